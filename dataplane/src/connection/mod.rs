//! The life of one connection: hello (or HTTP request), route, upstream, PROXY header, engine.
//!
//! The steps are in the modules of those names; here they follow each other, and every way out that
//! is not forwarding is a [`Reason`]. Up to the last step no byte reaches an upstream, and all of
//! it happens before `hello_timeout` and `connect_timeout`. At any point of its life a connection
//! can be parked for another process that goes on with it (`parked`).

mod parked;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime};

use ipnet::IpNet;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::{timeout, timeout_at};

use crate::admission::{ClientPermit, Permit};
use crate::config::{Listener, Mode, SendProxy};
use crate::engine::{self, End, Forwarded, Halt, Kind, Legs, Selection, Side, Timeouts, Traffic, Unsent, answer};
use crate::generation::{Destination, Generation, Listed};
use crate::hello::{Input, Machine, Progress, ServerName};
use crate::http;
use crate::kernel::socket;
use crate::logging::unix_seconds;
use crate::loops;
use crate::proxy_protocol::{self, Decoded, Header};
use crate::registry::{Entry, Order, Orders, Record};
use crate::reject::Reason;
use crate::route::Pattern;
use crate::shared::Shared;
use crate::upstream::connect::Dial;
use crate::upstream::{Dialled, Lease, Pool, Target};

pub use parked::resume;

/// Room for a PROXY header and the usual hello behind it.
const FIRST_READ: usize = 2048;

/// How long a hello of which bytes are there may take to be read when its connection has to give
/// way.
const LATE: Duration = Duration::from_secs(2);

/// Connections of one client on a listener of mode `tcp` that may wait for their first byte before
/// they are taken for a loop: a client's share of what has come to nothing yet, within these
/// bounds. Where it has the address of a target, which makes a loop likely, the lower one. See
/// [`loops`].
const UNANSWERED: std::ops::RangeInclusive<usize> = 64..=1024;

/// What of the offered protocols is kept and logged, bytes: browsers offer `h2,http/1.1`.
const ALPN_TEXT: usize = 100;

/// A connection as it comes from the listener. SO_LINGER {on, 0} is set on it, inherited.
pub struct Accepted {
    pub stream: TcpStream,
    /// Who it seems to be.
    pub peer: SocketAddr,
    /// Index of the listener.
    pub listener: usize,
    /// Its permit among all.
    pub permit: Permit,
}

/// When a connection was accepted.
#[derive(Debug, Clone, Copy)]
struct Start {
    /// For people.
    wall: SystemTime,
    /// For durations and deadlines.
    at: Instant,
}

impl Start {
    fn now() -> Self {
        Self { wall: SystemTime::now(), at: Instant::now() }
    }
}

/// Serves one connection to its end, or until another process goes on with it.
pub async fn serve(shared: Arc<Shared>, generation: Arc<Generation>, accepted: Accepted) {
    go_on(Arrival::new(shared, generation, accepted)).await;
}

/// Serves a connection from its first bytes on.
async fn go_on(arrival: Arrival) {
    // In a box of its own: what is needed only to get here is freed before the connection's long
    // life begins.
    let established = Box::pin(establish(arrival)).await;
    if let Some(established) = established {
        // In another one: who has said nothing yet does not pay for this.
        Box::pin(forward(established)).await;
    }
}

/// The connection's long life.
async fn forward(established: Established) {
    let Established { shared, engine, legs, timeouts, entry, permits, mut lease } = established;
    let traffic = entry.record.traffic.clone();
    // What was asked of all while it was not yet among the live connections.
    let halt = Halt::new(shared.parking.stop());
    let forwarded = {
        let forward = async {
            match &engine {
                Some(engine) => engine::forward(&engine.plan, legs, timeouts, &traffic, &halt).await,
                None => Box::pin(answer::run(legs, timeouts, &traffic, &halt)).await,
            }
        };
        let mut forward = std::pin::pin!(forward);
        loop {
            tokio::select! {
                biased;
                forwarded = &mut forward => break forwarded,
                // Both sockets are dropped with the engine's work, and so reset.
                () = lease.lost() => break Forwarded::Ended(End::TargetDown),
                order = entry.record.orders.due() => match order {
                    Order::End => break Forwarded::Ended(End::RouteRemoved),
                    Order::Stop(stop) => halt.ask(stop),
                },
                () = traffic.target_closed() => lease.give_up_place(),
            }
        }
    };
    let end = match forwarded {
        Forwarded::Ended(end) => end,
        Forwarded::Halted(legs) => {
            drop(lease);
            parked::park(&shared, parked::established(engine.is_none(), legs, entry, &permits));
            return;
        }
    };
    // What the port for challenges does says nothing of the target.
    if engine.is_some() && end == End::Reset(Side::Upstream) && traffic.look().is_unanswered() {
        lease.reset_early();
    }
    drop((permits, lease));
    entry.finish(end);
}

struct Established {
    shared: Arc<Shared>,
    /// `None`: one request, one answer.
    engine: Option<Arc<Selection>>,
    legs: Legs,
    timeouts: Timeouts,
    entry: Entry,
    permits: Permits,
    lease: Lease,
}

/// What a connection has a right to, and is remembered by, until its end.
struct Permits {
    _connection: Permit,
    client: Option<ClientPermit>,
    in_flight: Option<loops::Guard>,
}

/// What was learned of the client before its connection was routed.
struct Client {
    address: SocketAddr,
    /// The address that it connected to.
    server: SocketAddr,
    server_name: Option<ServerName>,
    /// What it sent in the place of one, escaped.
    bad_name: Option<Box<str>>,
    /// The header of a proxy in front of us was read.
    is_introduced: bool,
    /// Of the proxy in front of us, if it sent one.
    unique_id: Option<Vec<u8>>,
    /// The first protocol that it offers, as it came.
    alpn: Option<Box<[u8]>>,
    /// The first few of them, for people.
    alpn_text: Option<Box<str>>,
    /// Bytes read and not yet passed on.
    read: Vec<u8>,
    /// What tells whether it has come back to us, while the connection lasts.
    in_flight: Option<loops::Guard>,
}

/// What a connection is for.
enum Purpose {
    Forward(Destination, Listed),
    /// A request and its answer, at this port of the destination.
    Challenge(Destination, Listed, u16),
    /// A request that this answers.
    Redirect(Vec<u8>),
}

/// A connection on its way to a target: what its four steps know, and one way to reject it.
struct Arrival {
    shared: Arc<Shared>,
    generation: Arc<Generation>,
    listener: usize,
    stream: TcpStream,
    peer: SocketAddr,
    start: Start,
    permit: Permit,
    client: Client,
    /// What is answered here, once that is known; empty when all of it was sent.
    answer: Option<Vec<u8>>,
}

/// What the preread found.
struct Preread {
    purpose: Purpose,
    permit: Option<ClientPermit>,
}

/// Where a connection goes.
struct Decision {
    destination: Destination,
    listed: Listed,
    /// For a request and its answer: another port than the target's.
    challenge_port: Option<u16>,
    permit: Option<ClientPermit>,
}

/// `None`: it was rejected or answered here, or another process goes on with it.
async fn establish(mut arrival: Arrival) -> Option<Established> {
    let shared = arrival.shared.clone();
    let found = tokio::select! {
        biased;
        found = arrival.find_target() => found,
        // Whatever it waits for, nothing is lost: what was read is kept, and nothing was sent.
        () = shared.parking.opened() => {
            let (parcel, permit) = parked::arrival(arrival);
            parked::park(&shared, parcel);
            drop(permit);
            return None;
        }
    };
    match found {
        Ok(found) => found.map(|(decision, first, dialled)| arrival.register(decision, first, dialled)),
        Err(reason) => {
            arrival.reject(reason);
            None
        }
    }
}

impl Arrival {
    fn new(shared: Arc<Shared>, generation: Arc<Generation>, accepted: Accepted) -> Self {
        let Accepted { stream, peer, listener, permit } = accepted;
        let server = stream.local_addr().unwrap_or(generation.config.listeners[listener].bind[0].addr);
        let client = Client {
            address: peer,
            server,
            server_name: None,
            bad_name: None,
            is_introduced: false,
            unique_id: None,
            alpn: None,
            alpn_text: None,
            read: Vec::new(),
            in_flight: None,
        };
        Self { shared, generation, listener, stream, peer, start: Start::now(), permit, client, answer: None }
    }

    async fn find_target(&mut self) -> Result<Option<(Decision, Unsent, Dialled)>, Reason> {
        if self.answer.is_some() {
            self.answer().await;
            return Ok(None);
        }
        let preread = self.preread().await?;
        let Some(decision) = self.decide(preread).await else { return Ok(None) };
        let (first, dialled) = self.dial(&decision).await?;
        Ok(Some((decision, first, dialled)))
    }

    fn config(&self) -> &Listener {
        &self.generation.config.listeners[self.listener]
    }

    fn deadline(&self) -> Instant {
        self.start.at + self.generation.config.limits.hello_timeout
    }

    /// Reads what tells where the connection wants to go, before the deadline and for as long as no
    /// newer one needs its place.
    async fn preread(&mut self) -> Result<Preread, Reason> {
        let deadline = self.deadline().into();
        let is_proxied = contains(&self.config().accept_proxy, self.peer.ip());
        let guest = self.shared.admission.enter_lobby((!is_proxied).then(|| self.peer.ip()));
        let Self { shared, generation, listener: index, stream, peer, start, client, .. } = self;
        let (index, listener) = (*index, &generation.config.listeners[*index]);
        let limits = &generation.config.limits;
        let read = async {
            if is_proxied && !client.is_introduced {
                proxy_header(stream, client).await?;
                client.is_introduced = true;
            }
            let ip = client.address.ip();
            if contains(&listener.deny, ip) || !(listener.allow.is_empty() || contains(&listener.allow, ip)) {
                return Err(Reason::ClientDenied);
            }
            let permit = match limits.max_connections_per_client {
                0 => None,
                max => Some(shared.admission.enter_client(ip, max).ok_or(Reason::ClientLimit)?),
            };
            let purpose = match listener.mode {
                Mode::Tcp { .. } => {
                    let destination = generation.by_tcp_listener(index);
                    let guard = refuse_own(shared, &destination.pool, &listener.name, *peer, ip)?;
                    client.in_flight = Some(guard);
                    Purpose::Forward(destination, Listed::ByListener)
                }
                Mode::Tls => {
                    let (route, pattern) = hello_route(stream, client, generation, index, start.at, shared).await?;
                    Purpose::Forward(generation.by_route(route), Listed::ByRoute(pattern))
                }
                Mode::Http { acme_port } => http_request(stream, client, generation, index, acme_port, shared).await?,
            };
            Ok(Preread { purpose, permit })
        };
        let mut read = std::pin::pin!(timeout_at(deadline, read));
        tokio::select! {
            biased;
            read = &mut read => read.unwrap_or(Err(Reason::Timeout)),
            // Newer ones want its place. What has come is looked at first: this worker may be late.
            () = guest.gives_way() => match rustix::io::ioctl_fionread(&*stream) {
                Ok(1..) => match timeout(LATE, read).await {
                    Ok(read) => read.unwrap_or(Err(Reason::Timeout)),
                    Err(_) => Err(Reason::TotalLimit),
                },
                _ => Err(Reason::TotalLimit),
            },
        }
    }

    /// Answers what is answered here; `None`: it was.
    async fn decide(&mut self, Preread { purpose, permit }: Preread) -> Option<Decision> {
        let (destination, listed, challenge_port) = match purpose {
            Purpose::Forward(destination, listed) => (destination, listed, None),
            Purpose::Challenge(destination, listed, port) => (destination, listed, Some(port)),
            Purpose::Redirect(answer) => {
                self.generation.listener_metrics[self.listener].redirected.inc();
                if self.shared.rejections.admits(None) {
                    log_redirect(self.config(), &self.client, self.start);
                }
                self.answer = Some(answer);
                self.answer().await;
                return None;
            }
        };
        Some(Decision { destination, listed, challenge_port, permit })
    }

    /// Answers. Whether the client takes its answer is its own affair; it has as long as it had for
    /// its request, and gives way to newer ones as before that.
    async fn answer(&mut self) {
        let deadline = self.deadline();
        let guest = self.shared.admission.enter_lobby(Some(self.client.address.ip()));
        let Some(answer) = &mut self.answer else { return };
        tokio::select! {
            _ = timeout_at(deadline.into(), redirect(&self.stream, answer)) => {}
            () = guest.gives_way() => {}
        }
    }

    /// Connects to a target; with it, what that gets to read first.
    async fn dial(&self, decision: &Decision) -> Result<(Unsent, Dialled), Reason> {
        let pool = &decision.destination.pool;
        let first = first_bytes(&self.shared, pool.config.send_proxy, &self.client);
        let dial = Dial {
            client: self.client.address,
            own: self.generation.own.clone(),
            port: decision.challenge_port,
            speaks_first: !first.is_empty(),
            is_probe: false,
        };
        let dialled = tokio::select! {
            biased;
            dialled = pool.dial(dial) => dialled?,
            // Only a reset ends the attempt: a client that has sent FIN may still want its answer.
            _ = self.stream.ready(Interest::ERROR) => return Err(Reason::ClosedEarly),
        };
        Ok((first, dialled))
    }

    /// Enters it among the live connections.
    fn register(self, decision: Decision, first: Unsent, dialled: Dialled) -> Established {
        let Self { shared, generation, listener, stream, start, permit, client, .. } = self;
        let Decision { destination: Destination { route, pool, metrics }, listed, challenge_port, .. } = decision;
        let listener = &generation.config.listeners[listener];
        let is_challenge = challenge_port.is_some();
        let traffic = Arc::new(Traffic::by(if is_challenge { Kind::Copy } else { generation.engine.plan.relay }));
        if let Some(in_flight) = &client.in_flight {
            in_flight.sent(dialled.lease.of(), &traffic);
        }
        let is_tcp = matches!(listener.mode, Mode::Tcp { .. });
        let legs =
            || Some((dialled.stream.local_addr().ok()?.port(), dialled.stream.peer_addr().ok()?.ip().to_canonical()));
        let record = Record {
            start: start.wall,
            accepted: start.at,
            client: client.address,
            listener: listener.name.clone(),
            server_name: client.server_name.as_deref().map(Into::into),
            alpn: client.alpn_text,
            route,
            upstream: pool.config.name.clone(),
            target: dialled.lease.target().clone(),
            listed,
            dialled: if is_tcp { legs() } else { None },
            traffic,
            orders: Orders::default(),
        };
        let entry = shared.registry.enter(record, metrics);
        // A reload that came meanwhile has not seen it.
        let in_force = shared.generation.load();
        if !Arc::ptr_eq(&in_force, &generation) {
            entry.record.judge(&in_force);
        }
        drop(in_force);
        Established {
            engine: (!is_challenge).then(|| generation.engine.clone()),
            legs: Legs::new(stream, dialled.stream, first),
            timeouts: timeouts(&generation),
            entry,
            permits: Permits { _connection: permit, client: decision.permit, in_flight: client.in_flight },
            lease: dialled.lease,
            shared,
        }
    }

    fn reject(&self, reason: Reason) {
        let Self { shared, generation, listener, stream, client, start, .. } = self;
        let name = client.server_name.as_deref().or(client.bad_name.as_deref());
        reject(shared, generation, *listener, stream, (client.address, name), reason, *start);
    }
}

fn timeouts(generation: &Generation) -> Timeouts {
    let limits = &generation.config.limits;
    Timeouts { idle: limits.idle_timeout, half_closed: limits.half_closed_timeout, dead_peer: limits.dead_peer_timeout }
}

fn came_back(target: &Target) -> Reason {
    target.note_loop();
    Reason::Loop
}

/// Refuses a connection without a hello that may be one of our own which came back: it comes from
/// the very address that we have dialled and the port that we have dialled it from, as 1:1 NAT
/// leaves both; or it is one too many of its client that wait for their first byte.
fn refuse_own(
    shared: &Shared,
    pool: &Pool,
    listener: &str,
    peer: SocketAddr,
    client: IpAddr,
) -> Result<loops::Guard, Reason> {
    let ip = peer.ip().to_canonical();
    let target = pool.targets().iter().find(|target| target.has_address(ip));
    if let Some(target) = target
        && shared.registry.awaits((peer.port(), ip))
    {
        return Err(came_back(target));
    }
    let (fewest, most) = UNANSWERED.into_inner();
    let most = if target.is_some() { fewest } else { shared.admission.share_of_client().clamp(fewest, most) };
    let id = shared.next_id.fetch_add(1, Relaxed);
    shared.in_flight.connection(listener, client.to_canonical(), id, most).map_err(|target| came_back(&target))
}

/// Reads a PROXY header; what follows it stays in `client.read`.
async fn proxy_header(stream: &TcpStream, client: &mut Client) -> Result<(), Reason> {
    loop {
        match proxy_protocol::decode(&client.read) {
            Decoded::NeedMore => {}
            Decoded::Header { len, source } => {
                if let Some(source) = source {
                    client.address = source.client;
                    client.server = source.server;
                    client.unique_id = source.unique_id.map(Into::into);
                }
                client.read.drain(..len);
                return Ok(());
            }
            Decoded::Invalid(_) => return Err(Reason::ProxyHeader),
        }
        let read = &mut client.read;
        let some = read_some(stream, || {
            read.reserve(FIRST_READ);
            stream.try_read_buf(read)
        });
        match some.await {
            Ok(n) if n > 0 => {}
            _ if client.read.is_empty() => return Err(Reason::ClosedEarly),
            _ => return Err(Reason::ProxyHeader),
        }
    }
}

/// What reads a client's first bytes. When it is dropped, at whatever point, the bytes are the
/// client's again.
struct Reading<'c, M: Into<Vec<u8>>> {
    machine: Option<M>,
    bytes: &'c mut Vec<u8>,
}

impl<'c, M: Into<Vec<u8>>> Reading<'c, M> {
    fn new(machine: M, bytes: &'c mut Vec<u8>) -> Self {
        Self { machine: Some(machine), bytes }
    }

    fn machine(&mut self) -> &mut M {
        self.machine.as_mut().expect("taken when this is dropped")
    }
}

impl<M: Into<Vec<u8>>> Drop for Reading<'_, M> {
    fn drop(&mut self) {
        if let Some(machine) = self.machine.take() {
            *self.bytes = machine.into();
        }
    }
}

/// Reads the hello; what was read, the hello and perhaps more, stays in `client.read`. The index of
/// the route, and by which of its patterns it was found.
async fn hello_route(
    stream: &TcpStream,
    client: &mut Client,
    generation: &Generation,
    listener: usize,
    accepted: Instant,
    shared: &Shared,
) -> Result<(usize, Pattern), Reason> {
    let mut machine = Machine::new(generation.config.limits.hello_max_bytes);
    machine.input(Input::Bytes(&std::mem::take(&mut client.read)));
    let mut reading = Reading::new(machine, &mut client.read);
    loop {
        let machine = reading.machine();
        match machine.progress() {
            Progress::NeedMore => {}
            Progress::Reject(reason) => {
                client.bad_name = machine.bad_name().and_then(|name| printable([name].into_iter()));
                return Err(reason);
            }
            Progress::Hello(hello) => {
                shared.metrics.listen.hello_duration.observe(accepted.elapsed().as_secs_f64());
                client.server_name = hello.server_name;
                // Nothing of a stranger's list is copied before its name is found.
                let found = generation.table.find(listener, hello.server_name.as_deref(), hello.alpn.clone())?;
                let id = shared.next_id.fetch_add(1, Relaxed);
                client.in_flight = Some(shared.in_flight.hello(hello.random, id).map_err(|target| came_back(&target))?);
                client.alpn = hello.alpn.clone().next().map(Into::into);
                client.alpn_text = printable(hello.alpn);
                return Ok((found.route, found.by.into()));
            }
        }
        let read = read_some(stream, || stream.try_read_buf(&mut machine.buffer_mut())).await;
        machine.input(if matches!(read, Ok(n) if n > 0) { Input::Bytes(&[]) } else { Input::Closed });
    }
}

/// Reads one request head and decides what it gets. What is to be sent for it is in `client.read`:
/// nothing of what the client says goes further as it is.
async fn http_request(
    stream: &TcpStream,
    client: &mut Client,
    generation: &Generation,
    listener: usize,
    acme_port: u16,
    shared: &Shared,
) -> Result<Purpose, Reason> {
    let mut machine = http::Machine::new(generation.config.limits.hello_max_bytes);
    machine.input(http::Input::Bytes(&std::mem::take(&mut client.read)));
    let mut reading = Reading::new(machine, &mut client.read);
    let request = loop {
        let machine = reading.machine();
        match machine.progress() {
            http::Progress::NeedMore => {}
            http::Progress::Reject(reason) => return Err(reason),
            http::Progress::Request(request) => break request.clone(),
        }
        let read = read_some(stream, || stream.try_read_buf(&mut machine.buffer_mut())).await;
        machine.input(if matches!(read, Ok(n) if n > 0) { http::Input::Bytes(&[]) } else { http::Input::Closed });
    };
    drop(reading);
    client.server_name = request.host;
    let found = generation.table.find_plain(listener, request.host.as_deref())?;
    let listed = Listed::ByRoute(found.by.into());
    if let Some(challenge) = request.challenge() {
        let id = shared.next_id.fetch_add(1, Relaxed);
        client.in_flight = Some(shared.in_flight.challenge(challenge, id).map_err(|target| came_back(&target))?);
        client.read = challenge.to_vec();
        return Ok(Purpose::Challenge(generation.by_route(found.route), listed, acme_port));
    }
    let host = request.host.ok_or(Reason::UnknownHost)?;
    Ok(Purpose::Redirect(request.redirect(&host)))
}

/// Answers, and leaves the client the time to read it.
async fn redirect(stream: &TcpStream, answer: &mut Vec<u8>) -> io::Result<()> {
    while !answer.is_empty() {
        stream.writable().await?;
        match stream.try_write(answer) {
            Ok(n) => drop(answer.drain(..n)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
    socket::close_with_fin(stream);
    rustix::net::shutdown(stream, rustix::net::Shutdown::Write)?;
    socket::discard(stream).await
}

/// Waits for bytes, then reads them; 0 is the end of the stream. Memory for them is taken by
/// `read`, when they are there.
async fn read_some(stream: &TcpStream, mut read: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        stream.readable().await?;
        match read() {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            result => return result,
        }
    }
}

fn first_bytes(shared: &Shared, send_proxy: SendProxy, client: &Client) -> Unsent {
    let mut bytes = Vec::with_capacity(client.read.len() + proxy_protocol::MAX_ENCODED);
    match send_proxy {
        SendProxy::Off => {}
        SendProxy::V1 => proxy_protocol::encode_v1(&mut bytes, client.address, client.server),
        SendProxy::V2 => {
            let mut own_id = [0; 16];
            own_id[..8].copy_from_slice(&shared.id_prefix.to_be_bytes());
            own_id[8..].copy_from_slice(&shared.next_id.fetch_add(1, Relaxed).to_be_bytes());
            let header = Header {
                client: client.address,
                server: client.server,
                authority: client.server_name.as_deref(),
                // The header has room for one protocol. What the ends will agree on is not known
                // yet: this is what the client prefers.
                alpn: client.alpn.as_deref(),
                unique_id: client.unique_id.as_deref().unwrap_or(&own_id),
            };
            proxy_protocol::encode_v2(&mut bytes, &header);
        }
    }
    let header = bytes.len();
    bytes.extend_from_slice(&client.read);
    Unsent::bytes(bytes, header)
}

fn contains(networks: &[IpNet], ip: IpAddr) -> bool {
    // A PROXY header may write an IPv4 address as one of IPv6.
    let ip = ip.to_canonical();
    networks.iter().any(|network| network.contains(&ip))
}

/// The first protocols, escaped and separated by commas, in at most [`ALPN_TEXT`] bytes and `...`.
fn printable<'a>(alpn: impl Iterator<Item = &'a [u8]>) -> Option<Box<str>> {
    let mut text = String::new();
    for (n, protocol) in alpn.enumerate() {
        let separator = if n == 0 { &b""[..] } else { b"," };
        for byte in separator.iter().chain(protocol) {
            let escaped = byte.escape_ascii();
            if text.len() + escaped.len() > ALPN_TEXT {
                text += "...";
                return Some(text.into());
            }
            text.extend(escaped.map(char::from));
        }
    }
    (!text.is_empty()).then(|| text.into())
}

/// Refuses a connection of which nothing was read.
pub fn refuse(
    shared: &Shared,
    generation: &Generation,
    listener: usize,
    stream: &TcpStream,
    peer: SocketAddr,
    reason: Reason,
) {
    reject(shared, generation, listener, stream, (peer, None), reason, Start::now());
}

/// Counts, logs, answers, closes.
fn reject(
    shared: &Shared,
    generation: &Generation,
    listener: usize,
    stream: &TcpStream,
    (client, server_name): (SocketAddr, Option<&str>),
    reason: Reason,
    start: Start,
) {
    generation.listener_metrics[listener].rejected(reason).inc();
    let listener = &generation.config.listeners[listener];
    // Health checkers connect and go, all day long.
    let debug = reason == Reason::ClosedEarly;
    if (debug && tracing::enabled!(target: "access", tracing::Level::DEBUG))
        || (!debug && shared.rejections.admits(Some(reason)))
    {
        log_rejection(listener, client, server_name, reason, start);
    }
    close_rejected(stream, if listener.mode == Mode::Tls { reason.alert() } else { None });
}

/// Closes with a FIN where possible, after the alert if there is one.
fn close_rejected(stream: &TcpStream, alert: Option<u8>) {
    if let Some(description) = alert {
        // Content type alert, version TLS 1.2 as all records have it (RFC 8446 section 5.1), length
        // 2, fatal.
        let _ = stream.try_write(&[21, 3, 3, 0, 2, 2, description]);
    }
    // Unread bytes would turn the FIN into a RST, which can overtake the alert. What comes later is
    // not waited for.
    let mut rest = [0; 16 * 1024];
    for _ in 0..16 {
        if !matches!(stream.try_read(&mut rest), Ok(n) if n > 0) {
            break;
        }
    }
    socket::close_with_fin(stream);
}

fn log_rejection(listener: &Listener, client: SocketAddr, server_name: Option<&str>, reason: Reason, start: Start) {
    macro_rules! log {
        ($level:expr) => {
            tracing::event!(
                target: "access",
                $level,
                start = unix_seconds(start.wall),
                duration = start.at.elapsed().as_secs_f64(),
                %client,
                listener = &*listener.name,
                server_name = server_name.unwrap_or_default(),
                rejected = reason.as_str(),
            )
        };
    }
    if reason == Reason::ClosedEarly { log!(tracing::Level::DEBUG) } else { log!(tracing::Level::INFO) }
}

fn log_redirect(listener: &Listener, client: &Client, start: Start) {
    tracing::info!(
        target: "access",
        start = unix_seconds(start.wall),
        duration = start.at.elapsed().as_secs_f64(),
        client = %client.address,
        listener = &*listener.name,
        server_name = client.server_name.as_deref().unwrap_or_default(),
        reason = "redirected",
    );
}
