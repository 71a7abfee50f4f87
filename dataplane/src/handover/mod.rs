//! How one process hands its listening sockets and connections to the next one, without anybody
//! noticing: an upgrade, a restart by systemd, or the start after a crash.
//!
//! What is handed over is a [`Package`]: a file in memory that says what there is, and queues with
//! the descriptors. An upgrade sends it through a [`Channel`] to a successor that runs already; for
//! a restart it waits in systemd's file descriptor [`store`]. The successor knows everything before
//! it does anything: what it does not understand it refuses, and the predecessor goes on.
//!
//! It must not know how a connection stops or goes on, nor when to hand over.

mod channel;
pub mod metrics;
mod package;
pub mod program;
pub mod store;
pub mod supervisor;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

pub use channel::{Channel, Message};
pub use package::{Contents, Package};

use crate::moment::Moment;
use crate::source::kept;
use crate::upstream::handover::UpstreamsState;

/// Changes when a reader of the old form would take the new one for something else. A field that
/// is only new needs no other number: who does not know it refuses it by name.
const FORMAT: u32 = 1;

/// What the predecessor has, but for the connections.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Offer {
    format: u32,
    /// Of the predecessor.
    pub version: String,
    /// How many processes there were before the predecessor.
    pub generation: u64,
    /// When connections stopped.
    pub stopped: Moment,
    /// In the order of their descriptors, which come before those of connections.
    pub sockets: Vec<Listening>,
    /// The commit in force.
    pub commit: Option<kept::Document>,
    pub upstreams: UpstreamsState,
    /// Connections that could not be stopped, and end with the predecessor.
    pub left_behind: usize,
    /// Names of packages of listening sockets in systemd's store.
    pub stored: Vec<String>,
}

/// A listening socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Listening {
    /// For clients.
    Public(SocketAddr),
    /// `[admin] bind`
    Admin(SocketAddr),
    /// `[admin] socket`
    Control(PathBuf),
    Webhook(SocketAddr),
}

impl Offer {
    /// Of this version.
    pub fn new(generation: u64, sockets: Vec<Listening>, upstreams: UpstreamsState) -> Self {
        Self {
            format: FORMAT,
            version: env!("DATAPLANE_VERSION").to_owned(),
            generation,
            stopped: Moment::now(),
            sockets,
            commit: None,
            upstreams,
            left_behind: 0,
            stored: Vec::new(),
        }
    }

    /// The addresses that clients connect to.
    pub fn public(&self) -> Vec<SocketAddr> {
        let mut all: Vec<_> = self
            .sockets
            .iter()
            .filter_map(|socket| if let Listening::Public(addr) = socket { Some(*addr) } else { None })
            .collect();
        all.dedup();
        all
    }
}

/// How this process came to be in charge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum By {
    Upgrade,
    Restart,
    Crash,
}

impl By {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Upgrade => "upgrade",
            Self::Restart => "restart",
            Self::Crash => "crash",
        }
    }
}

/// Where this process stands in the line of those that handed over, for `dataplane status`.
#[derive(Debug, Default)]
pub struct Lineage(Mutex<Descent>);

/// See [`Lineage`].
#[derive(Debug, Clone, Default, Serialize)]
pub struct Descent {
    /// How many processes there were before this one.
    pub generation: u64,
    pub predecessor: Option<Predecessor>,
    pub inherited: Inherited,
    /// Seconds that connections stood still, when this process took over.
    pub pause: Option<f64>,
    /// Why the last attempt to hand over failed.
    pub last_error: Option<String>,
}

/// See [`Descent`].
#[derive(Debug, Clone, Serialize)]
pub struct Predecessor {
    pub version: String,
    pub by: By,
}

/// What became of the predecessor's connections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inherited {
    pub kept: usize,
    pub reset: usize,
}

/// What a successor says when it serves.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    pub inherited: Inherited,
    /// Seconds that connections stood still.
    pub pause: f64,
    pub version: String,
}

impl Lineage {
    pub fn descent(&self) -> Descent {
        self.0.lock().expect("no panic while held").clone()
    }

    pub fn update(&self, change: impl FnOnce(&mut Descent)) {
        change(&mut self.0.lock().expect("no panic while held"));
    }
}
