//! The program's rules and the daemon's against each other: the real [`governor`] and the real
//! [`Stream`]s of both directions, over a kernel that is played here and whose every choice is
//! random. It makes its steps between any two calls of the daemon, as if on another CPU.
//!
//! What must hold, whatever the schedule: the sinks accept exactly what the sources' peers sent, in
//! order; what waits in the kernel is bounded; a direction is complete only when its sink has
//! accepted all of it; and nobody sleeps for ever. The last tests break one rule each, and see that
//! it is noticed.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use common::sockmap::governor::{self, Action, BASE_KNOWN, SEGMENT_COST, Sink};
use common::sockmap::{Budget, Row};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use tokio::time::Instant;

use super::leaving::{Leaving, Step, View};
use super::stream::{Broken, Next, Phase, Ports, Received, Stream, Want};
use super::table::Signal;
use crate::engine::copy;
use crate::engine::in_kernel::Left;

/// Steps in which a connection whose parties are all willing must come to its end.
const PATIENCE: u32 = 200_000;

/// What is wrong on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Nothing,
    /// The kernel loses a segment that was redirected.
    LosesSegment,
    /// A sender does not respect the receive window.
    IgnoresWindow,
    /// The daemon does not wait until the sink has what the kernel sent on.
    SkipsProof,
    /// The barrier does not wait for a verdict that is running.
    SkipsBarrier,
    /// The program redirects although passed bytes are unconsumed.
    IgnoresUnread,
    /// The program does not cut off what came before.
    IgnoresOverlap,
    /// The program does not look at what is queued.
    IgnoresQueue,
    /// The program tells nothing.
    TellsNothing,
}

/// A connection and its circumstances.
#[allow(clippy::struct_excessive_bools)]
#[derive(Debug, Clone)]
struct Case {
    seed: u64,
    /// By side of the source: bytes that its peer sends.
    totals: [u32; 2],
    /// By side of the source: the largest segment.
    largest: [u32; 2],
    queue: u32,
    sndbuf: u32,
    rcvbuf: u32,
    leave_on_bulk: bool,
    /// Bytes that a socket had received, but nobody had read, when it went into the map.
    early: bool,
    /// Now and then the daemon does not want the kernel to forward.
    fickle: bool,
    /// When the connection should not stay in the map, it is taken out of it.
    leaves: bool,
    /// For so many steps the parties are moody: peers pause, workers dawdle. Then all are willing.
    moody: u32,
    /// One in so many chances to run is taken by the daemon.
    lazy: u64,
    /// Between one in so many instructions of the daemon others make steps.
    busy: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    let largest =
        || prop_oneof![1 => Just(1_u32), 2 => Just(700), 2 => Just(1_448), 1 => Just(16_384), 1 => Just(65_536)];
    let total =
        || prop_oneof![1 => Just(0_u32), 2 => 1..3_000_u32, 6 => 20_000..150_000_u32, 3 => 300_000..900_000_u32];
    let sizes = (
        prop_oneof![Just(4_096_u32), Just(16_384), Just(65_536), Just(262_144)],
        prop_oneof![Just(4_608_u32), Just(40_000), Just(400_000)],
        prop_oneof![Just(8_192_u32), Just(65_536), Just(300_000)],
    );
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    let pace = (0..60_000_u32, 1..12_u64, 1..10_u64);
    (any::<u64>(), [total(), total()], [largest(), largest()], sizes, flags, pace).prop_map(
        |(seed, mut totals, largest, (queue, sndbuf, rcvbuf), flags, (moody, lazy, busy))| {
            for (total, largest) in totals.iter_mut().zip(largest) {
                // Not more segments than can be played in a moment.
                *total = (*total).min(largest.saturating_mul(500));
            }
            let (leave_on_bulk, early, fickle, leaves) = flags;
            Case {
                seed,
                totals,
                largest,
                queue,
                sndbuf,
                rcvbuf,
                leave_on_bulk,
                early,
                fickle,
                leaves,
                moody,
                lazy,
                busy,
            }
        },
    )
}

/// SplitMix64.
#[derive(Debug)]
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Less than `n`.
    fn below(&mut self, n: u64) -> u64 {
        self.roll() % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// From 1 to `most`; often all, often little.
    fn some(&mut self, most: u64) -> u64 {
        match self.below(4) {
            0 => most,
            1 => 1 + self.below(most.min(1_500)),
            _ => 1 + self.below(most),
        }
    }
}

/// Bytes of a direction, by their place in its stream.
#[derive(Debug, Clone, Copy)]
struct Span {
    at: u64,
    len: u64,
}

/// The bytes of a stream: the byte at a place is the same in each run.
fn content(span: Span) -> Vec<u8> {
    (span.at..span.at + span.len).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

/// What waits in a socket's `psock->ingress_skb`.
#[derive(Debug, Clone, Copy)]
enum Queued {
    /// To be sent by this socket.
    Redirected(Span),
    /// To be read from this socket.
    Passed(Span),
}

/// How far the verdict on the head of the receive queue is.
#[derive(Debug, Clone, Copy)]
enum Verdict {
    /// The mode is known.
    Mode(u32),
    /// So is what the sink looks like.
    Sink(u32, Sink),
}

/// A socket in the map, and its peer.
#[derive(Debug)]
struct Socket {
    first_seq: u32,
    first_write_seq: u32,
    /// What its peer has sent, and so what was received, without FIN.
    received: u64,
    fin: bool,
    /// Received, without a verdict.
    receive_queue: VecDeque<Span>,
    /// Something was received just now, and the socket is locked until there is a verdict on all of
    /// `receive_queue`.
    locked: bool,
    verdict: Option<Verdict>,
    /// What recv(2) gives.
    readable: VecDeque<Span>,
    /// In the order in which the worker takes it.
    backlog: VecDeque<Queued>,
    /// Bytes that the send queue has ever accepted.
    accepted: u64,
    acknowledged: u64,
    /// A writer was turned away.
    no_space: bool,
    /// What epoll is asked for.
    wanted: [bool; 2],
}

impl Socket {
    fn new(dice: &mut Dice) -> Self {
        // Near the wrap more often than not.
        let sequence = |dice: &mut Dice| (dice.below(1 << 20) as u32).wrapping_sub(1 << 19);
        Self {
            first_seq: sequence(dice),
            first_write_seq: sequence(dice),
            received: 0,
            fin: false,
            receive_queue: VecDeque::new(),
            locked: false,
            verdict: None,
            readable: VecDeque::new(),
            backlog: VecDeque::new(),
            accepted: 0,
            acknowledged: 0,
            no_space: false,
            wanted: [false; 2],
        }
    }

    fn seq(&self, at: u64) -> u32 {
        self.first_seq.wrapping_add(at as u32)
    }

    fn send_queue(&self) -> u64 {
        self.accepted - self.acknowledged
    }

    /// Redirected bytes and segments that wait to be sent by this socket.
    fn waiting(&self) -> (u64, u64) {
        self.backlog.iter().fold((0, 0), |(bytes, segments), queued| match queued {
            Queued::Redirected(span) => (bytes + span.len, segments + 1),
            Queued::Passed(_) => (bytes, segments),
        })
    }

    /// What is charged to the receive buffer.
    fn charged(&self) -> u64 {
        let passed = self.backlog.iter().map(|queued| if let Queued::Passed(span) = queued { span.len } else { 0 });
        self.receive_queue.iter().chain(&self.readable).map(|span| span.len).sum::<u64>() + passed.sum::<u64>()
    }

    fn is_readable(&self) -> bool {
        self.fin || !self.readable.is_empty() || !self.receive_queue.is_empty()
    }
}

/// How a side is disposed for a while.
#[derive(Debug, Clone, Copy)]
struct Mood {
    /// How often its peer sends, its verdicts go on, its worker runs, its peer acknowledges.
    weights: [u64; 4],
    /// Its peer takes one in so many chances to send.
    pause: u64,
}

const WILLING: Mood = Mood { weights: [1, 3, 2, 2], pause: 1 };

impl Mood {
    fn any(dice: &mut Dice) -> Self {
        let weights = [(); 4].map(|()| dice.below(6).saturating_sub(1));
        Self { weights, pause: [1, 4, 20, 100][dice.below(4) as usize] }
    }
}

#[derive(Debug)]
struct Kernel {
    case: Case,
    fault: Fault,
    dice: Dice,
    sides: [Socket; 2],
    /// Bits of [`Signal`], by side.
    signals: [u32; 2],
    willing: bool,
    moods: [Mood; 2],
    /// No data is let in.
    quiet: bool,
    /// The kernel has lost a segment of the direction from this side.
    lost: [bool; 2],
    /// What was found to be wrong first.
    wrong: Option<String>,
}

#[derive(Debug)]
struct World {
    rows: [Row; 2],
    budget: Budget,
    kernel: RefCell<Kernel>,
}

impl Kernel {
    fn wrong(&mut self, what: impl Into<String>) {
        self.wrong.get_or_insert(what.into());
    }

    fn data_ready(&mut self, side: usize) {
        let socket = &self.sides[side];
        if socket.fin {
            self.signals[side] |= Signal::READABLE | Signal::ENDED;
        } else if socket.wanted[0] && socket.is_readable() {
            self.signals[side] |= Signal::READABLE;
        }
    }

    fn is_writable(&self, side: usize) -> bool {
        self.sides[side].send_queue() * 3 < u64::from(self.case.sndbuf) * 2
    }

    /// As `Registration::want`: what is ready already is told when the wish changes.
    fn want(&mut self, side: usize, wanted: [bool; 2]) {
        if self.sides[side].wanted == wanted {
            return;
        }
        self.sides[side].wanted = wanted;
        self.data_ready(side);
        if wanted[1] {
            if self.is_writable(side) {
                self.signals[side] |= Signal::WRITABLE;
            } else {
                self.sides[side].no_space = true;
            }
        }
    }

    /// Something before the bytes for this sink was lost by the kernel, which is not the rules'
    /// fault.
    fn has_gap(&self, sink: usize) -> bool {
        self.fault == Fault::LosesSegment && self.lost[1 - sink]
    }

    /// The sink's send queue takes bytes of the other side's stream.
    fn accept(&mut self, sink: usize, span: Span) {
        let expected = self.sides[sink].accepted;
        if span.at != expected && !self.has_gap(sink) {
            self.wrong(format!("order: the sink {sink} got byte {} instead of {expected}", span.at));
            return;
        }
        self.sides[sink].accepted += span.len;
        if self.sides[sink].accepted > self.sides[1 - sink].received {
            self.wrong("more was sent on than received");
        }
    }

    /// How much the sink's send queue would take of so many bytes, at random.
    fn room(&mut self, sink: usize, bytes: u64) -> u64 {
        let free = u64::from(self.case.sndbuf).saturating_sub(self.sides[sink].send_queue());
        let most = bytes.min(free);
        if most == 0 { 0 } else { self.dice.some(most) }
    }

    fn write(&mut self, sink: usize, bytes: &[u8]) -> io::Result<usize> {
        let n = self.room(sink, bytes.len() as u64);
        if n == 0 {
            self.sides[sink].no_space = true;
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let span = Span { at: self.sides[sink].accepted, len: n };
        if bytes[..n as usize] != content(span) && !self.has_gap(sink) {
            self.wrong(format!("order: other bytes than those at {} were written to the sink {sink}", span.at));
        }
        self.accept(sink, span);
        Ok(n as usize)
    }

    /// The peer sends a segment, FIN or both.
    fn arrive(&mut self, side: usize) -> bool {
        let (total, rcvbuf) = (u64::from(self.case.totals[side]), u64::from(self.case.rcvbuf));
        let largest = u64::from(self.case.largest[side]);
        let socket = &self.sides[side];
        if self.quiet || socket.locked || socket.fin {
            return false;
        }
        let window =
            if self.fault == Fault::IgnoresWindow { u64::MAX } else { rcvbuf.saturating_sub(socket.charged()) };
        let unsent = (total - socket.received).min(largest);
        let most = unsent.min(window);
        // A window is not opened by a little (RFC 9293 section 3.8.6.2.2).
        if most < unsent.min(rcvbuf / 2) {
            return false;
        }
        let new = if most == 0 { 0 } else { self.dice.some(most) };
        // Who has nothing more to send seldom says so while the other side still sends.
        let reluctance = match (self.willing, self.sides[1 - side].received < u64::from(self.case.totals[1 - side])) {
            (true, _) => 1 + u64::from(new > 0),
            (false, true) => 200,
            (false, false) => 4,
        };
        let ends = self.sides[side].received + new == total && self.dice.one_in(reluctance);
        if new == 0 && !ends {
            return false;
        }
        let socket = &mut self.sides[side];
        let back = if self.dice.one_in(6) { self.dice.below(socket.received.min(3_000) + 1) } else { 0 };
        socket.locked = true;
        socket.receive_queue.push_back(Span { at: socket.received - back, len: back + new });
        socket.received += new;
        if ends {
            socket.fin = true;
            // Comes before the verdict (net/ipv4/tcp_input.c, `tcp_data_queue`).
            self.data_ready(side);
        }
        true
    }

    fn acknowledge(&mut self, side: usize) -> bool {
        let unacknowledged = self.sides[side].send_queue();
        if unacknowledged == 0 {
            return false;
        }
        let n = self.dice.some(unacknowledged);
        self.sides[side].acknowledged += n;
        if self.sides[side].no_space && self.is_writable(side) {
            self.sides[side].no_space = false;
            if self.sides[side].wanted[1] {
                self.signals[side] |= Signal::WRITABLE;
            }
        }
        true
    }

    /// The worker gets rid of some of what waits in a socket.
    fn work(&mut self, side: usize) -> bool {
        match self.sides[side].backlog.front().copied() {
            None => false,
            Some(Queued::Passed(span)) => {
                self.sides[side].backlog.pop_front();
                self.sides[side].readable.push_back(span);
                self.data_ready(side);
                true
            }
            Some(Queued::Redirected(span)) => {
                if self.fault == Fault::LosesSegment && self.lost == [false; 2] && self.dice.one_in(8) {
                    self.lost[1 - side] = true;
                    self.sides[side].backlog.pop_front();
                    return true;
                }
                let n = self.room(side, span.len);
                if n == 0 {
                    self.sides[side].no_space = true;
                    if !matches!(
                        self.fault,
                        Fault::IgnoresQueue | Fault::IgnoresUnread | Fault::SkipsProof | Fault::SkipsBarrier
                    ) {
                        self.wrong("what was redirected has to wait for the peer");
                    }
                    return false;
                }
                self.accept(side, Span { at: span.at, len: n });
                let backlog = &mut self.sides[side].backlog;
                if n == span.len {
                    backlog.pop_front();
                } else {
                    backlog[0] = Queued::Redirected(Span { at: span.at + n, len: span.len - n });
                }
                true
            }
        }
    }

    fn look_at(&self, sink: usize) -> Sink {
        let socket = &self.sides[sink];
        Sink {
            write_seq: socket.first_write_seq.wrapping_add(socket.accepted as u32),
            wmem_queued: socket.send_queue() as u32,
            sndbuf: self.case.sndbuf,
        }
    }
}

impl World {
    fn new(case: &Case, fault: Fault) -> Self {
        let mut dice = Dice(case.seed);
        let sides = [Socket::new(&mut dice), Socket::new(&mut dice)];
        let world = Self {
            rows: [Row::default(), Row::default()],
            budget: Budget::default(),
            kernel: RefCell::new(Kernel {
                case: case.clone(),
                fault,
                dice,
                sides,
                signals: [0; 2],
                willing: false,
                moods: [WILLING; 2],
                quiet: false,
                lost: [false; 2],
                wrong: None,
            }),
        };
        world.budget.flood.set(case.rcvbuf + 256 * 1024);
        world.budget.queue.set(if fault == Fault::IgnoresQueue { u32::MAX } else { case.queue });
        for row in &world.rows {
            row.leave_on_bulk.set(u32::from(case.leave_on_bulk));
        }
        if case.early {
            let mut kernel = world.kernel.borrow_mut();
            for side in 0..2 {
                kernel.arrive(side);
                kernel.sides[side].locked = false;
            }
        }
        world
    }

    /// The program, up to its next look at what others write.
    fn verdict(&self, kernel: &mut Kernel, side: usize) -> bool {
        let Some(span) = kernel.sides[side].receive_queue.front().copied() else { return false };
        let row = &self.rows[side];
        match kernel.sides[side].verdict {
            None => kernel.sides[side].verdict = Some(Verdict::Mode(row.mode.get())),
            Some(Verdict::Mode(mode)) => {
                kernel.sides[side].verdict = Some(Verdict::Sink(mode, kernel.look_at(1 - side)));
            }
            Some(Verdict::Sink(mode, sink)) => {
                kernel.sides[side].verdict = None;
                kernel.sides[side].receive_queue.pop_front();
                if span.len > 0 {
                    self.decide(kernel, side, span, sink, mode);
                }
                kernel.sides[side].locked &= !kernel.sides[side].receive_queue.is_empty();
                kernel.data_ready(side);
            }
        }
        true
    }

    fn decide(&self, kernel: &mut Kernel, side: usize, span: Span, sink: Sink, mode: u32) {
        let row = &self.rows[side];
        let socket = &kernel.sides[side];
        // Nothing was read before the first verdict.
        let before = governor::overlap(row, socket.seq(span.at), span.len as u32, || Some(socket.seq(0)));
        let before = if kernel.fault == Fault::IgnoresOverlap { 0 } else { u64::from(before) };
        let span = Span { at: span.at + before, len: span.len - before };
        if span.len == 0 {
            return;
        }
        // The mode is the first that `judge` reads: it may have changed since.
        let mode_now = row.mode.get();
        row.mode.set(mode);
        let consumed = row.consumed.get();
        if kernel.fault == Fault::IgnoresUnread {
            row.consumed.set(row.passed.get());
        }
        let action = governor::judge(row, &self.rows[1 - side], &self.budget, span.len as u32, || Some(sink));
        row.mode.set(mode_now);
        row.consumed.set(consumed);
        if row.known.get() & BASE_KNOWN != 0 && row.base.get() != kernel.sides[1 - side].first_write_seq {
            kernel.wrong("base: where the sink began is not where it began".to_owned());
        }

        let tell = match action {
            Action::Redirect => {
                kernel.sides[1 - side].backlog.push_back(Queued::Redirected(span));
                let (bytes, segments) = kernel.sides[1 - side].waiting();
                if bytes + (segments - 1) * u64::from(SEGMENT_COST) > u64::from(kernel.case.queue) {
                    kernel.wrong(format!("bound: {segments} segments of {bytes} bytes wait"));
                }
                false
            }
            Action::Pass { tell } => {
                let socket = &mut kernel.sides[side];
                if socket.backlog.is_empty() {
                    socket.readable.push_back(span);
                } else {
                    socket.backlog.push_back(Queued::Passed(span));
                }
                tell
            }
            Action::Drop { tell } => {
                kernel.lost[side] = true;
                tell
            }
        };
        if tell && kernel.fault != Fault::TellsNothing {
            kernel.signals[side] |= Signal::ROW;
        }
    }

    /// Takes a socket's lock: what has begun with the socket locked is over.
    fn lock(&self, kernel: &mut Kernel, side: usize) {
        while kernel.sides[side].locked {
            self.verdict(kernel, side);
        }
    }

    /// One step of anybody but the daemon; false when nobody can or will.
    fn step(&self) -> bool {
        let mut kernel = self.kernel.borrow_mut();
        let kernel = &mut *kernel;
        if kernel.dice.one_in(100) {
            kernel.moods = [Mood::any(&mut kernel.dice), Mood::any(&mut kernel.dice)];
        }
        let moods = if kernel.willing { [WILLING; 2] } else { kernel.moods };
        let weights = moods.map(|mood| mood.weights);
        let mut chosen = kernel.dice.below(weights.iter().flatten().sum::<u64>().max(1));
        let first = weights.iter().flatten().position(|weight| {
            let here = chosen < *weight;
            chosen = chosen.saturating_sub(*weight);
            here
        });
        let first = first.unwrap_or(0);
        let moved = (first..first + 8).map(|who| (who / 4 % 2, who % 4)).any(|(side, what)| {
            weights[side][what] > 0
                && match what {
                    0 => kernel.dice.one_in(moods[side].pause) && kernel.arrive(side),
                    1 => kernel.sides[side].locked && self.verdict(kernel, side),
                    2 => kernel.work(side),
                    _ => kernel.acknowledge(side),
                }
        });
        if !moved {
            kernel.moods = [Mood::any(&mut kernel.dice), Mood::any(&mut kernel.dice)];
        }
        moved
    }

    /// What others do while the daemon is between two instructions.
    fn meanwhile(&self) {
        let steps = {
            let mut kernel = self.kernel.borrow_mut();
            let busy = kernel.case.busy;
            if kernel.dice.one_in(busy) { kernel.dice.below(6) } else { 0 }
        };
        for _ in 0..steps {
            self.step();
        }
    }
}

/// The sockets of the direction from this side.
struct Direction<'a> {
    world: &'a World,
    from: usize,
}

impl Ports for Direction<'_> {
    fn row(&self) -> &Row {
        self.world.meanwhile();
        &self.world.rows[self.from]
    }

    fn barrier(&mut self) -> io::Result<Received> {
        self.world.meanwhile();
        let mut kernel = self.world.kernel.borrow_mut();
        if kernel.fault != Fault::SkipsBarrier {
            self.world.lock(&mut kernel, self.from);
        }
        Ok(Received { bytes: kernel.sides[self.from].received, reset: false })
    }

    fn accepted(&mut self) -> io::Result<u64> {
        self.world.meanwhile();
        let mut kernel = self.world.kernel.borrow_mut();
        let accepted = kernel.sides[1 - self.from].accepted;
        let unseen = if kernel.dice.one_in(4) { kernel.dice.below(2_000) } else { 0 };
        Ok(if kernel.fault == Fault::SkipsProof { u64::MAX } else { accepted.saturating_sub(unseen) })
    }

    fn source_has_backlog(&mut self) -> io::Result<bool> {
        self.world.meanwhile();
        Ok(self.world.kernel.borrow().sides[self.from].waiting().0 > 0)
    }

    fn step(&mut self) -> io::Result<copy::Step> {
        let bytes = self.take()?;
        let mut written = 0;
        while written < bytes.len() {
            match self.write(&bytes[written..]) {
                Ok(n) => written += n,
                Err(_) => break,
            }
        }
        Ok(copy::Step { read: bytes.len(), written, rest: bytes[written..].to_vec(), write_error: None })
    }

    fn read(&mut self, rest: &mut Vec<u8>) -> io::Result<usize> {
        let read = self.take()?;
        rest.extend_from_slice(&read);
        Ok(read.len())
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.world.meanwhile();
        self.world.kernel.borrow_mut().write(1 - self.from, bytes)
    }
}

impl Direction<'_> {
    /// Takes some of what the source has for userspace; nothing at the end of the stream.
    fn take(&mut self) -> io::Result<Vec<u8>> {
        self.world.meanwhile();
        let mut kernel = self.world.kernel.borrow_mut();
        self.world.lock(&mut kernel, self.from);
        // What came before the socket was in the map has its verdict now (net/ipv4/tcp_bpf.c,
        // `tcp_bpf_recvmsg_parser`).
        while self.world.verdict(&mut kernel, self.from) {}
        let Some(head) = kernel.sides[self.from].readable.front().copied() else {
            return if kernel.sides[self.from].fin { Ok(Vec::new()) } else { Err(io::ErrorKind::WouldBlock.into()) };
        };
        let read = head.len.min(kernel.dice.some(copy::CHUNK as u64));
        let readable = &mut kernel.sides[self.from].readable;
        if read == head.len {
            readable.pop_front();
        } else {
            readable[0] = Span { at: head.at + read, len: head.len - read };
        }
        Ok(content(Span { at: head.at, len: read }))
    }
}

/// How a connection ended.
#[derive(Debug, Default)]
struct Ended {
    complete: [bool; 2],
    /// It was taken out of the map.
    left: bool,
    /// That was for another process, and bytes went along.
    halted: bool,
    unsent: bool,
    broken: Option<&'static str>,
    lost: [bool; 2],
    redirected: u64,
    passed: u64,
    trimmed: u64,
    /// How often userspace gave a direction back to the kernel.
    returns: u32,
}

impl Ended {
    /// A direction of which something was lost passes for one that was forwarded whole.
    fn claims_what_is_lost(&self) -> bool {
        (0..2).any(|side| self.lost[side] && (self.complete[side] || self.left))
    }
}

/// What `Flow` does, without sockets.
struct Daemon<'a> {
    world: &'a World,
    streams: [Stream; 2],
    now: Instant,
    next: Next,
    want: Want,
    leaving: Leaving,
    /// The connection is to be handed to another process.
    halts: bool,
    ended: Ended,
}

impl<'a> Daemon<'a> {
    fn new(world: &'a World) -> Self {
        let now = Instant::now();
        Self {
            world,
            streams: [Stream::new(now), Stream::new(now)],
            now,
            next: Next::Turn,
            want: Want::Kernel,
            leaving: Leaving::new(now, None),
            halts: false,
            ended: Ended::default(),
        }
    }

    fn is_awake(&self, kernel: &Kernel) -> bool {
        kernel.signals != [0; 2]
            || match self.next {
                Next::Turn => true,
                Next::At(at) => self.now >= at,
                Next::Event => false,
            }
    }

    fn is_over(&self) -> bool {
        self.ended.left || self.ended.broken.is_some() || self.ended.complete == [true; 2]
    }

    fn run(&mut self, case: &Case) -> Result<(), String> {
        self.hear();
        let fickle = case.fickle && self.world.kernel.borrow_mut().dice.one_in(8);
        self.want = if fickle { Want::Userspace } else { self.leaving.want(self.now) };
        self.next = Next::Event;
        for from in 0..2 {
            let was = self.streams[from].phase;
            let own = self.streams[from].advance(&mut Direction { world: self.world, from }, self.now, self.want);
            let next = match own {
                Ok(next) => next,
                Err(Broken::Unproven(why)) => {
                    self.ended.broken = Some(why);
                    return Ok(());
                }
                Err(broken) => return Err(format!("{broken:?}")),
            };
            self.next = sooner(self.next, next);
            let phase = self.streams[from].phase;
            self.ended.returns += u32::from(was != Phase::Kernel && phase == Phase::Kernel);
            if phase == Phase::Complete && !self.ended.complete[from] && !self.streams[from].is_blocked() {
                self.ended.complete[from] = true;
                self.all_accepted(from, "complete")?;
            }
            if self.streams[from].left_for() == Some(governor::Reason::Bulk) {
                self.leave_soon(Left::Bulk);
            }
        }
        if self.ended.complete != [false; 2] {
            self.leave_soon(Left::Ending);
        }
        if self.halts && self.leaving.halt(self.now) {
            self.next = Next::Turn;
        }
        if case.leaves || self.halts {
            self.leave()?;
        }
        let mut kernel = self.world.kernel.borrow_mut();
        for (side, (source, sink)) in self.streams.iter().zip(self.streams.iter().rev()).enumerate() {
            kernel.want(side, [source.phase == Phase::Userspace && !source.is_blocked(), sink.is_blocked()]);
        }
        Ok(())
    }

    /// What the daemon has to do is told to it, or it has a timer of its own.
    fn sleeps_well(&self) -> Result<(), String> {
        let kernel = self.world.kernel.borrow();
        if self.is_awake(&kernel) {
            return Ok(());
        }
        for (side, stream) in self.streams.iter().enumerate() {
            let (row, source, sink) = (&self.world.rows[side], &kernel.sides[side], &kernel.sides[1 - side]);
            let missed = match stream.phase {
                Phase::Kernel => row.passed.get() != stream.written() || source.fin,
                Phase::Userspace if stream.is_blocked() => sink.send_queue() == 0,
                Phase::Userspace => self.next == Next::Event && !source.readable.is_empty(),
                Phase::Proving | Phase::Complete => false,
            };
            if missed {
                return Err(format!("asleep: {stream:?} was not told of {row:?}"));
            }
        }
        Ok(())
    }

    fn hear(&mut self) {
        let bits = std::mem::take(&mut self.world.kernel.borrow_mut().signals);
        for (side, own) in bits.into_iter().enumerate() {
            self.streams[side].readable |= own & Signal::READABLE != 0;
            self.streams[side].source_ended |= own & Signal::ENDED != 0;
            self.streams[1 - side].writable |= own & Signal::WRITABLE != 0;
        }
    }

    fn leave_soon(&mut self, why: Left) {
        if self.leaving.note(Some(why)) {
            self.next = Next::Turn;
        }
    }

    /// Does the steps of the real [`Leaving`] to the kernel that is played.
    fn leave(&mut self) -> Result<(), String> {
        let view = View::of(self.streams.iter(), false);
        let (streams, rows) = (&self.streams, &self.world.rows);
        let collects = self.leaving.collects(self.now);
        let is_drained = || {
            let of = |(stream, row): (&Stream, &Row)| {
                if collects { stream.is_collected(row) } else { stream.is_drained(row) }
            };
            streams.iter().zip(rows).all(of)
        };
        match self.leaving.step(self.now, view, is_drained) {
            Step::Wait(None) => {}
            Step::Wait(Some(at)) => self.next = sooner(self.next, Next::At(at)),
            Step::KeepDataAway => {
                let mut kernel = self.world.kernel.borrow_mut();
                kernel.quiet = true;
                // What had begun is waited for.
                for side in 0..2 {
                    self.world.lock(&mut kernel, side);
                }
                drop(kernel);
                for side in (0..2).filter(|side| !self.ended.complete[*side]) {
                    self.streams[side].readable = true;
                }
                self.leaving.kept_away(self.now);
                self.next = Next::Turn;
            }
            Step::LetDataIn => {
                self.world.kernel.borrow_mut().quiet = false;
                self.next = Next::Turn;
            }
            Step::TakeOut(_) => {
                self.world.meanwhile();
                self.ended.left = true;
                self.ended.halted = self.halts;
                self.ended.unsent = self.streams.iter().any(Stream::is_blocked);
                return (0..2).try_for_each(|side| self.all_accepted(side, "drained"));
            }
            Step::Finish => return Err("a FIN that nobody owes".to_owned()),
        }
        Ok(())
    }

    /// Nothing of this direction is anywhere but in the sink.
    fn all_accepted(&self, from: usize, what: &str) -> Result<(), String> {
        let kernel = self.world.kernel.borrow();
        let (source, sink) = (&kernel.sides[from], &kernel.sides[1 - from]);
        if what == "complete" && (!source.fin || source.received < u64::from(kernel.case.totals[from])) {
            return Err(format!("{what} before the end of the stream"));
        }
        let left_behind = source.charged() + sink.waiting().0;
        let unsent = self.streams[from].rest();
        if sink.accepted + unsent.len() as u64 != source.received || left_behind != 0 {
            return Err(format!(
                "{what}: of {} bytes received {} are accepted and {} go along, and {left_behind} are still on their way",
                source.received,
                sink.accepted,
                unsent.len()
            ));
        }
        if content(Span { at: sink.accepted, len: unsent.len() as u64 }) != unsent {
            return Err(format!("order: what goes along is not what follows {}", sink.accepted));
        }
        Ok(())
    }
}

fn sooner(a: Next, b: Next) -> Next {
    match (a, b) {
        (Next::Turn, _) | (_, Next::Turn) => Next::Turn,
        (Next::At(a), Next::At(b)) => Next::At(a.min(b)),
        (Next::At(at), Next::Event) | (Next::Event, Next::At(at)) => Next::At(at),
        (Next::Event, Next::Event) => Next::Event,
    }
}

/// Plays a connection to its end; the error says what must not be.
fn play(case: &Case, fault: Fault) -> Result<Ended, String> {
    play_until(case, fault, usize::MAX)
}

/// The same; from this step on it is to be handed to another process, and its readers do not help.
fn play_until(case: &Case, fault: Fault, halt: usize) -> Result<Ended, String> {
    let world = World::new(case, fault);
    let mut daemon = Daemon::new(&world);
    for step in 0..case.moody + PATIENCE {
        daemon.halts = step as usize >= halt;
        let willing = step >= case.moody && !daemon.halts;
        if daemon.halts && step as usize == halt {
            // Whoever halts it wakes it.
            daemon.next = Next::Turn;
        }
        let runs = {
            let mut kernel = world.kernel.borrow_mut();
            kernel.willing = willing;
            daemon.now += Duration::from_micros(kernel.dice.below(1_000));
            // A flow also wakes for reasons that are not a stream's.
            let awake = daemon.is_awake(&kernel) || (case.fickle && kernel.dice.one_in(20));
            awake && kernel.dice.one_in(case.lazy)
        };
        if runs {
            daemon.run(case)?;
        } else if !world.step() {
            // Nobody else does anything: the daemon's turn, or its timer's.
            let awake = daemon.is_awake(&world.kernel.borrow());
            if awake {
                daemon.run(case)?;
            } else if let Next::At(at) = daemon.next {
                daemon.now = at;
            } else if willing || daemon.halts {
                return Err(format!("hang: {:?} sleeps over {world:?}", daemon.streams));
            }
        } else if let Next::At(at) = daemon.next
            && world.kernel.borrow_mut().dice.one_in(16)
        {
            daemon.now = daemon.now.max(at);
        }
        if let Some(wrong) = world.kernel.borrow_mut().wrong.take() {
            return Err(wrong);
        }
        if daemon.is_over() {
            let mut ended = daemon.ended;
            ended.lost = world.kernel.borrow().lost;
            for row in &world.rows {
                ended.redirected += row.redirected.get();
                ended.passed += row.passed.get();
                ended.trimmed += u64::from(row.trimmed.get());
            }
            return Ok(ended);
        }
        daemon.sleeps_well()?;
    }
    Err(format!("hang: {:?} goes round and round over {world:?}", daemon.streams))
}

/// The same cases each time.
fn sample(count: usize) -> impl Iterator<Item = Case> {
    let mut runner = TestRunner::deterministic();
    (0..count).map(move |_| cases().new_tree(&mut runner).expect("a case").current())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, max_shrink_iters: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_byte_is_forwarded_once_and_in_order_and_nobody_sleeps_for_ever(case in cases()) {
        let ended = play(&case, Fault::Nothing).map_err(TestCaseError::fail)?;
        prop_assert_eq!(ended.broken, None);
        prop_assert!(ended.left || ended.complete == [true; 2]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn at_any_moment_it_can_be_handed_to_another_process_with_every_byte(case in cases(), halt in 0..3_000_usize) {
        let ended = play_until(&case, Fault::Nothing, halt).map_err(TestCaseError::fail)?;
        prop_assert_eq!(ended.broken, None);
        prop_assert!(ended.left || ended.complete == [true; 2]);
    }
}

#[test]
fn what_a_slow_reader_has_not_taken_goes_along() {
    let (mut halted, mut unsent) = (0, 0);
    for case in sample(300) {
        for halt in [200, 600, 1_800] {
            let ended = play_until(&case, Fault::Nothing, halt).unwrap_or_else(|wrong| panic!("{wrong}: {case:?}"));
            halted += u32::from(ended.halted);
            unsent += u32::from(ended.unsent);
        }
    }
    assert!(halted > 400 && unsent > 1, "{halted} {unsent}");
}

#[test]
fn the_cases_lead_everywhere() {
    let mut sum = Ended::default();
    let (mut left, mut both_ways) = (0, 0);
    for case in sample(200) {
        let ended = play(&case, Fault::Nothing).unwrap_or_else(|wrong| panic!("{wrong}: {case:?}"));
        sum.redirected += ended.redirected;
        sum.passed += ended.passed;
        sum.trimmed += ended.trimmed;
        sum.returns += ended.returns;
        left += u32::from(ended.left);
        both_ways += u32::from(ended.redirected > 0 && ended.passed > 0);
    }
    assert!(sum.redirected > 5_000_000 && sum.passed > 5_000_000 && sum.trimmed > 100_000, "{sum:?}");
    assert!(sum.returns > 500 && left > 40 && both_ways > 80, "{sum:?} {left} {both_ways}");
}

#[test]
fn a_stream_of_which_the_kernel_lost_something_is_never_complete() {
    let mut endless = 0;
    for case in sample(100) {
        match play(&case, Fault::LosesSegment) {
            // The proof never succeeds; the connection's idle timeout ends it.
            Err(wrong) => {
                assert!(wrong.starts_with("hang: "), "{wrong}: {case:?}");
                endless += 1;
            }
            Ok(ended) => assert!(!ended.claims_what_is_lost(), "{case:?}"),
        }
    }
    assert!(endless > 20, "{endless}");
}

#[test]
fn a_flood_ends_the_connection_and_nothing_is_sent_on_from_behind_the_gap() {
    let mut broken = 0;
    for case in sample(300) {
        let ended = play(&case, Fault::IgnoresWindow).unwrap_or_else(|wrong| panic!("{wrong}: {case:?}"));
        assert!(!ended.claims_what_is_lost(), "{case:?}");
        broken += u32::from(ended.broken.is_some());
    }
    assert!(broken > 10, "{broken}");
}

/// In how many of the cases the model finds something of this kind.
fn found(fault: Fault, kind: &str) -> usize {
    sample(300).filter(|case| play(case, fault).is_err_and(|wrong| wrong.starts_with(kind))).count()
}

#[test]
fn the_model_notices_when_userspace_overtakes_redirected_bytes() {
    assert!(found(Fault::SkipsProof, "order") > 50);
}

#[test]
fn the_model_notices_when_the_kernel_overtakes_passed_bytes() {
    assert!(found(Fault::IgnoresUnread, "order") > 10);
}

#[test]
fn the_model_notices_a_barrier_that_does_not_wait() {
    assert!(found(Fault::SkipsBarrier, "") > 10);
}

#[test]
fn the_model_notices_doubled_bytes() {
    assert!(found(Fault::IgnoresOverlap, "order") > 100);
}

#[test]
fn the_model_notices_an_unbounded_queue() {
    assert!(found(Fault::IgnoresQueue, "bound") > 50);
}

#[test]
fn the_model_notices_an_event_that_is_not_told() {
    assert!(found(Fault::TellsNothing, "asleep") > 50);
}
