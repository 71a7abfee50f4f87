//! Connections of every kind through the daemon at once, each of which verifies itself: what must
//! not notice that one daemon hands over to the next.
//!
//! The upstream that the test plays is in this process, too. A connection begins with a hello, then
//! one line that says what the upstream is to do. Whatever goes wrong on either side is in the
//! [`Report`], in words.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use socket2::SockRef;

use crate::netns::Net;
use crate::rig::{hello, public};
use crate::stream::{Pattern, read_preamble};

/// How many of each kind.
#[derive(Debug, Clone, Copy)]
pub struct Numbers {
    /// Connections that begin, exchange a message and end, a second.
    pub new: usize,
    /// Connections that exchange messages all the time.
    pub exchanges: usize,
    /// Bulk flows, each way.
    pub bulk: usize,
    /// Downloads that nobody reads until the end.
    pub stalled: usize,
    /// Connections that say nothing until the end.
    pub idle: usize,
    /// Connections of which one side has sent FIN, of each side.
    pub half_closed: usize,
    /// Connections at a time whose hello comes byte by byte.
    pub slow_hellos: usize,
}

impl Numbers {
    /// What an entrance node of a busy household has.
    pub const FULL: Self =
        Self { new: 200, exchanges: 100, bulk: 16, stalled: 100, idle: 1000, half_closed: 10, slow_hellos: 10 };

    /// A tenth of it.
    pub const TENTH: Self =
        Self { new: 40, exchanges: 10, bulk: 2, stalled: 10, idle: 100, half_closed: 3, slow_hellos: 3 };

    /// Nothing moves by itself: for what is looked at closely.
    pub const QUIET: Self = Self { new: 0, exchanges: 0, bulk: 0, stalled: 0, idle: 0, half_closed: 0, slow_hellos: 0 };
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Report {
    /// Each failure, in words.
    pub failures: Vec<String>,
    /// Connections that were made.
    pub connections: usize,
    /// Of those, the ones that began and ended under way.
    pub new: usize,
    /// Bytes that were verified.
    pub bytes: u64,
    /// How long each exchange took, shortest first.
    pub exchanges: Vec<Duration>,
}

impl Report {
    /// Panics unless nobody noticed anything.
    #[track_caller]
    pub fn assert_unnoticed(&self) {
        let some: Vec<_> = self.failures.iter().take(20).collect();
        assert!(some.is_empty(), "{} of {} connections noticed: {some:#?}", self.failures.len(), self.connections);
    }

    /// The exchange that took longer than this share of all.
    pub fn percentile(&self, share: f64) -> Duration {
        let last = self.exchanges.len().saturating_sub(1);
        self.exchanges.get((last as f64 * share) as usize).copied().unwrap_or_default()
    }

    /// In one line.
    pub fn summary(&self) -> String {
        format!(
            "{} connections ({} of them began and ended under way), {} MB, {} exchanges: p50 {:?}, p99 {:?}, worst {:?}; {} failures",
            self.connections,
            self.new,
            self.bytes / 1_000_000,
            self.exchanges.len(),
            self.percentile(0.5),
            self.percentile(0.99),
            self.percentile(1.0),
            self.failures.len()
        )
    }
}

/// Bytes of a download that is stalled: more than the buffers on its way hold.
const STALLED: u64 = 5_000_000;
/// Longer than any load lasts: who waits until its end is not stuck.
const STUCK: Option<Duration> = Some(Duration::from_secs(600));
/// Bytes of a message.
const MESSAGE: usize = 200;
/// Between two messages of a connection.
const THOUGHT: Duration = Duration::from_millis(20);
/// Between two pieces of a half-closed stream, and between two bytes of a slow hello.
const DRIP: Duration = Duration::from_millis(40);
const BYTE: Duration = Duration::from_millis(2);
/// Threads that make new connections.
const MAKERS: usize = 8;

/// What the upstream does.
const ECHO: u8 = b'e';
/// Sends so many bytes, then FIN.
const SEND: u8 = b's';
/// Sends a little now and then until the end, then FIN.
const DRIP_DOWN: u8 = b'd';
/// Receives until FIN; says how much that was.
const RECEIVE: u8 = b'r';
/// Sends FIN at once, and receives until FIN.
const CLOSE_AND_RECEIVE: u8 = b'c';

#[derive(Default)]
struct State {
    stops: AtomicBool,
    /// The clients are done.
    is_over: AtomicBool,
    begun: AtomicUsize,
    new: AtomicUsize,
    seed: AtomicU64,
    bytes: AtomicU64,
    failures: Mutex<Vec<String>>,
    exchanges: Mutex<Vec<Duration>>,
}

impl State {
    fn fail(&self, what: &str, error: &io::Error) {
        self.failures.lock().expect("no panic while held").push(format!("{what}: {error}"));
    }

    fn stops(&self) -> bool {
        self.stops.load(Relaxed)
    }
}

/// The clients stop when this is dropped, also because a test gives up in the middle.
struct Stops<'s>(&'s State);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.stops.store(true, Relaxed);
    }
}

/// The same of the upstream.
struct Over<'s>(&'s State);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.is_over.store(true, Relaxed);
    }
}

/// Has the load run while `during` does, and some time after it.
pub fn under_load<T>(net: &Net, upstream: &TcpListener, numbers: Numbers, during: impl FnOnce() -> T) -> (T, Report) {
    let state = State::default();
    state.seed.store(1, Relaxed);
    upstream.set_nonblocking(true).expect("fcntl");
    let outcome = thread::scope(|scope| {
        scope.spawn(|| serve(scope, upstream, &state));
        let _over = Over(&state);
        thread::scope(|clients| {
            let quiet = begin(net, clients, numbers, &state);
            let stops = Stops(&state);
            let outcome = during();
            thread::sleep(Duration::from_millis(300));
            drop(stops);
            for (what, connection) in quiet {
                clients.spawn({
                    let state = &state;
                    move || note(state, what, connection.and_then(|connection| connection.end(state)))
                });
            }
            outcome
        })
    });
    upstream.set_nonblocking(false).expect("fcntl");
    let mut exchanges = state.exchanges.into_inner().expect("no panic while held");
    exchanges.sort_unstable();
    let report = Report {
        failures: state.failures.into_inner().expect("no panic while held"),
        connections: state.begun.into_inner(),
        new: state.new.into_inner(),
        bytes: state.bytes.into_inner(),
        exchanges,
    };
    (outcome, report)
}

/// A connection that waits for the end.
struct Waiting {
    stream: TcpStream,
    pattern: Pattern,
    /// It has this to read; 0: it exchanges a message.
    unread: u64,
}

impl Waiting {
    fn end(self, state: &State) -> io::Result<()> {
        if self.unread == 0 {
            exchange(&self.stream, self.pattern, 1)?;
            return finish(&self.stream);
        }
        receive(&self.stream, self.pattern, state).and_then(|n| expect("bytes", n, self.unread))
    }
}

fn note(state: &State, what: &str, outcome: io::Result<()>) {
    if let Err(error) = outcome {
        state.fail(what, &error);
    }
}

fn begin<'s>(
    net: &'s Net,
    clients: &'s Scope<'s, '_>,
    numbers: Numbers,
    state: &'s State,
) -> Vec<(&'static str, io::Result<Waiting>)> {
    let connect = move |kind: u8, size: u64| connect(net, state, kind, size, None);
    let mut quiet = Vec::new();
    for _ in 0..numbers.idle {
        let idle = connect(ECHO, 0).and_then(|(stream, pattern)| {
            exchange(&stream, pattern, 0)?;
            Ok(Waiting { stream, pattern, unread: 0 })
        });
        quiet.push(("an idle connection", idle));
    }
    for _ in 0..numbers.stalled {
        let stalled = connect(SEND, STALLED);
        let stalled = stalled.map(|(stream, pattern)| Waiting { stream, pattern, unread: STALLED });
        quiet.push(("a stalled download", stalled));
    }
    let run = move |what: &'static str, task: fn(&State, &TcpStream, Pattern) -> io::Result<()>, kind, size| {
        clients.spawn(move || {
            note(state, what, connect(kind, size).and_then(|(stream, pattern)| task(state, &stream, pattern)));
        });
    };
    for _ in 0..numbers.exchanges {
        run("an exchange", exchanges, ECHO, 0);
    }
    for _ in 0..numbers.bulk {
        run("an upload", upload, RECEIVE, 0);
        run("a download", download, SEND, u64::MAX);
    }
    for _ in 0..numbers.half_closed {
        run("a download after the client's FIN", drip_down, DRIP_DOWN, 0);
        run("an upload after the upstream's FIN", drip_up, CLOSE_AND_RECEIVE, 0);
    }
    for _ in 0..numbers.slow_hellos {
        clients.spawn(move || {
            while !state.stops() {
                let slow = connect_slowly(net, state).and_then(|(stream, pattern)| {
                    exchange(&stream, pattern, 0)?;
                    finish(&stream)
                });
                note(state, "a hello that comes byte by byte", slow);
            }
        });
    }
    for _ in 0..MAKERS.min(numbers.new) {
        let pause = Duration::from_secs(1) * MAKERS as u32 / numbers.new as u32;
        clients.spawn(move || {
            let mut due = Instant::now();
            while !state.stops() {
                let new = connect(ECHO, 0).and_then(|(stream, pattern)| {
                    exchange(&stream, pattern, 0)?;
                    finish(&stream)
                });
                state.new.fetch_add(1, Relaxed);
                note(state, "a new connection", new);
                due += pause;
                thread::sleep(due.saturating_duration_since(Instant::now()));
            }
        });
    }
    quiet
}

/// Connects, and says what the upstream is to do.
fn connect(
    net: &Net,
    state: &State,
    kind: u8,
    size: u64,
    between_bytes: Option<Duration>,
) -> io::Result<(TcpStream, Pattern)> {
    let at = |step: &'static str| move |error: io::Error| io::Error::new(error.kind(), format!("{step}: {error}"));
    state.begun.fetch_add(1, Relaxed);
    let seed = state.seed.fetch_add(1, Relaxed);
    let mut stream = net.client.connect(public()).map_err(at("connect"))?;
    stream.set_read_timeout(STUCK).and(stream.set_write_timeout(STUCK))?;
    stream.set_nodelay(true)?;
    let first = [&hello()[..], &[kind], &seed.to_be_bytes(), &size.to_be_bytes()].concat();
    match between_bytes {
        None => stream.write_all(&first).map_err(at("hello"))?,
        Some(pause) => {
            for byte in &first {
                stream.write_all(&[*byte]).map_err(at("hello"))?;
                thread::sleep(pause);
            }
        }
    }
    Ok((stream, Pattern::new(seed)))
}

fn connect_slowly(net: &Net, state: &State) -> io::Result<(TcpStream, Pattern)> {
    connect(net, state, ECHO, 0, Some(BYTE))
}

/// One message there and back.
fn exchange(mut stream: &TcpStream, pattern: Pattern, number: u64) -> io::Result<()> {
    let message = pattern.at(number * MESSAGE as u64, MESSAGE as u64);
    stream.write_all(message)?;
    let mut back = [0; MESSAGE];
    stream.read_exact(&mut back)?;
    if back == *message { Ok(()) } else { Err(io::Error::other(format!("message {number} came back changed"))) }
}

fn exchanges(state: &State, stream: &TcpStream, pattern: Pattern) -> io::Result<()> {
    let mut took = Vec::new();
    for number in 0.. {
        if state.stops() {
            break;
        }
        let start = Instant::now();
        exchange(stream, pattern, number)?;
        took.push(start.elapsed());
        thread::sleep(THOUGHT);
    }
    state.exchanges.lock().expect("no panic while held").extend(took);
    finish(stream)
}

/// Sends FIN and expects one.
fn finish(mut stream: &TcpStream) -> io::Result<()> {
    stream.shutdown(Shutdown::Write)?;
    let mut rest = [0; 1];
    match stream.read(&mut rest)? {
        0 => Ok(()),
        _ => Err(io::Error::other("a byte too many")),
    }
}

fn upload(state: &State, mut stream: &TcpStream, pattern: Pattern) -> io::Result<()> {
    let mut sent = 0;
    while !state.stops() {
        sent += stream.write(pattern.at(sent, 64 << 10))? as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut received = [0; 8];
    stream.read_exact(&mut received)?;
    expect("bytes at the upstream", u64::from_be_bytes(received), sent)
}

/// Reads for as long as the load lasts, and resets.
fn download(state: &State, mut stream: &TcpStream, pattern: Pattern) -> io::Result<()> {
    let (mut buffer, mut position) = (vec![0; 64 << 10], 0);
    while !state.stops() {
        let n = stream.read(&mut buffer)?;
        if n == 0 {
            return Err(io::Error::other(format!("FIN at {position}")));
        }
        verify(pattern, position, &buffer[..n])?;
        position += n as u64;
    }
    state.bytes.fetch_add(position, Relaxed);
    // It is closed by the caller.
    SockRef::from(stream).set_linger(Some(Duration::ZERO))
}

fn drip_down(state: &State, stream: &TcpStream, pattern: Pattern) -> io::Result<()> {
    stream.shutdown(Shutdown::Write)?;
    receive(stream, pattern, state).map(drop)
}

fn drip_up(state: &State, mut stream: &TcpStream, pattern: Pattern) -> io::Result<()> {
    let mut first = [0; 1];
    match stream.read(&mut first)? {
        0 => {}
        _ => return Err(io::Error::other("bytes of an upstream that has none")),
    }
    let mut sent = 0;
    while !state.stops() {
        stream.write_all(pattern.at(sent, MESSAGE as u64))?;
        sent += MESSAGE as u64;
        thread::sleep(DRIP);
    }
    stream.shutdown(Shutdown::Write)
}

/// Receives and verifies to FIN; how many bytes that was.
fn receive(mut stream: &TcpStream, pattern: Pattern, state: &State) -> io::Result<u64> {
    let (mut buffer, mut position) = (vec![0; 64 << 10], 0);
    loop {
        let n = stream
            .read(&mut buffer)
            .map_err(|error| io::Error::new(error.kind(), format!("reading at {position}: {error}")))?;
        if n == 0 {
            state.bytes.fetch_add(position, Relaxed);
            return Ok(position);
        }
        verify(pattern, position, &buffer[..n])?;
        position += n as u64;
    }
}

fn verify(pattern: Pattern, position: u64, bytes: &[u8]) -> io::Result<()> {
    let expected = pattern.at(position, bytes.len() as u64);
    match bytes.iter().zip(expected).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(first) => Err(io::Error::other(format!("a wrong byte at position {}", position + first as u64))),
    }
}

fn expect(what: &str, got: u64, expected: u64) -> io::Result<()> {
    if got == expected { Ok(()) } else { Err(io::Error::other(format!("{got} {what}, not {expected}"))) }
}

/// The upstream.
fn serve<'s>(scope: &'s Scope<'s, '_>, upstream: &'s TcpListener, state: &'s State) {
    while !state.is_over.load(Relaxed) {
        match upstream.accept() {
            Ok((stream, _)) => {
                thread::Builder::new()
                    .stack_size(256 << 10)
                    .spawn_scoped(scope, move || {
                        if let Err((what, error)) = answer(stream, state) {
                            state.fail(what, &error);
                        }
                    })
                    .expect("a thread");
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(Duration::from_millis(1)),
            Err(error) => panic!("accept: {error}"),
        }
    }
}

fn answer(mut stream: TcpStream, state: &State) -> Result<(), (&'static str, io::Error)> {
    let of = |what: &'static str| move |error: io::Error| (what, error);
    stream.set_nonblocking(false).expect("fcntl");
    stream.set_read_timeout(STUCK).and(stream.set_write_timeout(STUCK)).expect("a time limit");
    stream.set_nodelay(true).expect("TCP_NODELAY");
    // A dial that was given up, for the benefit of another one, sends nothing.
    let Ok(_) = read_preamble(&stream, false) else { return Ok(()) };
    let mut order = [0; 17];
    stream.read_exact(&mut order).map_err(of("the upstream, at the beginning"))?;
    let number = |at: usize| u64::from_be_bytes(order[at..at + 8].try_into().expect("8 bytes"));
    let (pattern, size) = (Pattern::new(number(1)), number(9));
    match order[0] {
        ECHO => echo(stream).map_err(of("the upstream of an exchange")),
        SEND => {
            let sent = pattern.send(&stream, 0, size).and_then(|()| stream.shutdown(Shutdown::Write));
            match sent {
                // Endless: the client ends it.
                Err(error) if size == u64::MAX && is_reset(&error) && state.stops() => Ok(()),
                sent => sent.map_err(of("the upstream of a download")),
            }
        }
        DRIP_DOWN => {
            let mut sent = 0;
            while !state.stops() {
                stream
                    .write_all(pattern.at(sent, MESSAGE as u64))
                    .map_err(of("the upstream, after the client's FIN"))?;
                sent += MESSAGE as u64;
                thread::sleep(DRIP);
            }
            stream.shutdown(Shutdown::Write).map_err(of("the upstream, after the client's FIN"))
        }
        RECEIVE => {
            let received = receive(&stream, pattern, state).map_err(of("the upstream of an upload"))?;
            stream.write_all(&received.to_be_bytes()).map_err(of("the upstream of an upload"))
        }
        CLOSE_AND_RECEIVE => {
            stream.shutdown(Shutdown::Write).map_err(of("the upstream, after its FIN"))?;
            receive(&stream, pattern, state).map(drop).map_err(of("the upstream, after its FIN"))
        }
        other => Err(("the upstream", io::Error::other(format!("an order {other}")))),
    }
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        let n = stream.read(&mut buffer)?;
        if n == 0 {
            return stream.shutdown(Shutdown::Write);
        }
        stream.write_all(&buffer[..n])?;
    }
}

fn is_reset(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
}
