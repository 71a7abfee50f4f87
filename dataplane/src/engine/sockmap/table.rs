//! Places in the sockmap: which rows are whose, how much each may queue, and who is woken for a
//! row.
//!
//! Knows no connection.

use std::io;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::AcqRel, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, Weak, mpsc};
use std::task::{Context, Poll};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use atomic_waker::AtomicWaker;
use aya::maps::{MapData, RingBuf};
use common::sockmap::{Budget, Row};
use prometheus::IntCounter;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::sync::oneshot;

use super::programs::{Programs, load};
use crate::engine::pair::Side;
use crate::kernel::ebpf::LoadError;
use crate::kernel::sys;

/// Connections that the map has room for at most. A row is 128 bytes, and the kernel allocates them
/// when the map is made.
const MOST: u32 = 16 * 1024;

/// What one direction may queue in the kernel, whatever the budget allows: more than a segment of
/// GRO, or bulk never stays in the kernel at all.
const LARGEST_QUEUE: u64 = 256 * 1024;
/// Less is not worth a slot: one message of 2 KiB and its overhead.
const SMALLEST_QUEUE: u64 = 4 * 1024;

/// Space above the largest receive buffer: segments of GRO, and what is in flight when the window
/// closes.
const UNREAD_MARGIN: u32 = 1 << 20;

#[derive(Debug)]
pub struct Table {
    /// What is in the kernel.
    pub programs: Programs,
    /// Directions that left the kernel's path because the reader was slow, by side of the source.
    pub spills: [IntCounter; 2],
    signals: Box<[Signal]>,
    free: Mutex<Vec<u32>>,
    slots: u32,
    /// Bytes that all queues together may hold.
    memory: AtomicU64,
    /// TCP has so much of the machine's memory that nothing may be queued in the kernel.
    pressed: AtomicBool,
    grace: mpsc::Sender<oneshot::Sender<io::Result<()>>>,
}

/// What happened to a connection that sleeps.
#[derive(Debug, Default)]
pub struct Signal {
    bits: AtomicU32,
    waker: AtomicWaker,
}

/// Bits of a [`Signal`]; those of [`Side::Upstream`] are shifted by [`Signal::UPSTREAM`].
impl Signal {
    /// The socket may have something to read.
    pub const READABLE: u32 = 1;
    /// The socket may have room.
    pub const WRITABLE: u32 = 1 << 1;
    /// Its peer has sent FIN.
    pub const ENDED: u32 = 1 << 2;
    /// It has an error.
    pub const FAILED: u32 = 1 << 3;
    /// Look at the row of which it is the source.
    pub const ROW: u32 = 1 << 4;
    /// Distance of the other side's bits.
    pub const UPSTREAM: u32 = 8;

    /// Adds bits and wakes the connection.
    pub fn raise(&self, bits: u32) {
        self.bits.fetch_or(bits, AcqRel);
        self.waker.wake();
    }

    /// The bits since the last time.
    pub fn take(&self) -> u32 {
        self.bits.swap(0, AcqRel)
    }

    /// Ready when there are bits.
    pub fn poll(&self, cx: &mut Context<'_>) -> Poll<u32> {
        self.waker.register(cx.waker());
        match self.take() {
            0 => Poll::Pending,
            bits => Poll::Ready(bits),
        }
    }
}

impl Table {
    /// Loads the programs, with room for so many connections, and starts to listen to them. Spills
    /// are counted in `spills`.
    pub fn load(connections: usize, spills: [IntCounter; 2]) -> Result<Arc<Self>, LoadError> {
        let slots = MOST.min(connections as u32).max(1);
        let mut programs = load(slots)?;
        bound_unread(&programs.budget[0]);
        let events = programs.events.take().expect("nobody took it before");
        let (grace, requests) = mpsc::channel();
        let table = Arc::new(Self {
            programs,
            spills,
            signals: (0..slots).map(|_| Signal::default()).collect(),
            // The last is taken first: rows that were never used cost no memory of ours.
            free: Mutex::new((0..slots).rev().collect()),
            slots,
            memory: AtomicU64::new(0),
            pressed: AtomicBool::new(false),
            grace,
        });
        Listener::start(&table, events).map_err(|e| LoadError::Refused(aya::maps::MapError::IoError(e).into()))?;
        thread::Builder::new()
            .name("grace".to_owned())
            .spawn(move || serve_grace_periods(&requests))
            .map_err(|e| LoadError::Refused(aya::maps::MapError::IoError(e).into()))?;
        Ok(table)
    }

    /// Bounds what all connections together may queue in the kernel.
    pub fn set_memory(&self, bytes: u64) {
        self.memory.store(bytes, Relaxed);
        self.share_out(&self.free());
    }

    /// A slot for a connection; `None` when all are taken or the budget has nothing left for one
    /// more.
    pub fn take(self: &Arc<Self>) -> Option<Slot> {
        let mut free = self.free();
        if self.share(&free, 1) < SMALLEST_QUEUE {
            return None;
        }
        let index = free.pop()?;
        self.share_out(&free);
        drop(free);
        self.signals[index as usize].take();
        let slot = Slot { table: self.clone(), index, cookies: [None; 2] };
        for side in [Side::Client, Side::Upstream] {
            clear(slot.row(side));
        }
        Some(slot)
    }

    /// Waits until whatever in the kernel looked at something before this call has ended. Those who
    /// ask at the same time wait together.
    pub async fn grace_period(&self) -> io::Result<()> {
        let (answer, answered) = oneshot::channel();
        self.grace.send(answer).map_err(io::Error::other)?;
        answered.await.map_err(io::Error::other)?
    }

    /// Whether the budget still has a share for each connection that is in the map: a reload may
    /// have taken it.
    pub fn has_room(&self) -> bool {
        u64::from(self.programs.budget[0].queue.get()) >= SMALLEST_QUEUE
    }

    fn is_in_use(&self) -> bool {
        self.free().len() < self.slots as usize
    }

    /// The signal of a slot.
    pub fn signal(&self, index: u32) -> Option<&Signal> {
        self.signals.get(index as usize)
    }

    fn free(&self) -> MutexGuard<'_, Vec<u32>> {
        self.free.lock().expect("no panic while held")
    }

    /// Every direction may queue the same, so that all together stay within the budget.
    fn share_out(&self, free: &[u32]) {
        self.programs.budget[0].queue.set(self.share(free, 0) as u32);
    }

    /// What that is, with so many connections more.
    fn share(&self, free: &[u32], more: u64) -> u64 {
        if self.pressed.load(Relaxed) {
            return 0;
        }
        let connections = u64::from(self.slots) - free.len() as u64 + more;
        (self.memory.load(Relaxed) / (2 * connections.max(1))).min(LARGEST_QUEUE)
    }

    /// Gives the kernel's path up while TCP is short of memory, and takes it again later.
    ///
    /// Then send buffers shrink, and what was redirected to a socket whose peer does not read may
    /// have to wait. Passed bytes queue behind it, charged to nobody: with both directions of many
    /// connections stalled that would be much.
    fn watch_memory(&self, pressure: u64) {
        let Some(used) = tcp_memory() else { return };
        // Leave early, come back late.
        let pressed = used > if self.pressed.load(Relaxed) { pressure / 4 } else { pressure / 2 };
        if self.pressed.swap(pressed, Relaxed) != pressed {
            tracing::warn!(bytes = used, pressed, "memory of TCP sockets");
            self.share_out(&self.free());
        }
    }
}

/// Sets how much may be unread of a direction.
fn bound_unread(budget: &Budget) {
    let (receive, send) = (largest_buffer("tcp_rmem"), largest_buffer("tcp_wmem"));
    let unread = receive.saturating_add(UNREAD_MARGIN);
    budget.unread.set(unread);
    // What may be past the filter already: a queue of segments that came out of order, and the
    // backlog of a socket in use (net/ipv4/tcp_ipv4.c, `tcp_add_backlog`).
    budget.flood.set(unread.saturating_add(receive).saturating_add(receive).saturating_add(send));
}

/// How many bytes a socket's buffer may grow to (kernel: Documentation/networking/ip-sysctl.rst).
fn largest_buffer(sysctl: &str) -> u32 {
    // The kernel's own default on most machines.
    const USUAL: u32 = 6 << 20;
    let text = std::fs::read_to_string(format!("/proc/sys/net/ipv4/{sysctl}")).unwrap_or_default();
    text.split_whitespace().nth(2).and_then(|bytes| bytes.parse().ok()).unwrap_or(USUAL)
}

fn clear(row: &Row) {
    row.mode.set(common::sockmap::governor::HOLD);
    for long in [&row.passed, &row.redirected, &row.consumed] {
        long.set(0);
    }
    for word in [
        &row.last_ms,
        &row.next_seq,
        &row.base,
        &row.known,
        &row.reason,
        &row.run_bytes,
        &row.run_segments,
        &row.run_began,
        &row.segments_mark,
        &row.segments_before,
        &row.segments_after,
        &row.trimmed,
        &row.leave_on_bulk,
    ] {
        word.set(0);
    }
}

/// The slot of one connection: two keys, two rows, a signal. It must outlive the sockets that were
/// put there, or they must have been taken out.
#[derive(Debug)]
pub struct Slot {
    table: Arc<Table>,
    index: u32,
    cookies: [Option<u64>; 2],
}

impl Slot {
    pub fn table(&self) -> &Arc<Table> {
        &self.table
    }

    pub fn index(&self) -> u32 {
        self.index
    }

    /// Key of a side's socket.
    fn key(&self, side: Side) -> u32 {
        self.index * 2 + side as u32
    }

    /// The row of the direction of which this side is the source.
    pub fn row(&self, side: Side) -> &Row {
        &self.table.programs.rows[self.key(side) as usize]
    }

    pub fn signal(&self) -> &Signal {
        &self.table.signals[self.index as usize]
    }

    /// Puts a socket into the map: from now on the verdict runs for what it receives.
    pub fn insert(&mut self, side: Side, socket: &TcpStream) -> io::Result<()> {
        let (key, cookie) = (self.key(side), rustix::net::sockopt::socket_cookie(socket)?);
        self.cookies[side as usize] = Some(cookie);
        let programs = &self.table.programs;
        programs.keys.lock().expect("no panic while held").insert(cookie, key, 0).map_err(io::Error::other)?;
        programs.brake(socket)?;
        programs.sockets.lock().expect("no panic while held").set(key, socket, 0).map_err(io::Error::other)
    }

    /// Takes a socket out. No verdict may be running for it, nor begin to.
    pub fn remove(&mut self, side: Side) {
        let key = self.key(side);
        // An error: it was never in, or is closed.
        let _ = self.table.programs.sockets.lock().expect("no panic while held").clear_index(&key);
        self.forget(side);
    }

    fn forget(&mut self, side: Side) {
        if let Some(cookie) = self.cookies[side as usize].take() {
            let _ = self.table.programs.keys.lock().expect("no panic while held").remove(&cookie);
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        for side in [Side::Client, Side::Upstream] {
            self.forget(side);
        }
        // It keeps the memory of the connection's task.
        drop(self.signal().waker.take());
        let mut free = self.table.free();
        free.push(self.index);
        self.table.share_out(&free);
    }
}

/// The thread that hears of rows from the kernel.
struct Listener {
    events: RingBuf<MapData>,
    table: Weak<Table>,
}

impl Listener {
    fn start(table: &Arc<Table>, events: RingBuf<MapData>) -> io::Result<JoinHandle<()>> {
        let listener = Self { events, table: Arc::downgrade(table) };
        thread::Builder::new().name("sockmap-events".to_owned()).spawn(move || listener.listen())
    }

    fn listen(mut self) {
        // Often enough to end soon after the table; and often enough that TCP's memory does not
        // grow by much between two looks.
        const RELAXED: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
        const ATTENTIVE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
        let pressure = tcp_memory_pressure();
        let (mut tick, mut looked) = (&RELAXED, Instant::now());
        loop {
            let ready = poll(&mut [PollFd::new(&self.events, PollFlags::IN)], Some(tick));
            let Some(table) = self.table.upgrade() else { return };
            if looked.elapsed() >= Duration::from_millis(100) {
                looked = Instant::now();
                table.watch_memory(pressure);
                tick = if table.is_in_use() { &ATTENTIVE } else { &RELAXED };
            }
            if ready.is_err() {
                continue;
            }
            while let Some(event) = self.events.next() {
                let Some(key) = event.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes)) else { continue };
                if let Some(signal) = table.signal(key / 2) {
                    signal.raise(Signal::ROW << (key % 2 * Signal::UPSTREAM));
                }
            }
        }
    }
}

fn serve_grace_periods(requests: &mpsc::Receiver<oneshot::Sender<io::Result<()>>>) {
    while let Ok(first) = requests.recv() {
        let waiting: Vec<_> = std::iter::once(first).chain(requests.try_iter()).collect();
        let errno = sys::grace_period().err().map(|e| e.raw_os_error().unwrap_or(0));
        for answer in waiting {
            let _ = answer.send(errno.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno))));
        }
    }
}

/// Bytes that TCP sockets of the whole machine hold (kernel: net/ipv4/proc.c).
fn tcp_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/net/sockstat").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("TCP:"))?;
    let mut words = line.split_whitespace().skip_while(|word| *word != "mem").skip(1);
    let pages: u64 = words.next()?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

/// From how many bytes on the kernel is sparing with them (kernel:
/// Documentation/networking/ip-sysctl.rst, tcp_mem). Network namespaces other than the first do not
/// show it: there it is taken to be the default, a sixteenth of all memory.
fn tcp_memory_pressure() -> u64 {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_mem").unwrap_or_default();
    let pages = text.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok());
    pages.map_or_else(|| rustix::system::sysinfo().totalram / 16, |pages| pages * rustix::param::page_size() as u64)
}
