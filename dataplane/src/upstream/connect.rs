//! Connecting to one target: which of its addresses, for how long, and why it failed.
//!
//! It must not know that there are other targets.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{timeout, timeout_at};

use super::{Address, Resolution, Target};
use crate::kernel::socket;

/// A connect that was given up after less than this says nothing of the address.
const LONG: Duration = Duration::from_millis(200);

/// What a dial needs beside the pool.
#[derive(Debug, Clone)]
pub struct Dial {
    /// The client, for its family and for `balance = "hash"`.
    pub client: SocketAddr,
    /// Where we listen: a target that turns out to be ourselves would make a loop.
    pub own: Arc<[SocketAddr]>,
    /// Another port of the targets than their own. How that one does says nothing of the target: it
    /// is not put aside for it, nor taken back.
    pub port: Option<u16>,
    /// Something is sent as soon as there is a connection.
    pub speaks_first: bool,
    /// It is no client's: a check or a probe.
    pub is_probe: bool,
}

/// Why a connect failed.
#[derive(Debug)]
pub struct Failure {
    /// What callers decide by.
    pub cause: Cause,
    detail: String,
}

/// What stood in the way of a connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// This process has no file descriptor left.
    NoDescriptor,
    /// The kernel has no memory for a socket.
    NoMemory,
    /// No local port is left for this address.
    NoLocalPort,
    /// Nothing listens there.
    Refused,
    /// No answer in time.
    Timeout,
    /// The connection was reset.
    Reset,
    /// No way leads there.
    Unreachable,
    /// The name has no address.
    Resolve,
    /// The target is a listener of ours.
    OwnListener,
    /// The node's owner does not let the repository that names the target go there.
    Forbidden,
    /// Something else.
    Other,
}

impl Cause {
    /// The label of `dataplane_upstream_connect_failures_total`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NoDescriptor => "no_descriptor",
            Self::NoMemory => "no_memory",
            Self::NoLocalPort => "no_local_port",
            Self::Refused => "refused",
            Self::Timeout => "timeout",
            Self::Reset => "reset",
            Self::Unreachable => "unreachable",
            Self::Resolve => "resolve",
            Self::OwnListener => "own_listener",
            Self::Forbidden => "forbidden",
            Self::Other => "other",
        }
    }

    /// It says nothing of the target: what a connection needs was lacking here.
    pub const fn is_our_own(self) -> bool {
        matches!(self, Self::NoDescriptor | Self::NoMemory | Self::NoLocalPort)
    }

    /// It was not dialled: what is known of its name is told by who asks for that.
    pub const fn is_of_the_name(self) -> bool {
        matches!(self, Self::Resolve | Self::Forbidden)
    }
}

impl From<&io::Error> for Cause {
    fn from(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE) => Self::NoDescriptor,
            Some(libc::ENOBUFS | libc::ENOMEM) => Self::NoMemory,
            Some(libc::EADDRNOTAVAIL) => Self::NoLocalPort,
            Some(libc::ECONNREFUSED) => Self::Refused,
            Some(libc::ETIMEDOUT) => Self::Timeout,
            Some(libc::ECONNRESET) => Self::Reset,
            Some(libc::EHOSTUNREACH | libc::ENETUNREACH | libc::EHOSTDOWN | libc::ENETDOWN) => Self::Unreachable,
            _ => Self::Other,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.cause.as_str(), self.detail)
    }
}

impl Failure {
    fn new(cause: Cause, detail: impl Into<String>) -> Self {
        Self { cause, detail: detail.into() }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::new(Cause::from(&error), error.to_string())
    }
}

/// A connect to one of several addresses.
type UnderWay<'a> = Pin<Box<dyn Future<Output = Result<TcpStream, Failure>> + Send + 'a>>;

impl Target {
    /// Connects to one of the target's addresses within `patience`: one after the other, the next
    /// as soon as one has failed or has not answered for `stagger`. Without a `stagger`, those that
    /// are left share the time that is left.
    pub(super) async fn connect(
        &self,
        dial: &Dial,
        stagger: Duration,
        patience: Duration,
    ) -> Result<TcpStream, Failure> {
        let deadline = Instant::now() + patience;
        let no_answer = |_| Failure::new(Cause::Timeout, format!("no answer within {patience:?}"));
        let addresses = self.addresses_by(dial, deadline).await?;
        if let [address] = &addresses[..] {
            return timeout_at(deadline.into(), self.connect_to(address, dial)).await.map_err(no_answer)?;
        }
        let mut last = Failure::new(Cause::Resolve, "the name has no address");
        let mut under_way: Vec<UnderWay<'_>> = Vec::new();
        let mut left = addresses.iter();
        loop {
            if let Some(address) = left.next() {
                under_way.push(Box::pin(self.connect_to(address, dial)));
            } else if under_way.is_empty() {
                return Err(last);
            }
            let more = left.len() as u32;
            let remaining = deadline.saturating_duration_since(Instant::now());
            let pause = if more == 0 {
                remaining
            } else if stagger.is_zero() {
                remaining / (more + 1)
            } else {
                stagger.min(remaining)
            };
            let first = std::future::poll_fn(|context| {
                for index in 0..under_way.len() {
                    if let Poll::Ready(outcome) = under_way[index].as_mut().poll(context) {
                        drop(under_way.remove(index));
                        return Poll::Ready(outcome);
                    }
                }
                Poll::Pending
            });
            match timeout(pause, first).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(failure)) => last = failure,
                Err(late) if more == 0 => return Err(no_answer(late)),
                Err(_) => {}
            }
        }
    }

    async fn connect_to(&self, address: &Address, dial: &Dial) -> Result<TcpStream, Failure> {
        // Of another port nothing is remembered.
        let remembers = dial.port.is_none();
        let mut connect = Connect { target: self, address, begun: Instant::now(), answered: !remembers };
        let mut at = address.at;
        if let Some(port) = dial.port {
            at.set_port(port);
            // The address was admitted with the target's own port.
            if !self.address.admits(at, socket::is_of_this_machine) {
                let detail = format!("`allow_targets` of [source] does not let a repository go to {at}");
                tracing::debug!(target_name = &*self.address.text, detail, "not dialled");
                return Err(Failure::new(Cause::Forbidden, detail));
            }
        }
        let prepared = if at.is_ipv6() { TcpSocket::new_v6() } else { TcpSocket::new_v4() }.and_then(|socket| {
            socket::prepare(&socket)?;
            if dial.speaks_first {
                socket::save_an_acknowledgement(&socket)?;
            }
            Ok(socket)
        });
        let connected = prepared?.connect(at).await;
        connect.answered = true;
        if remembers {
            address.failed_at.store(if connected.is_ok() { 0 } else { self.now() }, Relaxed);
        }
        let stream = connected?;
        if is_own(&stream, at.port(), &dial.own) {
            return Err(Failure::new(Cause::OwnListener, format!("{at} is a listener of this daemon")));
        }
        Ok(stream)
    }

    /// The addresses. Waits for the resolver's first answer, if there was none yet, and for another
    /// one where it had none: this client has nowhere else to go. An answer that may not be used is
    /// no reason to wait, but one to ask again.
    async fn addresses_by(&self, dial: &Dial, deadline: Instant) -> Result<Vec<Arc<Address>>, Failure> {
        let mut resolution = self.resolution.subscribe();
        match &*resolution.borrow_and_update() {
            Resolution::Known(known) => return Ok(self.in_turn(known, dial)),
            Resolution::Pending => {}
            Resolution::Unknown(_) => self.wanted.notify_one(),
            Resolution::Forbidden(reason) => {
                self.wanted.notify_one();
                return Err(Failure::new(Cause::Forbidden, &**reason));
            }
        }
        let _ = timeout_at(deadline.into(), resolution.changed()).await;
        match &*resolution.borrow() {
            Resolution::Known(known) => Ok(self.in_turn(known, dial)),
            Resolution::Pending => Err(Failure::new(Cause::Resolve, "the resolver has not answered yet")),
            Resolution::Unknown(reason) => Err(Failure::new(Cause::Resolve, &**reason)),
            Resolution::Forbidden(reason) => Err(Failure::new(Cause::Forbidden, &**reason)),
        }
    }
}

/// A connect to one address. Given up after a while, it says that the others are to be preferred.
struct Connect<'a> {
    target: &'a Target,
    address: &'a Address,
    begun: Instant,
    answered: bool,
}

impl Drop for Connect<'_> {
    fn drop(&mut self) {
        if !self.answered && self.begun.elapsed() >= LONG {
            self.address.failed_at.store(self.target.now(), Relaxed);
        }
    }
}

/// Whether a connection of ours to this port arrived at one of our own listeners.
fn is_own(stream: &TcpStream, port: u16, own: &[SocketAddr]) -> bool {
    let mut own = own.iter().filter(|own| own.port() == port).peekable();
    if own.peek().is_none() {
        return false;
    }
    // Not the address that was dialled: 0.0.0.0 is this machine, and an IPv4 address may be written
    // as one of IPv6.
    let (Ok(local), Ok(peer)) = (stream.local_addr(), stream.peer_addr()) else { return false };
    let (here, there) = (local.ip().to_canonical(), peer.ip().to_canonical());
    let listens =
        |own: &SocketAddr| own.is_ipv4() == there.is_ipv4() && (own.ip() == there || own.ip().is_unspecified());
    // A host that connects to itself has that address at both ends.
    own.any(listens) && (there.is_loopback() || there == here)
}
