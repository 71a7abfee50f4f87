//! Notices that files have changed: by inotify(7) on the folders that lead to them, for what
//! replaces a file is a new one.
//!
//! Symbolic links are followed step by step, each with its folder: Kubernetes swaps a link in the
//! middle of the path. It does not know what the files hold.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;

use crate::kernel::sys;

/// What ends in a file that can be read as a whole. A file that is being written is not there yet.
const EVENTS: WatchFlags = WatchFlags::CLOSE_WRITE
    .union(WatchFlags::CREATE)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::ONLYDIR);

/// Several files, or a file and its link, change together.
const SETTLE: Duration = Duration::from_millis(100);

/// More links in one path than the kernel would follow (path_resolution(7)).
const MOST_LINKS: usize = 40;

#[derive(Debug)]
pub struct Watcher {
    inotify: AsyncFd<Arc<OwnedFd>>,
    watched: BTreeMap<PathBuf, i32>,
}

impl Watcher {
    pub fn new() -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        Ok(Self { inotify: sys::watch_readable(Arc::new(inotify))?, watched: BTreeMap::new() })
    }

    /// Watches these folders and no others. One that is there again, but another one, is watched
    /// anew. Whether one was not watched before: what changed there until now went unnoticed.
    pub fn watch(&mut self, folders: &BTreeSet<PathBuf>) -> bool {
        let added =
            folders.iter().filter_map(|folder| match inotify::add_watch(self.inotify.get_ref(), folder, EVENTS) {
                Ok(watch) => Some((folder.clone(), watch)),
                Err(error) => {
                    tracing::warn!(folder = %folder.display(), %error, "changes in this folder go unnoticed");
                    None
                }
            });
        let watched: BTreeMap<_, _> = added.collect();
        let kept: BTreeSet<i32> = watched.values().copied().collect();
        for watch in self.watched.values().filter(|watch| !kept.contains(watch)) {
            // The kernel has removed it already when the folder is gone.
            let _ = inotify::remove_watch(self.inotify.get_ref(), *watch);
        }
        let before: BTreeSet<i32> = self.watched.values().copied().collect();
        self.watched = watched;
        !kept.is_subset(&before)
    }

    /// Waits until something has changed, and until it is quiet again.
    pub async fn changed(&mut self) {
        self.drain().await;
        while tokio::time::timeout(SETTLE, self.drain()).await.is_ok() {}
    }

    /// Waits for events and takes them all; what they say does not matter.
    async fn drain(&mut self) {
        loop {
            let Ok(mut ready) = self.inotify.readable().await else { return std::future::pending().await };
            let mut buffer = [0; 4096];
            let mut events = false;
            loop {
                match rustix::io::read(self.inotify.get_ref(), &mut buffer) {
                    Ok(n) if n > 0 => events = true,
                    Err(Errno::INTR) => {}
                    _ => break,
                }
            }
            ready.clear_ready();
            if events {
                return;
            }
        }
    }
}

/// The folders in which something changes when what a path leads to changes.
pub fn folders(path: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut path = std::path::absolute(path).unwrap_or_else(|_| path.into());
    for _ in 0..MOST_LINKS {
        let Some((link, target, rest)) = first_link(&path) else { break };
        let folder = link.parent().unwrap_or(Path::new("/")).to_path_buf();
        path = folder.join(target).join(rest);
        found.insert(folder);
    }
    // A folder that is not there yet appears in the nearest one that is.
    found.extend(path.ancestors().skip(1).find(|folder| folder.is_dir()).map(Path::to_path_buf));
    found
}

/// The first symbolic link of a path, where it leads, and the rest of the path.
fn first_link(path: &Path) -> Option<(PathBuf, PathBuf, PathBuf)> {
    let mut walked = PathBuf::new();
    let mut components = path.components();
    while let Some(component) = components.next() {
        match component {
            // Nothing before it is a link.
            Component::ParentDir => {
                walked.pop();
            }
            component => walked.push(component),
        }
        if let Ok(target) = std::fs::read_link(&walked) {
            return Some((walked, target, components.as_path().into()));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    async fn notices(watcher: &mut Watcher) -> bool {
        tokio::time::timeout(Duration::from_secs(10), watcher.changed()).await.is_ok()
    }

    #[tokio::test]
    async fn a_write_a_rename_and_a_swapped_link_are_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        // As Kubernetes mounts a ConfigMap.
        for (name, text) in [("..1", "one"), ("..2", "two")] {
            fs::create_dir(root.join(name)).unwrap();
            fs::write(root.join(name).join("dataplane.toml"), text).unwrap();
        }
        symlink("..1", root.join("..data")).unwrap();
        let file = root.join("dataplane.toml");
        symlink("..data/dataplane.toml", &file).unwrap();
        assert_eq!(folders(&file), BTreeSet::from([root.clone(), root.join("..1")]));

        let mut watcher = Watcher::new().unwrap();
        watcher.watch(&folders(&file));
        symlink("..2", root.join("..data_tmp")).unwrap();
        fs::rename(root.join("..data_tmp"), root.join("..data")).unwrap();
        assert!(notices(&mut watcher).await, "a link is swapped");
        assert_eq!(folders(&file), BTreeSet::from([root.clone(), root.join("..2")]));

        watcher.watch(&folders(&file));
        fs::write(root.join("..2/dataplane.toml"), "three").unwrap();
        assert!(notices(&mut watcher).await, "the file behind the links is written");
        fs::write(root.join("new"), "four").unwrap();
        fs::rename(root.join("new"), &file).unwrap();
        assert!(notices(&mut watcher).await, "a file takes the place of the link");
        watcher.watch(&BTreeSet::new());
        assert!(notices(&mut watcher).await, "the kernel says that it watches no more");
        fs::write(&file, "five").unwrap();
        let quiet = tokio::time::timeout(Duration::from_millis(300), watcher.changed()).await.is_err();
        assert!(quiet, "nothing is watched any more");
    }

    #[test]
    fn a_circle_of_links_and_a_folder_that_is_not_there_end_somewhere() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        symlink("b", root.join("a")).unwrap();
        symlink("a", root.join("b")).unwrap();
        assert!(folders(&root.join("a/x.toml")).contains(&root));
        assert_eq!(folders(&root.join("routes.d/deep/x.toml")), BTreeSet::from([root]));
    }
}
