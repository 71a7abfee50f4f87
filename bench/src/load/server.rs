//! The server: answers requests on as many connections as come, and strips what stands before them.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use anyhow::{Context, Result, anyhow, bail};
use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use socket2::{Domain, Protocol, Socket, Type};

use super::preamble::{Preamble, find_end};
use super::wire::{MESSAGE, PIECE, Request, check, replied, uploaded};
use super::{Served, control, threads};

/// The listening socket in epoll's user data; connections count from 0.
const LISTENER: u64 = u64::MAX;

/// Serves until the harness closes standard input; each line that it writes is answered with what
/// was [`Served`] so far.
pub fn run(address: SocketAddr) -> Result<()> {
    let counters = Arc::new(Counters::default());
    for _ in 0..threads() {
        let worker = Worker::new(address, Arc::clone(&counters)).with_context(|| format!("listen on {address}"))?;
        std::thread::spawn(move || {
            if let Err(error) = worker.run() {
                control::give_up(&error);
            }
        });
    }
    control::say(Served::default())?;
    while control::next_line()?.is_some() {
        control::say(counters.served())?;
    }
    Ok(())
}

/// What the threads share.
#[derive(Default)]
struct Counters {
    received: AtomicU64,
    connections: AtomicU64,
    proxied: AtomicU64,
}

impl Counters {
    fn served(&self) -> Served {
        Served {
            received: self.received.load(Relaxed),
            connections: self.connections.load(Relaxed),
            proxied: self.proxied.load(Relaxed),
        }
    }
}

struct Worker {
    epoll: OwnedFd,
    listener: TcpListener,
    /// By their number in epoll's user data.
    sessions: Vec<Option<Session>>,
    free: Vec<usize>,
    counters: Arc<Counters>,
    buffer: Vec<u8>,
}

impl Worker {
    fn new(address: SocketAddr, counters: Arc<Counters>) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        // Each thread accepts for itself.
        socket.set_reuse_port(true)?;
        socket.bind(&address.into())?;
        socket.listen(4096)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &socket, epoll::EventData::new_u64(LISTENER), epoll::EventFlags::IN)?;
        let listener = socket.into();
        Ok(Self { epoll, listener, sessions: Vec::new(), free: Vec::new(), counters, buffer: vec![0; PIECE] })
    }

    fn run(mut self) -> Result<()> {
        let mut events = Vec::with_capacity(256);
        loop {
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), None) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other.context("epoll_wait")?,
            };
            for event in &events {
                match event.data.u64() {
                    LISTENER => self.accept()?,
                    number => self.serve(number as usize)?,
                }
            }
        }
    }

    fn accept(&mut self) -> Result<()> {
        loop {
            let socket = match self.listener.accept() {
                Ok((socket, _)) => socket,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e).context("accept"),
            };
            socket.set_nonblocking(true)?;
            socket.set_nodelay(true)?;
            let number = self.free.pop().unwrap_or(self.sessions.len());
            let data = epoll::EventData::new_u64(number as u64);
            epoll::add(&self.epoll, &socket, data, epoll::EventFlags::IN)?;
            if number == self.sessions.len() {
                self.sessions.push(None);
            }
            self.sessions[number] = Some(Session::new(socket));
        }
    }

    fn serve(&mut self, number: usize) -> Result<()> {
        let Some(session) = &mut self.sessions[number] else { return Ok(()) };
        let waits = session.waits_for_room;
        if !session.turn(&mut self.buffer, &self.counters)? {
            self.close(number);
            return Ok(());
        }
        if session.waits_for_room != waits {
            let mut interest = epoll::EventFlags::IN;
            interest.set(epoll::EventFlags::OUT, session.waits_for_room);
            epoll::modify(&self.epoll, &session.socket, epoll::EventData::new_u64(number as u64), interest)?;
        }
        Ok(())
    }

    fn close(&mut self, number: usize) {
        // Closing takes it out of epoll.
        self.sessions[number] = None;
        self.free.push(number);
    }
}

struct Session {
    socket: TcpStream,
    /// What came before the first request; `None` behind it.
    preamble: Option<Vec<u8>>,
    /// The request that is being read.
    request: [u8; MESSAGE],
    request_len: usize,
    /// Bytes of upload that are to come, and their position.
    upload_left: u64,
    upload_at: u64,
    /// Bytes of reply that are to be sent, and their position.
    reply_left: u64,
    reply_at: u64,
    seed: u64,
    verify: bool,
    waits_for_room: bool,
}

impl Session {
    fn new(socket: TcpStream) -> Self {
        Self {
            socket,
            preamble: Some(Vec::new()),
            request: [0; MESSAGE],
            request_len: 0,
            upload_left: 0,
            upload_at: 0,
            reply_left: 0,
            reply_at: 0,
            seed: 0,
            verify: false,
            waits_for_room: false,
        }
    }

    /// One read and one write, so that all connections have their turn; whether it goes on. An
    /// error is content that is not what was sent: it ends the run. A connection that breaks does
    /// not, for a client or a proxy that is stopped leaves such behind.
    fn turn(&mut self, buffer: &mut [u8], counters: &Counters) -> Result<bool> {
        match self.socket.read(buffer) {
            Ok(0) => return Ok(false),
            Ok(n) => {
                counters.received.fetch_add(n as u64, Relaxed);
                self.take(&buffer[..n], counters)?;
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return Ok(false),
        }
        if self.reply_left > 0 {
            match self.socket.write(replied(self.seed).at(self.reply_at, self.reply_left)) {
                Ok(n) => {
                    self.reply_left -= n as u64;
                    self.reply_at += n as u64;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return Ok(false),
            }
        }
        self.waits_for_room = self.reply_left > 0;
        Ok(true)
    }

    fn take(&mut self, bytes: &[u8], counters: &Counters) -> Result<()> {
        let Some(mut start) = self.preamble.take() else { return self.take_payload(bytes) };
        start.extend_from_slice(bytes);
        match find_end(&start) {
            Preamble::Ends { header, hello } => {
                counters.connections.fetch_add(1, Relaxed);
                counters.proxied.fetch_add((header > 0).into(), Relaxed);
                self.take_payload(&start[header + hello..])
            }
            Preamble::NeedMore => {
                self.preamble = Some(start);
                Ok(())
            }
            Preamble::Broken => {
                bail!("no hello and no PROXY header: {:?}", start.escape_ascii().to_string())
            }
        }
    }

    fn take_payload(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            bytes = if self.upload_left > 0 { self.take_upload(bytes)? } else { self.take_request(bytes)? };
        }
        Ok(())
    }

    fn take_upload<'a>(&mut self, bytes: &'a [u8]) -> Result<&'a [u8]> {
        let (mine, rest) = bytes.split_at(bytes.len().min(usize::try_from(self.upload_left).unwrap_or(usize::MAX)));
        if self.verify {
            check(uploaded(self.seed), self.upload_at, mine)
                .map_err(|at| anyhow!("connection {}: wrong byte at position {at} of the upload", self.seed))?;
        }
        self.upload_left -= mine.len() as u64;
        self.upload_at += mine.len() as u64;
        Ok(rest)
    }

    fn take_request<'a>(&mut self, bytes: &'a [u8]) -> Result<&'a [u8]> {
        let (mine, rest) = bytes.split_at(bytes.len().min(MESSAGE - self.request_len));
        self.request[self.request_len..self.request_len + mine.len()].copy_from_slice(mine);
        self.request_len += mine.len();
        if self.request_len == MESSAGE {
            self.request_len = 0;
            let request =
                Request::decode(&self.request).with_context(|| format!("connection {}: not a request", self.seed))?;
            self.reply_left = self.reply_left.saturating_add(request.reply);
            self.upload_left = request.upload;
            self.seed = request.seed;
            self.verify = request.verify;
        }
        Ok(rest)
    }
}
