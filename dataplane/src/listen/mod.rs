//! Listening sockets: binding them, and accepting without ever spinning.
//!
//! Each worker has a socket of its own on each address (SO_REUSEPORT), so that the kernel spreads
//! connections and no thread hands one to another. What a connection is for is not known here; it
//! goes to [`crate::connection`] as it comes.

pub mod metrics;

use std::fs::File;
use std::future::poll_fn;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

use crate::connection;
use crate::kernel::socket::prepare;
use crate::reject::Reason;
use crate::shared::Shared;
use crate::shortages::Shortage;

/// Connections that the kernel completes before we accept them; it caps this at net.core.somaxconn.
const BACKLOG: i32 = 4096;

/// The same where few ask.
const BACKLOG_OF_ONE: i32 = 128;

/// How long to wait when the kernel is out of memory for sockets: long enough not to spin, short
/// enough to go unnoticed.
const BREATHER: Duration = Duration::from_millis(50);

/// Binds one address once for each worker. `beside_own`: this process already listens on the port
/// at another address.
///
/// # Errors
/// Those of bind(2); EADDRINUSE also when the other listener would have shared the port.
pub fn bind(addr: SocketAddr, workers: usize, beside_own: bool) -> io::Result<Vec<StdListener>> {
    // SO_REUSEPORT would let a second daemon of the same user take half of the connections in
    // silence: without it, bind finds out.
    if !beside_own {
        socket(addr)?.bind(&addr.into())?;
    }
    (0..workers)
        .map(|_| {
            let socket = socket(addr)?;
            socket.set_reuse_port(true)?;
            prepare(&socket)?;
            socket.bind(&addr.into())?;
            socket.listen(BACKLOG)?;
            socket.set_nonblocking(true)?;
            Ok(socket.into())
        })
        .collect()
}

/// Binds an address for something else than clients: metrics, the webhook. IPv6 sockets are IPv6
/// only here, too: else this one and an IPv4 listener of ours on the same port would be in each
/// other's way.
///
/// # Errors
/// Those of bind(2).
pub fn bind_one(addr: SocketAddr) -> io::Result<StdListener> {
    let socket = socket(addr)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG_OF_ONE)?;
    Ok(socket.into())
}

fn socket(addr: SocketAddr) -> io::Result<Socket> {
    // Protocol TCP, spelled out: MPTCP sockets do not splice and do not belong in a sockmap.
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    Ok(socket)
}

/// Whether this failure to bind only says that the machine has no IPv6.
pub fn is_no_ipv6(addr: SocketAddr, error: &io::Error) -> bool {
    let missing = matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL));
    addr.is_ipv6() && addr.ip().is_unspecified() && missing
}

/// How a listener stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Nobody will accept there any more: what the kernel has completed is accepted first.
    Drain,
    /// Somebody else accepts next: that is theirs.
    Leave,
}

/// Accepts until it is told to stop.
pub async fn accept(shared: Arc<Shared>, bound: SocketAddr, listener: TcpListener, stop: oneshot::Receiver<Stop>) {
    let mut spare = Spare::new();
    let mut turn = Turn::Open(stop);
    while let Some(accepted) = turn.next(|context| listener.poll_accept(context)).await {
        take(&shared, bound, &mut spare, accepted).await;
    }
}

/// How long a listener goes on.
enum Turn {
    /// Until this is sent or dropped.
    Open(oneshot::Receiver<Stop>),
    /// For so many connections that are there at once: the kernel resets what is left in the queue
    /// of a socket that closes, but clients that keep coming fill it again for ever.
    Draining(i32),
}

impl Turn {
    /// What `poll` gives next; `None`: it was the last.
    async fn next<T>(&mut self, mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>) -> Option<T> {
        if let Self::Open(stop) = self {
            tokio::select! {
                biased;
                stop = stop => match stop {
                    Ok(Stop::Leave) => return None,
                    Ok(Stop::Drain) | Err(_) => *self = Self::Draining(BACKLOG + 1),
                },
                accepted = poll_fn(&mut poll) => return Some(accepted),
            }
        }
        let Self::Draining(left) = self else { unreachable!("set above") };
        *left -= 1;
        let at_once = poll_fn(|context| Poll::Ready(poll(context)));
        match tokio::task::coop::unconstrained(at_once).await {
            Poll::Ready(accepted) if *left >= 0 => Some(accepted),
            _ => None,
        }
    }
}

async fn take(
    shared: &Arc<Shared>,
    bound: SocketAddr,
    spare: &mut Spare,
    accepted: io::Result<(TcpStream, SocketAddr)>,
) {
    match accepted {
        Ok((stream, peer)) => {
            let generation = shared.generation.load_full();
            let Some(index) = generation.listener(bound) else { return };
            generation.listener_metrics[index].accepted.inc();
            let permit = if spare.is_spent() { None } else { shared.admission.enter_or_displace().await };
            if let Some(permit) = permit {
                let accepted = connection::Accepted { stream, peer, listener: index, permit };
                tokio::spawn(connection::serve(shared.clone(), generation, accepted));
            } else {
                connection::refuse(shared, &generation, index, &stream, peer, Reason::TotalLimit);
                drop(stream);
            }
            spare.restore();
        }
        Err(error) => match error.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE) => {
                shared.metrics.listen.accept_errors.inc();
                shared.metrics.shortages.note(Shortage::Descriptors);
                // The connection stays in the queue and the socket stays readable. With the spare
                // descriptor it is taken out and refused.
                if !spare.spend() {
                    tokio::time::sleep(BREATHER).await;
                    spare.restore();
                }
            }
            Some(libc::ENOBUFS | libc::ENOMEM) => {
                shared.metrics.listen.accept_errors.inc();
                tokio::time::sleep(BREATHER).await;
            }
            // accept(2): errors of the connection that was in the queue; the next one is not
            // concerned.
            _ => tracing::debug!(%error, "accept"),
        },
    }
}

/// A file descriptor kept for the moment when there is none left.
struct Spare(Option<File>);

impl Spare {
    fn new() -> Self {
        Self(File::open("/dev/null").ok())
    }

    fn is_spent(&self) -> bool {
        self.0.is_none()
    }

    fn spend(&mut self) -> bool {
        self.0.take().is_some()
    }

    fn restore(&mut self) {
        if self.0.is_none() {
            *self = Self::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_port_is_bound_on_each_family() {
        let v4 = bind_one("0.0.0.0:0".parse().unwrap()).unwrap();
        let port = v4.local_addr().unwrap().port();
        match bind_one(SocketAddr::new(std::net::Ipv6Addr::UNSPECIFIED.into(), port)) {
            Ok(_) => {}
            Err(error) => assert_ne!(error.kind(), io::ErrorKind::AddrInUse, "IPv6 alone"),
        }
    }

    #[tokio::test]
    async fn clients_that_keep_coming_do_not_keep_a_listener_open() {
        let (stop, stopped) = oneshot::channel::<Stop>();
        let (mut turn, mut taken) = (Turn::Open(stopped), 0);
        let mut stop = Some(stop);
        while turn.next(|_| Poll::Ready(())).await.is_some() {
            taken += 1;
            if taken == 10 {
                stop = None;
            }
            assert!(taken <= 10 + BACKLOG + 1, "it takes what the kernel may have completed, and no more");
        }
        assert!(stop.is_none() && taken == 10 + BACKLOG + 1);
    }
}
