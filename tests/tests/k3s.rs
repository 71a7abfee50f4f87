//! The set-up of docs/k3s.md with real parts: Traefik as a pod behind what servicelb does to
//! packets, certificates from an ACME server on the Internet side.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tests::acme::Pebble;
use tests::daemon::{Config, Daemon, HOST};
use tests::netns::{CLIENT, CLUSTER, ENTRANCE, ENTRANCE_INSIDE, Net, PODS};
use tests::peers::{Peer, Program, curl, directory};
use tests::{beside_others, eventually};

/// A site of the cluster that is not for the Internet.
const INTERNAL: &str = "grafana.example.com";
/// servicelb's pod and Traefik's.
const SVCLB: &str = "10.42.0.7";
const TRAEFIK: &str = "10.42.0.8";
/// What a busy machine may take to get a certificate.
const PATIENCE: Duration = Duration::from_secs(60);

/// Ports of the node with those of Traefik: `web`, `websecure`, `public`.
const PORTS: [(u16, u16); 3] = [(80, 8000), (443, 8443), (8443, 8444)];

struct K3s {
    daemon: Daemon,
    traefik: Peer,
    traefik_dir: PathBuf,
    pebble: Pebble,
    _sites: Peer,
    net: Net,
}

impl K3s {
    fn start() -> Self {
        let mut net = Net::new();
        let svclb = net.pod("svclb", SVCLB);
        let pod = net.pod("traefik", TRAEFIK);

        // The Internet for the pods, as it is behind a router at home.
        net.entrance.forwards();
        net.cluster.ip(&format!("route add 198.51.100.0/24 via {}\n", ENTRANCE_INSIDE[0]));
        net.client.ip(&format!("route add 100.64.0.0/24 via {}\n", ENTRANCE[0]));
        net.cluster.iptables(&format!("-t nat -A POSTROUTING -s {PODS} ! -d {PODS} -j MASQUERADE"));

        // Ports of the node go to servicelb's pod (CNI portmap), and from there, masqueraded, to
        // Traefik (klipper-lb; the service's address left out).
        svclb.forwards();
        for (node, traefik) in PORTS {
            let dnat = |to: &str, port: u16| {
                format!("-t nat -I PREROUTING -p tcp --dport {node} -j DNAT --to-destination {to}:{port}")
            };
            net.cluster.iptables(&format!("{} -d {}", dnat(SVCLB, node), CLUSTER[0]));
            svclb.iptables(&dnat(TRAEFIK, traefik));
        }
        svclb.iptables(&format!("-t nat -I POSTROUTING -d {TRAEFIK}/32 -p tcp -j MASQUERADE"));

        let sites = Peer::nginx(
            &net,
            &pod,
            "http { server { listen 127.0.0.1:8001; return 200 \"blog for $http_x_forwarded_for\"; }\n\
             server { listen 127.0.0.1:8002; return 200 \"internal dashboards\"; } }",
        );
        let pebble = Pebble::start(&net).unwrap_or_else(|e| panic!("{e}"));
        let traefik_dir = directory(&net, "traefik-");
        let routers = traefik_dir.join("routers.toml");
        std::fs::write(&routers, routers_toml()).expect("written");
        let config = traefik_toml(&pebble, &traefik_dir.join("acme.json"), &traefik_dir.join("access.log"), &routers);
        let traefik = Peer::configured(&pod, Program::Traefik, traefik_dir.clone(), &config);
        let traefik = traefik.unwrap_or_else(|e| panic!("{e}"));
        let daemon = Daemon::start(&net, &prescribed());
        Self { daemon, traefik, traefik_dir, pebble, _sites: sites, net }
    }

    /// A page from the Internet, by the CA that Pebble is.
    fn fetch(&self, name: &str, more: &[&str]) -> Result<String, String> {
        curl(&self.net.client, &self.pebble.root, name, &format!("{}:443", ENTRANCE[0]), more)
    }

    /// Waits for Traefik to have its certificate.
    fn wait_for_certificate(&self) -> String {
        let mut last = String::new();
        tests::within(PATIENCE, || {
            let answer = self.fetch(HOST, &[]);
            last = answer.clone().unwrap_or_else(|e| e);
            answer.ok()
        })
        .unwrap_or_else(|| {
            panic!("no certificate: {last}\nTraefik: {}\nPebble: {}", self.traefik.log(), self.pebble.log())
        })
    }

    /// Traefik's log of requests.
    fn requests(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.traefik_dir.join("access.log")).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }
}

/// As docs/k3s.md has it.
fn prescribed() -> Config {
    Config::new("auto")
        .targets([&format!("{}:8443", CLUSTER[0])])
        .upstream("send_proxy = \"v2\"")
        .more("[listeners.web]\nmode = \"http\"\nbind = [\"198.51.100.1:80\"]")
}

/// What the chart makes of the values in docs/k3s.md, and a resolver in the place of cert-manager.
fn traefik_toml(
    pebble: &Pebble,
    storage: &std::path::Path,
    log: &std::path::Path,
    routers: &std::path::Path,
) -> String {
    format!(
        r#"
[entryPoints.web]
address = ":8000/tcp"
asDefault = true
proxyProtocol.trustedIPs = ["10.42.0.0/16"]
[entryPoints.websecure]
address = ":8443/tcp"
asDefault = true
http.tls = {{}}
[entryPoints.public]
address = ":8444/tcp"
http.tls = {{}}
proxyProtocol.trustedIPs = ["10.42.0.0/16"]
[accessLog]
filePath = "{log}"
format = "json"
[log]
level = "INFO"
[providers.file]
filename = "{routers}"
[certificatesResolvers.pebble.acme]
email = "owner@example.com"
storage = "{storage}"
caServer = "{directory}"
caCertificates = ["{ca}"]
keyType = "EC256"
httpChallenge.entryPoint = "web"
[global]
checkNewVersion = false
sendAnonymousUsage = false
"#,
        log = log.display(),
        routers = routers.display(),
        storage = storage.display(),
        directory = pebble.directory,
        ca = pebble.ca.display(),
    )
}

/// The public site is on the entry point for public hosts and on that of the house, the internal
/// one where every router is that says nothing.
fn routers_toml() -> String {
    format!(
        r#"
[http.routers.blog]
rule = "Host(`{HOST}`)"
entryPoints = ["public", "websecure"]
service = "blog"
tls.certResolver = "pebble"
[http.routers.internal]
rule = "Host(`{INTERNAL}`)"
service = "internal"
[[http.services.blog.loadBalancer.servers]]
url = "http://127.0.0.1:8001"
[[http.services.internal.loadBalancer.servers]]
url = "http://127.0.0.1:8002"
"#
    )
}

#[test]
fn traefik_gets_a_certificate_through_port_80_and_serves_public_hosts_alone_with_the_clients_address() {
    let _turn = beside_others();
    let k3s = K3s::start();

    // The certificate is Pebble's, for the challenge came through port 80.
    let page = k3s.wait_for_certificate();
    assert_eq!(page, format!("blog for {}", CLIENT[0]));
    let done = [("route", HOST), ("reason", "done")];
    eventually(PATIENCE, "the challenge ends well", || {
        (k3s.daemon.metric("dataplane_connections_closed_total", &done) >= 1.0).then_some(())
    });
    eventually(PATIENCE, "the challenge is in the access log", || {
        k3s.daemon.access_log().iter().any(|line| line.contains("\"listener\":\"web\"")).then_some(())
    });
    eventually(PATIENCE, "Traefik logs the client's address", || {
        let requests = k3s.requests();
        let page =
            requests.iter().find(|request| request["entryPointName"] == "public" && request["RequestHost"] == HOST)?;
        assert_eq!(page["ClientHost"], CLIENT[0], "{page}");
        Some(())
    });

    // The internal site: not by its own name, which is not listed, and not by a listed name with
    // its Host.
    let refusal = k3s.fetch(INTERNAL, &[]).expect_err("not listed");
    assert!(refusal.contains("unrecognized name"), "{refusal}");
    let host = format!("Host: {INTERNAL}");
    for version in ["--http1.1", "--http2"] {
        let refusal = k3s.fetch(HOST, &[version, "--header", &host]).expect_err("the entry point does not know it");
        assert!(refusal.contains("404"), "{refusal}");
    }
    let plain = |path: &str, host: &str| {
        let mut command = Command::new("curl");
        command.args([
            "--silent",
            "--show-error",
            "--noproxy",
            "*",
            "--max-time",
            "10",
            "--write-out",
            " %{http_code}",
        ]);
        command.args(["--header", &format!("Host: {host}"), &format!("http://{}{path}", ENTRANCE[0])]);
        let out = k3s.net.client.run(|| command.output()).expect("curl runs");
        String::from_utf8_lossy(&out.stdout).into_owned()
    };
    assert_eq!(plain("/", INTERNAL), " 000", "port 80 closes without a word");
    assert_eq!(plain("/.well-known/acme-challenge/x", INTERNAL), " 000");
    assert_eq!(plain("/", HOST), " 308");
    let at_home = curl(&k3s.net.cluster, &k3s.pebble.root, INTERNAL, &format!("{TRAEFIK}:8443"), &["--insecure"]);
    assert_eq!(at_home.as_deref(), Ok("internal dashboards"), "it is there, for those who are inside");

    // What the page warns of: routes that point at the entry point where everything is.
    let naive = prescribed().targets([&format!("{}:443", CLUSTER[0])]);
    k3s.daemon.rewrite(&Config { upstream: "send_proxy = \"off\"\n".to_owned(), ..naive });
    let reloaded = k3s.daemon.cli(&["reload"]);
    assert!(reloaded.status.success(), "{}", String::from_utf8_lossy(&reloaded.stderr));
    let leaked = k3s.fetch(HOST, &["--header", &host]);
    assert_eq!(leaked.as_deref(), Ok("internal dashboards"), "the naive set-up lets it through");
    assert_eq!(k3s.fetch(HOST, &[]), Ok(format!("blog for {SVCLB}")), "without a PROXY header everybody is servicelb");
}
