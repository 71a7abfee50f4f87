//! When a connection moves to the sockmap, and when it moves back: pure functions of what it carried.
//!
//! The kernel forwards small messages at less cost than userspace, since nobody is woken up for them; bulk costs it more than splice(2) does. So what counts is
//! that a connection lives long and carries small messages; how it begins says nothing (a download begins with small ones too).

use std::time::Duration;

use tokio::time::Instant;

/// A read of more than this is not a small message.
pub const MESSAGE: usize = 16 * 1024;

/// Small messages before the move.
const MESSAGES: u32 = 64;

/// For so long there was none that is not small.
const AGE: Duration = Duration::from_secs(1);

/// Moves back for bulk after which a connection stays where it is: each doubles the number of messages that the next move takes.
const MOST_RETURNS: u32 = 6;

/// What is to be done with a connection.
#[derive(Debug, Clone)]
pub enum Promotion {
    /// It stays with the relay.
    Never,
    /// It moves as soon as what was read before has been sent.
    AtOnce,
    /// It moves when it turns out to live long and to carry small messages.
    Earned(Conduct),
}

/// How a connection behaved.
#[derive(Debug, Clone, Default)]
pub struct Conduct {
    messages: u32,
    since: Option<Instant>,
    returns: u32,
}

impl Promotion {
    /// Notes a read of so many bytes; `now` is asked when it matters.
    pub fn note(&mut self, bytes: usize, now: impl FnOnce() -> Instant) {
        let Self::Earned(conduct) = self else { return };
        if bytes > MESSAGE {
            conduct.messages = 0;
            conduct.since = None;
        } else {
            conduct.messages = conduct.messages.saturating_add(1);
            conduct.since.get_or_insert_with(now);
        }
    }

    /// Whether the connection moves now.
    pub fn is_due(&self, now: Instant) -> bool {
        match self {
            Self::Never => false,
            Self::AtOnce => true,
            Self::Earned(conduct) => {
                conduct.messages >= MESSAGES << conduct.returns
                    && conduct.since.is_some_and(|since| now.saturating_duration_since(since) >= AGE)
            }
        }
    }

    /// What applies after a move back for bulk.
    #[must_use]
    pub fn after_bulk(self) -> Self {
        match self {
            Self::Earned(Conduct { returns, .. }) if returns < MOST_RETURNS => {
                Self::Earned(Conduct { returns: returns + 1, ..Conduct::default() })
            }
            _ => Self::Never,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn earned(reads: impl IntoIterator<Item = (usize, u64)>) -> bool {
        let start = Instant::now();
        let mut promotion = Promotion::Earned(Conduct::default());
        let mut now = start;
        for (bytes, ms) in reads {
            now = start + Duration::from_millis(ms);
            promotion.note(bytes, || now);
        }
        promotion.is_due(now)
    }

    #[test]
    fn small_messages_for_a_second_move_a_connection() {
        assert!(earned((0..64).map(|i| (200, i * 20))));
    }

    #[test]
    fn a_burst_of_small_messages_does_not() {
        assert!(!earned((0..1000).map(|i| (200, i / 2))));
    }

    #[test]
    fn few_messages_in_a_long_time_do_not() {
        assert!(!earned((0..63).map(|i| (200, i * 60_000))));
    }

    #[test]
    fn one_large_read_begins_the_count_anew() {
        let reads = (0..100).map(|i| (if i == 50 { MESSAGE + 1 } else { 200 }, i * 100));
        assert!(!earned(reads));
    }

    #[test]
    fn each_return_for_bulk_doubles_the_price_until_there_is_no_more() {
        let start = Instant::now();
        let mut promotion = Promotion::Earned(Conduct::default());
        for returns in 0..=MOST_RETURNS {
            let mut messages = 0;
            while !promotion.is_due(start + Duration::from_secs(3600)) {
                promotion.note(200, || start);
                messages += 1;
            }
            assert_eq!(messages, MESSAGES << returns);
            promotion = promotion.after_bulk();
        }
        assert!(matches!(promotion, Promotion::Never));
        assert!(matches!(Promotion::AtOnce.after_bulk(), Promotion::Never));
    }
}
