//! `cargo xtask demo`: three hosts, two real nginx servers, the daemon between them, and curl that
//! shows what it does.
//!
//! Everything that is claimed on the screen is checked; a claim that fails ends the demo with an
//! error. The hosts and peers are those of the tests.

use std::fs::{self, File};
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};
use tests::daemon::Metrics;
use tests::netns::{CLIENT, CLUSTER, ENTRANCE, Net, Process};
use tests::peers::{Peer, certificate, curl};

use crate::run::{self, step};
use crate::{ebpf, packages, recording, test};

#[derive(clap::Args)]
pub struct Options {
    /// Leave the hosts and everything on them up, and say how to play with them
    #[arg(long, conflicts_with = "down")]
    keep: bool,
    /// Take down what an earlier `--keep` left up
    #[arg(long)]
    down: bool,
    /// Show it, and make the picture of it that README.md has
    #[arg(long, conflicts_with_all = ["keep", "down"])]
    record: bool,
}

/// Seen from the top of the repository.
const RECORDING: &str = "docs/images/demo.svg";

/// The hosts are called `dp-demo-client`, `dp-demo-entrance` and `dp-demo-cluster`.
const NAME: &str = "demo";

const BLOG: &str = "blog.example.com";
const SHOP: &str = "shop.example.com";
/// A real site of the cluster, for the tailnet only.
const INTERNAL: &str = "grafana.example.com";

const DOWNLOAD: u64 = 1_000_000_000;

pub fn run(options: &Options) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("the demo makes network namespaces: run it as root");
    }
    Net::remove_called(NAME);
    if options.down {
        return Ok(());
    }
    packages::ensure(test::PROGRAMS)?;
    ebpf::build()?;
    step("building the daemon");
    run::run(run::cargo().args(["build", "--release", "--package", "dataplane"]))?;
    if options.record {
        return record();
    }

    let demo = Demo::start(&run::binaries(true)?.join("dataplane"))?;
    demo.two_domains()?;
    demo.refusals()?;
    demo.a_gigabyte()?;
    demo.internal_host()?;
    let demo = demo.a_laptop_dies()?;
    println!("\nEverything above was checked.");
    if options.keep {
        demo.keep();
    } else {
        step("taking everything down");
    }
    Ok(())
}

/// Has the demo run, all that it needs being built, and keeps what it shows.
fn record() -> Result<()> {
    let lines = recording::record(Command::new(std::env::current_exe()?).arg("demo"))?;
    // A folder of this run.
    let of_run = lines.iter().find_map(|(_, line)| Some(line.split_once("/tmp/dp-")?.1.split('/').next()?.to_owned()));
    let tidied =
        |line: &str| of_run.as_ref().map_or(line.to_owned(), |name| line.replace(&format!("dp-{name}"), "demo"));
    let lines: Vec<_> = lines.iter().map(|(at, line)| (*at, tidied(line))).collect();
    let title = "A recording of `cargo xtask demo`: listed domains reach their servers, others are refused, a download \
                 arrives whole, and a laptop dies without the site going with it";
    let file = run::workspace().join(RECORDING);
    fs::write(&file, recording::svg(&lines, title)).with_context(|| format!("cannot write {}", file.display()))?;
    println!("{}", file.display());
    Ok(())
}

struct Demo {
    // In the order in which they go down.
    daemon: Process,
    laptops: Vec<Peer>,
    net: Net,
    binary: PathBuf,
    config: PathBuf,
    ca: PathBuf,
}

impl Demo {
    fn start(binary: &Path) -> Result<Self> {
        step("three hosts: client (Internet), entrance (public address), cluster (two laptops)");
        let net = Net::called(NAME);

        step("two nginx servers in the cluster: TLS, PROXY protocol, a public and an internal entry point");
        let ca = certificate(&net, &[BLOG, SHOP, INTERNAL]);
        let mut laptops = Vec::new();
        make_download(&net.dir().join("big"))?;
        for (name, address) in [("laptop-1", CLUSTER[0]), ("laptop-2", CLUSTER[1])] {
            laptops.push(Peer::nginx(&net, &net.cluster, &nginx(name, address, &ca, net.dir())));
        }

        let config = net.file(
            "dataplane.toml",
            format!(
                r#"[listeners.public]
bind = ["{entrance4}:443", "[{entrance6}]:443"]

[upstreams.blog]                 # laptop-1, and laptop-2 when that one is down
targets = ["{first}:443", "{second}:443"]
balance = "first"
send_proxy = "v2"

[upstreams.shop]                 # the other way round
targets = ["{second}:443", "{first}:443"]
balance = "first"
send_proxy = "v2"

[[routes]]
hosts = ["{BLOG}"]
upstream = "blog"

[[routes]]
hosts = ["{SHOP}"]
upstream = "shop"

[admin]
bind = "127.0.0.1:9443"
socket = "{socket}"
"#,
                entrance4 = ENTRANCE[0],
                entrance6 = ENTRANCE[1],
                first = CLUSTER[0],
                second = CLUSTER[1],
                socket = net.dir().join("admin.sock").display(),
            ),
        );
        step(format_args!("dataplane run --config {}", config.display()));
        println!("{}", fs::read_to_string(&config)?);
        let log = File::create(net.dir().join("dataplane.log"))?;
        let mut command = Command::new(binary);
        command.args(["run", "--config"]).arg(&config).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let daemon = net.entrance.spawn(&mut command).context("cannot start the daemon")?;
        let demo = Self { daemon, laptops, net, binary: binary.to_owned(), config, ca };
        demo.wait_ready()?;
        Ok(demo)
    }

    fn wait_ready(&self) -> Result<()> {
        let begin = Instant::now();
        while self.get("/readyz").is_none() {
            if begin.elapsed() > Duration::from_secs(10) {
                bail!("the daemon does not get ready:\n{}", fs::read_to_string(self.net.dir().join("dataplane.log"))?);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn get(&self, path: &str) -> Option<String> {
        let url = format!("http://127.0.0.1:9443{path}");
        let mut command = Command::new("curl");
        command.args(["--silent", "--fail", "--noproxy", "*", "--max-time", "5", &url]);
        let out = self.net.entrance.run(|| command.output()).ok()?;
        out.status.success().then(|| String::from_utf8_lossy(&out.stdout).into_owned())
    }

    fn metrics(&self) -> Result<Metrics> {
        Ok(Metrics::parse(&self.get("/metrics").context("the daemon gives no metrics")?))
    }

    fn fetch(&self, name: &str, more: &[&str]) -> Result<String, String> {
        curl(&self.net.client, &self.ca, name, &format!("{}:443", ENTRANCE[0]), more)
    }

    fn two_domains(&self) -> Result<()> {
        heading("Two listed domains, each at its own server, which learns client and domain");
        for (name, laptop) in [(BLOG, "laptop-1"), (SHOP, "laptop-2")] {
            let page = self.fetch(name, &[]).map_err(anyhow::Error::msg)?;
            println!("$ curl https://{name}/\n{page}");
            let expected = format!("{laptop} sees client {}, domain {name}", CLIENT[0]);
            ensure!(page.contains(&expected), "expected: {expected}");
        }
        Ok(())
    }

    fn refusals(&self) -> Result<()> {
        heading("What is refused");
        let connections = || self.net.cluster.tcp_segments_received();
        let before = connections();
        println!("$ curl https://{INTERNAL}/        (a real site of the cluster that is not listed)");
        let Err(refusal) = self.fetch(INTERNAL, &[]) else { bail!("an unlisted domain was served") };
        println!("{refusal}");
        println!("$ curl http://{BLOG}:443/        (no TLS)");
        let url = format!("http://{BLOG}:443/");
        let resolve = format!("{BLOG}:443:{}", ENTRANCE[0]);
        let mut command = Command::new("curl");
        command.args(["--silent", "--show-error", "--noproxy", "*", "--max-time", "10", "--resolve", &resolve, &url]);
        let out = self.net.client.run(|| command.output()).context("curl is needed")?;
        ensure!(!out.status.success(), "a request without TLS was served");
        println!("{}", String::from_utf8_lossy(&out.stderr));
        let metrics = self.metrics()?;
        for reason in ["unknown_host", "not_tls"] {
            let labels = [("listener", "public"), ("reason", reason)];
            let count = metrics.sum("dataplane_connections_rejected_total", &labels);
            println!("dataplane_connections_rejected_total{{reason=\"{reason}\"}} {count}");
            ensure!(count >= 1.0, "the refusal is not in the metrics");
        }
        ensure!(connections() == before, "the cluster heard of a refused connection");
        println!("The cluster received no packet of either.");
        Ok(())
    }

    fn a_gigabyte(&self) -> Result<()> {
        heading("A download of 1 GB");
        let bytes = |metrics: &Metrics, path: &[(&str, &str)]| {
            metrics.sum("dataplane_bytes_total", &[&[("direction", "to_client")], path].concat())
        };
        let before = self.metrics()?;
        let begin = Instant::now();
        let (ip, name) = (ENTRANCE[0], BLOG);
        let mut command = Command::new("curl");
        command
            .args(["--silent", "--show-error", "--fail", "--noproxy", "*", "--max-time", "300"])
            .arg("--resolve")
            .arg(format!("{name}:443:{ip}"))
            .arg("--cacert")
            .arg(&self.ca)
            .arg(format!("https://{name}/big"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut process = self.net.client.spawn(&mut command)?;
        let received = process.child().stdout.take().expect("piped");
        let (length, received) = hash(received, "downloading")?;
        let seconds = begin.elapsed().as_secs_f64();
        ensure!(process.child().wait()?.success(), "curl failed");
        let (_, original) = hash(File::open(self.net.dir().join("big"))?, "hashing the original")?;
        println!("sent      sha256 {original}\nreceived  sha256 {received}");
        ensure!(length == DOWNLOAD && original == received, "the download is not what was sent: {length} bytes");
        let after = self.metrics()?;
        let share = |path: &str| {
            let labels = [("path", path)];
            bytes(&after, &labels) - bytes(&before, &labels)
        };
        let (kernel, userspace) = (share("kernel"), share("userspace"));
        let percent = 100.0 * kernel / (kernel + userspace);
        println!(
            "{:.0} MB in {seconds:.1} s, most of it TLS at both ends; {percent:.2} % of the bytes never came to userspace of the entrance node",
            length as f64 / 1e6
        );
        ensure!(percent > 90.0, "the kernel was to forward the bulk");
        Ok(())
    }

    fn internal_host(&self) -> Result<()> {
        heading("A listed server name with the Host of an internal site");
        println!("$ curl https://{BLOG}/ --header 'Host: {INTERNAL}'");
        let host = format!("Host: {INTERNAL}");
        let answer = self.fetch(BLOG, &["--header", &host]);
        let Err(refusal) = answer else { bail!("the internal site was served to the Internet") };
        println!("{refusal}");
        ensure!(refusal.contains("421"), "expected the public entry point to answer 421");
        let inside = format!("{}:8443", CLUSTER[0]);
        let page = curl(&self.net.cluster, &self.ca, INTERNAL, &inside, &[]).map_err(anyhow::Error::msg)?;
        println!(
            "The public entry point knows public hosts only and answers 421; inside the tailnet the site is there, on another one:\n\
             $ curl https://{INTERNAL}:8443/        (from the cluster)\n{page}\
             The dataplane cannot see the Host, it is inside TLS: README.md, security note."
        );
        Ok(())
    }

    fn a_laptop_dies(mut self) -> Result<Self> {
        heading("A laptop dies");
        println!("laptop-1's nginx is killed");
        drop(self.laptops.remove(0));
        let page = self.fetch(BLOG, &[]).map_err(anyhow::Error::msg)?;
        println!("$ curl https://{BLOG}/\n{page}");
        ensure!(page.starts_with("laptop-2"), "expected laptop-2 to answer");
        let out = self.command(&["status"]).output()?;
        println!("$ dataplane status\n{}", String::from_utf8_lossy(&out.stdout));
        Ok(self)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(arguments).arg("--config").arg(&self.config);
        command
    }

    fn keep(self) {
        let Self { daemon, laptops, net, binary, config, ca } = self;
        let (client, entrance) = ("ip netns exec dp-demo-client", "ip netns exec dp-demo-entrance");
        println!(
            "\nEverything stays up. For example:\n\n  \
             {client} curl --cacert {ca} --resolve {SHOP}:443:{ip} https://{SHOP}/\n  \
             {client} openssl s_client -connect {ip}:443 -servername {INTERNAL}\n  \
             {entrance} curl http://127.0.0.1:9443/metrics\n  \
             {binary} --config {config} status\n  \
             {binary} --config {config} connections\n  \
             {binary} --config {config} drain {second}:443\n  \
             editor {config}; {binary} --config {config} reload\n  \
             tail -f {log}\n\n\
             Take it down:\n\n  cargo xtask demo --down",
            ca = ca.display(),
            ip = ENTRANCE[0],
            binary = binary.display(),
            config = config.display(),
            second = CLUSTER[1],
            log = net.dir().join("dataplane.log").display(),
        );
        // Not dropped, so not ended.
        std::mem::forget((daemon, laptops, net));
    }
}

fn nginx(name: &str, address: &str, ca: &Path, root: &Path) -> String {
    let certificate = ca.display();
    let root = root.display();
    format!(
        r#"http {{
    ssl_certificate {certificate};
    ssl_certificate_key {certificate};
    sendfile on;
    # The public entry point: public hosts, and nothing for anybody else.
    server {{
        listen {address}:443 ssl proxy_protocol default_server;
        return 421;
    }}
    server {{
        listen {address}:443 ssl proxy_protocol;
        server_name {BLOG} {SHOP};
        location = /big {{ root {root}; }}
        location / {{ return 200 "{name} sees client $proxy_protocol_addr, domain $proxy_protocol_tlv_authority, Host $host\n"; }}
    }}
    # The internal one, for the tailnet.
    server {{
        listen {address}:8443 ssl;
        server_name {INTERNAL};
        return 200 "{name}: internal dashboards, for {INTERNAL} only\n";
    }}
}}"#
    )
}

/// Bytes that do not repeat, so that a piece that is lost, doubled or swapped changes the hash.
fn make_download(path: &Path) -> Result<()> {
    step("a file of 1 GB to download");
    let mut file = File::create(path)?;
    let mut random = File::open("/dev/urandom")?.take(DOWNLOAD);
    std::io::copy(&mut random, &mut file).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(())
}

/// Length and SHA-256 of a stream, with progress on a terminal.
fn hash(mut from: impl Read, what: &str) -> Result<(u64, String)> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let (mut length, mut shown) = (0, 0);
    let terminal = std::io::stderr().is_terminal();
    loop {
        let n = from.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
        length += n as u64;
        let percent = length * 100 / DOWNLOAD;
        if terminal && percent != shown {
            shown = percent;
            eprint!("\r{what}: {percent} %");
            let _ = std::io::stderr().flush();
        }
    }
    if terminal {
        eprintln!("\r{what}: done  ");
    }
    Ok((length, format!("{:x}", hash.finalize())))
}

fn heading(text: &str) {
    println!("\n--- {text}\n");
}
