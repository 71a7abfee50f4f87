//! What outlives a reload and is common to all upstreams: the last good answer for each name, and
//! which targets are one machine.
//!
//! It must not know what is done with either.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, Weak};

use super::Target;
use crate::config::{self, TargetHost};

/// One for the life of the daemon.
#[derive(Debug, Default)]
pub struct Inventory {
    answers: Mutex<HashMap<String, Arc<[IpAddr]>>>,
    endpoints: Mutex<HashMap<(String, u16), Weak<Endpoint>>>,
}

/// A host and port. Targets of several upstreams may have it in common: what one learns of it, all
/// know.
#[derive(Debug, Default)]
pub struct Endpoint {
    /// Dials that have waited for longer than `hedge_delay`.
    pub overdue: AtomicU32,
    /// Members that are down: while there are none, a dial that passed is no news.
    pub down: AtomicU32,
    members: Mutex<Vec<Weak<Target>>>,
}

impl Inventory {
    /// The last good answer for a name.
    pub fn last_answer(&self, name: &str) -> Option<Arc<[IpAddr]>> {
        self.answers.lock().expect("no panic while held").get(&normal(name)).cloned()
    }

    /// All last good answers.
    pub fn answers(&self) -> BTreeMap<String, Vec<IpAddr>> {
        let answers = self.answers.lock().expect("no panic while held");
        answers.iter().map(|(name, answer)| (name.clone(), answer.to_vec())).collect()
    }

    /// Keeps a good answer.
    pub fn remember(&self, name: &str, addresses: &[IpAddr]) {
        self.answers.lock().expect("no panic while held").insert(normal(name), addresses.into());
    }

    /// Forgets what no target of these configurations asks for.
    pub fn retain<'c>(&self, configs: impl IntoIterator<Item = &'c config::Config>) {
        let targets = configs.into_iter().flat_map(|config| &config.upstreams).flat_map(|upstream| &upstream.targets);
        let names: HashSet<String> = targets.map(|target| host(&target.host)).collect();
        self.answers.lock().expect("no panic while held").retain(|name, _| names.contains(name));
        self.endpoints.lock().expect("no panic while held").retain(|_, endpoint| endpoint.strong_count() > 0);
    }

    /// The endpoint of a target.
    pub fn endpoint(&self, target: &config::Target) -> Arc<Endpoint> {
        let mut endpoints = self.endpoints.lock().expect("no panic while held");
        let known = endpoints.entry((host(&target.host), target.port)).or_default();
        known.upgrade().unwrap_or_else(|| {
            let endpoint = Arc::default();
            *known = Arc::downgrade(&endpoint);
            endpoint
        })
    }
}

impl Endpoint {
    /// Adds a target.
    pub fn join(&self, target: &Arc<Target>) {
        let mut members = self.members.lock().expect("no panic while held");
        members.retain(|member| member.strong_count() > 0);
        members.push(Arc::downgrade(target));
    }

    /// The targets that are there beside this one.
    pub fn others(&self, target: &Target) -> Vec<Arc<Target>> {
        let members = self.members.lock().expect("no panic while held");
        members.iter().filter_map(Weak::upgrade).filter(|member| !std::ptr::eq(&raw const **member, target)).collect()
    }
}

fn host(host: &TargetHost) -> String {
    match host {
        TargetHost::Ip(ip) => ip.to_canonical().to_string(),
        TargetHost::Name(name) => normal(name),
    }
}

/// Names are equal whatever their case, and with or without the last dot (RFC 4343, RFC 1034
/// section 3.1).
pub fn normal(name: &str) -> String {
    name.trim_end_matches('.').to_ascii_lowercase()
}
