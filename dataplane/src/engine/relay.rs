//! The loop that `copy` and `splice` share: both directions of one connection, until it ends.
//!
//! Each direction is a small state machine that sends what it holds before it reads on, so backpressure is the kernel's: a slow reader
//! leaves the sender's bytes in the sender's socket buffers. Waiting is tokio's; moving bytes is [`copy`] and [`super::splice`].

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until};

use super::splice::Pipe;
use super::vigil::{self, Finding, Leg};
use super::{Counter, End, First, Kind, Pair, Path, Side, Timeouts, Traffic, copy};
use crate::{socket, sys};

/// Reads of one direction before other connections of the worker get their turn. With [`crate::worker::EVENT_INTERVAL`]: an echo beside four bulk transfers
/// on one worker had a p99 of 36 to 59 ms, against 181 to 339 ms with 8 reads and tokio's interval, at the same throughput.
const READS_PER_TURN: usize = 4;

/// How often to see whether a slow reader has taken the last bytes of a connection that has ended otherwise.
const TAIL_TICK: Duration = Duration::from_millis(500);

/// A splice that moved less is not bulk. Exchanges of 200 and of 2,000 bytes over 16 connections on loopback cost the process 3 to 16 % less CPU
/// copied than spliced, those of 8,000 and more cost the same either way (three rounds, a noisy machine).
const SMALL: usize = 4 * 1024;

/// Forwards until the connection ends.
pub async fn run(kind: Kind, pair: Pair, timeouts: Timeouts, traffic: &Traffic) -> End {
    let Pair { client, upstream, first } = pair;
    let end = forward(kind, &client, &upstream, first, timeouts, traffic).await;
    if end == End::Done {
        // Both directions are complete and proven: only now may close() mean FIN instead of RST.
        for leg in [&client, &upstream] {
            let _ = socket::no_user_timeout(leg);
            socket::close_with_fin(leg);
        }
    }
    end
}

async fn forward(
    kind: Kind,
    client: &TcpStream,
    upstream: &TcpStream,
    first: First,
    timeouts: Timeouts,
    traffic: &Traffic,
) -> End {
    let mut up = Direction::new(kind, first);
    let mut down = Direction::new(kind, First::default());
    let mut watch = Watch::new(timeouts);
    let mut timer = pin!(sleep_until(watch.deadline()));
    // A side that resets while nothing is read from it or written to it, because the other side is stalled, is noticed here.
    let mut client_error = pin!(client.ready(Interest::ERROR));
    let mut upstream_error = pin!(upstream.ready(Interest::ERROR));

    poll_fn(|cx| {
        let before = (up.moved, down.moved);
        let up_done = up.poll(cx, client, upstream, &traffic.to_upstream, down.is_finished());
        // A write that failed has taken the error off the socket: read now, it would look like a clean end of stream.
        if let Poll::Ready(Err(broken)) = up_done {
            return Poll::Ready(broken.end(Side::Client, Side::Upstream));
        }
        let down_done = down.poll(cx, upstream, client, &traffic.to_client, up.is_finished());
        if let Poll::Ready(Err(broken)) = down_done {
            return Poll::Ready(broken.end(Side::Upstream, Side::Client));
        }
        // The kernel gives up soon on a closed socket whose reader is slow, so it is kept until the last byte could be sent.
        let finished = up.is_finished() && down.is_finished();
        if finished {
            if all_sent(client) && all_sent(upstream) {
                return Poll::Ready(End::Done);
            }
            watch.keep_looking();
            timer.as_mut().reset(watch.deadline());
        }
        if client_error.as_mut().poll(cx).is_ready() {
            return Poll::Ready(ended_by(Side::Client, client.take_error()));
        }
        if upstream_error.as_mut().poll(cx).is_ready() {
            return Poll::Ready(ended_by(Side::Upstream, upstream.take_error()));
        }
        if before != (up.moved, down.moved) {
            let now = Instant::now();
            traffic.touch(now.into_std());
            if watch.bytes_moved(now) {
                timer.as_mut().reset(watch.deadline());
            }
        }
        while timer.as_mut().poll(cx).is_ready() {
            if let Some(end) = watch.look(client, upstream) {
                return Poll::Ready(end);
            }
            if finished {
                watch.keep_looking();
            }
            timer.as_mut().reset(watch.deadline());
        }
        Poll::Pending
    })
    .await
}

/// Whether nothing waits for the peer's window. What is in flight the kernel delivers also after close().
fn all_sent(socket: &TcpStream) -> bool {
    sys::tcp_info(socket).map_or(true, |info| info.notsent_bytes == 0)
}

/// One direction.
struct Direction {
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

fn ended_by(side: Side, error: io::Result<Option<io::Error>>) -> End {
    let Ok(Some(error)) = error else { return End::Reset(side) };
    match error.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::NotConnected => End::Reset(side),
        io::ErrorKind::TimedOut | io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
            End::Vanished(side)
        }
        _ => {
            tracing::warn!(?side, %error, "a system call failed in mid-connection");
            End::Error
        }
    }
}

/// The end of a stream must have come with a FIN. A socket tells of a RST once, to whichever call comes first, and then reads like one that ended well.
fn prove_fin(from: &TcpStream, has_our_fin: bool) -> io::Result<()> {
    // After both FINs the kernel may have closed it too (TIME_WAIT); but then nothing was written to it that could have taken the error.
    if has_our_fin || sys::tcp_info(from)?.state != sys::TCP_CLOSE {
        Ok(())
    } else {
        Err(io::ErrorKind::ConnectionReset.into())
    }
}

impl Direction {
    fn new(kind: Kind, first: First) -> Self {
        let held = if first.bytes.is_empty() { Held::Nothing } else { Held::Buffer { bytes: first.bytes, sent: 0 } };
        Self { splice: kind == Kind::Splice, held, header: first.header, flow: Flow::Open, bulk: false, moved: 0 }
    }

    fn is_finished(&self) -> bool {
        self.flow == Flow::Finished
    }

    /// Moves bytes until one side has to be waited for; ready when FIN was passed on. `from_has_our_fin`: the other direction is finished.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &TcpStream,
        to: &TcpStream,
        counter: &Counter,
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
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    ready!(from.poll_read_ready(cx)).map_err(Broken::Source)?;
                }
                Err(e) => return Poll::Ready(Err(Broken::Source(e))),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Sends what is held; ready when nothing is, and the receiver takes more: nothing is read that could not be sent.
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

    /// One read; what the receiver does not take at once is held. The number of bytes, 0 at the end of the stream.
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
                // Told once: recv would find the socket without error, and take it for the end of the stream.
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

/// Idle timeout and vanished peers, with one timer that rests while nothing moves.
struct Watch {
    timeouts: Timeouts,
    last_bytes: Instant,
    /// When to look at the legs; `None` while both are quiet.
    next_look: Option<Instant>,
    legs: [Leg; 2],
    /// Whether TCP_USER_TIMEOUT is on.
    user_timeout: bool,
}

impl Watch {
    fn new(timeouts: Timeouts) -> Self {
        Self {
            timeouts,
            last_bytes: Instant::now(),
            next_look: None,
            legs: [Leg::default(), Leg::default()],
            user_timeout: true,
        }
    }

    fn deadline(&self) -> Instant {
        let idle = self.last_bytes + self.timeouts.idle;
        self.next_look.map_or(idle, |look| look.min(idle))
    }

    /// Notes that bytes moved; true when the timer has to be set anew.
    fn bytes_moved(&mut self, now: Instant) -> bool {
        self.last_bytes = now;
        let was_quiet = self.next_look.is_none();
        if was_quiet {
            self.next_look = Some(self.last_bytes + vigil::interval(self.timeouts.dead_peer));
        }
        was_quiet
    }

    /// No event will tell what is waited for: look again before long.
    fn keep_looking(&mut self) {
        let soon = Instant::now() + vigil::interval(self.timeouts.dead_peer).min(TAIL_TICK);
        self.next_look = Some(self.next_look.map_or(soon, |look| look.min(soon)));
    }

    /// The timer fired.
    fn look(&mut self, client: &TcpStream, upstream: &TcpStream) -> Option<End> {
        let now = Instant::now();
        if now >= self.last_bytes + self.timeouts.idle {
            return Some(End::Idle);
        }
        if self.next_look.is_none_or(|look| look > now) {
            return None;
        }
        let dead_peer = self.timeouts.dead_peer;
        let mut quiet = now >= self.last_bytes + vigil::interval(dead_peer);
        for (leg, (side, socket)) in self.legs.iter_mut().zip([(Side::Client, client), (Side::Upstream, upstream)]) {
            let Ok(info) = sys::tcp_info(socket) else { continue };
            match leg.judge(&info, now.into_std(), dead_peer) {
                Finding::Quiet => {}
                Finding::Vanished => return Some(End::Vanished(side)),
                Finding::Waiting => {
                    quiet = false;
                    if self.user_timeout {
                        self.user_timeout = false;
                        let _ = socket::no_user_timeout(client);
                        let _ = socket::no_user_timeout(upstream);
                    }
                }
            }
        }
        self.next_look = (!quiet).then(|| now + vigil::interval(dead_peer));
        None
    }
}
