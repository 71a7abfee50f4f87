//! The loop that `copy` and `splice` share: both directions of one connection, until it ends.
//!
//! Each direction is a small state machine that sends what it holds before it reads on, so
//! backpressure is the kernel's: a slow reader leaves the sender's bytes in the sender's socket
//! buffers. Waiting is tokio's; moving bytes is [`copy`] and [`super::splice`].

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::task::{Context, Poll, ready};

use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until};

use super::copy;
use super::idle::IdleTimer;
use super::pair::{End, Halt, Kind, Legs, PerSide, Side, Stop, StreamState, Timeouts, Unsent, ended_by};
use super::promotion::Promotion;
use super::splice::Pipe;
use super::traffic::{Counter, Path, Traffic};
use crate::kernel::{socket, sys};

/// Reads of one direction before other connections of the worker get their turn. With
/// [`crate::daemon::worker::EVENT_INTERVAL`]: an echo beside four bulk transfers on one worker had
/// a p99 of 36 to 59 ms, against 181 to 339 ms with 8 reads and tokio's interval, at the same
/// throughput.
const READS_PER_TURN: usize = 4;

/// A splice that moved less is not bulk. Exchanges of 200 and of 2,000 bytes over 16 connections on
/// loopback cost the process 3 to 16 % less CPU copied than spliced, those of 8,000 and more cost
/// the same either way (three rounds, a noisy machine).
const SMALL: usize = 4 * 1024;

/// What is waited for beside bytes: errors, and the peer's FIN, which comes with this interest
/// alone also while nobody reads.
const NEWS: Interest = Interest::ERROR.add(Interest::PRIORITY);

/// What became of a connection.
pub enum Relayed {
    Ended(End),
    /// It is to move to the sockmap: nothing is unsent.
    Promoted(Legs),
    /// It was told to stop.
    Halted(Legs),
}

/// Why the loop is left.
enum Exit {
    Ended(End),
    Promoted,
    Halted,
}

/// Forwards until the connection ends, moves, or is told to stop.
pub async fn run(
    kind: Kind,
    legs: Legs,
    promotion: Promotion,
    timeouts: Timeouts,
    traffic: &Traffic,
    halt: &Halt,
) -> Relayed {
    let Legs { client, upstream, streams, unsent } = legs;
    let mut directions = Directions {
        up: Direction::new(kind, Side::Client, unsent.client, streams.client),
        down: Direction::new(kind, Side::Upstream, unsent.upstream, streams.upstream),
    };
    let exit = forward(&client, &upstream, &mut directions, promotion, timeouts, traffic, halt).await;
    let Directions { up, down } = directions;
    let streams = PerSide { client: up.state(), upstream: down.state() };
    let unsent = PerSide { client: up.unsent(), upstream: down.unsent() };
    let legs = Legs { client, upstream, streams, unsent };
    match exit {
        Exit::Promoted => Relayed::Promoted(legs),
        Exit::Halted => Relayed::Halted(legs),
        Exit::Ended(end) => {
            if end == End::Done {
                // Both directions are complete and proven: only now may close() mean FIN instead of
                // RST.
                for leg in [&legs.client, &legs.upstream] {
                    socket::close_with_fin(leg);
                }
            }
            Relayed::Ended(end)
        }
    }
}

struct Directions {
    up: Direction,
    down: Direction,
}

async fn forward(
    client: &TcpStream,
    upstream: &TcpStream,
    Directions { up, down }: &mut Directions,
    mut promotion: Promotion,
    timeouts: Timeouts,
    traffic: &Traffic,
    halt: &Halt,
) -> Exit {
    let mut idle = IdleTimer::new(timeouts, traffic.last_bytes());
    let mut timer = pin!(sleep_until(idle.deadline()));
    let mut has_closed = PerSide::<bool>::default();
    let mut target_closed = false;
    // A side that resets or closes while nothing is read from it or written to it, because the
    // other side is stalled, is noticed here.
    let mut client_news = pin!(client.ready(NEWS));
    let mut upstream_news = pin!(upstream.ready(NEWS));

    poll_fn(|cx| {
        let before = (up.moved, down.moved);
        let up_done = up.poll(cx, client, upstream, &traffic.to_upstream, &mut promotion, down.is_finished());
        // A write that failed has taken the error off the socket: read now, it would look like a
        // clean end of stream.
        if let Poll::Ready(Err(broken)) = up_done {
            return Poll::Ready(Exit::Ended(broken.end(Side::Client, Side::Upstream)));
        }
        let down_done = down.poll(cx, upstream, client, &traffic.to_client, &mut promotion, up.is_finished());
        if let Poll::Ready(Err(broken)) = down_done {
            return Poll::Ready(Exit::Ended(broken.end(Side::Upstream, Side::Client)));
        }
        // The kernel gives up soon on a closed socket whose reader is slow, so it is kept until the
        // last byte could be sent.
        let finished = up.is_finished() && down.is_finished();
        if finished {
            if all_sent(client) && all_sent(upstream) {
                return Poll::Ready(Exit::Ended(End::Done));
            }
            idle.keep_looking();
            timer.as_mut().reset(idle.deadline());
        }
        for (side, leg, news) in
            [(Side::Client, client, &mut client_news), (Side::Upstream, upstream, &mut upstream_news)]
        {
            while let Poll::Ready(ready) = news.as_mut().poll(cx) {
                if !ready.is_ok_and(|ready| !ready.is_error()) {
                    return Poll::Ready(Exit::Ended(ended_by(side, leg.take_error())));
                }
                has_closed[side] = true;
                news.set(leg.ready(Interest::ERROR));
            }
        }
        if has_closed.iter().any(|closed| *closed) && idle.half_closed(Instant::now()) {
            timer.as_mut().reset(idle.deadline());
        }
        if has_closed.upstream && !std::mem::replace(&mut target_closed, true) {
            traffic.note_target_closed();
        }
        if before != (up.moved, down.moved) {
            let now = Instant::now();
            traffic.touch(now.into_std());
            if idle.bytes_moved(now) {
                timer.as_mut().reset(idle.deadline());
            }
        }
        // A failure is told by the next poll.
        if halt.is_asked(Stop::All) && !up.has_failed() && !down.has_failed() {
            return Poll::Ready(Exit::Halted);
        }
        let may_move = up.is_empty() && down.is_empty() && !halt.is_asked(Stop::LeaveKernel);
        if may_move && promotion.is_due(Instant::now()) {
            return Poll::Ready(Exit::Promoted);
        }
        while timer.as_mut().poll(cx).is_ready() {
            if let Some(end) = idle.look(client, upstream) {
                return Poll::Ready(Exit::Ended(end));
            }
            if finished {
                idle.keep_looking();
            }
            timer.as_mut().reset(idle.deadline());
        }
        Poll::Pending
    })
    .await
}

/// Whether nothing waits for the peer's window. What is in flight the kernel delivers also after
/// close().
pub(super) fn all_sent(socket: &TcpStream) -> bool {
    sys::tcp_info(socket).map_or(true, |info| info.notsent_bytes == 0)
}

/// One direction.
struct Direction {
    from: Side,
    splice: bool,
    held: Held,
    /// Bytes at the front of what is held that are not payload.
    header: usize,
    flow: Flow,
    /// The last read was large: the next one goes through a pipe.
    bulk: bool,
    /// Bytes sent so far; only its change matters.
    moved: u64,
}

/// Read and not yet sent.
enum Held {
    Nothing,
    Buffer {
        bytes: Vec<u8>,
        sent: usize,
    },
    Pipe(Pipe),
    /// The receiver failed while it was written to.
    Failed(io::Error),
}

#[derive(PartialEq)]
enum Flow {
    Open,
    /// The source sent FIN; what is held goes first.
    SourceEnded,
    /// FIN was passed on.
    Finished,
}

/// Which end of a direction failed.
enum Broken {
    Source(io::Error),
    Sink(io::Error),
}

impl Broken {
    fn end(self, source: Side, sink: Side) -> End {
        match self {
            Self::Source(e) => ended_by(source, Ok(Some(e))),
            Self::Sink(e) => ended_by(sink, Ok(Some(e))),
        }
    }
}

/// The end of a stream must have come with a FIN. A socket tells of a RST once, to whichever call
/// comes first, and then reads like one that ended well.
pub(super) fn prove_fin(from: &TcpStream, has_our_fin: bool) -> io::Result<()> {
    // After both FINs the kernel may have closed it too (TIME_WAIT); but then nothing was written
    // to it that could have taken the error.
    if has_our_fin || sys::tcp_info(from)?.state != sys::TCP_CLOSE {
        Ok(())
    } else {
        Err(io::ErrorKind::ConnectionReset.into())
    }
}

impl Direction {
    fn new(kind: Kind, from: Side, unsent: Unsent, state: StreamState) -> Self {
        let (held, header) = match unsent {
            Unsent::Nothing => (Held::Nothing, 0),
            Unsent::Bytes { bytes, header } => (Held::Buffer { bytes, sent: 0 }, header),
            Unsent::Pipe(pipe) => (Held::Pipe(pipe), 0),
        };
        let flow = match state {
            StreamState::Open => Flow::Open,
            StreamState::Ended => Flow::SourceEnded,
            StreamState::Finished => Flow::Finished,
        };
        Self { from, splice: kind == Kind::Splice, held, header, flow, bulk: false, moved: 0 }
    }

    fn state(&self) -> StreamState {
        match self.flow {
            Flow::Open => StreamState::Open,
            Flow::SourceEnded => StreamState::Ended,
            Flow::Finished => StreamState::Finished,
        }
    }

    /// What was read and not sent.
    fn unsent(self) -> Unsent {
        match self.held {
            Held::Nothing | Held::Failed(_) => Unsent::Nothing,
            Held::Buffer { mut bytes, sent } => {
                bytes.drain(..sent);
                Unsent::bytes(bytes, self.header)
            }
            Held::Pipe(pipe) => Unsent::Pipe(pipe),
        }
    }

    fn has_failed(&self) -> bool {
        matches!(self.held, Held::Failed(_))
    }

    /// Whether it is open and holds nothing.
    fn is_empty(&self) -> bool {
        self.flow == Flow::Open && matches!(self.held, Held::Nothing)
    }

    fn is_finished(&self) -> bool {
        self.flow == Flow::Finished
    }

    /// Moves bytes until one side has to be waited for; ready when FIN was passed on.
    /// `from_has_our_fin`: the other direction is finished.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &TcpStream,
        to: &TcpStream,
        counter: &Counter,
        promotion: &mut Promotion,
        from_has_our_fin: bool,
    ) -> Poll<Result<(), Broken>> {
        let mut reads = READS_PER_TURN;
        while self.flow != Flow::Finished {
            ready!(self.poll_send(cx, to, counter))?;
            if self.flow == Flow::SourceEnded {
                prove_fin(from, from_has_our_fin).map_err(Broken::Source)?;
                match rustix::net::shutdown(to, rustix::net::Shutdown::Write) {
                    Ok(()) => self.flow = Flow::Finished,
                    Err(e) => return Poll::Ready(Err(Broken::Sink(e.into()))),
                }
                break;
            }
            if reads == 0 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            reads -= 1;
            match from.try_io(Interest::READABLE, || self.receive(from, to, counter)) {
                Ok(0) => self.flow = Flow::SourceEnded,
                Ok(n) => promotion.note(self.from, n, Instant::now),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    ready!(from.poll_read_ready(cx)).map_err(Broken::Source)?;
                }
                Err(e) => return Poll::Ready(Err(Broken::Source(e))),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Sends what is held; ready when nothing is, and the receiver takes more: nothing is read that
    /// could not be sent.
    fn poll_send(&mut self, cx: &mut Context<'_>, to: &TcpStream, counter: &Counter) -> Poll<Result<(), Broken>> {
        loop {
            let sent = to.try_io(Interest::WRITABLE, || match &mut self.held {
                Held::Nothing => Ok(None),
                Held::Failed(error) => Err(error.kind().into()),
                Held::Buffer { bytes, sent } => {
                    let n = copy::write(to, &bytes[*sent..])?;
                    *sent += n;
                    let done = *sent == bytes.len();
                    Ok(Some((n, Path::Userspace, done)))
                }
                Held::Pipe(pipe) => {
                    let n = pipe.drain(to)?;
                    Ok(Some((n, Path::Kernel, pipe.is_empty())))
                }
            });
            match sent {
                Ok(None) => return Poll::Ready(Ok(())),
                Ok(Some((n, path, done))) => {
                    self.count(counter, path, n);
                    if done && let Held::Pipe(pipe) = std::mem::replace(&mut self.held, Held::Nothing) {
                        pipe.put_back();
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    ready!(to.poll_write_ready(cx)).map_err(Broken::Sink)?;
                }
                Err(e) => return Poll::Ready(Err(Broken::Sink(e))),
            }
        }
    }

    /// One read; what the receiver does not take at once is held. The number of bytes, 0 at the end
    /// of the stream.
    fn receive(&mut self, from: &TcpStream, to: &TcpStream, counter: &Counter) -> io::Result<usize> {
        if self.bulk
            && let Some(mut pipe) = Pipe::take()
        {
            match pipe.fill(from) {
                Ok(n) if n > 0 => {
                    self.bulk = n >= SMALL;
                    self.held = Held::Pipe(pipe);
                    return Ok(n);
                }
                // Told once: recv would find the socket without error, and take it for the end of
                // the stream.
                Err(e) if e.kind() != io::ErrorKind::WouldBlock => {
                    pipe.put_back();
                    return Err(e);
                }
                // The socket is empty, ended, or at its urgent mark, which only recv gets past.
                _ => pipe.put_back(),
            }
        }
        let step = copy::step(from, to)?;
        self.bulk = self.splice && step.read == copy::CHUNK;
        self.count(counter, Path::Userspace, step.written);
        if let Some(error) = step.write_error {
            self.held = Held::Failed(error);
        } else if !step.rest.is_empty() {
            self.held = Held::Buffer { bytes: step.rest, sent: 0 };
        }
        Ok(step.read)
    }

    fn count(&mut self, counter: &Counter, path: Path, sent: usize) {
        let header = sent.min(self.header);
        self.header -= header;
        counter.add(path, sent - header);
        self.moved += sent as u64;
    }
}
