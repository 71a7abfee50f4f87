//! How a connection leaves the map, step by step. Pure: what has to be done to sockets is said to
//! who asks, and the clock is an argument.
//!
//! A socket's entry may only be deleted while no verdict runs for it: the program's verdict on
//! bytes that are acknowledged already would be lost with it. So data is kept away from the socket
//! first, then whatever had begun before is waited for. And nothing may be unread: passed bytes go
//! with the entry. So a slow reader keeps a connection in the map; but not one that is to be handed
//! to another process: then what its readers did not take is read, and goes along.

use std::time::Duration;

use tokio::time::Instant;

use super::stream::{Phase, Stream, Want};
use crate::engine::in_kernel::Left;

/// How long data is kept away from a socket that leaves the map, until both directions have nothing
/// left to forward. Its sender sees a loss.
const PATIENCE: Duration = Duration::from_millis(100);

/// The same for a connection that is to be handed to another process: then the attempt must not
/// fail, however much there is to read.
const HALT_PATIENCE: Duration = Duration::from_secs(2);

/// How long a slow reader of such a connection may keep it in the map, before data is kept away all
/// the same; and how long it may still take what is there then, before the rest is read and goes
/// along.
const HALT_WAITS: Duration = Duration::from_millis(200);
const COLLECT_AFTER: Duration = Duration::from_millis(30);

/// How soon to look again meanwhile.
const TICK: Duration = Duration::from_millis(1);

/// How long to let a direction go on before the next attempt to leave, doubling.
const LEAVE_AGAIN: Duration = Duration::from_secs(1);
const LONGEST_LEAVE_AGAIN: Duration = Duration::from_secs(16);

/// How long a FIN may wait for the socket to leave the map, before it is sent by a socket that is
/// still there.
const FIN_PATIENCE: Duration = Duration::from_millis(300);

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing, until then or until something happens.
    Wait(Option<Instant>),
    /// Keep data away from the sockets in the map whose direction is open, wait for what had begun
    /// before, and say so to [`Leaving::kept_away`].
    KeepDataAway,
    /// Let it in again.
    LetDataIn,
    /// Take the sockets out of the map.
    TakeOut(Left),
    /// Send the FIN that is owed, from a socket that is in the map, and say so to
    /// [`Leaving::finished`].
    Finish,
}

/// What keeps a connection in the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hindrance {
    Nothing,
    /// Userspace forwards, and a reader keeps it waiting.
    Reader,
    /// The kernel forwards some direction.
    Kernel,
}

/// What is looked at.
#[derive(Debug, Clone, Copy)]
pub struct View {
    pub hindrance: Hindrance,
    /// Some direction has not ended.
    pub is_open: bool,
    /// A peer has still to be told that the other side has ended.
    pub owes_fin: bool,
}

impl View {
    /// Of the directions whose sources are in the map.
    pub fn of<'s>(streams: impl Iterator<Item = &'s Stream>, owes_fin: bool) -> Self {
        let (mut is_ours, mut is_blocked, mut is_open) = (true, false, false);
        for stream in streams {
            is_ours &= matches!(stream.phase, Phase::Complete | Phase::Userspace);
            is_blocked |= stream.is_blocked();
            is_open |= stream.phase != Phase::Complete;
        }
        let hindrance = match (is_ours, is_blocked) {
            (false, _) => Hindrance::Kernel,
            (true, true) => Hindrance::Reader,
            (true, false) => Hindrance::Nothing,
        };
        Self { hindrance, is_open, owes_fin }
    }
}

#[derive(Debug)]
pub struct Leaving {
    why: Option<Left>,
    not_before: Instant,
    pause: Duration,
    /// When it was told to leave for another process.
    halted: Option<Instant>,
    /// Data is kept away since then.
    quiet_since: Option<Instant>,
    fin_due: Option<Instant>,
}

impl Leaving {
    /// Of a connection that has just gone in; `why` says that it cannot stay.
    pub fn new(now: Instant, why: Option<Left>) -> Self {
        Self { why, not_before: now, pause: LEAVE_AGAIN, halted: None, quiet_since: None, fin_due: None }
    }

    /// Who is to forward meanwhile.
    pub fn want(&self, now: Instant) -> Want {
        match self.why {
            None => Want::Kernel,
            Some(_) if self.collects(now) => Want::Collect,
            Some(_) => Want::Userspace,
        }
    }

    /// The connection is to leave at once, for another process to go on with it: whatever it leaves
    /// for already, and whatever its readers do. True when that is news.
    pub fn halt(&mut self, now: Instant) -> bool {
        let is_new = self.halted.is_none();
        if is_new {
            (self.why, self.halted, self.not_before) = (Some(Left::Halted), Some(now), now);
        }
        is_new
    }

    /// Whether what a sink does not take is read, and leaves with the connection: only while data
    /// is kept away, else there would be no end of it.
    pub fn collects(&self, now: Instant) -> bool {
        self.halted.is_some() && self.quiet_since.is_some_and(|since| now >= since + COLLECT_AFTER)
    }

    /// There is a reason to leave, or none; true when that has changed what is
    /// [`want`](Self::want)ed.
    pub fn note(&mut self, why: Option<Left>) -> bool {
        let is_new = self.why.is_none() && why.is_some();
        self.why = self.why.or(why);
        is_new
    }

    /// What to do now. `is_drained`: nothing is left to forward.
    pub fn step(&mut self, now: Instant, view: View, is_drained: impl FnOnce() -> bool) -> Step {
        if let (Some(since), Some(why)) = (self.quiet_since, self.why) {
            if is_drained() {
                return Step::TakeOut(why);
            }
            if now >= since + if self.halted.is_some() { HALT_PATIENCE } else { PATIENCE } {
                self.failed(now);
                return Step::LetDataIn;
            }
            return Step::Wait(Some(now + TICK));
        }
        let mut wake = None;
        if let Some(why) = self.why
            && (view.hindrance == Hindrance::Nothing || view.hindrance == Hindrance::Reader && self.halted.is_some())
        {
            let due = match self.halted {
                Some(halted) if view.hindrance == Hindrance::Reader => self.not_before.max(halted + HALT_WAITS),
                _ => self.not_before,
            };
            if now >= due {
                return if view.is_open { Step::KeepDataAway } else { Step::TakeOut(why) };
            }
            wake = Some(due);
        }
        if !view.owes_fin {
            self.fin_due = None;
            return Step::Wait(wake);
        }
        let due = *self.fin_due.get_or_insert(now + FIN_PATIENCE);
        if now >= due { Step::Finish } else { Step::Wait(Some(wake.map_or(due, |wake| wake.min(due)))) }
    }

    /// Data is kept away by now.
    pub fn kept_away(&mut self, now: Instant) {
        self.quiet_since = Some(now);
    }

    /// The attempt has failed: the next one is later.
    pub fn failed(&mut self, now: Instant) {
        self.quiet_since = None;
        if self.halted.is_some() {
            self.not_before = now;
            return;
        }
        self.not_before = now + self.pause;
        self.pause = (self.pause * 2).min(LONGEST_LEAVE_AGAIN);
    }

    /// What FIN could be sent was sent.
    pub fn finished(&mut self, now: Instant) {
        self.fin_due = Some(now + LEAVE_AGAIN);
    }
}
