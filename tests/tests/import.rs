//! `dataplane import nginx`: nginx and the daemon side by side, with the same hellos from the same
//! clients. A connection arrives where nginx sends it, or is refused, and then the import says so.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tests::beside_others;
use tests::daemon::{Daemon, binary};
use tests::netns::{CLIENT, ENTRANCE, Net};
use tests::peers::{Peer, Program, directory};
use tests::random::Random;
use tests::rig::Server;
use tests::stream::client_hello;

/// A client of the networks that the cases let in; [`CLIENT`] is a stranger.
const FRIEND: &str = "192.168.7.9";
/// Where the cases' targets are.
const TARGETS: &str = "10.9.0.0/16";
/// Configurations that are made up, besides those that are written.
const MADE_UP: u64 = 12;

/// What a client sends.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Probe {
    port: u16,
    from: &'static str,
    /// A PROXY header that names another client comes first.
    claims: Option<&'static str>,
    /// `None`: a hello without a name. An empty one: bytes that are no TLS.
    name: Option<String>,
}

/// Where it arrived; `None`: nowhere.
type Arrivals = BTreeMap<Probe, Option<String>>;

/// The three hosts, with targets that say which address was dialled.
struct Site {
    net: Net,
    servers: Vec<(u16, Server)>,
}

impl Site {
    fn new() -> Self {
        let net = Net::new();
        net.cluster.ip(&format!("route add local {TARGETS} dev lo\n"));
        net.entrance.ip(&format!("route add {TARGETS} via 100.64.0.2\nroute add 192.168.7.0/24 via {}\n", CLIENT[0]));
        net.client.ip(&format!("addr add {FRIEND}/32 dev public\n"));
        Self { net, servers: Vec::new() }
    }

    /// Has every target of a configuration answer.
    fn serve(&mut self, text: &str) {
        for port in ports(text, "10.9.") {
            if self.servers.iter().all(|(other, _)| *other != port) {
                let listener = self.net.cluster.listen(&format!("0.0.0.0:{port}"));
                self.servers.push((port, Server::start(listener, answer)));
            }
        }
    }

    fn arrivals(&self, probes: &BTreeSet<Probe>) -> Arrivals {
        // A few at once: what is refused may take a moment.
        let probes: Vec<&Probe> = probes.iter().collect();
        let parts: Vec<_> = probes.chunks(probes.len().div_ceil(4).max(1)).collect();
        std::thread::scope(|s| {
            let threads: Vec<_> = parts
                .iter()
                .map(|part| {
                    s.spawn(|| part.iter().map(|probe| ((*probe).clone(), self.arrival(probe))).collect::<Vec<_>>())
                })
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().expect("no panic")).collect()
        })
    }

    fn arrival(&self, probe: &Probe) -> Option<String> {
        let to = SocketAddr::new(ENTRANCE[0].parse().expect("an address"), probe.port);
        let mut stream = if probe.from == "127.0.0.1" {
            self.net.entrance.connect(SocketAddr::new(IpAddr::from([127, 0, 0, 1]), probe.port)).ok()?
        } else {
            self.net.client.connect_from(probe.from.parse().expect("an address"), to).ok()?
        };
        let mut bytes = Vec::new();
        if let Some(claims) = probe.claims {
            bytes.extend(format!("PROXY TCP4 {claims} 203.0.113.1 1000 443\r\n").as_bytes());
        }
        match probe.name.as_deref() {
            Some("") => bytes.extend(b"GET / HTTP/1.0\r\n\r\n"),
            name => bytes.extend(client_hello(name, &[])),
        }
        // Whoever refuses may have closed.
        let _ = stream.write_all(&bytes);
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a time limit");
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        // What is no answer of a target is an alert.
        String::from_utf8(answer).ok().and_then(|answer| answer.strip_suffix('\n').map(str::to_owned))
    }

    /// Runs nginx, then the daemon with what was imported, and tells the differences.
    fn compare(&mut self, name: &str, text: &str, file: &Path) -> String {
        self.serve(text);
        let probes = probes(text);
        let dir = directory(&self.net, "nginx-");
        let d = dir.display();
        let whole = format!(
            "daemon off;\nmaster_process off;\nuser root;\npid {d}/pid;\nerror_log {d}/error.log info;\n{text}"
        );
        let whole = whole.replace("ranges.d/", &format!("{}/ranges.d/", folder().display()));
        let nginx = Peer::configured(&self.net.entrance, Program::Nginx, dir, &whole);
        let nginx = nginx.unwrap_or_else(|error| panic!("{name}: {error}\n{text}"));
        let theirs = self.arrivals(&probes);
        let log = nginx.log();
        nginx.stop();

        let imported = Command::new(binary()).args(["import", "nginx"]).arg(file).output().expect("the binary runs");
        let said = String::from_utf8_lossy(&imported.stderr).into_owned();
        let toml = String::from_utf8(imported.stdout).expect("UTF-8");
        let code = imported.status.code();
        let ours = if code == Some(1) {
            assert!(toml.is_empty(), "{name}: exit code 1 and a file");
            probes.iter().map(|probe| (probe.clone(), None)).collect()
        } else {
            let admin = |dir: &Path| {
                // What it says of metrics, if port 9443 is taken, stands at the end.
                let toml = toml.split("\n[admin]\n").next().unwrap_or_default();
                format!(
                    "{toml}\n[admin]\nbind = \"127.0.0.1:9999\"\nsocket = \"{}\"\n",
                    dir.join("admin.sock").display()
                )
            };
            let daemon = Daemon::start_on(&self.net, &self.net.entrance, admin);
            let ours = self.arrivals(&probes);
            drop(daemon);
            ours
        };
        let mut differences = String::new();
        for (probe, nginx) in &theirs {
            let here = &ours[probe];
            // Behind a hop of its own nginx knows no client; here the target learns who it is.
            let told = |arrival: &Option<String>| {
                let told = arrival.as_deref().and_then(|arrival| arrival.split_once(" for "));
                told.map(|(address, client)| (address.to_owned(), client == "127.0.0.1"))
            };
            let learns_more = matches!((told(here), told(nginx)), (Some((a, _)), Some((b, true))) if a == b);
            if learns_more && said.contains("nginx told them 127.0.0.1") {
                continue;
            }
            assert!(
                here.is_none() || here == nginx,
                "{name}: {probe:?} arrives at {here:?}, with nginx at {nginx:?}\n{text}\n{said}\n{toml}\n{log}"
            );
            if here != nginx {
                let Probe { port, from, claims, name } = probe;
                let claims = claims.map(|claims| format!(" as {claims}")).unwrap_or_default();
                let nginx = nginx.as_deref().unwrap_or_default();
                let name = match name.as_deref() {
                    None => "no server name",
                    Some("") => "no TLS",
                    Some(name) => name,
                };
                let _ = writeln!(differences, "{port} from {from}{claims}: {name}: nginx sends it to {nginx}");
            }
        }
        // Never silently: what is refused here and not there is a loss.
        assert!(
            differences.is_empty() || matches!(code, Some(1 | 2)),
            "{name}: exit code {code:?}\n{differences}{said}\n{toml}"
        );
        assert_eq!(
            said.contains(": lost: "),
            code == Some(2) || (code == Some(1) && said.contains(": lost: ")),
            "{name}: {said}"
        );
        differences
    }
}

/// Reads what a client sends and tells it which address it has reached.
fn answer(mut stream: std::net::TcpStream) {
    let mut bytes = [0; 4096];
    let _ = stream.set_read_timeout(Some(Duration::from_secs(20)));
    let read = stream.read(&mut bytes).unwrap_or(0);
    let Ok(local) = stream.local_addr() else { return };
    // The header of the proxy in front; of what it says only the client counts.
    let header = bytes[..read].strip_prefix(b"PROXY TCP4 ").unwrap_or_default();
    let client = String::from_utf8_lossy(header).split(' ').next().map(str::to_owned).unwrap_or_default();
    let line = if client.is_empty() { format!("{local}\n") } else { format!("{local} for {client}\n") };
    let _ = stream.write_all(line.as_bytes());
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let _ = stream.read(&mut bytes);
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("imports")
}

/// Ports that stand behind an address which begins like this.
fn ports(text: &str, prefix: &str) -> BTreeSet<u16> {
    let mut ports: BTreeSet<u16> = words(text)
        .filter(|word| word.starts_with(prefix))
        .filter_map(|word| word.rsplit_once(':')?.1.parse().ok())
        .collect();
    if text.contains("$server_port") {
        ports.extend(7001..=7003);
    }
    ports
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .filter(|line| !line.trim_start().starts_with('#'))
        .flat_map(|line| line.split([' ', ';', '{', '}', '"']))
        .filter(|word| !word.is_empty())
}

/// Whether it is a name of the cases.
fn is_of_test(word: &str) -> bool {
    word.rsplit('.').next() == Some("test") && word != "test"
}

/// Names that a configuration has something to say about, and others.
fn names(text: &str) -> BTreeSet<Option<String>> {
    let mut names: BTreeSet<Option<String>> = [None, Some(String::new())].into();
    let mut add = |name: &str| {
        names.insert(Some(name.to_owned()));
    };
    for name in [
        "unlisted.test",
        "a.b.unlisted.test",
        "a.x.test",
        "b.x.test",
        "d.x.test",
        "f.x.test",
        "n2.y.test",
        "q.y.test",
        "c.z.test",
    ] {
        add(name);
    }
    for word in words(text).filter(|word| word.is_ascii() && !word.starts_with('~')) {
        let word = word.to_ascii_lowercase();
        if let Some(suffix) =
            word.strip_prefix("*.").or_else(|| word.strip_prefix('.')).filter(|suffix| is_of_test(suffix))
        {
            add(suffix);
            add(&format!("q.{suffix}"));
            add(&format!("q.r.{suffix}"));
        } else if let Some(prefix) = word.strip_suffix(".*") {
            add(&format!("{prefix}.unlisted.test"));
        } else if is_of_test(&word) {
            add(&word);
        }
    }
    names
}

fn probes(text: &str) -> BTreeSet<Probe> {
    let mut probes = BTreeSet::new();
    let statements: Vec<&str> = text.split([';', '{', '}']).map(str::trim).collect();
    let guarded = text.contains("allow") || text.contains("deny");
    let names = names(text);
    for listen in
        statements.iter().filter_map(|line| line.strip_prefix("listen ")).filter(|listen| !listen.contains("udp"))
    {
        let address = listen.split(' ').next().unwrap_or_default();
        let ports = address.rsplit_once(':').map_or(address, |(_, port)| port);
        let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
        let ports = first.parse::<u16>().expect("a port")..=last.parse::<u16>().expect("a port");
        let clients: &[&str] = if address.starts_with("127.") {
            &["127.0.0.1"]
        } else if guarded {
            &[CLIENT[0], FRIEND]
        } else {
            &[CLIENT[0]]
        };
        for (port, from) in ports.flat_map(|port| clients.iter().map(move |client| (port, *client))) {
            // A peer that is not believed needs no header here, and has to send one to nginx: that
            // is a loss that is told, and nobody is let in who would not be with a header.
            let headers: &[Option<&str>] = match (listen.contains("proxy_protocol"), text.contains("set_real_ip_from"))
            {
                (false, _) => &[None],
                (true, false) => &[None, Some(FRIEND)],
                (true, true) => &[Some(FRIEND)],
            };
            for claims in headers.iter().copied() {
                probes.extend(names.iter().map(|name| Probe { port, from, claims, name: name.clone() }));
            }
        }
    }
    probes
}

#[test]
fn names_go_where_nginx_sends_them_or_are_refused_and_said() {
    let _turn = beside_others();
    let mut site = Site::new();
    let update = std::env::var_os("UPDATE_GOLDEN").is_some();
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder()).expect("the cases").map(|e| e.expect("an entry").path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "conf"));
    files.sort();
    assert!(files.len() >= 12, "{} cases", files.len());
    let mut wrong = String::new();
    for file in &files {
        let text = std::fs::read_to_string(file).expect("a case");
        let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let found = site.compare(&name, &text, file);
        let golden = file.with_extension("txt");
        if update {
            std::fs::write(&golden, &found).expect("written");
        }
        let expected = std::fs::read_to_string(&golden).unwrap_or_default();
        if found != expected {
            let _ = writeln!(wrong, "--- {name}\nexpected:\n{expected}\nfound:\n{found}");
        }
    }
    assert!(wrong.is_empty(), "{wrong}If this is right: UPDATE_GOLDEN=1 cargo test -p tests --test import");
}

/// Choices that are the same for the same seed.
struct Choice(Random);

impl Choice {
    fn below(&mut self, end: usize) -> usize {
        self.0.below(end)
    }

    fn one_of<'t>(&mut self, items: &[&'t str]) -> &'t str {
        items[self.below(items.len())]
    }

    fn some(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

/// A configuration of the grammar that the import knows.
fn made_up(choice: &mut Choice) -> String {
    const NAMES: &[&str] = &["a.x.test", "b.x.test", "c.a.x.test", "x.test", "y.test", "a.y.test"];
    const WILDCARDS: &[&str] = &[
        "*.x.test",
        ".a.x.test",
        "*.y.test",
        ".y.test",
        "*.test",
        "a.*",
        "~^(a|b)\\.x\\.test$",
        "~y",
        "~^c\\.z\\.test$",
    ];
    const VALUES: &[&str] = &[
        "127.0.0.1:9001",
        "10.9.70.1:443",
        "10.9.70.2:443",
        "one",
        "two",
        "gone",
        "",
        "unix:/nowhere",
        "10.9.70.3",
        "127.0.0.1:9002",
        "$hostname:443",
    ];
    let mut text = String::from(
        "events {}\nstream {\nupstream one { server 10.9.71.1:443; }\nupstream two { server 10.9.71.2:443; server 10.9.71.2:443; }\nupstream gone { server 10.9.71.3:443 down; }\n",
    );
    if choice.some(50) {
        text += "ssl_preread on;\n";
    }
    for map in ["m", "n"] {
        let _ = writeln!(text, "map $ssl_preread_server_name ${map} {{ hostnames;");
        let mut seen = BTreeSet::new();
        for _ in 0..choice.below(7) {
            let key = if choice.some(50) { choice.one_of(NAMES) } else { choice.one_of(WILDCARDS) };
            // nginx takes `.x` beside `x` or `*.x` for a conflict.
            if seen.insert(key.trim_start_matches("*.").trim_start_matches('.')) {
                // A hop to itself would go round in a circle.
                let value = choice.one_of(if map == "m" { VALUES } else { &VALUES[1..] });
                let _ = writeln!(text, "  {key} \"{value}\";");
            }
        }
        if choice.some(50) {
            let _ = writeln!(text, "  default \"{}\";", choice.one_of(&VALUES[1..]));
        }
        text += "}\n";
    }
    for server in 0..=choice.below(5) {
        text += "server { ";
        for port in [443, 8443] {
            if server == 0 || choice.some(60) {
                let _ = write!(text, "listen {port}; ");
            }
        }
        if !text.ends_with("; ") {
            text += "listen 7443; ";
        }
        if choice.some(70) {
            let mut seen = BTreeSet::new();
            let named: Vec<&str> = (0..=choice.below(2))
                .map(|_| if choice.some(60) { choice.one_of(NAMES) } else { choice.one_of(&WILDCARDS[..5]) })
                .collect();
            let named: Vec<&str> = named
                .into_iter()
                .filter(|name| seen.insert(name.trim_start_matches("*.").trim_start_matches('.')))
                .collect();
            let _ = write!(text, "server_name {}; ", named.join(" "));
        }
        if choice.some(30) {
            let _ = write!(text, "ssl_preread {}; ", choice.one_of(&["on", "off"]));
        }
        if choice.some(20) {
            text += choice.one_of(&[
                "deny all; ",
                "allow 192.168.7.0/24; deny all; ",
                "allow 192.168.7.9; deny 192.168.7.0/24; ",
            ]);
        }
        if choice.some(15) {
            text += "proxy_protocol on; ";
        }
        let _ = writeln!(
            text,
            "proxy_pass {}; }}",
            choice.one_of(&["$m", "$n", "one", "two", "10.9.70.4:443", "127.0.0.1:9001"])
        );
    }
    let mut hop = |text: &mut String, port: u16, rest: &str| {
        let headers = [
            "",
            "proxy_protocol on; ",
            "set_real_ip_from 127.0.0.1; ",
            "set_real_ip_from 127.0.0.1; proxy_protocol on; ",
            "set_real_ip_from 127.0.0.1; deny 192.168.7.9; ",
        ];
        let headers = if choice.some(60) { headers[0] } else { choice.one_of(&headers) };
        let listen = if choice.some(30) { " proxy_protocol" } else { "" };
        let _ = writeln!(text, "server {{ listen 127.0.0.1:{port}{listen}; {headers}{rest} }}");
    };
    hop(&mut text, 9001, "ssl_preread on; proxy_pass $n;");
    hop(&mut text, 9002, "proxy_pass 10.9.70.5:443;");
    text + "}\n"
}

#[test]
fn names_of_made_up_configurations_go_where_nginx_sends_them_or_nowhere() {
    let _turn = beside_others();
    let mut site = Site::new();
    let count = std::env::var("DATAPLANE_TEST_IMPORTS").map_or(MADE_UP, |count| count.parse().expect("a number"));
    for seed in 0..count {
        let text = made_up(&mut Choice(Random(seed)));
        let file = site.net.file(&format!("made-up-{seed}.conf"), &text);
        site.compare(&format!("seed {seed}"), &text, &file);
    }
}
