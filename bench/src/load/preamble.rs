//! Where the payload begins on the server's side: behind the PROXY header, if there is one, and the
//! hello. Pure.

const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
/// proxy-protocol.txt 2.1: the longest line of version 1.
const MAX_LINE: usize = 107;

/// What is known of the bytes so far.
#[derive(Debug, PartialEq, Eq)]
pub enum Preamble {
    /// It is not whole yet.
    NeedMore,
    /// So many bytes of PROXY header, if any, so many of hello, then the payload.
    Ends {
        /// 0: there is none.
        header: usize,
        /// Record headers included.
        hello: usize,
    },
    /// No hello, or no PROXY header before it.
    Broken,
}

/// Looks at all bytes from the beginning of the connection.
pub fn find_end(bytes: &[u8]) -> Preamble {
    let header = match proxy_header(bytes) {
        Ok(Some(header)) => header,
        Ok(None) => return Preamble::NeedMore,
        Err(Broken) => return Preamble::Broken,
    };
    let mut at = header;
    let mut message = Vec::new();
    loop {
        let Some(&[kind, _, _, high, low]) = bytes.get(at..at + 5) else { return Preamble::NeedMore };
        if kind != 22 {
            return Preamble::Broken;
        }
        let end = at + 5 + usize::from(u16::from_be_bytes([high, low]));
        let Some(fragment) = bytes.get(at + 5..end) else { return Preamble::NeedMore };
        message.extend_from_slice(fragment);
        at = end;
        if let [_, a, b, c, body @ ..] = &message[..]
            && body.len() >= u32::from_be_bytes([0, *a, *b, *c]) as usize
        {
            return Preamble::Ends { header, hello: at - header };
        }
    }
}

/// What no PROXY header begins like.
struct Broken;

/// Its length, 0 if a hello comes at once; `None`: it is not whole yet.
fn proxy_header(bytes: &[u8]) -> Result<Option<usize>, Broken> {
    match bytes.first() {
        None => Ok(None),
        Some(22) => Ok(Some(0)),
        Some(b'\r') => match bytes.get(..16) {
            None => Ok(None),
            Some(fixed) if fixed.starts_with(SIGNATURE) => {
                let end = 16 + usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
                Ok((bytes.len() >= end).then_some(end))
            }
            Some(_) => Err(Broken),
        },
        Some(b'P') => match bytes.iter().take(MAX_LINE).position(|b| *b == b'\n') {
            Some(newline) => Ok(Some(newline + 1)),
            None if bytes.len() < MAX_LINE => Ok(None),
            None => Err(Broken),
        },
        Some(_) => Err(Broken),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::HELLO;
    use ::tests::stream::in_records_of;

    fn ends_exactly_there(header: &[u8], hello: &[u8]) {
        let bytes = [header, hello, b"payload"].concat();
        let whole = Preamble::Ends { header: header.len(), hello: hello.len() };
        for cut in 0..bytes.len() {
            let found = find_end(&bytes[..cut]);
            if cut < header.len() + hello.len() {
                assert_eq!(found, Preamble::NeedMore, "{cut} bytes");
            } else {
                assert_eq!(found, whole, "{cut} bytes");
            }
        }
    }

    #[test]
    fn every_prefix_of_a_plain_hello_needs_more() {
        ends_exactly_there(b"", HELLO);
        ends_exactly_there(b"", &in_records_of(100, HELLO));
    }

    #[test]
    fn a_proxy_header_before_it_is_stripped() {
        let line = b"PROXY TCP4 192.0.2.1 192.0.2.2 1024 443\r\n";
        ends_exactly_there(line, HELLO);
        let binary = [SIGNATURE, &[0x21, 0x11, 0, 12], &[7; 12]].concat();
        ends_exactly_there(&binary, HELLO);
    }

    #[test]
    fn what_is_neither_is_broken() {
        assert_eq!(find_end(b"GET / HTTP/1.1\r\n"), Preamble::Broken);
        assert_eq!(find_end(&[b'P'; 200]), Preamble::Broken);
        assert_eq!(find_end(b"\r\n\r\n\r\n\r\n\r\n\r\n\r\n\r\n"), Preamble::Broken);
    }
}
