//! How many connections may exist: in all, and for one client.
//!
//! Counts only; what happens to a connection that is one too many is decided by who asks.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

/// The counts of the process.
#[derive(Debug, Default)]
pub struct Admission {
    open: AtomicUsize,
    max: AtomicUsize,
    clients: Mutex<HashMap<IpAddr, u32>>,
}

/// A connection's place in the total.
#[derive(Debug)]
pub struct Place(Arc<Admission>);

/// A connection's place among its client's.
#[derive(Debug)]
pub struct ClientPlace {
    admission: Arc<Admission>,
    client: IpAddr,
}

impl Admission {
    /// Sets the most that may be open at once.
    pub fn set_max(&self, max: usize) {
        self.max.store(max, SeqCst);
    }

    /// The most that may be open at once.
    pub fn max(&self) -> usize {
        self.max.load(SeqCst)
    }

    /// Connections that are open, from accept on.
    pub fn open(&self) -> usize {
        self.open.load(SeqCst)
    }

    /// A place in the total, if one is free.
    pub fn enter(self: &Arc<Self>) -> Option<Place> {
        let place = Place(self.clone());
        (self.open.fetch_add(1, SeqCst) < self.max()).then_some(place)
    }

    /// A place among the connections of one client, of which there may be `max`.
    pub fn enter_client(self: &Arc<Self>, client: IpAddr, max: u32) -> Option<ClientPlace> {
        let client = client_key(client);
        let mut clients = self.clients.lock().expect("no panic while held");
        let count = clients.entry(client).or_insert(0);
        if *count >= max {
            return None;
        }
        *count += 1;
        Some(ClientPlace { admission: self.clone(), client })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, SeqCst);
    }
}

impl Drop for ClientPlace {
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

    #[test]
    fn a_place_is_free_again_when_it_is_dropped() {
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
