//! The forwarding dataplane of an entrance node.
pub mod config;
pub mod hello;
pub mod reject;
