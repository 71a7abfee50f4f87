//! From text to [`Config`]: the keys, what each may hold, and what stands in when it is left out.
//!
//! A value that is wrong is reported and replaced by a placeholder, so that everything wrong with a file is said at once. No placeholder
//! gets out: a configuration with an error is not returned.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};
use toml::de::DeTable;

use super::check::Places;
use super::diagnostic::shown_part;
use super::keys;
use super::reader::{Field, Reader, Section, quoted, some_of};
use super::source::{File, Role};
use super::values::{format_duration, has_zone, link_local, parse_bind, parse_net};
use super::{
    Admin, Balance, Bind, Config, Diagnostic, EngineChoice, Fence, HealthCheck, HostPattern, Limits, Listener, Mode,
    OnDown, OnRemovedRoute, Repository, Resolver, Route, SendProxy, Source, Span, Tailnet, Target, TargetHost,
    Upstream, check, fence, syntax,
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
/// What is compared with each other has bounds, so that whoever may write the text cannot make the reading of it slow.
const MOST_LISTENERS: usize = 256;
const MOST_BINDS: usize = 1024;
const MOST_PROTOCOLS: usize = 32;
/// Names that are compared with a wrong one, and of which a few are shown.
const MOST_NAMES: usize = 200;
/// `sun_path` of unix(7), without the closing NUL.
const LONGEST_SOCKET_PATH: usize = 107;

/// Reads a whole configuration. Gives the warnings with it, or else everything that is wrong, warnings included, in the order of the files.
pub fn parse(source: Arc<Source>) -> Result<(Config, Vec<Diagnostic>), Vec<Diagnostic>> {
    parse_within(source, None)
}

/// As [`parse`], with another fence for the files of a repository than that of `[source]`.
pub fn parse_within(source: Arc<Source>, fence: Option<Fence>) -> Result<(Config, Vec<Diagnostic>), Vec<Diagnostic>> {
    let shared_from = source.repository_start();
    let mut parser = Parser { local: source.local_files().count(), shared_from, ..Parser::default() };
    source.findings.iter().for_each(|finding| parser.reader.push(finding.clone()));
    let (root, errors) = {
        let trees: Vec<_> =
            source.files().iter().map(|file| DeTable::parse_recoverable(&source.text[file.range.clone()])).collect();
        let roots = source.files().iter().zip(&trees);
        let roots: Vec<_> = roots.map(|(file, (tree, _))| parser.file(file, tree.get_ref())).collect();
        (parser.root(&roots), trees.into_iter().map(|(_, errors)| errors).collect::<Vec<_>>())
    };
    let Root {
        engine,
        listeners,
        upstreams,
        routes,
        limits,
        admin,
        resolver,
        tailnet,
        on_removed_route,
        watch,
        repository,
    } = root;
    let Parser { mut reader, places, .. } = parser;

    let hash = hash(&source);
    let is_of_repository = |span: &Span| span.start >= shared_from;
    let fence = fence.or_else(|| Some(repository.as_ref()?.fence.clone())).unwrap_or_default();
    let mut config = Config {
        engine,
        listeners,
        upstreams,
        routes,
        limits,
        admin,
        resolver,
        tailnet,
        on_removed_route,
        watch,
        repository,
        source,
        hash,
    };
    let conflicts = check::conflicts(&config, &places).into_iter();
    let violations = fence::violations(&config, &places, &fence, is_of_repository);
    conflicts.chain(violations).for_each(|found| reader.push_absence(found));
    fence::mark(&mut config, &places, &fence, is_of_repository);

    let Reader { diagnostics, absences, mut left_out, .. } = reader;
    let mut diagnostics = syntax::combine(&config.source, &errors, diagnostics, absences, &mut left_out);
    if !diagnostics.iter().any(Diagnostic::is_error) {
        diagnostics.extend(check::unused(&config, &places));
    }
    let diagnostics = shown_part(diagnostics, left_out);
    if diagnostics.iter().any(Diagnostic::is_error) { Err(diagnostics) } else { Ok((config, diagnostics)) }
}

/// Reads `[source]` alone: what it names has to be fetched before the whole can be read. Errors are those of this table, and of the file as TOML.
pub fn repository(source: &Source) -> Result<Option<Repository>, Vec<Diagnostic>> {
    let mut reader = Reader::default();
    let file = &source.files()[0];
    let (tree, errors) = DeTable::parse_recoverable(&source.text[file.range.clone()]);
    let root = reader.root(tree.get_ref(), TOP_LEVEL, file.range.start, keys::ROOT);
    let Some(field) = root.get("source") else { return Ok(None) };
    let mut reader = Reader::default();
    let repository = super::repository::read(&mut reader, field);
    let Reader { diagnostics, absences, mut left_out, .. } = reader;
    let diagnostics = syntax::combine(source, &[errors], diagnostics, absences, &mut left_out);
    let diagnostics = shown_part(diagnostics, left_out);
    if diagnostics.iter().any(Diagnostic::is_error) { Err(diagnostics) } else { Ok(repository) }
}

/// First 16 hex digits of the SHA-256 of the files that all entrance nodes share.
fn hash(source: &Source) -> String {
    let mut hasher = Sha256::new();
    source.shared_texts().for_each(|text| hasher.update(text));
    let first = hasher.finalize()[..8].iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
    format!("{first:016x}")
}

/// How messages call the root of the file that the user named.
const TOP_LEVEL: &str = "the top level";

#[derive(Default)]
struct Parser {
    reader: Reader,
    places: Places,
    /// Upstreams by name.
    upstreams: HashMap<Arc<str>, usize>,
    /// How many of the files, the first ones, lie on this machine.
    local: usize,
    /// Where the files of a repository begin.
    shared_from: usize,
    /// Addresses to listen on up to now.
    binds: usize,
}

/// Stands in for a reference that was reported as an error.
const NOWHERE: usize = usize::MAX;

/// What stands at the top level.
struct Root {
    engine: EngineChoice,
    listeners: Vec<Listener>,
    upstreams: Vec<Upstream>,
    routes: Vec<Route>,
    limits: Limits,
    admin: Admin,
    resolver: Resolver,
    tailnet: Tailnet,
    on_removed_route: OnRemovedRoute,
    watch: bool,
    repository: Option<Repository>,
}

impl Parser {
    /// The root table of one file.
    fn file<'t>(&mut self, file: &File, table: &'t DeTable<'t>) -> Section<'t> {
        let (name, keys) = match file.role {
            Role::Main => (TOP_LEVEL, keys::ROOT),
            Role::Included | Role::RepositoryIncluded => ("the top level of an included file", keys::INCLUDED),
            Role::Repository => ("the top level of the repository's file", keys::ROOT),
        };
        let root = self.reader.root(table, name, file.range.start, keys);
        if file.role.is_of_repository() {
            self.refuse_node_only(&root, keys::NODE_ONLY);
        }
        root
    }

    /// Reports what a repository has no business to say.
    fn refuse_node_only(&mut self, section: &Section<'_>, keys: &[&str]) {
        for (span, field) in section.entries() {
            if keys.contains(&field.key) {
                self.reader.error(
                    span,
                    format!("`{}` belongs to the node alone: a repository may not set it", field.key),
                    "move it into the node's own file, the one that the daemon is started with",
                );
            }
        }
    }

    fn root(&mut self, roots: &[Section<'_>]) -> Root {
        let own = &roots[..self.local];
        let engine = self.once(own, "engine").and_then(|field| {
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
        let on_removed_route = self.once(roots, "on_removed_route").and_then(|field| {
            self.reader.choice(field, &[("drain", OnRemovedRoute::Drain), ("close", OnRemovedRoute::Close)])
        });
        // Its patterns were looked at when the files were read.
        for field in roots.iter().filter_map(|root| root.get("include")) {
            self.reader.strings(field, "a file name or a pattern", "\"routes.d/*.toml\"");
        }
        let main = own.first();
        let watch = main.and_then(|main| main.get("watch")).and_then(|field| self.reader.boolean(field));
        let repository =
            main.and_then(|main| main.get("source")).and_then(|field| super::repository::read(&mut self.reader, field));
        let (tailnet, prefer_direct) = self.tailnet(own);
        let upstreams = self.upstreams(roots, prefer_direct);
        self.upstreams = upstreams.iter().enumerate().map(|(index, u)| (u.name.clone(), index)).collect();
        let listeners = self.listeners(roots, &upstreams);
        let routes = self.routes(roots, &listeners, &upstreams);
        Root {
            engine: engine.unwrap_or(EngineChoice::Auto),
            listeners,
            upstreams,
            routes,
            limits: self.limits(roots),
            admin: self.admin(own),
            resolver: self.resolver(own),
            tailnet,
            on_removed_route: on_removed_route.unwrap_or(OnRemovedRoute::Drain),
            watch: watch.unwrap_or(false),
            repository,
        }
    }

    /// The value of a key that only one of the files may have.
    fn once<'t>(&mut self, roots: &[Section<'t>], key: &str) -> Option<Field<'t>> {
        let mut fields = roots.iter().filter_map(|root| root.get(key));
        let first = fields.next()?;
        for again in fields {
            self.defined_twice(again.span(), &format!("`{key}`"), first.span());
        }
        Some(first)
    }

    fn defined_twice(&mut self, again: Span, what: &str, first: Span) {
        let message = format!("{what} is defined in another file already");
        let diagnostic = Diagnostic::error(again, message, "keep one of the two; all files are read as one");
        self.reader.push(diagnostic.note(first, "first defined here"));
    }

    /// The tables below `[listeners]` or `[upstreams]`, in the order of the files.
    fn named<'t>(&mut self, roots: &[Section<'t>], key: &str, keys: &[&str]) -> Vec<(Span, Arc<str>, Section<'t>)> {
        let mut sections = Vec::new();
        let mut seen: HashMap<&'t str, Span> = HashMap::new();
        for field in roots.iter().filter_map(|root| root.get(key)) {
            let Some(all) = self.reader.any_section(field, format!("[{key}.NAME]")) else { continue };
            for (span, field) in all.entries() {
                let name = field.key;
                if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')) {
                    self.reader.error(
                        span.clone(),
                        format!("{} is no name for one of `{key}`", quoted(name)),
                        "use letters, digits, `-`, `_` and `.`: names stand in metrics and log lines",
                    );
                }
                if let Some(first) = seen.get(name) {
                    self.defined_twice(span.clone(), &format!("[{key}.{name}]"), first.clone());
                } else {
                    seen.insert(name, span.clone());
                }
                if let Some(section) = self.reader.section(field, format!("[{key}.{name}]"), keys) {
                    sections.push((span, Arc::from(name), section));
                }
            }
        }
        sections
    }

    fn upstreams(&mut self, roots: &[Section<'_>], prefer_direct: bool) -> Vec<Upstream> {
        let mut upstreams = Vec::new();
        for (span, name, section) in self.named(roots, "upstreams", keys::UPSTREAM) {
            self.places.upstreams.push(span);
            upstreams.push(self.upstream(name, &section, prefer_direct));
        }
        upstreams
    }

    fn upstream(&mut self, name: Arc<str>, section: &Section<'_>, prefer_direct: bool) -> Upstream {
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
        let hedge_delay = section.get("hedge_delay").and_then(|field| reader.duration(field, &(Duration::ZERO..=HOUR)));
        let on_down = section
            .get("on_down")
            .and_then(|field| reader.choice(field, &[("keep", OnDown::Keep), ("reset", OnDown::Reset)]));
        let prefer_direct =
            section.get("prefer_direct").and_then(|field| reader.boolean(field)).unwrap_or(prefer_direct);
        let connect_timeout = connect_timeout.unwrap_or(Duration::from_secs(3));
        if let (Some(field), Some(delay)) = (section.get("hedge_delay"), hedge_delay)
            && delay >= connect_timeout
        {
            reader.warning(
                field.span(),
                format!(
                    "a second target is never dialled: `hedge_delay` is not shorter than `connect_timeout`, which is {}",
                    format_duration(connect_timeout)
                ),
                "write a shorter one, such as \"250ms\", or \"0s\" to say that it is meant",
            );
        }
        let health = self.health(section);
        Upstream {
            name,
            targets: self.targets(section),
            send_proxy: send_proxy.unwrap_or(SendProxy::Off),
            balance: balance.unwrap_or(Balance::LeastConnections),
            health,
            connect_timeout,
            max_connections_per_target: most.unwrap_or(0) as u32,
            hedge_delay: hedge_delay.unwrap_or(Duration::from_millis(250)),
            on_down: on_down.unwrap_or(OnDown::Keep),
            prefer_direct,
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
        let mut listed: HashMap<(TargetHost, u16), usize> = HashMap::new();
        for (span, text) in self.reader.strings(field, "a target", EXAMPLE) {
            let Some(target) = self.reader.accept(span.clone(), Target::parse(text, span)) else { continue };
            if let Some(first) = listed.get(&(target.host.clone(), target.port)) {
                let diagnostic = Diagnostic::error(
                    target.span.clone(),
                    format!("target `{text}` is listed twice"),
                    "remove one; a share of the connections cannot be given by repetition",
                );
                self.reader.push(diagnostic.note(targets[*first].span.clone(), "first listed here"));
            } else {
                listed.insert((target.host.clone(), target.port), targets.len());
                targets.push(target);
            }
        }
        targets
    }

    /// `health`: what is left out of it has a default; without it there is no check.
    fn health(&mut self, section: &Section<'_>) -> Option<HealthCheck> {
        let reader = &mut self.reader;
        let health = section.get("health").and_then(|field| reader.section(field, "`health`".into(), keys::HEALTH))?;
        let mut duration = |key| health.get(key).and_then(|field| reader.duration(field, &DEADLINE));
        let (interval, timeout) = (duration("interval"), duration("timeout"));
        let mut count = |key| health.get(key).and_then(|field| reader.integer(field, &(1..=1000), "2"));
        let (fall, rise) = (count("fall"), count("rise"));
        let tls = health.get("tls").and_then(|field| {
            let text = reader.string(field, "a host name", "\"blog.example.com\"")?;
            match reader.accept(field.span(), HostPattern::parse(text))? {
                HostPattern::Exact(name) => Some(name),
                HostPattern::Wildcard(_) | HostPattern::Any => {
                    let message = format!("a hello has one server name, not {}", quoted(text));
                    reader.error(field.span(), message, "write a host that the ingress serves: \"blog.example.com\"");
                    None
                }
            }
        });
        Some(HealthCheck {
            interval: interval.unwrap_or(Duration::from_secs(5)),
            timeout: timeout.unwrap_or(Duration::from_secs(2)),
            fall: fall.unwrap_or(2) as u32,
            rise: rise.unwrap_or(2) as u32,
            tls,
        })
    }

    fn listeners(&mut self, roots: &[Section<'_>], upstreams: &[Upstream]) -> Vec<Listener> {
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

    fn upstream_index(&mut self, field: Field<'_>, upstreams: &[Upstream]) -> usize {
        let example = quoted(upstreams.first().map_or("cluster", |upstream| &upstream.name));
        let index = self.reader.string(field, "the name of an upstream", &example).and_then(|text| {
            let index = self.upstreams.get(text).copied();
            if index.is_none() {
                let few = upstreams.iter().take(MOST_NAMES);
                let names: Vec<&str> = few.map(|upstream| &*upstream.name).collect();
                let define = format!("define it: `[upstreams.{text}]` with `targets = [\"host:port\"]`");
                let remedy = match self.reader.suggest(text, &names) {
                    Some(name) => format!("did you mean \"{name}\"?"),
                    None if Target::parse(text, 0..0).is_ok() => {
                        "name an upstream here, and give it the target: `[upstreams.NAME]` with `targets`".into()
                    }
                    None if names.is_empty() => define,
                    None => format!("{define}, or name one of {}", some_of(&names)),
                };
                self.reader.absent(field.span(), format!("there is no upstream {}", quoted(text)), remedy);
            }
            index
        });
        index.unwrap_or(NOWHERE)
    }

    fn routes(&mut self, roots: &[Section<'_>], listeners: &[Listener], upstreams: &[Upstream]) -> Vec<Route> {
        let fields = roots.iter().filter_map(|root| root.get("routes"));
        let sections: Vec<_> = fields.flat_map(|field| self.reader.sections(field, keys::ROUTE)).collect();
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

    /// Those of the repository, and then the node's own, which stand in their place.
    fn limits(&mut self, roots: &[Section<'_>]) -> Limits {
        let (own, shared) = roots.split_at(self.local);
        let limits = self.limits_of(shared, Limits::default());
        self.limits_of(own, limits)
    }

    fn limits_of(&mut self, roots: &[Section<'_>], mut limits: Limits) -> Limits {
        let Some(section) =
            self.once(roots, "limits").and_then(|field| self.reader.section(field, "[limits]".into(), keys::LIMITS))
        else {
            return limits;
        };
        if section.span.start >= self.shared_from {
            self.refuse_node_only(&section, keys::NODE_ONLY_LIMITS);
        }
        let reader = &mut self.reader;
        let durations: [(&str, &mut Duration, &RangeInclusive<Duration>); 5] = [
            ("hello_timeout", &mut limits.hello_timeout, &DEADLINE),
            ("idle_timeout", &mut limits.idle_timeout, &IDLE),
            ("half_closed_timeout", &mut limits.half_closed_timeout, &IDLE),
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

    fn resolver(&mut self, roots: &[Section<'_>]) -> Resolver {
        let mut servers = Vec::new();
        let section = self
            .once(roots, "resolver")
            .and_then(|field| self.reader.section(field, "[resolver]".into(), keys::RESOLVER));
        if let Some(field) = section.and_then(|section| section.get("servers")) {
            if field.is_empty_list() {
                let remedy = "remove it to ask the system's, or name one: `servers = [\"100.100.100.100\"]`";
                self.reader.error(field.span(), "`servers` is empty: no name could be resolved", remedy);
            }
            for (span, text) in self.reader.strings(field, "the address of a DNS server", "\"100.100.100.100\"") {
                let server = text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, 53)).or_else(|_| text.parse());
                let is_link_local =
                    |server: &SocketAddr| matches!(server.ip(), IpAddr::V6(ip) if ip.is_unicast_link_local());
                match server {
                    _ if has_zone(text) => { let _: Option<()> = self.reader.accept(span, Err(link_local(text))); },
                    Ok(server) if is_link_local(&server) => {
                        { let _: Option<()> = self.reader.accept(span, Err(link_local(text))); };
                    }
                    Ok(server) => servers.push(server),
                    Err(_) => self.reader.error(
                        span,
                        format!("{} is not the address of a DNS server", quoted(text)),
                        "write an address, with a port where that is not 53: \"100.100.100.100\", \"127.0.0.1:5353\", \"[::1]:5353\"",
                    ),
                }
            }
        }
        Resolver { servers }
    }

    /// `[tailnet]`, and what its `prefer_direct` says for upstreams that say nothing.
    fn tailnet(&mut self, roots: &[Section<'_>]) -> (Tailnet, bool) {
        let mut tailnet = Tailnet { socket: PathBuf::from(super::DEFAULT_TAILSCALED) };
        let Some(section) =
            self.once(roots, "tailnet").and_then(|field| self.reader.section(field, "[tailnet]".into(), keys::TAILNET))
        else {
            return (tailnet, true);
        };
        if let Some(field) = section.get("socket")
            && let Some(path) = self.socket_path(field, super::DEFAULT_TAILSCALED)
        {
            tailnet.socket = path;
        }
        let prefer_direct = section.get("prefer_direct").and_then(|field| self.reader.boolean(field));
        (tailnet, prefer_direct.unwrap_or(true))
    }

    fn admin(&mut self, roots: &[Section<'_>]) -> Admin {
        let mut admin = Admin {
            bind: Bind { addr: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9443), span: 0..0 },
            socket: PathBuf::from(super::DEFAULT_SOCKET),
        };
        let Some(section) =
            self.once(roots, "admin").and_then(|field| self.reader.section(field, "[admin]".into(), keys::ADMIN))
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
            && let Some(path) = self.socket_path(field, super::DEFAULT_SOCKET)
        {
            admin.socket = path;
        }
        admin
    }

    fn socket_path(&mut self, field: Field<'_>, example: &str) -> Option<PathBuf> {
        let text = self.reader.string(field, "a path", &quoted(example))?;
        if !text.starts_with('/') || text.ends_with('/') || text.contains('\0') {
            self.reader.error(
                field.span(),
                format!("{} is not the absolute path of a socket", quoted(text)),
                format!("write a path from the root: {}", quoted(example)),
            );
            return None;
        }
        if text.len() > LONGEST_SOCKET_PATH {
            let message =
                format!("the path of a unix socket has at most {LONGEST_SOCKET_PATH} bytes, this has {}", text.len());
            self.reader.error(field.span(), message, "choose a shorter path");
            return None;
        }
        Some(PathBuf::from(text))
    }
}
