//! Where the payload begins on the server's side: behind the PROXY header, if there is one, and the hello. Pure.

const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
/// proxy-protocol.txt 2.1: the longest line of version 1.
const MAX_LINE: usize = 107;

/// What is known of the bytes so far.
#[derive(Debug, PartialEq, Eq)]
pub enum Preamble {
    /// It is not whole yet.
    NeedMore,
    /// So many bytes, then the payload.
    Ends(usize),
    /// No hello, or no PROXY header before it.
    Broken,
}

/// Looks at all bytes from the beginning of the connection.
pub fn find_end(bytes: &[u8]) -> Preamble {
    let header = match proxy_header(bytes) {
        Preamble::Ends(header) => header,
        other => return other,
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
            return Preamble::Ends(at);
        }
    }
}

/// `Ends(0)`: there is none.
fn proxy_header(bytes: &[u8]) -> Preamble {
    match bytes.first() {
        None => Preamble::NeedMore,
        Some(22) => Preamble::Ends(0),
        Some(b'\r') => match bytes.get(..16) {
            None => Preamble::NeedMore,
            Some(fixed) if fixed.starts_with(SIGNATURE) => {
                let end = 16 + usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
                if bytes.len() < end { Preamble::NeedMore } else { Preamble::Ends(end) }
            }
            Some(_) => Preamble::Broken,
        },
        Some(b'P') => match bytes.iter().take(MAX_LINE).position(|b| *b == b'\n') {
            Some(newline) => Preamble::Ends(newline + 1),
            None if bytes.len() < MAX_LINE => Preamble::NeedMore,
            None => Preamble::Broken,
        },
        Some(_) => Preamble::Broken,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::HELLO;
    use ::tests::stream::in_records_of;

    fn ends_exactly_there(preamble: &[u8]) {
        let bytes = [preamble, b"payload"].concat();
        for cut in 0..bytes.len() {
            let expected = if cut < preamble.len() { Preamble::NeedMore } else { Preamble::Ends(preamble.len()) };
            assert_eq!(find_end(&bytes[..cut]), expected, "{cut} bytes of {}", preamble.len());
        }
    }

    #[test]
    fn every_prefix_of_a_plain_hello_needs_more() {
        ends_exactly_there(HELLO);
        ends_exactly_there(&in_records_of(100, HELLO));
    }

    #[test]
    fn a_proxy_header_before_it_is_stripped() {
        let line = b"PROXY TCP4 192.0.2.1 192.0.2.2 1024 443\r\n";
        ends_exactly_there(&[line, HELLO].concat());
        let binary = [SIGNATURE, &[0x21, 0x11, 0, 12], &[7; 12]].concat();
        ends_exactly_there(&[&binary, HELLO].concat());
    }

    #[test]
    fn what_is_neither_is_broken() {
        assert_eq!(find_end(b"GET / HTTP/1.1\r\n"), Preamble::Broken);
        assert_eq!(find_end(&[b'P'; 200]), Preamble::Broken);
        assert_eq!(find_end(b"\r\n\r\n\r\n\r\n\r\n\r\n\r\n\r\n"), Preamble::Broken);
    }
}
