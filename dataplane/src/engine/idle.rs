//! When to look at a connection that nothing woke: idle timeout and vanished peers, with one timer
//! that rests while nothing moves.
//!
//! Knows neither how bytes move nor who forwards them.

use std::os::fd::AsFd;
use std::time::Duration;

use tokio::time::Instant;

use super::dead_peer::{self, Finding, Leg};
use super::pair::{End, Side, Timeouts};
use crate::kernel::{socket, sys};

/// How often to see whether a slow reader has taken the last bytes of a connection that has ended
/// otherwise.
const TAIL_TICK: Duration = Duration::from_millis(500);

pub struct IdleTimer {
    timeouts: Timeouts,
    last_bytes: Instant,
    /// When to look at the legs; `None` while both are quiet.
    next_look: Option<Instant>,
    legs: [Leg; 2],
    /// What each peer had acknowledged when it was last looked at.
    acknowledged: [Option<u64>; 2],
    /// Keepalive is on. Most connections end before the first look, and are spared the system
    /// calls.
    keep_alive: bool,
    /// Nobody tells when bytes move: look all the time.
    unattended: bool,
    /// Since when one side has sent FIN.
    half_closed: Option<Instant>,
}

impl IdleTimer {
    /// For a connection of which every byte is noticed by [`bytes_moved`](Self::bytes_moved);
    /// `last_bytes`: when some last did.
    pub fn new(timeouts: Timeouts, last_bytes: std::time::Instant) -> Self {
        let now = Instant::now();
        Self {
            timeouts,
            last_bytes: now.min(last_bytes.into()),
            next_look: Some(now + dead_peer::interval(timeouts.dead_peer)),
            legs: [Leg::default(), Leg::default()],
            acknowledged: [None; 2],
            keep_alive: false,
            unattended: false,
            half_closed: None,
        }
    }

    /// For one whose bytes the kernel moves: looks at it for as long as it lives.
    pub fn unattended(timeouts: Timeouts, last_bytes: std::time::Instant) -> Self {
        Self { unattended: true, ..Self::new(timeouts, last_bytes) }
    }

    /// When to call [`look`](Self::look).
    pub fn deadline(&self) -> Instant {
        let idle = self.idle_at();
        self.next_look.map_or(idle, |look| look.min(idle))
    }

    /// Notes that one side has sent FIN; true when the timer has to be set anew.
    pub fn half_closed(&mut self, now: Instant) -> bool {
        let is_news = self.half_closed.is_none();
        self.half_closed.get_or_insert(now);
        is_news
    }

    /// When it will have been idle for too long.
    fn idle_at(&self) -> Instant {
        let idle = self.last_bytes + self.timeouts.idle;
        match self.half_closed {
            Some(since) => idle.min(self.last_bytes.max(since) + self.timeouts.half_closed),
            None => idle,
        }
    }

    /// Notes that bytes moved; true when the timer has to be set anew.
    pub fn bytes_moved(&mut self, at: Instant) -> bool {
        self.last_bytes = at;
        let was_quiet = self.next_look.is_none();
        if was_quiet {
            self.next_look = Some(self.last_bytes + dead_peer::interval(self.timeouts.dead_peer));
        }
        was_quiet
    }

    /// No event will tell what is waited for: look again before long.
    pub fn keep_looking(&mut self) {
        let soon = Instant::now() + dead_peer::interval(self.timeouts.dead_peer).min(TAIL_TICK);
        self.next_look = Some(self.next_look.map_or(soon, |look| look.min(soon)));
    }

    /// The deadline has come.
    pub fn look(&mut self, client: impl AsFd, upstream: impl AsFd) -> Option<End> {
        let now = Instant::now();
        let sockets = [(Side::Client, client.as_fd()), (Side::Upstream, upstream.as_fd())];
        let infos = sockets.map(|(_, socket)| sys::tcp_info(socket).ok());
        // A slow reader takes what was sent long ago: nobody is woken up for that, and a reset
        // would cut it off.
        for (info, acknowledged) in infos.iter().zip(&mut self.acknowledged) {
            let Some(info) = info else { continue };
            let before = acknowledged.replace(info.bytes_acked);
            let waits = info.unacked > 0 || info.notsent_bytes > 0;
            let moved = match before {
                // The last bytes may have been taken since the last look; the short deadline must
                // not overlook that.
                Some(before) => before != info.bytes_acked && (waits || self.half_closed.is_some()),
                None => waits,
            };
            if moved {
                self.last_bytes = now;
            }
        }
        if now >= self.idle_at() {
            return Some(End::Idle);
        }
        if self.next_look.is_none_or(|look| look > now) {
            return None;
        }
        let dead_peer = self.timeouts.dead_peer;
        let mut quiet = now >= self.last_bytes + dead_peer::interval(dead_peer);
        if !self.keep_alive {
            self.keep_alive = true;
            for (_, socket) in sockets {
                let _ = socket::keep_alive(socket, dead_peer);
            }
        }
        for ((leg, info), (side, _)) in self.legs.iter_mut().zip(&infos).zip(sockets) {
            let Some(info) = info else { continue };
            match leg.judge(info, now.into_std(), dead_peer) {
                Finding::Quiet => {}
                Finding::Vanished => return Some(End::Vanished(side)),
                Finding::Waiting => quiet = false,
            }
        }
        self.next_look = (self.unattended || !quiet).then(|| now + dead_peer::interval(dead_peer));
        None
    }
}
