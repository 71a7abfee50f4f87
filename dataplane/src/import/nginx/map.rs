//! The `map` of a variable that the server name decides, and variables in texts.

use std::collections::HashMap;
use std::rc::Rc;

use super::super::syntax::{Directive, Place};
use super::names::{Names, Written};
use super::notes::Notes;

/// The variable with the server name.
pub const SNI: &str = "ssl_preread_server_name";
/// The variable with the port of the address that a connection came in by.
pub const PORT: &str = "server_port";
/// Why an expression, or a wildcard at the right, is not carried over.
pub const INFINITE: &str = "names that only it matches are refused, for an expression or a wildcard at the right has no counterpart; list the names that are meant";

/// The `map` of a variable.
pub struct Map<'a> {
    pub place: &'a Place,
    pub names: Names<usize>,
    /// Each value once, and where it is first.
    pub values: Vec<(String, &'a Place)>,
    pub default: Option<&'a Place>,
}

/// Reads a `map` of the server name. `None`: it is one of something else, and that was told.
pub fn read_map<'a>(block: &'a Directive, notes: &mut Notes) -> Option<Rc<Map<'a>>> {
    let source = &block.words[0];
    if !matches!(source.strip_prefix('$'), Some(SNI | "{ssl_preread_server_name}")) {
        notes.lost(
            &block.place,
            format!("the map of `{source}` is not carried over: only $ssl_preread_server_name decides here (routes have `alpn` for protocols)"),
        );
        return None;
    }
    let mut map = Map { place: &block.place, names: Names::default(), values: Vec::new(), default: None };
    let mut value_of: HashMap<&str, usize> = HashMap::new();
    // It counts for what stands behind it.
    let mut hostnames = false;
    let mut default = None;
    let mut infinite = Vec::new();
    for entry in block.inside() {
        let place = &entry.place;
        let (key, value) = match (&*entry.name, &entry.words[..]) {
            ("hostnames", []) => {
                hostnames = true;
                continue;
            }
            ("volatile", []) => continue,
            ("include", _) if entry.is_missing_file() => {
                map.names.is_partial = true;
                notes.lost(
                    place,
                    format!("`include {}`: there is no such file here; only the names that this map lists by themselves are carried over", entry.text()),
                );
                continue;
            }
            (key, [value]) => (key, &**value),
            (key, _) => {
                notes.lost(place, format!("`{key} {}` is not carried over: it is not one value", entry.text()));
                (key, "")
            }
        };
        let next = map.values.len();
        let index = *value_of.entry(value).or_insert(next);
        if index == next {
            map.values.push((value.to_owned(), place));
        }
        if key == "default" {
            if map.names.set_default(index) {
                map.default = Some(place);
                default = Some(index);
            }
            continue;
        }
        let written = match key.strip_prefix('\\') {
            Some(literal) if literal.starts_with('~') => Written::Never("it is no name that a client sends"),
            Some(literal) => Written::read(literal, hostnames),
            None => Written::read(key, hostnames),
        };
        match &written {
            Written::Never(why) => notes.changed(place, format!("`{key}` is not carried over: {why}")),
            Written::Prefix(_) => infinite.push((entry, index)),
            Written::Regex(text) if map.names.written_out(text).is_none() => infinite.push((entry, index)),
            _ => {}
        }
        if !map.names.add(written, index, place) {
            notes.changed(place, format!("`{key}` is listed twice in this map: the first counts"));
        }
    }
    for (entry, index) in infinite {
        if Some(index) != default && !map.values[index].0.is_empty() {
            notes.lost(&entry.place, format!("`{}` is not carried over: {INFINITE}", entry.name));
        }
    }
    Some(Rc::new(map))
}

/// The variables of a text, and where they are.
pub fn variables(text: &str) -> Vec<(&str, std::ops::Range<usize>)> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(dollar) = text[at..].find('$').map(|found| at + found) {
        let rest = &text[dollar + 1..];
        let (name, length) = if let Some((name, _)) = rest.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
            (name, name.len() + 2)
        } else {
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
            (&rest[..end], end)
        };
        found.push((name, dollar..dollar + 1 + length));
        at = dollar + 1 + length;
    }
    found
}

/// The variables that a regular expression sets: `(?<name>…)`, `(?P<name>…)`, `(?'name'…)`.
pub fn captures(expression: &str) -> impl Iterator<Item = &str> {
    expression.split("(?").skip(1).filter_map(|rest| {
        let rest = rest.strip_prefix('P').unwrap_or(rest);
        let name = rest.strip_prefix(['<', '\''])?;
        name.split(['>', '\'']).next()
    })
}

/// A text with the port of the address for `$server_port`.
pub fn with_port(text: &str, port: u16) -> String {
    let mut out = String::new();
    let mut at = 0;
    for (_, range) in variables(text).into_iter().filter(|(name, _)| *name == PORT) {
        out.extend([&text[at..range.start], &port.to_string()]);
        at = range.end;
    }
    out + &text[at..]
}
