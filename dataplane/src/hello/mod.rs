//! Reading a ClientHello: bytes, a timeout or the end of the stream go in; "need more", the hello,
//! or the reason of a rejection comes out.
//!
//! A pure state machine. It must not know of sockets, clocks or routes: whoever feeds it measures
//! the deadline and decides where the name leads.
//!
//! A hello comes in any number of TCP segments and TLS records. Headers are judged byte by byte as
//! they come, so that a connection is refused with the first byte that condemns it, and the answer
//! cannot depend on how the bytes were cut; the message inside is read once, when it is whole.
//! Every byte is looked at once, whatever the cut, and nothing is allocated but the stored bytes
//! and, for a hello of several records, the message that they add up to.
//!
//! tls-parser gives the names of the code points. Its parser is not used here, but holds ours to
//! account in the tests and the fuzz target: it allocates lists of everything in a hello, and lets
//! pass what must not be routed (a second server name, what follows a list's last entry).

mod client_hello;
mod server_name;
#[cfg(test)]
mod tests;

use std::ops::Range;

use bytes::BufMut;
use tls_parser::{TlsHandshakeType, TlsRecordType};

pub use client_hello::{Alpn, Versions};
pub use server_name::ServerName;

use crate::reject::Reason;
use client_hello::Outline;

/// RFC 8446 section 5.1: type, version, length.
const RECORD_HEADER: usize = 5;
/// RFC 8446 section 5.1: the largest plaintext record.
const MAX_RECORD: usize = 1 << 14;
/// RFC 8446 section 4: type, length.
const MESSAGE_HEADER: usize = 4;
/// The first reading's room: hellos with a post-quantum key share are 1.5 to 2 KiB; more is found
/// on demand.
const FIRST_READ: usize = 4096;

/// What happened on the client's connection.
#[derive(Debug, Clone, Copy)]
pub enum Input<'a> {
    /// The stream went on with these. An empty slice says that bytes were put into
    /// [`Machine::buffer_mut`].
    Bytes(&'a [u8]),
    /// The deadline passed.
    Timeout,
    /// The client closed or reset.
    Closed,
}

/// What is known so far.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "made once or twice in a connection and used on the spot")]
pub enum Progress<'a> {
    /// Nothing yet: feed the next input.
    NeedMore,
    /// The hello is whole and well-formed.
    Hello(Hello<'a>),
    /// This connection must not be forwarded.
    Reject(Reason),
}

/// A whole, well-formed ClientHello.
#[derive(Debug, Clone)]
pub struct Hello<'a> {
    /// `None`: no SNI extension (RFC 6066 section 3).
    pub server_name: Option<ServerName>,
    /// Offered application protocols (RFC 7301).
    pub alpn: Alpn<'a>,
    /// Offered protocol versions.
    pub versions: Versions<'a>,
    /// An encrypted hello is inside (RFC 9849), or one is pretended (GREASE): the two are made to
    /// look alike. `server_name` is then the name of the service that can decrypt it.
    pub ech: bool,
    /// What the client's random number generator gave (RFC 8446 section 4.1.2).
    pub random: [u8; 32],
    /// Bytes on the wire, record headers included. What [`Machine::bytes`] has beyond them came
    /// after the hello.
    pub len: usize,
}

/// Reads one hello; see the module's description.
///
/// A verdict is final: after [`Progress::Hello`] and [`Progress::Reject`] every further input gives
/// the same again. Bytes that follow a hello are still stored, for they have to be forwarded; those
/// that follow a rejection are not.
#[derive(Debug)]
pub struct Machine {
    max_bytes: usize,
    /// All that came, as it came.
    raw: Vec<u8>,
    /// How much of `raw` was looked at.
    at: usize,
    /// Where in `raw` the present record starts, and where it ends; the end is known when its
    /// header is whole.
    record: usize,
    record_end: usize,
    /// Bytes of the handshake message, its header included, in what was looked at.
    seen: usize,
    /// Length of the message's body as far as its header is known: never more than the truth.
    body_len: usize,
    /// The message of a hello of several records; else empty.
    joined: Vec<u8>,
    /// With [`Reason::BadServerName`]: where the name is in the message's body.
    bad_name: Option<Range<usize>>,
    state: State,
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "the name is inline so that it needs no allocation")]
enum State {
    Reading,
    Hello(Outline),
    Rejected(Reason),
}

impl Machine {
    /// A machine that rejects hellos of more than `max_bytes` bytes on the wire, record headers
    /// included.
    pub fn new(max_bytes: usize) -> Self {
        Self {
            max_bytes,
            raw: Vec::new(),
            at: 0,
            record: 0,
            record_end: 0,
            seen: 0,
            body_len: 0,
            joined: Vec::new(),
            bad_name: None,
            state: State::Reading,
        }
    }

    /// Takes what happened, says what is known.
    pub fn input(&mut self, input: Input<'_>) -> Progress<'_> {
        match (input, &self.state) {
            (Input::Bytes(bytes), State::Reading) => {
                self.raw.extend_from_slice(bytes);
                if let Err(reason) = self.advance() {
                    self.state = State::Rejected(reason);
                }
            }
            (Input::Bytes(bytes), State::Hello(_)) => self.raw.extend_from_slice(bytes),
            (Input::Timeout, State::Reading) => self.state = State::Rejected(Reason::Timeout),
            (Input::Closed, State::Reading) => self.state = State::Rejected(Reason::ClosedEarly),
            (Input::Bytes(_), State::Rejected(_)) | (Input::Timeout | Input::Closed, _) => {}
        }
        self.progress()
    }

    /// What the last input gave.
    pub fn progress(&self) -> Progress<'_> {
        match &self.state {
            State::Reading => Progress::NeedMore,
            State::Rejected(reason) => Progress::Reject(*reason),
            State::Hello(outline) => {
                let body = &self.message()[MESSAGE_HEADER..];
                Progress::Hello(Hello {
                    server_name: outline.server_name,
                    alpn: Alpn { list: &body[outline.alpn.clone()] },
                    versions: Versions { list: &body[outline.versions.clone()] },
                    ech: outline.ech,
                    random: body[outline.random.clone()].try_into().expect("32 bytes were taken"),
                    len: self.record_end,
                })
            }
        }
    }

    /// Room to read the stream into without a copy in between, to be followed by
    /// `input(Input::Bytes(&[]))`. It ends where `max_bytes` does: there is always some while the
    /// machine needs more (if `max_bytes` has room for the two headers, 9 bytes), and what it holds
    /// stays bounded.
    pub fn buffer_mut(&mut self) -> impl BufMut {
        let room = self.max_bytes.saturating_sub(self.raw.len());
        if self.raw.capacity() == self.raw.len() {
            self.raw.reserve_exact(room.min(self.raw.len().max(FIRST_READ)));
        }
        (&mut self.raw).limit(room)
    }

    /// What stands in the place of a server name, with [`Reason::BadServerName`].
    pub fn bad_name(&self) -> Option<&[u8]> {
        let name = self.bad_name.clone()?;
        Some(&self.message()[MESSAGE_HEADER..][name])
    }

    /// All bytes that came: the hello and what followed it.
    pub fn bytes(&self) -> &[u8] {
        &self.raw
    }

    /// Looks at the bytes that are new.
    fn advance(&mut self) -> Result<(), Reason> {
        while self.at < self.raw.len() {
            if self.at - self.record < RECORD_HEADER {
                self.record_header_byte()?;
            } else if self.seen < MESSAGE_HEADER {
                self.message_header_byte()?;
            } else {
                let body = self.raw.len().min(self.record_end) - self.at;
                self.seen += body;
                self.at += body;
            }
            if self.at == self.record_end {
                let whole = self.seen >= MESSAGE_HEADER && self.seen == MESSAGE_HEADER + self.body_len;
                self.end_record(whole);
                if whole {
                    let outline = client_hello::parse(&self.message()[MESSAGE_HEADER..]).ok_or(Reason::Malformed)?;
                    self.bad_name.clone_from(&outline.bad_name);
                    if outline.bad_name.is_some() {
                        return Err(Reason::BadServerName);
                    }
                    self.state = State::Hello(outline);
                    break;
                }
            }
        }
        Ok(())
    }

    /// Judges one byte of a record's header. What cannot begin a TLS connection is not TLS; once it
    /// has begun, it is TLS, but broken.
    fn record_header_byte(&mut self) -> Result<(), Reason> {
        let byte = self.raw[self.at];
        let foreign = if self.record == 0 { Reason::NotTls } else { Reason::Malformed };
        match self.at - self.record {
            0 if byte != TlsRecordType::Handshake.0 => return Err(foreign),
            1 if byte != 3 => return Err(foreign),
            // The lower byte of the version says nothing (RFC 8446 section 5.1: "MUST be ignored
            // for all purposes").
            3 if usize::from(byte) > MAX_RECORD >> 8 => return Err(Reason::Malformed),
            4 => {
                let len = usize::from(u16::from_be_bytes([self.raw[self.at - 1], byte]));
                if len == 0 || len > MAX_RECORD {
                    return Err(Reason::Malformed);
                }
                self.at += 1;
                self.record_end = self.at + len;
                return self.check_lengths();
            }
            _ => {}
        }
        self.at += 1;
        Ok(())
    }

    /// Judges one byte of the message's header.
    fn message_header_byte(&mut self) -> Result<(), Reason> {
        let byte = self.raw[self.at];
        if self.seen == 0 {
            if byte != TlsHandshakeType::ClientHello.0 {
                return Err(Reason::Malformed);
            }
        } else {
            self.body_len |= usize::from(byte) << (8 * (MESSAGE_HEADER - 1 - self.seen));
        }
        self.at += 1;
        self.seen += 1;
        self.check_lengths()
    }

    /// Rejects what is known to become longer than allowed, and a record that goes on behind the
    /// message: a client has nothing more to say before it is answered, and RFC 8446 section 5.1
    /// lets no record span a change of keys.
    fn check_lengths(&self) -> Result<(), Reason> {
        let in_records = self.seen + (self.record_end - self.at);
        let message = MESSAGE_HEADER + self.body_len;
        let to_come = message.saturating_sub(in_records);
        let least = self.record_end + to_come + to_come.div_ceil(MAX_RECORD) * RECORD_HEADER;
        if least > self.max_bytes {
            return Err(Reason::TooLarge);
        }
        if self.seen >= MESSAGE_HEADER && in_records > message {
            return Err(Reason::Malformed);
        }
        Ok(())
    }

    /// Keeps the present record's part of the message, unless it is the whole, which stays where it
    /// is.
    fn end_record(&mut self, whole: bool) {
        if whole && self.joined.is_empty() {
            return;
        }
        self.joined.extend_from_slice(&self.raw[self.record + RECORD_HEADER..self.record_end]);
        if !whole {
            self.record = self.record_end;
        }
    }

    /// The whole message.
    fn message(&self) -> &[u8] {
        if self.joined.is_empty() { &self.raw[RECORD_HEADER..self.record_end] } else { &self.joined }
    }
}

/// All bytes that came: the hello and what followed it.
impl From<Machine> for Vec<u8> {
    fn from(machine: Machine) -> Self {
        machine.raw
    }
}
