//! Engines: what carries the bytes once both sides are connected.
//!
//! An engine takes a [`Pair`], the two sockets and the bytes that still have to be sent first, and ends with an [`End`]. All engines behave
//! alike: no byte lost, doubled or reordered; FIN passed on after the last byte; anything unproven ends in RST. An engine does not know
//! why the pair was made: no host names, no routes, no PROXY protocol.

pub mod copy;
pub mod relay;
pub mod splice;
pub mod vigil;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tokio::net::TcpStream;

use crate::config::EngineChoice;

/// An engine that this version has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Through a buffer in userspace: the reference, runs anywhere.
    Copy,
    /// Bulk through pipes with splice(2), small messages through a buffer.
    Splice,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Copy, Self::Splice];

    /// As in the configuration and in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Copy => "copy",
            Self::Splice => "splice",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What runs when the configuration asks for `choice`, and why it is something else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effective {
    /// What was asked for.
    pub configured: EngineChoice,
    /// What runs.
    pub kind: Kind,
    /// One line for each engine that was passed over.
    pub reasons: Vec<String>,
}

impl Effective {
    /// Decides; `splice` is what the self-test of splice(2) said.
    pub fn choose(choice: EngineChoice, splice: &Result<(), String>) -> Self {
        let mut reasons = Vec::new();
        match choice {
            EngineChoice::Translate => reasons.push("translate: this version has no packet-level engine".to_owned()),
            EngineChoice::Sockmap => reasons.push("sockmap: this version has no sockmap engine".to_owned()),
            EngineChoice::Auto | EngineChoice::Splice | EngineChoice::Copy => {}
        }
        let kind = match (choice, splice) {
            (EngineChoice::Copy, _) => Kind::Copy,
            (_, Ok(())) => Kind::Splice,
            (_, Err(why)) => {
                reasons.push(format!("splice: {why}"));
                Kind::Copy
            }
        };
        Self { configured: choice, kind, reasons }
    }

    /// Whether what was asked for is what runs.
    pub fn as_configured(&self) -> bool {
        match self.configured {
            EngineChoice::Auto => true,
            EngineChoice::Splice => self.kind == Kind::Splice,
            EngineChoice::Copy => self.kind == Kind::Copy,
            EngineChoice::Translate | EngineChoice::Sockmap => false,
        }
    }
}

/// The two sides of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Who came to our listener.
    Client,
    /// Whom we dialled.
    Upstream,
}

/// A client and an upstream, both connected, with SO_LINGER {on, 0} set: dropping it resets both.
#[derive(Debug)]
pub struct Pair {
    /// The accepted socket.
    pub client: TcpStream,
    /// The dialled socket.
    pub upstream: TcpStream,
    /// To be sent to the upstream before anything else.
    pub first: First,
}

/// Bytes for the upstream that the engine did not read from the client itself.
#[derive(Debug, Default)]
pub struct First {
    /// A header of ours, then what was already read of the client.
    pub bytes: Vec<u8>,
    /// Length of the header in front, which is not the client's payload.
    pub header: usize,
}

/// Deadlines of an established connection.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// No byte either way for so long: [`End::Idle`].
    pub idle: Duration,
    /// A peer that acknowledges nothing for so long: [`End::Vanished`].
    pub dead_peer: Duration,
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Both sides sent FIN, after every byte before it was passed on.
    Done,
    /// This side sent RST.
    Reset(Side),
    /// This side stopped answering.
    Vanished(Side),
    /// Silent for `idle_timeout`.
    Idle,
    /// The daemon stopped before the connection did.
    Drained,
    /// The kernel refused a call; see the log.
    Error,
}

impl End {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Done,
        Self::Reset(Side::Client),
        Self::Reset(Side::Upstream),
        Self::Vanished(Side::Client),
        Self::Vanished(Side::Upstream),
        Self::Idle,
        Self::Drained,
        Self::Error,
    ];

    /// The label of `dataplane_connections_closed_total`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Reset(Side::Client) => "client_reset",
            Self::Reset(Side::Upstream) => "upstream_reset",
            Self::Vanished(Side::Client) => "client_vanished",
            Self::Vanished(Side::Upstream) => "upstream_vanished",
            Self::Idle => "idle",
            Self::Drained => "drained",
            Self::Error => "error",
        }
    }
}

/// The way that bytes took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// They never came to userspace.
    Kernel,
    /// They were copied through the process.
    Userspace,
}

impl Path {
    /// The label of `dataplane_bytes_total`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Userspace => "userspace",
        }
    }
}

/// Payload bytes of one connection, readable while it runs.
#[derive(Debug)]
pub struct Traffic {
    /// Towards the upstream.
    pub to_upstream: Counter,
    /// Towards the client.
    pub to_client: Counter,
    begun: Instant,
    /// Milliseconds after `begun`.
    last_bytes: AtomicU64,
}

impl Default for Traffic {
    fn default() -> Self {
        Self {
            to_upstream: Counter::default(),
            to_client: Counter::default(),
            begun: Instant::now(),
            last_bytes: AtomicU64::new(0),
        }
    }
}

impl Traffic {
    /// Notes that bytes moved just now.
    pub fn touch(&self, now: Instant) {
        self.last_bytes.store(now.saturating_duration_since(self.begun).as_millis() as u64, Relaxed);
    }

    /// Since when no byte moved.
    pub fn idle(&self) -> Duration {
        self.begun.elapsed().saturating_sub(Duration::from_millis(self.last_bytes.load(Relaxed)))
    }
}

/// Bytes of one direction, by path.
#[derive(Debug, Default)]
pub struct Counter {
    kernel: AtomicU64,
    userspace: AtomicU64,
}

impl Counter {
    /// Counts bytes that the kernel accepted for the receiving side.
    pub fn add(&self, path: Path, bytes: usize) {
        match path {
            Path::Kernel => &self.kernel,
            Path::Userspace => &self.userspace,
        }
        .fetch_add(bytes as u64, Relaxed);
    }

    /// Bytes that took this path.
    pub fn by(&self, path: Path) -> u64 {
        match path {
            Path::Kernel => self.kernel.load(Relaxed),
            Path::Userspace => self.userspace.load(Relaxed),
        }
    }

    /// All bytes.
    pub fn total(&self) -> u64 {
        self.by(Path::Kernel) + self.by(Path::Userspace)
    }
}

/// Forwards until the connection ends. On [`End::Done`] both sockets were closed with FIN, on anything else with RST.
pub async fn forward(kind: Kind, pair: Pair, timeouts: Timeouts, traffic: Arc<Traffic>) -> End {
    relay::run(kind, pair, timeouts, &traffic).await
}
