//! What is done with the connections: a list, and what each kind of connection does next. Pure.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::load::wire::{ENDLESS, MESSAGE};

/// One kind of load.
#[derive(Debug, Clone, Copy)]
pub struct Workload {
    /// As on the command line.
    pub name: &'static str,
    /// How many connections of which behaviour.
    pub flows: &'static [(usize, Behaviour)],
    /// What costs are told for.
    pub unit: Unit,
    /// How long it runs at least before the window opens; every connection must also have done
    /// [`Behaviour::warm_up`].
    pub warm_up: Duration,
    /// What is measured.
    pub window: Window,
}

/// What costs are divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    /// 10^9 bytes of payload.
    Gigabyte,
    /// An exchange, or a connection from connect to close.
    Operation,
    /// A connection that is open: only memory counts.
    Connection,
}

/// When the window closes.
#[derive(Debug, Clone, Copy)]
pub enum Window {
    /// After so long.
    Time(Duration),
    /// When each connection has finished.
    UntilDone,
}

/// What a connection does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    /// Receives without end.
    Download,
    /// Sends without end.
    Upload,
    /// Small messages, the next when the last was answered.
    Exchange,
    /// Replies of this many bytes, at fixed points in time.
    Paced(u64, Duration),
    /// One exchange; then it is closed and opened anew.
    Reconnect,
    /// Small messages for about a second and a half, then, in the window, one reply of [`BULK`]
    /// bytes.
    ExchangeThenBulk,
    /// One exchange, then silence.
    Idle,
    /// Asks for an endless reply and does not read it.
    Stalled,
}

/// What a connection does when a reply is whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Asks for a reply of so many bytes, at once.
    Ask(u64),
    /// The same, so long after it asked last.
    AskAfter(u64, Duration),
    /// The same, when the window opens.
    AskInWindow(u64),
    /// Closes, and connects anew.
    Reopen,
    Rest,
}

/// The bulk behind small exchanges, on each connection.
pub const BULK: u64 = 64 << 20;
const EXCHANGES_BEFORE_BULK: u64 = 200;
const PACE_BEFORE_BULK: Duration = Duration::from_micros(7500);

/// `auto` moves a connection to the sockmap after 64 small messages and a second: more than that is
/// not measured.
const STEADY: u64 = 80;

impl Behaviour {
    /// What it does after so many whole replies; 0: when it has connected.
    pub fn step(self, replies: u64) -> Step {
        match self {
            Self::Download | Self::Stalled if replies == 0 => Step::Ask(ENDLESS),
            Self::Upload | Self::Idle | Self::Reconnect if replies == 0 => Step::Ask(MESSAGE as u64),
            Self::Download | Self::Stalled | Self::Upload | Self::Idle => Step::Rest,
            Self::Exchange => Step::Ask(MESSAGE as u64),
            Self::Paced(size, _) if replies == 0 => Step::Ask(size),
            Self::Paced(size, every) => Step::AskAfter(size, every),
            Self::Reconnect => Step::Reopen,
            Self::ExchangeThenBulk => match replies {
                0 => Step::Ask(MESSAGE as u64),
                EXCHANGES_BEFORE_BULK => Step::AskInWindow(BULK),
                n if n > EXCHANGES_BEFORE_BULK => Step::Rest,
                _ => Step::AskAfter(MESSAGE as u64, PACE_BEFORE_BULK),
            },
        }
    }

    /// Whole replies before a connection counts as warm; 0: the first byte will do.
    pub fn warm_up(self) -> u64 {
        match self {
            Self::Download | Self::Stalled => 0,
            Self::Exchange | Self::Paced(..) => STEADY,
            Self::Upload | Self::Reconnect | Self::Idle => 1,
            Self::ExchangeThenBulk => EXCHANGES_BEFORE_BULK,
        }
    }

    /// Bytes that the client sends behind its first request.
    pub fn upload(self) -> u64 {
        if self == Self::Upload { ENDLESS } else { 0 }
    }

    /// Whether a whole reply of so many bytes is one of the operations that are counted.
    pub fn counts(self, reply: u64) -> bool {
        match self {
            Self::Exchange | Self::Reconnect => true,
            Self::Paced(..) => reply == MESSAGE as u64,
            Self::ExchangeThenBulk => reply == BULK,
            Self::Download | Self::Upload | Self::Idle | Self::Stalled => false,
        }
    }
}

impl Workload {
    pub fn connections(&self) -> usize {
        self.flows.iter().map(|(count, _)| count).sum()
    }

    /// The workload of this name.
    pub fn named(name: &str) -> Option<&'static Self> {
        ALL.iter().find(|w| w.name == name)
    }

    /// About how long a cell takes, set-up included.
    pub fn estimate(&self) -> Duration {
        let window = match self.window {
            Window::Time(time) => time,
            Window::UntilDone => Duration::from_secs(1),
        };
        self.warm_up + window + Duration::from_micros(300) * self.connections() as u32 + Duration::from_millis(700)
    }
}

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

const fn bulk(name: &'static str, flows: &'static [(usize, Behaviour)]) -> Workload {
    Workload { name, flows, unit: Unit::Gigabyte, warm_up: ms(500), window: Window::Time(ms(2000)) }
}

const fn exchange(name: &'static str, flows: &'static [(usize, Behaviour)]) -> Workload {
    Workload { name, flows, unit: Unit::Operation, warm_up: ms(1500), window: Window::Time(ms(2000)) }
}

const fn connect(name: &'static str, flows: &'static [(usize, Behaviour)]) -> Workload {
    Workload { name, flows, unit: Unit::Operation, warm_up: ms(300), window: Window::Time(ms(2000)) }
}

/// All of them, in the order of a run.
pub const ALL: &[Workload] = &[
    bulk("bulk-down-1", &[(1, Behaviour::Download)]),
    bulk("bulk-down-16", &[(16, Behaviour::Download)]),
    bulk("bulk-up-1", &[(1, Behaviour::Upload)]),
    bulk("bulk-up-16", &[(16, Behaviour::Upload)]),
    exchange("exchange-1", &[(1, Behaviour::Exchange)]),
    exchange("exchange-16", &[(16, Behaviour::Exchange)]),
    exchange("exchange-200", &[(200, Behaviour::Exchange)]),
    exchange("exchange-2000", &[(2000, Behaviour::Exchange)]),
    connect("connect-1", &[(1, Behaviour::Reconnect)]),
    connect("connect-64", &[(64, Behaviour::Reconnect)]),
    Workload {
        name: "small-then-bulk",
        flows: &[(16, Behaviour::ExchangeThenBulk)],
        unit: Unit::Gigabyte,
        warm_up: ms(1500),
        window: Window::UntilDone,
    },
    // The same load for every subject, so that what it costs can be compared: 3,200 exchanges and
    // 52 MB a second.
    Workload {
        name: "mix",
        flows: &[(16, Behaviour::Paced(MESSAGE as u64, ms(5))), (4, Behaviour::Paced(256 << 10, ms(20)))],
        unit: Unit::Operation,
        warm_up: ms(1500),
        window: Window::Time(ms(2500)),
    },
    Workload {
        name: "idle-8000",
        flows: &[(8000, Behaviour::Idle)],
        unit: Unit::Connection,
        warm_up: ms(1000),
        window: Window::Time(ms(500)),
    },
    Workload {
        name: "stalled-200",
        flows: &[(200, Behaviour::Stalled)],
        unit: Unit::Connection,
        warm_up: ms(2000),
        window: Window::Time(ms(1000)),
    },
];

/// Those of `--quick`.
pub const QUICK: [&str; 3] = ["bulk-down-1", "exchange-16", "connect-1"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_quick_ones_exist() {
        for (n, workload) in ALL.iter().enumerate() {
            assert!(ALL[..n].iter().all(|w| w.name != workload.name), "{}", workload.name);
        }
        assert!(QUICK.iter().all(|name| Workload::named(name).is_some()));
    }

    #[test]
    fn bulk_comes_after_two_hundred_exchanges_and_only_in_the_window() {
        let behaviour = Behaviour::ExchangeThenBulk;
        assert!((1..200).all(|n| matches!(behaviour.step(n), Step::AskAfter(200, _))));
        assert_eq!(behaviour.step(200), Step::AskInWindow(BULK));
        assert_eq!(behaviour.step(201), Step::Rest);
        assert_eq!(behaviour.warm_up(), 200);
    }

    #[test]
    fn every_connection_begins_with_a_request() {
        for (_, behaviour) in ALL.iter().flat_map(|w| w.flows) {
            assert!(matches!(behaviour.step(0), Step::Ask(_)), "{behaviour:?}");
        }
    }
}
