//! One configuration in force: tables built from it, and the handles that connections need.
//!
//! A connection keeps the generation that it was accepted under until its end; a reload makes a new
//! one beside it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::config::{Config, Mode};
use crate::engine::Selection;
use crate::listen::metrics::ListenerMetrics;
use crate::metrics::Metrics;
use crate::registry::metrics::RouteMetrics;
use crate::route::{Pattern, Table};
use crate::upstream::handover::{self, UpstreamsState};
use crate::upstream::inventory::Inventory;
use crate::upstream::{Lease, Pool};

pub struct Generation {
    /// What the owner wrote.
    pub config: Config,
    /// What carries bytes.
    pub engine: Arc<Selection>,
    /// Host names to routes.
    pub table: Table,
    /// By index of the upstream.
    pub pools: Vec<Arc<Pool>>,
    /// Handed on from one generation to the next.
    inventory: Arc<Inventory>,
    /// By index of the listener.
    pub listener_metrics: Vec<Arc<ListenerMetrics>>,
    /// By index of the route.
    route_metrics: Vec<Arc<RouteMetrics>>,
    /// By index of the listener, for those of mode `tcp`, whose name serves as the route's.
    tcp_metrics: Vec<Option<Arc<RouteMetrics>>>,
    by_bind: HashMap<SocketAddr, usize>,
    /// All addresses that we listen on, admin included.
    pub own: Arc<[SocketAddr]>,
    /// When it came into force.
    pub loaded_at: SystemTime,
}

/// Where a connection goes: the answer of the table, or the one upstream of a `tcp` listener.
#[derive(Clone)]
pub struct Destination {
    /// Name of the route, or of the listener.
    pub route: Arc<str>,
    pub pool: Arc<Pool>,
    /// What to count with.
    pub metrics: Arc<RouteMetrics>,
}

/// What let a connection through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Listed {
    /// Its listener has mode `tcp`.
    ByListener,
    /// A route has this pattern.
    ByRoute(Pattern),
}

impl Generation {
    /// Builds it; upstreams that `previous` had too keep the state of their targets.
    pub fn new(config: Config, engine: Selection, previous: Option<&Self>, metrics: &Metrics) -> Self {
        let known: HashMap<&str, &Pool> =
            previous.iter().flat_map(|p| &p.pools).map(|pool| (&*pool.config.name, &**pool)).collect();
        let inventory = previous.map_or_else(Arc::default, |p| p.inventory.clone());
        inventory.retain(previous.map(|p| &p.config).into_iter().chain([&config]));
        let pools = config
            .upstreams
            .iter()
            .map(|upstream| {
                Arc::new(Pool::new(upstream, known.get(&*upstream.name).copied(), &inventory, &metrics.upstreams))
            })
            .collect();
        let mut own: Vec<SocketAddr> = config.listeners.iter().flat_map(|l| &l.bind).map(|b| b.addr).collect();
        let by_bind =
            config.listeners.iter().enumerate().flat_map(|(i, l)| l.bind.iter().map(move |b| (b.addr, i))).collect();
        own.push(config.admin.bind.addr);
        Self {
            table: Table::new(&config),
            pools,
            inventory,
            listener_metrics: config.listeners.iter().map(|l| metrics.listen.of(&l.name)).collect(),
            route_metrics: config.routes.iter().map(|r| metrics.registry.of(&r.name)).collect(),
            tcp_metrics: config
                .listeners
                .iter()
                .map(|l| matches!(l.mode, Mode::Tcp { .. }).then(|| metrics.registry.of(&l.name)))
                .collect(),
            by_bind,
            own: own.into(),
            loaded_at: SystemTime::now(),
            config,
            engine: Arc::new(engine),
        }
    }

    /// The listener that owns a bound address.
    pub fn listener(&self, bound: SocketAddr) -> Option<usize> {
        self.by_bind.get(&bound).copied()
    }

    /// Whether connections that were listed so on a listener of that name still would be, wherever
    /// they would go.
    pub fn lists(&self, listener: &str, server_name: Option<&str>, listed: Listed) -> bool {
        let Some(index) = self.config.listeners.iter().position(|l| *l.name == *listener) else { return false };
        match listed {
            Listed::ByListener => matches!(self.config.listeners[index].mode, Mode::Tcp { .. }),
            Listed::ByRoute(pattern) => server_name.is_some_and(|name| self.table.lists(index, name, pattern)),
        }
    }

    /// What is known of targets, for a successor.
    pub fn upstreams_state(&self) -> UpstreamsState {
        handover::export(&self.pools, &self.inventory)
    }

    /// Takes over what a predecessor knew of targets; before anything else is done with them.
    pub fn restore(&self, state: &UpstreamsState) {
        handover::restore(&self.pools, state);
    }

    /// The place of a connection that another process had at a target, which may be gone from the
    /// configuration by now. `counts`: among the target's connections.
    pub fn adopt(&self, upstream: &Arc<str>, target: &Arc<str>, counts: bool) -> Lease {
        let pool = self.pools.iter().find(|pool| pool.config.name == *upstream);
        let lease = pool.and_then(|pool| pool.adopt(target));
        let mut lease = lease.unwrap_or_else(|| Lease::orphan(upstream, target));
        if !counts {
            lease.give_up_place();
        }
        lease
    }

    /// The destination of a route.
    pub fn by_route(&self, route: usize) -> Destination {
        let config = &self.config.routes[route];
        let Some(upstream) = config.upstream() else { unreachable!("the table finds routes that forward") };
        Destination {
            route: config.name.clone(),
            pool: self.pools[upstream].clone(),
            metrics: self.route_metrics[route].clone(),
        }
    }

    /// The destination of a listener of mode `tcp`.
    pub fn by_tcp_listener(&self, listener: usize) -> Destination {
        let config = &self.config.listeners[listener];
        let (Mode::Tcp { upstream }, Some(metrics)) = (config.mode, &self.tcp_metrics[listener]) else {
            unreachable!("asked for a listener of mode tcp")
        };
        Destination { route: config.name.clone(), pool: self.pools[upstream].clone(), metrics: metrics.clone() }
    }
}
