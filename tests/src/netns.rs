//! Three hosts in a row, each a network namespace: `client` ── `entrance` ── `cluster`.
//!
//! The links are veth pairs with an MTU of 1500, because loopback hides segmentation. Names carry
//! the process id, so tests run beside one another, and a later run sweeps away what a killed one
//! left behind. Knows nothing of the daemon.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Once};

use rustix::fd::AsFd;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use socket2::{Domain, Protocol, Socket, Type};

use crate::PATIENCE;

/// The entrance node's public addresses.
pub const ENTRANCE: [&str; 2] = ["198.51.100.1", "2001:db8:1::1"];
/// The client's addresses; the first of each family is the one that it connects from by default.
pub const CLIENT: [&str; 2] = ["198.51.100.2", "2001:db8:1::2"];
/// More addresses of the client host, for proxies in front of the entrance node and for visitors of
/// those.
pub const CLIENT_MORE: [&str; 4] = ["198.51.100.3", "198.51.100.4", "2001:db8:1::3", "2001:db8:1::4"];
/// The entrance node's address in the cluster's network.
pub const ENTRANCE_INSIDE: [&str; 2] = ["100.64.0.1", "fd7a:115c:a1e0::1"];
/// Addresses of the cluster host; two of each family, so that it can play two nodes.
pub const CLUSTER: [&str; 4] = ["100.64.0.2", "100.64.0.3", "fd7a:115c:a1e0::2", "fd7a:115c:a1e0::3"];
/// An address in the cluster's network that swallows every packet without an answer.
pub const BLACK_HOLE: &str = "100.64.0.66";

/// The network of the cluster host's pods.
pub const PODS: &str = "10.42.0.0/24";
/// The cluster host's own address in it.
const NODE: &str = "10.42.0.1";

const PREFIX: &str = "dp-test";
const ROLES: [&str; 3] = ["client", "entrance", "cluster"];
const NOWHERE: &str = "02:00:00:00:66:66";

/// One host: a network namespace. Clones are the same host.
#[derive(Clone)]
pub struct Host {
    name: Arc<str>,
    ns: Arc<File>,
}

impl Host {
    /// Runs `f` on a thread that is on this host: sockets made there, and processes started there,
    /// stay on the host.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|s| {
            s.spawn(|| {
                move_into_link_name_space(self.ns.as_fd(), Some(LinkNameSpaceType::Network))
                    .expect("entering a network namespace needs root");
                f()
            })
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Starts a program on this host.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Process> {
        self.run(|| command.spawn()).map(|child| Process { child })
    }

    /// Runs a program on this host to its end and returns its standard output; panics, with what it
    /// said, when it fails.
    #[track_caller]
    pub fn output(&self, command: &mut Command) -> String {
        let out = self.run(|| command.stdin(Stdio::null()).output()).unwrap_or_else(|e| panic!("{command:?}: {e}"));
        assert!(out.status.success(), "{command:?}: {}\n{}", out.status, String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    /// A TCP listener with a backlog that no test fills; IPv6 ones take IPv6 only.
    #[track_caller]
    pub fn listen(&self, addr: &str) -> TcpListener {
        self.listen_as(addr, false)
    }

    /// The same on an IPv4 address that the host need not have yet.
    #[track_caller]
    pub fn listen_early(&self, addr: &str) -> TcpListener {
        self.listen_as(addr, true)
    }

    #[track_caller]
    fn listen_as(&self, addr: &str, early: bool) -> TcpListener {
        let addr: SocketAddr = addr.parse().expect("address:port");
        self.run(|| -> io::Result<TcpListener> {
            let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
            socket.set_reuse_address(true)?;
            if early {
                socket.set_freebind_v4(true)?;
            }
            if addr.is_ipv6() {
                socket.set_only_v6(true)?;
            }
            socket.bind(&addr.into())?;
            socket.listen(4096)?;
            Ok(socket.into())
        })
        .unwrap_or_else(|e| panic!("listen on {addr}: {e}"))
    }

    /// Connects within [`PATIENCE`].
    pub fn connect(&self, addr: SocketAddr) -> io::Result<TcpStream> {
        self.run(|| TcpStream::connect_timeout(&addr, PATIENCE))
    }

    /// As [`connect`](Self::connect), from one of this host's addresses.
    pub fn connect_from(&self, source: IpAddr, addr: SocketAddr) -> io::Result<TcpStream> {
        self.connect_from_port(SocketAddr::new(source, 0), addr)
    }

    /// The same, from a port of it.
    pub fn connect_from_port(&self, source: SocketAddr, addr: SocketAddr) -> io::Result<TcpStream> {
        self.run(|| {
            let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
            socket.bind(&source.into())?;
            socket.connect_timeout(&addr.into(), PATIENCE)?;
            Ok(socket.into())
        })
    }

    /// TCP sockets of this host that are neither listening nor in TIME_WAIT, one line each as in
    /// /proc/net/tcp.
    pub fn tcp_sockets(&self) -> Vec<String> {
        self.run(|| {
            ["tcp", "tcp6"]
                .iter()
                .flat_map(|table| {
                    let text = std::fs::read_to_string(format!("/proc/thread-self/net/{table}")).expect("procfs");
                    text.lines().skip(1).map(str::to_owned).collect::<Vec<_>>()
                })
                .filter(|line| !matches!(line.split_whitespace().nth(3), Some("0A" | "06")))
                .collect()
        })
    }

    /// TCP segments that ever reached this host (`Tcp: InSegs`, IPv4 and IPv6, RFC 4022).
    pub fn tcp_segments_received(&self) -> u64 {
        let text = self.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp")).expect("procfs");
        let mut lines = text.lines().filter_map(|l| l.strip_prefix("Tcp: "));
        let names = lines.next().expect("names");
        let values = lines.next().expect("values");
        let at = names.split(' ').position(|n| n == "InSegs").expect("InSegs");
        values.split(' ').nth(at).and_then(|v| v.parse().ok()).expect("a number")
    }

    /// Kernel memory that this host's TCP sockets are charged with, bytes (`skmem` of ss(8):
    /// receive queue, write queue, forward allocation, backlog).
    pub fn socket_memory(&self) -> u64 {
        let text = self.output(Command::new("ss").args(["-tamnH"]));
        text.split("skmem:(")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
            .flat_map(|inside| inside.split(','))
            .filter_map(|field| {
                let digits = field.find(|c: char| c.is_ascii_digit())?;
                let (name, value) = field.split_at(digits);
                // What is forward-allocated may be owed: ss(8) prints it as if it had no sign.
                matches!(name, "r" | "w" | "f" | "bl")
                    .then(|| i64::from(value.parse::<u32>().expect("a number") as i32))
            })
            .sum::<i64>()
            .max(0) as u64
    }

    /// Bytes in the receive and send queues of this host's connections (`Recv-Q`, `Send-Q` of
    /// ss(8)): received and not read, sent and not acknowledged.
    pub fn queued_bytes(&self) -> u64 {
        let text = self.output(Command::new("ss").args(["-tnH"]));
        text.lines()
            .flat_map(|line| line.split_whitespace().skip(1).take(2))
            .map(|q| q.parse::<u64>().expect("a number"))
            .sum()
    }

    /// Lets it pass packets on.
    pub fn forwards(&self) {
        self.run(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")).expect("sysctl");
    }

    /// Runs lines of iptables(8) on this host.
    #[track_caller]
    pub fn iptables(&self, rules: &str) {
        for rule in rules.lines() {
            self.output(Command::new("iptables").arg("--wait").args(rule.split_whitespace()));
        }
    }

    /// Runs lines of ip(8) on this host.
    #[track_caller]
    pub fn ip(&self, lines: &str) {
        let prefix = format!("-n {}", self.name);
        ip_batch(&[prefix.as_str()], lines);
    }
}

/// A program that runs on a host; killed when dropped.
pub struct Process {
    child: Child,
}

impl Process {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The child as the standard library knows it.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One of the two links.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Link {
    /// client ── entrance
    Public,
    /// entrance ── cluster
    Inside,
}

/// The three hosts, and a directory for the files of a test; all of it goes away when dropped.
pub struct Net {
    /// On the Internet side.
    pub client: Host,
    /// Where the daemon runs.
    pub entrance: Host,
    /// Behind the entrance node.
    pub cluster: Host,
    pods: Vec<Host>,
    dir: tempfile::TempDir,
}

impl Net {
    /// Makes the hosts; panics without root.
    #[track_caller]
    #[allow(clippy::new_without_default)] // it makes hosts: not a value to be had by default
    pub fn new() -> Self {
        static ONCE: Once = Once::new();
        static COUNT: AtomicU32 = AtomicU32::new(0);
        assert!(
            rustix::process::geteuid().is_root(),
            "these tests make network namespaces: run them as root (sudo -E cargo test -p tests)"
        );
        ONCE.call_once(|| {
            sweep();
            raise_file_limit();
        });
        Self::make(&format!("{PREFIX}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)))
    }

    /// Makes hosts that are called `dp-NAME-client` and so on, and that no later run sweeps away;
    /// panics without root.
    #[track_caller]
    pub fn called(name: &str) -> Self {
        Self::make(&format!("dp-{name}"))
    }

    /// Removes the hosts of that name, if there are any, with all that runs on them.
    pub fn remove_called(name: &str) {
        for role in ROLES {
            remove(&format!("dp-{name}-{role}"));
        }
    }

    #[track_caller]
    fn make(id: &str) -> Self {
        let [c, e, u] = ROLES.map(|role| format!("{id}-{role}"));
        ip_batch(&[], &format!("netns add {c}\nnetns add {e}\nnetns add {u}\n"));
        ip_batch(
            &["-n", &e],
            &format!(
                "link add public mtu 1500 type veth peer name public mtu 1500 netns {c}\n\
                 link add inside mtu 1500 type veth peer name inside mtu 1500 netns {u}\n"
            ),
        );
        let host = |name: &str, addresses: &[(&str, &str)]| {
            let ns = File::open(Path::new("/run/netns").join(name)).expect("made above");
            let host = Host { name: name.into(), ns: Arc::new(ns) };
            let mut lines = String::from("link set lo up\n");
            for (n, (address, dev)) in addresses.iter().enumerate() {
                let (length, flags) = match address.contains(':') {
                    false => (24, ""),
                    // An address that is not preferred is never the source by default.
                    true if addresses[..n].iter().any(|(a, d)| a.contains(':') && d == dev) => {
                        (64, "nodad preferred_lft 0")
                    }
                    true => (64, "nodad"),
                };
                let _ = writeln!(lines, "addr add {address}/{length} dev {dev} {flags}");
            }
            for dev in ["public", "inside"] {
                if addresses.iter().any(|(_, d)| *d == dev) {
                    let _ = writeln!(lines, "link set {dev} up");
                }
            }
            host.ip(&lines);
            host.run(|| std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "10000 65000")).expect("sysctl");
            host
        };
        let on =
            |addresses: &[&'static str], dev: &'static str| addresses.iter().map(|a| (*a, dev)).collect::<Vec<_>>();
        let client = host(&c, &[on(&CLIENT, "public"), on(&CLIENT_MORE, "public")].concat());
        let entrance = host(&e, &[on(&ENTRANCE, "public"), on(&ENTRANCE_INSIDE, "inside")].concat());
        let cluster = host(&u, &on(&CLUSTER, "inside"));
        entrance.ip(&format!("neigh replace {BLACK_HOLE} lladdr {NOWHERE} dev inside nud permanent\n"));
        let dir = tempfile::Builder::new().prefix("dp-test-").tempdir().expect("a temporary directory");
        // A daemon without privileges has to reach its files.
        std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("chmod");
        Self { client, entrance, cluster, pods: Vec::new(), dir }
    }

    /// Adds a host behind the cluster host, as pods are behind their node: on a bridge of it, with
    /// that as the way out. Addresses are in [`PODS`].
    #[track_caller]
    pub fn pod(&mut self, name: &str, address: &str) -> Host {
        if self.pods.is_empty() {
            self.cluster.ip(&format!("link add pods type bridge\naddr add {NODE}/24 dev pods\nlink set pods up\n"));
            self.cluster.forwards();
        }
        let full = format!("{}-{name}", self.cluster.name.trim_end_matches("-cluster"));
        ip_batch(&[], &format!("netns add {full}\n"));
        self.cluster.ip(&format!(
            "link add {name} mtu 1500 type veth peer name eth0 mtu 1500 netns {full}\nlink set {name} master pods up\n"
        ));
        let ns = File::open(Path::new("/run/netns").join(&full)).expect("made above");
        let host = Host { name: full.into(), ns: Arc::new(ns) };
        host.ip(&format!(
            "link set lo up\naddr add {address}/24 dev eth0\nlink set eth0 up\nroute add default via {NODE}\n"
        ));
        self.pods.push(host.clone());
        host
    }

    /// For files of this test.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Writes a file of this test and says where it is.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.dir().join(name);
        std::fs::write(&path, content).expect("the temporary directory can be written");
        path
    }

    /// The peer on the far side of a link vanishes: the link stays up and swallows every packet,
    /// either way.
    pub fn vanish(&self, link: Link) {
        let (far, dev, near_addresses, far_addresses) = match link {
            Link::Public => (&self.client, "public", ENTRANCE, CLIENT),
            Link::Inside => (&self.cluster, "inside", ENTRANCE_INSIDE, [CLUSTER[0], CLUSTER[2]]),
        };
        let swallow = |addresses: [&str; 2]| {
            addresses.map(|a| format!("neigh replace {a} lladdr {NOWHERE} dev {dev} nud permanent\n")).concat()
        };
        self.entrance.ip(&swallow(far_addresses));
        far.ip(&swallow(near_addresses));
    }

    /// Kernel memory of all TCP sockets on the three hosts, bytes.
    pub fn socket_memory(&self) -> u64 {
        [&self.client, &self.entrance, &self.cluster].iter().map(|h| h.socket_memory()).sum()
    }

    /// Bytes in all TCP queues on the three hosts. Each byte is in one of them only, once nothing
    /// is in flight.
    pub fn queued_bytes(&self) -> u64 {
        [&self.client, &self.entrance, &self.cluster].iter().map(|h| h.queued_bytes()).sum()
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for host in [&self.client, &self.entrance, &self.cluster].into_iter().chain(&self.pods) {
            remove(&host.name);
        }
    }
}

/// Kills what still runs in a namespace and removes it. Errors do not matter: another run may be
/// sweeping too.
fn remove(name: &str) {
    if let Ok(out) = Command::new("ip").args(["netns", "pids", name]).output() {
        for pid in String::from_utf8_lossy(&out.stdout).split_whitespace().filter_map(|p| p.parse().ok()) {
            // This process appears while one of its own threads is on the host.
            if pid != std::process::id() as i32
                && let Some(pid) = rustix::process::Pid::from_raw(pid)
            {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
    let _ = Command::new("ip").args(["netns", "del", name]).output();
}

/// Removes the hosts of test runs that are no more.
fn sweep() {
    let Ok(entries) = std::fs::read_dir("/run/netns") else { return };
    for name in entries.flatten().filter_map(|e| e.file_name().into_string().ok()) {
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').nth(1));
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            remove(&name);
        }
    }
}

/// Both ends of thousands of connections live in this process.
fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).expect("the soft limit may go up to the hard one");
}

#[track_caller]
fn ip_batch(args: &[&str], lines: &str) {
    let args: Vec<_> = args.iter().flat_map(|a| a.split(' ')).collect();
    let mut child = Command::new("ip")
        .args(&args)
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("ip(8) is needed: apt-get install iproute2");
    child.stdin.take().expect("piped").write_all(lines.as_bytes()).expect("ip reads its lines");
    let out = child.wait_with_output().expect("ip ends");
    assert!(out.status.success(), "ip {args:?}:\n{lines}{}", String::from_utf8_lossy(&out.stderr));
}
