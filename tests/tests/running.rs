//! The daemon's life: start, reload, drain, limits, end.

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tests::daemon::{Config, Daemon, Limits};
use tests::netns::{CLUSTER, Net};
use tests::rig::{PATIENCE, Rig, accept, accept_within, public};
use tests::stream::{End, Pattern, client_hello, read_to_end, reset_within};
use tests::{beside_others, eventually};

const PATTERN: Pattern = Pattern::new(11);

#[track_caller]
fn works((client, server): &(TcpStream, TcpStream)) {
    PATTERN.send(client, 0, 10_000).expect("sent");
    PATTERN.receive_exactly(server, 0, 10_000);
    PATTERN.send(server, 0, 10_000).expect("sent");
    PATTERN.receive_exactly(client, 0, 10_000);
}

#[test]
fn ready_is_said_when_every_listener_accepts() {
    let _turn = beside_others();
    let net = Net::new();
    let more = "[listeners.second]\nbind = [\"198.51.100.1:8443\"]";
    for _ in 0..5 {
        let _daemon = Daemon::start(&net, &Config::new("auto").more(more));
        for addr in ["198.51.100.1:443", "198.51.100.1:8443", "[2001:db8:1::1]:443"] {
            net.client.connect(addr.parse().expect("an address")).unwrap_or_else(|e| panic!("{addr}: {e}"));
        }
    }
}

#[test]
fn on_sigterm_it_stops_accepting_and_established_connections_finish() {
    let _turn = beside_others();
    let mut rig = Rig::new(&Config::new("auto"));
    let pair = rig.pair();
    rig.daemon.signal(Signal::TERM);
    eventually(PATIENCE, "new connections are refused", || rig.net.client.connect(public()).is_err().then_some(()));
    works(&pair);
    assert!(!rig.daemon.ended());
    let size = 5_000_000;
    std::thread::scope(|s| {
        s.spawn(|| {
            PATTERN.send(&pair.1, 0, size).expect("sent");
            pair.1.shutdown(std::net::Shutdown::Write).expect("FIN");
        });
        assert_eq!(PATTERN.receive(&pair.0, 0), (size, End::Fin));
    });
    drop(pair);
    // The drain is over with its last connection, not with its deadline of 30 s.
    assert_eq!(rig.daemon.wait_end(PATIENCE).code(), Some(0));
}

#[test]
fn at_the_end_of_drain_timeout_what_is_left_is_reset() {
    let _turn = beside_others();
    let mut rig = Rig::new(&Config::new("auto").limits("drain_timeout = \"1s\""));
    let (client, server) = rig.pair();
    let start = Instant::now();
    rig.daemon.signal(Signal::TERM);
    assert!(reset_within(&client, PATIENCE).is_some());
    assert!(start.elapsed() > Duration::from_millis(900), "after {:?}", start.elapsed());
    assert!(reset_within(&server, PATIENCE).is_some());
    assert_eq!(rig.daemon.wait_end(PATIENCE).code(), Some(0));
}

#[test]
fn without_connections_sigterm_ends_it_at_once() {
    let _turn = beside_others();
    let mut rig = Rig::new(&Config::new("auto"));
    rig.daemon.signal(Signal::TERM);
    // It is told from the drain's deadline, 30 s.
    assert_eq!(rig.daemon.wait_end(PATIENCE).code(), Some(0));
}

#[test]
fn a_reload_changes_routes_and_leaves_established_connections_alone() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("auto"));
    let other = rig.net.cluster.listen(&format!("{}:443", CLUSTER[1]));
    let old = rig.pair();
    let hash = rig.daemon.metrics().values("dataplane_config_info", "hash").concat();
    let new = "[[routes]]\nhosts = [\"new.example.net\"]\nupstream = \"new\"\n\
               [upstreams.new]\ntargets = [\"100.64.0.3:443\"]";
    rig.daemon.rewrite(&Config::new("auto").targets(["100.64.0.3:443"]).more(new));
    rig.daemon.signal(Signal::HUP);
    eventually(PATIENCE, "the reload", || {
        (rig.daemon.metrics().values("dataplane_config_info", "hash").concat() != hash).then_some(())
    });
    rig.daemon.wait_metric("dataplane_config_last_reload_success", &[], 1.0);
    works(&old);
    let mut client = rig.connect();
    client.write_all(&client_hello(Some("new.example.net"), &[])).expect("sent");
    accept(&other, false);
    let _moved = rig.open();
    accept(&other, false);
    works(&old);
    assert!(accept_within(&rig.upstream, Duration::ZERO).is_none());
}

#[test]
fn a_broken_reload_changes_nothing_and_says_so() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("auto"));
    let old = rig.pair();
    assert!((rig.daemon.metric("dataplane_config_last_reload_success", &[]) - 1.0).abs() < 0.1);
    let hash = rig.daemon.metrics().values("dataplane_config_info", "hash").concat();
    rig.daemon.rewrite(&Config::new("auto").listener("bindd = 3"));
    rig.daemon.signal(Signal::HUP);
    rig.daemon.wait_metric("dataplane_config_last_reload_success", &[], 0.0);
    assert_eq!(rig.daemon.metrics().values("dataplane_config_info", "hash").concat(), hash);
    works(&old);
    works(&rig.pair());
    rig.daemon.wait_last_error();
    let command = rig.daemon.cli(&["reload"]);
    assert!(!command.status.success(), "`dataplane reload` fails too");
    assert!(String::from_utf8_lossy(&command.stderr).contains("bindd"), "and says what is wrong");
    rig.daemon.rewrite(&Config::new("auto"));
    assert!(rig.daemon.cli(&["reload"]).status.success());
    rig.daemon.wait_metric("dataplane_config_last_reload_success", &[], 1.0);
}

#[test]
fn a_connection_is_idle_when_no_byte_moves_either_way() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("auto").limits("idle_timeout = \"2s\""));
    let (busy, idle) = (rig.pair(), rig.pair());
    let start = Instant::now();
    let mut position = 0;
    // One byte a while, one way only, keeps a connection alive.
    while start.elapsed() < Duration::from_secs(5) {
        PATTERN.send(&busy.1, position, position + 1).expect("not idle");
        PATTERN.receive_exactly(&busy.0, position, position + 1);
        position += 1;
        std::thread::sleep(Duration::from_millis(400));
    }
    for end in [&idle.0, &idle.1] {
        assert!(reset_within(end, PATIENCE).is_some(), "idle for more than twice its time");
    }
    rig.daemon.wait_metric("dataplane_connections_closed_total", &[("reason", "idle")], 1.0);
    works(&busy);
}

#[test]
fn without_file_descriptors_the_old_live_the_new_are_refused_and_nothing_spins() {
    let _turn = beside_others();
    let net = Net::new();
    let upstream = net.cluster.listen(&format!("{}:443", CLUSTER[0]));
    let limits = Limits { files: Some(168), ..Limits::default() };
    let daemon = Daemon::start_with(&net, &Config::new("auto"), limits);
    let rig = Rig { daemon, upstream, net };
    let old = rig.pair();
    let mut open = Vec::new();
    let mut refused = 0;
    for _ in 0..200 {
        let client = rig.open();
        let server = eventually(PATIENCE, "it is forwarded or refused", || {
            if let Some(server) = accept_within(&rig.upstream, Duration::ZERO) {
                return Some(Some(server));
            }
            (read_to_end(&client, Duration::from_millis(1)) != (Vec::new(), End::Silence)).then_some(None)
        });
        if let Some(server) = server {
            open.push((client, server));
        } else {
            assert_eq!(read_to_end(&client, PATIENCE).0, b"");
            refused += 1;
        }
        if refused == 20 {
            break;
        }
    }
    assert!(open.len() >= 10, "only {} connections within 168 descriptors", open.len());
    assert_eq!(refused, 20, "{} connections within 168 descriptors", open.len());
    rig.daemon.wait_metric("dataplane_connections_rejected_total", &[("reason", "total_limit")], f64::from(refused));
    works(&old);
    let (cpu, lines) = (rig.daemon.cpu(), rig.daemon.log().len());
    let waiting: Vec<_> = (0..20).map(|_| rig.connect()).collect();
    std::thread::sleep(Duration::from_secs(2));
    let used = rig.daemon.cpu().saturating_sub(cpu);
    assert!(used < Duration::from_millis(500), "{used:?} of CPU in 2 s of nothing");
    assert!(rig.daemon.log().len() - lines < 200, "the log floods");
    drop((waiting, open));
    rig.daemon.wait_metric("dataplane_connections_active", &[], 1.0);
    works(&rig.pair());
    works(&old);
}

#[test]
fn an_address_in_use_is_named_with_its_remedy() {
    let _turn = beside_others();
    let net = Net::new();
    let _taken = net.entrance.listen("198.51.100.1:443");
    let mut daemon = Daemon::spawn(&net, &Config::new("auto"), Limits::default());
    assert_eq!(daemon.wait_end(PATIENCE).code(), Some(1));
    // The remedy names the command that shows who holds it.
    for part in ["198.51.100.1:443", "in use", "ss -"] {
        daemon.wait_log(&[part]);
    }
}

#[test]
fn a_port_that_needs_a_privilege_is_named_with_its_remedy() {
    let _turn = beside_others();
    let net = Net::new();
    let mut daemon = Daemon::spawn(&net, &Config::new("auto"), Limits { user: Some(65534), ..Limits::default() });
    assert_eq!(daemon.wait_end(PATIENCE).code(), Some(1));
    for part in ["198.51.100.1:443", "CAP_NET_BIND_SERVICE"] {
        daemon.wait_log(&[part]);
    }
}

#[test]
fn without_privileges_everything_works_but_what_needs_them() {
    let _turn = beside_others();
    let net = Net::new();
    let upstream = net.cluster.listen(&format!("{}:443", CLUSTER[0]));
    for engine in ["copy", "splice", "auto"] {
        let mut config = Config::new(engine);
        config.port = 8443;
        let daemon = Daemon::start_with(&net, &config, Limits { user: Some(65534), ..Limits::default() });
        for addr in ["198.51.100.1:8443", "[2001:db8:1::1]:8443"] {
            let mut client = net.client.connect(addr.parse().expect("an address")).expect("accepted");
            client.write_all(&tests::rig::hello()).expect("sent");
            works(&(client, accept(&upstream, false).0));
        }
        assert!(daemon.json(&["status", "--json"])["engine"]["effective"].is_string());
    }
}
