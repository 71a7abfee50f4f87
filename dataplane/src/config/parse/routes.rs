//! `[[routes]]`.

use std::sync::Arc;

use super::{NOWHERE, Parser};
use crate::config::reader::{Field, Section, quoted, some_of};
use crate::config::{Action, HostPattern, Listener, Mode, Route, Upstream, keys};

const MOST_PROTOCOLS: usize = 32;

impl Parser {
    pub(super) fn routes(
        &mut self,
        roots: &[Section<'_>],
        listeners: &[Listener],
        upstreams: &[Upstream],
    ) -> Vec<Route> {
        let fields = roots.iter().filter_map(|root| root.get("routes"));
        let sections: Vec<_> = fields.flat_map(|field| self.reader.sections(field, keys::ROUTE)).collect();
        sections.iter().map(|section| self.route(section, listeners, upstreams)).collect()
    }

    fn route(&mut self, section: &Section<'_>, listeners: &[Listener], upstreams: &[Upstream]) -> Route {
        let action = self.action(section, upstreams);
        let (name, hosts) = self.hosts(section, action);
        Route {
            name,
            hosts,
            alpn: section.get("alpn").map(|field| self.alpn(field)).unwrap_or_default(),
            listeners: section.get("listeners").map(|field| self.route_listeners(field, listeners)).unwrap_or_default(),
            action,
        }
    }

    fn action(&mut self, section: &Section<'_>, upstreams: &[Upstream]) -> Action {
        const REFUSES: [(&str, bool); 2] = [("forward", false), ("refuse", true)];
        let written = section.get("action").map(|field| self.reader.choice(field, &REFUSES));
        let upstream = section.get("upstream").map(|field| (field.span(), self.upstream_index(field, upstreams)));
        if let Some(None) = written {
            // It has been reported. To ask for an `upstream` might be wrong.
            return Action::Refuse;
        }
        if written != Some(Some(true)) {
            if upstream.is_none() {
                let example = quoted(upstreams.first().map_or("cluster", |u| &u.name));
                self.reader.missing(section, "upstream", &example);
            }
            return Action::Forward { upstream: upstream.map_or(NOWHERE, |(_, index)| index) };
        }
        if let Some((span, _)) = upstream {
            let remedy = "remove it to refuse these hosts, or remove `action` to forward them";
            self.reader.error(span, "a route with `action = \"refuse\"` has no `upstream`", remedy);
        }
        if let Some(field) = section.get("alpn") {
            // The client chooses the order of its protocols, and with it the route.
            let message = "a route with `action = \"refuse\"` has no `alpn`";
            self.reader.error(field.span(), message, "remove it: these hosts are refused for every protocol");
        }
        Action::Refuse
    }

    fn hosts(&mut self, section: &Section<'_>, action: Action) -> (Arc<str>, Vec<HostPattern>) {
        const EXAMPLE: &str = "\"blog.example.com\"";
        let parse = if action == Action::Refuse { HostPattern::parse_refused } else { HostPattern::parse };
        let mut spans = Vec::new();
        let mut hosts = Vec::new();
        let mut name = None;
        if let Some(field) = section.get("hosts") {
            if field.is_empty_list() {
                self.reader.error(
                    field.span(),
                    "a route needs at least one host",
                    format!("name one: `hosts = [{EXAMPLE}]`; `hosts = [\"*\"]` matches every name"),
                );
            }
            for (span, text) in self.reader.strings(field, "a host name", EXAMPLE) {
                if let Some(host) = self.reader.accept(span.clone(), parse(text)) {
                    name.get_or_insert_with(|| Arc::from(text));
                    hosts.push(host);
                    spans.push(span);
                }
            }
        } else {
            self.reader.missing(section, "hosts", &format!("[{EXAMPLE}]"));
        }
        self.places.hosts.push(spans);
        (name.unwrap_or_else(|| Arc::from("")), hosts)
    }

    fn alpn(&mut self, field: Field<'_>) -> Vec<String> {
        if field.is_empty_list() {
            self.reader.error(
                field.span(),
                "`alpn` is empty",
                "remove it to take every connection, or name a protocol",
            );
        }
        let mut protocols = Vec::new();
        let entries = self.reader.strings(field, "a protocol", "\"h2\"");
        if entries.len() > MOST_PROTOCOLS {
            let message = format!("`alpn` has more than {MOST_PROTOCOLS} protocols");
            self.reader.error(field.span(), message, "name those that the upstream speaks");
            return protocols;
        }
        for (span, text) in entries {
            // RFC 7301 section 3.1: ProtocolName<1..2^8-1>.
            if text.is_empty() || text.len() > 255 {
                self.reader.error(
                    span,
                    format!("a protocol has 1 to 255 bytes, not {}", text.len()),
                    "write the name as registered for ALPN: \"h2\", \"http/1.1\", \"acme-tls/1\"",
                );
                continue;
            }
            let usual = match text.to_ascii_lowercase().as_str() {
                "http2" | "http/2" | "http/2.0" => Some("h2"),
                "http1" | "http1.1" | "http/1" | "http" => Some("http/1.1"),
                "http/1.1" | "h2" if text != text.to_ascii_lowercase() => Some("in lower case"),
                _ => None,
            };
            if let Some(usual) = usual {
                self.reader.warning(
                    span,
                    format!("no client offers a protocol named {}", quoted(text)),
                    format!(
                        "did you mean \"{}\"?",
                        if usual == "in lower case" { text.to_ascii_lowercase() } else { usual.into() }
                    ),
                );
            }
            if !protocols.iter().any(|other| other == text) {
                protocols.push(text.to_owned());
            }
        }
        protocols
    }

    fn route_listeners(&mut self, field: Field<'_>, listeners: &[Listener]) -> Vec<usize> {
        let names: Vec<&str> = listeners.iter().map(|listener| &*listener.name).collect();
        if field.is_empty_list() {
            self.reader.error(
                field.span(),
                "`listeners` is empty: the route would match nothing",
                "remove it for all listeners of the modes \"tls\" and \"http\", or name one",
            );
        }
        let mut indices = Vec::new();
        let example = quoted(names.first().unwrap_or(&"public"));
        for (span, text) in self.reader.strings(field, "the name of a listener", &example) {
            match names.iter().position(|name| *name == text) {
                Some(index) if matches!(listeners[index].mode, Mode::Tcp { .. }) => self.reader.error(
                    span,
                    format!("listener \"{text}\" has mode \"tcp\": it forwards every connection to its own upstream, routes do not apply"),
                    "leave it out here, or remove `mode` and `upstream` from the listener",
                ),
                Some(index) if !indices.contains(&index) => indices.push(index),
                Some(_) => {}
                None => {
                    let remedy = match self.reader.suggest(text, &names) {
                        Some(name) => format!("did you mean \"{name}\"?"),
                        None => format!("the listeners are {}", some_of(&names)),
                    };
                    self.reader.absent(span, format!("there is no listener {}", quoted(text)), remedy);
                    // Else the route would seem to be on every listener.
                    indices.push(NOWHERE);
                }
            }
        }
        indices
    }
}
