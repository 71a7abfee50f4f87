//! What nginx finds for a name: in a map, or among the servers of one address.
//!
//! The order is that of `ngx_hash_find_combined` (src/core/ngx_hash.c) and of its callers: the name
//! itself, the longest `*.x`, the longest `x.*`, the first regular expression, the default.

use std::collections::{HashMap, HashSet};

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
    /// A name that is not known.
    Unknown,
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

/// Names that expressions are written out as, in one map or for one address.
const MOST_WRITTEN_OUT: usize = 10_000;

/// Values. What counts is only whether they are all the same.
#[derive(Debug)]
struct Alike<T> {
    first: Option<T>,
    differ: bool,
}

impl<T: Copy + PartialEq> Alike<T> {
    fn add(&mut self, value: T) {
        self.differ |= *self.first.get_or_insert(value) != value;
    }

    /// Whether there is none but this.
    fn are(&self, value: Option<T>) -> bool {
        self.first.is_none() || (!self.differ && self.first == value)
    }
}

impl<T> Default for Alike<T> {
    fn default() -> Self {
        Self { first: None, differ: false }
    }
}

/// Names and what belongs to them.
#[derive(Debug)]
pub struct Names<T> {
    exact: HashMap<String, T>,
    /// By suffix; whether the suffix itself is meant too.
    below: HashMap<String, (T, bool)>,
    /// `x` of each `.x` that was refused: nginx keeps it, and refuses an `x` that comes later.
    occupied: HashSet<String>,
    prefixes: HashMap<String, T>,
    /// Of expressions before the first that is not written out.
    written_out: HashMap<String, T>,
    of_prefixes: Alike<T>,
    /// Of the first expression that is not written out, and of all behind it.
    of_regexes: Alike<T>,
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
            occupied: HashSet::new(),
            prefixes: HashMap::new(),
            written_out: HashMap::new(),
            of_prefixes: Alike::default(),
            of_regexes: Alike::default(),
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
            Written::Unknown => {
                self.is_partial = true;
                true
            }
            Written::Name(name) => {
                // nginx takes `.x` and `x` for the same name twice.
                let is_below = matches!(self.below.get(&name), Some((_, true)));
                if is_below || self.exact.contains_key(&name) || self.occupied.contains(&name) {
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
                    if itself {
                        self.occupied.insert(suffix);
                    }
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
                let new = !self.prefixes.contains_key(&prefix);
                if new {
                    self.prefixes.insert(prefix, value);
                    self.of_prefixes.add(value);
                }
                new
            }
            Written::Regex(expression) => {
                let Some(names) = self.written_out(&expression) else {
                    self.of_regexes.add(value);
                    return true;
                };
                for name in names {
                    if is_sent(&name) {
                        self.patterns.push((HostPattern::Exact(name.clone()), place.clone()));
                    }
                    self.written_out.entry(name).or_insert(value);
                }
                true
            }
        }
    }

    /// The names that an expression is written out as, if it is the next to be added.
    pub fn written_out(&self, expression: &str) -> Option<Vec<String>> {
        // What an expression before it has is not known.
        if self.of_regexes.first.is_some() {
            return None;
        }
        regex::finite(expression).filter(|names| self.written_out.len() + names.len() <= MOST_WRITTEN_OUT)
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
            let mut shorter = name.rmatch_indices('.').map(|(at, _)| &name[..at]);
            if let Some(value) = shorter.find_map(|prefix| self.prefixes.get(prefix)) {
                return Found::One(value);
            }
            if let Some(value) = self.written_out.get(name) {
                return Found::One(value);
            }
        } else if !self.of_prefixes.are(self.default) {
            return Found::Unknown;
        }
        if self.of_regexes.are(self.default) { self.otherwise() } else { Found::Unknown }
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
}
