//! Upstreams: which target a connection gets, and dialling it.
//!
//! In the order in which a connection meets them: [`balance`] chooses, [`dial`] connects, to the
//! next target when one fails or is slow. What they go by is kept in a [`Target`]: [`health`] says
//! whether it is up. [`maintenance`] keeps that true on a thread of its own: [`probe`] checks,
//! [`resolver`] resolves, and the tailnet is listened to. After the first byte went out there is no
//! second try: the work here ends with the connected socket.

pub mod balance;
pub mod connect;
pub mod dial;
pub mod handover;
pub mod health;
pub mod inventory;
pub mod maintenance;
mod metrics;
pub mod probe;
mod queue;
pub mod resolver;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use prometheus::{Histogram, IntCounterVec, IntGauge, IntGaugeVec};
use serde::Serialize;
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};

use crate::config::{self, OnDown, TargetHost};
use crate::kernel::socket;
use crate::logging::unix_seconds;
use crate::shortages::Shortages;
use crate::tailnet::{Peer, Way};
use balance::Standing;
use connect::Dial;
use health::{Change, Event, Health};
use inventory::{Endpoint, Inventory};
pub use metrics::UpstreamMetrics;
use queue::Queue;

/// How long an address of several is tried last after a failed connect.
const ADDRESS_ASIDE: Duration = Duration::from_secs(30);
/// How long the log is silent about a target that connections come back from, after it was told.
const LOOP_TOLD: Duration = Duration::from_secs(60);
/// More addresses of one name are not used: each of them is another connect where none answers.
const MOST_ADDRESSES: usize = 16;
/// How long a target counts as relayed after the last packet that proved it: without traffic the
/// tailnet cannot tell, and without a time limit there would be none.
const RELAYED_FOR: Duration = Duration::from_secs(300);

/// An upstream in use.
#[derive(Debug)]
pub struct Pool {
    /// As configured.
    pub config: config::Upstream,
    targets: Vec<Arc<Target>>,
    turn: AtomicUsize,
    queue: Arc<Queue>,
    connect_duration: Histogram,
    connect_failures: IntCounterVec,
    shortages: Arc<Shortages>,
}

/// A target in use. It outlives reloads that keep it.
#[derive(Debug)]
pub struct Target {
    upstream: Arc<str>,
    address: config::Target,
    active: AtomicU32,
    /// Shared with the targets of other upstreams that have the same host and port.
    endpoint: Arc<Endpoint>,
    inventory: Arc<Inventory>,
    loops: Mutex<Option<(u64, SystemTime)>>,
    turn: AtomicUsize,
    /// Of checks and probes, which take no turn of clients.
    probe_turn: AtomicUsize,
    /// Somebody needs an answer of the resolver now.
    wanted: Notify,
    drained: AtomicBool,
    health: Mutex<Health>,
    /// These two follow `health`, for the choice without a lock.
    is_up: AtomicBool,
    only_resets: AtomicBool,
    /// When `health` was changed so that there is something to do: [`maintenance`] waits for it.
    ejected: Notify,
    /// Sends when nothing answers there any more.
    lost: watch::Sender<()>,
    resolution: watch::Sender<Resolution>,
    relayed: AtomicBool,
    peer: Mutex<Option<(Peer, Instant)>>,
    /// No configuration in force has it: connections from before keep it.
    is_retired: AtomicBool,
    epoch: Instant,
    up: IntGauge,
    paths: IntGaugeVec,
}

/// What is known of a target's addresses.
#[derive(Debug, Clone)]
enum Resolution {
    /// The resolver has not answered yet.
    Pending,
    /// The last good answer; at least one.
    Known(Arc<[Arc<Address>]>),
    /// There never was a good answer; what the resolver said.
    Unknown(Arc<str>),
    /// There is one, and the node's owner does not let a repository go there.
    Forbidden(Arc<str>),
}

#[derive(Debug)]
struct Address {
    at: SocketAddr,
    /// Milliseconds after the target's epoch; 0: never, or it has worked since.
    failed_at: AtomicU64,
}

impl Address {
    fn new(at: SocketAddr) -> Arc<Self> {
        Arc::new(Self { at, failed_at: AtomicU64::new(0) })
    }
}

/// A connected target. Its place among the target's connections is given up when this is dropped.
#[derive(Debug)]
pub struct Dialled {
    /// SO_LINGER {on, 0} is set.
    pub stream: TcpStream,
    /// Counts the connection.
    pub lease: Lease,
}

/// One connection of a target.
#[derive(Debug)]
pub struct Lease {
    target: Arc<Target>,
    /// Who waits for it, if there is a cap.
    queue: Option<Arc<Queue>>,
    /// It counts among the target's connections.
    has_place: bool,
    /// With `on_down = "reset"`: changes when the target is lost.
    lost: Option<watch::Receiver<()>>,
    since: Instant,
}

impl Lease {
    /// A place among the target's connections, unless it has `cap` of them (0: no cap).
    fn take(target: &Arc<Target>, pool: &Pool) -> Option<Self> {
        let cap = pool.config.max_connections_per_target;
        let room = |active: u32| (cap == 0 || active < cap).then_some(active + 1);
        target.active.fetch_update(Relaxed, Relaxed, room).ok()?;
        Some(Self::of_pool(target, pool))
    }

    /// Of a connection that is counted already.
    fn of_pool(target: &Arc<Target>, pool: &Pool) -> Self {
        Self {
            target: target.clone(),
            queue: (pool.config.max_connections_per_target > 0).then(|| pool.queue.clone()),
            has_place: true,
            lost: (pool.config.on_down == OnDown::Reset).then(|| target.lost.subscribe()),
            since: Instant::now(),
        }
    }

    /// The connection is made. What happened to its target before is none of its concern.
    fn connected(mut self) -> Self {
        self.since = Instant::now();
        if let Some(lost) = &mut self.lost {
            lost.mark_unchanged();
        }
        self
    }

    /// As written in the configuration.
    pub fn target(&self) -> &Arc<str> {
        &self.target.address.text
    }

    /// Whose connection it is.
    pub fn of(&self) -> &Arc<Target> {
        &self.target
    }

    /// The target has closed its side, so another connection may have the place: what the client
    /// has not read yet waits here. One that only half-closes and reads on cannot be told from
    /// that.
    pub fn give_up_place(&mut self) {
        if std::mem::take(&mut self.has_place) {
            self.target.active.fetch_sub(1, Relaxed);
            if let Some(queue) = &self.queue {
                queue.released();
            }
        }
    }

    /// Ends when the connection is to be reset because its target went down; never where the
    /// configuration keeps such connections.
    pub async fn lost(&mut self) {
        if let Some(lost) = &mut self.lost {
            let _ = lost.changed().await;
        } else {
            std::future::pending::<()>().await;
        }
    }

    /// The target has reset the connection before it had sent a byte.
    pub fn reset_early(&self) {
        self.target.apply(Event::ResetEarly { started: self.since });
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if !self.is_up.load(Relaxed) {
            self.endpoint.down.fetch_sub(1, Relaxed);
        }
        // Nobody checks it on behalf of this upstream any more. If it said nothing, what the others
        // know is by the word of its successor.
        let is_silent = self.health.get_mut().is_ok_and(|health| health.silent().is_some());
        if is_silent {
            self.tell_others(&Event::CheckedElsewhere { by: self.upstream.clone(), silent: None });
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.give_up_place();
    }
}

/// A target in `dataplane status`.
#[derive(Debug, Serialize)]
pub struct TargetStatus {
    target: Arc<str>,
    up: bool,
    reason: String,
    active: u32,
    /// `direct`, `relayed` or `unknown`; `None`: it is no peer of a tailnet.
    path: Option<Way>,
    drained: bool,
    addresses: Vec<SocketAddr>,
    tailnet: Option<Peer>,
    history: Vec<Change>,
    /// Connections to it that came back to us, and when the last one did (Unix time, seconds).
    loops: Option<(u64, f64)>,
}

impl Pool {
    /// Builds the pool; targets that `previous` had too keep their state.
    pub fn new(
        config: &config::Upstream,
        previous: Option<&Self>,
        inventory: &Arc<Inventory>,
        metrics: &UpstreamMetrics,
    ) -> Self {
        let mut known: HashMap<&str, &Arc<Target>> =
            previous.iter().flat_map(|p| &p.targets).map(|t| (&**t.text(), t)).collect();
        let targets: Vec<Arc<Target>> = config
            .targets
            .iter()
            .map(|t| {
                // One that may lead elsewhere by now is another one.
                let kept = known.remove(&*t.text).filter(|known| known.address.fence == t.fence).cloned();
                kept.unwrap_or_else(|| Target::new(&config.name, t, inventory, metrics))
            })
            .collect();
        let queue = previous.map_or_else(|| Arc::new(Queue::new(metrics.queued(&config.name))), |p| p.queue.clone());
        Self {
            config: config.clone(),
            targets,
            turn: AtomicUsize::new(0),
            queue,
            connect_duration: metrics.connect_duration(&config.name),
            connect_failures: metrics.connect_failures.clone(),
            shortages: metrics.shortages.clone(),
        }
    }

    /// The targets, in the order of the file.
    pub fn targets(&self) -> &[Arc<Target>] {
        &self.targets
    }
}

impl Target {
    fn new(
        upstream: &Arc<str>,
        address: &config::Target,
        inventory: &Arc<Inventory>,
        metrics: &UpstreamMetrics,
    ) -> Arc<Self> {
        let up = metrics.target_up(upstream, &address.text);
        up.set(1);
        let known =
            |ips: &[IpAddr]| Resolution::Known(ips.iter().map(|ip| Address::new((*ip, address.port).into())).collect());
        let resolution = match &address.host {
            TargetHost::Ip(ip) => known(&[*ip]),
            TargetHost::Name(name) => {
                // Another target may have asked, whom a repository does not fence in.
                let answer = inventory.last_answer(name);
                let answer = answer.and_then(|ips| address.admit(ips.to_vec(), socket::is_of_this_machine).ok());
                answer.map_or(Resolution::Pending, |ips| known(&ips))
            }
        };
        let target = Arc::new(Self {
            upstream: upstream.clone(),
            address: address.clone(),
            active: AtomicU32::new(0),
            endpoint: inventory.endpoint(address),
            inventory: inventory.clone(),
            loops: Mutex::default(),
            turn: AtomicUsize::new(0),
            probe_turn: AtomicUsize::new(0),
            wanted: Notify::new(),
            drained: AtomicBool::new(false),
            health: Mutex::default(),
            is_up: AtomicBool::new(true),
            only_resets: AtomicBool::new(false),
            ejected: Notify::new(),
            lost: watch::Sender::new(()),
            resolution: watch::Sender::new(resolution),
            relayed: AtomicBool::new(false),
            peer: Mutex::default(),
            is_retired: AtomicBool::new(false),
            epoch: Instant::now(),
            up,
            paths: metrics.tailnet_path.clone(),
        });
        // What is known of the machine already.
        let others = target.endpoint.others(&target);
        let failure = others.iter().find_map(|other| other.health().unreachable().map(str::to_owned));
        target.endpoint.join(&target);
        if let Some(reason) = failure {
            target.note(Event::DialFailed { started: Instant::now(), reason });
        }
        for other in others {
            let silent = other.health().silent().map(str::to_owned);
            if silent.is_some() {
                target.note(Event::CheckedElsewhere { by: other.upstream.clone(), silent });
            }
        }
        target
    }

    /// A connection to it came back to us. That is no verdict: whoever knows a client's hello could
    /// bring it about.
    pub fn note_loop(&self) {
        let now = SystemTime::now();
        let mut loops = self.loops.lock().expect("no panic while held");
        let told = loops.and_then(|(_, at)| now.duration_since(at).ok()).is_some_and(|ago| ago < LOOP_TOLD);
        let count = loops.map_or(0, |(count, _)| count) + 1;
        *loops = Some((count, now));
        drop(loops);
        if !told {
            tracing::warn!(
                upstream = &*self.upstream,
                target_name = &*self.address.text,
                "connections to this target seem to come back to this node: it may be this node itself behind NAT, or another one that forwards them here; \
                 name the address where the service itself listens"
            );
        }
    }

    fn loops(&self) -> Option<(u64, SystemTime)> {
        *self.loops.lock().expect("no panic while held")
    }

    /// Whether this is one of its addresses.
    pub fn has_address(&self, ip: IpAddr) -> bool {
        let is = |address: &Arc<Address>| address.at.ip().to_canonical() == ip;
        matches!(&*self.resolution.borrow(), Resolution::Known(all) if all.iter().any(is))
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().expect("no panic while held")
    }

    /// As written in the configuration.
    pub fn text(&self) -> &Arc<str> {
        &self.address.text
    }

    /// Takes it out of the choice for new connections, or puts it back.
    pub fn set_drained(&self, drained: bool) {
        self.drained.store(drained, Relaxed);
    }

    /// For `dataplane status`.
    pub fn status(&self) -> TargetStatus {
        let peer = self.peer.lock().expect("no panic while held").as_ref().map(|(peer, _)| peer.clone());
        let health = self.health.lock().expect("no panic while held");
        TargetStatus {
            target: self.address.text.clone(),
            up: health.reason().is_none(),
            reason: health.reason().unwrap_or("ok").to_owned(),
            active: self.active.load(Relaxed),
            path: peer.as_ref().map(|peer| peer.path),
            drained: self.drained.load(Relaxed),
            addresses: match &*self.resolution.borrow() {
                Resolution::Known(known) => known.iter().map(|address| address.at).collect(),
                _ => Vec::new(),
            },
            tailnet: peer,
            history: health.history(),
            loops: self.loops().map(|(count, at)| (count, unix_seconds(at))),
        }
    }

    fn standing(&self, prefer_direct: bool) -> Standing {
        if !self.is_up.load(Relaxed) {
            if self.only_resets.load(Relaxed) { Standing::Resetting } else { Standing::Down }
        } else if self.endpoint.overdue.load(Relaxed) > 0 {
            Standing::Overdue
        } else if prefer_direct && self.relayed.load(Relaxed) {
            Standing::Relayed
        } else {
            Standing::Good
        }
    }

    /// Tells the target's health of something that happened just now, and everybody of what that
    /// changed.
    fn apply(&self, event: Event) {
        // Almost every connection: nothing changes, and no lock is needed to know.
        if event == Event::DialPassed && self.is_up.load(Relaxed) && self.endpoint.down.load(Relaxed) == 0 {
            return;
        }
        let of_the_machine = event.of_the_machine();
        let silent = || self.health().silent().map(str::to_owned);
        let before = silent();
        self.note(event);
        if let Some(event) = of_the_machine {
            self.tell_others(&event);
        }
        let after = silent();
        if before != after {
            self.tell_others(&Event::CheckedElsewhere { by: self.upstream.clone(), silent: after });
        }
    }

    /// No configuration in force has it any more. Its connections may keep it for hours, and nobody
    /// checks it meanwhile: what its check said ends now.
    fn retire(&self) {
        self.is_retired.store(true, Relaxed);
        self.apply(Event::NoCheck);
    }

    fn tell_others(&self, event: &Event) {
        for other in self.endpoint.others(self) {
            other.note(event.clone());
        }
    }

    /// What [`apply`](Self::apply) does for this target alone.
    fn note(&self, event: Event) {
        let mut health = self.health();
        let outcome = health.apply(event, Instant::now());
        self.only_resets.store(health.only_resets(), Relaxed);
        if let Some(up) = outcome.up {
            self.is_up.store(up, Relaxed);
            if up {
                self.endpoint.down.fetch_sub(1, Relaxed);
            } else {
                self.endpoint.down.fetch_add(1, Relaxed);
            }
            health.remember(up, SystemTime::now());
            let (upstream, target) = (&*self.upstream, &*self.address.text);
            // The gauge and the name in the log may be those of a successor.
            if !self.is_retired.load(Relaxed) {
                self.up.set(i64::from(up));
                if up {
                    tracing::info!(upstream, target_name = target, "target is up");
                } else {
                    let reason = health.reason().unwrap_or_default();
                    tracing::warn!(upstream, target_name = target, reason, "target is down");
                }
            }
        }
        drop(health);
        if outcome.lost {
            self.lost.send_replace(());
        }
        if outcome.up == Some(false) {
            self.ejected.notify_one();
        }
    }

    /// What the tailnet says of it; `None`: it is no peer, or there is no tailnet.
    fn see(&self, peer: Option<&Peer>) {
        let now = Instant::now();
        let mut seen = self.peer.lock().expect("no panic while held");
        let before = seen.take();
        *seen = peer.map(|peer| {
            let mut peer = peer.clone();
            let mut at = now;
            if let (Way::Unknown, Some((Peer { path: Way::Relayed, via, .. }, since))) = (peer.path, before)
                && now.duration_since(since) < RELAYED_FOR
            {
                (peer.path, peer.via, at) = (Way::Relayed, via, since);
            }
            (peer, at)
        });
        let path = seen.as_ref().map(|(peer, _)| peer.path);
        drop(seen);
        self.relayed.store(path == Some(Way::Relayed), Relaxed);
        for way in Way::ALL {
            let labels = [&*self.upstream, &*self.address.text, way.as_str()];
            if path.is_some() {
                self.paths.with_label_values(&labels).set(i64::from(path == Some(way)));
            } else {
                let _ = self.paths.remove_label_values(&labels);
            }
        }
        self.apply(Event::Tailnet { online: peer.map(|peer| peer.online) });
    }

    /// What the resolver says of its name; whether that was of use.
    fn resolved(&self, answer: Result<Vec<IpAddr>, String>) -> bool {
        let has_answer = answer.is_ok();
        let answer = answer.and_then(|found| self.address.admit(found, socket::is_of_this_machine));
        let is_of_use = answer.is_ok();
        let known = match (&*self.resolution.borrow(), &answer) {
            (Resolution::Known(known), _) => Some(known.clone()),
            _ => None,
        };
        let event = match (answer, known) {
            (Ok(found), known) => {
                let known = known.as_deref().unwrap_or_default();
                let at = |ip| SocketAddr::new(ip, self.address.port);
                let found: Vec<IpAddr> = found.into_iter().take(MOST_ADDRESSES).collect();
                if let TargetHost::Name(name) = &self.address.host {
                    self.inventory.remember(name, &found);
                }
                let found: Vec<SocketAddr> = found.into_iter().map(at).collect();
                if known.iter().map(|a| a.at).ne(found.iter().copied()) {
                    tracing::info!(
                        upstream = &*self.upstream,
                        target_name = &*self.address.text,
                        addresses = ?found,
                        "target has new addresses"
                    );
                    let keep = |at: &SocketAddr| known.iter().find(|a| a.at == *at).cloned();
                    let addresses = found.iter().map(|at| keep(at).unwrap_or_else(|| Address::new(*at)));
                    self.resolution.send_replace(Resolution::Known(addresses.collect()));
                }
                Event::Resolved
            }
            // The last good answer survives an outage of the resolver.
            (Err(reason), Some(_)) => {
                tracing::debug!(target_name = &*self.address.text, reason, "resolver");
                return is_of_use;
            }
            (Err(reason), None) => {
                let text = reason.as_str().into();
                self.resolution.send_replace(if has_answer {
                    Resolution::Forbidden(text)
                } else {
                    Resolution::Unknown(text)
                });
                Event::Unresolved { reason: format!("resolve: {reason}") }
            }
        };
        self.apply(event);
        is_of_use
    }

    /// Where to connect: what has not failed lately first, then the client's address family, then
    /// in turn. Each call takes a turn.
    fn in_turn(&self, known: &[Arc<Address>], dial: &Dial) -> Vec<Arc<Address>> {
        if known.len() < 2 {
            return known.to_vec();
        }
        let (now, ipv6_first) = (self.now(), dial.client.is_ipv6());
        let turn = if dial.is_probe { &self.probe_turn } else { &self.turn };
        // Others connect meanwhile: each is looked at once, and may have failed after `now`.
        let mut ranked: Vec<_> = known
            .iter()
            .map(|address| {
                let failed_at = address.failed_at.load(Relaxed);
                let failed = failed_at != 0 && now.saturating_sub(failed_at) < ADDRESS_ASIDE.as_millis() as u64;
                ((failed, address.at.is_ipv6() != ipv6_first), address.clone())
            })
            .collect();
        ranked.sort_by_key(|(rank, _)| *rank);
        // Among those that are as good as the first: else the others' places would be the first
        // one's, too.
        let first = ranked[0].0;
        let equals = ranked.iter().take_while(|(rank, _)| *rank == first).count();
        ranked[..equals].rotate_left(turn.fetch_add(1, Relaxed) % equals);
        ranked.into_iter().map(|(_, address)| address).collect()
    }

    /// Milliseconds after the epoch, never 0.
    fn now(&self) -> u64 {
        self.epoch.elapsed().as_millis() as u64 + 1
    }
}
