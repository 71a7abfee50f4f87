//! Keeps the configuration up to date: looks when asked, when a file changes, when a push is announced, and now and then.
//!
//! What it finds goes to the control thread as [`News`]. A look that fails changes nothing, however often it fails.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

use super::git::Seen;
use super::watch::{self, Watcher};
use super::{Loaded, Snapshot, git, kept, whole};
use crate::config::{self, LoadError, Repository, Source};

/// Asked by an operator, with where to send the outcome.
pub type ReloadRequest = oneshot::Sender<Result<String, String>>;

/// What a look has found.
#[derive(Debug)]
pub enum News {
    /// This validates: to be put in force, and said whether it is.
    Load(Box<Loaded>, oneshot::Sender<Result<String, String>>),
    /// There is something new, and it is wrong.
    Broken(String),
    /// The repository could not be fetched from.
    Unreachable(String),
    /// The repository was reached, and there is nothing new.
    Unchanged,
}

/// Reaches repositories.
pub trait Fetch {
    /// As [`git::fetch`].
    fn fetch(
        &self,
        repository: &Repository,
        seen: Option<&Seen>,
    ) -> impl Future<Output = Result<Option<(Seen, Snapshot)>, String>>;
}

/// The git program.
pub struct Git;

impl Fetch for Git {
    async fn fetch(&self, repository: &Repository, seen: Option<&Seen>) -> Result<Option<(Seen, Snapshot)>, String> {
        git::fetch(repository, seen).await
    }
}

/// See the module.
pub struct Follower<F> {
    path: PathBuf,
    fetch: F,
    news: mpsc::Sender<News>,
    /// The text of this machine's files that was looked at last, good or not.
    local: String,
    /// What the ref was when its commit was looked at last, good or not; `None`: to be looked at whatever it is.
    seen: Option<Seen>,
    /// In force.
    commit: Option<String>,
    /// Of the configuration in force.
    interval: Option<Duration>,
    /// This machine's files, and the folders in which there may be more.
    places: Vec<PathBuf>,
    /// `None`: nobody wants to know.
    watcher: Option<Watcher>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Why {
    /// An operator wants it done, and wants to know.
    Asked,
    /// A file has changed, perhaps.
    Changed,
    /// The repository has changed, perhaps.
    Due,
}

enum Failure {
    Broken(String),
    Unreachable(String),
}

impl<F: Fetch> Follower<F> {
    /// Goes on from what was loaded at the start. Must be called within a runtime.
    pub fn new(path: PathBuf, fetch: F, news: mpsc::Sender<News>, at_start: &config::Config) -> Self {
        let mut follower = Self {
            path,
            fetch,
            news,
            local: String::new(),
            seen: None,
            commit: at_start.source.commit.clone(),
            interval: None,
            places: Vec::new(),
            watcher: None,
        };
        follower.local = local_text(&at_start.source);
        follower.places = places(&at_start.source);
        follower.take_over(at_start);
        follower.watch();
        follower
    }

    /// Runs until the control thread has ended.
    pub async fn run(mut self, mut requests: mpsc::Receiver<ReloadRequest>, pushed: Arc<Notify>) {
        // What was loaded at the start may be the commit that is kept.
        let mut due = Instant::now();
        loop {
            let why = tokio::select! {
                request = requests.recv() => {
                    let Some(answer) = request else { return };
                    notify(&[
                        NotifyState::Reloading,
                        NotifyState::monotonic_usec_now().unwrap_or(NotifyState::Status("reloading")),
                    ]);
                    let outcome = self.look(Why::Asked).await;
                    self.watch();
                    notify(&[NotifyState::Ready]);
                    // An answer that nobody waits for is in the log.
                    let _ = answer.send(outcome);
                    None
                }
                () = pushed.notified(), if self.interval.is_some() => Some(Why::Due),
                () = sleep_until(due), if self.interval.is_some() => Some(Why::Due),
                () = changed(self.watcher.as_mut()) => Some(Why::Changed),
            };
            if let Some(why) = why {
                let _ = self.look(why).await;
                self.watch();
            }
            if let Some(interval) = self.interval {
                due = Instant::now() + with_jitter(interval);
            }
            if self.news.is_closed() {
                return;
            }
        }
    }

    /// Looks once. What came of it, for people.
    async fn look(&mut self, why: Why) -> Result<String, String> {
        let stopping = || "the daemon is stopping".to_owned();
        let (news, outcome) = match self.load(why).await {
            Ok(Some((loaded, seen))) => return self.put_in_force(loaded, seen).await,
            Ok(None) => (News::Unchanged, Ok("nothing has changed\n".to_owned())),
            Err(Failure::Broken(text)) => (News::Broken(text.clone()), Err(text)),
            Err(Failure::Unreachable(text)) => (News::Unreachable(text.clone()), Err(text)),
        };
        self.news.send(news).await.map_err(|_| stopping())?;
        outcome
    }

    async fn put_in_force(&mut self, mut loaded: Loaded, seen: Option<Seen>) -> Result<String, String> {
        let stopping = || "the daemon is stopping".to_owned();
        let snapshot = loaded.snapshot.take();
        let config = loaded.config.clone();
        let (answer, outcome) = oneshot::channel();
        self.news.send(News::Load(Box::new(loaded), answer)).await.map_err(|_| stopping())?;
        let text = outcome.await.map_err(|_| stopping())??;
        // Only now: what validates and cannot be put in force is tried again.
        self.seen = seen;
        self.commit.clone_from(&config.source.commit);
        self.take_over(&config);
        if let (Some(repository), Some(snapshot)) = (&config.repository, snapshot) {
            kept::keep(repository, &snapshot);
        }
        Ok(text)
    }

    /// What is new, with what the ref is now; `None`: nothing.
    async fn load(&mut self, why: Why) -> Result<Option<(Loaded, Option<Seen>)>, Failure> {
        let broken = |error: LoadError| Failure::Broken(error.to_string());
        let local = config::read(&self.path).map_err(broken)?;
        self.places = places(&local);
        let text = local_text(&local);
        let is_new = std::mem::replace(&mut self.local, text) != self.local;
        if !is_new && why == Why::Changed {
            return Ok(None);
        }
        let Some(repository) = super::repository(&local).map_err(broken)? else {
            return if is_new || why == Why::Asked {
                Ok(Some((whole(local, None).map_err(broken)?, None)))
            } else {
                Ok(None)
            };
        };
        let anew = is_new || why == Why::Asked;
        let fetched = self.fetch.fetch(&repository, self.seen.as_ref().filter(|_| !anew)).await;
        let fetched = fetched.map_err(|error| {
            if is_new {
                // Not yet looked at, after all.
                self.local.clear();
            }
            Failure::Unreachable(LoadError::Repository { git: repository.git.clone(), error }.to_string())
        })?;
        let Some((seen, snapshot)) = fetched else { return Ok(None) };
        if !anew && self.commit.as_ref() == Some(&snapshot.commit) {
            self.seen = Some(seen);
            return Ok(None);
        }
        match whole(local, Some((&repository, snapshot))) {
            Ok(loaded) => Ok(Some((loaded, Some(seen)))),
            Err(error) => {
                // The same commit will not be better the next time.
                self.seen = Some(seen);
                Err(broken(error))
            }
        }
    }

    /// What the configuration in force says of how to look.
    fn take_over(&mut self, config: &config::Config) {
        self.interval = config.repository.as_ref().map(|repository| repository.interval);
        if !config.watch {
            self.watcher = None;
        } else if self.watcher.is_none() {
            self.watcher = Watcher::new()
                .inspect_err(|error| tracing::error!(%error, "`watch`: inotify cannot be used, changes go unnoticed"))
                .ok();
        }
    }

    /// Links may lead elsewhere by now, also to something wrong.
    fn watch(&mut self) {
        if let Some(watcher) = &mut self.watcher {
            watcher.watch(&self.places.iter().flat_map(|place| watch::folders(place)).collect::<BTreeSet<_>>());
        }
    }
}

async fn changed(watcher: Option<&mut Watcher>) {
    match watcher {
        Some(watcher) => watcher.changed().await,
        None => std::future::pending().await,
    }
}

fn places(source: &Source) -> Vec<PathBuf> {
    // A file that appears in a folder is one of its entries.
    source.local_files().map(Into::into).chain(source.folders.iter().map(|folder| folder.join("*"))).collect()
}

/// All that this machine's files say, and which they are.
fn local_text(source: &Source) -> String {
    source.local_texts().map(|(path, text)| format!("{}\n{text}\n", path.display())).collect()
}

/// A tenth more or less, so that entrance nodes do not all ask at once. Chance needs no secrecy here: the standard library's keys will do.
fn with_jitter(interval: Duration) -> Duration {
    let chance = RandomState::new().hash_one(0) % 1000;
    interval * 9 / 10 + interval / 5 * chance as u32 / 1000
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "sd_notify");
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::*;

    const GOOD: &str = "[listeners.public]\nbind = [\"0.0.0.0:443\"]\n[upstreams.a]\ntargets = [\"a:443\"]\n\
        [[routes]]\nhosts = [\"HOST\"]\nupstream = \"a\"\n";

    /// A server that is there or not, with one commit.
    #[derive(Default)]
    struct Server {
        commit: Mutex<Option<(String, String)>>,
        asked: AtomicUsize,
    }

    impl Server {
        fn push(&self, commit: &str, text: &str) {
            *self.commit.lock().unwrap() = Some((commit.into(), text.into()));
        }

        fn go_away(&self) {
            *self.commit.lock().unwrap() = None;
        }
    }

    impl Fetch for Arc<Server> {
        async fn fetch(&self, _: &Repository, seen: Option<&Seen>) -> Result<Option<(Seen, Snapshot)>, String> {
            self.asked.fetch_add(1, Relaxed);
            let commit = self.commit.lock().unwrap().clone();
            let (commit, text) = commit.ok_or("connection refused")?;
            if seen == Some(&commit) {
                return Ok(None);
            }
            let files = BTreeMap::from([("dataplane.toml".into(), text.into_bytes())]);
            Ok(Some((commit.clone(), Snapshot { commit, files })))
        }
    }

    struct Rig {
        server: Arc<Server>,
        news: mpsc::Receiver<News>,
        requests: mpsc::Sender<ReloadRequest>,
        pushed: Arc<Notify>,
        /// Hosts of the configuration in force.
        in_force: String,
        folder: tempfile::TempDir,
    }

    impl Rig {
        /// Started from commit `one`, with an interval of a minute.
        fn start() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("dataplane.toml");
            let state = folder.path().join("state");
            let local = format!("[source]\ngit = \"/srv/x.git\"\nstate_directory = \"{}\"\n", state.display());
            std::fs::write(&file, local).unwrap();
            let server = Arc::new(Server::default());
            server.push("one", &GOOD.replace("HOST", "one.example"));
            let local = config::read(&file).unwrap();
            let repository = config::repository(&local).unwrap().unwrap();
            let files = BTreeMap::from([("dataplane.toml".into(), GOOD.replace("HOST", "one.example").into_bytes())]);
            let loaded = whole(local, Some((&repository, Snapshot { commit: "one".into(), files }))).unwrap();
            let (sender, news) = mpsc::channel(1);
            let (requests, inbox) = mpsc::channel(1);
            let pushed = Arc::new(Notify::new());
            let follower = Follower::new(file, server.clone(), sender, &loaded.config);
            tokio::spawn(follower.run(inbox, pushed.clone()));
            Self { server, news, requests, pushed, in_force: "one.example".into(), folder }
        }

        /// The next news within `limit`, in one word; what is to be put in force is.
        async fn next(&mut self, limit: Duration) -> &'static str {
            match tokio::time::timeout(limit, self.news.recv()).await {
                Err(_) => "nothing",
                Ok(None) => "ended",
                Ok(Some(News::Load(loaded, answer))) => {
                    self.in_force = loaded.config.routes[0].name.to_string();
                    answer.send(Ok("in force".into())).unwrap();
                    "load"
                }
                Ok(Some(News::Broken(_))) => "broken",
                Ok(Some(News::Unreachable(_))) => "unreachable",
                Ok(Some(News::Unchanged)) => "unchanged",
            }
        }
    }

    const MINUTE: Duration = Duration::from_secs(60);
    /// An interval of a minute, with the most of its jitter.
    const INTERVAL: Duration = Duration::from_secs(67);

    #[tokio::test(start_paused = true)]
    async fn a_server_that_is_away_for_an_hour_changes_nothing_and_is_found_again_within_the_interval() {
        let mut rig = Rig::start();
        assert_eq!(rig.next(MINUTE).await, "unchanged", "it looks at once");
        rig.server.go_away();
        let start = Instant::now();
        let mut looks = 0;
        while start.elapsed() < 60 * MINUTE {
            assert_eq!(rig.next(INTERVAL).await, "unreachable");
            looks += 1;
        }
        assert!((54..=67).contains(&looks), "{looks} looks in an hour");
        assert_eq!(rig.in_force, "one.example");
        rig.server.push("two", &GOOD.replace("HOST", "two.example"));
        assert_eq!(rig.next(INTERVAL).await, "load");
        assert_eq!(rig.in_force, "two.example");
        assert_eq!(rig.next(INTERVAL).await, "unchanged");
        let kept = std::fs::read_to_string(rig.folder.path().join("state/last-good.json")).unwrap();
        assert!(kept.contains("two.example"), "{kept}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_broken_commit_is_told_once_and_the_next_good_one_is_put_in_force() {
        let mut rig = Rig::start();
        assert_eq!(rig.next(MINUTE).await, "unchanged");
        rig.server.push("two", "listeners = 3");
        assert_eq!(rig.next(INTERVAL).await, "broken");
        for _ in 0..10 {
            assert_eq!(rig.next(INTERVAL).await, "unchanged");
        }
        rig.server.push("three", &GOOD.replace("HOST", "three.example"));
        assert_eq!(rig.next(INTERVAL).await, "load");
        // Taken back, the commit of the start is a new one again.
        rig.server.push("one", &GOOD.replace("HOST", "one.example"));
        assert_eq!(rig.next(INTERVAL).await, "load");
        assert_eq!(rig.in_force, "one.example");
    }

    #[tokio::test(start_paused = true)]
    async fn a_push_and_an_operator_have_it_look_at_once() {
        let mut rig = Rig::start();
        assert_eq!(rig.next(MINUTE).await, "unchanged");
        rig.server.push("two", &GOOD.replace("HOST", "two.example"));
        rig.pushed.notify_one();
        assert_eq!(rig.next(Duration::from_secs(1)).await, "load");
        let (answer, outcome) = oneshot::channel();
        rig.requests.send(answer).await.unwrap();
        assert_eq!(rig.next(Duration::from_secs(1)).await, "load", "asked, it loads what is there, changed or not");
        assert_eq!(outcome.await.unwrap(), Ok("in force".to_owned()));
        rig.server.go_away();
        let (answer, outcome) = oneshot::channel();
        rig.requests.send(answer).await.unwrap();
        assert_eq!(rig.next(Duration::from_secs(1)).await, "unreachable");
        assert!(outcome.await.unwrap().unwrap_err().contains("connection refused"));
    }

    #[test]
    fn nodes_do_not_ask_in_step() {
        let looks: BTreeSet<_> = (0..100).map(|_| with_jitter(MINUTE)).collect();
        assert!(looks.len() > 10);
        assert!(looks.iter().all(|look| (54..=66).contains(&look.as_secs())), "{looks:?}");
    }
}
