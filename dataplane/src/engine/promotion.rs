//! When a connection moves into the kernel, and when it moves back: pure functions of what it
//! carried.
//!
//! The kernel forwards small messages at less cost than userspace, since no process is woken up for
//! them; bulk costs it more than splice(2) does. So what counts is that a connection lives long and
//! carries small messages there and back; how it begins says nothing (a download begins with small
//! ones too).
//!
//! Measured with `cargo xtask bench` (three rounds, two cores, 200-byte exchanges, CPU of the whole
//! machine): 1 connection 46 µs against 48 with splice, and 16,000 exchanges a second against
//! 13,700; 16 connections 28.1 against 28.3; 200 connections 27.9 against 29.7. With answers of
//! 4,000 bytes the kernel's path cost as much as splice's, with 8,000 it cost 5 to 10 % more, with
//! 32,000 twice as much.

use std::time::Duration;

use tokio::time::Instant;

use super::pair::Side;

/// What goes one way before something comes the other way is a message, if it is no more than this.
pub const MESSAGE: usize = 4 * 1024;

/// Messages before the move.
const MESSAGES: u32 = 64;

/// For so long there was nothing larger.
const AGE: Duration = Duration::from_secs(1);

/// Moves back for bulk after which a connection stays where it is: each doubles the number of
/// messages that the next move takes.
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
    /// Who spoke last, and how much without an answer.
    speaker: Option<Side>,
    said: usize,
    messages: u32,
    since: Option<Instant>,
    returns: u32,
}

impl Promotion {
    /// Notes a read of so many bytes from this side; `now` is asked when it matters.
    pub fn note(&mut self, from: Side, bytes: usize, now: impl FnOnce() -> Instant) {
        let Self::Earned(conduct) = self else { return };
        if conduct.speaker != Some(from) {
            conduct.speaker = Some(from);
            conduct.said = 0;
            conduct.messages = conduct.messages.saturating_add(1);
            conduct.since.get_or_insert_with(now);
        }
        conduct.said = conduct.said.saturating_add(bytes);
        if conduct.said > MESSAGE {
            conduct.messages = 0;
            conduct.since = None;
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

    /// What applies after a move back, or after one that was refused.
    #[must_use]
    pub fn after_return(self) -> Self {
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

    /// Whether reads of these sides and sizes, at these milliseconds, move a connection.
    fn earned(reads: impl IntoIterator<Item = (Side, usize, u64)>) -> bool {
        let start = Instant::now();
        let mut promotion = Promotion::Earned(Conduct::default());
        let mut now = start;
        for (side, bytes, ms) in reads {
            now = start + Duration::from_millis(ms);
            promotion.note(side, bytes, || now);
        }
        promotion.is_due(now)
    }

    fn speaker(turn: u64) -> Side {
        if turn.is_multiple_of(2) { Side::Client } else { Side::Upstream }
    }

    #[test]
    fn small_messages_there_and_back_for_a_second_move_a_connection() {
        assert!(earned((0..64).map(|i| (speaker(i), 200, i * 20))));
    }

    #[test]
    fn a_burst_of_small_messages_does_not() {
        assert!(!earned((0..1000).map(|i| (speaker(i), 200, i / 2))));
    }

    #[test]
    fn few_messages_in_a_long_time_do_not() {
        assert!(!earned((0..63).map(|i| (speaker(i), 200, i * 60_000))));
    }

    #[test]
    fn one_large_message_begins_the_count_anew_however_it_was_read() {
        for size in [100, 1448, MESSAGE + 1] {
            let large = std::iter::repeat_n((Side::Client, size, 1000), MESSAGE / size + 1);
            let before = (0..50).map(|i| (speaker(i), 200, i * 20));
            let after = (0..50).map(|i| (speaker(i), 200, 1000 + i * 20));
            assert!(!earned(before.chain(large).chain(after)), "{size}");
        }
    }

    #[test]
    fn a_slow_download_that_is_read_segment_by_segment_stays() {
        assert!(!earned((0..100_000).map(|i| (Side::Upstream, 1448, i))));
    }

    #[test]
    fn each_return_doubles_the_price_until_there_is_no_more() {
        let start = Instant::now();
        let mut promotion = Promotion::Earned(Conduct::default());
        for returns in 0..=MOST_RETURNS {
            let mut messages = 0;
            while !promotion.is_due(start + Duration::from_secs(3600)) {
                promotion.note(speaker(messages), 200, || start);
                messages += 1;
            }
            assert_eq!(messages, u64::from(MESSAGES << returns));
            promotion = promotion.after_return();
        }
        assert!(matches!(promotion, Promotion::Never));
        assert!(matches!(Promotion::AtOnce.after_return(), Promotion::Never));
    }
}
