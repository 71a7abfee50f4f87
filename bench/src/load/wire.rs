//! What client and server say to each other behind the hello.
//!
//! The client sends a [`Request`] of [`MESSAGE`] bytes that says how long a reply it wants, and how
//! many bytes of its own follow. Every workload is made of that. All other bytes are those of a
//! [`Pattern`], so that the receiver can check each of them by its position in the stream.

use ::tests::stream::Pattern;

/// Length of a request, and of the reply in an exchange of small messages.
pub const MESSAGE: usize = 200;

/// A reply or an upload that never ends.
pub const ENDLESS: u64 = u64::MAX;

/// The longest piece that is read or written at once.
pub const PIECE: usize = 256 << 10;

const MAGIC: &[u8; 4] = b"load";
const HEADER: usize = MAGIC.len() + 8 + 8 + 8 + 1;

/// What the client wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Bytes of reply.
    pub reply: u64,
    /// Bytes that the client sends behind the request.
    pub upload: u64,
    /// Which patterns the two are of; the same for all requests of a connection.
    pub seed: u64,
    /// Whether the server is to check the upload.
    pub verify: bool,
}

impl Request {
    /// The bytes on the wire.
    pub fn encode(&self) -> [u8; MESSAGE] {
        let mut bytes = [0; MESSAGE];
        bytes[..4].copy_from_slice(MAGIC);
        bytes[4..12].copy_from_slice(&self.reply.to_be_bytes());
        bytes[12..20].copy_from_slice(&self.upload.to_be_bytes());
        bytes[20..28].copy_from_slice(&self.seed.to_be_bytes());
        bytes[28] = self.verify.into();
        bytes[HEADER..].copy_from_slice(uploaded(self.seed).at(0, (MESSAGE - HEADER) as u64));
        bytes
    }

    /// `None`: these are not the bytes of a request.
    pub fn decode(bytes: &[u8; MESSAGE]) -> Option<Self> {
        let number = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let request = Self { reply: number(4), upload: number(12), seed: number(20), verify: bytes[28] != 0 };
        (*bytes == request.encode()).then_some(request)
    }
}

/// The stream of all replies on a connection.
pub fn replied(seed: u64) -> Pattern {
    Pattern::new(seed)
}

/// The stream of all uploads on a connection.
pub fn uploaded(seed: u64) -> Pattern {
    Pattern::new(!seed)
}

/// Whether these bytes are the ones that belong at `position`; else the position of the first wrong
/// one.
pub fn check(pattern: Pattern, position: u64, bytes: &[u8]) -> Result<(), u64> {
    let mut at = position;
    for piece in bytes.chunks(PIECE) {
        let expected = pattern.at(at, piece.len() as u64);
        if piece != expected {
            let first = piece.iter().zip(expected).position(|(a, b)| a != b).unwrap_or_default();
            return Err(at + first as u64);
        }
        at += piece.len() as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUEST: Request = Request { reply: ENDLESS, upload: 7, seed: 42, verify: true };

    #[test]
    fn a_request_survives_the_wire() {
        assert_eq!(Request::decode(&REQUEST.encode()), Some(REQUEST));
    }

    #[test]
    fn any_wrong_byte_in_a_request_shows() {
        for at in 0..MESSAGE {
            let mut bytes = REQUEST.encode();
            bytes[at] ^= 0x80;
            // A changed header may still be a request, but never the same.
            assert_ne!(Request::decode(&bytes), Some(REQUEST), "byte {at}");
        }
    }

    #[test]
    fn a_lost_byte_is_found_at_its_position() {
        let stream = replied(1);
        let mut bytes = [stream.at(1000, 500), stream.at(1501, 500)].concat();
        assert_eq!(check(stream, 1000, &bytes[..500]), Ok(()));
        let wrong = check(stream, 1000, &bytes).expect_err("a byte is missing");
        assert!((1500..1510).contains(&wrong), "{wrong}");
        bytes.truncate(500);
        assert_eq!(check(stream, 1000, &bytes), Ok(()));
    }
}
