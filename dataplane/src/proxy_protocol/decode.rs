//! Headers from trusted peers.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use super::{
    ADDRESSES_TCP4, ADDRESSES_TCP6, FIXED_V2, LOCAL, MAX_HEADER, MAX_LINE, MAX_UNIQUE_ID, PROXY, SIGNATURE, TCP4, TCP6,
    TYPE_CRC32C, TYPE_UNIQUE_ID,
};

/// What the first bytes of a connection are. More bytes turn `NeedMore` into one of the others, and
/// those into nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decoded<'a> {
    /// The start of a header.
    NeedMore,
    /// A whole header.
    Header {
        /// Of the header, in bytes; what follows is the client's.
        len: usize,
        /// `None`: the connection is the peer's own (LOCAL, its health check) or it could not say
        /// whose it is (`UNKNOWN`, and every family but TCP over IPv4 and IPv6, as section 2.2 asks
        /// of receivers); the addresses of the socket are the true ones.
        source: Option<Source<'a>>,
    },
    /// No header, whatever may follow.
    Invalid(Invalid),
}

/// The connection that the peer forwards. IPv4-mapped IPv6 addresses, which dual-stack listeners
/// send, are given as IPv4: a network in a list of allowed or denied clients then means the same
/// whichever way they are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source<'a> {
    /// Who connected.
    pub client: SocketAddr,
    /// The address that the client connected to.
    pub server: SocketAddr,
    /// PP2_TYPE_UNIQUE_ID, to be handed on so that the logs of all hops name the connection alike.
    pub unique_id: Option<&'a [u8]>,
}

/// Why it is no header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Invalid {
    /// Neither version starts like this: the peer does not send the PROXY protocol.
    Signature,
    /// A version 1 line that breaks the grammar.
    Line,
    /// Over 107 bytes in version 1, over [`MAX_HEADER`] in version 2.
    TooLong,
    /// The signature of version 2 with another version.
    Version,
    /// Neither LOCAL nor PROXY.
    Command,
    /// An address family or transport protocol that is not assigned.
    Family,
    /// Too short for the addresses of its family.
    Addresses,
    /// A TLV that does not end inside the header or is longer than it may be, or a second one where
    /// there may be one.
    Tlv,
    /// The CRC32C is wrong.
    Checksum,
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Signature => "not a PROXY protocol header",
            Self::Line => "malformed version 1 line",
            Self::TooLong => "header too long",
            Self::Version => "unknown version",
            Self::Command => "unknown command",
            Self::Family => "unknown address family or transport protocol",
            Self::Addresses => "too short for its addresses",
            Self::Tlv => "malformed TLV",
            Self::Checksum => "wrong CRC32C",
        })
    }
}

impl std::error::Error for Invalid {}

/// Looks for a header at the start of `bytes`, which may go on beyond it.
///
/// The signature and the fixed part are judged byte by byte; an address or a port when it ends, or
/// at the first byte that cannot be in it; the TLVs when the header is whole.
pub fn decode(bytes: &[u8]) -> Decoded<'_> {
    let decoded = match bytes.first() {
        None => Err(Stop::NeedMore),
        Some(b'P') => decode_v1(bytes),
        Some(b'\r') => decode_v2(bytes),
        Some(_) => Err(Stop::Invalid(Invalid::Signature)),
    };
    match decoded {
        Ok((len, source)) => Decoded::Header { len, source },
        Err(Stop::NeedMore) => Decoded::NeedMore,
        Err(Stop::Invalid(why)) => Decoded::Invalid(why),
    }
}

enum Stop {
    NeedMore,
    Invalid(Invalid),
}

impl From<Invalid> for Stop {
    fn from(why: Invalid) -> Self {
        Self::Invalid(why)
    }
}

fn decode_v1(bytes: &[u8]) -> Result<(usize, Option<Source<'_>>), Stop> {
    let bytes = &bytes[..bytes.len().min(MAX_LINE)];
    let mut line = Unread(bytes);
    match decode_line(&mut line) {
        Ok(source) => Ok((bytes.len() - line.0.len(), source)),
        Err(Stop::NeedMore) if bytes.strip_suffix(b"\r").unwrap_or(bytes).len() > MAX_LINE - 2 => {
            Err(Invalid::TooLong.into())
        }
        Err(stop) => Err(stop),
    }
}

fn decode_line(line: &mut Unread) -> Result<Option<Source<'static>>, Stop> {
    line.literal(b"PROXY ", Invalid::Signature)?;
    if line.0.starts_with(b"U") {
        line.literal(b"UNKNOWN", Invalid::Line)?;
        let end = line.0.windows(2).position(|pair| pair == b"\r\n").ok_or(Stop::NeedMore)?;
        line.0 = &line.0[end + 2..];
        return Ok(None);
    }
    line.literal(b"TCP", Invalid::Line)?;
    let ip = match line.byte()? {
        b'4' => Unread::ipv4,
        b'6' => Unread::ipv6,
        _ => return Err(Invalid::Line.into()),
    };
    line.literal(b" ", Invalid::Line)?;
    let (client, server) = (ip(line)?, ip(line)?);
    let client = SocketAddr::new(client, line.port(b" ")?);
    let server = SocketAddr::new(server, line.port(b"\r\n")?);
    Ok(Some(Source { client, server, unique_id: None }))
}

fn decode_v2(bytes: &[u8]) -> Result<(usize, Option<Source<'_>>), Stop> {
    let mut unread = Unread(bytes);
    unread.literal(SIGNATURE, Invalid::Signature)?;
    let command = match unread.byte()? {
        command @ (LOCAL | PROXY) => command,
        other if other >> 4 == PROXY >> 4 => return Err(Invalid::Command.into()),
        _ => return Err(Invalid::Version.into()),
    };
    let family = unread.byte()?;
    // Of LOCAL even the family is to be ignored.
    if command == PROXY && (family >> 4 > 3 || family & 0xf > 2) {
        return Err(Invalid::Family.into());
    }
    let length = usize::from(u16::from_be_bytes([unread.byte()?, unread.byte()?]));
    let len = FIXED_V2 + length;
    if len > MAX_HEADER {
        return Err(Invalid::TooLong.into());
    }
    // Where the addresses are not understood, neither is where the TLVs begin: the rest is skipped
    // unread.
    let addresses = match (command, family) {
        (PROXY, TCP4) => ADDRESSES_TCP4,
        (PROXY, TCP6) => ADDRESSES_TCP6,
        _ => return if unread.0.len() < length { Err(Stop::NeedMore) } else { Ok((len, None)) },
    };
    if length < addresses {
        return Err(Invalid::Addresses.into());
    }
    let header = bytes.get(..len).ok_or(Stop::NeedMore)?;

    let ip = if family == TCP4 { Unread::ipv4_octets } else { Unread::ipv6_octets };
    let (client, server) = (ip(&mut unread)?, ip(&mut unread)?);
    let client = SocketAddr::new(client, u16::from_be_bytes(unread.array()?));
    let server = SocketAddr::new(server, u16::from_be_bytes(unread.array()?));
    let unique_id = check_tlvs(header, FIXED_V2 + addresses)?;
    Ok((len, Some(Source { client, server, unique_id })))
}

/// Verifies the TLVs, which begin at `first`; gives back the unique ID.
fn check_tlvs(header: &[u8], first: usize) -> Result<Option<&[u8]>, Invalid> {
    let mut unique_id = None;
    let mut checksum = None;
    let mut at = first;
    while at < header.len() {
        let (&[kind, high, low], _) = header[at..].split_first_chunk().ok_or(Invalid::Tlv)?;
        let start = at + 3;
        at = start + usize::from(u16::from_be_bytes([high, low]));
        let value = header.get(start..at).ok_or(Invalid::Tlv)?;
        let repeated = match kind {
            TYPE_UNIQUE_ID if value.len() > MAX_UNIQUE_ID => return Err(Invalid::Tlv),
            TYPE_UNIQUE_ID => unique_id.replace(value).is_some(),
            TYPE_CRC32C => {
                let value: [u8; 4] = value.try_into().map_err(|_| Invalid::Tlv)?;
                checksum.replace((start, u32::from_be_bytes(value))).is_some()
            }
            _ => false,
        };
        if repeated {
            return Err(Invalid::Tlv);
        }
    }
    if let Some((start, sent)) = checksum {
        let crc = crc32c::crc32c(&header[..start]);
        let crc = crc32c::crc32c_append(crc, &[0; 4]);
        if crc32c::crc32c_append(crc, &header[start + 4..]) != sent {
            return Err(Invalid::Checksum);
        }
    }
    Ok(unique_id)
}

/// The bytes not yet understood.
struct Unread<'a>(&'a [u8]);

impl<'a> Unread<'a> {
    fn literal(&mut self, expected: &[u8], otherwise: Invalid) -> Result<(), Stop> {
        let there = self.0.len().min(expected.len());
        if self.0[..there] != expected[..there] {
            return Err(otherwise.into());
        }
        if there < expected.len() {
            return Err(Stop::NeedMore);
        }
        self.0 = &self.0[there..];
        Ok(())
    }

    fn byte(&mut self) -> Result<u8, Stop> {
        self.array().map(|[byte]| byte)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Stop> {
        let (array, rest) = self.0.split_first_chunk().ok_or(Stop::NeedMore)?;
        self.0 = rest;
        Ok(*array)
    }

    fn ipv4_octets(&mut self) -> Result<IpAddr, Stop> {
        Ok(Ipv4Addr::from(self.array::<4>()?).into())
    }

    fn ipv6_octets(&mut self) -> Result<IpAddr, Stop> {
        Ok(Ipv6Addr::from(self.array::<16>()?).to_canonical())
    }

    fn ipv4(&mut self) -> Result<IpAddr, Stop> {
        let ip: Ipv4Addr = self.field("255.255.255.255".len(), |b| b.is_ascii_digit() || b == b'.', b" ")?;
        Ok(ip.into())
    }

    /// The specification knows hexadecimal groups only, but nginx and HAProxy write mapped
    /// addresses with a dotted tail.
    fn ipv6(&mut self) -> Result<IpAddr, Stop> {
        let longest = "ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255".len();
        let ip: Ipv6Addr = self.field(longest, |b| b.is_ascii_hexdigit() || b == b':' || b == b'.', b" ")?;
        Ok(ip.to_canonical())
    }

    fn port(&mut self, end: &[u8]) -> Result<u16, Stop> {
        let leading_zero = matches!(self.0, [b'0', b'0'..=b'9', ..]);
        if leading_zero {
            return Err(Invalid::Line.into());
        }
        self.field("65535".len(), |b| b.is_ascii_digit(), end)
    }

    /// The longest run of `allowed` bytes, and `end` behind it.
    fn field<T: FromStr>(&mut self, longest: usize, allowed: impl Fn(u8) -> bool, end: &[u8]) -> Result<T, Stop> {
        let len = self.0.iter().position(|&b| !allowed(b)).unwrap_or(self.0.len());
        if len > longest {
            return Err(Invalid::Line.into());
        }
        let (field, rest): (&'a [u8], &'a [u8]) = self.0.split_at(len);
        if rest.is_empty() {
            return Err(Stop::NeedMore);
        }
        self.0 = rest;
        let value = std::str::from_utf8(field).ok().and_then(|text| text.parse().ok()).ok_or(Invalid::Line)?;
        self.literal(end, Invalid::Line)?;
        Ok(value)
    }
}
