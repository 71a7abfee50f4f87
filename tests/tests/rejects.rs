//! Who is not let through: the reason that the metric gives, what the client is told, how soon, and
//! that no upstream ever hears of it.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use tests::beside_others;
use tests::daemon::{Config, HOST};
use tests::netns::{CLIENT, CLIENT_MORE, CLUSTER, ENTRANCE, ENTRANCE_INSIDE};
use tests::rig::{PATIENCE, Rig, accept, accept_within, hello, public};
use tests::stream::{End, Pattern, client_hello, read_to_end, reset, send_in_segments};

/// "At once" on a busy machine; the deadline that it is told from, `hello_timeout`, is 5 s.
const AT_ONCE: Duration = Duration::from_secs(4);
/// `description` of RFC 8446 section 6 and RFC 6066, RFC 7301.
const UNRECOGNIZED_NAME: u8 = 112;
const NO_APPLICATION_PROTOCOL: u8 = 120;
const INTERNAL_ERROR: u8 = 80;

fn rig(config: &Config) -> Rig {
    Rig::new(config)
}

fn rejected(rig: &Rig, reason: &str) -> f64 {
    rig.daemon.metric("dataplane_connections_rejected_total", &[("listener", "public"), ("reason", reason)])
}

/// Sends `bytes` on a fresh connection and expects to be refused at once for `reason`, with this
/// alert or a plain close, and without a single TCP segment reaching the cluster.
#[track_caller]
fn refused(rig: &Rig, bytes: &[u8], reason: &str, alert: Option<u8>) {
    let before = (rejected(rig, reason), rig.net.cluster.tcp_segments_received());
    let start = Instant::now();
    let mut client = rig.connect();
    client.write_all(bytes).expect("sent");
    let (answer, end) = read_to_end(&client, PATIENCE);
    assert_eq!(end, End::Fin, "{reason}: after {answer:02x?}");
    assert!(start.elapsed() < AT_ONCE, "{reason}: only after {:?}", start.elapsed());
    expect_answer(&answer, alert);
    drop(client);
    rig.daemon.wait_metric(
        "dataplane_connections_rejected_total",
        &[("listener", "public"), ("reason", reason)],
        before.0 + 1.0,
    );
    assert_eq!(rig.net.cluster.tcp_segments_received(), before.1, "{reason}: the cluster got a TCP segment");
}

#[track_caller]
fn expect_answer(answer: &[u8], alert: Option<u8>) {
    match (alert, answer) {
        (None, []) => {}
        (Some(description), [21, 3, 1..=3, 0, 2, 2, told]) if *told == description => {}
        _ => panic!("expected alert {alert:?}, got {answer:02x?}"),
    }
}

#[test]
fn an_unlisted_domain_is_told_so_and_no_upstream_hears_of_it() {
    let _turn = beside_others();
    let rig = rig(&Config::new("auto"));
    for name in
        ["example.com", "other.example.com", "xapp.example.com", "app.example.com.evil.test", "apps.example.com"]
    {
        refused(&rig, &client_hello(Some(name), &[]), "unknown_host", Some(UNRECOGNIZED_NAME));
    }
    assert!(accept_within(&rig.upstream, Duration::ZERO).is_none());
    // The same listener does let a listed one through, so the silence above means something.
    let segments = rig.net.cluster.tcp_segments_received();
    let (_client, _server) = rig.pair();
    assert!(rig.net.cluster.tcp_segments_received() > segments);
}

#[test]
fn names_are_compared_without_case_and_trailing_dot_and_a_wildcard_takes_any_depth() {
    let _turn = beside_others();
    let rig = rig(&Config::new("auto"));
    for name in ["APP.Example.COM", "app.example.com.", "a.apps.example.com", "a.b.C.apps.example.com"] {
        let sent = client_hello(Some(name), &[]);
        let mut client = rig.connect();
        client.write_all(&sent).expect("sent");
        let (_server, preamble) = accept(&rig.upstream, false);
        assert_eq!(preamble.hello, sent, "{name}: the upstream gets the hello as the client wrote it");
    }
}

#[test]
fn a_hello_without_a_name_is_told_so() {
    let _turn = beside_others();
    let rig = rig(&Config::new("auto"));
    refused(&rig, &client_hello(None, &["h2"]), "no_sni", Some(UNRECOGNIZED_NAME));
}

#[test]
fn what_is_not_tls_is_refused_at_its_first_byte() {
    let _turn = beside_others();
    let rig = rig(&Config::new("auto"));
    refused(&rig, b"GET / HTTP/1.1\r\nHost: app.example.com\r\n\r\n", "not_tls", None);
    refused(&rig, b"S", "not_tls", None);
    // An alert record, and application data.
    refused(&rig, &[21, 3, 1, 0, 2, 1, 0], "not_tls", None);
    refused(&rig, &[23, 3, 3, 0, 1, 0], "not_tls", None);
}

#[test]
fn a_broken_hello_is_refused_as_malformed() {
    let _turn = beside_others();
    let rig = rig(&Config::new("auto"));
    for name in ["192.0.2.1", "app.example.com:443", "[2001:db8::1]"] {
        refused(&rig, &client_hello(Some(name), &[]), "bad_server_name", Some(UNRECOGNIZED_NAME));
        rig.daemon.wait_log(&["bad_server_name", &format!("\"server_name\":\"{name}\"")]);
    }
    refused(&rig, &client_hello(Some("app.example.com\0.evil.test"), &[]), "malformed", None);
    let mut longer_inside_than_outside = hello();
    // The session id's length, behind record header, message header, version and random.
    longer_inside_than_outside[5 + 4 + 2 + 32] = 255;
    refused(&rig, &longer_inside_than_outside, "malformed", None);
}

#[test]
fn a_hello_that_declares_too_much_is_refused_before_it_is_sent() {
    let _turn = beside_others();
    let rig = rig(&Config::new("auto").limits("hello_max_bytes = 1024"));
    // Record header and message header alone: 2,000 bytes are to come.
    refused(&rig, &[22, 3, 1, 0x07, 0xd4, 1, 0, 0x07, 0xd0], "too_large", None);
}

#[test]
fn a_hello_that_comes_too_slowly_is_cut_at_the_absolute_deadline() {
    let _turn = beside_others();
    let rig = rig(&Config::new("auto").limits("hello_timeout = \"1s\""));
    let hello = hello();
    for trickles in [false, true] {
        let start = Instant::now();
        let client = rig.connect();
        let mut sent = 20;
        (&client).write_all(&hello[..sent]).expect("sent");
        // A deadline that each byte puts off would never come: the hello goes on for longer than
        // anybody waits here.
        let (answer, end) = loop {
            let (answer, end) = read_to_end(&client, if trickles { Duration::from_millis(100) } else { PATIENCE });
            if end != End::Silence || !trickles || start.elapsed() > PATIENCE / 2 {
                break (answer, end);
            }
            // It may have been cut just now.
            let _ = (&client).write_all(&hello[sent..=sent]);
            sent += 1;
        };
        expect_answer(&answer, None);
        let took = start.elapsed();
        assert!(end != End::Silence && took >= Duration::from_millis(900), "{end:?} after {took:?}");
        assert!(sent < hello.len(), "the hello was over");
    }
    // And one that says nothing at all.
    let silent = rig.connect();
    assert_eq!(read_to_end(&silent, PATIENCE).0, b"");
    rig.daemon.wait_metric("dataplane_connections_rejected_total", &[("reason", "timeout")], 3.0);
    assert!(accept_within(&rig.upstream, Duration::ZERO).is_none());
}

#[test]
fn a_client_that_leaves_before_its_hello_is_whole_closed_early_and_is_no_error() {
    let _turn = beside_others();
    let rig = rig(&Config::new("auto"));
    drop(rig.connect());
    reset(rig.connect());
    let partial = rig.connect();
    (&partial).write_all(&hello()[..100]).expect("sent");
    drop(partial);
    rig.daemon.wait_metric("dataplane_connections_rejected_total", &[("reason", "closed_early")], 3.0);
    let errors: Vec<_> = rig.daemon.log().into_iter().filter(|line| line.contains("\"ERROR\"")).collect();
    assert!(errors.is_empty(), "{errors:?}");
    assert!(accept_within(&rig.upstream, Duration::ZERO).is_none());
}

#[test]
fn a_denied_client_is_refused_and_its_neighbour_is_not() {
    let _turn = beside_others();
    let rules = format!("deny = [\"{}/32\", \"{}/128\"]", CLIENT[0], CLIENT[1]);
    let rig = rig(&Config::new("auto").listener(&rules));
    let v6: SocketAddr = format!("[{}]:443", ENTRANCE[1]).parse().expect("an address");
    for (source, addr) in [(CLIENT[0], public()), (CLIENT[1], v6)] {
        let client =
            rig.net.client.connect_from(source.parse().expect("an address"), addr).expect("accepted, then closed");
        closed_without_a_word(&client);
    }
    rig.daemon.wait_metric("dataplane_connections_rejected_total", &[("reason", "client_denied")], 2.0);
    let neighbour =
        rig.net.client.connect_from(CLIENT_MORE[0].parse().expect("an address"), public()).expect("accepted");
    (&neighbour).write_all(&hello()).expect("sent");
    rig.accept();
}

#[test]
fn a_client_outside_the_allowed_networks_is_refused() {
    let _turn = beside_others();
    let rig = rig(&Config::new("auto").listener(&format!("allow = [\"{}/32\"]", CLIENT_MORE[0])));
    closed_without_a_word(&rig.connect());
    rig.daemon.wait_metric("dataplane_connections_rejected_total", &[("reason", "client_denied")], 1.0);
    let allowed = rig.net.client.connect_from(CLIENT_MORE[0].parse().expect("an address"), public()).expect("accepted");
    (&allowed).write_all(&hello()).expect("sent");
    rig.accept();
}

/// A connection that was refused for who the client is: the close may overtake what the client
/// sends.
#[track_caller]
fn closed_without_a_word(client: &TcpStream) {
    let start = Instant::now();
    let (answer, end) = read_to_end(client, PATIENCE);
    assert_eq!(answer, b"");
    assert_ne!(end, End::Silence);
    assert!(start.elapsed() < AT_ONCE, "only after {:?}", start.elapsed());
}

#[test]
fn one_client_gets_no_more_than_its_share_and_gets_it_back() {
    let _turn = beside_others();
    let rig = rig(&Config::new("auto").limits("max_connections_per_client = 2"));
    let (first, second) = (rig.pair(), rig.pair());
    closed_without_a_word(&rig.connect());
    rig.daemon.wait_metric("dataplane_connections_rejected_total", &[("reason", "client_limit")], 1.0);
    let other = rig.net.client.connect_from(CLIENT_MORE[0].parse().expect("an address"), public()).expect("accepted");
    (&other).write_all(&hello()).expect("sent");
    let other = (other, rig.accept());
    drop(first);
    rig.daemon.wait_metric("dataplane_connections_active", &[], 2.0);
    rig.pair();
    drop((second, other));
}

#[test]
fn beyond_the_total_new_connections_are_refused_and_the_others_live() {
    let _turn = beside_others();
    let rig = rig(&Config::new("auto").limits("max_connections = 2"));
    let (client, server) = rig.pair();
    let second = rig.pair();
    closed_without_a_word(&rig.connect());
    rig.daemon.wait_metric("dataplane_connections_rejected_total", &[("reason", "total_limit")], 1.0);
    let pattern = Pattern::new(1);
    pattern.send(&client, 0, 10_000).expect("sent");
    pattern.receive_exactly(&server, 0, 10_000);
    drop(second);
    rig.daemon.wait_metric("dataplane_connections_active", &[], 1.0);
    rig.pair();
}

#[test]
fn a_client_that_offers_no_protocol_of_the_route_is_told_so() {
    let _turn = beside_others();
    let rig = rig(&Config::new("auto").route("alpn = [\"h2\"]"));
    refused(&rig, &client_hello(Some(HOST), &["http/1.1"]), "alpn_mismatch", Some(NO_APPLICATION_PROTOCOL));
    refused(&rig, &client_hello(Some(HOST), &[]), "alpn_mismatch", Some(NO_APPLICATION_PROTOCOL));
    rig.pair();
}

#[test]
fn a_trusted_proxy_without_a_header_is_refused() {
    let _turn = beside_others();
    let rig = rig(&Config::new("auto").listener(&format!("accept_proxy = [\"{}/32\"]", CLIENT[0])));
    refused(&rig, &hello(), "proxy_header", None);
    refused(&rig, b"PROXY TCP4 nonsense\r\n", "proxy_header", None);
    refused(&rig, b"\r\n\r\n\0\r\nQUIT\n\x51\x11\0\x0c", "proxy_header", None);
}

#[test]
fn when_no_target_answers_the_client_is_told_that_it_is_not_to_blame() {
    let _turn = beside_others();
    // Nothing listens on this port of the cluster host.
    let rig = rig(&Config::new("auto").targets([&format!("{}:444", CLUSTER[0])]));
    let start = Instant::now();
    let client = rig.open();
    let (answer, end) = read_to_end(&client, PATIENCE);
    expect_answer(&answer, Some(INTERNAL_ERROR));
    assert_eq!(end, End::Fin);
    assert!(start.elapsed() < AT_ONCE);
    rig.daemon.wait_metric("dataplane_connections_rejected_total", &[("reason", "no_upstream")], 1.0);
    let failures = rig.daemon.metric("dataplane_upstream_connect_failures_total", &[("upstream", "cluster")]);
    assert!(failures >= 1.0);
}

#[test]
fn a_hello_split_at_any_byte_arrives_whole() {
    let _turn = beside_others();
    let rig = rig(&Config::new("auto"));
    for at in 1..hello().len() {
        let hello = hello();
        let client = rig.connect();
        send_in_segments(&client, [&hello[..at], &hello[at..]]).expect("sent");
        let _server = rig.accept();
    }
}

#[test]
fn a_hello_in_segments_of_one_byte_arrives_whole() {
    let _turn = beside_others();
    let rig = rig(&Config::new("auto"));
    let client = rig.connect();
    send_in_segments(&client, hello().chunks(1)).expect("sent");
    let _server = rig.accept();
}

#[test]
fn a_hello_in_many_tls_records_arrives_as_it_was_sent() {
    let _turn = beside_others();
    let rig = rig(&Config::new("auto"));
    for size in [1, 2, 3, 5, 50, 100] {
        let sent = tests::stream::in_records_of(size, &hello());
        let client = rig.connect();
        (&client).write_all(&sent).expect("sent");
        let (_server, preamble) = accept(&rig.upstream, false);
        assert_eq!(preamble.hello, sent, "records of {size} bytes");
    }
}

#[test]
fn a_listener_of_mode_tcp_forwards_what_is_no_tls() {
    let _turn = beside_others();
    let git = "[listeners.git]\nmode = \"tcp\"\nbind = [\"198.51.100.1:2222\"]\nupstream = \"git\"\n\
               [upstreams.git]\ntargets = [\"100.64.0.2:22\"]\nsend_proxy = \"v1\"";
    let rig = rig(&Config::new("auto").more(git));
    let ssh = rig.net.cluster.listen(&format!("{}:22", CLUSTER[0]));
    let client = rig.net.client.connect("198.51.100.1:2222".parse().expect("an address")).expect("accepted");
    // The server speaks first: its banner must not wait for the client.
    let server = accept_within(&ssh, PATIENCE).expect("dialled before the client said anything");
    (&server).write_all(b"SSH-2.0-x\r\n").expect("sent");
    let mut banner = [0; 11];
    std::io::Read::read_exact(&mut &client, &mut banner).expect("the banner comes through");
    assert_eq!(&banner, b"SSH-2.0-x\r\n");
    let line = format!("PROXY TCP4 {} {} ", CLIENT[0], ENTRANCE[0]);
    let mut header = vec![0; line.len()];
    std::io::Read::read_exact(&mut &server, &mut header).expect("a PROXY header");
    assert_eq!(String::from_utf8_lossy(&header), line);
    assert_eq!(server.peer_addr().expect("connected").ip().to_string(), ENTRANCE_INSIDE[0]);
}

#[test]
fn networks_of_ipv4_addresses_match_however_they_are_written() {
    let _turn = beside_others();
    for rules in ["deny = [\"::ffff:198.51.100.0/120\"]", "allow = [\"::ffff:203.0.113.0/120\"]"] {
        let rig = rig(&Config::new("auto").listener(rules));
        closed_without_a_word(&rig.connect());
        rig.daemon.wait_metric("dataplane_connections_rejected_total", &[("reason", "client_denied")], 1.0);
    }
    let rig =
        rig(&Config::new("auto").listener("accept_proxy = [\"::ffff:198.51.100.0/120\"]\ndeny = [\"203.0.113.0/24\"]"));
    let mut client = rig.connect();
    client.write_all(&hello()).expect("sent");
    closed_without_a_word(&client);
    rig.daemon.wait_metric("dataplane_connections_rejected_total", &[("reason", "proxy_header")], 1.0);
    // And so do addresses that a PROXY header writes as IPv6.
    let mut client = rig.connect();
    client.write_all(b"PROXY TCP6 ::ffff:203.0.113.9 ::ffff:198.51.100.1 1 443\r\n").expect("sent");
    closed_without_a_word(&client);
    rig.daemon.wait_metric("dataplane_connections_rejected_total", &[("reason", "client_denied")], 1.0);
}

#[test]
fn what_is_kept_and_logged_of_an_endless_list_of_protocols_is_bounded() {
    let _turn = beside_others();
    let rig = rig(&Config::new("auto").limits("hello_max_bytes = 65536"));
    let long = "\u{1}".repeat(255);
    let few: Vec<&str> = vec![&long; 62];
    let many: Vec<&str> = vec!["x"; 7_000];
    for (n, protocols) in [few, many].iter().enumerate() {
        let mut client = rig.connect();
        let hello = client_hello(Some(HOST), protocols);
        client.write_all(&hello).expect("sent");
        let (server, preamble) = accept(&rig.upstream, false);
        assert_eq!(preamble.hello, hello, "it is forwarded as it came");
        let shown = &rig.daemon.json(&["connections", "--json"])[0]["alpn"];
        let shown = shown.as_str().expect("what it offers");
        assert!(shown.len() <= 110 && shown.ends_with("..."), "{shown}");
        drop((client, server));
        rig.daemon.wait_metric("dataplane_connections_closed_total", &[], n as f64 + 1.0);
    }
    for line in rig.daemon.wait_log(&["\"target\":\"access\""]) {
        assert!(line.len() < 1500, "{} bytes of log", line.len());
    }
}

/// Refusals, many times what a window of the log has.
const MANY: usize = 1000;

#[test]
fn strangers_cannot_fill_the_log_with_refusals_and_none_goes_uncounted() {
    let _turn = beside_others();
    let rig = rig(&Config::new("auto"));
    let stranger = client_hello(Some("wiki.example.com"), &[]);
    for _ in 0..MANY {
        let mut client = rig.connect();
        client.write_all(&stranger).expect("sent");
        assert_eq!(read_to_end(&client, PATIENCE).1, End::Fin);
    }
    rig.daemon.wait_metric("dataplane_connections_rejected_total", &[("reason", "unknown_host")], MANY as f64);
    // However many windows that took, each line and each that was left out is told once.
    tests::eventually(PATIENCE * 3, "the log tells of all", || {
        let lines = rig.daemon.access_log();
        let one_by_one = lines.iter().filter(|line| line.contains("\"rejected\":\"unknown_host\"")).count();
        let told: usize = lines
            .iter()
            .filter_map(|line| line.split_once("\"left_out\":\"unknown_host ")?.1.split_once('"'))
            .map(|(count, _)| count.parse::<usize>().expect("a number"))
            .sum();
        assert!(one_by_one < MANY, "{one_by_one} lines");
        (one_by_one + told == MANY).then_some(())
    });
}

#[test]
fn a_refused_host_is_refused_although_a_wildcard_covers_it_on_every_kind_of_listener() {
    let _turn = beside_others();
    let refuse = "[[routes]]\nhosts = [\"secret.apps.example.com\", \"*.inside.apps.example.com\"]\naction = \"refuse\"\n\
                  [listeners.web]\nmode = \"http\"\nbind = [\"198.51.100.1:80\"]\n";
    let rig = rig(&Config::new("auto").more(refuse));
    for name in ["secret.apps.example.com", "a.inside.apps.example.com", "a.b.inside.apps.example.com"] {
        refused(&rig, &client_hello(Some(name), &["h2"]), "unknown_host", Some(UNRECOGNIZED_NAME));
    }
    let mut client = rig.connect();
    client.write_all(&client_hello(Some("open.apps.example.com"), &[])).expect("sent");
    accept(&rig.upstream, false);
    for (name, answered) in [("secret.apps.example.com", false), ("open.apps.example.com", true)] {
        let mut client = rig.net.client.connect((ENTRANCE[0].parse::<std::net::IpAddr>().unwrap(), 80).into()).unwrap();
        client.write_all(format!("GET / HTTP/1.1\r\nHost: {name}\r\n\r\n").as_bytes()).expect("sent");
        let (answer, _) = read_to_end(&client, PATIENCE);
        assert_eq!(answer.starts_with(b"HTTP/1.1 308"), answered, "{name}: {}", answer.escape_ascii());
    }
    let said = |args: &[&str]| String::from_utf8_lossy(&rig.daemon.cli(args).stdout).into_owned();
    let explained = said(&["explain", "x.inside.apps.example.com", "--listener", "public"]);
    assert!(explained.contains("`action = \"refuse\"` says so: `*.inside.apps.example.com`"), "{explained}");
    assert!(said(&["status"]).contains("secret.apps.example.com *.inside.apps.example.com -> refused"));
    let routes = rig.daemon.json(&["status", "--json"])["routes"].clone();
    assert!(routes.as_array().unwrap().iter().any(|r| r["action"] == "refuse" && r["upstream"].is_null()), "{routes}");
}
