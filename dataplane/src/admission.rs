//! How many connections may exist: in all, for one client, and of those that have not said yet what
//! they want.
//!
//! Counts only; what happens to a connection that is one too many is decided by who asks.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::timeout;

/// The counts of the process.
#[derive(Debug, Default)]
pub struct Admission {
    open: AtomicUsize,
    max: AtomicUsize,
    clients: Mutex<HashMap<IpAddr, u32>>,
    lobby: Mutex<Lobby>,
    /// A permit was given back.
    freed: Notify,
}

/// A permit to be one of all connections.
#[derive(Debug)]
pub struct Permit(Arc<Admission>);

/// A connection's permit among its client's.
#[derive(Debug)]
pub struct ClientPermit {
    admission: Arc<Admission>,
    client: IpAddr,
}

/// However few connections there may be in all, so many may be about to send their hello.
const FEWEST: usize = 16;

/// How long one that has to give way may take to be gone, and after what time another has to.
const GONE: Duration = Duration::from_secs(1);
const ANOTHER: Duration = Duration::from_millis(20);

/// The connections that have not sent their hello, oldest first.
#[derive(Debug, Default)]
struct Lobby {
    next: u64,
    guests: BTreeMap<u64, (Option<IpAddr>, Arc<Notify>)>,
    of_clients: HashMap<IpAddr, BTreeSet<u64>>,
}

/// A connection's stay in the lobby.
#[derive(Debug)]
pub struct Guest {
    admission: Arc<Admission>,
    number: u64,
    leave: Arc<Notify>,
}

impl Guest {
    /// Waits until it has to give way to a newer one.
    pub async fn gives_way(&self) {
        self.leave.notified().await;
    }
}

impl Lobby {
    fn remove(&mut self, number: u64) -> Option<Arc<Notify>> {
        let (client, leave) = self.guests.remove(&number)?;
        if let Some(client) = client
            && let Some(numbers) = self.of_clients.get_mut(&client)
        {
            numbers.remove(&number);
            if numbers.is_empty() {
                self.of_clients.remove(&client);
            }
        }
        Some(leave)
    }
}

impl Admission {
    /// Sets the most that may be open at once.
    pub fn set_max(&self, max: usize) {
        self.max.store(max, SeqCst);
    }

    /// Lets a connection in that has not sent its hello. Those may be half of all, and of one
    /// client a sixteenth of that; where there are more, the oldest gives way: a client that means
    /// it sends its hello at once. `None`: who the client is comes later, in a PROXY header.
    pub fn enter_lobby(self: &Arc<Self>, client: Option<IpAddr>) -> Guest {
        let client = client.map(client_key);
        let (most, most_of_client) = ((self.max() / 2).max(FEWEST), self.share_of_client());
        let leave = Arc::new(Notify::new());
        let mut lobby = self.lobby.lock().expect("no panic while held");
        let number = lobby.next;
        lobby.next += 1;
        lobby.guests.insert(number, (client, leave.clone()));
        let of_client = client.and_then(|client| {
            let numbers = lobby.of_clients.entry(client).or_default();
            numbers.insert(number);
            numbers.first().copied().filter(|_| numbers.len() > most_of_client)
        });
        let oldest = if of_client.is_some() {
            of_client
        } else if lobby.guests.len() > most {
            lobby.guests.first_key_value().map(|(number, _)| *number)
        } else {
            None
        };
        if let Some(leave) = oldest.and_then(|oldest| lobby.remove(oldest)) {
            // Kept for whoever does not wait yet.
            leave.notify_one();
        }
        drop(lobby);
        Guest { admission: self.clone(), number, leave }
    }

    /// How many of one client may be in a state in which nothing has come of them yet.
    pub fn share_of_client(&self) -> usize {
        (self.max() / 32).max(FEWEST)
    }

    /// The most that may be open at once.
    pub fn max(&self) -> usize {
        self.max.load(SeqCst)
    }

    /// Connections that are open, from accept on.
    pub fn open(&self) -> usize {
        self.open.load(SeqCst)
    }

    /// A permit, if one is free.
    pub fn enter(self: &Arc<Self>) -> Option<Permit> {
        let max = self.max();
        let entered = self.open.fetch_update(SeqCst, SeqCst, |open| (open < max).then_some(open + 1));
        entered.is_ok().then(|| Permit(self.clone()))
    }

    /// A permit for a connection that another process let in: beyond the most, if it has to be.
    pub fn adopt(self: &Arc<Self>) -> Permit {
        self.open.fetch_add(1, SeqCst);
        Permit(self.clone())
    }

    /// The same among its client's.
    pub fn adopt_client(self: &Arc<Self>, client: IpAddr) -> ClientPermit {
        let client = client_key(client);
        *self.clients.lock().expect("no panic while held").entry(client).or_insert(0) += 1;
        ClientPermit { admission: self.clone(), client }
    }

    /// A permit; where all are taken, the oldest connection that has not sent its hello gives way,
    /// and this waits until it is gone. `None`: none is left that could.
    pub async fn enter_or_displace(self: &Arc<Self>) -> Option<Permit> {
        let displace = async {
            loop {
                // Listens before it looks, so that no release falls in between.
                let mut freed = pin!(self.freed.notified());
                freed.as_mut().enable();
                if let Some(permit) = self.enter() {
                    return Some(permit);
                }
                let oldest = {
                    let mut lobby = self.lobby.lock().expect("no panic while held");
                    let oldest = lobby.guests.first_key_value().map(|(number, _)| *number);
                    oldest.and_then(|number| lobby.remove(number))?
                };
                oldest.notify_one();
                // One whose hello has just come may stay: then it is the next one's turn.
                let _ = timeout(ANOTHER, freed).await;
            }
        };
        match self.enter() {
            Some(permit) => Some(permit),
            None => timeout(GONE, displace).await.unwrap_or(None),
        }
    }

    /// A permit for a connection of one client, which may have `max`.
    pub fn enter_client(self: &Arc<Self>, client: IpAddr, max: u32) -> Option<ClientPermit> {
        let client = client_key(client);
        let mut clients = self.clients.lock().expect("no panic while held");
        let count = clients.entry(client).or_insert(0);
        if *count >= max {
            return None;
        }
        *count += 1;
        Some(ClientPermit { admission: self.clone(), client })
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.admission.lobby.lock().expect("no panic while held").remove(self.number);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, SeqCst);
        self.0.freed.notify_one();
    }
}

impl Drop for ClientPermit {
    fn drop(&mut self) {
        let mut clients = self.admission.clients.lock().expect("no panic while held");
        if let Some(count) = clients.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                clients.remove(&self.client);
            }
        }
    }
}

/// An IPv6 customer has a /64 at least, so that is one client.
fn client_key(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => ip,
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from(u128::from(v6) & (!0 << 64))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn gave_way(guest: &Guest) -> bool {
        tokio::time::timeout(std::time::Duration::ZERO, guest.gives_way()).await.is_ok()
    }

    #[tokio::test]
    async fn of_those_that_say_nothing_the_oldest_gives_way_and_of_one_client_its_own() {
        let admission = Arc::new(Admission::default());
        admission.set_max(1000);
        let from = |n: usize| IpAddr::from([192, 0, (n / 256) as u8, n as u8]);
        let one = IpAddr::from([203, 0, 113, 1]);
        let early = admission.enter_lobby(Some(from(0)));
        let of_one: Vec<_> = (0..40).map(|_| admission.enter_lobby(Some(one))).collect();
        // 500 / 16
        assert!(gave_way(&of_one[0]).await && gave_way(&of_one[8]).await && !gave_way(&of_one[9]).await);
        assert!(!gave_way(&early).await, "a client that opens many costs nobody else");
        let others: Vec<_> = (1..=500).map(|n| admission.enter_lobby(Some(from(n)))).collect();
        assert!(gave_way(&early).await && gave_way(&of_one[39]).await && !gave_way(&others[0]).await);
        assert_eq!(admission.lobby.lock().unwrap().guests.len(), 500);
        drop((early, of_one, others));
        let proxied: Vec<_> = (0..100).map(|_| admission.enter_lobby(None)).collect();
        assert!(!gave_way(&proxied[0]).await, "whoever is in front of us is not one client");
        drop(proxied);
        let lobby = admission.lobby.lock().unwrap();
        assert!(lobby.guests.is_empty() && lobby.of_clients.is_empty(), "nothing is left over");
    }

    #[tokio::test]
    async fn where_all_permits_are_taken_who_has_said_nothing_gives_way() {
        let admission = Arc::new(Admission::default());
        admission.set_max(10);
        let mut established: Vec<_> = (0..8).map(|_| admission.enter().unwrap()).collect();
        let silent = |n: u8| {
            let (admission, permit) = (admission.clone(), admission.enter().unwrap());
            tokio::spawn(async move {
                let guest = admission.enter_lobby(Some([192, 0, 2, n].into()));
                guest.gives_way().await;
                drop(permit);
            })
        };
        let (first, second) = (silent(1), silent(2));
        tokio::task::yield_now().await;
        established.push(admission.enter_or_displace().await.expect("the oldest gives way"));
        assert!(first.await.is_ok() && !second.is_finished());
        established.push(admission.enter_or_displace().await.expect("and the next one"));
        second.await.unwrap();
        assert!(admission.enter_or_displace().await.is_none(), "those that were let in stay");
        assert_eq!(admission.open(), 10);
    }

    #[test]
    fn a_permit_is_free_again_when_it_is_dropped() {
        let admission = Arc::new(Admission::default());
        admission.set_max(1);
        let first = admission.enter().unwrap();
        assert!(admission.enter().is_none());
        assert_eq!(admission.open(), 1);
        drop(first);
        assert!(admission.enter().is_some());
    }

    #[test]
    fn a_slash_64_is_one_client_and_so_is_an_ipv4_address() {
        let admission = Arc::new(Admission::default());
        let first = admission.enter_client("2001:db8:0:1::1".parse().unwrap(), 1).unwrap();
        assert!(admission.enter_client("2001:db8:0:1:ffff::2".parse().unwrap(), 1).is_none());
        assert!(admission.enter_client("2001:db8:0:2::1".parse().unwrap(), 1).is_some());
        let _v4 = admission.enter_client("192.0.2.1".parse().unwrap(), 1).unwrap();
        assert!(admission.enter_client("192.0.2.1".parse().unwrap(), 1).is_none());
        assert!(admission.enter_client("192.0.2.2".parse().unwrap(), 1).is_some());
        drop(first);
        assert!(admission.enter_client("2001:db8:0:1::1".parse().unwrap(), 1).is_some());
        assert_eq!(admission.clients.lock().unwrap().len(), 1);
    }
}
