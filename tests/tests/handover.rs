//! One daemon hands over to the next, and nobody notices: `dataplane upgrade`.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::PathBuf;
use std::process::Output;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tests::daemon::{Config, Daemon, HOST, Limits};
use tests::load::{Numbers, under_load};
use tests::netns::{BLACK_HOLE, CLUSTER, ENTRANCE, Net};
use tests::rig::{PATIENCE, Rig, accept, accept_within, hello, public};
use tests::stream::{End, Pattern, client_hello, never_hang, read_to_end, reset_within};
use tests::{alone, beside_others, eventually};

/// Upgrades in a row; `DATAPLANE_TEST_HANDOVERS` makes it more for a long run.
fn handovers() -> usize {
    std::env::var("DATAPLANE_TEST_HANDOVERS").map_or(3, |n| n.parse().expect("a number"))
}

const UP: Pattern = Pattern::new(31);
const DOWN: Pattern = Pattern::new(32);

/// Verifies a connection each way.
#[track_caller]
fn works((client, server): &(TcpStream, TcpStream)) {
    for (from, to) in [(client, server), (server, client)] {
        UP.send(from, 0, 10_000).expect("sent");
        UP.receive_exactly(to, 0, 10_000);
    }
}

/// A program for `dataplane upgrade` that is none of ours.
fn script(net: &Net, name: &str, text: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = net.file(name, text);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("chmod");
    path
}

/// A successor that says this, instead of taking over; `hear()` is what the daemon says next.
fn impostor(net: &Net, name: &str, says: &str) -> PathBuf {
    let text = format!(
        "#!/usr/bin/env python3\nimport socket\ns = socket.socket(fileno=0)\n\
         def hear(): return socket.recv_fds(s, 65536, 253)[0]\n{says}\n"
    );
    script(net, name, &text)
}

fn upgrade_to(daemon: &Daemon, program: &std::path::Path) -> Output {
    daemon.cli(&["upgrade", program.to_str().expect("UTF-8")])
}

fn handover(daemon: &Daemon) -> Value {
    daemon.json(&["status", "--json"])["handover"].take()
}

fn upgrades_under_load(engine: &str) {
    let _turn = alone();
    let rig = Rig::new(&Config::new(engine));
    let numbers = if handovers() > 3 { Numbers::FULL } else { Numbers::TENTH };
    let ((), report) = under_load(&rig.net, &rig.upstream, numbers, || {
        for n in 1..=handovers() {
            println!("{}", rig.daemon.upgrade());
            let handover = handover(&rig.daemon);
            assert_eq!((&handover["generation"], &handover["inherited"]["reset"]), (&n.into(), &0.into()));
        }
    });
    println!("{engine}: {}", report.summary());
    report.assert_unnoticed();
    rig.wait_idle();
}

#[test]
fn upgrades_under_load_with_copy() {
    upgrades_under_load("copy");
}

#[test]
fn upgrades_under_load_with_splice() {
    upgrades_under_load("splice");
}

#[test]
fn upgrades_under_load_with_sockmap() {
    upgrades_under_load("sockmap");
}

#[test]
fn upgrades_under_load_with_auto() {
    upgrades_under_load("auto");
}

#[test]
fn memory_and_descriptors_do_not_grow_from_one_to_the_next() {
    let _turn = alone();
    let rig = Rig::new(&Config::new("auto"));
    let pairs: Vec<_> = (0..200).map(|_| rig.pair()).collect();
    let settled = |daemon: &Daemon| {
        pairs.iter().step_by(20).for_each(works);
        (daemon.fds().len(), daemon.pss())
    };
    rig.daemon.upgrade();
    let (fds, pss) = settled(&rig.daemon);
    for _ in 0..8 {
        rig.daemon.upgrade();
    }
    let (fds_now, pss_now) = settled(&rig.daemon);
    assert!(fds_now <= fds + 4, "{fds} descriptors became {fds_now}: {:?}", rig.daemon.fds());
    assert!(pss_now < pss + (4 << 20), "{pss} bytes became {pss_now}");
    pairs.iter().for_each(works);
}

#[test]
fn the_access_log_has_one_line_for_a_connection_with_all_that_it_carried() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("splice"));
    let (client, server) = rig.pair();
    for round in 0..3_u64 {
        UP.send(&client, round * 1_000_000, (round + 1) * 1_000_000).expect("sent");
        UP.receive_exactly(&server, round * 1_000_000, (round + 1) * 1_000_000);
        rig.daemon.upgrade();
    }
    drop((client, server));
    rig.wait_idle();
    let lines = rig.daemon.wait_log(&["\"target\":\"access\""]);
    let [line] = &lines[..] else { panic!("{lines:#?}") };
    let fields: Value = serde_json::from_str::<Value>(line).expect("JSON")["fields"].take();
    assert_eq!(fields["bytes_to_upstream"], 3_000_000 + hello().len());
    assert!(fields["duration"].as_f64() > Some(0.3), "{fields}");
    // What an earlier process has counted is not counted again.
    assert_eq!(rig.daemon.metric("dataplane_bytes_total", &[("direction", "to_upstream")]) as u64, 0);
    assert_eq!(rig.daemon.metric("dataplane_handover_connections_total", &[("result", "kept")]) as u64, 1);
}

#[test]
fn a_successor_that_fails_leaves_everything_as_it_was_and_says_why() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("splice"));
    let pairs: Vec<_> = (0..5).map(|_| rig.pair()).collect();
    let before = rig.daemon.pid();
    let refuses = |out: &Output, why: &str| {
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && said.contains(why) && said.contains("goes on"), "{said}");
        assert_eq!(rig.daemon.pid(), before);
        assert!(handover(&rig.daemon)["last_error"].as_str().is_some_and(|error| error.contains(why)));
        pairs.iter().for_each(works);
        works(&rig.pair());
    };
    let net = &rig.net;
    refuses(&upgrade_to(&rig.daemon, &net.dir().join("nothing")), "No such file");
    refuses(&upgrade_to(&rig.daemon, &script(net, "rubbish", "\x7fELF")), "cannot be run");
    refuses(&upgrade_to(&rig.daemon, "/bin/false".as_ref()), "has ended");
    refuses(&upgrade_to(&rig.daemon, &impostor(net, "early", "hear(); s.send(b'\"taken\"')")), "out of turn");
    refuses(&upgrade_to(&rig.daemon, &impostor(net, "foreign", "hear(); s.send(b'hello')")), "not understood");
    // Everything had stopped, and the package was sent.
    refuses(&upgrade_to(&rig.daemon, &impostor(net, "dies", "hear(); s.send(b'\"ready\"'); hear()")), "has ended");
    let unknown = "hear(); s.send(b'\"ready\"'); hear(); s.send(b'{\"failed\": \"unknown field `colour`\"}')";
    refuses(&upgrade_to(&rig.daemon, &impostor(net, "unknown", unknown)), "unknown field `colour`");
    rig.daemon.rewrite(&Config::new("splice").more("rubbish = 7"));
    refuses(&rig.daemon.cli(&["upgrade"]), "rubbish");
    rig.daemon.rewrite(&Config::new("splice"));
    rig.daemon.upgrade();
    pairs.iter().for_each(works);
}

#[test]
fn a_successor_that_dies_with_everything_costs_the_connections_and_that_is_said() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("splice"));
    let (client, server) = rig.pair();
    let says = "hear(); s.send(b'\"ready\"'); hear(); s.send(b'\"taken\"'); hear()";
    let out = upgrade_to(&rig.daemon, &impostor(&rig.net, "dies", says));
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && said.contains("1 connections were reset"), "{said}");
    assert!(reset_within(&client, PATIENCE).is_some() && reset_within(&server, PATIENCE).is_some());
    works(&rig.pair());
    rig.daemon.upgrade();
    works(&rig.pair());
}

#[test]
fn a_program_that_others_could_have_written_is_not_run() {
    use std::os::unix::fs::{PermissionsExt, chown};
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("splice"));
    let program = script(&rig.net, "open", "#!/bin/sh\ntouch \"$0\".ran\n");
    let refused = || {
        let out = upgrade_to(&rig.daemon, &program);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && said.contains("only root can"), "{said}");
    };
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o777)).expect("chmod");
    refused();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("chmod");
    chown(&program, Some(1234), None).expect("chown");
    refused();
    assert!(!rig.net.dir().join("open.ran").exists());
}

#[test]
fn without_a_service_manager_the_first_process_stays_for_whoever_waits_for_it() {
    let _turn = beside_others();
    let net = Net::new();
    let upstream = net.cluster.listen(&format!("{}:443", CLUSTER[0]));
    let mut daemon = Daemon::spawn(&net, &Config::new("splice"), Limits { alone: true, ..Limits::default() });
    daemon.wait_log(&["listening", "[2001:db8:1::1]:443"]);
    let pair = || {
        let mut client = net.client.connect(public()).expect("the daemon accepts");
        never_hang(&client);
        client.write_all(&hello()).expect("sent");
        (client, accept(&upstream, false).0)
    };
    let first = pair();
    for n in 1..=3 {
        let out = daemon.cli(&["upgrade"]);
        assert!(out.status.success(), "{out:?}");
        assert_eq!(handover(&daemon)["generation"], n);
        works(&first);
    }
    // The first one and the one in charge.
    let children = || std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", daemon.first_pid()));
    eventually(PATIENCE, "one successor", || {
        children().ok().filter(|pids| pids.split_whitespace().count() == 1).map(drop)
    });
    let supervisor = Pid::from_raw(daemon.first_pid() as i32).expect("a process id");
    kill_process(supervisor, Signal::HUP).expect("it is our child");
    daemon.wait_log(&["configuration reloaded"]);
    kill_process(supervisor, Signal::TERM).expect("it is our child");
    works(&first);
    drop(first);
    assert!(daemon.wait_end(PATIENCE).success());
    assert!(net.client.connect(public()).is_err());
}

#[test]
fn whatever_a_connection_waits_for_it_goes_on_with_the_next_one() {
    let _turn = beside_others();
    let config = Config::new("splice")
        .listener("accept_proxy = [\"198.51.100.3/32\"]")
        .more("[listeners.web]\nmode = \"http\"\nbind = [\"198.51.100.1:80\"]");
    let rig = Rig::new(&config);
    let acme = rig.net.cluster.listen(&format!("{}:80", CLUSTER[0]));
    let web = format!("{}:80", ENTRANCE[0]).parse().expect("an address");
    let hello = hello();

    let silent = rig.connect();
    let halves: Vec<_> = [1, 5, 40, hello.len() - 1]
        .into_iter()
        .map(|at| {
            let mut client = rig.connect();
            client.write_all(&hello[..at]).expect("sent");
            (client, at)
        })
        .collect();
    // A trusted proxy, whose header was read, or half of it.
    let header = b"PROXY TCP4 192.0.2.77 198.51.100.1 1234 443\r\n";
    let proxied: Vec<_> = [10, header.len(), header.len() + 20]
        .into_iter()
        .map(|at| {
            let source = "198.51.100.3".parse().expect("an address");
            let mut client = rig.net.client.connect_from(source, public()).expect("the daemon accepts");
            never_hang(&client);
            let all = [&header[..], &client_hello(Some(HOST), &["h2", "http/1.1"])].concat();
            client.write_all(&all[..at]).expect("sent");
            (client, all, at)
        })
        .collect();
    // A challenge whose answer is slow, and half of one.
    let token = "/.well-known/acme-challenge/LoqXcYV8q5ONbJQxbmR7SCTNo3tiAXDfowyjxAjEuX0";
    let request = format!("GET {token} HTTP/1.1\r\nHost: {HOST}\r\n\r\n");
    let mut asked = rig.net.client.connect(web).expect("the daemon accepts");
    asked.write_all(request.as_bytes()).expect("sent");
    let mut answering = accept_within(&acme, PATIENCE).expect("the challenge");
    answering.write_all(b"HTTP/1.1 200 OK\r\n").expect("sent");
    let mut half = rig.net.client.connect(web).expect("the daemon accepts");
    half.write_all(&request.as_bytes()[..30]).expect("sent");
    // One that was sent to https, and has not closed its side.
    let mut redirected = rig.net.client.connect(web).expect("the daemon accepts");
    redirected.write_all(format!("GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n").as_bytes()).expect("sent");
    let mut first = [0; 12];
    redirected.read_exact(&mut first).expect("an answer");

    std::thread::sleep(Duration::from_millis(100));
    rig.daemon.upgrade();

    for (mut client, at) in halves {
        client.write_all(&hello[at..]).expect("sent");
        works(&(client, rig.accept()));
    }
    for (mut client, all, at) in proxied {
        client.write_all(&all[at..]).expect("sent");
        works(&(client, accept(&rig.upstream, false).0));
    }
    let lines = rig.daemon.json(&["connections", "--json"]);
    let of_proxied = lines.as_array().expect("a list").iter().filter(|c| c["client"] == "192.0.2.77:1234");
    assert!(of_proxied.count() <= 3);
    (&silent).write_all(&client_hello(Some(HOST), &["h2", "http/1.1"])).expect("sent");
    works(&(silent, accept(&rig.upstream, false).0));
    answering.write_all(b"Content-Length: 2\r\n\r\nok").expect("sent");
    answering.shutdown(Shutdown::Write).expect("FIN");
    let (answer, end) = read_to_end(&asked, PATIENCE);
    assert!(answer.starts_with(b"HTTP/1.1 200 OK\r\n") && answer.ends_with(b"ok"), "{answer:?}");
    assert_eq!(end, End::Fin);
    half.write_all(&request.as_bytes()[30..]).expect("sent");
    assert!(accept_within(&acme, PATIENCE).is_some());
    let (answer, end) = read_to_end(&redirected, PATIENCE);
    assert!(String::from_utf8_lossy(&answer).contains("Location: https://"), "{answer:?}");
    assert_eq!(end, End::Fin);
}

#[test]
fn a_connection_on_its_way_to_a_target_or_in_the_queue_gets_there() {
    let _turn = beside_others();
    let hole = format!("{BLACK_HOLE}:443");
    let config = Config::new("splice").targets([&hole]).upstream("connect_timeout = \"60s\"");
    let rig = Rig::new(&config);
    let dialling = rig.open();
    std::thread::sleep(Duration::from_millis(200));
    // The successor has another target.
    rig.daemon.rewrite(&Config::new("splice").upstream("max_connections_per_target = 1\nconnect_timeout = \"60s\""));
    rig.daemon.upgrade();
    let first = (dialling, rig.accept());
    works(&first);
    let queued = rig.open();
    assert!(accept_within(&rig.upstream, Duration::from_millis(300)).is_none(), "there is one place");
    rig.daemon.upgrade();
    works(&first);
    assert!(accept_within(&rig.upstream, Duration::from_millis(300)).is_none(), "it is taken still");
    drop(first);
    works(&(queued, rig.accept()));
}

#[test]
fn what_was_known_of_clients_and_targets_still_is() {
    let _turn = beside_others();
    let [one, two] = [0, 1].map(|n| format!("{}:443", CLUSTER[n]));
    let config = Config::new("splice").targets([&one, &two]).limits("max_connections_per_client = 2");
    let rig = Rig::new(&config);
    let second = rig.net.cluster.listen(&two);
    assert!(rig.daemon.cli(&["drain", &two]).status.success());
    let pairs = [rig.pair(), rig.pair()];
    rig.daemon.upgrade();
    let refused = rig.open();
    assert_eq!(read_to_end(&refused, PATIENCE).1, End::Fin, "two of this client are there");
    let targets = rig.daemon.json(&["status", "--json"])["upstreams"][0]["targets"].take();
    assert_eq!((&targets[0]["active"], &targets[1]["drained"]), (&2.into(), &true.into()), "{targets}");
    pairs.iter().for_each(works);
    drop(pairs);
    rig.wait_idle();
    for _ in 0..2 {
        works(&rig.pair());
    }
    assert!(accept_within(&second, Duration::from_millis(50)).is_none(), "it is drained");
}

#[test]
fn what_the_configuration_no_longer_has_ends_as_with_a_reload() {
    let _turn = beside_others();
    let more = |removed: &str| {
        let mut config = Config::new("splice").more(
            "[listeners.other]\nbind = [\"198.51.100.1:8443\"]\n[[routes]]\nhosts = [\"two.example.com\"]\nupstream = \"cluster\"",
        );
        config.engine = format!("splice\"\non_removed_route = \"{removed}");
        config
    };
    let rig = Rig::new(&more("close"));
    let other = format!("{}:8443", ENTRANCE[0]).parse().expect("an address");
    let of = |address, name: &str| {
        let mut client = rig.net.client.connect(address).expect("the daemon accepts");
        never_hang(&client);
        client.write_all(&client_hello(Some(name), &["h2", "http/1.1"])).expect("sent");
        (client, accept(&rig.upstream, false).0)
    };
    let kept = rig.pair();
    let removed = of(public(), "two.example.com");
    let elsewhere = of(other, HOST);
    let mut config = Config::new("splice").more("[listeners.third]\nbind = [\"198.51.100.1:9443\"]");
    config.engine = "splice\"\non_removed_route = \"close".into();
    rig.daemon.rewrite(&config);
    rig.daemon.upgrade();
    works(&kept);
    for (client, server) in [removed, elsewhere] {
        assert!(reset_within(&client, PATIENCE).is_some() && reset_within(&server, PATIENCE).is_some());
    }
    assert!(rig.net.client.connect(other).is_err());
    let third = format!("{}:9443", ENTRANCE[0]).parse().expect("an address");
    works(&of(third, HOST));
    works(&rig.pair());
}

#[test]
fn both_sides_stalled_and_half_closed_lose_nothing() {
    let _turn = alone();
    for engine in ["copy", "splice", "sockmap"] {
        let rig = Rig::new(&Config::new(engine));
        let (client, server) = rig.pair();
        let up = UP.send_until_stalled(&client, 0);
        let down = DOWN.send_until_stalled(&server, 0);
        rig.daemon.upgrade();
        rig.daemon.upgrade();
        client.shutdown(Shutdown::Write).expect("FIN");
        rig.daemon.upgrade();
        assert_eq!(UP.receive(&server, 0), (up, End::Fin), "{engine}");
        rig.daemon.upgrade();
        server.shutdown(Shutdown::Write).expect("FIN");
        rig.daemon.upgrade();
        assert_eq!(DOWN.receive(&client, 0), (down, End::Fin), "{engine}");
        rig.wait_idle();
    }
}
