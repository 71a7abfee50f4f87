//! What the machine promises, on requests of browsers and ACME servers and on requests that two
//! programs could read in two ways.

use bytes::BufMut;
use proptest::prelude::*;

use super::*;

const MAX_BYTES: usize = 16384;
/// As Let's Encrypt sends it.
const CHALLENGE: &str = "GET /.well-known/acme-challenge/dG9rZW4_-x HTTP/1.1\r\n\
    Host: blog.example.com\r\n\
    User-Agent: Mozilla/5.0 (compatible; Let's Encrypt validation server; +https://www.letsencrypt.org)\r\n\
    Accept: */*\r\nAccept-Encoding: gzip\r\nConnection: close\r\n\r\n";
const PASSED_ON: &str = "GET /.well-known/acme-challenge/dG9rZW4_-x HTTP/1.1\r\n\
    Host: blog.example.com\r\n\
    User-Agent: Mozilla/5.0 (compatible; Let's Encrypt validation server; +https://www.letsencrypt.org)\r\n\
    Connection: close\r\n\r\n";

#[derive(Debug, Clone, PartialEq)]
enum Answer {
    NeedMore,
    /// No host that could be listed.
    Nameless,
    PassOn(String),
    /// `Location`
    Redirect(String),
    Reject(Reason),
}

impl From<Progress<'_>> for Answer {
    fn from(progress: Progress<'_>) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match progress {
            Progress::NeedMore => Self::NeedMore,
            Progress::Reject(reason) => Self::Reject(reason),
            Progress::Request(request) => match (request.challenge(), request.host) {
                (_, None) => Self::Nameless,
                (Some(head), Some(_)) => Self::PassOn(text(head)),
                (None, Some(host)) => {
                    let answer = text(&request.redirect(&host));
                    let location = answer.strip_prefix("HTTP/1.1 308 Permanent Redirect\r\nLocation: ").unwrap();
                    let location = location.strip_suffix("\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").unwrap();
                    Self::Redirect(location.to_owned())
                }
            },
        }
    }
}

fn answer(bytes: impl AsRef<[u8]>) -> Answer {
    Machine::new(MAX_BYTES).input(Input::Bytes(bytes.as_ref())).into()
}

/// The answer to a request with these header lines, Host included.
fn with(request_line: &str, lines: &[&str]) -> Answer {
    answer(format!("{request_line}\r\n{}\r\n", lines.iter().map(|line| format!("{line}\r\n")).collect::<String>()))
}

/// The answer to `GET / HTTP/1.1` for this Host.
fn host(host: &str) -> Answer {
    with("GET / HTTP/1.1", &[&format!("Host: {host}")])
}

/// The answer to a GET of this target at `a.example`.
fn get(target: &str) -> Answer {
    with(&format!("GET {target} HTTP/1.1"), &["Host: a.example"])
}

fn to(location: &str) -> Answer {
    Answer::Redirect(location.to_owned())
}

const MALFORMED: Answer = Answer::Reject(Reason::Malformed);
const NOT_HTTP: Answer = Answer::Reject(Reason::NotHttp);

#[test]
fn a_challenge_is_written_anew_with_nothing_but_what_it_needs() {
    assert_eq!(answer(CHALLENGE), Answer::PassOn(PASSED_ON.to_owned()));
    let head = CHALLENGE.replace("GET", "HEAD").replace("HTTP/1.1", "HTTP/1.0");
    assert_eq!(answer(head), Answer::PassOn(PASSED_ON.replace("GET", "HEAD").replace("HTTP/1.1", "HTTP/1.0")));
    let dressed_up = CHALLENGE.replace(
        "Accept: */*\r\n",
        "X-Forwarded-For: 10.0.0.1\r\nConnection: keep-alive, X-Real-Ip\r\nX-Real-Ip: 10.0.0.1\r\nUpgrade: h2c\r\n\
         Expect: 100-continue\r\nContent-Length: 0\r\nCookie: a=b\r\n",
    );
    assert_eq!(answer(dressed_up), Answer::PassOn(PASSED_ON.to_owned()));
    let odd_host = CHALLENGE.replace("blog.example.com", "BLOG.Example.com.:80");
    assert_eq!(answer(odd_host), Answer::PassOn(PASSED_ON.to_owned()), "the name is passed on as it was looked up");
}

#[test]
fn only_the_exact_path_of_a_challenge_is_one() {
    for target in [
        "/.well-known/acme-challenge/",
        "/.well-known/acme-challenge",
        "/.well-known/acme-challenge/../secret",
        "/.well-known/acme-challenge/..",
        "/.well-known/acme-challenge/%2e%2e/secret",
        "/.well-known/acme-challenge/token/../../x",
        "/.well-known/acme-challenge/token/",
        "/.well-known/acme-challenge//token",
        "/.well-known/acme-challenge/token?x=/../secret",
        "/.well-known/acme-challenge/token#x",
        "/.well-known/acme-challenge/token;x",
        "/.well-known/acme-challenge/to%6ben",
        "/.well-known/acme-challenge/token\\..\\x",
        "/.well-known/./acme-challenge/token",
        "//.well-known/acme-challenge/token",
        "/.Well-Known/acme-challenge/token",
        "/%2ewell-known/acme-challenge/token",
        "/x/.well-known/acme-challenge/token",
        "/",
    ] {
        assert_eq!(get(target), to(&format!("https://a.example{target}")));
    }
}

#[test]
fn a_challenge_is_a_get_or_a_head_without_a_body() {
    let path = "/.well-known/acme-challenge/token";
    let redirect = to(&format!("https://a.example{path}"));
    for method in ["POST", "PUT", "OPTIONS", "get", "GETT"] {
        assert_eq!(with(&format!("{method} {path} HTTP/1.1"), &["Host: a.example"]), redirect, "{method}");
    }
    for body in ["Content-Length: 5", "Content-Length: 0005", "Transfer-Encoding: chunked", "transfer-encoding: x"] {
        assert_eq!(with(&format!("GET {path} HTTP/1.1"), &["Host: a.example", body]), redirect, "{body}");
    }
}

#[test]
fn everything_else_is_sent_to_https_with_its_path_and_query() {
    assert_eq!(get("/a/b?c=d&e"), to("https://a.example/a/b?c=d&e"));
    assert_eq!(get("//evil.example/x"), to("https://a.example//evil.example/x"));
    assert_eq!(with("POST /form HTTP/1.1", &["Host: a.example", "Content-Length: 5"]), to("https://a.example/form"));
    assert_eq!(with("OPTIONS * HTTP/1.1", &["Host: a.example"]), to("https://a.example/"));
    assert_eq!(with("GET / HTTP/1.0", &["Host: a.example"]), to("https://a.example/"));
}

#[test]
fn hosts_are_names_in_lower_case_without_port_and_trailing_dot() {
    for text in
        ["blog.example.com", "BLOG.Example.COM", "blog.example.com.", "blog.example.com:80", "blog.example.com.:8080"]
    {
        assert_eq!(host(text), to("https://blog.example.com/"), "{text}");
    }
    assert_eq!(host("blog.example.com:"), to("https://blog.example.com/"), "RFC 3986 allows an empty port");
    assert_eq!(with("GET / HTTP/1.1", &["hOsT:\t a.example \t"]), to("https://a.example/"));
}

#[test]
fn an_address_or_nothing_is_no_name_that_could_be_listed() {
    for text in ["192.0.2.1", "192.0.2.1:80", "[2001:db8::1]", "[2001:db8::1]:80", "[::ffff:192.0.2.1]", "", ":80"] {
        assert_eq!(host(text), Answer::Nameless, "{text}");
    }
    assert_eq!(with("GET / HTTP/1.0", &[]), Answer::Nameless, "HTTP/1.0 knows no Host");
}

#[test]
fn what_is_no_host_is_malformed() {
    for text in [
        "a b.example",
        "a.example, b.example",
        "user@a.example",
        "a.example:80:80",
        "a.example:x",
        "a.example:+80",
        "a.example:65536",
        "a..example",
        "a.example/x",
        "http://a.example",
        "[::1",
        "[::1]x",
        "[a.example]",
        "2001:db8::1",
        "b\u{fc}cher.example",
        "%61.example",
        "a.example\u{0}",
        "*.example",
    ] {
        assert_eq!(host(text), MALFORMED, "{text}");
    }
}

#[test]
fn there_is_one_host() {
    assert_eq!(with("GET / HTTP/1.1", &[]), MALFORMED, "RFC 9112 section 3.2");
    assert_eq!(with("GET / HTTP/1.1", &["Host: a.example", "Host: b.example"]), MALFORMED);
    assert_eq!(with("GET / HTTP/1.1", &["Host: a.example", "HOST: a.example"]), MALFORMED);
    assert_eq!(with("GET / HTTP/1.1", &["Host : a.example"]), MALFORMED);
    assert_eq!(with("GET / HTTP/1.1", &["Host: a.example", "Host : b.example"]), MALFORMED);
}

#[test]
fn an_absolute_target_must_agree_with_the_host() {
    let token = "/.well-known/acme-challenge/token";
    for scheme in ["http", "HTTP", "https"] {
        assert_eq!(get(&format!("{scheme}://a.example/x?y")), to("https://a.example/x?y"));
        assert_eq!(get(&format!("{scheme}://A.example.:80")), to("https://a.example/"));
        let Answer::PassOn(head) = get(&format!("{scheme}://a.example{token}")) else { panic!("{scheme}") };
        assert_eq!(head, format!("GET {token} HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n"));
    }
    assert_eq!(with("GET http://a.example/ HTTP/1.0", &[]), to("https://a.example/"));
    assert_eq!(with("GET http://a.example/ HTTP/1.1", &[]), MALFORMED);
    for target in [
        "http://b.example/",
        "http://user@a.example/",
        "http://a.example?x",
        "http://",
        "http:///x",
        "ftp://a.example/",
        "a.example",
        "a.example:80",
        "*",
        "x/y",
        "/b\u{fc}cher",
    ] {
        assert_eq!(get(target), MALFORMED, "{target}");
    }
    assert_eq!(with("CONNECT a.example:443 HTTP/1.1", &["Host: a.example:443"]), MALFORMED);
}

#[test]
fn lines_end_in_cr_lf_and_nowhere_else() {
    for text in [
        "GET / HTTP/1.1\nHost: a.example\n\n",
        "GET / HTTP/1.1\r\nHost: a.example\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.example\r\n\n",
        "GET / HTTP/1.1\r\nHost: a.example\rX: y\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.example\r\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.example\r\n\r\r",
        "GET / HTTP/1.1\r\nHost: a.example\0\r\n\r\n",
        "GET /\0 HTTP/1.1\r\nHost: a.example\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.example\r\nX: y\0z\r\n\r\n",
    ] {
        assert_eq!(answer(text), MALFORMED, "{}", text.escape_debug());
    }
}

#[test]
fn folded_lines_and_what_is_no_header_are_malformed() {
    for line in [" folded", "\tfolded", "no colon", ": no name", "na me: x", "na\u{fc}me: x", "x: \u{1}", "(x): y"] {
        assert_eq!(with("GET / HTTP/1.1", &["Host: a.example", line]), MALFORMED, "{line}");
        assert_eq!(with("GET / HTTP/1.1", &[line, "Host: a.example"]), MALFORMED, "{line} first");
    }
    for line in ["GET  / HTTP/1.1", "GET /  HTTP/1.1", "GET / x HTTP/1.1", "GET\t/ HTTP/1.1"] {
        let refused = with(line, &["Host: a.example"]);
        assert!(matches!(refused, Answer::Reject(Reason::Malformed | Reason::NotHttp)), "{line}: {refused:?}");
    }
}

#[test]
fn lengths_that_can_be_read_in_two_ways_are_malformed() {
    for lines in [
        &["Content-Length: 5", "Transfer-Encoding: chunked"][..],
        &["Transfer-Encoding: chunked", "Content-Length: 0"],
        &["Content-Length: 5", "Content-Length: 6"],
        &["Content-Length: 5", "content-length: 5"],
        &["Content-Length: 5, 5"],
        &["Content-Length: +5"],
        &["Content-Length: -1"],
        &["Content-Length: 0x5"],
        &["Content-Length:"],
        &["Transfer-Encoding: chunked", "Transfer-Encoding: identity"],
    ] {
        let lines = [&["Host: a.example"][..], lines].concat();
        assert_eq!(with("POST / HTTP/1.1", &lines), MALFORMED, "{lines:?}");
    }
}

#[test]
fn other_protocols_are_refused_with_the_first_byte_that_tells() {
    for text in [
        "\x16",
        "SSH-2.0-OpenSSH_9.2\r",
        "PROXY-TCP4-and-so-on-",
        "\r",
        "\n",
        " ",
        "\0",
        "GET/",
        "EHLO mail.example\r\n",
        "PRI * HTTP/2.0\r\n",
        "GET / HTTP/2.0\r\n",
        "GET / HTTP/1.2\r\n",
        "GET / HTTP/0.9\r\n",
        "GET / http/1.1\r\n",
        "GET /\r\n",
    ] {
        assert_eq!(answer(text), NOT_HTTP, "{}", text.escape_debug());
        assert_eq!(answer(&text[..text.len() - 1]), Answer::NeedMore, "{}", text.escape_debug());
    }
    assert_eq!(answer("\x16\x03\x01\x02\x00\x01"), NOT_HTTP, "a TLS hello");
    assert_eq!(answer("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), NOT_HTTP);
}

#[test]
fn what_follows_the_head_changes_nothing_and_is_not_passed_on() {
    for rest in ["GET /admin HTTP/1.1\r\nHost: intern.example\r\n\r\n", "\0", "x", "\r\n"] {
        assert_eq!(answer(format!("{CHALLENGE}{rest}")), answer(CHALLENGE));
    }
}

#[test]
fn a_head_cut_at_any_byte_and_one_in_single_bytes_read_the_same() {
    let expected = answer(CHALLENGE);
    for at in 0..CHALLENGE.len() {
        let mut machine = Machine::new(MAX_BYTES);
        let (first, second) = CHALLENGE.as_bytes().split_at(at);
        assert_eq!(machine.input(Input::Bytes(first)), Progress::NeedMore, "the first {at} bytes");
        assert_eq!(Answer::from(machine.input(Input::Bytes(second))), expected, "cut after {at}");
    }
    let mut machine = Machine::new(MAX_BYTES);
    for byte in CHALLENGE.as_bytes() {
        assert_eq!(machine.progress(), Progress::NeedMore);
        machine.buffer_mut().put_u8(*byte);
        machine.input(Input::Bytes(&[]));
    }
    assert_eq!(Answer::from(machine.progress()), expected);
}

#[test]
fn a_head_has_as_many_bytes_as_allowed_and_a_hundred_headers() {
    let whole = |max: usize| Answer::from(Machine::new(max).input(Input::Bytes(CHALLENGE.as_bytes())));
    assert_eq!(whole(CHALLENGE.len()), answer(CHALLENGE));
    assert_eq!(whole(CHALLENGE.len() - 1), Answer::Reject(Reason::TooLarge));
    let mut machine = Machine::new(1024);
    let mut read = 0;
    while machine.progress() == Progress::NeedMore {
        let next = if read < 4 { b"GET "[read] } else { b'a' };
        assert!(machine.buffer_mut().has_remaining_mut(), "room for what is still needed");
        machine.buffer_mut().put_u8(next);
        read += 1;
        machine.input(Input::Bytes(&[]));
    }
    assert_eq!((machine.progress(), read), (Progress::Reject(Reason::TooLarge), 1024));
    let many = |n: usize| with("GET / HTTP/1.1", &[&["Host: a.example"][..], &vec!["a: b"; n - 1]].concat());
    assert_eq!(many(100), to("https://a.example/"));
    assert_eq!(many(101), Answer::Reject(Reason::TooLarge));
}

#[test]
fn a_verdict_is_final_and_an_end_before_it_has_its_reason() {
    let after = |bytes: &str, input| {
        let mut machine = Machine::new(MAX_BYTES);
        machine.input(Input::Bytes(bytes.as_bytes()));
        Answer::from(machine.input(input))
    };
    assert_eq!(after("GET /", Input::Timeout), Answer::Reject(Reason::Timeout));
    assert_eq!(after("GET /", Input::Closed), Answer::Reject(Reason::ClosedEarly));
    for input in [Input::Timeout, Input::Closed, Input::Bytes(b"\0")] {
        assert_eq!(after(CHALLENGE, input), answer(CHALLENGE));
        assert_eq!(after("\x16", input), NOT_HTTP);
    }
}

proptest! {
    #[test]
    fn no_cut_changes_the_answer(
        pieces in prop::collection::vec(prop::sample::select(vec![
            "GET ", "/", " HTTP/1.1", "\r\n", "\n", "\r", "Host: a.example", "Host: [::1]", "x: y", " ", "\0", ":", "\u{fc}",
            "/.well-known/acme-challenge/t", "http://a.example", "Content-Length: 1", "Transfer-Encoding: chunked",
        ]), 0..12),
        at in any::<prop::sample::Index>(),
    ) {
        let bytes = pieces.concat().into_bytes();
        let (first, second) = bytes.split_at(at.index(bytes.len() + 1));
        let mut machine = Machine::new(MAX_BYTES);
        machine.input(Input::Bytes(first));
        prop_assert_eq!(Answer::from(machine.input(Input::Bytes(second))), answer(&bytes));
    }
}
