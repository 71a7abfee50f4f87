//! All metrics of the process. Each module has its own beside what it measures; here they are
//! registered, and rendered for Prometheus.

use std::sync::Arc;

use crate::engine::EngineMetrics;
use crate::handover::metrics::HandoverMetrics;
use crate::listen::metrics::ListenMetrics;
use crate::register::Register;
use crate::registry::metrics::RegistryMetrics;
use crate::shortages::Shortages;
use crate::source::ConfigMetrics;
use crate::upstream::UpstreamMetrics;

pub struct Metrics {
    register: Register,
    /// Of listeners, and of connections that are not forwarded.
    pub listen: ListenMetrics,
    pub registry: RegistryMetrics,
    pub upstreams: UpstreamMetrics,
    pub engine: EngineMetrics,
    pub config: ConfigMetrics,
    /// Of what was taken over.
    pub handover: HandoverMetrics,
    /// What this machine has run out of.
    pub shortages: Arc<Shortages>,
}

impl Metrics {
    /// Registers everything; called once a process.
    pub fn new() -> Self {
        let register = Register::default();
        let shortages = Arc::new(Shortages::new(&register));
        Self {
            listen: ListenMetrics::new(&register),
            registry: RegistryMetrics::new(&register),
            upstreams: UpstreamMetrics::new(&register, shortages.clone()),
            engine: EngineMetrics::new(&register),
            config: ConfigMetrics::new(&register),
            handover: HandoverMetrics::new(&register),
            shortages,
            register,
        }
    }

    /// The text format, version 0.0.4.
    pub fn render(&self) -> String {
        self.engine.refresh();
        self.register.render()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}
