//! What the threads of the process have in common.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Instant;

use arc_swap::ArcSwap;

use crate::admission::Admission;
use crate::generation::Generation;
use crate::metrics::Metrics;
use crate::registry::Registry;

/// See the module.
pub struct Shared {
    /// The configuration in force; a connection takes it once, at accept.
    pub generation: ArcSwap<Generation>,
    /// Counters.
    pub metrics: Metrics,
    /// Live connections.
    pub registry: Arc<Registry>,
    /// Limits on their number.
    pub admission: Arc<Admission>,
    /// Connections are accepted.
    pub ready: AtomicBool,
    /// Why the last reload failed.
    pub last_error: std::sync::Mutex<Option<String>>,
    /// When the daemon started.
    pub started: Instant,
    /// Numbers the connections, for UNIQUE_ID.
    pub next_id: AtomicU64,
    /// Random per process: two daemons never give the same UNIQUE_ID.
    pub id_prefix: u64,
}
