//! What nginx does, written as our configuration.
//!
//! Our routes are one table for all listeners: a name that one listener has by itself is refused by
//! every other that does not list it. So each pattern is written for each listener that a wider
//! one would cover.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use ipnet::IpNet;

use super::super::syntax::Place;
use super::super::{Imported, Kind, Note};
use super::access::{Lists, everybody};
use super::names::Key;
use super::server::PREREAD_TIMEOUT;
use super::stream::Stream;
use super::upstream::{Members, is_name};
use crate::config::{
    Diagnostic, HostPattern, LARGEST, MOST_BINDS, MOST_LISTENERS, Source, format_duration, parse, shown,
};

/// Questions where a name goes: names times addresses.
const MOST_QUESTIONS: usize = 4_000_000;
/// Notes at the head of the file.
const SHOWN_NOTES: usize = 100;

/// Where a listener sends connections, by index into [`Stream::uses`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Way {
    /// All to one.
    All(usize),
    /// For each pattern, and at the end for all other names.
    ByName(Vec<Option<usize>>),
}

struct Listener {
    name: String,
    binds: Vec<SocketAddr>,
    way: Way,
    guard: Arc<Guard>,
}

/// In the words of our configuration.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Guard {
    accept_proxy: Vec<IpNet>,
    lists: Lists,
}

/// Names that listeners may tell apart from others.
struct Pattern {
    hosts: HostPattern,
    place: Place,
    /// Why our configuration cannot have it as it is.
    unwritable: Option<String>,
}

/// A route; no upstream: it refuses.
struct Route {
    hosts: Vec<String>,
    /// Empty: all.
    listeners: Vec<usize>,
    upstream: Option<usize>,
}

/// Writes the file.
///
/// # Errors
/// Nothing could be carried over.
pub fn write(path: &Path, mut stream: Stream<'_>) -> Result<Imported> {
    let mut patterns = stream.patterns();
    patterns.push((HostPattern::Any, Place { file: path.into(), line: 1 }));
    let patterns: Vec<Pattern> = patterns
        .into_iter()
        .map(|(hosts, place)| Pattern { unwritable: writable(&hosts).err(), hosts, place })
        .collect();
    let listeners = listeners(&mut stream, &patterns)?;
    let routes = routes(&patterns, &listeners);
    let rest = rest(&mut stream, &listeners);
    for block in stream.unused_blocks() {
        let message = format!("upstream `{}` is not carried over: nothing that was uses it", block.text());
        stream.notes.changed(&block.place, message);
    }
    let Stream { notes, uses, .. } = stream;
    let notes = notes.sorted();
    let told = |notes: &[Note]| notes.iter().fold(String::new(), |told, note| told + &format!("{note}\n"));
    if listeners.is_empty() {
        bail!("{}{}: error: no server of a `stream` block could be carried over", told(&notes), path.display());
    }
    let names = upstream_names(uses.iter().map(|used| &*used.name));
    let mut toml = head(path, &notes);
    for listener in &listeners {
        let _ = writeln!(toml, "\n[listeners.{}]", quoted_key(&listener.name));
        if let Way::All(upstream) = listener.way {
            let _ = writeln!(toml, "mode = \"tcp\"\nupstream = {}", quoted(&names[upstream]));
        }
        let _ = writeln!(toml, "bind = {}", list(&listener.binds));
        let Guard { accept_proxy, lists: Lists { allow, deny } } = &*listener.guard;
        for (key, networks) in [("accept_proxy", accept_proxy), ("allow", allow), ("deny", deny)] {
            if !networks.is_empty() {
                let _ = writeln!(toml, "{key} = {}", list(networks));
            }
        }
    }
    let to_all = listeners.iter().filter_map(|listener| match listener.way {
        Way::All(upstream) => Some(upstream),
        Way::ByName(_) => None,
    });
    let needed: HashSet<usize> = to_all.chain(routes.iter().filter_map(|route| route.upstream)).collect();
    for (used, name) in uses.iter().zip(&names).enumerate().filter(|(at, _)| needed.contains(at)).map(|(_, both)| both)
    {
        let Members { targets, balance, max_connections } = &used.members;
        let texts: Vec<_> = targets.iter().map(|target| &target.text).collect();
        let _ = writeln!(toml, "\n[upstreams.{}]\ntargets = {}", quoted_key(name), list(&texts));
        if targets.len() > 1 {
            let _ = writeln!(toml, "balance = \"{balance}\"");
        }
        if *max_connections > 0 {
            let _ = writeln!(toml, "max_connections_per_target = {max_connections}");
        }
        if used.send_proxy {
            toml += "send_proxy = \"v1\"\n";
        }
        if let Some(timeout) = used.connect_timeout {
            let _ = writeln!(toml, "connect_timeout = \"{}\"", format_duration(timeout));
        }
    }
    for route in &routes {
        let _ = write!(toml, "\n[[routes]]\nhosts = {}\n", list(&route.hosts));
        if !route.listeners.is_empty() {
            let names: Vec<&str> = route.listeners.iter().map(|index| &*listeners[*index].name).collect();
            let _ = writeln!(toml, "listeners = {}", list(&names));
        }
        let _ = match route.upstream {
            Some(upstream) => writeln!(toml, "upstream = {}", quoted(&names[upstream])),
            None => writeln!(toml, "action = \"refuse\""),
        };
    }
    toml += &rest;
    checked(path, toml, notes, told)
}

/// The file, if it is one of ours.
fn checked(path: &Path, toml: String, notes: Vec<Note>, told: impl Fn(&[Note]) -> String) -> Result<Imported> {
    if toml.len() > LARGEST {
        bail!(
            "{}{}: error: what comes of it has {} bytes, and a configuration has at most {LARGEST}",
            told(&notes),
            path.display(),
            toml.len()
        );
    }
    let source = Arc::new(Source::new(path, toml.clone()));
    let Err(diagnostics) = parse(source.clone()) else { return Ok(Imported { toml, notes }) };
    let errors = diagnostics.iter().filter(|d| d.is_error());
    let shown: String = errors.map(|d: &Diagnostic| d.render(&source).to_string()).collect();
    bail!("{}{toml}\n{}: error: what comes of it, above, does not check:\n{shown}", told(&notes), path.display())
}

/// The listeners of all addresses; addresses with the same ways and guards are one.
fn listeners(stream: &mut Stream<'_>, patterns: &[Pattern]) -> Result<Vec<Listener>> {
    let mut of_group: HashMap<usize, Option<(Way, Arc<Guard>)>> = HashMap::new();
    let mut questions = 0;
    let mut found: Vec<(SocketAddr, usize, Way, Arc<Guard>)> = Vec::new();
    for (addr, index) in stream.sockets.clone() {
        let answer = if let Some(answer) = of_group.get(&index) {
            answer.clone()
        } else {
            let blind = stream.is_blind(index);
            questions += if blind { 1 } else { patterns.len() };
            if questions > MOST_QUESTIONS {
                bail!("error: there are more than {MOST_QUESTIONS} names and addresses to look at");
            }
            let answer = group(stream, index, if blind { &[] } else { patterns });
            of_group.insert(index, answer.clone());
            answer
        };
        if let Some((way, guard)) = answer {
            found.push((addr, index, way, guard));
        }
    }
    let clashing = without_clashes(stream, &found);
    let mut listeners: Vec<Listener> = Vec::new();
    let mut index_of: HashMap<(Way, Arc<Guard>, Option<usize>), usize> = HashMap::new();
    let mut names = HashSet::new();
    for (addr, group, way, guard) in found.into_iter().filter(|(addr, ..)| !clashing.contains(addr)) {
        // Ports that lead to one upstream by chance remain two listeners.
        let by_chance = matches!(way, Way::All(_)).then_some(group);
        let key = (way.clone(), Arc::clone(&guard), by_chance);
        let is_one_more = listeners.len() == MOST_LISTENERS && !index_of.contains_key(&key);
        if is_one_more || listeners.iter().map(|listener| listener.binds.len()).sum::<usize>() == MOST_BINDS {
            let message = format!(
                "{addr} is not carried over: there are at most {MOST_LISTENERS} listeners, with {MOST_BINDS} addresses"
            );
            stream.notes.lost(stream.servers[stream.group(group).default].place, message);
            if !addr.ip().is_unspecified() {
                bail!("error: there are more than {MOST_LISTENERS} listeners, with {MOST_BINDS} addresses");
            }
            continue;
        }
        let index = *index_of.entry(key).or_insert_with(|| {
            let base = match (&way, addr.port()) {
                (Way::ByName(_), 443) => "public".to_owned(),
                (Way::ByName(_), port) => format!("tls-{port}"),
                (Way::All(_), port) => format!("tcp-{port}"),
            };
            let name = unused(&base, &mut names);
            listeners.push(Listener { name, binds: Vec::new(), way, guard });
            listeners.len() - 1
        });
        listeners[index].binds.push(addr);
    }
    Ok(listeners)
}

/// What becomes of the connections of a group. `None`: nothing, and why was told.
fn group(stream: &mut Stream<'_>, index: usize, patterns: &[Pattern]) -> Option<(Way, Arc<Guard>)> {
    let group = stream.group(index);
    let guard = group.guard.as_ref()?;
    let way = way(stream, index, patterns)?;
    let place = stream.servers[group.default].place;
    let accept_proxy =
        if group.proxy_protocol { accept_proxy(stream, &guard.trusted, &way, place)? } else { Vec::new() };
    let lists = guard.access.lists().unwrap_or_else(|| Lists { allow: Vec::new(), deny: everybody().into() });
    Some((way, Arc::new(Guard { accept_proxy, lists })))
}

/// Where the connections of a group go. `None`: nowhere, and why was told.
fn way(stream: &mut Stream<'_>, index: usize, patterns: &[Pattern]) -> Option<Way> {
    let server = &stream.servers[stream.group(index).default];
    let (place, looks_at_names) = (server.place, server.preread || !server.names.is_empty());
    let nameless = stream.decide(index, Key::Nameless);
    let mut ways: Vec<Option<usize>> =
        patterns.iter().map(|pattern| stream.decide(index, Key::of(&pattern.hosts))).collect();
    if let Some(all) = nameless
        && ways.iter().all(|way| *way == Some(all))
    {
        if looks_at_names {
            let message = format!(
                "every connection goes to `{}`, whatever its name: carried over as mode \"tcp\"; a listener of mode \"tls\" with routes would let listed names through alone",
                stream.uses[all].name
            );
            stream.notes.changed(place, message);
        }
        return Some(Way::All(all));
    }
    for (way, Pattern { hosts, place, unwritable }) in ways.iter_mut().zip(patterns) {
        if let (Some(_), Some(why)) = (*way, unwritable) {
            stream.notes.lost(place, format!("`{hosts}` is not carried over: {why}"));
            *way = None;
        }
    }
    if patterns.is_empty() {
        stream.notes.changed(place, "no connection that comes here is forwarded, so there is no listener for it");
        return None;
    }
    if ways.iter().all(Option::is_none) {
        stream.notes.lost(place, "this server is not carried over: none of its destinations could be");
        return None;
    }
    let others = stream.place_of_others(index);
    if let Some(Some(all)) = ways.last() {
        let message = format!(
            "every name that is not listed goes to `{}`, as before: list the names that are meant and remove the route of \"*\"",
            stream.uses[*all].name
        );
        stream.notes.changed(others, message);
    }
    if let Some(all) = nameless {
        let message = format!(
            "clients without a server name, and those that do not speak TLS, are refused; nginx sent them to `{}`",
            stream.uses[all].name
        );
        stream.notes.lost(others, message);
    }
    Some(Way::ByName(ways))
}

/// Whose PROXY headers are believed where nginx asks every client for one. `None`: that cannot be
/// carried over, and why was told.
fn accept_proxy(stream: &mut Stream<'_>, trusted: &[IpNet], way: &Way, place: &Place) -> Option<Vec<IpNet>> {
    if trusted.is_empty() {
        let message = "every client must send a PROXY header here, and is believed: put the addresses of the proxies in front into `accept_proxy`";
        stream.notes.changed(place, message);
        return Some(everybody().into());
    }
    if let Way::All(upstream) = way
        && !stream.uses[*upstream].send_proxy
    {
        let message = "this server is not carried over: nginx takes away the PROXY header of a peer that it does not believe; here it would reach the target as if it came from this machine";
        stream.notes.lost(place, message);
        return None;
    }
    let message = "PROXY headers are asked for and believed from `set_real_ip_from` alone; other peers must send none, nginx asks everybody for one";
    stream.notes.lost(place, message);
    let mut networks = trusted.to_vec();
    networks.sort();
    networks.dedup();
    Some(networks)
}

/// Whether our configuration reads a pattern as it is.
fn writable(pattern: &HostPattern) -> Result<(), String> {
    match HostPattern::parse(&pattern.to_string()) {
        Ok(read) if read == *pattern => Ok(()),
        Ok(_) => Err("it would be another name here".into()),
        Err(refused) => Err(format!("{}; {}", refused.message, refused.remedy)),
    }
}

/// Addresses that cannot be bound beside another that takes every address of the port, and those
/// others if they do not do the same: what comes to an address that is left out would go there.
fn without_clashes(stream: &mut Stream<'_>, found: &[(SocketAddr, usize, Way, Arc<Guard>)]) -> HashSet<SocketAddr> {
    let by_addr: HashMap<SocketAddr, usize> = found.iter().enumerate().map(|(at, (addr, ..))| (*addr, at)).collect();
    let any_of = |ip: IpAddr, port| {
        let unspecified: IpAddr = if ip.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        SocketAddr::new(unspecified, port)
    };
    let mut left_out = HashSet::new();
    for (addr, group) in stream.sockets.clone() {
        let any = any_of(addr.ip(), addr.port());
        let Some(other) = by_addr.get(&any).map(|at| &found[*at]).filter(|_| any != addr) else { continue };
        left_out.insert(addr);
        let same = by_addr.get(&addr).is_some_and(|at| found[*at].2 == other.2 && found[*at].3 == other.3);
        if !same && left_out.insert(any) {
            let message = format!(
                "{addr} and {any} are not carried over: both cannot be bound here, and they do not do the same; write a listener for each address of this machine"
            );
            stream.notes.lost(stream.servers[stream.group(group).default].place, message);
        }
    }
    for index in 0..stream.servers.len() {
        for port in stream.servers[index].unknown_hosts.clone() {
            let anys = [any_of([0; 4].into(), port), any_of([0; 16].into(), port)];
            for any in anys.into_iter().filter(|any| by_addr.contains_key(any)) {
                left_out.insert(any);
                let message = format!(
                    "{any} is not carried over: an address of this port is not known, and what comes to it would go there"
                );
                stream.notes.lost(stream.servers[index].place, message);
            }
        }
    }
    left_out
}

/// The routes of all listeners that look at names.
fn routes(patterns: &[Pattern], listeners: &[Listener]) -> Vec<Route> {
    let by_name: Vec<(usize, &[Option<usize>])> = listeners
        .iter()
        .enumerate()
        .filter_map(|(index, listener)| match &listener.way {
            Way::ByName(ways) => Some((index, &ways[..])),
            Way::All(_) => None,
        })
        .collect();
    let mut routes: Vec<Route> = Vec::new();
    let mut index_of: HashMap<(Vec<usize>, Option<usize>), usize> = HashMap::new();
    let mut add = |host: String, listeners: Vec<usize>, upstream: Option<usize>| {
        let index = *index_of.entry((listeners.clone(), upstream)).or_insert_with(|| {
            routes.push(Route { hosts: Vec::new(), listeners, upstream });
            routes.len() - 1
        });
        routes[index].hosts.push(host);
    };
    for (at, Pattern { hosts, .. }) in patterns.iter().enumerate() {
        let mut to: Vec<(usize, Vec<usize>)> = Vec::new();
        for (listener, ways) in &by_name {
            let Some(upstream) = ways[at] else { continue };
            match to.iter_mut().find(|(other, _)| *other == upstream) {
                Some((_, listeners)) => listeners.push(*listener),
                None => to.push((upstream, vec![*listener])),
            }
        }
        // A name that is refused has an entry of its own: a wider pattern may come later.
        if to.is_empty() && *hosts != HostPattern::Any && !by_name.is_empty() {
            add(hosts.to_string(), Vec::new(), None);
        }
        for (upstream, listeners) in to {
            let all = listeners.len() == by_name.len();
            add(hosts.to_string(), if all { Vec::new() } else { listeners }, Some(upstream));
        }
    }
    routes
}

/// The tables behind the routes: `[limits]`, `[resolver]`, `[admin]`.
fn rest(stream: &mut Stream<'_>, listeners: &[Listener]) -> String {
    let mut out = String::from("\n[limits]\n");
    let mut used: Vec<usize> = stream.used.iter().copied().collect();
    used.sort_unstable();
    // One for all: the longest, for a shorter one would cut connections.
    let idle = used.iter().map(|index| stream.servers[*index].idle_timeout).max().unwrap_or_default();
    for index in &used {
        let server = &stream.servers[*index];
        if server.idle_timeout != idle {
            let message = format!(
                "`proxy_timeout` of this server is {}; `idle_timeout` is one for all, {}",
                format_duration(server.idle_timeout),
                format_duration(idle)
            );
            stream.notes.lost(server.idle_place.unwrap_or(server.place), message);
        }
    }
    limit(&mut out, "idle_timeout", idle, Duration::from_secs(31_536_000));
    let prereads = || used.iter().filter_map(|index| stream.servers[*index].preread_timeout);
    let reads = listeners.iter().any(|listener| matches!(listener.way, Way::ByName(_)));
    if reads && prereads().next().is_some() {
        let own = used.iter().map(|index| stream.servers[*index].preread_timeout.unwrap_or(PREREAD_TIMEOUT));
        limit(&mut out, "hello_timeout", own.max().unwrap_or_default(), Duration::from_secs(3600));
    }
    if stream.uses.iter().flat_map(|used| &used.members.targets).any(is_name) {
        out += &resolver(stream);
    }
    let taken = |port: u16| listeners.iter().flat_map(|l| &l.binds).any(|bind| bind.port() == port);
    if taken(9443) {
        let port = (9444..=u16::MAX).find(|port| !taken(*port)).unwrap_or(9444);
        let _ = write!(out, "\n[admin]\nbind = \"127.0.0.1:{port}\"\n");
    }
    out
}

fn limit(out: &mut String, key: &str, value: Duration, most: Duration) {
    let value = value.clamp(Duration::from_millis(1), most);
    let _ = writeln!(out, "{key} = \"{}\"", format_duration(value));
}

/// Who is asked for names. nginx may have one for each server; here is one.
fn resolver(stream: &mut Stream<'_>) -> String {
    let mut servers: Option<Vec<SocketAddr>> = None;
    for directive in std::mem::take(&mut stream.resolvers) {
        let mut own = Vec::new();
        for word in directive.words.iter().filter(|word| !word.contains('=')) {
            let bare = word.trim_start_matches('[').trim_end_matches(']');
            match word.parse().ok().or_else(|| Some(SocketAddr::new(bare.parse().ok()?, 53))) {
                Some(server) => own.push(server),
                None => stream.notes.lost(
                    &directive.place,
                    format!("resolver `{word}` is not carried over: write its address into [resolver]"),
                ),
            }
        }
        own.sort();
        match &servers {
            Some(servers) if *servers != own && !own.is_empty() => {
                let message =
                    "this `resolver` is not carried over: [resolver] is one for all names, and another one came first";
                stream.notes.lost(&directive.place, message);
            }
            None if !own.is_empty() => {
                stream.notes.changed(
                    &directive.place,
                    "`resolver` becomes [resolver]: it is asked for the names of all targets",
                );
                servers = Some(own);
            }
            _ => {}
        }
    }
    servers.map(|servers| format!("\n[resolver]\nservers = {}\n", list(&servers))).unwrap_or_default()
}

fn head(path: &Path, notes: &[Note]) -> String {
    let from: String = path.display().to_string().chars().map(shown).collect();
    let mut out = format!("# From {from}. `dataplane check FILE` prints its routing table.\n");
    let notes = notes.iter().filter(|note| note.kind != Kind::Needless);
    let (count, mut notes) = (notes.clone().count(), notes.take(SHOWN_NOTES).peekable());
    if notes.peek().is_some() {
        out += "#\n# Not carried over, or not as it was:\n";
    }
    for note in notes {
        let _ = writeln!(out, "# - {note}");
    }
    if count > SHOWN_NOTES {
        let _ = writeln!(out, "# - and {} more", count - SHOWN_NOTES);
    }
    out
}

/// A name for each upstream.
fn upstream_names<'t>(texts: impl Iterator<Item = &'t str>) -> Vec<String> {
    let mut names = HashSet::new();
    texts.map(|text| unused(&sanitized(text), &mut names)).collect()
}

/// The name, or the name and a number.
fn unused(base: &str, names: &mut HashSet<String>) -> String {
    let candidates = (1_usize..).map(|n| if n == 1 { base.to_owned() } else { format!("{base}-{n}") });
    let name = candidates.into_iter().find(|name| !names.contains(name)).unwrap_or_default();
    names.insert(name.clone());
    name
}

/// Letters, digits, hyphens, underscores and dots.
fn sanitized(text: &str) -> String {
    let name: String =
        text.chars().map(|c| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '-' }).collect();
    let name = name.trim_matches('-').replace("--", "-");
    if name.is_empty() { "upstream".into() } else { name }
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

fn quoted_key(name: &str) -> String {
    if name.contains('.') { quoted(name) } else { name.to_owned() }
}

/// A list of texts.
fn list<T: ToString>(items: &[T]) -> String {
    format!("[{}]", items.iter().map(|item| quoted(&item.to_string())).collect::<Vec<_>>().join(", "))
}
