//! Where the configuration's text comes from: files of this machine, and the newest commit of a
//! repository that validates.
//!
//! It gives [`crate::config`] a set of named files and hands what validates to the control thread,
//! from a thread of its own: neither a slow repository nor a large file keeps anybody waiting. What
//! a configuration means, and what runs, is not known here.

pub mod folder;
pub mod follow;
pub mod git;
pub mod kept;
mod metrics;
pub mod secret;
pub mod watch;
pub mod webhook;

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::net::IpAddr;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use folder::Folder;
pub use metrics::ConfigMetrics;

use crate::config::{self, Config, Diagnostic, Files, LoadError, Repository, Source, TargetHost};
use crate::kernel::socket;

/// A configuration that validates.
#[derive(Debug)]
pub struct Loaded {
    pub config: Config,
    /// What its owner should know.
    pub warnings: Vec<Diagnostic>,
    /// The files of the repository, where it has one.
    pub snapshot: Option<Snapshot>,
}

/// Why the newest revision is not to be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreachable {
    /// The key of `[source]` that it depends on.
    key: &'static str,
    /// In one line.
    text: String,
}

impl Unreachable {
    const fn by(key: &'static str, text: String) -> Self {
        Self { key, text }
    }

    /// At its place in the node's own file.
    fn report(&self, local: &Source) -> LoadError {
        let remedy = match self.key {
            "ref" => "name a branch or a tag that the repository has",
            "path" => "name a file that is in the repository",
            "timeout" | "max_size" => "look at the repository, or allow more",
            _ => "`[source]` says which repository this is and how it is reached",
        };
        config::at_source(local, self.key, &self.text, remedy)
    }
}

impl From<String> for Unreachable {
    fn from(text: String) -> Self {
        Self::by("git", text)
    }
}

/// What a source says of its newest revision, to be compared with the next look.
pub type Seen = String;

/// The files of a commit that make up the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Its full id.
    pub revision: String,
    /// By path from the top of the repository.
    pub files: BTreeMap<PathBuf, Vec<u8>>,
}

impl Files for Snapshot {
    fn matching(&self, folder: &Path, pattern: &str) -> Result<Vec<PathBuf>, String> {
        matching(self.files.keys().map(|path| &**path), folder, pattern)
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.files
            .get(path)
            .cloned()
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the commit has no such file"))
    }
}

/// Those of the paths of a repository that a pattern, seen from a folder of it, matches.
fn matching<'p>(paths: impl Iterator<Item = &'p Path>, folder: &Path, pattern: &str) -> Result<Vec<PathBuf>, String> {
    let mut whole = PathBuf::new();
    for component in folder.join(pattern).components() {
        match component {
            Component::Normal(name) => whole.push(name),
            Component::CurDir => {}
            Component::ParentDir if whole.pop() => {}
            _ => return Err("it leads out of the repository".into()),
        }
    }
    if !config::is_pattern(pattern) {
        return Ok(vec![whole]);
    }
    let glob = config::glob(&whole.to_string_lossy())?;
    Ok(paths.filter(|path| glob.matches_path_with(path, config::WILDCARDS)).map(Path::to_path_buf).collect())
}

/// Loads without a network: the commit that is kept stands for the repository, or the one that a
/// predecessor had in force.
pub fn kept(path: &Path, inherited: Option<&kept::Document>) -> Result<Loaded, LoadError> {
    let local = config::read(path)?;
    let Some(repository) = repository(&local)? else { return whole(local, None) };
    match kept::load(&repository, inherited) {
        Ok(snapshot) => whole(local, Some((&repository, snapshot))),
        Err(error) => Err(Unreachable::from(error).report(&local)),
    }
}

/// Loads the content of a repository that lies in a folder, without a network and without a file
/// outside of it. `path` is that of its file, seen from the folder; `node` the own file of a node,
/// whose fence it has to fit.
pub fn content(folder: &Path, path: &Path, node: Option<&Path>) -> Result<Loaded, LoadError> {
    let fence = node.map(|node| {
        let local = config::read(node)?;
        Ok(repository(&local)?.map(|repository| repository.fence).unwrap_or_default())
    });
    let fence = fence.transpose()?;
    let unreadable = |error| LoadError::Unreadable { path: folder.into(), error };
    let source = config::read_repository(path, &Folder::open(folder).map_err(unreadable)?)?;
    let source = Arc::new(source);
    let (config, warnings) =
        config::parse_within(source.clone(), fence).map_err(|diagnostics| LoadError::Report { source, diagnostics })?;
    Ok(Loaded { config, warnings, snapshot: None })
}

/// Loads the newest commit. `before` is called before the repository is asked, and a token sent.
pub fn newest(path: &Path, before: impl FnOnce(&Repository)) -> Result<Loaded, LoadError> {
    let local = config::read(path)?;
    let Some(repository) = repository(&local)? else { return whole(local, None) };
    before(&repository);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let fetched = runtime
        .map_err(|error| error.to_string().into())
        .and_then(|runtime| runtime.block_on(git::fetch(&repository, None)))
        .map_err(|error| error.report(&local))?;
    match fetched {
        Some((_, snapshot)) => whole(local, Some((&repository, snapshot))),
        None => unreachable!("nothing was seen before"),
    }
}

/// Loads what is kept, so that a start does not wait for a repository; or else the newest commit.
/// The text says why it is the latter.
///
/// # Errors
/// Why there is neither: an outage does not hide what is wrong with what is kept.
pub fn at_start(path: &Path, inherited: Option<&kept::Document>) -> anyhow::Result<(Loaded, Option<String>)> {
    let error = match kept(path, inherited) {
        Ok(loaded) => return Ok((loaded, None)),
        Err(error) => error,
    };
    let has_repository = config::read(path).is_ok_and(|local| repository(&local).is_ok_and(|r| r.is_some()));
    if !has_repository {
        return Err(error.into());
    }
    let why = error.to_string();
    match newest(path, |_| ()) {
        Ok(loaded) => Ok((loaded, Some(why))),
        // It is the node's own file that is wrong, whatever the commit.
        Err(newest) if newest.to_string() == why => Err(newest.into()),
        Err(newest) => anyhow::bail!("the commit that is kept:\n{why}\nthe newest commit:\n{newest}"),
    }
}

fn repository(local: &Source) -> Result<Option<Repository>, LoadError> {
    config::repository(local).map_err(|diagnostics| {
        // Everything else that is wrong with the file belongs to it; what is only in the repository
        // does not.
        LoadError::Report { source: Arc::new(local.clone()), diagnostics }
    })
}

/// Puts the files together and checks them.
fn whole(mut source: Source, fetched: Option<(&Repository, Snapshot)>) -> Result<Loaded, LoadError> {
    let mut snapshot = None;
    if let Some((repository, files)) = fetched {
        config::add_repository(&mut source, &files.revision, &repository.path, &files)?;
        snapshot = Some(files);
    }
    let source = Arc::new(source);
    let report = |diagnostics| LoadError::Report { source: source.clone(), diagnostics };
    let (config, mut warnings) = config::parse(source.clone()).map_err(report)?;
    let local = local_addresses(&config);
    warnings.extend(config::own_listener_targets(&config, &local));
    warnings.extend(config::own_targets(&config, &local));
    if warnings.iter().any(Diagnostic::is_error) {
        Err(report(warnings))
    } else {
        Ok(Loaded { config, warnings, snapshot })
    }
}

/// Those of the targets' literal addresses that are this machine's.
fn local_addresses(config: &Config) -> Vec<IpAddr> {
    let targets = config.upstreams.iter().flat_map(|u| &u.targets);
    let literal: HashSet<IpAddr> = targets
        .filter_map(|t| match t.host {
            TargetHost::Ip(ip) => Some(ip),
            TargetHost::Name(_) => None,
        })
        .collect();
    literal.into_iter().filter(|ip| socket::is_of_this_machine(*ip)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_of_a_repository_stay_in_it() {
        let names = ["a.toml", "routes.d/b.toml", "routes.d/.c.toml", "routes.d/deep/d.toml", "routes.d/e.txt"];
        let find = |folder: &str, pattern: &str| {
            let paths = names.iter().map(Path::new);
            matching(paths, Path::new(folder), pattern)
                .map(|found| found.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" "))
        };
        assert_eq!(find("", "routes.d/*.toml").unwrap(), "routes.d/b.toml");
        assert_eq!(find("routes.d", "../*.toml").unwrap(), "a.toml");
        assert_eq!(find("routes.d", "../a.toml").unwrap(), "a.toml");
        assert!(find("routes.d", "../../a.toml").is_err());
        assert!(find("", "/etc/passwd").is_err());
        assert!(find("", "/etc/*").is_err());
    }

    #[test]
    fn what_is_wrong_with_a_repository_is_told_at_the_key_that_it_depends_on() {
        let text = "# ours\n[source]\ngit = \"/srv/x\"\nref = \"gone\"\n";
        let source = Source::new("node.toml", text.into());
        let told = |key| Unreachable::by(key, "no".into()).report(&source).to_string();
        assert!(told("ref").starts_with("node.toml:4:7: error: no\n4 | ref = \"gone\"\n"), "{}", told("ref"));
        // That has its default.
        assert!(told("path").starts_with("node.toml:3:7: error: no\n"), "{}", told("path"));
    }
}
