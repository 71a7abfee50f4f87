//! What a run found: one document, shown as text, as JSON and as a page.

mod html;
mod text;

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::claims::{self, Verdict, paired};
use crate::figures::{Cell, Figure};
use crate::network::Kind;
use crate::statistics::{self, Estimate, Summary};
use crate::subjects::Subject;
use crate::workloads::{self, Unit, Workload};

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// Between entrance node and cluster.
    pub network: Kind,
    /// Where it ran.
    pub machine: Machine,
    /// When it ended, seconds since 1970.
    pub at: u64,
    /// How long it took, seconds.
    pub took: f64,
    /// Who took part, and who could not.
    pub subjects: Vec<SubjectReport>,
    /// By workload, then by subject.
    pub tables: Vec<Table>,
    /// What was claimed, and what came of it.
    pub claims: Vec<Verdict>,
    /// What went wrong.
    pub failures: Vec<Failure>,
    /// All that was counted.
    pub cells: Vec<Cell>,
}

/// Where a run took place.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Machine {
    /// Of the kernel.
    pub kernel: String,
    /// Of the processor.
    pub processor: String,
    /// How many of them.
    pub cores: usize,
    pub memory: u64,
}

impl Machine {
    pub fn here() -> Result<Self> {
        let read = |file: &str| std::fs::read_to_string(file).with_context(|| file.to_owned());
        let cpuinfo = read("/proc/cpuinfo")?;
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let meminfo = read("/proc/meminfo")?;
        let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"));
        Ok(Self {
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            processor: model.map_or("unknown", |(_, name)| name).to_owned(),
            cores: std::thread::available_parallelism()?.get(),
            memory: total.and_then(|kb| kb.parse::<u64>().ok()).context("MemTotal in /proc/meminfo")? * 1024,
        })
    }
}

/// Who took part.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SubjectReport {
    /// As on the command line.
    pub name: String,
    /// What it is, with its version.
    pub description: Option<String>,
    /// Why it did not take part.
    pub missing: Option<String>,
}

impl SubjectReport {
    /// Of what [`Subject::describe`] said.
    pub fn new(subject: Subject, description: Result<String>) -> Self {
        let (description, missing) = match description {
            Ok(description) => (Some(description), None),
            Err(why) => (None, Some(format!("{why:#}"))),
        };
        Self { name: subject.name().to_owned(), description, missing }
    }
}

/// A cell that gave nothing.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failure {
    /// By name.
    pub subject: String,
    /// By name.
    pub workload: String,
    /// From 0.
    pub round: usize,
    pub why: String,
}

impl Failure {
    /// Of an error.
    pub fn new(subject: Subject, workload: &Workload, round: usize, why: &anyhow::Error) -> Self {
        let (subject, workload) = (subject.name().to_owned(), workload.name.to_owned());
        Self { subject, workload, round, why: format!("{why:#}") }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FAILED {} {} round {}: {}", self.workload, self.subject, self.round + 1, self.why)
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Table {
    /// By name.
    pub workload: String,
    /// What costs are told for.
    pub unit: Unit,
    /// By subject, in the order of the subjects.
    pub rows: Vec<Row>,
}

/// One subject under one workload.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    /// By name.
    pub subject: String,
    /// Rounds that were measured, and how many of them on a disturbed machine.
    pub rounds: usize,
    pub disturbed: usize,
    /// Median, min, max of each figure that there is.
    pub figures: BTreeMap<Figure, Summary>,
    /// The same minus `direct` of the same round, where that makes sense.
    pub attributable: BTreeMap<Figure, Estimate>,
}

impl Report {
    /// Makes it of what was measured.
    pub fn new(
        network: Kind,
        machine: Machine,
        subjects: Vec<SubjectReport>,
        cells: Vec<Cell>,
        failures: Vec<Failure>,
        took: Duration,
    ) -> Self {
        let at = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let tables = workloads::ALL
            .iter()
            .filter(|workload| cells.iter().any(|cell| cell.workload == workload.name))
            .map(|workload| Table::new(workload, &subjects, &cells))
            .collect();
        let claims = claims::judge(network, &cells);
        Self { network, machine, at, took: took.as_secs_f64(), subjects, tables, claims, failures, cells }
    }

    /// For a terminal.
    pub fn text(&self) -> String {
        text::render(self)
    }

    /// For a browser: one page that needs nothing else.
    pub fn html(&self) -> String {
        html::render(self)
    }

    /// Cells that were measured on a disturbed machine.
    fn disturbed(&self) -> usize {
        self.cells.iter().filter(|cell| cell.disturbed.is_some()).count()
    }
}

impl Table {
    fn new(workload: &Workload, subjects: &[SubjectReport], cells: &[Cell]) -> Self {
        let rows = subjects.iter().filter_map(|subject| Row::new(&subject.name, workload, cells)).collect();
        Self { workload: workload.name.to_owned(), unit: workload.unit, rows }
    }

    /// The figures that at least one subject has.
    fn figures(&self) -> Vec<Figure> {
        Figure::ALL.into_iter().filter(|figure| self.rows.iter().any(|row| row.figures.contains_key(figure))).collect()
    }
}

impl Row {
    fn new(subject: &str, workload: &Workload, cells: &[Cell]) -> Option<Self> {
        let own: Vec<_> = cells.iter().filter(|c| c.subject == subject && c.workload == workload.name).collect();
        if own.is_empty() {
            return None;
        }
        let figures = Figure::ALL.into_iter().filter_map(|figure| {
            let values: Vec<_> = own.iter().filter_map(|cell| figure.of(cell)).collect();
            let summary = statistics::summary(&values)?;
            // A column of zeros tells nothing: a subject without processes, a network without a
            // tunnel.
            (summary.max != 0.0).then_some((figure, summary))
        });
        let base = Subject::Direct.name();
        let attributable = Figure::ALL.into_iter().filter(|figure| figure.has_base() && subject != base);
        let attributable = attributable.filter_map(|figure| {
            let pairs = paired(figure, [subject, base], workload.name, cells);
            let pairs: Vec<_> = pairs.into_iter().map(|[a, b]| (a, b)).collect();
            Some((figure, statistics::difference(&pairs)?))
        });
        Some(Self {
            subject: subject.to_owned(),
            rounds: own.len(),
            disturbed: own.iter().filter(|cell| cell.disturbed.is_some()).count(),
            figures: figures.collect(),
            attributable: attributable.collect(),
        })
    }
}

/// Three significant digits, which is more than rounds agree on.
fn number(value: f64) -> String {
    let magnitude = value.abs();
    if magnitude >= 99_950.0 {
        format!("{:.0}k", value / 1000.0)
    } else if magnitude >= 99.95 {
        format!("{value:.0}")
    } else if magnitude >= 9.995 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::tests::bulk;

    pub fn sample() -> Report {
        let cells = (0..3)
            .flat_map(|round| [bulk("direct", round, 1.0), bulk("auto", round, 2.0 + 0.1 * round as f64)])
            .collect();
        let machine = Machine { kernel: "6.18".into(), processor: "A <fast> one".into(), cores: 2, memory: 1 << 30 };
        let subjects = vec![
            SubjectReport::new(Subject::Direct, Ok("no proxy".into())),
            SubjectReport::new(Subject::Engine("auto"), Ok("dataplane 0.1.0".into())),
            SubjectReport::new(Subject::Sozu, Err(anyhow::anyhow!("not built"))),
        ];
        Report::new(Kind::Veth, machine, subjects, cells, Vec::new(), Duration::from_secs(10))
    }

    #[test]
    fn the_attributable_part_is_what_is_beyond_direct() {
        let report = sample();
        let row = &report.tables[0].rows[1];
        assert!((row.figures[&Figure::Cpu].median - 1.05).abs() < 1e-9);
        assert!((row.attributable[&Figure::Cpu].value - 0.55).abs() < 1e-9);
        assert!(report.tables[0].rows[0].attributable.is_empty());
    }

    #[test]
    fn who_is_missing_is_named_with_the_reason_everywhere() {
        let report = sample();
        for page in [report.text(), report.html(), serde_json::to_string(&report).expect("serializable")] {
            assert!(page.contains("sozu") && page.contains("not built"), "{page}");
        }
    }

    #[test]
    fn the_page_needs_nothing_else_and_escapes_what_it_shows() {
        let page = sample().html();
        assert!(page.contains("<svg") && page.contains("A &lt;fast&gt; one"));
        assert!(!page.contains("src=") && !page.contains("href="));
    }

    #[test]
    fn a_report_survives_json() {
        let json = serde_json::to_string(&sample()).expect("serializable");
        let back: Report = serde_json::from_str(&json).expect("what was written");
        assert_eq!(back.tables.len(), 1);
        assert_eq!(back.cells.len(), 6);
    }

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!([0.1234, 12.345, 123.45, 123_456.0].map(number), ["0.12", "12.3", "123", "123k"]);
    }
}
