//! One `upstream` block of nginx, as the lines of one of ours.

use std::collections::HashSet;
use std::fmt::Write as _;

use super::super::syntax::{Directive, Place, named};
use super::notes::Notes;
use super::write::list;
use crate::config::{Target, TargetHost};

/// What a block comes to.
#[derive(Debug, Clone)]
pub struct Members {
    /// At least one, each once.
    pub targets: Vec<String>,
    /// Lines of the table, without `targets`.
    pub lines: String,
    /// The client's address chooses the target.
    pub is_hashed: bool,
}

impl Members {
    /// Of one target that has no block.
    pub fn one(target: String) -> Self {
        Self { targets: vec![target], lines: String::new(), is_hashed: false }
    }

    /// The lines of the table.
    pub fn table(&self) -> String {
        format!("targets = {}\n{}", list(&self.targets), self.lines)
    }
}

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
    let mut balance = "round-robin";
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
                if let Err(why) = target(address) {
                    notes.lost(place, format!("`{address}` is not carried over: {why}"));
                    continue;
                }
                let limit = options.iter().find_map(|o| o.strip_prefix("max_conns=")).unwrap_or("0");
                if options.iter().any(|option| option == "backup") {
                    backups.push((address.clone(), limit, place));
                } else {
                    first.push((address.clone(), limit, place));
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
                balance = "hash";
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
    let mut once = |(target, _, place): &(String, &str, &Place)| {
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
                notes.lost(place, format!("`{target}` is not carried over: of several targets none is a backup (balance = \"first\" takes them in order)"));
            }
        }
    }
    if first.is_empty() {
        notes.changed(&block.place, format!("upstream `{name}` has no target: what leads there is refused"));
        return None;
    }
    let mut lines = String::new();
    if first.len() > 1 {
        let _ = writeln!(lines, "balance = \"{balance}\"");
    }
    let limit = first.iter().all(|(_, limit, _)| *limit == first[0].1).then_some(first[0].1);
    match limit.and_then(|limit| limit.parse::<u32>().ok()) {
        Some(0) => {}
        Some(limit) => {
            let _ = writeln!(lines, "max_connections_per_target = {limit}");
        }
        None => notes.lost(
            &block.place,
            format!("`max_conns` of `{name}` is not carried over: it is one number for all targets"),
        ),
    }
    let targets: Vec<String> = first.into_iter().map(|(target, ..)| target).collect();
    Some(Members { is_hashed: balance == "hash" && targets.len() > 1, targets, lines })
}
