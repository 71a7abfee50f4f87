//! One request, as far as it matters: its Host, its target, and whether it is an ACME challenge.

use std::net::{Ipv4Addr, Ipv6Addr};

use httparse::{EMPTY_HEADER, Status};

use crate::hello::ServerName;
use crate::reject::Reason;

/// RFC 8555 section 8.3.
const CHALLENGES: &str = "/.well-known/acme-challenge/";
/// More than any client sends.
const MAX_HEADERS: usize = 100;

/// A whole, well-formed request head.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// `None`: an IP address, or nothing at all, which no route can list.
    pub host: Option<ServerName>,
    /// Path and query (RFC 9112 section 3.2.1), ASCII without blanks; `/` for `OPTIONS *`.
    target: Box<str>,
    /// What to send for it when it asks for a challenge.
    challenge: Option<Box<[u8]>>,
}

impl Request {
    /// Takes apart a head that ends with its empty line.
    pub(super) fn parse(head: &[u8]) -> Result<Self, Reason> {
        let mut headers = [EMPTY_HEADER; MAX_HEADERS];
        let mut parsed = httparse::Request::new(&mut headers);
        match parsed.parse(head) {
            Ok(Status::Complete(len)) if len == head.len() => {}
            Err(httparse::Error::TooManyHeaders) => return Err(Reason::TooLarge),
            Ok(_) | Err(_) => return Err(Reason::Malformed),
        }
        let (Some(method), Some(target), Some(version)) = (parsed.method, parsed.path, parsed.version) else {
            return Err(Reason::Malformed);
        };
        let fields = Fields::read(parsed.headers)?;
        let (authority, target) = split_target(method, target)?;
        let host = fields.host.map(parse_authority).transpose()?;
        // RFC 9112 section 3.2: only HTTP/1.0 may be silent about it.
        if host.is_none() && version > 0 {
            return Err(Reason::Malformed);
        }
        let host = match (authority.map(parse_authority).transpose()?, host) {
            (Some(asked), Some(host)) if asked != host => return Err(Reason::Malformed),
            (Some(name), _) | (None, Some(name)) => name,
            (None, None) => None,
        };
        let challenge = host.filter(|_| is_challenge(method, target) && !fields.has_body);
        let challenge = challenge.map(|host| write_challenge(method, target, version, &host, fields.user_agent).into());
        Ok(Self { host, target: target.into(), challenge })
    }

    /// The request to pass on when this one asks for an ACME http-01 challenge (RFC 8555 section
    /// 8.3) and has no body. It asks for the connection to be closed after the answer.
    pub fn challenge(&self) -> Option<&[u8]> {
        self.challenge.as_deref()
    }

    /// The answer that sends a client to `https` (RFC 9110 section 15.4.9: with the same method).
    pub fn redirect(&self, host: &ServerName) -> Vec<u8> {
        format!(
            "HTTP/1.1 308 Permanent Redirect\r\nLocation: https://{host}{}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            self.target
        )
        .into_bytes()
    }
}

/// The header fields that matter.
struct Fields<'a> {
    host: Option<&'a [u8]>,
    has_body: bool,
    user_agent: Option<&'a [u8]>,
}

impl<'a> Fields<'a> {
    fn read(headers: &[httparse::Header<'a>]) -> Result<Self, Reason> {
        let mut all = [None; 4];
        for header in headers {
            let names = ["host", "content-length", "transfer-encoding", "user-agent"];
            let Some(which) = names.iter().position(|name| header.name.eq_ignore_ascii_case(name)) else { continue };
            // Two of them are two readings of one request.
            if all[which].replace(header.value).is_some() {
                return Err(Reason::Malformed);
            }
        }
        let [host, length, encoding, user_agent] = all;
        let is_number = |value: &[u8]| !value.is_empty() && value.iter().all(u8::is_ascii_digit);
        if length.is_some_and(|value| encoding.is_some() || !is_number(value)) {
            return Err(Reason::Malformed);
        }
        let has_body = encoding.is_some() || length.is_some_and(|value| value.iter().any(|digit| *digit != b'0'));
        Ok(Self { host, has_body, user_agent })
    }
}

/// The authority of an absolute target, and path with query (RFC 9112 section 3.2).
fn split_target<'a>(method: &str, target: &'a str) -> Result<(Option<&'a [u8]>, &'a str), Reason> {
    if !target.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Reason::Malformed);
    }
    if target.starts_with('/') {
        return Ok((None, target));
    }
    if target == "*" && method == "OPTIONS" {
        return Ok((None, "/"));
    }
    let Some((scheme, rest)) = target.split_once("://") else { return Err(Reason::Malformed) };
    if !(scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("https")) {
        return Err(Reason::Malformed);
    }
    match rest.find(['/', '?', '#']) {
        None => Ok((Some(rest.as_bytes()), "/")),
        Some(end) if rest[end..].starts_with('/') => Ok((Some(&rest.as_bytes()[..end]), &rest[end..])),
        Some(_) => Err(Reason::Malformed),
    }
}

/// The name of `uri-host [ ":" port ]` (RFC 9110 section 7.2); `None` for an address and for
/// nothing.
fn parse_authority(authority: &[u8]) -> Result<Option<ServerName>, Reason> {
    let text = str::from_utf8(authority).map_err(|_| Reason::Malformed)?;
    let (host, port) = match text.strip_prefix('[').map(|rest| rest.split_once(']')) {
        Some(Some((host, port))) if host.parse::<Ipv6Addr>().is_ok() => ("", port),
        Some(_) => return Err(Reason::Malformed),
        None => text.split_at(text.find(':').unwrap_or(text.len())),
    };
    let port = port.strip_prefix(':').unwrap_or(port);
    // The port may be empty (RFC 3986 section 3.2.3).
    if !port.is_empty() && (!port.bytes().all(|b| b.is_ascii_digit()) || port.parse::<u16>().is_err()) {
        return Err(Reason::Malformed);
    }
    if host.is_empty() || host.parse::<Ipv4Addr>().is_ok() {
        return Ok(None);
    }
    ServerName::parse(host.as_bytes()).map(Some).ok_or(Reason::Malformed)
}

/// Whether the path is that of a challenge and nothing else: its token is of the base64url alphabet
/// (RFC 8555 section 8.3), so neither a dot nor a percent sign nor another slash can make a second
/// path of it.
fn is_challenge(method: &str, target: &str) -> bool {
    let token = target.strip_prefix(CHALLENGES).unwrap_or_default();
    let base64url = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    matches!(method, "GET" | "HEAD") && !token.is_empty() && token.bytes().all(base64url)
}

/// Nothing but what an ACME client's answer may depend on, and the user agent for the ingress's
/// log.
fn write_challenge(method: &str, path: &str, version: u8, host: &ServerName, user_agent: Option<&[u8]>) -> Vec<u8> {
    let mut bytes = format!("{method} {path} HTTP/1.{version}\r\nHost: {host}\r\n").into_bytes();
    if let Some(user_agent) = user_agent {
        bytes.extend_from_slice(b"User-Agent: ");
        bytes.extend_from_slice(user_agent);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"Connection: close\r\n\r\n");
    bytes
}
