//! Which route a hello takes: host name, then ALPN, on the listener it came in by. An HTTP request
//! is routed by its host name alone.
//!
//! A pure table, built once a configuration. Lookup costs a hash per label of the name, whatever
//! the number of routes. The most specific host pattern that lists the name decides alone: when its
//! routes do not fit the listener or the ALPN, the connection is rejected and never falls through
//! to a wider pattern. Sockets, upstreams and the hello's bytes are not known here.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::config::{Action, Config, HostPattern};
use crate::reject::Reason;

/// The routing table of one configuration.
#[derive(Debug, Default)]
pub struct Table {
    exact: HashMap<Box<str>, Vec<Candidate>>,
    wildcard: HashMap<Box<str>, Vec<Candidate>>,
    any: Vec<Candidate>,
    /// Labels of the longest wildcard suffix: longer suffixes of a name need no lookup.
    deepest: usize,
}

#[derive(Debug, Clone)]
struct Candidate {
    route: usize,
    /// It takes the connections of no wider pattern, and forwards none.
    refuses: bool,
    /// Indexed by listener.
    listeners: Box<[bool]>,
    alpn: Box<[Box<[u8]>]>,
}

impl Candidate {
    fn forwards<'a>(&self, by: By<'a>) -> Result<Match<'a>, Reason> {
        if self.refuses { Err(Reason::UnknownHost) } else { Ok(Match { route: self.route, by }) }
    }
}

/// A route that was found, and by which pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Match<'a> {
    /// Index into [`Config::routes`].
    pub route: usize,
    /// How the name was found.
    pub by: By<'a>,
}

/// The kind of pattern that decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By<'a> {
    /// The name itself is listed.
    Exact,
    /// `*.` and this suffix.
    Wildcard(&'a str),
    /// `*`
    Any,
}

/// [`By`] without the name, for whoever keeps that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pattern {
    /// The name itself is listed.
    Exact,
    /// `*.` and the last so many bytes of the name.
    Wildcard(u8),
    /// `*`
    Any,
}

impl From<By<'_>> for Pattern {
    fn from(by: By<'_>) -> Self {
        match by {
            By::Exact => Self::Exact,
            // A name has at most 253 bytes.
            By::Wildcard(suffix) => Self::Wildcard(suffix.len() as u8),
            By::Any => Self::Any,
        }
    }
}

impl Table {
    /// Builds the table; the configuration has already been checked for overlaps.
    pub fn new(config: &Config) -> Self {
        let mut table = Self::default();
        for (index, route) in config.routes.iter().enumerate() {
            let listeners =
                config.listeners.iter().enumerate().map(|(i, l)| l.mode.has_routes() && route.is_for(i)).collect();
            let alpn = route.alpn.iter().map(|p| p.as_bytes().into()).collect();
            let candidate = Candidate { route: index, refuses: route.action == Action::Refuse, listeners, alpn };
            for host in &route.hosts {
                let slot = match host {
                    HostPattern::Exact(name) => table.exact.entry(name.as_str().into()).or_default(),
                    HostPattern::Wildcard(suffix) => {
                        table.deepest = table.deepest.max(suffix.split('.').count());
                        table.wildcard.entry(suffix.as_str().into()).or_default()
                    }
                    HostPattern::Any => &mut table.any,
                };
                slot.push(candidate.clone());
            }
        }
        table
    }

    /// Finds the route of `name` (lower case A-labels, no trailing dot) for a client that offers
    /// `alpn`, in its order of preference.
    ///
    /// # Errors
    /// `NoSni`, `UnknownHost` or `AlpnMismatch`.
    pub fn find<'a, 'p, I>(&self, listener: usize, name: Option<&'a str>, mut alpn: I) -> Result<Match<'a>, Reason>
    where
        I: Iterator<Item = &'p [u8]>,
    {
        let name = name.ok_or(Reason::NoSni)?;
        let (candidates, by) = self.candidates(name).ok_or(Reason::UnknownHost)?;
        let mut here = candidates.iter().filter(|c| c.listeners.get(listener) == Some(&true)).peekable();
        if here.peek().is_none() {
            return Err(Reason::UnknownHost);
        }
        let found = alpn
            .find_map(|offered| here.clone().find(|c| c.alpn.iter().any(|p| **p == *offered)))
            .or_else(|| here.find(|c| c.alpn.is_empty()))
            .ok_or(Reason::AlpnMismatch)?;
        found.forwards(by)
    }

    /// The route by which `name` is refused in spite of a wider pattern, for whoever explains.
    pub fn refused_by<'a>(&self, listener: usize, name: &'a str) -> Option<Match<'a>> {
        let (candidates, by) = self.candidates(name)?;
        let found = candidates.iter().find(|c| c.refuses && c.listeners.get(listener) == Some(&true))?;
        Some(Match { route: found.route, by })
    }

    /// Whether the pattern by which `name` was found is listed on a listener, for whatever ALPN and
    /// upstream, and `name` is not refused there.
    pub fn lists(&self, listener: usize, name: &str, pattern: Pattern) -> bool {
        let here = |candidates: &[Candidate]| {
            let mut forwards =
                candidates.iter().filter(|c| c.listeners.get(listener) == Some(&true)).map(|c| !c.refuses);
            forwards.next().map(|first| first || forwards.any(|forwards| forwards))
        };
        if self.candidates(name).is_some_and(|(deciding, _)| here(deciding) == Some(false)) {
            return false;
        }
        let candidates = match pattern {
            Pattern::Exact => self.exact.get(name).map(Vec::as_slice),
            Pattern::Wildcard(length) => {
                let start = name.len().saturating_sub(length.into());
                name.get(start..).and_then(|suffix| self.wildcard.get(suffix)).map(Vec::as_slice)
            }
            Pattern::Any => Some(&self.any[..]),
        };
        here(candidates.unwrap_or_default()) == Some(true)
    }

    /// Finds the route of `name` for a request in clear text, where no protocols are offered: that
    /// without `alpn`, else the first.
    ///
    /// # Errors
    /// `UnknownHost`.
    pub fn find_plain<'a>(&self, listener: usize, name: Option<&'a str>) -> Result<Match<'a>, Reason> {
        let (candidates, by) = name.and_then(|name| self.candidates(name)).ok_or(Reason::UnknownHost)?;
        let here = candidates.iter().filter(|c| c.listeners.get(listener) == Some(&true));
        here.min_by_key(|c| (!c.alpn.is_empty(), c.route)).ok_or(Reason::UnknownHost)?.forwards(by)
    }

    fn candidates<'a>(&self, name: &'a str) -> Option<(&[Candidate], By<'a>)> {
        if let Some(found) = self.exact.get(name) {
            return Some((found, By::Exact));
        }
        if self.deepest > 0 {
            let mut labels_left = name.bytes().filter(|b| *b == b'.').count();
            let mut rest = name;
            while let Some((_, suffix)) = rest.split_once('.') {
                if labels_left <= self.deepest
                    && let Some(found) = self.wildcard.get(suffix)
                {
                    return Some((found, By::Wildcard(suffix)));
                }
                labels_left -= 1;
                rest = suffix;
            }
        }
        (!self.any.is_empty()).then_some((&self.any[..], By::Any))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::config::{Source, parse};

    const HEAD: &str = r#"
        listeners.public.bind = ["127.0.0.1:443"]
        listeners.private.bind = ["127.0.0.1:444"]
        upstreams.a.targets = ["192.0.2.1:443"]
        upstreams.b.targets = ["192.0.2.2:443"]
    "#;

    fn config(routes: &str) -> Config {
        let source = Source::new("test.toml", format!("{HEAD}\n{routes}"));
        parse(Arc::new(source)).unwrap().0
    }

    fn find(config: &Config, listener: usize, name: &str, alpn: &[&str]) -> Result<usize, Reason> {
        let offered = alpn.iter().map(|p| p.as_bytes());
        Table::new(config).find(listener, Some(name), offered).map(|found| found.route)
    }

    #[test]
    fn an_exact_host_comes_before_a_wildcard_and_the_longest_wildcard_first() {
        let config = config(
            r#"
            [[routes]]
            hosts = ["*.example.com"]
            upstream = "a"
            [[routes]]
            hosts = ["*.apps.example.com"]
            upstream = "a"
            [[routes]]
            hosts = ["blog.apps.example.com"]
            upstream = "b"
            "#,
        );
        assert_eq!(find(&config, 0, "blog.apps.example.com", &[]), Ok(2));
        assert_eq!(find(&config, 0, "wiki.apps.example.com", &[]), Ok(1));
        assert_eq!(find(&config, 0, "a.b.c.apps.example.com", &[]), Ok(1));
        assert_eq!(find(&config, 0, "apps.example.com", &[]), Ok(0));
    }

    #[test]
    fn a_wildcard_does_not_match_its_own_suffix_nor_half_a_label() {
        let config = config("[[routes]]\nhosts = [\"*.example.com\"]\nupstream = \"a\"");
        assert_eq!(find(&config, 0, "example.com", &[]), Err(Reason::UnknownHost));
        assert_eq!(find(&config, 0, "badexample.com", &[]), Err(Reason::UnknownHost));
        assert_eq!(find(&config, 0, "example.com.evil.org", &[]), Err(Reason::UnknownHost));
    }

    #[test]
    fn there_is_no_default_route_unless_it_is_written_out() {
        let listed = config("[[routes]]\nhosts = [\"blog.example.com\"]\nupstream = \"a\"");
        assert_eq!(find(&listed, 0, "intern.example.com", &[]), Err(Reason::UnknownHost));
        let open = config("[[routes]]\nhosts = [\"*\"]\nupstream = \"a\"");
        assert_eq!(find(&open, 0, "intern.example.com", &[]), Ok(0));
        let none = Table::new(&open).find(0, None, std::iter::empty());
        assert_eq!(none, Err(Reason::NoSni));
    }

    #[test]
    fn the_clients_preference_decides_among_alpn_routes_and_a_route_without_is_the_rest() {
        let config = config(
            r#"
            [[routes]]
            hosts = ["x.example.com"]
            alpn = ["http/1.1"]
            upstream = "a"
            [[routes]]
            hosts = ["x.example.com"]
            alpn = ["h2"]
            upstream = "b"
            [[routes]]
            hosts = ["x.example.com"]
            upstream = "a"
            [[routes]]
            hosts = ["strict.example.com"]
            alpn = ["h2"]
            upstream = "b"
            "#,
        );
        assert_eq!(find(&config, 0, "x.example.com", &["h2", "http/1.1"]), Ok(1));
        assert_eq!(find(&config, 0, "x.example.com", &["http/1.1", "h2"]), Ok(0));
        assert_eq!(find(&config, 0, "x.example.com", &["acme-tls/1"]), Ok(2));
        assert_eq!(find(&config, 0, "x.example.com", &[]), Ok(2));
        assert_eq!(find(&config, 0, "strict.example.com", &["http/1.1"]), Err(Reason::AlpnMismatch));
        assert_eq!(find(&config, 0, "strict.example.com", &[]), Err(Reason::AlpnMismatch));
    }

    #[test]
    fn in_clear_text_the_route_without_alpn_is_found_or_the_first() {
        let config = config(
            r#"
            [[routes]]
            hosts = ["x.example.com", "h2.example.com"]
            alpn = ["h2"]
            upstream = "b"
            [[routes]]
            hosts = ["x.example.com"]
            upstream = "a"
            [[routes]]
            hosts = ["h2.example.com"]
            alpn = ["http/1.1"]
            upstream = "a"
            [[routes]]
            hosts = ["elsewhere.example.com"]
            listeners = ["private"]
            upstream = "a"
            [[routes]]
            hosts = ["*.example.com"]
            upstream = "b"
            "#,
        );
        let table = Table::new(&config);
        let find = |name| table.find_plain(0, name).map(|m| m.route);
        assert_eq!(find(Some("x.example.com")), Ok(1));
        assert_eq!(find(Some("h2.example.com")), Ok(0));
        assert_eq!(find(Some("y.example.com")), Ok(4));
        assert_eq!(
            find(Some("elsewhere.example.com")),
            Err(Reason::UnknownHost),
            "it never falls through to a wildcard"
        );
        assert_eq!(find(Some("example.org")), Err(Reason::UnknownHost));
        assert_eq!(find(None), Err(Reason::UnknownHost));
    }

    #[test]
    fn a_host_that_is_listed_for_another_listener_never_falls_through_to_a_wildcard() {
        let config = config(
            r#"
            [[routes]]
            hosts = ["secret.example.com"]
            listeners = ["private"]
            upstream = "b"
            [[routes]]
            hosts = ["*.example.com"]
            upstream = "a"
            "#,
        );
        assert_eq!(find(&config, 1, "secret.example.com", &[]), Ok(0));
        assert_eq!(find(&config, 0, "secret.example.com", &[]), Err(Reason::UnknownHost));
        assert_eq!(find(&config, 0, "open.example.com", &[]), Ok(1));
    }

    #[test]
    fn what_is_refused_by_name_is_in_no_wildcard_and_a_narrower_route_is_open() {
        let config = config(
            r#"
            [[routes]]
            hosts = ["*"]
            upstream = "a"
            [[routes]]
            hosts = ["secret.apps.example.com", "*.int.apps.example.com"]
            action = "refuse"
            [[routes]]
            hosts = ["half.example.com"]
            listeners = ["public"]
            action = "refuse"
            [[routes]]
            hosts = ["half.example.com", "wiki.int.apps.example.com"]
            listeners = ["private"]
            upstream = "b"
            [[routes]]
            hosts = ["h2.example.com"]
            alpn = ["h2"]
            upstream = "b"
            [[routes]]
            hosts = ["h2.example.com"]
            action = "refuse"
            "#,
        );
        let table = Table::new(&config);
        let plain = |listener, name| table.find_plain(listener, Some(name)).map(|found| found.route);
        for name in ["secret.apps.example.com", "a.int.apps.example.com", "a.b.int.apps.example.com"] {
            for listener in [0, 1] {
                assert_eq!(find(&config, listener, name, &["h2"]), Err(Reason::UnknownHost), "{name}");
                assert_eq!(plain(listener, name), Err(Reason::UnknownHost), "{name}");
                assert!(!table.lists(listener, name, Pattern::Any), "a connection by the wildcard is of no route now");
            }
        }
        for name in ["apps.example.com", "int.apps.example.com", "x.secret.apps.example.com"] {
            assert_eq!(find(&config, 0, name, &[]), Ok(0), "{name}");
            assert!(table.lists(0, name, Pattern::Any));
        }
        assert_eq!(find(&config, 0, "half.example.com", &[]), Err(Reason::UnknownHost));
        assert_eq!(find(&config, 1, "half.example.com", &[]), Ok(3));
        assert!(table.lists(1, "half.example.com", Pattern::Exact));
        assert!(!table.lists(0, "half.example.com", Pattern::Exact));
        assert_eq!(find(&config, 1, "wiki.int.apps.example.com", &[]), Ok(3));
        assert_eq!(find(&config, 0, "h2.example.com", &["h2"]), Ok(4));
        assert_eq!(find(&config, 0, "h2.example.com", &["http/1.1"]), Err(Reason::UnknownHost));
        assert_eq!(plain(0, "h2.example.com"), Err(Reason::UnknownHost));
    }

    #[test]
    fn a_pattern_is_listed_as_long_as_a_route_of_the_listener_has_it() {
        let routes = |hosts: &str, listener: &str| {
            config(&format!("[[routes]]\nhosts = [{hosts}]\nlisteners = [\"{listener}\"]\nupstream = \"a\""))
        };
        let before = Table::new(&routes("\"x.example.com\", \"*.example.com\", \"*\"", "public"));
        let name = "y.example.com";
        let pattern = |name| Pattern::from(before.find(0, Some(name), std::iter::empty()).unwrap().by);
        assert_eq!(pattern(name), Pattern::Wildcard(11));
        for (name, host) in [("x.example.com", "x.example.com"), (name, "*.example.com"), ("z", "*")] {
            assert!(before.lists(0, name, pattern(name)));
            let alone = Table::new(&routes(&format!("\"{host}\""), "public"));
            assert!(alone.lists(0, name, pattern(name)), "{host}");
            let elsewhere = Table::new(&routes(&format!("\"{host}\""), "private"));
            assert!(!elsewhere.lists(0, name, pattern(name)), "{host}");
        }
        let wider = Table::new(&routes("\"*.example.com\"", "public"));
        assert!(!wider.lists(0, "x.example.com", pattern("x.example.com")), "a wildcard is another route");
        let narrower = Table::new(&routes("\"*.example.com\", \"y.example.com\"", "public"));
        assert!(narrower.lists(0, name, pattern(name)), "the route is there, though it would not decide any more");
    }

    #[test]
    fn ten_thousand_hosts_are_all_found() {
        let hosts: Vec<String> = (0..10_000).map(|i| format!("\"host-{i}.example.com\"")).collect();
        let config = config(&format!("[[routes]]\nhosts = [{}]\nupstream = \"a\"", hosts.join(",")));
        let table = Table::new(&config);
        for i in 0..10_000 {
            let name = format!("host-{i}.example.com");
            assert_eq!(table.find(0, Some(&name), std::iter::empty()).map(|m| m.by), Ok(By::Exact));
        }
        assert!(table.find(0, Some("host-10000.example.com"), std::iter::empty()).is_err());
    }

    proptest! {
        #[test]
        fn the_table_agrees_with_a_search_through_the_list(
            patterns in prop::collection::hash_set("(\\*\\.)?[ab](\\.[ab]){0,3}", 1..12),
            name in "[ab](\\.[ab]){0,5}",
        ) {
            let patterns: Vec<String> = patterns.into_iter().collect();
            let routes: String =
                patterns.iter().map(|p| format!("[[routes]]\nhosts = [\"{p}\"]\nupstream = \"a\"\n")).collect();
            let expected = patterns
                .iter()
                .enumerate()
                .filter(|(_, p)| match p.strip_prefix('*') {
                    Some(suffix) => name.ends_with(suffix) && name.len() > suffix.len(),
                    None => **p == name,
                })
                .max_by_key(|(_, p)| (!p.starts_with('*'), p.len()))
                .map(|(i, _)| i);
            prop_assert_eq!(find(&config(&routes), 0, &name, &[]).ok(), expected);
        }
    }
}
