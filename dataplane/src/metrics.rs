//! What Prometheus scrapes: names and labels of the contract, handles that the hot path increments without a lookup.
//!
//! Label values come from the configuration, never from a client. This module knows no socket; live connections are in [`crate::registry`].

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

use crate::engine::{End, Kind, Path, Selection};
use crate::reject::Reason;
use crate::shortages::Shortages;
use crate::tailnet::Way;

/// All metrics of the process.
pub struct Metrics {
    registry: Registry,
    build_info: GaugeVec,
    config_info: GaugeVec,
    /// 1 when the last reload (or start) succeeded.
    pub reload_success: IntGauge,
    /// Unix time of the last successful load.
    pub reload_timestamp: Gauge,
    /// Unix time of the last look at the repository that reached it; 0 without one.
    pub repository_reached: Gauge,
    accepted: IntCounterVec,
    rejected: IntCounterVec,
    redirected: IntCounterVec,
    active: IntGaugeVec,
    closed: IntCounterVec,
    bytes: IntCounterVec,
    /// From accept to the last byte of the hello.
    pub hello_duration: Histogram,
    connect_duration: HistogramVec,
    /// By upstream, target and reason.
    pub connect_failures: IntCounterVec,
    target_up: IntGaugeVec,
    /// By upstream, target and path: 1 for the path that is taken. For targets that are peers of a tailnet.
    pub tailnet_path: IntGaugeVec,
    queued: IntGaugeVec,
    /// accept(2) calls that failed for want of a file descriptor or memory.
    pub accept_errors: IntCounter,
    pipes: IntGauge,
    /// Bytes queued in the kernel on our behalf, besides those in pipes.
    pub sockmap_backlog: IntGauge,
    sockmap_spills: IntCounterVec,
    /// What this machine has run out of.
    pub shortages: Arc<Shortages>,
    listener_bound: IntGaugeVec,
    engine_refused: IntGaugeVec,
    listeners: Mutex<HashMap<Arc<str>, Arc<ListenerMetrics>>>,
    routes: Mutex<HashMap<Arc<str>, Arc<RouteMetrics>>>,
}

/// The handles of one listener.
#[derive(Debug)]
pub struct ListenerMetrics {
    /// Connections accepted.
    pub accepted: IntCounter,
    /// Requests answered with a redirection to https.
    pub redirected: IntCounter,
    rejected: Vec<IntCounter>,
}

impl ListenerMetrics {
    /// The counter of one reason.
    pub fn rejected(&self, reason: Reason) -> &IntCounter {
        &self.rejected[reason as usize]
    }
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

/// Seconds; a LAN answers in under a millisecond, a relayed tailnet path in hundreds.
const SECONDS: &[f64] =
    &[0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

impl Metrics {
    /// Registers everything; called once a process.
    pub fn new() -> Self {
        let registry = Registry::new();
        macro_rules! register {
            ($metric:expr) => {{
                let metric = $metric.expect("constant names and labels are valid");
                registry.register(Box::new(metric.clone())).expect("each name is registered once");
                metric
            }};
        }
        let opts = |name: &str, help: &str| Opts::new(format!("dataplane_{name}"), help);
        let histogram = |name: &str, help: &str| HistogramOpts::from(opts(name, help)).buckets(SECONDS.to_vec());
        let build_info = register!(GaugeVec::new(
            opts("build_info", "Version of the daemon, running kernel and engine in use."),
            &["version", "kernel", "engine"]
        ));
        let config_info = register!(GaugeVec::new(
            opts(
                "config_info",
                "Hash of the configuration in force, and its commit; differs between entrance nodes that disagree."
            ),
            &["hash", "commit"]
        ));
        let reload_success = register!(IntGauge::with_opts(opts(
            "config_last_reload_success",
            "Whether the last load of the configuration succeeded."
        )));
        let reload_timestamp = register!(Gauge::with_opts(opts(
            "config_last_reload_success_timestamp_seconds",
            "Unix time of the last successful load of the configuration."
        )));
        let repository_reached = register!(Gauge::with_opts(opts(
            "config_repository_reached_timestamp_seconds",
            "Unix time when the repository of the configuration was last reached; 0 without one."
        )));
        let accepted =
            register!(IntCounterVec::new(opts("connections_accepted_total", "Connections accepted."), &["listener"]));
        let rejected = register!(IntCounterVec::new(
            opts("connections_rejected_total", "Connections closed without a byte sent upstream."),
            &["listener", "reason"]
        ));
        let redirected = register!(IntCounterVec::new(
            opts("http_redirects_total", "Requests answered with a redirection to https."),
            &["listener"]
        ));
        let active = register!(IntGaugeVec::new(
            opts("connections_active", "Connections being forwarded."),
            &["route", "engine"]
        ));
        let closed = register!(IntCounterVec::new(
            opts("connections_closed_total", "Forwarded connections that ended, and how."),
            &["route", "reason"]
        ));
        let bytes = register!(IntCounterVec::new(
            opts("bytes_total", "Payload bytes forwarded, without the PROXY header."),
            &["route", "direction", "path"]
        ));
        let hello_duration = register!(Histogram::with_opts(histogram(
            "hello_duration_seconds",
            "From accept to the last byte of the ClientHello."
        )));
        let connect_duration = register!(HistogramVec::new(
            histogram("upstream_connect_duration_seconds", "Duration of successful connects to targets."),
            &["upstream"]
        ));
        let connect_failures = register!(IntCounterVec::new(
            opts("upstream_connect_failures_total", "Connects to targets that failed."),
            &["upstream", "target", "reason"]
        ));
        let target_up = register!(IntGaugeVec::new(
            opts("upstream_target_up", "Whether the target is up by checks, connections, tailnet and resolver."),
            &["upstream", "target"]
        ));
        let tailnet_path = register!(IntGaugeVec::new(
            opts("tailnet_path", "The way that the tailnet takes to a target: 1 for direct, relayed or unknown."),
            &["upstream", "target", "path"]
        ));
        let queued = register!(IntGaugeVec::new(
            opts("upstream_queued", "Connections that wait because every target has max_connections_per_target."),
            &["upstream"]
        ));
        let accept_errors = register!(IntCounter::with_opts(opts(
            "accept_errors_total",
            "accept(2) calls that failed for want of a file descriptor or of memory."
        )));
        let pipes = register!(IntGauge::with_opts(opts("splice_pipes", "Pipes that exist for splice(2).")));
        let sockmap_backlog = register!(IntGauge::with_opts(opts(
            "sockmap_backlog_bytes",
            "Bytes redirected inside the kernel that the receiving socket has not yet taken."
        )));
        let sockmap_spills = register!(IntCounterVec::new(
            opts("sockmap_spills_total", "Times that a flow left the kernel path because its reader was slow."),
            &["direction"]
        ));
        let shortages = register!(IntCounterVec::new(
            opts("shortages_total", "Times that local ports or file descriptors of this machine were used up."),
            &["what"]
        ));
        let listener_bound = register!(IntGaugeVec::new(
            opts("listener_bound", "Whether an address is listened on; 0: this machine does not have it yet."),
            &["listener", "address"]
        ));
        let engine_refused = register!(IntGaugeVec::new(
            opts("engine_refused", "Engines that were wanted and do not run on this machine: 1, with the reason."),
            &["reason"]
        ));
        Self {
            registry,
            build_info,
            config_info,
            reload_success,
            reload_timestamp,
            repository_reached,
            accepted,
            rejected,
            redirected,
            active,
            closed,
            bytes,
            hello_duration,
            connect_duration,
            connect_failures,
            target_up,
            tailnet_path,
            queued,
            accept_errors,
            pipes,
            sockmap_backlog,
            sockmap_spills,
            shortages: Arc::new(Shortages::new(|what| shortages.with_label_values(&[what]))),
            listener_bound,
            engine_refused,
            listeners: Mutex::default(),
            routes: Mutex::default(),
        }
    }

    /// Sets `dataplane_build_info` and `dataplane_engine_refused`.
    pub fn set_engine(&self, kernel: &str, engine: &Selection) {
        self.build_info.reset();
        self.build_info.with_label_values(&[env!("CARGO_PKG_VERSION"), kernel, engine.name()]).set(1.0);
        self.engine_refused.reset();
        for reason in &engine.reasons {
            self.engine_refused.with_label_values(&[reason.as_str()]).set(1);
        }
    }

    /// Sets `dataplane_listener_bound` of everything that is to be listened on.
    pub fn set_bound<'a>(&self, all: impl IntoIterator<Item = (&'a str, SocketAddr, bool)>) {
        self.listener_bound.reset();
        for (listener, addr, bound) in all {
            self.listener_bound.with_label_values(&[listener, &addr.to_string()]).set(i64::from(bound));
        }
    }

    /// The counters of flows that left the kernel path, by the side of their source.
    pub fn sockmap_spills(&self) -> [IntCounter; 2] {
        ["to_upstream", "to_client"].map(|direction| self.sockmap_spills.with_label_values(&[direction]))
    }

    /// Sets `dataplane_config_info` and notes a successful load.
    pub fn set_config(&self, hash: &str, commit: &str, unix_time: f64) {
        self.config_info.reset();
        self.config_info.with_label_values(&[hash, commit]).set(1.0);
        self.reload_success.set(1);
        self.reload_timestamp.set(unix_time);
    }

    /// The handles of a listener, all at zero the first time.
    pub fn listener(&self, name: &Arc<str>) -> Arc<ListenerMetrics> {
        let mut listeners = self.listeners.lock().expect("no panic while held");
        let entry = listeners.entry(name.clone()).or_insert_with(|| {
            Arc::new(ListenerMetrics {
                accepted: self.accepted.with_label_values(&[&**name]),
                redirected: self.redirected.with_label_values(&[&**name]),
                rejected: Reason::ALL
                    .iter()
                    .map(|reason| self.rejected.with_label_values(&[&**name, reason.as_str()]))
                    .collect(),
            })
        });
        entry.clone()
    }

    /// The handles of a route, all at zero the first time.
    pub fn route(&self, name: &Arc<str>) -> Arc<RouteMetrics> {
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

    /// The text format, version 0.0.4.
    pub fn render(&self) -> String {
        self.pipes.set(crate::engine::splice::existing() as i64);
        TextEncoder::new().encode_to_string(&self.registry.gather()).expect("constant names are valid")
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}
