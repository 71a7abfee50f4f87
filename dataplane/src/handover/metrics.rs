//! What is measured of a hand-over, by the process that took over.

use prometheus::{Gauge, IntCounter};

use crate::register::Register;

pub struct HandoverMetrics {
    kept: IntCounter,
    reset: IntCounter,
    duration: Gauge,
}

impl HandoverMetrics {
    pub fn new(register: &Register) -> Self {
        let connections = register.counters(
            "handover_connections_total",
            "Connections of a predecessor, by what became of them.",
            &["result"],
        );
        Self {
            kept: connections.with_label_values(&["kept"]),
            reset: connections.with_label_values(&["reset"]),
            duration: register.time(
                "handover_duration_seconds",
                "How long connections stood still when this process took over; 0: there was nothing to take over.",
            ),
        }
    }

    /// This process has taken over: so many connections were kept and so many reset, and they stood
    /// still for so many seconds.
    pub fn note(&self, kept: usize, reset: usize, pause: f64) {
        self.kept.inc_by(kept as u64);
        self.reset.inc_by(reset as u64);
        self.duration.set(pause);
    }
}
