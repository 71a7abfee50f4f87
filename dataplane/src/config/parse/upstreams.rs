//! `[upstreams.NAME]`, and references to one.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::{DEADLINE, HOUR, NOWHERE, Parser};
use crate::config::reader::{Field, Section, quoted, some_of};
use crate::config::values::format_duration;
use crate::config::{
    Balance, Diagnostic, HealthCheck, HostPattern, OnDown, SendProxy, Target, TargetHost, Upstream, keys,
};

/// Names that are compared with a wrong one, and of which a few are shown.
const MOST_NAMES: usize = 200;

impl Parser {
    pub(super) fn upstreams(&mut self, roots: &[Section<'_>], prefer_direct: bool) -> Vec<Upstream> {
        let mut upstreams = Vec::new();
        for (span, name, section) in self.named(roots, "upstreams", keys::UPSTREAM) {
            self.places.upstreams.push(span);
            upstreams.push(self.upstream(name, &section, prefer_direct));
        }
        upstreams
    }

    fn upstream(&mut self, name: Arc<str>, section: &Section<'_>, prefer_direct: bool) -> Upstream {
        let reader = &mut self.reader;
        let send_proxy = section.get("send_proxy").and_then(|field| reader.choice(field, &SendProxy::WORDS));
        let balance = section.get("balance").and_then(|field| reader.choice(field, &Balance::WORDS));
        let connect_timeout = section.get("connect_timeout").and_then(|field| reader.duration(field, &DEADLINE));
        let most = section
            .get("max_connections_per_target")
            .and_then(|field| reader.integer(field, &(0..=u64::from(u32::MAX)), "1000"));
        let hedge_delay = section.get("hedge_delay").and_then(|field| reader.duration(field, &(Duration::ZERO..=HOUR)));
        let on_down = section.get("on_down").and_then(|field| reader.choice(field, &OnDown::WORDS));
        let prefer_direct =
            section.get("prefer_direct").and_then(|field| reader.boolean(field)).unwrap_or(prefer_direct);
        let connect_timeout = connect_timeout.unwrap_or(Duration::from_secs(3));
        if let (Some(field), Some(delay)) = (section.get("hedge_delay"), hedge_delay)
            && delay >= connect_timeout
        {
            reader.warning(
                field.span(),
                format!(
                    "a second target is never dialled: `hedge_delay` is not shorter than `connect_timeout`, which is {}",
                    format_duration(connect_timeout)
                ),
                "write a shorter one, such as \"250ms\", or \"0s\" to say that it is meant",
            );
        }
        let health = self.health(section);
        Upstream {
            name,
            targets: self.targets(section),
            send_proxy: send_proxy.unwrap_or(SendProxy::Off),
            balance: balance.unwrap_or(Balance::LeastConnections),
            health,
            connect_timeout,
            max_connections_per_target: most.unwrap_or(0) as u32,
            hedge_delay: hedge_delay.unwrap_or(Duration::from_millis(250)),
            on_down: on_down.unwrap_or(OnDown::Keep),
            prefer_direct,
        }
    }

    fn targets(&mut self, section: &Section<'_>) -> Vec<Target> {
        const EXAMPLE: &str = "\"thinkpad-1:443\"";
        let Some(field) = section.get("targets") else {
            self.reader.missing(section, "targets", &format!("[{EXAMPLE}]"));
            return Vec::new();
        };
        if field.is_empty_list() {
            self.reader.error(
                field.span(),
                format!("{} has no target", section.name),
                format!("name at least one as host:port: `targets = [{EXAMPLE}]`"),
            );
        }
        let mut targets: Vec<Target> = Vec::new();
        let mut listed: HashMap<(TargetHost, u16), usize> = HashMap::new();
        for (span, text) in self.reader.strings(field, "a target", EXAMPLE) {
            let Some(target) = self.reader.accept(span.clone(), Target::parse(text, span)) else { continue };
            if let Some(first) = listed.get(&(target.host.clone(), target.port)) {
                let diagnostic = Diagnostic::error(
                    target.span.clone(),
                    format!("target `{text}` is listed twice"),
                    "remove one; a share of the connections cannot be given by repetition",
                );
                self.reader.push(diagnostic.note(targets[*first].span.clone(), "first listed here"));
            } else {
                listed.insert((target.host.clone(), target.port), targets.len());
                targets.push(target);
            }
        }
        targets
    }

    /// `health`: what is left out of it has a default; without it there is no check.
    fn health(&mut self, section: &Section<'_>) -> Option<HealthCheck> {
        let reader = &mut self.reader;
        let health = section.get("health").and_then(|field| reader.section(field, "`health`".into(), keys::HEALTH))?;
        let mut duration = |key| health.get(key).and_then(|field| reader.duration(field, &DEADLINE));
        let (interval, timeout) = (duration("interval"), duration("timeout"));
        let mut count = |key| health.get(key).and_then(|field| reader.integer(field, &(1..=1000), "2"));
        let (fall, rise) = (count("fall"), count("rise"));
        let tls = health.get("tls").and_then(|field| {
            let text = reader.string(field, "a host name", "\"blog.example.com\"")?;
            match reader.accept(field.span(), HostPattern::parse(text))? {
                HostPattern::Exact(name) => Some(name),
                HostPattern::Wildcard(_) | HostPattern::Any => {
                    let message = format!("a hello has one server name, not {}", quoted(text));
                    reader.error(field.span(), message, "write a host that the ingress serves: \"blog.example.com\"");
                    None
                }
            }
        });
        Some(HealthCheck {
            interval: interval.unwrap_or(Duration::from_secs(5)),
            timeout: timeout.unwrap_or(Duration::from_secs(2)),
            fall: fall.unwrap_or(2) as u32,
            rise: rise.unwrap_or(2) as u32,
            tls,
        })
    }

    pub(super) fn upstream_index(&mut self, field: Field<'_>, upstreams: &[Upstream]) -> usize {
        let example = quoted(upstreams.first().map_or("cluster", |upstream| &upstream.name));
        let index = self.reader.string(field, "the name of an upstream", &example).and_then(|text| {
            let index = self.upstreams.get(text).copied();
            if index.is_none() {
                let few = upstreams.iter().take(MOST_NAMES);
                let names: Vec<&str> = few.map(|upstream| &*upstream.name).collect();
                let define = format!("define it: `[upstreams.{text}]` with `targets = [\"host:port\"]`");
                let remedy = match self.reader.suggest(text, &names) {
                    Some(name) => format!("did you mean \"{name}\"?"),
                    None if Target::parse(text, 0..0).is_ok() => {
                        "name an upstream here, and give it the target: `[upstreams.NAME]` with `targets`".into()
                    }
                    None if names.is_empty() => define,
                    None => format!("{define}, or name one of {}", some_of(&names)),
                };
                self.reader.absent(field.span(), format!("there is no upstream {}", quoted(text)), remedy);
            }
            index
        });
        index.unwrap_or(NOWHERE)
    }
}
