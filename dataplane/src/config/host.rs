//! Host names: what a route matches and where a target lies.
//!
//! Names are compared as A-labels (RFC 5890) in lower case, as they stand in a ClientHello (RFC
//! 6066 section 3).

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use idna::AsciiDenyList;

use super::values::{Refused, has_zone, is_of_many, is_quotation_mark, link_local, refuse};
use super::{HostPattern, Span, Target, TargetHost};
use crate::hello::ServerName;

/// RFC 1035 section 2.3.4, without the trailing dot.
const LONGEST_NAME: usize = 253;
const LONGEST_LABEL: usize = 63;

/// A name as A-labels, in lower case, without trailing dot. Underscores are let through: not valid
/// in host names, but in use.
pub fn normalize_name(text: &str) -> Result<String, Refused> {
    const REMEDY: &str =
        "names are letters, digits and hyphens, in labels of up to 63 with dots between them, 253 in all";
    let bad = |why: &str| refuse(format!("`{text}` is not a host name: {why}"), REMEDY);
    if text.is_empty() {
        return refuse("the host name is empty", "write a name such as \"blog.example.com\"");
    }
    if text.chars().any(is_quotation_mark) {
        let plain = text.replace(is_quotation_mark, "");
        return refuse(
            format!("`{text}` has quotation marks in it"),
            format!("write \"{plain}\", in plain quotes, those of the keyboard"),
        );
    }
    let Ok(name) = idna::domain_to_ascii_cow(text.as_bytes(), AsciiDenyList::URL) else {
        return bad("it has characters that no name can have");
    };
    let name = name.strip_suffix('.').unwrap_or(&name);
    if name.len() > LONGEST_NAME {
        return bad("it is too long");
    }
    for label in name.split('.') {
        if label.is_empty() {
            return bad("a label is empty");
        }
        if label.len() > LONGEST_LABEL {
            return bad("a label is too long");
        }
        if label.starts_with('-') || label.ends_with('-') {
            return bad("a label begins or ends with a hyphen");
        }
        if let Some(c) = label.chars().find(|c| !c.is_ascii_alphanumeric() && !matches!(c, '-' | '_')) {
            return bad(&format!("`{c}` cannot be in a name"));
        }
    }
    if name.rsplit('.').next().is_some_and(|label| label.bytes().all(|b| b.is_ascii_digit())) {
        return bad("its last label is a number, as in an IPv4 address");
    }
    Ok(name.to_ascii_lowercase())
}

impl HostPattern {
    /// Reads a host of a route: a name, `*.name` or `*`.
    pub fn parse(text: &str) -> Result<Self, Refused> {
        if text == "*" {
            return Ok(Self::Any);
        }
        if let Some((_, rest)) = text.split_once("://") {
            let host = rest.split(['/', '?', '#', ':']).next().unwrap_or_default();
            return refuse(format!("`{text}` is a URL"), instead(host, "write the host name alone"));
        }
        if unbracketed(text).parse::<IpAddr>().is_ok() {
            return refuse(
                format!(
                    "`{text}` is an IP address; clients send no server name for an address, so it could never match"
                ),
                "write the name that clients use, or forward the port as it is with a listener of `mode = \"tcp\"`",
            );
        }
        if let Some((host, path)) = text.split_once('/') {
            return refuse(
                format!("`{text}` has a path; the path is encrypted, a route cannot see it"),
                instead(host, &format!("leave out `/{path}`")),
            );
        }
        if let Some((host, port)) = text.rsplit_once(':') {
            return refuse(
                format!("`{text}` has a port"),
                instead(host, &format!("leave out `:{port}`: the port is that of the listener, see `bind`")),
            );
        }
        if let Some(suffix) = text.strip_prefix('.') {
            return refuse(
                format!("`{text}` begins with a dot"),
                format!("write \"*.{suffix}\" for the names below `{suffix}`; it does not match `{suffix}` itself"),
            );
        }
        let pattern = match text.strip_prefix("*.") {
            Some(suffix) if !suffix.contains('*') => Self::Wildcard(normalize_name(suffix)?),
            None if !text.contains('*') => Self::Exact(normalize_name(text)?),
            _ => {
                return refuse(
                    format!("`{text}` has a wildcard in the wrong place"),
                    "`*` stands for whole labels at the left: \"*.example.com\", or \"*\" for every name",
                );
            }
        };
        // What it matches has at least one character and a dot more.
        if let Self::Wildcard(suffix) = &pattern
            && suffix.len() + 2 > LONGEST_NAME
        {
            return refuse(
                format!("`{text}` is too long: no name could match it"),
                "names have at most 253 characters",
            );
        }
        Ok(pattern)
    }

    /// Reads a host of a route that refuses: also a name that nobody may have, but that a client
    /// can send.
    pub(super) fn parse_refused(text: &str) -> Result<Self, Refused> {
        Self::parse(text).or_else(|refused| {
            let (name, kind): (&str, fn(String) -> Self) = match text.strip_prefix("*.") {
                Some(suffix) => (suffix, Self::Wildcard),
                None => (text, Self::Exact),
            };
            let sent = ServerName::parse(name.as_bytes());
            sent.map(|name| kind(name.as_str().to_owned())).ok_or(refused)
        })
    }
}

fn instead(host: &str, otherwise: &str) -> String {
    match HostPattern::parse(host) {
        Ok(_) => format!("write \"{host}\""),
        Err(_) => otherwise.to_owned(),
    }
}

fn unbracketed(text: &str) -> &str {
    text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text)
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => f.write_str(name),
            Self::Wildcard(suffix) => write!(f, "*.{suffix}"),
            Self::Any => f.write_str("*"),
        }
    }
}

impl Target {
    /// Reads `host:port`; `span` is where it stands in the file.
    pub fn parse(text: &str, span: Span) -> Result<Self, Refused> {
        if let Some((_, rest)) = text.split_once("://") {
            let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
            let remedy = match Self::parse(host, 0..0).or_else(|_| Self::parse(&format!("{host}:443"), 0..0)) {
                Ok(target) => format!("write \"{}\"", target.text),
                Err(_) => "write host and port alone: \"thinkpad-1:443\"".into(),
            };
            return refuse(format!("`{text}` is a URL; bytes are forwarded as they are"), remedy);
        }
        if has_zone(text) {
            return Err(link_local(text));
        }
        if let Some(socket) = text.strip_prefix("unix:") {
            return refuse(
                format!("`{socket}` is a unix socket; targets are reached by TCP"),
                "have the service listen on an address of this machine, and write that: \"127.0.0.1:8443\"",
            );
        }
        if let Ok(ip) = text.parse::<Ipv6Addr>() {
            // Its last group may be meant as a port.
            let meant = text.rsplit_once(':').and_then(|(ip, port)| {
                Some((ip.parse::<Ipv6Addr>().ok()?, port.parse::<u16>().ok().filter(|port| *port > 0)?))
            });
            if let Some((before, port)) = meant {
                return refuse(
                    format!(
                        "`{text}` is an IPv6 address without brackets: whether `{port}` is its port cannot be told"
                    ),
                    format!("write \"[{before}]:{port}\", or \"[{ip}]:443\" if `{port}` belongs to the address"),
                );
            }
            return refuse(
                format!("`{text}` is an IPv6 address without brackets and port"),
                format!("write \"[{ip}]:443\", with the port of the service"),
            );
        }
        let Some((host, port)) = text.rsplit_once(':').filter(|_| !text.ends_with(']')) else {
            return refuse(
                format!("`{text}` has no port"),
                format!("write \"{text}:443\", with the port of the service"),
            );
        };
        let port = match port.parse::<u16>() {
            Ok(port) if port > 0 => port,
            _ => return refuse(format!("`{port}` is not a port"), "write a port from 1 to 65535 after the colon"),
        };
        let host = match host.strip_prefix('[') {
            Some(rest) => match rest.strip_suffix(']').map(str::parse::<Ipv6Addr>) {
                Some(Ok(ip)) => TargetHost::Ip(IpAddr::V6(ip).to_canonical()),
                _ => {
                    return refuse(
                        format!("`{host}` is not an IPv6 address in brackets"),
                        "write it as \"[2001:db8::7]:443\"",
                    );
                }
            },
            None if host.parse::<Ipv6Addr>().is_ok() => {
                return refuse(
                    format!("the IPv6 address of `{text}` has no brackets"),
                    format!("write \"[{host}]:{port}\""),
                );
            }
            None if host.is_empty() => {
                return refuse(format!("`{text}` has no host"), format!("write a name or an address before `:{port}`"));
            }
            None => match host.parse::<IpAddr>() {
                Ok(ip) => TargetHost::Ip(ip),
                // To a resolver the trailing dot means something: no search list.
                Err(_) => TargetHost::Name(normalize_name(host)? + if host.ends_with('.') { "." } else { "" }),
            },
        };
        match host {
            TargetHost::Ip(IpAddr::V6(ip)) if ip.is_unicast_link_local() => Err(link_local(text)),
            TargetHost::Ip(ip) if ip.is_unspecified() || is_of_many(ip) => refuse(
                format!("nothing can be reached at `{ip}`"),
                "write the address of the service: \"127.0.0.1:8443\" for this machine",
            ),
            host => Ok(Self { text: Arc::from(text), host, port, span, fence: None }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(text: &str) -> String {
        HostPattern::parse(text).unwrap().to_string()
    }

    fn remedy(text: &str) -> String {
        HostPattern::parse(text).unwrap_err().remedy
    }

    #[test]
    fn hosts_are_kept_as_lower_case_a_labels_without_trailing_dot() {
        assert_eq!(pattern("Blog.Example.COM."), "blog.example.com");
        assert_eq!(pattern("bücher.example"), "xn--bcher-kva.example");
        assert_eq!(pattern("*.BÜCHER.example"), "*.xn--bcher-kva.example");
        assert_eq!(pattern("faß.example"), "xn--fa-hia.example");
        assert_eq!(pattern("*"), "*");
        assert_eq!(pattern("a_b.example"), "a_b.example");
    }

    #[test]
    fn a_wildcard_is_whole_and_leftmost() {
        for text in ["*a.example", "a.*.example", "*.*.example", "**", "*.", "a*"] {
            assert!(HostPattern::parse(text).is_err(), "{text}");
        }
        assert!(HostPattern::parse(&format!("*.{}", ["a".repeat(63).as_str(); 4].join("."))).is_err());
    }

    #[test]
    fn what_is_no_host_name_comes_with_what_to_write() {
        assert_eq!(remedy("https://blog.example.com/x"), "write \"blog.example.com\"");
        assert_eq!(remedy("blog.example.com:443"), "write \"blog.example.com\"");
        assert_eq!(remedy("blog.example.com/x"), "write \"blog.example.com\"");
        assert!(remedy(".example.com").starts_with("write \"*.example.com\""));
        for text in [
            "",
            ".",
            "a..b",
            "-a.example",
            "a-.example",
            "a b.example",
            "192.0.2.1",
            "[::1]",
            "::1",
            "1.2.3.999",
            "xn--a.example",
            "a\0b",
        ] {
            assert!(HostPattern::parse(text).is_err(), "{text}");
        }
        assert!(HostPattern::parse(&format!("{}.example", "a".repeat(64))).is_err());
        assert!(HostPattern::parse(&["a".repeat(60).as_str(); 5].join(".")).is_err());
    }

    fn target(text: &str) -> Result<Target, Refused> {
        Target::parse(text, 0..0)
    }

    #[test]
    fn targets_are_names_or_addresses_with_a_port() {
        assert_eq!(target("thinkpad-1:443").unwrap().host, TargetHost::Name("thinkpad-1".into()));
        assert_eq!(target("a.example.:443").unwrap().host, TargetHost::Name("a.example.".into()));
        assert_eq!(target("100.64.0.7:443").unwrap().host, TargetHost::Ip([100, 64, 0, 7].into()));
        assert_eq!(target("[fd7a:115c:a1e0::7]:443").unwrap().port, 443);
        assert_eq!(target("[::ffff:192.0.2.1]:443").unwrap().host, TargetHost::Ip([192, 0, 2, 1].into()));
    }

    #[test]
    fn what_is_no_target_comes_with_what_to_write() {
        let remedy = |text| target(text).unwrap_err().remedy;
        assert_eq!(remedy("thinkpad-1"), "write \"thinkpad-1:443\", with the port of the service");
        assert_eq!(remedy("[fd7a::7]"), "write \"[fd7a::7]:443\", with the port of the service");
        assert_eq!(remedy("https://thinkpad-1:8443/"), "write \"thinkpad-1:8443\"");
        assert_eq!(remedy("https://thinkpad-1"), "write \"thinkpad-1:443\"");
        assert_eq!(remedy("fd7a:0:0:0:1:2:3:4:443"), "write \"[fd7a:0:0:0:1:2:3:4]:443\"");
        for text in [
            "",
            ":443",
            "a:0",
            "a:65536",
            "a:",
            "a b:443",
            "100.64.0.300:443",
            "0.0.0.0:443",
            "[::]:443",
            "[x]:443",
            "fd7a::7",
            "[fe80::1%eth0]:443",
        ] {
            assert!(target(text).is_err(), "{text}");
        }
    }
}
