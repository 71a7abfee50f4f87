//! systemd's file descriptor store (sd_notify(3), FDSTORE): what waits there outlives the process.
//!
//! It costs PID 1 time that grows with the square of the number of entries, so there are only a few
//! of them: packages.

use std::os::fd::OwnedFd;

use anyhow::Result;

use super::Package;
use crate::moment::Moment;
use crate::systemd;

/// A package of listening sockets and connections, for the next start.
pub const HANDOVER: &str = "h";

/// What the names of packages of listening sockets alone begin with: they are there in case the
/// process is killed.
const LISTENING: &str = "l";

/// What is in the store.
#[derive(Debug, Default)]
pub struct Stored {
    pub handover: Option<Package>,
    /// The newest of them.
    pub listening: Option<Package>,
    /// The names of all of them.
    pub names: Vec<String>,
}

/// A name for a package of listening sockets that none has had before.
pub fn name() -> String {
    format!("{LISTENING}{}", Moment::now().as_micros())
}

/// Takes what systemd has passed to this process. To be asked once, when it has just started.
pub fn take() -> Stored {
    let mut stored = Stored::default();
    let mut packages: Vec<(String, Vec<OwnedFd>)> = Vec::new();
    for (descriptor, name) in systemd::passed_descriptors() {
        match packages.iter_mut().find(|(known, _)| *known == name) {
            Some((_, all)) => all.push(descriptor),
            None => packages.push((name, vec![descriptor])),
        }
    }
    let mut newest = None;
    for (name, descriptors) in packages {
        if name.starts_with(LISTENING) {
            stored.names.push(name.clone());
        }
        let package = match Package::from_descriptors(descriptors) {
            Ok(package) => package,
            Err(error) => {
                tracing::warn!(name, error = format!("{error:#}"), "descriptors in systemd's store are not of use");
                continue;
            }
        };
        if name == HANDOVER {
            stored.handover = Some(package);
        } else {
            let stopped = package.offer().ok().map(|offer| offer.stopped);
            if stopped >= newest {
                newest = stopped;
                stored.listening = Some(package);
            }
        }
    }
    stored
}

/// Puts a package there, and waits until it is.
pub fn put(name: &str, package: &Package) -> Result<()> {
    // Not polled: what has no other end would be thrown away at once.
    systemd::notify_with(&format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0\n"), &package.descriptors())?;
    systemd::barrier()
}

/// Removes one, if it is there.
pub fn remove(name: &str) {
    let _ = systemd::notify_with(&format!("FDSTOREREMOVE=1\nFDNAME={name}\n"), &[]);
}
