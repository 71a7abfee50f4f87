//! Headers for upstreams.

use std::io::Write;
use std::net::{IpAddr, SocketAddr};

use super::{
    FIXED_V2, LOCAL, MAX_ALPN, MAX_AUTHORITY, MAX_UNIQUE_ID, PROXY, SIGNATURE, TCP4, TCP6, TYPE_ALPN, TYPE_AUTHORITY,
    TYPE_CRC32C, TYPE_UNIQUE_ID,
};

/// What a version 2 header tells the upstream.
///
/// A TLV whose value is longer than its protocol allows is left out: no ClientHello that parses
/// carries such a value.
#[derive(Debug, Clone, Copy)]
pub struct Header<'a> {
    /// The client, as the entrance node saw it.
    pub client: SocketAddr,
    /// The address that the client connected to.
    pub server: SocketAddr,
    /// The server name of the ClientHello, at most 255 bytes.
    pub authority: Option<&'a str>,
    /// One protocol name, as other senders have it (`h2`), at most 255 bytes; not the list of the
    /// extension: receivers compare it with names.
    pub alpn: Option<&'a [u8]>,
    /// Identifies the connection in the logs of every hop, at most [`MAX_UNIQUE_ID`] bytes; empty:
    /// none.
    pub unique_id: &'a [u8],
}

/// Appends the text header. Allocates nothing when `out` has room for
/// [`MAX_ENCODED`](super::MAX_ENCODED).
pub fn encode_v1(out: &mut Vec<u8>, client: SocketAddr, server: SocketAddr) {
    let (from, to) = of_one_family(client.ip(), server.ip());
    let family = if from.is_ipv4() { "TCP4" } else { "TCP6" };
    write!(out, "PROXY {family} {from} {to} {} {}\r\n", client.port(), server.port()).expect("a Vec takes every write");
}

/// Appends the binary header, with CRC32C. Allocates nothing when `out` has room for
/// [`MAX_ENCODED`](super::MAX_ENCODED).
pub fn encode_v2(out: &mut Vec<u8>, header: &Header) {
    let start = out.len();
    out.extend_from_slice(SIGNATURE);
    match of_one_family(header.client.ip(), header.server.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            out.extend_from_slice(&[PROXY, TCP4, 0, 0]);
            out.extend_from_slice(&from.octets());
            out.extend_from_slice(&to.octets());
        }
        (from, to) => {
            out.extend_from_slice(&[PROXY, TCP6, 0, 0]);
            out.extend_from_slice(&in_ipv6(from));
            out.extend_from_slice(&in_ipv6(to));
        }
    }
    out.extend_from_slice(&header.client.port().to_be_bytes());
    out.extend_from_slice(&header.server.port().to_be_bytes());

    tlv(out, TYPE_CRC32C, &[0; 4], 4);
    let checksum = out.len() - 4..out.len();
    if let Some(alpn) = header.alpn {
        tlv(out, TYPE_ALPN, alpn, MAX_ALPN);
    }
    if let Some(authority) = header.authority {
        tlv(out, TYPE_AUTHORITY, authority.as_bytes(), MAX_AUTHORITY);
    }
    if !header.unique_id.is_empty() {
        tlv(out, TYPE_UNIQUE_ID, header.unique_id, MAX_UNIQUE_ID);
    }

    let length = (out.len() - start - FIXED_V2) as u16;
    out[start + FIXED_V2 - 2..start + FIXED_V2].copy_from_slice(&length.to_be_bytes());
    let crc = crc32c::crc32c(&out[start..]);
    out[checksum].copy_from_slice(&crc.to_be_bytes());
}

/// Appends the text header of a connection that is nobody's but ours, such as a check (section 2.1,
/// UNKNOWN).
pub fn encode_local_v1(out: &mut Vec<u8>) {
    out.extend_from_slice(b"PROXY UNKNOWN\r\n");
}

/// Appends the binary header of a connection that is nobody's but ours (section 2.2, LOCAL; family
/// unspecified, no addresses).
pub fn encode_local_v2(out: &mut Vec<u8>) {
    out.extend_from_slice(SIGNATURE);
    out.extend_from_slice(&[LOCAL, 0, 0, 0]);
}

fn tlv(out: &mut Vec<u8>, kind: u8, value: &[u8], max: usize) {
    if value.len() <= max {
        out.push(kind);
        out.extend_from_slice(&(value.len() as u16).to_be_bytes());
        out.extend_from_slice(value);
    }
}

/// A header has one family. Both ends of a TCP connection have the same, so a mixed pair can only
/// come out of a header that we were sent; its IPv4 side is written as IPv4-mapped IPv6, as HAProxy
/// does. Two mapped addresses are IPv4: that is what they mean.
fn of_one_family(client: IpAddr, server: IpAddr) -> (IpAddr, IpAddr) {
    match (client.to_canonical(), server.to_canonical()) {
        (IpAddr::V4(from), to @ IpAddr::V6(_)) => (from.to_ipv6_mapped().into(), to),
        (from @ IpAddr::V6(_), IpAddr::V4(to)) => (from, to.to_ipv6_mapped().into()),
        same => same,
    }
}

fn in_ipv6(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}
