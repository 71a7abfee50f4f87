//! `[limits]`, `[resolver]`, `[tailnet]` and `[admin]`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use super::{DEADLINE, IDLE, Parser, SECOND};
use crate::config::reader::{Field, Reader, Section, quoted};
use crate::config::values::{has_zone, link_local, parse_bind};
use crate::config::{Admin, Bind, DEFAULT_SOCKET, DEFAULT_TAILSCALED, Limits, Resolver, Tailnet, keys};

/// The kernel counts keepalive in whole seconds, up to 32767 (include/net/tcp.h, MAX_TCP_KEEPIDLE).
const DEAD_PEER: RangeInclusive<Duration> = SECOND..=Duration::from_secs(9 * 3600);
const DRAIN: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(24 * 3600);
/// No client says less than 512 bytes; four records of the largest size (RFC 8446 section 5.1) are
/// more than any client says.
const HELLO_BYTES: RangeInclusive<u64> = 512..=65536;
const KERNEL_MEMORY: RangeInclusive<u64> = 64 << 10..=1 << 40;
/// `sun_path` of unix(7), without the closing NUL.
const LONGEST_SOCKET_PATH: usize = 107;

impl Parser {
    /// Those of the repository, and then the node's own, which stand in their place.
    pub(super) fn limits(&mut self, roots: &[Section<'_>]) -> Limits {
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

    pub(super) fn resolver(&mut self, roots: &[Section<'_>]) -> Resolver {
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
    pub(super) fn tailnet(&mut self, roots: &[Section<'_>]) -> (Tailnet, bool) {
        let mut tailnet = Tailnet { socket: PathBuf::from(DEFAULT_TAILSCALED) };
        let Some(section) =
            self.once(roots, "tailnet").and_then(|field| self.reader.section(field, "[tailnet]".into(), keys::TAILNET))
        else {
            return (tailnet, true);
        };
        if let Some(field) = section.get("socket")
            && let Some(path) = self.socket_path(field, DEFAULT_TAILSCALED)
        {
            tailnet.socket = path;
        }
        let prefer_direct = section.get("prefer_direct").and_then(|field| self.reader.boolean(field));
        (tailnet, prefer_direct.unwrap_or(true))
    }

    pub(super) fn admin(&mut self, roots: &[Section<'_>]) -> Admin {
        let mut admin = Admin {
            bind: Bind { addr: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9443), span: 0..0 },
            socket: PathBuf::from(DEFAULT_SOCKET),
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
            && let Some(path) = self.socket_path(field, DEFAULT_SOCKET)
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
