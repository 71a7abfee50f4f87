//! Options of the sockets of both legs, set before they connect or, on a listener, inherited by
//! what it accepts; and how a socket is left.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

/// More than a client sends that has its answer already.
const DISCARDED: usize = 256 * 1024;

/// Whether an address is one of this machine: then the kernel answers it from itself. Nothing is
/// sent.
pub fn is_of_this_machine(ip: IpAddr) -> bool {
    let any: IpAddr = if ip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let from = UdpSocket::bind((any, 0)).and_then(|socket| {
        // A port of the sort that is never dialled (RFC 863); any will do.
        socket.connect((ip, 9))?;
        socket.local_addr()
    });
    from.is_ok_and(|from| from.ip() == ip)
}

/// Options of both legs.
pub fn prepare(socket: impl AsFd) -> io::Result<()> {
    let socket = SockRef::from(&socket);
    // A process that dies must never look like the end of a stream: its sockets are reset.
    socket.set_linger(Some(Duration::ZERO))?;
    socket.set_tcp_nodelay(true)?;
    // An urgent byte stays in its place in the stream.
    socket.set_out_of_band_inline(true)
}

/// Before a connect after which something is sent at once: the SYN of the other side is then
/// acknowledged together with that, in one packet instead of two (net/ipv4/tcp_input.c,
/// `tcp_rcv_synsent_state_process`).
pub fn save_an_acknowledgement(socket: impl AsFd) -> io::Result<()> {
    rustix::net::sockopt::set_tcp_quickack(socket, false).map_err(Into::into)
}

/// Has the kernel notice, within about `dead_peer`, that the peer of an idle connection has
/// vanished.
pub fn keep_alive(socket: impl AsFd, dead_peer: Duration) -> io::Result<()> {
    let seconds = dead_peer.as_secs().max(1);
    // Half of the time idle, the other half for three probes.
    let idle = (seconds / 2).max(1);
    let interval = ((seconds - seconds.min(idle)) / 3).max(1);
    SockRef::from(&socket).set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(Duration::from_secs(idle))
            .with_interval(Duration::from_secs(interval))
            .with_retries(3),
    )
}

/// From now on closing means FIN: for a connection whose end is proven, or of which nothing was
/// forwarded.
pub fn close_with_fin(socket: impl AsFd) {
    let _ = SockRef::from(&socket).set_linger(None);
}

/// Reads and throws away until the peer's FIN, or until it is too much: bytes that nobody has read
/// turn a FIN of ours into a RST, which can overtake what was sent before it.
pub async fn discard(stream: &TcpStream) -> io::Result<()> {
    let mut left = DISCARDED;
    while left > 0 {
        stream.readable().await?;
        let mut buffer = [0; 4096];
        match stream.try_read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => left = left.saturating_sub(n),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
