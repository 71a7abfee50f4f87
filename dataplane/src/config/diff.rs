//! What a change of the configuration does, in words: which names go elsewhere, which are let through or refused, what else is set differently.
//!
//! A pure comparison of two configurations.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::config::{Config, HostPattern, Limits, Listener, Mode, SendProxy, Upstream, format_duration, format_size};

/// One line for each difference, each a sentence without a full stop; empty when nothing changes.
pub fn diff(old: &Config, new: &Config) -> String {
    let mut text = String::new();
    hosts(old, new, &mut text);
    listeners(old, new, &mut text);
    upstreams(old, new, &mut text);
    settings(old, new, &mut text);
    text
}

/// Where a host goes: by pattern, listener and ALPN.
type Table<'c> = BTreeMap<(&'c HostPattern, &'c str, &'c str), &'c Upstream>;

fn table(config: &Config) -> Table<'_> {
    let mut table = Table::new();
    for route in &config.routes {
        let upstream = &config.upstreams[route.upstream];
        let here = |index: &usize| {
            config.listeners[*index].mode == Mode::Tls
                && (route.listeners.is_empty() || route.listeners.contains(index))
        };
        for listener in (0..config.listeners.len()).filter(here).map(|index| &*config.listeners[index].name) {
            for host in &route.hosts {
                if route.alpn.is_empty() {
                    table.insert((host, listener, ""), upstream);
                }
                for protocol in &route.alpn {
                    table.insert((host, listener, protocol), upstream);
                }
            }
        }
    }
    table
}

fn hosts(old: &Config, new: &Config, text: &mut String) {
    let (before, after) = (table(old), table(new));
    // The same words for several listeners and protocols are said once, with these.
    let mut said: BTreeMap<(String, String), Vec<String>> = BTreeMap::new();
    let keys = before.keys().chain(after.keys().filter(|key| !before.contains_key(*key)));
    for key @ (host, listener, protocol) in keys {
        let what = match (before.get(key), after.get(key)) {
            (None, Some(upstream)) => format!("is let through, to {}", described(upstream)),
            (Some(upstream), None) => match wider(&after, host, listener) {
                Some((pattern, now)) => {
                    format!("goes to {}, by `{pattern}`, and no longer to `{}`", described(now), upstream.name)
                }
                None => format!("is no longer let through, to `{}`", upstream.name),
            },
            (Some(before), Some(after)) if before.name != after.name => {
                format!("goes to {} and no longer to `{}`", described(after), before.name)
            }
            _ => continue,
        };
        let where_ = if protocol.is_empty() { (*listener).to_owned() } else { format!("{listener} ({protocol})") };
        said.entry((host.to_string(), what)).or_default().push(where_);
    }
    for ((host, what), places) in said {
        let _ = writeln!(text, "{host} {what}; on {}", places.join(", "));
    }
}

/// The most specific wildcard that takes the connections of a pattern that is gone.
fn wider<'c>(table: &Table<'c>, host: &HostPattern, listener: &str) -> Option<(&'c HostPattern, &'c Upstream)> {
    let name = match host {
        HostPattern::Exact(name) | HostPattern::Wildcard(name) => name,
        HostPattern::Any => return None,
    };
    let takes = |pattern: &HostPattern| match pattern {
        HostPattern::Exact(_) => false,
        HostPattern::Wildcard(suffix) => name.strip_suffix(&**suffix).is_some_and(|rest| rest.ends_with('.')),
        HostPattern::Any => true,
    };
    let found = table.iter().filter(|((pattern, l, _), _)| *l == listener && takes(pattern));
    found
        .max_by_key(|((pattern, ..), _)| pattern.to_string().len())
        .map(|((pattern, ..), upstream)| (*pattern, *upstream))
}

fn listeners(old: &Config, new: &Config, text: &mut String) {
    let find = |config: &'_ Config, name: &str| config.listeners.iter().position(|l| *l.name == *name);
    for before in &old.listeners {
        let Some(index) = find(new, &before.name) else {
            let _ = writeln!(text, "listener `{}` is removed: nothing listens on {}", before.name, binds(before));
            continue;
        };
        let after = &new.listeners[index];
        let name = &before.name;
        if binds(before) != binds(after) {
            let _ = writeln!(text, "listener `{name}` is on {} and no longer on {}", binds(after), binds(before));
        }
        if mode(old, before) != mode(new, after) {
            let _ = writeln!(text, "listener `{name}` {} and no longer {}", mode(new, after), mode(old, before));
        }
        for (what, before, after) in [
            ("accept_proxy", &before.accept_proxy, &after.accept_proxy),
            ("allow", &before.allow, &after.allow),
            ("deny", &before.deny, &after.deny),
        ] {
            if before != after {
                let _ = writeln!(text, "listener `{name}` has `{what}` {after:?} and no longer {before:?}");
            }
        }
    }
    for after in new.listeners.iter().filter(|l| find(old, &l.name).is_none()) {
        let _ = writeln!(text, "listener `{}` is added, on {}: it {}", after.name, binds(after), mode(new, after));
    }
}

fn binds(listener: &Listener) -> String {
    let addresses: Vec<_> = listener.bind.iter().map(|bind| bind.addr.to_string()).collect();
    addresses.join(", ")
}

fn mode(config: &Config, listener: &Listener) -> String {
    match listener.mode {
        Mode::Tls => "routes by server name".into(),
        Mode::Http { acme_port } => {
            format!("sends clients to https, and passes ACME challenges on to port {acme_port}")
        }
        Mode::Tcp { upstream } => format!("forwards everything to `{}`", config.upstreams[upstream].name),
    }
}

fn upstreams(old: &Config, new: &Config, text: &mut String) {
    let known = |config: &'_ Config| -> BTreeMap<String, Upstream> {
        config.upstreams.iter().map(|upstream| (upstream.name.to_string(), upstream.clone())).collect()
    };
    let (before, after) = (known(old), known(new));
    for (name, old) in &before {
        let Some(new) = after.get(name) else {
            let _ = writeln!(text, "upstream `{name}` is removed");
            continue;
        };
        let has = |upstream: &Upstream, target: &str| upstream.targets.iter().any(|other| *other.text == *target);
        for target in new.targets.iter().filter(|target| !has(old, &target.text)) {
            let _ = writeln!(text, "upstream `{name}` gets the target {}", target.text);
        }
        for target in old.targets.iter().filter(|target| !has(new, &target.text)) {
            let _ = writeln!(text, "upstream `{name}` loses the target {}", target.text);
        }
        let mut changed = |what: &str, before: String, after: String| {
            if before != after {
                let _ = writeln!(text, "upstream `{name}` has `{what}` {after} and no longer {before}");
            }
        };
        changed("send_proxy", proxy(old).into(), proxy(new).into());
        changed("balance", format!("{:?}", old.balance), format!("{:?}", new.balance));
        changed("connect_timeout", format_duration(old.connect_timeout), format_duration(new.connect_timeout));
        changed(
            "max_connections_per_target",
            old.max_connections_per_target.to_string(),
            new.max_connections_per_target.to_string(),
        );
    }
    for (name, upstream) in after.iter().filter(|(name, _)| !before.contains_key(*name)) {
        let _ = writeln!(text, "upstream `{name}` is added: {}", targets(upstream));
    }
}

fn described(upstream: &Upstream) -> String {
    format!("`{}` ({})", upstream.name, targets(upstream))
}

fn targets(upstream: &Upstream) -> String {
    let targets: Vec<&str> = upstream.targets.iter().map(|target| &*target.text).collect();
    format!("{}; PROXY {}", targets.join(", "), proxy(upstream))
}

fn proxy(upstream: &Upstream) -> &'static str {
    match upstream.send_proxy {
        SendProxy::Off => "off",
        SendProxy::V1 => "v1",
        SendProxy::V2 => "v2",
    }
}

fn settings(old: &Config, new: &Config, text: &mut String) {
    let mut changed = |what: &str, before: String, after: String| {
        if before != after {
            let _ = writeln!(text, "`{what}` is {after} and no longer {before}");
        }
    };
    let word = |value: &dyn std::fmt::Debug| format!("{value:?}").to_lowercase();
    changed("engine", word(&old.engine), word(&new.engine));
    changed("on_removed_route", word(&old.on_removed_route), word(&new.on_removed_route));
    for ((what, before), (_, after)) in limits(&old.limits).into_iter().zip(limits(&new.limits)) {
        changed(what, before, after);
    }
    changed("admin.bind", old.admin.bind.addr.to_string(), new.admin.bind.addr.to_string());
    changed("admin.socket", old.admin.socket.display().to_string(), new.admin.socket.display().to_string());
}

fn limits(limits: &Limits) -> [(&'static str, String); 9] {
    [
        ("hello_timeout", format_duration(limits.hello_timeout)),
        ("hello_max_bytes", format_size(limits.hello_max_bytes as u64)),
        ("idle_timeout", format_duration(limits.idle_timeout)),
        ("half_closed_timeout", format_duration(limits.half_closed_timeout)),
        ("dead_peer_timeout", format_duration(limits.dead_peer_timeout)),
        ("drain_timeout", format_duration(limits.drain_timeout)),
        ("max_connections", limits.max_connections.to_string()),
        ("max_connections_per_client", limits.max_connections_per_client.to_string()),
        ("kernel_memory", format_size(limits.kernel_memory)),
    ]
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::config::{Source, parse};

    const OLD: &str = r#"
[listeners.public]
bind = ["0.0.0.0:443"]
[listeners.git]
mode = "tcp"
bind = ["0.0.0.0:2222"]
upstream = "ssh"
[upstreams.cluster]
targets = ["thinkpad-1:443", "thinkpad-2:443"]
[upstreams.other]
targets = ["thinkpad-3:443"]
send_proxy = "v2"
[upstreams.ssh]
targets = ["thinkpad-1:22"]
[[routes]]
hosts = ["blog.example.com", "shop.example.com", "*.apps.example.com", "x.apps.example.com"]
upstream = "cluster"
[[routes]]
hosts = ["old.example.com"]
alpn = ["h2", "http/1.1"]
upstream = "other"
"#;

    fn compare(old: &str, new: &str) -> String {
        let config = |text: &str| parse(Arc::new(Source::new("x", text.into()))).unwrap().0;
        diff(&config(old), &config(new))
    }

    #[test]
    fn nothing_changes_when_only_order_and_words_do() {
        assert_eq!(compare(OLD, OLD), "");
        let (head, routes) = OLD.split_at(OLD.find("[[routes]]").unwrap());
        let (first, second) = routes.split_at(routes.rfind("[[routes]]").unwrap());
        assert_eq!(compare(OLD, &format!("# moved\n{head}{second}{first}")), "");
    }

    #[test]
    fn each_name_that_goes_elsewhere_is_told_in_words() {
        let new = OLD
            .replace("\"shop.example.com\", ", "")
            .replace(", \"x.apps.example.com\"", "")
            .replace("hosts = [\"old.example.com\"]", "hosts = [\"blog.example.com\", \"new.example.com\"]")
            .replace("hosts = [\"blog.example.com\", \"*", "hosts = [\"*");
        assert_eq!(
            compare(OLD, &new),
            "\
blog.example.com is let through, to `other` (thinkpad-3:443; PROXY v2); on public (h2), public (http/1.1)
blog.example.com is no longer let through, to `cluster`; on public
new.example.com is let through, to `other` (thinkpad-3:443; PROXY v2); on public (h2), public (http/1.1)
old.example.com is no longer let through, to `other`; on public (h2), public (http/1.1)
shop.example.com is no longer let through, to `cluster`; on public
x.apps.example.com goes to `cluster` (thinkpad-1:443, thinkpad-2:443; PROXY off), by `*.apps.example.com`, and no longer to `cluster`; on public
"
        );
    }

    #[test]
    fn listeners_upstreams_and_settings_are_told_too() {
        let new = OLD
            .replace("[listeners.git]", "[listeners.ssh]")
            .replace("bind = [\"0.0.0.0:443\"]", "bind = [\"0.0.0.0:443\", \"[::]:443\"]\ndeny = [\"192.0.2.7\"]")
            .replace("\"thinkpad-2:443\"", "\"thinkpad-4:443\"")
            .replace("send_proxy = \"v2\"", "send_proxy = \"v1\"\nbalance = \"first\"")
            + "[limits]\nidle_timeout = \"2h\"\n[admin]\nbind = \"127.0.0.1:9444\"\n";
        assert_eq!(
            compare(OLD, &new),
            "\
listener `public` is on 0.0.0.0:443, [::]:443 and no longer on 0.0.0.0:443
listener `public` has `deny` [192.0.2.7/32] and no longer []
listener `git` is removed: nothing listens on 0.0.0.0:2222
listener `ssh` is added, on 0.0.0.0:2222: it forwards everything to `ssh`
upstream `cluster` gets the target thinkpad-4:443
upstream `cluster` loses the target thinkpad-2:443
upstream `other` has `send_proxy` v1 and no longer v2
upstream `other` has `balance` First and no longer LeastConnections
`idle_timeout` is 2h and no longer 1h
`admin.bind` is 127.0.0.1:9444 and no longer 127.0.0.1:9443
"
        );
    }
}
