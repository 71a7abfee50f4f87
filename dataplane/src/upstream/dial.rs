//! Connecting a client to one of the targets: the next one when one fails, a second one beside the
//! first when that is slow (a hedged dial), and a wait in the queue where all have enough to do.
//!
//! It must not know how a target's health comes about; it tells what it found.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::Poll;
use std::time::Instant;

use tokio::time::{sleep, timeout};

use super::balance::{Candidate, Choice, choose, weight};
use super::connect::{Cause, Dial, Failure};
use super::health::Event;
use super::queue::LOOK_AGAIN;
use super::{Dialled, Lease, Pool, Target};
use crate::config::Balance;
use crate::kernel::socket;
use crate::reject::Reason;
use crate::shortages::Shortage;

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
    /// Connects to a target. Another one is dialled when one has failed, and beside it when it has
    /// not answered for `hedge_delay`; whichever answers first is taken.
    ///
    /// # Errors
    /// `NoUpstream` when all failed or none had room in time, `TotalLimit` when this process has no
    /// file descriptor left.
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
                Some(Err(Failure { cause: Cause::NoDescriptor | Cause::NoMemory, .. })) if attempts.is_empty() => {
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
        if self.config.max_connections_per_target == 0 || self.queue.is_empty() {
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
        let _ticket = self.queue.enter().ok_or(Reason::NoUpstream)?;
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

    /// Another target to dial beside those that are being dialled. One that is down is no better
    /// than one that is slow.
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
                    let labels = [&*pool.config.name, &*of.address.text, failure.cause.as_str()];
                    pool.connect_failures.with_label_values(&labels).inc();
                    match failure.cause {
                        Cause::NoLocalPort => pool.shortages.note(Shortage::LocalPorts),
                        Cause::NoDescriptor => pool.shortages.note(Shortage::Descriptors),
                        _ => {}
                    }
                    if !failure.cause.is_our_own() && !failure.cause.is_of_the_name() && dial.port.is_none() {
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
