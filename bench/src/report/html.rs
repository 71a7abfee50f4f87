//! The report for a browser: tables, and for each workload a plot of its figures, as inline SVG.

use std::fmt::Write as _;

use super::text::{attributable_title, claim, interval, spread};
use super::{Report, Table, number};
use crate::claims::Outcome;
use crate::figures::Figure;

const STYLE: &str = "\
body{font:15px/1.45 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem;color:#1d2430;background:#fff}\
h2{margin-top:2.5rem}table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}\
th,td{text-align:left;padding:.25rem .8rem .25rem 0;border-bottom:1px solid #dde2ea;white-space:nowrap}\
div{overflow-x:auto}.plots{display:flex;flex-wrap:wrap;gap:1.5rem;margin:1rem 0}\
svg text{font:12px system-ui,sans-serif;fill:#1d2430}.met{color:#0a6b35}.missed{color:#b3261e}.warning{color:#b3261e}";

/// Colours of our engines, of the peers, and of what is no proxy.
const OWN: &str = "#2563b0";
const PEER: &str = "#b0722b";
const NONE: &str = "#8a93a3";

pub fn render(report: &Report) -> String {
    let machine = &report.machine;
    let mut page = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>dataplane: measured on {network}</title><style>{STYLE}</style>\
         <h1>Measured on {network}</h1><p>Linux {}, {} × {}, {:.0} GiB, {:.0} s in all. Each figure is the median of the rounds with the smallest and the largest; \
         what is attributable is minus direct of the same round, with the bootstrap 95 % interval.</p>",
        escape(&machine.kernel),
        machine.cores,
        escape(&machine.processor),
        machine.memory as f64 / f64::from(1 << 30),
        report.took,
        network = report.network.name(),
    );
    if report.disturbed() > 0 {
        let _ = write!(
            page,
            "<p class=\"warning\">Disturbed: in {} of {} cells other processes or the hypervisor took more than 3 % of a core.</p>",
            report.disturbed(),
            report.cells.len()
        );
    }
    page += "<h2>Subjects</h2>";
    page += &table(
        &["subject", "what it is"].map(str::to_owned),
        report.subjects.iter().map(|subject| {
            let what = subject.missing.as_ref().map(|why| format!("missing: {why}"));
            (
                String::new(),
                vec![subject.name.clone(), what.or_else(|| subject.description.clone()).unwrap_or_default()],
            )
        }),
    );
    page += "<h2>Claims</h2><p>Ratio to the best rival in the same run; the bad end of the interval decides.</p>";
    page += &table(
        &["outcome", "claim", "workload", "compared", "ratio"].map(str::to_owned),
        report.claims.iter().map(|verdict| {
            let class = match verdict.outcome {
                Outcome::Met => "met",
                Outcome::Missed => "missed",
                Outcome::Undecided => "",
            };
            (class.to_owned(), claim(verdict).to_vec())
        }),
    );
    for workload in &report.tables {
        let _ = write!(page, "<h2>{}</h2><div class=\"plots\">", escape(&workload.workload));
        for figure in workload.figures() {
            page += &plot(workload, figure);
        }
        page += "</div>";
        page += &figures(workload);
    }
    if !report.failures.is_empty() {
        page += "<h2>Failures</h2>";
        for failure in &report.failures {
            let _ = write!(page, "<p class=\"warning\">{}</p>", escape(&failure.to_string()));
        }
    }
    page + "</html>\n"
}

fn figures(workload: &Table) -> String {
    let mut head = vec!["subject".to_owned()];
    for figure in workload.figures() {
        head.push(format!("{}, {}", figure.title(), figure.unit(workload.unit)));
        if figure.has_base() {
            head.push(attributable_title(figure).to_owned());
        }
    }
    let rows = workload.rows.iter().map(|row| {
        let disturbed =
            if row.disturbed > 0 { format!(" ({} of {} disturbed)", row.disturbed, row.rounds) } else { String::new() };
        let mut line = vec![row.subject.clone() + &disturbed];
        for figure in workload.figures() {
            line.push(row.figures.get(&figure).map(spread).unwrap_or_default());
            if figure.has_base() {
                line.push(row.attributable.get(&figure).map(interval).unwrap_or_default());
            }
        }
        (String::new(), line)
    });
    table(&head, rows)
}

/// Rows with their class.
fn table(head: &[String], rows: impl Iterator<Item = (String, Vec<String>)>) -> String {
    let cells = |tag: &str, row: &[String]| -> String {
        row.iter().map(|cell| format!("<{tag}>{}</{tag}>", escape(cell))).collect()
    };
    let rows: String = rows.map(|(class, row)| format!("<tr class=\"{class}\">{}</tr>", cells("td", &row))).collect();
    format!("<div><table><tr>{}</tr>{rows}</table></div>", cells("th", head))
}

/// A bar to the median for each subject, a whisker from the smallest to the largest.
fn plot(workload: &Table, figure: Figure) -> String {
    const LABEL: f64 = 62.0;
    const WIDTH: f64 = 250.0;
    const LINE: f64 = 20.0;
    let rows: Vec<_> = workload.rows.iter().filter_map(|row| Some((&row.subject, row.figures.get(&figure)?))).collect();
    let largest = rows.iter().map(|(_, summary)| summary.max).fold(f64::MIN_POSITIVE, f64::max);
    let scale = |value: f64| value.max(0.0) / largest * WIDTH;
    let height = LINE * (rows.len() as f64 + 1.5);
    let better = if figure.is_cost() { "less" } else { "more" };
    let mut svg = format!(
        "<svg width=\"{w}\" height=\"{height}\" viewBox=\"0 0 {w} {height}\" role=\"img\"><text x=\"0\" y=\"14\" font-weight=\"bold\">{} {} ({better} is better)</text>",
        figure.title(),
        figure.unit(workload.unit),
        w = LABEL + WIDTH + 60.0,
    );
    for (n, (subject, summary)) in rows.iter().enumerate() {
        let y = LINE * (n as f64 + 1.3);
        let middle = y + LINE / 2.0 - 2.0;
        let colour = match subject.as_str() {
            "direct" | "forward" => NONE,
            "nginx" | "haproxy" | "sozu" => PEER,
            _ => OWN,
        };
        let (median, min, max) = (scale(summary.median), LABEL + scale(summary.min), LABEL + scale(summary.max));
        let _ = write!(
            svg,
            "<text x=\"0\" y=\"{:.1}\">{}</text><rect x=\"{LABEL}\" y=\"{y:.1}\" width=\"{median:.1}\" height=\"{:.1}\" fill=\"{colour}\"/>\
             <path d=\"M{min:.1} {middle:.1}H{max:.1}M{min:.1} {:.1}v6M{max:.1} {:.1}v6\" stroke=\"#1d2430\" fill=\"none\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            middle + 4.0,
            escape(subject),
            LINE - 4.0,
            middle - 3.0,
            middle - 3.0,
            max.max(LABEL + median) + 6.0,
            middle + 4.0,
            number(summary.median),
        );
    }
    svg + "</svg>"
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
