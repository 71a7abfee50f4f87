//! The forwarding dataplane of an entrance node.
pub mod config;
pub mod ebpf;
pub mod reject;
