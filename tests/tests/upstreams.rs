//! Which target gets a connection, and what happens when it does not answer.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};
use tests::daemon::{Config, Daemon, HOST};
use tests::netns::{BLACK_HOLE, CLUSTER, Net};
use tests::peers::{Peer, certificate, curl};
use tests::rig::{PATIENCE, Rig, accept_within, ended_at_once, hello, public};
use tests::stream::{End, Pattern, read_to_end, reset};
use tests::{beside_others, eventually};

const FIRST: &str = "100.64.0.2:443";
const SECOND: &str = "100.64.0.3:443";

#[test]
fn when_one_nginx_is_killed_the_next_request_succeeds() {
    let _turn = beside_others();
    let net = Net::new();
    let pem = certificate(&net, &[HOST]);
    let node = |address: &str| {
        let path = pem.display();
        let server = format!(
            "listen {address} ssl; ssl_certificate {path}; ssl_certificate_key {path}; location / {{ return 200 $server_addr; }}"
        );
        Peer::nginx(&net, &net.cluster, &format!("http {{ server {{ {server} }} }}"))
    };
    let (first, second) = (node(FIRST), node(SECOND));
    let daemon =
        Daemon::start(&net, &Config::new("auto").targets([FIRST, SECOND]).upstream("balance = \"round-robin\""));
    let fetch = || curl(&net.client, &pem, HOST, "198.51.100.1:443", &[]);
    let mut seen: Vec<_> = (0..4).map(|_| fetch().expect("both live")).collect();
    seen.sort();
    seen.dedup();
    assert_eq!(seen, [CLUSTER[0], CLUSTER[1]], "round-robin reaches both");
    drop(first);
    for request in 0..10 {
        assert_eq!(fetch().unwrap_or_else(|e| panic!("request {request} after the kill: {e}")), CLUSTER[1]);
    }
    let failures = daemon.metric("dataplane_upstream_connect_failures_total", &[("target", FIRST)]);
    assert!((1.0..10.0).contains(&failures), "{failures} dials of the dead one: it is not asked every time");
    drop(second);
}

#[test]
fn a_target_that_swallows_everything_costs_one_connect_timeout() {
    let _turn = beside_others();
    let hole = format!("{BLACK_HOLE}:443");
    let config = Config::new("auto")
        .targets([&hole, FIRST])
        .upstream("balance = \"first\"\nconnect_timeout = \"3s\"\nhedge_delay = \"0s\"");
    let rig = Rig::new(&config);
    let start = Instant::now();
    let _first = rig.pair();
    let took = start.elapsed();
    // Once, and not twice.
    assert!((Duration::from_millis(2900)..Duration::from_millis(5900)).contains(&took), "{took:?}");
    // It has failed just now: the next connection need not wait for it again.
    let start = Instant::now();
    let _second = rig.pair();
    assert!(start.elapsed() < Duration::from_millis(2900), "{:?}", start.elapsed());
}

#[test]
fn no_second_target_is_tried_after_a_byte_went_out() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("auto").targets([FIRST, SECOND]).upstream("balance = \"first\""));
    let second = rig.net.cluster.listen(SECOND);
    let client = rig.open();
    reset(rig.accept());
    let (answer, end) = read_to_end(&client, PATIENCE);
    assert_eq!((answer, end), (Vec::new(), End::Reset));
    assert!(accept_within(&second, Duration::from_millis(500)).is_none(), "the hello went to a second target");
    // It was put aside, and may have been tried out by now: without a word.
    while let Some(again) = accept_within(&rig.upstream, Duration::ZERO) {
        assert_eq!(read_to_end(&again, PATIENCE), (Vec::new(), End::Fin), "the hello went to the first target again");
    }
}

/// Opens `count` connections; for each, which of the two listeners got it.
fn spread(rig: &Rig, second: &TcpListener, count: usize) -> Vec<(bool, (std::net::TcpStream, std::net::TcpStream))> {
    (0..count)
        .map(|_| {
            let client = rig.open();
            tests::eventually(PATIENCE, "a target gets the connection", || {
                let first = accept_within(&rig.upstream, Duration::from_millis(5));
                let is_first = first.is_some();
                let server = first.or_else(|| accept_within(second, Duration::from_millis(5)))?;
                if ended_at_once(&server) {
                    return None;
                }
                tests::stream::read_preamble(&server, false).expect("a hello");
                Some((is_first, (client.try_clone().expect("dup"), server)))
            })
        })
        .collect()
}

#[test]
fn the_target_with_the_fewest_connections_gets_the_next_one() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("auto").targets([FIRST, SECOND]));
    let second = rig.net.cluster.listen(SECOND);
    let open = spread(&rig, &second, 10);
    assert_eq!(open.iter().filter(|(first, _)| *first).count(), 5);
    let (at_first, at_second): (Vec<_>, Vec<_>) = open.into_iter().partition(|(first, _)| *first);
    drop(at_first);
    rig.daemon.wait_metric("dataplane_connections_active", &[], 5.0);
    let more = spread(&rig, &second, 5);
    assert!(more.iter().all(|(first, _)| *first), "all go to the one that became free");
    drop((at_second, more));
}

#[test]
fn a_drained_target_keeps_its_connections_and_gets_no_new_ones_until_undrained() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("auto").targets([FIRST, SECOND]));
    let second = rig.net.cluster.listen(SECOND);
    let open = spread(&rig, &second, 2);
    let command = |name| {
        let out = rig.daemon.cli(&[name, FIRST]);
        assert!(out.status.success(), "{name}: {}", String::from_utf8_lossy(&out.stderr));
        assert!(!out.stdout.is_empty(), "it says what happened");
    };
    command("drain");
    let more = spread(&rig, &second, 4);
    assert!(more.iter().all(|(first, _)| !first), "a drained target got a connection");
    let (_, (client, server)) = open.iter().find(|(first, _)| *first).expect("one went there before");
    let pattern = Pattern::new(5);
    pattern.send(client, 0, 5000).expect("sent");
    pattern.receive_exactly(server, 0, 5000);
    command("undrain");
    let after = spread(&rig, &second, 4);
    assert!(after.iter().all(|(first, _)| *first), "the one with fewer connections again");
    let unknown = rig.daemon.cli(&["drain", "100.64.0.9:443"]);
    assert!(!unknown.status.success() && !unknown.stderr.is_empty(), "an unknown target is an error");
}

#[test]
fn a_target_is_reached_over_ipv6_and_by_name() {
    let _turn = beside_others();
    let net = Net::new();
    let v6 = net.cluster.listen(&format!("[{}]:443", CLUSTER[2]));
    let local = net.entrance.listen("127.0.0.1:8443");
    for (target, listener) in [(format!("[{}]:443", CLUSTER[2]), &v6), ("localhost:8443".to_owned(), &local)] {
        let _daemon = Daemon::start(&net, &Config::new("auto").targets([&target]));
        let mut client = net.client.connect(public()).expect("accepted");
        client.write_all(&hello()).expect("sent");
        let (_server, preamble) = tests::rig::accept(listener, false);
        assert!(tests::stream::is_alike(&preamble.hello, &hello()), "{target}");
    }
}

#[test]
fn a_target_that_has_closed_gives_its_place_to_the_next_connection() {
    let _turn = beside_others();
    for engine in ["copy", "splice", "sockmap", "auto"] {
        let config = Config::new(engine).upstream("max_connections_per_target = 1\nconnect_timeout = \"60s\"");
        let rig = Rig::new(&config);
        let (client, mut server) = rig.pair();
        server.write_all(b"bye").expect("sent");
        drop(server);
        assert_eq!(read_to_end(&client, PATIENCE), (b"bye".to_vec(), End::Fin), "{engine}");
        // The first client keeps its end open, for as long as it likes.
        let (_second, _server) = rig.pair();
        let closed = rig.daemon.metric("dataplane_connections_closed_total", &[]);
        assert_eq!(closed as u64, 0, "{engine}: the first one goes on");
        drop(client);
    }
}

/// A client that does not read, and whose target has sent all of its 150 KB and closed: more than
/// both sockets of the client's side take, and no more than the daemon and its own socket to the
/// target do.
fn unread(rig: &Rig) -> TcpStream {
    let client = rig.net.client.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.set_recv_buffer_size(4096).expect("SO_RCVBUF");
        socket.connect(&public().into()).expect("accepted");
        TcpStream::from(socket)
    });
    (&client).write_all(&hello()).expect("sent");
    let server = rig.accept();
    Pattern::new(9).send(&server, 0, UNREAD).expect("taken");
    drop(server);
    eventually(PATIENCE, "the target has closed, and its FIN has arrived", || {
        let sockets = rig.net.cluster.output(Command::new("ss").args(["-tnH", "src", FIRST]));
        (!sockets.contains("ESTAB") && !sockets.contains("FIN-WAIT-1")).then_some(())
    });
    client
}

const UNREAD: u64 = 150_000;

#[test]
fn a_target_that_has_closed_keeps_no_place_for_a_client_that_does_not_read() {
    let _turn = beside_others();
    for engine in ["copy", "splice", "sockmap", "auto"] {
        let config = Config::new(engine).upstream("max_connections_per_target = 1\nconnect_timeout = \"60s\"");
        let rig = Rig::new(&config);
        let client = unread(&rig);
        let (_second, _server) = rig.pair();
        Pattern::new(9).receive_exactly(&client, 0, UNREAD);
        assert_eq!(read_to_end(&client, PATIENCE), (Vec::new(), End::Fin), "{engine}: and it gets all of it");
    }
}

#[test]
fn a_reader_has_the_half_closed_deadline_for_each_byte_that_it_takes() {
    let _turn = beside_others();
    for engine in ["copy", "splice", "sockmap", "auto"] {
        let rig = Rig::new(&Config::new(engine).limits("half_closed_timeout = \"3s\""));
        // One takes a little now and then, for longer than the deadline; one takes nothing.
        let (slow, stalled) = (unread(&rig), unread(&rig));
        let (pattern, start, mut at) = (Pattern::new(9), Instant::now(), 0);
        while start.elapsed() < Duration::from_secs(8) {
            pattern.receive_exactly(&slow, at, at + 8000);
            at += 8000;
            std::thread::sleep(Duration::from_millis(500));
        }
        pattern.receive_exactly(&slow, at, UNREAD);
        assert_eq!(read_to_end(&slow, PATIENCE), (Vec::new(), End::Fin), "{engine}");
        rig.daemon.wait_metric("dataplane_connections_closed_total", &[("reason", "idle")], 1.0);
        assert_eq!(read_to_end(&stalled, PATIENCE).1, End::Reset, "{engine}");
    }
}

#[test]
fn a_half_closed_connection_has_its_whole_deadline_from_the_fin_on() {
    let _turn = beside_others();
    for engine in ["splice", "sockmap"] {
        // Both sides are alive, so the search for dead peers, which is quicker, must not end it.
        let limits = "half_closed_timeout = \"5s\"\ndead_peer_timeout = \"1s\"";
        let rig = Rig::new(&Config::new(engine).limits(limits));
        let (client, mut server) = rig.pair();
        // Nothing moves for longer than that, which is no reason to end it; then it ends on one
        // side.
        std::thread::sleep(Duration::from_secs(6));
        client.shutdown(std::net::Shutdown::Write).expect("sent");
        assert_eq!(read_to_end(&server, PATIENCE), (Vec::new(), End::Fin), "{engine}");
        std::thread::sleep(Duration::from_secs(2));
        server.write_all(b"answer").expect("sent");
        drop(server);
        assert_eq!(read_to_end(&client, PATIENCE), (b"answer".to_vec(), End::Fin), "{engine}");
    }
}

#[test]
fn a_half_closed_connection_on_which_nothing_moves_has_a_deadline_of_its_own() {
    let _turn = beside_others();
    for engine in ["copy", "splice", "sockmap", "auto"] {
        let rig = Rig::new(&Config::new(engine).limits("half_closed_timeout = \"1s\""));
        let open = rig.pair();
        for client_closes in [true, false] {
            let (client, server) = rig.pair();
            let (closes, stays) = if client_closes { (&client, &server) } else { (&server, &client) };
            closes.shutdown(std::net::Shutdown::Write).expect("sent");
            assert_eq!(read_to_end(stays, PATIENCE), (Vec::new(), End::Fin), "{engine}");
            assert_eq!(read_to_end(closes, PATIENCE).1, End::Reset, "{engine}: it ends without a FIN that nobody sent");
        }
        rig.daemon.wait_metric("dataplane_connections_closed_total", &[("reason", "idle")], 2.0);
        let pattern = Pattern::new(3);
        pattern.send(&open.0, 0, 5000).expect("sent");
        pattern.receive_exactly(&open.1, 0, 5000);
    }
}

#[test]
fn one_refused_dial_resets_no_established_connection() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("auto").upstream("on_down = \"reset\""));
    let (client, server) = rig.pair();
    let Rig { daemon, upstream, net } = rig;
    // An ingress that starts again: its old connections go on.
    drop(upstream);
    let mut refused = net.client.connect(public()).expect("accepted");
    refused.write_all(&hello()).expect("sent");
    daemon.wait_metric("dataplane_upstream_connect_failures_total", &[("reason", "refused")], 1.0);
    let _upstream = net.cluster.listen(FIRST);
    daemon.wait_metric("dataplane_upstream_target_up", &[("target", FIRST)], 1.0);
    let pattern = Pattern::new(4);
    pattern.send(&client, 0, 5000).expect("sent");
    pattern.receive_exactly(&server, 0, 5000);
}

#[test]
fn local_ports_that_are_used_up_are_named() {
    let _turn = beside_others();
    let told = |daemon: &Daemon, what: &str| {
        let status = daemon.json(&["status", "--json"]);
        let met = status["shortages"].as_array().expect("a list").iter().find(|met| met["what"] == what).cloned();
        let met = met.unwrap_or_else(|| panic!("{what}: {status:#}"));
        assert!(met["times"].as_u64() >= Some(1) && met["reason"].as_str().is_some_and(|why| why.len() > 40), "{met}");
        daemon.wait_log(&["\"level\":\"ERROR\"", what]);
        let text = String::from_utf8(daemon.cli(&["status"]).stdout).expect("text");
        assert!(text.contains("SHORTAGE"), "{text}");
    };
    let rig = Rig::new(&Config::new("auto"));
    rig.net.entrance.run(|| std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "50000 50003").expect("a sysctl"));
    let mut open: Vec<_> = (0..4).map(|_| rig.pair()).collect();
    let refused = rig.open();
    assert_ne!(read_to_end(&refused, PATIENCE).1, End::Silence);
    told(&rig.daemon, "local_ports");
    open.clear();
}
