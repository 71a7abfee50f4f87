//! What keeps the knowledge of targets true, on a thread and a runtime of its own: checks, probes
//! of targets that were ejected, the resolver, the tailnet.
//!
//! A configuration's tasks end when the next one comes; what they found stays in the targets.
//! Forwarding never waits for anything here.

use std::collections::HashSet;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, sleep_until, timeout};

use super::connect::Dial;
use super::health::Event;
use super::resolver::{self, Resolver};
use super::{Pool, Target, probe};
use crate::config::{self, Config, TargetHost};
use crate::kernel::socket;
use crate::tailnet::{self, View};

/// The first checks after a start are spread over this, or over the interval where that is shorter.
/// Also how long to wait when we lack what a check needs.
const SPREAD: Duration = Duration::from_secs(1);

/// How long names wait for the tailnet's first word at a start; without a tailscaled that is a
/// refusal, at once.
const TAILNET_FIRST: Duration = Duration::from_millis(500);

/// The running thread.
pub struct Maintenance {
    work: mpsc::UnboundedSender<Work>,
}

struct Work {
    pools: Vec<Arc<Pool>>,
    resolver: config::Resolver,
    tailscaled: PathBuf,
}

impl Maintenance {
    /// Starts it, with nothing to do.
    pub fn start() -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (work, inbox) = mpsc::unbounded_channel();
        std::thread::Builder::new().name("maintenance".into()).spawn(move || runtime.block_on(run(inbox)))?;
        Ok(Self { work })
    }

    /// From now on keeps these up to date, and no others.
    pub fn follow(&self, config: &Config, pools: &[Arc<Pool>]) {
        let (resolver, tailscaled) = (config.resolver.clone(), config.tailnet.socket.clone());
        let _ = self.work.send(Work { pools: pools.to_vec(), resolver, tailscaled });
    }
}

async fn run(mut inbox: mpsc::UnboundedReceiver<Work>) {
    let view = watch::Sender::new(None);
    // It is not asked anew by every reload: for a moment nothing would be known of any peer.
    let mut tailnet: Option<(PathBuf, AbortHandle)> = None;
    let mut tasks = JoinSet::new();
    let mut followed: Vec<Weak<Target>> = Vec::new();
    while let Some(Work { pools, resolver, tailscaled }) = inbox.recv().await {
        tasks.abort_all();
        tasks = JoinSet::new();
        // Before their successors are checked.
        let current: HashSet<_> = pools.iter().flat_map(|pool| pool.targets()).map(Arc::as_ptr).collect();
        for target in followed.iter().filter(|target| !current.contains(&target.as_ptr())).filter_map(Weak::upgrade) {
            target.retire();
        }
        followed = pools.iter().flat_map(|pool| pool.targets()).map(Arc::downgrade).collect();
        if tailnet.as_ref().is_none_or(|(socket, _)| *socket != tailscaled) {
            if let Some((_, task)) = tailnet.take() {
                task.abort();
                view.send_replace(None);
            }
            let task = tokio::spawn(tailnet::follow(tailscaled.clone(), view.clone()));
            tailnet = Some((tailscaled, task.abort_handle()));
        }
        let names = Arc::new(Resolver::new(resolver));
        for pool in &pools {
            for target in pool.targets() {
                tasks.spawn(attend(pool.clone(), target.clone()));
                if let TargetHost::Name(name) = &target.address.host {
                    tasks.spawn(resolve(target.clone(), name.clone(), names.clone(), view.subscribe()));
                }
            }
        }
        tasks.spawn(see(pools, names, view.subscribe()));
    }
}

async fn resolve(
    target: Arc<Target>,
    name: String,
    names: Arc<Resolver>,
    mut view: watch::Receiver<Option<Arc<View>>>,
) {
    // At a start the tailnet has not been heard yet, and what is one of its names the resolver may
    // not know.
    if view.borrow().is_none() {
        let _ = timeout(TAILNET_FIRST, view.changed()).await;
    }
    resolver::follow(names, &name, view, &target.wanted, |answer| target.resolved(answer)).await;
}

/// Tells the targets what the tailnet says of them.
async fn see(pools: Vec<Arc<Pool>>, names: Arc<Resolver>, mut view: watch::Receiver<Option<Arc<View>>>) {
    loop {
        let now = view.borrow_and_update().clone();
        for target in pools.iter().flat_map(|pool| pool.targets()) {
            target.see(now.as_deref().and_then(|view| names.peer(&target.address.host, view)));
        }
        if view.changed().await.is_err() {
            return;
        }
    }
}

/// Checks a target as configured, and probes it when it was ejected for long enough; one of both at
/// a time.
async fn attend(pool: Arc<Pool>, target: Arc<Target>) {
    let health = pool.config.health.as_ref();
    if health.is_none() {
        // Here, because a check of the configuration before may have ended up to now.
        target.apply(Event::NoCheck);
    }
    let mut next_check = health.map(|check| Instant::now() + SPREAD.min(check.interval).mul_f64(fastrand::f64()));
    loop {
        let probe_due = target.health.lock().expect("no panic while held").probe_due();
        let Some(due) = [next_check, probe_due].into_iter().flatten().min() else {
            target.ejected.notified().await;
            continue;
        };
        tokio::select! {
            () = sleep_until(due.into()) => {}
            // The probe may be due before the check now.
            () = target.ejected.notified() => continue,
        }
        let begun = Instant::now();
        let failure = match probe(&pool, &target).await {
            Found::Answer => None,
            Found::WrongAnswer(reason) => Some((reason, true)),
            Found::Nothing(reason) => Some((reason, false)),
            Found::OurFault => {
                sleep(SPREAD).await;
                continue;
            }
        };
        if let Some((check, due)) = health.zip(next_check)
            && due <= begun
        {
            // A tenth more or less, so that the checks of many targets and of many entrance nodes
            // do not fall into step.
            next_check = Some(begun + check.interval.mul_f64(0.9 + 0.2 * fastrand::f64()));
            target.apply(match &failure {
                None => Event::CheckPassed { rise: check.rise },
                Some((reason, answers)) => {
                    Event::CheckFailed { fall: check.fall, reason: format!("check: {reason}"), answers: *answers }
                }
            });
        }
        if probe_due.is_some_and(|due| due <= begun) {
            target.apply(match failure {
                None => Event::ProbePassed,
                Some((reason, answers)) => Event::ProbeFailed { reason, answers },
            });
        }
    }
}

/// What a check or a probe found.
enum Found {
    Answer,
    /// It answers, but not as it should.
    WrongAnswer(String),
    Nothing(String),
    /// Neither could be made.
    OurFault,
}

/// As a client would: the address that answers first is the one that is spoken to.
async fn probe(pool: &Pool, target: &Target) -> Found {
    // Without a check, a probe is what a client would have done.
    let health = pool.config.health.as_ref();
    let patience = health.map_or(pool.config.connect_timeout, |check| check.timeout);
    let tls = health.and_then(|check| check.tls.as_deref());
    let nobody = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0);
    let dial = Dial { client: nobody, own: [].into(), port: None, speaks_first: false, is_probe: true };
    let begun = Instant::now();
    let connect = async {
        match target.connect(&dial, pool.config.hedge_delay, patience).await {
            Ok(stream) => Ok(stream),
            Err(failure) if failure.cause.is_our_own() => Err(Found::OurFault),
            Err(failure) => Err(Found::Nothing(failure.to_string())),
        }
    };
    let mut stream = match timeout(patience, connect).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(found)) => return found,
        Err(_) => return Found::Nothing(format!("timeout: no answer within {patience:?}")),
    };
    socket::close_with_fin(&stream);
    let spoken = probe::speak(&mut stream, pool.config.send_proxy, tls);
    match timeout(patience.saturating_sub(begun.elapsed()), spoken).await {
        Ok(Ok(())) => Found::Answer,
        Ok(Err(reason)) => Found::WrongAnswer(reason),
        Err(_) => Found::Nothing(probe::late(&stream, patience)),
    }
}
