//! What is measured of engines.

use prometheus::{GaugeVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use super::selection::Selection;
use super::splice;
use crate::kernel::sys::kernel_release;
use crate::register::Register;

pub struct EngineMetrics {
    build_info: GaugeVec,
    refused: IntGaugeVec,
    pipes: IntGauge,
    /// Bytes queued in the kernel on our behalf, besides those in pipes.
    pub backlog: IntGauge,
    spills: IntCounterVec,
}

impl EngineMetrics {
    pub fn new(register: &Register) -> Self {
        Self {
            build_info: register.info(
                "build_info",
                "Version of the daemon, running kernel and engine in use.",
                &["version", "kernel", "engine"],
            ),
            refused: register.gauges(
                "engine_refused",
                "Engines that were wanted and do not run on this machine: 1, with the reason.",
                &["reason"],
            ),
            pipes: register.gauge("splice_pipes", "Pipes that exist for splice(2)."),
            backlog: register.gauge(
                "sockmap_backlog_bytes",
                "Bytes redirected inside the kernel that the receiving socket has not yet taken.",
            ),
            spills: register.counters(
                "sockmap_spills_total",
                "Times that a flow left the kernel path because its reader was slow.",
                &["direction"],
            ),
        }
    }

    /// Says what runs, and what does not.
    pub fn set(&self, engine: &Selection) {
        self.build_info.reset();
        self.build_info.with_label_values(&[env!("CARGO_PKG_VERSION"), &kernel_release(), engine.name()]).set(1.0);
        self.refused.reset();
        for reason in &engine.reasons {
            self.refused.with_label_values(&[reason.as_str()]).set(1);
        }
    }

    /// The counters of flows that left the kernel path, by the side of their source.
    pub fn spills(&self) -> [IntCounter; 2] {
        ["to_upstream", "to_client"].map(|direction| self.spills.with_label_values(&[direction]))
    }

    /// Brings those up to date that nobody counts.
    pub fn refresh(&self) {
        self.pipes.set(splice::existing() as i64);
    }
}
