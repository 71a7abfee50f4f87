//! Who forwards a connection when: the relay, and in turns with it an engine that works in the
//! kernel.

use std::sync::Arc;

use super::in_kernel::{InKernel, Left, Outcome};
use super::pair::{End, Kind, Legs, Pair, PerSide, StreamState, Timeouts};
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

/// Forwards until the connection ends. On [`End::Done`] both sockets were closed with FIN, on
/// anything else with RST.
pub async fn forward(plan: &Plan, pair: Pair, timeouts: Timeouts, traffic: &Traffic) -> End {
    let Pair { client, upstream, mut first } = pair;
    let mut legs = Legs { client, upstream, streams: PerSide::new(|_| StreamState::Open) };
    let mut promotion = plan.promotion();
    loop {
        let first = std::mem::take(&mut first);
        legs = match relay::run(plan.relay, legs, first, promotion.clone(), timeouts, traffic).await {
            Relayed::Ended(end) => return end,
            Relayed::Promoted(legs) => legs,
        };
        let Some(engine) = &plan.in_kernel else { unreachable!("promoted to an engine that is not there") };
        let why;
        (legs, why) = match engine.clone().forward(legs, plan.must_earn, timeouts, traffic).await {
            Outcome::Ended(end) => return end,
            Outcome::Left(legs, why) => (legs, why),
        };
        promotion = match why {
            Left::Bulk | Left::Refused => promotion.after_return(),
            Left::Ending => Promotion::Never,
        };
    }
}
