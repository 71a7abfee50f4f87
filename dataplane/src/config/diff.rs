//! What a change of the configuration does, in words: which names go elsewhere, which are let
//! through or refused, what else is set differently.
//!
//! A pure comparison of two configurations. Each table is taken apart field by field, so that a new
//! key does not compile until it is compared.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;

use ipnet::IpNet;

use super::values::{format_duration, format_size, word};
use super::{
    Admin, Balance, Config, EngineChoice, HealthCheck, HostPattern, Limits, Listener, Mode, OnDown, OnRemovedRoute,
    Repository, Resolver, SendProxy, Tailnet, Upstream, Webhook,
};

/// One difference.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Change {
    /// More is open than before: a name, a network, an address, or what a repository may decide.
    pub widens: bool,
    /// A sentence without a full stop.
    pub text: String,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.widens { "WIDER: " } else { "" }, self.text)
    }
}

/// What differs; that which opens more stands first.
pub fn diff(old: &Config, new: &Config) -> Vec<Change> {
    let mut changes = Changes::default();
    hosts(old, new, &mut changes);
    listeners(old, new, &mut changes);
    upstreams(old, new, &mut changes);
    settings(old, new, &mut changes);
    let (wider, other): (Vec<_>, Vec<_>) = changes.0.into_iter().partition(|change| change.widens);
    wider.into_iter().chain(other).collect()
}

#[derive(Default)]
struct Changes(Vec<Change>);

impl Changes {
    fn wider(&mut self, text: String) {
        self.0.push(Change { widens: true, text });
    }

    fn other(&mut self, text: String) {
        self.0.push(Change { widens: false, text });
    }

    /// A key of `whose`, if its value differs.
    fn key(&mut self, whose: &str, key: &str, before: &str, after: &str) {
        if before != after {
            self.other(format!("{whose}`{key}` is {after} and no longer {before}"));
        }
    }
}

/// Where a host goes, `None`: it is refused; by pattern, listener and ALPN.
type Table<'c> = BTreeMap<(&'c HostPattern, &'c str, &'c str), Option<&'c Upstream>>;

fn table(config: &Config, has_mode: fn(Mode) -> bool) -> Table<'_> {
    let mut table = Table::new();
    for route in &config.routes {
        let upstream = route.upstream().map(|upstream| &config.upstreams[upstream]);
        let here = |index: &usize| has_mode(config.listeners[*index].mode) && route.is_for(*index);
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

fn hosts(old: &Config, new: &Config, changes: &mut Changes) {
    compare_hosts(old, new, |mode| mode == Mode::Tls, "", changes);
    let is_http = |mode| matches!(mode, Mode::Http { .. });
    compare_hosts(old, new, is_http, "for certificates (ACME challenges), ", changes);
}

fn compare_hosts(old: &Config, new: &Config, has_mode: fn(Mode) -> bool, what_for: &str, changes: &mut Changes) {
    let (before, after) = (table(old, has_mode), table(new, has_mode));
    // The same words for several listeners and protocols are said once, with these.
    let mut said: BTreeMap<(String, bool, String), Vec<String>> = BTreeMap::new();
    let keys = before.keys().chain(after.keys().filter(|key| !before.contains_key(*key)));
    for key @ (host, listener, protocol) in keys {
        let (widens, what) = match (taken(&before, key), taken(&after, key)) {
            (None, Some((now, None))) => (true, format!("is let through, to {}", described(now))),
            (None, Some((now, Some(by)))) => (true, format!("is let through, to {}, by `{by}`", described(now))),
            (Some((was, _)), None) => (false, format!("is no longer let through, to `{}`", was.name)),
            (Some((was, None)), Some((now, None))) if was.name != now.name => {
                (false, format!("goes to {} and no longer to `{}`", described(now), was.name))
            }
            (Some((was, Some(by))), Some((now, None))) => {
                (false, format!("goes to {}, and no longer to `{}` by `{by}`", described(now), was.name))
            }
            (Some((was, None)), Some((now, Some(by)))) => {
                (false, format!("goes to {}, by `{by}`, and no longer to `{}`", described(now), was.name))
            }
            _ => continue,
        };
        let where_ = if protocol.is_empty() { (*listener).to_owned() } else { format!("{listener} ({protocol})") };
        said.entry((host.to_string(), widens, what)).or_default().push(where_);
    }
    for ((host, widens, what), places) in said {
        changes.0.push(Change { widens, text: format!("{what_for}{host} {what}; on {}", places.join(", ")) });
    }
}

/// Who takes the connections of a pattern, and by which other pattern where that one is not there.
/// `None`: they are refused.
fn taken<'c>(
    table: &Table<'c>,
    key: &(&'c HostPattern, &'c str, &'c str),
) -> Option<(&'c Upstream, Option<&'c HostPattern>)> {
    if let Some(found) = table.get(key) {
        return found.map(|upstream| (upstream, None));
    }
    let (host, listener, _) = *key;
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
    let ((pattern, ..), upstream) = found.max_by_key(|((pattern, ..), _)| pattern.to_string().len())?;
    upstream.map(|upstream| (upstream, Some(*pattern)))
}

fn listeners(old: &Config, new: &Config, changes: &mut Changes) {
    let find = |config: &'_ Config, name: &str| config.listeners.iter().position(|l| *l.name == *name);
    for before in &old.listeners {
        match find(new, &before.name) {
            Some(index) => listener(old, before, new, &new.listeners[index], changes),
            None => changes.other(format!(
                "listener `{}` is removed: nothing listens on {}",
                before.name,
                listed(before.bind.iter().map(|bind| bind.addr))
            )),
        }
    }
    for after in new.listeners.iter().filter(|l| find(old, &l.name).is_none()) {
        let Listener { name, bind, mode: _, accept_proxy, allow, deny } = after;
        let mut text = format!(
            "listener `{name}` is added, on {}: it {}",
            listed(bind.iter().map(|bind| bind.addr)),
            mode(new, after)
        );
        for (key, networks) in [("accept_proxy", accept_proxy), ("allow", allow), ("deny", deny)] {
            if !networks.is_empty() {
                text += &format!("; `{key}` is {}", listed(networks));
            }
        }
        changes.wider(text);
    }
}

fn listener(old: &Config, before: &Listener, new: &Config, after: &Listener, changes: &mut Changes) {
    let Listener { name, bind, mode: _, accept_proxy, allow, deny } = before;
    let addresses = |listener: &Listener| -> BTreeSet<_> { listener.bind.iter().map(|bind| bind.addr).collect() };
    let (was, now) = (addresses(before), addresses(after));
    if was != now {
        changes.0.push(Change {
            widens: !now.is_subset(&was),
            text: format!(
                "listener `{name}` is on {} and no longer on {}",
                listed(after.bind.iter().map(|bind| bind.addr)),
                listed(bind.iter().map(|bind| bind.addr))
            ),
        });
    }
    let (said, says) = (mode(old, before), mode(new, after));
    if said != says {
        let opens = matches!(after.mode, Mode::Tcp { .. });
        changes.0.push(Change { widens: opens, text: format!("listener `{name}` {says} and no longer {said}") });
    }
    // Whoever is believed, let in, or no longer kept out.
    for (key, before, after, widens) in [
        ("accept_proxy", accept_proxy, &after.accept_proxy, !covers(accept_proxy, &after.accept_proxy)),
        ("allow", allow, &after.allow, !allow.is_empty() && (after.allow.is_empty() || !covers(allow, &after.allow))),
        ("deny", deny, &after.deny, !covers(&after.deny, deny)),
    ] {
        if before != after {
            let text = format!("listener `{name}` has `{key}` {} and no longer {}", listed(after), listed(before));
            changes.0.push(Change { widens, text });
        }
    }
}

/// Whether each of `inner` lies in `outer`, wherever the networks are cut.
fn covers(outer: &[IpNet], inner: &[IpNet]) -> bool {
    let outer = IpNet::aggregate(&outer.to_vec());
    IpNet::aggregate(&inner.to_vec()).iter().all(|net| outer.iter().any(|outer| outer.contains(net)))
}

/// Things as in a list of the file, without quotes.
fn listed<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<_> = items.into_iter().map(|item| item.to_string()).collect();
    if items.is_empty() { "[]".to_owned() } else { items.join(", ") }
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

fn upstreams(old: &Config, new: &Config, changes: &mut Changes) {
    let known = |config: &'_ Config| -> BTreeMap<String, Upstream> {
        config.upstreams.iter().map(|upstream| (upstream.name.to_string(), upstream.clone())).collect()
    };
    let (before, after) = (known(old), known(new));
    for (name, old) in &before {
        match after.get(name) {
            Some(new) => upstream(old, new, changes),
            None => changes.other(format!("upstream `{name}` is removed")),
        }
    }
    for (name, upstream) in after.iter().filter(|(name, _)| !before.contains_key(*name)) {
        changes.other(format!("upstream `{name}` is added: {}", targets(upstream)));
    }
}

fn upstream(old: &Upstream, new: &Upstream, changes: &mut Changes) {
    let Upstream {
        name,
        targets,
        send_proxy,
        balance,
        health,
        connect_timeout,
        max_connections_per_target,
        hedge_delay,
        on_down,
        prefer_direct,
    } = old;
    let whose = format!("upstream `{name}`: ");
    let gained: Vec<_> = new.targets.iter().filter(|target| !targets.contains(target)).collect();
    let lost: Vec<_> = targets.iter().filter(|target| !new.targets.contains(target)).collect();
    for target in &gained {
        changes.other(format!("upstream `{name}` gets the target {}", target.text));
    }
    for target in &lost {
        changes.other(format!("upstream `{name}` loses the target {}", target.text));
    }
    if gained.is_empty() && lost.is_empty() && *targets != new.targets {
        let order = listed(new.targets.iter().map(|target| &target.text));
        changes.other(format!("upstream `{name}` has its targets in another order: {order}"));
    }
    let mut key = |key: &str, before: String, after: String| changes.key(&whose, key, &before, &after);
    let proxy = |value| word(&value, &SendProxy::WORDS).to_owned();
    key("send_proxy", proxy(*send_proxy), proxy(new.send_proxy));
    let words = |value| word(&value, &Balance::WORDS).to_owned();
    key("balance", words(*balance), words(new.balance));
    key("health", checks(health.as_ref()), checks(new.health.as_ref()));
    key("connect_timeout", format_duration(*connect_timeout), format_duration(new.connect_timeout));
    let most = |most: u32| most.to_string();
    key("max_connections_per_target", most(*max_connections_per_target), most(new.max_connections_per_target));
    key("hedge_delay", format_duration(*hedge_delay), format_duration(new.hedge_delay));
    let words = |value| word(&value, &OnDown::WORDS).to_owned();
    key("on_down", words(*on_down), words(new.on_down));
    key("prefer_direct", prefer_direct.to_string(), new.prefer_direct.to_string());
}

fn checks(check: Option<&HealthCheck>) -> String {
    let Some(HealthCheck { interval, timeout, fall, rise, tls }) = check else { return "not set".to_owned() };
    let tls = tls.as_ref().map(|name| format!(", tls = {name}")).unwrap_or_default();
    let (interval, timeout) = (format_duration(*interval), format_duration(*timeout));
    format!("{{ interval = {interval}, timeout = {timeout}, fall = {fall}, rise = {rise}{tls} }}")
}

fn described(upstream: &Upstream) -> String {
    format!("`{}` ({})", upstream.name, targets(upstream))
}

fn targets(upstream: &Upstream) -> String {
    let targets = listed(upstream.targets.iter().map(|target| &target.text));
    format!("{targets}; PROXY {}", word(&upstream.send_proxy, &SendProxy::WORDS))
}

fn settings(old: &Config, new: &Config, changes: &mut Changes) {
    let Config {
        engine,
        // Above.
        listeners: _,
        upstreams: _,
        routes: _,
        limits,
        admin,
        resolver: Resolver { servers },
        tailnet: Tailnet { socket },
        on_removed_route,
        watch,
        repository,
        // The files, not what they say.
        source: _,
        hash: _,
    } = old;
    let mut key = |key: &str, before: String, after: String| changes.key("", key, &before, &after);
    let words = |value| word(&value, &EngineChoice::WORDS).to_owned();
    key("engine", words(*engine), words(new.engine));
    let words = |value| word(&value, &OnRemovedRoute::WORDS).to_owned();
    key("on_removed_route", words(*on_removed_route), words(new.on_removed_route));
    key("watch", watch.to_string(), new.watch.to_string());
    for ((name, before), (_, after)) in each_limit(limits).into_iter().zip(each_limit(&new.limits)) {
        key(name, before, after);
    }
    key("resolver.servers", listed(servers), listed(&new.resolver.servers));
    key("tailnet.socket", socket.display().to_string(), new.tailnet.socket.display().to_string());
    let Admin { bind, socket } = admin;
    key("admin.socket", socket.display().to_string(), new.admin.socket.display().to_string());
    if *bind != new.admin.bind {
        changes.0.push(Change {
            widens: !new.admin.bind.addr.ip().is_loopback(),
            text: format!("`admin.bind` is {} and no longer {}", new.admin.bind.addr, bind.addr),
        });
    }
    match (repository, &new.repository) {
        (None, None) => {}
        (Some(before), None) => changes.other(format!("the repository {} is not asked any more", before.shown())),
        (None, Some(after)) => changes.wider(format!("the repository {} decides from now on", after.shown())),
        (Some(before), Some(after)) => self::repository(before, after, changes),
    }
}

fn repository(old: &Repository, new: &Repository, changes: &mut Changes) {
    let Repository {
        git,
        reference,
        path,
        interval,
        token_file,
        ssh_key_file,
        known_hosts_file,
        timeout,
        max_size,
        state_directory,
        webhook,
        fence,
    } = old;
    if (git, reference, path) != (&new.git, &new.reference, &new.path) {
        let shown = |repository: &Repository| {
            format!("{} ({}, {})", repository.shown(), repository.reference, repository.path.display())
        };
        changes.wider(format!("the repository {} decides and no longer {}", shown(new), shown(old)));
    }
    let mut key = |key: &str, before: String, after: String| changes.key("", key, &before, &after);
    let file = |path: &Option<PathBuf>| path.as_ref().map_or("not set".to_owned(), |path| path.display().to_string());
    key("source.interval", format_duration(*interval), format_duration(new.interval));
    key("source.token_file", file(token_file), file(&new.token_file));
    key("source.ssh_key_file", file(ssh_key_file), file(&new.ssh_key_file));
    key("source.known_hosts_file", file(known_hosts_file), file(&new.known_hosts_file));
    key("source.timeout", format_duration(*timeout), format_duration(new.timeout));
    key("source.max_size", format_size(*max_size), format_size(new.max_size));
    let directory = |path: &PathBuf| path.display().to_string();
    key("source.state_directory", directory(state_directory), directory(&new.state_directory));
    let announced = |webhook: &Option<Webhook>| match webhook {
        None => "not set".to_owned(),
        Some(Webhook { bind, secret_file }) => {
            format!("{{ bind = {}, secret_file = {} }}", bind.addr, secret_file.display())
        }
    };
    if webhook != &new.webhook {
        let bind = |webhook: &Option<Webhook>| webhook.as_ref().map(|webhook| webhook.bind.addr);
        changes.0.push(Change {
            widens: new.webhook.is_some() && bind(webhook) != bind(&new.webhook),
            text: format!("`source.webhook` is {} and no longer {}", announced(&new.webhook), announced(webhook)),
        });
    }
    for (name, before, after) in fence.compared(&new.fence) {
        // Whether a list is wider than another is not judged: whoever changes it looks at it.
        changes.wider(format!("`source.{name}` is {after} and no longer {before}"));
    }
}

fn each_limit(limits: &Limits) -> [(&'static str, String); 9] {
    let Limits {
        hello_timeout,
        hello_max_bytes,
        idle_timeout,
        half_closed_timeout,
        dead_peer_timeout,
        drain_timeout,
        max_connections,
        max_connections_per_client,
        kernel_memory,
    } = limits;
    [
        ("hello_timeout", format_duration(*hello_timeout)),
        ("hello_max_bytes", format_size(*hello_max_bytes as u64)),
        ("idle_timeout", format_duration(*idle_timeout)),
        ("half_closed_timeout", format_duration(*half_closed_timeout)),
        ("dead_peer_timeout", format_duration(*dead_peer_timeout)),
        ("drain_timeout", format_duration(*drain_timeout)),
        ("max_connections", max_connections.to_string()),
        ("max_connections_per_client", max_connections_per_client.to_string()),
        ("kernel_memory", format_size(*kernel_memory)),
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
        let changes = diff(&config(old), &config(new));
        changes.iter().map(|change| format!("{change}\n")).collect()
    }

    #[test]
    fn nothing_changes_when_only_order_and_words_do() {
        assert_eq!(compare(OLD, OLD), "");
        let (head, routes) = OLD.split_at(OLD.find("[[routes]]").unwrap());
        let (first, second) = routes.split_at(routes.rfind("[[routes]]").unwrap());
        assert_eq!(compare(OLD, &format!("# moved\n{head}{second}{first}")), "");
        let refused = format!("{OLD}[[routes]]\nhosts = [\"unlisted.example.com\"]\naction = \"refuse\"\n");
        assert_eq!(compare(OLD, &refused), "", "it is refused in any case");
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
WIDER: blog.example.com is let through, to `other` (thinkpad-3:443; PROXY v2); on public (h2), public (http/1.1)
WIDER: new.example.com is let through, to `other` (thinkpad-3:443; PROXY v2); on public (h2), public (http/1.1)
blog.example.com is no longer let through, to `cluster`; on public
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
WIDER: listener `public` is on 0.0.0.0:443, [::]:443 and no longer on 0.0.0.0:443
WIDER: listener `ssh` is added, on 0.0.0.0:2222: it forwards everything to `ssh`
listener `public` has `deny` 192.0.2.7/32 and no longer []
listener `git` is removed: nothing listens on 0.0.0.0:2222
upstream `cluster` gets the target thinkpad-4:443
upstream `cluster` loses the target thinkpad-2:443
upstream `other`: `send_proxy` is v1 and no longer v2
upstream `other`: `balance` is first and no longer least-connections
`idle_timeout` is 2h and no longer 1h
`admin.bind` is 127.0.0.1:9444 and no longer 127.0.0.1:9443
"
        );
    }

    /// A value for each key that is not that of [`OLD`], and whether it opens more.
    #[test]
    fn each_key_that_changes_is_told_and_what_opens_more_stands_out() {
        let listener =
            |more: &str| OLD.replacen("bind = [\"0.0.0.0:443\"]", &format!("bind = [\"0.0.0.0:443\"]\n{more}"), 1);
        let upstream = |more: &str| OLD.replacen("[upstreams.other]", &format!("{more}\n[upstreams.other]"), 1);
        let top = |more: &str| format!("{more}\n{OLD}");
        let end = |more: &str| format!("{OLD}{more}\n");
        let http = "[listeners.web]\nmode = \"http\"\nbind = [\"0.0.0.0:80\"]";
        let without = "[[routes]]\nhosts = [\"x.apps.example.com\"]\nlisteners = [\"public\"]\nupstream = \"cluster\"";
        let moved = OLD.replace(", \"x.apps.example.com\"", "");
        for (old, new, said) in [
            (
                OLD.to_owned(),
                listener("allow = [\"10.0.0.0/8\"]"),
                "listener `public` has `allow` 10.0.0.0/8 and no longer []",
            ),
            (
                listener("allow = [\"10.0.0.0/8\"]"),
                OLD.to_owned(),
                "WIDER: listener `public` has `allow` [] and no longer 10.0.0.0/8",
            ),
            (
                listener("allow = [\"10.0.0.0/8\"]"),
                listener("allow = [\"10.0.0.0/9\", \"10.128.0.0/9\"]"),
                "listener `public` has `allow` 10.0.0.0/9, 10.128.0.0/9 and no longer 10.0.0.0/8",
            ),
            (
                listener("deny = [\"192.0.2.0/24\"]"),
                OLD.to_owned(),
                "WIDER: listener `public` has `deny` [] and no longer 192.0.2.0/24",
            ),
            (
                OLD.to_owned(),
                listener("accept_proxy = [\"10.0.0.0/8\"]"),
                "WIDER: listener `public` has `accept_proxy` 10.0.0.0/8 and no longer []",
            ),
            (
                OLD.to_owned(),
                upstream("health = {}"),
                "upstream `cluster`: `health` is { interval = 5s, timeout = 2s, fall = 2, rise = 2 } and no longer not set",
            ),
            (
                OLD.to_owned(),
                upstream("hedge_delay = \"0s\""),
                "upstream `cluster`: `hedge_delay` is 0s and no longer 250ms",
            ),
            (
                OLD.to_owned(),
                upstream("on_down = \"reset\""),
                "upstream `cluster`: `on_down` is reset and no longer keep",
            ),
            (
                OLD.to_owned(),
                upstream("prefer_direct = false"),
                "upstream `cluster`: `prefer_direct` is false and no longer true",
            ),
            (
                OLD.to_owned(),
                OLD.replace("\"thinkpad-1:443\", \"thinkpad-2:443\"", "\"thinkpad-2:443\", \"thinkpad-1:443\""),
                "upstream `cluster` has its targets in another order: thinkpad-2:443, thinkpad-1:443",
            ),
            (
                OLD.to_owned(),
                end("[[routes]]\nhosts = [\"secret.apps.example.com\"]\naction = \"refuse\""),
                "secret.apps.example.com is no longer let through, to `cluster`; on public",
            ),
            (
                end("[[routes]]\nhosts = [\"*.int.apps.example.com\"]\naction = \"refuse\""),
                OLD.to_owned(),
                "WIDER: *.int.apps.example.com is let through, to `cluster` (thinkpad-1:443, thinkpad-2:443; PROXY off), by `*.apps.example.com`; on public",
            ),
            (
                end("[[routes]]\nhosts = [\"new.example.com\"]\naction = \"refuse\""),
                end("[[routes]]\nhosts = [\"new.example.com\"]\nupstream = \"cluster\""),
                "WIDER: new.example.com is let through, to `cluster` (thinkpad-1:443, thinkpad-2:443; PROXY off); on public",
            ),
            (OLD.to_owned(), top("watch = true"), "`watch` is true and no longer false"),
            (OLD.to_owned(), top("engine = \"copy\""), "`engine` is copy and no longer auto"),
            (OLD.to_owned(), top("on_removed_route = \"close\""), "`on_removed_route` is close and no longer drain"),
            (
                OLD.to_owned(),
                end("[resolver]\nservers = [\"192.0.2.53\"]"),
                "`resolver.servers` is 192.0.2.53:53 and no longer []",
            ),
            (
                OLD.to_owned(),
                end("[tailnet]\nsocket = \"/x\""),
                "`tailnet.socket` is /x and no longer /var/run/tailscale/tailscaled.sock",
            ),
            (
                OLD.to_owned(),
                end("[admin]\nbind = \"192.0.2.1:9443\""),
                "WIDER: `admin.bind` is 192.0.2.1:9443 and no longer 127.0.0.1:9443",
            ),
            (
                end(http),
                format!("{moved}{http}\n{without}\n"),
                "for certificates (ACME challenges), x.apps.example.com goes to `cluster` (thinkpad-1:443, thinkpad-2:443; PROXY off), by `*.apps.example.com`, and no longer to `cluster`; on web",
            ),
            (
                end("[source]\ngit = \"/srv/a\""),
                end("[source]\ngit = \"/srv/a\"\nallow_hosts = [\"*\"]"),
                "WIDER: `source.allow_hosts` is * and no longer names of two labels and more",
            ),
            (OLD.to_owned(), end("[source]\ngit = \"/srv/a\""), "WIDER: the repository /srv/a decides from now on"),
        ] {
            assert_eq!(compare(&old, &new), format!("{said}\n"));
        }
    }
}
