//! Readiness of sockets in the sockmap: one epoll instance a worker, itself registered with the
//! worker's runtime.
//!
//! tokio registers sockets for EPOLLIN. The kernel wakes such a waiter for every segment, also for
//! one that it has redirected already: 100,000 wake-ups in a transfer of 4 GB. So a socket in the
//! map is registered here, for nothing but the end of the stream and errors, until userspace has
//! something to do with it.

use std::cell::OnceCell;
use std::io;
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::sync::Arc;

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;

use super::table::{Signal, Slot, Table};
use crate::engine::pair::Side;
use crate::kernel::sys;

/// Events fetched at once.
const BATCH: usize = 64;

thread_local! {
    static EPOLL: OnceCell<Arc<OwnedFd>> = const { OnceCell::new() };
}

/// A socket's registration, which goes with the socket or is [`end`](Self::end)ed.
#[derive(Debug)]
pub struct Registration {
    epoll: Arc<OwnedFd>,
    /// Slot and side.
    data: u64,
    flags: EventFlags,
}

/// What is wanted of every socket.
fn always() -> EventFlags {
    // EPOLLERR and EPOLLHUP come unasked.
    EventFlags::RDHUP | EventFlags::ET
}

impl Registration {
    /// Registers a socket of this slot with its worker's epoll instance.
    pub fn new(epoll: Arc<OwnedFd>, slot: &Slot, side: Side, socket: &TcpStream) -> io::Result<Self> {
        let data = u64::from(slot.index()) * 2 + side as u64;
        epoll::add(&epoll, socket, EventData::new_u64(data), always())?;
        Ok(Self { epoll, data, flags: always() })
    }

    /// Says whether it matters that the socket can be read or written. What is ready already is
    /// told at once.
    pub fn want(&mut self, socket: &TcpStream, readable: bool, writable: bool) -> io::Result<()> {
        let mut flags = always();
        flags.set(EventFlags::IN, readable);
        flags.set(EventFlags::OUT, writable);
        if flags != self.flags {
            epoll::modify(&self.epoll, socket, EventData::new_u64(self.data), flags)?;
            self.flags = flags;
        }
        Ok(())
    }

    /// Ends the registration of a socket that stays open.
    pub fn end(self, socket: &TcpStream) {
        let _ = epoll::delete(&self.epoll, socket);
    }
}

/// The epoll instance of the worker that calls.
pub fn of_this_worker(table: &Arc<Table>) -> io::Result<Arc<OwnedFd>> {
    EPOLL.with(|cell| {
        if let Some(epoll) = cell.get() {
            return Ok(epoll.clone());
        }
        let epoll = Arc::new(epoll::create(CreateFlags::CLOEXEC)?);
        let watched = sys::watch_readable(epoll.clone())?;
        tokio::spawn(dispatch(watched, table.clone()));
        let _ = cell.set(epoll.clone());
        Ok(epoll)
    })
}

async fn dispatch(epoll: AsyncFd<Arc<OwnedFd>>, table: Arc<Table>) {
    while let Ok(mut ready) = epoll.readable().await {
        match raise_signals(epoll.get_ref(), &table) {
            Ok(BATCH) | Err(Errno::INTR) => {}
            Ok(_) => ready.clear_ready(),
            Err(error) => {
                tracing::error!(%error, "epoll_wait");
                return;
            }
        }
    }
}

/// Fetches a batch of events and passes them on; says how many there were.
fn raise_signals(epoll: &OwnedFd, table: &Table) -> Result<usize, Errno> {
    let mut buffer = [const { MaybeUninit::<Event>::uninit() }; BATCH];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    let (events, _) = epoll::wait(epoll, &mut buffer, Some(&at_once))?;
    for event in events.iter() {
        let data = event.data.u64();
        if let Some(signal) = table.signal((data / 2) as u32) {
            signal.raise(bits(event.flags) << (data % 2 * u64::from(Signal::UPSTREAM)));
        }
    }
    Ok(events.len())
}

fn bits(flags: EventFlags) -> u32 {
    let mut bits = 0;
    if flags.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR) {
        bits |= Signal::READABLE;
    }
    if flags.intersects(EventFlags::OUT | EventFlags::HUP | EventFlags::ERR) {
        bits |= Signal::WRITABLE;
    }
    if flags.intersects(EventFlags::RDHUP | EventFlags::HUP) {
        bits |= Signal::ENDED;
    }
    if flags.contains(EventFlags::ERR) {
        bits |= Signal::FAILED;
    }
    bits
}
