//! The daemon under test, as an operator sees it: a configuration file, a process, its logs,
//! metrics and command line.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::netns::{CLUSTER, ENTRANCE, Host, Net, Process};
use crate::{PATIENCE, eventually, target_dir, within};

/// The host that [`Config::new`] routes.
pub const HOST: &str = "app.example.com";
/// The name of its route, listener and upstream in metrics.
pub const ROUTE: &str = HOST;
/// How long a daemon may take to say READY=1 on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(60);

/// A configuration that is right unless a test makes it wrong: one listener `public` on both
/// families, one upstream `cluster`, one route.
#[derive(Clone, Debug)]
pub struct Config {
    /// `engine = …`
    pub engine: String,
    /// Port of the listener.
    pub port: u16,
    /// Further lines of `[listeners.public]`.
    pub listener: String,
    /// `address:port`
    pub targets: Vec<String>,
    /// Further lines of `[upstreams.cluster]`.
    pub upstream: String,
    /// Further lines of the route.
    pub route: String,
    /// Lines of `[limits]`.
    pub limits: String,
    /// Further tables.
    pub more: String,
}

impl Config {
    /// The configuration that works, for one engine.
    pub fn new(engine: &str) -> Self {
        Self {
            engine: engine.to_owned(),
            port: 443,
            listener: String::new(),
            targets: vec![format!("{}:443", CLUSTER[0])],
            upstream: String::new(),
            route: String::new(),
            limits: String::new(),
            more: String::new(),
        }
    }

    /// Adds lines to `[limits]`.
    #[must_use]
    pub fn limits(mut self, lines: &str) -> Self {
        let _ = writeln!(self.limits, "{lines}");
        self
    }

    /// Adds lines to `[listeners.public]`.
    #[must_use]
    pub fn listener(mut self, lines: &str) -> Self {
        let _ = writeln!(self.listener, "{lines}");
        self
    }

    /// Adds lines to `[upstreams.cluster]`.
    #[must_use]
    pub fn upstream(mut self, lines: &str) -> Self {
        let _ = writeln!(self.upstream, "{lines}");
        self
    }

    /// Adds lines to the route.
    #[must_use]
    pub fn route(mut self, lines: &str) -> Self {
        let _ = writeln!(self.route, "{lines}");
        self
    }

    /// Adds tables.
    #[must_use]
    pub fn more(mut self, lines: &str) -> Self {
        let _ = writeln!(self.more, "{lines}");
        self
    }

    /// Replaces the targets.
    #[must_use]
    pub fn targets<const N: usize>(mut self, targets: [&str; N]) -> Self {
        self.targets = targets.map(str::to_owned).to_vec();
        self
    }

    fn text(&self, dir: &Path) -> String {
        let Self { engine, port, listener, targets, upstream, route, limits, more } = self;
        format!(
            "engine = \"{engine}\"\n\
             [listeners.public]\nbind = [\"{}:{port}\", \"[{}]:{port}\"]\n{listener}\
             [upstreams.cluster]\ntargets = {targets:?}\n{upstream}\
             [[routes]]\nhosts = [\"{HOST}\", \"*.apps.example.com\"]\nupstream = \"cluster\"\n{route}\
             [limits]\n{limits}\
             [admin]\nbind = \"{ADMIN}\"\nsocket = \"{}\"\n{more}",
            ENTRANCE[0],
            ENTRANCE[1],
            dir.join("admin.sock").display()
        )
    }
}

const ADMIN: &str = "127.0.0.1:9443";

/// What a process is started with besides its configuration.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// User and group id; `None`: root.
    pub user: Option<u32>,
    /// RLIMIT_NOFILE, soft and hard.
    pub files: Option<u64>,
    /// Bytes of a control group of its own.
    pub memory: Option<u64>,
    /// There is no service manager to tell anything.
    pub alone: bool,
}

/// A running daemon; killed when dropped.
pub struct Daemon {
    process: Process,
    /// The process in charge: the first one, or the last successor.
    in_charge: Arc<AtomicU32>,
    host: Host,
    dir: PathBuf,
    /// It has told systemd so.
    ready: Arc<AtomicBool>,
    /// What it has told systemd of itself last.
    told: Arc<Mutex<String>>,
    log: Arc<Mutex<Vec<String>>>,
    /// Removed when the process is gone.
    _group: Option<MemoryGroup>,
}

/// A control group with a memory limit, of either version.
struct MemoryGroup(PathBuf);

impl MemoryGroup {
    #[track_caller]
    fn new(bytes: u64) -> Self {
        let mounts = std::fs::read_to_string("/proc/mounts").expect("procfs");
        let of = |kind: &str, option: &str| {
            let fields = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
            let mut all = mounts.lines().map(fields);
            all.find(|m| m[2] == kind && m[3].split(',').any(|o| o == option)).map(|m| PathBuf::from(&m[1]))
        };
        let (root, file) = match of("cgroup", "memory") {
            Some(root) => (root, "memory.limit_in_bytes"),
            None => (of("cgroup2", "rw").expect("a control group with a memory limit is needed"), "memory.max"),
        };
        if file == "memory.max" {
            let _ = std::fs::write(root.join("cgroup.subtree_control"), "+memory");
        }
        let group = root.join(format!("dp-test-{}-{bytes}", std::process::id()));
        std::fs::create_dir(&group).expect("root may make control groups");
        std::fs::write(group.join(file), bytes.to_string()).expect("the memory controller is there");
        Self(group)
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let _ = within(PATIENCE, || std::fs::remove_dir(&self.0).ok());
    }
}

fn as_pid(pid: u32) -> Pid {
    Pid::from_raw(pid as i32).expect("a process id")
}

impl Daemon {
    /// Starts it on the entrance node and waits until it says READY=1.
    #[track_caller]
    pub fn start(net: &Net, config: &Config) -> Self {
        Self::start_with(net, config, Limits::default())
    }

    /// As [`start`](Self::start), as another user or with another limit.
    #[track_caller]
    pub fn start_with(net: &Net, config: &Config, limits: Limits) -> Self {
        let daemon = Self::spawn(net, config, limits);
        daemon.wait_ready();
        daemon
    }

    /// Starts it and returns at once.
    #[track_caller]
    pub fn spawn(net: &Net, config: &Config, limits: Limits) -> Self {
        Self::spawn_on(net, &net.entrance, |dir| config.text(dir), limits)
    }

    /// As [`start`](Self::start), on any host, with a configuration of the caller's own; it is told
    /// the daemon's directory, where its control socket has to be.
    #[track_caller]
    pub fn start_on(net: &Net, host: &Host, text: impl FnOnce(&Path) -> String) -> Self {
        let daemon = Self::spawn_on(net, host, text, Limits::default());
        daemon.wait_ready();
        daemon
    }

    #[track_caller]
    fn spawn_on(net: &Net, host: &Host, text: impl FnOnce(&Path) -> String, limits: Limits) -> Self {
        let dir = tempfile::Builder::new().prefix("daemon-").tempdir_in(net.dir()).expect("a directory").keep();
        let file = dir.join("dataplane.toml");
        std::fs::write(&file, text(&dir)).expect("the configuration is written");
        let notify_path = dir.join("notify.sock");
        let notify = UnixDatagram::bind(&notify_path).expect("a socket for sd_notify");
        if let Some(user) = limits.user {
            for path in [&dir, &file, &notify_path] {
                std::os::unix::fs::chown(path, Some(user), Some(user)).expect("chown");
            }
        }
        rustix::process::set_child_subreaper(Some(rustix::process::getpid())).expect("prctl");
        let mut command = Command::new(binary());
        command
            .args(["run", "--log-format", "json", "--config"])
            .arg(&file)
            .env("GIT_SSL_CAINFO", crate::forge::authority(net.dir()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        if limits.alone {
            command.env_remove("NOTIFY_SOCKET");
        } else {
            command.env("NOTIFY_SOCKET", &notify_path);
        }
        if let Some(user) = limits.user {
            command.uid(user).gid(user);
        }
        if let Some(files) = limits.files {
            let set = move || {
                let limit = rustix::process::Rlimit { current: Some(files), maximum: Some(files) };
                rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).map_err(Into::into)
            };
            // SAFETY: setrlimit(2) is a bare system call, async-signal-safe between fork and exec.
            unsafe { command.pre_exec(set) };
        }
        let group = limits.memory.map(MemoryGroup::new);
        if let Some(MemoryGroup(group)) = &group {
            let procs = std::fs::File::options().write(true).open(group.join("cgroup.procs")).expect("made above");
            let join = move || rustix::io::write(&procs, b"0").map(drop).map_err(Into::into);
            // SAFETY: write(2) is a bare system call, async-signal-safe between fork and exec.
            unsafe { command.pre_exec(join) };
        }
        let mut process = host.spawn(&mut command).expect("the daemon's binary can be run");
        let log = Arc::new(Mutex::new(Vec::new()));
        let lines = BufReader::new(process.child().stderr.take().expect("piped"));
        let sink = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                sink.lock().expect("no panic while held").push(line);
            }
        });
        let in_charge = Arc::new(AtomicU32::new(process.pid()));
        let ready = Arc::new(AtomicBool::new(false));
        let told = Arc::new(Mutex::new(String::new()));
        let (watcher, status, main) = (Arc::downgrade(&ready), Arc::clone(&told), Arc::clone(&in_charge));
        notify.set_read_timeout(Some(Duration::from_secs(1))).expect("a time limit");
        // Reads for as long as there is a daemon, as systemd does.
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                let length = notify.recv(&mut buffer);
                let Some(ready) = watcher.upgrade() else { return };
                let text = String::from_utf8_lossy(&buffer[..length.unwrap_or(0)]);
                if let Some(text) = text.lines().find_map(|line| line.strip_prefix("STATUS=")) {
                    text.clone_into(&mut status.lock().expect("no panic while held"));
                }
                if let Some(pid) = text.lines().find_map(|line| line.strip_prefix("MAINPID=")) {
                    main.store(pid.parse().expect("a process id"), Relaxed);
                }
                if text.lines().any(|line| line == "READY=1") {
                    ready.store(true, Relaxed);
                }
            }
        });
        Self { process, in_charge, host: host.clone(), dir, ready, told, log, _group: group }
    }

    /// Waits for READY=1; panics with the log when the daemon ends before that.
    #[track_caller]
    pub fn wait_ready(&self) {
        let start = Instant::now();
        while !self.ready.load(Relaxed) {
            assert!(
                start.elapsed() < START_LIMIT && !self.ended(),
                "the daemon did not get ready (config {}):\n{}",
                self.config_path().display(),
                self.log().join("\n")
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The line that it has told systemd of itself.
    pub fn status_line(&self) -> String {
        self.told.lock().expect("no panic while held").clone()
    }

    /// Its own directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its configuration file.
    pub fn config_path(&self) -> PathBuf {
        self.dir.join("dataplane.toml")
    }

    /// Writes another configuration into the file; nothing is reloaded yet.
    pub fn rewrite(&self, config: &Config) {
        std::fs::write(self.config_path(), config.text(&self.dir)).expect("the configuration is written");
    }

    /// Waits for lines of the log that have all of these parts, and returns those that there are:
    /// lines come a moment after what they tell of, in its order.
    #[track_caller]
    pub fn wait_log(&self, parts: &[&str]) -> Vec<String> {
        let has = |line: &String| parts.iter().all(|part| line.contains(part));
        let lines = within(PATIENCE, || {
            let lines: Vec<_> = self.log().into_iter().filter(has).collect();
            (!lines.is_empty()).then_some(lines)
        });
        lines.unwrap_or_else(|| panic!("no line with {parts:?}:\n{}", self.log().join("\n")))
    }

    /// What was read of its log so far, line by line. What it has just done may not be there yet:
    /// see [`wait_log`](Self::wait_log).
    pub fn log(&self) -> Vec<String> {
        self.log.lock().expect("no panic while held").clone()
    }

    /// The log lines of finished connections, as they were written.
    pub fn access_log(&self) -> Vec<String> {
        self.log().into_iter().filter(|line| line.contains("\"target\":\"access\"")).collect()
    }

    /// Of the process in charge.
    pub fn pid(&self) -> u32 {
        self.in_charge.load(Relaxed)
    }

    /// Has a successor take over; what that printed.
    #[track_caller]
    pub fn upgrade(&self) -> String {
        let before = self.pid();
        let out = self.cli(&["upgrade"]);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        assert!(out.status.success(), "{}\n{}", text(&out.stderr), self.log().join("\n"));
        eventually(PATIENCE, "a successor in charge", || (self.pid() != before).then_some(()));
        text(&out.stdout)
    }

    /// Of the process that was started first.
    pub fn first_pid(&self) -> u32 {
        self.process.pid()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(as_pid(self.pid()), signal).expect("it is our child");
    }

    /// Waits for its end, while no successor has taken over.
    #[track_caller]
    pub fn wait_end(&mut self, limit: Duration) -> ExitStatus {
        let child = self.process.child();
        eventually(limit, "the daemon's end", || child.try_wait().expect("it is our child"))
    }

    /// Whether the process has ended, also when nobody has waited for it yet.
    pub fn ended(&self) -> bool {
        let stat = self.proc("stat");
        stat.rsplit(") ").next().is_none_or(|rest| rest.starts_with(['Z', 'X']))
    }

    fn proc(&self, file: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{file}", self.pid())).unwrap_or_default()
    }

    /// Open file descriptors: what each one is.
    pub fn fds(&self) -> Vec<String> {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .expect("the daemon runs")
            .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
            .map(|target| target.to_string_lossy().into_owned())
            .collect()
    }

    /// Pipes, each with its two descriptors.
    pub fn pipes(&self) -> usize {
        let mut pipes: Vec<_> = self.fds().into_iter().filter(|fd| fd.starts_with("pipe:")).collect();
        pipes.sort();
        pipes.dedup();
        pipes.len()
    }

    /// Threads.
    pub fn threads(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/task", self.pid())).expect("the daemon runs").count()
    }

    /// Proportional set size, bytes.
    pub fn pss(&self) -> u64 {
        let rollup = self.proc("smaps_rollup");
        let line = rollup.lines().find_map(|l| l.strip_prefix("Pss:")).expect("a Pss line");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
    }

    /// CPU time used so far, user and system.
    pub fn cpu(&self) -> Duration {
        let stat = self.proc("stat");
        let fields: Vec<_> = stat.rsplit(") ").next().expect("a stat line").split(' ').collect();
        let ticks: u64 = fields[11..13].iter().map(|f| f.parse::<u64>().expect("a number")).sum();
        Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
    }

    /// One command of its command line, with its configuration.
    pub fn cli(&self, args: &[&str]) -> Output {
        self.host
            .run(|| {
                let mut command = Command::new(binary());
                let net = self.dir.parent().expect("a folder of the net's");
                command.env("GIT_SSL_CAINFO", crate::forge::authority(net));
                command.args(args).arg("--config").arg(self.config_path()).output()
            })
            .expect("the daemon's binary can be run")
    }

    /// The JSON document that a command prints.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Value {
        let out = self.cli(args);
        assert!(out.status.success(), "{args:?}: {}\n{}", out.status, String::from_utf8_lossy(&out.stderr));
        serde_json::from_slice(&out.stdout)
            .unwrap_or_else(|e| panic!("{args:?} is no JSON ({e}): {}", String::from_utf8_lossy(&out.stdout)))
    }

    /// GET of a path of the admin listener: status code and body.
    pub fn get(&self, path: &str) -> Result<(u16, String), String> {
        let addr: SocketAddr = ADMIN.parse().expect("an address");
        let mut stream = self.host.connect(addr).map_err(|e| e.to_string())?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(|e| e.to_string())?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: {ADMIN}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).map_err(|e| e.to_string())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map_err(|e| e.to_string())?;
        let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| format!("no HTTP answer: {answer:?}"))?;
        let code = head.split(' ').nth(1).and_then(|c| c.parse().ok()).ok_or_else(|| head.to_owned())?;
        if head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
            return Ok((code, unchunk(body)?));
        }
        Ok((code, body.to_owned()))
    }

    /// A scrape of /metrics.
    #[track_caller]
    pub fn metrics(&self) -> Metrics {
        let (code, body) = self.get("/metrics").expect("the admin listener answers");
        assert_eq!(code, 200, "{body}");
        Metrics::parse(&body)
    }

    /// The sum of a metric over the series that have these labels, now.
    #[track_caller]
    pub fn metric(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.metrics().sum(name, labels)
    }

    /// Waits for `status` to say that the last reload or look at a repository failed, and returns
    /// why: the metric of it may come first.
    #[track_caller]
    pub fn wait_last_error(&self) -> String {
        eventually(PATIENCE, "an error in the status", || {
            self.json(&["status", "--json"])["config"]["last_error"].as_str().map(str::to_owned)
        })
    }

    /// Waits for a metric to get a value.
    #[track_caller]
    pub fn wait_metric(&self, name: &str, labels: &[(&str, &str)], value: f64) {
        let start = Instant::now();
        loop {
            let now = self.metric(name, labels);
            if (now - value).abs() < 0.5 {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "{name}{labels:?} is {now}, not {value}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let tail = &log[log.len().saturating_sub(30)..];
            eprintln!("--- the daemon's last lines ---\n{}", tail.join("\n"));
        }
        let pid = self.pid();
        if pid != self.process.pid() {
            // A successor: it has become a child of this process when its predecessor ended.
            let _ = kill_process(as_pid(pid), Signal::KILL);
            let _ = rustix::process::waitpid(Some(as_pid(pid)), rustix::process::WaitOptions::empty());
        }
    }
}

/// The daemon's binary: `DATAPLANE_BIN`, else the newer one of the workspace's builds.
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("DATAPLANE_BIN") {
        return path.into();
    }
    let modified = |path: &PathBuf| std::fs::metadata(path).and_then(|m| m.modified()).ok();
    ["release", "debug"]
        .map(|profile| target_dir().join(profile).join("dataplane"))
        .into_iter()
        .filter(|path| modified(path).is_some())
        .max_by_key(modified)
        .expect("no dataplane binary in target/: build it first (cargo build -p dataplane), or set DATAPLANE_BIN")
}

fn unchunk(mut body: &str) -> Result<String, String> {
    let mut whole = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size.trim(), 16).map_err(|e| format!("chunk size {size:?}: {e}"))?;
        if size == 0 {
            break;
        }
        whole += rest.get(..size).ok_or("a chunk is cut short")?;
        body = &rest[size + 2..];
    }
    Ok(whole)
}

/// One scrape in the Prometheus text format.
#[derive(Debug)]
pub struct Metrics(Vec<Series>);

#[derive(Debug)]
struct Series {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

impl Metrics {
    /// Panics on a line that is no series.
    pub fn parse(text: &str) -> Self {
        let series = |line: &str| -> Option<Series> {
            let (id, value) = line.rsplit_once(' ')?;
            let (name, labels) = match id.split_once('{') {
                Some((name, labels)) => (name, labels.strip_suffix('}')?),
                None => (id, ""),
            };
            let labels = labels
                .split("\",")
                .filter(|pair| !pair.is_empty())
                .map(|pair| {
                    let (key, value) = pair.split_once("=\"")?;
                    Some((key.to_owned(), value.trim_end_matches('"').to_owned()))
                })
                .collect::<Option<_>>()?;
            Some(Series { name: name.to_owned(), labels, value: value.parse().ok()? })
        };
        let lines = text.lines().filter(|l| !l.is_empty() && !l.starts_with('#'));
        Self(lines.map(|l| series(l).unwrap_or_else(|| panic!("not a series: {l}"))).collect())
    }

    /// The sum over the series of this name that have these labels; 0 when there is none.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let has = |s: &&Series| labels.iter().all(|(k, v)| s.labels.get(*k).is_some_and(|have| have == v));
        self.0.iter().filter(|s| s.name == name).filter(has).map(|s| s.value).sum()
    }

    /// Whether a series of this name exists.
    pub fn has(&self, name: &str) -> bool {
        self.0.iter().any(|s| s.name == name)
    }

    /// The label names of the first series of this name, sorted.
    pub fn labels_of(&self, name: &str) -> Option<Vec<&str>> {
        self.0.iter().find(|s| s.name == name).map(|s| s.labels.keys().map(String::as_str).collect())
    }

    /// The different values of a label.
    pub fn values(&self, name: &str, label: &str) -> Vec<&str> {
        let mut values: Vec<_> =
            self.0.iter().filter(|s| s.name == name).filter_map(|s| s.labels.get(label).map(String::as_str)).collect();
        values.sort_unstable();
        values.dedup();
        values
    }
}
