//! The entrance node as a whole machine: a real systemd as PID 1, the daemon installed by
//! `cargo xtask install`, run by the unit.
//!
//! systemd-nspawn boots an overlay of this machine's own root file system, so nothing is
//! downloaded, and every write stays in memory. What this machine has enabled, mounts or configures
//! is hidden from it. Mounts live in a mount namespace that ends with the container; what is left
//! to clean up is a control group.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::daemon::{HOST, binary};
use crate::eventually;
use crate::netns::{CLUSTER, Net};
use crate::rig::{PATIENCE, accept, accept_within, hello, public};
use crate::stream::{Pattern, client_hello, is_alike, read_to_end};

/// The service's name.
const UNIT: &str = "dataplane.service";
/// What the daemon reads, as the machine sees it.
pub const CONFIG: &str = "/etc/dataplane/dataplane.toml";
/// How long a machine may take to boot while others keep the processors busy.
const BOOT_LIMIT: Duration = Duration::from_secs(60);
const PREFIX: &str = "dp-test";

/// Runs `cargo xtask install --root FOLDER` with the binary under test, as somebody does whose
/// umask hides everything from others.
#[track_caller]
pub fn install(root: &Path) {
    let out = Command::new("sh")
        .args(["-c", "umask 077 && exec \"$@\"", "sh", env!("CARGO"), "xtask", "install", "--root"])
        .arg(root)
        .arg("--binary")
        .arg(binary())
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdin(Stdio::null())
        .output()
        .expect("cargo can be run");
    assert!(out.status.success(), "cargo xtask install: {}\n{}", out.status, text(&out));
}

/// A booted machine on the network of a host; gone when dropped.
pub struct Machine {
    nspawn: Child,
    /// The machine's PID 1, as this machine counts.
    leader: u32,
    cgroup: Cgroup,
    console: PathBuf,
}

impl Machine {
    /// Boots it in the place of the entrance node, with the daemon installed and not yet started.
    #[track_caller]
    pub fn boot(net: &Net) -> Self {
        for (program, package) in [("systemd-nspawn", "systemd-container"), ("nsenter", "util-linux")] {
            let found = Command::new(program).arg("--version").output().is_ok_and(|out| out.status.success());
            assert!(found, "{program} is needed: apt-get install {package}");
        }
        let dir = net.dir().join("machine");
        let console = net.dir().join("console");
        let ready_path = net.dir().join("machine-ready");
        let ready = UnixDatagram::bind(&ready_path).expect("a socket for sd_notify");
        let cgroup = Cgroup::new();
        let mut join = File::options().write(true).open(cgroup.0.join("cgroup.procs")).expect("made above");
        let log = File::create(&console).expect("the temporary directory can be written");

        // A thread of its own: its mount namespace is seen by what it starts, and by nobody else.
        let spawn = || {
            let root = mount_overlay(&dir);
            install(&root);
            // systemd-nspawn leaves files there.
            run(Command::new("mount").args(["-t", "tmpfs", "tmpfs", "/run"]));
            let mut command = Command::new("systemd-nspawn");
            command
                .arg("--directory")
                .arg(&root)
                .args(["--boot", "--notify-ready=yes", "--register=no", "--keep-unit", "--link-journal=no"])
                .args(["--machine=entrance", "--resolv-conf=off", "--timezone=off", "--private-users=no"])
                .args(["--network-namespace-path=/proc/self/ns/net", "--capability=all", "--system-call-filter=bpf"])
                .arg("systemd.unit=basic.target")
                .env("NOTIFY_SOCKET", &ready_path)
                .env("SYSTEMD_NSPAWN_UNIFIED_HIERARCHY", "1")
                .env("SYSTEMD_NSPAWN_LOCK", "0")
                .stdin(Stdio::null())
                .stdout(log.try_clone().expect("a descriptor"))
                .stderr(log);
            // 0 is the process that writes (kernel: Documentation/admin-guide/cgroup-v2.rst).
            let join = move || join.write_all(b"0");
            // SAFETY: write(2) is async-signal-safe between fork and exec, and allocates nothing
            // when it succeeds.
            unsafe { command.pre_exec(join) };
            net.entrance.run(|| command.spawn()).expect("it printed its version")
        };
        let nspawn = std::thread::scope(|s| s.spawn(spawn).join().unwrap_or_else(|e| std::panic::resume_unwind(e)));
        let mut machine = Self { nspawn, leader: 0, cgroup, console };
        machine.wait_ready(&ready);
        machine
    }

    #[track_caller]
    fn wait_ready(&mut self, ready: &UnixDatagram) {
        let start = Instant::now();
        ready.set_read_timeout(Some(Duration::from_millis(100))).expect("a time limit");
        let mut buffer = [0; 4096];
        let mut booted = false;
        while !booted || self.leader == 0 {
            let ended = self.nspawn.try_wait().expect("it is our child");
            assert!(ended.is_none() && start.elapsed() < BOOT_LIMIT, "the machine did not boot ({ended:?})");
            let n = ready.recv(&mut buffer).unwrap_or(0);
            for line in String::from_utf8_lossy(&buffer[..n]).lines() {
                booted |= line == "READY=1";
                if let Some(pid) = line.strip_prefix("X_NSPAWN_LEADER_PID=") {
                    self.leader = pid.parse().expect("a process id");
                }
            }
        }
    }

    /// A file of the machine, where this process can reach it.
    pub fn path(&self, path: &str) -> PathBuf {
        Path::new("/proc").join(self.leader.to_string()).join("root").join(path.trim_start_matches('/'))
    }

    /// Writes a file of the machine, and makes its folder.
    #[track_caller]
    pub fn write(&self, path: &str, content: &str) {
        let path = self.path(path);
        std::fs::create_dir_all(path.parent().expect("a file")).expect("the machine's files can be written");
        std::fs::write(path, content).expect("the machine's files can be written");
    }

    /// Runs a command on the machine as root.
    #[track_caller]
    pub fn run(&self, args: &[&str]) -> Output {
        Command::new("nsenter")
            .args(["--target", &self.leader.to_string()])
            .args(["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd", "--"])
            .args(args)
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(Stdio::null())
            .output()
            .expect("it printed its version")
    }

    /// What a command prints; panics, with what it said, when it fails.
    #[track_caller]
    pub fn output(&self, args: &[&str]) -> String {
        let out = self.run(args);
        assert!(out.status.success(), "{args:?}: {}\n{}\n{}", out.status, text(&out), self.journal());
        String::from_utf8_lossy(&out.stdout).trim_end().to_owned()
    }

    /// A property of the service, systemd.service(5) or org.freedesktop.systemd1(5).
    #[track_caller]
    pub fn property(&self, name: &str) -> String {
        self.output(&["systemctl", "show", "--value", "--property", name, UNIT])
    }

    /// What the service logged, and what systemd said about it.
    pub fn journal(&self) -> String {
        // A journal that does not answer is no reason to hide what it has.
        let _ = self.run(&["journalctl", "--sync"]);
        text(&self.run(&["journalctl", "--unit", UNIT, "--output", "cat", "--no-pager"]))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let mut said = std::fs::read_to_string(&self.console).unwrap_or_default();
            if self.leader != 0 {
                let _ = write!(said, "--- the service's journal ---\n{}", self.journal());
            }
            eprintln!("--- the machine's console ---\n{said}");
        }
        self.cgroup.kill();
        let _ = self.nspawn.kill();
        let _ = self.nspawn.wait();
    }
}

const PATTERN: Pattern = Pattern::new(13);

/// A machine in the entrance node's place, and an upstream behind it.
pub struct Node {
    pub machine: Machine,
    pub upstream: TcpListener,
    pub net: Net,
}

impl Node {
    /// Booted, the daemon not started.
    #[track_caller]
    pub fn booted() -> Self {
        let net = Net::new();
        let upstream = net.cluster.listen(&format!("{}:443", CLUSTER[0]));
        Self { machine: Machine::boot(&net), upstream, net }
    }

    /// A node whose daemon routes [`HOST`] and runs.
    #[track_caller]
    pub fn started() -> Self {
        let node = Self::booted();
        node.machine.write(CONFIG, &config(HOST));
        node.machine.output(&["systemctl", "start", "dataplane"]);
        node
    }

    /// A client that has sent its hello.
    #[track_caller]
    pub fn says_hello(&self, name: &str) -> TcpStream {
        let mut client = self.net.client.connect(public()).expect("the daemon accepts");
        client.write_all(&client_hello(Some(name), &["h2", "http/1.1"])).expect("sent");
        client
    }

    /// Both ends of a connection through the daemon.
    #[track_caller]
    pub fn pair(&self) -> (TcpStream, TcpStream) {
        let client = self.says_hello(HOST);
        let (server, preamble) = accept(&self.upstream, false);
        assert!(is_alike(&preamble.hello, &hello()));
        (client, server)
    }

    /// A connection for this name is forwarded.
    #[track_caller]
    pub fn forwards(&self, name: &str) {
        let client = self.says_hello(name);
        let (server, _) = accept(&self.upstream, false);
        works(&(client, server));
    }

    /// It is not.
    #[track_caller]
    pub fn refuses(&self, name: &str) {
        let (answer, _) = read_to_end(&self.says_hello(name), PATIENCE);
        assert_eq!(answer.first(), Some(&21), "a TLS alert (RFC 8446 section 6): {answer:02x?}");
        assert!(accept_within(&self.upstream, Duration::from_millis(50)).is_none(), "{name} reaches the upstream");
    }

    /// Waits until systemd has started the daemon so often by itself.
    #[track_caller]
    pub fn wait_restarts(&self, n: &str) {
        let machine = &self.machine;
        eventually(PATIENCE, "systemd starts the daemon again", || {
            (machine.property("NRestarts") == n && machine.property("ActiveState") == "active").then_some(())
        });
    }
}

/// A configuration that forwards this host.
pub fn config(host: &str) -> String {
    format!(
        "[listeners.public]\nbind = [\"0.0.0.0:443\", \"[::]:443\"]\n\
         [upstreams.cluster]\ntargets = [\"{}:443\"]\n\
         [[routes]]\nhosts = [\"{host}\"]\nupstream = \"cluster\"\n",
        CLUSTER[0]
    )
}

/// Verifies a connection, of which both ends are given, each way.
#[track_caller]
pub fn works((client, server): &(TcpStream, TcpStream)) {
    for (from, to) in [(client, server), (server, client)] {
        PATTERN.send(from, 0, 10_000).expect("sent");
        PATTERN.receive_exactly(to, 0, 10_000);
    }
}

/// Both output streams, for people.
pub fn text(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

/// Mounts a root file system for the machine below `dir`, in a mount namespace of the calling
/// thread's own.
fn mount_overlay(dir: &Path) -> PathBuf {
    // SAFETY: without CLONE_FILES no descriptor table is unshared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.expect("a mount namespace needs root");
    run(Command::new("mount").args(["--make-rprivate", "/"]));
    std::fs::create_dir(dir).expect("the temporary directory can be written");
    run(Command::new("mount").args(["-t", "tmpfs", "-o", "mode=0755", "tmpfs"]).arg(dir));
    let [upper, work, root] = ["upper", "work", "root"].map(|name| dir.join(name));
    for folder in [&upper, &work, &root] {
        std::fs::create_dir(folder).expect("just mounted");
    }
    let options = format!("lowerdir=/,upperdir={},workdir={}", upper.display(), work.display());
    run(Command::new("mount").args(["-t", "overlay", "-o", &options, "overlay"]).arg(&root));

    let gone = |result: io::Result<()>| match result {
        Err(e) if e.kind() != io::ErrorKind::NotFound => panic!("{}: {e}", root.display()),
        _ => {}
    };
    // What this machine has enabled, its mounts, and a dataplane of its own are none of the
    // machine's business.
    gone(std::fs::remove_dir_all(root.join("etc/systemd/system")));
    gone(std::fs::remove_dir_all(root.join("etc/dataplane")));
    gone(std::fs::remove_file(root.join("etc/fstab")));
    // Without one it would take this for its first boot, and enable what the distribution's presets
    // say.
    gone(std::fs::remove_file(root.join("etc/machine-id")));
    std::fs::write(root.join("etc/machine-id"), "00000000000000000000000000000da7\n").expect("an overlay is writable");
    root
}

#[track_caller]
fn run(command: &mut Command) {
    let out = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(out.status.success(), "{command:?}: {}\n{}", out.status, text(&out));
}

/// A control group (version 2) that all of a machine is in; what is in it is killed, and it is
/// removed, when it is dropped.
struct Cgroup(PathBuf);

impl Cgroup {
    #[track_caller]
    fn new() -> Self {
        static ONCE: Once = Once::new();
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let mounts = std::fs::read_to_string("/proc/self/mounts").expect("procfs");
        let mut mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let hierarchy = mounts.find(|m| m[2] == "cgroup2").map(|m| PathBuf::from(m[1]));
        let hierarchy = hierarchy.expect("systemd needs control groups: mount -t cgroup2 cgroup2 /sys/fs/cgroup");
        ONCE.call_once(|| sweep(&hierarchy));
        let name = format!("{PREFIX}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = hierarchy.join(name);
        std::fs::create_dir(&path).unwrap_or_else(|e| panic!("{}: {e} (these tests need root)", path.display()));
        Self(path)
    }

    fn kill(&self) {
        let _ = std::fs::write(self.0.join("cgroup.kill"), "1");
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        self.kill();
        // A group is busy until the last process in it has been reaped.
        let start = Instant::now();
        while remove_groups(&self.0).is_err() && start.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Removes a group and those below it.
fn remove_groups(group: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(group)?.flatten() {
        if entry.file_type()?.is_dir() {
            remove_groups(&entry.path())?;
        }
    }
    std::fs::remove_dir(group)
}

/// Ends the machines of test runs that are no more.
fn sweep(hierarchy: &Path) {
    let Ok(entries) = std::fs::read_dir(hierarchy) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|n| n.strip_prefix(PREFIX)?.split('-').nth(1));
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            drop(Cgroup(entry.path()));
        }
    }
}
