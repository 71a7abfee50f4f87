//! The sockmap engine: an sk_skb program redirects bytes between both sockets inside the kernel, and userspace sleeps.
//!
//! In the order of a connection's life: `table` gives it a place, `flow` puts its sockets into the map and drives it, `stream` decides for each direction
//! who forwards, `reactor` wakes it. The program's half of the rules is [`common::governor`]. Whether this kernel can be trusted with it, [`known_bugs`] says by its
//! version and [`self_test`] by its behaviour.

mod flow;
pub mod known_bugs;
mod reactor;
pub mod self_test;
mod stream;
mod table;

#[cfg(test)]
mod model;

pub use flow::{Engaged, Left, Outcome, forward};
pub use table::Table;
