//! The content of a repository as a folder, for a check before it is pushed or merged: whoever
//! wrote it is not trusted.
//!
//! Nothing outside of the folder is read. A path is walked part by part, each opened below the one
//! before and never through a symbolic link: the nodes do not follow those of a commit either.
//! Nothing but files and folders is opened for reading, and `.git` is no part of a commit.

use std::cell::OnceCell;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat};
use rustix::io::Errno;

use super::matching;
use crate::config::{Files, LARGEST, is_pattern};

/// Entries of the folder and those below it, where a pattern has to be compared with all of them.
const MOST_ENTRIES: usize = 200_000;

/// Folders in one another.
const DEEPEST: usize = 100;

pub struct Folder {
    root: OwnedFd,
    listing: OnceCell<Vec<PathBuf>>,
}

impl Folder {
    /// Opens it. The path of the folder itself may lead through links.
    pub fn open(path: &Path) -> io::Result<Self> {
        let root = openat(CWD, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { root, listing: OnceCell::new() })
    }

    /// The files and links in it, as seen from it, in the order of their names.
    fn listing(&self) -> Result<&[PathBuf], String> {
        if let Some(listing) = self.listing.get() {
            return Ok(listing);
        }
        let mut found = Vec::new();
        let mut folders = vec![PathBuf::new()];
        let mut entries = 0;
        while let Some(folder) = folders.pop() {
            let told = |error: Errno| format!("{}: {}", folder.display(), io::Error::from(error));
            let open = self.descend(&folder, OFlags::DIRECTORY).map_err(told)?;
            for entry in rustix::fs::Dir::read_from(&open).map_err(told)? {
                let entry = entry.map_err(told)?;
                let name = Path::new(<OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(entry.file_name().to_bytes()));
                if name == Path::new(".") || name == Path::new("..") || is_git(name.as_os_str()) {
                    continue;
                }
                entries += 1;
                if entries > MOST_ENTRIES || folder.components().count() > DEEPEST {
                    return Err("the folder is too large: check a checkout of the repository, and nothing else".into());
                }
                let path = folder.join(name);
                if entry.file_type() == FileType::Directory {
                    folders.push(path);
                } else {
                    found.push(path);
                }
            }
        }
        found.sort();
        Ok(self.listing.get_or_init(|| found))
    }

    /// Opens what a path leads to, without following a link.
    fn descend(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let below = |folder: &OwnedFd, name: &OsStr, flags: OFlags| {
            // A pipe would otherwise wait for somebody to write into it.
            let flags = flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            openat(folder.as_fd(), name, flags, Mode::empty())
        };
        let mut open = below(&self.root, OsStr::new("."), OFlags::DIRECTORY)?;
        let mut parts = path.components().peekable();
        while let Some(part) = parts.next() {
            let Component::Normal(name) = part else { return Err(Errno::PERM) };
            if is_git(name) {
                return Err(Errno::NOENT);
            }
            let flags = if parts.peek().is_some() { OFlags::DIRECTORY } else { flags };
            open = below(&open, name, flags)?;
        }
        Ok(open)
    }
}

/// The repository's own folder, also on file systems that take `.GIT` for it.
fn is_git(name: &OsStr) -> bool {
    name.eq_ignore_ascii_case(".git")
}

impl Files for Folder {
    fn matching(&self, folder: &Path, pattern: &str) -> Result<Vec<PathBuf>, String> {
        let listing = if is_pattern(pattern) { self.listing()? } else { &[] };
        matching(listing.iter().map(|path| &**path), folder, pattern)
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let refused = |why: &str| io::Error::other(why.to_owned());
        let open = self.descend(path, OFlags::empty()).map_err(|error| match error {
            Errno::LOOP => refused("it is a symbolic link: links of a commit are not followed"),
            Errno::PERM => refused("it leads out of the repository"),
            // Also where a part of the path is a link.
            Errno::NOTDIR => refused("a part of its path is no folder, or a symbolic link"),
            error => error.into(),
        })?;
        if FileType::from_raw_mode(fstat(&open)?.st_mode) != FileType::RegularFile {
            return Err(refused("it is no file"));
        }
        let mut bytes = Vec::new();
        File::from(open).take(LARGEST as u64 + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn nothing_outside_of_the_folder_is_read() {
        let outer = tempfile::tempdir().unwrap();
        let root = outer.path().join("repository");
        std::fs::create_dir_all(root.join("routes.d/deep")).unwrap();
        std::fs::create_dir(root.join(".git")).unwrap();
        for file in ["../secret", "a.toml", "routes.d/b.toml", "routes.d/deep/c.toml", ".git/config"] {
            std::fs::write(root.join(file), "text").unwrap();
        }
        symlink("../secret", root.join("routes.d/link.toml")).unwrap();
        symlink("/etc", root.join("etc")).unwrap();
        symlink("..", root.join("up")).unwrap();
        rustix::fs::mknodat(CWD, root.join("pipe.toml"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        let folder = Folder::open(&root).unwrap();
        let read = |path: &str| folder.read(Path::new(path)).map_err(|error| error.to_string());
        assert_eq!(read("routes.d/deep/c.toml").unwrap(), b"text");
        let secret = outer.path().join("secret").display().to_string();
        for path in [
            "../secret",
            "routes.d/../../secret",
            &secret,
            "/etc/passwd",
            "routes.d/link.toml",
            "etc/passwd",
            "up/secret",
            ".git/config",
            ".GIT/config",
            "pipe.toml",
            "routes.d",
            "",
            "gone",
            "a.toml/x",
        ] {
            assert!(read(path).is_err(), "{path}");
        }
        assert!(read("routes.d/link.toml").unwrap_err().contains("symbolic link"));
        let find = |folder_of: &str, pattern: &str| {
            let found = folder.matching(Path::new(folder_of), pattern);
            found.map(|found| found.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" "))
        };
        assert_eq!(find("", "routes.d/*").unwrap(), "routes.d/b.toml routes.d/link.toml");
        assert_eq!(find("", "**/c.toml").unwrap(), "routes.d/deep/c.toml");
        assert_eq!(find("", ".git/*").unwrap(), "");
        assert_eq!(find("", "etc/*").unwrap(), "");
        assert!(find("", "../*").is_err());
        assert!(find("", "/etc/*").is_err());
        assert!(find("", "*a*b*c*").is_err(), "all combinations would be tried");
    }
}
