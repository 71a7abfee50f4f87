//! Port 80: one request a connection; ACME challenges for listed hosts reach the cluster, nothing
//! else does.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tests::daemon::{Config, HOST, ROUTE};
use tests::netns::{CLIENT, CLUSTER, ENTRANCE};
use tests::peers::certificate;
use tests::rig::{PATIENCE, Rig, Server, accept_within, hello};
use tests::stream::{End, Pattern, never_hang, read_to_end, reset, reset_within, send_in_segments};
use tests::{alone, beside_others, eventually};

/// "At once" on a busy machine; the deadline that it is told from, `hello_timeout`, is 5 s.
const AT_ONCE: Duration = Duration::from_secs(4);
const TOKEN: &str = "/.well-known/acme-challenge/LoqXcYV8q5ONbJQxbmR7SCTNo3tiAXDfowyjxAjEuX0";

/// The usual configuration, and a listener on port 80.
fn config() -> Config {
    Config::new("auto").more("[listeners.web]\nmode = \"http\"\nbind = [\"198.51.100.1:80\", \"[2001:db8:1::1]:80\"]")
}

/// The rig, and the port of the cluster host that answers challenges.
fn rig(config: &Config) -> (Rig, TcpListener) {
    let rig = Rig::new(config);
    let acme = rig.net.cluster.listen(&format!("{}:80", CLUSTER[0]));
    (rig, acme)
}

fn port_80() -> SocketAddr {
    format!("{}:80", ENTRANCE[0]).parse().expect("an address")
}

#[track_caller]
fn connect(rig: &Rig) -> TcpStream {
    let client = rig.net.client.connect(port_80()).expect("the daemon accepts");
    never_hang(&client);
    client
}

/// A client that has sent this.
#[track_caller]
fn send(rig: &Rig, bytes: impl AsRef<[u8]>) -> TcpStream {
    let client = connect(rig);
    (&client).write_all(bytes.as_ref()).expect("sent");
    client
}

fn request(method: &str, target: &str, host: &str) -> String {
    format!("{method} {target} HTTP/1.1\r\nHost: {host}\r\nX-Own: 1\r\n\r\n")
}

fn challenge() -> String {
    request("GET", TOKEN, HOST)
}

/// What an upstream gets of [`challenge`].
fn passed_on() -> String {
    format!("GET {TOKEN} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n")
}

fn read_head(mut stream: &TcpStream) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && matches!(stream.read(&mut byte), Ok(1)) {
        head.push(byte[0]);
    }
    String::from_utf8_lossy(&head).into_owned()
}

#[track_caller]
fn accept(listener: &TcpListener) -> TcpStream {
    accept_within(listener, PATIENCE).expect("a challenge reaches the cluster")
}

/// Sends it and expects a plain close, at once, and not a single TCP segment to the cluster.
#[track_caller]
fn refused(rig: &Rig, bytes: impl AsRef<[u8]>, reason: &str) {
    let labels = [("listener", "web"), ("reason", reason)];
    let count = || rig.daemon.metric("dataplane_connections_rejected_total", &labels);
    let before = (count(), rig.net.cluster.tcp_segments_received());
    let start = Instant::now();
    let client = send(rig, &bytes);
    let shown = bytes.as_ref().escape_ascii();
    assert_eq!(read_to_end(&client, PATIENCE), (Vec::new(), End::Fin), "{shown}");
    assert!(start.elapsed() < AT_ONCE, "{shown}: only after {:?}", start.elapsed());
    rig.daemon.wait_metric("dataplane_connections_rejected_total", &labels, before.0 + 1.0);
    assert_eq!(rig.net.cluster.tcp_segments_received(), before.1, "{shown}: the cluster got a TCP segment");
}

/// Sends it and expects to be sent there, without a TCP segment to the cluster.
#[track_caller]
fn redirected(rig: &Rig, bytes: impl AsRef<[u8]>, location: &str) {
    let before = rig.net.cluster.tcp_segments_received();
    let client = send(rig, &bytes);
    let (answer, end) = read_to_end(&client, PATIENCE);
    let expected = format!(
        "HTTP/1.1 308 Permanent Redirect\r\nLocation: {location}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    );
    assert_eq!(String::from_utf8_lossy(&answer), expected, "{}", bytes.as_ref().escape_ascii());
    assert_eq!(end, End::Fin);
    assert_eq!(rig.net.cluster.tcp_segments_received(), before, "the cluster got a TCP segment");
}

#[test]
fn a_challenge_reaches_the_acme_port_with_a_proxy_header_and_its_answer_ends_the_connection() {
    let _turn = beside_others();
    let config = Config::new("auto")
        .more("[listeners.web]\nmode = \"http\"\nbind = [\"198.51.100.1:80\"]\nacme_port = 8080")
        .upstream("send_proxy = \"v1\"");
    let rig = Rig::new(&config);
    let acme = rig.net.cluster.listen(&format!("{}:8080", CLUSTER[0]));
    let client = send(&rig, challenge());
    let server = accept(&acme);
    let port = client.local_addr().expect("bound").port();
    let head = format!("PROXY TCP4 {} {} {port} 80\r\n{}", CLIENT[0], ENTRANCE[0], passed_on());
    assert_eq!(read_head(&server), head);

    let connections = rig.daemon.json(&["connections", "--json"]);
    let shown = &connections[0];
    assert_eq!(shown["listener"], "web");
    assert_eq!(shown["server_name"], HOST);
    assert_eq!(shown["route"], ROUTE);
    assert_eq!(shown["engine"], "copy");

    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc";
    (&server).write_all(answer).expect("sent");
    drop(server);
    assert_eq!(read_to_end(&client, PATIENCE), (answer.to_vec(), End::Fin));
    drop(client);
    rig.daemon.wait_metric("dataplane_connections_closed_total", &[("route", ROUTE), ("reason", "done")], 1.0);
    let bytes =
        |direction| rig.daemon.metric("dataplane_bytes_total", &[("route", ROUTE), ("direction", direction)]) as usize;
    assert_eq!(bytes("to_upstream"), passed_on().len());
    assert_eq!(bytes("to_client"), answer.len());
    rig.daemon.wait_metric("dataplane_connections_accepted_total", &[("listener", "web")], 1.0);
}

#[test]
fn nothing_that_follows_the_challenge_is_ever_passed_on() {
    let _turn = beside_others();
    let (rig, acme) = rig(&config());
    let second = request("GET", "/admin", HOST);
    let client = send(&rig, challenge() + &second);
    let server = accept(&acme);
    assert_eq!(read_head(&server), passed_on());
    // More of it while the answer is under way, and after it.
    for _ in 0..20 {
        (&client).write_all(second.as_bytes()).expect("sent");
    }
    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\n";
    (&server).write_all(answer).expect("sent");
    let mut head = vec![0; answer.len()];
    (&client).read_exact(&mut head).expect("the answer comes through");
    (&client).write_all(second.as_bytes()).expect("sent");
    (&server).write_all(b"ok").expect("sent");
    server.shutdown(std::net::Shutdown::Write).expect("connected");
    assert_eq!(read_to_end(&client, PATIENCE), (b"ok".to_vec(), End::Fin));
    drop(client);
    assert_eq!(read_to_end(&server, PATIENCE), (Vec::new(), End::Fin), "not a byte more than the one head");
    rig.wait_idle();
    assert!(accept_within(&acme, Duration::ZERO).is_none());
}

#[test]
fn a_client_that_has_said_all_and_closed_its_side_still_gets_its_answer() {
    let _turn = beside_others();
    let (rig, acme) = rig(&config());
    let client = send(&rig, challenge());
    client.shutdown(std::net::Shutdown::Write).expect("connected");
    let server = accept(&acme);
    assert_eq!(read_head(&server), passed_on());
    // The upstream must not take it for a client that went away: Go's server would give up on it.
    server.set_read_timeout(Some(Duration::from_millis(300))).expect("a time limit");
    let silence = (&server).read(&mut [0]).expect_err("neither a byte nor a FIN");
    assert_eq!(silence.kind(), std::io::ErrorKind::WouldBlock);
    (&server).write_all(b"answer").expect("sent");
    drop(server);
    assert_eq!(read_to_end(&client, PATIENCE), (b"answer".to_vec(), End::Fin));
}

#[test]
fn a_long_answer_to_a_slow_reader_arrives_whole() {
    let _turn = beside_others();
    let (rig, acme) = rig(&config());
    let client = send(&rig, challenge());
    let server = accept(&acme);
    assert_eq!(read_head(&server), passed_on());
    let (pattern, length) = (Pattern::new(5), 20_000_000);
    std::thread::scope(|s| {
        s.spawn(|| {
            pattern.send(&server, 0, length).expect("sent");
            server.shutdown(std::net::Shutdown::Write).expect("connected");
        });
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!(pattern.receive(&client, 0), (length, End::Fin));
    });
}

#[test]
fn an_answer_that_breaks_off_ends_in_a_reset_and_so_does_a_request() {
    let _turn = beside_others();
    let (rig, acme) = rig(&config());
    let client = send(&rig, challenge());
    let server = accept(&acme);
    read_head(&server);
    (&server).write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n").expect("sent");
    let mut some = [0; 15];
    (&client).read_exact(&mut some).expect("the beginning of an answer");
    reset(server);
    assert_eq!(read_to_end(&client, PATIENCE).1, End::Reset);

    let client = send(&rig, challenge());
    let server = accept(&acme);
    read_head(&server);
    reset(client);
    assert!(reset_within(&server, PATIENCE).is_some(), "a client that is gone takes its request back");
    for reason in ["upstream_reset", "client_reset"] {
        rig.daemon.wait_metric("dataplane_connections_closed_total", &[("reason", reason)], 1.0);
    }
}

#[test]
fn an_answer_that_does_not_end_is_cut() {
    let _turn = beside_others();
    let (rig, acme) = rig(&config().limits("idle_timeout = \"1s\""));
    let client = send(&rig, challenge());
    let server = accept(&acme);
    read_head(&server);
    assert_eq!(read_to_end(&client, PATIENCE), (Vec::new(), End::Reset));
    assert!(reset_within(&server, PATIENCE).is_some());
    rig.daemon.wait_metric("dataplane_connections_closed_total", &[("reason", "idle")], 1.0);
}

#[test]
fn everything_else_for_a_listed_host_is_sent_to_https() {
    let _turn = beside_others();
    let (rig, acme) = rig(&config());
    for (method, target) in [
        ("GET", "/"),
        ("GET", "/a?b=c"),
        ("POST", "/form"),
        ("GET", "/.well-known/acme-challenge/../x"),
        ("POST", TOKEN),
    ] {
        redirected(&rig, request(method, target, HOST), &format!("https://{HOST}{target}"));
    }
    redirected(&rig, request("GET", "/", "A.B.apps.EXAMPLE.com.:80"), "https://a.b.apps.example.com/");
    redirected(&rig, request("GET", &format!("http://{HOST}/x"), HOST), &format!("https://{HOST}/x"));
    let with_body = format!("GET {TOKEN} HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 5\r\n\r\nhello");
    redirected(&rig, with_body, &format!("https://{HOST}{TOKEN}"));
    // A body that is longer than what anybody reads must not cost the client its answer.
    let upload = format!("POST /up HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 100000\r\n\r\n{}", "x".repeat(100_000));
    redirected(&rig, upload, &format!("https://{HOST}/up"));
    rig.daemon.wait_metric("dataplane_http_redirects_total", &[("listener", "web")], 9.0);
    assert!(accept_within(&acme, Duration::ZERO).is_none());
    let redirected = |line: &&String| line.contains("\"redirected\"") && line.contains("\"listener\":\"web\"");
    eventually(PATIENCE, "a line in the log for each of them", || {
        (rig.daemon.access_log().iter().filter(redirected).count() == 9).then_some(())
    });
}

#[test]
fn a_real_client_follows_the_redirection_to_the_page() {
    let _turn = beside_others();
    let net = tests::netns::Net::new();
    let pem = certificate(&net, &[HOST]);
    let path = pem.display();
    let server = format!(
        "listen {}:443 ssl; ssl_certificate {path}; ssl_certificate_key {path}; location / {{ return 200 $request_method$uri; }}",
        CLUSTER[0]
    );
    let _nginx = tests::peers::Peer::nginx(&net, &net.cluster, &format!("http {{ server {{ {server} }} }}"));
    let _daemon = tests::daemon::Daemon::start(&net, &config());
    for (entrance, post) in [(ENTRANCE[0].to_owned(), false), (format!("[{}]", ENTRANCE[1]), true)] {
        let mut command = std::process::Command::new("curl");
        command.args(["--silent", "--show-error", "--fail", "--location", "--max-time", "20", "--noproxy", "*"]);
        for port in [80, 443] {
            command.args(["--resolve", &format!("{HOST}:{port}:{entrance}")]);
        }
        command.arg("--cacert").arg(&pem).arg(format!("http://{HOST}/page"));
        if post {
            command.args(["--data", "a=b"]);
        }
        let expected = if post { "POST/page" } else { "GET/page" };
        assert_eq!(net.client.output(&mut command), expected);
    }
}

#[test]
fn who_is_not_let_through_has_a_reason_and_no_upstream_hears_of_it() {
    let _turn = beside_others();
    let (rig, acme) = rig(&config().limits("hello_max_bytes = 1024"));
    for host in ["example.com", "other.example.com", "192.0.2.1", "[2001:db8::1]:80", "apps.example.com", ""] {
        refused(&rig, request("GET", TOKEN, host), "unknown_host");
        refused(&rig, request("GET", "/", host), "unknown_host");
    }
    refused(&rig, hello(), "not_http");
    refused(&rig, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "not_http");
    refused(&rig, "SSH-2.0-x\r\n", "not_http");
    for request in [
        format!("GET {TOKEN} HTTP/1.1\r\n\r\n"),
        format!("GET {TOKEN} HTTP/1.1\r\nHost: {HOST}\r\nHost: other.example.com\r\n\r\n"),
        format!("GET {TOKEN} HTTP/1.1\r\nHost: {HOST}\r\n folded\r\n\r\n"),
        format!("GET {TOKEN} HTTP/1.1\nHost: {HOST}\n\n"),
        format!("GET {TOKEN} HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"),
        format!("GET http://other.example.com{TOKEN} HTTP/1.1\r\nHost: {HOST}\r\n\r\n"),
        format!("GET {TOKEN} HTTP/1.1\r\nHost: {HOST}\r\nX: \0\r\n\r\n"),
    ] {
        refused(&rig, request, "malformed");
    }
    refused(&rig, format!("GET / HTTP/1.1\r\nHost: {HOST}\r\nX: {}", "x".repeat(1024)), "too_large");
    drop(send(&rig, "GET / HTTP/1.1\r\nHost:"));
    reset(send(&rig, "GET /"));
    let labels = [("listener", "web"), ("reason", "closed_early")];
    rig.daemon.wait_metric("dataplane_connections_rejected_total", &labels, 2.0);
    assert!(accept_within(&acme, Duration::ZERO).is_none());
}

#[test]
fn a_head_that_comes_too_slowly_is_cut_at_the_absolute_deadline() {
    let _turn = beside_others();
    let (rig, _acme) = rig(&config().limits("hello_timeout = \"1s\""));
    let start = Instant::now();
    let client = connect(&rig);
    for byte in challenge().as_bytes().iter().take(8) {
        (&client).write_all(&[*byte]).expect("sent");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(read_to_end(&client, PATIENCE).0, b"");
    let took = start.elapsed();
    assert!((Duration::from_millis(900)..PATIENCE).contains(&took), "cut after {took:?}");
    let labels = [("listener", "web"), ("reason", "timeout")];
    rig.daemon.wait_metric("dataplane_connections_rejected_total", &labels, 1.0);
}

#[test]
fn a_head_cut_at_any_byte_or_in_single_bytes_arrives_whole() {
    let _turn = beside_others();
    let (rig, acme) = rig(&config());
    let head = challenge();
    let cuts = (1..head.len()).map(|at| vec![&head.as_bytes()[..at], &head.as_bytes()[at..]]);
    for parts in cuts.chain([head.as_bytes().chunks(1).collect()]) {
        let client = connect(&rig);
        send_in_segments(&client, parts).expect("sent");
        let server = accept(&acme);
        assert_eq!(read_head(&server), passed_on());
        drop(server);
        read_to_end(&client, PATIENCE);
    }
}

#[test]
fn an_acme_port_that_refuses_takes_nothing_from_the_target() {
    let _turn = beside_others();
    // Nothing listens on port 80 of the cluster host.
    let rig = Rig::new(&config());
    for _ in 0..3 {
        let client = send(&rig, challenge());
        assert_eq!(read_to_end(&client, PATIENCE), (Vec::new(), End::Fin));
    }
    let labels = [("listener", "web"), ("reason", "no_upstream")];
    rig.daemon.wait_metric("dataplane_connections_rejected_total", &labels, 3.0);
    assert!(rig.daemon.metric("dataplane_upstream_connect_failures_total", &[("reason", "refused")]) >= 3.0);
    rig.daemon.wait_metric("dataplane_upstream_target_up", &[], 1.0);
    rig.pair();
}

#[test]
fn the_command_line_knows_the_mode() {
    let _turn = beside_others();
    let rig = Rig::new(&config());
    let status = rig.daemon.json(&["status", "--json"]);
    let web = status["listeners"].as_array().expect("a list").iter().find(|l| l["name"] == "web").expect("listed");
    assert_eq!((web["mode"].as_str(), web["acme_port"].as_u64()), (Some("http"), Some(80)));
    let said = |args: &[&str]| String::from_utf8_lossy(&rig.daemon.cli(args).stdout).into_owned();
    assert!(said(&["status"]).contains("web (http)"), "{}", said(&["status"]));
    let check = said(&["check"]);
    assert!(check.contains("ACME challenges go to port 80") && check.contains("public,web"), "{check}");
    let explained = said(&["explain", HOST, "--listener", "web"]);
    assert!(explained.contains("308 to https") && explained.contains("port 80"), "{explained}");
    assert!(said(&["explain", "example.org"]).contains("example.org on web: rejected, `unknown_host`"));
}

/// Two hundred connections a second, some of each kind, for this long.
const STORM: Duration = Duration::from_secs(10);
const RATE: u32 = 200;

#[test]
fn two_hundred_requests_a_second_and_tls_connections_do_not_hinder_each_other() {
    let _turn = alone();
    let (rig, acme) = rig(&config().limits("hello_timeout = \"2s\""));
    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok";
    let _acme = Server::start(acme, move |stream| {
        read_head(&stream);
        let _ = (&stream).write_all(answer);
    });
    let pairs: Vec<_> = (0..20).map(|_| rig.pair()).collect();
    // What a client sends, and the first bytes of what it gets.
    let kinds: [(Vec<u8>, &[u8]); 8] = [
        (challenge().into(), answer),
        (request("GET", "/x", HOST).into(), b"HTTP/1.1 308 "),
        (request("POST", "/", "a.apps.example.com").into(), b"HTTP/1.1 308 "),
        (request("GET", TOKEN, "other.example.com").into(), b""),
        (hello(), b""),
        (format!("GET / HTTP/1.1\r\nHost: {HOST}\r\nHost: x\r\n\r\n").into(), b""),
        (vec![b'x'; 20_000], b""),
        // Never finishes: cut at the deadline.
        (b"GET / HTTP/1.1\r\nHost:".to_vec(), b""),
    ];
    let stop = AtomicBool::new(false);
    let storm = |length: Duration| {
        let begin = Instant::now();
        let count = (length.as_secs_f64() * f64::from(RATE)) as u32;
        std::thread::scope(|s| {
            // Each worker opens its share on the beat and reads the answers of those that are due,
            // without waiting for one that is slow.
            for worker in 0..4 {
                let (rig, kinds) = (&rig, &kinds);
                s.spawn(move || {
                    let mut open = Vec::new();
                    for n in (worker..count).step_by(4) {
                        let due = begin + Duration::from_secs(1) * n / RATE;
                        std::thread::sleep(due.saturating_duration_since(Instant::now()));
                        let (bytes, expected) = &kinds[(n / 4 + n) as usize % kinds.len()];
                        let client = connect(rig);
                        // One that is refused at its first byte may be closed while it still sends.
                        let _ = (&client).write_all(bytes);
                        open.push((client, *expected));
                        if open.len() > 200 {
                            check(open.remove(0));
                        }
                    }
                    open.into_iter().for_each(check);
                });
            }
        });
        begin.elapsed()
    };
    let exchange = |(client, server): &(TcpStream, TcpStream), pattern: Pattern| {
        pattern.send(client, 0, 200).expect("sent");
        pattern.receive_exactly(server, 0, 200);
        pattern.send(server, 0, 200).expect("sent");
        pattern.receive_exactly(client, 0, 200);
    };
    // The first storm brings memory to its level.
    storm(Duration::from_secs(3));
    let before = rig.daemon.pss();
    let rejected = rig.daemon.metric("dataplane_connections_rejected_total", &[("listener", "web")]);
    let (exchanges, slowest, took) = std::thread::scope(|s| {
        let tls = s.spawn(|| {
            let (mut exchanges, mut slowest) = (0_u32, Duration::ZERO);
            while !stop.load(Ordering::Relaxed) {
                for pair in &pairs {
                    let start = Instant::now();
                    exchange(pair, Pattern::new(3));
                    slowest = slowest.max(start.elapsed());
                    exchanges += 1;
                }
            }
            (exchanges, slowest)
        });
        let took = storm(STORM);
        stop.store(true, Ordering::Relaxed);
        let (exchanges, slowest) = tls.join().expect("TLS connections go on");
        (exchanges, slowest, took)
    });
    eprintln!("{exchanges} exchanges over TLS, the slowest in {slowest:?}; the storm took {took:?}");
    assert!(exchanges > 1000, "only {exchanges} exchanges in {took:?}");
    assert!(slowest < Duration::from_secs(2), "an exchange took {slowest:?}");
    let now = rig.daemon.metric("dataplane_connections_rejected_total", &[("listener", "web")]);
    assert!(now - rejected >= f64::from(RATE) * STORM.as_secs_f64() / 2.0, "five kinds of eight are refused");
    drop(pairs);
    rig.wait_idle();
    eventually(PATIENCE, "memory is what it was", || {
        let after = rig.daemon.pss();
        (after < before + (2 << 20)).then_some(())
    });
    eventually(PATIENCE, "its sockets go", || (rig.net.entrance.tcp_sockets().len() < 20).then_some(()));
}

#[track_caller]
fn check((client, expected): (TcpStream, &[u8])) {
    let (answer, _) = read_to_end(&client, PATIENCE);
    let begins = answer.get(..expected.len()) == Some(expected);
    assert!(
        begins && (answer.is_empty() == expected.is_empty()),
        "{} for {}",
        answer.escape_ascii(),
        expected.escape_ascii()
    );
}
