//! What is measured of upstreams and their targets.

use std::sync::Arc;

use prometheus::{Histogram, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec};

use crate::register::Register;
use crate::shortages::Shortages;
use crate::tailnet::Way;

pub struct UpstreamMetrics {
    connect_duration: HistogramVec,
    /// By upstream, target and reason.
    pub connect_failures: IntCounterVec,
    target_up: IntGaugeVec,
    /// By upstream, target and path: 1 for the path that is taken. For targets that are peers of a
    /// tailnet.
    pub tailnet_path: IntGaugeVec,
    queued: IntGaugeVec,
    /// What dials may meet.
    pub shortages: Arc<Shortages>,
}

impl UpstreamMetrics {
    pub fn new(register: &Register, shortages: Arc<Shortages>) -> Self {
        Self {
            connect_duration: register.durations(
                "upstream_connect_duration_seconds",
                "Duration of successful connects to targets.",
                &["upstream"],
            ),
            connect_failures: register.counters(
                "upstream_connect_failures_total",
                "Connects to targets that failed.",
                &["upstream", "target", "reason"],
            ),
            target_up: register.gauges(
                "upstream_target_up",
                "Whether the target is up by checks, connections, tailnet and resolver.",
                &["upstream", "target"],
            ),
            tailnet_path: register.gauges(
                "tailnet_path",
                "The way that the tailnet takes to a target: 1 for direct, relayed or unknown.",
                &["upstream", "target", "path"],
            ),
            queued: register.gauges(
                "upstream_queued",
                "Connections that wait because every target has max_connections_per_target.",
                &["upstream"],
            ),
            shortages,
        }
    }

    /// The histogram of an upstream's connects.
    pub fn connect_duration(&self, upstream: &str) -> Histogram {
        self.connect_duration.with_label_values(&[upstream])
    }

    /// The gauge of connections that wait for an upstream's targets.
    pub fn queued(&self, upstream: &str) -> IntGauge {
        self.queued.with_label_values(&[upstream])
    }

    /// The gauge of a target.
    pub fn target_up(&self, upstream: &str, target: &str) -> IntGauge {
        self.target_up.with_label_values(&[upstream, target])
    }

    /// Forgets the gauges of a target that is no longer configured.
    pub fn remove_target(&self, upstream: &str, target: &str) {
        let _ = self.target_up.remove_label_values(&[upstream, target]);
        for way in Way::ALL {
            let _ = self.tailnet_path.remove_label_values(&[upstream, target, way.as_str()]);
        }
    }
}
