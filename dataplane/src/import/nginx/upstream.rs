//! One `upstream` block of nginx.

use std::collections::HashSet;

use super::super::syntax::{Directive, Place, named};
use super::notes::Notes;
use crate::config::{Target, TargetHost};

/// What a block comes to.
#[derive(Debug, Clone)]
pub struct Members {
    /// At least one, each once.
    pub targets: Vec<Target>,
    /// How to choose among several: the value of `balance`.
    pub balance: &'static str,
    /// For each target; 0: no limit.
    pub max_connections: u32,
}

impl Members {
    /// Of one target that has no block.
    pub fn one(target: Target) -> Self {
        Self { targets: vec![target], balance: ROUND_ROBIN, max_connections: 0 }
    }

    /// Whether the client's address chooses the target.
    pub fn is_hashed(&self) -> bool {
        self.targets.len() > 1 && self.balance == HASH
    }
}

const ROUND_ROBIN: &str = "round-robin";
const HASH: &str = "hash";

/// `host:port`, if it is one that can be a target.
pub fn target(text: &str) -> Result<Target, String> {
    if text.starts_with("unix:") {
        return Err("targets are reached by TCP".into());
    }
    if !text.is_ascii() {
        return Err("nginx looks up the bytes as they are, no name has such; write its ASCII form (xn--…)".into());
    }
    Target::parse(text, 0..0).map_err(|refused| format!("{}; {}", refused.message, refused.remedy))
}

/// Whether a target has to be looked up.
pub fn is_name(target: &Target) -> bool {
    matches!(&target.host, TargetHost::Name(name) if name != "localhost")
}

/// Reads a block. `None`: no target is left, and that was told.
pub fn read(block: &Directive, notes: &mut Notes) -> Option<Members> {
    let name = block.text();
    let mut balance = ROUND_ROBIN;
    let (mut first, mut backups) = (Vec::new(), Vec::new());
    for directive in block.inside() {
        let place = &directive.place;
        match &*directive.name {
            "server" => {
                let Some(address) = directive.words.first() else { continue };
                let options = &directive.words[1..];
                if options.iter().any(|option| option == "down") {
                    notes.changed(place, format!("`{address}` is not carried over: it is down"));
                    continue;
                }
                if options.iter().any(|option| option.starts_with("service=")) {
                    notes.lost(place, format!("`{address}` is not carried over: SRV records are not looked up"));
                    continue;
                }
                let target = match target(address) {
                    Ok(target) => target,
                    Err(why) => {
                        notes.lost(place, format!("`{address}` is not carried over: {why}"));
                        continue;
                    }
                };
                let limit = options.iter().find_map(|o| o.strip_prefix("max_conns=")).unwrap_or("0");
                if options.iter().any(|option| option == "backup") {
                    backups.push((target, limit, place));
                } else {
                    first.push((target, limit, place));
                }
                for option in options {
                    match option.split_once('=').map_or(&**option, |(key, _)| key) {
                        "weight" if option != "weight=1" => {
                            notes.lost(place, format!("`{option}` is not carried over: targets have no weights"));
                        }
                        "max_fails" | "fail_timeout" | "resolve" => {
                            notes.needless_part(place, option.split('=').next().unwrap_or(option));
                        }
                        "weight" | "max_conns" | "backup" => {}
                        _ => notes.lost(place, format!("`{option}` is not carried over: it has no counterpart")),
                    }
                }
            }
            "least_conn" => balance = "least-connections",
            "hash"
                if matches!(
                    directive.words.first().map(String::as_str),
                    Some("$remote_addr" | "$binary_remote_addr")
                ) =>
            {
                balance = HASH;
            }
            "hash" => notes.lost(
                place,
                format!(
                    "`hash {}` is not carried over: only the client's address is hashed (balance = \"hash\")",
                    directive.text()
                ),
            ),
            "zone" => notes.needless(directive),
            "resolver" | "resolver_timeout" => {}
            "include" if directive.is_missing_file() => notes.lost(
                place,
                format!("`include {}`: there is no such file here; its targets are not carried over", directive.text()),
            ),
            _ => notes.lost(place, format!("{} is not carried over: it has no counterpart", named(&directive.name))),
        }
    }
    let mut seen = HashSet::new();
    let mut once = |(target, _, place): &(Target, &str, &Place)| {
        let target = &target.text;
        let new = seen.insert(target.to_ascii_lowercase());
        if !new {
            let message =
                format!("`{target}` is in `{name}` twice, as a weight: targets have no weights, it is there once");
            notes.lost(place, message);
        }
        new
    };
    first.retain(&mut once);
    backups.retain(&mut once);
    match (first.len(), backups.len()) {
        (_, 0) => {}
        (0 | 1, _) => {
            balance = "first";
            first.append(&mut backups);
        }
        _ => {
            for (target, _, place) in backups {
                let target = target.text;
                notes.lost(place, format!("`{target}` is not carried over: of several targets none is a backup (balance = \"first\" takes them in order)"));
            }
        }
    }
    if first.is_empty() {
        notes.changed(&block.place, format!("upstream `{name}` has no target: what leads there is refused"));
        return None;
    }
    let limit = first[0].1;
    let limit = if first.iter().all(|(_, other, _)| *other == limit) { limit.parse().ok() } else { None };
    if limit.is_none() {
        notes.lost(
            &block.place,
            format!("`max_conns` of `{name}` is not carried over: it is one number for all targets"),
        );
    }
    let targets = first.into_iter().map(|(target, ..)| target).collect();
    Some(Members { targets, balance, max_connections: limit.unwrap_or(0) })
}
