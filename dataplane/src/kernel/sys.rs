//! The kernel boundary: calls for which no safe wrapper exists in the libraries used here.
//!
//! Everything `unsafe` of this crate is in this file. It knows nothing of connections or routes.

use std::io;
use std::mem::{self, MaybeUninit};
use std::net::TcpStream;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use rustix::mm::{MapFlags, ProtFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// As `uname -r` says it.
pub fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// The head of `struct tcp_info` (include/uapi/linux/tcp.h), as far as it is used here. The kernel
/// fills as much as it has.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct TcpInfo {
    /// `TCP_ESTABLISHED` is 1.
    pub state: u8,
    ca_state: u8,
    retransmits: u8,
    /// Window or keepalive probes sent since the peer last answered.
    pub probes: u8,
    backoff: u8,
    options: u8,
    wscale: u8,
    flags: u8,
    rto: u32,
    ato: u32,
    snd_mss: u32,
    rcv_mss: u32,
    /// Segments sent and not acknowledged.
    pub unacked: u32,
    sacked: u32,
    lost: u32,
    retrans: u32,
    fackets: u32,
    last_data_sent: u32,
    last_ack_sent: u32,
    last_data_recv: u32,
    /// Milliseconds since the peer last acknowledged anything.
    pub last_ack_recv: u32,
    pmtu: u32,
    rcv_ssthresh: u32,
    rtt: u32,
    rttvar: u32,
    snd_ssthresh: u32,
    snd_cwnd: u32,
    advmss: u32,
    reordering: u32,
    rcv_rtt: u32,
    rcv_space: u32,
    total_retrans: u32,
    pacing_rate: u64,
    max_pacing_rate: u64,
    /// RFC 4898 tcpEStatsAppHCThruOctetsAcked.
    pub bytes_acked: u64,
    /// RFC 4898 tcpEStatsAppHCThruOctetsReceived.
    pub bytes_received: u64,
    segs_out: u32,
    segs_in: u32,
    /// Bytes in the send queue that were never sent.
    pub notsent_bytes: u32,
    min_rtt: u32,
    data_segs_in: u32,
    data_segs_out: u32,
    delivery_rate: u64,
    busy_time: u64,
    rwnd_limited: u64,
    sndbuf_limited: u64,
    delivered: u32,
    delivered_ce: u32,
    bytes_sent: u64,
    bytes_retrans: u64,
    dsack_dups: u32,
    reord_seen: u32,
    rcv_ooopack: u32,
    /// The peer's advertised window in bytes (since Linux 5.4; 0 before).
    pub snd_wnd: u32,
}

/// [`TcpInfo::state`] of a socket to which both sides may still write.
pub const TCP_ESTABLISHED: u8 = 1;

/// [`TcpInfo::state`] of a socket that has received FIN and sent none.
pub const TCP_CLOSE_WAIT: u8 = 8;

/// [`TcpInfo::state`] of a socket without a connection, for example after a RST
/// (include/net/tcp_states.h).
pub const TCP_CLOSE: u8 = 7;

/// `getsockopt(TCP_INFO)`.
pub fn tcp_info(socket: impl AsFd) -> io::Result<TcpInfo> {
    get(socket, libc::TCP_INFO)
}

/// `ioctl(SIOCOUTQ)`: bytes in the send queue, sent or not, that the peer has not acknowledged
/// (tcp(7)).
pub fn unacknowledged(socket: impl AsFd) -> io::Result<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the kernel writes one int (net/ipv4/tcp.c, `tcp_ioctl`).
    let rc = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if rc == 0 { Ok(bytes as u32) } else { Err(io::Error::last_os_error()) }
}

/// `struct tcp_repair_window` (include/uapi/linux/tcp.h).
#[repr(C)]
#[derive(Default)]
struct RepairWindow {
    snd_wl1: u32,
    snd_wnd: u32,
    max_window: u32,
    rcv_wnd: u32,
    rcv_wup: u32,
}

/// Closes an established connection without a word to its peer, and opens it anew so many bytes
/// earlier in what it has sent: what is written next overlaps with what the peer has already, as a
/// retransmit may. For tests; by TCP_REPAIR, which needs CAP_NET_ADMIN.
pub fn rewind(socket: TcpStream, bytes: u32) -> io::Result<TcpStream> {
    const RECEIVE_QUEUE: u32 = 1;
    const SEND_QUEUE: u32 = 2;
    let (local, peer) = (socket.local_addr()?, socket.peer_addr()?);
    set(&socket, libc::TCP_REPAIR, &1_u32)?;
    let sequence = |queue: u32| -> io::Result<u32> {
        set(&socket, libc::TCP_REPAIR_QUEUE, &queue)?;
        get(&socket, libc::TCP_QUEUE_SEQ)
    };
    let (sent, received) = (sequence(SEND_QUEUE)?, sequence(RECEIVE_QUEUE)?);
    let window: RepairWindow = get(&socket, libc::TCP_REPAIR_WINDOW)?;
    drop(socket);

    let again = socket2::Socket::new(socket2::Domain::for_address(peer), socket2::Type::STREAM, None)?;
    // With it comes the permission to bind where somebody listens; SO_REUSEADDR would take that
    // away.
    set(&again, libc::TCP_REPAIR, &1_u32)?;
    again.bind(&local.into())?;
    for (queue, at) in [(SEND_QUEUE, sent.wrapping_sub(bytes)), (RECEIVE_QUEUE, received)] {
        set(&again, libc::TCP_REPAIR_QUEUE, &queue)?;
        set(&again, libc::TCP_QUEUE_SEQ, &at)?;
    }
    again.connect(&peer.into())?;
    let window = RepairWindow { snd_wnd: window.snd_wnd.max(bytes * 2), ..window };
    set(&again, libc::TCP_REPAIR_WINDOW, &window)?;
    set(&again, libc::TCP_REPAIR, &0_u32)?;
    Ok(again.into())
}

/// `setsockopt` of a TCP option whose value is this.
fn set<T>(socket: impl AsFd, option: libc::c_int, value: &T) -> io::Result<()> {
    let len = mem::size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel reads `len` bytes of `value`.
    let rc = unsafe {
        libc::setsockopt(socket.as_fd().as_raw_fd(), libc::IPPROTO_TCP, option, ptr::from_ref(value).cast(), len)
    };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `getsockopt` of a TCP option whose value is made of integers.
fn get<T: Integers>(socket: impl AsFd, option: libc::c_int) -> io::Result<T> {
    let mut value = MaybeUninit::<T>::zeroed();
    let mut len = mem::size_of::<T>() as libc::socklen_t;
    // SAFETY: `value` is valid for `len` bytes of writes, and the kernel writes at most `len` of
    // them.
    let rc = unsafe {
        libc::getsockopt(socket.as_fd().as_raw_fd(), libc::IPPROTO_TCP, option, value.as_mut_ptr().cast(), &raw mut len)
    };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was zeroed, zero is a value of every integer, and whatever the kernel wrote is
    // integers.
    Ok(unsafe { value.assume_init() })
}

/// A type of which any bytes are a value.
///
/// # Safety
/// It consists of integers only.
unsafe trait Integers {}

// SAFETY: it is one.
unsafe impl Integers for u32 {}
// SAFETY: see the type.
unsafe impl Integers for RepairWindow {}
// SAFETY: see the type.
unsafe impl Integers for TcpInfo {}

/// Waits until every thread of the machine has passed through a point outside of the kernel's
/// read-side critical sections (membarrier(2), `MEMBARRIER_CMD_GLOBAL`): code that looked at
/// something before it was changed has ended. Takes some 10 ms.
///
/// # Errors
/// `EINVAL` on kernels with `nohz_full`.
pub fn grace_period() -> io::Result<()> {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: the call has no memory operands.
    let rc = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Values of an eBPF array map that was made with `BPF_F_MMAPABLE`, in memory shared with the
/// kernel.
#[derive(Debug)]
pub struct SharedArray<T> {
    start: NonNull<T>,
    len: usize,
}

/// A type of which any bytes are a value, and which may be changed by the kernel while it is
/// borrowed.
///
/// # Safety
/// It consists of atomics and padding only, and is a whole number of 8-byte words long, as array
/// maps have them.
pub unsafe trait Shareable {}

// SAFETY: words, see `common`.
unsafe impl Shareable for common::sockmap::Row {}
// SAFETY: words, see `common`.
unsafe impl Shareable for common::sockmap::Budget {}

impl<T: Shareable> SharedArray<T> {
    /// Maps the first `len` values.
    pub fn new(map: impl AsFd, len: usize) -> io::Result<Self> {
        let (bytes, protection) = (len * mem::size_of::<T>(), ProtFlags::READ | ProtFlags::WRITE);
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let start = unsafe { rustix::mm::mmap(ptr::null_mut(), bytes, protection, MapFlags::SHARED, map, 0) }?;
        Ok(Self { start: NonNull::new(start.cast()).expect("mmap(2) never gives page zero"), len })
    }
}

impl<T: Shareable> Deref for SharedArray<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the mapping is `len` values long (the kernel refuses longer ones than the map),
        // lives as long as `self`, and any bytes are a value.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T> Drop for SharedArray<T> {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nothing borrows any more.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len * mem::size_of::<T>()) };
    }
}

// SAFETY: what is in there is made of atomics.
unsafe impl<T: Shareable> Send for SharedArray<T> {}
// SAFETY: as above.
unsafe impl<T: Shareable> Sync for SharedArray<T> {}

/// Has the current runtime say when a descriptor becomes readable.
pub fn watch_readable(fd: Arc<OwnedFd>) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    // SAFETY: the descriptor is owned, so it stays open and the same for as long as the `Arc` that
    // the `AsyncFd` holds.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(Into::into)
}

/// Puts this thread into a network namespace of its own, where only a loopback interface is, and
/// brings that up.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN, and where a sandbox forbids it.
pub fn own_network() -> io::Result<()> {
    // SAFETY: a network namespace concerns sockets that are made later, and interfaces.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }?;
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    // SAFETY: all zeroes is a value of this C structure.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    request.ifr_name[..2].copy_from_slice(&[b'l' as libc::c_char, b'o' as libc::c_char]);
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the kernel reads one `ifreq` (netdevice(7)).
    let rc = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Has a child keep no capability, whoever started us (capabilities(7)), and get none by any
/// program that it runs (`PR_SET_NO_NEW_PRIVS`; without it, root's children would get all of them
/// back); and write no file larger than this, nor its children.
pub fn confine(command: &mut std::process::Command, largest_file: u64) {
    use std::os::unix::process::CommandExt;

    use rustix::thread::{self, CapabilitySet, CapabilitySets};

    let confine = move || {
        let limit = rustix::process::Rlimit { current: Some(largest_file), maximum: Some(largest_file) };
        rustix::process::setrlimit(rustix::process::Resource::Fsize, limit)?;
        // A write beyond it then fails with EFBIG, and says so, instead of ending the program
        // without a word. SAFETY: no handler is installed, so none can run.
        unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
        let none = CapabilitySet::empty();
        thread::set_no_new_privs(true)?;
        // The ambient set follows: it is never more than the other two have in common.
        thread::set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
        Ok(())
    };
    // SAFETY: between fork and exec only bare system calls are made, setrlimit(2), rt_sigaction(2),
    // prctl(2) and capset(2); nothing is allocated and no lock is taken.
    unsafe { command.pre_exec(confine) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn tcp_info_counts_the_bytes_of_a_loopback_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        client.write_all(&[7; 1000]).unwrap();
        server.read_exact(&mut [0; 1000]).unwrap();
        let info = tcp_info(&server).unwrap();
        assert_eq!(info.state, 1);
        assert_eq!(info.bytes_received, 1000);
        assert!(tcp_info(&client).unwrap().snd_wnd > 0);
    }
}
