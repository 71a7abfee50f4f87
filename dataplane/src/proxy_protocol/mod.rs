//! The PROXY protocol, versions 1 and 2: the header that tells the next hop who the client was,
//! written and read.
//!
//! Source: the specification by HAProxy's authors, `doc/proxy-protocol.txt` in its sources; section
//! numbers below refer to it. Everything here is pure: bytes in, decision out. This module must not
//! know sockets, deadlines, or which peers are trusted to send a header; the caller asks [`decode`]
//! only about those, and must not guess from the bytes whether there is a header (section 5).
//!
//! The `ppp` crate is the oracle in the tests, not the parser. Its version 1 calls
//! `PROXY TCP4 192.0.2.7 198.51.100.1 1 ` invalid though more bytes are to come, accepts `+80` as a
//! port, and waits without end on an `UNKNOWN` line of many words. Its version 2 refuses a LOCAL
//! header that names a family without addresses, waits for 16 bytes before it looks at the 13th,
//! knows no upper bound and verifies no checksum.

mod decode;
mod encode;
#[cfg(test)]
mod tests;

pub use decode::{Decoded, Invalid, Source, decode};
pub use encode::{Header, encode_local_v1, encode_local_v2, encode_v1, encode_v2};

/// The longest header that [`decode`] accepts, in bytes; also nginx's limit. The longest addresses,
/// those of unix sockets, make it 232, the TLVs of the common senders add well below 1 KiB (the
/// names in a client certificate are the long ones). A peer can make us hold no more than this.
pub const MAX_HEADER: usize = 4096;

/// The longest header that [`encode_v1`] and [`encode_v2`] write, in bytes: IPv6 addresses,
/// checksum, and each TLV at its longest. A buffer with this much room is never reallocated.
pub const MAX_ENCODED: usize =
    FIXED_V2 + ADDRESSES_TCP6 + (3 + 4) + (3 + MAX_ALPN) + (3 + MAX_AUTHORITY) + (3 + MAX_UNIQUE_ID);

/// Of PP2_TYPE_UNIQUE_ID, in bytes (section 2.2.5).
pub const MAX_UNIQUE_ID: usize = 128;

/// A ProtocolName has one length byte (RFC 7301 section 3.1).
const MAX_ALPN: usize = 255;
/// A domain name in text is no longer than its wire form (RFC 1035 section 3.1).
const MAX_AUTHORITY: usize = 255;

/// A version 1 line with its CRLF, in bytes (section 2.1).
const MAX_LINE: usize = 107;

const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Signature, version and command, family, length.
const FIXED_V2: usize = 16;
const LOCAL: u8 = 0x20;
const PROXY: u8 = 0x21;
const TCP4: u8 = 0x11;
const TCP6: u8 = 0x21;
const ADDRESSES_TCP4: usize = 2 * 4 + 2 * 2;
const ADDRESSES_TCP6: usize = 2 * 16 + 2 * 2;

const TYPE_ALPN: u8 = 0x01;
const TYPE_AUTHORITY: u8 = 0x02;
const TYPE_CRC32C: u8 = 0x03;
const TYPE_UNIQUE_ID: u8 = 0x05;
