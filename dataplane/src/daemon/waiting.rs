//! Addresses that this machine does not have yet, tailscale0's at boot above all: they stop
//! nothing, and are tried again. When one has come and something else is in its way, that is told
//! instead.

use std::net::SocketAddr;

use sd_notify::NotifyState;

use super::Daemon;
use super::binding::try_webhook;
use crate::listen;
use crate::shared::{Role, Waiting};
use crate::systemd::notify;

impl Daemon {
    /// Whether there are any.
    pub(super) fn waits(&self) -> bool {
        !self.shared.waiting.lock().expect("no panic while held").is_empty()
    }

    /// From now on tries these addresses again, and no others.
    pub(super) fn wait_for(&self, waiting: Vec<Waiting>) {
        for waiting in &waiting {
            tell(waiting);
        }
        self.tell_waiting(waiting);
    }

    /// For `status`, `/readyz`, metrics and systemd.
    fn tell_waiting(&self, waiting: Vec<Waiting>) {
        let generation = self.shared.generation.load();
        let listeners = generation.config.listeners.iter().flat_map(|l| l.bind.iter().map(|b| (&*l.name, b.addr)));
        let is_bound = |addr: SocketAddr| waiting.iter().all(|waiting| waiting.addr != addr);
        let mut all: Vec<_> = listeners.map(|(name, addr)| (name, addr, self.listening.contains_key(&addr))).collect();
        let admin = generation.config.admin.bind.addr;
        all.push(("admin", admin, is_bound(admin)));
        if let Some(webhook) = generation.config.webhook() {
            all.push(("webhook", webhook.bind.addr, is_bound(webhook.bind.addr)));
        }
        self.shared.metrics.listen.set_bound(all);
        *self.shared.waiting.lock().expect("no panic while held") = waiting;
        self.tell_status();
    }

    /// For systemd.
    pub(super) fn tell_status(&self) {
        let waiting = self.shared.waiting.lock().expect("no panic while held");
        let text = match &waiting[..] {
            [] => "serving".to_owned(),
            some => {
                let some: Vec<_> = some.iter().map(|w| format!("{} ({}): {}", w.addr, w.role, w.reason())).collect();
                format!("serving; not listening on {}", some.join("; "))
            }
        };
        drop(waiting);
        notify(&[NotifyState::Status(&text)]);
    }

    /// Tries each of the addresses that were missing. What is in the way is told when that changes.
    pub(super) fn try_waiting(&mut self) {
        let generation = self.shared.generation.load_full();
        let waiting = self.shared.waiting.lock().expect("no panic while held").clone();
        let mut changed = false;
        let mut left = Vec::new();
        for mut one in waiting {
            let bound = match &one.role {
                Role::Listener(_) => {
                    let beside = self
                        .listening
                        .keys()
                        .any(|bound| bound.port() == one.addr.port() && bound.is_ipv4() == one.addr.is_ipv4());
                    listen::bind(one.addr, self.workers.len(), beside)
                        .and_then(|sockets| self.listen(one.addr, sockets))
                }
                Role::Admin => listen::bind_one(one.addr).and_then(|tcp| self.serve_metrics(tcp)),
                Role::Webhook => generation.config.webhook().map_or(Ok(()), |webhook| {
                    try_webhook(webhook, None).map(|serving| self.serve_webhook(Some(serving)))
                }),
            };
            match bound {
                Ok(()) => {
                    changed = true;
                    tracing::info!(addr = %one.addr, role = %one.role, "listening");
                }
                Err(error) => {
                    if one.fails_otherwise(&error) {
                        changed = true;
                        tell(&one);
                    }
                    left.push(one);
                }
            }
        }
        if changed {
            self.tell_waiting(left);
            self.keep_sockets();
        }
    }
}

fn tell(waiting: &Waiting) {
    tracing::warn!(
        addr = %waiting.addr,
        role = %waiting.role,
        why = waiting.reason(),
        "not listening there yet: it is tried again each second"
    );
}
