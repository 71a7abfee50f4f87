//! What is wrong with a configuration, where, and what to do about it.
//!
//! A diagnostic knows a byte range of the text, nothing of what the text means.

use std::fmt;

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use super::{Source, Span};

/// Lines longer than this many columns are quoted in part: a generated file may be a single line.
const QUOTE_WIDTH: usize = 160;

/// Errors, and warnings, that are shown of one configuration: more than anybody corrects at once.
/// What comes after them is counted.
const MOST_SHOWN: usize = 100;

/// Errors, and warnings, that each stage of reading keeps for the choice of those.
pub(super) const MOST_KEPT: usize = 3 * MOST_SHOWN;

/// Characters of a message or a remedy, which may quote what somebody wrote.
const LONGEST_TEXT: usize = 1000;

/// One finding about a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    /// Does it stop the configuration from being used?
    pub severity: Severity,
    /// The offending text.
    pub span: Span,
    /// What is wrong, in lower case, without a full stop.
    pub message: String,
    /// What to do about it.
    pub remedy: String,
    /// Another place that has to do with it.
    pub note: Option<(Span, String)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The configuration is refused.
    Error,
    /// The configuration is used, but perhaps not as meant.
    Warning,
}

impl Diagnostic {
    /// The configuration is refused because of `message`.
    pub fn error(span: Span, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { severity: Severity::Error, span, message: fit(message.into()), remedy: fit(remedy.into()), note: None }
    }

    /// The configuration is used, but its owner should know `message`.
    pub fn warning(span: Span, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(span, message, remedy) }
    }

    /// Shows a second place.
    #[must_use]
    pub fn note(mut self, span: Span, message: impl Into<String>) -> Self {
        self.note = Some((span, fit(message.into())));
        self
    }

    /// Does it stop the configuration from being used?
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }

    /// For programs: the places as path, line and column, both from 1.
    pub fn json(&self, source: &Source) -> serde_json::Value {
        let place = |span: &Span| {
            let (path, line, column) = source.position(span.start);
            let (_, end_line, end_column) = source.position(span.end);
            serde_json::json!({
                "file": path, "line": line, "column": column, "end_line": end_line, "end_column": end_column,
            })
        };
        let mut json = place(&self.span);
        json["severity"] = serde_json::json!(self.severity);
        json["message"] = self.message.clone().into();
        json["help"] = self.remedy.clone().into();
        json["note"] = self.note.as_ref().map_or(serde_json::Value::Null, |(span, message)| {
            let mut note = place(span);
            note["message"] = message.clone().into();
            note
        });
        json
    }

    /// For people: `path:line:column: error: message`, the quoted line, the remedy. Ends with a
    /// newline.
    pub fn render<'a>(&'a self, source: &'a Source) -> impl fmt::Display + 'a {
        Rendered { diagnostic: self, source }
    }
}

/// In the order of the files; what is beyond [`MOST_SHOWN`], and the errors and warnings that were
/// `left_out` before, as a number.
pub(super) fn shown_part(mut all: Vec<Diagnostic>, left_out: [usize; 2]) -> Vec<Diagnostic> {
    all.sort_by_key(|diagnostic| (diagnostic.span.start, diagnostic.span.end));
    let mut seen = [0, 0];
    let mut last = [None, None];
    all.retain(|diagnostic| {
        let kind = usize::from(!diagnostic.is_error());
        seen[kind] += 1;
        let is_shown = seen[kind] <= MOST_SHOWN;
        if is_shown {
            last[kind] = Some(diagnostic.span.clone());
        }
        is_shown
    });
    for (kind, what) in ["errors", "warnings"].iter().enumerate() {
        let more = left_out[kind] + seen[kind].saturating_sub(MOST_SHOWN);
        if let (true, Some(span)) = (more > 0, &last[kind]) {
            let message = format!("{more} more {what} are not shown");
            let severity = if kind == 0 { Severity::Error } else { Severity::Warning };
            all.push(Diagnostic { severity, ..Diagnostic::error(span.clone(), message, "correct those above first") });
        }
    }
    all
}

/// Short enough to be shown, and without passwords of URLs.
fn fit(text: String) -> String {
    let text = if text.contains("://") || text.contains('@') { redacted(&text) } else { text };
    match text.char_indices().nth(LONGEST_TEXT) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// A text in which each URL is without what may be secret in it. What is in backticks is one value,
/// with its blanks.
pub fn redacted(text: &str) -> String {
    let is_between = |c: char| c.is_whitespace() || matches!(c, '"' | '\'');
    let by_word = |text: &str| text.split_inclusive(is_between).map(hidden).collect::<String>();
    let parts = text.split('`').enumerate();
    parts.map(|(n, part)| if n % 2 == 0 { by_word(part) } else { hidden(part) }).collect::<Vec<_>>().join("`")
}

/// The line around a position, as wide as it is, without what may be secret in it.
fn redacted_line(source: &Source, offset: usize) -> String {
    let line = source.line_at(offset);
    // No key but that of the repository has a reason to be written over several lines.
    let above = &source.text[source.file(offset).range.start..source.line_start(offset)];
    let first = if ends_in_a_long_string(above) {
        Some(0)
    } else {
        MULTI_LINE.iter().filter_map(|delimiter| line.find(delimiter)).min()
    };
    first.map_or_else(|| hidden(line), |first| masked(line, std::slice::from_ref(&(first..line.len()))))
}

/// What begins and ends a string that may have line breaks in it.
const MULTI_LINE: [&str; 2] = ["\"\"\"", "'''"];

fn ends_in_a_long_string(mut text: &str) -> bool {
    let mut open: Option<&str> = None;
    loop {
        let found = MULTI_LINE.iter().filter(|delimiter| open.is_none_or(|open| open == **delimiter));
        let next = found.filter_map(|delimiter| Some((text.find(delimiter)?, *delimiter))).min();
        let Some((at, delimiter)) = next else { return open.is_some() };
        open = if open.is_some() { None } else { Some(delimiter) };
        text = &text[at + delimiter.len()..];
    }
}

/// A text with stars for what may be secret in URLs, and in scp's form of them.
pub(super) fn hidden(text: &str) -> String {
    masked(text, &secrets_of(text))
}

/// How `@` can be written.
const AT: [&str; 5] = ["@", "%40", "\\u0040", "\\U00000040", "\\x40"];

/// Where names, passwords and queries of URLs are in a text: up to the last `@`, and from the end
/// of the host where more follows than a plain path. More is hidden than has to be: nobody knows
/// where a password ends that is not quoted well.
fn secrets_of(text: &str) -> Vec<Span> {
    let mut secrets = Vec::new();
    let at = AT.iter().filter_map(|at| text.rfind(at).map(|start| start..start + at.len())).max_by_key(|at| at.start);
    let before = at.as_ref().map_or("", |at| &text[..at.start]);
    if let (false, Some(colon)) = (before.contains("://"), before.find(':')) {
        secrets.push(colon + 1..before.len());
    }
    let mut from = 0;
    while let Some(found) = text[from..].find("://") {
        let scheme = from + found;
        let mut host = scheme + 3;
        if let Some(at) = at.as_ref().filter(|at| at.start >= host) {
            // `ssh://git@host` tells nothing, and is what most people write.
            if !(text[..scheme].ends_with("ssh") && text[host..at.start].chars().all(is_of_name)) {
                secrets.push(host..at.start);
            }
            host = at.end;
        }
        let (host_end, end) = plain(&text[host..]);
        let rest = &text[host + end..];
        let quote = text[..scheme].trim_end_matches(is_of_name).chars().next_back();
        let is_closed = quote.is_some_and(|quote| matches!(quote, '"' | '\'') && rest.starts_with(quote));
        if !is_closed && !rest.chars().all(|c| c.is_whitespace() || "\"'),;.…".contains(c)) {
            secrets.push(host + host_end..text.len());
            break;
        }
        from = host + end;
    }
    secrets
}

/// How much of what comes after `://` is a host, and how much is that with a port and a path.
fn plain(text: &str) -> (usize, usize) {
    let run = |from: usize, is_part: fn(char) -> bool| {
        let end = text[from..].find(|c| !is_part(c));
        end.map_or(text.len(), |end| from + end)
    };
    let host = match text.strip_prefix('[').and_then(|rest| rest.find(']')) {
        Some(end) if text[1..=end].chars().all(|c| c.is_ascii_hexdigit() || c == ':') => end + 2,
        _ => run(0, is_of_name),
    };
    let port = if text[host..].starts_with(':') { run(host + 1, |c| c.is_ascii_digit()) } else { host };
    let path = |c| is_of_name(c) || matches!(c, '/' | '~' | '+' | '%');
    (host, if text[port..].starts_with('/') { run(port, path) } else { port })
}

fn is_of_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')
}

fn masked(text: &str, hidden: &[Span]) -> String {
    let mut shown = String::new();
    let mut from = 0;
    for span in hidden {
        shown += &text[from..span.start];
        shown.extend(text[span.clone()].chars().map(|_| '*'));
        from = span.end;
    }
    shown + &text[from..]
}

struct Rendered<'a> {
    diagnostic: &'a Diagnostic,
    source: &'a Source,
}

impl fmt::Display for Rendered<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Diagnostic { severity, span, message, remedy, note } = self.diagnostic;
        let severity = match severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        quote(f, self.source, span, severity, message)?;
        if let Some((span, message)) = note {
            quote(f, self.source, span, "note", message)?;
        }
        writeln!(f, "  help: {remedy}")
    }
}

fn quote(f: &mut fmt::Formatter<'_>, source: &Source, span: &Span, severity: &str, message: &str) -> fmt::Result {
    let (path, line, column) = source.position(span.start);
    writeln!(f, "{}:{line}:{column}: {severity}: {}", path.display(), printable(message))?;

    let text = &*redacted_line(source, span.start);
    // Where the window into a long line begins, in characters.
    let skip = if text.chars().count() > QUOTE_WIDTH { column.saturating_sub(QUOTE_WIDTH / 4) } else { 0 };
    let before: String = text.chars().take(column - 1).skip(skip).map(shown).collect();
    let start = source.floor(span.start);
    let marked_end = source.floor(span.end).max(start).min(source.line_start(start) + text.len()).max(start);
    let marked = source.text[start..marked_end].chars().count().min(QUOTE_WIDTH - QUOTE_WIDTH / 4);
    let marked: String = text.chars().skip(column - 1).take(marked).map(shown).collect();
    let window: String = text.chars().skip(skip).take(QUOTE_WIDTH).map(shown).collect();
    let more = if text.chars().count() > skip + QUOTE_WIDTH { "…" } else { "" };
    let lead = if skip > 0 { "…" } else { "" };

    let number = line.to_string();
    let gutter = " ".repeat(number.len());
    writeln!(f, "{}", format!("{number} | {lead}{window}{more}").trim_end())?;
    let indent = " ".repeat(lead.width() + before.width());
    let carets = "^".repeat(marked.width().max(1));
    writeln!(f, "{gutter} | {indent}{carets}")
}

/// One column for what a terminal would act on or show in an unknown width.
pub fn shown(c: char) -> char {
    match c {
        '\t' => ' ',
        c if c.is_control() || c.width().is_none() || is_direction_mark(c) => '\u{fffd}',
        c => c,
    }
}

fn is_direction_mark(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn printable(text: &str) -> String {
    text.chars().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(text: &str) -> Source {
        Source::new("test.toml", text.into())
    }

    #[test]
    fn columns_count_characters_and_carets_count_terminal_cells() {
        let source = source("x = 1\nhost = [\"東京.example\", \"bad host\"]\n");
        let start = source.text.find("\"bad").unwrap();
        let shown = Diagnostic::error(start..start + 10, "bad", "fix it").render(&source).to_string();
        let expected = "test.toml:2:23: error: bad\n\
             2 | host = [\"東京.example\", \"bad host\"]\n  |                         ^^^^^^^^^^\n  help: fix it\n";
        assert_eq!(shown, expected);
    }

    #[test]
    fn a_very_long_line_is_quoted_around_the_mistake() {
        let source = source(&format!("a = \"{}\" BAD \"{}\"", "x".repeat(5000), "y".repeat(5000)));
        let start = source.text.find("BAD").unwrap();
        let shown = Diagnostic::error(start..start + 3, "bad", "fix it").render(&source).to_string();
        let mut lines = shown.lines().skip(1);
        let (quoted, carets) = (lines.next().unwrap(), lines.next().unwrap());
        assert!(quoted.chars().count() < 200, "{shown}");
        let at = carets.find('^').unwrap();
        assert_eq!(quoted.chars().skip(at).take(3).collect::<String>(), "BAD");
    }

    #[test]
    fn control_characters_of_the_file_do_not_reach_the_terminal() {
        let source = source("a = \"\x1b[2J\u{202e}\"");
        let shown = Diagnostic::error(4..10, "bad \x1b[2J", "fix it").render(&source).to_string();
        assert!(!shown.contains(['\x1b', '\u{202e}']));
    }

    #[test]
    fn a_password_in_a_url_is_never_shown_however_it_is_written() {
        for line in [
            r#"git = "https://me:s3cret@git.example.com/x""#,
            r#"git = "https://s3cret@git.example.com/x""#,
            r#"git = "ssh://git:s3cret@git.example.com/x""#,
            r#"git = "me:s3cret@git.example.com:x""#,
            r#"git = "me:s3cret%40git.example.com:x""#,
            r#"git = "https://me:s3/cr s3cret@git.example.com/x""#,
            r#"git = "https://me:s3cret@git.example.com/x""#,
            r#"git = "https://me:s3cret%40git.example.com/x""#,
            r#"git = "https://git.example.com/x?private_token=s3cret""#,
            r#"git = "https://git.example.com:8443/x#s3cret""#,
            r#"git = "https://git.example.com/x s3cret""#,
            r#"git = "https://git.example.com:s3cret/x""#,
            r#"git = "https://git.example.com:8s3cret/x""#,
            r#"git = "https://git.example.com/x's3cret""#,
            r#"git = "https://git.example.com/x\u0020s3cret""#,
            r"git = 'https://me:s3cret'@git.example.com/x",
            "git = https://me:s3cret@git.example.com/x",
            "git = https://git.example.com/x?s3cret # s3cret",
            r#"source = { git = "https://me:s3cret@git.example.com/x", webhok = 1 }"#,
        ] {
            let source = source(line);
            let shown = Diagnostic::error(0..line.len(), "bad", "fix it").render(&source).to_string();
            assert!(!shown.contains("s3cret") && shown.contains("git.example.com"), "{shown}");
            assert_eq!(shown.lines().nth(1).unwrap().chars().count(), line.chars().count() + 4, "{shown}");
        }
        for plain in [
            r#"source = { git = "https://git.example.com:8443/~me/x.git", webhok = 1 } # see https://example.com/"#,
            r#"git = "ssh://git@git.example.com:22/x.git""#,
            r#"git = "https://[2001:db8::1]:8443/x.git""#,
        ] {
            let source = source(plain);
            assert!(Diagnostic::error(0..1, "bad", "fix it").render(&source).to_string().contains(plain), "{plain}");
        }
        // Of several lines, each may be the one that is quoted.
        let text = "a = 1\ngit = \"\"\"https://me:\ns3cret'''\ns3cret\n@x\"\"\"\nb = '''s3cret'''\nc = 2\n";
        let several = source(text);
        for (at, _) in text.match_indices('\n') {
            let shown = Diagnostic::error(at - 1..at, "bad", "fix it").render(&several).to_string();
            assert!(!shown.contains("s3cret") && !shown.contains("me:"), "{shown}");
            assert_eq!(shown.contains("a = 1") || shown.contains("c = 2"), !shown.contains('*'), "{shown}");
        }
        for value in ["https://me:hun s3cret@x.example", "https://x.example/y?t=s3cret", "https://x.example/y s3cret"] {
            let found = Diagnostic::error(0..1, format!("`{value}` is a URL"), format!("not \"{}\"", hidden(value)));
            assert!(!format!("{found:?}").contains("s3cret"), "{found:?}");
        }
        let message = "`https://me:s3cret@x.example/` is a URL; write \"ssh://git@HOST/PATH\" or git@host:x";
        let found = Diagnostic::error(0..1, message, "write \"https://me:s3cret@x.example\"");
        assert!(!format!("{found:?}").contains("s3cret"), "{found:?}");
        assert!(found.message.ends_with("write \"ssh://git@HOST/PATH\" or git@host:x"), "{found:?}");
    }

    #[test]
    fn more_than_a_hundred_are_counted_and_no_text_is_without_end() {
        let warnings = (0..120).map(|i| Diagnostic::warning(i..i, "w", ""));
        let all: Vec<_> = warnings.chain((0..250).map(|i| Diagnostic::error(i..i, "e", ""))).collect();
        let shown = shown_part(all, [1000, 0]);
        let last: Vec<_> = shown[shown.len() - 2..].iter().map(|d| &*d.message).collect();
        assert_eq!(last, ["1150 more errors are not shown", "20 more warnings are not shown"]);
        assert_eq!(shown.iter().filter(|d| d.is_error()).count(), MOST_SHOWN + 1);
        assert_eq!(shown_part(shown[..3].to_vec(), [0, 0]).len(), 3);
        let long = Diagnostic::error(0..1, "é".repeat(1 << 20), "");
        assert_eq!(long.message.chars().count(), LONGEST_TEXT + 1);
    }

    #[test]
    fn the_end_of_the_file_can_be_pointed_at() {
        let source = source("a = [");
        let shown = Diagnostic::error(5..5, "unclosed", "close it").render(&source).to_string();
        assert!(shown.starts_with("test.toml:1:6: error: unclosed\n1 | a = [\n  |      ^\n"), "{shown}");
    }
}
