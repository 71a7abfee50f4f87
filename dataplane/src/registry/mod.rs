//! The connections that are being forwarded now: what `connections` lists, and where byte metrics
//! come from.
//!
//! A connection costs the lock twice, when it begins and when it ends; its bytes are counted in its
//! own [`Traffic`] and collected when somebody asks. Nothing here knows how bytes move.

pub mod metrics;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;
use tokio::sync::Notify;
use tokio::time::sleep_until;

use metrics::RouteMetrics;

use crate::config::OnRemovedRoute;
use crate::engine::{End, Kind, Look, Path, Stop, Traffic};
use crate::generation::{Generation, Listed};
use crate::logging::unix_seconds;

/// All live connections.
#[derive(Debug, Default)]
pub struct Registry {
    next_id: AtomicU64,
    live: Mutex<HashMap<u64, Live>>,
}

#[derive(Debug)]
struct Live {
    record: Arc<Record>,
    metrics: Arc<RouteMetrics>,
    /// What the metrics already have.
    collected: [u64; 4],
    /// Under which engine the metrics count it.
    engine: Kind,
}

/// What is known of a connection from its beginning on.
#[derive(Debug)]
pub struct Record {
    /// When it was accepted.
    pub start: SystemTime,
    /// The same, for durations.
    pub accepted: Instant,
    /// As a PROXY header said, or as seen.
    pub client: SocketAddr,
    pub listener: Arc<str>,
    /// Of the hello.
    pub server_name: Option<Box<str>>,
    /// What the hello offered, separated by commas; bytes that are not printable are escaped.
    pub alpn: Option<Box<str>>,
    /// Name of the route, or of the listener in mode `tcp`.
    pub route: Arc<str>,
    pub upstream: Arc<str>,
    /// The target as written in the configuration.
    pub target: Arc<str>,
    /// What let it through.
    pub listed: Listed,
    /// From which port of ours which address was dialled, where that may tell of a loop.
    pub dialled: Option<(u16, IpAddr)>,
    /// What forwards it, and payload so far.
    pub traffic: Arc<Traffic>,
    /// What is asked of it.
    pub orders: Orders,
}

/// What the control thread asks of a connection.
#[derive(Debug, Default)]
pub struct Orders {
    state: Mutex<OrderState>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct OrderState {
    /// Its route was removed: when it has to end therefore.
    end: Option<Instant>,
    /// It is to stop so far, for another process to go on with it.
    stop: Option<Stop>,
}

/// See [`Orders`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// To end, since its route was removed.
    End,
    /// To stop so far, for another process to go on. Given once.
    Stop(Stop),
}

impl Orders {
    /// Of a connection whose route was removed already, or was not.
    pub fn new(end: Option<Instant>) -> Self {
        Self { state: Mutex::new(OrderState { end, stop: None }), changed: Notify::new() }
    }

    /// Waits until there is something to do.
    pub async fn due(&self) -> Order {
        loop {
            let deadline = {
                let mut state = self.state();
                if let Some(stop) = state.stop.take() {
                    return Order::Stop(stop);
                }
                state.end
            };
            match deadline {
                None => self.changed.notified().await,
                // In a box: few connections get here, none should pay for the room.
                Some(deadline) => {
                    let late = Box::pin(sleep_until(deadline.into()));
                    tokio::select! {
                        () = late => return Order::End,
                        () = self.changed.notified() => {}
                    }
                }
            }
        }
    }

    /// When the connection has to end because its route was removed.
    pub fn end(&self) -> Option<Instant> {
        self.state().end
    }

    fn set_end(&self, deadline: Option<Instant>) {
        let mut now = self.state();
        let new = match (now.end, deadline) {
            (Some(before), Some(deadline)) => Some(before.min(deadline)),
            (_, deadline) => deadline,
        };
        if new != now.end {
            now.end = new;
            // Kept for whoever does not wait yet.
            self.changed.notify_one();
        }
    }

    fn stop(&self, stop: Stop) {
        self.state().stop = Some(stop);
        self.changed.notify_one();
    }

    fn state(&self) -> MutexGuard<'_, OrderState> {
        self.state.lock().expect("no panic while held")
    }
}

/// A line of `dataplane connections`.
#[derive(Debug, Serialize)]
pub struct Connection {
    client: SocketAddr,
    listener: Arc<str>,
    server_name: Option<Box<str>>,
    alpn: Option<Box<str>>,
    route: Arc<str>,
    upstream: Arc<str>,
    target: Arc<str>,
    engine: &'static str,
    /// `kernel` while the process sleeps for it, whatever way its bytes took before.
    path: &'static str,
    bytes_to_upstream: u64,
    bytes_to_client: u64,
    bytes_kernel: u64,
    age: f64,
    idle: f64,
    backlog: u64,
}

impl Record {
    fn describe(&self) -> Connection {
        let Look { engine, asleep, to_upstream, to_client, idle } = self.traffic.look();
        Connection {
            client: self.client,
            listener: self.listener.clone(),
            server_name: self.server_name.clone(),
            alpn: self.alpn.clone(),
            route: self.route.clone(),
            upstream: self.upstream.clone(),
            target: self.target.clone(),
            engine: engine.as_str(),
            path: if asleep { Path::Kernel } else { Path::Userspace }.as_str(),
            bytes_to_upstream: to_upstream.iter().sum(),
            bytes_to_client: to_client.iter().sum(),
            bytes_kernel: to_upstream[0] + to_client[0],
            age: self.accepted.elapsed().as_secs_f64(),
            idle: idle.as_secs_f64(),
            backlog: self.traffic.backlog(),
        }
    }

    /// Compares it with a configuration that is in force from now on; whether its route was
    /// removed.
    pub fn judge(&self, generation: &Generation) -> bool {
        let removed = !generation.lists(&self.listener, self.server_name.as_deref(), self.listed);
        let grace = match generation.config.on_removed_route {
            OnRemovedRoute::Drain => generation.config.limits.drain_timeout,
            OnRemovedRoute::Close => Duration::ZERO,
        };
        self.orders.set_end(removed.then(|| Instant::now() + grace));
        removed
    }

    fn log(&self, end: End) {
        let Look { to_upstream, to_client, .. } = self.traffic.look();
        tracing::info!(
            target: "access",
            start = unix_seconds(self.start),
            duration = self.accepted.elapsed().as_secs_f64(),
            client = %self.client,
            listener = &*self.listener,
            server_name = self.server_name.as_deref().unwrap_or_default(),
            alpn = self.alpn.as_deref().unwrap_or_default(),
            route = &*self.route,
            upstream = &*self.upstream,
            target = &*self.target,
            engine = self.traffic.last_engine().as_str(),
            bytes_to_upstream = to_upstream.iter().sum::<u64>(),
            bytes_to_client = to_client.iter().sum::<u64>(),
            bytes_kernel = to_upstream[0] + to_client[0],
            bytes_userspace = to_upstream[1] + to_client[1],
            reason = end.as_str(),
        );
    }
}

impl Registry {
    /// Enters a connection; it leaves when the guard is finished or dropped.
    pub fn enter(self: &Arc<Self>, record: Record, metrics: Arc<RouteMetrics>) -> Entry {
        let id = self.next_id.fetch_add(1, Relaxed);
        let engine = record.traffic.look().engine;
        metrics.active(engine).inc();
        let record = Arc::new(record);
        // What it carried before is in the metrics of whoever had it.
        let Look { to_upstream, to_client, .. } = record.traffic.look();
        let collected = [to_upstream[0], to_upstream[1], to_client[0], to_client[1]];
        let live = Live { record: record.clone(), metrics: metrics.clone(), collected, engine };
        self.live().insert(id, live);
        Entry { id, record, metrics, registry: self.clone(), end: Some(End::Drained) }
    }

    /// Has all connections stop, for another process to go on.
    pub fn stop(&self, stop: Stop) {
        let live = self.live();
        live.values().for_each(|live| live.record.orders.stop(stop));
    }

    /// How many connections the kernel forwards.
    pub fn in_kernel(&self) -> usize {
        self.live().values().filter(|live| live.record.traffic.is_offloaded()).count()
    }

    /// Brings `dataplane_bytes_total` and `dataplane_connections_active` up to date. Bytes queued
    /// in the kernel on our behalf.
    pub fn collect(&self) -> u64 {
        let mut records = Vec::new();
        for live in self.live().values_mut() {
            live.collect();
            if live.engine == Kind::Sockmap {
                records.push(live.record.clone());
            }
        }
        // Sockets are asked when the lock is free again.
        records.iter().map(|record| record.traffic.backlog()).sum()
    }

    /// Whether a connection that was dialled from this port to this address still waits for its
    /// first byte.
    pub fn awaits(&self, dialled: (u16, IpAddr)) -> bool {
        let live = self.live();
        let mut records = live.values().map(|live| &live.record);
        records.any(|record| record.dialled == Some(dialled) && record.traffic.look().is_unanswered())
    }

    /// Has connections end whose routes a new configuration no longer has; how many they are.
    pub fn judge(&self, generation: &Generation) -> usize {
        let records: Vec<_> = self.live().values().map(|live| live.record.clone()).collect();
        records.iter().filter(|record| record.judge(generation)).count()
    }

    /// The live connections, oldest first.
    pub fn connections(&self) -> Vec<Connection> {
        let mut records: Vec<_> = self.live().iter().map(|(id, live)| (*id, live.record.clone())).collect();
        records.sort_unstable_by_key(|(id, _)| *id);
        records.iter().map(|(_, record)| record.describe()).collect()
    }

    fn live(&self) -> MutexGuard<'_, HashMap<u64, Live>> {
        self.live.lock().expect("no panic while held")
    }
}

impl Live {
    fn collect(&mut self) {
        let Look { engine, to_upstream, to_client, .. } = self.record.traffic.look();
        let now = [to_upstream, to_client].concat();
        for ((counter, now), collected) in self.metrics.bytes.iter().zip(now).zip(&mut self.collected) {
            counter.inc_by(now - *collected);
            *collected = now;
        }
        if engine != self.engine {
            self.metrics.active(self.engine).dec();
            self.metrics.active(engine).inc();
            self.engine = engine;
        }
    }
}

/// A connection's place in the [`Registry`]. Dropped unfinished, it ended because the daemon did.
#[derive(Debug)]
pub struct Entry {
    id: u64,
    /// What is known of it.
    pub record: Arc<Record>,
    metrics: Arc<RouteMetrics>,
    registry: Arc<Registry>,
    /// `None`: another process goes on with it.
    end: Option<End>,
}

impl Entry {
    /// Counts and logs the end.
    pub fn finish(mut self, end: End) {
        self.end = Some(end);
    }

    /// The connection does not end: another process goes on with it.
    pub fn hand_over(mut self) -> Arc<Record> {
        self.end = None;
        self.record.clone()
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let live = self.registry.live().remove(&self.id);
        if let Some(mut live) = live {
            live.collect();
            live.metrics.active(live.engine).dec();
        }
        if let Some(end) = self.end {
            self.metrics.closed(end).inc();
            self.record.log(end);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_route_that_comes_back_in_time_spares_its_connections() {
        let orders = Orders::default();
        let minute = Duration::from_secs(60);
        let now = || tokio::time::Instant::now().into_std();
        let is_due = async |after: Duration| tokio::time::timeout(after, orders.due()).await.is_ok();
        assert!(!is_due(minute * 60).await);
        orders.set_end(Some(now() + minute));
        assert!(!is_due(minute / 2).await);
        orders.set_end(None);
        assert!(!is_due(minute * 60).await);
        orders.set_end(Some(now() + minute));
        orders.set_end(Some(now() + minute * 2));
        assert!(!is_due(minute / 2).await, "the first removal counts");
        assert!(is_due(minute).await);
        let orders = Orders::default();
        orders.set_end(Some(now() + minute));
        orders.set_end(Some(now()));
        assert!(tokio::time::timeout(minute / 2, orders.due()).await.is_ok(), "closed while it drained");
    }
}
