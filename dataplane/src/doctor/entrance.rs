//! What bites on a real entrance node, besides the kernel: rules that take connections before our socket, a full table of connections, a tailnet that relays.
//!
//! It looks, with the programs that the machine has, and changes nothing.

use std::fs;
use std::net::{IpAddr, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};

use serde::Serialize;

use crate::config::{Config, DEFAULT_TAILSCALED, TargetHost};
use crate::tailnet::{self, View, Way};

/// From here on nf_conntrack is nearly full: it drops packets of new connections when it is.
const NEARLY_FULL: f64 = 0.8;

/// What one look found.
#[derive(Debug, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub check: &'static str,
    /// Nothing is wrong with it.
    pub ok: bool,
    /// For people.
    pub text: String,
}

impl Finding {
    fn new(check: &'static str, ok: bool, text: impl Into<String>) -> Self {
        Self { check, ok, text: text.into() }
    }
}

/// Looks.
pub fn look(config: Option<&Config>) -> Vec<Finding> {
    let socket = config.map_or(Path::new(DEFAULT_TAILSCALED), |config| &config.tailnet.socket);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let view = runtime.ok().and_then(|runtime| runtime.block_on(tailnet::look(socket)).ok());
    vec![nat(config), conntrack(), path(config, view.as_ref()), udp_gro(view.is_some())]
}

/// What a program prints; `None`: it is not there or may not.
fn said(program: &str, arguments: &[&str]) -> Option<String> {
    // A service's PATH may lack the system's own programs.
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(program).args(arguments).env("PATH", path).stdin(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

fn nat(config: Option<&Config>) -> Finding {
    const CHECK: &str = "NAT";
    let mut ports: Vec<u16> =
        config.iter().flat_map(|c| &c.listeners).flat_map(|l| &l.bind).map(|b| b.addr.port()).collect();
    if ports.is_empty() {
        ports.push(443);
    }
    ports.sort_unstable();
    ports.dedup();
    let rules = [
        said("iptables-save", &["-t", "nat"]),
        said("ip6tables-save", &["-t", "nat"]),
        said("iptables-legacy-save", &["-t", "nat"]),
        said("nft", &["list", "ruleset"]),
    ];
    if rules.iter().all(Option::is_none) {
        return Finding::new(CHECK, true, "not looked at: neither iptables-save nor nft can be run here");
    }
    let is_ours = |ip: IpAddr| UdpSocket::bind((ip, 0)).is_ok();
    let taken = ports.iter().find_map(|port| {
        let mut lines = rules.iter().flatten().flat_map(|rules| of_arrivals(rules));
        lines.find(|line| takes(line, *port, &is_ours)).map(|line| (port, line.trim().to_owned()))
    });
    match taken {
        None => Finding::new(CHECK, true, format!("no rule takes connections to port {}", numbers(&ports))),
        Some((port, rule)) => Finding::new(
            CHECK,
            false,
            format!(
                "a rule takes connections to port {port} before our socket sees them: {rule}\n  help: on a k3s node that is servicelb: run it with \
                 `--disable servicelb`, or keep it off this node by the label svccontroller.k3s.cattle.io/enablelb on others"
            ),
        ),
    }
}

/// The lines, without those of chains of nft that only see what this machine sends itself; iptables tells such chains by their names.
fn of_arrivals(rules: &str) -> Vec<&str> {
    let mut departs = false;
    let arrives = |line: &&str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        if words.first() == Some(&"chain") {
            departs = false;
        }
        departs |= words.first() == Some(&"type") && matches!(words.get(3), Some(&("output" | "postrouting")));
        !departs
    };
    rules.lines().filter(arrives).collect()
}

fn numbers(ports: &[u16]) -> String {
    ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ")
}

/// Whether a rule, as iptables-save or `nft list ruleset` prints it, rewrites the destination of connections to this port of ours.
fn takes(rule: &str, port: u16, is_ours: &impl Fn(IpAddr) -> bool) -> bool {
    let words: Vec<&str> = rule.split_whitespace().collect();
    let after = |key: &str| words.iter().position(|word| *word == key).and_then(|i| words.get(i + 1)).copied();
    let among = |list: &str| {
        list.split(',').any(|item| {
            let (first, last) = item.split_once([':', '-']).unwrap_or((item, item));
            matches!((first.parse(), last.parse()), (Ok(first), Ok(last)) if (first..=last).contains(&port))
        })
    };
    let of_address =
        |text: &str| text.split('/').next().and_then(|ip| ip.parse().ok()).is_none_or(|ip: IpAddr| is_ours(ip));
    if words.first() == Some(&"-A") {
        // OUTPUT is for what this machine dials itself.
        let from_outside = !matches!(words.get(1), Some(&("OUTPUT" | "POSTROUTING")));
        let to = after("-j").or_else(|| after("-g")).unwrap_or_default();
        let rewrites = matches!(to, "DNAT" | "REDIRECT")
            || ["CNI-DN-", "KUBE-EXT-", "KUBE-FW-", "KUBE-XLB-"].iter().any(|chain| to.starts_with(chain));
        let port = after("--dport").or_else(|| after("--dports")).is_some_and(among);
        let negated = words.windows(2).any(|pair| pair[0] == "!" && pair[1].starts_with("--dport"));
        return from_outside && rewrites && port && !negated && after("-d").is_none_or(of_address);
    }
    let port = match words.windows(3).find(|words| words[..2] == ["tcp", "dport"]).map(|words| words[2]) {
        Some("{") => rule
            .split_once("dport {")
            .and_then(|(_, rest)| rest.split_once('}'))
            .is_some_and(|(set, _)| among(&set.replace(' ', ""))),
        Some(port) => among(port),
        None => false,
    };
    port && words.iter().any(|word| matches!(*word, "dnat" | "redirect")) && after("daddr").is_none_or(of_address)
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

/// Tailscale recommends it for machines that forward (kernel 6.2 and later): <https://tailscale.com/kb/1320/performance-best-practices>.
fn udp_gro(tailscale: bool) -> Finding {
    const CHECK: &str = "UDP GRO";
    let not_looked_at = |why: &str| Finding::new(CHECK, true, format!("not looked at: {why}"));
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

    fn takes_443(rule: &str) -> bool {
        takes(rule, 443, &|ip| ip == IpAddr::from([203, 0, 113, 7]))
    }

    #[test]
    fn rules_that_take_the_port_are_found() {
        for rule in [
            "-A CNI-HOSTPORT-DNAT -p tcp -m comment --comment \"dnat name: \\\"cbr0\\\"\" -m multiport --dports 80,443 -j CNI-DN-56a61",
            "-A CNI-DN-56a61 -p tcp -m tcp --dport 443 -j DNAT --to-destination 10.42.0.8:443",
            "-A KUBE-SERVICES -d 203.0.113.7/32 -p tcp -m comment --comment \"kube-system/traefik:websecure loadbalancer IP\" -m tcp --dport 443 -j KUBE-EXT-CVG3",
            "-A PREROUTING -i eth0 -p tcp -m tcp --dport 400:500 -j REDIRECT --to-ports 8443",
            "tcp dport 443 redirect to :8443",
            "iifname \"eth0\" tcp dport { 80, 443 } dnat ip to 10.0.0.2",
        ] {
            assert!(takes_443(rule), "{rule}");
        }
    }

    #[test]
    fn rules_for_others_are_none() {
        for rule in [
            "-A KUBE-SERVICES -d 10.43.0.1/32 -p tcp -m tcp --dport 443 -j KUBE-SVC-NPX46",
            "-A KUBE-SERVICES -d 203.0.113.8/32 -p tcp -m tcp --dport 443 -j KUBE-EXT-CVG3",
            "-A CNI-DN-56a61 -s 10.42.0.0/24 -p tcp -m tcp --dport 443 -j CNI-HOSTPORT-SETMARK",
            "-A PREROUTING -p tcp -m tcp --dport 8443 -j DNAT --to-destination 10.42.0.8:443",
            "-A PREROUTING -p tcp -m tcp ! --dport 443 -j REDIRECT --to-ports 1",
            "-A OUTPUT -p tcp -m tcp --dport 443 -j REDIRECT --to-ports 8443",
            "tcp dport 443 accept",
            "tcp dport { 80, 8443 } redirect to :8080",
            "ip daddr 203.0.113.8 tcp dport 443 dnat to 10.0.0.2",
        ] {
            assert!(!takes_443(rule), "{rule}");
        }
    }

    #[test]
    fn what_this_machine_sends_itself_is_no_arrival() {
        let ruleset = |hook: &str| {
            format!(
                "table ip nat {{\n\tchain OUTPUT {{\n\t\ttype nat hook {hook} priority dstnat; policy accept;\n\t\t\
                 tcp dport 443 counter packets 0 bytes 0 redirect to :8443\n\t}}\n\tchain PREROUTING {{\n\t\t\
                 type nat hook prerouting priority dstnat; policy accept;\n\t\ttcp dport 80 redirect to :8080\n\t}}\n}}\n"
            )
        };
        let taken = |ruleset: &str| of_arrivals(ruleset).iter().filter(|rule| rule.contains("redirect")).count();
        assert_eq!(taken(&ruleset("output")), 1);
        assert_eq!(taken(&ruleset("prerouting")), 2);
    }

    #[test]
    fn a_table_of_connections_that_is_nearly_full_is_told() {
        assert!(judge_conntrack(100, 1000).ok);
        let full = judge_conntrack(900, 1000);
        assert!(!full.ok && full.text.contains("nf_conntrack_max=4000"), "{full:?}");
    }

    #[test]
    fn ethtool_says_whether_udp_is_coalesced() {
        let off = "Features for eth0:\nrx-gro-list: off\nrx-udp-gro-forwarding: off\n";
        assert!(!judge_udp_gro("eth0", off).ok);
        assert!(judge_udp_gro("eth0", &off.replace("forwarding: off", "forwarding: on")).ok);
        assert!(judge_udp_gro("eth0", &off.replace("forwarding: off", "forwarding: off [fixed]")).ok);
        assert!(judge_udp_gro("eth0", "rx-gro-list: off\n").ok, "an old kernel");
    }
}
