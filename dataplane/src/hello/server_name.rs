//! The server name of a hello: checked once, then compared as it is.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::Deref;

/// A DNS name as text, without the root's dot (RFC 1035 section 3.1: 255 bytes on the wire).
const MAX_NAME: usize = 253;
/// RFC 1035 section 2.3.4.
const MAX_LABEL: usize = 63;

/// A DNS name in lower case without a trailing dot, 1 to 253 bytes of `a-z 0-9 - _ .`; held inline,
/// so that a name costs no allocation.
///
/// An underscore is no host name (RFC 952), but clients and servers use it.
#[derive(Clone, Copy)]
pub struct ServerName {
    len: u8,
    bytes: [u8; MAX_NAME],
}

impl ServerName {
    /// The name in a `host_name` entry (RFC 6066 section 3), folded to lower case and without its
    /// trailing dot.
    ///
    /// `None` if it is no DNS name: empty or too long, as a whole or in a label, with other
    /// characters than the above (NUL, non-ASCII, the colons of an IPv6 address), or with a last
    /// label of digits only, which is an IPv4 address or meant as one (no top-level domain is a
    /// number: RFC 3696 section 2).
    pub fn parse(raw: &[u8]) -> Option<Self> {
        let raw = raw.strip_suffix(b".").unwrap_or(raw);
        let mut bytes = [0; MAX_NAME];
        let name = bytes.get_mut(..raw.len())?;
        let mut label_len = 0;
        let mut label_is_number = true;
        for (folded, byte) in name.iter_mut().zip(raw) {
            if *byte == b'.' {
                if label_len == 0 {
                    return None;
                }
                label_len = 0;
                label_is_number = true;
            } else {
                if !(byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')) || label_len == MAX_LABEL {
                    return None;
                }
                label_len += 1;
                label_is_number &= byte.is_ascii_digit();
            }
            *folded = byte.to_ascii_lowercase();
        }
        // The last label may be empty because the whole name is, or because of a second trailing
        // dot.
        (label_len > 0 && !label_is_number).then_some(Self { len: raw.len() as u8, bytes })
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        str::from_utf8(&self.bytes[..usize::from(self.len)]).expect("`parse` lets through ASCII only")
    }
}

impl Deref for ServerName {
    type Target = str;

    fn deref(&self) -> &str {
        self.as_str()
    }
}

impl AsRef<str> for ServerName {
    fn as_ref(&self) -> &str {
        self.as_str()
    }
}

impl PartialEq for ServerName {
    fn eq(&self, other: &Self) -> bool {
        self.as_str() == other.as_str()
    }
}

impl Eq for ServerName {}

impl Hash for ServerName {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_str().hash(state);
    }
}

impl fmt::Display for ServerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Debug for ServerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(raw: &[u8]) -> Option<String> {
        ServerName::parse(raw).map(|name| name.as_str().to_owned())
    }

    #[test]
    fn case_is_folded_and_one_trailing_dot_dropped() {
        for (raw, name) in [
            ("blog.example.com", "blog.example.com"),
            ("BLOG.Example.COM", "blog.example.com"),
            ("blog.example.com.", "blog.example.com"),
            ("xn--bcher-kva.example", "xn--bcher-kva.example"),
            ("_acme-challenge.example.com", "_acme-challenge.example.com"),
            ("localhost", "localhost"),
            ("1.2.3.4.example", "1.2.3.4.example"),
            ("1and1.com", "1and1.com"),
        ] {
            assert_eq!(parsed(raw.as_bytes()).as_deref(), Some(name), "{raw}");
        }
    }

    #[test]
    fn what_is_no_dns_name_is_refused() {
        for raw in [
            &b""[..],
            b".",
            b"..",
            b"a..",
            b".a",
            b"a..b",
            b"a\0.example.com",
            b"blog.example.com\0",
            b"b\xc3\xbccher.example",
            b"*.example.com",
            b"blog.example.com:443",
            b"blog example.com",
            b"blog/example.com",
            b"blog.example.com\r\n",
            b"1.2.3.4",
            b"1.2.3.4.",
            b"127.1",
            b"2130706433",
            b"::1",
            b"[::1]",
            b"2001:db8::1",
            b"::ffff:1.2.3.4",
        ] {
            assert_eq!(parsed(raw), None, "{}", raw.escape_ascii());
        }
    }

    #[test]
    fn labels_end_at_63_bytes_and_names_at_253() {
        let label = "a".repeat(63);
        let longest = format!("{label}.{label}.{label}.{}", &label[..61]);
        assert_eq!(longest.len(), 253);
        assert_eq!(parsed(longest.as_bytes()).as_ref(), Some(&longest));
        assert_eq!(parsed(format!("{longest}.").as_bytes()).as_ref(), Some(&longest));
        assert_eq!(parsed(format!("{longest}a").as_bytes()), None);
        assert_eq!(parsed(format!("{label}a.example").as_bytes()), None);
        assert_eq!(parsed(format!("example.{label}a").as_bytes()), None);
    }
}
