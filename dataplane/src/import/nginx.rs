//! What the directives of nginx's `stream` module mean, in our terms.
//!
//! Names are let through as nginx lets them through and never more: what is matched by a regular
//! expression, or by nothing, is told and left out.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use ipnet::IpNet;

use super::syntax::{Directive, Place, named};
use super::{Imported, Note};
use crate::config::{Diagnostic, HostPattern, Source, Target, format_duration, parse};

const SNI: &str = "ssl_preread_server_name";

/// Of a server, with their own notes or none.
const HANDLED: &[&str] = &[
    "listen",
    "server_name",
    "proxy_pass",
    "proxy_protocol",
    "proxy_connect_timeout",
    "proxy_timeout",
    "preread_timeout",
    "ssl_preread",
    "allow",
    "deny",
    "set_real_ip_from",
    "server",
    "map",
    "upstream",
    "resolver",
];

/// What has no counterpart and needs none, and why.
const NEEDLESS: &[(&[&str], &str)] = &[
    (
        &["access_log", "error_log", "log_format", "open_log_file_cache"],
        "one line for each connection goes to the journal",
    ),
    (
        &["proxy_buffer_size", "preread_buffer_size", "proxy_upload_rate", "proxy_download_rate"],
        "memory is bounded by [limits]",
    ),
    (&["tcp_nodelay", "proxy_socket_keepalive", "proxy_half_close"], "it is always so"),
    (
        &["proxy_next_upstream", "proxy_next_upstream_tries", "proxy_next_upstream_timeout"],
        "the next target is always tried until one answers",
    ),
    (
        &[
            "resolver_timeout",
            "variables_hash_max_size",
            "variables_hash_bucket_size",
            "map_hash_max_size",
            "map_hash_bucket_size",
        ],
        "not needed",
    ),
    (&["limit_conn", "limit_conn_zone", "limit_conn_log_level"], "see `max_connections_per_client` in [limits]"),
];

/// One value of a variable that the server name decides.
#[derive(Debug, Clone)]
struct Case {
    /// Empty: of all other names.
    hosts: Vec<String>,
    value: String,
    place: Place,
}

/// Where a server's connections go.
enum Destinations {
    /// All to one place.
    Fixed(String),
    ByName {
        cases: Vec<Case>,
        /// Names were left out that nginx sent somewhere, or nowhere.
        lost: bool,
    },
}

/// An upstream as a server uses it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Use {
    /// Name of an `upstream` block, or `host:port`.
    destination: String,
    send_proxy: bool,
    connect_timeout: Option<Duration>,
}

#[derive(Debug, Default)]
struct Listener {
    name: String,
    binds: Vec<SocketAddr>,
    accept_proxy: Vec<String>,
    allow: Vec<String>,
    deny: Vec<String>,
    /// Of mode `tcp`, by name in the file.
    upstream: Option<String>,
}

impl Listener {
    /// Whether another server on these addresses is the same listener.
    fn shares(&self, other: &Self, binds: &[SocketAddr]) -> bool {
        let rules = |l: &Self| (l.accept_proxy.clone(), l.allow.clone(), l.deny.clone());
        self.upstream.is_none() && self.binds == binds && rules(self) == rules(other)
    }
}

#[derive(Debug)]
struct Route {
    hosts: Vec<String>,
    listener: usize,
    upstream: String,
}

struct Translation<'a> {
    stream: Vec<&'a Directive>,
    notes: Vec<Note>,
    listeners: Vec<Listener>,
    routes: Vec<Route>,
    /// In the order of their first use: name, lines of the table.
    upstreams: Vec<(String, String)>,
    used: BTreeMap<Use, String>,
    idle_timeout: Option<Duration>,
    hello_timeout: Option<Duration>,
}

pub(super) fn translate(path: &Path, directives: &[Directive], notes: Vec<Note>) -> Result<Imported> {
    let is_fragment = directives.iter().any(|d| {
        d.name == "server" && d.inside().iter().any(|d| d.name == "proxy_pass")
            || d.name == "map" && d.words.first().is_some_and(|word| word.starts_with("$ssl_preread"))
    });
    let blocks: Vec<&Directive> = directives.iter().filter(|d| d.name == "stream").collect();
    let stream: Vec<&Directive> = if blocks.is_empty() && is_fragment {
        directives.iter().collect()
    } else {
        blocks.iter().flat_map(|block| block.inside()).collect()
    };
    if stream.is_empty() {
        bail!(
            "{}: error: there is no `stream` block with anything in it\n  help: name the file that has it, or the main configuration file that includes it",
            path.display()
        );
    }
    let mut translation = Translation {
        stream,
        notes,
        listeners: Vec::new(),
        routes: Vec::new(),
        upstreams: Vec::new(),
        used: BTreeMap::new(),
        idle_timeout: None,
        hello_timeout: None,
    };
    if !blocks.is_empty() {
        for http in directives.iter().filter(|d| d.name == "http") {
            let message = "`http` is not carried over; if it answered ACME challenges or sent port 80 to https, a listener of mode \"http\" does both";
            translation.note(&http.place, message);
        }
        for mail in directives.iter().filter(|d| d.name == "mail") {
            translation.note(&mail.place, "`mail` is not carried over");
        }
    }
    translation.run();
    translation.finish(path)
}

impl<'a> Translation<'a> {
    fn note(&mut self, place: &Place, message: impl Into<String>) {
        let note = Note { place: place.clone(), message: message.into() };
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    fn run(&mut self) {
        for directive in self.stream.clone() {
            match &*directive.name {
                "server" => self.server(directive),
                "resolver" => self.note(
                    &directive.place,
                    "`resolver` is not carried over: names are looked up by the system's resolver (/etc/resolv.conf)",
                ),
                _ => self.leave(directive),
            }
        }
        for directive in self.stream.clone() {
            let told = |note: &Note| note.place == directive.place && note.message.starts_with("upstream ");
            let unused = directive.name == "upstream"
                && !self.notes.iter().any(told)
                && !self.used.keys().any(|used| directive.words.first() == Some(&used.destination));
            if unused {
                self.note(
                    &directive.place,
                    format!("upstream `{}` is not carried over: nothing that was uses it", directive.text()),
                );
            }
        }
    }

    /// Says of a directive that it is not carried over.
    fn leave(&mut self, directive: &Directive) {
        let name = &*directive.name;
        if HANDLED.contains(&name) {
            return;
        }
        let why =
            NEEDLESS.iter().find(|(names, _)| names.contains(&name)).map_or("it has no counterpart", |(_, why)| why);
        self.note(&directive.place, format!("{} is not carried over: {why}", named(name)));
    }

    /// A directive of a server, or what stands in its place for all.
    fn setting<'d>(&self, server: &'d Directive, name: &str) -> Option<&'d Directive>
    where
        'a: 'd,
    {
        let own = server.inside().iter().rfind(|d| d.name == name);
        own.or_else(|| self.stream.iter().copied().rfind(|d| d.name == name))
    }

    fn is_on(&self, server: &Directive, name: &str) -> bool {
        self.setting(server, name).is_some_and(|d| d.text() == "on")
    }

    fn duration(&mut self, server: &Directive, name: &str) -> Option<Duration> {
        let directive = self.setting(server, name)?;
        let (text, place) = (directive.text(), directive.place.clone());
        let duration = parse_duration(&text);
        if duration.is_none() {
            self.note(&place, format!("`{name} {text}` is not carried over: it is no duration"));
        }
        duration
    }

    fn server(&mut self, server: &'a Directive) {
        for directive in server.inside() {
            self.leave(directive);
        }
        let Some(pass) = server.inside().iter().find(|d| d.name == "proxy_pass") else {
            self.note(&server.place, "this server is not carried over: it has no `proxy_pass`");
            return;
        };
        let listens: Vec<&Directive> = server.inside().iter().filter(|d| d.name == "listen").collect();
        if let Some(listen) = listens.iter().find(|d| d.words.iter().any(|word| word == "udp")) {
            self.note(&listen.place, "this server is not carried over: it listens for UDP");
            return;
        }
        if let Some(listen) = listens.iter().find(|d| d.words.iter().any(|word| word == "ssl")) {
            self.note(
                &listen.place,
                "this server is not carried over: it terminates TLS, which is the upstream's to do",
            );
            return;
        }
        let mut binds = Vec::new();
        for listen in &listens {
            match parse_listen(&listen.words) {
                Ok(found) => binds.extend(found),
                Err(why) => self.note(&listen.place, format!("`listen {}` is not carried over: {why}", listen.text())),
            }
        }
        if binds.is_empty() {
            self.note(&server.place, "this server is not carried over: it listens nowhere");
            return;
        }
        let how = Use {
            destination: String::new(),
            send_proxy: self.is_on(server, "proxy_protocol"),
            connect_timeout: self.duration(server, "proxy_connect_timeout"),
        };
        let Some(destinations) = self.destinations(server, pass) else { return };
        let idle = self.duration(server, "proxy_timeout");
        self.idle_timeout = self.idle_timeout.max(idle);
        let hello = self.duration(server, "preread_timeout");
        self.hello_timeout = self.hello_timeout.max(hello);

        let (upstream, routes) = match destinations {
            Destinations::Fixed(value) => (self.upstream(&value, &how, &pass.place), Vec::new()),
            Destinations::ByName { cases, lost } => (None, self.routes_of(cases, lost, &how)),
        };
        if upstream.is_none() && routes.is_empty() {
            self.note(&server.place, "this server is not carried over: none of its destinations could be");
            return;
        }
        let Some(index) = self.listener(server, &listens, binds, upstream) else {
            self.note(
                &server.place,
                "this server is not carried over: servers above have its addresses, and other rules",
            );
            return;
        };
        for (hosts, upstream) in routes {
            self.route(hosts, index, upstream, &server.place);
        }
    }

    /// Hosts and upstreams of what a server tells apart by name; the default comes last, for all
    /// else has to be known by then.
    fn routes_of(&mut self, cases: Vec<Case>, mut lost: bool, how: &Use) -> Vec<(Vec<String>, String)> {
        let mut routes: Vec<(Vec<String>, String)> = Vec::new();
        let exact: Vec<String> =
            cases.iter().filter(|case| case.hosts.len() == 1).map(|case| case.hosts[0].clone()).collect();
        let (defaults, named): (Vec<Case>, Vec<Case>) = cases.into_iter().partition(|case| case.hosts.is_empty());
        for mut case in named {
            if let [name, _] = &case.hosts[..]
                && exact.contains(name)
            {
                // `.x` stands for `x` too, but `x` itself comes first.
                case.hosts.remove(0);
            }
            let Some(upstream) = self.upstream(&case.value, how, &case.place) else {
                lost = true;
                continue;
            };
            match routes.iter_mut().find(|(_, to)| *to == upstream) {
                Some((hosts, _)) => hosts.extend(case.hosts),
                None => routes.push((case.hosts, upstream)),
            }
        }
        for Case { value, place, .. } in defaults {
            if lost {
                self.note(
                    &place,
                    format!("`default` is not carried over: names that could not be would now go to `{value}`; write a route of \"*\" if they may"),
                );
            } else if let Some(upstream) = self.upstream(&value, how, &place) {
                self.note(
                    &place,
                    format!("`default` lets every name through to `{value}`, as before: list the names that are meant and remove the route of \"*\"; clients without a server name are refused"),
                );
                routes.push((vec!["*".to_owned()], upstream));
            }
        }
        routes
    }

    /// Adds a route; names that the listener has already keep their first place, as in nginx.
    fn route(&mut self, mut hosts: Vec<String>, listener: usize, upstream: String, place: &Place) {
        let key = |host: &String| HostPattern::parse(host).ok();
        let mut seen: Vec<_> =
            self.routes.iter().filter(|r| r.listener == listener).flat_map(|r| &r.hosts).map(key).collect();
        let mut again = Vec::new();
        hosts.retain(|host| {
            let new = !seen.contains(&key(host));
            if new {
                seen.push(key(host));
            } else {
                again.push(host.clone());
            }
            new
        });
        for host in again {
            self.note(place, format!("`{host}` is listed twice on these addresses: the first counts"));
        }
        if !hosts.is_empty() {
            self.routes.push(Route { hosts, listener, upstream });
        }
    }

    /// Where a server's connections go: by name, or all to one place. `None`: that could not be
    /// carried over.
    fn destinations(&mut self, server: &Directive, pass: &Directive) -> Option<Destinations> {
        let template = pass.text();
        let Some(variable) = variable_in(&template) else {
            // Servers on one address are told apart by the name (since nginx 1.25.5).
            let names: Vec<&Directive> = server.inside().iter().filter(|d| d.name == "server_name").collect();
            if names.is_empty() {
                if self.is_on(server, "ssl_preread") {
                    self.note(
                        &pass.place,
                        format!("every connection goes to `{template}`, whatever its name: carried over as mode \"tcp\"; routes with `hosts` would let listed names through alone"),
                    );
                }
                return Some(Destinations::Fixed(template));
            }
            let mut cases = Vec::new();
            for (name, place) in names.iter().flat_map(|d| d.words.iter().map(|word| (word, &d.place))) {
                if let Some(hosts) = self.hosts(name, true, place) {
                    cases.push(Case { hosts, value: template.clone(), place: place.clone() });
                }
            }
            return Some(Destinations::ByName { cases, lost: false });
        };
        if variable == SNI {
            self.note(
                &pass.place,
                format!("`proxy_pass {template}` is not carried over: it dials whatever name a client asks for; list the names in routes"),
            );
            return None;
        }
        let map = self
            .stream
            .iter()
            .copied()
            .find(|d| d.name == "map" && d.words.get(1).and_then(|word| word.strip_prefix('$')) == Some(variable));
        let Some(map) = map else {
            self.note(
                &pass.place,
                format!("`proxy_pass {template}` is not carried over: no `map` here sets ${variable}"),
            );
            return None;
        };
        let source = &map.words[0];
        if variable_in(source) != Some(SNI) || !source.trim_start_matches(['$', '{']).trim_end_matches('}').eq(SNI) {
            self.note(
                &map.place,
                format!("the map of `{source}` is not carried over: only $ssl_preread_server_name decides here (routes have `alpn` for protocols)"),
            );
            return None;
        }
        if !self.is_on(server, "ssl_preread") {
            self.note(
                &server.place,
                "`ssl_preread` is off in this server, so nginx sees no name: carried over as if it were on",
            );
        }
        let (mut cases, mut lost) = (Vec::new(), false);
        let hostnames = map.inside().iter().any(|d| d.name == "hostnames" && d.words.is_empty());
        for entry in map.inside() {
            if matches!(&*entry.name, "hostnames" | "volatile") && entry.words.is_empty() {
                continue;
            }
            let value = entry.text();
            if value.is_empty() {
                self.note(&entry.place, format!("`{}` has an empty value: the name is refused", entry.name));
                lost |= entry.name != "default";
                continue;
            }
            if let Some(inner) = variable_in(&value) {
                self.note(
                    &entry.place,
                    if inner == SNI {
                        format!("`{} {value}` is not carried over: it dials whatever name a client asks for; list the names in routes", entry.name)
                    } else {
                        format!("`{} {value}` is not carried over: its value is another variable", entry.name)
                    },
                );
                lost |= entry.name != "default";
                continue;
            }
            let hosts = match &*entry.name {
                "default" => Vec::new(),
                name => {
                    let Some(hosts) = self.hosts(name, hostnames, &entry.place) else {
                        // Nobody can have matched these.
                        lost |= !name.is_empty() && (hostnames || name.starts_with('~') || !name.contains('*'));
                        continue;
                    };
                    hosts
                }
            };
            let value = substitute(&template, variable, &value);
            cases.push(Case { hosts, value, place: entry.place.clone() });
        }
        Some(Destinations::ByName { cases, lost })
    }

    /// The hosts that a name of a map or of `server_name` stands for.
    fn hosts(&mut self, name: &str, wildcards: bool, place: &Place) -> Option<Vec<String>> {
        let name = name.strip_prefix('\\').unwrap_or(name);
        if name.starts_with('~') {
            self.note(
                place,
                format!("`{name}` is not carried over: regular expressions have no counterpart; list the names"),
            );
            return None;
        }
        if name.is_empty() {
            self.note(place, "clients without a server name are refused");
            return None;
        }
        let hosts = match name.strip_prefix('.') {
            Some(rest) => vec![rest.to_owned(), format!("*.{rest}")],
            None => vec![name.to_owned()],
        };
        if !wildcards && (name.starts_with('.') || name.contains('*')) {
            self.note(
                place,
                format!("`{name}` is not carried over: in a map without `hostnames` nginx takes it literally, so no client matched it"),
            );
            return None;
        }
        for host in &hosts {
            match HostPattern::parse(host) {
                Err(refused) => {
                    self.note(place, format!("`{name}` is not carried over: {}; {}", refused.message, refused.remedy));
                    return None;
                }
                Ok(HostPattern::Any) if name == "_" || name == "*" => return None,
                Ok(_) => {}
            }
        }
        if name == "_" {
            return None;
        }
        Some(hosts)
    }

    /// The name of our upstream for a destination of a server.
    fn upstream(&mut self, destination: &str, how: &Use, place: &Place) -> Option<String> {
        let used = Use { destination: destination.to_owned(), ..how.clone() };
        if let Some(name) = self.used.get(&used) {
            return Some(name.clone());
        }
        let block = self.stream.iter().copied().find(|d| d.name == "upstream" && d.words == [destination]);
        let mut lines = match block {
            Some(block) => self.members(block)?,
            None => match self.target(destination, place) {
                Some(target) => format!("targets = [{}]\n", quoted(&target)),
                None => return None,
            },
        };
        if how.send_proxy {
            lines += "send_proxy = \"v1\"\n";
        }
        if let Some(timeout) = how.connect_timeout.filter(|timeout| (1..=3_600_000).contains(&timeout.as_millis())) {
            let _ = writeln!(lines, "connect_timeout = \"{}\"", format_duration(timeout));
        }
        let base = sanitized(destination);
        let taken = |name: &str| self.upstreams.iter().any(|(other, _)| other == name);
        let candidates = (1..).map(|n| if n == 1 { base.clone() } else { format!("{base}-{n}") });
        let name = candidates.into_iter().find(|name| !taken(name)).expect("numbers do not end");
        self.upstreams.push((name.clone(), lines));
        self.used.insert(used, name.clone());
        Some(name)
    }

    /// `host:port`, if it is one.
    fn target(&mut self, text: &str, place: &Place) -> Option<String> {
        if text.starts_with("unix:") {
            self.note(place, format!("`{text}` is not carried over: targets are reached by TCP"));
            return None;
        }
        match Target::parse(text, 0..0) {
            Ok(_) => Some(text.to_owned()),
            Err(refused) => {
                self.note(place, format!("`{text}` is not carried over: {}; {}", refused.message, refused.remedy));
                None
            }
        }
    }

    /// The lines of an upstream's table.
    fn members(&mut self, block: &Directive) -> Option<String> {
        let name = block.text();
        let mut balance = "round-robin";
        let (mut first, mut backups) = (Vec::new(), Vec::new());
        let mut most: Vec<String> = Vec::new();
        for directive in block.inside() {
            let place = &directive.place;
            match &*directive.name {
                "server" => {
                    let Some(address) = directive.words.first() else { continue };
                    let options = &directive.words[1..];
                    if options.iter().any(|option| option == "down") {
                        self.note(place, format!("`{address}` is not carried over: it is down"));
                        continue;
                    }
                    let Some(target) = self.target(address, place) else { continue };
                    most.push(options.iter().find_map(|o| o.strip_prefix("max_conns=")).unwrap_or("0").to_owned());
                    if options.iter().any(|option| option == "backup") {
                        backups.push((target, place.clone()));
                    } else {
                        first.push(target);
                    }
                    for option in options {
                        match option.split_once('=').map_or(&**option, |(key, _)| key) {
                            "weight" if option != "weight=1" => {
                                self.note(place, format!("`{option}` is not carried over: targets have no weights"));
                            }
                            "max_fails" | "fail_timeout" => self.note(
                                place,
                                format!("`{option}` is not carried over: a target that fails is put aside for 1 s, doubling to 30 s"),
                            ),
                            "weight" | "max_conns" | "backup" | "resolve" => {}
                            _ => self.note(place, format!("`{option}` is not carried over: it has no counterpart")),
                        }
                    }
                }
                "least_conn" => balance = "least-connections",
                "hash"
                    if directive
                        .words
                        .first()
                        .is_some_and(|key| matches!(&**key, "$remote_addr" | "$binary_remote_addr")) =>
                {
                    balance = "hash";
                }
                "hash" => self.note(
                    place,
                    format!(
                        "`hash {}` is not carried over: only the client's address is hashed (balance = \"hash\")",
                        directive.text()
                    ),
                ),
                "zone" | "resolver" => {}
                _ => self.note(place, format!("{} is not carried over: it has no counterpart", named(&directive.name))),
            }
        }
        match (first.len(), backups.len()) {
            (_, 0) => {}
            (0 | 1, _) => {
                balance = "first";
                first.extend(backups.into_iter().map(|(target, _)| target));
            }
            _ => {
                for (target, place) in backups {
                    self.note(&place, format!("`{target}` is not carried over: of several targets none is a backup (balance = \"first\" takes them in order)"));
                }
                most.truncate(first.len());
            }
        }
        first.dedup();
        if first.is_empty() {
            self.note(&block.place, format!("upstream `{name}` is not carried over: no target is left"));
            return None;
        }
        let targets: Vec<String> = first.iter().map(|target| quoted(target)).collect();
        let mut lines = format!("targets = [{}]\n", targets.join(", "));
        if first.len() > 1 {
            let _ = writeln!(lines, "balance = \"{balance}\"");
        }
        most.sort();
        most.dedup();
        match &most[..] {
            [one] if one == "0" => {}
            [one] if one.parse::<u32>().is_ok() => lines += &format!("max_connections_per_target = {one}\n"),
            _ => self.note(
                &block.place,
                format!("`max_conns` of `{name}` is not carried over: it is one number for all targets"),
            ),
        }
        Some(lines)
    }

    /// The index of the listener on these addresses: servers that share them become one.
    fn listener(
        &mut self,
        server: &Directive,
        listens: &[&Directive],
        binds: Vec<SocketAddr>,
        upstream: Option<String>,
    ) -> Option<usize> {
        let mut listener = Listener { upstream, ..Listener::default() };
        if let Some(listen) = listens.iter().find(|d| d.words.iter().any(|word| word == "proxy_protocol")) {
            listener.accept_proxy = self.trusted(server, &listen.place);
        }
        self.access(server, &mut listener);
        if listener.upstream.is_none()
            && let Some(index) = self.listeners.iter().position(|l| l.shares(&listener, &binds))
        {
            return Some(index);
        }
        let mut new = Vec::new();
        for bind in binds {
            if self.listeners.iter().flat_map(|l| &l.binds).chain(&new).any(|other| *other == bind) {
                self.note(&server.place, format!("{bind} is taken by another server above: left out here"));
            } else {
                new.push(bind);
            }
        }
        if new.is_empty() {
            return None;
        }
        listener.binds = new;
        let port = listener.binds.first().map_or(0, SocketAddr::port);
        let base = match (&listener.upstream, port) {
            (None, 443) => "public".to_owned(),
            (None, port) => format!("tls-{port}"),
            (Some(_), port) => format!("tcp-{port}"),
        };
        let taken = |name: &str| self.listeners.iter().any(|l| l.name == name);
        let mut candidates = (1..).map(|n| if n == 1 { base.clone() } else { format!("{base}-{n}") });
        listener.name = candidates.find(|name| !taken(name)).expect("numbers do not end");
        self.listeners.push(listener);
        Some(self.listeners.len() - 1)
    }

    /// Whose PROXY headers are believed.
    fn trusted(&mut self, server: &Directive, listen: &Place) -> Vec<String> {
        let own: Vec<&Directive> = server.inside().iter().filter(|d| d.name == "set_real_ip_from").collect();
        let all = self.stream.iter().copied().filter(|d| d.name == "set_real_ip_from");
        let froms: Vec<&Directive> = if own.is_empty() { all.collect() } else { own };
        let mut networks = Vec::new();
        for from in &froms {
            match network(&from.text()) {
                Some(network) => networks.push(network),
                None => self.note(
                    &from.place,
                    format!("`set_real_ip_from {}` is not carried over: it is no network", from.text()),
                ),
            }
        }
        if networks.is_empty() {
            self.note(
                listen,
                "every client must send a PROXY header here, and is believed, as before: put the addresses of the proxies in front into `accept_proxy`",
            );
            networks = vec!["0.0.0.0/0".to_owned(), "::/0".to_owned()];
        } else {
            self.note(
                listen,
                "PROXY headers are asked for and believed from `set_real_ip_from` alone; other clients send none",
            );
        }
        networks
    }

    /// `allow` and `deny`, where their order says what ours say: nginx takes the first that fits,
    /// here `deny` comes first.
    fn access(&mut self, server: &Directive, listener: &mut Listener) {
        let own: Vec<&Directive> = server.inside().iter().filter(|d| matches!(&*d.name, "allow" | "deny")).collect();
        let all = self.stream.iter().copied().filter(|d| matches!(&*d.name, "allow" | "deny"));
        let rules: Vec<&Directive> = if own.is_empty() { all.collect() } else { own };
        let Some(last) = rules.last() else { return };
        let (closing, rules) =
            if last.text() == "all" { (Some(&*last.name), &rules[..rules.len() - 1]) } else { (None, &rules[..]) };
        let networks = |name: &str| -> Option<Vec<String>> {
            rules.iter().filter(|d| d.name == name).map(|d| network(&d.text())).collect()
        };
        let only = |name: &str| rules.iter().all(|d| d.name == name);
        match (networks("allow"), networks("deny"), closing) {
            (Some(allow), _, Some("deny")) if only("allow") && !allow.is_empty() => listener.allow = allow,
            (_, Some(deny), None | Some("allow")) if only("deny") => listener.deny = deny,
            (Some(allow), Some(deny), Some("deny")) if !allow.is_empty() && denies_first(rules) => {
                listener.allow = allow;
                listener.deny = deny;
            }
            _ => {
                // To let in fewer than before is safe, to let in more is not.
                listener.deny = vec!["0.0.0.0/0".to_owned(), "::/0".to_owned()];
                self.note(
                    &last.place,
                    "the order of `allow` and `deny` here cannot be carried over: everybody is denied until you write `allow` and `deny` of the listener (`deny` is looked at first)",
                );
            }
        }
    }

    fn finish(mut self, path: &Path) -> Result<Imported> {
        self.notes.sort_by_key(|note| (note.place.file.clone(), note.place.line));
        let told: String = self.notes.iter().map(|note| format!("{note}\n")).collect();
        if self.listeners.is_empty() {
            bail!("{told}{}: error: no server of a `stream` block could be carried over", path.display());
        }
        let toml = self.toml(path);
        let source = Arc::new(Source::new(path, toml.clone()));
        match parse(source.clone()) {
            Ok(_) => Ok(Imported { toml, notes: self.notes }),
            // What nginx takes and we do not, such as a target that is a listener.
            Err(diagnostics) => {
                let shown: String = diagnostics
                    .iter()
                    .filter(|d| d.is_error())
                    .map(|d: &Diagnostic| d.render(&source).to_string())
                    .collect();
                bail!("{told}{toml}\n{}: error: what comes of it, above, does not check:\n{shown}", path.display())
            }
        }
    }

    fn toml(&self, path: &Path) -> String {
        let mut out = format!("# From {}. `dataplane check --config FILE` prints its routing table.\n", path.display());
        if !self.notes.is_empty() {
            out += "#\n# Not carried over, or not as it was:\n";
            for note in &self.notes {
                let _ = writeln!(out, "# - {note}");
            }
        }
        for listener in &self.listeners {
            let _ = writeln!(out, "\n[listeners.{}]", quoted_key(&listener.name));
            if let Some(upstream) = &listener.upstream {
                let _ = writeln!(out, "mode = \"tcp\"\nupstream = {}", quoted(upstream));
            }
            let binds: Vec<String> = listener.binds.iter().map(ToString::to_string).collect();
            let _ = writeln!(out, "bind = {}", list(&binds));
            for (key, networks) in
                [("accept_proxy", &listener.accept_proxy), ("allow", &listener.allow), ("deny", &listener.deny)]
            {
                if !networks.is_empty() {
                    let _ = writeln!(out, "{key} = {}", list(networks));
                }
            }
        }
        for (name, lines) in &self.upstreams {
            let _ = write!(out, "\n[upstreams.{}]\n{lines}", quoted_key(name));
        }
        let several = self.listeners.iter().filter(|l| l.upstream.is_none()).count() > 1;
        for route in &self.routes {
            let _ = write!(out, "\n[[routes]]\nhosts = {}\n", list(&route.hosts));
            if several {
                let _ = writeln!(out, "listeners = {}", list(&[self.listeners[route.listener].name.clone()]));
            }
            let _ = writeln!(out, "upstream = {}", quoted(&route.upstream));
        }
        let limits = [("idle_timeout", self.idle_timeout, 31_536_000), ("hello_timeout", self.hello_timeout, 3600)];
        let limits: Vec<_> = limits.iter().filter_map(|(key, value, most)| Some((key, (*value)?, *most))).collect();
        let mut header = "\n[limits]\n";
        for (key, value, most) in limits {
            if (1..=most * 1000).contains(&(value.as_millis() as u64)) {
                let _ = writeln!(out, "{header}{key} = \"{}\"", format_duration(value));
                header = "";
            }
        }
        if self.listeners.iter().flat_map(|l| &l.binds).any(|bind| bind.port() == 9443) {
            out += "\n[admin]\nbind = \"127.0.0.1:9444\"\n";
        }
        out
    }
}

fn denies_first(rules: &[&Directive]) -> bool {
    rules.iter().skip_while(|d| d.name == "deny").all(|d| d.name == "allow")
}

/// The first variable in a text, without its dollar sign.
fn variable_in(text: &str) -> Option<&str> {
    let rest = text.split_once('$')?.1;
    let rest = rest.strip_prefix('{').unwrap_or(rest);
    let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
    Some(&rest[..end])
}

fn substitute(template: &str, variable: &str, value: &str) -> String {
    template.replace(&format!("${{{variable}}}"), value).replace(&format!("${variable}"), value)
}

/// The addresses of a `listen`.
fn parse_listen(words: &[String]) -> Result<Vec<SocketAddr>, String> {
    let address = words.first().ok_or("it has no address")?;
    if address.starts_with("unix:") {
        return Err("it is no TCP port".into());
    }
    let any = |port: u16| SocketAddr::from(([0, 0, 0, 0], port));
    let port_after = |prefix: &str| address.strip_prefix(prefix).and_then(|port| port.parse::<u16>().ok());
    let bind = if let Some(port) = port_after("").or_else(|| port_after("*:")) {
        any(port)
    } else if let Some(port) = port_after("localhost:") {
        SocketAddr::from(([127, 0, 0, 1], port))
    } else if let Ok(bind) = address.parse() {
        bind
    } else if address.rsplit_once(':').map_or(&**address, |(_, port)| port).contains('-') {
        return Err("it is a range of ports; write a listener for each that is meant".into());
    } else {
        return Err("it is no address with a port".into());
    };
    let both = bind.ip() == IpAddr::from([0_u16; 8]) && words.iter().any(|word| word == "ipv6only=off");
    Ok(if both { vec![any(bind.port()), bind] } else { vec![bind] })
}

/// nginx's durations: `1h 30m`, `10s`, `500ms`; a number alone is seconds.
fn parse_duration(text: &str) -> Option<Duration> {
    let mut millis: u64 = 0;
    let mut rest = text.trim();
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let number: u64 = rest[..digits].parse().ok()?;
        let after = &rest[digits..];
        let unit = after.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(after.len());
        let factor = match &after[..unit] {
            "ms" => 1,
            "" | "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            "w" => 7 * 86_400_000,
            _ => return None,
        };
        millis = millis.checked_add(number.checked_mul(factor)?)?;
        rest = after[unit..].trim_start();
    }
    Some(Duration::from_millis(millis))
}

fn network(text: &str) -> Option<String> {
    let network = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from)).ok()?;
    Some(network.trunc().to_string())
}

/// Letters, digits, hyphens, underscores and dots.
fn sanitized(text: &str) -> String {
    let name: String =
        text.chars().map(|c| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '-' }).collect();
    name.trim_matches('-').replace("--", "-")
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

fn quoted_key(name: &str) -> String {
    if name.contains('.') { quoted(name) } else { name.to_owned() }
}

fn list(texts: &[String]) -> String {
    format!("[{}]", texts.iter().map(|text| quoted(text)).collect::<Vec<_>>().join(", "))
}
