//! Why a connection was not forwarded: one reason, one metric label, one answer to the client.
//!
//! This module knows nothing of sockets; `connection` acts on what it says.

use std::fmt;

/// The reasons, as users see them in metrics and logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// A TLS hello without a server name.
    NoSni,
    /// No route lists the name on this listener.
    UnknownHost,
    /// The first bytes are no TLS record of a handshake.
    NotTls,
    /// TLS, but broken or forbidden (RFC 8446 section 4.1.2, RFC 6066 section 3).
    Malformed,
    /// Longer than `hello_max_bytes`, or declared to be.
    TooLarge,
    /// `hello_timeout` passed.
    Timeout,
    /// The client went away before its hello was whole.
    ClosedEarly,
    /// Not an HTTP/1 request.
    NotHttp,
    /// Outside `allow` or inside `deny`.
    ClientDenied,
    /// `max_connections_per_client`.
    ClientLimit,
    /// `max_connections`, or no file descriptor left.
    TotalLimit,
    /// The host has routes, none of them for what the client offers.
    AlpnMismatch,
    /// A peer of `accept_proxy` sent no PROXY header, or a broken one.
    ProxyHeader,
    /// No target of the upstream could be reached.
    NoUpstream,
    /// `kernel_memory` is used up.
    MemoryLimit,
    /// It is a connection of our own that came back.
    Loop,
    /// The server name is an address, or has a port (RFC 6066 section 3 forbids both).
    BadServerName,
}

impl Reason {
    /// Every reason, for metrics that start at zero.
    pub const ALL: [Self; 17] = [
        Self::NoSni,
        Self::UnknownHost,
        Self::NotTls,
        Self::Malformed,
        Self::TooLarge,
        Self::Timeout,
        Self::ClosedEarly,
        Self::NotHttp,
        Self::ClientDenied,
        Self::ClientLimit,
        Self::TotalLimit,
        Self::AlpnMismatch,
        Self::ProxyHeader,
        Self::NoUpstream,
        Self::MemoryLimit,
        Self::Loop,
        Self::BadServerName,
    ];

    /// The label of `dataplane_connections_rejected_total`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NoSni => "no_sni",
            Self::UnknownHost => "unknown_host",
            Self::NotTls => "not_tls",
            Self::Malformed => "malformed",
            Self::TooLarge => "too_large",
            Self::Timeout => "timeout",
            Self::ClosedEarly => "closed_early",
            Self::NotHttp => "not_http",
            Self::ClientDenied => "client_denied",
            Self::ClientLimit => "client_limit",
            Self::TotalLimit => "total_limit",
            Self::AlpnMismatch => "alpn_mismatch",
            Self::ProxyHeader => "proxy_header",
            Self::NoUpstream => "no_upstream",
            Self::MemoryLimit => "memory_limit",
            Self::Loop => "loop",
            Self::BadServerName => "bad_server_name",
        }
    }

    /// The description of the fatal TLS alert (RFC 8446 section 6) that tells the client; `None`: a
    /// plain close, because no parseable hello was seen.
    pub const fn alert(self) -> Option<u8> {
        match self {
            Self::NoSni | Self::UnknownHost | Self::BadServerName => Some(112), // unrecognized_name
            Self::AlpnMismatch => Some(120),                                    // no_application_protocol
            Self::NoUpstream | Self::MemoryLimit | Self::Loop => Some(80),      // internal_error
            Self::NotTls
            | Self::Malformed
            | Self::TooLarge
            | Self::Timeout
            | Self::ClosedEarly
            | Self::NotHttp
            | Self::ClientDenied
            | Self::ClientLimit
            | Self::TotalLimit
            | Self::ProxyHeader => None,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
