//! What is measured of listeners, and of connections that are not forwarded.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use prometheus::{Histogram, IntCounter, IntCounterVec, IntGaugeVec};

use crate::register::Register;
use crate::reject::Reason;

pub struct ListenMetrics {
    accepted: IntCounterVec,
    rejected: IntCounterVec,
    redirected: IntCounterVec,
    bound: IntGaugeVec,
    /// accept(2) calls that failed for want of a file descriptor or memory.
    pub accept_errors: IntCounter,
    /// From accept to the last byte of the hello.
    pub hello_duration: Histogram,
    listeners: Mutex<HashMap<Arc<str>, Arc<ListenerMetrics>>>,
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

impl ListenMetrics {
    pub fn new(register: &Register) -> Self {
        Self {
            accepted: register.counters("connections_accepted_total", "Connections accepted.", &["listener"]),
            rejected: register.counters(
                "connections_rejected_total",
                "Connections closed without a byte sent upstream.",
                &["listener", "reason"],
            ),
            redirected: register.counters(
                "http_redirects_total",
                "Requests answered with a redirection to https.",
                &["listener"],
            ),
            bound: register.gauges(
                "listener_bound",
                "Whether an address is listened on; 0: not yet, and `dataplane status` says why.",
                &["listener", "address"],
            ),
            accept_errors: register.counter(
                "accept_errors_total",
                "accept(2) calls that failed for want of a file descriptor or of memory.",
            ),
            hello_duration: register
                .duration("hello_duration_seconds", "From accept to the last byte of the ClientHello."),
            listeners: Mutex::default(),
        }
    }

    /// The handles of a listener, all at zero the first time.
    pub fn of(&self, name: &Arc<str>) -> Arc<ListenerMetrics> {
        let mut listeners = self.listeners.lock().expect("no panic while held");
        let rejected = |reason: &Reason| self.rejected.with_label_values(&[&**name, reason.as_str()]);
        let entry = listeners.entry(name.clone()).or_insert_with(|| {
            Arc::new(ListenerMetrics {
                accepted: self.accepted.with_label_values(&[&**name]),
                redirected: self.redirected.with_label_values(&[&**name]),
                rejected: Reason::ALL.iter().map(rejected).collect(),
            })
        });
        entry.clone()
    }

    /// Says of everything that is to be listened on whether it is.
    pub fn set_bound<'a>(&self, all: impl IntoIterator<Item = (&'a str, SocketAddr, bool)>) {
        self.bound.reset();
        for (listener, addr, bound) in all {
            self.bound.with_label_values(&[listener, &addr.to_string()]).set(i64::from(bound));
        }
    }
}
