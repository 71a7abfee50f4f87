//! Which engines this machine supports, and which of them runs.

use std::sync::Arc;

use prometheus::IntCounter;

use super::driver::Plan;
use super::in_kernel::InKernel;
use super::pair::Kind;
use super::sockmap::{self, Table};
use super::splice;
use crate::config::EngineChoice;

/// What a machine can do; the error says why not.
#[derive(Debug, Clone)]
pub struct Support {
    /// splice(2), as its self-test found it.
    pub splice: Result<(), String>,
    /// The engines that work in the kernel, the best first.
    pub in_kernel: Vec<Candidate>,
}

/// An engine that works in the kernel.
#[derive(Debug, Clone)]
pub struct Candidate {
    pub kind: Kind,
    /// Its programs in the kernel, and how the kernel behaves with them in the self-test.
    pub engine: Result<Arc<dyn InKernel>, String>,
    /// Whether the kernel is known to be rid of what no self-test finds.
    pub known_bugs: Result<(), String>,
}

impl Support {
    /// Tries everything. Engines in the kernel have room for so many connections; the sockmap
    /// counts spills there.
    pub fn test(connections: usize, spills: [IntCounter; 2]) -> Self {
        Self { splice: splice::self_test(), in_kernel: vec![sockmap(connections, spills)] }
    }

    /// What can be known at once, without an engine in the kernel: for a start that connections
    /// wait for. [`test`](Self::test) comes later.
    pub fn at_once() -> Self {
        Self { splice: splice::self_test(), in_kernel: Vec::new() }
    }

    /// Bounds what is queued in the kernel, bytes.
    pub fn set_memory(&self, bytes: u64) {
        for engine in self.in_kernel.iter().filter_map(|candidate| candidate.engine.as_ref().ok()) {
            engine.set_memory(bytes);
        }
    }
}

fn sockmap(connections: usize, spills: [IntCounter; 2]) -> Candidate {
    let table = Table::load(connections, spills).map_err(|error| error.to_string());
    let table = table.and_then(|table| sockmap::self_test::run(&table).map(|()| table));
    if let Ok(table) = &table {
        // Those of the self-test are nobody's.
        table.spills.iter().for_each(IntCounter::reset);
    }
    let kernel = rustix::system::uname();
    Candidate {
        kind: Kind::Sockmap,
        engine: table.map(|table| table as Arc<dyn InKernel>),
        known_bugs: sockmap::known_bugs::judge(
            &kernel.release().to_string_lossy(),
            &kernel.version().to_string_lossy(),
        ),
    }
}

/// What runs when the configuration asks for `configured`, and why it is something else.
#[derive(Debug, Clone)]
pub struct Selection {
    pub configured: EngineChoice,
    pub plan: Plan,
    /// One line for each engine that was passed over.
    pub reasons: Vec<String>,
    /// What speaks against an engine that runs because the configuration names it.
    pub warnings: Vec<String>,
}

impl Selection {
    pub fn choose(choice: EngineChoice, support: &Support) -> Self {
        let (mut reasons, mut warnings) = (Vec::new(), Vec::new());
        if choice == EngineChoice::Translate {
            reasons.push("translate: this version has no packet-level engine".to_owned());
        }
        let is_wanted = |kind| choice == EngineChoice::Auto || choice == EngineChoice::Sockmap && kind == Kind::Sockmap;
        let mut in_kernel = None;
        for Candidate { kind, engine, known_bugs } in support.in_kernel.iter().filter(|c| is_wanted(c.kind)) {
            let name = kind.as_str();
            match (engine, known_bugs) {
                (Err(why), _) => reasons.push(format!("{name}: {why}")),
                (Ok(_), Err(why)) if choice == EngineChoice::Auto => {
                    reasons.push(format!("{name}: {why}; `engine = \"{name}\"` runs it all the same"));
                }
                (Ok(engine), known_bugs) => {
                    if let Err(why) = known_bugs {
                        warnings.push(format!("{name} runs because the configuration names it: {why}"));
                    }
                    in_kernel.get_or_insert(engine.clone());
                }
            }
        }
        let splice = choice != EngineChoice::Copy && {
            support.splice.as_ref().inspect_err(|why| reasons.push(format!("splice: {why}"))).is_ok()
        };
        let relay = if splice { Kind::Splice } else { Kind::Copy };
        Self {
            configured: choice,
            plan: Plan { relay, in_kernel, must_earn: choice == EngineChoice::Auto },
            reasons,
            warnings,
        }
    }

    /// Tells the log what does not run, and what should not.
    pub fn tell(&self) {
        for reason in self.reasons.iter().chain(&self.warnings) {
            tracing::warn!(configured = ?self.configured, effective = self.name(), reason, "engine");
        }
    }

    /// What runs: `auto` when connections are moved between engines, else the one that they all
    /// have.
    pub fn name(&self) -> &'static str {
        match &self.plan.in_kernel {
            Some(_) if self.plan.must_earn => "auto",
            Some(engine) => engine.kind().as_str(),
            None => self.plan.relay.as_str(),
        }
    }

    /// Whether what was asked for is what runs.
    pub fn as_configured(&self) -> bool {
        match self.configured {
            EngineChoice::Auto => true,
            EngineChoice::Sockmap => self.plan.in_kernel.is_some(),
            EngineChoice::Splice => self.plan.relay == Kind::Splice,
            EngineChoice::Copy => self.plan.relay == Kind::Copy,
            EngineChoice::Translate => false,
        }
    }

    /// How much of a budget for bytes queued in the kernel pipes may have; the rest is for the
    /// engines in the kernel.
    pub fn share_of_pipes(&self, memory: u64) -> u64 {
        if self.plan.in_kernel.is_some() { memory / 2 } else { memory }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_run_here_is_not_offered_by_name() {
        let sockmap = Candidate {
            kind: Kind::Sockmap,
            engine: Err("needs CAP_BPF".to_owned()),
            known_bugs: Err("an old kernel".to_owned()),
        };
        let support = Support { splice: Ok(()), in_kernel: vec![sockmap] };
        for choice in [EngineChoice::Auto, EngineChoice::Sockmap] {
            let engine = Selection::choose(choice, &support);
            assert_eq!((engine.name(), engine.reasons), ("splice", vec!["sockmap: needs CAP_BPF".to_owned()]));
            assert!(engine.warnings.is_empty(), "{:?}", engine.warnings);
        }
        for choice in [EngineChoice::Splice, EngineChoice::Copy] {
            let engine = Selection::choose(choice, &support);
            assert!(engine.reasons.is_empty() && engine.warnings.is_empty(), "{engine:?}");
        }
    }
}
