//! Makes metrics and registers them, for the modules that measure.
//!
//! Label values come from the configuration, never from a client.

use prometheus::core::Collector;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

/// Seconds; a LAN answers in under a millisecond, a relayed tailnet path in hundreds.
const SECONDS: &[f64] =
    &[0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// What Prometheus scrapes. Each name is registered once, without the `dataplane_` in front.
#[derive(Default)]
pub struct Register(Registry);

fn opts(name: &str, help: &str) -> Opts {
    Opts::new(format!("dataplane_{name}"), help)
}

fn seconds(name: &str, help: &str) -> HistogramOpts {
    HistogramOpts::from(opts(name, help)).buckets(SECONDS.to_vec())
}

impl Register {
    fn add<M: Collector + Clone + 'static>(&self, metric: prometheus::Result<M>) -> M {
        let metric = metric.expect("constant names and labels are valid");
        self.0.register(Box::new(metric.clone())).expect("each name is registered once");
        metric
    }

    pub fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.add(IntCounter::with_opts(opts(name, help)))
    }

    /// A counter for each combination of the labels' values.
    pub fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.add(IntCounterVec::new(opts(name, help), labels))
    }

    /// A gauge of a whole number.
    pub fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.add(IntGauge::with_opts(opts(name, help)))
    }

    /// Such a gauge for each combination of the labels' values.
    pub fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.add(IntGaugeVec::new(opts(name, help), labels))
    }

    /// A gauge of a Unix time.
    pub fn time(&self, name: &str, help: &str) -> Gauge {
        self.add(Gauge::with_opts(opts(name, help)))
    }

    /// A gauge that is 1, and of which the labels say something.
    pub fn info(&self, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
        self.add(GaugeVec::new(opts(name, help), labels))
    }

    pub fn duration(&self, name: &str, help: &str) -> Histogram {
        self.add(Histogram::with_opts(seconds(name, help)))
    }

    /// Such a histogram for each combination of the labels' values.
    pub fn durations(&self, name: &str, help: &str, labels: &[&str]) -> HistogramVec {
        self.add(HistogramVec::new(seconds(name, help), labels))
    }

    /// The text format, version 0.0.4.
    pub fn render(&self) -> String {
        TextEncoder::new().encode_to_string(&self.0.gather()).expect("constant names are valid")
    }
}
