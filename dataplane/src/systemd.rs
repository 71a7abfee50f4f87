//! What systemd is told by sd_notify(3), and what it passes to a process that it starts
//! (sd_listen_fds(3)).

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::SendFlags;
use sd_notify::NotifyState;

use crate::kernel::descriptors;

/// How long a message may wait for room in the queue of whoever does not read: forwarding and
/// reloads do not depend on that.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long systemd may take to look at all that it was told.
const BARRIER: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

/// Another process is in charge: nothing is told.
static HELD: AtomicBool = AtomicBool::new(false);

/// From now on nothing is told, since another process is in charge; or everything again.
pub fn hold(hold: bool) {
    HELD.store(hold, Relaxed);
}

/// Tells it, if it wants to know.
pub fn notify(states: &[NotifyState<'_>]) {
    let text: String = states.iter().map(|state| format!("{state}\n")).collect();
    if is_told()
        && !HELD.load(Relaxed)
        && let Err(error) = notify_with(&text, &[])
    {
        tracing::debug!(%error, "sd_notify");
    }
}

/// Whether a service manager wants to be told.
pub fn is_told() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// Tells it, and sends copies of descriptors.
///
/// # Errors
/// There is no service manager, or it does not read.
pub fn notify_with(text: &str, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
    let socket = std::env::var_os("NOTIFY_SOCKET").context("there is no service manager")?;
    Ok(send(socket.as_bytes(), text.as_bytes(), descriptors)?)
}

fn send(to: &[u8], text: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let address = match to {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        path => SocketAddr::from_pathname(std::path::Path::new(std::ffi::OsStr::from_bytes(path)))?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    socket.set_write_timeout(Some(PATIENCE))?;
    descriptors::send(&socket, text, descriptors, SendFlags::empty())
}

/// Waits until it has looked at all that it was told before (sd_notify_barrier(3)).
pub fn barrier() -> Result<()> {
    let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    notify_with("BARRIER=1\n", &[std::os::fd::AsFd::as_fd(&theirs)])?;
    drop(theirs);
    let mut waited = [PollFd::new(&ours, PollFlags::empty())];
    ensure!(poll(&mut waited, Some(&BARRIER))? > 0, "the service manager does not answer");
    Ok(())
}

/// What it has passed to this process, with names. To be asked once, when the process has just
/// started.
pub fn passed_descriptors() -> Vec<(OwnedFd, String)> {
    let Ok(passed) = sd_notify::listen_fds_with_names() else { return Vec::new() };
    passed
        .map(|(descriptor, name)| {
            // SAFETY: it was passed to this process alone (LISTEN_PID), nothing else here looks at
            // it, and this function is called once.
            (unsafe { OwnedFd::from_raw_fd(descriptor) }, name)
        })
        .collect()
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
        let full = (0..10_000).find_map(|_| send(to, b"STATUS=x\n", &[]).err()).expect("it fills up");
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        let mut read = [0; 64];
        let n = socket.recv(&mut read).unwrap();
        assert_eq!(&read[..n], b"STATUS=x\n");
        send(to, b"READY=1\n", &[]).unwrap();
    }
}
