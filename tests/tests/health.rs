//! Which targets are up, by whose word, and what that does to connections.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::daemon::{Config, Daemon, HOST};
use tests::netns::{BLACK_HOLE, CLUSTER, Net};
use tests::peers::{Peer, certificate, curl};
use tests::rig::{PATIENCE, Rig, Server, accept_within, hello, public};
use tests::stream::{End, Pattern, read_preamble, read_to_end, reset};
use tests::{alone, beside_others, eventually};

const FIRST: &str = "100.64.0.2:443";
const SECOND: &str = "100.64.0.3:443";
const QUICK: &str = "health = { interval = \"200ms\", timeout = \"2s\", fall = 2, rise = 2 }";
const UP: &str = "dataplane_upstream_target_up";

fn target(daemon: &Daemon, name: &str) -> Value {
    let status = daemon.json(&["status", "--json"]);
    let targets = status["upstreams"][0]["targets"].as_array().expect("a list").clone();
    targets.into_iter().find(|t| t["target"] == name).expect("it is configured")
}

fn events<'a>(log: &'a [String], message: &str, target: &str) -> Vec<&'a String> {
    log.iter().filter(|line| line.contains(message) && line.contains(&format!("\"{target}\""))).collect()
}

#[test]
fn a_check_takes_a_target_down_and_brings_it_back_without_any_client() {
    let _turn = beside_others();
    let net = Net::new();
    let first = net.cluster.listen(FIRST);
    let _second = Server::echo(net.cluster.listen(SECOND));
    let daemon = Daemon::start(&net, &Config::new("auto").targets([FIRST, SECOND]).upstream(QUICK));
    let state = |up: f64| daemon.wait_metric(UP, &[("target", FIRST)], up);
    let checked = accept_within(&first, PATIENCE).expect("a check");
    assert_eq!(read_to_end(&checked, PATIENCE), (Vec::new(), End::Fin), "it says nothing, and closes in peace");
    drop(first);
    state(0.0);
    let down = target(&daemon, FIRST);
    assert_eq!(down["up"], false);
    assert!(down["reason"].as_str().is_some_and(|r| r.starts_with("check: refused")), "{down}");
    let _first = Server::echo(net.cluster.listen(FIRST));
    state(1.0);
    let history = target(&daemon, FIRST)["history"].clone();
    let ups: Vec<_> = history.as_array().expect("a list").iter().map(|c| c["up"] == true).collect();
    assert_eq!(ups, [false, true], "{history}");
    assert!(daemon.metric("dataplane_connections_accepted_total", &[]) < 0.5);
    // The later of the two lines: whatever came before it is there.
    daemon.wait_log(&["target is up", FIRST]);
    let log = daemon.log();
    assert_eq!(events(&log, "target is down", FIRST).len(), 1, "one event for a change: {log:?}");
    assert_eq!(events(&log, "target is up", FIRST).len(), 1, "one event for a change: {log:?}");
}

#[test]
fn an_ingress_that_is_up_but_does_not_serve_the_host_is_down_for_a_check_by_tls() {
    let _turn = beside_others();
    let net = Net::new();
    let pem = certificate(&net, &[HOST]);
    let node = |listen: &str, name: &str| {
        let pem = pem.display();
        let refuse = format!("server {{ listen {listen} ssl default_server; ssl_reject_handshake on; }}");
        let serve = format!(
            "server {{ listen {listen} ssl; server_name {name}; ssl_certificate {pem}; ssl_certificate_key {pem}; location / {{ return 200 $proxy_protocol_addr; }} }}"
        );
        Peer::nginx(&net, &net.cluster, &format!("http {{ {refuse} {serve} }}"))
    };
    let serves = node(&format!("{FIRST} proxy_protocol"), HOST);
    let refuses = node(&format!("{SECOND} proxy_protocol"), "other.example.com");
    for version in ["v1", "v2"] {
        let health = format!(
            "health = {{ interval = \"200ms\", timeout = \"5s\", tls = \"{HOST}\" }}\nsend_proxy = \"{version}\""
        );
        let daemon = Daemon::start(&net, &Config::new("auto").targets([FIRST, SECOND]).upstream(&health));
        daemon.wait_metric(UP, &[("target", SECOND)], 0.0);
        let down = target(&daemon, SECOND);
        // RFC 8446 section 6: unrecognized_name.
        assert_eq!(down["reason"], "check: tls: alert 112 instead of a ServerHello", "{down}");
        assert!(daemon.metric(UP, &[("target", FIRST)]) > 0.5, "{}", target(&daemon, FIRST));
        for _ in 0..4 {
            let answer = curl(&net.client, &pem, HOST, "198.51.100.1:443", &[]).expect("the one that serves it");
            assert_eq!(answer, "198.51.100.2");
        }
    }
    for peer in [serves, refuses] {
        assert!(!peer.log().contains("broken header"), "checks bring the header too: {}", peer.log());
    }
}

#[test]
fn connections_of_a_target_that_went_down_are_reset_only_where_that_is_configured() {
    let _turn = beside_others();
    let cases = [("splice", "reset"), ("copy", "reset"), ("sockmap", "reset"), ("auto", "keep")];
    for (engine, on_down) in cases {
        let config = Config::new(engine).targets([FIRST]).upstream(&format!("{QUICK}\non_down = \"{on_down}\""));
        let Rig { daemon, upstream, net } = Rig::new(&config);
        let mut client = net.client.connect(public()).expect("accepted");
        client.write_all(&hello()).expect("sent");
        let server = eventually(PATIENCE, "the connection among the checks", || {
            let stream = accept_within(&upstream, Duration::from_millis(50))?;
            stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
            read_preamble(&stream, false).ok().map(|_| stream)
        });
        if engine == "sockmap" {
            daemon.wait_metric("dataplane_connections_active", &[("engine", engine)], 1.0);
        }
        drop(upstream);
        daemon.wait_metric(UP, &[("target", FIRST)], 0.0);
        if on_down == "reset" {
            assert_eq!(read_to_end(&client, PATIENCE).1, End::Reset);
            daemon.wait_metric("dataplane_connections_closed_total", &[("reason", "target_down")], 1.0);
        } else {
            let pattern = Pattern::new(7);
            pattern.send(&client, 0, 5000).expect("sent");
            pattern.receive_exactly(&server, 0, 5000);
        }
    }
}

#[test]
fn a_check_of_another_upstream_resets_no_connections_until_a_second_sign_says_the_same() {
    let _turn = beside_others();
    let other: std::net::SocketAddr = "198.51.100.1:444".parse().expect("an address");
    let more = format!(
        "[listeners.other]\nmode = \"tcp\"\nbind = [\"{other}\"]\nupstream = \"other\"\n\
         [upstreams.other]\ntargets = [\"{FIRST}\"]\non_down = \"reset\"\n"
    );
    let config = Config::new("auto").targets([FIRST]).upstream(QUICK).more(&more);
    let Rig { daemon, upstream, net } = Rig::new(&config);
    let mut client = net.client.connect(other).expect("accepted");
    client.write_all(&hello()).expect("sent");
    let server = eventually(PATIENCE, "the connection among the checks", || {
        let stream = accept_within(&upstream, Duration::from_millis(50))?;
        stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
        read_preamble(&stream, false).ok().map(|_| stream)
    });
    // From here on the checks are refused. Only one of the two upstreams has one.
    drop(upstream);
    daemon.wait_metric(UP, &[("upstream", "other")], 0.0);
    let pattern = Pattern::new(7);
    pattern.send(&client, 0, 5000).expect("sent");
    pattern.receive_exactly(&server, 0, 5000);
    pattern.send(&server, 0, 5000).expect("sent");
    pattern.receive_exactly(&client, 0, 5000);
    let _refused = net.client.connect(other).expect("accepted");
    assert_eq!(read_to_end(&client, PATIENCE).1, End::Reset);
    daemon.wait_metric("dataplane_connections_closed_total", &[("reason", "target_down")], 1.0);
}

#[test]
fn a_reset_before_the_first_byte_puts_a_target_aside_and_time_brings_it_back() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("auto").targets([FIRST, SECOND]).upstream("balance = \"first\""));
    let second = rig.net.cluster.listen(SECOND);
    let (client, server) = rig.pair();
    let Rig { daemon, upstream, net } = rig;
    // Else it would be back after a second, which may be over before anybody has looked.
    drop(upstream);
    reset(server);
    assert_eq!(read_to_end(&client, PATIENCE).1, End::Reset);
    daemon.wait_metric(UP, &[("target", FIRST)], 0.0);
    let change = &target(&daemon, FIRST)["history"][0];
    assert!(change["reason"].as_str().is_some_and(|r| r.starts_with("reset:")), "{change}");
    let mut client = net.client.connect(public()).expect("accepted");
    client.write_all(&hello()).expect("sent");
    accept_within(&second, PATIENCE).expect("the next client goes to the other one");
    let _first = net.cluster.listen(FIRST);
    let is_up = || (daemon.metric(UP, &[("target", FIRST)]) > 0.5).then_some(());
    eventually(Duration::from_secs(60), "it is back", is_up);
}

#[test]
fn when_all_are_down_they_are_tried_all_the_same() {
    let _turn = beside_others();
    let net = Net::new();
    // It answers everybody but the check.
    let _first = Server::start(net.cluster.listen(FIRST), |mut stream| {
        if read_preamble(&stream, false).is_ok_and(|preamble| tests::stream::is_alike(&preamble.hello, &hello())) {
            stream.write_all(b"served").expect("the client waits for it");
        }
    });
    let check = "health = { interval = \"200ms\", timeout = \"2s\", tls = \"nobody.example.com\" }";
    let daemon = Daemon::start(&net, &Config::new("auto").targets([FIRST, SECOND]).upstream(check));
    for name in [FIRST, SECOND] {
        daemon.wait_metric(UP, &[("target", name)], 0.0);
    }
    for _ in 0..5 {
        let mut client = net.client.connect(public()).expect("accepted");
        client.write_all(&hello()).expect("sent");
        assert_eq!(read_to_end(&client, PATIENCE).0, b"served");
    }
}

#[test]
fn a_full_target_is_waited_for_but_no_longer_than_connect_timeout() {
    let _turn = beside_others();
    let rig = Rig::new(
        &Config::new("auto").targets([FIRST]).upstream("max_connections_per_target = 1\nconnect_timeout = \"4s\""),
    );
    let (client, server) = rig.pair();
    let waits = rig.open();
    rig.daemon.wait_metric("dataplane_upstream_queued", &[], 1.0);
    assert!(accept_within(&rig.upstream, Duration::from_millis(300)).is_none(), "the cap holds");
    drop((client, server));
    let next = rig.accept();
    rig.daemon.wait_metric("dataplane_upstream_queued", &[], 0.0);
    let start = Instant::now();
    let refused = rig.open();
    let (answer, _) = read_to_end(&refused, PATIENCE);
    assert_eq!(answer, [21, 3, 3, 0, 2, 2, 80], "no_upstream is told by an alert");
    assert!(start.elapsed() >= Duration::from_millis(3900), "{:?}", start.elapsed());
    rig.daemon.wait_metric("dataplane_connections_rejected_total", &[("reason", "no_upstream")], 1.0);
    drop((waits, next));
}

#[test]
fn a_reload_that_leaves_a_target_alone_keeps_what_is_known_of_it() {
    let _turn = beside_others();
    let net = Net::new();
    let config = Config::new("auto").targets([FIRST, SECOND]).upstream(QUICK);
    let _second = Server::echo(net.cluster.listen(SECOND));
    let daemon = Daemon::start(&net, &config);
    daemon.wait_metric(UP, &[("target", FIRST)], 0.0);
    let before = target(&daemon, FIRST)["history"].clone();
    daemon.rewrite(&config.clone().limits("idle_timeout = \"2h\""));
    assert!(daemon.cli(&["reload"]).status.success());
    let after = target(&daemon, FIRST);
    assert_eq!((&after["up"], &after["history"]), (&Value::Bool(false), &before));
    // Without the check nothing says any more that it is down.
    daemon.rewrite(&Config::new("auto").targets([FIRST, SECOND]));
    assert!(daemon.cli(&["reload"]).status.success());
    daemon.wait_metric(UP, &[("target", FIRST)], 1.0);
}

/// From connect to the first byte of the answer.
fn timed(net: &Net, port: u16) -> Duration {
    let start = Instant::now();
    let mut client = net.client.connect(([198, 51, 100, 1], port).into()).expect("accepted");
    client.write_all(&hello()).expect("sent");
    client.read_exact(&mut [0; 6]).expect("served");
    start.elapsed()
}

fn percentile(samples: &mut [Duration], p: f64) -> Duration {
    samples.sort_unstable();
    samples[((samples.len() - 1) as f64 * p) as usize]
}

#[test]
fn a_target_that_swallows_everything_costs_the_hedge_delay_until_it_is_put_aside_and_nothing_after() {
    let _turn = alone();
    let net = Net::new();
    let _server = Server::start(net.cluster.listen(FIRST), |mut stream| {
        if read_preamble(&stream, false).is_ok() {
            stream.write_all(b"served").expect("the client waits for it");
        }
    });
    let hole = format!("{BLACK_HOLE}:443");
    // The same target by itself, for comparison in the same moments.
    let more = format!(
        "[listeners.alone]\nmode = \"tcp\"\nbind = [\"198.51.100.1:444\"]\nupstream = \"alone\"\n[upstreams.alone]\ntargets = [\"{FIRST}\"]\n"
    );
    let config = Config::new("auto").targets([&hole, FIRST]).upstream("balance = \"round-robin\"").more(&more);
    let measure = |until: &dyn Fn(usize) -> bool| {
        let (mut both, mut single) = (Vec::new(), Vec::new());
        while !until(both.len()) {
            both.push(timed(&net, 443));
            single.push(timed(&net, 444));
        }
        (percentile(&mut both, 0.99), percentile(&mut single, 0.99), both.len())
    };
    let is_down = |daemon: &Daemon| daemon.metric(UP, &[("target", &hole)]) < 0.5;
    // What another process does to one sample in a hundred must not decide: one run of several must
    // be good.
    let mut daemon = None;
    let good = (0..5).any(|_| {
        // One that knows nothing yet, in the place of the one before.
        drop(daemon.take());
        let fresh = Daemon::start(&net, &config);
        let (before, base, count) = measure(&|_| is_down(&fresh));
        println!("before: p99 {before:?} of {count}, {base:?} without the black hole");
        assert!(count > 10, "{count} connections within connect_timeout");
        daemon = Some(fresh);
        before.saturating_sub(base) < Duration::from_millis(250 + 50)
    });
    assert!(good, "hedge delay + 50 ms or more in each run");
    let good = (0..10).any(|_| {
        let (after, base, count) = measure(&|count| count == 1000);
        println!("after: p99 {after:?} of {count}, {base:?} without the black hole");
        after.saturating_sub(base) < Duration::from_millis(5)
    });
    assert!(good, "5 ms or more in each run");
    assert!(daemon.is_some_and(|daemon| is_down(&daemon)), "it was away all the time");
}

#[test]
fn connections_that_lose_a_race_are_closed_unused() {
    let _turn = beside_others();
    let net = Net::new();
    let second = net.cluster.listen(SECOND);
    // The first answers late: its host has to learn its neighbour's address again, and is told a
    // wrong one for a while.
    let first = net.cluster.listen(FIRST);
    let swallow = |on: bool| {
        let what = if on { "replace" } else { "del" };
        let how = if on { " lladdr 02:00:00:00:66:66 nud permanent" } else { "" };
        net.entrance.ip(&format!("neigh {what} {} dev inside{how}\n", CLUSTER[0]));
    };
    swallow(true);
    let daemon = Daemon::start(
        &net,
        &Config::new("auto").targets([FIRST, SECOND]).upstream("balance = \"first\"\nconnect_timeout = \"20s\""),
    );
    let mut client = net.client.connect(public()).expect("accepted");
    client.write_all(&hello()).expect("sent");
    let winner = accept_within(&second, PATIENCE).expect("the second is dialled beside the first");
    assert!(tests::stream::is_alike(&read_preamble(&winner, false).expect("a hello").hello, &hello()));
    swallow(false);
    let loser = accept_within(&first, PATIENCE).expect("the first answers at last");
    assert_eq!(read_to_end(&loser, PATIENCE), (Vec::new(), End::Fin), "not a byte");
    assert!(daemon.metric(UP, &[("target", FIRST)]) > 0.5, "slow is not down");
    drop((client, winner));
}
