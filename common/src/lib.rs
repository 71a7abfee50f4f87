//! What the programs in the kernel and the daemon must agree on.
//!
//! Names are those of the `static`s and functions in `dataplane-ebpf`; the loader looks them up in the object.
#![no_std]

/// The stream verdict program.
pub const VERDICT: &str = "verdict";

/// The map of the forwarded sockets, to which [`VERDICT`] is attached.
pub const SOCKS: &str = "SOCKS";

/// Sockets that fit into [`SOCKS`]: two a connection. The kernel allocates a pointer for each when the map is made (512 KiB).
pub const SOCKS_MAX_ENTRIES: u32 = 65_536;
