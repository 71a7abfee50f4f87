//! What this machine has run out of: local ports and file descriptors. Counted by whoever met it, told by the log and `status`.

use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use crate::logging::unix_seconds;

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
#[derive(Debug, Default)]
pub struct Shortages([Mutex<Option<(u64, SystemTime)>>; 2]);

impl Shortages {
    /// It was met just now.
    pub fn note(&self, shortage: Shortage) {
        let now = SystemTime::now();
        let mut met = self.0[shortage as usize].lock().expect("no panic while held");
        let told = met.and_then(|(_, at)| now.duration_since(at).ok()).is_some_and(|ago| ago < TOLD);
        *met = Some((met.map_or(0, |(count, _)| count) + 1, now));
        drop(met);
        if !told {
            tracing::error!(shortage = shortage.as_str(), "{}", shortage.text());
        }
    }

    /// For `dataplane status`.
    pub fn describe(&self) -> Value {
        let met = Shortage::ALL.iter().filter_map(|shortage| {
            let (count, at) = (*self.0[*shortage as usize].lock().expect("no panic while held"))?;
            Some(json!({
                "what": shortage.as_str(),
                "times": count,
                "last": unix_seconds(at),
                "reason": shortage.text(),
            }))
        });
        met.collect()
    }
}
