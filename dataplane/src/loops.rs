//! Whether a connection is one of our own that came back: a target that is this machine behind NAT,
//! or another entrance node that sends it here again.
//!
//! Addresses do not tell. A hello does: its random is 32 bytes that no two clients choose (RFC 8446
//! section 4.1.2). One that was sent to a target, which has answered nothing yet, and that comes in
//! again, has gone in a circle. Of an ACME challenge the token is as unique; but an authority asks
//! for it from several places at once, so that only their number tells.
//!
//! On a forwarded port there is nothing to recognise. What tells there is that a loop never gets a
//! byte: how many connections of one client still wait for their first one. Clients that a service
//! leaves without a word look the same, so many are let through before that, and each address has
//! its own count: a loop comes from the few addresses that its nodes dial from.
//!
//! It must not know how bytes move. What is remembered of a connection goes with it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use sha2::{Digest, Sha256};

use crate::engine::Traffic;
use crate::upstream::Target;

/// What tells a request from all others: a hello's random, or a digest of a challenge.
pub type Mark = [u8; 32];

/// Requests for one challenge that may be under way: authorities ask from five to ten places (RFC
/// 8555 section 11.2 says why).
const CHALLENGED: usize = 32;

/// Locks, so that workers seldom wait for each other.
const SHARDS: usize = 16;

/// The hellos of the connections that there are.
#[derive(Debug, Default)]
pub struct InFlight {
    shards: [Mutex<HashMap<Mark, Vec<Flight>>>; SHARDS],
}

/// One that was sent to a target.
#[derive(Debug)]
struct Flight {
    id: u64,
    target: Arc<Target>,
    /// What has come back.
    traffic: Weak<Traffic>,
}

impl Flight {
    fn is_unanswered(&self) -> bool {
        self.traffic.upgrade().is_some_and(|traffic| traffic.look().is_unanswered())
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

    /// The same of a connection that nothing is known of but where it came from: it is a loop
    /// beyond `most` that wait for their first byte.
    ///
    /// # Errors
    /// As for a hello.
    pub fn connection(
        self: &Arc<Self>,
        listener: &str,
        client: IpAddr,
        id: u64,
        most: usize,
    ) -> Result<Guard, Arc<Target>> {
        let mark = Sha256::new().chain_update(listener).chain_update([0]).chain_update(client.to_string()).finalize();
        self.enter(mark.into(), id, most)
    }

    /// Remembers one that was let in and sent by another process.
    pub fn adopt(self: &Arc<Self>, mark: Mark, id: u64) -> Guard {
        Guard { all: self.clone(), mark, id }
    }

    /// `most`: how often the mark may be under way.
    fn enter(self: &Arc<Self>, mark: Mark, id: u64, most: usize) -> Result<Guard, Arc<Target>> {
        if let Some(flights) = self.shard(&mark).get_mut(&mark) {
            // What was answered once is no loop ever after: the list stays short however many
            // connections there are.
            flights.retain(Flight::is_unanswered);
            if let Some(flight) = flights.get(most - 1) {
                return Err(flight.target.clone());
            }
        }
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
    /// What tells it from all others.
    pub fn mark(&self) -> Mark {
        self.mark
    }

    /// It is about to be sent to this target.
    pub fn sent(&self, target: &Arc<Target>, traffic: &Arc<Traffic>) {
        let flight = Flight { id: self.id, target: target.clone(), traffic: Arc::downgrade(traffic) };
        self.all.shard(&self.mark).entry(self.mark).or_default().push(flight);
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

    #[test]
    fn only_connections_of_one_client_that_wait_for_their_first_byte_make_a_loop() {
        let (all, target, most) = (Arc::new(InFlight::default()), target(), 64);
        let (client, other) = (IpAddr::from([192, 0, 2, 7]), IpAddr::from([192, 0, 2, 8]));
        let mut open = Vec::new();
        let mut connect = |listener: &str, client, answered: bool| {
            let guard = all.connection(listener, client, open.len() as u64, most)?;
            let traffic = Arc::new(Traffic::by(Kind::Copy));
            guard.sent(&target, &traffic);
            if answered {
                traffic.to_client.add(Path::Kernel, 1);
            }
            open.push((guard, traffic));
            Ok::<_, Arc<Target>>(())
        };
        for _ in 0..1000 {
            assert!(connect("git", client, true).is_ok(), "whoever is served may come as often as they like");
        }
        for _ in 0..most {
            assert!(connect("git", client, false).is_ok() && connect("git", other, false).is_ok());
        }
        assert_eq!(connect("git", client, false).unwrap_err().text(), target.text());
        assert!(connect("mail", client, false).is_ok(), "another port is another matter");
        open[1000].1.to_client.add(Path::Userspace, 1);
        assert!(all.connection("git", client, 9999, most).is_ok(), "one of them was answered");
        drop(open);
        assert!(all.shards.iter().all(|shard| shard.lock().unwrap().is_empty()), "nothing is left");
    }
}
