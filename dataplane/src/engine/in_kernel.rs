//! An engine that works inside the kernel, as the driver sees it: one row in
//! [`selection`](super::selection), and one folder.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use super::pair::{End, Halt, Kind, Legs, Timeouts};
use super::traffic::Traffic;

/// Takes connections over from the relay, and gives them back.
pub trait InKernel: fmt::Debug + Send + Sync {
    fn kind(&self) -> Kind;

    /// Bounds what all its connections together may queue in the kernel, bytes.
    fn set_memory(&self, bytes: u64);

    /// Forwards, for as long as that is good for the connection. `leave_on_bulk`: the relay is
    /// better at bulk.
    fn forward<'a>(
        self: Arc<Self>,
        legs: Legs,
        leave_on_bulk: bool,
        timeouts: Timeouts,
        traffic: &'a Traffic,
        halt: &'a Halt,
    ) -> Forwarding<'a>;
}

/// In a box: most connections never get here, and should not pay for the room.
pub type Forwarding<'a> = Pin<Box<dyn Future<Output = Outcome> + Send + 'a>>;

/// What became of a connection.
#[derive(Debug)]
pub enum Outcome {
    Ended(End),
    /// The kernel does not forward it any more, or never did: the relay goes on with it.
    Left(Legs, Left),
}

/// Why a connection went back to the relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// There was no place for it.
    Refused,
    Bulk,
    /// One side has ended; passing that on is the relay's.
    Ending,
    /// It was told to stop.
    Halted,
}
