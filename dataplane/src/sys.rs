//! The kernel boundary: calls for which no safe wrapper exists in the libraries used here.
//!
//! Everything `unsafe` of this crate's socket handling is in this file. It knows nothing of connections or routes.

use std::io;
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsFd, AsRawFd};

/// The head of `struct tcp_info` (include/uapi/linux/tcp.h), as far as it is used here. The kernel fills as much as it has.
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

/// [`TcpInfo::state`] of a socket without a connection, for example after a RST (include/net/tcp_states.h).
pub const TCP_CLOSE: u8 = 7;

/// `getsockopt(TCP_INFO)`.
pub fn tcp_info(socket: impl AsFd) -> io::Result<TcpInfo> {
    let mut info = MaybeUninit::<TcpInfo>::zeroed();
    let mut len = mem::size_of::<TcpInfo>() as libc::socklen_t;
    // SAFETY: `info` is valid for `len` bytes of writes, and the kernel writes at most `len` of them.
    let rc = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was zeroed, zero is valid for every field, and whatever the kernel wrote is integers.
    Ok(unsafe { info.assume_init() })
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
