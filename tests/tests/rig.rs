//! The rig itself: what it is trusted to notice, it notices. A relay of a few lines, right or
//! broken on purpose, takes the daemon's place.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use tests::daemon::Metrics;
use tests::netns::{BLACK_HOLE, CLUSTER, Link, Net};
use tests::rig::{accept_within, hello, public};
use tests::stream::{End, Pattern, client_hello, in_records_of, read_preamble, reset, reset_within};
use tests::{PATIENCE, beside_others, eventually};

const SIZE: u64 = 3_000_000;
const PATTERN: Pattern = Pattern::new(17);

/// Client and server with a hand-made relay on the entrance node between them: the streams of its
/// two legs, and of the two ends.
struct Relay {
    client: TcpStream,
    near: TcpStream,
    far: TcpStream,
    server: TcpStream,
    net: Net,
}

impl Relay {
    fn new() -> Self {
        let net = Net::new();
        let entrance = net.entrance.listen("198.51.100.1:443");
        let cluster = net.cluster.listen("100.64.0.2:443");
        let accept = |listener: &TcpListener| accept_within(listener, PATIENCE).expect("a connection");
        let client = net.client.connect(public()).expect("connected");
        let near = accept(&entrance);
        let far = net.entrance.connect("100.64.0.2:443".parse().expect("an address")).expect("connected");
        let server = accept(&cluster);
        Self { client, near, far, server, net }
    }

    /// What the server makes of a stream of `SIZE` bytes that the relay passes through `spoil`,
    /// chunk by chunk.
    fn upload_through(
        self,
        mut spoil: impl FnMut(usize, Vec<u8>) -> Vec<u8> + Send,
    ) -> std::thread::Result<(u64, End)> {
        let Self { client, mut near, mut far, server, net } = self;
        let result = std::thread::scope(|s| {
            s.spawn(move || {
                PATTERN.send(&client, 0, SIZE).expect("sent");
                client.shutdown(Shutdown::Write).expect("FIN");
            });
            s.spawn(move || {
                let mut position = 0;
                let mut buffer = [0; 4096];
                while let Ok(n @ 1..) = near.read(&mut buffer) {
                    if far.write_all(&spoil(position, buffer[..n].to_vec())).is_err() {
                        return;
                    }
                    position += n;
                }
            });
            s.spawn(move || PATTERN.receive(&server, 0)).join()
        });
        drop(net);
        result
    }
}

#[test]
fn a_right_relay_passes() {
    let _turn = beside_others();
    let got = Relay::new().upload_through(|_, bytes| bytes);
    assert_eq!(got.expect("every byte is right"), (SIZE, End::Fin));
}

#[test]
fn a_lost_a_doubled_a_swapped_and_a_changed_byte_are_noticed() {
    let _turn = beside_others();
    let at = |position: usize, bytes: &[u8]| {
        (position..position + bytes.len()).contains(&2_000_000).then(|| 2_000_000 - position)
    };
    let spoilers: [fn(usize, &mut Vec<u8>); 4] = [
        |i, bytes| _ = bytes.remove(i),
        |i, bytes| bytes.insert(i, bytes[i]),
        |_, bytes| {
            let half = bytes.len() / 2;
            bytes.rotate_left(half);
        },
        |i, bytes| bytes[i] ^= 1,
    ];
    for (n, spoiler) in spoilers.into_iter().enumerate() {
        let got = Relay::new().upload_through(|position, mut bytes| {
            if let Some(i) = at(position, &bytes) {
                spoiler(i, &mut bytes);
            }
            bytes
        });
        assert!(got.is_err(), "spoiler {n} went unnoticed: {got:?}");
    }
}

#[test]
fn a_truncated_stream_is_told_from_a_whole_one() {
    let _turn = beside_others();
    let got = Relay::new().upload_through(|position, bytes| if position < 2_000_000 { bytes } else { Vec::new() });
    let (position, end) = got.expect("every byte until there is right");
    assert!(position < SIZE);
    assert_eq!(end, End::Fin);
}

#[test]
fn a_reset_is_told_from_a_fin_and_from_a_fin_before_a_reset() {
    let _turn = beside_others();
    let relay = Relay::new();
    assert!(reset_within(&relay.client, Duration::from_millis(100)).is_none());
    reset(relay.near);
    assert!(reset_within(&relay.client, PATIENCE).is_some());
    relay.far.shutdown(Shutdown::Write).expect("FIN");
    assert!(reset_within(&relay.server, Duration::from_millis(100)).is_none());
    reset(relay.far);
    let server = relay.server;
    let noticed = std::thread::spawn(move || reset_within(&server, PATIENCE)).join();
    assert!(noticed.is_err(), "a FIN before the RST went unnoticed");
}

#[test]
fn a_peer_that_vanished_says_nothing_at_all() {
    let _turn = beside_others();
    let relay = Relay::new();
    relay.net.vanish(Link::Inside);
    let segments = relay.net.cluster.tcp_segments_received();
    PATTERN.send(&relay.far, 0, 1000).expect("the socket takes it");
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(relay.net.cluster.tcp_segments_received(), segments);
    assert!(relay.far.take_error().expect("SO_ERROR").is_none(), "nobody says that the peer is gone");
    // The other link is as it was.
    PATTERN.send(&relay.near, 0, 1000).expect("sent");
    PATTERN.receive_exactly(&relay.client, 0, 1000);
    let start = Instant::now();
    let hole = relay.net.entrance.run(|| {
        TcpStream::connect_timeout(
            &format!("{BLACK_HOLE}:443").parse().expect("an address"),
            Duration::from_millis(1500),
        )
    });
    assert_eq!(hole.expect_err("nobody there").kind(), std::io::ErrorKind::TimedOut);
    assert!(start.elapsed() >= Duration::from_millis(1400));
}

#[test]
fn a_preamble_is_read_to_its_last_byte_and_no_further() {
    let _turn = beside_others();
    let Relay { mut client, near, net: _net, .. } = Relay::new();
    let v2 = [
        &b"\r\n\r\n\0\r\nQUIT\n\x21\x11"[..],
        &[0, 19, 192, 0, 2, 1, 192, 0, 2, 2, 0, 80, 1, 187],
        &[2, 0, 4],
        b"name",
    ]
    .concat();
    let v1 = b"PROXY TCP6 2001:db8::1 2001:db8::2 80 443\r\n".to_vec();
    for header in [v1, v2] {
        for sent in [hello(), in_records_of(1, &hello()), client_hello(None, &[])] {
            client.write_all(&[&header, &sent[..], b"!"].concat()).expect("sent");
            let preamble = read_preamble(&near, true).expect("a preamble");
            assert_eq!(preamble.hello, sent);
            let proxy = preamble.proxy.expect("a header");
            assert_eq!((proxy.source.port(), proxy.destination.port()), (80, 443));
            assert_eq!(proxy.tlvs, if proxy.version == 2 { vec![(2, b"name".to_vec())] } else { vec![] });
            let mut next = [0];
            (&near).read_exact(&mut next).expect("the byte behind the hello");
            assert_eq!(&next, b"!");
        }
    }
}

#[test]
fn hosts_and_what_runs_on_them_go_away() {
    let _turn = beside_others();
    let net = Net::new();
    let dir = net.dir().to_owned();
    let mut sleeper = net.cluster.spawn(Command::new("sleep").arg("1000")).expect("sleep(1)");
    let mine = || {
        let out = Command::new("ip").args(["netns", "list"]).output().expect("ip(8)");
        let ours = format!("dp-test-{}-", std::process::id());
        String::from_utf8_lossy(&out.stdout).lines().filter(|l| l.starts_with(&ours)).count()
    };
    assert!(mine() >= 3);
    drop(net);
    eventually(PATIENCE, "the process ended with its host", || sleeper.child().try_wait().expect("our child"));
    assert!(!dir.exists());
}

#[test]
fn hosts_of_a_dead_run_are_swept() {
    // No process has this id: it is beyond the largest one (PID_MAX_LIMIT, 2^22).
    let stale = "dp-test-99999999-0-client";
    // The sweep runs once in a process, before its first hosts: so in another process.
    if std::env::var_os("SWEEP").is_some() {
        let _turn = beside_others();
        drop(Net::new());
        assert!(!Path::new("/run/netns").join(stale).exists());
        return;
    }
    assert!(Command::new("ip").args(["netns", "add", stale]).status().expect("ip(8)").success());
    let out = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "hosts_of_a_dead_run_are_swept"])
        .env("SWEEP", "1")
        .output()
        .expect("this test runs again");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
}

#[test]
fn metrics_are_summed_over_the_labels_that_were_not_asked_for() {
    let metrics = Metrics::parse(
        "# HELP a A.\n# TYPE a counter\na{x=\"1\",y=\"p\"} 1\na{x=\"1\",y=\"q,r\"} 2.5\na{x=\"2\",y=\"p\"} 4\nb 7e3\n",
    );
    assert!((metrics.sum("a", &[("x", "1")]) - 3.5).abs() < 1e-9);
    assert!((metrics.sum("a", &[("y", "q,r")]) - 2.5).abs() < 1e-9);
    assert!((metrics.sum("b", &[]) - 7000.0).abs() < 1e-9);
    assert_eq!(metrics.values("a", "x"), ["1", "2"]);
    assert!(metrics.has("b") && !metrics.has("c"));
}

#[test]
fn one_client_of_each_family_and_two_cluster_nodes_can_be_reached() {
    let _turn = beside_others();
    let net = Net::new();
    for address in CLUSTER {
        let addr = if address.contains(':') { format!("[{address}]:443") } else { format!("{address}:443") };
        let listener = net.cluster.listen(&addr);
        net.entrance.connect(addr.parse().expect("an address")).unwrap_or_else(|e| panic!("{addr}: {e}"));
        assert!(accept_within(&listener, PATIENCE).is_some());
    }
    assert!(
        net.client.connect(format!("{}:443", CLUSTER[0]).parse().expect("an address")).is_err(),
        "no way around the entrance"
    );
}
