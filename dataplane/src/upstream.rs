//! Upstreams: which target a connection gets, and dialling it.
//!
//! The choice is a pure function of what is known of the targets ([`choose`]); the rest keeps that knowledge and opens sockets. A target that
//! fails is left alone for a while that doubles with each failure; when all have failed, they are tried all the same. After the first
//! byte went out there is no second try: this module's work ends with the connected socket.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use prometheus::{Histogram, IntGauge};
use serde::Serialize;
use sha2::{Digest, Sha256};
use tokio::net::{TcpSocket, TcpStream, lookup_host};
use tokio::time::{timeout, timeout_at};

use crate::config::{self, Balance, TargetHost};
use crate::metrics::Metrics;
use crate::reject::Reason;

/// How long a target is left alone after its first failure; doubles with each further one.
const BACKOFF_FIRST: Duration = Duration::from_secs(1);
/// The longest that a target is left alone.
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// How long the resolver may take before its last good answer is used instead: less than any sensible `connect_timeout`.
const RESOLVE_PATIENCE: Duration = Duration::from_millis(500);
/// How long an answer of the resolver is used before it is asked again.
const RESOLVE_EVERY: Duration = Duration::from_secs(10);

/// An upstream in use.
#[derive(Debug)]
pub struct Pool {
    /// As configured.
    pub config: config::Upstream,
    targets: Vec<Arc<Target>>,
    turn: AtomicUsize,
    connect_duration: Histogram,
}

/// A target in use. It outlives reloads that keep it.
#[derive(Debug)]
pub struct Target {
    upstream: Arc<str>,
    address: config::Target,
    active: AtomicU32,
    drained: AtomicBool,
    health: Mutex<Health>,
    resolved: tokio::sync::Mutex<Option<(Instant, Vec<SocketAddr>)>>,
    up: IntGauge,
    epoch: Instant,
    /// Milliseconds after `epoch` until which it is left alone; 0 while it works. Follows `health`, for the choice without a lock.
    retry_at: AtomicU64,
}

#[derive(Debug, Default)]
struct Health {
    failures: u32,
    failed_at: Option<Instant>,
    reason: Option<String>,
}

/// What the choice is made from.
#[derive(Debug, Clone, Copy)]
pub struct Candidate {
    /// Connections that it has.
    pub active: u32,
    /// What the configuration and the operator allow: not drained, not at its cap, not yet tried for this connection.
    pub allowed: bool,
    /// Failed and still left alone.
    pub failed: bool,
    /// Rank in rendezvous hashing for this client.
    pub weight: u64,
}

/// Picks a target: of those that work if any is allowed, else of the failed ones, because a wrong verdict must not make an outage.
pub fn choose(balance: Balance, turn: usize, candidates: &(impl Iterator<Item = Candidate> + Clone)) -> Option<usize> {
    let count = candidates.clone().count();
    let eligible = |failed: bool| candidates.clone().enumerate().filter(move |(_, c)| c.allowed && c.failed == failed);
    // Position after the turn's starting point: breaks ties in turn.
    let place = |i: usize| (i + count - turn % count) % count;
    [false, true].into_iter().find_map(|failed| {
        match balance {
            Balance::LeastConnections => eligible(failed).min_by_key(|(i, c)| (c.active, place(*i))),
            Balance::RoundRobin => eligible(failed).min_by_key(|(i, _)| place(*i)),
            Balance::Hash => eligible(failed).max_by_key(|(_, c)| c.weight),
            Balance::First => eligible(failed).next(),
        }
        .map(|(i, _)| i)
    })
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
}

impl Lease {
    fn new(target: &Arc<Target>) -> Self {
        target.active.fetch_add(1, Relaxed);
        Self { target: target.clone() }
    }

    /// As written in the configuration.
    pub fn target(&self) -> &Arc<str> {
        &self.target.address.text
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.target.active.fetch_sub(1, Relaxed);
    }
}

/// A target in `dataplane status`.
#[derive(Debug, Serialize)]
pub struct TargetStatus {
    target: Arc<str>,
    up: bool,
    reason: String,
    active: u32,
    path: Option<String>,
    drained: bool,
}

/// What a dial needs beside the pool.
#[derive(Clone, Copy)]
pub struct Dial<'a> {
    /// The client, for its family and for `balance = "hash"`.
    pub client: SocketAddr,
    /// Another port of the targets than their own. How that one does says nothing of the target: it is not put aside for it, nor taken back.
    pub port: Option<u16>,
    /// Where we listen: a target that turns out to be ourselves would make a loop.
    pub own: &'a [SocketAddr],
    /// Counts failures.
    pub metrics: &'a Metrics,
}

impl Pool {
    /// Builds the pool; targets that `previous` had too keep their state.
    pub fn new(config: &config::Upstream, previous: Option<&Self>, metrics: &Metrics) -> Self {
        let mut known: HashMap<&str, &Arc<Target>> =
            previous.iter().flat_map(|p| &p.targets).map(|t| (&**t.text(), t)).collect();
        let targets = config
            .targets
            .iter()
            .map(|t| known.remove(&*t.text).cloned().unwrap_or_else(|| Arc::new(Target::new(&config.name, t, metrics))))
            .collect();
        Self {
            config: config.clone(),
            targets,
            turn: AtomicUsize::new(0),
            connect_duration: metrics.connect_duration(&config.name),
        }
    }

    /// The targets, in the order of the file.
    pub fn targets(&self) -> &[Arc<Target>] {
        &self.targets
    }

    /// Connects to a target, trying one after the other until one answers.
    ///
    /// # Errors
    /// `NoUpstream` when all failed, `TotalLimit` when this process has no file descriptor left.
    pub async fn dial(&self, dial: Dial<'_>) -> Result<Dialled, Reason> {
        let mut tried = Vec::new();
        let turn = self.turn.fetch_add(1, Relaxed);
        loop {
            let cap = self.config.max_connections_per_target;
            let candidates = self.targets.iter().enumerate().map(|(i, target)| {
                let active = target.active.load(Relaxed);
                Candidate {
                    active,
                    allowed: !target.drained.load(Relaxed) && (cap == 0 || active < cap) && !tried.contains(&i),
                    failed: target.is_failed(),
                    weight: match self.config.balance {
                        Balance::Hash => target.weight(dial.client.ip()),
                        _ => 0,
                    },
                }
            });
            let index = choose(self.config.balance, turn, &candidates).ok_or(Reason::NoUpstream)?;
            let target = &self.targets[index];
            let lease = Lease::new(target);
            if dial.port.is_none() {
                target.claim_trial(self.config.connect_timeout);
            }
            let started = Instant::now();
            let deadline = started + self.config.connect_timeout;
            match target.connect(dial, deadline).await {
                Ok(stream) => {
                    self.connect_duration.observe(started.elapsed().as_secs_f64());
                    if dial.port.is_none() {
                        target.succeeded();
                    }
                    return Ok(Dialled { stream, lease });
                }
                Err(failure) => {
                    dial.metrics.connect_failed(&self.config.name, &target.address.text, failure.reason);
                    match failure.blame {
                        Blame::Target if dial.port.is_none() => target.failed(&failure, started),
                        Blame::OurDescriptors => return Err(Reason::TotalLimit),
                        Blame::Target | Blame::OurPorts => {}
                    }
                    tried.push(index);
                }
            }
        }
    }
}

/// Why a connect failed.
struct Failure {
    /// Label of the metric.
    reason: &'static str,
    detail: String,
    blame: Blame,
}

enum Blame {
    Target,
    OurDescriptors,
    OurPorts,
}

impl Failure {
    fn new(reason: &'static str, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into(), blame: Blame::Target }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        let (reason, blame) = match error.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
                ("no_descriptor", Blame::OurDescriptors)
            }
            Some(libc::EADDRNOTAVAIL) => ("no_local_port", Blame::OurPorts),
            Some(libc::ECONNREFUSED) => ("refused", Blame::Target),
            Some(libc::ETIMEDOUT) => ("timeout", Blame::Target),
            Some(libc::ECONNRESET) => ("reset", Blame::Target),
            Some(libc::EHOSTUNREACH | libc::ENETUNREACH | libc::EHOSTDOWN | libc::ENETDOWN) => {
                ("unreachable", Blame::Target)
            }
            _ => ("other", Blame::Target),
        };
        Self { reason, detail: error.to_string(), blame }
    }
}

impl Target {
    fn new(upstream: &Arc<str>, address: &config::Target, metrics: &Metrics) -> Self {
        let up = metrics.target_up(upstream, &address.text);
        up.set(1);
        Self {
            upstream: upstream.clone(),
            address: address.clone(),
            active: AtomicU32::new(0),
            drained: AtomicBool::new(false),
            health: Mutex::default(),
            resolved: tokio::sync::Mutex::default(),
            up,
            epoch: Instant::now(),
            retry_at: AtomicU64::new(0),
        }
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
        let health = self.health.lock().expect("no panic while held");
        TargetStatus {
            target: self.address.text.clone(),
            up: health.reason.is_none(),
            reason: health.reason.clone().unwrap_or_else(|| "ok".to_owned()),
            active: self.active.load(Relaxed),
            path: None,
            drained: self.drained.load(Relaxed),
        }
    }

    fn now(&self) -> u64 {
        self.epoch.elapsed().as_millis() as u64
    }

    fn is_failed(&self) -> bool {
        self.retry_at.load(Relaxed) > self.now()
    }

    /// When a failed target's time is up, one connection tries it; the others go on without until that one knows.
    fn claim_trial(&self, connect_timeout: Duration) {
        if self.retry_at.load(Relaxed) != 0 {
            self.retry_at.store(self.now() + connect_timeout.as_millis() as u64 + 1, Relaxed);
        }
    }

    fn succeeded(&self) {
        if self.retry_at.load(Relaxed) == 0 {
            return;
        }
        let mut health = self.health.lock().expect("no panic while held");
        self.retry_at.store(0, Relaxed);
        if health.reason.take().is_some() {
            tracing::info!(upstream = &*self.upstream, target_name = &*self.address.text, "target works again");
        }
        health.failures = 0;
        self.up.set(1);
    }

    fn failed(&self, failure: &Failure, started: Instant) {
        let mut health = self.health.lock().expect("no panic while held");
        // Dials that were under way together failed of one event.
        if health.failed_at.is_some_and(|at| started <= at) {
            return;
        }
        health.failed_at = Some(Instant::now());
        let backoff = (BACKOFF_FIRST * 2u32.saturating_pow(health.failures.min(10))).min(BACKOFF_MAX);
        self.retry_at.store(self.now() + backoff.as_millis() as u64, Relaxed);
        health.failures += 1;
        let reason = format!("{}: {}", failure.reason, failure.detail);
        if health.reason.is_none() {
            tracing::warn!(upstream = &*self.upstream, target_name = &*self.address.text, reason, "target failed");
        }
        health.reason = Some(reason);
        self.up.set(0);
    }

    /// Rendezvous hashing: each client ranks the targets; a target that leaves moves only its own clients.
    fn weight(&self, client: IpAddr) -> u64 {
        // A fixed function, so that every entrance node with this configuration agrees, whatever it was built with.
        let mut hash = Sha256::new();
        match client {
            IpAddr::V4(ip) => hash.update(ip.octets()),
            IpAddr::V6(ip) => hash.update(ip.octets()),
        }
        hash.update(self.address.text.as_bytes());
        let digest = hash.finalize();
        digest[..8].iter().fold(0, |weight, byte| weight << 8 | u64::from(*byte))
    }

    /// Connects to one of the target's addresses. Those that are left share the time that is left, so that one that swallows packets does not use it up.
    async fn connect(&self, dial: Dial<'_>, deadline: Instant) -> Result<TcpStream, Failure> {
        let no_answer = |_| Failure::new("timeout", "no answer within connect_timeout");
        let resolved = timeout_at(deadline.into(), self.addresses(dial.client.is_ipv6())).await;
        let addresses = resolved.map_err(|_| Failure::new("resolve", "no answer within connect_timeout"))??;
        let mut last = Failure::new("resolve", "the name has no address");
        for (i, mut address) in addresses.iter().copied().enumerate() {
            address.set_port(dial.port.unwrap_or(address.port()));
            let left = deadline.saturating_duration_since(Instant::now());
            let share = left / (addresses.len() - i) as u32;
            match timeout(share, connect(address)).await.map_err(no_answer) {
                Ok(Ok(stream)) if is_own(&stream, dial.own) => {
                    return Err(Failure::new("own_listener", format!("{address} is a listener of this daemon")));
                }
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => last = error.into(),
                Err(failure) => last = failure,
            }
        }
        Err(last)
    }

    /// Where to connect, the client's address family first.
    async fn addresses(&self, ipv6_first: bool) -> Result<Vec<SocketAddr>, Failure> {
        let port = self.address.port;
        let name = match &self.address.host {
            TargetHost::Ip(ip) => return Ok(vec![SocketAddr::new(*ip, port)]),
            TargetHost::Name(name) => name,
        };
        // The lock is held while the resolver works, so that a burst of connections asks once.
        let mut resolved = self.resolved.lock().await;
        if resolved.as_ref().is_none_or(|(at, _)| at.elapsed() >= RESOLVE_EVERY) {
            // Without an answer to fall back on, connect_timeout is the limit.
            let patience = if resolved.is_some() { RESOLVE_PATIENCE } else { Duration::MAX };
            let answer = timeout(patience, lookup_host((name.as_str(), port))).await;
            match answer.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut))) {
                Ok(found) => {
                    let mut found: Vec<_> = found.collect();
                    found.dedup();
                    *resolved = Some((Instant::now(), found));
                }
                // The last good answer survives an outage of the resolver.
                Err(error) => match &mut *resolved {
                    Some((at, _)) => *at = Instant::now(),
                    None => return Err(Failure::new("resolve", error.to_string())),
                },
            }
        }
        let mut addresses = resolved.as_ref().map(|(_, a)| a.clone()).unwrap_or_default();
        addresses.sort_by_key(|a| a.is_ipv6() != ipv6_first);
        Ok(addresses)
    }
}

async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = if address.is_ipv6() { TcpSocket::new_v6()? } else { TcpSocket::new_v4()? };
    crate::socket::prepare(&socket)?;
    socket.connect(address).await
}

/// Whether a connection of ours arrived at one of our own listeners.
fn is_own(stream: &TcpStream, own: &[SocketAddr]) -> bool {
    let (Ok(local), Ok(peer)) = (stream.local_addr(), stream.peer_addr()) else { return false };
    let local_host = local.ip() == peer.ip() || peer.ip().is_loopback();
    local_host
        && own.iter().any(|o| {
            o.is_ipv4() == peer.is_ipv4() && o.port() == peer.port() && (o.ip() == peer.ip() || o.ip().is_unspecified())
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(active: u32, allowed: bool, failed: bool) -> Candidate {
        Candidate { active, allowed, failed, weight: 0 }
    }

    #[test]
    fn the_target_with_the_fewest_connections_is_chosen() {
        let candidates = [candidate(3, true, false), candidate(1, true, false), candidate(2, true, false)];
        assert_eq!(choose(Balance::LeastConnections, 0, &candidates.into_iter()), Some(1));
    }

    #[test]
    fn equals_take_turns() {
        let candidates = [candidate(1, true, false); 3];
        for balance in [Balance::LeastConnections, Balance::RoundRobin] {
            let chosen: Vec<_> = (0..6).map(|turn| choose(balance, turn, &candidates.into_iter()).unwrap()).collect();
            assert_eq!(chosen, [0, 1, 2, 0, 1, 2]);
        }
    }

    #[test]
    fn a_failed_target_is_chosen_only_when_no_other_is_allowed() {
        let candidates = [candidate(0, true, true), candidate(9, true, false)];
        assert_eq!(choose(Balance::LeastConnections, 0, &candidates.into_iter()), Some(1));
        let candidates = [candidate(0, true, true), candidate(9, false, false)];
        assert_eq!(choose(Balance::First, 0, &candidates.into_iter()), Some(0));
    }

    #[test]
    fn nothing_is_chosen_when_nothing_is_allowed() {
        let candidates = [candidate(0, false, false), candidate(0, false, true)];
        assert_eq!(choose(Balance::RoundRobin, 5, &candidates.into_iter()), None);
        assert_eq!(choose(Balance::RoundRobin, 5, &std::iter::empty()), None);
    }

    #[test]
    fn a_target_that_leaves_moves_only_its_own_clients() {
        let metrics = Metrics::new();
        let targets: Vec<_> = (1..=4)
            .map(|i| {
                let address = config::Target {
                    text: format!("node-{i}:443").into(),
                    host: TargetHost::Name(format!("node-{i}")),
                    port: 443,
                    span: 0..0,
                };
                Target::new(&"u".into(), &address, &metrics)
            })
            .collect();
        let pick = |client: IpAddr, without: Option<usize>| {
            let candidates = targets.iter().enumerate().map(|(i, t)| Candidate {
                active: 0,
                allowed: Some(i) != without,
                failed: false,
                weight: t.weight(client),
            });
            choose(Balance::Hash, 0, &candidates).unwrap()
        };
        let mut counts = [0; 4];
        for n in 0..1000u32 {
            let client = IpAddr::V4((0xC000_0200 + n).into());
            let before = pick(client, None);
            counts[before] += 1;
            let after = pick(client, Some(2));
            assert!(before == 2 || before == after);
        }
        assert!(counts.iter().all(|c| *c > 150), "uneven: {counts:?}");
    }
}
