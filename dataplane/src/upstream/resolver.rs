//! From a target's name to its addresses, beforehand: connections never wait for a resolver, but
//! for the very first answer.
//!
//! hickory-resolver asks, because the system's `getaddrinfo` tells no TTL. What the tailnet itself
//! says of a name of its own comes first. The last good answer is used for as long as there is no
//! other.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use hickory_resolver::config::{ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolverConfig, ResolverOpts};
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::op::Query;
use hickory_resolver::proto::rr::{Name, RecordType};
use hickory_resolver::{Hosts, TokioResolver};
use tokio::sync::{Notify, watch};
use tokio::time::sleep;

use crate::config::{self, Config, Diagnostic, TargetHost};
use crate::tailnet::{self, Peer, View};

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
pub struct Resolver {
    config: config::Resolver,
    system: Mutex<Option<(Fingerprint, TokioResolver)>>,
    hosts: Mutex<Option<(Option<SystemTime>, Arc<Hosts>)>>,
    magic: Option<TokioResolver>,
}

type Fingerprint = [Option<SystemTime>; 2];

impl Resolver {
    /// Nothing is asked yet.
    pub fn new(config: config::Resolver) -> Self {
        Self {
            config,
            system: Mutex::default(),
            hosts: Mutex::default(),
            magic: build(of_servers(&[MAGIC_DNS]), options()),
        }
    }

    /// The addresses of a name, and how long they hold. This machine's own word comes first, then
    /// the tailnet's, then DNS: whoever names a machine of the tailnet must not capture a name that
    /// its owner did not give away.
    ///
    /// # Errors
    /// What the resolver said, for people.
    pub async fn look_up(&self, name: &str, view: Option<&View>) -> Result<(Vec<IpAddr>, Duration), String> {
        if is_localhost(name) {
            return Ok((vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()], LONGEST));
        }
        if let Some(addresses) = self.of_hosts_file(name) {
            return Ok((addresses, LONGEST));
        }
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

    /// Whether the tailnet has a machine of this name while DNS knows other addresses for it: then
    /// the owner of that machine decides where the name leads.
    pub async fn is_ambiguous(&self, name: &str, view: &View) -> bool {
        if name.contains('.') || is_localhost(name) || self.of_hosts_file(name).is_some() {
            return false;
        }
        let Some(peer) = view.by_name(name) else { return false };
        let Ok(resolver) = self.system() else { return false };
        ask(&resolver, name).await.is_ok_and(|(found, _)| found.iter().any(|ip| !peer.addresses.contains(ip)))
    }

    /// The machine of the tailnet that a target is; none where this machine's own word on the name
    /// counts: else the owner of a machine that is called so could take the target down.
    pub fn peer<'v>(&self, host: &TargetHost, view: &'v View) -> Option<&'v Peer> {
        match host {
            TargetHost::Ip(ip) => view.by_address(*ip),
            TargetHost::Name(name) if is_localhost(name) || self.of_hosts_file(name).is_some() => None,
            TargetHost::Name(name) => view.by_name(name),
        }
    }

    /// What /etc/hosts says.
    fn of_hosts_file(&self, name: &str) -> Option<Vec<IpAddr>> {
        let hosts = self.hosts_file()?;
        let name = Name::from_ascii(name.trim_end_matches('.')).ok()?;
        let of = |kind| hosts.lookup_static_host(&Query::query(name.clone(), kind));
        let found = [of(RecordType::A), of(RecordType::AAAA)];
        let mut addresses: Vec<IpAddr> =
            found.iter().flatten().flat_map(Lookup::answers).filter_map(|record| record.data.ip_addr()).collect();
        addresses.sort_unstable();
        addresses.dedup();
        (!addresses.is_empty()).then_some(addresses)
    }

    /// Read again when it has changed.
    fn hosts_file(&self) -> Option<Arc<Hosts>> {
        let changed = Path::new(FILES[1]).metadata().and_then(|m| m.modified()).ok();
        let mut known = self.hosts.lock().expect("no panic while held");
        if let Some((of, hosts)) = &*known
            && *of == changed
        {
            return Some(hosts.clone());
        }
        let hosts = Arc::new(Hosts::from_system().ok()?);
        *known = Some((changed, hosts.clone()));
        Some(hosts)
    }

    /// The system's, or the configured one; made anew when the files have changed that it is made
    /// of.
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

/// Targets of one label that the tailnet has a machine of while DNS knows other addresses for the
/// name. Asks tailscaled and DNS.
pub fn ambiguous(config: &Config) -> Vec<Diagnostic> {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return Vec::new() };
    runtime.block_on(async {
        let Ok(view) = tailnet::look(&config.tailnet.socket).await else { return Vec::new() };
        let names = Resolver::new(config.resolver.clone());
        let mut found = Vec::new();
        for target in config.upstreams.iter().flat_map(|upstream| &upstream.targets) {
            let TargetHost::Name(name) = &target.host else { continue };
            if names.is_ambiguous(name, &view).await {
                let message = format!("the tailnet has a machine called `{name}`, and DNS knows the name with other addresses: the tailnet's counts");
                let remedy = format!("write the name in full: \"{name}.{}:{}\" for the machine", view.suffix, target.port);
                found.push(Diagnostic::warning(target.span.clone(), message, remedy));
            }
        }
        found
    })
}

/// RFC 6761 section 6.3: these are loopback, whatever anybody says.
fn is_localhost(name: &str) -> bool {
    let name = name.trim_end_matches('.');
    let last = name.rsplit('.').next().unwrap_or(name);
    last.eq_ignore_ascii_case("localhost")
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

/// Looks a name up again and again, and tells `tell` of each outcome, which says whether it is of
/// use: an answer that is not counts as none. What the tailnet tells is looked at at once, and so
/// is the name when somebody wants it and it has no answer; but never more often than once a
/// second.
pub async fn follow(
    names: Arc<Resolver>,
    name: &str,
    mut view: watch::Receiver<Option<Arc<View>>>,
    wanted: &Notify,
    mut tell: impl FnMut(Result<Vec<IpAddr>, String>) -> bool,
) {
    let mut failures = 0;
    loop {
        let now = view.borrow_and_update().clone();
        let (answer, ttl) = match names.look_up(name, now.as_deref()).await {
            Ok((addresses, ttl)) => (Ok(addresses), ttl),
            Err(reason) => (Err(reason), Duration::ZERO),
        };
        let pause = if tell(answer) {
            failures = 0;
            ttl.clamp(SHORTEST, LONGEST)
        } else {
            let pause = (RETRY_FIRST * 2u32.saturating_pow(failures)).min(RETRY_MAX);
            failures = (failures + 1).min(10);
            pause
        };
        let addresses_in = |view: &Option<Arc<View>>| -> Option<Vec<IpAddr>> {
            view.as_ref()?.by_name(name).map(|peer| peer.addresses.clone())
        };
        let before = addresses_in(&now);
        let asked = async {
            sleep(SHORTEST).await;
            wanted.notified().await;
        };
        tokio::select! {
            // Of most that changes in a tailnet a name takes no notice.
            news = view.wait_for(|view| addresses_in(view) != before) => {
                if news.is_err() {
                    return;
                }
            }
            () = asked, if failures > 0 => {}
            () = sleep(pause) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A resolver that reaches no server.
    fn names() -> Resolver {
        Resolver::new(config::Resolver { servers: vec![([127, 0, 0, 1], 1).into()] })
    }

    #[tokio::test]
    async fn whoever_names_a_machine_of_the_tailnet_captures_no_name_of_this_machine() {
        let stranger: IpAddr = [100, 64, 0, 66].into();
        let view = View::of("tailnet.example", &[("localhost", stranger), ("thinkpad", stranger)]);
        let names = names();
        for name in ["localhost", "LOCALHOST.", "a.localhost"] {
            let (found, _) = names.look_up(name, Some(&view)).await.unwrap();
            assert!(found.iter().all(IpAddr::is_loopback), "{name}: {found:?}");
        }
        let mut own = Hosts::default();
        let name = Name::from_ascii("thinkpad.").unwrap();
        let written = hickory_resolver::proto::rr::RData::A(Ipv4Addr::new(192, 0, 2, 7).into());
        let record = hickory_resolver::proto::rr::Record::from_rdata(name.clone(), 60, written);
        let query = Query::query(name.clone(), RecordType::A);
        own.insert(name, RecordType::A, Lookup::new_with_max_ttl(query, [record]));
        assert_eq!(names.look_up("thinkpad", Some(&view)).await.unwrap().0, [stranger], "it knows no other");
        let modified = Path::new(FILES[1]).metadata().and_then(|m| m.modified()).ok();
        *names.hosts.lock().unwrap() = Some((modified, Arc::new(own)));
        let here: IpAddr = [192, 0, 2, 7].into();
        assert_eq!(
            names.look_up("Thinkpad", Some(&view)).await.unwrap().0,
            [here],
            "/etc/hosts is this machine's owner's"
        );
        let peer = |name: &str| names.peer(&TargetHost::Name(name.to_owned()), &view).is_some();
        assert!(
            !peer("localhost") && !peer("thinkpad"),
            "nor does such a machine take a target down when it goes offline"
        );
        assert!(peer("thinkpad.tailnet.example"));
    }
}
