//! What must hold between the parts of a configuration: no address taken twice, no two routes for
//! one name, no loop.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::{Action, Bind, Config, Diagnostic, HostPattern, Mode, Route, Span, TargetHost};

/// Each is compared with the others.
const MOST_ROUTES_OF_A_HOST: usize = 64;

/// Where things stand that the model does not keep: by index, as the lists of [`Config`].
#[derive(Default)]
pub(super) struct Places {
    /// Names of listeners.
    pub(super) listeners: Vec<Span>,
    /// Names of upstreams.
    pub(super) upstreams: Vec<Span>,
    /// Each host of each route.
    pub(super) hosts: Vec<Vec<Span>>,
}

/// Errors that can be told without looking at the machine. Indices that resolve to nothing have
/// been reported before.
pub(super) fn conflicts(config: &Config, places: &Places) -> Vec<Diagnostic> {
    let mut found = bind_conflicts(config);
    found.extend(webhook_conflicts(config));
    found.extend(overlapping_routes(config, places));
    found.extend(own_listener_targets(config, &[]));
    found
}

/// Warnings of what nothing leads to, or nothing good. Only for a configuration without errors:
/// else what leads to it may be what is wrong.
pub(super) fn unused(config: &Config, places: &Places) -> Vec<Diagnostic> {
    let mut found = unreached_listeners(config, places);
    found.extend(trusts_everybody(config, places));
    found.extend(challenges_to_ourselves(config));
    found.extend(unused_upstreams(config, places));
    found
}

fn bind_conflicts(config: &Config) -> Vec<Diagnostic> {
    let mut found = Vec::new();
    let mut taken: Vec<&Bind> = Vec::new();
    for bind in config.listeners.iter().flat_map(|listener| &listener.bind) {
        if let Some(first) = taken.iter().find(|first| clash(first.addr, bind.addr)) {
            let message = if first.addr == bind.addr {
                format!("{} is bound twice", bind.addr)
            } else {
                format!("{} and {} cannot both be bound: one of them takes every address", first.addr, bind.addr)
            };
            let remedy = "keep one of the two, or choose another port or address";
            found.push(
                Diagnostic::error(bind.span.clone(), message, remedy).note(first.span.clone(), "first bound here"),
            );
        }
        taken.push(bind);
    }
    let admin = &config.admin.bind;
    if let Some(first) = taken.iter().find(|first| clash(first.addr, admin.addr)) {
        let remedy = format!(
            "choose another port for one of the two: `bind = \"127.0.0.1:{}\"` in [admin]",
            other_port(admin.addr.port())
        );
        found.push(if admin.span.is_empty() {
            let message = format!("{} is where metrics are served when [admin] does not say otherwise", admin.addr);
            Diagnostic::error(first.span.clone(), message, remedy)
        } else {
            let message = format!("{} is taken by a listener", admin.addr);
            Diagnostic::error(admin.span.clone(), message, remedy).note(first.span.clone(), "bound here")
        });
    }
    found
}

/// The webhook beside a listener, or beside metrics: start would refuse it.
fn webhook_conflicts(config: &Config) -> Vec<Diagnostic> {
    let Some(webhook) = config.webhook() else { return Vec::new() };
    let mine = &webhook.bind;
    let listeners = config.listeners.iter().flat_map(|listener| &listener.bind);
    let first = listeners.chain([&config.admin.bind]).find(|other| clash(other.addr, mine.addr));
    let Some(first) = first else { return Vec::new() };
    let message = format!("the webhook's address {} is taken by {}", mine.addr, first.addr);
    let remedy = "choose another port for one of the two";
    let found = Diagnostic::error(mine.span.clone(), message, remedy);
    // A default stands nowhere.
    vec![if first.span.is_empty() { found } else { found.note(first.span.clone(), "bound here") }]
}

fn other_port(port: u16) -> u16 {
    if port == 9443 { 9444 } else { 9443 }
}

/// Would binding the second fail with EADDRINUSE? IPv6 sockets are IPv6 only, so families never
/// meet.
fn clash(a: SocketAddr, b: SocketAddr) -> bool {
    a.port() == b.port()
        && a.is_ipv4() == b.is_ipv4()
        && (a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified())
}

fn overlapping_routes(config: &Config, places: &Places) -> Vec<Diagnostic> {
    let mut found = Vec::new();
    let mut seen: HashMap<&HostPattern, Vec<(usize, &Span)>> = HashMap::new();
    for (index, (route, spans)) in config.routes.iter().zip(&places.hosts).enumerate() {
        for (host, span) in route.hosts.iter().zip(spans) {
            let earlier = seen.entry(host).or_default();
            if earlier.len() == MOST_ROUTES_OF_A_HOST {
                let message = format!("host `{host}` has more than {MOST_ROUTES_OF_A_HOST} routes");
                let remedy = "give the protocols and listeners that lead to one upstream one route";
                found.push(Diagnostic::error(span.clone(), message, remedy));
                continue;
            }
            let first = earlier.iter().find(|(other, _)| *other == index || overlap(&config.routes[*other], route));
            if let Some((other, first)) = first {
                let (message, remedy) = if *other == index {
                    (format!("host `{host}` is listed twice in this route"), "remove one")
                } else {
                    (
                        format!("host `{host}` has a route already"),
                        "remove one of the two, or tell them apart by `listeners` or by `alpn` without a protocol in common",
                    )
                };
                found
                    .push(Diagnostic::error(span.clone(), message, remedy).note((*first).clone(), "first listed here"));
            }
            earlier.push((index, span));
        }
    }
    found
}

/// Could both take the same connection? A route without `alpn` stands behind those that have it.
fn overlap(a: &Route, b: &Route) -> bool {
    let listeners = a.listeners.is_empty() || b.listeners.is_empty() || share(&a.listeners, &b.listeners);
    listeners && ((a.alpn.is_empty() && b.alpn.is_empty()) || share(&a.alpn, &b.alpn))
}

fn share<T: PartialEq>(a: &[T], b: &[T]) -> bool {
    a.iter().any(|item| b.contains(item))
}

/// Targets that are listeners of this configuration: a connection to one would come back in for
/// ever. `local` are the addresses of this machine, for listeners on every address; loopback need
/// not be among them.
pub fn own_listener_targets(config: &Config, local: &[IpAddr]) -> Vec<Diagnostic> {
    let mut found = Vec::new();
    for target in config.upstreams.iter().flat_map(|upstream| &upstream.targets) {
        let reaches = |bind: &&Bind| {
            let here = bind.addr.ip();
            bind.addr.port() == target.port
                && match &target.host {
                    TargetHost::Ip(ip) => {
                        *ip == here
                            || here.is_unspecified()
                                && here.is_ipv4() == ip.is_ipv4()
                                && (ip.is_loopback() || local.contains(ip))
                    }
                    TargetHost::Name(name) => is_localhost(name) && (here.is_unspecified() || here.is_loopback()),
                }
        };
        if let Some(bind) = config.listeners.iter().flat_map(|listener| &listener.bind).find(reaches) {
            let message = format!(
                "target `{}` is a listener of this dataplane: connections would go round in a circle",
                target.text
            );
            let remedy = "name the address and port where the service itself listens";
            found.push(Diagnostic::error(target.span.clone(), message, remedy).note(bind.span.clone(), "the listener"));
        }
    }
    found
}

/// Targets on this machine whose `acme_port` is a listener of ours: no challenge can be passed on
/// to them.
fn challenges_to_ourselves(config: &Config) -> Vec<Diagnostic> {
    let mut found = Vec::new();
    for (index, listener) in config.listeners.iter().enumerate() {
        let Mode::Http { acme_port } = listener.mode else { continue };
        let taken = config.listeners.iter().flat_map(|l| &l.bind).find(|bind| {
            bind.addr.port() == acme_port && (bind.addr.ip().is_unspecified() || bind.addr.ip().is_loopback())
        });
        let routes = config.routes.iter().filter(|route| route.is_for(index));
        let mut upstreams: Vec<usize> = routes.filter_map(Route::upstream).collect();
        upstreams.sort_unstable();
        upstreams.dedup();
        for target in upstreams.iter().flat_map(|upstream| &config.upstreams[*upstream].targets) {
            let here = match &target.host {
                TargetHost::Ip(ip) => ip.is_loopback(),
                TargetHost::Name(name) => is_localhost(name),
            };
            if let (true, Some(bind)) = (here, taken) {
                let message = format!(
                    "ACME challenges for `{}` cannot be passed on: port {acme_port} of that host is this dataplane",
                    target.text
                );
                let remedy = format!(
                    "have its certificates made by TLS-ALPN or DNS challenges, or let it answer challenges on another port: `acme_port` of listener \"{}\"",
                    listener.name
                );
                found.push(
                    Diagnostic::warning(target.span.clone(), message, remedy).note(bind.span.clone(), "the listener"),
                );
            }
        }
    }
    found
}

/// RFC 6761 section 6.3.
pub(super) fn is_localhost(name: &str) -> bool {
    let name = name.trim_end_matches('.');
    name == "localhost" || name.ends_with(".localhost")
}

fn unreached_listeners(config: &Config, places: &Places) -> Vec<Diagnostic> {
    let mut found = Vec::new();
    for (index, (listener, span)) in config.listeners.iter().zip(&places.listeners).enumerate() {
        let reached = config.routes.iter().any(|route| route.is_for(index) && route.action != Action::Refuse);
        if listener.mode.has_routes() && !reached {
            found.push(Diagnostic::warning(
                span.clone(),
                format!("no route is for listener \"{}\": it refuses every connection", listener.name),
                "add a `[[routes]]` with `hosts` and `upstream`, or remove the listener",
            ));
        }
    }
    found
}

/// Listeners that believe the PROXY header of whoever connects.
fn trusts_everybody(config: &Config, places: &Places) -> Vec<Diagnostic> {
    let mut found = Vec::new();
    for (listener, span) in config.listeners.iter().zip(&places.listeners) {
        if !covers_everybody(&listener.accept_proxy) {
            continue;
        }
        let name = &listener.name;
        let message = if listener.allow.is_empty() && listener.deny.is_empty() {
            format!("listener \"{name}\" believes everybody's PROXY header: any client can claim any address")
        } else {
            format!(
                "`allow` and `deny` of listener \"{name}\" PROTECT NOTHING: `accept_proxy` covers everybody, so any client can claim an address that passes"
            )
        };
        let remedy = "name only the proxies in front of this listener: accept_proxy = [\"10.0.0.0/8\"]";
        found.push(Diagnostic::warning(span.clone(), message, remedy));
    }
    found
}

/// IPv4 networks from which nobody comes over the internet (RFC 6890, RFC 5771, RFC 1112 section
/// 4).
const NOT_PUBLIC: [(u8, u8, u8); 8] =
    [(0, 0, 8), (10, 0, 8), (100, 64, 10), (127, 0, 8), (169, 254, 16), (172, 16, 12), (192, 168, 16), (224, 0, 3)];

/// Whether every client from the internet is in these networks together, by IPv4 or by IPv6.
fn covers_everybody(nets: &[IpNet]) -> bool {
    let not_public = NOT_PUBLIC.iter().map(|(a, b, prefix)| IpNet::new_assert([*a, *b, 0, 0].into(), *prefix));
    // All that is assigned of IPv6 (RFC 4291 section 2.4, IANA's registry).
    let global = IpNet::new_assert([0x2000, 0, 0, 0, 0, 0, 0, 0].into(), 3);
    let together = IpNet::aggregate(&nets.iter().copied().chain(not_public).collect());
    together.iter().any(|net| net.prefix_len() == 0 || net.contains(&global))
}

fn unused_upstreams(config: &Config, places: &Places) -> Vec<Diagnostic> {
    let of_listeners = config.listeners.iter().filter_map(|listener| match listener.mode {
        Mode::Tcp { upstream } => Some(upstream),
        Mode::Tls | Mode::Http { .. } => None,
    });
    let used: HashSet<usize> = config.routes.iter().filter_map(Route::upstream).chain(of_listeners).collect();
    let unused = config.upstreams.iter().zip(&places.upstreams).enumerate().filter(|(index, _)| !used.contains(index));
    unused
        .map(|(_, (upstream, span))| {
            Diagnostic::warning(
                span.clone(),
                format!("nothing uses upstream \"{}\"", upstream.name),
                "name it as the `upstream` of a route or of a listener of mode \"tcp\", or remove it",
            )
        })
        .collect()
}
