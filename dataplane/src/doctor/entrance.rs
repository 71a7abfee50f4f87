//! What bites on a real entrance node, besides the kernel: rules that take connections before our
//! socket, a full table of connections, a tailnet that relays.
//!
//! It looks, with the programs that the machine has, and changes nothing.

use std::collections::HashMap;
use std::fs;
use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::nat::{self, Met, Syn};
use crate::config::{Config, DEFAULT_TAILSCALED, TargetHost};
use crate::machine_memory::MachineMemory;
use crate::tailnet::{self, View, Way};

/// From here on nf_conntrack is nearly full: it drops packets of new connections when it is.
const NEARLY_FULL: f64 = 0.8;

/// What one look found.
#[derive(Debug, Serialize)]
pub struct Finding {
    pub check: &'static str,
    /// Nothing is wrong with it; `None`: it could not be looked at.
    pub ok: Option<bool>,
    /// For people.
    pub text: String,
}

impl Finding {
    fn new(check: &'static str, ok: bool, text: impl Into<String>) -> Self {
        Self { check, ok: Some(ok), text: text.into() }
    }

    fn unknown(check: &'static str, text: impl Into<String>) -> Self {
        Self { check, ok: None, text: text.into() }
    }
}

/// For a program to print what it has. `nft` with thousands of rules takes a second.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes: a hundred thousand rules.
const MOST: u64 = 16 << 20;

/// Names of findings.
const NAT: &str = "NAT";
const FIREWALL: &str = "firewall";

/// `running` is the status of the daemon, if one runs.
pub fn look(config: Option<&Config>, running: Option<&Value>) -> Vec<Finding> {
    let socket = config.map_or(Path::new(DEFAULT_TAILSCALED), |config| &config.tailnet.socket);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let view = runtime.ok().and_then(|runtime| runtime.block_on(tailnet::look(socket)).ok());
    let mut findings = rules(config);
    findings.extend([conntrack(), path(config, view.as_ref()), udp_gro(view.is_some()), connections(config, running)]);
    findings
}

/// How many there may be, as far as it can be told without the daemon: its RLIMIT_NOFILE is its
/// own.
fn connections(config: Option<&Config>, running: Option<&Value>) -> Finding {
    let limits = running.map(|status| &status["limits"]);
    if let Some((most, by)) =
        limits.and_then(|l| Some((l["max_connections"].as_u64()?, l["max_connections_by"].as_str()?)))
    {
        return Finding::new("connections", true, format!("at most {most} in the daemon that runs, by {by}"));
    }
    let (most, by) = MachineMemory::read().connections();
    let configured = config.map_or(0, |config| config.limits.max_connections);
    let text = match configured {
        0 => format!("at most {most}, by {by}; `dataplane status` says whether descriptors allow fewer"),
        _ if configured <= most => format!("at most {configured}, as configured; {most} by {by}"),
        _ => format!(
            "max_connections is {configured}, but there is room for {most} by {by}\n  help: lower `max_connections` in [limits], or remove it"
        ),
    };
    Finding::new("connections", configured <= most, text)
}

/// What a program prints; `None`: it is not there, may not, takes longer than [`PATIENCE`] or
/// prints more than [`MOST`].
fn said(program: &str, arguments: &[&str]) -> Option<String> {
    // A service's PATH may lack the system's own programs.
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new(program);
    command.args(arguments).env("PATH", path).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().ok()?;
    let output = child.stdout.take()?;
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let read = output.take(MOST + 1).read_to_end(&mut bytes);
        let _ = tell.send(read.map(|_| bytes));
    });
    let bytes = told.recv_timeout(PATIENCE).ok().and_then(Result::ok).filter(|bytes| bytes.len() as u64 <= MOST);
    if bytes.is_none() {
        let _ = child.kill();
    }
    let ended = child.wait().ok()?;
    bytes.filter(|_| ended.success()).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// What a SYN to our listeners meets.
fn rules(config: Option<&Config>) -> Vec<Finding> {
    let binds = config.iter().flat_map(|c| &c.listeners).flat_map(|l| &l.bind).map(|b| b.addr);
    let mut binds: Vec<SocketAddr> = binds.collect();
    if binds.is_empty() {
        binds.push(SocketAddr::from(([0, 0, 0, 0], 443)));
    }
    let mut ports: Vec<u16> = binds.iter().map(SocketAddr::port).collect();
    ports.sort_unstable();
    ports.dedup();
    let Some(rules) = Rules::gather() else {
        const TEXT: &str = "not looked at: neither iptables-save nor nft can be run here; run it as root";
        return vec![Finding::unknown(NAT, TEXT), Finding::unknown(FIREWALL, TEXT)];
    };
    let own = own_addresses();
    let mut unreadable = rules.unreadable.clone();
    let (mut taken, mut dropped) = (None, None);
    for bind in binds {
        let of_family = |ip: &IpAddr| ip.is_ipv4() == bind.is_ipv4();
        let to: Vec<IpAddr> =
            if bind.ip().is_unspecified() { own.iter().copied().filter(of_family).collect() } else { vec![bind.ip()] };
        for to in to {
            let by = if is_of_tailnet(to) { None } else { default_device(to.is_ipv4()) };
            let met = rules.meet(Syn { to, port: bind.port(), by: by.as_deref() });
            if let Some(rule) = met.taken {
                let text = format!(
                    "a rule takes connections to port {} of {to} before our socket sees them: {rule}\n  help: delete the rule, or have it leave our port out; on a \
                     k3s node that is servicelb: run it with `--disable servicelb`, or keep it off this node by the label svccontroller.k3s.cattle.io/enablelb on others",
                    bind.port()
                );
                taken.get_or_insert(text);
            }
            if let Some(rule) = met.dropped {
                dropped.get_or_insert_with(|| {
                    format!(
                        "every connection to port {port} of {to} is dropped: {rule}\n  help: let TCP port {port} in where that rule comes from: \
                         `ufw allow {port}/tcp`, `firewall-cmd --permanent --add-port={port}/tcp`, or `tcp dport {port} accept` before it",
                        port = bind.port()
                    )
                });
            }
            unreadable.extend(met.unreadable);
        }
    }
    let ports = numbers(&ports);
    let firewall = match dropped {
        Some(text) => Finding::new(FIREWALL, false, text),
        None => Finding::new(FIREWALL, true, format!("no rule drops every connection to port {ports}")),
    };
    vec![nat(taken, unreadable, &ports, rules.nft.is_some()), firewall]
}

/// `unreadable` are rules that may take a connection.
fn nat(taken: Option<String>, mut unreadable: Vec<String>, ports: &str, has_nft: bool) -> Finding {
    if let Some(text) = taken {
        return Finding::new(NAT, false, text);
    }
    unreadable.sort();
    unreadable.dedup();
    if let [first, others @ ..] = &unreadable[..] {
        let more = if others.is_empty() { String::new() } else { format!(" (and {} more)", others.len()) };
        let text = format!(
            "this may take connections to port {ports}, it cannot be read here: {first}{more}\n  help: connect from outside and look whether `dataplane status` counts the connection"
        );
        return Finding::new(NAT, false, text);
    }
    if !has_nft {
        let text = format!(
            "no rule of iptables takes connections to port {ports}; nftables' own rules were not looked at, for nft cannot be run here\n  help: `apt-get install nftables`, \
             and run this as root"
        );
        return Finding::unknown(NAT, text);
    }
    Finding::new(NAT, true, format!("no rule takes connections to port {ports}"))
}

/// What stands in a rule, by family, table and handle.
type Texts = HashMap<(String, String, u64), String>;

/// The rules of this machine.
struct Rules {
    /// What iptables-save and its kin print, and whether that is for IPv4.
    iptables: Vec<(String, bool)>,
    nft: Option<(Value, Texts)>,
    /// What could not be asked for.
    unreadable: Vec<String>,
}

impl Rules {
    /// `None`: no program could be run.
    fn gather() -> Option<Self> {
        let mut iptables = Vec::new();
        let mut unreadable = Vec::new();
        for (family, v4) in [("iptables", true), ("ip6tables", false)] {
            let kinds = ["nft", "legacy"].map(|kind| said(&format!("{family}-{kind}-save"), &[]));
            let legacy = kinds[1].is_some();
            let mut dumps: Vec<String> = kinds.into_iter().flatten().collect();
            if dumps.is_empty() {
                dumps.extend(said(&format!("{family}-save"), &[]));
            }
            let names = fs::read_to_string(format!("/proc/net/{}_tables_names", &family[..family.len() - 6]));
            let legacy = legacy || dumps.iter().any(|dump| dump.contains("(legacy)"));
            if names.is_ok_and(|names| names.lines().any(|name| name == "nat")) && !legacy {
                unreadable.push(format!("the table `nat` of {family}-legacy: {family}-legacy-save cannot be run"));
            }
            iptables.extend(dumps.into_iter().map(|dump| (dump, v4)));
        }
        let nft = said("nft", &["-j", "list", "ruleset"]).map(|json| {
            serde_json::from_str(&json).unwrap_or_else(|error| {
                unreadable.push(format!("the rules of nftables: `nft -j list ruleset` is no JSON: {error}"));
                Value::Null
            })
        });
        let nft = nft.map(|json| (json, texts(&said("nft", &["-a", "list", "ruleset"]).unwrap_or_default())));
        (!iptables.is_empty() || nft.is_some()).then_some(Self { iptables, nft, unreadable })
    }

    fn meet(&self, syn: Syn<'_>) -> Met {
        let mut met = Met::default();
        for (dump, v4) in &self.iptables {
            if *v4 == syn.to.is_ipv4() {
                nat::add(&mut met, nat::of_iptables(dump, syn));
            }
        }
        if let Some((ruleset, texts)) = &self.nft {
            // iptables-nft keeps its tables there too, and says itself better what is in them.
            let read = self.iptables.iter().any(|(dump, v4)| *v4 == syn.to.is_ipv4() && dump.contains("(nf_tables)"));
            // A table of one of its names that somebody else has made, or added chains to, it leaves
            // out in whole or in part; this it says in a comment.
            let is_foreign = |table: &str| {
                let dumps = self.iptables.iter().filter(|(_, v4)| *v4 == syn.to.is_ipv4());
                let mut lines = dumps.flat_map(|(dump, _)| dump.lines());
                lines.any(|line| line.contains(&format!("`{table}'")) && line.contains("incompatible"))
            };
            let skip = |family: &str, table: &str| {
                let is_own = matches!(family, "ip" | "ip6") && matches!(table, "nat" | "mangle" | "raw" | "filter");
                read && is_own && !is_foreign(table)
            };
            let text = |family: &str, table: &str, handle: u64| {
                texts.get(&(family.to_owned(), table.to_owned(), handle)).cloned()
            };
            nat::add(&mut met, nat::of_nft(ruleset, syn, &text, &skip));
        }
        met
    }
}

/// The rules of `nft -a list ruleset`, by family, table and handle.
fn texts(ruleset: &str) -> Texts {
    let mut here = (String::new(), String::new());
    let mut texts = HashMap::new();
    for line in ruleset.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let ["table", family, name, ..] = words[..] {
            here = (family.to_owned(), name.to_owned());
        } else if let Some((text, handle)) = line.rsplit_once(" # handle ")
            && let Ok(handle) = handle.trim().parse()
        {
            texts.insert((here.0.clone(), here.1.clone(), handle), text.trim().to_owned());
        }
    }
    texts
}

/// Whether an address is in the networks that tailnets use (RFC 6598, RFC 4193). One of RFC 1918
/// may be what a cloud translates its public address to.
fn is_of_tailnet(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.octets()[0] == 100 && ip.octets()[1] & 0xc0 == 64,
        IpAddr::V6(ip) => ip.is_unique_local(),
    }
}

/// The device of the default route.
fn default_device(v4: bool) -> Option<String> {
    let (file, place, none) =
        if v4 { ("route", 1, "00000000") } else { ("ipv6_route", 0, "00000000000000000000000000000000") };
    let routes = fs::read_to_string(format!("/proc/net/{file}")).unwrap_or_default();
    let lines = routes.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let mut to_all = lines.filter(|words| words.get(place) == Some(&none) && (v4 || words.get(1) == Some(&"00")));
    let words = to_all.find(|words| !words.contains(&"lo"))?;
    if v4 { words.first() } else { words.last() }.map(|device| (*device).to_owned())
}

/// The addresses of this machine that others can reach.
fn own_addresses() -> Vec<IpAddr> {
    let mut all = Vec::new();
    let mut last = None;
    for line in fs::read_to_string("/proc/net/fib_trie").unwrap_or_default().lines() {
        let line = line.trim();
        if let Some(address) = line.strip_prefix("|-- ") {
            last = address.parse::<Ipv4Addr>().ok();
        } else if line == "/32 host LOCAL" {
            all.extend(last.filter(|ip| !ip.is_loopback()).map(IpAddr::V4));
        }
    }
    for line in fs::read_to_string("/proc/net/if_inet6").unwrap_or_default().lines() {
        let hex = line.split_whitespace().next().unwrap_or_default();
        all.extend(
            u128::from_str_radix(hex, 16).ok().map(Ipv6Addr::from).filter(|ip| !ip.is_loopback()).map(IpAddr::V6),
        );
    }
    all.sort_unstable();
    all.dedup();
    all
}

fn numbers(ports: &[u16]) -> String {
    ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ")
}

fn conntrack() -> Finding {
    const CHECK: &str = "nf_conntrack";
    let read = |name: &str| {
        let text = fs::read_to_string(format!("/proc/sys/net/netfilter/nf_conntrack_{name}")).ok()?;
        text.trim().parse::<u64>().ok()
    };
    match (read("count"), read("max")) {
        (Some(count), Some(max)) if max > 0 => judge_conntrack(count, max),
        _ => Finding::new(CHECK, true, "not in use"),
    }
}

fn judge_conntrack(count: u64, max: u64) -> Finding {
    let ok = (count as f64) < max as f64 * NEARLY_FULL;
    let mut text = format!("{count} of {max} connections");
    if !ok {
        text += &format!(
            "; when it is full, new connections are dropped\n  help: `sysctl -w net.netfilter.nf_conntrack_max={}`, or exempt our ports from tracking",
            max * 4
        );
    }
    Finding::new("nf_conntrack", ok, text)
}

fn path(config: Option<&Config>, view: Option<&View>) -> Finding {
    const CHECK: &str = "tailnet";
    let Some(view) = view else { return Finding::new(CHECK, true, "no tailscaled answers here") };
    let targets = config.iter().flat_map(|c| &c.upstreams).flat_map(|u| &u.targets);
    let relayed: Vec<String> = targets
        .filter_map(|target| {
            let peer = match &target.host {
                TargetHost::Ip(ip) => view.by_address(*ip),
                TargetHost::Name(name) => view.by_name(name),
            }?;
            (peer.path == Way::Relayed)
                .then(|| format!("{} by {}", target.text, peer.via.as_deref().unwrap_or("a relay")))
        })
        .collect();
    if relayed.is_empty() {
        return Finding::new(CHECK, true, format!("{}; no target is known to be relayed", view.suffix));
    }
    let text = format!(
        "relayed, at a fraction of the speed: {}\n  help: let UDP through between the machines (port 41641 at one end is enough); `tailscale netcheck` says what \
         is in the way",
        relayed.join(", ")
    );
    Finding::new(CHECK, false, text)
}

/// Tailscale recommends it for machines that forward (kernel 6.2 and later):
/// <https://tailscale.com/kb/1320/performance-best-practices>.
fn udp_gro(tailscale: bool) -> Finding {
    const CHECK: &str = "UDP GRO";
    let not_looked_at = |why: &str| Finding::unknown(CHECK, format!("not looked at: {why}"));
    if !tailscale {
        return not_looked_at("no tailscaled answers here");
    }
    let routes = fs::read_to_string("/proc/net/route").unwrap_or_default();
    let default = routes.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let Some(device) = default.into_iter().find(|f| f.get(1) == Some(&"00000000")).map(|f| f[0].to_owned()) else {
        return not_looked_at("there is no default route");
    };
    match said("ethtool", &["-k", &device]) {
        Some(features) => judge_udp_gro(&device, &features),
        None => not_looked_at("ethtool cannot be run here"),
    }
}

fn judge_udp_gro(device: &str, features: &str) -> Finding {
    let value = |key: &str| features.lines().find_map(|line| line.trim().strip_prefix(key)?.split_whitespace().next());
    // What the device has fixed nobody can change.
    let fixed = features.lines().any(|line| line.contains("rx-udp-gro-forwarding:") && line.contains("[fixed]"));
    let good = value("rx-udp-gro-forwarding:") == Some("on") && value("rx-gro-list:") != Some("on");
    if good || fixed || value("rx-udp-gro-forwarding:").is_none() {
        return Finding::new("UDP GRO", true, format!("{device}: as tailscale recommends, or as its driver has it"));
    }
    let text = format!(
        "{device}: WireGuard's packets come in one by one\n  help: `ethtool -K {device} rx-udp-gro-forwarding on rx-gro-list off`, at every boot"
    );
    Finding::new("UDP GRO", false, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_connections_that_is_nearly_full_is_told() {
        assert!(judge_conntrack(100, 1000).ok == Some(true));
        let full = judge_conntrack(900, 1000);
        assert!(full.ok == Some(false) && full.text.contains("nf_conntrack_max=4000"), "{full:?}");
    }

    #[test]
    fn ethtool_says_whether_udp_is_coalesced() {
        let off = "Features for eth0:\nrx-gro-list: off\nrx-udp-gro-forwarding: off\n";
        assert!(judge_udp_gro("eth0", off).ok == Some(false));
        assert!(judge_udp_gro("eth0", &off.replace("forwarding: off", "forwarding: on")).ok == Some(true));
        assert!(judge_udp_gro("eth0", &off.replace("forwarding: off", "forwarding: off [fixed]")).ok == Some(true));
        assert!(judge_udp_gro("eth0", "rx-gro-list: off\n").ok == Some(true), "an old kernel");
    }
}
