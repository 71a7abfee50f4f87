//! From a target's name to its addresses, beforehand: connections never wait for a resolver, but for the very first answer.
//!
//! hickory-resolver asks, because the system's `getaddrinfo` tells no TTL. What the tailnet itself says of a name of its own comes first. The last good answer is used
//! for as long as there is no other.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolverConfig, ResolverOpts};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::config;
use crate::tailnet::View;

/// A name is asked for at least this often, whatever its TTL: hosts files and tailnets have none.
const LONGEST: Duration = Duration::from_secs(60);
/// And at most this often, also with a TTL of 0.
const SHORTEST: Duration = Duration::from_secs(1);
/// After a failure; doubles with each further one.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// For one question to one server.
const PATIENCE: Duration = Duration::from_secs(2);
/// Where tailscaled answers for the names of the tailnet and those that its owner added.
const MAGIC_DNS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(100, 100, 100, 100)), 53);
/// What the system's resolver is made of.
const FILES: [&str; 2] = ["/etc/resolv.conf", "/etc/hosts"];

/// Asks for names, on behalf of all targets.
pub struct Names {
    config: config::Resolver,
    system: Mutex<Option<(Fingerprint, TokioResolver)>>,
    magic: Option<TokioResolver>,
}

type Fingerprint = [Option<SystemTime>; 2];

impl Names {
    /// Nothing is asked yet.
    pub fn new(config: config::Resolver) -> Self {
        Self { config, system: Mutex::default(), magic: build(of_servers(&[MAGIC_DNS]), options()) }
    }

    /// The addresses of a name, and how long they hold.
    ///
    /// # Errors
    /// What the resolver said, for people.
    pub async fn look_up(&self, name: &str, view: Option<&View>) -> Result<(Vec<IpAddr>, Duration), String> {
        if let Some(view) = view {
            if let Some(peer) = view.by_name(name).filter(|peer| !peer.addresses.is_empty()) {
                return Ok((peer.addresses.clone(), LONGEST));
            }
            if let (true, Some(full), Some(magic)) = (view.magic_dns, view.full_name(name), &self.magic)
                && let Ok(found) = ask(magic, &format!("{full}.")).await
            {
                return Ok(found);
            }
        }
        let resolver = self.system()?;
        ask(&resolver, name).await
    }

    /// The system's, or the configured one; made anew when the files have changed that it is made of.
    fn system(&self) -> Result<TokioResolver, String> {
        let fingerprint = FILES.map(|file| Path::new(file).metadata().and_then(|m| m.modified()).ok());
        let mut system = self.system.lock().expect("no panic while held");
        if let Some((of, resolver)) = &*system
            && *of == fingerprint
        {
            return Ok(resolver.clone());
        }
        let resolver = if self.config.servers.is_empty() {
            let (config, found) = hickory_resolver::system_conf::read_system_conf()
                .map_err(|error| format!("{}: {error}; name DNS servers in [resolver]", FILES[0]))?;
            // `ndots` and the like are the system's; how patient we are is not.
            let mut options = options();
            options.ndots = found.ndots;
            build(config, options)
        } else {
            build(of_servers(&self.config.servers), options())
        };
        let resolver = resolver.ok_or("the resolver cannot be made")?;
        *system = Some((fingerprint, resolver.clone()));
        Ok(resolver)
    }
}

fn of_servers(servers: &[SocketAddr]) -> ResolverConfig {
    let servers = servers.iter().map(|server| {
        let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
            connection.port = server.port();
            connection
        });
        // A server that does not know a name may only not be the one that does.
        NameServerConfig::new(server.ip(), false, connections.into())
    });
    ResolverConfig::from_name_servers(servers.collect())
}

fn options() -> ResolverOpts {
    let mut options = ResolverOpts::default();
    options.timeout = PATIENCE;
    options.attempts = 1;
    options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
    // We ask when the TTL is over, and want to know then.
    options.cache_size = 0;
    options
}

fn build(config: ResolverConfig, options: ResolverOpts) -> Option<TokioResolver> {
    let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
    *builder.options_mut() = options;
    builder.build().ok()
}

/// Without the library's own notation.
fn in_words(error: &NetError) -> String {
    if error.is_nx_domain() {
        return "the name does not exist (NXDOMAIN)".to_owned();
    }
    if error.is_no_records_found() {
        return "the name has no address".to_owned();
    }
    match error.to_string() {
        text if text.contains('{') => "the resolver's answer is of no use".to_owned(),
        text => text,
    }
}

async fn ask(resolver: &TokioResolver, name: &str) -> Result<(Vec<IpAddr>, Duration), String> {
    let answer = resolver.lookup_ip(name).await.map_err(|error| in_words(&error))?;
    let mut addresses: Vec<IpAddr> = answer.iter().collect();
    // Servers turn the order of their answers; that is no change.
    addresses.sort_unstable();
    addresses.dedup();
    if addresses.is_empty() {
        return Err("the name has no address".to_owned());
    }
    Ok((addresses, answer.valid_until().saturating_duration_since(Instant::now())))
}

/// Looks a name up again and again, and tells `tell` of each outcome. What the tailnet tells is looked at at once.
pub async fn follow(
    names: Arc<Names>,
    name: &str,
    mut view: watch::Receiver<Option<Arc<View>>>,
    mut tell: impl FnMut(Result<Vec<IpAddr>, String>),
) {
    let mut failures = 0;
    loop {
        let now = view.borrow_and_update().clone();
        let pause = match names.look_up(name, now.as_deref()).await {
            Ok((addresses, ttl)) => {
                failures = 0;
                tell(Ok(addresses));
                ttl.clamp(SHORTEST, LONGEST)
            }
            Err(reason) => {
                let pause = (RETRY_FIRST * 2u32.saturating_pow(failures)).min(RETRY_MAX);
                failures = (failures + 1).min(10);
                tell(Err(reason));
                pause
            }
        };
        let addresses_in = |view: &Option<Arc<View>>| -> Option<Vec<IpAddr>> {
            view.as_ref()?.by_name(name).map(|peer| peer.addresses.clone())
        };
        let before = addresses_in(&now);
        // Of most that changes in a tailnet a name takes no notice.
        let news = view.wait_for(|view| addresses_in(view) != before);
        if let Ok(Err(_)) = timeout(pause, news).await {
            return;
        }
    }
}
