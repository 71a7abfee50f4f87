//! The tailnet's own view, with real tailscaled nodes: two laptops and the entrance node.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::daemon::{Config, Daemon};
use tests::netns::Net;
use tests::rig::{PATIENCE, Server, hello, public};
use tests::stream::read_preamble;
use tests::tailnet::{Node, Tailnet};
use tests::{beside_others, eventually, within};

const FIRST: &str = "thinkpad-1:443";
const SECOND: &str = "thinkpad-2.tailnet.example:443";
const UP: &str = "dataplane_upstream_target_up";
const PATH: &str = "dataplane_tailnet_path";
/// Joining, paths that break and heal: tailscaled takes its time, more so on a busy machine.
const LONG: Duration = Duration::from_secs(60);

fn named(node: &Node) -> Server {
    let name = node.name;
    Server::start(node.host().listen(&format!("{}:443", node.address)), move |mut stream| {
        if read_preamble(&stream, false).is_ok() {
            let _ = writeln!(stream, "{name}");
        }
    })
}

/// Who answers a new connection, and after what time.
fn ask(net: &Net) -> Result<(String, Duration), String> {
    let start = Instant::now();
    let mut client = net.client.connect(public()).map_err(|e| e.to_string())?;
    client.set_read_timeout(Some(PATIENCE)).expect("a time limit");
    client.write_all(&hello()).map_err(|e| e.to_string())?;
    let mut answer = Vec::new();
    let mut byte = [0];
    while byte != *b"\n" {
        client.read_exact(&mut byte).map_err(|e| format!("after {answer:?}: {e}"))?;
        answer.push(byte[0]);
    }
    Ok((String::from_utf8_lossy(&answer).trim().to_owned(), start.elapsed()))
}

fn names(net: &Net, count: usize) -> Vec<String> {
    let mut names: Vec<_> = (0..count).map(|_| ask(net).expect("served").0).collect();
    names.sort();
    names.dedup();
    names
}

fn target(daemon: &Daemon, name: &str) -> Value {
    let status = daemon.json(&["status", "--json"]);
    let targets = status["upstreams"][0]["targets"].as_array().expect("a list").clone();
    targets.into_iter().find(|t| t["target"] == name).expect("it is configured")
}

#[test]
fn what_the_tailnet_knows_of_its_laptops_decides_before_any_connection_fails() {
    let _turn = beside_others();
    let net = Net::new();
    let mut tailnet = Tailnet::join(&net).unwrap_or_else(|why| panic!("{why}"));
    let laptop = tailnet.join_client(&net).unwrap_or_else(|why| panic!("{why}"));
    let (first, second) = (named(&tailnet.cluster), named(&laptop));
    let config = Config::new("auto")
        .targets([FIRST, SECOND])
        .upstream("balance = \"round-robin\"")
        .more(&format!("[tailnet]\nsocket = \"{}\"\n", tailnet.entrance.socket().display()));
    let daemon = Daemon::start(&net, &config);

    magic_dns_names_work(&net, &daemon);

    // The entrance node's own tailscaled dies and comes back.
    tailnet.entrance.restart().unwrap_or_else(|why| panic!("{why}"));
    let resumed = within(LONG, || ask(&net).ok());
    assert!(resumed.is_some(), "forwarding resumes by itself: {}", tailnet.entrance.log());
    eventually(LONG, "both are back", || (daemon.metric(UP, &[]) > 1.5).then_some(()));
    // A tailscaled that has just started may take the relay first, and relayed targets are avoided.
    for node in [&tailnet.cluster, &laptop] {
        let address = node.address.to_string();
        let ping = ["ping", "--until-direct", "--c=50", "--timeout=1s", &address];
        tailnet.entrance.tailscale(&ping).unwrap_or_else(|why| panic!("{why}"));
    }
    eventually(LONG, "both are used again", || (names(&net, 6) == ["thinkpad-1", "thinkpad-2"]).then_some(()));

    a_node_that_is_told_offline_gets_nothing(&net, &tailnet, &daemon);
    a_node_whose_tailscaled_is_down_costs_the_hedge_delay(&net, &tailnet, &daemon);
    a_relayed_node_is_avoided_while_there_is_a_direct_one(&net, &tailnet, &daemon);
    drop((first, second));
}

fn magic_dns_names_work(net: &Net, daemon: &Daemon) {
    eventually(LONG, "both names have addresses", || {
        let known = |name| !target(daemon, name)["addresses"].as_array().expect("a list").is_empty();
        (known(FIRST) && known(SECOND)).then_some(())
    });
    assert_eq!(names(net, 6), ["thinkpad-1", "thinkpad-2"]);
    for name in [FIRST, SECOND] {
        let path = |path: &str| daemon.metric(PATH, &[("target", name), ("path", path)]);
        eventually(LONG, "the path is known to be direct", || (path("direct") > 0.5).then_some(()));
        assert!(path("relayed") + path("unknown") < 0.5);
        assert_eq!(target(daemon, name)["path"], "direct");
        let addresses = target(daemon, name)["addresses"].to_string();
        assert!(addresses.contains("100.64.") && addresses.contains("[fd7a:"), "both families: {addresses}");
    }
}

fn a_node_that_is_told_offline_gets_nothing(net: &Net, tailnet: &Tailnet, daemon: &Daemon) {
    let is = |up: bool| (daemon.metric(UP, &[("target", FIRST)]) > 0.5) == up;
    let tell = |online: bool| {
        let start = Instant::now();
        tailnet.tell_online(&tailnet.cluster, online);
        eventually(LONG, "the daemon knows", || is(online).then_some(()));
        start.elapsed()
    };
    // The machine may have something else to do just then, once or twice.
    let within_a_second = (0..3).any(|_| {
        let took = tell(false);
        println!("told offline: down after {took:?}");
        took < Duration::from_secs(1) || {
            tell(true);
            false
        }
    });
    assert!(within_a_second);
    assert_eq!(names(net, 10), ["thinkpad-2"], "{}", target(daemon, FIRST));
    assert_eq!(target(daemon, FIRST)["reason"], "offline: the tailnet says so");
    tell(true);
    assert_eq!(names(net, 6), ["thinkpad-1", "thinkpad-2"]);
}

fn a_node_whose_tailscaled_is_down_costs_the_hedge_delay(net: &Net, tailnet: &Tailnet, daemon: &Daemon) {
    let good = (0..20).map(|_| ask(net).expect("served").1).max().expect("some");
    tailnet.cluster.tailscale(&["down"]).unwrap_or_else(|why| panic!("{why}"));
    let start = Instant::now();
    let mut slowest = Duration::ZERO;
    // Until it is found out, and a while longer.
    while start.elapsed() < Duration::from_secs(8) {
        let (name, took) = ask(net).expect("served all the same");
        if start.elapsed() > Duration::from_secs(1) {
            assert_eq!(name, "thinkpad-2");
        }
        slowest = slowest.max(took);
        std::thread::sleep(Duration::from_millis(5));
    }
    println!("tailscale down: the slowest of all connections took {slowest:?}, before it {good:?}");
    // The hedge delay and a busy machine; without a second dial it would be the 3 s of
    // `connect_timeout`.
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
    assert!(daemon.metric(UP, &[("target", FIRST)]) < 0.5);
    tailnet.cluster.up().unwrap_or_else(|why| panic!("{why}"));
    eventually(LONG, "it is back", || (daemon.metric(UP, &[("target", FIRST)]) > 0.5).then_some(()));
    eventually(LONG, "it is used again", || (names(net, 4).len() == 2).then_some(()));
}

fn a_relayed_node_is_avoided_while_there_is_a_direct_one(net: &Net, tailnet: &Tailnet, daemon: &Daemon) {
    tailnet.block_udp(true);
    let relayed = || daemon.metric(PATH, &[("target", FIRST), ("path", "relayed")]) > 0.5;
    // It takes traffic to find out; while tailscaled makes up its mind connections fail.
    let found = within(LONG, || {
        let _ = ask(net);
        (relayed() && daemon.metric(UP, &[("target", FIRST)]) > 0.5).then_some(())
    });
    assert!(found.is_some(), "it is up, and relayed: {}", target(daemon, FIRST));
    assert_eq!(names(net, 10), ["thinkpad-2"], "{}", target(daemon, FIRST));
    // When it is the only one it is used.
    assert!(daemon.cli(&["drain", SECOND]).status.success());
    assert_eq!(names(net, 5), ["thinkpad-1"]);
    // It exits with 1: a relayed target bites.
    let doctor = daemon.cli(&["doctor", "--json"]).stdout;
    let doctor: serde_json::Value = serde_json::from_slice(&doctor).expect("JSON");
    let findings = doctor["entrance"].as_array().expect("a list");
    let told = findings.iter().find(|f| f["check"] == "tailnet").expect("it looks at the tailnet");
    assert!(told["ok"] == false && told["text"].as_str().is_some_and(|t| t.contains(FIRST)), "{told}");
    assert!(daemon.cli(&["undrain", SECOND]).status.success());
    tailnet.block_udp(false);
    eventually(LONG, "the direct path is found again", || {
        let _ = ask(net);
        (!relayed()).then_some(())
    });
}
