//! The last good commit, on disk: one file that is replaced as a whole, so that a node starts while
//! its repository is away.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Snapshot;
use crate::config::Repository;

/// A commit, and of what it is one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    git: String,
    r#ref: String,
    path: PathBuf,
    commit: String,
    files: BTreeMap<PathBuf, String>,
}

fn file(folder: &Path) -> PathBuf {
    folder.join("last-good.json")
}

impl Document {
    pub fn new(repository: &Repository, snapshot: &Snapshot) -> Self {
        let text = |bytes: &Vec<u8>| String::from_utf8_lossy(bytes).into_owned();
        Self {
            git: repository.git.clone(),
            r#ref: repository.reference.clone(),
            path: repository.path.clone(),
            commit: snapshot.revision.clone(),
            files: snapshot.files.iter().map(|(path, bytes)| (path.clone(), text(bytes))).collect(),
        }
    }

    /// The commit, if it is of this repository, ref and path.
    ///
    /// # Errors
    /// What it is of.
    fn of(self, repository: &Repository) -> Result<Snapshot, String> {
        let Self { git, r#ref, path, commit, files } = self;
        // Not quoted: an older version let a password through.
        if git != repository.git {
            return Err("it is of another repository".to_owned());
        }
        if (&r#ref, &path) != (&repository.reference, &repository.path) {
            return Err(format!("it is of `ref` {}, `path` {}", r#ref, path.display()));
        }
        let files = files.into_iter().map(|(path, text)| (path, text.into_bytes())).collect();
        Ok(Snapshot { revision: commit, files })
    }
}

/// Keeps it. It is on the disk when this returns.
pub fn save(repository: &Repository, snapshot: &Snapshot) -> io::Result<()> {
    let document = Document::new(repository, snapshot);
    let folder = &repository.state_directory;
    fs::create_dir_all(folder)?;
    let mut new = tempfile::NamedTempFile::new_in(folder)?;
    new.write_all(&serde_json::to_vec(&document)?)?;
    new.as_file().sync_all()?;
    new.persist(file(folder)).map_err(|error| error.error)?;
    File::open(folder)?.sync_all()
}

/// The same, where there is nobody to tell of an error.
pub fn keep(repository: &Repository, snapshot: &Snapshot) {
    if let Err(error) = save(repository, snapshot) {
        let folder = repository.state_directory.display();
        tracing::error!(%folder, %error, "the commit in force cannot be kept: a start without the repository will not have it");
    }
}

/// What is kept of this repository, ref and path; `inherited`: what a predecessor had in force.
///
/// # Errors
/// There is nothing, or nothing of these.
pub fn load(repository: &Repository, inherited: Option<&Document>) -> Result<Snapshot, String> {
    if let Some(Ok(snapshot)) = inherited.map(|document| document.clone().of(repository)) {
        return Ok(snapshot);
    }
    let file = file(&repository.state_directory);
    let why = |error: &dyn std::fmt::Display| format!("no commit is kept in {}: {error}", file.display());
    let bytes = fs::read(&file).map_err(|error| why(&error))?;
    let document: Document = serde_json::from_slice(&bytes).map_err(|error| why(&error))?;
    document.of(repository).map_err(|error| why(&error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    #[test]
    fn what_is_kept_is_found_again_for_the_same_repository_only() {
        let folder = tempfile::tempdir().unwrap();
        let text = format!("[source]\ngit = \"/srv/a.git\"\nstate_directory = \"{}/new\"\n", folder.path().display());
        let repository = config::repository(&config::Source::new("x", text)).unwrap().unwrap();
        assert!(load(&repository, None).is_err());
        let files = BTreeMap::from([(PathBuf::from("dataplane.toml"), b"x = \"\xc3\xa9\"".to_vec())]);
        let mut snapshot = Snapshot { revision: "0123".into(), files };
        for commit in ["0123", "4567"] {
            snapshot.revision = commit.into();
            save(&repository, &snapshot).unwrap();
            assert_eq!(load(&repository, None), Ok(snapshot.clone()));
        }
        assert_eq!(fs::read_dir(&repository.state_directory).unwrap().count(), 1);
        let other = Repository { reference: "other".into(), ..repository.clone() };
        assert!(load(&other, None).unwrap_err().contains("`ref` HEAD"));
        let old = Repository { git: "https://h/x.git?token=s3cret".into(), ..repository.clone() };
        save(&old, &snapshot).unwrap();
        let error = load(&repository, None).unwrap_err();
        assert!(error.contains("another repository") && !error.contains("s3cret"), "{error}");
    }
}
