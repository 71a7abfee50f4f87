//! What this machine's tailscaled knows of its peers: a client of its LocalAPI, HTTP over a unix
//! socket.
//!
//! The API is tailscaled's own, mostly stable one: `GET /localapi/v0/status` (`ipn/ipnstate`,
//! `Status`) and `GET /localapi/v0/watch-ipn-bus`, which streams a document for each change (`ipn`,
//! `Notify`). Of the stream only is used that something came: what it was says the status. This
//! module must not know upstreams; nothing depends on tailscaled being there.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};

/// The longest status that is read: some KiB a peer, so thousands of peers.
const LONGEST_STATUS: usize = 32 << 20;
/// How long tailscaled may take to answer. It does in milliseconds.
const PATIENCE: Duration = Duration::from_secs(3);
/// How often the status is asked for when nothing was told: a path that changes is no event on the
/// bus.
const POLL: Duration = Duration::from_secs(5);
/// Between two questions, however much is told.
const BREATHER: Duration = Duration::from_millis(100);
/// Between two attempts to reach a tailscaled that is not there.
const AGAIN: Duration = Duration::from_secs(1);
/// State, and peers that came, went or changed (`NotifyInitialState`, `NotifyPeerChanges`,
/// `NotifyPeerPatches` in `ipn/backend.go`). Versions that do not know the latter two tell of peers
/// without being asked.
const INTERESTS: u32 = 1 << 1 | 1 << 12 | 1 << 15;

/// The tailnet as tailscaled sees it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Domain of the nodes' names, `tailnet.ts.net`.
    pub suffix: String,
    /// Whether there is a DNS server at 100.100.100.100 that knows these names.
    pub magic_dns: bool,
    peers: Vec<Peer>,
}

/// Another node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its MagicDNS name in full, in lower case, without the last dot.
    pub name: String,
    /// In the tailnet.
    pub addresses: Vec<IpAddr>,
    /// Whether the control server reaches it.
    pub online: bool,
    /// The way to it.
    pub path: Way,
    /// The other end of the path: `address:port`, or the relay's region or address.
    pub via: Option<String>,
    /// RFC 3339; `None`: there has been none.
    pub last_handshake: Option<String>,
}

/// The way that packets take to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// UDP from machine to machine.
    Direct,
    /// Through a DERP server or a peer relay.
    Relayed,
    /// There has been no traffic that would tell.
    Unknown,
}

impl Way {
    pub const ALL: [Self; 3] = [Self::Direct, Self::Relayed, Self::Unknown];

    /// The label of `dataplane_tailnet_path`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Relayed => "relayed",
            Self::Unknown => "unknown",
        }
    }
}

#[cfg(test)]
impl View {
    /// Of peers by name and address.
    pub fn of(suffix: &str, peers: &[(&str, IpAddr)]) -> Self {
        let peer = |(name, address): &(&str, IpAddr)| Peer {
            name: format!("{name}.{suffix}"),
            addresses: vec![*address],
            online: true,
            path: Way::Unknown,
            via: None,
            last_handshake: None,
        };
        Self { suffix: suffix.to_owned(), magic_dns: false, peers: peers.iter().map(peer).collect() }
    }
}

impl View {
    /// The peer with this address.
    pub fn by_address(&self, address: IpAddr) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.addresses.contains(&address))
    }

    /// The peer of this name, in full or without the tailnet's domain.
    pub fn by_name(&self, name: &str) -> Option<&Peer> {
        let full = self.full_name(name)?;
        self.peers.iter().find(|peer| peer.name == full)
    }

    /// The name in full, if it can be one of this tailnet.
    pub fn full_name(&self, name: &str) -> Option<String> {
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        if !name.contains('.') && !self.suffix.is_empty() {
            return Some(format!("{name}.{}", self.suffix));
        }
        name.strip_suffix(&self.suffix).is_some_and(|label| label.ends_with('.')).then_some(name)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", default)]
#[derive(Default)]
struct Status {
    backend_state: String,
    current_tailnet: Option<CurrentTailnet>,
    #[serde(rename = "MagicDNSSuffix")]
    magic_dns_suffix: String,
    /// In an order, so that what is told again equals what was told.
    peer: Option<BTreeMap<String, PeerStatus>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct CurrentTailnet {
    #[serde(rename = "MagicDNSEnabled")]
    magic_dns_enabled: bool,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct PeerStatus {
    #[serde(rename = "DNSName")]
    dns_name: String,
    #[serde(rename = "TailscaleIPs")]
    addresses: Option<Vec<IpAddr>>,
    cur_addr: String,
    relay: String,
    peer_relay: String,
    online: bool,
    active: bool,
    last_handshake: String,
}

impl From<PeerStatus> for Peer {
    fn from(status: PeerStatus) -> Self {
        // Go's zero time.
        let last_handshake = Some(status.last_handshake).filter(|at| !at.is_empty() && !at.starts_with("0001-"));
        let (path, via) = if !status.cur_addr.is_empty() {
            (Way::Direct, status.cur_addr)
        } else if !status.peer_relay.is_empty() {
            (Way::Relayed, format!("peer relay {}", status.peer_relay))
        } else if status.active && last_handshake.is_some() {
            // `Relay` is the peer's home region, used or not.
            (Way::Relayed, format!("DERP {}", status.relay))
        } else {
            (Way::Unknown, String::new())
        };
        Self {
            name: status.dns_name.trim_end_matches('.').to_ascii_lowercase(),
            addresses: status.addresses.unwrap_or_default(),
            online: status.online,
            path,
            via: Some(via).filter(|via| !via.is_empty()),
            last_handshake,
        }
    }
}

impl TryFrom<Status> for View {
    type Error = anyhow::Error;

    fn try_from(status: Status) -> Result<Self> {
        // In any other state what it says of peers is of the past.
        if status.backend_state != "Running" {
            bail!("tailscaled is in state {}", status.backend_state);
        }
        Ok(Self {
            suffix: status.magic_dns_suffix.trim_end_matches('.').to_ascii_lowercase(),
            magic_dns: status.current_tailnet.is_some_and(|tailnet| tailnet.magic_dns_enabled),
            peers: status.peer.unwrap_or_default().into_values().map(Peer::from).collect(),
        })
    }
}

/// Keeps `view` up to date, for ever. It holds nothing while tailscaled is gone, silent, or not
/// part of a tailnet.
pub async fn follow(socket: PathBuf, view: watch::Sender<Option<Arc<View>>>) {
    let mut first = true;
    loop {
        let Err(error) = session(&socket, &view).await;
        let error = format!("{error:#}");
        if view.borrow().is_some() {
            tracing::warn!(socket = %socket.display(), error, "tailscaled is silent; going on without it");
        } else {
            tracing::debug!(socket = %socket.display(), error, "tailscaled");
        }
        // That there is none is news once: somebody may wait for it.
        view.send_if_modified(|view| view.take().is_some() || std::mem::take(&mut first));
        sleep(AGAIN).await;
    }
}

/// Asks once.
///
/// # Errors
/// There is no tailscaled, or it is not connected to a tailnet.
pub async fn look(socket: &Path) -> Result<View> {
    let ask = async {
        let body = Limited::new(get(socket, "/localapi/v0/status").await?.into_body(), LONGEST_STATUS);
        let body = body.collect().await.map_err(|e| anyhow::anyhow!("its status: {e}"))?.to_bytes();
        serde_json::from_slice::<Status>(&body).context("its status")?.try_into()
    };
    timeout(PATIENCE, ask).await.unwrap_or_else(|_| bail!("it does not answer"))
}

async fn session(socket: &Path, view: &watch::Sender<Option<Arc<View>>>) -> Result<std::convert::Infallible> {
    let path = format!("/localapi/v0/watch-ipn-bus?mask={INTERESTS}");
    let mut bus = timeout(PATIENCE, get(socket, &path)).await.context("it does not answer")??.into_body();
    loop {
        let now = look(socket).await?;
        view.send_if_modified(|view| {
            let changed = view.as_deref() != Some(&now);
            if view.is_none() {
                tracing::info!(suffix = now.suffix, peers = now.peers.len(), "tailscaled answers");
            }
            if changed {
                *view = Some(Arc::new(now));
            }
            changed
        });
        let next = Instant::now() + POLL;
        sleep(BREATHER).await;
        match timeout_at(next, bus.frame()).await {
            // What came is not looked at; more of it may be there.
            Ok(Some(frame)) => drop(frame.context("what it tells")?),
            Ok(None) => bail!("it has closed the connection"),
            Err(_) => {}
        }
    }
}

async fn get(socket: &Path, path: &str) -> Result<Response<Incoming>> {
    let stream = UnixStream::connect(socket).await.with_context(|| socket.display().to_string())?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    // The host is what tailscaled's own clients send; it refuses names that a browser could have
    // been led to.
    let request = Request::get(path).header("host", "local-tailscaled.sock").body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    if !response.status().is_success() {
        bail!("{path}: {}", response.status());
    }
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(fields: &str) -> Peer {
        let status = format!("{{\"DNSName\":\"Thinkpad-1.tailnet.example.\",\"Relay\":\"fra\",{fields}}}");
        serde_json::from_str::<PeerStatus>(&status).unwrap().into()
    }

    #[test]
    fn a_path_is_known_only_after_traffic() {
        let handshake = "\"LastHandshake\":\"2026-01-02T03:04:05.6Z\"";
        let path = |fields: &str| {
            let Peer { path, via, .. } = peer(fields);
            (path, via.unwrap_or_default())
        };
        let direct = format!("\"CurAddr\":\"192.0.2.7:41641\",\"Active\":true,{handshake}");
        assert_eq!(path(&direct), (Way::Direct, "192.0.2.7:41641".into()));
        assert_eq!(path(&format!("\"Active\":true,{handshake}")), (Way::Relayed, "DERP fra".into()));
        let through = format!("\"PeerRelay\":\"192.0.2.9:7:1\",{handshake}");
        assert_eq!(path(&through), (Way::Relayed, "peer relay 192.0.2.9:7:1".into()));
        let never = "\"CurAddr\":\"\",\"Active\":true,\"LastHandshake\":\"0001-01-01T00:00:00Z\"";
        assert_eq!(path(never), (Way::Unknown, String::new()));
        assert_eq!(path(&format!("\"Active\":false,{handshake}")), (Way::Unknown, String::new()));
    }

    fn view(state: &str) -> Result<View> {
        let status = format!(
            r#"{{"BackendState":"{state}","MagicDNSSuffix":"tailnet.example","CurrentTailnet":{{"MagicDNSEnabled":true}},
               "Peer":{{"nodekey:1":{{"DNSName":"Thinkpad-1.tailnet.example.","TailscaleIPs":["100.64.0.7","fd7a:115c:a1e0::7"],"Online":true}}}},
               "ThisIsNew":1}}"#
        );
        serde_json::from_str::<Status>(&status).unwrap().try_into()
    }

    #[test]
    fn peers_are_found_by_name_in_full_or_short_and_by_address() {
        let view = view("Running").unwrap();
        for name in ["thinkpad-1", "THINKPAD-1.tailnet.example", "thinkpad-1.tailnet.example."] {
            assert!(view.by_name(name).is_some_and(|peer| peer.online), "{name}");
        }
        for name in ["thinkpad-2", "thinkpad-1.example", "tailnet.example", "thinkpad-1.nottailnet.example"] {
            assert!(view.by_name(name).is_none(), "{name}");
        }
        assert!(view.by_address("fd7a:115c:a1e0::7".parse().unwrap()).is_some());
        assert!(view.by_address("100.64.0.8".parse().unwrap()).is_none());
    }

    #[test]
    fn what_is_told_again_is_no_change() {
        let peers: Vec<_> = (0..20).map(|n| format!("\"nodekey:{n}\":{{\"DNSName\":\"node-{n}.\"}}")).collect();
        let status = format!("{{\"BackendState\":\"Running\",\"Peer\":{{{}}}}}", peers.join(","));
        let view = || View::try_from(serde_json::from_str::<Status>(&status).unwrap()).unwrap();
        assert_eq!(view(), view());
    }

    #[tokio::test(start_paused = true)]
    async fn a_tailscaled_that_is_silent_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("sock");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let silent = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = Vec::new();
            tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut asked).await.unwrap();
            asked
        };
        let (seen, asked) = tokio::join!(look(&socket), silent);
        assert!(seen.is_err());
        assert!(asked.starts_with(b"GET /localapi/v0/status"), "and the connection was closed");
    }

    #[test]
    fn a_tailscaled_that_is_down_has_no_view() {
        assert!(view("Stopped").is_err());
        assert!(serde_json::from_str::<Status>(r#"{"BackendState":"Running","Peer":null}"#).is_ok());
    }

    #[test]
    fn without_a_tailnet_no_name_is_one_of_it() {
        assert_eq!(View::default().full_name("thinkpad-1"), None);
    }
}
