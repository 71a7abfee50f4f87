//! What a connection may rely on, whatever engine forwards it: one suite, run unchanged over all of
//! them.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use socket2::SockRef;
use tests::daemon::{Config, ROUTE};
use tests::netns::Link;
use tests::rig::{PATIENCE, Rig, Server, hello};
use tests::stream::{
    End, Pattern, client_hello, never_hang, reset, reset_after_fin_within, reset_within, send_in_segments,
    send_with_fin,
};
use tests::{alone, beside_others, eventually};

macro_rules! conformance {
    ($($engine:ident),+) => { $(
        mod $engine {
            conformance!(@tests stringify!($engine);
                a_gigabyte_each_way_at_once_arrives_byte_for_byte,
                a_thousand_connections_that_end_right_after_the_last_byte_lose_nothing,
                after_the_client_half_closes_a_hundred_megabytes_still_come_down,
                after_the_upstream_half_closes_a_hundred_megabytes_still_go_up,
                a_reset_by_the_client_reaches_the_upstream_within_a_second,
                a_reset_by_the_upstream_reaches_the_client_within_a_second,
                a_reset_by_the_client_reaches_the_upstream_while_stalled,
                a_reset_by_the_upstream_reaches_the_client_while_stalled,
                a_reset_passes_while_both_sides_are_stalled,
                a_reset_after_a_half_close_is_passed_on,
                a_reset_in_mid_transfer_never_looks_like_its_end,
                killing_the_daemon_in_mid_transfer_resets_both_sides,
                a_fin_in_the_segment_of_the_last_byte_follows_that_byte,
                a_fin_in_the_segment_of_the_hello_still_gets_an_answer,
                bytes_in_the_segment_of_the_hello_arrive_once,
                segments_of_one_byte_arrive_in_order,
                a_slow_reader_gets_every_byte,
                both_sides_stalled_and_released_lose_nothing,
                bytes_of_a_dead_connection_never_reach_the_next_one,
                nothing_is_left_over_after_ten_thousand_connections,
                a_stalled_reader_that_is_alive_is_not_cut,
                a_reader_that_stalls_past_both_ends_still_gets_the_tail,
                a_client_that_vanished_while_idle_is_cut,
                a_client_that_vanished_while_reading_is_cut,
                a_client_that_vanished_while_stalled_is_cut,
                an_upstream_that_vanished_while_idle_is_cut,
                an_upstream_that_vanished_while_reading_is_cut,
            );
        }
    )+ };
    (@tests $engine:expr; $($name:ident),+ $(,)?) => { $(
        #[test]
        fn $name() {
            super::$name($engine);
        }
    )+ };
}

conformance!(copy, splice, sockmap, auto);

const UP: Pattern = Pattern::new(1);
const DOWN: Pattern = Pattern::new(2);
const MEGABYTE: u64 = 1_000_000;
/// A peer learns of a reset within this time.
const A_SECOND: Duration = Duration::from_secs(1);

/// Bytes each way of the big transfer; `DATAPLANE_TEST_MEGABYTES` makes it smaller for a quick run.
fn big() -> u64 {
    std::env::var("DATAPLANE_TEST_MEGABYTES").map_or(1000, |m| m.parse().expect("a number of megabytes")) * MEGABYTE
}

fn close_write(stream: &TcpStream) {
    stream.shutdown(Shutdown::Write).expect("FIN");
}

/// Receives to the end, and tells when the first megabyte has come.
#[track_caller]
fn receive_and_tell(pattern: Pattern, stream: &TcpStream, under_way: &Sender<()>) -> (u64, End) {
    pattern.receive_exactly(stream, 0, MEGABYTE);
    under_way.send(()).expect("it is waited for");
    pattern.receive(stream, MEGABYTE)
}

/// Each time a reset is heard of; once of three times, for the machine may have something else to
/// do, within a second. How many times it was tried.
#[track_caller]
fn heard_within_a_second(reset: impl Fn() -> Option<Duration>) -> f64 {
    let mut took = Vec::new();
    while took.len() < 3 {
        took.push(reset().expect("a reset is passed on"));
        if took.last() <= Some(&A_SECOND) {
            return took.len() as f64;
        }
    }
    panic!("a reset is passed on after {took:?}");
}

fn a_gigabyte_each_way_at_once_arrives_byte_for_byte(engine: &str) {
    let _turn = alone();
    let rig = Rig::new(&Config::new(engine));
    let (client, server) = rig.pair();
    let size = big();
    std::thread::scope(|s| {
        s.spawn(|| {
            UP.send(&client, 0, size).expect("upload");
            close_write(&client);
        });
        s.spawn(|| {
            DOWN.send(&server, 0, size).expect("download");
            close_write(&server);
        });
        s.spawn(|| assert_eq!(UP.receive(&server, 0), (size, End::Fin)));
        s.spawn(|| assert_eq!(DOWN.receive(&client, 0), (size, End::Fin)));
    });
    rig.wait_idle();
    let bytes = |direction| rig.daemon.metric("dataplane_bytes_total", &[("route", ROUTE), ("direction", direction)]);
    // The hello is payload of the TLS stream.
    assert_eq!(bytes("to_upstream") as u64, size + hello().len() as u64);
    assert_eq!(bytes("to_client") as u64, size);
}

fn a_thousand_connections_that_end_right_after_the_last_byte_lose_nothing(engine: &str) {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new(engine));
    for i in 0..1000_u64 {
        // 1 byte to 130 KB, never a round number for long.
        let size = 1 + i * i * 7919 % 130_003;
        let (client, server) = rig.pair();
        let (up, down) = (Pattern::new(i), Pattern::new(i + 5000));
        std::thread::scope(|s| {
            s.spawn(|| {
                if i % 2 == 0 {
                    assert_eq!(up.receive(&server, 0), (size, End::Fin), "upload of connection {i}");
                }
                down.send(&server, 0, size).expect("download");
                drop(server);
            });
            if i % 2 == 0 {
                up.send(&client, 0, size).expect("upload");
                close_write(&client);
            }
            assert_eq!(down.receive(&client, 0), (size, End::Fin), "download of connection {i}");
        });
    }
    rig.wait_idle();
    rig.daemon.wait_metric("dataplane_connections_closed_total", &[("route", ROUTE), ("reason", "done")], 1000.0);
}

fn after_the_client_half_closes_a_hundred_megabytes_still_come_down(engine: &str) {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new(engine));
    let (client, server) = rig.pair();
    half_close(&client, &server, DOWN);
    rig.wait_idle();
}

fn after_the_upstream_half_closes_a_hundred_megabytes_still_go_up(engine: &str) {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new(engine));
    let (client, server) = rig.pair();
    half_close(&server, &client, UP);
    rig.wait_idle();
}

fn half_close(first: &TcpStream, second: &TcpStream, pattern: Pattern) {
    let size = 100 * MEGABYTE;
    close_write(first);
    assert_eq!(Pattern::new(0).receive(second, 0), (0, End::Fin), "the half-close arrives");
    std::thread::scope(|s| {
        s.spawn(|| {
            pattern.send(second, 0, size).expect("sent");
            close_write(second);
        });
        assert_eq!(pattern.receive(first, 0), (size, End::Fin));
    });
}

fn a_reset_by_the_client_reaches_the_upstream_within_a_second(engine: &str) {
    heard_and_counted(engine, "client_reset", |client, server| (client, server));
}

fn a_reset_by_the_upstream_reaches_the_client_within_a_second(engine: &str) {
    heard_and_counted(engine, "upstream_reset", |client, server| (server, client));
}

/// One of client and server resets, the other hears of it.
fn heard_and_counted(engine: &str, reason: &str, roles: impl Fn(TcpStream, TcpStream) -> (TcpStream, TcpStream)) {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new(engine));
    let resets = heard_within_a_second(|| {
        let (client, server) = rig.pair();
        let (resets, hears) = roles(client, server);
        reset(resets);
        reset_within(&hears, PATIENCE)
    });
    let labels = [("route", ROUTE), ("reason", reason)];
    rig.daemon.wait_metric("dataplane_connections_closed_total", &labels, resets);
}

fn a_reset_by_the_client_reaches_the_upstream_while_stalled(engine: &str) {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new(engine));
    heard_within_a_second(|| {
        let (client, server) = rig.pair();
        DOWN.send_until_stalled(&server, 0);
        reset(client);
        reset_within(&server, PATIENCE)
    });
    rig.wait_idle();
}

fn a_reset_by_the_upstream_reaches_the_client_while_stalled(engine: &str) {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new(engine));
    heard_within_a_second(|| {
        let (client, server) = rig.pair();
        UP.send_until_stalled(&client, 0);
        reset(server);
        reset_within(&client, PATIENCE)
    });
    rig.wait_idle();
}

fn a_reset_passes_while_both_sides_are_stalled(engine: &str) {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new(engine));
    for by_client in [true, false] {
        heard_within_a_second(|| {
            let (client, server) = rig.pair();
            DOWN.send_until_stalled(&server, 0);
            UP.send_until_stalled(&client, 0);
            let (first, second) = if by_client { (client, server) } else { (server, client) };
            reset(first);
            reset_within(&second, PATIENCE)
        });
    }
    rig.wait_idle();
}

fn a_reset_after_a_half_close_is_passed_on(engine: &str) {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new(engine));
    for by_client in [true, false] {
        heard_within_a_second(|| {
            let (client, server) = rig.pair();
            let (first, second) = if by_client { (client, server) } else { (server, client) };
            close_write(&first);
            assert_eq!(UP.receive(&second, 0), (0, End::Fin));
            DOWN.send(&second, 0, 1000).expect("sent");
            DOWN.receive_exactly(&first, 0, 1000);
            reset(first);
            reset_after_fin_within(&second, PATIENCE)
        });
    }
    rig.wait_idle();
}

fn a_reset_in_mid_transfer_never_looks_like_its_end(engine: &str) {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new(engine));
    for round in 0..200 {
        let (client, server) = rig.pair();
        let (first, second) = if round % 2 == 0 { (server, client) } else { (client, server) };
        let size = round * 104_729 % (2 * MEGABYTE);
        std::thread::scope(|s| {
            s.spawn(move || {
                DOWN.send(&first, 0, size).expect("sent");
                reset(first);
            });
            assert_eq!(DOWN.receive(&second, 0).1, End::Reset, "round {round}");
        });
    }
    rig.wait_idle();
}

fn killing_the_daemon_in_mid_transfer_resets_both_sides(engine: &str) {
    let _turn = beside_others();
    let mut rig = Rig::new(&Config::new(engine));
    let (upload, uploaded) = rig.pair();
    let (downloaded, download) = rig.pair();
    let idle = rig.pair();
    std::thread::scope(|s| {
        // The writing end: an error, whichever it is; the reading end: a reset and never a clean
        // end.
        s.spawn(|| UP.send(&upload, 0, u64::MAX).expect_err("a dead daemon takes nothing"));
        s.spawn(|| DOWN.send(&download, 0, u64::MAX).expect_err("a dead daemon takes nothing"));
        let (first, both) = channel();
        let second = first.clone();
        let (uploaded, downloaded) = (&uploaded, &downloaded);
        let at_upstream = s.spawn(move || receive_and_tell(UP, uploaded, &first));
        let at_client = s.spawn(move || receive_and_tell(DOWN, downloaded, &second));
        both.recv().and_then(|()| both.recv()).expect("both transfers are under way");
        rig.daemon.signal(rustix::process::Signal::KILL);
        for reader in [at_upstream, at_client] {
            assert_eq!(reader.join().expect("every byte until then is right").1, End::Reset);
        }
    });
    assert!(reset_within(&idle.0, PATIENCE).is_some(), "an idle client");
    assert!(reset_within(&idle.1, PATIENCE).is_some(), "an idle upstream connection");
    rig.daemon.wait_end(PATIENCE);
}

fn a_fin_in_the_segment_of_the_last_byte_follows_that_byte(engine: &str) {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new(engine));
    for size in [1, 100, 1000, 1400] {
        let (client, server) = rig.pair();
        send_with_fin(&client, UP.at(0, size));
        assert_eq!(UP.receive(&server, 0), (size, End::Fin));
        send_with_fin(&server, DOWN.at(0, size));
        assert_eq!(DOWN.receive(&client, 0), (size, End::Fin));
    }
    rig.wait_idle();
}

fn a_fin_in_the_segment_of_the_hello_still_gets_an_answer(engine: &str) {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new(engine));
    let client = rig.connect();
    send_with_fin(&client, &hello());
    let server = rig.accept();
    assert_eq!(UP.receive(&server, 0), (0, End::Fin));
    DOWN.leave(&server, 0, MEGABYTE).expect("sent");
    drop(server);
    assert_eq!(DOWN.receive(&client, 0), (MEGABYTE, End::Fin));
    rig.wait_idle();
}

fn bytes_in_the_segment_of_the_hello_arrive_once(engine: &str) {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new(engine));
    for early in [1, 500, 1000, 20_000, 200_000] {
        let client = rig.connect();
        let first = [&hello(), UP.at(0, early)].concat();
        std::thread::scope(|s| {
            s.spawn(|| (&client).write_all(&first).expect("sent"));
            let server = rig.accept();
            UP.receive_exactly(&server, 0, early);
            close_write(&server);
            assert_eq!(DOWN.receive(&client, 0), (0, End::Fin));
            close_write(&client);
            assert_eq!(UP.receive(&server, early), (early, End::Fin));
        });
    }
    rig.wait_idle();
}

fn segments_of_one_byte_arrive_in_order(engine: &str) {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new(engine));
    let (client, server) = rig.pair();
    let count = 2000;
    let trickle = |stream: &TcpStream, pattern: Pattern| {
        send_in_segments(stream, pattern.at(0, count).chunks(1)).expect("sent");
        close_write(stream);
    };
    std::thread::scope(|s| {
        s.spawn(|| trickle(&client, UP));
        s.spawn(|| trickle(&server, DOWN));
        s.spawn(|| assert_eq!(UP.receive(&server, 0), (count, End::Fin)));
        s.spawn(|| assert_eq!(DOWN.receive(&client, 0), (count, End::Fin)));
    });
    rig.wait_idle();
}

fn a_slow_reader_gets_every_byte(engine: &str) {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new(engine));
    let (client, server) = rig.pair();
    SockRef::from(&client).set_recv_buffer_size(16 << 10).expect("SO_RCVBUF");
    let size = 8 * MEGABYTE;
    std::thread::scope(|s| {
        s.spawn(|| {
            DOWN.send(&server, 0, size).expect("sent");
            close_write(&server);
        });
        let mut position = 0;
        while position < size {
            let next = (position + 16_000).min(size);
            DOWN.receive_exactly(&client, position, next);
            position = next;
            std::thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(DOWN.receive(&client, size), (size, End::Fin));
    });
}

fn both_sides_stalled_and_released_lose_nothing(engine: &str) {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new(engine));
    let (client, server) = rig.pair();
    let (mut up, mut down) = (0, 0);
    for _ in 0..3 {
        let stalled = (UP.send_until_stalled(&client, up), DOWN.send_until_stalled(&server, down));
        assert!(stalled.0 > up && stalled.1 > down, "something fits");
        let more = 10 * MEGABYTE;
        std::thread::scope(|s| {
            s.spawn(|| UP.send(&client, stalled.0, stalled.0 + more).expect("upload"));
            s.spawn(|| DOWN.send(&server, stalled.1, stalled.1 + more).expect("download"));
            s.spawn(|| UP.receive_exactly(&server, up, stalled.0 + more));
            s.spawn(|| DOWN.receive_exactly(&client, down, stalled.1 + more));
        });
        (up, down) = (stalled.0 + more, stalled.1 + more);
    }
    close_write(&client);
    assert_eq!(UP.receive(&server, up), (up, End::Fin));
    close_write(&server);
    assert_eq!(DOWN.receive(&client, down), (down, End::Fin));
    rig.wait_idle();
}

fn bytes_of_a_dead_connection_never_reach_the_next_one(engine: &str) {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new(engine));
    for i in 0..10 {
        let (client, server) = rig.pair();
        Pattern::new(100 + i).send_until_stalled(&server, 0);
        Pattern::new(200 + i).send_until_stalled(&client, 0);
        reset(if i % 2 == 0 { client } else { server });
        let (client, server) = rig.pair();
        let (up, down) = (Pattern::new(300 + i), Pattern::new(400 + i));
        std::thread::scope(|s| {
            s.spawn(|| up.send(&client, 0, MEGABYTE).expect("upload"));
            s.spawn(|| down.send(&server, 0, MEGABYTE).expect("download"));
            s.spawn(|| up.receive_exactly(&server, 0, MEGABYTE));
            s.spawn(|| down.receive_exactly(&client, 0, MEGABYTE));
        });
    }
}

fn nothing_is_left_over_after_ten_thousand_connections(engine: &str) {
    const AT_ONCE: u64 = 4;
    let _turn = alone();
    let rig = Rig::new(&Config::new(engine));
    let server = Server::echo(rig.upstream.try_clone().expect("dup"));
    let connections = |count: u64, seed: u64| {
        std::thread::scope(|s| {
            for worker in 0..AT_ONCE {
                let rig = &rig;
                s.spawn(move || {
                    rig.net.client.run(|| {
                        for i in 0..count / AT_ONCE {
                            exchange(
                                &client_hello(Some(tests::daemon::HOST), &[]),
                                seed + worker * count + i,
                                i % 10 == 9,
                            );
                        }
                    });
                });
            }
        });
        rig.wait_idle();
    };
    // Pools, allocator arenas and lazily made threads come with the first connections.
    connections(1000, 0);
    let settle = || {
        eventually(PATIENCE, "the daemon's sockets go", || {
            // What is left belongs to the admin listener, of which a scrape may just have ended.
            let left = rig.net.entrance.tcp_sockets();
            left.iter().all(|line| line.contains(":24E3")).then_some(())
        });
        (rig.daemon.fds().len(), rig.daemon.threads(), rig.daemon.pss())
    };
    let before = settle();
    connections(10_000, 1 << 32);
    let after = settle();
    assert!(server.accepted() >= 10_900, "only {} connections reached the upstream", server.accepted());
    assert!(after.0 <= before.0 + 16, "fds: {} before, {} after: {:?}", before.0, after.0, rig.daemon.fds());
    assert!(after.1 <= before.1 + 2, "threads: {} before, {} after", before.1, after.1);
    assert!(after.2 <= before.2 + (4 << 20), "memory: {} before, {} after", before.2, after.2);
    let metrics = rig.daemon.metrics();
    let accepted = metrics.sum("dataplane_connections_accepted_total", &[("listener", "public")]);
    let ended = metrics.sum("dataplane_connections_closed_total", &[])
        + metrics.sum("dataplane_connections_rejected_total", &[]);
    assert_eq!((accepted, ended), (11_000.0, 11_000.0), "every connection is accounted for");
}

/// One short connection with an echo server: an odd number of bytes there and back, then FIN; or a
/// reset in the middle.
fn exchange(hello: &[u8], seed: u64, with_reset: bool) {
    let pattern = Pattern::new(seed);
    let size = 1 + seed * 31 % 4999;
    let mut client = TcpStream::connect(tests::rig::public()).expect("the daemon accepts");
    never_hang(&client);
    client.write_all(hello).expect("sent");
    pattern.send(&client, 0, size).expect("sent");
    if with_reset {
        // Once a byte came back, both legs are up.
        client.read_exact(&mut [0]).expect("echo");
        return reset(client);
    }
    close_write(&client);
    assert_eq!(pattern.receive(&client, 0), (size, End::Fin), "connection {seed}");
}

/// `dead_peer_timeout` of the tests below, and the time within which a vanished peer's other side
/// must hear of it.
const DEAD: Duration = Duration::from_secs(2);
const CUT_WITHIN: Duration = Duration::from_secs(3 * DEAD.as_secs() + 1);

fn impatient(engine: &str) -> Rig {
    Rig::new(&Config::new(engine).limits(&format!("dead_peer_timeout = \"{}s\"", DEAD.as_secs())))
}

fn a_stalled_reader_that_is_alive_is_not_cut(engine: &str) {
    let _turn = beside_others();
    let rig = impatient(engine);
    let size = 20 * MEGABYTE;
    let (download, upload, idle) = (rig.pair(), rig.pair(), rig.pair());
    std::thread::scope(|s| {
        s.spawn(|| {
            DOWN.send(&download.1, 0, size).expect("the sender is not cut either");
            close_write(&download.1);
        });
        s.spawn(|| {
            UP.send(&upload.0, 0, size).expect("the sender is not cut either");
            close_write(&upload.0);
        });
        std::thread::sleep(3 * DEAD + A_SECOND);
        assert_eq!(DOWN.receive(&download.0, 0), (size, End::Fin), "a client that did not read");
        assert_eq!(UP.receive(&upload.1, 0), (size, End::Fin), "an upstream that did not read");
    });
    let (client, server) = idle;
    UP.send(&client, 0, 1000).expect("sent");
    UP.receive_exactly(&server, 0, 1000);
}

fn a_reader_that_stalls_past_both_ends_still_gets_the_tail(engine: &str) {
    let _turn = beside_others();
    let rig = impatient(engine);
    let size = 3 * MEGABYTE;
    let (client, server) = rig.pair();
    close_write(&client);
    assert_eq!(UP.receive(&server, 0), (0, End::Fin));
    DOWN.leave(&server, 0, size).expect("sent");
    drop(server);
    std::thread::sleep(3 * DEAD + A_SECOND);
    assert_eq!(DOWN.receive(&client, 0), (size, End::Fin));
    drop(client);
    rig.wait_idle();
}

fn a_client_that_vanished_while_idle_is_cut(engine: &str) {
    let _turn = beside_others();
    let rig = impatient(engine);
    let (_client, server) = rig.pair();
    rig.net.vanish(Link::Public);
    assert!(reset_within(&server, CUT_WITHIN).is_some());
    rig.wait_idle();
}

fn an_upstream_that_vanished_while_idle_is_cut(engine: &str) {
    let _turn = beside_others();
    let rig = impatient(engine);
    let (client, _server) = rig.pair();
    rig.net.vanish(Link::Inside);
    assert!(reset_within(&client, CUT_WITHIN).is_some());
    rig.wait_idle();
}

fn a_client_that_vanished_while_stalled_is_cut(engine: &str) {
    let _turn = beside_others();
    let rig = impatient(engine);
    let (_client, server) = rig.pair();
    DOWN.send_until_stalled(&server, 0);
    rig.net.vanish(Link::Public);
    assert!(reset_within(&server, CUT_WITHIN).is_some());
    rig.wait_idle();
}

fn a_client_that_vanished_while_reading_is_cut(engine: &str) {
    let _turn = beside_others();
    let rig = impatient(engine);
    let (client, server) = rig.pair();
    vanish_in_flight(&rig, Link::Public, &client, &server);
}

fn an_upstream_that_vanished_while_reading_is_cut(engine: &str) {
    let _turn = beside_others();
    let rig = impatient(engine);
    let (client, server) = rig.pair();
    vanish_in_flight(&rig, Link::Inside, &server, &client);
}

/// `reader` vanishes while `sender` sends to it at full speed.
fn vanish_in_flight(rig: &Rig, link: Link, reader: &TcpStream, sender: &TcpStream) {
    std::thread::scope(|s| {
        let (under_way, begun) = channel();
        s.spawn(move || receive_and_tell(DOWN, reader, &under_way));
        let sending = s.spawn(|| DOWN.send(sender, 0, u64::MAX).expect_err("cut"));
        begun.recv().expect("the transfer is under way");
        rig.net.vanish(link);
        let start = Instant::now();
        while !sending.is_finished() && start.elapsed() < CUT_WITHIN {
            std::thread::sleep(Duration::from_millis(10));
        }
        let cut = sending.is_finished();
        // Nobody tells the one that vanished; and a failure must not leave either thread waiting.
        for stream in [reader, sender] {
            let _ = stream.shutdown(Shutdown::Both);
        }
        assert!(cut, "the sender did not hear within {CUT_WITHIN:?} that its reader vanished");
        let error = sending.join().expect("no panic");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "after {:?}", start.elapsed());
    });
    rig.wait_idle();
}
