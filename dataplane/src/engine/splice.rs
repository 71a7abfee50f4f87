//! Pipes for splice(2): pooled, bounded, and never reused with a byte in them.
//!
//! A connection holds a pipe only while bytes are in it, so their number follows the connections
//! that are stalled, not all of them. Each worker thread keeps a few empty ones; the bound is on
//! all that exist in the process.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

/// Asked of F_SETPIPE_SZ: 64 buffers, each a fragment of an skb, so that a burst of GRO-sized
/// segments fits; 256 pipes of it are the default `kernel_memory`. Without privileges the kernel
/// may give less, which only makes the portions smaller.
pub const CAPACITY: usize = 256 * 1024;

/// Empty pipes that a worker keeps: one is in use at a time, unless receivers are slow.
const IDLE_PER_WORKER: usize = 16;

static EXISTING: AtomicUsize = AtomicUsize::new(0);
static LIMIT: AtomicUsize = AtomicUsize::new(256);

thread_local! {
    static IDLE: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
}

/// Bounds the pipes of the process; those beyond a lowered limit go as they empty.
pub fn set_limit(pipes: usize) {
    LIMIT.store(pipes, Relaxed);
}

/// Pipes that exist now, idle ones included.
pub fn existing() -> usize {
    EXISTING.load(Relaxed)
}

/// A pipe and the number of bytes in it. Dropped with bytes in it, it is closed.
#[derive(Debug)]
pub struct Pipe {
    /// To read from, to write to.
    ends: [OwnedFd; 2],
    len: usize,
    _existing: Existing,
}

/// One of [`EXISTING`].
#[derive(Debug)]
struct Existing;

impl Drop for Existing {
    fn drop(&mut self) {
        EXISTING.fetch_sub(1, Relaxed);
    }
}

impl Pipe {
    /// An empty pipe, or `None` at the bound or without a file descriptor: the caller copies
    /// instead.
    pub fn take() -> Option<Self> {
        if let Some(pipe) = IDLE.with_borrow_mut(Vec::pop) {
            return Some(pipe);
        }
        let is_one_too_many = EXISTING.fetch_add(1, Relaxed) >= LIMIT.load(Relaxed);
        let existing = Existing;
        if is_one_too_many {
            return None;
        }
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).ok()?;
        // A smaller pipe than asked for works as well.
        let _ = fcntl_setpipe_size(&write, CAPACITY);
        Some(Self { ends: [read, write], len: 0, _existing: existing })
    }

    /// A pipe of another process, its end to read from first, with so many bytes in it. It exists:
    /// there may be more than the bound by that.
    pub fn adopt(ends: [OwnedFd; 2], len: usize) -> Self {
        EXISTING.fetch_add(1, Relaxed);
        Self { ends, len, _existing: Existing }
    }

    /// Its two ends, as [`adopt`](Self::adopt) takes them, and the bytes in it.
    pub fn into_parts(self) -> ([OwnedFd; 2], usize) {
        let Self { ends, len, _existing: _ } = self;
        (ends, len)
    }

    /// Gives an empty pipe back.
    pub fn put_back(self) {
        debug_assert_eq!(self.len, 0, "bytes of one connection must never reach another");
        if self.len > 0 || EXISTING.load(Relaxed) > LIMIT.load(Relaxed) {
            return;
        }
        IDLE.with_borrow_mut(|idle| {
            // Of a small limit no worker may hoard what others need.
            if idle.len() < IDLE_PER_WORKER.min(LIMIT.load(Relaxed) / 8) {
                idle.push(self);
            }
        });
    }

    /// Moves what the socket has, up to the capacity, into this pipe, which must be empty: then
    /// EAGAIN can only mean that the socket is. 0 is the end of the stream.
    pub fn fill(&mut self, from: impl AsFd) -> io::Result<usize> {
        debug_assert_eq!(self.len, 0);
        let n = splice(from, None, &self.ends[1], None, CAPACITY, SpliceFlags::NONBLOCK | SpliceFlags::MOVE)?;
        self.len += n;
        Ok(n)
    }

    /// Moves what is in this pipe to the socket, as much as it accepts.
    pub fn drain(&mut self, to: impl AsFd) -> io::Result<usize> {
        let n = splice(&self.ends[0], None, to, None, self.len, SpliceFlags::NONBLOCK | SpliceFlags::MOVE)?;
        self.len -= n;
        Ok(n)
    }

    /// Whether no byte is in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Whether splice(2) between a socket and a pipe works here (a sandbox may forbid it).
pub fn self_test() -> Result<(), String> {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    let run = || -> io::Result<()> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let mut near = TcpStream::connect(listener.local_addr()?)?;
        let (mut far, _) = listener.accept()?;
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        near.write_all(b"splice")?;
        let mut moved = 0;
        while moved < 6 {
            moved += splice(&far, None, &write, None, 6 - moved, SpliceFlags::empty())?;
        }
        splice(&read, None, &far, None, 6, SpliceFlags::empty())?;
        far.flush()?;
        let mut back = [0; 6];
        near.read_exact(&mut back)?;
        if &back == b"splice" { Ok(()) } else { Err(io::Error::other("bytes came out changed")) }
    };
    run().map_err(|e| format!("the self-test on loopback failed: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    fn connected() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    }

    #[test]
    fn splice_works_on_this_machine() {
        self_test().unwrap();
    }

    #[test]
    fn a_pipe_that_still_holds_bytes_is_closed_and_not_pooled() {
        let (mut near, far) = connected();
        near.write_all(b"secret of connection one").unwrap();
        let mut pipe = Pipe::take().unwrap();
        assert_eq!(pipe.fill(&far).unwrap(), 24);
        drop(pipe);
        assert_eq!(IDLE.with_borrow(Vec::len), 0);

        let mut pipe = Pipe::take().unwrap();
        assert!(pipe.is_empty());
        near.write_all(b"two").unwrap();
        assert_eq!(pipe.fill(&far).unwrap(), 3);
        assert_eq!(pipe.drain(&far).unwrap(), 3);
        let mut got = [0; 3];
        near.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"two");
        pipe.put_back();
        assert_eq!(IDLE.with_borrow(Vec::len), 1);
    }
}
