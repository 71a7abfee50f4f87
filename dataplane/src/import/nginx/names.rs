//! What nginx finds for a name: in a map, or among the servers of one address.
//!
//! The order is that of `ngx_hash_find_combined` (src/core/ngx_hash.c) and of its callers: the name
//! itself, the longest `*.x`, the longest `x.*`, the first regular expression, the default.

use std::collections::HashMap;

use super::super::syntax::Place;
use super::regex;
use crate::config::HostPattern;
use crate::hello::ServerName;

/// Which names a question is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key<'a> {
    /// One name.
    Name(&'a str),
    /// The names below this one that no pattern of [`Names::patterns`] tells apart from each other.
    Below(&'a str),
    /// All that no pattern of [`Names::patterns`] has.
    Other,
    /// None: a client without a server name, or bytes that are no TLS.
    Nameless,
}

impl<'a> Key<'a> {
    /// The names of a pattern.
    pub fn of(pattern: &'a HostPattern) -> Self {
        match pattern {
            HostPattern::Exact(name) => Self::Name(name),
            HostPattern::Wildcard(suffix) => Self::Below(suffix),
            HostPattern::Any => Self::Other,
        }
    }
}

/// The answer.
#[derive(Debug, PartialEq, Eq)]
pub enum Found<'a, T> {
    /// This, for all the names.
    One(&'a T),
    /// Nothing, not even a default.
    Nothing,
    /// Not the same for all the names, or it depends on what is not known.
    Unknown,
}

/// A name as it stands in a map or in `server_name`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Written {
    /// In lower case.
    Name(String),
    /// `*.x`, or with the name itself `.x`.
    Below(String, bool),
    /// `x.*`
    Prefix(String),
    /// What follows `~`.
    Regex(String),
    /// No client can send what it matches, and why.
    Never(&'static str),
}

impl Written {
    /// Reads it; in a map without `hostnames` wildcards mean nothing.
    pub fn read(text: &str, wildcards: bool) -> Self {
        if let Some(expression) = text.strip_prefix('~') {
            return Self::Regex(expression.to_owned());
        }
        if !text.is_ascii() {
            return Self::Never("clients send such a name in its ASCII form (xn--…), and nginx compares bytes");
        }
        let name = text.to_ascii_lowercase();
        if name.is_empty() {
            return Self::Name(name);
        }
        let wildcard = |name: &str| match (name.strip_prefix("*."), name.strip_prefix('.'), name.strip_suffix(".*")) {
            (Some(suffix), ..) => Some(Self::Below(suffix.to_owned(), false)),
            (_, Some(suffix), _) => Some(Self::Below(suffix.to_owned(), true)),
            (.., Some(prefix)) => Some(Self::Prefix(prefix.to_owned())),
            _ => None,
        };
        match wildcard(&name) {
            Some(_) if !wildcards => Self::Never("in a map without `hostnames` nginx takes it literally"),
            Some(found) => found,
            None if is_sent(&name) => Self::Name(name),
            None => Self::Never("it is no name that a client sends"),
        }
    }
}

/// Whether a hello can have this name, as it is written.
fn is_sent(name: &str) -> bool {
    ServerName::parse(name.as_bytes()).is_some_and(|parsed| parsed.as_str() == name)
}

/// Names and what belongs to them.
#[derive(Debug)]
pub struct Names<T> {
    exact: HashMap<String, T>,
    /// By suffix; whether the suffix itself is meant too.
    below: HashMap<String, (T, bool)>,
    prefixes: Vec<(String, T)>,
    regexes: Vec<(Option<Vec<String>>, T)>,
    default: Option<T>,
    patterns: Vec<(HostPattern, Place)>,
    /// Entries are missing, of which nothing is known.
    pub is_partial: bool,
}

impl<T> Default for Names<T> {
    fn default() -> Self {
        Self {
            exact: HashMap::new(),
            below: HashMap::new(),
            prefixes: Vec::new(),
            regexes: Vec::new(),
            default: None,
            patterns: Vec::new(),
            is_partial: false,
        }
    }
}

impl<T: Copy + PartialEq> Names<T> {
    /// Adds an entry. False: there is one for the same names, and it remains.
    pub fn add(&mut self, written: Written, value: T, place: &Place) -> bool {
        let mut pattern = |pattern| self.patterns.push((pattern, place.clone()));
        match written {
            Written::Never(_) => true,
            Written::Name(name) => {
                // nginx takes `.x` and `x` for the same name twice.
                if self.exact.contains_key(&name) || matches!(self.below.get(&name), Some((_, true))) {
                    return false;
                }
                if !name.is_empty() {
                    pattern(HostPattern::Exact(name.clone()));
                }
                self.exact.insert(name, value);
                true
            }
            Written::Below(suffix, itself) => {
                if self.below.contains_key(&suffix) || (itself && self.exact.contains_key(&suffix)) {
                    return false;
                }
                if is_sent(&suffix) {
                    if itself {
                        pattern(HostPattern::Exact(suffix.clone()));
                    }
                    pattern(HostPattern::Wildcard(suffix.clone()));
                }
                self.below.insert(suffix, (value, itself));
                true
            }
            Written::Prefix(prefix) => {
                let new = self.prefixes.iter().all(|(other, _)| *other != prefix);
                if new {
                    self.prefixes.push((prefix, value));
                }
                new
            }
            Written::Regex(expression) => {
                let names = regex::finite(&expression);
                // What an expression before it has is not known.
                let names = names.filter(|_| self.regexes.iter().all(|(names, _)| names.is_some()));
                for name in names.iter().flatten().filter(|name| is_sent(name)) {
                    pattern(HostPattern::Exact(name.clone()));
                }
                self.regexes.push((names, value));
                true
            }
        }
    }

    /// Whether an expression is written out as names, if it is the next to be added.
    pub fn is_finite(&self, expression: &str) -> bool {
        self.regexes.iter().all(|(names, _)| names.is_some()) && regex::finite(expression).is_some()
    }

    /// Of all that nothing else has. False: there is one.
    pub fn set_default(&mut self, value: T) -> bool {
        let new = self.default.is_none();
        self.default.get_or_insert(value);
        new
    }

    /// What tells names apart, and where it is written, in the order of the file. A pattern may be
    /// there twice.
    pub fn patterns(&self) -> &[(HostPattern, Place)] {
        &self.patterns
    }

    /// What nginx finds.
    pub fn find(&self, key: Key<'_>) -> Found<'_, T> {
        let name = match key {
            Key::Nameless => {
                return match self.exact.get("") {
                    Some(value) => Found::One(value),
                    None if self.is_partial => Found::Unknown,
                    None => self.otherwise(),
                };
            }
            Key::Name(name) => Some(name),
            Key::Below(_) | Key::Other => None,
        };
        if let Some(value) = name.and_then(|name| self.exact.get(name)) {
            return Found::One(value);
        }
        if self.is_partial {
            return Found::Unknown;
        }
        let above = match key {
            Key::Name(name) => match self.below.get(name) {
                Some((value, true)) => Some(value),
                _ => self.above(name),
            },
            Key::Below(suffix) => self.below.get(suffix).map(|(value, _)| value).or_else(|| self.above(suffix)),
            Key::Other | Key::Nameless => None,
        };
        if let Some(value) = above {
            return Found::One(value);
        }
        if let Some(name) = name {
            let fits = |prefix: &str| name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('.'));
            let prefixes = self.prefixes.iter().filter(|(prefix, _)| fits(prefix));
            if let Some((_, value)) = prefixes.max_by_key(|(prefix, _)| prefix.len()) {
                return Found::One(value);
            }
            for (at, (names, value)) in self.regexes.iter().enumerate() {
                match names {
                    Some(names) if names.iter().any(|other| other == name) => return Found::One(value),
                    Some(_) => {}
                    None => return self.all_alike(self.regexes[at..].iter().map(|(_, value)| value)),
                }
            }
            self.otherwise()
        } else {
            let infinite = self.regexes.iter().filter(|(names, _)| names.is_none());
            let any = self.prefixes.iter().map(|(_, value)| value).chain(infinite.map(|(_, value)| value));
            self.all_alike(any)
        }
    }

    /// That of the longest `*.x` that has names below `name`'s parent.
    fn above(&self, name: &str) -> Option<&T> {
        if self.below.is_empty() {
            return None;
        }
        let mut rest = name;
        while let Some((_, suffix)) = rest.split_once('.') {
            if let Some((value, _)) = self.below.get(suffix) {
                return Some(value);
            }
            rest = suffix;
        }
        None
    }

    fn otherwise(&self) -> Found<'_, T> {
        self.default.as_ref().map_or(Found::Nothing, Found::One)
    }

    /// The default, if any of these would be the same.
    fn all_alike<'a>(&'a self, mut others: impl Iterator<Item = &'a T>) -> Found<'a, T> {
        if others.all(|other| Some(other) == self.default.as_ref()) { self.otherwise() } else { Found::Unknown }
    }
}
