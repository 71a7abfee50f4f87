//! The configuration: what the owner wrote, checked, in the form that the rest of the program uses.
//!
//! A [`Config`] exists only after it has validated as a whole: every name in it refers to something, every address parses.
//! This module must not open a socket, resolve a name or look at the running daemon.

mod check;
mod diagnostic;
pub mod host;
mod keys;
mod load;
mod parse;
mod reader;
mod routing_table;
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
pub use diagnostic::{Diagnostic, Severity};
pub use load::{LoadError, load};
pub use parse::parse;
pub use routing_table::routing_table;
pub use values::{Refused, format_duration, format_size};

/// What `dataplane init` prints.
pub const STARTER: &str = include_str!("starter.toml");

/// Where the configuration lies when `--config` does not say otherwise.
pub const DEFAULT_PATH: &str = "/etc/dataplane/dataplane.toml";

/// Where the control socket lies when `admin.socket` does not say otherwise.
pub const DEFAULT_SOCKET: &str = "/run/dataplane/admin.sock";

/// A whole, valid configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// The engine that was asked for; what runs may differ, see `engine::Effective`.
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
    /// The file that it came from.
    pub source: Arc<Source>,
    /// First 16 hex digits of the SHA-256 of the file's bytes: equal on entrance nodes that run the same file.
    pub hash: String,
}

/// The text that a configuration was read from; diagnostics quote it.
#[derive(Debug, Clone)]
pub struct Source {
    /// As given by the user.
    pub path: PathBuf,
    /// The whole file.
    pub text: String,
}

/// A byte range in [`Source::text`].
pub type Span = std::ops::Range<usize>;

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

/// One address to listen on.
#[derive(Debug, Clone)]
pub struct Bind {
    /// IPv6 sockets are IPv6 only.
    pub addr: SocketAddr,
    /// Where the file says so.
    pub span: Span,
}

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
    /// By the Host of an HTTP/1 request: ACME challenges go to this port of the route's upstream, the rest is sent to https.
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
    /// For one target, before the next is tried.
    pub connect_timeout: Duration,
    /// 0: no limit.
    pub max_connections_per_target: u32,
}

/// `host:port` of a target. Equal when written alike, wherever it stands.
#[derive(Debug, Clone)]
pub struct Target {
    /// As written: label of metrics, argument of `drain`.
    pub text: Arc<str>,
    /// Address or name.
    pub host: TargetHost,
    /// TCP port.
    pub port: u16,
    /// Where the file says so.
    pub span: Span,
}

impl PartialEq for Target {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Target {}

/// The host part of a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetHost {
    /// A literal address.
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
    /// Index into [`Config::upstreams`].
    pub upstream: usize,
}

/// A host of a route, as A-labels, lower case, without trailing dot.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
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
