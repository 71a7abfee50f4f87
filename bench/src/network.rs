//! Where a run takes place: three hosts in a row, and what lies between the entrance node and the
//! cluster.

use std::net::SocketAddr;

use ::tests::netns::{CLUSTER, ENTRANCE, ENTRANCE_INSIDE, Host, Net};
use ::tests::tailnet::Tailnet;
use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};

/// The port of everything.
pub const PORT: u16 = 443;

/// Kinds of network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Two veth links with an MTU of 1500.
    Veth,
    /// The entrance node and the cluster node in a real tailnet: tailscaled on both, WireGuard
    /// between them.
    Tailnet,
}

impl Kind {
    /// As on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Veth => "veth",
            Self::Tailnet => "tailnet",
        }
    }
}

/// The hosts of a run.
pub struct Network {
    /// Which kind it is.
    pub kind: Kind,
    /// Where the server listens, and what subjects forward to.
    pub server: SocketAddr,
    tailnet: Option<Tailnet>,
    /// Declared last: the hosts go when nothing runs on them any more.
    net: Net,
}

impl Network {
    pub fn new(kind: Kind) -> Result<Self> {
        let net = Net::new();
        for host in [&net.client, &net.entrance, &net.cluster] {
            // Tens of thousands of connections a cell: ports are used again after a second.
            sysctl(host, "net/ipv4/tcp_tw_reuse", "1")?;
        }
        if kind == Kind::Tailnet {
            let tailnet = Tailnet::join(&net).map_err(|why| anyhow!("{why}"))?;
            let server = SocketAddr::new(tailnet.cluster.address.into(), PORT);
            return Ok(Self { kind, server, tailnet: Some(tailnet), net });
        }
        // For the subject that only forwards packets.
        let [client_net, cluster_net] = [ENTRANCE[0], ENTRANCE_INSIDE[0]].map(network_of);
        net.client.ip(&format!("route add {cluster_net} via {}\n", ENTRANCE[0]));
        net.cluster.ip(&format!("route add {client_net} via {}\n", ENTRANCE_INSIDE[0]));
        Ok(Self { kind, server: address(CLUSTER[0])?, tailnet: None, net })
    }

    /// The hosts as the tests know them.
    pub fn hosts(&self) -> &Net {
        &self.net
    }

    /// The entrance node's public address, where proxies listen.
    pub fn public(&self) -> Result<SocketAddr> {
        address(ENTRANCE[0])
    }

    /// First processes of what carries the packets, when that is not the kernel alone.
    pub fn tunnel(&self) -> Vec<u32> {
        self.tailnet.iter().flat_map(|tailnet| [tailnet.entrance.pid(), tailnet.cluster.pid()]).collect()
    }
}

/// The network of 256 addresses that an address is in.
fn network_of(address: &str) -> String {
    let (network, _) = address.rsplit_once('.').expect("a constant of the rig");
    format!("{network}.0/24")
}

fn address(ip: &str) -> Result<SocketAddr> {
    format!("{ip}:{PORT}").parse().with_context(|| format!("{ip} is no address"))
}

/// Writes a setting of a host's network namespace.
pub fn sysctl(host: &Host, name: &str, value: &str) -> Result<()> {
    host.run(|| std::fs::write(format!("/proc/sys/{name}"), value)).with_context(|| format!("sysctl {name}={value}"))
}
