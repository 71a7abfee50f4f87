//! What a connection has carried, readable while it runs, whoever forwards it.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use super::pair::{Kind, SIDES, Side};
use crate::moment::Moment;

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
    /// What forwards it while the kernel does not.
    relay: Kind,
    /// While it does: what only the kernel counts.
    offload: Mutex<Option<Arc<dyn Offload>>>,
    /// What forwarded it in the kernel, if it ever was there.
    promoted: OnceLock<Kind>,
    /// The target's FIN has come: it has nothing left of the connection, whatever of it still waits
    /// here for the client.
    target_closed: Notify,
}

impl Traffic {
    /// Of a connection that this forwards.
    pub fn by(relay: Kind) -> Self {
        Self {
            to_upstream: Counter::default(),
            to_client: Counter::default(),
            begun: Instant::now(),
            last_bytes: AtomicU64::new(0),
            relay,
            offload: Mutex::default(),
            promoted: OnceLock::new(),
            target_closed: Notify::new(),
        }
    }

    /// Of a connection that was forwarded before, by another process perhaps.
    pub fn resumed(relay: Kind, carried: &Carried) -> Self {
        let begun = carried.begun.instant();
        let last_bytes = carried.last_bytes.instant().saturating_duration_since(begun);
        let counter = |[kernel, userspace]: [u64; 2]| Counter { kernel: kernel.into(), userspace: userspace.into() };
        Self {
            to_upstream: counter(carried.to_upstream),
            to_client: counter(carried.to_client),
            begun,
            last_bytes: AtomicU64::new(last_bytes.as_millis() as u64),
            promoted: carried.promoted.map_or_else(OnceLock::new, Into::into),
            ..Self::by(relay)
        }
    }

    /// What there is to know when somebody else goes on with it. No engine in the kernel has it.
    pub fn carried(&self) -> Carried {
        let Look { to_upstream, to_client, .. } = self.look();
        Carried {
            begun: self.begun.into(),
            last_bytes: self.last_bytes().into(),
            to_upstream,
            to_client,
            promoted: self.promoted.get().copied(),
        }
    }

    /// When the connection began.
    pub fn begun(&self) -> Instant {
        self.begun
    }

    /// When a byte last moved; if none has, when the connection began.
    pub fn last_bytes(&self) -> Instant {
        self.begun + Duration::from_millis(self.last_bytes.load(Relaxed))
    }

    /// The furthest that the connection got: for the record of one that has ended.
    pub fn last_engine(&self) -> Kind {
        self.promoted.get().copied().unwrap_or(self.relay)
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

    /// Notes that the target's FIN has come.
    pub fn note_target_closed(&self) {
        // Kept for whoever does not wait yet.
        self.target_closed.notify_one();
    }

    /// Waits until the target has closed its side, once.
    pub async fn target_closed(&self) {
        self.target_closed.notified().await;
    }

    pub fn look(&self) -> Look {
        let offload = self.offload();
        let bytes = |from: Side| {
            let counter = self.direction(from);
            let redirected = offload.as_ref().map_or(0, |offload| offload.redirected(from));
            [counter.by(Path::Kernel) + redirected, counter.by(Path::Userspace)]
        };
        let idle = self.begun.elapsed().saturating_sub(Duration::from_millis(self.last_bytes.load(Relaxed)));
        Look {
            engine: offload.as_ref().map_or(self.relay, |offload| offload.kind()),
            asleep: offload.as_ref().is_some_and(|offload| offload.is_asleep()),
            to_upstream: bytes(Side::Client),
            to_client: bytes(Side::Upstream),
            idle: offload.as_ref().map_or(idle, |offload| offload.idle()),
        }
    }

    /// Whether an engine in the kernel has it.
    pub fn is_offloaded(&self) -> bool {
        self.offload().is_some()
    }

    /// Bytes queued in the kernel on behalf of this connection.
    pub fn backlog(&self) -> u64 {
        self.offload().as_ref().map_or(0, |offload| offload.backlog())
    }

    /// From now on the kernel forwards it.
    pub(super) fn engage(&self, offload: Arc<dyn Offload>) {
        // One that moves for a second time is named after the first.
        let _ = self.promoted.set(offload.kind());
        *self.offload() = Some(offload);
    }

    /// From now on what the kernel has counted is counted here.
    pub(super) fn disengage(&self) -> Option<Arc<dyn Offload>> {
        let mut offload = self.offload();
        if let Some(offload) = &*offload {
            for from in SIDES {
                self.direction(from).add(Path::Kernel, offload.redirected(from) as usize);
            }
            self.touch(Instant::now().checked_sub(offload.idle()).unwrap_or(self.begun));
        }
        offload.take()
    }

    fn offload(&self) -> MutexGuard<'_, Option<Arc<dyn Offload>>> {
        self.offload.lock().expect("no panic while held")
    }
}

/// What a connection has carried, for another process that goes on with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Carried {
    begun: Moment,
    last_bytes: Moment,
    /// Bytes by path: kernel, userspace.
    to_upstream: [u64; 2],
    to_client: [u64; 2],
    /// What forwarded it in the kernel, if it ever was there.
    promoted: Option<Kind>,
}

/// A connection that an engine forwards inside the kernel, for whoever looks at it meanwhile.
pub trait Offload: fmt::Debug + Send + Sync {
    fn kind(&self) -> Kind;

    /// Bytes that the kernel has sent on, of the direction from this side.
    fn redirected(&self, from: Side) -> u64;

    /// Bytes that are queued in the kernel on our behalf: redirected, and not yet accepted by the
    /// sink.
    fn backlog(&self) -> u64;

    /// Since when no byte came.
    fn idle(&self) -> Duration;

    /// Whether the kernel forwards both ways without waking anybody.
    fn is_asleep(&self) -> bool;
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
    pub to_client: [u64; 2],
    /// Since when no byte moved.
    pub idle: Duration,
}

impl Look {
    /// Whether no byte has come back yet.
    pub fn is_unanswered(&self) -> bool {
        self.to_client == [0, 0]
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
}
