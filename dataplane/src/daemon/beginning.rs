//! What a start begins with: which configuration, and which of its addresses.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Result, bail};

use super::binding::{Bound, bind_each};
use crate::handover::Offer;
use crate::shared::Waiting;
use crate::source::{self, Loaded};

/// What the daemon starts with.
pub(super) struct Beginning {
    pub(super) loaded: Loaded,
    pub(super) listening: Bound,
    pub(super) waiting: Vec<Waiting>,
    /// Why some of the addresses are not listened on.
    pub(super) missing: Option<String>,
    /// The predecessor listens on some of its addresses.
    inherits: bool,
}

impl Beginning {
    /// The commit that is kept, or else the newest. One of which some addresses cannot be bound is
    /// served with the others, those that may still come among them: what mends it is in the
    /// repository, which is looked at from then on. One of which none can be bound now gives way to
    /// the newest.
    ///
    /// What the predecessor listens on, if there is one, is not bound: it comes later.
    pub(super) fn find(path: &Path, workers: usize, offer: Option<&Offer>) -> Result<Self> {
        let offered = offer.map(Offer::public).unwrap_or_default();
        let (loaded, not_kept) = source::at_start(path, offer.and_then(|offer| offer.commit.as_ref()))?;
        if let Some(why) = &not_kept {
            tracing::info!(why, "the repository was asked");
        }
        let is_kept = loaded.snapshot.is_some() && not_kept.is_none();
        let first = Self::bind(loaded, workers, &offered);
        // Its addresses may be gone for good, and the newest commit knows better.
        let gives_way = is_kept
            && !first.inherits
            && first.listening.is_empty()
            && !(first.waiting.is_empty() && first.missing.is_none());
        if !gives_way {
            return first.or_refuse();
        }
        let errors = first.missing.as_deref().unwrap_or_default();
        tracing::error!(errors, "the commit that is kept cannot be put in force: the newest is fetched");
        let why = match source::newest(path, |_| ()) {
            Ok(newest) => {
                let newest = Self::bind(newest, workers, &offered);
                if newest.serves() || !first.serves() {
                    return newest.or_refuse();
                }
                newest.missing.unwrap_or_default()
            }
            // It may be the network that is missing, and with it the address.
            Err(error) => error.to_string(),
        };
        Self { missing: Some(format!("{errors}{why}")), ..first }.or_refuse()
    }

    fn bind(loaded: Loaded, workers: usize, offered: &[SocketAddr]) -> Self {
        let (listening, waiting, errors) = bind_each(&loaded.config, offered, workers);
        let missing = (!errors.is_empty()).then_some(errors);
        let mut binds = loaded.config.listeners.iter().flat_map(|listener| &listener.bind);
        let inherits = binds.any(|bind| offered.contains(&bind.addr));
        Self { loaded, listening, waiting, missing, inherits }
    }

    /// Whether there is anything to listen on, now or when it comes.
    fn serves(&self) -> bool {
        self.inherits || !(self.listening.is_empty() && self.waiting.is_empty())
    }

    /// What can be served is, where a repository may mend the rest.
    fn or_refuse(self) -> Result<Self> {
        let Some(errors) = &self.missing else { return Ok(self) };
        if self.loaded.snapshot.is_none() || !self.serves() {
            bail!("{errors}");
        }
        tracing::error!(errors, "the configuration is in force in part; the repository is looked at for a better one");
        Ok(self)
    }
}
