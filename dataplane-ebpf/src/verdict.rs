//! The stream verdict of the sockmap: what becomes of each skb that a forwarded socket receives.
//!
//! The kernel runs it with the receiving socket locked (net/core/skmsg.c, `sk_psock_verdict_recv`).

use aya_ebpf::{
    bindings::sk_action,
    macros::{map, stream_verdict},
    maps::SockMap,
    programs::SkBuffContext,
};

/// The forwarded sockets.
#[map]
static SOCKS: SockMap = SockMap::with_max_entries(common::SOCKS_MAX_ENTRIES, 0);

/// Leaves every byte to userspace, and drops a bare FIN.
#[stream_verdict]
fn verdict(ctx: SkBuffContext) -> u32 {
    // A FIN without data comes as an skb without length. The socket has seen the end of its stream already: `recv` returns 0 all the same.
    // Queued behind data that another socket sent here, such an skb ends the connection with ECONNRESET.
    if ctx.len() == 0 {
        return sk_action::SK_DROP;
    }
    sk_action::SK_PASS
}
