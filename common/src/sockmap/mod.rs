//! The sockmap engine: names, the shape of shared memory, and the [`governor`]'s rules.

pub mod governor;

use crate::{Long, Word};

/// The stream verdict program.
pub const VERDICT: &str = "verdict";

/// The socket filter of every socket in the map: lets in no more than is bounded.
pub const BRAKE: &str = "brake";

/// The socket filter that keeps data away from a socket for a moment.
pub const QUIESCE: &str = "quiesce";

/// [`BRAKE`], which keeps the end of the stream away, too.
pub const POSTPONE_END: &str = "postpone_end";

/// The forwarded sockets, to which [`VERDICT`] is attached. Key: the [`Row`] of which the socket is
/// the source.
pub const SOCKS: &str = "SOCKS";

/// From a socket's cookie to its key in [`SOCKS`].
pub const KEYS: &str = "KEYS";

/// One [`Row`] a direction. Those of one connection are neighbours: the key of a socket's peer is
/// its own with the lowest bit flipped.
pub const ROWS: &str = "ROWS";

/// One [`Budget`].
pub const BUDGET: &str = "BUDGET";

/// A ring buffer of `u32`s: keys whose direction left the kernel's path.
pub const EVENTS: &str = "EVENTS";

/// Bytes of [`EVENTS`] for so many keys: an event is 16 bytes there, and a direction has one at a
/// time, or two while the daemon is late to look. Were there ever more, the daemon would see the
/// row itself at its next look, within seconds.
pub const fn events_bytes(keys: u32) -> u32 {
    let bytes = (keys * 32).next_power_of_two();
    // A whole number of pages, however large a page is.
    if bytes < 65_536 { 65_536 } else { bytes }
}

/// The globals that hold byte offsets in the running kernel's structures.
pub mod offset {
    /// `tcp_sock.write_seq`
    pub const WRITE_SEQ: &str = "OFFSET_WRITE_SEQ";
    /// `tcp_sock.copied_seq`
    pub const COPIED_SEQ: &str = "OFFSET_COPIED_SEQ";
    /// `sock.sk_wmem_queued`
    pub const WMEM_QUEUED: &str = "OFFSET_WMEM_QUEUED";
    /// `sock.sk_sndbuf`
    pub const SNDBUF: &str = "OFFSET_SNDBUF";
}

/// One direction of a forwarded connection: bytes that its *source* receives, for its *sink*.
/// Positions count bytes since the source went into [`SOCKS`].
///
/// While the source is in the map, the first cache line is written by [`VERDICT`] alone, which the
/// kernel runs with the source locked, the second by the daemon alone.
#[repr(C, align(64))]
#[derive(Debug, Default)]
pub struct Row {
    /// Bytes left to the daemon.
    pub passed: Long,
    /// Bytes sent on to the sink inside the kernel.
    pub redirected: Long,
    /// When the last byte came: milliseconds of CLOCK_MONOTONIC_COARSE, modulo 2³².
    pub last_ms: Word,
    /// TCP sequence number of the next byte; valid with [`governor::SEQ_KNOWN`].
    pub next_seq: Word,
    /// `write_seq` of the sink when nothing of this direction had been sent to it; valid with
    /// [`governor::BASE_KNOWN`].
    pub base: Word,
    /// What is known already.
    pub known: Word,
    /// Why the direction last left the kernel's path: a [`governor::Reason`].
    pub reason: Word,
    /// Bytes redirected since the other direction last answered.
    pub run_bytes: Word,
    /// Segments of that run.
    pub run_segments: Word,
    /// All bytes of the other direction when the run began, modulo 2³².
    pub run_began: Word,
    /// `write_seq` of the sink at which all segments counted in `segments_before` are sent.
    pub segments_mark: Word,
    /// Segments redirected between the last mark but one and the last.
    pub segments_before: Word,
    /// Segments redirected since the last mark.
    pub segments_after: Word,
    /// Bytes cut off because they had come before.
    pub trimmed: Word,

    /// Passed bytes that the sink has accepted from the daemon.
    pub consumed: Long,
    /// [`governor::HOLD`] or [`governor::RUN`].
    pub mode: Word,
    /// Whether a run of bulk leaves the kernel's path.
    pub leave_on_bulk: Word,
    spare: [u64; 6],
}

/// What all directions share; written by the daemon.
#[repr(C, align(64))]
#[derive(Debug, Default)]
pub struct Budget {
    /// What one direction may have queued on its way to the sink's send buffer, bytes, overhead
    /// included.
    pub queue: Word,
    /// How many bytes of a direction may be unread: more than any receive buffer holds. [`BRAKE`]
    /// lets no more in until some were read.
    pub unread: Word,
    /// With so many the connection is given up: more than [`BRAKE`] can have let in.
    pub flood: Word,
    spare: [u32; 13],
}
