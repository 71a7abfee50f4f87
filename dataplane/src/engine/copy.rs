//! The userspace step: read into a buffer of the worker, write at once, keep only what the receiver
//! did not take.
//!
//! The buffer belongs to the thread, so that a connection without unsent bytes costs no memory
//! here.

use std::cell::RefCell;
use std::io;
use std::os::fd::AsFd;

use rustix::net::{RecvFlags, SendFlags, recv, send};

/// Bytes read at once, and so the most that one direction of a connection ever keeps in userspace.
/// Two TLS records.
pub const CHUNK: usize = 32 * 1024;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; CHUNK].into_boxed_slice());
}

/// What one step did.
#[derive(Debug)]
pub struct Step {
    /// Bytes read; 0 is the end of the stream.
    pub read: usize,
    /// How many of them the receiver took.
    pub written: usize,
    /// The rest.
    pub rest: Vec<u8>,
    /// Why there is a rest, unless the receiver was merely full.
    pub write_error: Option<io::Error>,
}

/// Reads once and writes what was read.
///
/// # Errors
/// Those of reading; errors of writing are in the [`Step`], because bytes were read by then.
pub fn step(from: impl AsFd, to: impl AsFd) -> io::Result<Step> {
    SCRATCH.with_borrow_mut(|scratch| {
        let (read, _) = recv(from, &mut scratch[..], RecvFlags::DONTWAIT)?;
        let mut step = Step { read, written: 0, rest: Vec::new(), write_error: None };
        while step.written < read {
            match write(&to, &scratch[step.written..read]) {
                Ok(n) => step.written += n,
                Err(e) => {
                    if e.kind() != io::ErrorKind::WouldBlock {
                        step.write_error = Some(e);
                    }
                    step.rest = scratch[step.written..read].to_vec();
                    break;
                }
            }
        }
        Ok(step)
    })
}

/// Reads once, behind what is there already.
pub fn read(from: impl AsFd, rest: &mut Vec<u8>) -> io::Result<usize> {
    SCRATCH.with_borrow_mut(|scratch| {
        let (read, _) = recv(from, &mut scratch[..], RecvFlags::DONTWAIT)?;
        rest.extend_from_slice(&scratch[..read]);
        Ok(read)
    })
}

/// Writes what the receiver takes.
pub fn write(to: impl AsFd, bytes: &[u8]) -> io::Result<usize> {
    Ok(send(to, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?)
}
