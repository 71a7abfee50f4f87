//! Socket filters for a socket that has to leave the sockmap. What is dropped here, before TCP has seen it, its sender sends again.
//!
//! - Deleting a socket's entry while the verdict runs for it loses acknowledged bytes (net/core/sock_map.c takes no socket lock).
//! - When both FINs were exchanged the kernel takes a socket out of the map by itself, and passed bytes that were not read yet are lost.

use aya_ebpf::{macros::socket_filter, programs::SkBuffContext};

const FIN: u8 = 1;
const SYN: u8 = 1 << 1;
const RST: u8 = 1 << 2;

const DROP: i64 = 0;
const KEEP: i64 = -1;

/// Keeps segments that carry nothing but an acknowledgement or a reset, and drops the others.
#[socket_filter]
fn quiesce(ctx: SkBuffContext) -> i64 {
    let Some((header, flags)) = header(&ctx) else { return DROP };
    if flags & RST != 0 || (flags & (SYN | FIN) == 0 && ctx.len() <= header) { KEEP } else { DROP }
}

/// Drops segments with a FIN.
#[socket_filter]
fn postpone_end(ctx: SkBuffContext) -> i64 {
    match header(&ctx) {
        Some((_, flags)) if flags & FIN == 0 => KEEP,
        _ => DROP,
    }
}

/// Length of the TCP header, and its flags (RFC 9293 section 3.1). The kernel has pulled the IP header by now (net/ipv4/tcp_ipv4.c, `tcp_filter`).
#[inline(always)]
fn header(ctx: &SkBuffContext) -> Option<(u32, u8)> {
    let (Ok(offset), Ok(flags)) = (ctx.load::<u8>(12), ctx.load::<u8>(13)) else { return None };
    Some(((offset >> 4) as u32 * 4, flags))
}
