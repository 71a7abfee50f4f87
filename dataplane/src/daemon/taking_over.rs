//! How a successor begins: with what its predecessor hands over, which may be nothing.

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::binding::{bind_admin, bind_each, try_webhook};
use super::{Daemon, Prepared};
use crate::admin;
use crate::handover::{
    By, Channel, Contents, Inherited, Listening, Message, Offer, Package, Predecessor, Report, program, store,
};
use crate::systemd;

/// For the predecessor to say what there is, and to stop its connections.
const PATIENCE: Duration = Duration::from_secs(30);

/// For the predecessor to end.
const ITS_END: Duration = Duration::from_secs(5);

/// How long connections wait in systemd's store. They stand still there, and nobody tells their
/// clients.
const WAIT_IN_STORE: Duration = Duration::from_secs(30);

/// What there is to take over.
pub(super) enum Inheritance {
    Nothing,
    /// From a predecessor that runs.
    Upgrade(Arc<Channel>, Offer),
    /// From systemd's store.
    Stored(By, Package, Offer),
}

impl Inheritance {
    /// Asks the predecessor, or systemd's store. To be called once, when the process has started.
    pub(super) fn find() -> Result<Self> {
        if let Some(channel) = program::inherited_channel()? {
            let channel = Channel::new(channel);
            systemd::hold(true);
            let offer = hear_offer(&channel).inspect_err(|error| channel.fail(&format!("{error:#}")))?;
            return Ok(Self::Upgrade(Arc::new(channel), offer));
        }
        let store::Stored { handover, listening, names } = store::take();
        if let Some(package) = handover {
            let waited = |offer: &Offer| offer.stopped.instant().elapsed();
            match package.offer() {
                Ok(offer) if waited(&offer) > WAIT_IN_STORE => tracing::error!(
                    seconds = waited(&offer).as_secs(),
                    "connections have waited in systemd's store for too long; they are reset"
                ),
                Ok(mut offer) => {
                    offer.stored = names;
                    return Ok(Self::Stored(By::Restart, package, offer));
                }
                Err(error) => tracing::error!(
                    error = format!("{error:#}"),
                    "what waits in systemd's store is not understood; its connections are reset"
                ),
            }
            store::remove(store::HANDOVER);
        }
        let Some(package) = listening else { return Ok(Self::Nothing) };
        match package.offer() {
            Ok(mut offer) => {
                offer.stored = names;
                Ok(Self::Stored(By::Crash, package, offer))
            }
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "the sockets in systemd's store are not understood");
                Ok(Self::Nothing)
            }
        }
    }

    pub(super) fn offer(&self) -> Option<&Offer> {
        match self {
            Self::Nothing => None,
            Self::Upgrade(_, offer) | Self::Stored(_, _, offer) => Some(offer),
        }
    }

    /// Whether connections stand still until this process serves.
    pub(super) fn is_urgent(&self) -> bool {
        matches!(self, Self::Stored(By::Restart, ..))
    }

    /// The start has failed: the predecessor goes on. What is in systemd's store waits for the next
    /// start.
    pub(super) fn refuse(&self, error: &anyhow::Error) {
        if let Self::Upgrade(channel, _) = self {
            channel.fail(&format!("{error:#}"));
        }
    }
}

fn hear_offer(channel: &Channel) -> Result<Offer> {
    match channel.receive(PATIENCE)? {
        (Message::Offer, descriptors) => Package::from_descriptors(descriptors)?.offer(),
        (other, _) => bail!("the predecessor says {other:?} out of turn"),
    }
}

/// Takes the package, and understands it. Afterwards nothing is the predecessor's.
fn take_package(channel: &Channel) -> Result<Contents> {
    channel.send(&Message::Ready)?;
    let understood = match channel.receive(PATIENCE)? {
        (Message::Package, descriptors) => Package::from_descriptors(descriptors).and_then(Package::unpack),
        (other, _) => bail!("the predecessor says {other:?} out of turn"),
    };
    let contents = understood.inspect_err(|error| channel.fail(&format!("{error:#}")))?;
    channel.send(&Message::Taken)?;
    match channel.receive(PATIENCE).context("the predecessor")? {
        (Message::Go, _) => Ok(contents),
        (other, _) => bail!("the predecessor says {other:?} out of turn"),
    }
}

/// Waits until the predecessor has told the service manager who is in charge.
pub(super) async fn wait_for_its_end(channel: Arc<Channel>) {
    let _ = tokio::task::spawn_blocking(move || channel.receive(ITS_END)).await;
}

impl Daemon {
    /// Takes over, and serves. The channel to the predecessor, which has still to end.
    pub(super) async fn take_over(
        &mut self,
        inheritance: Inheritance,
        mut prepared: Prepared,
    ) -> Result<Option<Arc<Channel>>> {
        let mut offered = Vec::new();
        if let Some(offer) = inheritance.offer() {
            self.stored.clone_from(&offer.stored);
            offered.clone_from(&offer.sockets);
        }
        let (channel, by, contents) = match inheritance {
            Inheritance::Nothing => (None, None, None),
            Inheritance::Upgrade(channel, _) => {
                let contents = take_package(&channel)?;
                (Some(channel), Some(By::Upgrade), Some(contents))
            }
            Inheritance::Stored(by, package, _) => {
                // Up to here a start that fails leaves it to the next one.
                store::remove(store::HANDOVER);
                let contents = package.unpack().inspect_err(|error| {
                    tracing::error!(
                        error = format!("{error:#}"),
                        "what waits in systemd's store is not of use; its connections are reset"
                    );
                });
                (None, Some(by), contents.ok())
            }
        };
        let (offer, sockets, parcels) = match contents {
            Some(Contents { offer, sockets, parcels }) => (Some(offer), sockets, parcels),
            None => (None, Vec::new(), Vec::new()),
        };
        if let Some(offer) = &offer {
            self.shared.generation.load().restore(&offer.upstreams);
            if by == Some(By::Upgrade) {
                self.stored.clone_from(&offer.stored);
            }
        }
        // Nobody else has the connections now: what fails from here on is told, and no reason to
        // end.
        self.inherit(sockets, &mut prepared);
        self.bind_missing(&offered, &mut prepared);
        self.follow_generation();
        let in_package = parcels.len();
        let Inherited { kept, reset } = self.resume(parcels).await;
        self.serve(prepared);
        if let (Some(by), Some(offer)) = (by, offer) {
            let inherited = Inherited { kept, reset: reset + offer.left_behind };
            let pause = if in_package > 0 { offer.stopped.instant().elapsed().as_secs_f64() } else { 0.0 };
            self.shared.metrics.handover.note(inherited.kept, inherited.reset, pause);
            self.shared.lineage.update(|descent| {
                descent.generation = offer.generation + 1;
                descent.predecessor = Some(Predecessor { version: offer.version.clone(), by });
                descent.inherited = inherited;
                descent.pause = (by != By::Crash).then_some(pause);
            });
            tracing::info!(
                by = by.as_str(),
                predecessor = offer.version,
                kept,
                reset = inherited.reset,
                pause,
                "took over from a predecessor"
            );
            if let Some(channel) = &channel {
                let version = env!("DATAPLANE_VERSION").to_owned();
                let _ = channel.send(&Message::Serving(Report { inherited, pause, version }));
            }
        }
        Ok(channel)
    }

    /// Adds the sockets that were inherited, where the configuration has a use for them.
    fn inherit(&self, sockets: Vec<(Listening, OwnedFd)>, prepared: &mut Prepared) {
        let generation = self.shared.generation.load_full();
        let config = &generation.config;
        for (name, socket) in sockets {
            match name {
                Listening::Public(addr) if generation.listener(addr).is_some() => {
                    prepared.listening.entry(addr).or_default().push(TcpListener::from(socket));
                }
                Listening::Admin(addr) if addr == config.admin.bind.addr => {
                    prepared.admin.public = Some(socket.into());
                }
                Listening::Control(path) if path == config.admin.socket => {
                    // Where its folder was removed meanwhile, nobody finds it.
                    if path.exists() {
                        prepared.admin.control = Some((path, UnixListener::from(socket)));
                    }
                }
                Listening::Control(path) => admin::remove_unix(&path),
                Listening::Webhook(addr) => {
                    if let Some(webhook) = config.webhook().filter(|webhook| webhook.bind.addr == addr) {
                        let serving = try_webhook(webhook, Some(&socket.into()));
                        prepared.webhook =
                            serving.inspect_err(|error| tracing::error!(%error, "the webhook is not served")).ok();
                    }
                }
                Listening::Public(_) | Listening::Admin(_) => {}
            }
        }
    }

    /// Binds what was offered and did not come.
    fn bind_missing(&self, offered: &[Listening], Prepared { listening, waiting, admin, .. }: &mut Prepared) {
        let generation = self.shared.generation.load_full();
        let config = &generation.config;
        let is_missing = |addr| offered.contains(&Listening::Public(addr)) && !listening.contains_key(&addr);
        let all = config.listeners.iter().flat_map(|listener| &listener.bind).map(|bind| bind.addr);
        let there: Vec<_> = all.filter(|addr| !is_missing(*addr)).collect();
        let (more, more_waiting, errors) = bind_each(config, &there, self.workers.len());
        if !errors.is_empty() {
            tracing::error!(errors, "not listening everywhere");
        }
        listening.extend(more);
        waiting.extend(more_waiting);
        let (public, control) =
            (Listening::Admin(config.admin.bind.addr), Listening::Control(config.admin.socket.clone()));
        let mut have = Vec::new();
        if admin.public.is_some() || !offered.contains(&public) {
            have.push(public);
        }
        if admin.control.is_some() || !offered.contains(&control) {
            have.push(control);
        }
        if have.len() == 2 {
            return;
        }
        match bind_admin(config, &have, waiting) {
            Ok(bound) => {
                admin.public = admin.public.take().or(bound.public);
                admin.control = admin.control.take().or(bound.control);
            }
            Err(error) => tracing::error!(error = format!("{error:#}"), "metrics or commands are not served"),
        }
    }

    /// Serves what is bound.
    fn serve(&mut self, prepared: Prepared) {
        let Prepared { listening, waiting, admin, webhook, in_part } = prepared;
        self.listen_on(listening);
        self.wait_for(waiting);
        if in_part {
            self.shared.metrics.config.reload_success.set(0);
        }
        let public = admin.public.map_or(Ok(()), |public| self.serve_metrics(public));
        let control = admin.control.map_or(Ok(()), |(path, control)| self.take_commands(path, control));
        if let Err(error) = public.and(control) {
            tracing::error!(%error, "metrics or commands are not served");
        }
        self.serve_webhook(webhook);
    }
}
