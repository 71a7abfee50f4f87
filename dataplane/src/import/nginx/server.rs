//! One `server` block of nginx.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::time::Duration;

use ipnet::IpNet;

use super::super::syntax::{Directive, Place, named};
use super::access::{Access, mapped, network};
use super::names::Written;
use super::notes::Notes;

/// Ports of one `listen`.
const MOST_PORTS: u16 = 1024;

/// What nginx does when nothing is written (src/stream/ngx_stream_proxy_module.c).
const PROXY_TIMEOUT: Duration = Duration::from_secs(600);
/// The same (src/stream/ngx_stream_core_module.c).
pub const PREREAD_TIMEOUT: Duration = Duration::from_secs(30);

/// What has no counterpart and needs none: it is so in any case, or belongs to how nginx works.
const NEEDLESS: &[&str] = &[
    "access_log",
    "error_log",
    "log_format",
    "open_log_file_cache",
    "proxy_buffer_size",
    "preread_buffer_size",
    "tcp_nodelay",
    "proxy_socket_keepalive",
    "proxy_half_close",
    "proxy_next_upstream",
    "proxy_next_upstream_tries",
    "proxy_next_upstream_timeout",
    "resolver_timeout",
    "server_names_hash_max_size",
    "server_names_hash_bucket_size",
    "variables_hash_max_size",
    "variables_hash_bucket_size",
    "map_hash_max_size",
    "map_hash_bucket_size",
    "limit_conn_log_level",
    "limit_conn_zone",
    "proxy_requests",
    "proxy_responses",
    "status_zone",
    "proxy_protocol_timeout",
    "proxy_socket_rcvbuf",
    "proxy_socket_sndbuf",
    "limit_conn_dry_run",
    "limit_conn_status",
];

/// What is read elsewhere.
const READ: &[&str] = &[
    "listen",
    "server_name",
    "proxy_pass",
    "proxy_protocol",
    "proxy_ssl",
    "proxy_connect_timeout",
    "proxy_timeout",
    "preread_timeout",
    "ssl_preread",
    "allow",
    "deny",
    "set_real_ip_from",
    "resolver",
    "include",
];

/// What a server does with a connection in place of `proxy_pass`, once it was chosen.
const CONTENT: &[&str] = &["return", "pass"];

/// What has no counterpart and lets nobody in who would be refused, and what to do.
const LOST: &[(&str, &str)] = &[
    ("limit_conn", "connections are limited for all listeners together: `max_connections_per_client` in [limits]"),
    ("proxy_download_rate", "rates have no limit here; tc(8) can limit them"),
    ("proxy_upload_rate", "rates have no limit here; tc(8) can limit them"),
    ("proxy_bind", "targets see an address of this machine; `send_proxy` tells them the client's"),
    ("health_check", "write `health = {}` in the upstreams"),
];

/// Says of a directive that it is not carried over. False: what it does is not known.
pub fn leave(directive: &Directive, notes: &mut Notes) -> bool {
    let name = &*directive.name;
    if READ.contains(&name) {
        return true;
    }
    let lost = LOST.iter().find(|(known, _)| *known == name);
    let is_off = directive.words.first().is_some_and(|word| word == "0" || word.eq_ignore_ascii_case("off"));
    // Of what terminates TLS the `ssl` of `listen` and `proxy_ssl` decide.
    let is_of_tls = name.starts_with("ssl_") || name.starts_with("proxy_ssl_");
    if NEEDLESS.contains(&name) || is_of_tls || (lost.is_some() && is_off) {
        notes.needless(directive);
    } else if let Some((_, why)) = lost {
        notes.lost(&directive.place, format!("{} is not carried over: {why}", named(name)));
    } else {
        return false;
    }
    true
}

/// The directives of the `stream` block beside its blocks, by [`topic`].
#[derive(Default)]
pub struct Settings<'a> {
    by_topic: HashMap<&'a str, Vec<&'a Directive>>,
}

/// Its name, or for those of which the order counts a name in common.
fn topic(directive: &Directive) -> &str {
    match &*directive.name {
        "allow" | "deny" => ACCESS,
        name => name,
    }
}

const ACCESS: &str = "allow, deny";

impl<'a> Settings<'a> {
    /// Those among the directives of a `stream` block.
    pub fn new(stream: &[&'a Directive]) -> Self {
        let mut settings = Self::default();
        for directive in stream.iter().filter(|d| d.block.is_none()) {
            settings.by_topic.entry(topic(directive)).or_default().push(directive);
        }
        settings
    }

    /// Those of a server, else those that stand for all servers.
    fn of(&self, server: &'a Directive, wanted: &str) -> Vec<&'a Directive> {
        let own: Vec<&Directive> = server.inside().iter().filter(|d| topic(d) == wanted).collect();
        if own.is_empty() { self.of_all(wanted).to_vec() } else { own }
    }

    /// Those that stand for all servers.
    pub fn of_all(&self, wanted: &str) -> &[&'a Directive] {
        self.by_topic.get(wanted).map_or(&[], Vec::as_slice)
    }

    fn one(&self, server: &'a Directive, wanted: &str) -> Option<&'a Directive> {
        let own = server.inside().iter().rfind(|d| topic(d) == wanted);
        own.or_else(|| self.of_all(wanted).last().copied())
    }

    fn is_on(&self, server: &'a Directive, name: &str) -> bool {
        self.one(server, name).is_some_and(|d| d.words.first().is_some_and(|word| word.eq_ignore_ascii_case("on")))
    }
}

/// An address of a `listen`.
pub struct Listen<'a> {
    pub addr: SocketAddr,
    pub is_default: bool,
    pub directive: &'a Directive,
}

impl Listen<'_> {
    /// Whether it has an option.
    pub fn has(&self, option: &str) -> bool {
        self.directive.words.iter().any(|word| word == option)
    }
}

/// Who is let in, and who is believed about it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Guard {
    /// Whose PROXY headers are believed.
    pub trusted: Vec<IpNet>,
    pub access: Access,
}

/// What is not known of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unknown {
    /// The content of a file that it includes.
    File,
    /// The meaning of one of its directives.
    Directive,
}

/// One server.
pub struct Server<'a> {
    pub place: &'a Place,
    pub listens: Vec<Listen<'a>>,
    /// What is written in `server_name`, and where.
    pub names: Vec<(Written, &'a Place)>,
    /// `proxy_pass`, unless the server cannot be carried over; then that was told.
    pub pass: Option<&'a Directive>,
    pub send_proxy: bool,
    pub connect_timeout: Option<Duration>,
    pub idle_timeout: Duration,
    /// Where `proxy_timeout` is written.
    pub idle_place: Option<&'a Place>,
    pub preread: bool,
    pub preread_timeout: Option<Duration>,
    /// Why its rules cannot be kept, where that is so.
    pub guard: Result<Guard, (Place, String)>,
    pub resolvers: Vec<&'a Directive>,
    /// What is not known of it and may decide who is let in.
    pub unknown: Option<Unknown>,
    /// Ports of addresses that are names, which are not looked up here.
    pub unknown_hosts: Vec<u16>,
}

impl<'a> Server<'a> {
    /// Reads a block, with what stands for all servers.
    pub fn read(block: &'a Directive, settings: &Settings<'a>, notes: &mut Notes) -> Self {
        let unknown: Vec<&Directive> = block.inside().iter().filter(|directive| !leave(directive, notes)).collect();
        // One that guards counts more than one that only ends the connection.
        let unknown = unknown.iter().copied().find(|d| !CONTENT.contains(&&*d.name)).or(unknown.first().copied());
        let mut server = Self {
            place: &block.place,
            listens: Vec::new(),
            names: Vec::new(),
            pass: None,
            send_proxy: settings.is_on(block, "proxy_protocol"),
            connect_timeout: duration(settings.one(block, "proxy_connect_timeout"), notes),
            idle_timeout: PROXY_TIMEOUT,
            idle_place: None,
            preread: settings.is_on(block, "ssl_preread"),
            preread_timeout: duration(settings.one(block, "preread_timeout"), notes),
            guard: guard(block, settings),
            resolvers: settings.of(block, "resolver"),
            unknown: match unknown {
                _ if block.inside().iter().any(Directive::is_missing_file) => Some(Unknown::File),
                Some(directive) if !CONTENT.contains(&&*directive.name) => Some(Unknown::Directive),
                _ => None,
            },
            unknown_hosts: Vec::new(),
        };
        if let Some(directive) = settings.one(block, "proxy_timeout")
            && let Some(idle) = duration(Some(directive), notes)
        {
            server.idle_timeout = idle;
            server.idle_place = Some(&directive.place);
        }
        let tls = settings.one(block, "proxy_ssl").filter(|_| settings.is_on(block, "proxy_ssl"));
        let pass = block.inside().iter().find(|d| d.name == "proxy_pass");
        if let Some(tls) = tls {
            notes.lost(
                &tls.place,
                "servers with `proxy_ssl on` are not carried over: they speak TLS to the upstream, and here the same bytes would go there in the clear",
            );
        } else if let Some(unknown) = unknown {
            let what = named(&unknown.name);
            let message = format!(
                "this server is not carried over: {what} has no counterpart, and may decide who is let in or where to"
            );
            notes.lost(&unknown.place, message);
        } else if pass.is_none() {
            notes.lost(&block.place, "this server is not carried over: it has no `proxy_pass`");
        } else {
            server.pass = pass;
        }
        server.listen(block, notes);
        server.read_names(block, notes);
        server
    }

    fn listen(&mut self, block: &'a Directive, notes: &mut Notes) {
        for directive in block.inside().iter().filter(|d| d.name == "listen") {
            let has = |option: &str| directive.words.iter().any(|word| word == option);
            if has("udp") {
                notes.lost(
                    &directive.place,
                    format!("`listen {}` is not carried over: only TCP is forwarded", directive.text()),
                );
                continue;
            }
            if directive.words.first().is_some_and(|address| address.starts_with("localhost:")) {
                let message = "`localhost` is carried over as 127.0.0.1; nginx has ::1 as well, if the name has it";
                notes.changed(&directive.place, message);
            }
            match addresses(&directive.words) {
                Ok(addresses) => {
                    for addr in addresses {
                        if self.listens.iter().all(|listen| listen.addr != addr) {
                            let is_default = has("default_server") || has("default");
                            self.listens.push(Listen { addr, is_default, directive });
                        }
                    }
                }
                Err(why) => {
                    let ports = directive.words.first().and_then(|address| Some(address.rsplit_once(':')?.1));
                    self.unknown_hosts.extend(ports.and_then(ports_of).into_iter().flatten());
                    notes.lost(&directive.place, format!("`listen {}` is not carried over: {why}", directive.text()));
                }
            }
        }
        if !block.inside().iter().any(|d| d.name == "listen") {
            notes.lost(&block.place, "this server is not carried over: it listens nowhere");
        }
    }

    fn read_names(&mut self, block: &'a Directive, notes: &mut Notes) {
        for directive in block.inside().iter().filter(|d| d.name == "server_name") {
            for word in &directive.words {
                if !word.starts_with('~') && word.contains('$') {
                    let message = format!(
                        "`{word}` is not carried over: it is not known here which name that is; other names that are not listed are refused"
                    );
                    notes.lost(&directive.place, message);
                    self.names.push((Written::Unknown, &directive.place));
                    continue;
                }
                let written = Written::read(word, true);
                if let Written::Never(why) = written {
                    notes.changed(&directive.place, format!("`{word}` is not carried over: {why}"));
                }
                self.names.push((written, &directive.place));
            }
        }
    }
}

/// The rules of a server about clients.
fn guard(block: &Directive, settings: &Settings<'_>) -> Result<Guard, (Place, String)> {
    let mut guard = Guard { trusted: Vec::new(), access: Access::default() };
    for rule in settings.of(block, ACCESS) {
        if !guard.access.add(rule.name == "allow", &rule.text()) {
            return Err((rule.place.clone(), format!("`{} {}` is no network", rule.name, rule.text())));
        }
    }
    if guard.access.lists().is_none() {
        let place = settings.of(block, ACCESS).last().map_or(&block.place, |rule| &rule.place);
        return Err((place.clone(), "the order of `allow` and `deny` makes too many networks".into()));
    }
    for from in settings.of(block, "set_real_ip_from") {
        let text = from.text();
        match network(&text) {
            // No peer is in it for nginx, and here it would be a network of IPv4.
            Some(network) if mapped(&network).is_some() => {}
            Some(network) => guard.trusted.push(network),
            None if text == "unix:" => {}
            None => return Err((from.place.clone(), format!("`set_real_ip_from {text}` is no network"))),
        }
    }
    Ok(guard)
}

/// A port, or a range of ports.
fn ports_of(text: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0 && !text.starts_with('+'));
    let (first, last) = (port(first)?, port(last)?);
    (first <= last && last - first < MOST_PORTS).then_some(first..=last)
}

/// The addresses of a `listen`.
fn addresses(words: &[String]) -> Result<Vec<SocketAddr>, String> {
    let address = words.first().ok_or("it has no address")?;
    if address.starts_with("unix:") {
        return Err("it is no TCP port".into());
    }
    let (host, ports) = address.rsplit_once(':').unwrap_or(("*", address));
    let Some(ports) = ports_of(ports) else {
        return Err(format!("it is no address with a port, or with a range of at most {MOST_PORTS}"));
    };
    let ip: IpAddr = match host {
        "*" => Ipv4Addr::UNSPECIFIED.into(),
        "localhost" => Ipv4Addr::LOCALHOST.into(),
        _ => {
            let v6 = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
            let ip = v6.map_or_else(
                || host.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
                |ip| ip.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
            );
            ip.ok_or("a name is not looked up here; write its address")?
        }
    };
    Ok(ports.map(|port| SocketAddr::new(ip, port)).collect())
}

/// The duration of a directive. A text that is none is told.
fn duration(directive: Option<&Directive>, notes: &mut Notes) -> Option<Duration> {
    let directive = directive?;
    let text = directive.text();
    let duration = parse_duration(&text);
    if duration.is_none() {
        let message = format!("`{} {text}` is not carried over: it is no duration", directive.name);
        notes.lost(&directive.place, message);
    }
    duration
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
            "M" => 30 * 86_400_000,
            "y" => 365 * 86_400_000,
            _ => return None,
        };
        millis = millis.checked_add(number.checked_mul(factor)?)?;
        rest = after[unit..].trim_start();
    }
    Some(Duration::from_millis(millis))
}
