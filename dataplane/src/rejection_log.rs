//! Which refusals and redirections get a line of their own in the log: the first ones of each
//! window. The others are counted, and told together.
//!
//! Strangers bring these lines about as they like, and journald throws a service's lines away
//! beyond 10,000 in 30 s, warnings among them. Metrics stay exact.

use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use crate::reject::Reason;

/// For so long lines are counted.
pub const WINDOW: Duration = Duration::from_secs(10);

/// Lines in a window: a fifteenth of what journald takes by default.
pub const LINES: u32 = 200;

/// The counts of the present window.
#[derive(Debug, Default)]
pub struct RejectionLog {
    window: Mutex<Window>,
}

#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Window {
    lines: u32,
    left_out: [u64; Reason::ALL.len()],
    redirections: u64,
}

/// What becomes of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It is written, and is the first of its window.
    First,
    Written,
    LeftOut,
}

impl RejectionLog {
    /// Whether this refusal, or redirection (`None`), is to be written. Needs a tokio runtime: a
    /// window ends with a timer.
    pub fn admits(self: &std::sync::Arc<Self>, reason: Option<Reason>) -> bool {
        let fate = self.note(reason);
        if fate == Fate::First {
            let log = self.clone();
            tokio::spawn(async move {
                tokio::time::sleep(WINDOW).await;
                log.end_window();
            });
        }
        fate != Fate::LeftOut
    }

    fn note(&self, reason: Option<Reason>) -> Fate {
        let mut window = self.window();
        if window.lines < LINES {
            window.lines += 1;
            return if window.lines == 1 { Fate::First } else { Fate::Written };
        }
        match reason {
            Some(reason) => window.left_out[reason as usize] += 1,
            None => window.redirections += 1,
        }
        Fate::LeftOut
    }

    fn end_window(&self) {
        let window = std::mem::take(&mut *self.window());
        if let Some(text) = window.summary() {
            tracing::warn!(target: "access", left_out = text, seconds = WINDOW.as_secs(), "not logged one by one");
        }
    }

    fn window(&self) -> MutexGuard<'_, Window> {
        self.window.lock().expect("no panic while held")
    }
}

impl Window {
    /// `unknown_host 812, timeout 3`; `None`: nothing was left out.
    fn summary(&self) -> Option<String> {
        let refused = Reason::ALL.iter().map(|reason| (reason.as_str(), self.left_out[*reason as usize]));
        let all = refused.chain([("redirected", self.redirections)]);
        let told: Vec<_> = all.filter(|(_, n)| *n > 0).map(|(what, n)| format!("{what} {n}")).collect();
        (!told.is_empty()).then(|| told.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beyond_the_first_lines_of_a_window_refusals_are_counted_by_reason() {
        let log = RejectionLog::default();
        assert_eq!(log.note(Some(Reason::NoSni)), Fate::First);
        for _ in 1..LINES {
            assert_eq!(log.note(Some(Reason::NoSni)), Fate::Written);
        }
        assert_eq!(log.window().summary(), None);
        for _ in 0..1000 {
            assert_eq!(log.note(Some(Reason::UnknownHost)), Fate::LeftOut);
        }
        log.note(Some(Reason::Timeout));
        log.note(None);
        assert_eq!(log.window().summary().unwrap(), "unknown_host 1000, timeout 1, redirected 1");
        log.end_window();
        assert_eq!(*log.window(), Window::default());
        assert_eq!(log.note(Some(Reason::NoSni)), Fate::First, "a window later");
    }
}
