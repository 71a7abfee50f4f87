//! A socket filter that keeps data away from a socket while it is taken out of the sockmap.
//!
//! Deleting a socket's entry while the verdict runs for it loses acknowledged bytes (net/core/sock_map.c takes no socket lock). What is dropped here, before
//! TCP has seen it, its sender sends again.

use aya_ebpf::{macros::socket_filter, programs::SkBuffContext};

const FIN: u8 = 1;
const SYN: u8 = 1 << 1;
const RST: u8 = 1 << 2;

/// Keeps segments that carry nothing but an acknowledgement or a reset, and drops the others.
#[socket_filter]
fn quiesce(ctx: SkBuffContext) -> i64 {
    const DROP: i64 = 0;
    const KEEP: i64 = -1;
    // The kernel has pulled the IP header by now: RFC 9293 section 3.1 is what is left (net/ipv4/tcp_ipv4.c, `tcp_filter`).
    let (Ok(offset), Ok(flags)) = (ctx.load::<u8>(12), ctx.load::<u8>(13)) else { return DROP };
    let header = (offset >> 4) as u32 * 4;
    if flags & RST != 0 || (flags & (SYN | FIN) == 0 && ctx.len() <= header) { KEEP } else { DROP }
}
