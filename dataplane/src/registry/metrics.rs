//! What is measured of connections that are forwarded.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use crate::engine::{End, Kind, Path};
use crate::register::Register;

pub struct RegistryMetrics {
    active: IntGaugeVec,
    closed: IntCounterVec,
    bytes: IntCounterVec,
    routes: Mutex<HashMap<Arc<str>, Arc<RouteMetrics>>>,
}

/// The handles of one route.
#[derive(Debug)]
pub struct RouteMetrics {
    active: Vec<IntGauge>,
    closed: Vec<IntCounter>,
    /// to_upstream kernel, to_upstream userspace, to_client kernel, to_client userspace.
    pub bytes: [IntCounter; 4],
}

impl RouteMetrics {
    /// Connections that this engine forwards now.
    pub fn active(&self, kind: Kind) -> &IntGauge {
        &self.active[kind as usize]
    }

    /// The counter of one way to end.
    pub fn closed(&self, end: End) -> &IntCounter {
        let index = End::ALL.iter().position(|e| *e == end).expect("ALL holds every end");
        &self.closed[index]
    }
}

impl RegistryMetrics {
    pub fn new(register: &Register) -> Self {
        Self {
            active: register.gauges("connections_active", "Connections being forwarded.", &["route", "engine"]),
            closed: register.counters(
                "connections_closed_total",
                "Forwarded connections that ended, and how.",
                &["route", "reason"],
            ),
            bytes: register.counters(
                "bytes_total",
                "Payload bytes forwarded, without the PROXY header.",
                &["route", "direction", "path"],
            ),
            routes: Mutex::default(),
        }
    }

    /// The handles of a route, all at zero the first time.
    pub fn of(&self, name: &Arc<str>) -> Arc<RouteMetrics> {
        let mut routes = self.routes.lock().expect("no panic while held");
        let bytes = |direction: &str, path: Path| self.bytes.with_label_values(&[&**name, direction, path.as_str()]);
        let entry = routes.entry(name.clone()).or_insert_with(|| {
            Arc::new(RouteMetrics {
                active: Kind::ALL.iter().map(|k| self.active.with_label_values(&[&**name, k.as_str()])).collect(),
                closed: End::ALL.iter().map(|e| self.closed.with_label_values(&[&**name, e.as_str()])).collect(),
                bytes: [
                    bytes("to_upstream", Path::Kernel),
                    bytes("to_upstream", Path::Userspace),
                    bytes("to_client", Path::Kernel),
                    bytes("to_client", Path::Userspace),
                ],
            })
        });
        entry.clone()
    }
}
