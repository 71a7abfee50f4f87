//! A real tailnet between the entrance node and the cluster: tailscaled on both, WireGuard over TUN
//! devices between them.
//!
//! The inner link of a [`Net`] becomes what the Internet is to a tailnet: it carries WireGuard's
//! UDP, and has other addresses than before. The control server, relay and STUN server are one
//! process of our own (`tests/tailnet`) on the entrance node's end of that link; it idles while the
//! path is direct. Programs are built by Go once, into `target/tailnet-VERSION`. Knows nothing of
//! the daemon.

use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::golang::go;
use crate::netns::{ENTRANCE, Host, Net, Process};
use crate::{peers, target_dir, within};

/// Of the tailscale module, for the nodes as for the control server.
const MODULE: &str = include_str!("../tailnet/go.mod");
/// The ends of the inner link: entrance node, cluster. Private, because tailscaled dials a control
/// server with a public address on port 443 only when it has to dial it again.
const UNDERLAY: [&str; 2] = ["192.168.77.1", "192.168.77.2"];
/// What the nodes are called, in MagicDNS, too.
const NAMES: [&str; 2] = ["entrance", "thinkpad-1"];
/// The one that may join them later.
const THIRD: &str = "thinkpad-2";
/// Of the control server, on the entrance node's end.
const CONTROL_PORT: u16 = 8080;
/// How long a node may take to join, and two to find their direct path, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Builds what a tailnet is made of, if that is not there: seven minutes of CPU, the first time.
pub fn build() -> Result<(), String> {
    Programs::built().map(drop)
}

/// The tailnet; it ends when dropped.
pub struct Tailnet {
    /// On the entrance node.
    pub entrance: Node,
    /// On the cluster host.
    pub cluster: Node,
    programs: Programs,
    dir: PathBuf,
    _control: Process,
}

/// A machine in the tailnet.
pub struct Node {
    /// Its address there.
    pub address: Ipv4Addr,
    /// Its host name; MagicDNS knows it.
    pub name: &'static str,
    daemon: Process,
    host: Host,
    socket: PathBuf,
    tailscaled: PathBuf,
    tailscale: PathBuf,
}

impl Tailnet {
    /// Joins the two hosts; they have no other way to each other afterwards. The error says what is
    /// missing or went wrong.
    pub fn join(net: &Net) -> Result<Self, String> {
        let programs = Programs::built()?;
        let hosts = [&net.entrance, &net.cluster];
        for (host, address) in hosts.into_iter().zip(UNDERLAY) {
            host.ip(&format!("addr flush dev inside\naddr add {address}/24 dev inside\n"));
        }
        let dir = peers::directory(net, "tailnet-");
        let control =
            start(&net.entrance, Command::new(&programs.control).args(["-address", UNDERLAY[0]]), &dir, "control")?;
        let [entrance, cluster] = [0, 1].map(|n| Node::start(hosts[n], NAMES[n], &programs, &dir));
        let (entrance, cluster) = (entrance?, cluster?);
        // What crosses the relay first would be measured, or tested, on the relay.
        entrance.tailscale(&["ping", "--until-direct", "--c=50", "--timeout=1s", &cluster.address.to_string()])?;
        Ok(Self { entrance, cluster, programs, dir, _control: control })
    }

    /// Joins a third machine, `thinkpad-2`, on the client's host: that has a link to the entrance
    /// node of its own, and none to the cluster.
    pub fn join_client(&self, net: &Net) -> Result<Node, String> {
        net.client.ip(&format!("route add {} via {}\n", UNDERLAY[0], ENTRANCE[0]));
        let node = Node::start(&net.client, THIRD, &self.programs, &self.dir)?;
        self.entrance.tailscale(&["ping", "--until-direct", "--c=50", "--timeout=1s", &node.address.to_string()])?;
        Ok(node)
    }

    /// Has the control server tell the others that a node is online or not.
    #[track_caller]
    pub fn tell_online(&self, node: &Node, online: bool) {
        let form = format!("name={}&online={online}", node.name);
        let request = format!(
            "POST /rig/online HTTP/1.0\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: {}\r\n\r\n{form}",
            form.len()
        );
        let control = format!("{}:{CONTROL_PORT}", UNDERLAY[0]).parse().expect("an address");
        let mut stream = self.entrance.host.connect(control).expect("the control server runs");
        stream.write_all(request.as_bytes()).expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
    }

    /// Drops what the entrance node sends to the cluster's machine by UDP, or lets it through
    /// again: the two are left to the relay, or not.
    pub fn block_udp(&self, blocked: bool) {
        let what = if blocked { "add" } else { "del" };
        self.entrance.host.ip(&format!("rule {what} pref 10 to {} ipproto udp blackhole\n", UNDERLAY[1]));
    }
}

impl Node {
    fn start(host: &Host, name: &'static str, programs: &Programs, dir: &Path) -> Result<Self, String> {
        let state = dir.join(name);
        std::fs::create_dir_all(&state).map_err(|e| format!("{}: {e}", state.display()))?;
        let socket = state.join("tailscaled.sock");
        let tailscaled = programs.tailscaled.clone();
        let daemon = spawn(host, &tailscaled, &state)?;
        let tailscale = programs.tailscale.clone();
        let mut node =
            Self { address: Ipv4Addr::UNSPECIFIED, name, daemon, host: host.clone(), socket, tailscaled, tailscale };
        node.wait_for_socket()?;
        node.up()?;
        let said = node.tailscale(&["ip", "-4"])?;
        node.address = said.trim().parse().map_err(|e| format!("tailscale ip said {said:?}: {e}"))?;
        Ok(node)
    }

    /// `tailscale up`: joins, the first time and after a `tailscale down`.
    pub fn up(&self) -> Result<(), String> {
        let control = format!("--login-server=http://{}:{CONTROL_PORT}", UNDERLAY[0]);
        let hostname = format!("--hostname={}", self.name);
        // The hosts share one /etc/resolv.conf.
        self.tailscale(&["up", &control, "--accept-dns=false", "--timeout=30s", &hostname]).map(drop)
    }

    /// Stops tailscaled as a service manager would and starts it again; it finds back into the
    /// tailnet by itself.
    pub fn restart(&mut self) -> Result<(), String> {
        let state = self.socket.parent().expect("a directory of its own").to_owned();
        let pid = Pid::from_raw(self.pid() as i32).expect("a process id");
        kill_process(pid, Signal::TERM).map_err(|e| format!("kill: {e}"))?;
        let child = self.daemon.child();
        within(PATIENCE, || child.try_wait().ok().flatten()).ok_or("tailscaled does not end")?;
        let _ = std::fs::remove_file(&self.socket);
        self.daemon = spawn(&self.host, &self.tailscaled, &state)?;
        self.wait_for_socket()
    }

    fn wait_for_socket(&self) -> Result<(), String> {
        within(PATIENCE, || self.socket.exists().then_some(()))
            .ok_or_else(|| format!("tailscaled on {} makes no socket:\n{}", self.name, self.log()))
    }

    /// What tailscaled logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.socket.with_file_name("tailscaled.log")).unwrap_or_default()
    }

    /// tailscaled's process id.
    pub fn pid(&self) -> u32 {
        self.daemon.pid()
    }

    /// Where it runs.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The socket of tailscaled's LocalAPI.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// A command of tailscale(1) on this node: what it prints.
    pub fn tailscale(&self, arguments: &[&str]) -> Result<String, String> {
        let mut command = Command::new(&self.tailscale);
        command.arg(format!("--socket={}", self.socket.display())).args(arguments).stdin(Stdio::null());
        let out = self.host.run(|| command.output()).map_err(|e| format!("tailscale: {e}"))?;
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        if out.status.success() {
            Ok(said)
        } else {
            let errors = String::from_utf8_lossy(&out.stderr);
            Err(format!("tailscale {arguments:?} on {}: {said}{errors}\n{}", self.name, self.log()))
        }
    }
}

fn spawn(host: &Host, tailscaled: &Path, state: &Path) -> Result<Process, String> {
    let mut command = Command::new(tailscaled);
    command
        .args(["--tun=tailscale0", "--port=41641", "--no-logs-no-support"])
        .arg(format!("--statedir={}", state.display()))
        .arg(format!("--state={}", state.join("state").display()))
        .arg(format!("--socket={}", state.join("tailscaled.sock").display()))
        // iptables(8) may not be there, and nft(8) is not needed for this.
        .env("TS_DEBUG_FIREWALL_MODE", "nftables")
        .env("TS_LOGS_DIR", state);
    start(host, &mut command, state, "tailscaled")
}

fn start(host: &Host, command: &mut Command, dir: &Path, name: &str) -> Result<Process, String> {
    let log = std::fs::File::options().create(true).append(true).open(dir.join(format!("{name}.log")));
    let log = log.map_err(|e| format!("{name}'s log: {e}"))?;
    let errors = log.try_clone().map_err(|e| format!("{name}'s log: {e}"))?;
    host.spawn(command.stdin(Stdio::null()).stdout(log).stderr(errors)).map_err(|e| format!("{name}: {e}"))
}

/// What the tailnet is made of.
struct Programs {
    control: PathBuf,
    tailscaled: PathBuf,
    tailscale: PathBuf,
}

impl Programs {
    /// Builds what is not there yet: the first time, some minutes.
    fn built() -> Result<Self, String> {
        let version = version();
        let home = target_dir().join(format!("tailnet-{version}"));
        std::fs::create_dir_all(&home).map_err(|e| format!("{}: {e}", home.display()))?;
        let lock = std::fs::File::create(home.join("lock")).map_err(|e| format!("{}: {e}", home.display()))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).map_err(|e| format!("flock: {e}"))?;
        let programs = Self {
            control: home.join("control"),
            tailscaled: home.join("tailscaled"),
            tailscale: home.join("tailscale"),
        };
        if !(programs.tailscaled.exists() && programs.tailscale.exists()) {
            eprintln!("==> go install tailscale {version} into {} (some minutes)", home.display());
            let packages = ["tailscaled", "tailscale"].map(|name| format!("tailscale.com/cmd/{name}@{version}"));
            go(|command| command.env("GOBIN", &home).arg("install").args(packages))?;
        }
        // Go knows itself whether anything has to be built.
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tailnet");
        go(|command| command.current_dir(source).arg("build").arg("-o").arg(&programs.control).arg("."))?;
        Ok(programs)
    }
}

/// As go.mod has it.
fn version() -> &'static str {
    let version = MODULE.lines().find_map(|line| line.strip_prefix("require tailscale.com "));
    version.expect("go.mod requires the tailscale module")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_version_for_nodes_and_control_server() {
        assert!(version().starts_with("v1."), "{}", version());
    }
}
