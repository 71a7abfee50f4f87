//! `allow` and `deny`: nginx takes the first that fits, here `deny` comes before `allow`.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// The rules of a server, in their order (src/stream/ngx_stream_access_module.c).
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Access {
    /// Whether to allow, and whom.
    rules: Vec<(bool, IpNet)>,
}

/// Lists that mean the same when `deny` is looked at first, and an empty `allow` is everybody.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Lists {
    pub allow: Vec<IpNet>,
    pub deny: Vec<IpNet>,
}

/// Networks that a list may have when the order of the rules does not allow to keep those that are
/// written.
const MOST: usize = 2048;

/// Everybody.
pub fn everybody() -> [IpNet; 2] {
    [Ipv4Net::default().into(), Ipv6Net::default().into()]
}

/// A network or an address.
pub fn network(text: &str) -> Option<IpNet> {
    let network = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from)).ok()?;
    Some(network.trunc())
}

/// The part of the IPv4 addresses within IPv6 that a network is. nginx compares such clients with
/// IPv4 networks.
pub fn mapped(network: &IpNet) -> Option<IpNet> {
    let IpNet::V6(v6) = network else { return None };
    let bits = v6.prefix_len().checked_sub(96)?;
    Some(Ipv4Net::new(v6.addr().to_ipv4_mapped()?, bits).ok()?.into())
}

impl Access {
    /// Adds a rule behind those before. False: it is no network.
    pub fn add(&mut self, allow: bool, whom: &str) -> bool {
        match (whom, network(whom)) {
            ("unix:", _) => true,
            ("all", _) => {
                self.rules.extend(everybody().map(|all| (allow, all)));
                true
            }
            (_, Some(network)) => {
                self.rules.push((allow, network));
                true
            }
            (_, None) => false,
        }
    }

    /// The rules for sockets of one family, or for one that takes both. nginx compares the IPv4
    /// addresses of the latter with IPv6 rules where there are none for IPv4.
    pub fn on(&self, takes_both: bool) -> Self {
        let translated = takes_both && self.rules.iter().all(|(_, network)| !is_v4(network));
        let all_mapped: IpNet = Ipv6Net::new_assert(Ipv4Addr::UNSPECIFIED.to_ipv6_mapped(), 96).into();
        let mut rules = Vec::new();
        for (allow, network) in &self.rules {
            if let Some(v4) = mapped(network) {
                rules.extend(translated.then_some((*allow, v4)));
                continue;
            }
            if translated && network.contains(&all_mapped) {
                rules.push((*allow, Ipv4Net::default().into()));
            }
            rules.push((*allow, *network));
        }
        Self { rules }
    }

    /// Whether a client may connect.
    pub fn allows(&self, client: IpAddr) -> bool {
        self.rules.iter().find(|(_, network)| network.contains(&client)).is_none_or(|(allow, _)| *allow)
    }

    /// Whether every client may.
    pub fn is_open(&self) -> bool {
        self.lists().is_some_and(|lists| lists == Lists::default())
    }

    /// `None`: there would be too many networks.
    pub fn lists(&self) -> Option<Lists> {
        let [v4, v6] = everybody();
        let first = |all: IpNet| self.rules.iter().position(|(_, network)| *network == all);
        // Written in the order that ours have, they can stay as they are.
        let end = match (first(v4), first(v6)) {
            (None, None) => Some((self.rules.len(), true)),
            (Some(a), Some(b)) if a.abs_diff(b) == 1 && self.rules[a].0 == self.rules[b].0 => {
                Some((a.min(b), self.rules[a].0))
            }
            _ => None,
        };
        if let Some((end, closing)) = end {
            let rules = &self.rules[..end];
            let denies = rules.iter().take_while(|(allow, _)| !allow).count();
            let (deny, allow) = rules.split_at(denies);
            let networks = |rules: &[(bool, IpNet)]| -> Vec<IpNet> {
                let mut networks: Vec<IpNet> = rules.iter().map(|(_, network)| *network).collect();
                networks.dedup();
                networks
            };
            let in_order = allow.iter().all(|(allow, _)| *allow);
            match (closing, in_order, allow.is_empty()) {
                (true, true, _) => {
                    // What is allowed behind it changes nothing of what is denied.
                    return Some(Lists { allow: Vec::new(), deny: networks(deny) });
                }
                (false, true, false) => return Some(Lists { allow: networks(allow), deny: networks(deny) }),
                (false, true, true) => return Some(Lists { allow: Vec::new(), deny: everybody().into() }),
                (_, false, _) => {}
            }
        }
        let mut parts = (Vec::new(), Vec::new());
        for all in [v4, v6] {
            let rules: Vec<(bool, IpNet)> =
                self.rules.iter().filter(|(_, network)| is_v4(network) == is_v4(&all)).copied().collect();
            split(all, &rules, true, &mut parts)?;
        }
        let (allow, deny) = parts;
        Some(match (allow.is_empty(), deny.is_empty()) {
            (_, true) => Lists::default(),
            (true, false) => Lists { allow, deny: everybody().into() },
            _ if deny.len() < allow.len() => Lists { allow: Vec::new(), deny },
            _ => Lists { allow, deny: Vec::new() },
        })
    }
}

fn is_v4(network: &IpNet) -> bool {
    matches!(network, IpNet::V4(_))
}

/// Sorts the parts of a network into those that are allowed and those that are denied. `rules` are
/// those that have to do with it, `closing` is what holds when none fits.
fn split(part: IpNet, rules: &[(bool, IpNet)], closing: bool, found: &mut (Vec<IpNet>, Vec<IpNet>)) -> Option<()> {
    let whole = rules.iter().position(|(_, network)| network.contains(&part));
    let closing = whole.map_or(closing, |at| rules[at].0);
    let rules: Vec<(bool, IpNet)> =
        rules[..whole.unwrap_or(rules.len())].iter().filter(|(_, network)| part.contains(network)).copied().collect();
    if rules.iter().all(|(allow, _)| *allow == closing) {
        let list = if closing { &mut found.0 } else { &mut found.1 };
        list.push(part);
        return (list.len() <= MOST).then_some(());
    }
    for half in part.subnets(part.prefix_len() + 1).ok()? {
        split(half, &rules, closing, found)?;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn access(rules: &str) -> Access {
        let mut access = Access::default();
        for rule in rules.split(';').map(str::trim).filter(|rule| !rule.is_empty()) {
            let (what, whom) = rule.split_once(' ').unwrap();
            assert!(access.add(what == "allow", whom), "{rule}");
        }
        access
    }

    fn shown(rules: &str) -> String {
        let Lists { allow, deny } = access(rules).on(false).lists().unwrap();
        let list = |networks: Vec<IpNet>| networks.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        format!("{} - {}", list(allow), list(deny))
    }

    #[test]
    fn rules_in_our_order_stay_as_they_are() {
        assert_eq!(shown(""), " - ");
        assert_eq!(shown("allow 10.0.0.0/8"), " - ");
        assert_eq!(shown("allow 10.0.0.0/8; deny all"), "10.0.0.0/8 - ");
        assert_eq!(shown("deny 10.0.0.1; allow 10.0.0.0/8; deny all"), "10.0.0.0/8 - 10.0.0.1/32");
        assert_eq!(shown("deny 10.0.0.1; allow all; deny 10.0.0.2"), " - 10.0.0.1/32");
        assert_eq!(shown("deny all"), " - 0.0.0.0/0 ::/0");
        assert_eq!(shown("allow unix:; deny all"), " - 0.0.0.0/0 ::/0");
        assert_eq!(shown("allow ::ffff:10.0.0.0/104; deny all"), " - 0.0.0.0/0 ::/0");
    }

    #[test]
    fn a_socket_of_both_families_has_ipv6_rules_for_ipv4_where_there_are_no_others() {
        let v4: IpAddr = "10.9.0.1".parse().unwrap();
        for (rules, both, one) in [
            ("allow fd00::/8; deny ::/0", false, true),
            ("deny ::ffff:10.9.0.1", false, true),
            ("deny ::ffff:10.9.0.0/112; allow 192.0.2.1", true, true),
            ("allow fd00::/8; deny all", false, false),
        ] {
            let access = access(rules);
            assert_eq!((access.on(true).allows(v4), access.on(false).allows(v4)), (both, one), "{rules}");
        }
    }

    #[test]
    fn rules_in_another_order_are_split() {
        assert_eq!(shown("allow 192.0.2.0/31; deny 192.0.2.0/30; allow all"), " - 192.0.2.2/31");
        assert_eq!(shown("allow 10.0.0.0/8; deny 0.0.0.0/0"), "10.0.0.0/8 ::/0 - ");
        assert_eq!(shown("allow 10.0.0.0/8; deny 10.0.0.0/8"), " - ");
        assert_eq!(shown("allow 0.0.0.0/0; deny 2001:db8::/32"), " - 2001:db8::/32");
        assert_eq!(shown("deny 0.0.0.0/0; allow 2001:db8::/32; deny ::/0"), "2001:db8::/32 - ");
        assert_eq!(shown("deny 0.0.0.0/0; deny ::/0"), " - 0.0.0.0/0 ::/0");
    }

    proptest! {
        #[test]
        fn the_lists_let_in_whom_the_rules_let_in(
            rules in prop::collection::vec((any::<bool>(), 0_u8..4, prop::sample::select(vec![0_u8, 8, 30, 31, 32])), 0..8),
            clients in prop::collection::vec(any::<u8>(), 8),
        ) {
            let mut access = Access::default();
            for (allow, last, prefix) in rules {
                let added = access.add(allow, &format!("10.0.0.{last}/{prefix}"));
                prop_assert!(added);
            }
            let Lists { allow, deny } = access.lists().unwrap();
            let v6: IpAddr = "2001:db8::1".parse().unwrap();
            let v4 = clients.iter().map(|c| IpAddr::from([if c & 128 == 0 { 10 } else { 11 }, 0, 0, c & 7]));
            for client in v4.chain([v6]) {
                let has = |list: &[IpNet]| list.iter().any(|network| network.contains(&client));
                let ours = !has(&deny) && (allow.is_empty() || has(&allow));
                prop_assert_eq!(ours, access.allows(client), "{} {:?} {:?}", client, allow, deny);
            }
        }
    }
}
