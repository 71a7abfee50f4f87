//! How the daemon hands over: to a successor that it starts, or to the next start, by systemd's
//! store.
//!
//! Connections stand still from the moment when all is ready until somebody goes on with them. As
//! long as nobody has, this daemon can, and does when anything fails.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use sd_notify::NotifyState;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::Daemon;
use super::worker::Command;
use crate::admin::{self, UpgradeRequest};
use crate::engine::Stop;
use crate::handover::program::Successor;
use crate::handover::{Channel, Inherited, Listening, Message, Offer, Package, Report, store};
use crate::parking::Parcel;
use crate::systemd::{self, notify};
use crate::upstream::handover::UpstreamsState;

/// For a successor to start: its configuration, its tests of the machine.
const START: Duration = Duration::from_secs(60);

/// For a successor to understand what it was handed, and then to go on with it.
const UNDERSTAND: Duration = Duration::from_secs(15);

/// For connections to stop. One that has not by then stays behind.
const STOP: Duration = Duration::from_secs(2);
const TICK: Duration = Duration::from_millis(1);

/// For connections that the kernel forwards to come back to the relay, which goes on with them.
const LEAVE_KERNEL: Duration = Duration::from_secs(2);
const LEAVE_TICK: Duration = Duration::from_millis(10);

/// For answers to operators and to Prometheus that are under way.
const FINISH: Duration = Duration::from_secs(1);

/// A hand-over that has begun.
pub(super) struct Upgrade {
    successor: Successor,
    channel: Arc<Channel>,
    ready: JoinHandle<Result<()>>,
    answer: oneshot::Sender<Result<String, String>>,
}

/// Waits until the successor is ready, or has failed; never, if there is none.
pub(super) async fn ready(upgrade: &mut Option<Upgrade>) -> (Upgrade, Result<()>) {
    let Some(begun) = upgrade else { return std::future::pending().await };
    let ready = (&mut begun.ready).await.unwrap_or_else(|error| Err(error.into()));
    (upgrade.take().expect("looked at above"), ready)
}

impl Daemon {
    /// Starts a successor; the rest comes when it is ready.
    pub(super) fn begin_upgrade(&self, upgrade: &mut Option<Upgrade>, request: UpgradeRequest) {
        let UpgradeRequest { program, answer } = request;
        let program = program.as_deref().unwrap_or(self.shared.program.path());
        if upgrade.is_some() {
            let _ = answer.send(Err("another upgrade is under way\n".to_owned()));
            return;
        }
        tracing::info!(program = %program.display(), "a successor is started");
        match self.start_successor(program) {
            Ok((successor, channel)) => {
                let channel = Arc::new(channel);
                let listener = channel.clone();
                let ready = tokio::task::spawn_blocking(move || match listener.receive(START)?.0 {
                    Message::Ready => Ok(()),
                    other => Err(out_of_turn(&other)),
                });
                *upgrade = Some(Upgrade { successor, channel, ready, answer });
            }
            Err(error) => self.upgrade_failed(answer, &error),
        }
    }

    fn start_successor(&self, program: &Path) -> Result<(Successor, Channel)> {
        let (channel, far) = Channel::pair()?;
        let successor = self.shared.program.start_successor(program, far, &channel)?;
        let mut offer = self.offer();
        offer.upstreams = UpstreamsState::default();
        let package = Package::announce(&offer).context("the state cannot be written")?;
        channel.send_with(&Message::Offer, Some(&package))?;
        Ok((successor, channel))
    }

    fn upgrade_failed(&self, answer: oneshot::Sender<Result<String, String>>, error: &anyhow::Error) {
        let text = format!("{error:#}");
        tracing::error!(error = text, "no successor has taken over; this process goes on");
        self.shared.lineage.update(|descent| descent.last_error = Some(text.clone()));
        let _ = answer.send(Err(format!("{text}\nversion {} goes on", env!("DATAPLANE_VERSION"))));
    }

    /// Hands over to a successor that is ready. `None`: it has failed, and this process goes on.
    pub(super) async fn end_upgrade(&mut self, (upgrade, ready): (Upgrade, Result<()>)) -> Option<Successor> {
        let Upgrade { successor, channel, answer, .. } = upgrade;
        let outcome = match ready {
            Ok(()) => self.hand_over(&channel).await,
            Err(error) => Err(error),
        };
        let (report, is_finished) = match outcome {
            Ok(served) => served,
            Err(error) => {
                drop(successor);
                self.upgrade_failed(answer, &error.context("the successor did not take over"));
                return None;
            }
        };
        let Report { inherited: Inherited { kept, reset }, pause, version } = report;
        let pid = successor.pid();
        notify(&[NotifyState::MainPid(pid)]);
        tracing::info!(version, kept, reset, pause, pid, "a successor has taken over");
        let text = format!(
            "version {version} serves as process {pid}; {kept} connections go on after {:.0} ms, {reset} were reset\n",
            pause * 1000.0
        );
        let _ = answer.send(Ok(text));
        let _ = tokio::time::timeout(FINISH, is_finished).await;
        let _ = channel.send(&Message::Bye);
        Some(successor)
    }

    async fn hand_over(&mut self, channel: &Arc<Channel>) -> Result<(Report, oneshot::Receiver<()>)> {
        let (mut offer, parcels) = self.stop().await;
        offer.left_behind = self.shared.admission.open();
        if let Err(error) = self.send_package(channel, &offer, &parcels).await {
            self.go_on(parcels).await;
            return Err(error);
        }
        // From here on it is the successor's.
        let (finished, is_finished) = oneshot::channel();
        let _ = self.admin.send(admin::Order::Finish(finished));
        let _ = self.webhooks.send(None);
        let _ = channel.send(&Message::Go);
        match receive(channel, UNDERSTAND).await {
            Ok(Message::Serving(report)) => Ok((report, is_finished)),
            outcome => {
                let lost = parcels.len();
                // It may have forwarded bytes: nobody can go on with them.
                drop(parcels);
                self.go_on(Vec::new()).await;
                self.serve_operators();
                let error = outcome.map_or_else(|error| error, |other| out_of_turn(&other));
                Err(error
                    .context(format!("the successor failed when it had everything; {lost} connections were reset")))
            }
        }
    }

    async fn send_package(&self, channel: &Arc<Channel>, offer: &Offer, parcels: &[Parcel]) -> Result<()> {
        let package = self.pack(offer, parcels)?;
        channel.send_with(&Message::Package, Some(&package))?;
        match receive(channel, UNDERSTAND).await? {
            Message::Taken => Ok(()),
            other => Err(out_of_turn(&other)),
        }
    }

    fn pack(&self, offer: &Offer, parcels: &[Parcel]) -> Result<Package> {
        let sockets: Vec<_> = self.sockets().map(|(_, socket)| socket).collect();
        Package::pack(offer, &sockets, parcels).context("the state cannot be written")
    }

    /// Has everything stop: nothing is accepted, and no byte is moved.
    async fn stop(&self) -> (Offer, Vec<Parcel>) {
        // That takes longest, and nothing else waits for it.
        self.shared.parking.leave_kernel();
        self.shared.registry.stop(Stop::LeaveKernel);
        wait_until(LEAVE_KERNEL, LEAVE_TICK, || self.shared.registry.in_kernel() == 0).await;

        let offer = self.offer();
        let rest = |worker: &super::Worker| {
            let (rests, answer) = oneshot::channel();
            worker.send(Command::Rest(rests));
            answer
        };
        let rests: Vec<_> = self.workers.iter().map(rest).collect();
        for rests in rests {
            let _ = tokio::time::timeout(STOP, rests).await;
        }
        self.shared.parking.open();
        self.shared.registry.stop(Stop::All);
        wait_until(STOP, TICK, || self.shared.admission.open() == 0).await;
        let parcels = self.shared.parking.close();
        let behind = self.shared.admission.open();
        if behind > 0 {
            tracing::warn!(connections = behind, "some connections did not stop in time; they end with this process");
        }
        (offer, parcels)
    }

    /// Goes on after [`stop`](Self::stop), with these connections.
    async fn go_on(&mut self, parcels: Vec<Parcel>) {
        self.resume(parcels).await;
        for (addr, sockets) in std::mem::take(&mut self.listening) {
            if let Err(error) = self.listen(addr, sockets) {
                tracing::error!(%addr, %error, "not listening");
            }
        }
    }

    /// Serves operators again, after they were left to a successor.
    fn serve_operators(&mut self) {
        let admin = std::mem::take(&mut self.admin_sockets);
        let public = admin.public.map_or(Ok(()), |public| self.serve_metrics(public));
        let control = admin.control.map_or(Ok(()), |(path, control)| self.take_commands(path, control));
        if let Err(error) = public.and(control) {
            tracing::error!(%error, "metrics or commands are not served");
        }
        let generation = self.shared.generation.load_full();
        if let (Some(webhook), Some(bound)) = (generation.config.webhook(), self.webhook.take())
            && let Ok(serving) = super::binding::try_webhook(webhook, Some(&bound))
        {
            self.serve_webhook(Some(serving));
        }
    }

    /// Goes on with connections that have stopped: those that have a place first, then those that
    /// may want one.
    pub(super) async fn resume(&self, parcels: Vec<Parcel>) -> Inherited {
        let (arriving, established) = parcels.into_iter().partition(|parcel| parcel.state.is_arriving());
        let mut all = Inherited::default();
        for parcels in [established, arriving] {
            let Inherited { kept, reset } = self.resume_at_once(parcels).await;
            all.kept += kept;
            all.reset += reset;
        }
        all
    }

    async fn resume_at_once(&self, parcels: Vec<Parcel>) -> Inherited {
        let mut shares: Vec<Vec<Parcel>> = self.workers.iter().map(|_| Vec::new()).collect();
        let workers = shares.len();
        for (n, parcel) in parcels.into_iter().enumerate() {
            shares[n % workers].push(parcel);
        }
        let mut answers = Vec::new();
        for (worker, share) in self.workers.iter().zip(shares) {
            let (resumed, answer) = oneshot::channel();
            worker.send(Command::Resume(share, resumed));
            answers.push(answer);
        }
        let mut all = Inherited::default();
        for answer in answers {
            if let Ok(Inherited { kept, reset }) = answer.await {
                all.kept += kept;
                all.reset += reset;
            }
        }
        all
    }

    fn offer(&self) -> Offer {
        let generation = self.shared.generation.load();
        let sockets = self.sockets().map(|(name, _)| name).collect();
        let mut offer = Offer::new(self.shared.lineage.descent().generation, sockets, generation.upstreams_state());
        offer.commit.clone_from(&self.commit);
        offer.stored.clone_from(&self.stored);
        offer
    }

    /// All that is listened on.
    fn sockets(&self) -> impl Iterator<Item = (Listening, BorrowedFd<'_>)> {
        let of_clients = self
            .listening
            .iter()
            .flat_map(|(addr, sockets)| sockets.iter().map(move |socket| (Listening::Public(*addr), socket.as_fd())));
        let of = |socket: &'_ std::net::TcpListener| socket.local_addr().ok();
        let public = self.admin_sockets.public.as_ref();
        let public = public.and_then(move |socket| Some((Listening::Admin(of(socket)?), socket.as_fd())));
        let control = self.admin_sockets.control.as_ref();
        let control = control.map(|(path, socket)| (Listening::Control(path.clone()), socket.as_fd()));
        let webhook = self.webhook.as_ref();
        let webhook = webhook.and_then(move |socket| Some((Listening::Webhook(of(socket)?), socket.as_fd())));
        of_clients.chain(public).chain(control).chain(webhook)
    }

    /// Has copies of the listening sockets wait in systemd's store: when this process is killed,
    /// nobody is refused until the next one is there.
    pub(super) fn keep_sockets(&mut self) {
        if !systemd::is_told() {
            return;
        }
        let name = store::name();
        let mut offer = self.offer();
        // Nobody would know after a crash whether they still hold.
        offer.upstreams = UpstreamsState::default();
        let put = self.pack(&offer, &[]).and_then(|package| store::put(&name, &package));
        if let Err(error) = put {
            tracing::warn!(
                error = format!("{error:#}"),
                "systemd does not keep the listening sockets: if this process is killed, clients are refused until it is \
                 back"
            );
            return;
        }
        for before in std::mem::replace(&mut self.stored, vec![name]) {
            store::remove(&before);
        }
    }

    /// Stores everything for the next start. False: that cannot be, and this process goes on.
    pub(super) async fn store_all(&mut self) -> bool {
        // Looked at before anything stops: connections are better drained than stored for nobody.
        if let Err(error) = self.shared.program.can_run() {
            tracing::error!(error = format!("{error:#}"), "connections are drained: the next start would fail");
            return false;
        }
        let (mut offer, parcels) = self.stop().await;
        offer.left_behind = self.shared.admission.open();
        let stored = self.pack(&offer, &parcels).and_then(|package| store::put(store::HANDOVER, &package));
        match stored {
            Ok(()) => {
                tracing::info!(connections = parcels.len(), "they wait in systemd's store for the next start");
                true
            }
            Err(error) => {
                tracing::error!(error = format!("{error:#}"), "connections cannot be stored; they are drained instead");
                store::remove(store::HANDOVER);
                self.go_on(parcels).await;
                self.shared.ready.store(false, std::sync::atomic::Ordering::Relaxed);
                false
            }
        }
    }
}

async fn wait_until(patience: Duration, tick: Duration, mut is_done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_done() && start.elapsed() < patience {
        tokio::time::sleep(tick).await;
    }
}

async fn receive(channel: &Arc<Channel>, patience: Duration) -> Result<Message> {
    let channel = channel.clone();
    Ok(tokio::task::spawn_blocking(move || channel.receive(patience)).await??.0)
}

fn out_of_turn(message: &Message) -> anyhow::Error {
    anyhow!("the successor says {message:?} out of turn")
}
