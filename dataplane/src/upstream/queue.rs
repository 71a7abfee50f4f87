//! Connections that wait for room where all targets of an upstream are full.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use prometheus::IntGauge;
use tokio::sync::{Mutex, Notify};

/// Connections that may wait for room at the targets of one upstream. With more, the rest would
/// only wait to be refused.
const QUEUE: usize = 1024;

/// How often a connection that waits looks for room that came about otherwise than by the end of
/// another.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Connections that wait for room, first come, first served.
#[derive(Debug)]
pub struct Queue {
    /// Whoever holds it is next, and looks for room; the others wait for it in the order in which
    /// they came.
    pub(super) next: Mutex<()>,
    pub(super) released: Notify,
    waiting: AtomicUsize,
    gauge: IntGauge,
}

/// A wait for room.
pub(super) struct Ticket<'a>(&'a Queue);

impl Queue {
    pub(super) fn new(gauge: IntGauge) -> Self {
        Self { next: Mutex::new(()), released: Notify::new(), waiting: AtomicUsize::new(0), gauge }
    }

    /// Whether nobody waits.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.load(Relaxed) == 0
    }

    /// Has whoever is next look for room.
    pub(super) fn released(&self) {
        self.released.notify_one();
    }

    /// `None`: too many wait already.
    pub(super) fn enter(&self) -> Option<Ticket<'_>> {
        self.waiting.fetch_update(Relaxed, Relaxed, |n| (n < QUEUE).then_some(n + 1)).ok()?;
        self.gauge.inc();
        Some(Ticket(self))
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Relaxed);
        self.0.gauge.dec();
    }
}
