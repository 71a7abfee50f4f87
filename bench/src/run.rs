//! A run: rounds of cells, each subject under each workload, one after the other.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

use crate::figures::Cell;
use crate::load::control::Remote;
use crate::load::{Served, Tally};
use crate::measure::{self, Snapshot};
use crate::network::{Kind, Network};
use crate::report::{Failure, Machine, Report, SubjectReport};
use crate::subjects::{self, Running, Subject};
use crate::workloads::{self, Workload};

/// Rounds of a full run, and of a quick one.
const ROUNDS: usize = 5;
const QUICK_ROUNDS: usize = 3;
/// How long the machine may need to clean up after a cell.
const SETTLE: Duration = Duration::from_secs(2);

/// What to measure.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// In under three minutes: direct, auto, nginx, haproxy; three workloads; three rounds
    #[arg(long)]
    quick: bool,
    /// Measure this subject only; may be given more than once. `direct` is always measured
    #[arg(long, value_name = "NAME", value_parser = subject)]
    subject: Vec<Subject>,
    /// Measure this workload only; may be given more than once
    #[arg(long, value_name = "NAME", value_parser = workload)]
    workload: Vec<&'static Workload>,
    /// What lies between the entrance node and the cluster
    #[arg(long, value_enum, default_value = "veth")]
    network: Kind,
    /// How often everything is measured
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: Option<u16>,
    /// Check every byte by its position instead of measuring
    #[arg(long)]
    verify: bool,
    /// Write all figures to a file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write one self-contained page with plots
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

fn subject(name: &str) -> Result<Subject, String> {
    let names = || subjects::ALL.map(Subject::name).join(", ");
    Subject::named(name).ok_or_else(|| format!("there are {}", names()))
}

fn workload(name: &str) -> Result<&'static Workload, String> {
    let names = || workloads::ALL.iter().map(|w| w.name).collect::<Vec<_>>().join(", ");
    Workload::named(name).ok_or_else(|| format!("there are {}", names()))
}

/// Runs everything that was asked for, shows it on standard output and writes the files.
pub fn run(options: &Options) -> Result<()> {
    // No test of this workspace may run meanwhile.
    let _turn = ::tests::alone();
    let started = Instant::now();
    let network = Network::new(options.network)?;

    let mut present = Vec::new();
    let mut described = Vec::new();
    for subject in options.subjects() {
        let description = subject.describe(&network);
        if let Err(why) = &description {
            eprintln!("{} is missing: {why:#}", subject.name());
        } else {
            present.push(subject);
        }
        described.push(SubjectReport::new(subject, description));
    }

    let plan = options.plan(&present);
    let mut progress = Progress::new(&plan);
    let mut cells = Vec::new();
    let mut failures = Vec::new();
    for step in &plan {
        progress.begin(step);
        match step.measure(&network, options.verify) {
            Ok(cell) => cells.push(cell),
            Err(why) => {
                let failure = Failure::new(step.subject, step.workload, step.round, &why);
                progress.tell(&failure.to_string());
                failures.push(failure);
            }
        }
        progress.end(step);
    }
    progress.clear();

    if options.verify {
        for failure in &failures {
            println!("{failure}");
        }
        let bytes: u64 = cells.iter().map(|cell| cell.tally.received + cell.uploaded).sum();
        println!("{} cells, {:.1} GB in their windows, every byte checked", cells.len(), bytes as f64 / 1e9);
    } else {
        let report =
            Report::new(options.network, Machine::here()?, described, cells, failures.clone(), started.elapsed());
        print!("{}", report.text());
        if let Some(file) = &options.json {
            let json = serde_json::to_vec_pretty(&report)?;
            fs::write(file, json).with_context(|| format!("cannot write {}", file.display()))?;
        }
        if let Some(file) = &options.html {
            fs::write(file, report.html()).with_context(|| format!("cannot write {}", file.display()))?;
        }
    }
    if !failures.is_empty() {
        bail!("{} cells failed", failures.len());
    }
    Ok(())
}

impl Options {
    fn subjects(&self) -> Vec<Subject> {
        let chosen: &[Subject] = match (&self.subject[..], self.quick) {
            ([], true) => &subjects::QUICK,
            ([], false) => &subjects::ALL,
            (chosen, _) => chosen,
        };
        // Without it nothing is attributable.
        subjects::ALL.into_iter().filter(|s| *s == Subject::Direct || chosen.contains(s)).collect()
    }

    fn workloads(&self) -> Vec<&'static Workload> {
        match (&self.workload[..], self.quick) {
            ([], true) => workloads::QUICK.iter().filter_map(|name| Workload::named(name)).collect(),
            ([], false) => workloads::ALL.iter().collect(),
            (chosen, _) => chosen.to_vec(),
        }
    }

    /// All cells in their order. In a round the subjects of a workload follow each other directly,
    /// for they are compared pair by pair; who comes first differs from round to round.
    fn plan(&self, subjects: &[Subject]) -> Vec<Step> {
        let rounds = self.rounds.map_or(if self.quick { QUICK_ROUNDS } else { ROUNDS }, usize::from);
        let mut plan = Vec::new();
        for round in 0..rounds {
            for workload in self.workloads() {
                for n in 0..subjects.len() {
                    let subject = subjects[(n + round) % subjects.len()];
                    plan.push(Step { round, workload, subject });
                }
            }
        }
        plan
    }
}

/// One cell to be measured.
struct Step {
    round: usize,
    workload: &'static Workload,
    subject: Subject,
}

impl Step {
    fn measure(&self, network: &Network, verify: bool) -> Result<Cell> {
        measure::settle(SETTLE)?;
        let mut server = Remote::start(&network.hosts().cluster, "serve", &[network.server.to_string()])?;
        server.hear::<Served>()?;
        let running = self.subject.start(network)?;
        self.drive(network, &running, server, verify).map_err(|why| match running.complaint() {
            Some(said) => why.context(said),
            None => why,
        })
    }

    fn drive(&self, network: &Network, running: &Running, mut server: Remote, verify: bool) -> Result<Cell> {
        let before = Memory::of(running)?;
        let most_connections = self.subject.most_connections().unwrap_or(usize::MAX).to_string();
        let mut arguments = vec![running.target.to_string(), self.workload.name.to_owned(), most_connections];
        if verify {
            arguments.push("--verify".to_owned());
        }
        let mut client = Remote::start(&running.client, "load", &arguments)?;
        client.hear::<u32>()?;

        let tunnel = network.tunnel();
        server.go()?;
        let mark = server.hear::<Served>()?;
        let snapshot = Snapshot::take()?;
        client.go()?;
        let tally = client.hear::<Tally>()?;
        let usage = snapshot.until_now(running.pid, &tunnel)?;
        server.go()?;
        let counts = server.hear::<Served>()?;
        if self.subject.is_proxy() && counts.proxied < counts.connections {
            bail!(
                "{} of {} connections came without a PROXY header",
                counts.connections - counts.proxied,
                counts.connections
            );
        }
        let uploaded = counts.received - mark.received;
        let after = Memory::of(running)?;

        Ok(Cell {
            subject: self.subject.name().to_owned(),
            workload: self.workload.name.to_owned(),
            round: self.round,
            tally,
            uploaded,
            usage,
            pss: after.pss as i64 - before.pss as i64,
            memory: before.available as i64 - after.available as i64,
            disturbed: usage.disturbance(),
        })
    }
}

struct Memory {
    pss: u64,
    available: u64,
}

impl Memory {
    fn of(running: &Running) -> Result<Self> {
        Ok(Self { pss: running.pid.map_or(0, measure::pss), available: measure::available()? })
    }
}

/// A bar with the time left: the cells' own estimates, corrected by how well they came true so far.
struct Progress {
    bar: ProgressBar,
    start: Instant,
    estimated: Duration,
    total: Duration,
}

impl Progress {
    fn new(plan: &[Step]) -> Self {
        let bar = ProgressBar::new(plan.len() as u64);
        let style = ProgressStyle::with_template("{wide_bar} {pos}/{len}  {msg}").expect("a constant that is right");
        bar.set_style(style);
        Self {
            bar,
            start: Instant::now(),
            estimated: Duration::ZERO,
            total: plan.iter().map(|step| step.workload.estimate()).sum(),
        }
    }

    fn begin(&self, step: &Step) {
        let correction = if self.estimated.is_zero() {
            1.0
        } else {
            self.start.elapsed().as_secs_f64() / self.estimated.as_secs_f64()
        };
        let left = self.total.saturating_sub(self.estimated).as_secs_f64() * correction;
        let left = format!("{:.0}:{:02.0} left", (left / 60.0).floor(), left % 60.0);
        self.bar.set_message(format!("{left}  {} {}", step.workload.name, step.subject.name()));
        self.bar.tick();
    }

    fn end(&mut self, step: &Step) {
        self.estimated += step.workload.estimate();
        self.bar.inc(1);
    }

    fn tell(&self, line: &str) {
        self.bar.suspend(|| eprintln!("{line}"));
    }

    fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(quick: bool) -> Options {
        Options {
            quick,
            subject: Vec::new(),
            workload: Vec::new(),
            network: Kind::Veth,
            rounds: None,
            verify: false,
            json: None,
            html: None,
        }
    }

    fn estimate(plan: &[Step]) -> Duration {
        plan.iter().map(|step| step.workload.estimate()).sum()
    }

    #[test]
    fn a_full_run_stays_under_an_hour_and_a_quick_one_under_three_minutes() {
        let full = options(false);
        assert!(estimate(&full.plan(&full.subjects())) < Duration::from_secs(3600));
        let quick = options(true);
        assert!(estimate(&quick.plan(&quick.subjects())) < Duration::from_secs(180));
    }

    #[test]
    fn each_round_has_every_cell_once_and_begins_with_another_subject() {
        let quick = options(true);
        let plan = quick.plan(&quick.subjects());
        assert_eq!(plan.len(), QUICK_ROUNDS * 3 * 4);
        let firsts: Vec<_> = (0..QUICK_ROUNDS).map(|round| plan[round * 12].subject.name()).collect();
        assert_eq!(firsts, ["direct", "auto", "nginx"]);
    }

    #[test]
    fn direct_is_measured_whatever_was_chosen() {
        let mut chosen = options(false);
        chosen.subject = vec![Subject::Haproxy];
        assert_eq!(chosen.subjects(), [Subject::Direct, Subject::Haproxy]);
    }
}
