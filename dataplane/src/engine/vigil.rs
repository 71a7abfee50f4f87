//! Tells a peer that vanished from one that is merely slow.
//!
//! TCP_USER_TIMEOUT alone cannot: it also cuts a peer that keeps its window shut for that long although it answers every probe
//! (net/ipv4/tcp_timer.c, tcp_probe_timer), a paused download for example. So both legs carry it, and while a leg waits on a shut
//! window it is taken off and the answers to the window probes decide instead. The decision is pure; `relay` asks and acts.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};

use crate::sys::TcpInfo;

/// What a look at one leg says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finding {
    /// Nothing is under way: keepalive watches it, no further look is needed until bytes move.
    Quiet,
    /// Bytes are under way; TCP_USER_TIMEOUT watches them.
    Sending,
    /// The peer's window is shut; TCP_USER_TIMEOUT would cut it, so it has to be off.
    WindowShut,
    /// The peer's window is shut, and it stopped answering the probes.
    Vanished,
}

/// Window probes that must have gone unanswered: one may be lost, or be in flight just now.
const UNANSWERED_PROBES: u8 = 2;

/// Judges one leg.
pub fn judge(info: &TcpInfo, dead_peer: Duration) -> Finding {
    if info.unacked == 0 && info.notsent_bytes == 0 {
        return Finding::Quiet;
    }
    // Unsent bytes with none in flight: the kernel is in the persist state. In flight with a window of zero: the peer shrank it.
    let shut = if info.unacked == 0 { info.notsent_bytes > 0 } else { info.snd_wnd == 0 };
    if !shut {
        Finding::Sending
    } else if info.probes >= UNANSWERED_PROBES && Duration::from_millis(info.last_ack_recv.into()) >= dead_peer {
        Finding::Vanished
    } else {
        Finding::WindowShut
    }
}

/// How often to look while bytes move: often enough that TCP_USER_TIMEOUT is taken off before it fires.
pub fn interval(dead_peer: Duration) -> Duration {
    (dead_peer / 4).max(Duration::from_millis(100))
}

/// Sets keepalive and TCP_USER_TIMEOUT so that a silent peer is noticed after `dead_peer`. A listener passes them on to what it accepts.
pub fn arm(socket: impl AsFd, dead_peer: Duration) -> io::Result<()> {
    let socket = SockRef::from(&socket);
    let seconds = dead_peer.as_secs().max(1);
    // Half of the time idle, the other half for three probes. TCP_USER_TIMEOUT overrides the count (tcp(7)).
    let idle = (seconds / 2).max(1);
    let interval = ((seconds - seconds.min(idle)) / 3).max(1);
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(Duration::from_secs(idle))
            .with_interval(Duration::from_secs(interval))
            .with_retries(3),
    )?;
    socket.set_tcp_user_timeout(Some(dead_peer))
}

/// Puts TCP_USER_TIMEOUT on or takes it off.
pub fn set_user_timeout(socket: impl AsFd, timeout: Option<Duration>) -> io::Result<()> {
    SockRef::from(&socket).set_tcp_user_timeout(timeout)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEAD: Duration = Duration::from_secs(60);

    fn info(unacked: u32, notsent_bytes: u32, snd_wnd: u32, probes: u8, last_ack_recv: u32) -> TcpInfo {
        let mut info = TcpInfo::default();
        info.unacked = unacked;
        info.notsent_bytes = notsent_bytes;
        info.snd_wnd = snd_wnd;
        info.probes = probes;
        info.last_ack_recv = last_ack_recv;
        info
    }

    #[test]
    fn a_leg_with_empty_queues_is_quiet() {
        assert_eq!(judge(&info(0, 0, 65_535, 0, 3_000_000), DEAD), Finding::Quiet);
    }

    #[test]
    fn bytes_in_flight_are_left_to_the_user_timeout() {
        assert_eq!(judge(&info(10, 100_000, 65_535, 0, 70_000), DEAD), Finding::Sending);
    }

    #[test]
    fn a_shut_window_whose_peer_answers_is_never_dead() {
        assert_eq!(judge(&info(0, 100_000, 0, 0, 119_000), DEAD), Finding::WindowShut);
        assert_eq!(judge(&info(0, 100_000, 0, 1, 119_000), DEAD), Finding::WindowShut);
        assert_eq!(judge(&info(0, 100_000, 400, 0, 10), DEAD), Finding::WindowShut);
        assert_eq!(judge(&info(3, 100_000, 0, 0, 10), DEAD), Finding::WindowShut);
    }

    #[test]
    fn a_shut_window_whose_probes_go_unanswered_is_dead_after_the_timeout() {
        assert_eq!(judge(&info(0, 100_000, 0, 2, 59_000), DEAD), Finding::WindowShut);
        assert_eq!(judge(&info(0, 100_000, 0, 2, 60_000), DEAD), Finding::Vanished);
    }
}
