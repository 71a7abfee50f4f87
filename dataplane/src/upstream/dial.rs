//! Connecting a client to a target: the next one when one fails, a second one beside the first when that is slow, and the queue where all have enough to do.
//!
//! It must not know how a target's health comes about; it tells what it found.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::task::Poll;
use std::time::{Duration, Instant};

use prometheus::IntGauge;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{Mutex, Notify};
use tokio::time::{sleep, timeout, timeout_at};

use super::balance::{Candidate, Choice, choose, weight};
use super::health::Event;
use super::{Address, Dialled, Lease, Pool, Resolution, Target};
use crate::config::Balance;
use crate::reject::Reason;
use crate::shortages::Shortage;
use crate::socket;

/// Connections that may wait for room at the targets of one upstream. With more, the rest would only wait to be refused.
const QUEUE: usize = 1024;
/// How often a connection that waits looks for room that came about otherwise than by the end of another.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// A connect that was given up after less than this says nothing of the address.
const LONG: Duration = Duration::from_millis(200);

/// What a dial needs beside the pool.
#[derive(Debug, Clone)]
pub struct Dial {
    /// The client, for its family and for `balance = "hash"`.
    pub client: SocketAddr,
    /// Where we listen: a target that turns out to be ourselves would make a loop.
    pub own: Arc<[SocketAddr]>,
    /// Another port of the targets than their own. How that one does says nothing of the target: it is not put aside for it, nor taken back.
    pub port: Option<u16>,
    /// Something is sent as soon as there is a connection.
    pub speaks_first: bool,
}

/// Connections that wait for room, first come, first served.
#[derive(Debug)]
pub struct Queue {
    /// Whoever holds it is next, and looks for room; the others wait for it in the order in which they came.
    next: Mutex<()>,
    released: Notify,
    waiting: AtomicUsize,
    gauge: IntGauge,
}

struct Place<'a>(&'a Queue);

impl Queue {
    pub(super) fn new(gauge: IntGauge) -> Self {
        Self { next: Mutex::new(()), released: Notify::new(), waiting: AtomicUsize::new(0), gauge }
    }

    pub(super) fn released(&self) {
        self.released.notify_one();
    }

    fn enter(&self) -> Option<Place<'_>> {
        self.waiting.fetch_update(Relaxed, Relaxed, |n| (n < QUEUE).then_some(n + 1)).ok()?;
        self.gauge.inc();
        Some(Place(self))
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Relaxed);
        self.0.gauge.dec();
    }
}

/// Why a connect failed.
#[derive(Debug)]
pub struct Failure {
    /// Label of the metric.
    reason: &'static str,
    detail: String,
    blame: Blame,
}

#[derive(Debug, PartialEq, Eq)]
enum Blame {
    Target,
    OurDescriptors,
    OurPorts,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason, self.detail)
    }
}

impl Failure {
    /// It says nothing of the target: what a connection needs was lacking here.
    pub fn is_our_own(&self) -> bool {
        self.blame != Blame::Target
    }

    fn new(reason: &'static str, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into(), blame: Blame::Target }
    }
}

/// The metric's label for a connect that failed so.
pub fn label(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => "no_descriptor",
        Some(libc::EADDRNOTAVAIL) => "no_local_port",
        Some(libc::ECONNREFUSED) => "refused",
        Some(libc::ETIMEDOUT) => "timeout",
        Some(libc::ECONNRESET) => "reset",
        Some(libc::EHOSTUNREACH | libc::ENETUNREACH | libc::EHOSTDOWN | libc::ENETDOWN) => "unreachable",
        _ => "other",
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        let reason = label(&error);
        let blame = match reason {
            "no_descriptor" => Blame::OurDescriptors,
            "no_local_port" => Blame::OurPorts,
            _ => Blame::Target,
        };
        Self { reason, detail: error.to_string(), blame }
    }
}

/// A dial under way.
struct Attempt {
    outcome: Pin<Box<dyn Future<Output = Result<Dialled, Failure>> + Send>>,
    target: Arc<Target>,
    was_up: bool,
    overdue: Option<Overdue>,
}

/// Marks a target while a dial to it waits for longer than it should.
struct Overdue(Arc<Target>);

impl Overdue {
    fn new(target: &Arc<Target>) -> Self {
        target.endpoint.overdue.fetch_add(1, Relaxed);
        Self(target.clone())
    }
}

impl Drop for Overdue {
    fn drop(&mut self) {
        self.0.endpoint.overdue.fetch_sub(1, Relaxed);
    }
}

impl Pool {
    /// Connects to a target. Another one is dialled when one has failed, and beside it when it has not answered for `hedge_delay`; whichever answers first is
    /// taken.
    ///
    /// # Errors
    /// `NoUpstream` when all failed or none had room in time, `TotalLimit` when this process has no file descriptor left.
    pub async fn dial(self: &Arc<Self>, dial: Dial) -> Result<Dialled, Reason> {
        let hedge_delay = self.config.hedge_delay;
        let turn = self.turn.fetch_add(1, Relaxed);
        let mut tried = Vec::new();
        let mut attempts: Vec<Attempt> = Vec::new();
        let mut hold = None;
        loop {
            let next = if attempts.is_empty() {
                Some(self.wait_for_room(&dial, turn, &mut tried).await?)
            } else {
                self.pick(&dial, turn, &mut tried, &attempts)
            };
            // Where there is no other to dial, there may be one after the same time again.
            if (next.is_some() || hold.is_none()) && !hedge_delay.is_zero() {
                hold = Some(Box::pin(sleep(hedge_delay)));
            }
            if let Some((target, lease)) = next {
                attempts.push(self.attempt(&dial, &target, lease));
            }
            let first = tokio::select! {
                biased;
                first = first_done(&mut attempts) => Some(first),
                () = async { hold.as_mut().expect("checked").await }, if hold.is_some() => None,
            };
            match first {
                Some(Ok(dialled)) => {
                    attempts.into_iter().for_each(see_to_its_end);
                    return Ok(dialled);
                }
                Some(Err(failure)) if failure.blame == Blame::OurDescriptors && attempts.is_empty() => {
                    return Err(Reason::TotalLimit);
                }
                Some(Err(_)) => {}
                None => {
                    hold = None;
                    // Of another port nothing is remembered.
                    if dial.port.is_none() {
                        for attempt in attempts.iter_mut().filter(|attempt| attempt.overdue.is_none()) {
                            attempt.overdue = Some(Overdue::new(&attempt.target));
                        }
                    }
                }
            }
        }
    }

    /// A target with a place at it, when there is one; waits in the queue if that is what it takes.
    async fn wait_for_room(
        &self,
        dial: &Dial,
        turn: usize,
        tried: &mut Vec<usize>,
    ) -> Result<(Arc<Target>, Lease), Reason> {
        // Whoever came earlier and waits goes first.
        if self.config.max_connections_per_target == 0 || self.queue.waiting.load(Relaxed) == 0 {
            match self.choose(dial, turn, tried, true) {
                Choice::Target(index) => {
                    if let Some(found) = self.take(index, tried) {
                        return Ok(found);
                    }
                }
                Choice::Nothing => return Err(Reason::NoUpstream),
                Choice::Full => {}
            }
        }
        let _place = self.queue.enter().ok_or(Reason::NoUpstream)?;
        let wait = async {
            let _next = self.queue.next.lock().await;
            loop {
                // Listens before it looks, so that no release falls in between.
                let mut released = std::pin::pin!(self.queue.released.notified());
                released.as_mut().enable();
                match self.choose(dial, turn, tried, true) {
                    Choice::Target(index) => {
                        if let Some(found) = self.take(index, tried) {
                            return Ok(found);
                        }
                    }
                    Choice::Nothing => return Err(Reason::NoUpstream),
                    Choice::Full => {}
                }
                let _ = timeout(LOOK_AGAIN, released).await;
            }
        };
        timeout(self.config.connect_timeout, wait).await.unwrap_or(Err(Reason::NoUpstream))
    }

    /// Another target to dial beside those that are being dialled. One that is down is no better than one that is slow.
    fn pick(
        &self,
        dial: &Dial,
        turn: usize,
        tried: &mut Vec<usize>,
        attempts: &[Attempt],
    ) -> Option<(Arc<Target>, Lease)> {
        let also_down = !attempts.iter().any(|attempt| attempt.was_up);
        loop {
            match self.choose(dial, turn, tried, also_down) {
                // Somebody else may have been quicker; then there may be another.
                Choice::Target(index) => {
                    if let Some(found) = self.take(index, tried) {
                        return Some(found);
                    }
                }
                Choice::Full | Choice::Nothing => return None,
            }
        }
    }

    fn choose(&self, dial: &Dial, turn: usize, tried: &[usize], also_down: bool) -> Choice {
        let cap = self.config.max_connections_per_target;
        let candidate = |(i, target): (usize, &Arc<Target>)| {
            let active = target.active.load(Relaxed);
            let standing = target.standing(self.config.prefer_direct);
            Candidate {
                active,
                allowed: !target.drained.load(Relaxed) && !tried.contains(&i) && (also_down || !standing.is_down()),
                full: cap != 0 && active >= cap,
                standing,
                weight: match self.config.balance {
                    Balance::Hash => weight(dial.client.ip(), &target.address.text),
                    _ => 0,
                },
            }
        };
        // All that is asked of them must be of one moment.
        let candidates: Vec<Candidate> = self.targets.iter().enumerate().map(candidate).collect();
        choose(self.config.balance, turn, &candidates)
    }

    fn take(&self, index: usize, tried: &mut Vec<usize>) -> Option<(Arc<Target>, Lease)> {
        let target = &self.targets[index];
        let lease = Lease::take(target, self)?;
        tried.push(index);
        Some((target.clone(), lease))
    }

    fn attempt(self: &Arc<Self>, dial: &Dial, target: &Arc<Target>, lease: Lease) -> Attempt {
        let was_up = target.is_up.load(Relaxed);
        let (pool, dial, of) = (self.clone(), dial.clone(), target.clone());
        let outcome = Box::pin(async move {
            let started = Instant::now();
            match of.connect(&dial, pool.config.hedge_delay, pool.config.connect_timeout).await {
                Ok(stream) => {
                    pool.connect_duration.observe(started.elapsed().as_secs_f64());
                    if dial.port.is_none() {
                        of.apply(Event::DialPassed);
                    }
                    Ok(Dialled { stream, lease: lease.connected() })
                }
                Err(failure) => {
                    let labels = [&*pool.config.name, &*of.address.text, failure.reason];
                    pool.connect_failures.with_label_values(&labels).inc();
                    match failure.blame {
                        Blame::OurPorts => pool.shortages.note(Shortage::LocalPorts),
                        Blame::OurDescriptors => pool.shortages.note(Shortage::Descriptors),
                        Blame::Target => {}
                    }
                    // The resolver's failures are told by who asks it.
                    if !failure.is_our_own() && failure.reason != "resolve" && dial.port.is_none() {
                        of.apply(Event::DialFailed { started, reason: failure.to_string() });
                    }
                    Err(failure)
                }
            }
        });
        Attempt { outcome, target: target.clone(), was_up, overdue: None }
    }
}

/// The first outcome; its attempt is taken out.
async fn first_done(attempts: &mut Vec<Attempt>) -> Result<Dialled, Failure> {
    std::future::poll_fn(|context| {
        for index in 0..attempts.len() {
            if let Poll::Ready(outcome) = attempts[index].outcome.as_mut().poll(context) {
                attempts.remove(index);
                return Poll::Ready(outcome);
            }
        }
        Poll::Pending
    })
    .await
}

/// An attempt that lost still tells whether its target answers. Its connection is closed unused.
fn see_to_its_end(attempt: Attempt) {
    let Attempt { outcome, overdue, .. } = attempt;
    tokio::spawn(async move {
        if let Ok(dialled) = outcome.await {
            socket::close_with_fin(&dialled.stream);
        }
        drop(overdue);
    });
}

/// A connect to one of several addresses.
type UnderWay<'a> = Pin<Box<dyn Future<Output = Result<TcpStream, Failure>> + Send + 'a>>;

impl Target {
    /// Connects to one of the target's addresses within `patience`: one after the other, the next as soon as one has failed or has not answered for `stagger`. Without a
    /// `stagger`, those that are left share the time that is left.
    pub(super) async fn connect(
        &self,
        dial: &Dial,
        stagger: Duration,
        patience: Duration,
    ) -> Result<TcpStream, Failure> {
        let deadline = Instant::now() + patience;
        let no_answer = |_| Failure::new("timeout", format!("no answer within {patience:?}"));
        let addresses = self.addresses_by(dial, deadline).await?;
        if let [address] = &addresses[..] {
            return timeout_at(deadline.into(), self.connect_to(address, dial)).await.map_err(no_answer)?;
        }
        let mut last = Failure::new("resolve", "the name has no address");
        let mut under_way: Vec<UnderWay<'_>> = Vec::new();
        let mut left = addresses.iter();
        loop {
            if let Some(address) = left.next() {
                under_way.push(Box::pin(self.connect_to(address, dial)));
            } else if under_way.is_empty() {
                return Err(last);
            }
            let more = left.len() as u32;
            let remaining = deadline.saturating_duration_since(Instant::now());
            let pause = if more == 0 {
                remaining
            } else if stagger.is_zero() {
                remaining / (more + 1)
            } else {
                stagger.min(remaining)
            };
            let first = std::future::poll_fn(|context| {
                for index in 0..under_way.len() {
                    if let Poll::Ready(outcome) = under_way[index].as_mut().poll(context) {
                        drop(under_way.remove(index));
                        return Poll::Ready(outcome);
                    }
                }
                Poll::Pending
            });
            match timeout(pause, first).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(failure)) => last = failure,
                Err(late) if more == 0 => return Err(no_answer(late)),
                Err(_) => {}
            }
        }
    }

    async fn connect_to(&self, address: &Address, dial: &Dial) -> Result<TcpStream, Failure> {
        // Of another port nothing is remembered.
        let remembers = dial.port.is_none();
        let mut connect = Connect { target: self, address, begun: Instant::now(), answered: !remembers };
        let mut at = address.at;
        at.set_port(dial.port.unwrap_or(at.port()));
        let prepared = if at.is_ipv6() { TcpSocket::new_v6() } else { TcpSocket::new_v4() }.and_then(|socket| {
            socket::prepare(&socket)?;
            if dial.speaks_first {
                socket::save_an_acknowledgement(&socket)?;
            }
            Ok(socket)
        });
        let connected = prepared?.connect(at).await;
        connect.answered = true;
        if remembers {
            address.failed_at.store(if connected.is_ok() { 0 } else { self.now() }, Relaxed);
        }
        let stream = connected?;
        if is_own(&stream, at.port(), &dial.own) {
            return Err(Failure::new("own_listener", format!("{at} is a listener of this daemon")));
        }
        Ok(stream)
    }

    /// The addresses. Waits for the resolver's first answer, if there was none yet, and for another one where it had none: this client has nowhere else to go.
    async fn addresses_by(&self, dial: &Dial, deadline: Instant) -> Result<Vec<Arc<Address>>, Failure> {
        let mut resolution = self.resolution.subscribe();
        match &*resolution.borrow_and_update() {
            Resolution::Known(known) => return Ok(self.in_turn(known, dial.client.is_ipv6())),
            Resolution::Pending => {}
            Resolution::Unknown(_) => self.wanted.notify_one(),
        }
        let _ = timeout_at(deadline.into(), resolution.changed()).await;
        match &*resolution.borrow() {
            Resolution::Known(known) => Ok(self.in_turn(known, dial.client.is_ipv6())),
            Resolution::Pending => Err(Failure::new("resolve", "the resolver has not answered yet")),
            Resolution::Unknown(reason) => Err(Failure::new("resolve", &**reason)),
        }
    }
}

/// A connect to one address. Given up after a while, it says that the others are to be preferred.
struct Connect<'a> {
    target: &'a Target,
    address: &'a Address,
    begun: Instant,
    answered: bool,
}

impl Drop for Connect<'_> {
    fn drop(&mut self) {
        if !self.answered && self.begun.elapsed() >= LONG {
            self.address.failed_at.store(self.target.now(), Relaxed);
        }
    }
}

/// Whether a connection of ours to this port arrived at one of our own listeners.
fn is_own(stream: &TcpStream, port: u16, own: &[SocketAddr]) -> bool {
    let mut own = own.iter().filter(|own| own.port() == port).peekable();
    if own.peek().is_none() {
        return false;
    }
    // Not the address that was dialled: 0.0.0.0 is this machine, and an IPv4 address may be written as one of IPv6.
    let (Ok(local), Ok(peer)) = (stream.local_addr(), stream.peer_addr()) else { return false };
    let (here, there) = (local.ip().to_canonical(), peer.ip().to_canonical());
    let listens =
        |own: &SocketAddr| own.is_ipv4() == there.is_ipv4() && (own.ip() == there || own.ip().is_unspecified());
    // A host that connects to itself has that address at both ends.
    own.any(listens) && (there.is_loopback() || there == here)
}
