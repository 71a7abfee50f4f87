//! How a connection leaves the map, step by step. Pure: what has to be done to sockets is said to
//! who asks, and the clock is an argument.
//!
//! A socket's entry may only be deleted while no verdict runs for it: the program's verdict on
//! bytes that are acknowledged already would be lost with it. So data is kept away from the socket
//! first, then whatever had begun before is waited for. And nothing may be unread: passed bytes go
//! with the entry.

use std::time::Duration;

use tokio::time::Instant;

use super::stream::{Phase, Stream, Want};
use crate::engine::in_kernel::Left;

/// How long data is kept away from a socket that leaves the map, until both directions have nothing
/// left to forward. Its sender sees a loss.
const PATIENCE: Duration = Duration::from_millis(100);

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

/// What is looked at.
#[derive(Debug, Clone, Copy)]
pub struct View {
    /// An attempt has prospects: userspace forwards, and no reader keeps it waiting.
    pub may_leave: bool,
    /// Some direction has not ended.
    pub is_open: bool,
    /// A peer has still to be told that the other side has ended.
    pub owes_fin: bool,
}

impl View {
    /// Of the directions whose sources are in the map.
    pub fn of<'s>(streams: impl Iterator<Item = &'s Stream>, owes_fin: bool) -> Self {
        let (mut may_leave, mut is_open) = (true, false);
        for stream in streams {
            may_leave &= match stream.phase {
                Phase::Complete => true,
                Phase::Userspace => !stream.is_blocked(),
                Phase::Kernel | Phase::Proving => false,
            };
            is_open |= stream.phase != Phase::Complete;
        }
        Self { may_leave, is_open, owes_fin }
    }
}

#[derive(Debug)]
pub struct Leaving {
    why: Option<Left>,
    not_before: Instant,
    pause: Duration,
    /// Data is kept away, for no longer than this.
    quiet_until: Option<Instant>,
    fin_due: Option<Instant>,
}

impl Leaving {
    /// Of a connection that has just gone in; `why` says that it cannot stay.
    pub fn new(now: Instant, why: Option<Left>) -> Self {
        Self { why, not_before: now, pause: LEAVE_AGAIN, quiet_until: None, fin_due: None }
    }

    /// Who is to forward meanwhile.
    pub fn want(&self) -> Want {
        if self.why.is_some() { Want::Userspace } else { Want::Kernel }
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
        if let (Some(until), Some(why)) = (self.quiet_until, self.why) {
            if is_drained() {
                return Step::TakeOut(why);
            }
            if now >= until {
                self.failed(now);
                return Step::LetDataIn;
            }
            return Step::Wait(Some(now + TICK));
        }
        let mut wake = None;
        if let Some(why) = self.why
            && view.may_leave
        {
            if now >= self.not_before {
                return if view.is_open { Step::KeepDataAway } else { Step::TakeOut(why) };
            }
            wake = Some(self.not_before);
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
        self.quiet_until = Some(now + PATIENCE);
    }

    /// The attempt has failed: the next one is later.
    pub fn failed(&mut self, now: Instant) {
        self.quiet_until = None;
        self.not_before = now + self.pause;
        self.pause = (self.pause * 2).min(LONGEST_LEAVE_AGAIN);
    }

    /// What FIN could be sent was sent.
    pub fn finished(&mut self, now: Instant) {
        self.fin_due = Some(now + LEAVE_AGAIN);
    }
}
