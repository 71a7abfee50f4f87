//! The keys of each table. Knows nothing of what they may hold.

pub const ROOT: &[&str] = &[
    "engine",
    "listeners",
    "upstreams",
    "routes",
    "limits",
    "admin",
    "resolver",
    "tailnet",
    "on_removed_route",
    "include",
    "watch",
    "source",
];
/// Of a file that another one includes.
pub const INCLUDED: &[&str] =
    &["engine", "listeners", "upstreams", "routes", "limits", "admin", "resolver", "tailnet", "on_removed_route"];
/// What a node alone decides: no file of a repository may have them.
pub const NODE_ONLY: &[&str] = &["engine", "admin", "resolver", "tailnet", "watch", "source"];
/// The same of `[limits]`: what fits a machine depends on the machine.
pub const NODE_ONLY_LIMITS: &[&str] = &["max_connections", "kernel_memory"];
pub const LISTENER: &[&str] = &["bind", "mode", "upstream", "accept_proxy", "allow", "deny", "acme_port"];
pub const UPSTREAM: &[&str] = &[
    "targets",
    "send_proxy",
    "balance",
    "health",
    "connect_timeout",
    "max_connections_per_target",
    "hedge_delay",
    "on_down",
    "prefer_direct",
];
pub const HEALTH: &[&str] = &["interval", "timeout", "fall", "rise", "tls"];
pub const ROUTE: &[&str] = &["hosts", "upstream", "alpn", "listeners"];
pub const LIMITS: &[&str] = &[
    "hello_timeout",
    "hello_max_bytes",
    "idle_timeout",
    "half_closed_timeout",
    "dead_peer_timeout",
    "drain_timeout",
    "max_connections",
    "max_connections_per_client",
    "kernel_memory",
];
pub const ADMIN: &[&str] = &["bind", "socket"];
pub const RESOLVER: &[&str] = &["servers"];
pub const TAILNET: &[&str] = &["socket", "prefer_direct"];

pub const SOURCE: &[&str] = &[
    "git",
    "ref",
    "path",
    "interval",
    "token_file",
    "ssh_key_file",
    "known_hosts_file",
    "timeout",
    "max_size",
    "state_directory",
    "webhook",
    "allow_hosts",
    "allow_listeners",
    "allow_targets",
];
pub const WEBHOOK: &[&str] = &["bind", "secret_file"];

/// Where each key is at home, for those that stand in the wrong place.
pub const ALL: [(&str, &[&str]); 9] = [
    ("the top level", ROOT),
    ("[limits]", LIMITS),
    ("[admin]", ADMIN),
    ("[[routes]]", ROUTE),
    ("[upstreams.NAME]", UPSTREAM),
    ("[listeners.NAME]", LISTENER),
    ("[resolver]", RESOLVER),
    ("[tailnet]", TAILNET),
    ("[source]", SOURCE),
];
