//! `dataplane run`: starts the threads, then waits for signals. Start and reload take the same way through `Daemon::take_effect`.
//!
//! The order of a start is: read and check the configuration, bind everything, then accept, then tell systemd. A reload binds what is new,
//! then swaps; any failure leaves all as it was.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use arc_swap::ArcSwap;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use crate::admin::{self, ReloadRequest, Sockets};
use crate::admission::Admission;
use crate::config::{self, Bind, Config, Diagnostic, TargetHost};
use crate::engine::{Abilities, Effective, splice};
use crate::generation::Generation;
use crate::listen;
use crate::metrics::Metrics;
use crate::registry::{Registry, unix_seconds};
use crate::shared::Shared;
use crate::upstream::upkeep::Upkeep;
use crate::worker::{Command, Worker};

/// Descriptors that are neither a connection's nor a pipe's nor a listener's: admin clients, the configuration, eBPF maps and programs, and of the upkeep epoll, its wake-up,
/// tailscaled, the resolver's questions and checks.
const DESCRIPTORS_FOR_US: u64 = 64;

/// Of a worker: epoll, its wake-up, signals' pipe, epoll for the sockmap.
const DESCRIPTORS_PER_WORKER: u64 = 5;

/// Fewer connections than this are hardly meant.
const TIGHT: usize = 64;

/// How often a draining daemon looks whether it is alone.
const DRAIN_TICK: Duration = Duration::from_millis(50);

struct Daemon {
    path: PathBuf,
    shared: Arc<Shared>,
    workers: Vec<Worker>,
    abilities: Abilities,
    /// For workers, listeners, connections and pipes.
    descriptors: u64,
    /// The control socket that this process made, whatever the file says by now.
    control_socket: Option<PathBuf>,
    /// Addresses that are listened on; the sockets are the workers'.
    bound: Vec<SocketAddr>,
    upkeep: Upkeep,
}

/// Runs until SIGTERM or SIGINT.
pub fn run(path: &Path) -> Result<()> {
    let config = read_config(path)?;
    let descriptors = raise_descriptor_limit().saturating_sub(open_descriptors() + DESCRIPTORS_FOR_US);
    let metrics = Metrics::new();
    let abilities = Abilities::test(descriptors as usize / 2, metrics.sockmap_spills());
    let engine = Effective::choose(config.engine, &abilities);
    for reason in &engine.reasons {
        tracing::warn!(configured = ?engine.configured, effective = engine.name(), reason, "engine");
    }

    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let listening = bind_all(&config, &[], workers)?;
    let sockets = bind_admin(&config)?;
    let control_socket = sockets.unix.is_some().then(|| config.admin.socket.clone());

    metrics.set_engine(&kernel_release(), &engine);
    let generation = Generation::new(config, engine, None, &metrics);
    let shared = Arc::new(Shared {
        generation: ArcSwap::from_pointee(generation),
        metrics,
        registry: Arc::new(Registry::default()),
        admission: Arc::new(Admission::default()),
        ready: AtomicBool::new(false),
        last_error: std::sync::Mutex::default(),
        started: Instant::now(),
        next_id: AtomicU64::new(0),
        id_prefix: random_prefix(),
    });
    let workers = (0..workers)
        .map(|i| Worker::start(i, shared.clone()))
        .collect::<io::Result<Vec<_>>>()
        .context("cannot start a worker thread")?;
    let (reload, reload_requests) = mpsc::channel(4);
    admin::start(shared.clone(), sockets, reload).context("cannot start the admin thread")?;

    let upkeep = Upkeep::start().context("cannot start the thread that looks after targets")?;

    let mut daemon = Daemon {
        path: path.to_owned(),
        shared,
        workers,
        abilities,
        descriptors,
        control_socket,
        bound: Vec::new(),
        upkeep,
    };
    daemon.take_effect(listening);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(daemon.control(reload_requests))
}

impl Daemon {
    async fn control(mut self, mut reload_requests: mpsc::Receiver<ReloadRequest>) -> Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hangup = signal(SignalKind::hangup())?;
        let watchdog = sd_notify::watchdog_enabled();
        let mut feed = tokio::time::interval(watchdog.map_or(Duration::from_secs(3600), |interval| interval / 2));

        notify(&[NotifyState::Ready]);
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                _ = hangup.recv() => {
                    // What happened is in the log and the metrics.
                    let _ = self.reload();
                }
                Some(request) = reload_requests.recv() => {
                    let _ = request.send(self.reload());
                }
                _ = feed.tick(), if watchdog.is_some() => {
                    if self.workers_answer().await {
                        notify(&[NotifyState::Watchdog]);
                    }
                }
            }
        }

        self.shared.ready.store(false, Relaxed);
        notify(&[NotifyState::Stopping]);
        drop(reload_requests);
        for addr in std::mem::take(&mut self.bound) {
            for closed in self.close(addr) {
                let _ = tokio::time::timeout(Duration::from_secs(1), closed).await;
            }
        }
        let timeout = self.shared.generation.load().config.limits.drain_timeout;
        tracing::info!(connections = self.shared.admission.open(), timeout = timeout.as_secs_f64(), "draining");
        let alone = async {
            while self.shared.admission.open() > 0 {
                tokio::time::sleep(DRAIN_TICK).await;
            }
        };
        tokio::select! {
            () = alone => {}
            () = tokio::time::sleep(timeout) => {}
            // Asked a second time: now.
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!(connections = self.shared.admission.open(), "ending; connections that are left are reset");
        for worker in self.workers {
            worker.end();
        }
        if let Some(socket) = self.control_socket {
            let _ = std::fs::remove_file(socket);
        }
        Ok(())
    }

    /// Reads the configuration again. What happened, for people.
    fn reload(&mut self) -> Result<String, String> {
        notify(&[
            NotifyState::Reloading,
            NotifyState::monotonic_usec_now().unwrap_or(NotifyState::Status("reloading")),
        ]);
        let outcome = self.try_reload();
        notify(&[NotifyState::Ready]);
        match outcome {
            Ok(text) => {
                tracing::info!(hash = self.shared.generation.load().config.hash, "configuration reloaded");
                *self.shared.last_error.lock().expect("no panic while held") = None;
                Ok(text)
            }
            Err(error) => {
                let text = format!("{error:#}");
                tracing::error!(error = text, "reload failed; the configuration in force stays");
                self.shared.metrics.reload_success.set(0);
                *self.shared.last_error.lock().expect("no panic while held") = Some(text.clone());
                Err(text)
            }
        }
    }

    fn try_reload(&mut self) -> Result<String> {
        let config = read_config(&self.path)?;
        let before = self.shared.generation.load_full();
        let listening = bind_all(&config, &self.bound, self.workers.len())?;
        let mut text = format!("configuration {} is in force\n", config.hash);
        if config.admin.bind.addr != before.config.admin.bind.addr || config.admin.socket != before.config.admin.socket
        {
            text += "note: [admin] takes effect at the next start\n";
        }
        let engine = Effective::choose(config.engine, &self.abilities);
        self.shared.metrics.set_engine(&kernel_release(), &engine);
        let generation = Generation::new(config, engine, Some(&before), &self.shared.metrics);
        forget_targets(&before, &generation, &self.shared.metrics);
        self.shared.generation.store(Arc::new(generation));
        self.take_effect(listening);
        Ok(text)
    }

    /// Brings limits and listening sockets in line with the generation in force.
    fn take_effect(&mut self, new: HashMap<SocketAddr, Vec<TcpListener>>) {
        let generation = self.shared.generation.load_full();
        let config = &generation.config;
        self.shared.metrics.set_config(&config.hash, unix_seconds(SystemTime::now()));
        self.upkeep.follow(config, &generation.pools);

        let binds = config.listeners.iter().map(|l| l.bind.len()).sum::<usize>() as u64;
        // Each worker has a socket and a spare descriptor on each address.
        let fixed = self.workers.len() as u64 * (DESCRIPTORS_PER_WORKER + 2 * binds);
        let memory = config.limits.kernel_memory;
        let for_pipes = generation.engine.share_of_pipes(memory);
        if let Ok(table) = &self.abilities.sockmap {
            table.set_memory(memory - for_pipes);
        }
        let budget = Budget::new(self.descriptors.saturating_sub(fixed), for_pipes);
        if budget.connections < TIGHT {
            tracing::warn!(
                connections = budget.connections,
                "RLIMIT_NOFILE leaves room for few connections; raise LimitNOFILE"
            );
        }
        if config.limits.max_connections > budget.connections {
            tracing::warn!(
                configured = config.limits.max_connections,
                possible = budget.connections,
                "max_connections is more than RLIMIT_NOFILE allows; raise LimitNOFILE"
            );
        }
        self.shared.admission.set_max(match config.limits.max_connections {
            0 => budget.connections,
            max => max.min(budget.connections),
        });
        splice::set_limit(budget.pipes);

        let wanted: Vec<SocketAddr> = config.listeners.iter().flat_map(|l| &l.bind).map(|b| b.addr).collect();
        let (kept, gone) = std::mem::take(&mut self.bound).into_iter().partition(|addr| wanted.contains(addr));
        self.bound = kept;
        let gone: Vec<SocketAddr> = gone;
        for addr in gone {
            drop(self.close(addr));
        }
        for (addr, sockets) in new {
            for (worker, socket) in self.workers.iter().zip(sockets) {
                worker.send(Command::Listen(addr, socket));
            }
            tracing::info!(%addr, "listening");
            self.bound.push(addr);
        }
        self.shared.ready.store(true, Relaxed);
    }

    /// The workers answer when they have accepted what the kernel had completed.
    fn close(&self, addr: SocketAddr) -> Vec<oneshot::Receiver<()>> {
        tracing::info!(%addr, "no longer listening");
        let ask = |worker: &Worker| {
            let (closed, answer) = oneshot::channel();
            worker.send(Command::Close(addr, closed));
            answer
        };
        self.workers.iter().map(ask).collect()
    }

    /// Whether every worker's loop still turns.
    async fn workers_answer(&self) -> bool {
        for worker in &self.workers {
            let (pong, answer) = oneshot::channel();
            worker.send(Command::Ping(pong));
            if tokio::time::timeout(Duration::from_secs(5), answer).await.is_err() {
                tracing::error!("a worker thread does not answer");
                return false;
            }
        }
        true
    }
}

/// How the process's file descriptors are shared out.
#[derive(Debug, PartialEq, Eq)]
struct Budget {
    connections: usize,
    pipes: usize,
}

impl Budget {
    /// Shares out `free` descriptors and `memory` bytes.
    fn new(free: u64, memory: u64) -> Self {
        // A pipe is two descriptors and holds up to its capacity; without a pipe a connection is copied, so an eighth is plenty.
        let by_memory = memory / splice::CAPACITY as u64;
        let pipes = by_memory.min(free / 8 / 2);
        Self { connections: ((free - 2 * pipes) / 2) as usize, pipes: pipes as usize }
    }
}

/// Reads and checks the configuration. The second part are warnings.
///
/// # Errors
/// Everything that is wrong with it, rendered.
pub fn check(path: &Path) -> Result<(Config, Vec<Diagnostic>)> {
    let (config, mut diagnostics) = config::load(path)?;
    diagnostics.extend(config::own_listener_targets(&config, &local_addresses(&config)));
    if diagnostics.iter().any(Diagnostic::is_error) {
        let rendered: String = diagnostics.iter().map(|d| d.render(&config.source).to_string()).collect();
        bail!(rendered);
    }
    Ok((config, diagnostics))
}

fn read_config(path: &Path) -> Result<Config> {
    let (config, warnings) = check(path)?;
    for warning in &warnings {
        tracing::warn!("{}", warning.render(&config.source));
    }
    Ok(config)
}

/// Those of the targets' literal addresses that are this machine's: only these can be bound.
fn local_addresses(config: &Config) -> Vec<std::net::IpAddr> {
    let targets = config.upstreams.iter().flat_map(|u| &u.targets);
    targets
        .filter_map(|t| match t.host {
            TargetHost::Ip(ip) => Some(ip),
            TargetHost::Name(_) => None,
        })
        .filter(|ip| UdpSocket::bind((*ip, 0)).is_ok())
        .collect()
}

/// Binds the addresses of `config` that are not bound already; all or none, with every failure told.
fn bind_all(config: &Config, bound: &[SocketAddr], workers: usize) -> Result<HashMap<SocketAddr, Vec<TcpListener>>> {
    let mut sockets = HashMap::new();
    let mut errors = String::new();
    let beside_own = |addr: SocketAddr| bound.iter().any(|b| b.port() == addr.port() && b.is_ipv4() == addr.is_ipv4());
    for bind in config.listeners.iter().flat_map(|l| &l.bind).filter(|b| !bound.contains(&b.addr)) {
        match listen::bind(bind.addr, workers, beside_own(bind.addr)) {
            Ok(listeners) => {
                sockets.insert(bind.addr, listeners);
            }
            Err(error) if listen::is_no_ipv6(bind.addr, &error) => {
                tracing::warn!(addr = %bind.addr, "this machine has no IPv6: not listening there");
            }
            Err(error) => {
                let _ = write!(errors, "{}", bind_failure(config, bind, &error));
            }
        }
    }
    if errors.is_empty() { Ok(sockets) } else { bail!(errors) }
}

fn bind_admin(config: &Config) -> Result<Sockets> {
    let bind = &config.admin.bind;
    let tcp = TcpListener::bind(bind.addr).map_err(|e| anyhow::anyhow!(bind_failure(config, bind, &e)))?;
    let socket = &config.admin.socket;
    let unix = match admin::bind_unix(socket) {
        Ok(unix) => Some(unix),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            tracing::warn!(
                socket = %socket.display(),
                "no permission to make the control socket: the commands status, connections, reload, drain and undrain \
                 will not work; set admin.socket to a path in a directory of yours"
            );
            None
        }
        Err(error) => bail!(
            "cannot make the control socket {}: {error}\n  help: stop the other daemon, or set `socket` in [admin]",
            socket.display()
        ),
    };
    Ok(Sockets { tcp, unix })
}

fn bind_failure(config: &Config, bind: &Bind, error: &io::Error) -> String {
    let port = bind.addr.port();
    let remedy = match error.kind() {
        io::ErrorKind::AddrInUse => {
            format!(
                "another program listens there: find it with `ss -ltnp 'sport = :{port}'` and stop it, or choose another port"
            )
        }
        io::ErrorKind::PermissionDenied => {
            format!(
                "ports below 1024 need root or CAP_NET_BIND_SERVICE: run as root, by the systemd unit, or choose a port above {port}"
            )
        }
        io::ErrorKind::AddrNotAvailable => {
            "this machine does not have that address: `ip address` lists those that it has".to_owned()
        }
        _ => "choose another address".to_owned(),
    };
    let message = format!("cannot listen on {}: {error}", bind.addr);
    Diagnostic::error(bind.span.clone(), message, remedy).render(&config.source).to_string()
}

fn forget_targets(before: &Generation, after: &Generation, metrics: &Metrics) {
    let names = |generation: &Generation| -> Vec<(Arc<str>, Arc<str>)> {
        let of_pool = |pool: &Arc<crate::upstream::Pool>| {
            let name = pool.config.name.clone();
            pool.targets().iter().map(move |t| (name.clone(), t.text().clone())).collect::<Vec<_>>()
        };
        generation.pools.iter().flat_map(of_pool).collect()
    };
    let kept = names(after);
    for (upstream, target) in names(before).into_iter().filter(|n| !kept.contains(n)) {
        metrics.remove_target(&upstream, &target);
    }
}

/// Raises RLIMIT_NOFILE to its hard limit, which it returns.
fn raise_descriptor_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        tracing::warn!(%error, "RLIMIT_NOFILE cannot be raised to its hard limit");
    }
    // No limit at all is no number to plan with.
    getrlimit(Resource::Nofile).current.unwrap_or(1 << 20)
}

fn open_descriptors() -> u64 {
    std::fs::read_dir("/proc/self/fd").map_or(32, |entries| entries.count() as u64)
}

/// As `uname -r` says it.
pub fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

fn random_prefix() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    // The standard library's keys come from getrandom(2); a unique id needs no secrecy.
    RandomState::new().hash_one(std::process::id())
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "sd_notify");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_and_pipes_never_need_more_descriptors_than_there_are() {
        for free in [0, 1, 7, 64, 1000, 20_000, 1 << 20] {
            for memory in [64 << 10, 64 << 20, 1 << 40] {
                let budget = Budget::new(free, memory);
                assert!(2 * (budget.connections + budget.pipes) as u64 <= free, "{budget:?} of {free}");
                assert!((budget.pipes * splice::CAPACITY) as u64 <= memory);
            }
        }
        assert_eq!(Budget::new(19_900, 64 << 20), Budget { connections: 9694, pipes: 256 });
    }
}
