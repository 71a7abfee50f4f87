//! Engines: what carries the bytes once both sides are connected.
//!
//! An engine takes [`Legs`], the two sockets and the bytes that still have to be sent first, and
//! ends with an [`End`]; or it is told to stop, and gives them back. All engines behave alike: no
//! byte lost, doubled or reordered; FIN passed on after the last byte; anything unproven ends in
//! RST. An engine does not know why the pair was made: no host names, no routes, no PROXY protocol.

pub mod answer;
mod copy;
mod dead_peer;
mod driver;
mod idle;
mod in_kernel;
mod metrics;
mod pair;
mod promotion;
mod relay;
mod selection;
pub mod sockmap;
pub mod splice;
mod traffic;

pub use driver::{Plan, forward};
pub use in_kernel::{InKernel, Left, Outcome};
pub use metrics::EngineMetrics;
pub use pair::{End, Forwarded, Halt, Kind, Legs, PerSide, SIDES, Side, Stop, StreamState, Timeouts, Unsent};
pub use selection::{Candidate, Selection, Support};
pub use traffic::{Carried, Counter, Look, Offload, Path, Traffic};
