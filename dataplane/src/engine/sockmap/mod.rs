//! The sockmap engine: an sk_skb program redirects bytes between both sockets inside the kernel,
//! and userspace sleeps.
//!
//! In the order of a connection's life: `table` gives it a slot, `flow` puts its sockets into the
//! map and drives it, `stream` decides for each direction who forwards, `reactor` wakes it,
//! `leaving` says how it gets out. The program's half of the rules is
//! [`common::sockmap::governor`]. Whether this kernel can be trusted with it, [`known_bugs`] says
//! by its version and [`self_test`] by its behaviour. README.md beside this file has the states,
//! the rules and what makes them safe.

mod engaged;
mod flow;
pub mod known_bugs;
mod leaving;
pub mod programs;
mod reactor;
pub mod self_test;
mod stream;
mod table;

#[cfg(test)]
mod model;

use std::sync::Arc;

pub use table::Table;

use super::in_kernel::{Forwarding, InKernel};
use super::pair::{Halt, Kind, Legs, Timeouts};
use super::traffic::Traffic;

impl InKernel for Table {
    fn kind(&self) -> Kind {
        Kind::Sockmap
    }

    fn set_memory(&self, bytes: u64) {
        Table::set_memory(self, bytes);
    }

    fn forward<'a>(
        self: Arc<Self>,
        legs: Legs,
        leave_on_bulk: bool,
        timeouts: Timeouts,
        traffic: &'a Traffic,
        halt: &'a Halt,
    ) -> Forwarding<'a> {
        Box::pin(flow::forward(self, legs, leave_on_bulk, timeouts, traffic, halt))
    }
}
