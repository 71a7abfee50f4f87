//! A connection that has stopped so that another process can go on with it: what that has to know,
//! in a form that both understand, and its sockets. And where such connections are collected.
//!
//! Before a connection has a target, all that matters is what was read of the client: the other
//! process reads the rest, and dials. Afterwards it is the two sockets, and what was read and not
//! yet sent.
//!
//! It must not know how a connection stops and goes on, nor how state and sockets get to the other
//! process. A field that the other one does not know is an error there: nothing is dropped in
//! silence.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};

use base64::Engine as _;
use base64::display::Base64Display;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tokio::sync::Notify;

use crate::engine::{Carried, Halt, PerSide, Stop, StreamState};
use crate::generation::Listed;
use crate::loops::Mark;
use crate::moment::Moment;

/// Where connections stop while the daemon hands over.
#[derive(Debug, Default)]
pub struct Parking {
    /// How far connections have to stop.
    stop: Halt,
    opened: Notify,
    parcels: Mutex<Option<Vec<Parcel>>>,
}

impl Parking {
    /// From now on nothing is forwarded by the kernel; those in [`crate::registry`] have to be
    /// told.
    pub fn leave_kernel(&self) {
        self.stop.ask(Stop::LeaveKernel);
    }

    /// From now on connections stop; those in [`crate::registry`] have to be told.
    pub fn open(&self) {
        self.parcels().get_or_insert_default();
        self.stop.ask(Stop::All);
        self.opened.notify_waiters();
    }

    /// How far a connection has to stop now.
    pub fn stop(&self) -> Stop {
        match () {
            () if self.is_open() => Stop::All,
            () if self.stop.is_asked(Stop::LeaveKernel) => Stop::LeaveKernel,
            () => Stop::No,
        }
    }

    fn is_open(&self) -> bool {
        self.stop.is_asked(Stop::All)
    }

    /// Waits until connections have to stop.
    pub async fn opened(&self) {
        // Made before the look: what comes in between wakes it.
        let opened = self.opened.notified();
        if !self.is_open() {
            opened.await;
        }
    }

    /// What has stopped, oldest first; from now on connections go on.
    pub fn close(&self) -> Vec<Parcel> {
        self.stop.withdraw();
        let mut parcels = self.parcels().take().unwrap_or_default();
        parcels.sort_by_key(|parcel| parcel.state.accepted());
        parcels
    }

    /// Leaves a connection to whoever hands over; gives it back when that was done without it.
    pub fn park(&self, parcel: Parcel) -> Option<Parcel> {
        match &mut *self.parcels() {
            Some(parcels) => {
                parcels.push(parcel);
                None
            }
            None => Some(parcel),
        }
    }

    fn parcels(&self) -> MutexGuard<'_, Option<Vec<Parcel>>> {
        self.parcels.lock().expect("no panic while held")
    }
}

/// A connection that has stopped.
#[derive(Debug)]
pub struct Parcel {
    pub state: State,
    /// As many as [`State::descriptors`] says: the client's socket, the target's, then for each
    /// direction that has bytes in a pipe its two ends.
    pub descriptors: Vec<OwnedFd>,
    /// As many as [`State::bytes`] says: what each direction has read and not sent, in memory.
    pub bytes: Vec<u8>,
}

/// What there is to know of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It has no target yet.
    Arriving(Arriving),
    Established(Box<Running>),
}

/// A connection without a target.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Arriving {
    pub listener: Arc<str>,
    pub start: Begun,
    pub peer: SocketAddr,
    pub client: SocketAddr,
    pub server: SocketAddr,
    /// The header of a proxy in front of us was read: it named `client` and `server`.
    pub is_introduced: bool,
    pub unique_id: Option<Bytes>,
    pub read: Bytes,
    /// It is answered with this and has nothing else to expect.
    pub answer: Option<Bytes>,
}

/// A connection with a target.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Running {
    pub start: Begun,
    pub client: SocketAddr,
    pub listener: Arc<str>,
    pub server_name: Option<Box<str>>,
    pub alpn: Option<Box<str>>,
    pub route: Arc<str>,
    pub upstream: Arc<str>,
    pub target: Arc<str>,
    pub listed: Listed,
    pub dialled: Option<(u16, IpAddr)>,
    /// One request, one answer.
    pub is_exchange: bool,
    /// It counts among its client's.
    pub counts: bool,
    /// While nothing has come back: what tells whether it comes back to us.
    pub mark: Option<Mark>,
    pub carried: Carried,
    /// Its route was removed: when it has to end.
    pub ends: Option<Moment>,
    /// By side of the source.
    pub streams: PerSide<StreamState>,
    pub unsent: PerSide<Rest>,
}

/// When a connection was accepted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Begun {
    /// Unix time, microseconds.
    pub wall: u64,
    pub at: Moment,
}

/// What was read and not sent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Rest {
    Nothing,
    /// So many bytes.
    Bytes {
        len: usize,
        header: usize,
    },
    /// So many bytes, in a pipe.
    Pipe(usize),
}

/// Bytes, in base64.
#[derive(Debug, Clone, PartialEq)]
pub struct Bytes(pub Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&Base64Display::new(&self.0, &BASE64_STANDARD))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        BASE64_STANDARD.decode(text).map(Self).map_err(serde::de::Error::custom)
    }
}

impl State {
    /// How many descriptors go with it.
    pub fn descriptors(&self) -> usize {
        match self {
            Self::Arriving(_) => 1,
            Self::Established(running) => {
                let pipes = running.unsent.iter().filter(|rest| matches!(rest, Rest::Pipe(_))).count();
                2 + 2 * pipes
            }
        }
    }

    /// How many bytes go with it.
    pub fn bytes(&self) -> usize {
        let Self::Established(running) = self else { return 0 };
        running.unsent.iter().map(|rest| if let Rest::Bytes { len, .. } = rest { *len } else { 0 }).sum()
    }

    /// Whether it has no target yet.
    pub fn is_arriving(&self) -> bool {
        matches!(self, Self::Arriving(_))
    }

    fn accepted(&self) -> Moment {
        match self {
            Self::Arriving(arriving) => arriving.start.at,
            Self::Established(running) => running.start.at,
        }
    }
}
