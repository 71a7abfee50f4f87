//! Syntax errors of TOML as diagnostics, and what they cast doubt upon.
//!
//! The parser recovers from a mistake and goes on, so what comes after is worth reporting too; but not what was made up to go on.

use toml::de::Error;

use super::{Diagnostic, Source, Span};

/// Puts syntax errors together with `findings` about what could be read and `absences` of what could not be found.
pub(super) fn combine(
    source: &Source,
    errors: &[Error],
    mut findings: Vec<Diagnostic>,
    mut absences: Vec<Diagnostic>,
) -> Vec<Diagnostic> {
    let mut lines = Vec::new();
    let mut all: Vec<Diagnostic> = Vec::new();
    let mut lost = false;
    for error in errors {
        let span = error.span().unwrap_or(source.text.len()..source.text.len());
        let line = source.position(span.start).0;
        // One mistake often makes the parser stumble twice; the first time tells.
        let again = lines.contains(&line);
        lines.push(line);
        if again || lost {
            continue;
        }
        if let Some(unclosed) = unclosed_list(source, error.message(), &span) {
            all.push(unclosed);
            // What follows was read as entries of the list.
            lost = true;
        } else if error.message() == "duplicate key" {
            all.extend(duplicate(source, span));
        } else {
            all.push(diagnostic(source, error.message(), span));
        }
    }
    // Whatever was left out as a consequence: where the parser found an error, one is reported.
    if let (true, Some(error)) = (all.is_empty(), errors.first()) {
        all.push(diagnostic(source, error.message(), error.span().unwrap_or(0..0)));
    }
    // A missing value is read as a zero at the start of the file.
    let made_up = |d: &Diagnostic| lines.contains(&source.position(d.span.start).0) || d.span == (0..0);
    if !errors.is_empty() {
        findings.retain(|diagnostic| !made_up(diagnostic));
        if errors.iter().all(|error| is_local(error.message())) {
            absences.retain(|diagnostic| !made_up(diagnostic));
        } else {
            absences.clear();
        }
    }
    all.extend(findings);
    all.extend(absences);
    all
}

/// Does the rest of the file read as if the mistake were not there?
fn is_local(message: &str) -> bool {
    message.starts_with("string values must be quoted")
}

fn diagnostic(source: &Source, message: &str, span: Span) -> Diagnostic {
    let text = source.text.get(span.clone()).unwrap_or_default();
    let short = if is_local(message) { "text must be in quotes" } else { message };
    Diagnostic::error(span, format!("this is not TOML: {short}"), remedy(message, text))
}

/// A list that swallows the next line of the form `key = …` or `[table]`.
fn unclosed_list(source: &Source, message: &str, span: &Span) -> Option<Diagnostic> {
    let (before, line) = lines_around(source, span.start);
    let line = line.trim();
    let is_header =
        line.starts_with('[') && line.trim_end_matches(']').len() < line.len() && !line.contains(['"', ',', '\'']);
    let is_entry = line.split_once('=').is_some_and(|(key, _)| !key.contains(['"', '\'', '{']));
    if !message.contains("array") || !(is_header || is_entry) {
        return None;
    }
    let last = before.trim_end().len();
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
        _ if is_header => "keep one of the two, or give one another name",
        _ => "keep one of the two",
    };
    let diagnostic = Diagnostic::error(span.clone(), format!("`{text}` is already defined"), remedy);
    Some(match earlier(before, wanted) {
        Some(first) => diagnostic.note(first, "first defined here"),
        None => diagnostic,
    })
}

fn remedy(message: &str, text: &str) -> String {
    let remedy = match message {
        m if m.starts_with("string values must be quoted") => {
            return format!("write \"{}\"", text.trim_matches(['"', '\'']));
        }
        m if m.starts_with("unclosed array table") => "close the header with `]]`",
        m if m.starts_with("unclosed table") => "close the header with `]`",
        m if m.starts_with("unclosed array") => "close the list with `]`",
        m if m.starts_with("unclosed inline table") => "close the table with `}`",
        m if m.starts_with("missing comma") => "put `,` between the entries",
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

/// The lines before that of `offset`, and the latter.
fn lines_around(source: &Source, offset: usize) -> (&str, &str) {
    let start = source.text[..offset].rfind('\n').map_or(0, |newline| newline + 1);
    (&source.text[..start], source.text[start..].lines().next().unwrap_or_default())
}
