//! From text to [`Config`]: the keys, what each may hold, and what stands in when it is left out.
//!
//! A value that is wrong is reported and replaced by a placeholder, so that everything wrong with a file is said at once. No placeholder
//! gets out: a configuration with an error is not returned.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};
use toml::de::DeTable;

use super::check::Places;
use super::keys;
use super::reader::{Field, Reader, Section, quoted, suggest};
use super::values::{parse_bind, parse_net};
use super::{
    Admin, Balance, Bind, Config, Diagnostic, EngineChoice, HostPattern, Limits, Listener, Mode, Route, SendProxy,
    Source, Span, Target, Upstream, check, syntax,
};

const MILLISECOND: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);
/// A deadline that someone waits for.
const DEADLINE: RangeInclusive<Duration> = MILLISECOND..=HOUR;
/// The kernel counts keepalive in whole seconds, up to 32767 (include/net/tcp.h, MAX_TCP_KEEPIDLE).
const DEAD_PEER: RangeInclusive<Duration> = SECOND..=Duration::from_secs(9 * 3600);
const IDLE: RangeInclusive<Duration> = MILLISECOND..=Duration::from_secs(365 * 24 * 3600);
const DRAIN: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(24 * 3600);
/// No client says less than 512 bytes; four records of the largest size (RFC 8446 section 5.1) are more than any client says.
const HELLO_BYTES: RangeInclusive<u64> = 512..=65536;
const KERNEL_MEMORY: RangeInclusive<u64> = 64 << 10..=1 << 40;
const PORT: RangeInclusive<u64> = 1..=65535;
/// `sun_path` of unix(7), without the closing NUL.
const LONGEST_SOCKET_PATH: usize = 107;

/// Reads a whole configuration. Gives the warnings with it, or else everything that is wrong, warnings included, in the order of the file.
pub fn parse(source: Arc<Source>) -> Result<(Config, Vec<Diagnostic>), Vec<Diagnostic>> {
    let mut parser = Parser { reader: Reader::default(), places: Places::default() };
    let (root, errors) = {
        let (tree, errors) = DeTable::parse_recoverable(&source.text);
        (parser.root(tree.get_ref()), errors)
    };
    let (engine, listeners, upstreams, routes, limits, admin) = root;
    let Parser { reader: Reader { diagnostics, mut absences, .. }, places } = parser;

    let hash = hash(&source.text);
    let config = Config { engine, listeners, upstreams, routes, limits, admin, source, hash };
    absences.extend(check::conflicts(&config, &places));

    let mut diagnostics = syntax::combine(&config.source, &errors, diagnostics, absences);
    if !diagnostics.iter().any(Diagnostic::is_error) {
        diagnostics.extend(check::unused(&config, &places));
    }
    diagnostics.sort_by_key(|diagnostic| (diagnostic.span.start, diagnostic.span.end));
    if diagnostics.iter().any(Diagnostic::is_error) { Err(diagnostics) } else { Ok((config, diagnostics)) }
}

/// First 16 hex digits of the SHA-256 of the file.
fn hash(text: &str) -> String {
    let digest = Sha256::digest(text.as_bytes());
    let first = digest[..8].iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
    format!("{first:016x}")
}

struct Parser {
    reader: Reader,
    places: Places,
}

/// Stands in for a reference that was reported as an error.
const NOWHERE: usize = usize::MAX;

type Root = (EngineChoice, Vec<Listener>, Vec<Upstream>, Vec<Route>, Limits, Admin);

impl Parser {
    fn root<'t>(&mut self, table: &'t DeTable<'t>) -> Root {
        let root = self.reader.root(table, keys::ROOT);
        let engine = root.get("engine").and_then(|field| {
            self.reader.choice(
                field,
                &[
                    ("auto", EngineChoice::Auto),
                    ("translate", EngineChoice::Translate),
                    ("sockmap", EngineChoice::Sockmap),
                    ("splice", EngineChoice::Splice),
                    ("copy", EngineChoice::Copy),
                ],
            )
        });
        let upstreams = self.upstreams(&root);
        let listeners = self.listeners(&root, &upstreams);
        let routes = self.routes(&root, &listeners, &upstreams);
        let limits = self.limits(&root);
        let admin = self.admin(&root);
        (engine.unwrap_or(EngineChoice::Auto), listeners, upstreams, routes, limits, admin)
    }

    /// The tables below `[listeners]` or `[upstreams]`, in the order of the file.
    fn named<'t>(&mut self, root: &Section<'t>, key: &str, keys: &[&str]) -> Vec<(Span, Arc<str>, Section<'t>)> {
        let Some(field) = root.get(key) else { return Vec::new() };
        let Some(all) = self.reader.any_section(field, format!("[{key}.NAME]")) else { return Vec::new() };
        let mut sections = Vec::new();
        for (span, field) in all.entries() {
            let name = field.key;
            if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')) {
                self.reader.error(
                    span.clone(),
                    format!("{} is no name for one of `{key}`", quoted(name)),
                    "use letters, digits, `-`, `_` and `.`: names stand in metrics and log lines",
                );
            }
            if let Some(section) = self.reader.section(field, format!("[{key}.{name}]"), keys) {
                sections.push((span, Arc::from(name), section));
            }
        }
        sections
    }

    fn upstreams(&mut self, root: &Section<'_>) -> Vec<Upstream> {
        let mut upstreams = Vec::new();
        for (span, name, section) in self.named(root, "upstreams", keys::UPSTREAM) {
            self.places.upstreams.push(span);
            upstreams.push(self.upstream(name, &section));
        }
        upstreams
    }

    fn upstream(&mut self, name: Arc<str>, section: &Section<'_>) -> Upstream {
        let reader = &mut self.reader;
        let send_proxy = section.get("send_proxy").and_then(|field| {
            reader.choice(field, &[("off", SendProxy::Off), ("v1", SendProxy::V1), ("v2", SendProxy::V2)])
        });
        let balance = section.get("balance").and_then(|field| {
            reader.choice(
                field,
                &[
                    ("least-connections", Balance::LeastConnections),
                    ("round-robin", Balance::RoundRobin),
                    ("hash", Balance::Hash),
                    ("first", Balance::First),
                ],
            )
        });
        let connect_timeout = section.get("connect_timeout").and_then(|field| reader.duration(field, &DEADLINE));
        let most = section
            .get("max_connections_per_target")
            .and_then(|field| reader.integer(field, &(0..=u64::from(u32::MAX)), "1000"));
        self.not_yet_acted_on(section);
        Upstream {
            name,
            targets: self.targets(section),
            send_proxy: send_proxy.unwrap_or(SendProxy::Off),
            balance: balance.unwrap_or(Balance::LeastConnections),
            connect_timeout: connect_timeout.unwrap_or(Duration::from_secs(3)),
            max_connections_per_target: most.unwrap_or(0) as u32,
        }
    }

    fn targets(&mut self, section: &Section<'_>) -> Vec<Target> {
        const EXAMPLE: &str = "\"thinkpad-1:443\"";
        let Some(field) = section.get("targets") else {
            self.reader.missing(section, "targets", &format!("[{EXAMPLE}]"));
            return Vec::new();
        };
        if field.is_empty_list() {
            self.reader.error(
                field.span(),
                format!("{} has no target", section.name),
                format!("name at least one as host:port: `targets = [{EXAMPLE}]`"),
            );
        }
        let mut targets: Vec<Target> = Vec::new();
        for (span, text) in self.reader.strings(field, "a target", EXAMPLE) {
            let Some(target) = self.reader.accept(span.clone(), Target::parse(text, span)) else { continue };
            if let Some(first) = targets.iter().find(|other| other.host == target.host && other.port == target.port) {
                let diagnostic = Diagnostic::error(
                    target.span.clone(),
                    format!("target `{text}` is listed twice"),
                    "remove one; a share of the connections cannot be given by repetition",
                );
                self.reader.diagnostics.push(diagnostic.note(first.span.clone(), "first listed here"));
            } else {
                targets.push(target);
            }
        }
        targets
    }

    /// Checks what a later version does; says so where leaving it undone could surprise.
    fn not_yet_acted_on(&mut self, section: &Section<'_>) {
        let reader = &mut self.reader;
        if let Some(field) = section.get("health") {
            if let Some(health) = reader.section(field, "`health`".into(), keys::HEALTH) {
                for key in ["interval", "timeout"] {
                    health.get(key).and_then(|field| reader.duration(field, &DEADLINE));
                }
                for key in ["fall", "rise"] {
                    health.get(key).and_then(|field| reader.integer(field, &(1..=1000), "2"));
                }
            }
            reader.warning(
                field.span(),
                "this version does not act on `health` yet: targets are judged by failed connections alone",
                "it may stay for a later version; remove it to silence this warning",
            );
        }
        if let Some(field) = section.get("hedge_delay")
            && reader.duration(field, &(Duration::ZERO..=HOUR)).is_some_and(|delay| !delay.is_zero())
        {
            reader.warning(
                field.span(),
                "this version does not act on `hedge_delay` yet: the next target is dialled when the first has failed",
                "it may stay for a later version; write \"0s\" to silence this warning",
            );
        }
        if let Some(field) = section.get("on_down")
            && reader.choice(field, &[("keep", false), ("reset", true)]) == Some(true)
        {
            reader.warning(
                field.span(),
                "this version does not act on `on_down = \"reset\"` yet: established connections are kept",
                "it may stay for a later version; write \"keep\" to silence this warning",
            );
        }
    }

    fn listeners(&mut self, root: &Section<'_>, upstreams: &[Upstream]) -> Vec<Listener> {
        let mut listeners = Vec::new();
        for (span, name, section) in self.named(root, "listeners", keys::LISTENER) {
            self.places.listeners.push(span);
            listeners.push(self.listener(name, &section, upstreams));
        }
        let nothing_written = root.get("listeners").is_none_or(|field| field.is_empty_table());
        if nothing_written && !self.reader.is_misspelt(root, "listeners") {
            let span = root.get("listeners").map_or(0..0, |field| field.span());
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
        Listener {
            name,
            bind: self.binds(section),
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
        let entries = self.reader.strings(field, "an address to listen on", EXAMPLE);
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

    fn upstream_index(&mut self, field: Field<'_>, upstreams: &[Upstream]) -> usize {
        let names: Vec<&str> = upstreams.iter().map(|upstream| &*upstream.name).collect();
        let example = quoted(names.first().unwrap_or(&"cluster"));
        let index = self.reader.string(field, "the name of an upstream", &example).and_then(|text| {
            let index = names.iter().position(|name| *name == text);
            if index.is_none() {
                let define = format!("define it: `[upstreams.{text}]` with `targets = [\"host:port\"]`");
                let remedy = match suggest(text, &names) {
                    Some(name) => format!("did you mean \"{name}\"?"),
                    None if Target::parse(text, 0..0).is_ok() => {
                        "name an upstream here, and give it the target: `[upstreams.NAME]` with `targets`".into()
                    }
                    None if names.is_empty() => define,
                    None => format!("{define}, or name one of {}", names.join(", ")),
                };
                self.reader.absent(field.span(), format!("there is no upstream {}", quoted(text)), remedy);
            }
            index
        });
        index.unwrap_or(NOWHERE)
    }

    fn routes(&mut self, root: &Section<'_>, listeners: &[Listener], upstreams: &[Upstream]) -> Vec<Route> {
        let Some(field) = root.get("routes") else { return Vec::new() };
        let sections = self.reader.sections(field, keys::ROUTE);
        sections.iter().map(|section| self.route(section, listeners, upstreams)).collect()
    }

    fn route(&mut self, section: &Section<'_>, listeners: &[Listener], upstreams: &[Upstream]) -> Route {
        let (name, hosts) = self.hosts(section);
        let upstream = if let Some(field) = section.get("upstream") {
            self.upstream_index(field, upstreams)
        } else {
            self.reader.missing(section, "upstream", &quoted(upstreams.first().map_or("cluster", |u| &u.name)));
            NOWHERE
        };
        Route {
            name,
            hosts,
            alpn: section.get("alpn").map(|field| self.alpn(field)).unwrap_or_default(),
            listeners: section.get("listeners").map(|field| self.route_listeners(field, listeners)).unwrap_or_default(),
            upstream,
        }
    }

    fn hosts(&mut self, section: &Section<'_>) -> (Arc<str>, Vec<HostPattern>) {
        const EXAMPLE: &str = "\"blog.example.com\"";
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
                if let Some(host) = self.reader.accept(span.clone(), HostPattern::parse(text)) {
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
        for (span, text) in self.reader.strings(field, "a protocol", "\"h2\"") {
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
                    let remedy = match suggest(text, &names) {
                        Some(name) => format!("did you mean \"{name}\"?"),
                        None => format!("the listeners are {}", names.join(", ")),
                    };
                    self.reader.absent(span, format!("there is no listener {}", quoted(text)), remedy);
                    // Else the route would seem to be on every listener.
                    indices.push(NOWHERE);
                }
            }
        }
        indices
    }

    fn limits(&mut self, root: &Section<'_>) -> Limits {
        let mut limits = Limits::default();
        let Some(section) =
            root.get("limits").and_then(|field| self.reader.section(field, "[limits]".into(), keys::LIMITS))
        else {
            return limits;
        };
        let reader = &mut self.reader;
        let durations: [(&str, &mut Duration, &RangeInclusive<Duration>); 4] = [
            ("hello_timeout", &mut limits.hello_timeout, &DEADLINE),
            ("idle_timeout", &mut limits.idle_timeout, &IDLE),
            ("dead_peer_timeout", &mut limits.dead_peer_timeout, &DEAD_PEER),
            ("drain_timeout", &mut limits.drain_timeout, &DRAIN),
        ];
        for (key, limit, range) in durations {
            if let Some(duration) = section.get(key).and_then(|field| reader.duration(field, range)) {
                *limit = duration;
            }
        }
        let size = |reader: &mut Reader, key, range| section.get(key).and_then(|field| reader.size(field, &range));
        if let Some(bytes) = size(reader, "hello_max_bytes", HELLO_BYTES) {
            limits.hello_max_bytes = bytes as usize;
        }
        if let Some(bytes) = size(reader, "kernel_memory", KERNEL_MEMORY) {
            limits.kernel_memory = bytes;
        }
        let count = |reader: &mut Reader, key| {
            section.get(key).and_then(|field| reader.integer(field, &(0..=u64::from(u32::MAX)), "10000"))
        };
        if let Some(most) = count(reader, "max_connections") {
            limits.max_connections = most as usize;
        }
        if let Some(most) = count(reader, "max_connections_per_client") {
            limits.max_connections_per_client = most as u32;
        }
        limits
    }

    fn admin(&mut self, root: &Section<'_>) -> Admin {
        let mut admin = Admin {
            bind: Bind { addr: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9443), span: 0..0 },
            socket: PathBuf::from(super::DEFAULT_SOCKET),
        };
        let Some(section) =
            root.get("admin").and_then(|field| self.reader.section(field, "[admin]".into(), keys::ADMIN))
        else {
            return admin;
        };
        let reader = &mut self.reader;
        if let Some(field) = section.get("bind")
            && let Some(text) = reader.string(field, "an address", "\"127.0.0.1:9443\"")
            && let Some(addr) = reader.accept(field.span(), parse_bind(text))
        {
            if addr.ip().is_unspecified() {
                reader.warning(
                    field.span(),
                    "metrics, with the names of listeners, hosts and targets, are open to everybody who reaches this machine",
                    format!("bind to a private address, such as \"127.0.0.1:{}\" or that of the tailnet", addr.port()),
                );
            }
            admin.bind = Bind { addr, span: field.span() };
        }
        if let Some(field) = section.get("socket")
            && let Some(text) = reader.string(field, "a path", "\"/run/dataplane/admin.sock\"")
        {
            if !text.starts_with('/') || text.ends_with('/') || text.contains('\0') {
                reader.error(
                    field.span(),
                    format!("{} is not the absolute path of a socket", quoted(text)),
                    "write a path from the root: \"/run/dataplane/admin.sock\"",
                );
            } else if text.len() > LONGEST_SOCKET_PATH {
                reader.error(
                    field.span(),
                    format!(
                        "the path of a unix socket has at most {LONGEST_SOCKET_PATH} bytes, this has {}",
                        text.len()
                    ),
                    "choose a shorter path",
                );
            }
            admin.socket = PathBuf::from(text);
        }
        admin
    }
}
