//! The sockmap engine where it differs from the others: bytes that the kernel forwards, the way
//! into the map and out of it, and what an attacker would try.

use std::collections::HashSet;
use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use aya::maps::{HashMap, MapData, MapInfo, loaded_maps};
use aya::programs::loaded_programs;
use rustix::net::{SendFlags, send};
use rustix::process::Signal;
use serde_json::Value;
use tests::daemon::{Config, Daemon, HOST, Limits, ROUTE};
use tests::netns::{CLIENT, ENTRANCE, Net};
use tests::peers::{Peer, certificate, curl};
use tests::rig::{PATIENCE, Rig, Server, hello, public};
use tests::stream::{End, Pattern, client_hello, never_hang, reset, reset_within};
use tests::{alone, beside_others, eventually, see_an_old_kernel};

const UP: Pattern = Pattern::new(31);
const DOWN: Pattern = Pattern::new(32);
const MEGABYTE: u64 = 1_000_000;
const MESSAGE: u64 = 200;

/// Both ends of a connection, and how far its streams are.
struct Talk {
    client: TcpStream,
    server: TcpStream,
    at: u64,
}

impl Talk {
    fn new((client, server): (TcpStream, TcpStream)) -> Self {
        for stream in [&client, &server] {
            stream.set_nodelay(true).expect("TCP_NODELAY");
        }
        Self { client, server, at: 0 }
    }

    /// A message there, and one back.
    #[track_caller]
    fn exchange(&mut self) {
        let next = self.at + MESSAGE;
        UP.send(&self.client, self.at, next).expect("sent");
        UP.receive_exactly(&self.server, self.at, next);
        DOWN.send(&self.server, self.at, next).expect("sent");
        DOWN.receive_exactly(&self.client, self.at, next);
        self.at = next;
    }

    /// Exchanges until the daemon says that the connection is where it should be.
    #[track_caller]
    fn exchange_until(&mut self, rig: &Rig, engine: &str) {
        let start = Instant::now();
        while engines(rig) != [engine] {
            // To look is slow on a busy machine.
            (0..10).for_each(|_| self.exchange());
            assert!(start.elapsed() < PATIENCE, "still {:?}, not {engine}", engines(rig));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Exchanges until the kernel forwards both ways: it takes over when a direction of a
    /// connection in the map is quiet for a moment.
    #[track_caller]
    fn exchange_until_in_kernel(&mut self, rig: &Rig) {
        self.exchange_until(rig, "sockmap");
        let by_kernel = || ["to_upstream", "to_client"].map(|direction| bytes(rig, direction, "kernel"));
        eventually(PATIENCE, "the kernel forwards both ways", || {
            let before = by_kernel();
            self.exchange();
            (by_kernel() == before.map(|bytes| bytes + MESSAGE)).then_some(())
        });
    }
}

/// What forwards each connection, in the order of their age.
fn engines(rig: &Rig) -> Vec<String> {
    let connections = connections(rig);
    connections.iter().map(|c| c["engine"].as_str().expect("a name").to_owned()).collect()
}

fn connections(rig: &Rig) -> Vec<Value> {
    rig.daemon.json(&["connections", "--json"]).as_array().expect("a list").clone()
}

fn bytes(rig: &Rig, direction: &str, path: &str) -> u64 {
    rig.daemon.metric("dataplane_bytes_total", &[("route", ROUTE), ("direction", direction), ("path", path)]) as u64
}

fn spills(rig: &Rig) -> f64 {
    rig.daemon.metric("dataplane_sockmap_spills_total", &[])
}

#[test]
fn the_kernel_forwards_all_but_the_first_bytes_and_they_are_counted_once() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("sockmap").upstream("send_proxy = \"off\""));
    let mut talk = Talk::new(rig.pair());
    talk.exchange_until_in_kernel(&rig);
    let before = ["to_upstream", "to_client"].map(|direction| bytes(&rig, direction, "userspace"));
    for _ in 0..1000 {
        talk.exchange();
    }
    for (direction, before, first) in [("to_upstream", before[0], hello().len() as u64), ("to_client", before[1], 0)] {
        let (kernel, userspace) = (bytes(&rig, direction, "kernel"), bytes(&rig, direction, "userspace"));
        assert_eq!(kernel + userspace, talk.at + first, "{direction}");
        assert_eq!(userspace, before, "{direction}: bytes came to userspace");
        assert!(kernel >= 1000 * MESSAGE, "{direction}: {kernel} bytes by the kernel");
    }
    let one = &connections(&rig)[0];
    assert_eq!((&one["bytes_to_client"], &one["path"]), (&talk.at.into(), &"kernel".into()));
    assert!(one["idle"].as_f64().expect("seconds") < 5.0, "{one}");
    let totals = ["to_upstream", "to_client"].map(|d| bytes(&rig, d, "kernel") + bytes(&rig, d, "userspace"));
    drop(talk);
    rig.wait_idle();
    // Nothing is counted twice when the connection ends.
    let after = ["to_upstream", "to_client"].map(|d| bytes(&rig, d, "kernel") + bytes(&rig, d, "userspace"));
    assert_eq!(after, totals);
    assert_eq!(rig.daemon.metric("dataplane_sockmap_backlog_bytes", &[]) as u64, 0);
    let line = eventually(PATIENCE, "the access log", || rig.daemon.access_log().pop());
    assert!(line.contains("\"engine\":\"sockmap\""), "{line}");
}

#[test]
fn auto_moves_small_exchanges_into_the_kernel_and_comes_back_for_bulk() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("auto"));
    let mut talk = Talk::new(rig.pair());
    assert_eq!(rig.daemon.json(&["status", "--json"])["engine"]["effective"], "auto");
    talk.exchange();
    assert_eq!(engines(&rig), ["splice"]);
    for _ in 0..2 {
        talk.exchange_until(&rig, "sockmap");
        let active = |engine| rig.daemon.metric("dataplane_connections_active", &[("engine", engine)]) as u64;
        assert_eq!((active("sockmap"), active("splice")), (1, 0));
        let kernel = bytes(&rig, "to_client", "kernel");
        eventually(PATIENCE, "the kernel forwards", || {
            talk.exchange();
            (bytes(&rig, "to_client", "kernel") > kernel).then_some(())
        });
        let end = talk.at + 40 * MEGABYTE;
        std::thread::scope(|s| {
            s.spawn(|| DOWN.send(&talk.server, talk.at, end).expect("download"));
            DOWN.receive_exactly(&talk.client, talk.at, end);
            s.spawn(|| UP.send(&talk.client, talk.at, end).expect("upload"));
            UP.receive_exactly(&talk.server, talk.at, end);
        });
        talk.at = end;
        eventually(PATIENCE, "bulk is left to splice", || (engines(&rig) == ["splice"]).then_some(()));
    }
    talk.exchange();
    talk.client.shutdown(Shutdown::Write).expect("FIN");
    assert_eq!(UP.receive(&talk.server, talk.at), (talk.at, End::Fin));
    talk.server.shutdown(Shutdown::Write).expect("FIN");
    assert_eq!(DOWN.receive(&talk.client, talk.at), (talk.at, End::Fin));
    rig.wait_idle();
    rig.daemon.wait_metric("dataplane_connections_closed_total", &[("reason", "done")], 1.0);
}

#[test]
fn the_kernel_forwards_between_address_families() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("sockmap"));
    let six = format!("[{}]:443", ENTRANCE[1]).parse().expect("an address");
    let mut client = rig.net.client.connect(six).expect("the daemon accepts");
    never_hang(&client);
    client.write_all(&hello()).expect("sent");
    let mut talk = Talk::new((client, rig.accept()));
    talk.exchange_until_in_kernel(&rig);
    let before = bytes(&rig, "to_client", "kernel");
    for _ in 0..100 {
        talk.exchange();
    }
    assert!(bytes(&rig, "to_client", "kernel") >= before + 100 * MESSAGE);
    let Talk { client, server, at } = talk;
    drop(server);
    assert_eq!(DOWN.receive(&client, at), (at, End::Fin));
}

/// Five hundred requests on one connection, then a download of 20 MB on it, with TLS all the way to
/// nginx.
#[test]
fn curl_and_nginx_notice_nothing_when_the_kernel_forwards_between_them() {
    let _turn = beside_others();
    let net = Net::new();
    let pem = certificate(&net, &[HOST]);
    let (path, big) = (pem.display(), net.file("big", vec![b'x'; 20_000_000]));
    let root = big.parent().expect("a file").display();
    let server = format!(
        "listen 100.64.0.2:443 ssl proxy_protocol; ssl_certificate {path}; ssl_certificate_key {path}; keepalive_requests 10000; \
         location / {{ return 200 $proxy_protocol_addr; }} location = /big {{ root {root}; }}"
    );
    let _nginx = Peer::nginx(&net, &net.cluster, &format!("http {{ server {{ {server} }} }}"));
    let daemon = Daemon::start(&net, &Config::new("sockmap").upstream("send_proxy = \"v2\""));
    let small = format!("https://{HOST}:443/[1-500]");
    let large = format!("https://{HOST}:443/big");
    let fetched = curl(&net.client, &pem, HOST, "198.51.100.1:443", &[&small, &large]).expect("all succeed");
    // The last is the address that `curl` itself adds.
    let answers = 501 * CLIENT[0].len();
    assert_eq!(fetched.len(), 20_000_000 + answers);
    assert!(fetched.starts_with(&CLIENT[0].repeat(500)), "the client's address comes through: {}", &fetched[..100]);
    assert_eq!(daemon.metric("dataplane_connections_accepted_total", &[]) as u64, 1, "on one connection");
    daemon.wait_metric("dataplane_connections_closed_total", &[("reason", "done")], 1.0);
    let kernel = daemon.metric("dataplane_bytes_total", &[("direction", "to_upstream"), ("path", "kernel")]);
    assert!(kernel > 500.0 * 50.0, "{kernel} bytes of requests were redirected");
}

/// Times that a thread of the daemon was taken off the processor: it had slept before it ran again,
/// or was preempted.
fn wakeups(daemon: &Daemon) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).expect("the daemon runs");
    let of_task = |entry: std::io::Result<std::fs::DirEntry>| -> u64 {
        let status = std::fs::read_to_string(entry.expect("procfs").path().join("status")).unwrap_or_default();
        let lines = status.lines().filter(|line| line.contains("ctxt_switches"));
        lines.filter_map(|line| line.split_whitespace().last()?.parse::<u64>().ok()).sum()
    };
    tasks.map(of_task).sum()
}

#[test]
fn a_million_small_exchanges_over_a_hundred_connections_hardly_wake_userspace() {
    const CONNECTIONS: usize = 100;
    const ROUNDS: u64 = 10_000;
    let _turn = alone();
    let rig = Rig::new(&Config::new("sockmap"));
    let mut talks: Vec<_> = (0..CONNECTIONS).map(|_| Talk::new(rig.pair())).collect();
    let everybody = |talks: &mut [Talk]| {
        for talk in &*talks {
            UP.send(&talk.client, talk.at, talk.at + MESSAGE).expect("sent");
        }
        for talk in &*talks {
            UP.receive_exactly(&talk.server, talk.at, talk.at + MESSAGE);
            DOWN.send(&talk.server, talk.at, talk.at + MESSAGE).expect("sent");
        }
        for talk in talks {
            DOWN.receive_exactly(&talk.client, talk.at, talk.at + MESSAGE);
            talk.at += MESSAGE;
        }
    };
    eventually(PATIENCE, "all connections are in the map", || {
        everybody(&mut talks);
        engines(&rig).iter().all(|engine| engine == "sockmap").then_some(())
    });
    let by_kernel = || ["to_upstream", "to_client"].map(|direction| bytes(&rig, direction, "kernel"));
    eventually(PATIENCE, "the kernel forwards all of them both ways", || {
        let before = by_kernel();
        everybody(&mut talks);
        (by_kernel() == before.map(|bytes| bytes + CONNECTIONS as u64 * MESSAGE)).then_some(())
    });
    let before = (wakeups(&rig.daemon), bytes(&rig, "to_client", "kernel"));
    for _ in 0..ROUNDS {
        everybody(&mut talks);
    }
    let woken = wakeups(&rig.daemon) - before.0;
    let exchanges = CONNECTIONS as u64 * ROUNDS;
    println!("{woken} wake-ups in {exchanges} exchanges");
    assert!(woken * 100 < exchanges, "{woken} wake-ups in {exchanges} exchanges");
    let by_kernel = bytes(&rig, "to_client", "kernel") - before.1;
    assert!(by_kernel * 100 >= exchanges * MESSAGE * 99, "only {by_kernel} bytes by the kernel");
}

#[test]
fn retransmits_that_overlap_are_not_doubled() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("sockmap"));
    for again in [1, 100, 199, 1000] {
        let mut talk = Talk::new(rig.pair());
        talk.exchange_until(&rig, "sockmap");
        for _ in 0..10 {
            talk.exchange();
        }
        // The client sends bytes again that were forwarded, together with new ones in the same
        // segment.
        let Talk { client, server, at } = talk;
        let client = rig.net.client.run(|| dataplane::kernel::sys::rewind(client, again)).expect("TCP_REPAIR");
        never_hang(&client);
        let end = at + 300;
        (&client).write_all(UP.at(at - u64::from(again), u64::from(again) + 300)).expect("sent");
        UP.receive_exactly(&server, at, end);
        // And so does the upstream.
        let server = rig.net.cluster.run(|| dataplane::kernel::sys::rewind(server, again)).expect("TCP_REPAIR");
        never_hang(&server);
        (&server).write_all(DOWN.at(at - u64::from(again), u64::from(again) + 300)).expect("sent");
        DOWN.receive_exactly(&client, at, end);
        client.shutdown(Shutdown::Write).expect("FIN");
        assert_eq!(UP.receive(&server, end), (end, End::Fin));
        server.shutdown(Shutdown::Write).expect("FIN");
        assert_eq!(DOWN.receive(&client, end), (end, End::Fin), "{again} bytes again");
    }
    rig.wait_idle();
    rig.daemon.wait_metric("dataplane_connections_closed_total", &[("reason", "done")], 4.0);
}

#[test]
fn sixteen_uploads_at_once_arrive_whole() {
    const BYTES: u64 = 150 * MEGABYTE;
    let _turn = alone();
    let rig = Rig::new(&Config::new("sockmap"));
    let pairs: Vec<_> = (0..16).map(|_| rig.pair()).collect();
    std::thread::scope(|s| {
        for (client, server) in &pairs {
            s.spawn(move || {
                UP.send(client, 0, BYTES).expect("sent");
                client.shutdown(Shutdown::Write).expect("FIN");
            });
            s.spawn(move || assert_eq!(UP.receive(server, 0), (BYTES, End::Fin)));
        }
    });
    assert!(bytes(&rig, "to_upstream", "kernel") > 0, "none by the kernel");
    drop(pairs);
    rig.wait_idle();
}

#[test]
fn a_million_segments_of_one_byte_cost_no_memory_and_arrive_in_order() {
    const CONNECTIONS: u64 = 20;
    const BYTES: u64 = 50_000;
    let _turn = alone();
    let rig = Rig::new(&Config::new("sockmap"));
    for host in [&rig.net.client, &rig.net.cluster] {
        host.run(|| std::fs::write("/proc/sys/net/ipv4/tcp_autocorking", "0")).expect("sysctl");
    }
    // A sender that may have so many segments in flight has no cause to put two bytes into one.
    rig.net
        .client
        .ip("route replace 198.51.100.0/24 dev public proto kernel scope link src 198.51.100.2 initcwnd 20000\n");
    let pairs: Vec<_> = (0..CONNECTIONS).map(|_| rig.pair()).collect();
    let segments = rig.net.entrance.tcp_segments_received();
    std::thread::scope(|s| {
        for (client, server) in &pairs {
            s.spawn(move || {
                client.set_nodelay(true).expect("TCP_NODELAY");
                for at in 0..BYTES {
                    UP.send(client, at, at + 1).expect("sent");
                }
                client.shutdown(Shutdown::Write).expect("FIN");
            });
            s.spawn(move || assert_eq!(UP.receive(server, 0), (BYTES, End::Fin)));
        }
    });
    let segments = rig.net.entrance.tcp_segments_received() - segments;
    let kernel = bytes(&rig, "to_upstream", "kernel");
    println!("{segments} segments for {} bytes, {kernel} by the kernel", CONNECTIONS * BYTES);
    assert!(segments * 10 > CONNECTIONS * BYTES * 9, "the client put many bytes into one segment");
    // How many is the scheduler's affair: such a flood mostly finds the queue full, and is passed.
    assert!(kernel > 0, "none by the kernel");
    drop(pairs);
    rig.wait_idle();
}

#[test]
fn urgent_bytes_stay_in_their_place() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("sockmap"));
    let mut talk = Talk::new(rig.pair());
    socket2::SockRef::from(&talk.server).set_out_of_band_inline(true).expect("SO_OOBINLINE");
    talk.exchange_until(&rig, "sockmap");
    for round in 0..200 {
        let at = talk.at;
        UP.send(&talk.client, at, at + 50).expect("sent");
        assert_eq!(send(&talk.client, UP.at(at + 50, 1), SendFlags::OOB).expect("sent"), 1);
        UP.send(&talk.client, at + 51, at + MESSAGE).expect("sent");
        UP.receive_exactly(&talk.server, at, at + MESSAGE);
        talk.at += MESSAGE;
        DOWN.send(&talk.server, at, at + MESSAGE).expect("sent");
        DOWN.receive_exactly(&talk.client, at, at + MESSAGE);
        if round % 50 == 0 {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    talk.exchange();
}

#[test]
fn both_directions_stalled_for_a_minute_lose_nothing() {
    const CONNECTIONS: usize = 20;
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("sockmap").limits("dead_peer_timeout = \"10s\""));
    let mut talks: Vec<_> = (0..CONNECTIONS).map(|_| Talk::new(rig.pair())).collect();
    for talk in &mut talks {
        talk.exchange();
        talk.exchange();
    }
    let stalled: Vec<_> = std::thread::scope(|s| {
        let stall = |talk: &Talk| {
            (UP.send_until_stalled(&talk.client, talk.at), DOWN.send_until_stalled(&talk.server, talk.at))
        };
        let threads: Vec<_> = talks.iter().map(|talk| s.spawn(move || stall(talk))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    eventually(PATIENCE, "userspace has taken all of them over", || {
        (spills(&rig) >= 2.0 * CONNECTIONS as f64).then_some(())
    });
    std::thread::sleep(Duration::from_secs(60));
    // What was redirected went to send buffers that had room for it.
    assert_eq!(rig.daemon.metric("dataplane_sockmap_backlog_bytes", &[]) as u64, 0);
    std::thread::scope(|s| {
        for (talk, (up, down)) in talks.iter().zip(&stalled) {
            let more = 2 * MEGABYTE;
            s.spawn(move || UP.send(&talk.client, *up, up + more).and_then(|()| talk.client.shutdown(Shutdown::Write)));
            s.spawn(move || {
                DOWN.send(&talk.server, *down, down + more).and_then(|()| talk.server.shutdown(Shutdown::Write))
            });
            s.spawn(move || assert_eq!(UP.receive(&talk.server, talk.at), (up + more, End::Fin)));
            s.spawn(move || assert_eq!(DOWN.receive(&talk.client, talk.at), (down + more, End::Fin)));
        }
    });
    drop(talks);
    rig.wait_idle();
}

#[test]
fn a_client_that_half_closes_during_a_backlogged_download_gets_all_of_it() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("sockmap"));
    for round in 0..24 {
        let mut talk = Talk::new(rig.pair());
        for _ in 0..=(round % 3) {
            talk.exchange();
        }
        let at = talk.at;
        let sent = DOWN.send_until_stalled(&talk.server, at);
        talk.client.shutdown(Shutdown::Write).expect("FIN");
        let more = sent + (round % 4) * MEGABYTE;
        std::thread::scope(|s| {
            s.spawn(|| {
                DOWN.send(&talk.server, sent, more).expect("sent");
                talk.server.shutdown(Shutdown::Write).expect("FIN");
            });
            s.spawn(|| assert_eq!(UP.receive(&talk.server, at), (at, End::Fin), "round {round}"));
            assert_eq!(DOWN.receive(&talk.client, at), (more, End::Fin), "round {round}");
        });
    }
    rig.wait_idle();
    rig.daemon.wait_metric("dataplane_connections_closed_total", &[("reason", "done")], 24.0);
}

/// An upstream that goes on until it is told to stop must hear of it, however slowly its bytes are
/// read.
#[test]
fn a_half_close_is_passed_on_while_the_one_who_sent_it_does_not_read() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("sockmap"));
    for by_client in [true, false] {
        let mut talk = Talk::new(rig.pair());
        talk.exchange_until(&rig, "sockmap");
        let at = talk.at;
        let (near, far) = if by_client { (&talk.client, &talk.server) } else { (&talk.server, &talk.client) };
        let sent = DOWN.send_until_stalled(far, at);
        near.shutdown(Shutdown::Write).expect("FIN");
        assert_eq!(UP.receive(far, at), (at, End::Fin), "by the client: {by_client}");
        // The other side ends as well, before anything was read.
        far.shutdown(Shutdown::Write).expect("FIN");
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!(DOWN.receive(near, at), (sent, End::Fin), "by the client: {by_client}");
    }
    rig.wait_idle();
    rig.daemon.wait_metric("dataplane_connections_closed_total", &[("reason", "done")], 2.0);
}

/// A slow reader takes what has long arrived: nothing comes in, but something goes out.
#[test]
fn a_connection_whose_reader_is_slow_is_not_idle() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("sockmap").limits("idle_timeout = \"4s\""));
    let mut talk = Talk::new(rig.pair());
    talk.exchange();
    let (mut at, end) = (talk.at, DOWN.send_until_stalled(&talk.server, talk.at));
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(10) {
        let next = (at + (end - at) / 20 + 1).min(end);
        DOWN.receive_exactly(&talk.client, at, next);
        at = next;
        std::thread::sleep(Duration::from_millis(400));
    }
    DOWN.receive_exactly(&talk.client, at, end);
    // When nothing moves, it is.
    assert!(reset_within(&talk.client, Duration::from_secs(30)).is_some());
    rig.daemon.wait_metric("dataplane_connections_closed_total", &[("reason", "idle")], 1.0);
}

#[test]
fn a_reload_that_gives_the_sockmap_up_takes_connections_out_of_it() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("sockmap"));
    let mut talk = Talk::new(rig.pair());
    talk.exchange_until(&rig, "sockmap");
    rig.daemon.rewrite(&Config::new("splice"));
    assert!(rig.daemon.cli(&["reload"]).status.success());
    talk.exchange_until(&rig, "splice");
    for _ in 0..100 {
        talk.exchange();
    }
}

#[test]
fn an_upstream_that_closes_before_a_slow_client_has_read_loses_nothing() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("sockmap"));
    for round in 0..12 {
        let mut talk = Talk::new(rig.pair());
        talk.exchange();
        let at = talk.at;
        if round % 2 == 0 {
            talk.client.shutdown(Shutdown::Write).expect("FIN");
            assert_eq!(UP.receive(&talk.server, at), (at, End::Fin));
        }
        let size = at + 1 + round * 80_000;
        DOWN.leave(&talk.server, at, size).expect("sent");
        drop(talk.server);
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(DOWN.receive(&talk.client, at), (size, End::Fin), "round {round}");
    }
    rig.wait_idle();
}

#[test]
fn a_reset_with_a_backlog_is_passed_on_and_leaves_nothing_behind() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("sockmap"));
    for round in 0..20 {
        let mut talk = Talk::new(rig.pair());
        talk.exchange();
        DOWN.send_until_stalled(&talk.server, talk.at);
        let (first, second) = if round % 2 == 0 { (talk.client, talk.server) } else { (talk.server, talk.client) };
        reset(first);
        assert!(reset_within(&second, PATIENCE).is_some(), "round {round}");
    }
    rig.wait_idle();
    assert_eq!(rig.daemon.metric("dataplane_sockmap_backlog_bytes", &[]) as u64, 0);
}

#[test]
fn a_slow_reader_is_counted_as_a_spill_and_the_kernel_takes_over_again() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("sockmap"));
    let mut talk = Talk::new(rig.pair());
    talk.exchange_until_in_kernel(&rig);
    let stalled = DOWN.send_until_stalled(&talk.server, talk.at);
    let of = |direction| rig.daemon.metric("dataplane_sockmap_spills_total", &[("direction", direction)]) as u64;
    eventually(PATIENCE, "it has left the kernel's path", || {
        (connections(&rig)[0]["path"] == "userspace" && of("to_client") >= 1).then_some(())
    });
    assert_eq!(of("to_upstream"), 0);
    DOWN.receive_exactly(&talk.client, talk.at, stalled);
    std::thread::scope(|s| {
        s.spawn(|| UP.send(&talk.client, talk.at, stalled).expect("sent"));
        UP.receive_exactly(&talk.server, talk.at, stalled);
    });
    talk.at = stalled;
    let kernel = bytes(&rig, "to_client", "kernel");
    eventually(Duration::from_secs(20), "the kernel forwards again", || {
        talk.exchange();
        (bytes(&rig, "to_client", "kernel") > kernel).then_some(())
    });
}

/// What of the kernel's the daemon has descriptors of, by this field of bpf(2)'s fdinfo.
fn own(daemon: &Daemon, field: &str) -> HashSet<u32> {
    let mut own = HashSet::new();
    for entry in std::fs::read_dir(format!("/proc/{}/fdinfo", daemon.pid())).expect("the daemon runs").flatten() {
        let info = std::fs::read_to_string(entry.path()).unwrap_or_default();
        own.extend(info.lines().filter_map(|line| line.strip_prefix(field)?.trim().parse::<u32>().ok()));
    }
    own
}

/// The kernel's maps by this name that belong to the daemon.
fn maps(daemon: &Daemon, name: &str) -> Vec<MapInfo> {
    let own = own(daemon, "map_id:");
    let maps = loaded_maps().filter_map(Result::ok);
    maps.filter(|map| own.contains(&map.id()) && map.name_as_str() == Some(name)).collect()
}

/// Sockets that the daemon's programs know.
fn entries(daemon: &Daemon) -> usize {
    let maps = maps(daemon, common::sockmap::KEYS);
    assert_eq!(maps.len(), 1, "the daemon has one map of keys");
    let map = aya::maps::Map::HashMap(MapData::from_id(maps[0].id()).expect("the map is there"));
    let keys = HashMap::<_, u64, u32>::try_from(map).expect("a map of cookies to keys");
    keys.keys().filter_map(Result::ok).count()
}

#[test]
fn ten_thousand_connections_later_no_socket_is_left_in_the_map() {
    const CONNECTIONS: u64 = 10_000;
    const AT_ONCE: u64 = 8;
    let _turn = alone();
    let rig = Rig::new(&Config::new("sockmap"));
    let server = Server::echo(rig.upstream.try_clone().expect("dup"));
    std::thread::scope(|s| {
        for worker in 0..AT_ONCE {
            let rig = &rig;
            s.spawn(move || {
                rig.net.client.run(|| {
                    for i in 0..CONNECTIONS / AT_ONCE {
                        let pattern = Pattern::new(worker * CONNECTIONS + i);
                        let mut client = TcpStream::connect(public()).expect("the daemon accepts");
                        never_hang(&client);
                        client.write_all(&client_hello(Some(HOST), &[])).expect("sent");
                        for message in 0..3 {
                            pattern.send(&client, message * MESSAGE, (message + 1) * MESSAGE).expect("sent");
                            pattern.receive_exactly(&client, message * MESSAGE, (message + 1) * MESSAGE);
                        }
                        if i % 10 == 9 {
                            reset(client);
                        } else {
                            client.shutdown(Shutdown::Write).expect("FIN");
                            assert_eq!(pattern.receive(&client, 3 * MESSAGE), (3 * MESSAGE, End::Fin));
                        }
                    }
                });
            });
        }
    });
    assert_eq!(server.accepted() as u64, CONNECTIONS);
    rig.wait_idle();
    assert_eq!(entries(&rig.daemon), 0);
    let by_kernel = bytes(&rig, "to_client", "kernel");
    println!("{by_kernel} bytes of {} by the kernel", CONNECTIONS * 3 * MESSAGE);
    assert!(by_kernel > 0);
    // And the sockets are counted while they are there.
    drop(server);
    let mut talk = Talk::new(rig.pair());
    talk.exchange_until(&rig, "sockmap");
    assert_eq!(entries(&rig.daemon), 2);
}

#[test]
fn killed_with_a_thousand_connections_in_the_map_both_sides_are_reset_and_the_next_start_is_clean() {
    const CONNECTIONS: usize = 1000;
    let _turn = alone();
    let mut rig = Rig::new(&Config::new("sockmap"));
    let mut talks: Vec<_> = (0..CONNECTIONS).map(|_| Talk::new(rig.pair())).collect();
    eventually(PATIENCE, "all connections are in the map", || {
        talks.iter_mut().for_each(Talk::exchange);
        (rig.daemon.metric("dataplane_connections_active", &[("engine", "sockmap")]) as usize == CONNECTIONS)
            .then_some(())
    });
    assert_eq!(entries(&rig.daemon), 2 * CONNECTIONS);
    let ids: Vec<u32> = [common::sockmap::KEYS, common::sockmap::SOCKS]
        .iter()
        .flat_map(|name| maps(&rig.daemon, name))
        .map(|map| map.id())
        .collect();
    assert_eq!(ids.len(), 2);
    let programs = own(&rig.daemon, "prog_id:");
    let verdicts = |own: &HashSet<u32>| {
        let loaded = loaded_programs().filter_map(Result::ok);
        loaded.filter(|p| own.contains(&p.id()) && p.name_as_str() == Some(common::sockmap::VERDICT)).count()
    };
    assert_eq!(verdicts(&programs), 1);
    rig.daemon.signal(Signal::KILL);
    rig.daemon.wait_end(PATIENCE);
    for talk in talks {
        assert!(reset_within(&talk.client, PATIENCE).is_some(), "a client");
        assert!(reset_within(&talk.server, PATIENCE).is_some(), "an upstream");
    }
    eventually(PATIENCE, "the maps and the program go", || {
        let maps_left = loaded_maps().filter_map(Result::ok).any(|map| ids.contains(&map.id()));
        (!maps_left && verdicts(&programs) == 0).then_some(())
    });
    assert!(std::fs::read_dir("/sys/fs/bpf").map_or(true, |mut dir| dir.next().is_none()), "nothing is pinned");
    rig.daemon = Daemon::start(&rig.net, &Config::new("sockmap"));
    assert_eq!(verdicts(&own(&rig.daemon, "prog_id:")), 1);
    let mut talk = Talk::new(rig.pair());
    talk.exchange_until(&rig, "sockmap");
    assert_eq!(entries(&rig.daemon), 2);
}

#[test]
fn where_the_kernel_does_not_let_it_splice_serves_and_the_reason_is_told() {
    let _turn = beside_others();
    let net = Net::new();
    let mut config = Config::new("auto");
    config.port = 8443;
    let daemon = Daemon::start_with(&net, &config, Limits { user: Some(65_534), ..Limits::default() });
    let status = daemon.json(&["status", "--json"]);
    assert_eq!(status["engine"]["effective"], "splice");
    let reason = status["engine"]["reasons"][0].as_str().expect("a reason").to_owned();
    assert!(reason.starts_with("sockmap: needs CAP_BPF"), "{reason}");
    assert_eq!(daemon.metric("dataplane_build_info", &[("engine", "splice")]) as u64, 1);
    assert_eq!(daemon.metric("dataplane_engine_refused", &[("reason", &reason)]) as u64, 1);
    daemon.wait_log(&["needs CAP_BPF"]);
    let doctor = daemon.json(&["doctor", "--json"]);
    assert_eq!(doctor["engines"]["sockmap"]["usable"], true, "the test itself may");
}

#[test]
fn a_kernel_without_the_fixes_gets_the_sockmap_only_by_name() {
    let _turn = beside_others();
    see_an_old_kernel();
    let rig = Rig::new(&Config::new("auto"));
    let engine = |rig: &Rig| rig.daemon.json(&["status", "--json"])["engine"].clone();
    let of = |rig: &Rig, list: &str| -> Vec<String> {
        let lines = engine(rig)[list].as_array().expect("a list").clone();
        lines.iter().map(|line| line.as_str().expect("a text").to_owned()).collect()
    };
    assert_eq!(engine(&rig)["effective"], "splice");
    let [reason] = &of(&rig, "reasons")[..] else { panic!("one reason: {}", engine(&rig)) };
    assert!(reason.starts_with("sockmap: kernel 2.6."), "{reason}");
    assert!(reason.contains("is not known to have the fix") && reason.contains("6.12.35"), "{reason}");
    assert!(reason.contains("`engine = \"sockmap\"` runs it all the same"), "{reason}");
    assert!(of(&rig, "warnings").is_empty(), "{}", engine(&rig));
    assert_eq!(rig.daemon.metric("dataplane_engine_refused", &[]) as u64, 1);
    rig.daemon.wait_log(&["is not known to have the fix", "CVE-2025-38165"]);
    let doctor = rig.daemon.json(&["doctor", "--json"]);
    assert_eq!(
        (&doctor["engine"]["effective"], &doctor["engines"]["sockmap"]["usable"]),
        (&"splice".into(), &false.into())
    );
    assert_eq!(doctor["engine"]["reasons"][0], **reason);
    let text = String::from_utf8(rig.daemon.cli(&["doctor"]).stdout).expect("text");
    assert!(text.contains("passed its self-test, but kernel 2.6."), "{text}");

    // The remedy that was named.
    rig.daemon.rewrite(&Config::new("sockmap"));
    assert!(rig.daemon.cli(&["reload"]).status.success());
    assert_eq!(engine(&rig)["effective"], "sockmap");
    assert!(of(&rig, "reasons").is_empty(), "{}", engine(&rig));
    assert!(of(&rig, "warnings")[0].contains("is not known to have the fix"), "{}", engine(&rig));
    rig.daemon.wait_log(&["because the configuration names it", "CVE-2025-38165"]);
    assert_eq!(rig.daemon.metric("dataplane_engine_refused", &[]) as u64, 0);
    assert!(rig.daemon.cli(&["doctor"]).status.success(), "what is configured runs");
    Talk::new(rig.pair()).exchange_until(&rig, "sockmap");
}

#[test]
fn without_room_in_the_budget_connections_stay_with_splice() {
    let _turn = beside_others();
    // Half of it is for pipes; a connection in the map needs 8 KiB.
    let rig = Rig::new(&Config::new("sockmap").limits("kernel_memory = \"64KiB\""));
    let mut talks: Vec<_> = (0..10).map(|_| Talk::new(rig.pair())).collect();
    let in_map = |rig: &Rig| engines(rig).iter().filter(|engine| *engine == "sockmap").count();
    eventually(PATIENCE, "there is room for four", || {
        talks.iter_mut().for_each(Talk::exchange);
        (in_map(&rig) == 4).then_some(())
    });
    for _ in 0..10 {
        talks.iter_mut().for_each(Talk::exchange);
    }
    assert_eq!(in_map(&rig), 4, "and for no more");
    drop(talks);
    rig.wait_idle();
    let mut again = Talk::new(rig.pair());
    again.exchange_until(&rig, "sockmap");
}
