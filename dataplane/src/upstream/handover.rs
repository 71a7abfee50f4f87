//! What one process knows of targets and another one goes on with, so that it does not begin blind.
//!
//! It must not know how that gets there.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};

use super::health::{Event, Health};
use super::inventory::{Inventory, normal};
use super::{Lease, Pool, Target, UpstreamMetrics};
use crate::config::{self, TargetHost};
use crate::logging::unix_seconds;
use crate::moment::Moment;
use crate::register::Register;
use crate::shortages::Shortages;
use crate::tailnet::{Peer, Way};

/// See the module's description.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpstreamsState {
    /// The last good answers of the resolver, by name.
    answers: BTreeMap<String, Vec<IpAddr>>,
    targets: Vec<TargetState>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TargetState {
    upstream: Arc<str>,
    target: Arc<str>,
    drained: bool,
    health: Health,
    /// What the tailnet said of it, and when.
    peer: Option<(Peer, Moment)>,
    /// Connections to it that came back, and when the last one did (Unix time, seconds).
    loops: Option<(u64, f64)>,
}

/// What is known.
pub fn export(pools: &[Arc<Pool>], inventory: &Inventory) -> UpstreamsState {
    let targets = pools.iter().flat_map(|pool| pool.targets.iter().map(|target| target.export())).collect();
    UpstreamsState { answers: inventory.answers(), targets }
}

/// Takes it over, as far as there are such targets; nothing was done with them yet.
pub fn restore(pools: &[Arc<Pool>], state: &UpstreamsState) {
    let known: HashMap<_, _> = state.targets.iter().map(|state| ((&*state.upstream, &*state.target), state)).collect();
    let checks = |name: &str| pools.iter().any(|pool| *pool.config.name == *name && pool.config.health.is_some());
    for target in pools.iter().flat_map(|pool| &pool.targets) {
        if let Some(known) = known.get(&(&*target.upstream, &**target.text())) {
            target.restore(known, checks);
        }
        if !checks(&target.upstream) {
            target.apply(Event::NoCheck);
        }
        if let TargetHost::Name(name) = &target.address.host
            && let Some(answer) = state.answers.get(&normal(name))
        {
            target.resolved(Ok(answer.clone()));
        }
    }
}

impl Target {
    fn export(&self) -> TargetState {
        let peer = self.peer.lock().expect("no panic while held").clone();
        TargetState {
            upstream: self.upstream.clone(),
            target: self.text().clone(),
            drained: self.drained.load(Relaxed),
            health: self.health().clone(),
            peer: peer.map(|(peer, at)| (peer, at.into())),
            loops: self.loops().map(|(count, at)| (count, unix_seconds(at))),
        }
    }

    fn restore(&self, state: &TargetState, checks: impl Fn(&str) -> bool) {
        self.drained.store(state.drained, Relaxed);
        let loops =
            state.loops.map(|(count, at)| (count, SystemTime::UNIX_EPOCH + Duration::from_secs_f64(at.max(0.0))));
        *self.loops.lock().expect("no panic while held") = loops;
        if let Some((peer, at)) = &state.peer {
            self.relayed.store(peer.path == Way::Relayed, Relaxed);
            *self.peer.lock().expect("no panic while held") = Some((peer.clone(), at.instant()));
        }
        let mut health = self.health();
        *health = state.health.clone();
        health.retain_elsewhere(checks);
        let up = health.reason().is_none();
        self.only_resets.store(health.only_resets(), Relaxed);
        drop(health);
        if self.is_up.swap(up, Relaxed) && !up {
            self.endpoint.down.fetch_add(1, Relaxed);
            self.ejected.notify_one();
        }
        self.up.set(i64::from(up));
    }
}

impl Pool {
    /// The place of a connection that another process had made to this target: beyond the most, if
    /// it has to be. `None`: there is no such target.
    pub fn adopt(&self, target: &str) -> Option<Lease> {
        let target = self.targets.iter().find(|known| **known.text() == *target)?;
        target.active.fetch_add(1, Relaxed);
        Some(Lease::of_pool(target, self))
    }
}

impl Lease {
    /// Of a connection that another process had made, to a target that no configuration has any
    /// more: it counts nowhere.
    pub fn orphan(upstream: &Arc<str>, target: &Arc<str>) -> Self {
        let nowhere = Register::default();
        let metrics = UpstreamMetrics::new(&nowhere, Arc::new(Shortages::new(&nowhere)));
        let address = config::Target {
            text: target.clone(),
            host: TargetHost::Name(String::new()),
            port: 0,
            span: config::Span::default(),
            fence: None,
        };
        let target = Target::new(upstream, &address, &Arc::default(), &metrics);
        target.is_retired.store(true, Relaxed);
        Self { target, queue: None, has_place: false, lost: None, since: Instant::now() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Source, parse};
    use crate::metrics::Metrics;
    use crate::upstream::balance::Standing;

    const BOTH: &str = "[upstreams.a]\ntargets = [\"192.0.2.1:1\", \"laptop:2\"]\nhealth = { interval = \"5s\" }\n\
                        max_connections_per_target = 1\n\
                        [upstreams.b]\ntargets = [\"192.0.2.1:1\", \"192.0.2.3:3\"]\n";

    fn pools(text: &str) -> (Vec<Arc<Pool>>, Arc<Inventory>) {
        let listener = "[listeners.x]\nmode = \"tcp\"\nbind = [\"192.0.2.9:1\"]\nupstream = \"b\"\n";
        let config = parse(Arc::new(Source::new("test.toml", format!("{listener}{text}")))).unwrap().0;
        let (inventory, metrics) = (Arc::new(Inventory::default()), Metrics::new());
        let pool = |upstream| Arc::new(Pool::new(upstream, None, &inventory, &metrics.upstreams));
        (config.upstreams.iter().map(pool).collect(), inventory)
    }

    fn handed_over(pools: &[Arc<Pool>], inventory: &Inventory) -> UpstreamsState {
        serde_json::from_str(&serde_json::to_string(&export(pools, inventory)).unwrap()).unwrap()
    }

    #[test]
    fn a_successor_knows_what_was_known() {
        let (old, inventory) = pools(BOTH);
        let [a, b] = &old[..] else { unreachable!() };
        let failed = |reason: &str| Event::DialFailed { started: Instant::now(), reason: reason.to_owned() };
        a.targets[0].apply(failed("refused"));
        a.targets[1].resolved(Ok(vec![[192, 0, 2, 7].into()]));
        a.targets[1].set_drained(true);
        a.targets[1].note_loop();
        b.targets[1].apply(Event::ResetEarly { started: Instant::now() });
        let (new, new_inventory) = pools(BOTH);
        restore(&new, &handed_over(&old, &inventory));
        for (old, new) in old.iter().flat_map(|pool| &pool.targets).zip(new.iter().flat_map(|pool| &pool.targets)) {
            assert_eq!(old.standing(true), new.standing(true));
            assert_eq!(old.health().reason(), new.health().reason());
            assert_eq!(old.drained.load(Relaxed), new.drained.load(Relaxed));
            assert_eq!(old.health().probe_due().is_some(), new.health().probe_due().is_some());
            assert_eq!(old.endpoint.down.load(Relaxed), new.endpoint.down.load(Relaxed));
            assert_eq!(old.health().history().len(), new.health().history().len());
            assert_eq!(old.loops().map(|(count, _)| count), new.loops().map(|(count, _)| count));
            assert_eq!(old.has_address([192, 0, 2, 7].into()), new.has_address([192, 0, 2, 7].into()));
        }
        assert_eq!(new[1].targets[1].standing(false), Standing::Resetting);
        assert_eq!(new_inventory.answers(), inventory.answers());
        new[0].targets[0].apply(Event::DialPassed);
        assert_eq!(new[1].targets[0].standing(false), Standing::Good, "it is one machine, for both");
    }

    #[test]
    fn what_is_gone_is_forgotten_and_what_is_new_begins_as_usual() {
        let (old, inventory) = pools(BOTH);
        let silent = |reason: &str| Event::CheckFailed { fall: 1, reason: reason.to_owned(), answers: false };
        old[0].targets[0].apply(silent("no answer"));
        assert_eq!(old[1].targets[0].health().reason(), Some("no answer"));
        let (new, _) = pools("[upstreams.b]\ntargets = [\"192.0.2.1:1\", \"192.0.2.4:4\"]\n");
        restore(&new, &handed_over(&old, &inventory));
        let ups: Vec<_> = new[0].targets.iter().map(|target| target.standing(false)).collect();
        assert_eq!(ups, [Standing::Good, Standing::Good], "nobody checks it any more");
        assert_eq!(new[0].targets[0].endpoint.down.load(Relaxed), 0);
    }

    #[test]
    fn a_connection_keeps_its_place_beyond_the_most_and_without_a_target() {
        let (new, _) = pools(BOTH);
        let leases = [new[0].adopt("192.0.2.1:1").unwrap(), new[0].adopt("192.0.2.1:1").unwrap()];
        assert_eq!(new[0].targets[0].active.load(Relaxed), 2);
        assert!(Lease::take(&new[0].targets[0], &new[0]).is_none());
        drop(leases);
        assert_eq!(new[0].targets[0].active.load(Relaxed), 0);
        assert!(new[0].adopt("192.0.2.2:2").is_none());
        let orphan = Lease::orphan(&"gone".into(), &"192.0.2.2:2".into());
        assert_eq!(&**orphan.target(), "192.0.2.2:2");
    }

    #[test]
    fn an_unknown_field_is_an_error() {
        let (old, inventory) = pools(BOTH);
        let text = serde_json::to_string(&export(&old, &inventory)).unwrap();
        for field in ["\"drained\"", "\"times_ejected\"", "\"answers\""] {
            let wider = text.replacen(field, &format!("\"mood\":1,{field}"), 1);
            assert!(
                serde_json::from_str::<UpstreamsState>(&wider).unwrap_err().to_string().contains("mood"),
                "{field}"
            );
        }
    }
}
