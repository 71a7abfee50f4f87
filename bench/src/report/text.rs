//! The report for a terminal.

use std::fmt::Write as _;

use super::{Report, Table, number};
use crate::claims::{Bound, Verdict};
use crate::figures::Figure;
use crate::statistics::{Estimate, Summary};

pub fn render(report: &Report) -> String {
    let mut out = String::new();
    let machine = &report.machine;
    let _ = writeln!(
        out,
        "Network {}; Linux {}, {} × {}, {:.0} GiB; {:.0} s in all.\nEach figure: median [min–max] of the rounds; attributable: minus direct of the same round, with the 95 % interval.",
        report.network.name(),
        machine.kernel,
        machine.cores,
        machine.processor,
        machine.memory as f64 / f64::from(1 << 30),
        report.took,
    );
    for subject in &report.subjects {
        let _ = match (&subject.description, &subject.missing) {
            (_, Some(why)) => writeln!(out, "  {:<8} missing: {why}", subject.name),
            (description, None) => writeln!(out, "  {:<8} {}", subject.name, description.as_deref().unwrap_or("")),
        };
    }
    if report.disturbed() > 0 {
        let _ = writeln!(
            out,
            "DISTURBED: in {} of {} cells other processes or the hypervisor took more than 3 % of a core; rows with such cells are marked with !.",
            report.disturbed(),
            report.cells.len()
        );
    }
    for table in &report.tables {
        let _ = writeln!(out, "\n{}", table.workload);
        out += &grid(&rows(table));
    }
    for failure in &report.failures {
        let _ = writeln!(out, "{failure}");
    }
    let measured: Vec<_> = report.claims.iter().filter(|verdict| verdict.ratio.is_some()).collect();
    if !measured.is_empty() {
        let _ = writeln!(out, "\nClaims (ratio to the best rival [95 % interval]; the bad end decides)");
        let lines = measured.into_iter().map(|verdict| claim(verdict).to_vec());
        out += &grid(&lines.collect::<Vec<_>>());
    }
    out
}

fn rows(table: &Table) -> Vec<Vec<String>> {
    let figures = table.figures();
    let mut head = vec![String::new()];
    for figure in &figures {
        head.push(format!("{} {}", figure.title(), figure.unit(table.unit)));
        if figure.has_base() {
            head.push(attributable_title(*figure).to_owned());
        }
    }
    let mut rows = vec![head];
    for row in &table.rows {
        let mark = if row.disturbed > 0 { "!" } else { "" };
        let mut line = vec![format!("{}{mark}", row.subject)];
        for figure in &figures {
            line.push(row.figures.get(figure).map_or_else(|| "–".to_owned(), spread));
            if figure.has_base() {
                line.push(row.attributable.get(figure).map_or_else(|| "–".to_owned(), interval));
            }
        }
        rows.push(line);
    }
    rows
}

/// Heading of the column beside a figure's own.
pub fn attributable_title(figure: Figure) -> &'static str {
    match figure {
        Figure::Cpu => "attributable",
        _ => "beyond direct",
    }
}

/// Median, min and max.
pub fn spread(summary: &Summary) -> String {
    format!("{} [{}–{}]", number(summary.median), number(summary.min), number(summary.max))
}

/// A value with its interval.
pub fn interval(estimate: &Estimate) -> String {
    format!("{} [{}..{}]", number(estimate.value), number(estimate.low), number(estimate.high))
}

/// A verdict's columns.
pub fn claim(verdict: &Verdict) -> [String; 5] {
    let bound = match verdict.bound {
        Bound::AtMost(limit) => format!("≤ {limit}"),
        Bound::AtLeast(limit) => format!("≥ {limit}"),
    };
    let rival = verdict.rival.as_deref().unwrap_or("–");
    [
        verdict.outcome.name().to_owned(),
        verdict.claim.clone(),
        verdict.workload.clone(),
        format!("{} / {rival}", verdict.subject),
        verdict.ratio.as_ref().map_or_else(|| "–".to_owned(), interval) + ", wanted " + &bound,
    ]
}

/// Columns as wide as their widest entry.
fn grid(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|c| c.chars().count()).max();
    let widths: Vec<_> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        let cells: Vec<_> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        format!("  {}\n", cells.join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}
