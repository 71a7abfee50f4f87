//! `dataplane run`: starts the threads, then waits for signals and for what [`crate::source`]
//! finds. Start and reload take the same way through `Daemon::take_effect`.
//!
//! The order of a start is: read and check the configuration, bind everything, then take over from
//! a predecessor if there is one, then accept, then tell systemd. A reload binds what is new, then
//! swaps; any failure leaves all as it was. How a daemon ends its time in favour of a successor is
//! in `handing_over`, how the successor begins in `taking_over`.

mod beginning;
mod binding;
mod descriptors;
mod handing_over;
mod taking_over;
mod waiting;
pub mod worker;

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::task::{Context, Waker};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result};
use arc_swap::ArcSwap;
use rustix::process::Signal;
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, mpsc, oneshot};

use beginning::Beginning;
use binding::{AdminSockets, Bound, Serving, bind_admin, bind_all, bind_webhook};
use descriptors::{Budget, DESCRIPTORS_PER_WORKER};
use handing_over::{Upgrade, ready};
use taking_over::{Inheritance, wait_for_its_end};
use worker::{Command, Worker};

use crate::admin::{self, UpgradeRequest};
use crate::admission::Admission;
use crate::config::{Config, Diagnostic};
use crate::engine::{Selection, Support, splice};
use crate::generation::Generation;
use crate::handover::program::{Program, is_successor};
use crate::handover::{Channel, Lineage, supervisor};
use crate::logging::unix_seconds;
use crate::machine_memory::MachineMemory;
use crate::metrics::Metrics;
use crate::parking::Parking;
use crate::registry::Registry;
use crate::shared::{LoadFailure, LoadStatus, Role, Shared, Waiting};
use crate::source::follow::{Follower, News, ReloadRequest};
use crate::source::{Loaded, Snapshot, git, kept, webhook};
use crate::systemd::{self, notify};
use crate::upstream::maintenance::Maintenance;

/// Fewer connections than this are hardly meant.
const TIGHT: usize = 64;

/// How often a draining daemon looks whether it is alone.
const DRAIN_TICK: Duration = Duration::from_millis(50);

/// How often an address that this machine did not have is tried again.
const ADDRESS_AGAIN: Duration = Duration::from_secs(1);

/// How long a start that fails takes at least: the next one would fail, too.
const FAILED_START: Duration = Duration::from_secs(1);

/// What the unit's ExecStop sends when the stop that follows is one half of a restart. A daemon
/// that does not know it ignores it, as is the default of this signal.
const RESTARTS: i32 = libc::SIGURG;

/// How long a worker may take to accept what is left in a socket's queue, and close it.
const CLOSING: Duration = Duration::from_secs(1);

struct Daemon {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
    support: Support,
    /// Engines in the kernel were tested; if not, that was put off.
    is_tested: bool,
    /// For workers, listeners, connections and pipes.
    descriptors: u64,
    memory: MachineMemory,
    /// What is listened on for clients; the workers accept on copies.
    listening: BTreeMap<SocketAddr, Vec<TcpListener>>,
    /// Copies of the admin thread's.
    admin_sockets: AdminSockets,
    admin: mpsc::UnboundedSender<admin::Order>,
    maintenance: Maintenance,
    /// Of `[source]`; the source thread serves on a copy.
    webhook: Option<TcpListener>,
    /// Where that thread learns of another.
    webhooks: mpsc::UnboundedSender<Option<webhook::Served>>,
    /// The commit in force.
    commit: Option<kept::Document>,
    /// Names of packages of listening sockets in systemd's store, in case this process is killed.
    stored: Vec<String>,
}

/// What is bound and not served yet.
struct Prepared {
    listening: Bound,
    waiting: Vec<Waiting>,
    admin: AdminSockets,
    webhook: Option<Serving>,
    /// Some of the addresses are not listened on.
    in_part: bool,
}

/// What the control thread hears of.
struct Ears {
    news: mpsc::Receiver<News>,
    reload: mpsc::Sender<ReloadRequest>,
    upgrades: mpsc::Receiver<UpgradeRequest>,
}

/// Signals that mean something to the daemon.
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    hangup: tokio::signal::unix::Signal,
    restart: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            restart: signal(SignalKind::from_raw(RESTARTS))?,
        })
    }
}

/// Whether this signal has come and was not heard yet.
fn has_come(signal: &mut tokio::signal::unix::Signal) -> bool {
    signal.poll_recv(&mut Context::from_waker(Waker::noop())).is_ready()
}

/// Who goes on when the daemon has ended.
enum After {
    Nobody,
    /// A successor, which this process has started.
    Successor,
}

/// Runs until SIGTERM or SIGINT, or until a successor has taken over.
pub fn run(path: &Path) -> Result<()> {
    let program = Program::of_this_process();
    let inheritance = Inheritance::find()?;
    let prepared = prepare(path, program, &inheritance).inspect_err(|error| {
        inheritance.refuse(error);
        if systemd::is_told() && !is_successor() {
            // It is started again at once, which is as it should be after a crash.
            std::thread::sleep(FAILED_START);
        }
    });
    let (mut daemon, prepared, following, ears) = prepared?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let after = runtime.block_on(async {
        // Before anything is taken over: a signal would end it.
        let signals = Signals::new()?;
        let predecessor = daemon.take_over(inheritance, prepared).await?;
        daemon.control(following, ears, signals, predecessor).await
    });
    runtime.shutdown_background();
    match after? {
        After::Nobody => Ok(()),
        // The service manager was told who is in charge; or there is a supervisor already.
        After::Successor if systemd::is_told() || is_successor() => Ok(()),
        After::Successor => supervisor::become_one(),
    }
}

/// Everything that can fail or takes time: nothing is served yet, and what the predecessor listens
/// on is not bound.
fn prepare(path: &Path, program: Program, inheritance: &Inheritance) -> Result<(Daemon, Prepared, Following, Ears)> {
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let offer = inheritance.offer();
    let offered = offer.map(|offer| &*offer.sockets).unwrap_or_default();
    let Beginning { loaded: Loaded { config, warnings, snapshot }, listening, mut waiting, missing, .. } =
        Beginning::find(path, workers, offer)?;
    tell(&config, &warnings);
    let descriptors = descriptors::available();
    let metrics = Metrics::new();
    let is_tested = !inheritance.is_urgent();
    let support =
        if is_tested { Support::test(slots(descriptors), metrics.engine.spills()) } else { Support::at_once() };
    let engine = Selection::choose(config.engine, &support);
    if is_tested {
        engine.tell();
    }

    let admin_sockets = bind_admin(&config, offered, &mut waiting)?;
    let webhook = bind_webhook(&config, offered, None, &mut waiting)?;

    metrics.engine.set(&engine);
    let commit = commit(&config, snapshot.as_ref());
    let generation = Generation::new(config, engine, None, &metrics);
    let shared = Arc::new(Shared {
        generation: ArcSwap::from_pointee(generation),
        metrics,
        registry: Arc::new(Registry::default()),
        admission: Arc::new(Admission::default()),
        parking: Parking::default(),
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
        lineage: Lineage::default(),
        program,
        started: Instant::now(),
        next_id: AtomicU64::new(0),
        id_prefix: random_prefix(),
    });
    let workers = (0..workers)
        .map(|i| Worker::start(i, shared.clone()))
        .collect::<io::Result<Vec<_>>>()
        .context("cannot start a worker thread")?;
    let (reload, requests) = mpsc::channel(4);
    let (upgrade, upgrades) = mpsc::channel(4);
    let admin = admin::start(shared.clone(), reload.clone(), upgrade).context("cannot start the admin thread")?;
    let maintenance = Maintenance::start().context("cannot start the thread that looks after targets")?;
    let (webhooks, served) = mpsc::unbounded_channel();
    let (news, inbox) = mpsc::channel(1);
    let in_part = missing.is_some();
    let following = Following { path: path.to_owned(), news, requests, webhooks: served, snapshot, in_part };
    let daemon = Daemon {
        shared,
        workers,
        support,
        is_tested,
        descriptors,
        memory: MachineMemory::read(),
        listening: BTreeMap::new(),
        admin_sockets: AdminSockets::default(),
        admin,
        maintenance,
        webhook: None,
        webhooks,
        commit,
        stored: Vec::new(),
    };
    let prepared = Prepared { listening, waiting, admin: admin_sockets, webhook, in_part };
    Ok((daemon, prepared, following, Ears { news: inbox, reload, upgrades }))
}

/// How many connections engines in the kernel have room for.
fn slots(descriptors: u64) -> usize {
    descriptors as usize / 2
}

/// The commit in force, if there is one.
fn commit(config: &Config, snapshot: Option<&Snapshot>) -> Option<kept::Document> {
    config.repository.as_ref().zip(snapshot).map(|(repository, snapshot)| kept::Document::new(repository, snapshot))
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
        Ears { mut news, reload, mut upgrades }: Ears,
        Signals { mut terminate, mut interrupt, mut hangup, mut restart }: Signals,
        predecessor: Option<Arc<Channel>>,
    ) -> Result<After> {
        let mut restarts = false;
        let watchdog = sd_notify::watchdog_enabled();
        let mut feed = tokio::time::interval(watchdog.map_or(Duration::from_secs(3600), |interval| interval / 2));

        let mut again = tokio::time::interval(ADDRESS_AGAIN);
        again.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        if let Some(predecessor) = predecessor {
            wait_for_its_end(predecessor).await;
            systemd::hold(false);
            self.tell_status();
        }
        notify(&[NotifyState::Ready]);
        self.keep_sockets();
        let config = self.shared.generation.load().config.clone();
        following.start(config).context("cannot start the thread that looks for new configurations")?;
        let mut upgrade: Option<Upgrade> = None;
        let mut tested = (!self.is_tested).then(|| self.test_engines());
        loop {
            tokio::select! {
                support = async { tested.as_mut().expect("checked").await }, if tested.is_some() => {
                    tested = None;
                    if let Ok(support) = support {
                        self.use_engines(support);
                    }
                }
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                _ = hangup.recv() => if self.shared.program.is_another() {
                    self.begin_upgrade(&mut upgrade, UpgradeRequest { program: None, answer: oneshot::channel().0 });
                } else {
                    // What happens is in the log and the metrics. When its queue is full, it reads
                    // the file all the same.
                    let _ = reload.try_send(oneshot::channel().0);
                },
                _ = restart.recv() => restarts = systemd::is_told(),
                Some(news) = news.recv() => self.hear(news).await,
                Some(request) = upgrades.recv() => self.begin_upgrade(&mut upgrade, request),
                ready = ready(&mut upgrade) => if let Some(successor) = self.end_upgrade(ready).await {
                    // What came meanwhile is meant for whoever is in charge.
                    if has_come(&mut terminate) {
                        successor.send(Signal::TERM);
                    } else if has_come(&mut interrupt) {
                        successor.send(Signal::INT);
                    }
                    successor.leave();
                    return Ok(After::Successor);
                },
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
        drop((news, upgrade));
        // It comes before the one that ends this process, but both may have been seen at once.
        restarts |= has_come(&mut restart) && systemd::is_told();
        if restarts && self.store_all().await {
            return Ok(After::Nobody);
        }
        let closing: Vec<_> = std::mem::take(&mut self.listening).into_iter().map(|(a, s)| self.close(a, s)).collect();
        for closing in closing {
            closing.ended().await;
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
        if let Some((path, _)) = self.admin_sockets.control {
            admin::remove_unix(&path);
        }
        Ok(After::Nobody)
    }

    /// Tests engines in the kernel, on a thread of its own: connections are forwarded meanwhile.
    fn test_engines(&self) -> oneshot::Receiver<Support> {
        let (tested, answer) = oneshot::channel();
        let (slots, spills) = (slots(self.descriptors), self.shared.metrics.engine.spills());
        std::thread::spawn(move || tested.send(Support::test(slots, spills)));
        answer
    }

    /// From now on new connections have these engines.
    fn use_engines(&mut self, support: Support) {
        self.support = support;
        let before = self.shared.generation.load_full();
        let engine = Selection::choose(before.config.engine, &self.support);
        engine.tell();
        self.shared.metrics.engine.set(&engine);
        let mut generation = Generation::new(before.config.clone(), engine, Some(&before), &self.shared.metrics);
        generation.loaded_at = before.loaded_at;
        self.shared.generation.store(Arc::new(generation));
        self.follow_generation();
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
                let commit = commit(&loaded.config, loaded.snapshot.as_ref());
                let outcome = self.put_in_force(loaded.config).await.map_err(|error| format!("{error:#}"));
                match &outcome {
                    Ok(_) => {
                        self.commit = commit;
                        self.succeeded(true);
                    }
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
        let bound: Vec<_> = self.listening.keys().copied().collect();
        let (listening, mut waiting) = bind_all(&config, &bound, self.workers.len())?;
        let webhook = bind_webhook(&config, &[], self.webhook.as_ref(), &mut waiting)?;
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
        self.follow_generation();
        for closing in self.listen_on(listening) {
            closing.ended().await;
        }
        if generation.config.webhook() != before.config.webhook() || (webhook.is_some() && self.webhook.is_none()) {
            self.serve_webhook(webhook);
        }
        self.wait_for(waiting);
        self.keep_sockets();
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

    /// Brings limits, and what is looked after, in line with the generation in force.
    fn follow_generation(&self) {
        let generation = self.shared.generation.load_full();
        let config = &generation.config;
        let commit = config.source.revision.as_deref().unwrap_or_default();
        self.shared.metrics.config.set(&config.hash, commit, unix_seconds(SystemTime::now()));
        self.maintenance.follow(config, &generation.pools);

        let binds = config.listeners.iter().map(|l| l.bind.len()).sum::<usize>() as u64;
        // Each worker has a socket and a spare descriptor on each address; there is a copy of each.
        let fixed = self.workers.len() as u64 * (DESCRIPTORS_PER_WORKER + 3 * binds);
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
    }

    /// Brings listening sockets in line with the generation in force; `new` are bound. Those that
    /// are given up go when what is returned has ended.
    fn listen_on(&mut self, new: Bound) -> Vec<Closing> {
        let generation = self.shared.generation.load_full();
        let wanted: HashSet<SocketAddr> =
            generation.config.listeners.iter().flat_map(|l| &l.bind).map(|b| b.addr).collect();
        let (kept, gone): (BTreeMap<_, _>, BTreeMap<_, _>) =
            std::mem::take(&mut self.listening).into_iter().partition(|(addr, _)| wanted.contains(addr));
        self.listening = kept;
        let closing = gone.into_iter().map(|(addr, sockets)| self.close(addr, sockets)).collect();
        for (addr, sockets) in new {
            match self.listen(addr, sockets) {
                Ok(()) => tracing::info!(%addr, "listening"),
                Err(error) => tracing::error!(%addr, %error, "not listening"),
            }
        }
        self.shared.ready.store(true, Relaxed);
        closing
    }

    /// Has the workers accept on these sockets, as far as there is one for each.
    fn listen(&mut self, addr: SocketAddr, sockets: Vec<TcpListener>) -> io::Result<()> {
        let copies: Vec<_> = sockets.iter().map(TcpListener::try_clone).collect::<io::Result<_>>()?;
        for (worker, socket) in self.workers.iter().cycle().zip(copies) {
            worker.send(Command::Listen(addr, socket));
        }
        self.listening.insert(addr, sockets);
        Ok(())
    }

    fn serve_metrics(&mut self, public: TcpListener) -> io::Result<()> {
        let _ = self.admin.send(admin::Order::Public(public.try_clone()?));
        self.admin_sockets.public = Some(public);
        Ok(())
    }

    fn take_commands(&mut self, path: PathBuf, control: UnixListener) -> io::Result<()> {
        let _ = self.admin.send(admin::Order::Control(control.try_clone()?));
        self.admin_sockets.control = Some((path, control));
        Ok(())
    }

    /// The workers answer when they have accepted what the kernel had completed.
    fn close(&self, addr: SocketAddr, sockets: Vec<TcpListener>) -> Closing {
        tracing::info!(%addr, "no longer listening");
        let ask = |worker: &Worker| {
            let (closed, answer) = oneshot::channel();
            worker.send(Command::Close(addr, closed));
            answer
        };
        Closing { answers: self.workers.iter().map(ask).collect(), sockets }
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

/// Sockets that are given up.
struct Closing {
    answers: Vec<oneshot::Receiver<()>>,
    sockets: Vec<TcpListener>,
}

impl Closing {
    /// Waits until what the kernel had completed was accepted; then nothing is completed any more.
    async fn ended(self) {
        for answer in self.answers {
            let _ = tokio::time::timeout(CLOSING, answer).await;
        }
        for socket in self.sockets {
            // There are copies, in systemd's store for one.
            let _ = rustix::net::shutdown(&socket, rustix::net::Shutdown::Both);
        }
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
