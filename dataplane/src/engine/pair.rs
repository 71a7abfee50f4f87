//! The words of this folder: two sides, the pair of their sockets, how it ends.

use std::io;
use std::ops::{Index, IndexMut};
use std::sync::atomic::{AtomicU8, Ordering::SeqCst};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;

use super::splice::Pipe;

/// What carries the bytes of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Through a buffer in userspace: the reference, runs anywhere.
    Copy,
    /// Bulk through pipes with splice(2), small messages through a buffer.
    Splice,
    /// Redirected inside the kernel.
    Sockmap,
}

impl Kind {
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

/// The two sides of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Who came to our listener.
    Client,
    /// Whom we dialled.
    Upstream,
}

impl Side {
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Client => Self::Upstream,
            Self::Upstream => Self::Client,
        }
    }
}

pub const SIDES: [Side; 2] = [Side::Client, Side::Upstream];

/// One of each side. Of a direction it is the side of its source, where nothing else is said.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PerSide<T> {
    pub client: T,
    pub upstream: T,
}

impl<T> PerSide<T> {
    /// What this says of each side.
    pub fn new(mut of: impl FnMut(Side) -> T) -> Self {
        Self { client: of(Side::Client), upstream: of(Side::Upstream) }
    }

    /// As [`new`](Self::new), unless one of them fails.
    pub fn try_new<E>(mut of: impl FnMut(Side) -> Result<T, E>) -> Result<Self, E> {
        Ok(Self { client: of(Side::Client)?, upstream: of(Side::Upstream)? })
    }

    pub fn iter(&self) -> impl Iterator<Item = &T> {
        [&self.client, &self.upstream].into_iter()
    }
}

impl<T> Index<Side> for PerSide<T> {
    type Output = T;

    fn index(&self, side: Side) -> &T {
        match side {
            Side::Client => &self.client,
            Side::Upstream => &self.upstream,
        }
    }
}

impl<T> IndexMut<Side> for PerSide<T> {
    fn index_mut(&mut self, side: Side) -> &mut T {
        match side {
            Side::Client => &mut self.client,
            Side::Upstream => &mut self.upstream,
        }
    }
}

/// A client and an upstream, both connected, with SO_LINGER {on, 0} set: dropping it resets both.
/// What an engine begins with, and what it leaves to the next one.
#[derive(Debug)]
pub struct Legs {
    /// The accepted socket.
    pub client: TcpStream,
    /// The dialled socket.
    pub upstream: TcpStream,
    /// By side of the source.
    pub streams: PerSide<StreamState>,
    /// By side of the source: to be sent before anything else is read.
    pub unsent: PerSide<Unsent>,
}

impl Legs {
    /// Of a new connection; `first` is for the upstream.
    pub fn new(client: TcpStream, upstream: TcpStream, first: Unsent) -> Self {
        let unsent = PerSide { client: first, upstream: Unsent::Nothing };
        Self { client, upstream, streams: PerSide::default(), unsent }
    }
}

/// What was read of a direction, and was not sent yet.
#[derive(Debug, Default)]
pub enum Unsent {
    #[default]
    Nothing,
    Bytes {
        bytes: Vec<u8>,
        /// Length of a header of ours in front, which is not payload.
        header: usize,
    },
    /// In a pipe, which holds at least one byte.
    Pipe(Pipe),
}

impl Unsent {
    /// These bytes, none of which is a header.
    pub fn payload(bytes: Vec<u8>) -> Self {
        Self::bytes(bytes, 0)
    }

    /// These bytes, a header of so many in front.
    pub fn bytes(bytes: Vec<u8>, header: usize) -> Self {
        if bytes.is_empty() { Self::Nothing } else { Self::Bytes { bytes, header } }
    }

    pub const fn is_empty(&self) -> bool {
        matches!(self, Self::Nothing)
    }
}

/// How far a direction of a connection between two engines is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StreamState {
    /// Bytes may come.
    #[default]
    Open,
    /// Its source has sent FIN; what is unsent goes first.
    Ended,
    /// FIN was sent on, too.
    Finished,
}

/// Deadlines of an established connection.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// No byte either way for so long: [`End::Idle`].
    pub idle: Duration,
    /// The same, once one side has sent FIN: also no byte that a slow reader has taken.
    pub half_closed: Duration,
    /// A peer that acknowledges nothing for so long: [`End::Vanished`].
    pub dead_peer: Duration,
}

/// How an engine is told to stop, so that another process can go on. Whoever tells it polls the
/// engine afterwards: nobody is woken.
#[derive(Debug, Default)]
pub struct Halt(AtomicU8);

/// How far a connection has to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Stop {
    No,
    /// The kernel does not forward it any more. That takes a while: the relay goes on meanwhile.
    LeaveKernel,
    /// Nobody forwards it any more.
    All,
}

impl Halt {
    /// Of a connection that has to stop as far as that from the beginning on.
    pub const fn new(stop: Stop) -> Self {
        Self(AtomicU8::new(stop as u8))
    }

    /// The engine is to stop, as soon as nothing is lost by that.
    pub fn ask(&self, stop: Stop) {
        self.0.fetch_max(stop as u8, SeqCst);
    }

    /// It need not stop any more.
    pub fn withdraw(&self) {
        self.0.store(Stop::No as u8, SeqCst);
    }

    /// Whether it is to stop as far as that, or farther.
    pub fn is_asked(&self, stop: Stop) -> bool {
        self.0.load(SeqCst) >= stop as u8
    }
}

/// What became of a connection that an engine forwarded.
#[derive(Debug)]
pub enum Forwarded {
    Ended(End),
    /// It was told to stop: somebody else goes on.
    Halted(Legs),
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
pub(super) fn ended_by(side: Side, error: io::Result<Option<io::Error>>) -> End {
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
