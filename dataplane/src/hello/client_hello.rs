//! The ClientHello message (RFC 8446 section 4.1.2) once it is whole: where in it are the things
//! that routing asks for.
//!
//! This module must not know of records or of how the bytes came; `super` does. It judges only what
//! it reads: the outline of the message, the list of extensions, and the three extensions that it
//! looks into.

use std::net::IpAddr;
use std::ops::Range;

use tls_parser::{TlsExtensionType, TlsVersion};

use super::ServerName;

/// draft-ietf-tls-esni, now RFC 9849; tls-parser knows only the older `encrypted_server_name`.
const ENCRYPTED_CLIENT_HELLO: TlsExtensionType = TlsExtensionType(0xfe0d);
/// RFC 6066 section 3, `NameType`.
const HOST_NAME: u8 = 0;

/// What a hello says. Positions count from the first byte of the handshake message's body, so that
/// they outlive a move of the buffer.
#[derive(Debug)]
pub(super) struct Outline {
    pub(super) server_name: Option<ServerName>,
    /// It is none, but an address or a name with a port: what it says.
    pub(super) bad_name: Option<Range<usize>>,
    /// The protocols of the ALPN extension, each behind a length byte; empty without that
    /// extension.
    pub(super) alpn: Range<usize>,
    /// Pairs of bytes, at least one.
    pub(super) versions: Range<usize>,
    pub(super) ech: bool,
    /// 32 bytes.
    pub(super) random: Range<usize>,
}

/// `None`: malformed.
pub(super) fn parse(body: &[u8]) -> Option<Outline> {
    let mut rest = Reader { body, at: 0, end: body.len() };
    let legacy_version = rest.take(2)?;
    let random = rest.take(32)?;
    if rest.block_u8()?.len() > 32 {
        return None;
    }
    let cipher_suites = rest.block_u16()?.len();
    if cipher_suites < 2 || !cipher_suites.is_multiple_of(2) {
        return None;
    }
    if rest.block_u8()?.is_empty() {
        return None; // compression methods: at least "null"
    }
    let (mut server_name, mut bad_name) = (None, None);
    let mut alpn = None;
    let mut versions = None;
    let mut ech = false;
    // Before TLS 1.3 a hello may end here (RFC 5246 section 7.4.1.2).
    if !rest.is_empty() {
        let mut extensions = rest.block_u16()?;
        if !rest.is_empty() {
            return None;
        }
        while !extensions.is_empty() {
            let kind = TlsExtensionType(extensions.u16()?);
            let content = extensions.block_u16()?;
            // RFC 8446 section 4.2 forbids to repeat any extension. One that is not read here
            // cannot mislead the choice of a route, and is the server's to refuse.
            let repeated = match kind {
                TlsExtensionType::ServerName => {
                    let repeated = server_name.is_some() || bad_name.is_some();
                    match parse_server_name(content)? {
                        Ok(name) => server_name = Some(name),
                        Err(bad) => bad_name = Some(bad),
                    }
                    repeated
                }
                TlsExtensionType::ApplicationLayerProtocolNegotiation => alpn.replace(parse_alpn(content)?).is_some(),
                TlsExtensionType::SupportedVersions => versions.replace(parse_versions(content)?).is_some(),
                ENCRYPTED_CLIENT_HELLO => {
                    ech = true;
                    false
                }
                _ => false,
            };
            if repeated {
                return None;
            }
        }
    }
    Some(Outline {
        server_name,
        bad_name,
        alpn: alpn.unwrap_or(0..0),
        versions: versions.unwrap_or(legacy_version),
        ech,
        random,
    })
}

/// RFC 6066 section 3. The list was made for several names; no client sends more than one, and a
/// second one would be a guess which of them counts.
fn parse_server_name(mut content: Reader<'_>) -> Option<Result<ServerName, Range<usize>>> {
    let mut list = content.block_u16()?;
    if !content.is_empty() || list.u8()? != HOST_NAME {
        return None;
    }
    let name = list.block_u16()?;
    if !list.is_empty() {
        return None;
    }
    match ServerName::parse(name.as_bytes()) {
        Some(name) => Some(Ok(name)),
        None => is_address_or_has_port(name.as_bytes()).then(|| Err(name.range())),
    }
}

/// What people put there by mistake, and programs.
fn is_address_or_has_port(name: &[u8]) -> bool {
    let Ok(name) = str::from_utf8(name) else { return false };
    let is_address = |text: &str| text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().is_ok();
    let with_port = name.rsplit_once(':').filter(|(_, port)| port.parse::<u16>().is_ok());
    is_address(name.strip_suffix('.').unwrap_or(name))
        || with_port.is_some_and(|(host, _)| is_address(host) || ServerName::parse(host.as_bytes()).is_some())
}

/// RFC 7301 section 3.1: a list of at least one protocol, none of them empty.
fn parse_alpn(mut content: Reader<'_>) -> Option<Range<usize>> {
    let mut list = content.block_u16()?;
    if !content.is_empty() || list.is_empty() {
        return None;
    }
    let protocols = list.range();
    while !list.is_empty() {
        if list.block_u8()?.is_empty() {
            return None;
        }
    }
    Some(protocols)
}

/// RFC 8446 section 4.2.1.
fn parse_versions(mut content: Reader<'_>) -> Option<Range<usize>> {
    let list = content.block_u8()?;
    (content.is_empty() && !list.is_empty() && list.len().is_multiple_of(2)).then(|| list.range())
}

/// A part of the body, read from its front; a read past its end is `None`.
struct Reader<'a> {
    body: &'a [u8],
    at: usize,
    end: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<Range<usize>> {
        if len > self.len() {
            return None;
        }
        let taken = self.at..self.at + len;
        self.at = taken.end;
        Some(taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|taken| self.body[taken.start])
    }

    fn u16(&mut self) -> Option<u16> {
        self.take(2).map(|taken| u16::from_be_bytes([self.body[taken.start], self.body[taken.start + 1]]))
    }

    fn block(&mut self, len: usize) -> Option<Self> {
        self.take(len).map(|taken| Self { body: self.body, at: taken.start, end: taken.end })
    }

    /// A vector behind one byte of length.
    fn block_u8(&mut self) -> Option<Self> {
        let len = self.u8()?;
        self.block(len.into())
    }

    /// A vector behind two bytes of length.
    fn block_u16(&mut self) -> Option<Self> {
        let len = self.u16()?;
        self.block(len.into())
    }

    fn len(&self) -> usize {
        self.end - self.at
    }

    fn is_empty(&self) -> bool {
        self.at == self.end
    }

    fn range(&self) -> Range<usize> {
        self.at..self.end
    }

    fn as_bytes(&self) -> &'a [u8] {
        &self.body[self.range()]
    }
}

/// The protocols that a client offers, in its order; empty if it offers none.
#[derive(Clone, Debug)]
pub struct Alpn<'a> {
    pub(super) list: &'a [u8],
}

impl<'a> Iterator for Alpn<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let (len, rest) = self.list.split_first()?;
        let (protocol, rest) = rest.split_at(usize::from(*len));
        self.list = rest;
        Some(protocol)
    }
}

/// The protocol versions that a client offers, in its order and with its GREASE values (RFC 8701):
/// those of `supported_versions`, else the one in the hello itself, which stands for all up to it.
#[derive(Clone, Debug)]
pub struct Versions<'a> {
    pub(super) list: &'a [u8],
}

impl Iterator for Versions<'_> {
    type Item = TlsVersion;

    fn next(&mut self) -> Option<TlsVersion> {
        let (version, rest) = self.list.split_first_chunk()?;
        self.list = rest;
        Some(TlsVersion(u16::from_be_bytes(*version)))
    }
}
