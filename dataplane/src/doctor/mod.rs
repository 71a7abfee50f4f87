//! `dataplane doctor`: what this machine can do, what each engine would be, and why one is refused.
//!
//! It changes nothing and needs no running daemon.

mod entrance;
mod nat;
pub mod upstreams;

use std::path::Path;

use serde_json::{Value, json};

use crate::config::{Config, EngineChoice};
use crate::engine::{Candidate, Selection, Support};
use crate::kernel::btf;
use crate::kernel::sys::kernel_release;
use crate::metrics::Metrics;
use crate::source;

pub struct Findings {
    config: Result<Config, String>,
    engine: Selection,
    support: Support,
    entrance: Vec<entrance::Finding>,
}

/// What every owner should have been told once.
const SECURITY_NOTE: &str = "a client may send a listed server name and then, inside TLS, the Host of an internal site; the dataplane cannot see \
     that. Point routes at an ingress entry point that serves public hosts only.";

/// The capabilities that something here needs, and what for (include/uapi/linux/capability.h).
const CAPABILITIES: [(&str, u32, &str); 4] = [
    ("CAP_NET_BIND_SERVICE", 10, "ports below 1024"),
    ("CAP_NET_ADMIN", 12, "attaching eBPF programs to sockets"),
    ("CAP_PERFMON", 38, "eBPF programs that read the kernel's structures"),
    ("CAP_BPF", 39, "loading eBPF programs"),
];

impl Findings {
    pub fn gather(path: &Path, running: Option<&Value>) -> Self {
        let config = source::kept(path, None).map(|loaded| loaded.config).map_err(|e| e.to_string());
        // Room for the self-test's connections.
        let support = Support::test(16, Metrics::new().engine.spills());
        let choice = config.as_ref().map_or(EngineChoice::Auto, |c| c.engine);
        let entrance = entrance::look(config.as_ref().ok(), running);
        Self { engine: Selection::choose(choice, &support), support, config, entrance }
    }

    /// Whether the engine that is configured can run, and nothing was found that bites.
    pub fn is_good(&self) -> bool {
        self.config.is_ok()
            && self.engine.as_configured()
            && self.entrance.iter().all(|finding| finding.ok != Some(false))
    }

    /// The engines, and whether `auto` may use each.
    fn engines(&self) -> Vec<(&'static str, Result<(), String>)> {
        let mut engines = vec![("copy", Ok(())), ("splice", self.support.splice.clone())];
        for Candidate { kind, engine, known_bugs } in &self.support.in_kernel {
            let usable = engine
                .as_ref()
                .map_err(Clone::clone)
                .and_then(|_| known_bugs.clone().map_err(|why| format!("passed its self-test, but {why}")));
            engines.push((kind.as_str(), usable));
        }
        engines.push(("translate", Err("not in this version".to_owned())));
        engines
    }

    /// `--json`
    pub fn json(&self) -> Value {
        let outcome = |result: &Result<(), String>| match result {
            Ok(()) => json!({ "usable": true, "reason": null }),
            Err(why) => json!({ "usable": false, "reason": why }),
        };
        let engines: serde_json::Map<_, _> =
            self.engines().iter().map(|(name, result)| ((*name).to_owned(), outcome(result))).collect();
        let effective = effective_capabilities();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "kernel": kernel_release(),
            "btf": has_btf(),
            "capabilities": CAPABILITIES.iter()
                .map(|(name, bit, _)| ((*name).to_owned(), json!(effective >> bit & 1 == 1)))
                .collect::<serde_json::Map<_, _>>(),
            "nofile": rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum,
            "engines": engines,
            "engine": {
                "configured": self.engine.configured,
                "effective": self.engine.name(),
                "reasons": self.engine.reasons,
                "warnings": self.engine.warnings,
                "as_configured": self.engine.as_configured(),
            },
            "config": {
                "path": self.config.as_ref().ok().map(|c| c.source.path.clone()),
                "error": self.config.as_ref().err(),
            },
            "entrance": self.entrance,
            "notes": [SECURITY_NOTE],
        })
    }

    /// For people.
    pub fn text(&self) -> String {
        use std::fmt::Write as _;
        let mut out = String::new();
        let mut line = |mark: Option<bool>, name: &str, text: &str| {
            let mark = match mark {
                Some(true) => "ok  ",
                Some(false) => "no  ",
                None => "??  ",
            };
            let _ = writeln!(out, "{mark} {name:<22} {text}");
        };
        line(Some(true), "kernel", &kernel_release());
        line(Some(has_btf()), "BTF", "/sys/kernel/btf/vmlinux: the kernel's types, for eBPF programs");
        let effective = effective_capabilities();
        for (name, bit, what) in CAPABILITIES {
            line(Some(effective >> bit & 1 == 1), name, what);
        }
        let nofile = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
        let nofile = nofile.map_or("no limit".to_owned(), |n| format!("{n}, two for each connection"));
        line(Some(true), "file descriptors", &nofile);
        for (name, result) in self.engines() {
            match result {
                Ok(()) => line(Some(true), &format!("engine {name}"), "passed its self-test"),
                Err(why) => line(Some(false), &format!("engine {name}"), &why),
            }
        }
        for finding in &self.entrance {
            line(finding.ok, finding.check, &finding.text);
        }
        match &self.config {
            Ok(config) => line(Some(true), "configuration", &config.source.path.display().to_string()),
            Err(why) => line(Some(false), "configuration", why.trim_end()),
        }
        let _ = writeln!(
            out,
            "\nengine: {} is configured, {} runs",
            choice_name(self.engine.configured),
            self.engine.name()
        );
        for reason in &self.engine.reasons {
            let _ = writeln!(out, "  because {reason}");
        }
        for warning in &self.engine.warnings {
            let _ = writeln!(out, "  warning: {warning}");
        }
        let _ = writeln!(out, "\nnote: {SECURITY_NOTE}");
        out
    }
}

fn choice_name(choice: EngineChoice) -> String {
    serde_json::to_value(choice).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

fn has_btf() -> bool {
    Path::new(btf::KERNEL).exists()
}

/// The effective set as a bit mask; 0 when /proc does not say.
fn effective_capabilities() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0)
}
