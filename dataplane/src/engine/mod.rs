//! Engines: what carries the bytes once both sides are connected.
//!
//! An engine takes a [`Pair`], the two sockets and the bytes that still have to be sent first, and ends with an [`End`]. All engines behave
//! alike: no byte lost, doubled or reordered; FIN passed on after the last byte; anything unproven ends in RST. An engine does not know
//! why the pair was made: no host names, no routes, no PROXY protocol.

pub mod answer;
pub mod copy;
pub mod promotion;
pub mod relay;
pub mod sockmap;
pub mod splice;
pub mod vigil;
pub mod watch;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use prometheus::IntCounter;
use tokio::net::TcpStream;
use tokio::sync::Notify;

use crate::config::EngineChoice;
use promotion::Promotion;
use relay::Relayed;
use sockmap::{Engaged, Left, Outcome, Table};

/// What carries the bytes of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Through a buffer in userspace: the reference, runs anywhere.
    Copy,
    /// Bulk through pipes with splice(2), small messages through a buffer.
    Splice,
    /// Redirected inside the kernel.
    Sockmap,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Copy, Self::Splice, Self::Sockmap];

    /// As in the configuration and in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Copy => "copy",
            Self::Splice => "splice",
            Self::Sockmap => "sockmap",
        }
    }
}

/// What a machine can do; the error says why not.
#[derive(Debug, Clone)]
pub struct Abilities {
    /// splice(2), as its self-test found it.
    pub splice: Result<(), String>,
    /// The programs in the kernel, and how the kernel behaves with them in the self-test.
    pub sockmap: Result<Arc<Table>, String>,
    /// Whether the kernel is known to be rid of what no self-test finds: see [`sockmap::known_bugs`].
    pub known_bugs: Result<(), String>,
}

impl Abilities {
    /// Tries everything. The table that comes of it has room for so many connections, and counts spills there.
    pub fn test(connections: usize, spills: [IntCounter; 2]) -> Self {
        let sockmap = Table::load(connections, spills).map_err(|error| error.to_string());
        let sockmap = sockmap.and_then(|table| sockmap::self_test::run(&table).map(|()| table));
        if let Ok(table) = &sockmap {
            // Those of the self-test are nobody's.
            table.spills.iter().for_each(IntCounter::reset);
        }
        let kernel = rustix::system::uname();
        let known_bugs =
            sockmap::known_bugs::judge(&kernel.release().to_string_lossy(), &kernel.version().to_string_lossy());
        Self { splice: splice::self_test(), sockmap, known_bugs }
    }
}

/// What runs when the configuration asks for `choice`, and why it is something else.
#[derive(Debug, Clone)]
pub struct Effective {
    /// What was asked for.
    pub configured: EngineChoice,
    /// What carries a connection's first bytes, and all of them if it is not moved.
    relay: Kind,
    /// Where connections are moved to.
    sockmap: Option<Arc<Table>>,
    /// One line for each engine that was passed over.
    pub reasons: Vec<String>,
    /// What speaks against an engine that runs because the configuration names it.
    pub warnings: Vec<String>,
}

impl Effective {
    /// Decides.
    pub fn choose(choice: EngineChoice, abilities: &Abilities) -> Self {
        let mut reasons = Vec::new();
        let mut able = |name: &str, ability: Result<(), &String>| match ability {
            Ok(()) => true,
            Err(why) => {
                reasons.push(format!("{name}: {why}"));
                false
            }
        };
        if choice == EngineChoice::Translate {
            able("translate", Err(&"this version has no packet-level engine".to_owned()));
        }
        let mut warnings = Vec::new();
        let wants_sockmap = matches!(choice, EngineChoice::Auto | EngineChoice::Sockmap);
        let mut sockmap = wants_sockmap && able("sockmap", abilities.sockmap.as_ref().map(drop));
        match &abilities.known_bugs {
            Err(why) if sockmap && choice == EngineChoice::Auto => {
                sockmap = able("sockmap", Err(&format!("{why}; `engine = \"sockmap\"` runs it all the same")));
            }
            Err(why) if sockmap => warnings.push(format!("sockmap runs because the configuration names it: {why}")),
            _ => (),
        }
        let splice = choice != EngineChoice::Copy && able("splice", abilities.splice.as_ref().map(drop));
        Self {
            configured: choice,
            relay: if splice { Kind::Splice } else { Kind::Copy },
            sockmap: abilities.sockmap.as_ref().ok().filter(|_| sockmap).cloned(),
            reasons,
            warnings,
        }
    }

    /// Tells the log what does not run, and what should not.
    pub fn tell(&self) {
        for reason in self.reasons.iter().chain(&self.warnings) {
            tracing::warn!(configured = ?self.configured, effective = self.name(), reason, "engine");
        }
    }

    /// What runs: `auto` when connections are moved between engines, else the one that they all have.
    pub fn name(&self) -> &'static str {
        match (&self.sockmap, self.configured) {
            (Some(_), EngineChoice::Auto) => "auto",
            (Some(_), _) => Kind::Sockmap.as_str(),
            (None, _) => self.relay.as_str(),
        }
    }

    /// Whether what was asked for is what runs.
    pub fn as_configured(&self) -> bool {
        match self.configured {
            EngineChoice::Auto => true,
            EngineChoice::Sockmap => self.sockmap.is_some(),
            EngineChoice::Splice => self.relay == Kind::Splice,
            EngineChoice::Copy => self.relay == Kind::Copy,
            EngineChoice::Translate => false,
        }
    }

    /// How much of a budget for bytes queued in the kernel pipes may have; the rest is for the sockmap.
    pub fn share_of_pipes(&self, memory: u64) -> u64 {
        if self.sockmap.is_some() { memory / 2 } else { memory }
    }

    fn promotion(&self) -> Promotion {
        match (&self.sockmap, self.configured) {
            (Some(_), EngineChoice::Auto) => Promotion::Earned(promotion::Conduct::default()),
            (Some(_), _) => Promotion::AtOnce,
            (None, _) => Promotion::Never,
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

impl Side {
    /// The peer.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Client => Self::Upstream,
            Self::Upstream => Self::Client,
        }
    }
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

/// The sockets of a connection between two engines: all that was read was also sent.
#[derive(Debug)]
pub struct Legs {
    /// The accepted socket.
    pub client: TcpStream,
    /// The dialled socket.
    pub upstream: TcpStream,
    /// By side of the source.
    pub streams: [StreamState; 2],
}

/// How far a direction of a connection between two engines is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamState {
    /// Bytes may come.
    Open,
    /// Its source has sent FIN, and all before it was sent on.
    Ended,
    /// FIN was sent on, too.
    Finished,
}

/// Deadlines of an established connection.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// No byte either way for so long: [`End::Idle`].
    pub idle: Duration,
    /// The same, once one side has sent FIN and that was passed on.
    pub half_closed: Duration,
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
    /// The target went down, and its connections with it (`on_down = "reset"`).
    TargetDown,
    /// A reload removed its route.
    RouteRemoved,
    /// The kernel refused a call; see the log.
    Error,
}

impl End {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Done,
        Self::Reset(Side::Client),
        Self::Reset(Side::Upstream),
        Self::Vanished(Side::Client),
        Self::Vanished(Side::Upstream),
        Self::Idle,
        Self::Drained,
        Self::TargetDown,
        Self::RouteRemoved,
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
            Self::TargetDown => "target_down",
            Self::RouteRemoved => "route_removed",
            Self::Error => "error",
        }
    }
}

/// How a connection ends of which this side's socket has this error.
fn ended_by(side: Side, error: io::Result<Option<io::Error>>) -> End {
    let Ok(Some(error)) = error else { return End::Reset(side) };
    match error.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::NotConnected => End::Reset(side),
        io::ErrorKind::TimedOut | io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
            End::Vanished(side)
        }
        _ => {
            tracing::warn!(?side, %error, "a system call failed in mid-connection");
            End::Error
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
    /// What forwards it while it is not in the sockmap.
    relay: Kind,
    /// While it is: what only the kernel counts.
    engaged: Mutex<Option<Arc<Engaged>>>,
    /// It ever was.
    promoted: AtomicBool,
    /// The target has sent its last byte, and the client has it or will get it.
    target_closed: Notify,
}

impl Traffic {
    /// Of a connection that begins as this engine says.
    pub fn new(engine: &Effective) -> Self {
        Self::by(engine.relay)
    }

    /// Of a connection that this forwards.
    pub fn by(relay: Kind) -> Self {
        Self {
            to_upstream: Counter::default(),
            to_client: Counter::default(),
            begun: Instant::now(),
            last_bytes: AtomicU64::new(0),
            relay,
            engaged: Mutex::default(),
            promoted: AtomicBool::new(false),
            target_closed: Notify::new(),
        }
    }

    /// The furthest that the connection got: for the record of one that has ended.
    pub fn last_engine(&self) -> Kind {
        if self.promoted.load(Relaxed) { Kind::Sockmap } else { self.relay }
    }

    /// The counter of the direction from this side.
    pub fn direction(&self, from: Side) -> &Counter {
        match from {
            Side::Client => &self.to_upstream,
            Side::Upstream => &self.to_client,
        }
    }

    /// Notes that bytes moved just now.
    pub fn touch(&self, now: Instant) {
        self.last_bytes.store(now.saturating_duration_since(self.begun).as_millis() as u64, Relaxed);
    }

    /// Notes that the target's FIN was passed on.
    pub fn note_target_closed(&self) {
        // Kept for whoever does not wait yet.
        self.target_closed.notify_one();
    }

    /// Waits until the target has closed its side, once.
    pub async fn target_closed(&self) {
        self.target_closed.notified().await;
    }

    /// What is known now.
    pub fn look(&self) -> Look {
        let engaged = self.engaged();
        let bytes = |from: Side| {
            let counter = self.direction(from);
            let redirected = engaged.as_ref().map_or(0, |engaged| engaged.redirected(from));
            [counter.by(Path::Kernel) + redirected, counter.by(Path::Userspace)]
        };
        let idle = self.begun.elapsed().saturating_sub(Duration::from_millis(self.last_bytes.load(Relaxed)));
        Look {
            engine: if engaged.is_some() { Kind::Sockmap } else { self.relay },
            asleep: engaged.as_ref().is_some_and(|engaged| engaged.is_in_kernel()),
            to_upstream: bytes(Side::Client),
            to_client: bytes(Side::Upstream),
            idle: engaged.as_ref().map_or(idle, |engaged| engaged.idle()),
        }
    }

    /// Bytes queued in the kernel on behalf of this connection.
    pub fn backlog(&self) -> u64 {
        self.engaged().as_ref().map_or(0, |engaged| engaged.backlog())
    }

    fn engage(&self, engaged: Arc<Engaged>) {
        *self.engaged() = Some(engaged);
        self.promoted.store(true, Relaxed);
    }

    /// From now on what the kernel has counted is counted here.
    fn disengage(&self) -> Option<Arc<Engaged>> {
        let mut engaged = self.engaged();
        if let Some(engaged) = &*engaged {
            for from in [Side::Client, Side::Upstream] {
                self.direction(from).add(Path::Kernel, engaged.redirected(from) as usize);
            }
            self.touch(Instant::now().checked_sub(engaged.idle()).unwrap_or(self.begun));
        }
        engaged.take()
    }

    fn engaged(&self) -> MutexGuard<'_, Option<Arc<Engaged>>> {
        self.engaged.lock().expect("no panic while held")
    }
}

/// What is known of a live connection's traffic.
#[derive(Debug, Clone, Copy)]
pub struct Look {
    /// What forwards it.
    pub engine: Kind,
    /// The kernel forwards both ways without waking anybody.
    pub asleep: bool,
    /// Bytes by path: kernel, userspace.
    pub to_upstream: [u64; 2],
    /// The same.
    pub to_client: [u64; 2],
    /// Since when no byte moved.
    pub idle: Duration,
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
}

/// Forwards until the connection ends. On [`End::Done`] both sockets were closed with FIN, on anything else with RST.
pub async fn forward(engine: &Effective, pair: Pair, timeouts: Timeouts, traffic: &Traffic) -> End {
    let Pair { client, upstream, mut first } = pair;
    let mut legs = Legs { client, upstream, streams: [StreamState::Open; 2] };
    let mut promotion = engine.promotion();
    loop {
        legs = match relay::run(engine.relay, legs, std::mem::take(&mut first), promotion.clone(), timeouts, traffic)
            .await
        {
            Relayed::Ended(end) => return end,
            Relayed::Promoted(legs) => legs,
        };
        let Some(table) = &engine.sockmap else { unreachable!("promoted to an engine that is not there") };
        let leave_on_bulk = engine.configured == EngineChoice::Auto;
        // In a box: most connections never get here, and should not pay for the room.
        let outcome = Box::pin(sockmap::forward(table, legs, leave_on_bulk, timeouts, traffic)).await;
        let why;
        (legs, why) = match outcome {
            Outcome::Ended(end) => return end,
            Outcome::Left(legs, why) => (legs, why),
        };
        promotion = match why {
            Left::Bulk | Left::Refused => promotion.after_return(),
            Left::Ending => Promotion::Never,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_run_here_is_not_offered_by_name() {
        let abilities = Abilities {
            splice: Ok(()),
            sockmap: Err("needs CAP_BPF".to_owned()),
            known_bugs: Err("an old kernel".to_owned()),
        };
        for choice in [EngineChoice::Auto, EngineChoice::Sockmap] {
            let engine = Effective::choose(choice, &abilities);
            assert_eq!((engine.name(), engine.reasons), ("splice", vec!["sockmap: needs CAP_BPF".to_owned()]));
            assert!(engine.warnings.is_empty(), "{:?}", engine.warnings);
        }
        for choice in [EngineChoice::Splice, EngineChoice::Copy] {
            let engine = Effective::choose(choice, &abilities);
            assert!(engine.reasons.is_empty() && engine.warnings.is_empty(), "{engine:?}");
        }
    }
}
