//! The forwarding dataplane of an entrance node.
pub mod config;
pub mod proxy_protocol;
pub mod reject;
