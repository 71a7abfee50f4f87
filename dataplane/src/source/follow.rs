//! Keeps the configuration up to date: looks when asked, when a file changes, when a push is
//! announced, and now and then.
//!
//! What it finds goes to the control thread as [`News`]. A look that fails changes nothing, however
//! often it fails.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use super::watch::{self, Watcher};
use super::{Loaded, Seen, Snapshot, Unreachable, kept, whole};
use crate::config::{self, LoadError, Repository, Source, format_duration};
use crate::systemd::notify;

/// For reading a configuration, and for checking it. The largest takes a small part of it.
const CHECKING: Duration = Duration::from_secs(10);

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

/// Where the newest revision comes from. Nothing else here depends on what kind of source that is.
pub trait Fetch {
    /// The newest revision, unless it is still what was `seen` before.
    fn fetch(
        &self,
        repository: &Repository,
        seen: Option<&Seen>,
    ) -> impl Future<Output = Result<Option<(Seen, Snapshot)>, Unreachable>>;
}

pub struct Follower<F> {
    path: PathBuf,
    fetch: F,
    news: mpsc::Sender<News>,
    /// This machine's files as they are in force.
    local: Source,
    /// What they said when they were looked at last, good or not; empty: to be looked at whatever
    /// they say.
    looked_at: String,
    /// What the ref was when its commit was looked at last, good or not; `None`: to be looked at
    /// whatever it is.
    seen: Option<Seen>,
    /// In force, and nothing was refused since: then even the way back to it is news.
    revision: Option<String>,
    /// Of the configuration in force.
    interval: Option<Duration>,
    /// This machine's files, and the folders in which there may be more.
    places: Vec<PathBuf>,
    /// `None`: nobody wants to know.
    watcher: Option<Watcher>,
    /// A reading or a check that took too long.
    stuck: Option<JoinHandle<()>>,
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

/// What a look came to.
enum Found {
    /// This validates, and is not in force.
    New(Box<Loaded>, Option<Seen>),
    /// The repository has nothing new.
    Unchanged,
    /// There was nothing to ask a repository for.
    Nothing,
}

enum Failure {
    Broken(String),
    Unreachable(String),
}

impl<F: Fetch> Follower<F> {
    /// Goes on from what was loaded at the start; where that is in force only in part, it is tried
    /// again with each look. Must be called within a runtime.
    pub fn new(path: PathBuf, fetch: F, news: mpsc::Sender<News>, at_start: &config::Config, in_part: bool) -> Self {
        let local = at_start.source.local();
        let mut follower = Self {
            path,
            fetch,
            news,
            looked_at: text(&local),
            places: places(&local),
            local,
            seen: None,
            revision: at_start.source.revision.clone().filter(|_| !in_part),
            interval: None,
            watcher: None,
            stuck: None,
        };
        follower.take_over(at_start);
        follower
    }

    /// Runs until the control thread has ended.
    pub async fn run(mut self, mut requests: mpsc::Receiver<ReloadRequest>, pushed: Arc<Notify>) {
        self.catch_up().await;
        // What was loaded at the start may be the commit that is kept.
        let mut due = Instant::now();
        while !self.news.is_closed() {
            let why = tokio::select! {
                request = requests.recv() => {
                    let Some(answer) = request else { return };
                    notify(&[
                        NotifyState::Reloading,
                        NotifyState::monotonic_usec_now().unwrap_or(NotifyState::Status("reloading")),
                    ]);
                    let outcome = self.look(Why::Asked).await;
                    notify(&[NotifyState::Ready]);
                    // An answer that nobody waits for is in the log.
                    let _ = answer.send(outcome);
                    Why::Asked
                }
                () = pushed.notified(), if self.interval.is_some() => Why::Due,
                () = sleep_until(due), if self.interval.is_some() => Why::Due,
                () = changed(self.watcher.as_mut()) => Why::Changed,
            };
            if why != Why::Asked {
                let _ = self.look(why).await;
            }
            self.catch_up().await;
            if let Some(interval) = self.interval {
                let next = Instant::now() + with_jitter(interval);
                // A file that changes again and again keeps nobody from the repository.
                due = if why == Why::Changed { due.min(next) } else { next };
            }
        }
    }

    /// Watches what there is to watch now; what changed in a place before it was watched is looked
    /// at.
    async fn catch_up(&mut self) {
        while self.watch() {
            let _ = self.look(Why::Changed).await;
        }
    }

    /// Looks once. What came of it, for people.
    async fn look(&mut self, why: Why) -> Result<String, String> {
        let stopping = || "the daemon is stopping".to_owned();
        let nothing = || Ok("nothing has changed\n".to_owned());
        let (news, outcome) = match self.load(why).await {
            Ok(Found::New(loaded, seen)) => return self.put_in_force(loaded, seen).await,
            Ok(Found::Nothing) => return nothing(),
            Ok(Found::Unchanged) => (News::Unchanged, nothing()),
            Err(Failure::Broken(text)) => (News::Broken(text.clone()), Err(text)),
            Err(Failure::Unreachable(text)) => (News::Unreachable(text.clone()), Err(text)),
        };
        self.news.send(news).await.map_err(|_| stopping())?;
        outcome
    }

    async fn put_in_force(&mut self, loaded: Box<Loaded>, seen: Option<Seen>) -> Result<String, String> {
        let stopping = || "the daemon is stopping".to_owned();
        let (config, snapshot) = (loaded.config.clone(), loaded.snapshot.clone());
        let (answer, outcome) = oneshot::channel();
        self.news.send(News::Load(loaded, answer)).await.map_err(|_| stopping())?;
        let text = outcome.await.map_err(|_| stopping())?.inspect_err(|_| {
            // What validates and cannot be put in force is tried again.
            self.looked_at.clear();
            self.seen = None;
            self.revision = None;
        })?;
        self.local = config.source.local();
        self.seen = seen;
        self.revision.clone_from(&config.source.revision);
        self.take_over(&config);
        if let (Some(repository), Some(snapshot)) = (&config.repository, snapshot) {
            kept::keep(repository, &snapshot);
        }
        Ok(text)
    }

    async fn load(&mut self, why: Why) -> Result<Found, Failure> {
        let broken = |error: LoadError| Failure::Broken(error.to_string());
        let (local, is_new) = if why == Why::Due && self.watcher.is_none() {
            // Nobody has said that this machine's files are ready.
            (self.local.clone(), false)
        } else {
            let path = self.path.clone();
            let read = self.aside(move || config::read(&path)).await.and_then(|read| read.map_err(broken));
            let local = read.inspect_err(|_| self.looked_at.clear())?;
            self.places = places(&local);
            let text = text(&local);
            let is_new = text != self.looked_at;
            self.looked_at = text;
            (local, is_new)
        };
        let anew = is_new || why == Why::Asked;
        if !anew && why == Why::Changed {
            return Ok(Found::Nothing);
        }
        let (local, repository) = self.aside(move || (super::repository(&local), local)).await.map(|(r, l)| (l, r))?;
        let Some(repository) = repository.map_err(broken)? else {
            if !anew {
                return Ok(Found::Nothing);
            }
            let loaded = self.aside(move || whole(local, None)).await?.map_err(broken)?;
            return Ok(Found::New(Box::new(loaded), None));
        };
        let fetched = self.fetch.fetch(&repository, self.seen.as_ref().filter(|_| !anew)).await;
        let fetched = fetched.map_err(|error| {
            if is_new {
                // Not yet looked at, after all.
                self.looked_at.clear();
            }
            Failure::Unreachable(error.report(&local).to_string())
        })?;
        let Some((seen, snapshot)) = fetched else { return Ok(Found::Unchanged) };
        if !anew && self.revision.as_ref() == Some(&snapshot.revision) {
            self.seen = Some(seen);
            return Ok(Found::Unchanged);
        }
        let loaded = self.aside(move || whole(local, Some((&repository, snapshot)))).await;
        match loaded.and_then(|loaded| loaded.map_err(broken)) {
            Ok(loaded) => Ok(Found::New(Box::new(loaded), Some(seen))),
            Err(failure) => {
                // The same commit will not be better the next time.
                self.seen = Some(seen);
                self.revision = None;
                Err(failure)
            }
        }
    }

    /// Reads or checks on another thread, so that webhooks are answered meanwhile, and not for
    /// ever: a file may be a pipe, or lie on a server that is gone. There is never more than one
    /// that does not end.
    async fn aside<T: Send + 'static>(&mut self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Failure> {
        if self.stuck.as_ref().is_some_and(|stuck| !stuck.is_finished()) {
            return Err(Failure::Broken("an earlier reading of the configuration has not ended yet".to_owned()));
        }
        let (answer, outcome) = oneshot::channel();
        let task = tokio::task::spawn_blocking(move || {
            let _ = answer.send(work());
        });
        match tokio::time::timeout(CHECKING, outcome).await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(_)) => Err(Failure::Broken("the check of the configuration has ended without an answer".to_owned())),
            Err(_) => {
                self.stuck = Some(task);
                let limit = format_duration(CHECKING);
                Err(Failure::Broken(format!(
                    "the configuration was not read and checked within {limit}: is one of its files a pipe, or on a server that does not answer?"
                )))
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

    /// Links may lead elsewhere by now, also to something wrong. Whether there is a folder that was
    /// not watched before.
    fn watch(&mut self) -> bool {
        let Some(watcher) = &mut self.watcher else { return false };
        watcher.watch(&self.places.iter().flat_map(|place| watch::folders(place)).collect::<BTreeSet<_>>())
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
fn text(source: &Source) -> String {
    source.local_texts().map(|(path, text)| format!("{}\n{text}\n", path.display())).collect()
}

/// A tenth more or less, so that entrance nodes do not all ask at once. Chance needs no secrecy
/// here: the standard library's keys will do.
fn with_jitter(interval: Duration) -> Duration {
    let chance = RandomState::new().hash_one(0) % 1000;
    interval * 9 / 10 + interval / 5 * chance as u32 / 1000
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;
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
        async fn fetch(&self, _: &Repository, seen: Option<&Seen>) -> Result<Option<(Seen, Snapshot)>, Unreachable> {
            self.asked.fetch_add(1, Relaxed);
            let commit = self.commit.lock().unwrap().clone();
            let (commit, text) = commit.ok_or_else(|| "connection refused".to_owned())?;
            if seen == Some(&commit) {
                return Ok(None);
            }
            let files = BTreeMap::from([("dataplane.toml".into(), text.into_bytes())]);
            Ok(Some((commit.clone(), Snapshot { revision: commit, files })))
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
        /// What is to be put in force cannot be.
        refuse: bool,
    }

    fn append(file: &Path) {
        let mut file = std::fs::File::options().append(true).open(file).unwrap();
        std::io::Write::write_all(&mut file, b"# edited\n").unwrap();
    }

    impl Rig {
        /// Started from commit `one`, with an interval of a minute.
        fn start() -> Self {
            Self::start_with("", |_| {})
        }

        /// The same, with these lines in front, and something that happens when the file has been
        /// read.
        fn start_with(lines: &str, meanwhile: impl FnOnce(&Path)) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("dataplane.toml");
            let state = folder.path().join("state");
            let local = format!("{lines}[source]\ngit = \"/srv/x.git\"\nstate_directory = \"{}\"\n", state.display());
            std::fs::write(&file, local).unwrap();
            let server = Arc::new(Server::default());
            server.push("one", &GOOD.replace("HOST", "one.example"));
            let local = config::read(&file).unwrap();
            let repository = config::repository(&local).unwrap().unwrap();
            let files = BTreeMap::from([("dataplane.toml".into(), GOOD.replace("HOST", "one.example").into_bytes())]);
            let loaded = whole(local, Some((&repository, Snapshot { revision: "one".into(), files }))).unwrap();
            let (sender, news) = mpsc::channel(1);
            let (requests, inbox) = mpsc::channel(1);
            let pushed = Arc::new(Notify::new());
            meanwhile(&file);
            let follower = Follower::new(file, server.clone(), sender, &loaded.config, false);
            tokio::spawn(follower.run(inbox, pushed.clone()));
            Self { server, news, requests, pushed, in_force: "one.example".into(), folder, refuse: false }
        }

        /// As an operator does.
        async fn ask(&self) -> oneshot::Receiver<Result<String, String>> {
            let (answer, outcome) = oneshot::channel();
            self.requests.send(answer).await.unwrap();
            outcome
        }

        /// Adds a line to this machine's file.
        fn edit(&self) {
            append(&self.folder.path().join("dataplane.toml"));
        }

        /// The next news within `limit`, in one word; what is to be put in force is.
        async fn next(&mut self, limit: Duration) -> &'static str {
            match tokio::time::timeout(limit, self.news.recv()).await {
                Err(_) => "nothing",
                Ok(None) => "ended",
                Ok(Some(News::Load(_, answer))) if self.refuse => {
                    answer.send(Err("the address is in use".into())).unwrap();
                    "refused"
                }
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
        let outcome = rig.ask().await;
        assert_eq!(rig.next(Duration::from_secs(1)).await, "load", "asked, it loads what is there, changed or not");
        assert_eq!(outcome.await.unwrap(), Ok("in force".to_owned()));
        rig.server.go_away();
        let outcome = rig.ask().await;
        assert_eq!(rig.next(Duration::from_secs(1)).await, "unreachable");
        assert!(outcome.await.unwrap().unwrap_err().contains("connection refused"));
    }

    #[tokio::test(start_paused = true)]
    async fn the_way_back_to_what_is_in_force_is_news_after_something_was_refused() {
        let mut rig = Rig::start();
        assert_eq!(rig.next(MINUTE).await, "unchanged");
        rig.server.push("two", "listeners = 3");
        assert_eq!(rig.next(INTERVAL).await, "broken");
        rig.server.push("one", &GOOD.replace("HOST", "one.example"));
        assert_eq!(rig.next(INTERVAL).await, "load", "nothing is wrong any more, and that is to be told");
        assert_eq!(rig.next(INTERVAL).await, "unchanged");
    }

    #[tokio::test(start_paused = true)]
    async fn what_could_not_be_put_in_force_is_tried_again_and_so_is_the_way_back() {
        let mut rig = Rig::start();
        assert_eq!(rig.next(MINUTE).await, "unchanged");
        rig.refuse = true;
        rig.server.push("two", &GOOD.replace("HOST", "two.example"));
        assert_eq!(rig.next(INTERVAL).await, "refused");
        assert_eq!(rig.next(INTERVAL).await, "refused");
        rig.refuse = false;
        rig.server.push("one", &GOOD.replace("HOST", "one.example"));
        assert_eq!(rig.next(INTERVAL).await, "load");
        assert_eq!(rig.next(INTERVAL).await, "unchanged");
    }

    #[tokio::test(start_paused = true)]
    async fn without_watch_an_edit_waits_for_its_owner_and_commits_do_not_wait_for_it() {
        let mut rig = Rig::start();
        assert_eq!(rig.next(MINUTE).await, "unchanged");
        std::fs::write(rig.folder.path().join("dataplane.toml"), "[[half an edit").unwrap();
        assert_eq!(rig.next(INTERVAL).await, "unchanged");
        rig.server.push("two", &GOOD.replace("HOST", "two.example"));
        assert_eq!(rig.next(INTERVAL).await, "load");
        assert_eq!(rig.in_force, "two.example");
        let outcome = rig.ask().await;
        assert_eq!(rig.next(Duration::from_secs(1)).await, "broken");
        assert!(outcome.await.unwrap().is_err());
        assert_eq!(rig.next(INTERVAL).await, "unchanged");
    }

    const LONG: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_change_from_before_the_watch_is_noticed() {
        let mut rig = Rig::start_with("watch = true\n", append);
        assert_eq!(rig.next(LONG).await, "load");
        assert_eq!(rig.next(LONG).await, "unchanged");
        rig.edit();
        assert_eq!(rig.next(LONG).await, "load");
    }

    #[tokio::test]
    async fn a_file_that_changes_says_nothing_of_the_repository() {
        let mut rig = Rig::start_with("watch = true\n", |_| {});
        assert_eq!(rig.next(LONG).await, "unchanged");
        let asked = rig.server.asked.load(Relaxed);
        std::fs::write(rig.folder.path().join("neighbour"), "").unwrap();
        assert_eq!(rig.next(Duration::from_millis(500)).await, "nothing");
        assert_eq!(rig.server.asked.load(Relaxed), asked);
        // One that could not be put in force is in question until it is, even where it says again
        // what is in force.
        rig.refuse = true;
        rig.edit();
        assert_eq!(rig.next(LONG).await, "refused");
        rig.refuse = false;
        std::fs::write(rig.folder.path().join("neighbour"), "").unwrap();
        assert_eq!(rig.next(LONG).await, "load");
    }

    #[tokio::test]
    async fn a_file_that_is_never_read_to_its_end_keeps_nobody_waiting() {
        let mut rig = Rig::start();
        assert_eq!(rig.next(LONG).await, "unchanged");
        let file = rig.folder.path().join("dataplane.toml");
        let text = std::fs::read_to_string(&file).unwrap();
        let pipe = rig.folder.path().join("pipe.toml");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
        std::fs::write(&file, format!("include = [\"pipe.toml\"]\n{text}")).unwrap();
        let outcome = rig.ask().await;
        // Whoever shares the thread, as webhooks do, goes on.
        let began = std::time::Instant::now();
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert!(began.elapsed() < CHECKING / 2, "{:?}", began.elapsed());
        assert_eq!(rig.next(3 * CHECKING).await, "broken");
        assert!(outcome.await.unwrap().unwrap_err().contains("was not read and checked within 10s"));
        // There is never a second one.
        std::fs::write(&file, &text).unwrap();
        let outcome = rig.ask().await;
        assert_eq!(rig.next(LONG).await, "broken");
        assert!(outcome.await.unwrap().unwrap_err().contains("has not ended yet"));
        // Somebody writes into the pipe at last.
        drop(std::fs::File::options().write(true).open(&pipe).unwrap());
        let end = std::time::Instant::now() + LONG;
        loop {
            let outcome = rig.ask().await;
            if rig.next(LONG).await == "load" {
                assert!(outcome.await.unwrap().is_ok());
                return;
            }
            assert!(std::time::Instant::now() < end, "the reading has ended");
        }
    }

    #[test]
    fn nodes_do_not_ask_in_step() {
        let looks: BTreeSet<_> = (0..100).map(|_| with_jitter(MINUTE)).collect();
        assert!(looks.len() > 10);
        assert!(looks.iter().all(|look| (54..=66).contains(&look.as_secs())), "{looks:?}");
    }
}
