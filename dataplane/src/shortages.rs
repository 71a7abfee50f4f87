//! What this machine has run out of: local ports and file descriptors. Counted by whoever met it,
//! told by the log and `status`.

use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use prometheus::IntCounter;
use serde_json::{Value, json};

use crate::logging::unix_seconds;
use crate::register::Register;

/// How long the log is silent about a shortage after it was told.
const TOLD: Duration = Duration::from_secs(60);

/// What can run out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shortage {
    /// EADDRNOTAVAIL at connect(2): all ports of `ip_local_port_range` are taken for that target.
    LocalPorts,
    /// EMFILE, ENFILE.
    Descriptors,
}

impl Shortage {
    const ALL: [Self; 2] = [Self::LocalPorts, Self::Descriptors];

    const fn as_str(self) -> &'static str {
        match self {
            Self::LocalPorts => "local_ports",
            Self::Descriptors => "descriptors",
        }
    }

    /// What it is and what to do.
    const fn text(self) -> &'static str {
        match self {
            Self::LocalPorts => {
                "all local ports for connections to a target are taken: widen net.ipv4.ip_local_port_range, or give the upstream more targets or addresses"
            }
            Self::Descriptors => {
                "no file descriptor is left: raise LimitNOFILE in the unit of dataplane and fs.file-max, or lower `max_connections` in [limits]"
            }
        }
    }
}

/// How often each was met, and when it last was.
#[derive(Debug)]
pub struct Shortages([(IntCounter, Mutex<Option<SystemTime>>); 2]);

impl Shortages {
    pub fn new(register: &Register) -> Self {
        let counters = register.counters(
            "shortages_total",
            "Times that local ports or file descriptors of this machine were used up.",
            &["what"],
        );
        let of = |shortage: Shortage| counters.with_label_values(&[shortage.as_str()]);
        Self(Shortage::ALL.map(|shortage| (of(shortage), Mutex::default())))
    }

    /// It was met just now.
    pub fn note(&self, shortage: Shortage) {
        let (counter, last) = &self.0[shortage as usize];
        counter.inc();
        let now = SystemTime::now();
        let before = last.lock().expect("no panic while held").replace(now);
        let told = before.and_then(|at| now.duration_since(at).ok()).is_some_and(|ago| ago < TOLD);
        if !told {
            tracing::error!(shortage = shortage.as_str(), "{}", shortage.text());
        }
    }

    /// For `dataplane status`.
    pub fn describe(&self) -> Value {
        let met = Shortage::ALL.iter().filter_map(|shortage| {
            let (counter, last) = &self.0[*shortage as usize];
            let at = (*last.lock().expect("no panic while held"))?;
            Some(json!({
                "what": shortage.as_str(),
                "times": counter.get(),
                "last": unix_seconds(at),
                "reason": shortage.text(),
            }))
        });
        met.collect()
    }
}
