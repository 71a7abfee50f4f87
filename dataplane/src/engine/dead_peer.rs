//! Dead peer detection: tells a peer that vanished from one that is merely slow.
//!
//! TCP_USER_TIMEOUT cannot. It also cuts a peer that keeps its window shut for that long although
//! it answers every probe, and even one that opens it now and then by less than the segment that
//! waits, because the kernel's clock for window probes then runs on (net/ipv4/tcp_timer.c,
//! tcp_probe_timer; net/ipv4/tcp_input.c, tcp_ack_probe): a paused or a throttled download. So
//! while bytes wait, what the peer acknowledges decides; while none do, keepalive does. The
//! decision is pure; `idle` asks and acts.

use std::time::{Duration, Instant};

use crate::kernel::sys::TcpInfo;

/// What is known of one leg.
#[derive(Debug, Default)]
pub struct Leg {
    /// What the peer had acknowledged, and since when it has been no more than that although bytes
    /// are in flight.
    stuck: Option<(u64, Instant)>,
}

/// What a look at one leg says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finding {
    /// Nothing is under way: keepalive watches it, no further look is needed until bytes move.
    Quiet,
    /// Bytes wait for the peer.
    Waiting,
    /// They wait for nobody.
    Vanished,
}

/// Window probes that must have gone unanswered: one may be lost, or be in flight just now.
const UNANSWERED_PROBES: u8 = 2;

impl Leg {
    /// Judges the leg by a fresh [`TcpInfo`].
    pub fn judge(&mut self, info: &TcpInfo, now: Instant, dead_peer: Duration) -> Finding {
        if info.unacked == 0 {
            self.stuck = None;
            if info.notsent_bytes == 0 {
                return Finding::Quiet;
            }
        } else if self.stuck.is_none_or(|(acked, _)| acked != info.bytes_acked) {
            self.stuck = Some((info.bytes_acked, now));
        }
        // Silence before there was something to answer proves nothing, so both clocks have to run
        // out.
        let silent = Duration::from_millis(info.last_ack_recv.into()) >= dead_peer;
        let unanswered = info.probes >= UNANSWERED_PROBES
            || self.stuck.is_some_and(|(_, since)| now.saturating_duration_since(since) >= dead_peer);
        if silent && unanswered { Finding::Vanished } else { Finding::Waiting }
    }
}

/// How often to look while bytes move.
pub fn interval(dead_peer: Duration) -> Duration {
    (dead_peer / 4).max(Duration::from_millis(100))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEAD: Duration = Duration::from_secs(60);

    fn info(unacked: u32, notsent_bytes: u32, probes: u8, last_ack_recv: u32, bytes_acked: u64) -> TcpInfo {
        let mut info = TcpInfo::default();
        info.unacked = unacked;
        info.notsent_bytes = notsent_bytes;
        info.probes = probes;
        info.last_ack_recv = last_ack_recv;
        info.bytes_acked = bytes_acked;
        info
    }

    #[test]
    fn a_leg_with_empty_queues_is_quiet_however_long_its_peer_is_silent() {
        assert_eq!(Leg::default().judge(&info(0, 0, 0, 3_000_000, 9), Instant::now(), DEAD), Finding::Quiet);
    }

    #[test]
    fn a_shut_window_whose_peer_answers_is_never_dead() {
        let (mut leg, start) = (Leg::default(), Instant::now());
        for minute in 0..600 {
            let now = start + DEAD * minute;
            assert_eq!(leg.judge(&info(0, 100_000, 0, 119_000, 9), now, DEAD), Finding::Waiting);
            assert_eq!(leg.judge(&info(0, 100_000, 1, 119_000, 9), now, DEAD), Finding::Waiting);
        }
    }

    #[test]
    fn a_shut_window_whose_probes_go_unanswered_is_dead_after_the_timeout() {
        let mut leg = Leg::default();
        assert_eq!(leg.judge(&info(0, 100_000, 2, 59_000, 9), Instant::now(), DEAD), Finding::Waiting);
        assert_eq!(leg.judge(&info(0, 100_000, 2, 60_000, 9), Instant::now(), DEAD), Finding::Vanished);
    }

    #[test]
    fn bytes_in_flight_that_nobody_acknowledges_are_dead_after_the_timeout() {
        let (mut leg, start) = (Leg::default(), Instant::now());
        assert_eq!(leg.judge(&info(3, 0, 0, 15_000, 9), start, DEAD), Finding::Waiting);
        assert_eq!(leg.judge(&info(3, 0, 0, 59_000, 9), start + DEAD * 44 / 60, DEAD), Finding::Waiting);
        assert_eq!(leg.judge(&info(3, 0, 0, 75_000, 9), start + DEAD, DEAD), Finding::Vanished);
    }

    #[test]
    fn the_silence_before_the_first_byte_does_not_count() {
        let (mut leg, start) = (Leg::default(), Instant::now());
        assert_eq!(leg.judge(&info(1, 0, 0, 3_000_000, 9), start, DEAD), Finding::Waiting);
        assert_eq!(leg.judge(&info(1, 0, 0, 3_030_000, 9), start + DEAD / 2, DEAD), Finding::Waiting);
    }

    #[test]
    fn a_trickle_of_acknowledgements_keeps_a_peer_alive() {
        let (mut leg, start) = (Leg::default(), Instant::now());
        for look in 0..1000 {
            let now = start + DEAD / 4 * look;
            assert_eq!(leg.judge(&info(9, 100_000, 0, 14_000, look.into()), now, DEAD), Finding::Waiting);
        }
    }
}
