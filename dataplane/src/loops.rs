//! Whether a connection is one of our own that came back: a target that is this machine behind NAT, or another entrance node that sends it here again.
//!
//! Addresses do not tell. A hello does: its random is 32 bytes that no two clients choose (RFC 8446 section 4.1.2). One that was sent to a target, which has
//! answered nothing yet, and that comes in again, has gone in a circle. Of an ACME challenge the token is as unique; but an authority asks for it from several
//! places at once, so that only their number tells.
//!
//! It must not know how bytes move. What is remembered of a connection goes with it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use sha2::{Digest, Sha256};

use crate::engine::Traffic;
use crate::upstream::Target;

/// What tells a request from all others: a hello's random, or a digest of a challenge.
pub type Mark = [u8; 32];

/// Requests for one challenge that may be under way: authorities ask from five to ten places (RFC 8555 section 11.2 says why).
const CHALLENGED: usize = 32;

/// Locks, so that workers seldom wait for each other.
const SHARDS: usize = 16;

/// The hellos of the connections that there are.
#[derive(Debug, Default)]
pub struct InFlight {
    shards: [Mutex<HashMap<Mark, Vec<Flight>>>; SHARDS],
}

#[derive(Debug)]
struct Flight {
    id: u64,
    /// Where it was sent, and what has come back.
    sent: Option<(Arc<Target>, Weak<Traffic>)>,
}

impl Flight {
    /// The target, if that has answered nothing yet.
    fn unanswered(&self) -> Option<&Arc<Target>> {
        let (target, traffic) = self.sent.as_ref()?;
        (traffic.upgrade()?.look().to_client == [0, 0]).then_some(target)
    }
}

impl InFlight {
    /// Remembers a hello until the guard is dropped.
    ///
    /// # Errors
    /// It is one that came back; the target that it was sent to.
    pub fn hello(self: &Arc<Self>, random: Mark, id: u64) -> Result<Guard, Arc<Target>> {
        self.enter(random, id, 1)
    }

    /// The same of the request that a challenge is asked for with.
    ///
    /// # Errors
    /// As for a hello.
    pub fn challenge(self: &Arc<Self>, request: &[u8], id: u64) -> Result<Guard, Arc<Target>> {
        self.enter(Sha256::digest(request).into(), id, CHALLENGED)
    }

    /// `most`: how often the mark may be under way.
    fn enter(self: &Arc<Self>, mark: Mark, id: u64, most: usize) -> Result<Guard, Arc<Target>> {
        let mut shard = self.shard(&mark);
        let flights = shard.entry(mark).or_default();
        let unanswered = flights.iter().filter_map(Flight::unanswered).nth(most - 1).cloned();
        if let Some(target) = unanswered {
            return Err(target);
        }
        flights.push(Flight { id, sent: None });
        drop(shard);
        Ok(Guard { all: self.clone(), mark, id })
    }

    fn shard(&self, mark: &Mark) -> MutexGuard<'_, HashMap<Mark, Vec<Flight>>> {
        self.shards[usize::from(mark[0]) % SHARDS].lock().expect("no panic while held")
    }
}

/// A hello in flight.
#[derive(Debug)]
pub struct Guard {
    all: Arc<InFlight>,
    mark: Mark,
    id: u64,
}

impl Guard {
    /// It is about to be sent to this target.
    pub fn sent(&self, target: &Arc<Target>, traffic: &Arc<Traffic>) {
        if let Some(flights) = self.all.shard(&self.mark).get_mut(&self.mark)
            && let Some(flight) = flights.iter_mut().find(|flight| flight.id == self.id)
        {
            flight.sent = Some((target.clone(), Arc::downgrade(traffic)));
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut shard = self.all.shard(&self.mark);
        if let Entry::Occupied(mut flights) = shard.entry(self.mark) {
            flights.get_mut().retain(|flight| flight.id != self.id);
            if flights.get().is_empty() {
                flights.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Source, parse};
    use crate::engine::{Kind, Path};
    use crate::metrics::Metrics;
    use crate::upstream::Pool;

    fn target() -> Arc<Target> {
        let text = "[listeners.a]\nmode = \"tcp\"\nbind = [\"192.0.2.1:1\"]\nupstream = \"u\"\n[upstreams.u]\ntargets = [\"192.0.2.2:1\"]\n";
        let config = parse(Arc::new(Source::new("test.toml", text.to_owned()))).unwrap().0;
        Pool::new(&config.upstreams[0], None, &Arc::default(), &Metrics::new().upstreams).targets()[0].clone()
    }

    #[test]
    fn a_hello_that_comes_back_is_a_loop_and_names_the_target() {
        let (all, target, random) = (Arc::new(InFlight::default()), target(), [7; 32]);
        let first = all.hello(random, 0).unwrap();
        assert!(all.hello(random, 1).is_ok(), "nothing was sent yet, so it cannot have come back");
        let traffic = Arc::new(Traffic::by(Kind::Copy));
        first.sent(&target, &traffic);
        let back = all.hello(random, 2).unwrap_err();
        assert_eq!(back.text(), target.text());
        assert!(all.hello([8; 32], 3).is_ok());
        traffic.to_client.add(Path::Userspace, 1);
        assert!(all.hello(random, 4).is_ok(), "the target has answered: it is no circle");
        drop(first);
        assert!(all.shard(&random).is_empty(), "nothing is left");
    }

    #[test]
    fn several_may_ask_for_one_challenge_but_not_without_end() {
        let (all, target) = (Arc::new(InFlight::default()), target());
        let mut under_way = Vec::new();
        let refused = (0..10_000).find(|n| {
            let Ok(guard) = all.challenge(b"GET /token", *n) else { return true };
            let traffic = Arc::new(Traffic::by(Kind::Copy));
            guard.sent(&target, &traffic);
            under_way.push((guard, traffic));
            false
        });
        assert_eq!(refused, Some(CHALLENGED as u64));
    }
}
