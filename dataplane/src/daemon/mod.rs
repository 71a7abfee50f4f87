//! `dataplane run`: starts the threads, then waits for signals and for what [`crate::source`]
//! finds. Start and reload take the same way through `Daemon::take_effect`.
//!
//! The order of a start is: read and check the configuration, bind everything, then accept, then
//! tell systemd. A reload binds what is new, then swaps; any failure leaves all as it was.

mod beginning;
mod binding;
mod descriptors;
mod waiting;
pub mod worker;

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use arc_swap::ArcSwap;
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, mpsc, oneshot};

use beginning::Beginning;
use binding::{bind_admin, bind_all, bind_webhook};
use descriptors::{Budget, DESCRIPTORS_PER_WORKER};
use worker::{Command, Worker};

use crate::admin;
use crate::admission::Admission;
use crate::config::{Config, Diagnostic};
use crate::engine::{Selection, Support, splice};
use crate::generation::Generation;
use crate::logging::unix_seconds;
use crate::machine_memory::MachineMemory;
use crate::metrics::Metrics;
use crate::registry::Registry;
use crate::shared::{LoadFailure, LoadStatus, Role, Shared};
use crate::source::follow::{Follower, News, ReloadRequest};
use crate::source::{Loaded, Snapshot, git, kept, webhook};
use crate::systemd::notify;
use crate::upstream::maintenance::Maintenance;

/// Fewer connections than this are hardly meant.
const TIGHT: usize = 64;

/// How often a draining daemon looks whether it is alone.
const DRAIN_TICK: Duration = Duration::from_millis(50);

/// How often an address that this machine did not have is tried again.
const ADDRESS_AGAIN: Duration = Duration::from_secs(1);

/// How long a worker may take to accept what is left in a socket's queue, and close it.
const CLOSING: Duration = Duration::from_secs(1);

struct Daemon {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
    support: Support,
    /// For workers, listeners, connections and pipes.
    descriptors: u64,
    memory: MachineMemory,
    /// The control socket that this process made, whatever the file says by now.
    control_socket: Option<PathBuf>,
    /// Addresses that are listened on; the sockets are the workers'.
    bound: Vec<SocketAddr>,
    maintenance: Maintenance,
    /// Of `[source]`; the source thread serves on a copy.
    webhook: Option<TcpListener>,
    /// Where that thread learns of another.
    webhooks: mpsc::UnboundedSender<Option<webhook::Served>>,
    /// Where the admin thread learns of its socket, when that could not be bound at once.
    admin: mpsc::UnboundedSender<TcpListener>,
}

/// Runs until SIGTERM or SIGINT.
pub fn run(path: &Path) -> Result<()> {
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let Beginning { loaded: Loaded { config, warnings, snapshot }, listening, mut waiting, missing } =
        Beginning::find(path, workers)?;
    tell(&config, &warnings);
    let descriptors = descriptors::available();
    let metrics = Metrics::new();
    let support = Support::test(descriptors as usize / 2, metrics.engine.spills());
    let engine = Selection::choose(config.engine, &support);
    engine.tell();

    let sockets = bind_admin(&config, &mut waiting)?;
    let control_socket = sockets.unix.is_some().then(|| config.admin.socket.clone());
    let webhook = bind_webhook(&config, None, &mut waiting)?;

    metrics.engine.set(&engine);
    let generation = Generation::new(config, engine, None, &metrics);
    let shared = Arc::new(Shared {
        generation: ArcSwap::from_pointee(generation),
        metrics,
        registry: Arc::new(Registry::default()),
        admission: Arc::new(Admission::default()),
        in_flight: Arc::default(),
        rejections: Arc::default(),
        ready: AtomicBool::new(false),
        waiting: std::sync::Mutex::default(),
        limited_by: std::sync::Mutex::default(),
        load: std::sync::Mutex::new(LoadStatus {
            last_success: missing.is_none().then(SystemTime::now),
            last_error: missing.clone().map(|text| LoadFailure {
                text,
                at: SystemTime::now(),
                is_of_repository: false,
            }),
        }),
        started: Instant::now(),
        next_id: AtomicU64::new(0),
        id_prefix: random_prefix(),
    });
    let workers = (0..workers)
        .map(|i| Worker::start(i, shared.clone()))
        .collect::<io::Result<Vec<_>>>()
        .context("cannot start a worker thread")?;
    let (reload, reload_requests) = mpsc::channel(4);
    let admin = admin::start(shared.clone(), sockets, reload.clone()).context("cannot start the admin thread")?;

    let maintenance = Maintenance::start().context("cannot start the thread that looks after targets")?;

    let (webhooks, served) = mpsc::unbounded_channel();
    let bound = Vec::new();
    let mut daemon = Daemon {
        shared,
        workers,
        support,
        descriptors,
        memory: MachineMemory::read(),
        control_socket,
        bound,
        maintenance,
        webhook: None,
        webhooks,
        admin,
    };
    daemon.take_effect(listening);
    daemon.wait_for(waiting);
    if missing.is_some() {
        daemon.shared.metrics.config.reload_success.set(0);
    }
    daemon.serve_webhook(webhook);
    let (news, inbox) = mpsc::channel(1);
    let in_part = missing.is_some();
    let follower =
        Following { path: path.to_owned(), news, requests: reload_requests, webhooks: served, snapshot, in_part };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(daemon.control(follower, inbox, reload))
}

/// What the thread that looks for new configurations begins with.
struct Following {
    path: PathBuf,
    news: mpsc::Sender<News>,
    requests: mpsc::Receiver<ReloadRequest>,
    webhooks: mpsc::UnboundedReceiver<Option<webhook::Served>>,
    /// Not yet kept, perhaps.
    snapshot: Option<Snapshot>,
    /// Some of its addresses are not listened on.
    in_part: bool,
}

impl Following {
    fn start(self, config: Config) -> io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name("source".into()).spawn(move || {
            if let (Some(repository), Some(snapshot)) = (&config.repository, &self.snapshot) {
                kept::keep(repository, snapshot);
            }
            runtime.block_on(async {
                let pushed = Arc::new(Notify::new());
                tokio::spawn(webhook::serve(self.webhooks, pushed.clone()));
                let follower = Follower::new(self.path, git::Repositories, self.news, &config, self.in_part);
                follower.run(self.requests, pushed).await;
            });
        })?;
        Ok(())
    }
}

impl Daemon {
    async fn control(
        mut self,
        following: Following,
        mut news: mpsc::Receiver<News>,
        reload: mpsc::Sender<ReloadRequest>,
    ) -> Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hangup = signal(SignalKind::hangup())?;
        let watchdog = sd_notify::watchdog_enabled();
        let mut feed = tokio::time::interval(watchdog.map_or(Duration::from_secs(3600), |interval| interval / 2));

        let mut again = tokio::time::interval(ADDRESS_AGAIN);
        again.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        notify(&[NotifyState::Ready]);
        let config = self.shared.generation.load().config.clone();
        following.start(config).context("cannot start the thread that looks for new configurations")?;
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                _ = hangup.recv() => {
                    // What happens is in the log and the metrics. When its queue is full, it reads
                    // the file all the same.
                    let _ = reload.try_send(oneshot::channel().0);
                }
                Some(news) = news.recv() => self.hear(news).await,
                _ = again.tick(), if self.waits() => self.try_waiting(),
                _ = feed.tick(), if watchdog.is_some() => {
                    if self.workers_answer().await {
                        notify(&[NotifyState::Watchdog]);
                    }
                }
            }
        }

        self.shared.ready.store(false, Relaxed);
        notify(&[NotifyState::Stopping]);
        drop(news);
        for addr in std::mem::take(&mut self.bound) {
            for closed in self.close(addr) {
                let _ = tokio::time::timeout(CLOSING, closed).await;
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
            admin::remove_unix(&socket);
        }
        Ok(())
    }

    /// Puts what was found in force, or says why not.
    async fn hear(&mut self, news: News) {
        let shared = self.shared.clone();
        let failed = |error: String, is_of_repository: bool| {
            let mut load = shared.load.lock().expect("no panic while held");
            if is_of_repository && load.last_error.as_ref().is_some_and(|error| !error.is_of_repository) {
                // What is wrong with the configuration matters longer than an outage.
                return;
            }
            load.last_error = Some(LoadFailure { text: error, at: SystemTime::now(), is_of_repository });
        };
        match news {
            News::Load(loaded, answer) => {
                tell(&loaded.config, &loaded.warnings);
                let outcome = self.put_in_force(loaded.config).await.map_err(|error| format!("{error:#}"));
                match &outcome {
                    Ok(_) => self.succeeded(true),
                    Err(error) => {
                        tracing::error!(error, "reload failed; the configuration in force stays");
                        failed(error.clone(), false);
                        self.shared.metrics.config.reload_success.set(0);
                    }
                }
                let _ = answer.send(outcome);
            }
            News::Broken(error) => {
                tracing::error!(error, "reload failed; the configuration in force stays");
                failed(error, false);
                self.shared.metrics.config.reload_success.set(0);
            }
            News::Unreachable(error) => {
                tracing::error!(error, "the repository was not reached; the configuration in force stays");
                failed(error, true);
            }
            News::Unchanged => self.succeeded(false),
        }
    }

    fn succeeded(&self, is_new: bool) {
        let now = SystemTime::now();
        let mut load = self.shared.load.lock().expect("no panic while held");
        // A commit that is wrong is still wrong when nothing has changed.
        if is_new || load.last_error.as_ref().is_none_or(|error| error.is_of_repository) {
            *load = LoadStatus { last_success: Some(now), last_error: None };
        }
        if self.shared.generation.load().config.repository.is_some() {
            self.shared.metrics.config.repository_reached.set(unix_seconds(now));
        }
    }

    async fn put_in_force(&mut self, config: Config) -> Result<String> {
        let before = self.shared.generation.load_full();
        let (listening, mut waiting) = bind_all(&config, &self.bound, self.workers.len())?;
        let webhook = bind_webhook(&config, self.webhook.as_ref(), &mut waiting)?;
        let mut text = format!("configuration {} is in force\n", config.hash);
        if config.admin.bind.addr != before.config.admin.bind.addr || config.admin.socket != before.config.admin.socket
        {
            text += "note: [admin] takes effect at the next start\n";
        }
        for waiting in &waiting {
            text += &format!(
                "note: not listening on {} ({}) yet, but as soon as that can be: {}\n",
                waiting.addr,
                waiting.role,
                waiting.reason()
            );
        }
        // Takes effect at the next start, and so does what it waits for.
        waiting.extend(
            self.shared.waiting.lock().expect("no panic while held").iter().filter(|w| w.role == Role::Admin).cloned(),
        );
        let engine = Selection::choose(config.engine, &self.support);
        if engine.configured != before.engine.configured {
            engine.tell();
        }
        self.shared.metrics.engine.set(&engine);
        let generation = Arc::new(Generation::new(config, engine, Some(&before), &self.shared.metrics));
        forget_targets(&before, &generation, &self.shared.metrics);
        self.shared.generation.store(generation.clone());
        // The next reload may want an address again that this one gives up.
        for closed in self.take_effect(listening) {
            let _ = tokio::time::timeout(CLOSING, closed).await;
        }
        if generation.config.webhook() != before.config.webhook() || (webhook.is_some() && self.webhook.is_none()) {
            self.serve_webhook(webhook);
        }
        self.wait_for(waiting);
        let removed = self.shared.registry.judge(&generation);
        tracing::info!(
            hash = generation.config.hash,
            commit = generation.config.source.revision.as_deref().unwrap_or_default(),
            connections_of_removed_routes = removed,
            "configuration reloaded"
        );
        Ok(text)
    }

    /// Has the source thread serve this and nothing else.
    fn serve_webhook(&mut self, webhook: Option<(TcpListener, webhook::Served)>) {
        let (listener, served) = webhook.unzip();
        self.webhook = listener;
        // The source thread ends with the process.
        let _ = self.webhooks.send(served);
    }

    /// Brings limits and listening sockets in line with the generation in force. Sockets that are
    /// given up are closed when the answers come.
    fn take_effect(&mut self, new: HashMap<SocketAddr, Vec<TcpListener>>) -> Vec<oneshot::Receiver<()>> {
        let generation = self.shared.generation.load_full();
        let config = &generation.config;
        let commit = config.source.revision.as_deref().unwrap_or_default();
        self.shared.metrics.config.set(&config.hash, commit, unix_seconds(SystemTime::now()));
        self.maintenance.follow(config, &generation.pools);

        let binds = config.listeners.iter().map(|l| l.bind.len()).sum::<usize>() as u64;
        // Each worker has a socket and a spare descriptor on each address.
        let fixed = self.workers.len() as u64 * (DESCRIPTORS_PER_WORKER + 2 * binds);
        let memory = config.limits.kernel_memory;
        let for_pipes = generation.engine.share_of_pipes(memory);
        self.support.set_memory(memory - for_pipes);
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
        let (most, by) = match config.limits.max_connections {
            0 => self.memory.connections().min((budget.connections, "descriptors".to_owned())),
            max => (budget.connections, "descriptors".to_owned()).min((max, "configured".to_owned())),
        };
        if config.limits.max_connections > self.memory.connections().0 {
            tracing::warn!(
                configured = config.limits.max_connections,
                advised = self.memory.connections().0,
                by = self.memory.connections().1,
                "max_connections is more than memory has room for"
            );
        }
        self.shared.admission.set_max(most);
        *self.shared.limited_by.lock().expect("no panic while held") = by;
        splice::set_limit(budget.pipes);

        let wanted: Vec<SocketAddr> = config.listeners.iter().flat_map(|l| &l.bind).map(|b| b.addr).collect();
        let (kept, gone) = std::mem::take(&mut self.bound).into_iter().partition(|addr| wanted.contains(addr));
        self.bound = kept;
        let gone: Vec<SocketAddr> = gone;
        let closing = gone.into_iter().flat_map(|addr| self.close(addr)).collect();
        for (addr, sockets) in new {
            for (worker, socket) in self.workers.iter().zip(sockets) {
                worker.send(Command::Listen(addr, socket));
            }
            tracing::info!(%addr, "listening");
            self.bound.push(addr);
        }
        self.shared.ready.store(true, Relaxed);
        closing
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

/// Logs the warnings.
fn tell(config: &Config, warnings: &[Diagnostic]) {
    for warning in warnings {
        tracing::warn!("{}", warning.render(&config.source));
    }
}

fn forget_targets(before: &Generation, after: &Generation, metrics: &Metrics) {
    let names = |generation: &Generation| -> Vec<(Arc<str>, Arc<str>)> {
        let of_pool = |pool: &Arc<crate::upstream::Pool>| {
            let name = pool.config.name.clone();
            pool.targets().iter().map(move |t| (name.clone(), t.text().clone())).collect::<Vec<_>>()
        };
        generation.pools.iter().flat_map(of_pool).collect()
    };
    let kept: HashSet<_> = names(after).into_iter().collect();
    for (upstream, target) in names(before).into_iter().filter(|n| !kept.contains(n)) {
        metrics.upstreams.remove_target(&upstream, &target);
    }
}

fn random_prefix() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    // The standard library's keys come from getrandom(2); a unique id needs no secrecy.
    RandomState::new().hash_one(std::process::id())
}
