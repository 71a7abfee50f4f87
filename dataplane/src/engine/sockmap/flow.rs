//! One connection in the sockmap, from the insertion of its sockets until it ends or goes back to the relay.
//!
//! What is decided for each direction is in [`Stream`]; here are the sockets, the waiting, and the order in which sockets go into the map and out of it.

use std::future::{Future, poll_fn};
use std::io;
use std::net::{Shutdown, TcpStream as StdStream};
use std::os::fd::AsFd;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use common::Row;
use common::governor::{BULK_BYTES, RUN, Reason};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until};

use super::reactor::{self, Registration};
use super::stream::{Broken, Next, Phase, Ports, Received, Stream, Want};
use super::table::{Place, Signal, Table};
use crate::ebpf::Programs;
use crate::engine::watch::Watch;
use crate::engine::{End, Legs, Path, Side, StreamState, Timeouts, Traffic, copy, ended_by};
use crate::sys;

/// How long data is kept away from a socket that leaves the map, until both directions have nothing left to forward. Its sender sees a loss.
const PATIENCE: Duration = Duration::from_millis(100);

/// How long to let a direction go on before the next attempt to leave, doubling.
const LEAVE_AGAIN: Duration = Duration::from_secs(1);
const LONGEST_LEAVE_AGAIN: Duration = Duration::from_secs(16);

/// How long a FIN may wait for the socket to leave the map, before it is sent by a socket that is still there.
const FIN_PATIENCE: Duration = Duration::from_millis(300);

const SIDES: [Side; 2] = [Side::Client, Side::Upstream];

/// What became of a connection.
pub enum Outcome {
    /// It has ended.
    Ended(End),
    /// It is not in the map any more, or never was: the relay goes on with it.
    Left(Legs, Left),
}

/// Why a connection went back to the relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// It had no place in the map.
    Refused,
    /// It carries bulk.
    Bulk,
    /// One side has ended; passing that on needs a socket that is not in the map.
    Ending,
}

/// Forwards in the kernel, for as long as that is good for the connection.
pub async fn forward(
    table: &Arc<Table>,
    legs: Legs,
    leave_on_bulk: bool,
    timeouts: Timeouts,
    traffic: &Traffic,
) -> Outcome {
    match Flow::engage(table, legs, leave_on_bulk, traffic) {
        Ok(flow) => flow.run(timeouts).await,
        Err(Refused::Whole(legs)) => Outcome::Left(legs, Left::Refused),
        Err(Refused::Broken(error)) => lost(&error),
    }
}

fn lost(error: &io::Error) -> Outcome {
    tracing::warn!(%error, "a connection was lost on its way into the sockmap or out of it");
    Outcome::Ended(End::Error)
}

enum Refused {
    /// Nothing was done to the connection.
    Whole(Legs),
    /// It is lost.
    Broken(io::Error),
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

/// What others may look at while the connection is in the map. Dropped in this order: the place goes when the sockets are closed.
#[derive(Debug)]
pub struct Engaged {
    /// By side.
    sockets: [StdStream; 2],
    /// By side of the sink: bytes that its send queue had accepted before.
    accepted_before: [u64; 2],
    place: Place,
}

impl Engaged {
    /// Bytes that the kernel has sent on, of the direction from this side.
    pub fn redirected(&self, from: Side) -> u64 {
        self.place.row(from).redirected.get()
    }

    /// Whether the kernel forwards both ways.
    pub fn is_in_kernel(&self) -> bool {
        let runs = |from: Side| {
            let row = self.place.row(from);
            row.mode.get() == RUN && row.passed.get() == row.consumed.get()
        };
        SIDES.into_iter().all(runs)
    }

    /// Bytes that are queued in the kernel on our behalf: redirected, and not yet accepted by the sink.
    pub fn backlog(&self) -> u64 {
        // A socket that cannot be asked has none.
        SIDES.into_iter().map(|from| self.backlog_from(from).unwrap_or(0)).sum()
    }

    fn backlog_from(&self, from: Side) -> io::Result<u64> {
        let row = self.place.row(from);
        let sent_on = row.redirected.get() + row.consumed.get();
        Ok(sent_on.saturating_sub(self.accepted(from.other())?))
    }

    /// Bytes that this side's send queue has accepted since it went into the map, at least.
    fn accepted(&self, side: Side) -> io::Result<u64> {
        // Less than at the beginning, when an acknowledgement of earlier bytes comes between the two questions.
        Ok(accepted(&self.sockets[side as usize])?.saturating_sub(self.accepted_before[side as usize]))
    }

    /// Since when no byte came.
    pub fn idle(&self) -> Duration {
        // The clock is asked last: it has not been before any of them.
        let last = SIDES.map(|from| self.place.row(from).last_ms.get());
        let now = coarse_ms();
        Duration::from_millis(last.map(|last| u64::from(now.wrapping_sub(last))).into_iter().min().unwrap_or(0))
    }
}

/// The clock of [`Row::last_ms`].
fn coarse_ms() -> u32 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicCoarse);
    (now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000) as u32
}

/// Ends the sharing of an [`Engaged`].
struct Shared<'a>(&'a Traffic);

impl Drop for Shared<'_> {
    fn drop(&mut self) {
        drop(self.0.disengage());
    }
}

/// Dropped in this order: what is shared comes back before the sockets are closed.
struct Flow<'a> {
    traffic: Shared<'a>,
    /// Shared with whoever looks at [`Traffic`], who keeps it for no longer than the look.
    engaged: Arc<Engaged>,
    /// By side of the source.
    streams: [Stream; 2],
    /// By side of the source: what it had received before.
    received_before: [u64; 2],
    /// By side.
    registrations: [Option<Registration>; 2],
    /// By side.
    in_map: [bool; 2],
    /// By side of the source: what of the stream's bytes was counted.
    counted: [u64; 2],
    leave_on_bulk: bool,
    /// By side: we have sent FIN on this socket.
    fin_sent: [bool; 2],
}

/// A direction's sockets.
struct Sockets<'a> {
    engaged: &'a Engaged,
    from: Side,
    received_before: u64,
}

impl Sockets<'_> {
    fn source(&self) -> &StdStream {
        &self.engaged.sockets[self.from as usize]
    }

    fn sink(&self) -> &StdStream {
        &self.engaged.sockets[self.from.other() as usize]
    }
}

impl Ports for Sockets<'_> {
    fn row(&self) -> &Row {
        self.engaged.place.row(self.from)
    }

    fn barrier(&mut self) -> io::Result<Received> {
        // TCP_INFO takes the socket's lock (net/ipv4/tcp.c, `tcp_get_info`).
        let info = sys::tcp_info(self.source())?;
        // FIN has a place in the sequence, and so in this count.
        let fin = u64::from(info.state == sys::TCP_CLOSE_WAIT);
        Ok(Received {
            bytes: (info.bytes_received - fin).saturating_sub(self.received_before),
            reset: info.state == sys::TCP_CLOSE,
        })
    }

    fn accepted(&mut self) -> io::Result<u64> {
        self.engaged.accepted(self.from.other())
    }

    fn source_has_backlog(&mut self) -> io::Result<bool> {
        Ok(self.engaged.backlog_from(self.from.other())? > 0)
    }

    fn step(&mut self) -> io::Result<copy::Step> {
        copy::step(self.source(), self.sink())
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        copy::write(self.sink(), bytes)
    }
}

/// Bytes that a socket's send queue has ever accepted, at least: what was acknowledged is asked first, so that what is acknowledged meanwhile counts once.
fn accepted(socket: impl AsFd + Copy) -> io::Result<u64> {
    let acknowledged = sys::tcp_info(socket)?.bytes_acked;
    Ok(acknowledged + u64::from(sys::unacknowledged(socket)?))
}

/// The same exactly, of a socket to which nobody writes.
fn accepted_exactly(socket: impl AsFd + Copy) -> io::Result<u64> {
    loop {
        let before = sys::tcp_info(socket)?.bytes_acked;
        let queued = sys::unacknowledged(socket)?;
        if sys::tcp_info(socket)?.bytes_acked == before {
            return Ok(before + u64::from(queued));
        }
    }
}

/// Bytes that were received and read. `None` when the socket is not established on both sides.
fn read_exactly(socket: impl AsFd + Copy) -> io::Result<Option<u64>> {
    loop {
        let before = sys::tcp_info(socket)?;
        let unread = rustix::io::ioctl_fionread(socket)?;
        let after = sys::tcp_info(socket)?;
        if after.state != sys::TCP_ESTABLISHED {
            return Ok(None);
        }
        if after.bytes_received == before.bytes_received {
            return Ok(Some(before.bytes_received - unread));
        }
    }
}

impl<'a> Flow<'a> {
    /// Puts both sockets into the map, on hold. If only one can be put in, because the other's peer has just sent FIN, the flow has to leave at once.
    fn engage(table: &Arc<Table>, legs: Legs, leave_on_bulk: bool, traffic: &'a Traffic) -> Result<Self, Refused> {
        let (Some(mut place), Ok(epoll)) = (table.take(), reactor::of_this_worker(table)) else {
            return Err(Refused::Whole(legs));
        };
        let read = [read_exactly(&legs.client)?, read_exactly(&legs.upstream)?];
        let [Some(client_received), Some(upstream_received)] = read else { return Err(Refused::Whole(legs)) };
        let accepted_before = [accepted_exactly(&legs.client)?, accepted_exactly(&legs.upstream)?];
        for side in SIDES {
            let row = place.row(side);
            row.leave_on_bulk.set(u32::from(leave_on_bulk));
            row.last_ms.set(coarse_ms());
        }
        // From here on the sockets belong to this worker's epoll instance.
        let sockets = [legs.client.into_std()?, legs.upstream.into_std()?];
        let mut registrations = [None, None];
        for side in SIDES {
            let socket = &sockets[side as usize];
            registrations[side as usize] = Some(Registration::new(epoll.clone(), &place, side, socket)?);
        }
        let mut in_map = [false; 2];
        // The sink of a direction has to be there before its source.
        for side in [Side::Upstream, Side::Client] {
            if let Err(error) = place.insert(side, &sockets[side as usize]) {
                tracing::debug!(?side, %error, "not taken by the sockmap");
                break;
            }
            in_map[side as usize] = true;
        }
        let now = Instant::now();
        let engaged = Arc::new(Engaged { sockets, accepted_before, place });
        traffic.engage(engaged.clone());
        Ok(Self {
            engaged,
            streams: [Stream::new(now), Stream::new(now)],
            received_before: [client_received, upstream_received],
            registrations,
            in_map,
            counted: [0; 2],
            leave_on_bulk,
            fin_sent: [false; 2],
            traffic: Shared(traffic),
        })
    }

    async fn run(mut self, timeouts: Timeouts) -> Outcome {
        let mut watch = Watch::unattended(timeouts);
        let mut leaving = SIDES.into_iter().any(|side| !self.is_in_map(side)).then_some(Left::Refused);
        let (mut not_before, mut pause) = (Instant::now(), LEAVE_AGAIN);
        let mut fin_due = None;
        let mut moved = (0, 0);
        loop {
            let want = if leaving.is_some() { Want::Userspace } else { Want::Kernel };
            let next = match self.advance(want) {
                Ok(next) => next,
                Err(end) => return Outcome::Ended(end),
            };
            if leaving.is_none() {
                leaving = self.reason_to_leave();
                if leaving.is_some() {
                    // What is wanted of both directions has changed.
                    continue;
                }
            }
            let now = Instant::now();
            if let Some(why) = leaving
                && now >= not_before
                && self.may_leave()
            {
                match self.leave().await {
                    Ok(true) => return self.into_left(why),
                    Ok(false) => {
                        not_before = Instant::now() + pause;
                        pause = (pause * 2).min(LONGEST_LEAVE_AGAIN);
                    }
                    Err(end) => return Outcome::Ended(end),
                }
                continue;
            }
            if !SIDES.into_iter().any(|side| self.owes_fin(side)) {
                fin_due = None;
            } else if now >= *fin_due.get_or_insert(now + FIN_PATIENCE) {
                if let Err(end) = self.finish_in_map().await {
                    return Outcome::Ended(end);
                }
                fin_due = Some(Instant::now() + LEAVE_AGAIN);
                continue;
            }

            let total = self.moved();
            if total.1 != moved.1 {
                self.traffic.0.touch(now.into_std());
                watch.bytes_moved(now);
            } else if total.0 != moved.0 {
                watch.bytes_moved(now.checked_sub(self.engaged.idle()).unwrap_or(now));
            }
            moved = total;
            if now >= watch.deadline() {
                let [client, upstream] = &self.engaged.sockets;
                if let Some(end) = watch.look(client, upstream) {
                    return Outcome::Ended(end);
                }
            }
            let mut deadline = watch.deadline();
            match next {
                Next::Turn => {
                    tokio::task::yield_now().await;
                    continue;
                }
                Next::At(at) => deadline = deadline.min(at),
                Next::Event => {}
            }
            if leaving.is_some() && self.may_leave() {
                deadline = deadline.min(not_before);
            }
            deadline = fin_due.map_or(deadline, |due| deadline.min(due));
            if let Err(end) = self.wait(deadline).await {
                return Outcome::Ended(end);
            }
        }
    }

    fn is_in_map(&self, side: Side) -> bool {
        self.in_map[side as usize]
    }

    /// Lets both directions do what they can.
    fn advance(&mut self, want: Want) -> Result<Next, End> {
        let now = Instant::now();
        let mut next = Next::Event;
        for from in SIDES {
            // What a socket outside of the map receives waits there for the relay.
            if !self.is_in_map(from) {
                continue;
            }
            let source = from as usize;
            let mut sockets = Sockets { engaged: &self.engaged, from, received_before: self.received_before[source] };
            let stream = &mut self.streams[source];
            let own = stream.advance(&mut sockets, now, want);
            let written = stream.written();
            self.traffic.0.direction(from).add(Path::Userspace, (written - self.counted[source]) as usize);
            self.counted[source] = written;
            next = match (next, own.map_err(|broken| end_of(broken, from))?) {
                (Next::Turn, _) | (_, Next::Turn) => Next::Turn,
                (Next::At(a), Next::At(b)) => Next::At(a.min(b)),
                (Next::At(at), Next::Event) | (Next::Event, Next::At(at)) => Next::At(at),
                (Next::Event, Next::Event) => Next::Event,
            };
        }
        Ok(next)
    }

    fn reason_to_leave(&mut self) -> Option<Left> {
        if self.streams.iter().any(|stream| stream.phase == Phase::Complete) {
            return Some(Left::Ending);
        }
        if !self.engaged.place.table().has_room() {
            return Some(Left::Refused);
        }
        let mut bulk = false;
        for from in SIDES {
            let stream = &mut self.streams[from as usize];
            match stream.left_for() {
                Some(Reason::Slow) => self.engaged.place.table().spills[from as usize].inc(),
                Some(Reason::Bulk) => bulk = true,
                _ => {}
            }
            bulk |= self.leave_on_bulk && stream.written_since() > BULK_BYTES.into();
        }
        bulk.then_some(Left::Bulk)
    }

    /// Bytes that have moved, inside the kernel and through userspace.
    fn moved(&self) -> (u64, u64) {
        let kernel = SIDES.into_iter().map(|from| self.engaged.redirected(from)).sum();
        (kernel, self.streams.iter().map(Stream::written).sum())
    }

    /// Whether an attempt to leave has prospects: userspace forwards, and no reader keeps it waiting.
    fn may_leave(&self) -> bool {
        SIDES.into_iter().filter(|side| self.is_in_map(*side)).map(|side| &self.streams[side as usize]).all(|stream| {
            match stream.phase {
                Phase::Complete => true,
                Phase::Userspace => !stream.is_blocked(),
                Phase::Kernel | Phase::Proving => false,
            }
        })
    }

    /// Takes the sockets out of the map; false when there is always more to forward.
    ///
    /// A socket's entry may only be deleted while no verdict runs for it: the program's verdict on bytes that are acknowledged already would be lost with it. So
    /// data is kept away from the socket first, then whatever had begun before is waited for. And nothing may be unread: passed bytes go with the entry.
    async fn leave(&mut self) -> Result<bool, End> {
        let open: Vec<Side> = SIDES
            .into_iter()
            .filter(|side| self.is_in_map(*side) && self.streams[*side as usize].phase != Phase::Complete)
            .collect();
        if !open.is_empty() && !self.drain(&open).await? {
            return Ok(false);
        }
        drop(self.traffic.0.disengage());
        let engaged = Arc::get_mut(&mut self.engaged).expect("only looked at under the lock of Traffic");
        for side in SIDES {
            let socket = &engaged.sockets[side as usize];
            if std::mem::take(&mut self.in_map[side as usize]) {
                engaged.place.remove(side);
                let _ = Programs::unfilter(socket);
            }
            if let Some(registration) = self.registrations[side as usize].take() {
                registration.end(socket);
            }
        }
        Ok(true)
    }

    /// Keeps data away from these sockets until nothing is left to forward; gives up, and lets it in again, when that takes too long.
    async fn drain(&mut self, open: &[Side]) -> Result<bool, End> {
        let table = self.engaged.place.table().clone();
        let quiet = open.iter().try_for_each(|side| table.programs.quiesce(&self.engaged.sockets[*side as usize]));
        let mut drained = false;
        let waited = match quiet {
            Ok(()) => table.grace_period().await,
            Err(error) => Err(error),
        };
        match waited {
            Ok(()) => {
                let until = Instant::now() + PATIENCE;
                for side in open {
                    self.streams[*side as usize].readable = true;
                }
                while !drained && Instant::now() < until {
                    let next = self.advance(Want::Userspace)?;
                    drained =
                        open.iter().all(|side| self.streams[*side as usize].is_drained(self.engaged.place.row(*side)));
                    if next == Next::Turn {
                        tokio::task::yield_now().await;
                    } else if !drained {
                        self.wait(Instant::now() + Duration::from_millis(1)).await?;
                    }
                }
            }
            Err(error) => tracing::warn!(%error, "a connection cannot leave the sockmap yet"),
        }
        if !drained {
            for side in open {
                let socket = &self.engaged.sockets[*side as usize];
                // Of two filters the later one counts.
                let _ = if self.fin_sent[*side as usize] {
                    table.programs.postpone_end(socket)
                } else {
                    table.programs.brake(socket)
                };
            }
        }
        Ok(drained)
    }

    /// Whether the peer of this side has still to be told that the other side has ended.
    fn owes_fin(&self, side: Side) -> bool {
        self.is_in_map(side)
            && !self.fin_sent[side as usize]
            && self.streams[side.other() as usize].phase == Phase::Complete
            && !self.streams[side as usize].source_ended
    }

    /// Passes the end of a stream on although the socket is in the map, since a slow reader of what that socket receives keeps it there.
    ///
    /// From the exchange of both FINs on, passed bytes that are unread would be lost. So the peer's is kept away until the socket has left; the peer sends it again.
    /// Where it has come already, ours waits: that peer has nothing more to say.
    async fn finish_in_map(&mut self) -> Result<(), End> {
        let table = self.engaged.place.table().clone();
        for side in SIDES {
            let socket = &self.engaged.sockets[side as usize];
            if !self.owes_fin(side) || table.programs.postpone_end(socket).is_err() {
                continue;
            }
            let waited = table.grace_period().await;
            let socket = &self.engaged.sockets[side as usize];
            let established = sys::tcp_info(socket).is_ok_and(|info| info.state == sys::TCP_ESTABLISHED);
            if waited.is_err() || !established {
                let _ = table.programs.brake(socket);
                continue;
            }
            if let Err(error) = socket.shutdown(Shutdown::Write) {
                return Err(end_of(Broken::Source(error), side));
            }
            self.fin_sent[side as usize] = true;
        }
        Ok(())
    }

    fn into_left(self, why: Left) -> Outcome {
        let streams = SIDES.map(|from| match self.streams[from as usize].phase {
            Phase::Complete if self.fin_sent[from.other() as usize] => StreamState::Finished,
            Phase::Complete => StreamState::Ended,
            _ => StreamState::Open,
        });
        let Some(Engaged { sockets: [client, upstream], place, .. }) = Arc::into_inner(self.engaged) else {
            unreachable!("only looked at under the lock of Traffic");
        };
        drop(place);
        match (TcpStream::from_std(client), TcpStream::from_std(upstream)) {
            (Ok(client), Ok(upstream)) => Outcome::Left(Legs { client, upstream, streams }, why),
            (Err(error), _) | (_, Err(error)) => lost(&error),
        }
    }

    /// Waits for an event or this time.
    async fn wait(&mut self, deadline: Instant) -> Result<(), End> {
        for side in SIDES {
            let Some(registration) = &mut self.registrations[side as usize] else { continue };
            let (source, sink) = (&self.streams[side as usize], &self.streams[side.other() as usize]);
            let readable = self.in_map[side as usize] && source.phase == Phase::Userspace && !source.is_blocked();
            registration
                .want(&self.engaged.sockets[side as usize], readable, sink.is_blocked())
                .map_err(|error| end_of(Broken::Source(error), side))?;
        }
        let bits = {
            let signal = self.engaged.place.signal();
            let mut timer = pin!(sleep_until(deadline));
            poll_fn(|cx| match signal.poll(cx) {
                Poll::Ready(bits) => Poll::Ready(bits),
                Poll::Pending => timer.as_mut().poll(cx).map(|()| 0),
            })
            .await
        };
        for side in SIDES {
            let own = bits >> (side as u32 * Signal::UPSTREAM);
            if own & Signal::FAILED != 0
                && let Ok(Some(error)) = self.engaged.sockets[side as usize].take_error()
            {
                return Err(ended_by(side, Ok(Some(error))));
            }
            self.streams[side as usize].readable |= own & Signal::READABLE != 0;
            self.streams[side as usize].source_ended |= own & Signal::ENDED != 0;
            self.streams[side.other() as usize].writable |= own & Signal::WRITABLE != 0;
        }
        Ok(())
    }
}

fn end_of(broken: Broken, source: Side) -> End {
    match broken {
        Broken::Source(error) => ended_by(source, Ok(Some(error))),
        Broken::Sink(error) => ended_by(source.other(), Ok(Some(error))),
        Broken::Unproven(why) => {
            tracing::warn!(?source, why, "a connection in the sockmap is reset");
            End::Error
        }
    }
}
