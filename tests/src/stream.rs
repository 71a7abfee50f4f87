//! Byte streams that verify themselves, plain ClientHellos, and how a TCP connection ends.
//!
//! A [`Pattern`] gives the byte at every position of a stream without keeping the stream, at the
//! speed of a memory comparison. Nothing here speaks TLS beyond the hello: what follows it is
//! opaque to whoever forwards it.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::SockRef;

use crate::random::splitmix64;

/// The period of a pattern, a prime: no buffer or pipe has a size that divides it, so what is lost,
/// doubled or swapped shows.
const PERIOD: usize = 4_194_301;
/// The longest run of a pattern in one slice, bytes.
const RUN: usize = 256 << 10;

static TABLE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut table = Vec::with_capacity(PERIOD + RUN);
    for n in 0..PERIOD as u64 {
        table.push(splitmix64(n) as u8);
    }
    table.extend_from_within(..RUN);
    table
});

/// How a stream ended for its reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// FIN: the peer says that this was all.
    Fin,
    /// RST.
    Reset,
    /// Nothing more within the time limit.
    Silence,
}

/// An endless deterministic stream; another seed gives another one, so that a byte of a foreign
/// connection shows.
#[derive(Debug, Clone, Copy)]
pub struct Pattern(u64);

impl Pattern {
    /// The stream of this seed.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The bytes from `position` on, as many as `len` or 256 KiB.
    pub fn at(self, position: u64, len: u64) -> &'static [u8] {
        let start = ((splitmix64(self.0 ^ 0xdead_beef) % PERIOD as u64 + position) % PERIOD as u64) as usize;
        &TABLE[start..start + len.min(RUN as u64) as usize]
    }

    /// Writes the bytes `from..to`.
    pub fn send(self, mut stream: &TcpStream, from: u64, to: u64) -> io::Result<()> {
        let mut position = from;
        while position < to {
            position += match stream.write(self.at(position, to - position)) {
                Err(e) if e.kind() == ErrorKind::Interrupted => 0,
                written => written? as u64,
            };
        }
        Ok(())
    }

    /// As [`send`](Self::send), where nobody reads yet: the kernel takes all, however much of it
    /// the others have room for.
    pub fn leave(self, stream: &TcpStream, from: u64, to: u64) -> io::Result<()> {
        // It counts what an skb needs besides.
        let room = 2 * (to - from) + (1 << 20);
        rustix::net::sockopt::set_socket_send_buffer_size_force(stream, room as usize)?;
        self.send(stream, from, to)
    }

    /// Writes from `from` on until nothing more is taken for 300 ms; says up to where. The stream
    /// is blocking again afterwards.
    pub fn send_until_stalled(self, mut stream: &TcpStream, from: u64) -> u64 {
        let mut position = from;
        stream.set_nonblocking(true).expect("fcntl");
        let mut last = Instant::now();
        while last.elapsed() < Duration::from_millis(300) {
            match stream.write(self.at(position, RUN as u64)) {
                Ok(n) => {
                    position += n as u64;
                    last = Instant::now();
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(5)),
                Err(e) => panic!("stalled sender: {e} at {position}"),
            }
        }
        stream.set_nonblocking(false).expect("fcntl");
        position
    }

    /// Reads and verifies until the end of the stream, from `from` on; says up to where and how it
    /// ended. Panics at the first wrong byte.
    #[track_caller]
    pub fn receive(self, stream: &TcpStream, from: u64) -> (u64, End) {
        self.receive_to(stream, from, u64::MAX)
    }

    /// As [`receive`](Self::receive), and stops at position `to` with `None`.
    #[track_caller]
    pub fn receive_exactly(self, stream: &TcpStream, from: u64, to: u64) {
        let (position, end) = self.receive_to(stream, from, to);
        assert_eq!(position, to, "the stream ended too early: {end:?}");
    }

    #[track_caller]
    fn receive_to(self, mut stream: &TcpStream, from: u64, to: u64) -> (u64, End) {
        let mut buffer = vec![0; RUN];
        let mut position = from;
        while position < to {
            let room = (to - position).min(RUN as u64) as usize;
            let n = match stream.read(&mut buffer[..room]) {
                Ok(0) => return (position, End::Fin),
                Ok(n) => n,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return (position, end_of(&e)),
            };
            let expected = self.at(position, n as u64);
            if buffer[..n] != *expected {
                let first = buffer.iter().zip(expected).position(|(a, b)| a != b).expect("they differ");
                panic!("wrong byte at position {} (read of {n} bytes at {position})", position + first as u64);
            }
            position += n as u64;
        }
        (position, End::Silence)
    }
}

fn end_of(error: &io::Error) -> End {
    match error.kind() {
        ErrorKind::ConnectionReset => End::Reset,
        ErrorKind::WouldBlock | ErrorKind::TimedOut => End::Silence,
        _ => panic!("reading: {error}"),
    }
}

/// Bounds each read and write at a minute: a test that got stuck then fails, instead of waiting
/// until somebody stops it.
pub fn never_hang(stream: &TcpStream) {
    const STUCK: Option<Duration> = Some(Duration::from_secs(60));
    stream.set_read_timeout(STUCK).and(stream.set_write_timeout(STUCK)).expect("a time limit");
}

/// Reads what comes until the stream ends or is silent for `limit`.
pub fn read_to_end(mut stream: &TcpStream, limit: Duration) -> (Vec<u8>, End) {
    stream.set_read_timeout(Some(limit)).expect("a time limit");
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    let end = loop {
        match stream.read(&mut buffer) {
            Ok(0) => break End::Fin,
            Ok(n) => all.extend_from_slice(&buffer[..n]),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => break end_of(&e),
        }
    };
    never_hang(stream);
    (all, end)
}

/// Closes with a RST.
pub fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("SO_LINGER");
    drop(stream);
}

/// Waits for a RST without reading, so that unread bytes do not hide it; says how long it took,
/// `None`: not within `limit`. Panics when a FIN came before it: whoever had read to that point
/// would have taken it for a clean end.
#[track_caller]
pub fn reset_within(stream: &TcpStream, limit: Duration) -> Option<Duration> {
    let (error, took) = error_within(stream, limit)?;
    assert_ne!(error.kind(), ErrorKind::BrokenPipe, "a FIN came before the RST");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    Some(took)
}

/// As [`reset_within`], on a stream whose peer has already sent its FIN: Linux then says EPIPE.
#[track_caller]
pub fn reset_after_fin_within(stream: &TcpStream, limit: Duration) -> Option<Duration> {
    let (error, took) = error_within(stream, limit)?;
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    Some(took)
}

#[track_caller]
fn error_within(stream: &TcpStream, limit: Duration) -> Option<(io::Error, Duration)> {
    let start = Instant::now();
    while let Some(left) = limit.checked_sub(start.elapsed()) {
        let mut fds = [PollFd::new(stream, PollFlags::empty())];
        let timeout = Timespec::try_from(left).expect("a short time");
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => return None,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => panic!("poll: {e}"),
        }
        let revents = fds[0].revents();
        if revents.contains(PollFlags::ERR) {
            let error = stream.take_error().expect("SO_ERROR").expect("POLLERR comes with an error");
            return Some((error, start.elapsed()));
        }
        assert!(!revents.contains(PollFlags::HUP), "closed both ways without a RST");
    }
    None
}

/// Sends `bytes` and the FIN in one segment.
pub fn send_with_fin(mut stream: &TcpStream, bytes: &[u8]) {
    let socket = SockRef::from(stream);
    socket.set_tcp_cork(true).expect("TCP_CORK");
    stream.write_all(bytes).expect("sent");
    // The FIN goes onto the last segment that was not sent yet, and takes the cork out.
    stream.shutdown(Shutdown::Write).expect("FIN");
}

/// A TLS 1.3 ClientHello in one record (RFC 8446 section 4.1.2): no real client's, and all that a
/// server name needs. `None`: without the extension.
pub fn client_hello(name: Option<&str>, alpn: &[&str]) -> Vec<u8> {
    // Each is another one, as clients' are: the same again while it is under way is taken for a
    // loop.
    static MADE: AtomicU64 = AtomicU64::new(0);
    let mut random = Pattern::new(1).at(0, 32).to_vec();
    random[..8].copy_from_slice(&MADE.fetch_add(1, Relaxed).to_be_bytes());
    let mut extensions = Vec::new();
    if let Some(name) = name {
        // RFC 6066 section 3: a list of one host_name (0).
        let entry = [&[0][..], &prefixed(2, name.as_bytes())].concat();
        extensions.extend(extension(0, &prefixed(2, &entry)));
    }
    if !alpn.is_empty() {
        let list: Vec<u8> = alpn.iter().flat_map(|p| prefixed(1, p.as_bytes())).collect();
        extensions.extend(extension(16, &prefixed(2, &list)));
    }
    extensions.extend(extension(10, &prefixed(2, &[0, 29]))); // supported_groups: x25519
    extensions.extend(extension(13, &prefixed(2, &[4, 3, 8, 4]))); // signature_algorithms
    extensions.extend(extension(43, &prefixed(1, &[3, 4]))); // supported_versions: 1.3
    let share = [&[0, 29][..], &prefixed(2, Pattern::new(29).at(0, 32))].concat();
    extensions.extend(extension(51, &prefixed(2, &share))); // key_share
    let body = [
        &[3, 3][..],
        &random[..],
        &prefixed(1, Pattern::new(2).at(0, 32)),
        &prefixed(2, &[0x13, 1, 0x13, 2, 0x13, 3]),
        &prefixed(1, &[0]),
        &prefixed(2, &extensions),
    ]
    .concat();
    record(&[&[1][..], &prefixed(3, &body)].concat())
}

/// Whether two hellos of one record each differ in nothing but their random.
pub fn is_alike(a: &[u8], b: &[u8]) -> bool {
    // Record header, message header, version.
    let random = 5 + 4 + 2..5 + 4 + 2 + 32;
    a.len() == b.len() && a[..random.start] == b[..random.start] && a[random.end..] == b[random.end..]
}

/// One TLS record of a handshake.
pub fn record(fragment: &[u8]) -> Vec<u8> {
    [&[22, 3, 1][..], &prefixed(2, fragment)].concat()
}

/// The same handshake message in records of at most `size` bytes of fragment.
pub fn in_records_of(size: usize, hello: &[u8]) -> Vec<u8> {
    hello[5..].chunks(size).flat_map(record).collect()
}

fn extension(kind: u16, content: &[u8]) -> Vec<u8> {
    [&kind.to_be_bytes()[..], &prefixed(2, content)].concat()
}

fn prefixed(width: usize, content: &[u8]) -> Vec<u8> {
    [&(content.len() as u32).to_be_bytes()[4 - width..], content].concat()
}

/// What stood before the payload on a connection that reached an upstream.
#[derive(Debug)]
pub struct Preamble {
    /// The PROXY header, if one was expected.
    pub proxy: Option<ProxyHeader>,
    /// The hello as it came, record headers included.
    pub hello: Vec<u8>,
}

/// A PROXY protocol header as an upstream sees it (haproxy.org, proxy-protocol.txt, 2.1 and 2.2).
#[derive(Debug, PartialEq, Eq)]
pub struct ProxyHeader {
    /// 1 or 2.
    pub version: u8,
    /// The client.
    pub source: SocketAddr,
    /// The address that the client connected to.
    pub destination: SocketAddr,
    /// Type and value of each TLV, in their order.
    pub tlvs: Vec<(u8, Vec<u8>)>,
}

/// Reads a PROXY header (when `proxied`) and a whole ClientHello, and not one byte more.
pub fn read_preamble(stream: &TcpStream, proxied: bool) -> io::Result<Preamble> {
    let proxy = if proxied { Some(read_proxy_header(stream)?) } else { None };
    let mut hello = Vec::new();
    let mut message = 0;
    let mut announced = None;
    while announced.is_none_or(|n| message < n) {
        let header = take(stream, 5)?;
        if header[0] != 22 {
            return Err(io::Error::other(format!("no handshake record: {header:02x?} after {hello:02x?}")));
        }
        let fragment = take(stream, usize::from(u16::from_be_bytes([header[3], header[4]])))?;
        hello.extend_from_slice(&header);
        hello.extend_from_slice(&fragment);
        message += fragment.len();
        let start: Vec<u8> = fragments(&hello).take(4).collect();
        if let [_, a, b, c] = start[..] {
            announced = Some(4 + u32::from_be_bytes([0, a, b, c]) as usize);
        }
    }
    Ok(Preamble { proxy, hello })
}

/// The handshake bytes inside whole records.
fn fragments(mut records: &[u8]) -> impl Iterator<Item = u8> + '_ {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_be_bytes([*records.get(3)?, *records.get(4)?]));
        let fragment = &records[5..5 + length];
        records = &records[5 + length..];
        Some(fragment.iter().copied())
    })
    .flatten()
}

fn read_proxy_header(stream: &TcpStream) -> io::Result<ProxyHeader> {
    const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
    let broken = |what: &str, bytes: &[u8]| {
        io::Error::other(format!("PROXY header, {what}: {:?}", bytes.escape_ascii().to_string()))
    };
    let mut head = take(stream, 12)?;
    if head == SIGNATURE {
        let fixed = take(stream, 4)?;
        let rest = take(stream, usize::from(u16::from_be_bytes([fixed[2], fixed[3]])))?;
        let port = |at: usize| u16::from_be_bytes([rest[at], rest[at + 1]]);
        let (source, destination, mut tail) = match (fixed[0], fixed[1]) {
            (0x21, 0x11) => {
                let ip = |at: usize| <[u8; 4]>::try_from(&rest[at..at + 4]).expect("4 bytes");
                (SocketAddr::from((ip(0), port(8))), SocketAddr::from((ip(4), port(10))), &rest[12..])
            }
            (0x21, 0x21) => {
                let ip = |at: usize| <[u8; 16]>::try_from(&rest[at..at + 16]).expect("16 bytes");
                (SocketAddr::from((ip(0), port(32))), SocketAddr::from((ip(16), port(34))), &rest[36..])
            }
            _ => return Err(broken("version, command or family", &fixed)),
        };
        let mut tlvs = Vec::new();
        while let [kind, high, low, after @ ..] = tail {
            let length = usize::from(u16::from_be_bytes([*high, *low]));
            let value = after.get(..length).ok_or_else(|| broken("TLV longer than the header", after))?;
            tlvs.push((*kind, value.to_vec()));
            tail = &after[length..];
        }
        return Ok(ProxyHeader { version: 2, source, destination, tlvs });
    }
    while !head.ends_with(b"\r\n") {
        if head.len() > 107 {
            return Err(broken("no line within 107 bytes", &head));
        }
        head.extend(take(stream, 1)?);
    }
    let line = String::from_utf8_lossy(&head[..head.len() - 2]).into_owned();
    let fields: Vec<_> = line.split(' ').collect();
    let ["PROXY", "TCP4" | "TCP6", source, destination, source_port, destination_port] = fields[..] else {
        return Err(broken("not a line of version 1", &head));
    };
    let address = |ip: &str, port: &str| -> io::Result<SocketAddr> {
        let port = port.parse().map_err(|_| broken("port", &head))?;
        Ok(SocketAddr::new(ip.parse().map_err(|_| broken("address", &head))?, port))
    };
    Ok(ProxyHeader {
        version: 1,
        source: address(source, source_port)?,
        destination: address(destination, destination_port)?,
        tlvs: Vec::new(),
    })
}

fn take(mut stream: &TcpStream, n: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; n];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Sends the parts one after the other, each in segments of its own.
pub fn send_in_segments<'a>(mut stream: &TcpStream, parts: impl IntoIterator<Item = &'a [u8]>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    for part in parts {
        stream.write_all(part)?;
        // Long enough for the receiver to wake up for this part alone, most of the time.
        std::thread::sleep(Duration::from_micros(300));
    }
    Ok(())
}
