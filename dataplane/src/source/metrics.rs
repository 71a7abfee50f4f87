//! What is measured of configurations: which one is in force, and how the last load went.

use prometheus::{Gauge, GaugeVec, IntGauge};

use crate::register::Register;

pub struct ConfigMetrics {
    info: GaugeVec,
    /// 1 when the last reload (or start) succeeded.
    pub reload_success: IntGauge,
    reload_timestamp: Gauge,
    /// Unix time of the last look at the repository that reached it; 0 without one.
    pub repository_reached: Gauge,
}

impl ConfigMetrics {
    pub fn new(register: &Register) -> Self {
        Self {
            info: register.info(
                "config_info",
                "Hash of the configuration in force, and its commit; differs between entrance nodes that disagree.",
                &["hash", "commit"],
            ),
            reload_success: register
                .gauge("config_last_reload_success", "Whether the last load of the configuration succeeded."),
            reload_timestamp: register.time(
                "config_last_reload_success_timestamp_seconds",
                "Unix time of the last successful load of the configuration.",
            ),
            repository_reached: register.time(
                "config_repository_reached_timestamp_seconds",
                "Unix time when the repository of the configuration was last reached; 0 without one.",
            ),
        }
    }

    pub fn set(&self, hash: &str, commit: &str, unix_time: f64) {
        self.info.reset();
        self.info.with_label_values(&[hash, commit]).set(1.0);
        self.reload_success.set(1);
        self.reload_timestamp.set(unix_time);
    }
}
