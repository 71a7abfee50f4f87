//! Who forwards a connection when: the relay, and in turns with it an engine that works in the
//! kernel.

use std::sync::Arc;

use super::in_kernel::{InKernel, Left, Outcome};
use super::pair::{Forwarded, Halt, Kind, Legs, Timeouts};
use super::promotion::{Conduct, Promotion};
use super::relay::{self, Relayed};
use super::traffic::Traffic;

/// How connections are forwarded.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What carries a connection's first bytes, and all of them if it is not moved.
    pub relay: Kind,
    /// Where connections are moved to.
    pub in_kernel: Option<Arc<dyn InKernel>>,
    /// Only those are moved that live long with small messages, and they come back for bulk. Else
    /// all are, at once.
    pub must_earn: bool,
}

impl Plan {
    fn promotion(&self) -> Promotion {
        match &self.in_kernel {
            None => Promotion::Never,
            Some(_) if self.must_earn => Promotion::Earned(Conduct::default()),
            Some(_) => Promotion::AtOnce,
        }
    }
}

/// Forwards until the connection ends, or until it is told to stop. On [`End::Done`] both sockets
/// were closed with FIN, on any other end with RST.
///
/// [`End::Done`]: super::End::Done
pub async fn forward(plan: &Plan, mut legs: Legs, timeouts: Timeouts, traffic: &Traffic, halt: &Halt) -> Forwarded {
    let mut promotion = plan.promotion();
    loop {
        legs = match relay::run(plan.relay, legs, promotion.clone(), timeouts, traffic, halt).await {
            Relayed::Ended(end) => return Forwarded::Ended(end),
            Relayed::Halted(legs) => return Forwarded::Halted(legs),
            Relayed::Promoted(legs) => legs,
        };
        let Some(engine) = &plan.in_kernel else { unreachable!("promoted to an engine that is not there") };
        let why;
        (legs, why) = match engine.clone().forward(legs, plan.must_earn, timeouts, traffic, halt).await {
            Outcome::Ended(end) => return Forwarded::Ended(end),
            Outcome::Left(legs, why) => (legs, why),
        };
        promotion = match why {
            Left::Bulk | Left::Refused => promotion.after_return(),
            Left::Ending | Left::Halted => Promotion::Never,
        };
    }
}
