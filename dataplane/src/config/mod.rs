//! The configuration: what the owner wrote, checked, in the form that the rest of the program uses.
//!
//! A [`Config`] exists only after it has validated as a whole: every name in it refers to
//! something, every address parses. This module must not open a socket, resolve a name or look at
//! the running daemon.

mod check;
mod diagnostic;
mod diff;
mod fence;
pub mod host;
mod keys;
mod load;
mod parse;
mod reader;
mod routing_table;
mod source;
mod syntax;
#[cfg(test)]
mod tests;
mod values;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

pub use check::own_listener_targets;
pub use diagnostic::{Diagnostic, Severity, redacted, shown};
pub use diff::{Change, diff};
pub use fence::{Fence, own_targets};
pub use keys::REFERENCE;
pub use load::{
    Files, LARGEST, LoadError, WILDCARDS, add_repository, glob, includes, is_pattern, read, read_repository,
};
pub use parse::{MOST_BINDS, MOST_LISTENERS, Repository, Webhook, at_source, parse, parse_within, repository};
pub use routing_table::routing_table;
pub use source::Source;
pub use values::{Refused, format_duration, format_size};

/// What `dataplane init` prints.
pub const STARTER: &str = include_str!("starter.toml");

/// Where the configuration lies when `--config` does not say otherwise.
pub const DEFAULT_PATH: &str = "/etc/dataplane/dataplane.toml";

/// Where the control socket lies when `admin.socket` does not say otherwise.
pub const DEFAULT_SOCKET: &str = "/run/dataplane/admin.sock";

/// Where tailscaled listens when `tailnet.socket` does not say otherwise. Nothing need be there.
pub const DEFAULT_TAILSCALED: &str = "/var/run/tailscale/tailscaled.sock";

/// A whole, valid configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// The engine that was asked for; what runs may differ, see `engine::Selection`.
    pub engine: EngineChoice,
    /// Listeners in the order of the file.
    pub listeners: Vec<Listener>,
    /// Upstreams in the order of the file.
    pub upstreams: Vec<Upstream>,
    /// Routes in the order of the file.
    pub routes: Vec<Route>,
    /// Limits and deadlines.
    pub limits: Limits,
    /// Metrics, health and the control socket.
    pub admin: Admin,
    /// Who is asked for the addresses of targets' names.
    pub resolver: Resolver,
    /// The tailscaled of this machine.
    pub tailnet: Tailnet,
    /// What becomes of the connections of a route that a reload removes.
    pub on_removed_route: OnRemovedRoute,
    /// Whether a change of the files is a reload.
    pub watch: bool,
    /// The repository that has the rest of the configuration.
    pub repository: Option<Repository>,
    /// The files that it came from.
    pub source: Arc<Source>,
    /// First 16 hex digits of the SHA-256 of the bytes of the repository's files, or of all files
    /// where there is no repository, one after the other: equal on entrance nodes that run the same
    /// files.
    pub hash: String,
}

impl Config {
    /// Of the repository, where it has one.
    pub fn webhook(&self) -> Option<&Webhook> {
        self.repository.as_ref()?.webhook.as_ref()
    }

    /// The ports of an upstream's targets that get challenges.
    pub fn challenge_ports(&self, upstream: usize) -> Vec<u16> {
        if !self.routes.iter().any(|route| route.upstream() == Some(upstream)) {
            return Vec::new();
        }
        let ports = self.listeners.iter().filter_map(|listener| match listener.mode {
            Mode::Http { acme_port } => Some(acme_port),
            _ => None,
        });
        let mut ports: Vec<u16> = ports.collect();
        ports.sort_unstable();
        ports.dedup();
        ports
    }
}

/// A byte range in [`Source::text`].
pub type Span = std::ops::Range<usize>;

/// `on_removed_route = "…"`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnRemovedRoute {
    /// They have `drain_timeout` to end.
    Drain,
    /// They are reset at once.
    Close,
}

impl OnRemovedRoute {
    /// As in the configuration.
    pub const WORDS: [(&str, Self); 2] = [("drain", Self::Drain), ("close", Self::Close)];
}

/// `engine = "…"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineChoice {
    /// The dataplane picks, per connection.
    Auto,
    /// Packet-level sequence translation.
    Translate,
    /// `sk_skb` redirection on a sockmap.
    Sockmap,
    /// splice(2) through pooled pipes.
    Splice,
    /// read and write through a buffer.
    Copy,
}

impl EngineChoice {
    /// As in the configuration.
    pub const WORDS: [(&str, Self); 5] = [
        ("auto", Self::Auto),
        ("translate", Self::Translate),
        ("sockmap", Self::Sockmap),
        ("splice", Self::Splice),
        ("copy", Self::Copy),
    ];
}

/// `[listeners.NAME]`
#[derive(Debug, Clone)]
pub struct Listener {
    /// The table's name: label of metrics and log lines.
    pub name: Arc<str>,
    /// At least one.
    pub bind: Vec<Bind>,
    /// What decides where a connection goes.
    pub mode: Mode,
    /// Peers that must send a PROXY header.
    pub accept_proxy: Vec<IpNet>,
    /// Client networks that may connect; empty: all.
    pub allow: Vec<IpNet>,
    /// Client networks that may not, looked at before `allow`.
    pub deny: Vec<IpNet>,
}

/// One address to listen on. Equal when the address is, wherever it stands.
#[derive(Debug, Clone)]
pub struct Bind {
    /// IPv6 sockets are IPv6 only.
    pub addr: SocketAddr,
    /// Where the file says so.
    pub span: Span,
}

impl PartialEq for Bind {
    fn eq(&self, other: &Self) -> bool {
        self.addr == other.addr
    }
}

impl Eq for Bind {}

/// How a listener finds the upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// By the server name of the ClientHello.
    Tls,
    /// Always this one (index into [`Config::upstreams`]).
    Tcp {
        /// Index into [`Config::upstreams`].
        upstream: usize,
    },
    /// By the Host of an HTTP/1 request: ACME challenges go to this port of the route's upstream,
    /// the rest is sent to https.
    Http {
        /// Instead of that of the targets.
        acme_port: u16,
    },
}

impl Mode {
    /// As in the configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tls => "tls",
            Self::Tcp { .. } => "tcp",
            Self::Http { .. } => "http",
        }
    }

    /// Whether routes are for listeners of this mode.
    pub const fn has_routes(self) -> bool {
        !matches!(self, Self::Tcp { .. })
    }
}

/// `[upstreams.NAME]`
#[derive(Debug, Clone)]
pub struct Upstream {
    /// The table's name.
    pub name: Arc<str>,
    /// At least one.
    pub targets: Vec<Target>,
    /// The PROXY protocol header to write first.
    pub send_proxy: SendProxy,
    /// How to choose among the targets.
    pub balance: Balance,
    /// What checks the targets beside the connections of clients; `None`: nothing does.
    pub health: Option<HealthCheck>,
    /// For one target to answer, and for a connection to wait for one that has room.
    pub connect_timeout: Duration,
    /// 0: no limit.
    pub max_connections_per_target: u32,
    /// After this time without an answer the next target is dialled beside the first; zero: only
    /// when the first has failed.
    pub hedge_delay: Duration,
    /// What becomes of the connections of a target that went down.
    pub on_down: OnDown,
    /// Targets that the tailnet reaches through a relay are used only when no other is up.
    pub prefer_direct: bool,
}

/// `health = { … }`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthCheck {
    /// From the start of one check to the next, give or take a tenth.
    pub interval: Duration,
    /// For a whole check.
    pub timeout: Duration,
    /// So many failures in a row: down.
    pub fall: u32,
    /// So many passes in a row: up again.
    pub rise: u32,
    /// The server name of a ClientHello that must be answered with a ServerHello; `None`: a TCP
    /// connection is enough.
    pub tls: Option<String>,
}

/// `on_down = "…"`
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OnDown {
    /// They are left to `dead_peer_timeout`.
    Keep,
    /// They are reset, so that clients connect anew.
    Reset,
}

impl OnDown {
    /// As in the configuration.
    pub const WORDS: [(&str, Self); 2] = [("keep", Self::Keep), ("reset", Self::Reset)];
}

/// `[resolver]`
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Resolver {
    /// Asked by UDP, and by TCP where needed; empty: those of the system.
    pub servers: Vec<SocketAddr>,
}

/// `[tailnet]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tailnet {
    /// tailscaled's socket.
    pub socket: PathBuf,
}

/// `host:port` of a target. Equal when written alike, wherever it stands.
#[derive(Debug, Clone)]
pub struct Target {
    /// As written: label of metrics, argument of `drain`.
    pub text: Arc<str>,
    pub host: TargetHost,
    pub port: u16,
    /// Where the file says so.
    pub span: Span,
    /// Where a repository decides upon it: what its name may lead to.
    pub fence: Option<Arc<Fence>>,
}

impl PartialEq for Target {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Target {}

/// The host part of a target.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum TargetHost {
    Ip(IpAddr),
    /// A name for the resolver.
    Name(String),
}

/// `send_proxy = "…"`
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SendProxy {
    /// No header.
    Off,
    /// The text header.
    V1,
    /// The binary header, with TLVs.
    V2,
}

impl SendProxy {
    /// As in the configuration.
    pub const WORDS: [(&str, Self); 3] = [("off", Self::Off), ("v1", Self::V1), ("v2", Self::V2)];
}

/// `balance = "…"`
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Balance {
    /// Fewest active connections.
    LeastConnections,
    /// In turn.
    RoundRobin,
    /// By the client's address: the same on every entrance node.
    Hash,
    /// The first that works, in the order of the file.
    First,
}

impl Balance {
    /// As in the configuration.
    pub const WORDS: [(&str, Self); 4] = [
        ("least-connections", Self::LeastConnections),
        ("round-robin", Self::RoundRobin),
        ("hash", Self::Hash),
        ("first", Self::First),
    ];
}

/// `[[routes]]`
#[derive(Debug, Clone)]
pub struct Route {
    /// The first host as written: label of metrics and log lines.
    pub name: Arc<str>,
    /// At least one.
    pub hosts: Vec<HostPattern>,
    /// Empty: any, also none.
    pub alpn: Vec<String>,
    /// Indices into [`Config::listeners`]; empty: all but those of mode `tcp`.
    pub listeners: Vec<usize>,
    /// What becomes of its connections.
    pub action: Action,
}

impl Route {
    /// Where it forwards to: an index into [`Config::upstreams`].
    pub const fn upstream(&self) -> Option<usize> {
        match self.action {
            Action::Forward { upstream } => Some(upstream),
            Action::Refuse => None,
        }
    }

    /// Whether it is for the listener of this index, if that has routes.
    pub fn is_for(&self, listener: usize) -> bool {
        self.listeners.is_empty() || self.listeners.contains(&listener)
    }
}

/// `action = "…"` and `upstream` of a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// They go to an upstream.
    Forward {
        /// Index into [`Config::upstreams`].
        upstream: usize,
    },
    /// They are refused as those of a name without a route, although a wider pattern has one.
    Refuse,
}

/// A host of a route, as A-labels, lower case, without trailing dot.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HostPattern {
    /// This name.
    Exact(String),
    /// One or more labels, then this suffix: `*.example.com` is kept as `example.com`.
    Wildcard(String),
    /// `*`: every name.
    Any,
}

/// `[limits]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// From accept to the last byte of the hello.
    pub hello_timeout: Duration,
    /// Bytes of a hello, TLS record headers included.
    pub hello_max_bytes: usize,
    /// No byte either way.
    pub idle_timeout: Duration,
    /// The same for a connection of which one side has sent its FIN.
    pub half_closed_timeout: Duration,
    /// A peer that vanished.
    pub dead_peer_timeout: Duration,
    /// How long a stopping daemon waits for its connections.
    pub drain_timeout: Duration,
    /// 0: from RLIMIT_NOFILE.
    pub max_connections: usize,
    /// 0: none. Counted per IPv4 address or IPv6 /64.
    pub max_connections_per_client: u32,
    /// Bytes queued inside the kernel on our behalf.
    pub kernel_memory: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            hello_timeout: Duration::from_secs(5),
            hello_max_bytes: 16384,
            idle_timeout: Duration::from_secs(3600),
            half_closed_timeout: Duration::from_secs(300),
            dead_peer_timeout: Duration::from_secs(60),
            drain_timeout: Duration::from_secs(30),
            max_connections: 0,
            max_connections_per_client: 0,
            kernel_memory: 64 << 20,
        }
    }
}

/// `[admin]`
#[derive(Debug, Clone)]
pub struct Admin {
    /// /metrics, /healthz, /readyz.
    pub bind: Bind,
    /// The control socket.
    pub socket: PathBuf,
}
