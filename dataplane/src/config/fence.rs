//! What the node's owner lets a repository decide: `allow_hosts`, `allow_listeners` and
//! `allow_targets` of `[source]`.
//!
//! What stands in the node's own files is never fenced in. Names of targets are judged twice: as
//! they are written, and by [`Target::admit`] each time that they have been resolved, because
//! whoever answers for a name chooses its addresses. A dial to another port of a target than its
//! own, for a challenge, is judged by [`Target::admits`] with that port.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;

use super::check::{Places, is_localhost};
use super::diagnostic::MOST_KEPT;
use super::reader::{Reader, Section, quoted};
use super::values::{Refused, parse_net, refuse};
use super::{Config, Diagnostic, HostPattern, Mode, Span, Target, TargetHost};

/// Where clouds tell machines their secrets, outside of link-local networks; and MagicDNS, which no
/// connection of a client needs.
const METADATA: [IpAddr; 10] = [
    // Almost all; the others have it, too.
    IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)),
    // EC2: instance metadata, and the credentials of EKS pods.
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23)),
    // Google Cloud.
    IpAddr::V6(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)),
    // Azure.
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    // Alibaba Cloud.
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    // Oracle Cloud.
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
    // Scaleway.
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x42, 0, 0, 0, 0, 0, 0x42)),
    // MagicDNS.
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 100)),
    IpAddr::V6(Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, 0x53)),
];

/// The three lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fence {
    /// `None`: every name of at least two labels, and wildcards above such names.
    hosts: Option<Vec<HostPattern>>,
    listeners: Vec<Place>,
    targets: Vec<Rule>,
}

impl Default for Fence {
    fn default() -> Self {
        let listeners = [80, 443].map(|port| Place { net: None, port: Some(port) });
        Self { hosts: None, listeners: listeners.into(), targets: vec![Rule { who: Who::Any, port: None }] }
    }
}

/// An entry of `allow_listeners`: where a listener may be bound.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    /// `None`: any address but those of [`is_loopback`].
    net: Option<IpNet>,
    /// `None`: any.
    port: Option<u16>,
}

/// An entry of `allow_targets`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    who: Who,
    /// `None`: any.
    port: Option<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Who {
    /// Everything but this machine.
    Any,
    /// These addresses, whatever they are called.
    Net(IpNet),
    /// These names, wherever they lead but to this machine.
    Name(HostPattern),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let port = self.port.map_or("*".to_owned(), |port| port.to_string());
        match self.net {
            None => write!(f, "*:{port}"),
            Some(net) => write!(f, "{net}:{port}"),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.who {
            Who::Any => f.write_str("*")?,
            Who::Net(net) => write!(f, "{net}")?,
            Who::Name(name) => write!(f, "{name}")?,
        }
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

impl Fence {
    /// The keys that say something else in `new`, with both values in words.
    pub(super) fn compared(&self, new: &Self) -> Vec<(&'static str, String, String)> {
        fn words<T: fmt::Display>(items: &[T]) -> String {
            let items: Vec<_> = items.iter().map(T::to_string).collect();
            if items.is_empty() { "[]".to_owned() } else { items.join(", ") }
        }
        let keys = |Self { hosts, listeners, targets }: &Self| {
            let hosts = hosts.as_ref().map_or("names of two labels and more".to_owned(), |hosts| words(hosts));
            [("allow_hosts", hosts), ("allow_listeners", words(listeners)), ("allow_targets", words(targets))]
        };
        let pairs = keys(self).into_iter().zip(keys(new));
        pairs.filter(|(old, new)| old != new).map(|((key, old), (_, new))| (key, old, new)).collect()
    }

    /// Reads the three keys of `[source]`.
    pub(super) fn read(reader: &mut Reader, section: &Section<'_>) -> Self {
        let mut fence = Self::default();
        if let Some(field) = section.get("allow_hosts") {
            let entries = reader.strings(field, "a host name or a wildcard", "\"*.example.com\"");
            let hosts = entries.into_iter().filter_map(|(span, text)| reader.accept(span, HostPattern::parse(text)));
            fence.hosts = Some(hosts.collect());
        }
        if let Some(field) = section.get("allow_listeners") {
            let entries = reader.strings(field, "an address and a port", "\"*:443\"");
            fence.listeners =
                entries.into_iter().filter_map(|(span, text)| reader.accept(span, Place::parse(text))).collect();
        }
        if let Some(field) = section.get("allow_targets") {
            let entries = reader.strings(field, "a network or a name", "\"100.64.0.0/10\"");
            fence.targets =
                entries.into_iter().filter_map(|(span, text)| reader.accept(span, Rule::parse(text))).collect();
        }
        fence
    }

    fn allows_host(&self, host: &HostPattern) -> bool {
        let Some(allowed) = &self.hosts else {
            return match host {
                HostPattern::Exact(name) | HostPattern::Wildcard(name) => name.contains('.'),
                HostPattern::Any => false,
            };
        };
        allowed.iter().any(|pattern| covers(pattern, host))
    }

    fn allows_listener(&self, addr: SocketAddr) -> bool {
        let ip = addr.ip().to_canonical();
        // A bind to the unspecified address is no forbidden one: it is all that the machine has.
        !is_link_local_or_metadata(ip)
            && self.listeners.iter().any(|place| {
                place.port.is_none_or(|port| port == addr.port())
                    && match place.net {
                        None => !ip.is_loopback(),
                        Some(net) if net.addr().is_unspecified() && net.prefix_len() == net.max_prefix_len() => {
                            net.addr().is_ipv4() == ip.is_ipv4() && !ip.is_loopback()
                        }
                        Some(net) => net.contains(&ip),
                    }
            })
    }

    /// May a target be there? `is_own`: it is an address of this machine.
    fn allows_address(&self, name: Option<&str>, ip: IpAddr, port: u16, is_own: bool) -> bool {
        let ip = ip.to_canonical();
        // Where a translator would take it to this machine, it is this machine that has to be
        // allowed.
        let ip = embedded(ip).filter(Ipv4Addr::is_loopback).map_or(ip, IpAddr::V4);
        let is_own = is_own || ip.is_loopback();
        !is_nowhere(ip)
            && !is_link_local_or_metadata(ip)
            && self.rules(port).any(|who| match who {
                Who::Any => !is_own,
                Who::Net(net) => net.contains(&ip),
                Who::Name(pattern) => {
                    name.is_some_and(|name| covers_name(pattern, name) && (!is_own || is_localhost(name)))
                }
            })
    }

    /// May a target have this name? A network decides later, by the addresses.
    fn allows_name(&self, name: &str, port: u16) -> bool {
        self.rules(port).any(|who| match who {
            Who::Any => !is_localhost(name),
            Who::Net(_) => !is_localhost(name) || self.allows_address(None, Ipv4Addr::LOCALHOST.into(), port, true),
            Who::Name(pattern) => covers_name(pattern, name),
        })
    }

    fn allows_target(&self, target: &Target, port: u16) -> bool {
        match &target.host {
            TargetHost::Ip(ip) => self.allows_address(None, *ip, port, false),
            TargetHost::Name(name) => self.allows_name(name, port),
        }
    }

    fn rules(&self, port: u16) -> impl Iterator<Item = &Who> {
        self.targets.iter().filter(move |rule| rule.port.is_none_or(|p| p == port)).map(|rule| &rule.who)
    }
}

impl Target {
    /// Those of the addresses of its name that the node's owner lets it lead to; `is_own` says
    /// which are of this machine.
    ///
    /// # Errors
    /// None of them; for people.
    pub fn admit(&self, found: Vec<IpAddr>, is_own: impl Fn(IpAddr) -> bool) -> Result<Vec<IpAddr>, String> {
        let (Some(_), TargetHost::Name(_)) = (&self.fence, &self.host) else { return Ok(found) };
        let (admitted, refused): (Vec<_>, Vec<_>) =
            found.into_iter().partition(|ip| self.admits(SocketAddr::new(*ip, self.port), &is_own));
        match (admitted.is_empty(), refused.first()) {
            (true, Some(refused)) => Err(format!(
                "it leads to {refused}, and `allow_targets` of [source] does not let a repository go there"
            )),
            _ => Ok(admitted),
        }
    }

    /// Whether the node's owner lets it lead to this address and port of its host; `is_own` says
    /// which are of this machine.
    pub fn admits(&self, at: SocketAddr, is_own: impl Fn(IpAddr) -> bool) -> bool {
        let Some(fence) = &self.fence else { return true };
        let name = match &self.host {
            TargetHost::Name(name) => Some(&**name),
            TargetHost::Ip(_) => None,
        };
        let inner = embedded(at.ip()).map(IpAddr::V4).filter(|inner| is_own(*inner));
        let ip = inner.unwrap_or(at.ip());
        fence.allows_address(name, ip, at.port(), inner.is_some() || is_own(ip))
    }
}

/// Everything of the repository's that the owner's lists do not cover.
pub(super) fn violations(
    config: &Config,
    places: &Places,
    fence: &Fence,
    is_of_repository: impl Fn(&Span) -> bool,
) -> Vec<Diagnostic> {
    let mut found = Vec::new();
    for (route, spans) in config.routes.iter().zip(&places.hosts) {
        for (host, span) in route.hosts.iter().zip(spans) {
            if is_of_repository(span) && !fence.allows_host(host) {
                let host = host.to_string();
                let shape = if fence.hosts.is_none() { "write names of at least two labels, or " } else { "" };
                found.push(outside(span, &format!("list `{host}`"), "allow_hosts", &host, shape));
            }
        }
    }
    for bind in config.listeners.iter().flat_map(|listener| &listener.bind) {
        if is_of_repository(&bind.span) && !fence.allows_listener(bind.addr) {
            let addr = bind.addr.to_string();
            found.push(if is_link_local_or_metadata(bind.addr.ip()) {
                forbidden(&bind.span, &format!("listen on {addr}"))
            } else {
                outside(&bind.span, &format!("listen on {addr}"), "allow_listeners", &addr, "")
            });
        }
    }
    found.extend(targets(config, places, &is_of_repository, fence));
    found
}

/// Targets that are these addresses of this machine, where they are not listed: `parse` cannot know
/// them.
pub fn own_targets(config: &Config, local: &[IpAddr]) -> Vec<Diagnostic> {
    let mut found = Vec::new();
    for (index, upstream) in config.upstreams.iter().enumerate() {
        let challenges = config.challenge_ports(index);
        for target in &upstream.targets {
            let (Some(_), TargetHost::Ip(ip)) = (&target.fence, &target.host) else { continue };
            let is_own = |ip: IpAddr| local.contains(&ip);
            let refused = |port: u16| !target.admits(SocketAddr::new(*ip, port), is_own);
            if !is_own(*ip) && !embedded(*ip).is_some_and(|inner| is_own(inner.into())) {
                continue;
            }
            if refused(target.port) {
                let what = format!("lead to `{}`, which is this machine", target.text);
                found.push(outside(&target.span, &what, "allow_targets", &target.text, ""));
            }
            for port in challenges.iter().filter(|port| **port != target.port && refused(**port)) {
                found.push(no_challenges(&target.span, &at_port(target, *port)));
            }
        }
    }
    found
}

/// The targets of the repository's upstreams, and those of the node's own that its routes and
/// listeners lead to.
fn targets(
    config: &Config,
    places: &Places,
    is_of_repository: impl Fn(&Span) -> bool,
    fence: &Fence,
) -> Vec<Diagnostic> {
    let mut found = Vec::new();
    let leads = leads(config, places, &is_of_repository);
    for (upstream, lead) in config.upstreams.iter().zip(&leads) {
        for target in &upstream.targets {
            let own = is_of_repository(&target.span).then_some(&target.span);
            let Some(span) = own.or(lead.span.as_ref()) else { continue };
            if found.len() > MOST_KEPT {
                return found;
            }
            let challenges = lead.acme_ports.iter().copied().filter(|(port, _)| *port != target.port);
            for (port, theirs) in std::iter::once((target.port, true)).chain(challenges) {
                if fence.allows_target(target, port) {
                    continue;
                }
                let text = at_port(target, port);
                if !theirs {
                    found.push(no_challenges(span, &text));
                    continue;
                }
                let what = format!("lead to `{text}`");
                found.push(match target.host {
                    TargetHost::Ip(ip) if is_link_local_or_metadata(ip) || is_nowhere(ip) => forbidden(span, &what),
                    _ => outside(span, &what, "allow_targets", &text, ""),
                });
            }
        }
    }
    found
}

/// How the repository leads to an upstream.
#[derive(Clone, Default)]
struct Lead {
    /// Of the first of its routes or listeners that does.
    span: Option<Span>,
    /// Ports of the targets that listeners of mode `http` name, and whether one of the repository's
    /// does.
    acme_ports: Vec<(u16, bool)>,
}

/// For each upstream.
fn leads(config: &Config, places: &Places, is_of_repository: impl Fn(&Span) -> bool) -> Vec<Lead> {
    let mut leads = vec![Lead::default(); config.upstreams.len()];
    let mut acme_ports: Vec<(u16, bool)> = Vec::new();
    for (listener, span) in config.listeners.iter().zip(&places.listeners) {
        match listener.mode {
            Mode::Tcp { upstream } if is_of_repository(span) => {
                if let Some(lead) = leads.get_mut(upstream) {
                    lead.span.get_or_insert_with(|| span.clone());
                }
            }
            Mode::Http { acme_port } => match acme_ports.iter_mut().find(|(port, _)| *port == acme_port) {
                Some((_, theirs)) => *theirs |= is_of_repository(span),
                None => acme_ports.push((acme_port, is_of_repository(span))),
            },
            _ => {}
        }
    }
    for (route, spans) in config.routes.iter().zip(&places.hosts) {
        let Some(lead) = route.upstream().and_then(|upstream| leads.get_mut(upstream)) else { continue };
        if let Some(span) = spans.first().filter(|span| is_of_repository(span)) {
            lead.span.get_or_insert_with(|| span.clone());
        }
        // Which of the listeners a route is for matters little: what one may not reach, none may.
        lead.acme_ports.clone_from(&acme_ports);
    }
    leads
}

/// Has the targets that the repository decides upon carry the fence.
pub(super) fn mark(config: &mut Config, places: &Places, fence: &Fence, is_of_repository: impl Fn(&Span) -> bool) {
    let leads = leads(config, places, &is_of_repository);
    let fence = Arc::new(fence.clone());
    for (upstream, lead) in config.upstreams.iter_mut().zip(leads) {
        for target in &mut upstream.targets {
            if lead.span.is_some() || is_of_repository(&target.span) {
                target.fence = Some(fence.clone());
            }
        }
    }
}

/// Where a challenge for a target goes.
fn at_port(target: &Target, port: u16) -> String {
    let host = target.text.rsplit_once(':').map_or(&*target.text, |(host, _)| host);
    format!("{host}:{port}")
}

/// A dial to the port of a listener that the node's owner wrote is refused all the same; but that
/// is no fault of the repository's.
fn no_challenges(span: &Span, to: &str) -> Diagnostic {
    Diagnostic::warning(
        span.clone(),
        format!("challenges are not passed on to `{to}`: `allow_targets` of the node does not cover it"),
        format!("have the node's owner add {} to `allow_targets` in [source] of the node's own file", quoted(to)),
    )
}

fn outside(span: &Span, what: &str, key: &str, entry: &str, shape: &str) -> Diagnostic {
    Diagnostic::error(
        span.clone(),
        format!("the repository may not {what}: `{key}` of the node does not cover it"),
        format!("{shape}have the node's owner add {} to `{key}` in [source] of the node's own file", quoted(entry)),
    )
}

fn forbidden(span: &Span, what: &str) -> Diagnostic {
    Diagnostic::error(
        span.clone(),
        format!("the repository may not {what}: link-local and metadata addresses are never its business"),
        "write another address; what the node itself needs there belongs into the node's own file",
    )
}

/// Addresses of one link alone, where machines trust each other, and those of METADATA.
fn is_link_local_or_metadata(ip: IpAddr) -> bool {
    let ip = ip.to_canonical();
    METADATA.contains(&ip)
        || embedded(ip).is_some_and(|inner| is_link_local_or_metadata(inner.into()))
        || match ip {
            IpAddr::V4(ip) => ip.is_link_local(),
            IpAddr::V6(ip) => ip.is_unicast_link_local(),
        }
}

/// The IPv4 address that a translator or a tunnel on the way makes of an IPv6 one: NAT64 (RFC 6052
/// section 2.1, and RFC 8215 with the address at its end), SIIT (RFC 2765 section 2.1), 6to4 (RFC
/// 3056 section 2).
fn embedded(ip: IpAddr) -> Option<Ipv4Addr> {
    let IpAddr::V6(ip) = ip else { return None };
    let ([0x64, 0xff9b, 0, 0, 0, 0, high, low]
    | [0x64, 0xff9b, 1, _, _, _, high, low]
    | [0, 0, 0, 0, 0xffff, 0, high, low]
    | [0x2002, high, low, ..]) = ip.segments()
    else {
        return None;
    };
    Some(Ipv4Addr::from(u32::from(high) << 16 | u32::from(low)))
}

/// Addresses that no service has; the kernel takes some of them for this machine.
fn is_nowhere(ip: IpAddr) -> bool {
    if let Some(inner) = embedded(ip) {
        return is_nowhere(inner.into());
    }
    match ip.to_canonical() {
        IpAddr::V4(ip) => ip.octets()[0] == 0 || ip.is_multicast() || ip.is_broadcast(),
        // An IPv4 address in the form of RFC 4291 section 2.5.5.1, too.
        IpAddr::V6(ip) => ip.is_multicast() || (ip.segments()[..6] == [0; 6] && !ip.is_loopback()),
    }
}

/// Does the pattern match everything that the other one does?
fn covers(pattern: &HostPattern, other: &HostPattern) -> bool {
    match (pattern, other) {
        (HostPattern::Any, _) => true,
        (HostPattern::Exact(a), HostPattern::Exact(b)) => a == b,
        (HostPattern::Wildcard(suffix), HostPattern::Exact(name)) => is_below(name, suffix),
        (HostPattern::Wildcard(suffix), HostPattern::Wildcard(other)) => other == suffix || is_below(other, suffix),
        (_, HostPattern::Any) | (HostPattern::Exact(_), HostPattern::Wildcard(_)) => false,
    }
}

fn covers_name(pattern: &HostPattern, name: &str) -> bool {
    covers(pattern, &HostPattern::Exact(name.trim_end_matches('.').to_owned()))
}

fn is_below(name: &str, suffix: &str) -> bool {
    name.strip_suffix(suffix).is_some_and(|rest| rest.ends_with('.'))
}

impl Place {
    fn parse(text: &str) -> Result<Self, Refused> {
        const EXAMPLES: &str =
            "write an address or a network with a port: \"*:443\", \"100.64.0.1:2222\", \"[::]:443\", \"10.0.0.0/8:*\"";
        let Some((host, Some(port))) = split(text) else {
            return refuse(format!("{} does not say which port", quoted(text)), EXAMPLES);
        };
        let net = match host {
            "*" => None,
            host => Some(network(host, EXAMPLES)?),
        };
        let port = if port == "*" { None } else { Some(parse_port(port)?) };
        Ok(Self { net, port })
    }
}

impl Rule {
    fn parse(text: &str) -> Result<Self, Refused> {
        const EXAMPLES: &str = "write a network or a name, with a port where only that one is meant: \"100.64.0.0/10\", \"*.tailnet.example:443\", \"127.0.0.1:8443\", \"[fd7a:115c:a1e0::/48]:443\"";
        let Some((host, port)) = split(text) else {
            return refuse(format!("{} is not a network or a name", quoted(text)), EXAMPLES);
        };
        let who = match host {
            "*" => Who::Any,
            host if host.contains(['/', ':']) || host.parse::<IpAddr>().is_ok() => Who::Net(network(host, EXAMPLES)?),
            host => Who::Name(HostPattern::parse(host)?),
        };
        let port = port.filter(|port| *port != "*").map(parse_port).transpose()?;
        Ok(Self { who, port })
    }
}

/// A network that could be allowed at all.
fn network(text: &str, examples: &str) -> Result<IpNet, Refused> {
    let net = parse_net(text).map_err(|refused| Refused { message: refused.message, remedy: examples.to_owned() })?;
    if is_link_local_or_metadata(net.addr()) {
        return refuse(
            format!("`{text}` cannot be allowed: link-local and metadata addresses are no business of a repository"),
            "put the upstream or listener that needs it into the node's own file",
        );
    }
    Ok(net)
}

/// `HOST`, `HOST:PORT`, `[HOST]:PORT`; an IPv6 address or network needs brackets where a port
/// follows.
fn split(text: &str) -> Option<(&str, Option<&str>)> {
    if let Some(rest) = text.strip_prefix('[') {
        let (host, rest) = rest.split_once(']')?;
        return match rest.strip_prefix(':') {
            Some(port) => Some((host, Some(port))),
            None => rest.is_empty().then_some((host, None)),
        };
    }
    match text.split_once(':') {
        Some((host, port)) if !port.contains(':') => Some((host, Some(port))),
        _ => Some((text, None)),
    }
}

fn parse_port(text: &str) -> Result<u16, Refused> {
    match text.parse() {
        Ok(port) if port > 0 => Ok(port),
        _ => refuse(format!("`{text}` is not a port"), "write a port from 1 to 65535, or `*` for any"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{LoadError, Source, parse_within, repository};
    use std::path::{Path, PathBuf};

    fn fence(lists: &str) -> Fence {
        let text = format!("[source]\ngit = \"/srv/x.git\"\n{lists}\n");
        repository(&Source::new("node.toml", text)).unwrap().unwrap().fence
    }

    /// What is refused of this content.
    fn refused(fence: &Fence, text: &str) -> String {
        let source = Arc::new(Source::of_repository("dataplane.toml", text.into()));
        match parse_within(source.clone(), Some(fence.clone())) {
            Ok(_) => String::new(),
            Err(diagnostics) => LoadError::Report { source, diagnostics }.to_string(),
        }
    }

    fn content(host: &str, bind: &str, target: &str) -> String {
        format!(
            "[listeners.public]\nbind = [\"{bind}\"]\n[upstreams.a]\ntargets = [\"{target}\"]\n[[routes]]\nhosts = [\"{host}\"]\nupstream = \"a\"\n"
        )
    }

    #[test]
    fn what_nobody_allowed_is_refused_by_default() {
        let default = Fence::default();
        assert_eq!(fence(""), default);
        let (host, bind, target) = ("blog.example.com", "0.0.0.0:443", "thinkpad-1:443");
        for host in ["blog.example.com", "*.example.com", "example.com"] {
            assert_eq!(refused(&default, &content(host, bind, target)), "", "{host}");
        }
        for host in ["*", "*.com", "nas"] {
            let said = refused(&default, &content(host, bind, target));
            assert!(
                said.contains(":6:10: error: the repository may not list") && said.contains("`allow_hosts`"),
                "{said}"
            );
        }
        for bind in ["[::]:443", "0.0.0.0:80", "192.0.2.1:443", "100.64.0.1:443"] {
            assert_eq!(refused(&default, &content(host, bind, target)), "", "{bind}");
        }
        for bind in ["127.0.0.1:22", "127.0.0.1:443", "[::1]:443", "0.0.0.0:2222", "169.254.169.254:80"] {
            let said = refused(&default, &content(host, bind, target));
            assert!(said.contains("the repository may not listen on"), "{bind}: {said}");
        }
        for target in ["100.64.0.2:443", "[fd7a:115c:a1e0::2]:443", "10.0.0.1:22", "a.example:1"] {
            assert_eq!(refused(&default, &content(host, bind, target)), "", "{target}");
        }
        for target in [
            "127.0.0.1:443",
            "[::1]:443",
            "[::ffff:127.0.0.1]:443",
            "127.8.8.8:1",
            "localhost:443",
            "x.localhost:443",
            "169.254.169.254:80",
            "169.254.1.1:80",
            "[fd00:ec2::254]:80",
            "100.100.100.100:53",
            "0.1.2.3:1",
            "[::127.0.0.1]:1",
        ] {
            let said = refused(&default, &content(host, bind, target));
            assert!(said.contains("the repository may not lead to"), "{target}: {said}");
        }
    }

    #[test]
    fn what_the_owner_lists_is_allowed_and_nothing_else() {
        let narrow = fence(
            "allow_hosts = [\"*.example.com\", \"example.org\"]\nallow_listeners = [\"192.0.2.1:443\", \"127.0.0.0/8:*\", \"[::]:443\"]\n\
             allow_targets = [\"100.64.0.0/10:443\", \"*.tailnet.example\", \"localhost:8443\", \"[::1]:8443\"]\n",
        );
        let allows = |host: &str, bind: &str, target: &str| {
            let said = refused(&narrow, &content(host, bind, target));
            assert!(said.is_empty() || said.contains("the repository may not"), "{said}");
            said.is_empty()
        };
        let (host, bind, target) = ("a.example.com", "192.0.2.1:443", "100.64.0.7:443");
        for (host, expected) in [
            ("a.example.com", true),
            ("*.example.com", true),
            ("*.b.example.com", true),
            ("example.org", true),
            ("example.com", false),
            ("aexample.com", false),
            ("*.example.org", false),
            ("a.example.org", false),
            ("*", false),
        ] {
            assert_eq!(allows(host, bind, target), expected, "{host}");
        }
        for (bind, expected) in [
            ("192.0.2.1:443", true),
            ("127.0.0.1:22", true),
            ("[2001:db8::1]:443", true),
            ("[::1]:443", false),
            ("0.0.0.0:443", false),
        ] {
            assert_eq!(allows(host, bind, target), expected, "{bind}");
        }
        for (target, expected) in [
            ("100.64.0.7:443", true),
            ("100.64.0.7:22", false),
            ("10.0.0.1:443", false),
            ("a.tailnet.example:22", true),
            // Its addresses decide.
            ("a.example:443", true),
            ("a.example:22", false),
            ("localhost:8443", true),
            ("localhost:443", false),
            ("[::1]:8443", true),
            ("127.0.0.1:8443", false),
        ] {
            assert_eq!(allows(host, bind, target), expected, "{target}");
        }
        let everything = fence("allow_hosts = [\"*\"]\nallow_listeners = []\nallow_targets = []");
        let said = refused(&everything, &content("*", bind, target));
        assert!(
            !said.contains("allow_hosts") && said.contains("`allow_listeners`") && said.contains("`allow_targets`"),
            "{said}"
        );
        for wrong in [
            "allow_targets = [\"169.254.0.0/16\"]",
            "allow_targets = [\"10.0.0.0/8:x\"]",
            "allow_listeners = [\"10.0.0.1\"]",
            "allow_hosts = [\"a*\"]",
            "allow_targets = [\"10.0.0.1/8\"]",
        ] {
            let text = format!("[source]\ngit = \"/srv/x.git\"\n{wrong}\n");
            assert!(repository(&Source::new("node.toml", text)).is_err(), "{wrong}");
        }
    }

    #[test]
    fn no_way_to_write_an_address_leads_where_none_may_go() {
        let everything = fence("allow_targets = [\"*\", \"0.0.0.0/0\", \"::/0\"]");
        let own: IpAddr = "192.0.2.9".parse().unwrap();
        let admits = |fence: &Fence, at: &str| {
            let mut target = Target::parse("a.example:443", 0..0).unwrap();
            target.fence = Some(Arc::new(fence.clone()));
            target.admits(SocketAddr::new(at.parse().unwrap(), 443), |ip| ip == own)
        };
        for (never, what) in [
            ("169.254.169.254", "metadata"),
            ("fd00:ec2::254", "EC2"),
            ("fd00:ec2::23", "EKS"),
            ("fd20:ce::254", "Google"),
            ("168.63.129.16", "Azure"),
            ("100.100.100.200", "Alibaba"),
            ("192.0.0.192", "Oracle"),
            ("fd00:42::42", "Scaleway"),
            ("100.100.100.100", "MagicDNS"),
            ("fd7a:115c:a1e0::53", "MagicDNS"),
            ("fe80::1", "link-local"),
            ("::ffff:168.63.129.16", "mapped"),
            ("64:ff9b::169.254.169.254", "NAT64 to link-local"),
            ("64:ff9b::100.100.100.200", "NAT64 to metadata"),
            ("64:ff9b:1::169.254.1.1", "NAT64 of one's own prefix"),
            ("64:ff9b::0.0.0.1", "NAT64 to nowhere"),
            ("::ffff:0:169.254.169.254", "SIIT"),
            ("2002:a9fe:a9fe::1", "6to4 to link-local"),
            ("2002:a83f:8110::", "6to4 to metadata"),
        ] {
            assert!(!admits(&everything, never), "{never}: {what}");
            // That one is refused of everybody.
            if never == "fe80::1" {
                continue;
            }
            let said = refused(&Fence::default(), &content("a.example.com", "0.0.0.0:443", &target_at(never)));
            assert!(said.contains("may not lead to") && said.contains("belongs into the node's own file"), "{said}");
        }
        for this_machine in
            ["127.0.0.1", "192.0.2.9", "64:ff9b::127.0.0.1", "64:ff9b::192.0.2.9", "2002:7f00:1::1", "2002:c000:209::"]
        {
            assert!(!admits(&Fence::default(), this_machine), "{this_machine} is not listed");
            assert!(
                !admits(&fence("allow_targets = [\"::/0\"]"), this_machine),
                "{this_machine}: nor by its translator"
            );
            assert!(admits(&everything, this_machine), "{this_machine} is listed");
        }
        for usual in
            ["64:ff9b::198.51.100.7", "2002:c633:6407::1", "2001:db8::1", "100.100.100.101", "fd7a:115c:a1e0::2"]
        {
            assert!(admits(&Fence::default(), usual), "{usual}");
        }
    }

    /// As a target is written.
    fn target_at(ip: &str) -> String {
        if ip.contains(':') { format!("[{ip}]:443") } else { format!("{ip}:443") }
    }

    #[test]
    fn a_name_leads_only_where_the_owner_lets_it_whoever_answers_for_it() {
        let admitted = |lists: &str, target: &str, found: &[&str]| {
            let mut target = Target::parse(target, 0..0).unwrap();
            target.fence = Some(Arc::new(fence(lists)));
            let found = found.iter().map(|ip| ip.parse().unwrap()).collect();
            let own: IpAddr = "192.0.2.9".parse().unwrap();
            let admitted = target.admit(found, |ip| ip == own);
            admitted.map(|ips| ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")).unwrap_or_default()
        };
        let bad = [
            "127.0.0.1",
            "::1",
            "::ffff:127.0.0.1",
            "169.254.169.254",
            "0.0.0.0",
            "::",
            "192.0.2.9",
            "fe80::1",
            "224.0.0.1",
        ];
        assert_eq!(admitted("", "a.example:443", &bad), "");
        assert_eq!(admitted("", "a.example:443", &[&bad[..], &["192.0.2.1"]].concat()), "192.0.2.1");
        let tailnet = "allow_targets = [\"100.64.0.0/10\"]";
        assert_eq!(admitted(tailnet, "a.example:443", &["100.64.0.7", "192.0.2.1", "127.0.0.1"]), "100.64.0.7");
        let name = "allow_targets = [\"a.example\"]";
        assert_eq!(admitted(name, "a.example.:443", &["192.0.2.1", "127.0.0.1"]), "192.0.2.1");
        assert_eq!(admitted(name, "b.example:443", &["192.0.2.1"]), "");
        assert_eq!(
            admitted("allow_targets = [\"a.example\", \"127.0.0.1\"]", "a.example:443", &["127.0.0.1"]),
            "127.0.0.1"
        );
        assert_eq!(
            admitted("allow_targets = [\"localhost\"]", "localhost:443", &["127.0.0.1", "::1"]),
            "127.0.0.1 ::1"
        );
        // Another port is another place.
        let mut target = Target::parse("a.example:8443", 0..0).unwrap();
        target.fence = Some(Arc::new(fence("allow_targets = [\"*\", \"127.0.0.1:8443\"]")));
        let admits = |at: &str| target.admits(at.parse().unwrap(), |_| false);
        assert!(admits("127.0.0.1:8443") && !admits("127.0.0.1:22") && admits("192.0.2.1:22"));
        // What the node's owner wrote is not fenced in.
        let own = Target::parse("a.example:443", 0..0).unwrap();
        assert_eq!(own.admit(vec!["127.0.0.1".parse().unwrap()], |_| true).unwrap().len(), 1);
    }

    struct Commit(String);

    impl crate::config::Files for Commit {
        fn matching(&self, _: &Path, _: &str) -> Result<Vec<PathBuf>, String> {
            Ok(Vec::new())
        }
        fn read(&self, _: &Path) -> std::io::Result<Vec<u8>> {
            Ok(self.0.clone().into_bytes())
        }
    }

    /// The node's own file and the repository's, read as one.
    fn both(own: &str, shared: &str) -> Result<Config, String> {
        let own = format!("[source]\ngit = \"/srv/x.git\"\n{own}");
        let mut source = Source::new("node.toml", own);
        crate::config::add_repository(&mut source, "0123", Path::new("x.toml"), &Commit(shared.into())).unwrap();
        let source = Arc::new(source);
        let parsed = crate::config::parse(source.clone());
        parsed.map(|(config, _)| config).map_err(|d| LoadError::Report { source, diagnostics: d }.to_string())
    }

    #[test]
    fn what_stands_in_the_nodes_own_file_is_free_until_the_repository_leads_to_it() {
        let own = content("*", "127.0.0.1:22", "127.0.0.1:8443");
        let more = "[upstreams.b]\ntargets = [\"b.example:443\"]\n[[routes]]\nhosts = [\"b.example.com\"]\nupstream = \"UP\"\n";
        let config = both(&own, &more.replace("UP", "b")).unwrap();
        assert!(config.upstreams[0].targets[0].fence.is_none() && config.upstreams[1].targets[0].fence.is_some());
        assert!(own_targets(&config, &[Ipv4Addr::LOCALHOST.into()]).is_empty());
        let said = both(&own, &more.replace("UP", "a")).unwrap_err();
        assert!(said.contains("0123:x.toml:4:10: error: the repository may not lead to `127.0.0.1:8443`"), "{said}");
        let by_tcp = "[listeners.t]\nmode = \"tcp\"\nbind = [\"0.0.0.0:443\"]\nupstream = \"a\"\n";
        let said = both(&own, by_tcp).unwrap_err();
        assert!(said.contains("0123:x.toml:1:12: error: the repository may not lead to"), "{said}");
        // The port for challenges is a port of the targets, whoever names it; the owner's own
        // listener refuses no commit.
        let by_owner = "[listeners.w]\nmode = \"http\"\nbind = [\"0.0.0.0:80\"]\nacme_port = 22\n";
        let to = |target: &str| content("a.example.com", "0.0.0.0:443", target);
        let warnings = |own: &str, shared: &str| {
            let own = format!("[source]\ngit = \"/srv/x.git\"\n{own}{by_owner}");
            let mut source = Source::new("node.toml", own);
            crate::config::add_repository(&mut source, "0123", Path::new("x.toml"), &Commit(shared.into())).unwrap();
            let (config, found) = crate::config::parse(Arc::new(source)).unwrap();
            let own = own_targets(&config, &["192.0.2.9".parse().unwrap()]);
            found.iter().chain(&own).map(|found| found.message.clone()).collect::<Vec<_>>().join("\n")
        };
        let narrow = "allow_targets = [\"10.0.0.0/8:443\"]\n";
        assert!(warnings(narrow, &to("10.0.0.1:443")).contains("not passed on to `10.0.0.1:22`"));
        assert_eq!(warnings("allow_targets = [\"10.0.0.0/8\"]\n", &to("10.0.0.1:443")), "");
        let this_machine = "allow_targets = [\"*\", \"192.0.2.9:8443\"]\n";
        assert!(warnings(this_machine, &to("192.0.2.9:8443")).contains("not passed on to `192.0.2.9:22`"));
        let acme = content("a.example.com", "0.0.0.0:443", "10.0.0.1:443")
            + "[listeners.w]\nmode = \"http\"\nbind = [\"0.0.0.0:80\"]\nacme_port = 22\n";
        let own = "allow_targets = [\"10.0.0.0/8:443\"]\n";
        let said = both(own, &acme).unwrap_err();
        assert!(said.contains("may not lead to `10.0.0.1:22`"), "{said}");
        // What is refused as the target's own port is not told again as that for challenges.
        let told = |own: &str, shared: &str| both(own, shared).unwrap_err().matches(":22`").count();
        assert_eq!(told(own, &acme.replace("10.0.0.1:443", "10.0.0.1:22")), 1);
        assert_eq!(told(&format!("{own}{by_owner}"), &to("10.0.0.1:22")), 1);
        let said = warnings("allow_targets = [\"*\"]\n", &to("192.0.2.9:22"));
        assert_eq!(said.matches(":22`").count(), 1, "{said}");
        // An address of this machine.
        let config = both("", &content("a.example.com", "0.0.0.0:443", "192.0.2.9:22")).unwrap();
        let found = own_targets(&config, &["192.0.2.9".parse().unwrap()]);
        assert!(found.len() == 1 && found[0].is_error() && found[0].message.contains("this machine"), "{found:?}");
    }

    #[test]
    fn what_a_machine_is_and_where_its_secrets_lie_is_no_business_of_a_repository() {
        use crate::config::keys;
        let content = content("a.example.com", "0.0.0.0:443", "a.example:443");
        for own in [
            "engine = \"copy\"\n",
            "watch = true\n",
            "[admin]\nbind = \"0.0.0.0:9443\"\n",
            "[resolver]\nservers = [\"192.0.2.53\"]\n",
            "[tailnet]\nsocket = \"/tmp/x\"\n",
            "[source]\ngit = \"http://192.0.2.1/x\"\ntoken_file = \"/etc/shadow\"\n",
            "[limits]\nmax_connections = 1\n",
            "[limits]\nkernel_memory = \"1GiB\"\n",
        ] {
            // Keys of the top level come before the first table.
            let text = if own.starts_with('[') { format!("{content}{own}") } else { format!("{own}{content}") };
            let said = refused(&Fence::default(), &text);
            assert!(
                said.contains("belongs to the node alone") && said.contains("move it into the node's own file"),
                "{said}"
            );
        }
        let config = both(
            "[limits]\nmax_connections = 7\nidle_timeout = \"1m\"\n",
            &format!("{content}[limits]\nidle_timeout = \"2m\"\nhello_timeout = \"3s\"\n"),
        );
        let limits = config.unwrap().limits;
        assert_eq!((limits.max_connections, limits.idle_timeout.as_secs(), limits.hello_timeout.as_secs()), (7, 60, 3));
        // No table that it may have names a file.
        let tables = [keys::INCLUDED, keys::LISTENER, keys::UPSTREAM, keys::HEALTH, keys::ROUTE, keys::LIMITS];
        assert!(tables.concat().iter().all(|key| !key.name.ends_with("_file") || keys::NODE_ONLY.contains(&key.name)));
    }
}
