//! What systemd is told by sd_notify(3).

use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use sd_notify::NotifyState;

/// How long a message may wait for room in the queue of whoever does not read: forwarding and
/// reloads do not depend on that.
const PATIENCE: Duration = Duration::from_secs(1);

/// Tells it, if it wants to know.
pub fn notify(states: &[NotifyState<'_>]) {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let text: String = states.iter().map(|state| format!("{state}\n")).collect();
    if let Err(error) = send(socket.as_bytes(), text.as_bytes()) {
        tracing::debug!(%error, "sd_notify");
    }
}

fn send(to: &[u8], text: &[u8]) -> io::Result<()> {
    let address = match to {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        path => SocketAddr::from_pathname(std::path::Path::new(std::ffi::OsStr::from_bytes(path)))?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_write_timeout(Some(PATIENCE))?;
    socket.send_to_addr(text, &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_does_not_read_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let to = path.as_os_str().as_bytes();
        // The queue is short (net.unix.max_dgram_qlen).
        let full = (0..10_000).find_map(|_| send(to, b"STATUS=x\n").err()).expect("it fills up");
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        let mut read = [0; 64];
        let n = socket.recv(&mut read).unwrap();
        assert_eq!(&read[..n], b"STATUS=x\n");
        send(to, b"READY=1\n").unwrap();
    }
}
