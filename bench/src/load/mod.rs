//! The load: a client and a server, each a process of its own in its namespace, so that they share
//! neither allocator nor lock with the harness.
//!
//! Both run at most one thread a core, each with its own epoll instance and its own connections;
//! nothing is shared between threads but a few counters. A connection begins with a real captured
//! ClientHello; behind it, client and server speak the little protocol of [`wire`]. There is no
//! TLS, so that what is measured is the forwarding.

pub mod client;
pub mod control;
pub mod preamble;
pub mod server;
pub mod wire;

use std::num::NonZero;

use serde::{Deserialize, Serialize};

/// The hello that opens every connection: as Chrome 131 has it, with a post-quantum key share, in
/// two segments.
pub const HELLO: &[u8] = include_bytes!("../../../dataplane/testdata/hello/chrome131.bin");

/// The server name in [`HELLO`].
pub const SERVER_NAME: &str = "blog.example.com";

/// What the client measured in its window.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Tally {
    /// Connections that were open.
    pub connections: u64,
    /// Length of the window.
    pub seconds: f64,
    /// Exchanges, or connections from connect to close, or bulk transfers, as the workload has it.
    pub operations: u64,
    /// Payload that was received.
    pub received: u64,
    /// Latency of the operations in µs: median, 99 %, 99.9 %.
    pub latency: Option<[f64; 3]>,
}

/// What the server counted since it started.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Served {
    /// Payload that was received, requests included.
    pub received: u64,
    /// Connections whose hello came.
    pub connections: u64,
    /// Those of them that had a PROXY header before it.
    pub proxied: u64,
}

/// One thread for each core.
fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}
