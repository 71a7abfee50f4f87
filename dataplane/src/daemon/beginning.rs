//! What a start begins with: which configuration, and which of its addresses.

use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;

use anyhow::{Result, bail};

use super::binding::bind_each;
use crate::shared::Waiting;
use crate::source::{self, Loaded};

/// What the daemon starts with.
pub(super) struct Beginning {
    pub(super) loaded: Loaded,
    pub(super) listening: HashMap<SocketAddr, Vec<TcpListener>>,
    pub(super) waiting: Vec<Waiting>,
    /// Why some of the addresses are not listened on.
    pub(super) missing: Option<String>,
}

impl Beginning {
    /// The commit that is kept, or else the newest. One of which some addresses cannot be bound is served with the others: what mends it is in the repository, which
    /// is looked at from then on. One of which none can be bound gives way to the newest.
    pub(super) fn find(path: &Path, workers: usize) -> Result<Self> {
        let (loaded, not_kept) = source::at_start(path)?;
        if let Some(why) = &not_kept {
            tracing::info!(why, "the repository was asked");
        }
        let (listening, waiting, errors) = bind_each(&loaded.config, &[], workers);
        let is_kept = loaded.snapshot.is_some() && not_kept.is_none();
        // Its addresses may be gone for good, and the newest commit knows better.
        let gone = listening.is_empty() && !waiting.is_empty() && is_kept;
        if errors.is_empty() && !gone {
            return Ok(Self { loaded, listening, waiting, missing: None });
        }
        if loaded.snapshot.is_none() {
            bail!(errors);
        }
        if !listening.is_empty() {
            tracing::error!(
                errors,
                "the configuration is in force in part; the repository is looked at for a better one"
            );
            return Ok(Self { loaded, listening, waiting, missing: Some(errors) });
        }
        if !is_kept {
            bail!(errors);
        }
        tracing::error!(errors, "the commit that is kept cannot be put in force: the newest is fetched");
        let newest = source::newest(path, |_| ());
        let loaded = match newest {
            Ok(newest) => newest,
            // It may be the network that is missing, and with it the address.
            Err(error) if errors.is_empty() => {
                let missing = Some(format!("{error}"));
                return Ok(Self { loaded, listening, waiting, missing });
            }
            Err(error) => return Err(anyhow::Error::from(error).context(errors)),
        };
        let (listening, waiting, errors) = bind_each(&loaded.config, &[], workers);
        if listening.is_empty() && waiting.is_empty() {
            bail!(errors);
        }
        let missing = (!errors.is_empty()).then_some(errors);
        Ok(Self { loaded, listening, waiting, missing })
    }
}
