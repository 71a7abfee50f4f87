//! Options of the sockets of both legs, set before they connect or, on a listener, inherited by what it accepts.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};

/// Options of both legs.
pub fn prepare(socket: impl AsFd, dead_peer: Duration) -> io::Result<()> {
    watch_peer(&socket, dead_peer)?;
    let socket = SockRef::from(&socket);
    // A process that dies must never look like the end of a stream: its sockets are reset.
    socket.set_linger(Some(Duration::ZERO))?;
    socket.set_tcp_nodelay(true)?;
    // An urgent byte stays in its place in the stream.
    socket.set_out_of_band_inline(true)
}

/// Sets keepalive and TCP_USER_TIMEOUT so that a silent peer is noticed after `dead_peer`.
pub fn watch_peer(socket: impl AsFd, dead_peer: Duration) -> io::Result<()> {
    let socket = SockRef::from(&socket);
    let seconds = dead_peer.as_secs().max(1);
    // Half of the time idle, the other half for three probes. TCP_USER_TIMEOUT overrides the count (tcp(7)).
    let idle = (seconds / 2).max(1);
    let interval = ((seconds - seconds.min(idle)) / 3).max(1);
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(Duration::from_secs(idle))
            .with_interval(Duration::from_secs(interval))
            .with_retries(3),
    )?;
    socket.set_tcp_user_timeout(Some(dead_peer))
}

/// Leaves a peer that is slow to take what was sent to keepalive and to our own judgement.
pub fn no_user_timeout(socket: impl AsFd) -> io::Result<()> {
    SockRef::from(&socket).set_tcp_user_timeout(None)
}

/// From now on closing means FIN: for a connection whose end is proven, or of which nothing was forwarded.
pub fn close_with_fin(socket: impl AsFd) {
    let _ = SockRef::from(&socket).set_linger(None);
}
