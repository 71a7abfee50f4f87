//! Socket filters of the sockmap's sockets. What is dropped here, before TCP has seen it, its
//! sender sends again.
//!
//! - Passed bytes behind redirected ones are charged to nobody, and the window stays open
//!   ([`is_over`]).
//! - Deleting a socket's entry while the verdict runs for it loses acknowledged bytes
//!   (net/core/sock_map.c takes no socket lock).
//! - When both FINs were exchanged the kernel takes a socket out of the map by itself, and passed
//!   bytes that were not read yet are lost.

use aya_ebpf::{
    EbpfContext, helpers::generated::bpf_get_socket_cookie, macros::socket_filter, programs::SkBuffContext,
};
use common::sockmap::governor::is_over;

use super::verdict::{BUDGET, KEYS, ROWS};

const FIN: u8 = 1;
const SYN: u8 = 1 << 1;
const RST: u8 = 1 << 2;

const DROP: i64 = 0;
const KEEP: i64 = -1;

/// Drops data while more is unread than is bounded.
#[socket_filter]
fn brake(ctx: SkBuffContext) -> i64 {
    match Segment::read(&ctx) {
        Some(segment) => verdict(!segment.has_data || !source_is_over(&ctx)),
        None => DROP,
    }
}

/// The same, and drops segments with a FIN.
#[socket_filter]
fn postpone_end(ctx: SkBuffContext) -> i64 {
    match Segment::read(&ctx) {
        Some(segment) => verdict(!segment.has(FIN) && (!segment.has_data || !source_is_over(&ctx))),
        None => DROP,
    }
}

/// Keeps segments that carry nothing but an acknowledgement or a reset, and drops the others.
#[socket_filter]
fn quiesce(ctx: SkBuffContext) -> i64 {
    match Segment::read(&ctx) {
        Some(segment) => verdict(segment.has(RST) || !(segment.has(SYN | FIN) || segment.has_data)),
        None => DROP,
    }
}

#[inline(always)]
fn verdict(keep: bool) -> i64 {
    if keep { KEEP } else { DROP }
}

/// What the header says (RFC 9293 section 3.1). The kernel has pulled the IP header by now
/// (net/ipv4/tcp_ipv4.c, `tcp_filter`).
struct Segment {
    flags: u8,
    has_data: bool,
}

impl Segment {
    #[inline(always)]
    fn read(ctx: &SkBuffContext) -> Option<Self> {
        // Length of the header in words of four bytes, four reserved bits, and the flags.
        let word = u16::from_be(ctx.load::<u16>(12).ok()?);
        Some(Self { flags: word as u8, has_data: ctx.len() > (word >> 12) as u32 * 4 })
    }

    #[inline(always)]
    fn has(&self, flags: u8) -> bool {
        self.flags & flags != 0
    }
}

#[inline(always)]
fn source_is_over(ctx: &SkBuffContext) -> bool {
    // SAFETY: `ctx` is the context of this call.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // SAFETY: the entry is a number, and stays for as long as the socket is in the map.
    let Some(key) = (unsafe { KEYS.get(cookie) }).copied() else { return false };
    let (Some(row), Some(budget)) = (ROWS.get(key), BUDGET.get(0)) else { return false };
    is_over(row, budget)
}
