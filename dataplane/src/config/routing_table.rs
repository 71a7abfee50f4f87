//! The routing table as `dataplane check` prints it: what wins stands first.

use ipnet::IpNet;

use super::values::word;
use super::{Config, HostPattern, Listener, Mode, SendProxy, Upstream};

/// Every host with where it goes, in the order in which they are tried, then every listener with
/// whom it lets in, and where metrics are. Ends with a newline.
pub fn routing_table(config: &Config) -> String {
    let mut hosts: Vec<_> =
        config.routes.iter().flat_map(|route| route.hosts.iter().map(move |host| (host, route))).collect();
    hosts.sort_by_key(|(host, route)| {
        let order = match host {
            HostPattern::Exact(_) => (0, 0),
            HostPattern::Wildcard(suffix) => (1, usize::MAX - suffix.len()),
            HostPattern::Any => (2, 0),
        };
        // Of one host the routes with `alpn` come first.
        (order, (*host).to_string(), route.alpn.is_empty())
    });

    let mut rows = vec![["HOST", "LISTENERS", "ALPN", "UPSTREAM", "TARGETS", "PROXY"].map(String::from)];
    for (host, route) in &hosts {
        let listeners = config.listeners.iter().enumerate();
        let names = listeners.filter(|(index, listener)| listener.mode.has_routes() && route.is_for(*index));
        let names: Vec<&str> = names.map(|(_, listener)| &*listener.name).collect();
        let alpn = if route.alpn.is_empty() { "any".into() } else { route.alpn.join(",") };
        let [name, targets, proxy] = match route.upstream() {
            Some(upstream) => describe(&config.upstreams[upstream]),
            None => ["refused", "", ""].map(String::from),
        };
        rows.push([host.to_string(), names.join(","), alpn, name, targets, proxy]);
    }
    let mut text = if hosts.is_empty() { String::new() } else { aligned(&rows) };
    let everything = |index: usize| {
        let mut any = hosts.iter().filter(|(host, route)| **host == HostPattern::Any && route.alpn.is_empty());
        any.any(|(_, route)| route.is_for(index))
    };
    let refusing = config.listeners.iter().enumerate().any(|(index, l)| l.mode.has_routes() && !everything(index));
    if refusing {
        text += "Every other server name is refused.\n";
    }

    for listener in &config.listeners {
        if let Mode::Http { acme_port } = listener.mode {
            text += &format!(
                "Listener {} speaks HTTP: ACME challenges go to port {acme_port} of these targets, the rest is sent to https.\n",
                listener.name
            );
        }
    }

    let mut rows = vec![
        ["LISTENER", "MODE", "BIND", "DENY", "ALLOW", "ACCEPT_PROXY", "UPSTREAM", "TARGETS", "PROXY"].map(String::from),
    ];
    for listener in &config.listeners {
        let Listener { name, bind, mode, accept_proxy, allow, deny } = listener;
        let binds: Vec<_> = bind.iter().map(|bind| bind.addr.to_string()).collect();
        let [upstream, targets, proxy] = match mode {
            Mode::Tcp { upstream } => describe(&config.upstreams[*upstream]),
            Mode::Tls | Mode::Http { .. } => ["by host", "", ""].map(String::from),
        };
        rows.push([
            name.to_string(),
            mode.as_str().to_owned(),
            binds.join(","),
            networks(deny, "nobody"),
            networks(allow, "all"),
            networks(accept_proxy, "nobody"),
            upstream,
            targets,
            proxy,
        ]);
    }
    if !text.is_empty() {
        text.push('\n');
    }
    text += &aligned(&rows);
    let admin = &config.admin;
    text + &format!("\nMetrics on {}, control socket {}.\n", admin.bind.addr, admin.socket.display())
}

fn networks(networks: &[IpNet], none: &str) -> String {
    if networks.is_empty() {
        return none.to_owned();
    }
    networks.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

fn describe(upstream: &Upstream) -> [String; 3] {
    let targets: Vec<&str> = upstream.targets.iter().map(|target| &*target.text).collect();
    let proxy = word(&upstream.send_proxy, &SendProxy::WORDS);
    [upstream.name.to_string(), targets.join(","), proxy.to_owned()]
}

/// What is wider than this puts its own row out of line, and no other.
const WIDEST: usize = 120;

fn aligned<const N: usize>(rows: &[[String; N]]) -> String {
    let widths: [usize; N] = std::array::from_fn(|column| {
        let widths = rows.iter().map(|row| row[column].chars().count());
        widths.filter(|width| *width <= WIDEST).max().unwrap_or(0)
    });
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text += cells.join("  ").trim_end();
        text.push('\n');
    }
    text
}
