//! Syntax errors of TOML as diagnostics, and what they cast doubt upon.
//!
//! The parser recovers from a mistake and goes on, so what comes after is worth reporting too; but
//! not what was made up to go on.

use std::collections::HashSet;

use toml::de::Error;

use super::diagnostic::MOST_KEPT;
use super::reader::quoted;
use super::values::is_quotation_mark;
use super::{Diagnostic, Source, Span};

/// Puts syntax errors, a list for each file, together with `findings` about what could be read and
/// `absences` of what could not be found.
pub(super) fn combine(
    source: &Source,
    errors: &[Vec<Error>],
    mut findings: Vec<Diagnostic>,
    mut absences: Vec<Diagnostic>,
    left_out: &mut [usize; 2],
) -> Vec<Diagnostic> {
    let mut all = Vec::new();
    let mut looked_at = 0;
    let line_starts: Vec<usize> = if errors.iter().all(Vec::is_empty) { Vec::new() } else { line_starts(&source.text) };
    // Found among all of them: a file may be one long line.
    let line_start = |offset: usize| line_starts[line_starts.partition_point(|start| *start <= offset).max(1) - 1];
    for (file, errors) in source.files().iter().zip(errors).filter(|(_, errors)| !errors.is_empty()) {
        let span = |error: &Error| {
            let end = file.range.len();
            Source::placed(file, &error.span().unwrap_or(end..end))
        };
        let mut lines = HashSet::new();
        let mut told = Vec::new();
        let mut lost = false;
        for error in errors {
            let span = span(error);
            // One mistake often makes the parser stumble twice; the first time tells.
            let again = !lines.insert(line_start(span.start));
            if again || lost {
                continue;
            }
            // Each look may go through the whole file.
            if looked_at == MOST_KEPT {
                left_out[0] += 1;
                continue;
            }
            looked_at += 1;
            if let Some(unclosed) = unclosed_list(source, error.message(), &span) {
                told.push(unclosed);
                // What follows was read as entries of the list.
                lost = true;
            } else if error.message() == "duplicate key" {
                told.extend(duplicate(source, span));
            } else {
                told.push(diagnostic(source, error.message(), span));
            }
        }
        // Whatever was left out as a consequence: where the parser found an error, one is reported.
        if let (true, Some(error)) = (told.is_empty(), errors.first()) {
            told.push(diagnostic(source, error.message(), span(error)));
        }
        // A missing value is read as a zero at the start of the file.
        let start = file.range.start;
        let made_up = |d: &Diagnostic| lines.contains(&line_start(d.span.start)) || d.span == (start..start);
        findings.retain(|diagnostic| !made_up(diagnostic));
        if errors.iter().all(|error| is_local(error.message())) {
            absences.retain(|diagnostic| !made_up(diagnostic));
        } else {
            absences.clear();
        }
        all.extend(told);
    }
    all.extend(findings);
    all.extend(absences);
    all
}

fn line_starts(text: &str) -> Vec<usize> {
    std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect()
}

/// Does the rest of the file read as if the mistake were not there?
fn is_local(message: &str) -> bool {
    message.starts_with("string values must be quoted")
}

fn diagnostic(source: &Source, message: &str, span: Span) -> Diagnostic {
    let text = source.text.get(span.clone()).unwrap_or_default();
    // RFC 3629 has no control characters but these; TOML allows no other in a file.
    let control =
        source.text[span.start..].chars().next().filter(|c| c.is_control() && !matches!(c, '\n' | '\r' | '\t'));
    if let Some(c) = control {
        let message = format!("this is not TOML: a control character (U+{:04X}) stands here", u32::from(c));
        return Diagnostic::error(
            span.start..span.start + c.len_utf8(),
            message,
            "remove it: an editor may not show it",
        );
    }
    if message.starts_with("missing comma") {
        // At the gap, not at the entry behind it.
        let gap = source.text[..span.start].trim_end().len();
        return Diagnostic::error(gap..gap, "this is not TOML: a comma is missing", "put `,` between the entries");
    }
    let short = if is_local(message) { "text must be in quotes" } else { message };
    Diagnostic::error(span, format!("this is not TOML: {short}"), remedy(message, text))
}

/// A list that swallows the next line of the form `key = …` or `[table]`.
fn unclosed_list(source: &Source, message: &str, span: &Span) -> Option<Diagnostic> {
    let (before, line) = lines_around(source, span.start);
    let line = line.trim();
    let start = source.file(span.start).range.start;
    let is_header =
        line.starts_with('[') && line.trim_end_matches(']').len() < line.len() && !line.contains(['"', ',', '\'']);
    let is_entry = line.split_once('=').is_some_and(|(key, _)| !key.contains(['"', '\'', '{']));
    // A list that begins on the same line lacks something else.
    let begins = source.text[source.line_start(span.start)..span.start].trim();
    if !message.contains("array") || !(is_header || is_entry) || begins.contains('[') {
        return None;
    }
    let last = start + before.trim_end().len();
    let diagnostic =
        Diagnostic::error(last..last, "this is not TOML: the list is not closed", "close the list with `]`");
    Some(diagnostic.note(span.clone(), "this would be an entry of the list"))
}

/// A key or a table that the file has twice; `None`: it follows from a table that it has twice.
fn duplicate(source: &Source, span: Span) -> Option<Diagnostic> {
    let text = source.text.get(span.clone()).unwrap_or_default();
    let (before, line) = lines_around(source, span.start);
    let wanted = definition(line);
    let is_header = wanted.starts_with('[');
    let headers_above = || before.lines().map(definition).filter(|text| text.starts_with('['));
    if !is_header
        && let Some(table) = headers_above().next_back()
        && !table.starts_with("[[")
        && headers_above().filter(|other| *other == table).count() > 1
    {
        return None;
    }
    let remedy = match wanted {
        "[routes]" => "write `[[routes]]`, with double brackets, once for each route",
        _ if is_header && !wanted.contains('.') => "write its keys below the first one, and remove this header",
        _ if is_header => "keep one of the two, or give one another name",
        _ => "keep one of the two",
    };
    let diagnostic = Diagnostic::error(span.clone(), format!("`{text}` is already defined"), remedy);
    Some(match earlier(before, wanted) {
        Some(first) => diagnostic.note(Source::placed(source.file(span.start), &first), "first defined here"),
        None => diagnostic,
    })
}

fn remedy(message: &str, text: &str) -> String {
    let remedy = match message {
        m if m.starts_with("string values must be quoted") => {
            return format!("write {}", quoted(text.trim_matches(is_quotation_mark)));
        }
        m if m.starts_with("unclosed array table") => "close the header with `]]`",
        m if m.starts_with("unclosed table") => "close the header with `]`",
        m if m.starts_with("unclosed array") => "close the list with `]`",
        m if m.starts_with("unclosed inline table") => "close the table with `}`",
        m if m.starts_with("invalid basic string") => "close the string with `\"`",
        m if m.starts_with("invalid literal string") => "close the string with `'`",
        m if m.contains("escape") => "write a backslash as `\\\\`, or the string in single quotes",
        m if m.starts_with("key with no value") => "write `key = value`, text in quotes, lists in brackets",
        m if m.starts_with("missing value") => "write a value after `=`: text in quotes, lists in brackets",
        _ => "write `key = value`, text in quotes, lists in brackets; toml.io describes the format",
    };
    remedy.to_owned()
}

/// The line above that defines the same key or table.
fn earlier(before: &str, wanted: &str) -> Option<Span> {
    let mut end = before.len();
    for line in before.split_inclusive('\n').rev() {
        let begin = end - line.len();
        end = begin;
        if definition(line) == wanted {
            let indent = line.len() - line.trim_start().len();
            return Some(begin + indent..begin + indent + wanted.len());
        }
        // A key is looked for in its own table.
        if !wanted.starts_with('[') && line.trim_start().starts_with('[') {
            return None;
        }
    }
    None
}

/// The header or the key of a line.
fn definition(line: &str) -> &str {
    let end = if line.trim_start().starts_with('[') { '#' } else { '=' };
    line.split(end).next().unwrap_or(line).trim()
}

/// The lines of the same file before that of `offset`, and the latter.
fn lines_around(source: &Source, offset: usize) -> (&str, &str) {
    let start = source.line_start(offset);
    let before = &source.text[source.file(offset).range.start..start];
    (before, source.text[start..].lines().next().unwrap_or_default())
}
