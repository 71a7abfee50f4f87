//! The client: opens the connections of a workload, warms up, and counts what happens in its
//! window.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hdrhistogram::Histogram;
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use socket2::{Domain, Protocol, Socket, Type};

use super::wire::{ENDLESS, PIECE, Request, check, replied, uploaded};
use super::{HELLO, Tally, control, threads};
use crate::workloads::{Behaviour, Step, Window, Workload};

/// How long connections may take to open and get warm.
const PATIENCE: Duration = Duration::from_secs(40);
/// Connections that a thread opens at once; a load that is about open connections is not about how
/// many SYNs a queue holds.
const OPENING: usize = 64;
/// How often a thread looks up when nothing happens.
const TICK: Duration = Duration::from_millis(5);

/// The phases of a run, for all threads.
const WARM_UP: u8 = 0;
const WINDOW: u8 = 1;
const OVER: u8 = 2;

/// Runs a workload against an address. Says 0 when it is warm, opens the window at the harness's
/// next line, says its [`Tally`] when the window is over, and goes on with the load until it is
/// killed: what closing costs is not measured.
pub fn run(target: SocketAddr, workload: &'static Workload, most_connections: usize, verify: bool) -> Result<()> {
    let common = Arc::new(Common::default());
    let (sender, tallies) = channel();
    let all = workload.flows.iter().flat_map(|(count, behaviour)| std::iter::repeat_n(*behaviour, *count));
    let behaviours: Vec<_> = all.take(most_connections).enumerate().collect();
    let connections = behaviours.len();
    let threads = threads().min(connections);
    let start = Instant::now();
    for thread in 0..threads {
        let mine = behaviours.iter().skip(thread).step_by(threads).copied().collect();
        let (common, sender) = (Arc::clone(&common), sender.clone());
        std::thread::spawn(move || {
            let ended = Worker::new(target, verify, mine, common).and_then(|worker| worker.run(&sender));
            // The receiver is gone only with the process.
            let _ = sender.send(ended.map(|never| match never {}));
        });
    }
    until(&tallies, "all connections are open and warm", || {
        common.warm.load(Relaxed) == connections && start.elapsed() >= workload.warm_up
    })?;

    control::say(0)?;
    if control::next_line()?.is_none() {
        return Ok(());
    }
    common.phase.store(WINDOW, Relaxed);
    match workload.window {
        Window::Time(length) => std::thread::sleep(length),
        Window::UntilDone => until(&tallies, "all transfers end", || common.done.load(Relaxed) == connections)?,
    }
    common.phase.store(OVER, Relaxed);
    let mut total = Count::new();
    let mut seconds = 0.0;
    for _ in 0..threads {
        let count = tallies.recv_timeout(PATIENCE).context("a thread of the load is stuck")??;
        total.operations += count.operations;
        total.received += count.received;
        total.latency.add(&count.latency).context("histograms of one kind")?;
        seconds += count.since.elapsed().as_secs_f64() / threads as f64;
    }
    let quantiles = [0.5, 0.99, 0.999].map(|q| total.latency.value_at_quantile(q) as f64 / 1000.0);
    control::say(Tally {
        connections: connections as u64,
        seconds,
        operations: total.operations,
        received: total.received,
        latency: (!total.latency.is_empty()).then_some(quantiles),
    })?;
    while control::next_line()?.is_some() {}
    Ok(())
}

/// Waits for something, and for the first thread that fails.
fn until(tallies: &Receiver<Result<Count>>, what: &str, mut probe: impl FnMut() -> bool) -> Result<()> {
    let start = Instant::now();
    while !probe() {
        match tallies.recv_timeout(Duration::from_millis(1)) {
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => bail!("the threads of the load are gone"),
            Ok(Ok(_)) => bail!("a thread counted too early"),
            Ok(Err(error)) => return Err(error),
        }
        if start.elapsed() > PATIENCE {
            bail!("not within {PATIENCE:?}: {what}");
        }
    }
    Ok(())
}

/// Where the random of [`HELLO`] is: behind record header, message header and version (RFC 8446
/// sections 5.1, 4 and 4.1.2).
const RANDOM: usize = 5 + 4 + 2;

/// Connections that were opened.
static OPENED: AtomicU64 = AtomicU64::new(0);

/// What the threads share.
#[derive(Default)]
struct Common {
    phase: AtomicU8,
    /// Connections that have warmed up.
    warm: AtomicUsize,
    /// Connections that have nothing more to do.
    done: AtomicUsize,
}

/// What one thread counts in the window.
struct Count {
    since: Instant,
    operations: u64,
    received: u64,
    /// ns
    latency: Histogram<u64>,
}

impl Count {
    fn new() -> Self {
        let latency = Histogram::new_with_bounds(100, 60_000_000_000, 3).expect("constant bounds that are right");
        Self { since: Instant::now(), operations: 0, received: 0, latency }
    }
}

struct Worker {
    target: SocketAddr,
    verify: bool,
    common: Arc<Common>,
    phase: u8,
    epoll: OwnedFd,
    flows: Vec<Flow>,
    /// Of `flows`: how many were opened, and how many of those have not received anything yet.
    opened: usize,
    opening: usize,
    /// When which flow asks next.
    timers: BinaryHeap<Reverse<(Instant, usize)>>,
    count: Count,
    buffer: Vec<u8>,
}

impl Worker {
    fn new(target: SocketAddr, verify: bool, behaviours: Vec<(usize, Behaviour)>, common: Arc<Common>) -> Result<Self> {
        Ok(Self {
            target,
            verify,
            common,
            phase: WARM_UP,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            flows: behaviours.into_iter().map(|(number, behaviour)| Flow::new(number as u64, behaviour)).collect(),
            opened: 0,
            opening: 0,
            timers: BinaryHeap::new(),
            count: Count::new(),
            buffer: vec![0; PIECE],
        })
    }

    fn run(mut self, tallies: &Sender<Result<Count>>) -> Result<std::convert::Infallible> {
        let mut events = Vec::with_capacity(256);
        loop {
            while self.opened < self.flows.len() && self.opening < OPENING {
                self.opened += 1;
                self.opening += 1;
                self.open(self.opened - 1)?;
            }
            events.clear();
            let wait = self
                .timers
                .peek()
                .map_or(TICK, |Reverse((due, _))| due.saturating_duration_since(Instant::now()).min(TICK));
            let wait = Timespec::try_from(wait).expect("a short time");
            match epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&wait)) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other.context("epoll_wait")?,
            };
            self.follow_phase(tallies)?;
            for event in &events {
                let index = event.data.u64() as usize;
                self.serve(index).with_context(|| format!("connection {}", self.flows[index].number))?;
            }
            self.ask_what_is_due()?;
        }
    }

    fn follow_phase(&mut self, tallies: &Sender<Result<Count>>) -> Result<()> {
        let phase = self.common.phase.load(Relaxed);
        if phase == self.phase {
            return Ok(());
        }
        self.phase = phase;
        let before = std::mem::replace(&mut self.count, Count::new());
        if phase == OVER {
            // The receiver is gone only with the process.
            let _ = tallies.send(Ok(before));
            return Ok(());
        }
        for index in 0..self.flows.len() {
            if let Step::AskInWindow(reply) = self.flows[index].step() {
                self.ask(index, reply, Instant::now())?;
            }
        }
        Ok(())
    }

    fn open(&mut self, index: usize) -> Result<()> {
        let flow = &mut self.flows[index];
        let socket = Socket::new(Domain::for_address(self.target), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        socket.set_tcp_nodelay(true)?;
        match socket.connect(&self.target.into()) {
            Err(e) if e.raw_os_error() != Some(rustix::io::Errno::INPROGRESS.raw_os_error()) => {
                return Err(e).context("connect");
            }
            _ => {}
        }
        flow.reset();
        flow.unsent.extend_from_slice(HELLO);
        // Another one each time, as clients' are.
        flow.unsent[RANDOM..RANDOM + 8].copy_from_slice(&OPENED.fetch_add(1, Relaxed).to_be_bytes());
        let Step::Ask(reply) = flow.behaviour.step(0) else { bail!("a connection must begin with a request") };
        flow.ask(reply, self.verify, Instant::now());
        flow.interest = epoll::EventFlags::IN | epoll::EventFlags::OUT;
        epoll::add(&self.epoll, &socket, epoll::EventData::new_u64(index as u64), flow.interest)?;
        flow.socket = Some(socket);
        Ok(())
    }

    fn serve(&mut self, index: usize) -> Result<()> {
        let flow = &mut self.flows[index];
        // Readiness that was reported before the socket was replaced.
        let Some(socket) = &flow.socket else { return Ok(()) };
        if flow.interest.contains(epoll::EventFlags::OUT) && !flow.connected {
            match socket.take_error()? {
                Some(error) => return Err(error).context("connect"),
                None => flow.connected = socket.peer_addr().is_ok(),
            }
        }
        if flow.connected {
            flow.send(self.verify)?;
            let fresh = flow.received == 0;
            let received = flow.receive(&mut self.buffer, self.verify)?;
            self.count.received += received;
            if fresh && flow.received > 0 {
                self.opening = self.opening.saturating_sub(1);
            }
            flow.warm_up(&self.common);
            if received > 0 && flow.reply_left == 0 {
                self.reply_is_whole(index)?;
            }
        }
        self.watch(index)
    }

    fn reply_is_whole(&mut self, index: usize) -> Result<()> {
        let flow = &mut self.flows[index];
        flow.replies += 1;
        flow.warm_up(&self.common);
        if flow.behaviour.counts(flow.reply) {
            self.count.operations += 1;
            self.count.latency.saturating_record(flow.asked.elapsed().as_nanos() as u64);
        }
        match flow.step() {
            Step::Ask(reply) => self.ask(index, reply, Instant::now()),
            Step::AskAfter(reply, pause) => {
                let due = flow.asked + pause;
                flow.next_reply = reply;
                self.timers.push(Reverse((due, index)));
                Ok(())
            }
            Step::Reopen => {
                flow.socket = None;
                self.open(index)
            }
            Step::AskInWindow(reply) if self.phase == WINDOW => self.ask(index, reply, Instant::now()),
            Step::AskInWindow(_) => Ok(()),
            Step::Rest => {
                self.common.done.fetch_add(1, Relaxed);
                Ok(())
            }
        }
    }

    fn ask_what_is_due(&mut self) -> Result<()> {
        let now = Instant::now();
        while let Some(Reverse((due, index))) = self.timers.peek().copied().filter(|Reverse((due, _))| *due <= now) {
            self.timers.pop();
            // Latency counts from when it should have asked, or a slow subject would be asked less
            // often and look better for it.
            self.ask(index, self.flows[index].next_reply, due)?;
        }
        Ok(())
    }

    fn ask(&mut self, index: usize, reply: u64, now: Instant) -> Result<()> {
        let flow = &mut self.flows[index];
        flow.ask(reply, self.verify, now);
        flow.send(self.verify)?;
        self.watch(index)
    }

    /// Asks epoll for what the flow waits for now.
    fn watch(&mut self, index: usize) -> Result<()> {
        let flow = &mut self.flows[index];
        let wanted = flow.wanted();
        if let Some(socket) = flow.socket.as_ref().filter(|_| wanted != flow.interest) {
            epoll::modify(&self.epoll, socket, epoll::EventData::new_u64(index as u64), wanted)?;
            flow.interest = wanted;
        }
        Ok(())
    }
}

struct Flow {
    /// Of all connections of the load; it is the seed of its patterns, too.
    number: u64,
    behaviour: Behaviour,
    socket: Option<Socket>,
    connected: bool,
    interest: epoll::EventFlags,
    /// Of the hello and the requests: what was not taken yet.
    unsent: Vec<u8>,
    /// Where the upload is.
    uploaded: u64,
    /// When the present reply was asked for, its length, and what is still to come of it.
    asked: Instant,
    reply: u64,
    reply_left: u64,
    /// The length of the reply that a timer will ask for.
    next_reply: u64,
    /// Bytes of all replies on this connection, and whole replies.
    received: u64,
    replies: u64,
    is_warm: bool,
}

impl Flow {
    fn new(number: u64, behaviour: Behaviour) -> Self {
        Self {
            number,
            behaviour,
            socket: None,
            connected: false,
            interest: epoll::EventFlags::empty(),
            unsent: Vec::new(),
            uploaded: 0,
            asked: Instant::now(),
            reply: 0,
            reply_left: 0,
            next_reply: 0,
            received: 0,
            replies: 0,
            is_warm: false,
        }
    }

    /// For a new connection.
    fn reset(&mut self) {
        *self = Self { is_warm: self.is_warm, ..Self::new(self.number, self.behaviour) };
    }

    fn step(&self) -> Step {
        self.behaviour.step(self.replies)
    }

    fn ask(&mut self, reply: u64, verify: bool, now: Instant) {
        let upload = if self.replies == 0 { self.behaviour.upload() } else { 0 };
        self.unsent.extend_from_slice(&Request { reply, upload, seed: self.number, verify }.encode());
        self.asked = now;
        self.reply = reply;
        self.reply_left = reply;
    }

    /// Sends what waits, once.
    fn send(&mut self, verify: bool) -> Result<()> {
        let Some(mut socket) = self.socket.as_ref() else { return Ok(()) };
        if !self.connected {
            return Ok(());
        }
        let written = if !self.unsent.is_empty() {
            socket.write(&self.unsent)
        } else if self.behaviour == Behaviour::Upload {
            socket.write(uploaded(self.number).at(if verify { self.uploaded } else { 0 }, PIECE as u64))
        } else {
            return Ok(());
        };
        match written {
            Ok(n) if self.unsent.is_empty() => self.uploaded += n as u64,
            Ok(n) => drop(self.unsent.drain(..n)),
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => return Err(e).context("send"),
        }
        Ok(())
    }

    /// Receives once; how much.
    fn receive(&mut self, buffer: &mut [u8], verify: bool) -> Result<u64> {
        let Some(mut socket) = self.socket.as_ref() else { return Ok(0) };
        if self.behaviour == Behaviour::Stalled && self.received > 0 {
            return Ok(0);
        }
        let n = match socket.read(buffer) {
            Ok(0) => bail!("closed by the other side after {} bytes", self.received),
            Ok(n) => n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(0),
            Err(e) => return Err(e).with_context(|| format!("receive after {} bytes", self.received)),
        };
        if n as u64 > self.reply_left {
            bail!("{} bytes more than were asked for", n as u64 - self.reply_left);
        }
        if verify && let Err(at) = check(replied(self.number), self.received, &buffer[..n]) {
            bail!("wrong byte at position {at}");
        }
        self.received += n as u64;
        if self.reply_left != ENDLESS {
            self.reply_left -= n as u64;
        }
        Ok(n as u64)
    }

    fn wanted(&self) -> epoll::EventFlags {
        let stalled = self.behaviour == Behaviour::Stalled && self.received > 0;
        let sends = !self.unsent.is_empty() || self.behaviour == Behaviour::Upload;
        let mut wanted = epoll::EventFlags::empty();
        wanted.set(epoll::EventFlags::IN, !stalled);
        wanted.set(epoll::EventFlags::OUT, sends || !self.connected);
        wanted
    }

    fn warm_up(&mut self, common: &Common) {
        if !self.is_warm && self.received > 0 && self.replies >= self.behaviour.warm_up() {
            self.is_warm = true;
            common.warm.fetch_add(1, Relaxed);
        }
    }
}
