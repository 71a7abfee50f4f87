//! Reads typed values out of a spanned TOML tree and collects what is wrong with them.
//!
//! It knows the grammar of values and keys, not what any key is for.

use std::ops::RangeInclusive;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::diagnostic::{MOST_KEPT, hidden};
use super::keys::{self, Key};
use super::values::{Refused, format_duration, format_size, parse_duration, parse_size};
use super::{Diagnostic, Span};

/// Collects diagnostics while values are read. A method that returns `None` has reported why.
#[derive(Default)]
pub(super) struct Reader {
    pub(super) diagnostics: Vec<Diagnostic>,
    /// Of things that are not there: kept apart, for they prove nothing once a syntax error has
    /// swallowed part of the file.
    pub(super) absences: Vec<Diagnostic>,
    /// How many errors and warnings were found after there were enough of them.
    pub(super) left_out: [usize; 2],
    kept: [usize; 2],
    /// Keys that are there under a wrong name, with the start of their table: they are not missing
    /// as well.
    misspelt: Vec<(usize, String)>,
}

/// A table whose keys have been compared with those that it may have.
#[derive(Clone)]
pub(super) struct Section<'t> {
    table: &'t DeTable<'t>,
    /// As in the file: `[listeners.public]`.
    pub(super) name: String,
    /// Its header.
    pub(super) span: Span,
    /// Where its file begins.
    base: usize,
}

/// A value with the key that names it in messages.
#[derive(Clone, Copy)]
pub(super) struct Field<'t> {
    pub(super) key: &'t str,
    /// Is it an entry of the list under `key`?
    entry: bool,
    spanned: &'t Spanned<DeValue<'t>>,
    /// Where its file begins.
    base: usize,
}

impl<'t> Field<'t> {
    pub(super) fn span(&self) -> Span {
        shifted(&self.spanned.span(), self.base)
    }

    fn value(&self) -> &'t DeValue<'t> {
        self.spanned.get_ref()
    }

    pub(super) fn is_table(&self) -> bool {
        self.value().is_table()
    }

    /// The entries of a table.
    pub(super) fn children(&self) -> Option<Vec<Self>> {
        let entry = |(key, spanned): (&'t Spanned<_>, &'t Spanned<DeValue<'t>>)| {
            let key: &std::borrow::Cow<'t, str> = key.get_ref();
            Field { key, entry: false, spanned, base: self.base }
        };
        Some(self.value().as_table()?.iter().map(entry).collect())
    }

    pub(super) fn is_empty_list(&self) -> bool {
        self.value().as_array().is_some_and(|items| items.is_empty())
    }

    pub(super) fn is_empty_table(&self) -> bool {
        self.value().as_table().is_some_and(DeTable::is_empty)
    }

    fn subject(&self) -> String {
        if self.entry { format!("each entry of `{}`", self.key) } else { format!("`{}`", self.key) }
    }
}

impl<'t> Section<'t> {
    fn is_root(&self) -> bool {
        self.span.is_empty()
    }

    pub(super) fn get(&self, key: &str) -> Option<Field<'t>> {
        let found = self.table.get_key_value(key);
        found.map(|(key, spanned)| Field { key: key.get_ref(), entry: false, spanned, base: self.base })
    }

    /// The entries in the order of the file, each with the span of its key.
    pub(super) fn entries(&self) -> Vec<(Span, Field<'t>)> {
        let mut entries: Vec<_> = self
            .table
            .iter()
            .map(|(key, spanned)| {
                let field = Field { key: key.get_ref(), entry: false, spanned, base: self.base };
                (shifted(&key.span(), self.base), field)
            })
            .collect();
        entries.sort_by_key(|(span, _)| span.start);
        entries
    }
}

impl Reader {
    pub(super) fn error(&mut self, span: Span, message: impl Into<String>, remedy: impl Into<String>) {
        self.push(Diagnostic::error(span, message, remedy));
    }

    pub(super) fn warning(&mut self, span: Span, message: impl Into<String>, remedy: impl Into<String>) {
        self.push(Diagnostic::warning(span, message, remedy));
    }

    /// Keeps it, unless there are enough of its kind.
    pub(super) fn push(&mut self, diagnostic: Diagnostic) {
        if self.has_room(&diagnostic) {
            self.diagnostics.push(diagnostic);
        }
    }

    fn has_room(&mut self, diagnostic: &Diagnostic) -> bool {
        let kind = usize::from(!diagnostic.is_error());
        let room = self.kept[kind] < MOST_KEPT;
        let counted = if room { &mut self.kept } else { &mut self.left_out };
        counted[kind] += 1;
        room
    }

    /// The candidate that was probably meant; of many the first ones are looked at. Nothing when
    /// nobody would read it.
    pub(super) fn suggest<'c>(&self, word: &str, candidates: &[&'c str]) -> Option<&'c str> {
        if self.is_full() { None } else { suggest(word, &candidates[..candidates.len().min(MOST_CANDIDATES)]) }
    }

    fn is_full(&self) -> bool {
        self.kept[0] == MOST_KEPT
    }

    /// Reports an error that rests on something being nowhere in the file.
    pub(super) fn absent(&mut self, span: Span, message: impl Into<String>, remedy: impl Into<String>) {
        self.push_absence(Diagnostic::error(span, message, remedy));
    }

    /// As [`push`](Self::push).
    pub(super) fn push_absence(&mut self, diagnostic: Diagnostic) {
        if self.has_room(&diagnostic) {
            self.absences.push(diagnostic);
        }
    }

    /// Unwraps, or reports that the value of `span` was refused.
    pub(super) fn accept<T>(&mut self, span: Span, result: Result<T, Refused>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(Refused { message, remedy }) => {
                self.error(span, message, remedy);
                None
            }
        }
    }

    /// The root table of a file that begins at `base`.
    pub(super) fn root<'t>(&mut self, table: &'t DeTable<'t>, name: &str, base: usize, keys: &[Key]) -> Section<'t> {
        let section = Section { table, name: name.into(), span: base..base, base };
        self.report_unknown_keys(&section, keys);
        section
    }

    /// A table with these keys alone. `name` is how it is written: `[limits]`.
    pub(super) fn section<'t>(&mut self, field: Field<'t>, name: String, keys: &[Key]) -> Option<Section<'t>> {
        let section = self.any_section(field, name)?;
        self.report_unknown_keys(&section, keys);
        Some(section)
    }

    /// A table whose keys are names that the owner chose.
    pub(super) fn any_section<'t>(&mut self, field: Field<'t>, name: String) -> Option<Section<'t>> {
        if let DeValue::Table(table) = field.value() {
            return Some(Section { table, name, span: field.span(), base: field.base });
        }
        let is_list =
            matches!(field.value(), DeValue::Array(items) if items.iter().any(|item| item.get_ref().is_table()));
        let (found, remedy) = if is_list {
            ("a list of tables".into(), format!("write `{name}`, with single brackets"))
        } else if name.starts_with('[') {
            (describe(field.value()), format!("write `{name}` on a line of its own, and its keys below"))
        } else {
            let remedy = match field.value() {
                DeValue::Boolean(true) => format!("write `{} = {{}}` for the defaults", field.key),
                DeValue::Boolean(false) => "remove it".to_owned(),
                _ => format!("write `{} = {{ … }}`, with its keys in the braces", field.key),
            };
            (describe(field.value()), remedy)
        };
        self.error(field.span(), format!("{} must be a table, not {found}", field.subject()), remedy);
        None
    }

    /// `[[key]]`: a list of tables.
    pub(super) fn sections<'t>(&mut self, field: Field<'t>, keys: &[Key]) -> Vec<Section<'t>> {
        let name = format!("[[{}]]", field.key);
        let DeValue::Array(items) = field.value() else {
            self.error(
                field.span(),
                format!("{} must be a list of tables, not {}", field.subject(), describe(field.value())),
                format!("write `{name}` with double brackets, once for each"),
            );
            return Vec::new();
        };
        let mut sections = Vec::new();
        for item in items {
            if let DeValue::Table(table) = item.get_ref() {
                let span = shifted(&item.span(), field.base);
                let section = Section { table, name: name.clone(), span, base: field.base };
                self.report_unknown_keys(&section, keys);
                sections.push(section);
            } else {
                self.error(
                    shifted(&item.span(), field.base),
                    format!("each entry of `{}` must be a table, not {}", field.key, describe(item.get_ref())),
                    format!("write `{name}` on a line of its own, and its keys below"),
                );
            }
        }
        sections
    }

    fn report_unknown_keys(&mut self, section: &Section<'_>, keys: &[Key]) {
        for (span, field) in section.entries() {
            if !keys::has(keys, field.key) {
                let word = if self.is_full() { None } else { meant(field.key, keys) };
                let remedy = if let Some(word) = word {
                    self.misspelt.push((section.span.start, word.to_owned()));
                    format!("did you mean `{word}`?")
                } else {
                    unknown_key_remedy(field.key, section, keys)
                };
                let at = if section.is_root() { "at" } else { "in" };
                self.error(span, format!("unknown key `{}` {at} {}", field.key, section.name), remedy);
            }
        }
    }

    /// Reports that a required key is not there.
    pub(super) fn missing(&mut self, section: &Section<'_>, key: &str, example: &str) {
        if self.is_misspelt(section, key) {
            return;
        }
        self.absent(
            section.span.clone(),
            format!("{} has no `{key}`", section.name),
            format!("add `{key} = {example}`"),
        );
    }

    /// Does the table have this key under a name that was reported as unknown?
    pub(super) fn is_misspelt(&self, section: &Section<'_>, key: &str) -> bool {
        self.misspelt.iter().any(|(start, word)| *start == section.span.start && word == key)
    }

    fn wrong_type(&mut self, field: &Field<'_>, expected: &str, example: &str) {
        let remedy =
            if field.entry { format!("write {example}") } else { format!("write `{} = {example}`", field.key) };
        self.error(
            field.span(),
            format!("{} must be {expected}, not {}", field.subject(), describe(field.value())),
            remedy,
        );
    }

    pub(super) fn string<'t>(&mut self, field: Field<'t>, expected: &str, example: &str) -> Option<&'t str> {
        if let DeValue::String(text) = field.value() {
            return Some(text);
        }
        self.wrong_type(&field, expected, example);
        None
    }

    /// The entries of a list of strings; those of another type are reported and left out.
    pub(super) fn strings<'t>(&mut self, field: Field<'t>, expected: &str, example: &str) -> Vec<(Span, &'t str)> {
        let DeValue::Array(items) = field.value() else {
            let remedy = match field.value() {
                DeValue::String(text) => format!("put it in brackets: `{} = [{}]`", field.key, quoted(text)),
                _ => format!("write `{} = [{example}]`", field.key),
            };
            self.error(
                field.span(),
                format!("{} must be a list of strings, not {}", field.subject(), describe(field.value())),
                remedy,
            );
            return Vec::new();
        };
        let entries = items.iter().map(|item| Field { key: field.key, entry: true, spanned: item, base: field.base });
        entries.filter_map(|item| self.string(item, expected, example).map(|text| (item.span(), text))).collect()
    }

    /// One of a few words.
    pub(super) fn choice<T: Copy>(&mut self, field: Field<'_>, choices: &[(&str, T)]) -> Option<T> {
        let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
        let listed = list(&words.iter().map(|word| format!("\"{word}\"")).collect::<Vec<_>>());
        let DeValue::String(text) = field.value() else {
            let word = match field.value() {
                DeValue::Boolean(true) if words[0] == "off" => words[words.len() - 1],
                _ => words[0],
            };
            self.error(
                field.span(),
                format!("{} must be one of {listed}, not {}", field.subject(), describe(field.value())),
                format!("write `{} = \"{}\"`", field.key, word),
            );
            return None;
        };
        if let Some((_, value)) = choices.iter().find(|(word, _)| word == text) {
            return Some(*value);
        }
        let remedy = match other_value(field.key, text).or_else(|| self.suggest(text, &words)) {
            Some(word) if words.contains(&word) => format!("did you mean \"{word}\"?"),
            _ => format!("write one of {listed}"),
        };
        self.error(field.span(), format!("`{}` cannot be {}", field.key, quoted(text)), remedy);
        None
    }

    pub(super) fn boolean(&mut self, field: Field<'_>) -> Option<bool> {
        let value = field.value().as_bool();
        if value.is_none() {
            self.wrong_type(&field, "true or false", "true");
        }
        value
    }

    pub(super) fn duration(&mut self, field: Field<'_>, range: &RangeInclusive<Duration>) -> Option<Duration> {
        let text = match field.value() {
            DeValue::String(text) => text,
            DeValue::Integer(number) => {
                let example = format!("\"{number}s\"");
                self.error(
                    field.span(),
                    format!("{} must be a duration in quotes, not {}", field.subject(), describe(field.value())),
                    format!("write `{} = {example}` for seconds; units are h, m, s, ms", field.key),
                );
                return None;
            }
            _ => {
                self.wrong_type(&field, "a duration", "\"5s\"");
                return None;
            }
        };
        let duration = self.accept(field.span(), parse_duration(text))?;
        self.in_range(&field, duration, range, format_duration).then_some(duration)
    }

    pub(super) fn size(&mut self, field: Field<'_>, range: &RangeInclusive<u64>) -> Option<u64> {
        let size = match field.value() {
            DeValue::String(text) => self.accept(field.span(), parse_size(text))?,
            DeValue::Integer(_) => self.unsigned(&field)?,
            _ => {
                self.wrong_type(&field, "a size", "\"64KiB\"");
                return None;
            }
        };
        self.in_range(&field, size, range, format_size).then_some(size)
    }

    pub(super) fn integer(&mut self, field: Field<'_>, range: &RangeInclusive<u64>, example: &str) -> Option<u64> {
        if !field.value().is_integer() {
            self.wrong_type(&field, "a whole number", example);
            return None;
        }
        let number = self.unsigned(&field)?;
        self.in_range(&field, number, range, |number| number.to_string()).then_some(number)
    }

    fn unsigned(&mut self, field: &Field<'_>) -> Option<u64> {
        let digits = field.value().as_integer()?;
        let number = u64::from_str_radix(digits.as_str(), digits.radix()).ok();
        if number.is_none() {
            let message = format!("{} cannot be {digits}", field.subject());
            self.error(field.span(), message, "write a whole number that is not negative and fits into 64 bits");
        }
        number
    }

    fn in_range<T: PartialOrd + Copy>(
        &mut self,
        field: &Field<'_>,
        value: T,
        range: &RangeInclusive<T>,
        format: impl Fn(T) -> String,
    ) -> bool {
        let inside = range.contains(&value);
        if !inside {
            let bound = if value < *range.start() { "small" } else { "large" };
            self.error(
                field.span(),
                format!("{} is too {bound}: {}", field.subject(), format(value)),
                format!("write a value from {} to {}", format(*range.start()), format(*range.end())),
            );
        }
        inside
    }
}

/// From the beginning of a file to that of the whole text.
fn shifted(span: &Span, base: usize) -> Span {
    span.start + base..span.end + base
}

fn describe(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => format!("the string {}", quoted(text)),
        DeValue::Integer(number) => format!("the number {number}"),
        DeValue::Float(number) => format!("the number {number}"),
        DeValue::Boolean(value) => format!("{value}"),
        DeValue::Datetime(_) => "a date or time".into(),
        DeValue::Array(_) => "a list".into(),
        DeValue::Table(_) => "a table".into(),
    }
}

/// In the quotes that TOML wants, for messages: long text is cut, and what may be secret is hidden.
pub(super) fn quoted(text: &str) -> String {
    const LONGEST: usize = 60;
    let text = &*hidden(text);
    let cut: String = text.chars().take(LONGEST).collect();
    let more = if cut.len() < text.len() { "…" } else { "" };
    format!("\"{cut}{more}\"")
}

/// `a, b or c`.
fn list(words: &[String]) -> String {
    match words {
        [] => String::new(),
        [word] => word.clone(),
        [most @ .., last] => format!("{} or {last}", most.join(", ")),
    }
}

/// A few of many names, for a message.
pub(super) fn some_of(names: &[&str]) -> String {
    const FEW: usize = 10;
    let more = if names.len() > FEW { ", …" } else { "" };
    names[..names.len().min(FEW)].join(", ") + more
}

/// Names that are compared with a word to find out which one was meant.
const MOST_CANDIDATES: usize = 200;

/// The candidate that was probably meant.
fn suggest<'c>(word: &str, candidates: &[&'c str]) -> Option<&'c str> {
    // More than a few letters are never wrong; of long words, the comparison would take its time.
    const LONGEST: usize = 80;
    if word.len() > LONGEST {
        return None;
    }
    let candidates = candidates.iter().filter(|candidate| candidate.len() <= LONGEST);
    let folded = word.to_lowercase().replace('-', "_");
    let distance = |candidate: &str| strsim::damerau_levenshtein(&folded, &candidate.to_lowercase().replace('-', "_"));
    let near = candidates.map(|candidate| (distance(candidate), *candidate));
    // A third of the letters may be wrong; of short words one, of the shortest none.
    let letters = folded.chars().count();
    near.filter(|(distance, _)| *distance <= if letters < 3 { 0 } else { (letters / 3).clamp(1, 4) })
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// What other proxies call it.
const OTHER_NAMES: [(&str, &str); 26] = [
    ("listen", "bind"),
    ("address", "bind"),
    ("port", "bind"),
    ("server_name", "hosts"),
    ("server_names", "hosts"),
    ("sni", "hosts"),
    ("domain", "hosts"),
    ("domains", "hosts"),
    ("name", "hosts"),
    ("backend", "upstream"),
    ("target", "upstream"),
    ("target", "targets"),
    ("to", "upstream"),
    ("proxy_pass", "upstream"),
    ("backend", "upstreams"),
    ("backends", "upstreams"),
    ("servers", "targets"),
    ("server", "targets"),
    ("backends", "targets"),
    ("nodes", "targets"),
    ("proxy_protocol", "send_proxy"),
    ("proxy_protocol", "accept_proxy"),
    ("lb_policy", "balance"),
    ("frontends", "listeners"),
    ("timeout", "connect_timeout"),
    ("metrics", "admin"),
];

/// What other programs call a value, by key.
const OTHER_VALUES: [(&str, &str, &str); 32] = [
    ("mode", "https", "tls"),
    ("mode", "ssl", "tls"),
    ("mode", "sni", "tls"),
    ("mode", "passthrough", "tls"),
    ("mode", "stream", "tcp"),
    ("mode", "raw", "tcp"),
    ("mode", "acme", "http"),
    ("mode", "redirect", "http"),
    ("balance", "least_conn", "least-connections"),
    ("balance", "leastconn", "least-connections"),
    ("balance", "least_request", "least-connections"),
    ("balance", "roundrobin", "round-robin"),
    ("balance", "rr", "round-robin"),
    ("balance", "wrr", "round-robin"),
    ("balance", "ip_hash", "hash"),
    ("balance", "source", "hash"),
    ("balance", "ring_hash", "hash"),
    ("balance", "maglev", "hash"),
    ("balance", "failover", "first"),
    ("send_proxy", "on", "v2"),
    ("send_proxy", "true", "v2"),
    ("send_proxy", "none", "off"),
    ("send_proxy", "false", "off"),
    ("on_down", "close", "reset"),
    ("on_removed_route", "reset", "close"),
    ("on_removed_route", "keep", "drain"),
    ("action", "reject", "refuse"),
    ("action", "deny", "refuse"),
    ("action", "block", "refuse"),
    ("action", "drop", "refuse"),
    ("action", "allow", "forward"),
    ("action", "proxy", "forward"),
];

fn other_value(key: &str, value: &str) -> Option<&'static str> {
    let plain = value.to_lowercase();
    OTHER_VALUES.iter().find(|(of, other, _)| *of == key && *other == plain).map(|(.., word)| *word)
}

fn meant(key: &str, keys: &[Key]) -> Option<&'static str> {
    let keys: Vec<&'static str> = keys.iter().map(|key| key.name).collect();
    let plain = key.to_lowercase().replace('-', "_");
    suggest(key, &keys).or_else(|| {
        let mut others = OTHER_NAMES.iter().filter(|(other, _)| *other == plain);
        others.find_map(|(_, word)| keys.iter().find(|key| *key == word).copied())
    })
}

fn unknown_key_remedy(key: &str, section: &Section<'_>, keys: &[Key]) -> String {
    if let Some((home, _)) = keys::ALL.iter().find(|(home, keys)| *home != section.name && keys::has(keys, key)) {
        return match *home {
            "the top level" if section.is_root() => {
                format!("`{key}` belongs to the file that the daemon is started with, on the node itself")
            }
            "the top level" => format!("`{key}` belongs to the top level: move it above the first line in brackets"),
            home => format!("`{key}` belongs to {home}"),
        };
    }
    let known = keys.iter().map(|key| format!("`{}`", key.name)).collect::<Vec<_>>();
    format!("remove it; the keys here are {}", list(&known).replace(" or ", " and "))
}
