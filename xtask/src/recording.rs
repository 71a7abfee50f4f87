//! A recording of a command's output as an SVG that plays: each line appears when it was printed,
//! and older ones move up and out of sight.
//!
//! Knows nothing of the command but its lines. A viewer without animations shows the end.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Lines and columns of the screen.
const ROWS: usize = 32;
const COLUMNS: usize = 120;
/// Pixels.
const ROW: usize = 18;
const COLUMN: f64 = 7.8;
const MARGIN: usize = 16;
/// What takes longer is shortened to this.
const LONGEST_PAUSE: Duration = Duration::from_millis(1500);
/// Time to read a line.
const READING: Duration = Duration::from_millis(120);

/// A line and when it was printed.
type Line = (Duration, String);

/// Runs a command to its end; what it printed is shown here, too.
pub fn record(command: &mut Command) -> Result<Vec<Line>> {
    let mut child = command.stdout(Stdio::piped()).spawn().context("cannot start what is to be recorded")?;
    let begin = Instant::now();
    let mut lines = Vec::new();
    for line in BufReader::new(child.stdout.take().context("a pipe")?).lines() {
        let line = line?;
        println!("{line}");
        lines.push((begin.elapsed(), line));
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("what was to be recorded has failed: {status}");
    }
    Ok(lines)
}

/// The picture. `title` is for those who cannot see it.
pub fn svg(lines: &[Line], title: &str) -> String {
    let (width, height) = ((COLUMN * COLUMNS as f64) as usize + 2 * MARGIN, ROWS * ROW + 2 * MARGIN);
    let times = paced(lines);
    let whole = times.last().copied().unwrap_or_default() + LONGEST_PAUSE;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" role=\"img\" aria-labelledby=\"title\">\n\
         <title id=\"title\">{}</title>\n<style>\n\
         text {{ font: 13px ui-monospace, \"DejaVu Sans Mono\", Menlo, Consolas, monospace; fill: #d9e0e7; white-space: pre; }}\n\
         .step {{ fill: #ffffff; font-weight: bold; }}\n.command {{ fill: #7fd1ae; }}\n\
         .line {{ animation: appear 1ms backwards; }}\n@keyframes appear {{ from {{ opacity: 0; }} }}\n",
        escaped(title)
    );
    let _ = writeln!(
        out,
        ".screen {{ animation: scroll {:.2}s step-end forwards; }}\n@keyframes scroll {{",
        whole.as_secs_f64()
    );
    let _ = writeln!(out, "0% {{ transform: none; }}");
    let up = |shown: usize| (shown.saturating_sub(ROWS)) * ROW;
    for (index, time) in times.iter().enumerate().filter(|(index, _)| *index >= ROWS) {
        let part = 100.0 * time.as_secs_f64() / whole.as_secs_f64();
        let _ = writeln!(out, "{part:.3}% {{ transform: translateY(-{}px); }}", up(index + 1));
    }
    let end = up(lines.len());
    let _ = writeln!(out, "100% {{ transform: translateY(-{end}px); }}\n}}\n</style>");
    let _ = writeln!(out, "<rect width=\"{width}\" height=\"{height}\" rx=\"8\" fill=\"#16202a\"/>");
    let _ = writeln!(
        out,
        "<svg x=\"{MARGIN}\" y=\"{MARGIN}\" width=\"{}\" height=\"{}\">\n<g class=\"screen\" xml:space=\"preserve\" transform=\"translate(0 -{end})\">",
        width - 2 * MARGIN,
        ROWS * ROW
    );
    for (index, ((_, line), time)) in
        lines.iter().zip(&times).enumerate().filter(|(_, ((_, line), _))| !line.is_empty())
    {
        let kind = match line {
            line if line.starts_with("--- ") => "line step",
            line if line.starts_with("$ ") => "line command",
            _ => "line",
        };
        let shown: String = line.chars().filter(|c| !c.is_control()).take(COLUMNS).collect();
        let _ = writeln!(
            out,
            "<text class=\"{kind}\" style=\"animation-delay: {:.2}s\" x=\"0\" y=\"{}\">{}</text>",
            time.as_secs_f64(),
            index * ROW + ROW - 5,
            escaped(&shown)
        );
    }
    out + "</g>\n</svg>\n</svg>\n"
}

/// When each line appears: as it was, without long pauses, and slowly enough to be read.
fn paced(lines: &[Line]) -> Vec<Duration> {
    let mut before = lines.first().map_or(Duration::ZERO, |(at, _)| *at);
    let mut now = Duration::ZERO;
    let mut times = Vec::new();
    for (at, line) in lines {
        now += at.saturating_sub(before).min(LONGEST_PAUSE);
        before = *at;
        times.push(now);
        now += if line.is_empty() { READING / 4 } else { READING };
    }
    times
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_appear_in_their_order_and_what_is_said_is_no_markup() {
        let lines: Vec<Line> = (0..40).map(|n| (Duration::from_secs(n * 60), format!("$ <{n}> & more"))).collect();
        let times = paced(&lines);
        assert!(times.is_sorted() && times[39] < Duration::from_secs(70), "an hour is shortened: {:?}", times[39]);
        let svg = svg(&lines, "a <title>");
        assert!(svg.contains("a &lt;title&gt;") && svg.contains("$ &lt;39&gt; &amp; more"));
        assert_eq!(svg.matches("<text ").count(), 40);
        assert!(svg.contains(&format!("translateY(-{}px)", 8 * ROW)), "the last lines are in sight at the end");
    }

    #[test]
    fn what_fails_is_not_recorded() {
        assert!(record(Command::new("sh").args(["-c", "echo one; exit 3"])).is_err());
        let lines = record(Command::new("sh").args(["-c", "echo one; echo two"])).expect("it ends well");
        assert_eq!(lines.iter().map(|(_, line)| &**line).collect::<Vec<_>>(), ["one", "two"]);
    }
}
