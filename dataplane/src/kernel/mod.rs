//! The kernel boundary: what is asked of the kernel in other ways than through the standard library
//! and tokio.
//!
//! Knows no connection, no route and no configuration.

pub mod btf;
pub mod descriptors;
pub mod ebpf;
pub mod socket;
pub mod sys;
