//! What the threads of the process have in common.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex};
use std::time::{Instant, SystemTime};

use arc_swap::ArcSwap;
use rustix::io::Errno;

use crate::admission::Admission;
use crate::generation::Generation;
use crate::handover::Lineage;
use crate::handover::program::Program;
use crate::loops::InFlight;
use crate::metrics::Metrics;
use crate::parking::Parking;
use crate::registry::Registry;
use crate::rejection_log::RejectionLog;

pub struct Shared {
    /// The configuration in force; a connection takes it once, at accept.
    pub generation: ArcSwap<Generation>,
    pub metrics: Metrics,
    pub registry: Arc<Registry>,
    pub admission: Arc<Admission>,
    /// Where connections stop for another process to go on with them.
    pub parking: Parking,
    /// Hellos of the connections that there are.
    pub in_flight: Arc<InFlight>,
    /// Which refusals are logged.
    pub rejections: Arc<RejectionLog>,
    /// Connections are accepted.
    pub ready: AtomicBool,
    /// What bounds the number of connections.
    pub limited_by: Mutex<String>,
    /// Addresses that this machine did not have when they were to be bound.
    pub waiting: Mutex<Vec<Waiting>>,
    /// How the configuration and its source are.
    pub load: Mutex<LoadStatus>,
    /// Who was in charge before.
    pub lineage: Lineage,
    /// What this process runs.
    pub program: Program,
    /// When the daemon started.
    pub started: Instant,
    /// Numbers the connections, for UNIQUE_ID.
    pub next_id: AtomicU64,
    /// Random per process: two daemons never give the same UNIQUE_ID.
    pub id_prefix: u64,
}

/// An address of this machine that was not there: it is listened on as soon as it can be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// What to listen on.
    pub addr: SocketAddr,
    pub role: Role,
    /// Why it could not be bound the last time: when it has come, something else may be in the way.
    pub why: Errno,
}

impl Waiting {
    /// Of an address that could not be bound.
    pub fn new(addr: SocketAddr, role: Role, error: &io::Error) -> Self {
        Self { addr, role, why: errno(error) }
    }

    /// Takes note of another failure; whether it is not the same as before.
    pub fn fails_otherwise(&mut self, error: &io::Error) -> bool {
        let why = errno(error);
        std::mem::replace(&mut self.why, why) != why
    }

    /// Why it could not be bound, in words.
    pub fn reason(&self) -> String {
        let port = self.addr.port();
        match self.why {
            Errno::ADDRNOTAVAIL => "this machine does not have the address yet".to_owned(),
            Errno::ADDRINUSE => {
                format!("another program listens there: `ss -ltnp 'sport = :{port}'` shows it")
            }
            Errno::ACCESS => "ports below 1024 need root or CAP_NET_BIND_SERVICE".to_owned(),
            other => other.to_string(),
        }
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// See [`Waiting`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// The listener of this name.
    Listener(Arc<str>),
    /// `[admin] bind`
    Admin,
    /// The webhook of `[source]`.
    Webhook,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Listener(name) => write!(f, "listener {name}"),
            Self::Admin => f.write_str("admin"),
            Self::Webhook => f.write_str("webhook"),
        }
    }
}

/// What came of looking for a new configuration.
#[derive(Debug, Default)]
pub struct LoadStatus {
    /// When there last was nothing wrong: put in force, or looked at and found unchanged.
    pub last_success: Option<SystemTime>,
    /// What is wrong since then, and when it was last seen to be.
    pub last_error: Option<LoadFailure>,
}

/// See [`LoadStatus`].
#[derive(Debug)]
pub struct LoadFailure {
    /// For people.
    pub text: String,
    pub at: SystemTime,
    /// The repository was not reached: nothing is known to be wrong with the configuration.
    pub is_of_repository: bool,
}
