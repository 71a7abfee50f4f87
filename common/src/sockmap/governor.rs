//! The rules by which the verdict program forwards a byte in the kernel or leaves it to the daemon.
//! Pure: rows and numbers in, a decision out.
//!
//! Why each rule is there:
//! - Nothing in the kernel bounds what is redirected to a socket that does not get rid of it
//!   (net/core/skmsg.c, `sk_psock_skb_redirect`). So a segment is redirected only when the sink's
//!   send buffer and the budget have room; else it is *passed*: then it is charged to the source's
//!   receive buffer, and TCP's own window slows the sender.
//! - A passed byte that the daemon has not yet sent on must not be overtaken: until `consumed`
//!   equals `passed`, everything is passed.
//! - The daemon sleeps while the kernel forwards. It is told when that ends, once: by the pass that
//!   finds nothing unconsumed before it.

use super::{Budget, Row};

/// Everything is passed; the daemon looks by itself.
pub const HOLD: u32 = 0;
/// Forward in the kernel where the rules allow; tell the daemon when they do not.
pub const RUN: u32 = 1;

/// Bit of [`Row::known`]: `next_seq` is valid.
pub const SEQ_KNOWN: u32 = 1;
/// Bit of [`Row::known`]: `base` is valid.
pub const BASE_KNOWN: u32 = 2;

/// What one queued segment costs besides its bytes: an sk_buff, its head, and what its page holds
/// in vain. One-byte segments cost 1 to 4 KiB each.
pub const SEGMENT_COST: u32 = 2048;

/// A run of so many bytes without an answer in the other direction is bulk, unless its segments are
/// small. Exchanges of a few hundred KiB stay in the kernel; a download of a megabyte pays for its
/// way out.
pub const BULK_BYTES: u32 = 256 * 1024;

/// A run ends when the other direction has carried more than this part of it.
pub const ANSWER: u32 = 16;

/// The mean segment of a run of bulk is larger than this: bulk fills its packets, or GRO its
/// segments.
pub const BULK_SEGMENT: u32 = 1000;

/// Why bytes are passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Reason {
    /// Earlier bytes are on the daemon's side, or it wants them there.
    Held = 0,
    /// The sink's send buffer or the budget is full.
    Slow = 1,
    /// Many bytes one way.
    Bulk = 2,
    /// The sink is not in the map (any more).
    NoSink = 3,
    /// More is unread than a receive buffer holds, although the [`is_over`] filter is there:
    /// nothing bounds it. The connection is lost; nothing more is kept.
    Flood = 4,
    /// The kernel did not do as it was told with acknowledged bytes. The connection is lost;
    /// nothing more is kept.
    Lost = 5,
}

impl Reason {
    /// As it is in [`Row::reason`].
    pub const fn from_u32(value: u32) -> Self {
        match value {
            1 => Self::Slow,
            2 => Self::Bulk,
            3 => Self::NoSink,
            4 => Self::Flood,
            5 => Self::Lost,
            _ => Self::Held,
        }
    }

    /// Whether the connection cannot go on.
    #[inline(always)]
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Flood | Self::Lost)
    }
}

/// What becomes of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// To the sink.
    Redirect,
    /// To the daemon.
    Pass {
        /// Tell the daemon.
        tell: bool,
    },
    /// To nobody; the connection is lost.
    Drop {
        /// Tell the daemon.
        tell: bool,
    },
}

/// What is read of the sink (struct sock, struct tcp_sock).
#[derive(Debug, Clone, Copy)]
pub struct Sink {
    /// `tcp_sock.write_seq`: the sequence number behind the last byte that its send queue has
    /// accepted.
    pub write_seq: u32,
    /// `sock.sk_wmem_queued`: memory in its send queue, bytes.
    pub wmem_queued: u32,
    /// `sock.sk_sndbuf`: the limit on that.
    pub sndbuf: u32,
}

/// How many bytes at the front of a segment came before. The kernel hands the program what a
/// retransmit brings again together with what is new (net/ipv4/tcp.c, `tcp_read_skb` does not look
/// at `copied_seq`). `copied_seq` is that of the source, asked once.
#[inline(always)]
pub fn overlap(row: &Row, seq: u32, len: u32, copied_seq: impl FnOnce() -> Option<u32>) -> u32 {
    let known = row.known.get();
    let next = if known & SEQ_KNOWN == 0 {
        let Some(copied_seq) = copied_seq() else { return 0 };
        row.known.set(known | SEQ_KNOWN);
        copied_seq
    } else {
        row.next_seq.get()
    };
    let before = next.wrapping_sub(seq);
    // Behind `next` there can be no segment: TCP delivers in order. Were there one, the count at
    // the end of the stream would tell.
    let before = if (before as i32) < 0 {
        0
    } else if before > len {
        len
    } else {
        before
    };
    row.next_seq.set(seq.wrapping_add(len).max_seq(next));
    if before > 0 {
        row.trimmed.set(row.trimmed.get().wrapping_add(before));
    }
    before
}

trait Sequence {
    /// The later of two sequence numbers (RFC 9293 section 3.4).
    fn max_seq(self, other: Self) -> Self;
}

impl Sequence for u32 {
    #[inline(always)]
    fn max_seq(self, other: Self) -> Self {
        if (self.wrapping_sub(other) as i32) < 0 { other } else { self }
    }
}

/// Whether more is unread than a receive buffer holds: then it is not charged to it. The kernel
/// queues passed bytes behind those that the other direction has redirected to the same socket, and
/// until its worker has got rid of these, the window stays open (net/core/skmsg.c). So what comes
/// is dropped *before* TCP sees it, and its sender sends it again.
#[inline(always)]
pub fn is_over(row: &Row, budget: &Budget) -> bool {
    // In this order: what is published between the two questions makes the difference larger, not
    // negative.
    let consumed = row.consumed.get();
    row.passed.get().wrapping_sub(consumed) > budget.unread.get() as u64
}

/// Decides on `len` new bytes of the source. The sink is asked when the daemon is known not to
/// write to it: what was read before that could lag behind what the daemon has published since.
#[inline(always)]
pub fn judge(row: &Row, opposite: &Row, budget: &Budget, len: u32, sink: impl FnOnce() -> Option<Sink>) -> Action {
    if Reason::from_u32(row.reason.get()).is_final() {
        return Action::Drop { tell: false };
    }
    let mode = row.mode.get();
    let unread = row.passed.get().wrapping_sub(row.consumed.get());
    if unread > budget.flood.get() as u64 {
        row.reason.set(Reason::Flood as u32);
        return Action::Drop { tell: true };
    }
    let reason = if mode == HOLD || unread != 0 {
        Reason::Held
    } else if let Some(sink) = sink() {
        match room(row, opposite, budget, len, sink) {
            None => {
                row.redirected.set(row.redirected.get().wrapping_add(len as u64));
                return Action::Redirect;
            }
            Some(reason) => reason,
        }
    } else {
        Reason::NoSink
    };
    if unread == 0 {
        row.reason.set(reason as u32);
    }
    // The daemon publishes `consumed` first and reads `passed` afterwards; here it is the other way
    // round. So one of both sees the other.
    let before = row.passed.add(len as u64);
    Action::Pass { tell: mode == RUN && row.consumed.get() == before }
}

/// Why the segment has to be passed, `None` when it may be redirected.
#[inline(always)]
fn room(row: &Row, opposite: &Row, budget: &Budget, len: u32, sink: Sink) -> Option<Reason> {
    let sent_on = row.redirected.get().wrapping_add(row.consumed.get()) as u32;
    let known = row.known.get();
    if known & BASE_KNOWN == 0 {
        // All that was passed is consumed, and nothing was redirected: the sink has it all.
        row.base.set(sink.write_seq.wrapping_sub(sent_on));
        row.segments_mark.set(sink.write_seq);
        row.known.set(known | BASE_KNOWN);
    }
    let end = row.base.get().wrapping_add(sent_on);
    let queued = end.wrapping_sub(sink.write_seq);

    // How many segments are queued is not told anywhere; a bound is: those counted since the last
    // mark but one, unless the last was reached.
    let mut before = row.segments_before.get();
    let mut after = row.segments_after.get();
    if sink.write_seq.wrapping_sub(row.segments_mark.get()) as i32 >= 0 {
        row.segments_mark.set(end);
        before = if queued == 0 { 0 } else { after };
        after = 0;
        row.segments_before.set(before);
    }
    let segments = before.wrapping_add(after);
    let cost = queued.saturating_add(len).saturating_add(segments.saturating_mul(SEGMENT_COST));
    // What is redirected must not have to wait for the peer: passed bytes of the other direction
    // queue behind it, and are charged to nobody there. The send queue costs more memory than it
    // holds bytes, the more so on older kernels, which copy.
    let memory = sink
        .wmem_queued
        .saturating_add(queued.saturating_add(len).saturating_mul(2))
        .saturating_add(segments.saturating_add(1).saturating_mul(SEGMENT_COST));
    if cost > budget.queue.get() || memory > sink.sndbuf {
        row.segments_after.set(after);
        return Some(Reason::Slow);
    }

    let other = opposite.redirected.get().wrapping_add(opposite.passed.get()) as u32;
    let (mut bytes, mut run) = (row.run_bytes.get(), row.run_segments.get());
    // What comes back in the course of a download, window updates for one, is no answer.
    if other.wrapping_sub(row.run_began.get()).saturating_mul(ANSWER) > bytes {
        row.run_began.set(other);
        (bytes, run) = (0, 0);
    }
    bytes = bytes.saturating_add(len);
    run = run.saturating_add(1);
    row.run_bytes.set(bytes);
    row.run_segments.set(run);
    row.segments_after.set(after.wrapping_add(1));
    let bulk = row.leave_on_bulk.get() != 0 && bytes > BULK_BYTES && bytes as u64 > run as u64 * BULK_SEGMENT as u64;
    if bulk { Some(Reason::Bulk) } else { None }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::collections::VecDeque;

    use super::*;

    const QUEUE: u32 = 64 * 1024;
    const UNREAD: u32 = 1 << 20;
    const FLOOD: u32 = 3 << 19;

    fn budget() -> Budget {
        let budget = Budget::default();
        budget.queue.set(QUEUE);
        budget.unread.set(UNREAD);
        budget.flood.set(FLOOD);
        budget
    }

    fn running() -> Row {
        let row = Row::default();
        row.mode.set(RUN);
        row
    }

    /// An idle sink with a large send buffer that has accepted so many bytes.
    fn idle(write_seq: u32) -> Sink {
        Sink { write_seq, wmem_queued: 0, sndbuf: 4 << 20 }
    }

    fn decide(row: &Row, len: u32, sink: Sink) -> Action {
        judge(row, &Row::default(), &budget(), len, || Some(sink))
    }

    fn reason(row: &Row) -> Reason {
        Reason::from_u32(row.reason.get())
    }

    const TOLD: Action = Action::Pass { tell: true };
    const UNTOLD: Action = Action::Pass { tell: false };

    #[test]
    fn a_segment_is_redirected_when_all_before_it_was_forwarded() {
        let row = running();
        assert_eq!(decide(&row, 100, idle(0)), Action::Redirect);
        assert_eq!((row.redirected.get(), row.passed.get()), (100, 0));
    }

    #[test]
    fn a_segment_is_passed_while_earlier_ones_are_unconsumed() {
        let row = running();
        row.passed.set(10);
        row.consumed.set(9);
        assert_eq!(decide(&row, 100, idle(0)), UNTOLD);
        assert_eq!((row.redirected.get(), row.passed.get()), (0, 110));
        row.consumed.set(110);
        assert_eq!(decide(&row, 100, idle(110)), Action::Redirect);
    }

    #[test]
    fn the_daemon_is_told_once_when_the_kernel_path_ends() {
        let row = running();
        let full = Sink { wmem_queued: 4 << 20, ..idle(0) };
        assert_eq!(decide(&row, 100, full), TOLD);
        assert_eq!(reason(&row), Reason::Slow);
        assert_eq!(decide(&row, 100, full), UNTOLD);
        assert_eq!(decide(&row, 100, idle(0)), UNTOLD);
        assert_eq!(reason(&row), Reason::Slow, "the first reason stays");
    }

    #[test]
    fn the_daemon_is_told_again_when_it_had_consumed_everything() {
        let row = running();
        let full = Sink { wmem_queued: 4 << 20, ..idle(0) };
        assert_eq!(decide(&row, 100, full), TOLD);
        row.consumed.set(100);
        assert_eq!(decide(&row, 100, full), TOLD);
    }

    #[test]
    fn on_hold_everything_is_passed_and_nothing_is_told() {
        let row = Row::default();
        assert_eq!(row.mode.get(), HOLD);
        for _ in 0..3 {
            assert_eq!(decide(&row, 100, idle(0)), UNTOLD);
            row.consumed.set(row.passed.get());
        }
        assert_eq!(reason(&row), Reason::Held);
    }

    #[test]
    fn of_a_lost_connection_nothing_is_kept() {
        let row = running();
        row.reason.set(Reason::Lost as u32);
        assert_eq!(decide(&row, 100, idle(0)), Action::Drop { tell: false });
        assert_eq!((row.passed.get(), row.redirected.get()), (0, 0));
    }

    #[test]
    fn without_a_sink_bytes_are_passed() {
        let row = running();
        assert_eq!(judge(&row, &Row::default(), &budget(), 100, || None), TOLD);
        assert_eq!(reason(&row), Reason::NoSink);
    }

    #[test]
    fn a_flood_is_dropped_and_told_once() {
        let row = running();
        row.passed.set(u64::from(FLOOD) + 1);
        assert_eq!(decide(&row, 100, idle(0)), Action::Drop { tell: true });
        assert_eq!(decide(&row, 100, idle(0)), Action::Drop { tell: false });
        assert_eq!(reason(&row), Reason::Flood);
        assert_eq!(row.passed.get(), u64::from(FLOOD) + 1, "what is dropped is not counted");
    }

    #[test]
    fn what_was_let_in_before_the_filter_closed_is_no_flood() {
        let row = running();
        row.passed.set(FLOOD.into());
        assert_eq!(decide(&row, 100, idle(0)), UNTOLD);
    }

    #[test]
    fn over_is_what_a_receive_buffer_does_not_hold() {
        let row = running();
        row.passed.set(u64::from(UNREAD) + 7);
        assert!(is_over(&row, &budget()));
        row.consumed.set(7);
        assert!(!is_over(&row, &budget()));
    }

    #[test]
    fn a_flood_is_told_on_hold_too() {
        let row = Row::default();
        row.passed.set(2 << 20);
        assert_eq!(decide(&row, 100, idle(0)), Action::Drop { tell: true });
    }

    #[test]
    fn a_segment_that_does_not_fit_the_send_buffer_is_passed() {
        let sink = |wmem_queued| Sink { wmem_queued, sndbuf: 10_000 + 2_000 + SEGMENT_COST, write_seq: 0 };
        assert_eq!(decide(&running(), 1_000, sink(10_000)), Action::Redirect);
        assert_eq!(decide(&running(), 1_000, sink(10_001)), TOLD);
    }

    #[test]
    fn what_is_queued_already_needs_room_in_the_send_buffer_too() {
        let row = running();
        let sink = Sink { write_seq: 0, wmem_queued: 0, sndbuf: 2 * (2_500 + SEGMENT_COST) };
        assert_eq!(decide(&row, 1_000, sink), Action::Redirect);
        assert_eq!(decide(&row, 1_000, sink), Action::Redirect);
        assert_eq!(decide(&row, 1_000, sink), TOLD);
    }

    #[test]
    fn a_segment_larger_than_the_budget_is_passed() {
        assert_eq!(decide(&running(), QUEUE, idle(0)), Action::Redirect);
        assert_eq!(decide(&running(), QUEUE + 1, idle(0)), TOLD);
    }

    #[test]
    fn one_byte_segments_count_for_their_overhead() {
        let row = running();
        let redirected = (0..1_000).take_while(|_| decide(&row, 1, idle(0)) == Action::Redirect).count();
        assert_eq!(redirected as u32, QUEUE / SEGMENT_COST);
        assert_eq!(reason(&row), Reason::Slow);
    }

    #[test]
    fn a_sink_that_keeps_up_never_ends_the_kernel_path() {
        let row = running();
        for sent in 0..10_000 {
            assert_eq!(decide(&row, 1, idle(sent)), Action::Redirect);
        }
    }

    #[test]
    fn the_base_is_learned_once_and_is_right_after_passes() {
        let row = running();
        // The daemon has forwarded 300 bytes before the first is redirected.
        row.passed.set(300);
        row.consumed.set(300);
        let before = 0_u32.wrapping_sub(100);
        let write_seq = before.wrapping_add(300);
        assert_eq!(decide(&row, 1_000, idle(write_seq)), Action::Redirect);
        assert_eq!((row.known.get() & BASE_KNOWN, row.base.get()), (BASE_KNOWN, before));
        // Then another 50.
        row.passed.set(350);
        row.consumed.set(350);
        let write_seq = before.wrapping_add(1_350);
        let tight = Sink { write_seq, wmem_queued: 0, sndbuf: 20 + SEGMENT_COST };
        assert_eq!(decide(&row, 10, tight), Action::Redirect, "nothing is queued");
        assert_eq!(row.base.get(), before);
    }

    /// The bound on queued segments, after each of many random steps.
    #[test]
    fn never_fewer_segments_are_counted_than_are_queued() {
        let mut state = 1_u64;
        let mut below = |n: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % n
        };
        for _ in 0..300 {
            let row = running();
            let base = 0_u32.wrapping_sub(below(100_000) as u32);
            let (mut sent, mut queued) = (0_u64, VecDeque::new());
            for _ in 0..500 {
                if below(2) == 0 {
                    // The worker sends some: whole segments, or a part of one.
                    let mut n = below(3_000);
                    while n > 0
                        && let Some(head) = queued.front_mut()
                    {
                        let now = n.min(*head);
                        (n, *head, sent) = (n - now, *head - now, sent + now);
                        if *head == 0 {
                            queued.pop_front();
                        }
                    }
                } else if below(10) == 0 {
                    // What is passed is forwarded behind all that is queued.
                    sent += queued.drain(..).sum::<u64>() + 77;
                    row.passed.set(row.passed.get() + 77);
                    row.consumed.set(row.consumed.get() + 77);
                } else {
                    let len = 1 + below(1_500);
                    match decide(&row, len as u32, idle(base.wrapping_add(sent as u32))) {
                        Action::Redirect => queued.push_back(len),
                        action => {
                            // Not counted as passed here: nobody would consume it.
                            assert_eq!(action, TOLD);
                            row.passed.set(row.consumed.get());
                        }
                    }
                    let counted = row.segments_before.get() + row.segments_after.get();
                    assert!(counted as usize >= queued.len(), "{counted} {}", queued.len());
                    let cost = queued.iter().sum::<u64>() + queued.len() as u64 * u64::from(SEGMENT_COST);
                    assert!(cost <= u64::from(QUEUE + SEGMENT_COST), "{cost}");
                }
            }
        }
    }

    #[test]
    fn segments_that_were_sent_are_forgotten() {
        let row = running();
        for _ in 0..10 {
            assert_eq!(decide(&row, 10, idle(0)), Action::Redirect);
        }
        assert_eq!(decide(&row, 10, idle(100)), Action::Redirect);
        assert_eq!(row.segments_before.get() + row.segments_after.get(), 1);
    }

    #[test]
    fn an_overlap_is_cut_off() {
        let row = Row::default();
        let once = || Some(1_000);
        let again = || panic!("asked twice");
        assert_eq!(overlap(&row, 1_000, 500, once), 0);
        assert_eq!(overlap(&row, 1_400, 300, again), 100);
        assert_eq!(overlap(&row, 1_700, 10, again), 0);
        assert_eq!(row.trimmed.get(), 100);
    }

    #[test]
    fn a_half_read_segment_is_cut_where_reading_stopped() {
        let row = Row::default();
        assert_eq!(overlap(&row, 1_000, 500, || Some(1_200)), 200);
        assert_eq!(overlap(&row, 1_500, 500, || None), 0);
    }

    #[test]
    fn a_segment_that_came_before_is_cut_off_whole() {
        let row = Row::default();
        assert_eq!(overlap(&row, 1_000, 500, || Some(1_000)), 0);
        assert_eq!(overlap(&row, 1_000, 500, || None), 500);
        assert_eq!(overlap(&row, 900, 200, || None), 200);
        assert_eq!(overlap(&row, 1_500, 1, || None), 0, "the next byte is still the next");
    }

    #[test]
    fn overlaps_are_cut_off_where_sequence_numbers_wrap() {
        let row = Row::default();
        let start = 0_u32.wrapping_sub(100);
        assert_eq!(overlap(&row, start, 300, || Some(start)), 0);
        assert_eq!(row.next_seq.get(), 200);
        assert_eq!(overlap(&row, start.wrapping_add(50), 200, || None), 200);
        assert_eq!(overlap(&row, 0_u32.wrapping_sub(10), 220, || None), 210);
        assert_eq!(row.next_seq.get(), 210);
    }

    #[test]
    fn without_a_position_nothing_is_cut_off() {
        let row = Row::default();
        assert_eq!(overlap(&row, 1_000, 500, || None), 0);
        assert_eq!(row.known.get() & SEQ_KNOWN, 0);
    }

    /// How many segments of this size a sink that keeps up gets before bytes are passed.
    fn run_of(row: &Row, other: &Row, len: u32, most: u32) -> u32 {
        let passed = |_: &u32| {
            let sink = idle(row.redirected.get() as u32);
            judge(row, other, &budget(), len, || Some(sink)) != Action::Redirect
        };
        (0..most).find(passed).unwrap_or(most)
    }

    #[test]
    fn a_run_of_bulk_leaves_the_kernel() {
        let row = running();
        row.leave_on_bulk.set(1);
        assert_eq!(run_of(&row, &Row::default(), 1_448, 1_000), BULK_BYTES / 1_448);
        assert_eq!(reason(&row), Reason::Bulk);
    }

    #[test]
    fn a_run_ends_when_the_other_direction_answers() {
        let (row, other) = (running(), running());
        row.leave_on_bulk.set(1);
        for exchange in 0..20 {
            assert_eq!(run_of(&row, &other, 1_448, 100), 100, "{exchange}");
            // By either way.
            let answer = 100 * 1_448 / u64::from(ANSWER) + 1;
            other.redirected.set(other.redirected.get() + exchange % 2 * answer);
            other.passed.set(other.passed.get() + (1 - exchange % 2) * answer);
        }
    }

    #[test]
    fn window_updates_do_not_end_a_run() {
        let (row, other) = (running(), running());
        row.leave_on_bulk.set(1);
        // A first answer begins the run.
        other.redirected.set(500);
        let mut segments = 0;
        while segments < 10_000 && run_of(&row, &other, 1_448, 45) == 45 {
            segments += 45;
            other.redirected.set(other.redirected.get() + 40);
        }
        assert!(segments <= BULK_BYTES / 1_448, "{segments}");
    }

    #[test]
    fn small_segments_are_no_bulk() {
        let row = running();
        row.leave_on_bulk.set(1);
        assert_eq!(run_of(&row, &Row::default(), BULK_SEGMENT, 1_000), 1_000);
    }

    #[test]
    fn bulk_stays_in_the_kernel_unless_it_is_to_leave() {
        assert_eq!(run_of(&running(), &Row::default(), 1_448, 1_000), 1_000);
    }

    #[test]
    fn reasons_are_read_as_they_were_written() {
        for reason in [Reason::Held, Reason::Slow, Reason::Bulk, Reason::NoSink, Reason::Flood, Reason::Lost] {
            assert_eq!(Reason::from_u32(reason as u32), reason);
        }
    }
}
