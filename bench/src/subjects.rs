//! What is measured: how each subject is started and stopped, and what it is made of.
//!
//! Proxies listen on the entrance node's public address, know one server name, and forward to the
//! server in the cluster with PROXY v2 where they can. The peers' configurations are the files in
//! `peers/`.

use std::net::SocketAddr;
use std::process::Command;

use ::tests::daemon::{self, Config, Daemon};
use ::tests::netns::Host;
use ::tests::peers::{self, Peer, Program};
use anyhow::{Result, anyhow, bail};

use crate::load::SERVER_NAME;
use crate::network::{Kind, Network, sysctl};

/// The peers' configurations, placeholders in them.
const NGINX: &str = include_str!("../peers/nginx.conf");
const HAPROXY: &str = include_str!("../peers/haproxy.conf");
const SOZU: &str = include_str!("../peers/sozu.conf");

/// The hard limit of file descriptors on the smallest machine that this is to run on.
const NOFILE: &str = "20000";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Subject {
    /// No proxy: the client is on the entrance node and connects to the server over the inner link.
    /// What every subject has in common, hence what is subtracted for the attributable part.
    Direct,
    /// Plain IP forwarding on the entrance node: what the two links cost.
    Forward,
    /// This dataplane with the engine of this name.
    Engine(&'static str),
    /// nginx, `stream` with `ssl_preread`.
    Nginx,
    /// HAProxy with `splice-auto`.
    Haproxy,
    /// Sōzu with splice.
    Sozu,
}

/// All subjects, in the order of the report.
pub const ALL: [Subject; 9] = [
    Subject::Direct,
    Subject::Forward,
    Subject::Engine("copy"),
    Subject::Engine("splice"),
    Subject::Engine("sockmap"),
    Subject::Engine("auto"),
    Subject::Nginx,
    Subject::Haproxy,
    Subject::Sozu,
];

/// Those of `--quick`.
pub const QUICK: [Subject; 4] = [Subject::Direct, Subject::Engine("auto"), Subject::Nginx, Subject::Haproxy];

/// What users would take instead.
pub const PEERS: [Subject; 3] = [Subject::Nginx, Subject::Haproxy, Subject::Sozu];

/// A subject in operation; it ends when dropped.
pub struct Running {
    /// Where the client is.
    pub client: Host,
    /// What it connects to.
    pub target: SocketAddr,
    /// Its first process, if it has one.
    pub pid: Option<u32>,
    held: Held,
}

/// What has to be put away afterwards.
enum Held {
    Nothing,
    Forwarding(Host),
    Daemon(Daemon),
    Peer(Option<Peer>),
}

impl Subject {
    /// As on the command line and in the report.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Forward => "forward",
            Self::Engine(engine) => engine,
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
            Self::Sozu => "sozu",
        }
    }

    /// How many connections it can hold with the files that it may open, if that is fewer than a
    /// workload has.
    pub const fn most_connections(self) -> Option<usize> {
        match self {
            // Two pipes for each connection, idle or not: six files, 3,333 connections for each of
            // the two workers.
            Self::Sozu => Some(6000),
            _ => None,
        }
    }

    /// Whether it tells the server who the client is.
    pub const fn is_proxy(self) -> bool {
        !matches!(self, Self::Direct | Self::Forward)
    }

    /// The subject of this name.
    pub fn named(name: &str) -> Option<Self> {
        ALL.into_iter().find(|subject| subject.name() == name)
    }

    /// What it is, of which version, and what it cannot do; the error says why it cannot be had on
    /// this machine.
    pub fn describe(self, network: &Network) -> Result<String> {
        let what = self.version(network)?;
        Ok(match self.most_connections() {
            Some(most) => format!("{what}; holds no more than {most} connections with {NOFILE} files"),
            None => what,
        })
    }

    fn version(self, network: &Network) -> Result<String> {
        let first_line = |mut command: Command, what: &str| -> Result<String> {
            let out = command.output().map_err(|e| anyhow!("{what}: {e}"))?;
            // nginx tells its version on standard error.
            let text = [out.stdout, out.stderr].concat();
            let text = String::from_utf8_lossy(&text);
            Ok(text.lines().next().unwrap_or_default().trim().to_owned())
        };
        let version = |mut command: Command, flag: &str| {
            command.arg(flag);
            first_line(command, self.name())
        };
        match self {
            Self::Direct => Ok("no proxy: client on the entrance node, server in the cluster".to_owned()),
            Self::Forward if network.kind == Kind::Tailnet => {
                bail!("the tailnet carries packets of its own nodes only; a client outside needs a proxy")
            }
            Self::Forward => Ok("IP forwarding on the entrance node".to_owned()),
            Self::Engine(engine) => {
                let running = self.start(network)?;
                drop(running);
                Ok(format!("{}, engine = \"{engine}\"", version(Command::new(daemon::binary()), "--version")?))
            }
            Self::Nginx => version(program(Program::Nginx)?, "-v"),
            Self::Haproxy => version(program(Program::Haproxy)?, "-v"),
            Self::Sozu => version(program(Program::Sozu)?, "--version"),
        }
    }

    /// Starts it; returns when it accepts connections.
    pub fn start(self, network: &Network) -> Result<Running> {
        let net = network.hosts();
        let public = network.public()?;
        let peer = |program, config: &str| {
            let dir = peers::directory(net, self.name());
            let config = config
                .replace("@DIR@", &dir.display().to_string())
                .replace("@LISTEN@", &public.to_string())
                .replace("@NAME@", SERVER_NAME)
                .replace("@TARGET@", &network.server.to_string())
                .replace("@NOFILE@", NOFILE);
            let peer = Peer::configured(&net.entrance, program, dir, &config).map_err(|why| anyhow!("{why}"))?;
            let pid = Some(peer.pid());
            Ok(Running { client: net.client.clone(), target: public, pid, held: Held::Peer(Some(peer)) })
        };
        match self {
            Self::Direct => {
                Ok(Running { client: net.entrance.clone(), target: network.server, pid: None, held: Held::Nothing })
            }
            Self::Forward => {
                sysctl(&net.entrance, FORWARDING, "1")?;
                let held = Held::Forwarding(net.entrance.clone());
                Ok(Running { client: net.client.clone(), target: network.server, pid: None, held })
            }
            Self::Engine(engine) => {
                let config = Config::new(engine).targets([&network.server.to_string()]).upstream("send_proxy = \"v2\"");
                let route = format!("[[routes]]\nhosts = [\"{SERVER_NAME}\"]\nupstream = \"cluster\"");
                let daemon = Daemon::start(net, &config.more(&route));
                let status = daemon.json(&["status", "--json"]);
                let effective = &status["engine"]["effective"];
                if effective != engine {
                    bail!("{effective} runs in its place: {}", status["engine"]["reasons"]);
                }
                let pid = Some(daemon.pid());
                Ok(Running { client: net.client.clone(), target: public, pid, held: Held::Daemon(daemon) })
            }
            Self::Nginx => peer(Program::Nginx, NGINX),
            Self::Haproxy => peer(Program::Haproxy, HAPROXY),
            Self::Sozu => peer(Program::Sozu, SOZU),
        }
    }
}

const FORWARDING: &str = "net/ipv4/ip_forward";

impl Running {
    /// The last that the daemon had to say.
    pub fn complaint(&self) -> Option<String> {
        match &self.held {
            Held::Daemon(daemon) => daemon.log().pop(),
            _ => None,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        match &mut self.held {
            Held::Nothing | Held::Daemon(_) => {}
            Held::Forwarding(host) => {
                // A host that cannot be reached any more forwards nothing either.
                let _ = sysctl(host, FORWARDING, "0");
            }
            Held::Peer(peer) => {
                if let Some(peer) = peer.take() {
                    peer.stop();
                }
            }
        }
    }
}

fn program(program: Program) -> Result<Command> {
    program.command().map_err(|why| anyhow!("{why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_subject_is_found_by_its_name() {
        for subject in ALL {
            assert_eq!(Subject::named(subject.name()), Some(subject));
        }
        assert_eq!(Subject::named("traefik"), None);
    }

    #[test]
    fn the_peers_know_the_name_that_the_hello_asks_for() {
        let name = SERVER_NAME.as_bytes();
        assert!(crate::load::HELLO.windows(name.len()).any(|window| window == name));
        for config in [NGINX, HAPROXY, SOZU] {
            assert!(config.contains("@NAME@") && config.contains("@TARGET@") && config.contains("@LISTEN@"));
        }
    }
}
