//! `[listeners.NAME]`.

use std::ops::RangeInclusive;
use std::sync::Arc;

use super::{NOWHERE, Parser};
use crate::config::reader::{Section, quoted};
use crate::config::values::{parse_bind, parse_net};
use crate::config::{Bind, Listener, Mode, Upstream, keys};

const PORT: RangeInclusive<u64> = 1..=65535;
/// What is compared with each other has bounds, so that whoever may write the text cannot make the
/// reading of it slow.
pub const MOST_LISTENERS: usize = 256;
/// Of all listeners together.
pub const MOST_BINDS: usize = 1024;

impl Parser {
    pub(super) fn listeners(&mut self, roots: &[Section<'_>], upstreams: &[Upstream]) -> Vec<Listener> {
        let mut listeners = Vec::new();
        for (span, name, section) in self.named(roots, "listeners", keys::LISTENER) {
            if listeners.len() == MOST_LISTENERS {
                let message = format!("there are more than {MOST_LISTENERS} listeners");
                self.reader.error(span, message, "one listener may have many addresses: put them into one `bind`");
                break;
            }
            self.places.listeners.push(span);
            listeners.push(self.listener(name, &section, upstreams));
        }
        let mut written = roots.iter().filter_map(|root| root.get("listeners"));
        let nothing_written = written.clone().all(|field| field.is_empty_table());
        if nothing_written && !roots.iter().any(|root| self.reader.is_misspelt(root, "listeners")) {
            let span = written.next().map_or(0..0, |field| field.span());
            self.reader.absent(
                span,
                "there is no listener",
                "add `[listeners.public]` with `bind = [\"0.0.0.0:443\", \"[::]:443\"]`; `dataplane init` prints a whole configuration",
            );
        }
        listeners
    }

    fn listener(&mut self, name: Arc<str>, section: &Section<'_>, upstreams: &[Upstream]) -> Listener {
        #[derive(Clone, Copy, PartialEq)]
        enum Written {
            Tls,
            Tcp,
            Http,
        }
        let mode = match section.get("mode") {
            None => Some(Written::Tls),
            Some(field) => {
                self.reader.choice(field, &[("tls", Written::Tls), ("tcp", Written::Tcp), ("http", Written::Http)])
            }
        };
        let acme_port = section.get("acme_port").and_then(|field| {
            if matches!(mode, Some(Written::Tls | Written::Tcp)) {
                self.reader.error(
                    field.span(),
                    "`acme_port` is for listeners of `mode = \"http\"`",
                    "remove it: TLS-ALPN challenges reach the upstream like any other connection",
                );
            }
            self.reader.integer(field, &PORT, "80")
        });
        let upstream = section.get("upstream").map(|field| (field, self.upstream_index(field, upstreams)));
        let mode = match (mode, upstream) {
            (Some(Written::Tcp), Some((_, upstream))) => Mode::Tcp { upstream },
            (Some(Written::Tcp), None) => {
                let example = upstreams.first().map_or("cluster", |upstream| &upstream.name);
                self.reader.missing(section, "upstream", &quoted(example));
                Mode::Tcp { upstream: NOWHERE }
            }
            (Some(Written::Tls), Some((field, _))) => {
                self.reader.error(
                    field.span(),
                    "a listener of mode \"tls\" has no `upstream`: routes choose it by server name",
                    "move it to `[[routes]]`, or write `mode = \"tcp\"` to forward every connection as it is",
                );
                Mode::Tls
            }
            (Some(Written::Http), upstream) => {
                if let Some((field, _)) = upstream {
                    self.reader.error(
                        field.span(),
                        "a listener of mode \"http\" has no `upstream`: challenges go to that of the route which lists their host",
                        "remove it, or write `mode = \"tcp\"` to forward every connection as it is",
                    );
                }
                Mode::Http { acme_port: acme_port.unwrap_or(80) as u16 }
            }
            _ => Mode::Tls,
        };
        let bind = self.binds(section);
        let unusual = match mode {
            Mode::Http { .. } => Some((443, "clients speak TLS on port 443, which mode \"http\" does not", "tls")),
            Mode::Tls => Some((80, "clients speak plain HTTP on port 80, which mode \"tls\" does not", "http")),
            Mode::Tcp { .. } => None,
        };
        if let Some((port, message, usual)) = unusual {
            for bind in bind.iter().filter(|bind| bind.addr.port() == port) {
                let remedy = format!("write `mode = \"{usual}\"`, or another port");
                self.reader.warning(bind.span.clone(), message, remedy);
            }
        }
        Listener {
            name,
            bind,
            mode,
            accept_proxy: self.nets(section, "accept_proxy"),
            allow: self.nets(section, "allow"),
            deny: self.nets(section, "deny"),
        }
    }

    fn binds(&mut self, section: &Section<'_>) -> Vec<Bind> {
        const EXAMPLE: &str = "\"0.0.0.0:443\"";
        let Some(field) = section.get("bind") else {
            self.reader.missing(section, "bind", "[\"0.0.0.0:443\", \"[::]:443\"]");
            return Vec::new();
        };
        if field.is_empty_list() {
            self.reader.error(
                field.span(),
                format!("{} has no address to listen on", section.name),
                format!("name at least one: `bind = [{EXAMPLE}]`"),
            );
        }
        let mut entries = self.reader.strings(field, "an address to listen on", EXAMPLE);
        self.binds += entries.len();
        if self.binds > MOST_BINDS {
            let message = format!("there are more than {MOST_BINDS} addresses to listen on");
            self.reader.error(field.span(), message, "remove some; `0.0.0.0` and `[::]` stand for all of the machine");
            entries.clear();
        }
        let reader = &mut self.reader;
        entries
            .into_iter()
            .filter_map(|(span, text)| Some(Bind { addr: reader.accept(span.clone(), parse_bind(text))?, span }))
            .collect()
    }

    fn nets(&mut self, section: &Section<'_>, key: &str) -> Vec<ipnet::IpNet> {
        let Some(field) = section.get(key) else { return Vec::new() };
        let entries = self.reader.strings(field, "a network", "\"10.0.0.0/8\"");
        entries.into_iter().filter_map(|(span, text)| self.reader.accept(span, parse_net(text))).collect()
    }
}
