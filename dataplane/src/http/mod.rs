//! Reading the head of one HTTP/1 request: bytes, a timeout or the end of the stream go in; "need
//! more", the request, or the reason of a rejection comes out.
//!
//! A pure state machine, as [`crate::hello`] is for TLS. It must not know of sockets, clocks or
//! routes: whoever feeds it measures the deadline and decides what the request gets. A connection
//! has one request; what comes after its head is nobody's.
//!
//! Stricter than RFC 9112 asks for: lines end in CR LF and nowhere else, no line is folded, there
//! is one Host, and it says what the target says. Whatever two programs could read in two ways is
//! refused, and what is passed on is written anew ([`Request::challenge`]): no byte of the client's
//! reaches an upstream but a name, a path of known form and a user agent. The bytes are judged one
//! by one as they come, so that a connection is refused with the first byte that condemns it, and
//! the answer cannot depend on how the bytes were cut; httparse takes the head apart once it is
//! whole.

mod request;
#[cfg(test)]
mod tests;

use bytes::BufMut;

pub use request::Request;

use crate::reject::Reason;

/// Requests of browsers and ACME servers have 200 to 1,000 bytes; more is found on demand.
const FIRST_READ: usize = 2048;
/// The longest method that is registered with IANA is `UPDATEREDIRECTREF`, 17 bytes.
const MAX_METHOD: usize = 20;

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
#[derive(Debug, Clone, PartialEq)]
pub enum Progress<'a> {
    /// Nothing yet: feed the next input.
    NeedMore,
    /// The head is whole and well-formed.
    Request(&'a Request),
    /// Nothing must be forwarded.
    Reject(Reason),
}

/// Reads one head; see the module's description. A verdict is final: after [`Progress::Request`]
/// and [`Progress::Reject`] every further input gives the same again, and nothing more is stored.
#[derive(Debug)]
pub struct Machine {
    max_bytes: usize,
    /// All that came, as it came.
    raw: Vec<u8>,
    /// How much of `raw` was looked at.
    at: usize,
    /// Where in `raw` the present line starts.
    line: usize,
    state: State,
}

#[derive(Debug)]
enum State {
    Reading,
    Request(Box<Request>),
    Rejected(Reason),
}

impl Machine {
    /// A machine that rejects heads of more than `max_bytes` bytes.
    pub fn new(max_bytes: usize) -> Self {
        Self { max_bytes, raw: Vec::new(), at: 0, line: 0, state: State::Reading }
    }

    /// Takes what happened, says what is known.
    pub fn input(&mut self, input: Input<'_>) -> Progress<'_> {
        if matches!(self.state, State::Reading) {
            self.state = match input {
                Input::Bytes(bytes) => {
                    self.raw.extend_from_slice(bytes);
                    self.advance().unwrap_or_else(State::Rejected)
                }
                Input::Timeout => State::Rejected(Reason::Timeout),
                Input::Closed => State::Rejected(Reason::ClosedEarly),
            };
        }
        self.progress()
    }

    /// What the last input gave.
    pub fn progress(&self) -> Progress<'_> {
        match &self.state {
            State::Reading => Progress::NeedMore,
            State::Request(request) => Progress::Request(request),
            State::Rejected(reason) => Progress::Reject(*reason),
        }
    }

    /// Room to read the stream into without a copy in between, to be followed by
    /// `input(Input::Bytes(&[]))`. It ends where `max_bytes` does: there is always some while the
    /// machine needs more, and what it holds stays bounded.
    pub fn buffer_mut(&mut self) -> impl BufMut {
        let room = self.max_bytes.saturating_sub(self.raw.len());
        if self.raw.capacity() == self.raw.len() {
            self.raw.reserve_exact(room.min(self.raw.len().max(FIRST_READ)));
        }
        (&mut self.raw).limit(room)
    }

    /// Looks at the bytes that are new.
    fn advance(&mut self) -> Result<State, Reason> {
        while let Some(byte) = self.raw.get(self.at) {
            if self.at == self.max_bytes {
                return Err(Reason::TooLarge);
            }
            self.judge(*byte)?;
            self.at += 1;
            if *byte == b'\n' {
                let line = &self.raw[self.line..self.at];
                if self.line == 0 {
                    check_version(line)?;
                } else if line == b"\r\n" {
                    return Ok(State::Request(Box::new(Request::parse(&self.raw[..self.at])?)));
                }
                self.line = self.at;
            }
        }
        if self.at == self.max_bytes { Err(Reason::TooLarge) } else { Ok(State::Reading) }
    }

    /// Refuses a byte that cannot stand where it does. What does not begin with a method is not
    /// HTTP.
    fn judge(&self, byte: u8) -> Result<(), Reason> {
        let previous = self.at.checked_sub(1).map(|at| self.raw[at]);
        let in_request_line = self.line == 0;
        if in_request_line && !self.raw[..self.at].contains(&b' ') {
            let ends = byte == b' ' && self.at > 0;
            return if (is_token(byte) && self.at < MAX_METHOD) || ends { Ok(()) } else { Err(Reason::NotHttp) };
        }
        let bad = match byte {
            b'\n' => previous != Some(b'\r'),
            _ if previous == Some(b'\r') => true,
            0 => true,
            // A line that begins so would go on with the last one (RFC 9112 section 5.2).
            b' ' | b'\t' => self.at == self.line,
            _ => false,
        };
        if bad { Err(Reason::Malformed) } else { Ok(()) }
    }
}

/// All bytes that came.
impl From<Machine> for Vec<u8> {
    fn from(machine: Machine) -> Self {
        machine.raw
    }
}

/// RFC 9110 section 5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// HTTP/2 with prior knowledge begins with a request line, too, as do other versions that nobody
/// has.
fn check_version(request_line: &[u8]) -> Result<(), Reason> {
    let known = [&b" HTTP/1.1\r\n"[..], b" HTTP/1.0\r\n"];
    if known.iter().any(|version| request_line.ends_with(version)) { Ok(()) } else { Err(Reason::NotHttp) }
}
