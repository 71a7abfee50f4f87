//! The forwarding dataplane of an entrance node. Modules in the order in which a connection meets
//! them: [`listen`], [`connection`] ([`hello`] or [`http`], [`route`], [`upstream`],
//! [`proxy_protocol`]), [`engine`]; beside it what they are driven by. ARCHITECTURE.md is the map.

pub mod listen;

pub mod connection;

pub mod hello;
pub mod http;
pub mod proxy_protocol;
pub mod route;
pub mod upstream;

pub mod tailnet;

pub mod engine;

pub mod admission;
pub mod loops;
pub mod registry;
pub mod reject;
pub mod rejection_log;

pub mod config;
pub mod generation;
pub mod handover;
pub mod import;
pub mod shared;
pub mod shortages;
pub mod source;

pub mod daemon;

pub mod admin;
pub mod bounded_server;
pub mod cli;
pub mod doctor;
pub mod logging;
pub mod machine_memory;
pub mod metrics;
pub mod moment;
pub mod parking;
pub mod register;
pub mod systemd;

pub mod kernel;
