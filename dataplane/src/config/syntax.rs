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
    for error in errors {
        let span = error.span().unwrap_or(source.text.len()..source.text.len());
        let line = source.position(span.start).0;
        // One mistake often makes the parser stumble twice; the first time tells.
        if !lines.contains(&line) {
            lines.push(line);
            all.push(diagnostic(source, error.message(), span));
        }
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
    if message == "duplicate key" {
        let diagnostic = Diagnostic::error(
            span.clone(),
            format!("`{text}` is already defined"),
            "keep one of the two; a second route begins with another `[[routes]]`",
        );
        return match earlier(source, span) {
            Some(first) => diagnostic.note(first, "first defined here"),
            None => diagnostic,
        };
    }
    Diagnostic::error(span, format!("this is not TOML: {message}"), remedy(message, text))
}

fn remedy(message: &str, text: &str) -> String {
    let remedy = match message {
        m if m.starts_with("string values must be quoted") => {
            return format!("put it in quotes: \"{}\"", text.trim_matches(['"', '\'']));
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
fn earlier(source: &Source, span: Span) -> Option<Span> {
    fn defines(line: &str) -> &str {
        let line = line.trim();
        if line.starts_with('[') {
            line.split('#').next().unwrap_or(line).trim()
        } else {
            line.split('=').next().unwrap_or(line).trim()
        }
    }
    let start = source.text[..span.start].rfind('\n').map_or(0, |newline| newline + 1);
    let wanted = defines(source.text[start..].lines().next()?);
    let is_header = wanted.starts_with('[');
    let mut end = start;
    for line in source.text[..start].split_inclusive('\n').rev() {
        let begin = end - line.len();
        end = begin;
        if defines(line) == wanted {
            let indent = line.len() - line.trim_start().len();
            return Some(begin + indent..begin + indent + wanted.len());
        }
        // A key is looked for in its own table.
        if !is_header && line.trim_start().starts_with('[') {
            return None;
        }
    }
    None
}
