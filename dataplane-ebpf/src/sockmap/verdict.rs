//! The stream verdict of the sockmap: what becomes of each skb that a forwarded socket receives.
//!
//! The kernel runs it with the receiving socket locked (net/core/skmsg.c, `sk_psock_verdict_recv`).
//! It reads what the rules of [`common::sockmap::governor`] ask for, and does what they say.

use core::ptr::{addr_of, read_volatile};

use aya_ebpf::{
    EbpfContext,
    bindings::{
        __sk_buff,
        sk_action::{SK_DROP, SK_PASS},
    },
    helpers::generated::{
        bpf_get_socket_cookie, bpf_ktime_get_coarse_ns, bpf_map_lookup_elem, bpf_sk_release, bpf_skb_adjust_room,
        bpf_skc_to_tcp_sock,
    },
    macros::{map, stream_verdict},
    maps::{Array, HashMap, RingBuf, SockMap},
    programs::SkBuffContext,
};
use common::sockmap::governor::{self, Action, Reason, Sink};
use common::sockmap::{Budget, Row};

// The loader says how many entries the maps have.

/// The forwarded sockets.
#[map]
static SOCKS: SockMap = SockMap::with_max_entries(2, 0);

/// Cookie of a socket to its key.
#[map]
pub static KEYS: HashMap<u64, u32> = HashMap::with_max_entries(2, BPF_F_NO_PREALLOC);

/// What is counted of each direction.
#[map]
pub static ROWS: Array<Row> = Array::with_max_entries(2, BPF_F_MMAPABLE);

/// Limits.
#[map]
pub static BUDGET: Array<Budget> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Keys of directions that left the kernel's path.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(common::sockmap::events_bytes(2), 0);

/// include/uapi/linux/bpf.h
const BPF_F_NO_PREALLOC: u32 = 1;
const BPF_F_MMAPABLE: u32 = 1 << 10;

/// Byte offsets in the running kernel's structures. The loader freezes them, so that the verifier
/// takes them for constants.
#[unsafe(no_mangle)]
static OFFSET_WRITE_SEQ: u32 = 0;
#[unsafe(no_mangle)]
static OFFSET_COPIED_SEQ: u32 = 0;
#[unsafe(no_mangle)]
static OFFSET_WMEM_QUEUED: u32 = 0;
#[unsafe(no_mangle)]
static OFFSET_SNDBUF: u32 = 0;

/// Redirects, passes or drops.
#[stream_verdict]
fn verdict(ctx: SkBuffContext) -> u32 {
    let len = ctx.len();
    // A FIN without data comes as an skb without length. The socket has seen the end of its stream
    // already: `recv` returns 0 all the same. Queued behind data that another socket sent here,
    // such an skb ends the connection with ECONNRESET.
    if len == 0 {
        return SK_DROP;
    }
    // SAFETY: `ctx` is the context of this call.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // SAFETY: the entry is a number, and stays for as long as the socket is in the map.
    let Some(key) = (unsafe { KEYS.get(cookie) }).copied() else { return SK_PASS };
    let (Some(row), Some(opposite), Some(budget)) = (ROWS.get(key), ROWS.get(key ^ 1), BUDGET.get(0)) else {
        return SK_PASS;
    };
    // SAFETY: the helper has no arguments.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    row.last_ms.set((now / 1_000_000) as u32);

    // The first word of the control block is the sequence number of the first byte (struct
    // tcp_skb_cb, include/net/tcp.h). SAFETY: the kernel maps `cb` of the context to the skb's
    // control block.
    let seq = unsafe { read_volatile(addr_of!((*ctx.skb.skb).cb[0])) };
    let before = governor::overlap(row, seq, len, || copied_seq(&ctx));
    if before > 0 && !trim(ctx.skb.skb, before) {
        return lose(row, key);
    }
    let len = len - before;
    if len == 0 {
        // Cut to nothing first: a drop advances `copied_seq` by what is left of the segment
        // (net/core/skmsg.c, `sk_psock_verdict_apply`).
        return SK_DROP;
    }

    match governor::judge(row, opposite, budget, len, || sink(key ^ 1)) {
        Action::Redirect => {
            // SAFETY: the context and the map are what the helper asks for.
            match unsafe { SOCKS.redirect_skb(&ctx, key ^ 1, 0) } as u32 {
                SK_PASS => SK_PASS,
                // The sink has left between the look at it and now.
                _ => lose(row, key),
            }
        }
        Action::Pass { tell } => {
            told(key, tell);
            SK_PASS
        }
        Action::Drop { tell } => {
            told(key, tell);
            SK_DROP
        }
    }
}

/// Acknowledged bytes go; so does the connection, as soon as the daemon has seen it.
fn lose(row: &Row, key: u32) -> u32 {
    row.reason.set(Reason::Lost as u32);
    told(key, true);
    SK_DROP
}

fn told(key: u32, tell: bool) {
    if tell {
        // There is room: see `common::sockmap::events_bytes`.
        let _ = EVENTS.output::<u32>(key, 0);
    }
}

/// `copied_seq` of the socket that has received this.
#[inline(always)]
fn copied_seq(ctx: &SkBuffContext) -> Option<u32> {
    // SAFETY: the kernel maps `sk` of the context to the skb's socket, or null.
    let socket = unsafe { (*ctx.skb.skb).__bindgen_anon_2.sk };
    if socket.is_null() {
        return None;
    }
    // SAFETY: `socket` is not null; the helper's result is checked.
    let tcp = unsafe { bpf_skc_to_tcp_sock(socket.cast()) };
    // SAFETY: a `tcp_sock`, and an offset within it.
    (!tcp.is_null()).then(|| unsafe { load(tcp.cast(), addr_of!(OFFSET_COPIED_SEQ)) })
}

/// Reads the sink, if it is in the map.
#[inline(always)]
fn sink(key: u32) -> Option<Sink> {
    // SAFETY: map and key are what the helper asks for; what it gives is null or a socket that has
    // to be released.
    let socket = unsafe { bpf_map_lookup_elem(addr_of!(SOCKS).cast_mut().cast(), addr_of!(key).cast()) };
    if socket.is_null() {
        return None;
    }
    // SAFETY: `socket` is held until it is released; the helper's result is checked.
    unsafe {
        let tcp = bpf_skc_to_tcp_sock(socket);
        let sink = if tcp.is_null() {
            None
        } else {
            let tcp = tcp.cast();
            Some(Sink {
                write_seq: load(tcp, addr_of!(OFFSET_WRITE_SEQ)),
                wmem_queued: load(tcp, addr_of!(OFFSET_WMEM_QUEUED)),
                sndbuf: load(tcp, addr_of!(OFFSET_SNDBUF)),
            })
        };
        bpf_sk_release(socket);
        sink
    }
}

/// # Safety
/// `structure` is one of the kernel's of which the verifier knows the type; it checks the offset.
#[inline(always)]
unsafe fn load(structure: *const u8, offset: *const u32) -> u32 {
    // Volatile: the compiler must not fold the zero that the loader replaces, nor merge loads of a
    // running kernel's memory.
    unsafe { read_volatile(structure.add(read_volatile(offset) as usize).cast()) }
}

/// Cuts bytes off the front; false when not all could be. A function of its own: in line, the
/// verifier of older kernels follows the rest of the program for each turn of the loop.
#[inline(never)]
fn trim(skb: *mut __sk_buff, bytes: u32) -> bool {
    // What one call takes (net/core/filter.c, `sk_skb_adjust_room`).
    const MOST: u32 = 0xfff;
    // 4 MiB: TCP joins segments that wait for a lock or for one that is missing
    // (net/ipv4/tcp_ipv4.c, `tcp_add_backlog`; net/ipv4/tcp_input.c, `tcp_ooo_try_coalesce`), as
    // many as the 17 fragments of an skb hold. 197 KB that had come before were seen.
    const TURNS: u32 = 1024;
    let (whole, rest) = (bytes / MOST, bytes % MOST);
    for turn in 0..TURNS {
        if turn == whole {
            return rest == 0 || cut(skb, rest);
        }
        if !cut(skb, MOST) {
            return false;
        }
    }
    false
}

#[inline(always)]
fn cut(skb: *mut __sk_buff, bytes: u32) -> bool {
    // SAFETY: `skb` is the context of this call.
    unsafe { bpf_skb_adjust_room(skb, -(bytes as i32), 0, 0) == 0 }
}
