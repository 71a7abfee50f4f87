//! One direction of a connection in the sockmap, on the daemon's side: asleep while the kernel
//! forwards, forwarding itself while it must.
//!
//! The counterpart of [`common::sockmap::governor`]; ARCHITECTURE.md tells the protocol between
//! both. No sockets here: what has to be done to them is asked of [`Ports`], so that a test can
//! play the kernel, and the clock is an argument.

use std::io;
use std::time::Duration;

use common::sockmap::Row;
use common::sockmap::governor::{HOLD, RUN, Reason};
use tokio::time::Instant;

use crate::engine::copy;

/// Reads before others get their turn.
const READS_PER_TURN: usize = 4;

/// Nothing tells when the sink has taken what was redirected to it: how soon to look again,
/// doubling.
const FIRST_POLL: Duration = Duration::from_millis(1);
const LAST_POLL: Duration = Duration::from_millis(50);

/// How long userspace keeps a direction after it left the kernel's path, at least. It doubles each
/// time the direction comes back within [`FLAP`] of its return, so that a reader that is just too
/// slow does not cost an event for each segment.
const STAY: Duration = Duration::from_millis(10);
const LONGEST_STAY: Duration = Duration::from_secs(5);
const FLAP: Duration = Duration::from_secs(1);

/// Bytes that do not turn up for so long after the end of the stream are lost; so is the connection
/// then.
const LOST_AFTER: Duration = Duration::from_secs(10);

/// What a direction asks of its sockets.
pub trait Ports {
    /// What it shares with the verdict program.
    fn row(&self) -> &Row;
    /// Takes the source's lock and gives it back: a verdict that was running has ended. Then says
    /// what the source has received.
    fn barrier(&mut self) -> io::Result<Received>;
    /// Bytes of this direction that the sink's send queue has accepted, at least.
    fn accepted(&mut self) -> io::Result<u64>;
    /// Whether the other direction has bytes for the source that its send queue has not accepted.
    fn source_has_backlog(&mut self) -> io::Result<bool>;
    /// Reads once from the source and writes to the sink what it takes.
    fn step(&mut self) -> io::Result<copy::Step>;
    /// Reads once from the source, behind what is there already.
    fn read(&mut self, rest: &mut Vec<u8>) -> io::Result<usize>;
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize>;
}

/// What a source has received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// Bytes, without FIN, since it went into the map.
    pub bytes: u64,
    /// It is closed, though we have not sent FIN: by a reset.
    pub reset: bool,
}

/// Where a direction is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The kernel forwards.
    Kernel,
    /// Userspace will forward as soon as the sink has all that the kernel sent on.
    Proving,
    /// Userspace forwards.
    Userspace,
    /// The source has ended, and the sink has accepted every byte.
    Complete,
}

/// Who is to forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// The kernel, where it can.
    Kernel,
    /// Userspace, until further notice.
    Userspace,
    /// Userspace, which keeps what the sink does not take: nothing new comes, so that is no more
    /// than the source's receive buffer had.
    Collect,
}

/// What a direction waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    Event,
    /// This time, or an event.
    At(Instant),
    /// Nothing: it has only had its turn.
    Turn,
}

/// Why a direction cannot go on.
#[derive(Debug)]
pub enum Broken {
    Source(io::Error),
    Sink(io::Error),
    /// Bytes are missing, or more came than the receive window allows.
    Unproven(&'static str),
}

#[derive(Debug)]
pub struct Stream {
    pub phase: Phase,
    /// The source may have something to read.
    pub readable: bool,
    /// The sink may have room.
    pub writable: bool,
    /// The source's peer has sent FIN, perhaps with bytes before it that were not seen yet.
    pub source_ended: bool,
    /// Read by userspace.
    read: u64,
    /// Of that, accepted by the sink. The same as [`Row::consumed`].
    written: u64,
    /// Read and not yet written: `rest[sent..]`.
    rest: Vec<u8>,
    sent: usize,
    poll: Duration,
    stay: Duration,
    /// When userspace took over, and what it had forwarded by then.
    since: Instant,
    written_before: u64,
    /// When the kernel took over.
    returned: Option<Instant>,
    incomplete_since: Option<Instant>,
    /// Why the kernel gave it up last; taken by [`left_for`](Self::left_for).
    left_for: Option<Reason>,
}

impl Stream {
    /// A direction that userspace forwards at first: the row says [`HOLD`].
    pub fn new(now: Instant) -> Self {
        Self {
            phase: Phase::Userspace,
            readable: true,
            writable: true,
            source_ended: false,
            read: 0,
            written: 0,
            rest: Vec::new(),
            sent: 0,
            poll: FIRST_POLL,
            stay: Duration::ZERO,
            since: now,
            written_before: 0,
            returned: None,
            incomplete_since: None,
            left_for: None,
        }
    }

    /// Why the kernel has given the direction up since this was last asked.
    pub fn left_for(&mut self) -> Option<Reason> {
        self.left_for.take()
    }

    /// Bytes that userspace has forwarded.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Bytes that userspace has forwarded since it last took over.
    pub fn written_since(&self) -> u64 {
        self.written - self.written_before
    }

    /// Whether userspace holds bytes that the sink did not take.
    pub fn is_blocked(&self) -> bool {
        self.sent < self.rest.len()
    }

    /// Whether userspace forwards, has forwarded all that there is, and nothing is left behind in
    /// the source.
    pub fn is_drained(&self, row: &Row) -> bool {
        match self.phase {
            Phase::Complete => true,
            Phase::Userspace => !self.readable && !self.is_blocked() && row.passed.get() == self.written,
            Phase::Kernel | Phase::Proving => false,
        }
    }

    /// As [`is_drained`](Self::is_drained), where what the sink did not take is kept.
    pub fn is_collected(&self, row: &Row) -> bool {
        match self.phase {
            Phase::Complete => true,
            Phase::Userspace => !self.readable && row.passed.get() == self.read,
            Phase::Kernel | Phase::Proving => false,
        }
    }

    /// What was read and not written.
    pub fn rest(&self) -> &[u8] {
        &self.rest[self.sent..]
    }

    /// Does what can be done now.
    pub fn advance(&mut self, ports: &mut impl Ports, now: Instant, want: Want) -> Result<Next, Broken> {
        match Reason::from_u32(ports.row().reason.get()) {
            Reason::Flood => return Err(Broken::Unproven("more was received than the receive window allows")),
            Reason::Lost => return Err(Broken::Unproven("the kernel dropped bytes")),
            Reason::Held | Reason::Slow | Reason::Bulk | Reason::NoSink => {}
        }
        loop {
            match self.phase {
                Phase::Complete => return Ok(Next::Event),
                Phase::Kernel => {
                    if want == Want::Kernel && !self.source_ended && ports.row().passed.get() == self.written {
                        return Ok(Next::Event);
                    }
                    self.hold(ports, now)?;
                }
                Phase::Proving => {
                    let sent_on = ports.row().redirected.get() + self.written;
                    if ports.accepted().map_err(Broken::Sink)? < sent_on {
                        return Ok(self.look_again(now));
                    }
                    self.phase = Phase::Userspace;
                    self.poll = FIRST_POLL;
                }
                Phase::Userspace => {
                    if let Some(next) = self.pump(ports, now, want)? {
                        return Ok(next);
                    }
                }
            }
        }
    }

    fn look_again(&mut self, now: Instant) -> Next {
        let at = now + self.poll;
        self.poll = (self.poll * 2).min(LAST_POLL);
        Next::At(at)
    }

    /// Takes the direction from the kernel.
    fn hold(&mut self, ports: &mut impl Ports, now: Instant) -> Result<(), Broken> {
        ports.row().mode.set(HOLD);
        // Behind the barrier no verdict redirects any more, and `redirected` stands still.
        not_reset(ports.barrier().map_err(Broken::Source)?)?;
        self.phase = Phase::Proving;
        if ports.row().passed.get() != self.written {
            self.left_for = Some(Reason::from_u32(ports.row().reason.get()));
        }
        self.poll = FIRST_POLL;
        (self.readable, self.writable) = (true, true);
        let flaps = self.returned.is_some_and(|returned| now.saturating_duration_since(returned) < FLAP);
        self.stay = if flaps { (self.stay * 2).clamp(STAY, LONGEST_STAY) } else { STAY };
        (self.since, self.written_before) = (now, self.written);
        Ok(())
    }

    /// Forwards in userspace. `None` when the phase has changed.
    fn pump(&mut self, ports: &mut impl Ports, now: Instant, want: Want) -> Result<Option<Next>, Broken> {
        for _ in 0..READS_PER_TURN {
            while self.is_blocked() {
                if !self.writable {
                    if want == Want::Collect {
                        break;
                    }
                    return Ok(Some(Next::Event));
                }
                match ports.write(&self.rest[self.sent..]) {
                    Ok(n) => {
                        self.sent += n;
                        self.publish(ports, n);
                    }
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                    Err(e) => return Err(Broken::Sink(e)),
                }
            }
            if !self.is_blocked() {
                (self.rest, self.sent) = (Vec::new(), 0);
            }
            if !self.readable {
                return self.rest_or_return(ports, now, want);
            }
            if self.is_blocked() {
                match ports.read(&mut self.rest) {
                    Ok(0) => return self.end(ports, now),
                    Ok(n) => self.read += n as u64,
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                    Err(e) => return Err(Broken::Source(e)),
                }
                continue;
            }
            match ports.step() {
                Ok(step) if step.read == 0 => return self.end(ports, now),
                Ok(step) => {
                    self.incomplete_since = None;
                    self.read += step.read as u64;
                    self.publish(ports, step.written);
                    if let Some(error) = step.write_error {
                        return Err(Broken::Sink(error));
                    }
                    self.writable &= step.rest.is_empty();
                    self.rest = step.rest;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(e) => return Err(Broken::Source(e)),
            }
        }
        Ok(Some(Next::Turn))
    }

    /// Tells the program, after the sink has accepted the bytes.
    fn publish(&mut self, ports: &mut impl Ports, bytes: usize) {
        self.written += bytes as u64;
        ports.row().consumed.set(self.written);
    }

    /// There is nothing to read.
    fn rest_or_return(&mut self, ports: &mut impl Ports, now: Instant, want: Want) -> Result<Option<Next>, Broken> {
        if ports.row().passed.get() != self.read {
            // Passed bytes queue behind what the other direction sent to this socket. An event
            // tells when they can be read; to look is cheap, and leans on nothing.
            self.readable = true;
            return Ok(Some(self.look_again(now)));
        }
        self.poll = FIRST_POLL;
        if want != Want::Kernel || self.source_ended {
            return Ok(Some(Next::Event));
        }
        let until = self.since + self.stay;
        if now < until {
            return Ok(Some(Next::At(until)));
        }
        ports.row().mode.set(RUN);
        self.phase = Phase::Kernel;
        self.returned = Some(now);
        // A verdict that still saw HOLD has passed its bytes and told nobody; behind the barrier
        // `advance` sees them.
        not_reset(ports.barrier().map_err(Broken::Source)?)?;
        Ok(None)
    }

    /// The source says that it has ended.
    fn end(&mut self, ports: &mut impl Ports, now: Instant) -> Result<Option<Next>, Broken> {
        let received = ports.barrier().map_err(Broken::Source)?;
        not_reset(received)?;
        self.source_ended = true;
        if ports.row().redirected.get() + self.read == received.bytes {
            self.phase = Phase::Complete;
            return Ok(None);
        }
        if ports.row().redirected.get() + self.read > received.bytes {
            return Err(Broken::Unproven("bytes were doubled"));
        }
        if ports.source_has_backlog().map_err(Broken::Source)? {
            // They are in the queue behind the other direction's bytes, however long that takes.
            self.incomplete_since = None;
        }
        let since = *self.incomplete_since.get_or_insert(now);
        if now.saturating_duration_since(since) > LOST_AFTER {
            return Err(Broken::Unproven("bytes were lost"));
        }
        Ok(Some(self.look_again(now)))
    }
}

/// A socket tells of a RST once, to whichever call comes first, and then reads like one that ended
/// well.
fn not_reset(received: Received) -> Result<(), Broken> {
    if received.reset { Err(Broken::Source(io::ErrorKind::ConnectionReset.into())) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A source that has nothing to read, and a sink that has taken everything.
    #[derive(Default)]
    struct Quiet(Row);

    impl Ports for Quiet {
        fn row(&self) -> &Row {
            &self.0
        }

        fn barrier(&mut self) -> io::Result<Received> {
            Ok(Received { bytes: 0, reset: false })
        }

        fn accepted(&mut self) -> io::Result<u64> {
            Ok(self.0.redirected.get() + self.0.consumed.get())
        }

        fn source_has_backlog(&mut self) -> io::Result<bool> {
            Ok(false)
        }

        fn step(&mut self) -> io::Result<copy::Step> {
            let read = (self.0.passed.get() - self.0.consumed.get()) as usize;
            if read == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            Ok(copy::Step { read, written: read, rest: Vec::new(), write_error: None })
        }

        fn read(&mut self, _rest: &mut Vec<u8>) -> io::Result<usize> {
            Err(io::ErrorKind::WouldBlock.into())
        }

        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            unreachable!("the sink takes everything at once")
        }
    }

    /// The verdict passes a byte; for how long userspace keeps the direction then.
    fn spill(stream: &mut Stream, ports: &mut Quiet, now: Instant) -> Duration {
        ports.0.passed.add(1);
        let next = stream.advance(ports, now, Want::Kernel).expect("nothing breaks");
        let Next::At(until) = next else { panic!("{next:?}") };
        assert_eq!((stream.phase, ports.0.mode.get()), (Phase::Userspace, HOLD));
        assert_eq!(stream.advance(ports, until, Want::Kernel).expect("nothing breaks"), Next::Event);
        assert_eq!((stream.phase, ports.0.mode.get()), (Phase::Kernel, RUN));
        until - now
    }

    #[test]
    fn a_direction_that_comes_back_at_once_stays_twice_as_long_up_to_a_bound() {
        let (mut now, mut ports) = (Instant::now(), Quiet::default());
        let mut stream = Stream::new(now);
        assert_eq!(stream.advance(&mut ports, now, Want::Kernel).expect("nothing breaks"), Next::Event);
        assert_eq!(stream.phase, Phase::Kernel, "a new one need not stay");
        now += FLAP;
        let mut expected = STAY;
        for _ in 0..20 {
            let stay = spill(&mut stream, &mut ports, now);
            assert_eq!(stay, expected);
            expected = (stay * 2).min(LONGEST_STAY);
            now += stay + Duration::from_millis(1);
        }
        assert_eq!(expected, LONGEST_STAY);
        now += FLAP;
        assert_eq!(spill(&mut stream, &mut ports, now), STAY, "forgiven");
    }

    #[test]
    fn a_direction_that_is_wanted_in_userspace_stays_there() {
        let (now, mut ports) = (Instant::now(), Quiet::default());
        let mut stream = Stream::new(now);
        stream.advance(&mut ports, now, Want::Kernel).expect("nothing breaks");
        for _ in 0..3 {
            assert_eq!(
                stream.advance(&mut ports, now + LONGEST_STAY, Want::Userspace).expect("nothing breaks"),
                Next::Event
            );
            assert_eq!((stream.phase, ports.0.mode.get()), (Phase::Userspace, HOLD));
            assert!(stream.is_drained(&ports.0));
        }
    }

    #[test]
    fn a_flood_ends_the_connection() {
        let (now, mut ports) = (Instant::now(), Quiet::default());
        ports.0.reason.set(Reason::Flood as u32);
        assert!(matches!(Stream::new(now).advance(&mut ports, now, Want::Kernel), Err(Broken::Unproven(_))));
    }
}
