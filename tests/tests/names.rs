//! Targets by name, with a real DNS server that changes its mind and falls silent.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tests::daemon::{Config, Daemon};
use tests::forge::Forge;
use tests::netns::{CLUSTER, Net, Process};
use tests::rig::{PATIENCE, Server, accept_within, hello, public};
use tests::stream::read_preamble;
use tests::{beside_others, eventually};

const UP: &str = "dataplane_upstream_target_up";
/// Seconds.
const TTL: u64 = 2;
/// What a busy machine may take beyond the TTL.
const SLACK: Duration = Duration::from_secs(8);

/// dnsmasq on the entrance node, with records that can be changed.
struct Dns<'a> {
    net: &'a Net,
    process: Process,
}

impl<'a> Dns<'a> {
    fn start(net: &'a Net, records: &str) -> Self {
        Self::with_ttl(net, records, TTL)
    }

    fn with_ttl(net: &'a Net, records: &str, ttl: u64) -> Self {
        net.file("records", records);
        let mut command = Command::new("dnsmasq");
        let hosts = net.dir().join("records");
        command
            .args([
                "--keep-in-foreground",
                "--conf-file=/dev/null",
                "--no-resolv",
                "--no-hosts",
                "--port=5300",
                "--pid-file",
            ])
            .args(["--listen-address=127.0.0.1", "--bind-interfaces", "--user=root", "--log-facility=-"])
            .arg(format!("--local-ttl={ttl}"))
            .arg(format!("--addn-hosts={}", hosts.display()))
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .stdin(Stdio::null())
            .stderr(Stdio::null());
        let process = net.entrance.spawn(&mut command).expect("dnsmasq is needed: apt-get install dnsmasq-base");
        eventually(PATIENCE, "dnsmasq listens", || {
            net.entrance.output(Command::new("ss").args(["-lunH"])).contains(":5300").then_some(())
        });
        Self { net, process }
    }

    fn change(&self, records: &str) {
        self.net.file("records", records);
        self.signal(Signal::HUP);
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.process.pid() as i32).expect("a process id"), signal).expect("our child");
    }
}

fn config(more: &str) -> Config {
    Config::new("auto")
        .targets(["laptop.example:443"])
        .more(&format!("[resolver]\nservers = [\"127.0.0.1:5300\"]\n{more}"))
}

/// A server that says which one it is, then keeps the connection.
fn named(net: &Net, address: &str) -> Server {
    let name = address.to_owned();
    Server::start(net.cluster.listen(address), move |mut stream| {
        if read_preamble(&stream, false).is_ok() {
            let _ = writeln!(stream, "{name}");
            let _ = std::io::copy(&mut &stream, &mut &stream);
        }
    })
}

/// Who answers a new connection; empty when nobody does. The connection stays.
fn ask(net: &Net) -> (String, TcpStream) {
    let mut client = net.client.connect(public()).expect("accepted");
    client.set_read_timeout(Some(PATIENCE)).expect("a time limit");
    client.write_all(&hello()).expect("sent");
    let mut name = Vec::new();
    let mut byte = [0];
    while client.read_exact(&mut byte).is_ok() && byte != *b"\n" {
        name.push(byte[0]);
    }
    (String::from_utf8_lossy(&name).into_owned(), client)
}

#[test]
fn a_changed_address_moves_new_connections_within_the_ttl_and_leaves_established_ones() {
    let _turn = beside_others();
    let net = Net::new();
    let (first, second) = (format!("{}:443", CLUSTER[0]), format!("{}:443", CLUSTER[1]));
    let _servers = [&first, &second].map(|address| named(&net, address));
    let dns = Dns::start(&net, &format!("{} laptop.example\n", CLUSTER[0]));
    let daemon = Daemon::start(&net, &config(""));
    let (answered, mut established) = ask(&net);
    assert_eq!(answered, first);

    dns.change(&format!("{} laptop.example\n", CLUSTER[1]));
    let changed = Instant::now();
    eventually(Duration::from_secs(TTL) + SLACK, "new connections go to the new address", || {
        (ask(&net).0 == second).then_some(())
    });
    println!("moved {:?} after the change, with a TTL of {TTL} s", changed.elapsed());
    established.write_all(b"still here").expect("established");
    let mut echoed = [0; 10];
    established.read_exact(&mut echoed).expect("established");
    assert_eq!(&echoed, b"still here");

    // The server falls silent, and then is gone.
    for signal in [Signal::STOP, Signal::KILL] {
        dns.signal(signal);
        std::thread::sleep(Duration::from_secs(TTL + 1));
        // The best of several: another program may have the processors. The resolver would be
        // waited for for 2 s each time.
        let asked = |_| {
            let start = Instant::now();
            assert_eq!(ask(&net).0, second, "the last good answer survives");
            start.elapsed()
        };
        let least = (0..3).map(asked).min().expect("three times");
        assert!(least < Duration::from_secs(1), "nobody waits for the resolver: {least:?}");
    }
    assert!(daemon.metric(UP, &[]) > 0.5);
}

#[test]
fn a_name_without_an_address_is_a_target_that_is_down_until_it_has_one() {
    let _turn = beside_others();
    let net = Net::new();
    let second = format!("{}:443", CLUSTER[1]);
    let _server = named(&net, &second);
    let dns = Dns::start(&net, "");
    let daemon = Daemon::start(&net, &config(""));
    daemon.wait_metric(UP, &[], 0.0);
    let status = daemon.json(&["status", "--json"]);
    let target = &status["upstreams"][0]["targets"][0];
    assert!(target["reason"].as_str().is_some_and(|r| r.starts_with("resolve:")), "{target}");
    assert_eq!(target["addresses"], Value::Array(Vec::new()));
    let warned = || daemon.wait_log(&["WARN", "laptop.example"]);
    assert_eq!(warned().len(), 1, "{:?}", warned());
    assert!(daemon.cli(&["reload"]).status.success(), "nor is it an error of a reload");
    dns.change(&format!("{} laptop.example\n", CLUSTER[1]));
    eventually(PATIENCE + SLACK, "it has an address now", || (ask(&net).0 == second).then_some(()));
    // A connection may be quicker than the word of it.
    daemon.wait_metric(UP, &[], 1.0);
    daemon.wait_log(&["target is up"]);
    assert_eq!(warned().len(), 1, "once for the change: {:?}", warned());
}

/// A node whose repository says this, and whose own file has these lines in [source].
fn of_repository(net: &Net, forge: &Forge, shared: &str, own: &str) -> Daemon {
    forge.push(&[("dataplane.toml", shared)]);
    Daemon::start_on(net, &net.entrance, |dir| {
        let d = dir.display();
        format!(
            "[admin]\nbind = \"127.0.0.1:9443\"\nsocket = \"{d}/admin.sock\"\n[resolver]\nservers = [\"127.0.0.1:5300\"]\n\
             [source]\nref = \"main\"\nstate_directory = \"{d}/state\"\ngit = \"file://{}\"\n{own}\n",
            forge.repository().display()
        )
    })
}

/// What a repository says of a name that it chose.
const SHARED: &str = "[listeners.public]\nbind = [\"0.0.0.0:443\"]\n\
                      [upstreams.cluster]\ntargets = [\"laptop.example:443\"]\nconnect_timeout = \"15s\"\n\
                      [[routes]]\nhosts = [\"app.example.com\"]\nupstream = \"cluster\"\n";

#[test]
fn a_port_for_challenges_leads_a_repository_nowhere_that_its_node_does_not_let_it() {
    let _turn = beside_others();
    let net = Net::new();
    let forge = Forge::start(&net, &net.entrance);
    let _dns = Dns::start(&net, "127.0.0.1 laptop.example\n");
    let secret = net.entrance.listen("127.0.0.1:8022");
    let web = "[listeners.web]\nmode = \"http\"\nbind = [\"0.0.0.0:80\"]\nacme_port = 8022\n";
    let shared = format!("{SHARED}{web}").replace("example:443", "example:8443");
    let daemon = of_repository(&net, &forge, &shared, "allow_targets = [\"*\", \"127.0.0.1:8443\"]");
    let mut client = net.client.connect(([198, 51, 100, 1], 80).into()).expect("accepted");
    client.set_read_timeout(Some(PATIENCE)).expect("a time limit");
    let request = "GET /.well-known/acme-challenge/abc HTTP/1.1\r\nHost: app.example.com\r\n\r\n";
    client.write_all(request.as_bytes()).expect("sent");
    let _ = client.read(&mut [0]);
    assert!(accept_within(&secret, Duration::from_millis(300)).is_none(), "it was dialled");
    daemon.wait_metric("dataplane_upstream_connect_failures_total", &[("reason", "forbidden")], 1.0);
}

#[test]
fn a_name_that_led_where_it_may_not_is_asked_for_again_and_keeps_nobody_waiting() {
    let _turn = beside_others();
    let net = Net::new();
    let forge = Forge::start(&net, &net.entrance);
    let second = format!("{}:443", CLUSTER[1]);
    let _server = named(&net, &second);
    let dns = Dns::with_ttl(&net, "127.0.0.1 laptop.example\n", 60);
    let daemon = of_repository(&net, &forge, SHARED, "");
    daemon.wait_metric(UP, &[], 0.0);
    let status = daemon.json(&["status", "--json"]);
    let target = &status["upstreams"][0]["targets"][0];
    assert!(target["reason"].as_str().is_some_and(|r| r.contains("allow_targets")), "{target}");
    // Long enough that it is not asked for again soon by itself.
    std::thread::sleep(Duration::from_secs(8));
    let start = Instant::now();
    // internal_error, RFC 8446 section 6.2.
    assert_eq!(ask(&net).0.as_bytes(), [21, 3, 3, 0, 2, 2, 80]);
    assert!(start.elapsed() < Duration::from_secs(5), "waited for {:?}", start.elapsed());
    dns.change(&format!("{} laptop.example\n", CLUSTER[1]));
    eventually(Duration::from_secs(5), "it leads elsewhere now", || (ask(&net).0 == second).then_some(()));
}

#[test]
fn all_addresses_of_a_name_are_used_and_one_that_is_dead_is_passed_over() {
    let _turn = beside_others();
    let net = Net::new();
    let (v4, v6) = (format!("{}:443", CLUSTER[0]), format!("[{}]:443", CLUSTER[2]));
    let (four, six) = (named(&net, &v4), named(&net, &v6));
    let records = [CLUSTER[0], CLUSTER[2]].map(|address| format!("{address} laptop.example\n")).concat();
    let _dns = Dns::start(&net, &records);
    let daemon = Daemon::start(&net, &config(""));
    eventually(PATIENCE, "both are known", || {
        let status = daemon.json(&["status", "--json"]);
        let addresses = status["upstreams"][0]["targets"][0]["addresses"].as_array().expect("a list").len();
        (addresses == 2).then_some(())
    });
    // The client came by IPv4: so does the connection.
    assert_eq!(ask(&net).0, v4);
    drop(four);
    for _ in 0..4 {
        assert_eq!(ask(&net).0, v6);
    }
    assert!(daemon.metric(UP, &[]) > 0.5, "one of its addresses answers: it is up");
    drop(six);
}

#[test]
fn a_name_that_both_the_tailnet_and_dns_know_is_told_by_check() {
    let _turn = beside_others();
    let net = Net::new();
    let _dns = Dns::start(&net, "100.64.0.3 laptop\n100.64.0.2 same\n");
    // What tailscaled's LocalAPI answers, of two machines.
    let socket = net.dir().join("tailscaled.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).expect("bound");
    std::thread::spawn(move || {
        let peer = |name: &str, ip: &str| {
            format!(
                "\"{name}\": {{\"DNSName\": \"{name}.tailnet.example.\", \"TailscaleIPs\": [\"{ip}\"], \"Online\": true}}"
            )
        };
        let peers = [peer("laptop", "100.64.0.66"), peer("same", "100.64.0.2")].join(",");
        let status = format!(
            "{{\"BackendState\": \"Running\", \"MagicDNSSuffix\": \"tailnet.example\", \"Peer\": {{{peers}}}}}"
        );
        for stream in listener.incoming() {
            let mut stream = stream.expect("accepted");
            let _ = stream.read(&mut [0; 4096]);
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", status.len());
            let _ = stream.write_all((head + &status).as_bytes());
        }
    });
    let check = |target: &str| {
        let text = format!(
            "[listeners.public]\nbind = [\"198.51.100.1:443\"]\n[upstreams.a]\ntargets = [\"{target}:443\"]\n\
             [[routes]]\nhosts = [\"a.example\"]\nupstream = \"a\"\n[resolver]\nservers = [\"127.0.0.1:5300\"]\n\
             [tailnet]\nsocket = \"{}\"\n",
            socket.display()
        );
        let file = net.file("check.toml", text);
        let mut command = Command::new(tests::daemon::binary());
        let out = net.entrance.run(|| command.args(["check", "--config"]).arg(&file).output()).expect("it runs");
        assert!(out.status.success());
        String::from_utf8_lossy(&out.stderr).into_owned()
    };
    let said = check("laptop");
    assert!(
        said.contains("the tailnet has a machine called `laptop`") && said.contains("laptop.tailnet.example:443"),
        "{said}"
    );
    assert_eq!(check("same"), "", "both lead to the same place");
    assert_eq!(check("laptop.tailnet.example"), "");
}
