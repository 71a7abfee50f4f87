//! One connection in the sockmap, from the insertion of its sockets until it ends or goes back to
//! the relay.
//!
//! What is decided for each direction is in [`Stream`]; here are the sockets, the waiting, and the
//! order in which sockets go into the map and out of it.

use std::future::{Future, poll_fn};
use std::io;
use std::net::{Shutdown, TcpStream as StdStream};
use std::os::fd::AsFd;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use common::sockmap::Row;
use common::sockmap::governor::{BULK_BYTES, Reason};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until};

use super::engaged::{Engaged, coarse_ms};
use super::leaving::{Leaving, Step, View};
use super::programs::Programs;
use super::reactor::{self, Registration};
use super::stream::{Broken, Next, Phase, Ports, Received, Stream, Want};
use super::table::{Signal, Table};
use crate::engine::copy;
use crate::engine::idle::IdleTimer;
use crate::engine::in_kernel::{Left, Outcome};
use crate::engine::pair::{End, Halt, Legs, PerSide, SIDES, Side, Stop, StreamState, Timeouts, Unsent, ended_by};
use crate::engine::traffic::{Offload, Path, Traffic};
use crate::kernel::sys;

/// Forwards in the kernel, for as long as that is good for the connection.
pub async fn forward(
    table: Arc<Table>,
    legs: Legs,
    leave_on_bulk: bool,
    timeouts: Timeouts,
    traffic: &Traffic,
    halt: &Halt,
) -> Outcome {
    match Flow::engage(&table, legs, leave_on_bulk, traffic, halt) {
        Ok(flow) => flow.run(timeouts).await,
        Err(Refused::Whole(legs)) => Outcome::Left(*legs, Left::Refused),
        Err(Refused::Broken(error)) => lost(&error),
    }
}

fn lost(error: &io::Error) -> Outcome {
    tracing::warn!(%error, "a connection was lost on its way into the sockmap or out of it");
    Outcome::Ended(End::Error)
}

enum Refused {
    /// Nothing was done to the connection.
    Whole(Box<Legs>),
    Broken(io::Error),
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
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
    streams: PerSide<Stream>,
    /// By side of the source: what it had received before.
    received_before: PerSide<u64>,
    /// By side.
    registrations: PerSide<Option<Registration>>,
    /// By side.
    in_map: PerSide<bool>,
    /// By side of the source: what of the stream's bytes was counted.
    counted: PerSide<u64>,
    leave_on_bulk: bool,
    /// By side: we have sent FIN on this socket.
    fin_sent: PerSide<bool>,
    /// By side: data is kept away from this socket, which is to leave.
    kept_away: PerSide<bool>,
    /// It was told that the target has closed.
    target_closed: bool,
    halt: &'a Halt,
    /// It was seen that the flow is to stop.
    halts: bool,
}

/// A direction's sockets.
struct Sockets<'a> {
    engaged: &'a Engaged,
    from: Side,
    received_before: u64,
}

impl Sockets<'_> {
    fn source(&self) -> &StdStream {
        &self.engaged.sockets[self.from]
    }

    fn sink(&self) -> &StdStream {
        &self.engaged.sockets[self.from.other()]
    }
}

impl Ports for Sockets<'_> {
    fn row(&self) -> &Row {
        self.engaged.slot.row(self.from)
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

    fn read(&mut self, rest: &mut Vec<u8>) -> io::Result<usize> {
        copy::read(self.source(), rest)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        copy::write(self.sink(), bytes)
    }
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
    /// Puts both sockets into the map, on hold. If only one can be put in, because the other's peer
    /// has just sent FIN, the flow has to leave at once.
    fn engage(
        table: &Arc<Table>,
        legs: Legs,
        leave_on_bulk: bool,
        traffic: &'a Traffic,
        halt: &'a Halt,
    ) -> Result<Self, Refused> {
        let (Some(mut slot), Ok(epoll)) = (table.take(), reactor::of_this_worker(table)) else {
            return Err(Refused::Whole(Box::new(legs)));
        };
        let read = [read_exactly(&legs.client)?, read_exactly(&legs.upstream)?];
        let [Some(client), Some(upstream)] = read else { return Err(Refused::Whole(Box::new(legs))) };
        let received_before = PerSide { client, upstream };
        let accepted_before =
            PerSide { client: accepted_exactly(&legs.client)?, upstream: accepted_exactly(&legs.upstream)? };
        for side in SIDES {
            let row = slot.row(side);
            row.leave_on_bulk.set(u32::from(leave_on_bulk));
            row.last_ms.set(coarse_ms());
        }
        // From here on the sockets belong to this worker's epoll instance.
        let sockets = PerSide { client: legs.client.into_std()?, upstream: legs.upstream.into_std()? };
        let register = |side| Registration::new(epoll.clone(), &slot, side, &sockets[side]).map(Some);
        let registrations = PerSide::try_new(register)?;
        let mut in_map = PerSide::default();
        // The sink of a direction has to be there before its source.
        for side in [Side::Upstream, Side::Client] {
            if let Err(error) = slot.insert(side, &sockets[side]) {
                tracing::debug!(?side, %error, "not taken by the sockmap");
                break;
            }
            in_map[side] = true;
        }
        let now = Instant::now();
        let engaged = Arc::new(Engaged { sockets, accepted_before, slot });
        traffic.engage(engaged.clone());
        Ok(Self {
            engaged,
            streams: PerSide::new(|_| Stream::new(now)),
            received_before,
            registrations,
            in_map,
            counted: PerSide::default(),
            leave_on_bulk,
            fin_sent: PerSide::default(),
            kept_away: PerSide::default(),
            target_closed: false,
            halt,
            halts: false,
            traffic: Shared(traffic),
        })
    }

    async fn run(mut self, timeouts: Timeouts) -> Outcome {
        let mut idle = IdleTimer::unattended(timeouts, self.traffic.0.last_bytes());
        let is_torn = SIDES.into_iter().any(|side| !self.is_in_map(side));
        let mut leaving = Leaving::new(Instant::now(), is_torn.then_some(Left::Refused));
        let mut moved = (0, 0);
        loop {
            match self.turn(&mut leaving, &mut idle, &mut moved).await {
                Ok(None) => {}
                Ok(Some(why)) => return self.into_left(why),
                Err(end) => return Outcome::Ended(end),
            }
        }
    }

    /// Does what is due, then waits. Says why the connection has left the map, when it has.
    async fn turn(
        &mut self,
        leaving: &mut Leaving,
        idle: &mut IdleTimer,
        moved: &mut (u64, u64),
    ) -> Result<Option<Left>, End> {
        let next = self.advance(leaving.want(Instant::now()))?;
        if self.streams.iter().any(|stream| stream.source_ended) {
            idle.half_closed(Instant::now());
        }
        if self.streams.upstream.source_ended && !std::mem::replace(&mut self.target_closed, true) {
            self.traffic.0.note_target_closed();
        }
        let now = Instant::now();
        self.halts = self.halt.is_asked(Stop::LeaveKernel);
        if self.halts && leaving.halt(now) || leaving.note(self.reason_to_leave()) {
            // What is wanted of both directions has changed.
            return Ok(None);
        }
        let in_map = SIDES.into_iter().filter(|side| self.is_in_map(*side));
        let view =
            View::of(in_map.clone().map(|side| &self.streams[side]), SIDES.into_iter().any(|side| self.owes_fin(side)));
        let collects = leaving.collects(now);
        let is_drained = || {
            in_map.clone().all(|side| {
                let (stream, row) = (&self.streams[side], self.engaged.slot.row(side));
                if collects { stream.is_collected(row) } else { stream.is_drained(row) }
            })
        };
        let wake = match leaving.step(now, view, is_drained) {
            Step::Wait(wake) => wake,
            Step::KeepDataAway => {
                match self.keep_data_away().await {
                    Ok(()) => leaving.kept_away(Instant::now()),
                    Err(error) => {
                        tracing::warn!(%error, "a connection cannot leave the sockmap yet");
                        self.let_data_in();
                        leaving.failed(Instant::now());
                    }
                }
                return Ok(None);
            }
            Step::LetDataIn => {
                self.let_data_in();
                return Ok(None);
            }
            Step::TakeOut(why) => {
                self.take_out();
                return Ok(Some(why));
            }
            Step::Finish => {
                self.finish_in_map().await?;
                leaving.finished(Instant::now());
                return Ok(None);
            }
        };

        let total = self.moved();
        if total.1 != moved.1 {
            self.traffic.0.touch(now.into_std());
            idle.bytes_moved(now);
        } else if total.0 != moved.0 {
            idle.bytes_moved(now.checked_sub(self.engaged.idle()).unwrap_or(now));
        }
        *moved = total;
        if now >= idle.deadline() {
            let PerSide { client, upstream } = &self.engaged.sockets;
            if let Some(end) = idle.look(client, upstream) {
                return Err(end);
            }
        }
        let mut deadline = idle.deadline();
        match next {
            Next::Turn => {
                tokio::task::yield_now().await;
                return Ok(None);
            }
            Next::At(at) => deadline = deadline.min(at),
            Next::Event => {}
        }
        self.wait(wake.map_or(deadline, |wake| deadline.min(wake))).await?;
        Ok(None)
    }

    fn is_in_map(&self, side: Side) -> bool {
        self.in_map[side]
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
            let mut sockets = Sockets { engaged: &self.engaged, from, received_before: self.received_before[from] };
            let stream = &mut self.streams[from];
            let own = stream.advance(&mut sockets, now, want);
            let written = stream.written();
            self.traffic.0.direction(from).add(Path::Userspace, (written - self.counted[from]) as usize);
            self.counted[from] = written;
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
        if !self.engaged.slot.table().has_room() {
            return Some(Left::Refused);
        }
        let mut bulk = false;
        for from in SIDES {
            let stream = &mut self.streams[from];
            match stream.left_for() {
                Some(Reason::Slow) => self.engaged.slot.table().spills[from as usize].inc(),
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

    /// Keeps data away from the sockets of open directions, and waits for what had begun before.
    async fn keep_data_away(&mut self) -> io::Result<()> {
        let table = self.engaged.slot.table().clone();
        for side in SIDES {
            if self.is_in_map(side) && self.streams[side].phase != Phase::Complete {
                self.kept_away[side] = true;
                table.programs.quiesce(&self.engaged.sockets[side])?;
            }
        }
        table.grace_period().await?;
        for side in SIDES {
            self.streams[side].readable |= self.kept_away[side];
        }
        Ok(())
    }

    fn let_data_in(&mut self) {
        let programs = &self.engaged.slot.table().programs;
        for side in SIDES {
            if std::mem::take(&mut self.kept_away[side]) {
                let socket = &self.engaged.sockets[side];
                // Of two filters the later one counts.
                let _ = if self.fin_sent[side] { programs.postpone_end(socket) } else { programs.brake(socket) };
            }
        }
    }

    /// Takes the sockets out of the map.
    fn take_out(&mut self) {
        drop(self.traffic.0.disengage());
        let engaged = Arc::get_mut(&mut self.engaged).expect("only looked at under the lock of Traffic");
        for side in SIDES {
            let socket = &engaged.sockets[side];
            if std::mem::take(&mut self.in_map[side]) {
                engaged.slot.remove(side);
                let _ = Programs::unfilter(socket);
            }
            if let Some(registration) = self.registrations[side].take() {
                registration.end(socket);
            }
        }
    }

    /// Whether the peer of this side has still to be told that the other side has ended.
    fn owes_fin(&self, side: Side) -> bool {
        self.is_in_map(side)
            && !self.fin_sent[side]
            && self.streams[side.other()].phase == Phase::Complete
            && !self.streams[side.other()].is_blocked()
            && !self.streams[side].source_ended
    }

    /// Passes the end of a stream on although the socket is in the map, since a slow reader of what
    /// that socket receives keeps it there.
    ///
    /// From the exchange of both FINs on, passed bytes that are unread would be lost. So the peer's
    /// is kept away until the socket has left; the peer sends it again. Where it has come already,
    /// ours waits: that peer has nothing more to say.
    async fn finish_in_map(&mut self) -> Result<(), End> {
        let table = self.engaged.slot.table().clone();
        for side in SIDES {
            let socket = &self.engaged.sockets[side];
            if !self.owes_fin(side) || table.programs.postpone_end(socket).is_err() {
                continue;
            }
            let waited = table.grace_period().await;
            let socket = &self.engaged.sockets[side];
            let established = sys::tcp_info(socket).is_ok_and(|info| info.state == sys::TCP_ESTABLISHED);
            if waited.is_err() || !established {
                let _ = table.programs.brake(socket);
                continue;
            }
            if let Err(error) = socket.shutdown(Shutdown::Write) {
                return Err(end_of(Broken::Source(error), side));
            }
            self.fin_sent[side] = true;
        }
        Ok(())
    }

    fn into_left(self, why: Left) -> Outcome {
        let streams = PerSide::new(|from: Side| match self.streams[from].phase {
            Phase::Complete if self.fin_sent[from.other()] => StreamState::Finished,
            Phase::Complete => StreamState::Ended,
            _ => StreamState::Open,
        });
        let unsent = PerSide::new(|from: Side| Unsent::payload(self.streams[from].rest().to_vec()));
        let Some(Engaged { sockets: PerSide { client, upstream }, slot, .. }) = Arc::into_inner(self.engaged) else {
            unreachable!("only looked at under the lock of Traffic");
        };
        drop(slot);
        match (TcpStream::from_std(client), TcpStream::from_std(upstream)) {
            (Ok(client), Ok(upstream)) => Outcome::Left(Legs { client, upstream, streams, unsent }, why),
            (Err(error), _) | (_, Err(error)) => lost(&error),
        }
    }

    /// Waits for an event or this time.
    async fn wait(&mut self, deadline: Instant) -> Result<(), End> {
        for side in SIDES {
            let Some(registration) = &mut self.registrations[side] else { continue };
            let (source, sink) = (&self.streams[side], &self.streams[side.other()]);
            let readable = self.in_map[side] && source.phase == Phase::Userspace && !source.is_blocked();
            registration
                .want(&self.engaged.sockets[side], readable, sink.is_blocked())
                .map_err(|error| end_of(Broken::Source(error), side))?;
        }
        let bits = {
            let signal = self.engaged.slot.signal();
            let mut timer = pin!(sleep_until(deadline));
            let halts = |seen: bool| !seen && self.halt.is_asked(Stop::LeaveKernel);
            poll_fn(|cx| match signal.poll(cx) {
                Poll::Ready(bits) => Poll::Ready(bits),
                Poll::Pending if halts(self.halts) => Poll::Ready(0),
                Poll::Pending => timer.as_mut().poll(cx).map(|()| 0),
            })
            .await
        };
        for side in SIDES {
            let own = bits >> (side as u32 * Signal::UPSTREAM);
            if own & Signal::FAILED != 0
                && let Ok(Some(error)) = self.engaged.sockets[side].take_error()
            {
                return Err(ended_by(side, Ok(Some(error))));
            }
            self.streams[side].readable |= own & Signal::READABLE != 0;
            self.streams[side].source_ended |= own & Signal::ENDED != 0;
            self.streams[side.other()].writable |= own & Signal::WRITABLE != 0;
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
