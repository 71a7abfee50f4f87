//! What the machine promises, on hellos of real clients and on hellos that no client should send.

use bytes::BufMut;
use proptest::prelude::*;
use tls_parser::{TlsExtension, TlsMessage, TlsMessageHandshake, TlsVersion};

use super::*;

const MAX_BYTES: usize = 16384;
/// Room for a capture in records of one byte.
const AMPLE: usize = 1 << 16;

const TLS10: u16 = 0x0301;
const TLS11: u16 = 0x0302;
const TLS12: u16 = 0x0303;
const TLS13: u16 = 0x0304;
/// Stands for any GREASE value (RFC 8701): clients draw them at random.
const GREASE: u16 = 0x0a0a;

/// A hello as it was captured (see testdata/hello/README.md), and what it is known to offer.
struct Capture {
    name: &'static str,
    wire: &'static [u8],
    server_name: Option<&'static str>,
    alpn: &'static [&'static [u8]],
    versions: &'static [u16],
    ech: bool,
}

macro_rules! capture {
    ($name:literal, $server_name:expr, $alpn:expr, $versions:expr, ech: $ech:literal) => {
        Capture {
            name: $name,
            wire: include_bytes!(concat!("../../testdata/hello/", $name, ".bin")),
            server_name: $server_name,
            alpn: &$alpn,
            versions: &$versions,
            ech: $ech,
        }
    };
}

const BLOG: Option<&str> = Some("blog.example.com");
const ALL: [u16; 4] = [TLS13, TLS12, TLS11, TLS10];
const WEB: [&[u8]; 2] = [b"h2", b"http/1.1"];

const CAPTURES: [Capture; 12] = [
    capture!("openssl", BLOG, [], ALL, ech: false),
    capture!("openssl-alpn", BLOG, WEB, ALL, ech: false),
    capture!("openssl-noservername", None, [], ALL, ech: false),
    capture!("openssl-tls12", BLOG, [], [TLS12], ech: false),
    capture!("gnutls", BLOG, WEB, ALL, ech: false),
    capture!("nss", BLOG, [], ALL, ech: false),
    capture!("chrome110", BLOG, WEB, [GREASE, TLS13, TLS12], ech: false),
    capture!("chrome120", BLOG, WEB, [GREASE, TLS13, TLS12], ech: true),
    capture!("chrome131", BLOG, WEB, [GREASE, TLS13, TLS12], ech: true),
    capture!("firefox147", BLOG, WEB, [TLS13, TLS12], ech: true),
    capture!("safari260", BLOG, WEB, [GREASE, TLS13, TLS12], ech: false),
    capture!("tlslite-all-key-shares", BLOG, WEB, ALL, ech: false),
];

/// [`Progress`] without its borrow.
#[derive(Debug, Clone, PartialEq)]
enum Answer {
    NeedMore,
    Hello { server_name: Option<String>, alpn: Vec<Vec<u8>>, versions: Vec<u16>, ech: bool, len: usize },
    Reject(Reason),
}

impl From<Progress<'_>> for Answer {
    fn from(progress: Progress<'_>) -> Self {
        match progress {
            Progress::NeedMore => Self::NeedMore,
            Progress::Reject(reason) => Self::Reject(reason),
            Progress::Hello(hello) => Self::Hello {
                server_name: hello.server_name.map(|name| name.as_str().to_owned()),
                alpn: hello.alpn.map(<[u8]>::to_vec).collect(),
                versions: hello.versions.map(|version| version.0).collect(),
                ech: hello.ech,
                len: hello.len,
            },
        }
    }
}

impl Answer {
    /// The same answer to a hello that takes `len` bytes on the wire.
    fn with_len(&self, wire_len: usize) -> Self {
        let mut answer = self.clone();
        if let Self::Hello { len, .. } = &mut answer {
            *len = wire_len;
        }
        answer
    }
}

/// The answer to all segments, one after the other.
fn answer_to_segments<'a>(segments: impl IntoIterator<Item = &'a [u8]>, max_bytes: usize) -> Answer {
    let mut machine = Machine::new(max_bytes);
    for segment in segments {
        machine.input(Input::Bytes(segment));
    }
    machine.progress().into()
}

fn answer(wire: &[u8]) -> Answer {
    answer_to_segments([wire], MAX_BYTES)
}

/// The message of a capture, which is one record.
fn message(wire: &[u8]) -> &[u8] {
    &wire[RECORD_HEADER..]
}

fn record(payload: &[u8]) -> Vec<u8> {
    let mut wire = vec![22, 3, 1];
    wire.extend_from_slice(&u16::try_from(payload.len()).unwrap().to_be_bytes());
    wire.extend_from_slice(payload);
    wire
}

fn records<'a>(payloads: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    payloads.into_iter().flat_map(record).collect()
}

fn is_grease(value: u16) -> bool {
    value & 0x0f0f == 0x0a0a && value >> 8 == value & 0xff
}

// Real hellos

#[test]
fn real_hellos_say_what_their_clients_offered() {
    for capture in CAPTURES {
        let Answer::Hello { server_name, alpn, versions, ech, len } = answer(capture.wire) else {
            panic!("{}: {:?}", capture.name, answer(capture.wire));
        };
        let versions: Vec<u16> = versions.into_iter().map(|v| if is_grease(v) { GREASE } else { v }).collect();
        assert_eq!(server_name.as_deref(), capture.server_name, "{}", capture.name);
        assert_eq!(alpn, capture.alpn, "{}", capture.name);
        assert_eq!(versions, capture.versions, "{}", capture.name);
        assert_eq!(ech, capture.ech, "{}", capture.name);
        assert_eq!(len, capture.wire.len(), "{}", capture.name);
    }
}

#[test]
fn tls_parser_reads_the_same_in_real_hellos() {
    for capture in CAPTURES {
        let (rest, plaintext) = tls_parser::parse_tls_plaintext(capture.wire).unwrap();
        assert!(rest.is_empty());
        let [TlsMessage::Handshake(TlsMessageHandshake::ClientHello(hello))] = &plaintext.msg[..] else {
            panic!("{}: not one hello", capture.name);
        };
        let mut name = None;
        let mut protocols = Vec::new();
        let mut offered = vec![hello.version];
        let mut encrypted = false;
        for extension in tls_parser::parse_tls_client_hello_extensions(hello.ext.unwrap()).unwrap().1 {
            match extension {
                TlsExtension::SNI(names) => name = Some(str::from_utf8(names[0].1).unwrap().to_owned()),
                TlsExtension::ALPN(list) => protocols = list.into_iter().map(<[u8]>::to_vec).collect(),
                TlsExtension::SupportedVersions(list) => offered = list,
                TlsExtension::Unknown(kind, _) => encrypted |= kind.0 == 0xfe0d,
                _ => {}
            }
        }
        let theirs = Answer::Hello {
            server_name: name,
            alpn: protocols,
            versions: offered.into_iter().map(|TlsVersion(version)| version).collect(),
            ech: encrypted,
            len: capture.wire.len(),
        };
        assert_eq!(answer(capture.wire), theirs, "{}", capture.name);
    }
}

#[test]
fn every_prefix_of_a_real_hello_needs_more() {
    for capture in CAPTURES {
        for end in 0..capture.wire.len() {
            assert_eq!(answer(&capture.wire[..end]), Answer::NeedMore, "{} up to {end}", capture.name);
        }
    }
}

#[test]
fn a_real_hello_in_two_segments_gives_the_same_answer() {
    for capture in CAPTURES {
        let whole = answer(capture.wire);
        for at in 0..=capture.wire.len() {
            let (first, second) = capture.wire.split_at(at);
            assert_eq!(answer_to_segments([first, second], MAX_BYTES), whole, "{} cut at {at}", capture.name);
        }
    }
}

#[test]
fn a_real_hello_byte_by_byte_needs_more_until_the_last_byte() {
    for capture in CAPTURES {
        let mut machine = Machine::new(MAX_BYTES);
        let (last, before) = capture.wire.split_last().unwrap();
        for byte in before {
            assert!(matches!(machine.input(Input::Bytes(&[*byte])), Progress::NeedMore), "{}", capture.name);
        }
        assert_eq!(Answer::from(machine.input(Input::Bytes(&[*last]))), answer(capture.wire), "{}", capture.name);
    }
}

#[test]
fn a_real_hello_in_two_records_gives_the_same_answer() {
    for capture in CAPTURES {
        let same = answer(capture.wire).with_len(capture.wire.len() + RECORD_HEADER);
        for at in 1..message(capture.wire).len() {
            let (first, second) = message(capture.wire).split_at(at);
            let wire = records([first, second]);
            assert_eq!(answer(&wire), same, "{} cut at {at}", capture.name);
            assert_eq!(answer(&wire[..wire.len() - 1]), Answer::NeedMore, "{} cut at {at}", capture.name);
        }
    }
}

#[test]
fn a_real_hello_in_records_of_one_byte_gives_the_same_answer() {
    for capture in CAPTURES {
        let wire = records(message(capture.wire).chunks(1));
        let same = answer(capture.wire).with_len(wire.len());
        assert_eq!(answer_to_segments([&wire[..]], AMPLE), same, "{}", capture.name);
        assert_eq!(answer_to_segments(wire.chunks(1), AMPLE), same, "{}", capture.name);
        assert_eq!(answer_to_segments([&wire[..wire.len() - 1]], AMPLE), Answer::NeedMore, "{}", capture.name);
    }
}

#[test]
fn every_byte_is_looked_at_once_however_the_hello_is_cut() {
    let mut body = vec![0; 4 + 2700];
    body[..4].copy_from_slice(&[1, 0, 0x0a, 0x8c]);
    let wire = records(body.chunks(1));
    assert!((16_000..=MAX_BYTES).contains(&wire.len()));
    let mut machine = Machine::new(MAX_BYTES);
    for (fed, byte) in wire[..wire.len() - 1].iter().enumerate() {
        assert_eq!(machine.at, fed);
        assert!(matches!(machine.input(Input::Bytes(&[*byte])), Progress::NeedMore));
    }
    assert_eq!(machine.joined.len(), body.len() - 1);
}

// Bytes before and after the verdict

#[test]
fn bytes_come_out_as_they_came_in_with_what_followed_the_hello() {
    for capture in CAPTURES {
        for wire in [capture.wire.to_vec(), records(message(capture.wire).chunks(100))] {
            let mut stream = wire.clone();
            stream.extend_from_slice(b"\x14\x03\x03\x00\x01\x01 and early data");
            let verdict = answer(&wire);
            let mut machine = Machine::new(MAX_BYTES);
            assert_eq!(Answer::from(machine.input(Input::Bytes(&stream))), verdict);
            assert_eq!(machine.bytes(), stream);
            assert_eq!(Answer::from(machine.input(Input::Bytes(b"more"))), verdict);
            stream.extend_from_slice(b"more");
            assert_eq!(Vec::from(machine), stream);
        }
    }
}

#[test]
fn a_hello_stands_whatever_happens_afterwards() {
    let wire = CAPTURES[0].wire;
    for after in [Input::Timeout, Input::Closed, Input::Bytes(b"\x15\x03")] {
        let mut machine = Machine::new(MAX_BYTES);
        machine.input(Input::Bytes(wire));
        assert_eq!(Answer::from(machine.input(after)), answer(wire));
    }
}

#[test]
fn a_rejection_stands_and_stores_no_more_bytes() {
    for first in [Input::Timeout, Input::Closed, Input::Bytes(b"GET / HTTP/1.1\r\n")] {
        let mut machine = Machine::new(MAX_BYTES);
        let verdict = Answer::from(machine.input(first));
        assert!(matches!(verdict, Answer::Reject(_)));
        let held = machine.bytes().len();
        for after in [Input::Bytes(CAPTURES[0].wire), Input::Timeout, Input::Closed] {
            assert_eq!(Answer::from(machine.input(after)), verdict);
        }
        assert_eq!(machine.bytes().len(), held);
    }
}

#[test]
fn a_timeout_and_a_close_before_the_hello_is_whole_are_told_apart() {
    let wire = CAPTURES[0].wire;
    for end in [0, 1, 5, 9, wire.len() - 1] {
        for (input, reason) in [(Input::Timeout, Reason::Timeout), (Input::Closed, Reason::ClosedEarly)] {
            let mut machine = Machine::new(MAX_BYTES);
            machine.input(Input::Bytes(&wire[..end]));
            assert_eq!(Answer::from(machine.input(input)), Answer::Reject(reason), "after {end} bytes");
        }
    }
}

#[test]
fn a_hello_may_be_read_straight_into_the_buffer() {
    for capture in CAPTURES {
        let mut machine = Machine::new(MAX_BYTES);
        for segment in capture.wire.chunks(1460) {
            machine.buffer_mut().put_slice(segment);
            machine.input(Input::Bytes(&[]));
        }
        assert_eq!(Answer::from(machine.progress()), answer(capture.wire), "{}", capture.name);
        assert_eq!(machine.bytes(), capture.wire);
    }
}

#[test]
fn the_buffer_has_room_until_the_limit_is_reached() {
    let message = Crafted::default().message();
    let max_bytes = records(message.chunks(1)).len();
    for wire in [record(&message), records(message.chunks(1)), records(message.chunks(7))] {
        let mut machine = Machine::new(max_bytes);
        let mut rest = &wire[..];
        while matches!(machine.progress(), Progress::NeedMore) {
            {
                let mut room = machine.buffer_mut();
                assert!((1..=max_bytes).contains(&room.remaining_mut()));
                assert!(room.chunk_mut().len() > 0);
                room.put_u8(rest[0]);
            }
            rest = &rest[1..];
            machine.input(Input::Bytes(&[]));
        }
        assert!(rest.is_empty() && matches!(machine.progress(), Progress::Hello(_)));
    }
}

#[test]
fn a_hello_of_one_record_costs_no_allocation_but_its_bytes() {
    for capture in CAPTURES {
        let mut machine = Machine::new(MAX_BYTES);
        machine.buffer_mut().put_slice(capture.wire);
        let buffer = machine.raw.as_ptr();
        assert!(matches!(machine.input(Input::Bytes(&[])), Progress::Hello(_)));
        assert_eq!(machine.joined.capacity(), 0);
        assert!(
            capture.wire.len() > FIRST_READ || machine.raw.as_ptr() == buffer && machine.raw.capacity() == FIRST_READ
        );
    }
}

// Verdicts at the first byte that allows them

/// Feeds byte by byte and says with how many bytes the verdict fell.
fn verdict_and_bytes(wire: &[u8], max_bytes: usize) -> (Answer, usize) {
    let mut machine = Machine::new(max_bytes);
    for (index, byte) in wire.iter().enumerate() {
        let answer = Answer::from(machine.input(Input::Bytes(&[*byte])));
        if answer != Answer::NeedMore {
            assert_eq!(answer_to_segments([wire], max_bytes), answer, "{}", wire.escape_ascii());
            return (answer, index + 1);
        }
    }
    (Answer::NeedMore, wire.len())
}

#[test]
fn a_rejection_falls_with_the_first_byte_that_condemns() {
    use Reason::{Malformed, NotTls, TooLarge};
    let openssl = CAPTURES[0].wire;
    let behind_a_record = |header: &[u8]| [record(&[1]), header.to_vec()].concat();
    let cases: [(&str, Vec<u8>, Reason, usize); 25] = [
        ("HTTP", b"GET / HTTP/1.1\r\n\r\n".to_vec(), NotTls, 1),
        ("SSH", b"SSH-2.0-OpenSSH_9.2p1\r\n".to_vec(), NotTls, 1),
        ("PROXY protocol v1", b"PROXY TCP4 192.0.2.1 192.0.2.2 1 443\r\n".to_vec(), NotTls, 1),
        ("PROXY protocol v2", b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec(), NotTls, 1),
        ("an SSLv2 hello", b"\x80\x2e\x01\x03\x01\0\x15\0\0\0\x10".to_vec(), NotTls, 1),
        ("an alert", b"\x15\x03\x01\0\x02\x02\x28".to_vec(), NotTls, 1),
        ("application data", b"\x17\x03\x03\0\x05hello".to_vec(), NotTls, 1),
        ("a major version of 2", b"\x16\x02\x01\0\x05\x01".to_vec(), NotTls, 2),
        ("a major version of 254, as DTLS has", b"\x16\xfe\xfd\0\0".to_vec(), NotTls, 2),
        ("an empty record", b"\x16\x03\x01\0\0\x16".to_vec(), Malformed, 5),
        ("a record length of 0x4100", b"\x16\x03\x01\x41\0\x01".to_vec(), Malformed, 4),
        ("a record length of 0x4001", b"\x16\x03\x01\x40\x01\x01".to_vec(), Malformed, 5),
        ("a record over the limit", b"\x16\x03\x01\x40\x00\x01".to_vec(), TooLarge, 5),
        ("a server hello", b"\x16\x03\x03\0\x50\x02\0\0\x4c".to_vec(), Malformed, 6),
        ("a hello request", b"\x16\x03\x03\0\x04\0\0\0\0".to_vec(), Malformed, 6),
        ("a length of 16 MB", b"\x16\x03\x01\x02\0\x01\xff\xff\xff".to_vec(), TooLarge, 7),
        ("a length of 64 KB", b"\x16\x03\x01\x02\0\x01\0\xff\xff".to_vec(), TooLarge, 8),
        ("a length of 0x3fff", b"\x16\x03\x01\x02\0\x01\0\x3f\xff\x03".to_vec(), TooLarge, 9),
        ("a record that goes on behind the hello", b"\x16\x03\x01\0\x40\x01\0\0\x30\x03".to_vec(), Malformed, 9),
        ("a hello without a body", b"\x16\x03\x01\0\x04\x01\0\0\0".to_vec(), Malformed, 9),
        ("an alert inside the hello", behind_a_record(b"\x15\x03\x03\0\x02"), Malformed, 7),
        ("application data inside the hello", behind_a_record(b"\x17\x03\x03\0\x02"), Malformed, 7),
        ("another major version inside the hello", behind_a_record(b"\x16\x02\x03\0\x02"), Malformed, 8),
        ("an empty record inside the hello", behind_a_record(b"\x16\x03\x03\0\0"), Malformed, 11),
        (
            "a second record that goes on behind the hello",
            [record(&openssl[5..9]), b"\x16\x03\x03\x10\0".to_vec()].concat(),
            Malformed,
            14,
        ),
    ];
    for (what, wire, reason, bytes) in cases {
        assert_eq!(verdict_and_bytes(&wire, MAX_BYTES), (Answer::Reject(reason), bytes), "{what}");
    }
}

#[test]
fn the_limit_counts_record_headers_and_is_itself_allowed() {
    for capture in CAPTURES {
        let message = message(capture.wire);
        for wire in [capture.wire.to_vec(), records(message.chunks(200)), records(message.chunks(1))] {
            assert!(matches!(answer_to_segments([&wire[..]], wire.len()), Answer::Hello { .. }), "{}", capture.name);
            let too_large = Answer::Reject(Reason::TooLarge);
            let (verdict, bytes) = verdict_and_bytes(&wire, wire.len() - 1);
            assert_eq!(verdict, too_large, "{}", capture.name);
            assert!(bytes < wire.len());
        }
        // The declared length alone is enough.
        assert_eq!(
            verdict_and_bytes(&records(message.chunks(200)), capture.wire.len() - 1),
            (Answer::Reject(Reason::TooLarge), RECORD_HEADER + MESSAGE_HEADER),
            "{}",
            capture.name
        );
    }
}

#[test]
fn a_hello_longer_than_a_record_is_read_if_the_limit_allows_it() {
    let padding = extension(21, &vec![0; 40_000]);
    let message = Crafted { extensions: [sni(b"blog.example.com"), padding].concat(), ..Crafted::default() }.message();
    let wire = records(message.chunks(MAX_RECORD));
    assert!(matches!(answer_to_segments([&wire[..]], AMPLE), Answer::Hello { len, .. } if len == wire.len()));
    assert!(matches!(answer_to_segments([&wire[..]], wire.len()), Answer::Hello { .. }));
    assert_eq!(verdict_and_bytes(&wire, wire.len() - 1), (Answer::Reject(Reason::TooLarge), 9));
}

#[test]
fn the_lower_byte_of_the_record_version_is_ignored() {
    for version in 0..=255 {
        let mut wire = CAPTURES[0].wire.to_vec();
        wire[2] = version;
        assert_eq!(answer(&wire), answer(CAPTURES[0].wire));
    }
}

// Crafted hellos

/// The parts of a hello; the default is the least that is well-formed and has extensions.
struct Crafted {
    version: [u8; 2],
    session_id: Vec<u8>,
    cipher_suites: Vec<u8>,
    compression: Vec<u8>,
    extensions: Vec<u8>,
    /// Behind the extensions.
    trailing: Vec<u8>,
}

impl Default for Crafted {
    fn default() -> Self {
        Self {
            version: [3, 3],
            session_id: vec![],
            cipher_suites: vec![0x13, 0x01],
            compression: vec![0],
            extensions: vec![],
            trailing: vec![],
        }
    }
}

impl Crafted {
    fn body_without_extensions(&self) -> Vec<u8> {
        let mut body = self.version.to_vec();
        body.extend_from_slice(&[7; 32]);
        body.extend(block_u8(&self.session_id));
        body.extend(block_u16(&self.cipher_suites));
        body.extend(block_u8(&self.compression));
        body
    }

    fn message(&self) -> Vec<u8> {
        handshake(&[self.body_without_extensions(), block_u16(&self.extensions), self.trailing.clone()].concat())
    }

    fn answer(&self) -> Answer {
        answer_in_full(&self.message())
    }
}

/// The answer, which must not depend on how the message is cut.
fn answer_in_full(message: &[u8]) -> Answer {
    let wire = record(message);
    let whole = answer(&wire);
    assert_eq!(answer_to_segments(wire.chunks(1), MAX_BYTES), whole);
    let wire = records(message.chunks(1));
    assert_eq!(answer_to_segments([&wire[..]], AMPLE), whole.with_len(wire.len()));
    whole
}

fn handshake(body: &[u8]) -> Vec<u8> {
    let mut message = vec![1];
    message.extend_from_slice(&u32::try_from(body.len()).unwrap().to_be_bytes()[1..]);
    message.extend_from_slice(body);
    message
}

fn block_u8(content: &[u8]) -> Vec<u8> {
    [&[u8::try_from(content.len()).unwrap()], content].concat()
}

fn block_u16(content: &[u8]) -> Vec<u8> {
    [&u16::try_from(content.len()).unwrap().to_be_bytes(), content].concat()
}

fn extension(kind: u16, content: &[u8]) -> Vec<u8> {
    [&kind.to_be_bytes()[..], &block_u16(content)].concat()
}

fn name_entry(kind: u8, name: &[u8]) -> Vec<u8> {
    [&[kind], &block_u16(name)[..]].concat()
}

fn sni(name: &[u8]) -> Vec<u8> {
    extension(0, &block_u16(&name_entry(0, name)))
}

fn alpn(protocols: &[&[u8]]) -> Vec<u8> {
    extension(16, &block_u16(&protocols.iter().flat_map(|protocol| block_u8(protocol)).collect::<Vec<_>>()))
}

fn versions(list: &[u8]) -> Vec<u8> {
    extension(43, &block_u8(list))
}

fn answer_to_extensions(extensions: &[Vec<u8>]) -> Answer {
    Crafted { extensions: extensions.concat(), ..Crafted::default() }.answer()
}

fn server_name_of(answer: Answer) -> Option<String> {
    match answer {
        Answer::Hello { server_name, .. } => server_name,
        other => panic!("{other:?}"),
    }
}

const MALFORMED: Answer = Answer::Reject(Reason::Malformed);

#[test]
fn a_hello_without_extensions_has_no_server_name_and_its_own_version() {
    for (version, number) in [([3, 0], 0x0300), ([3, 1], TLS10), ([3, 3], TLS12)] {
        let hello = Crafted { version, ..Crafted::default() };
        let without = answer_in_full(&handshake(&hello.body_without_extensions()));
        let expected = Answer::Hello { server_name: None, alpn: vec![], versions: vec![number], ech: false, len: 50 };
        assert_eq!(without, expected);
        assert_eq!(hello.answer(), expected.with_len(52));
    }
}

#[test]
fn extensions_are_found_in_any_order_among_others() {
    let name = sni(b"Blog.Example.com.");
    let protocols = alpn(&[b"h2", &[0x0a, 0x0a], b"\xff\0"]);
    let grease = extension(0x1a1a, &[]);
    let ech = extension(0xfe0d, b"not looked into");
    let offered = versions(&[0x7a, 0x7a, 3, 4, 3, 3]);
    let early = extension(42, &[]);
    let psk = extension(41, b"whatever");
    for order in [
        [&name, &protocols, &grease, &ech, &offered, &early, &psk],
        [&grease, &offered, &ech, &early, &protocols, &name, &psk],
        [&psk, &early, &offered, &ech, &grease, &protocols, &name],
    ] {
        let order: Vec<_> = order.into_iter().cloned().collect();
        let Answer::Hello { server_name, alpn, versions, ech, .. } = answer_to_extensions(&order) else {
            panic!("{:?}", answer_to_extensions(&order));
        };
        assert_eq!(server_name.as_deref(), Some("blog.example.com"));
        assert_eq!(alpn, [&b"h2"[..], &[0x0a, 0x0a], b"\xff\0"]);
        assert_eq!(versions, [0x7a7a, TLS13, TLS12]);
        assert!(ech);
    }
}

#[test]
fn the_longest_name_fits() {
    let longest = format!("{}.{}", vec!["a".repeat(63); 3].join("."), "b".repeat(61));
    assert_eq!(longest.len(), 253);
    assert_eq!(server_name_of(answer_to_extensions(&[sni(longest.as_bytes())])), Some(longest.clone()));
    assert_eq!(server_name_of(answer_to_extensions(&[sni(format!("{longest}.").as_bytes())])), Some(longest));
}

#[test]
fn names_that_are_no_dns_names_are_malformed() {
    let long = format!("{}.{}", vec!["a".repeat(63); 3].join("."), "b".repeat(62));
    for name in [
        &b""[..],
        b".",
        b"blog..example.com",
        b".example.com",
        b"blog.example.com..",
        b"blog.example.com\0",
        b"blog.example.com\0.evil.example",
        b"b\xc3\xbccher.example",
        b"blog example.com",
        b"*.example.com",
        "a".repeat(64).as_bytes(),
        long.as_bytes(),
        "a.".repeat(200).as_bytes(),
        "a".repeat(1000).as_bytes(),
    ] {
        assert_eq!(answer_to_extensions(&[sni(name)]), MALFORMED, "{}", name.escape_ascii());
    }
}

#[test]
fn a_name_that_is_an_address_or_has_a_port_has_a_reason_of_its_own() {
    for name in [
        "blog.example.com:443",
        "192.0.2.1",
        "192.0.2.1.",
        "192.0.2.1:443",
        "2001:db8::1",
        "[2001:db8::1]",
        "[2001:db8::1]:443",
        "::",
    ] {
        assert_eq!(answer_to_extensions(&[sni(name.as_bytes())]), Answer::Reject(Reason::BadServerName), "{name}");
    }
    assert_eq!(answer_to_extensions(&[sni(b"192.0.2.1"), sni(b"a.example")]), MALFORMED, "once is enough");
}

#[test]
fn broken_server_name_lists_are_malformed() {
    let good = name_entry(0, b"blog.example.com");
    let other = name_entry(0, b"other.example.com");
    let cases = [
        ("empty extension", vec![]),
        ("half a list length", vec![0]),
        ("empty list", block_u16(&[])),
        ("two names", block_u16(&[&good[..], &other].concat())),
        ("the same name twice", block_u16(&[&good[..], &good].concat())),
        ("another type only", block_u16(&name_entry(1, b"blog.example.com"))),
        ("another type first", block_u16(&[&name_entry(1, b"x")[..], &good].concat())),
        ("another type second", block_u16(&[&good[..], &name_entry(1, b"x")].concat())),
        ("a byte behind the name", block_u16(&[&good[..], &[0]].concat())),
        ("a byte behind the list", [block_u16(&good), vec![0]].concat()),
        ("a list length that is too long", [&[0, good.len() as u8 + 1], &good[..]].concat()),
        ("a list length that is too short", [&[0, good.len() as u8 - 1], &good[..]].concat()),
        ("a name length that is too long", block_u16(&[&[0, 0, 17], &b"blog.example.com"[..]].concat())),
        ("a name length that is too short", block_u16(&[&[0, 0, 15], &b"blog.example.com"[..]].concat())),
        ("a type without a name", block_u16(&[0])),
    ];
    for (what, content) in cases {
        assert_eq!(answer_to_extensions(&[extension(0, &content)]), MALFORMED, "{what}");
    }
}

#[test]
fn broken_alpn_lists_are_malformed() {
    let cases = [
        ("empty extension", vec![]),
        ("half a list length", vec![0]),
        ("empty list", block_u16(&[])),
        ("empty protocol only", block_u16(&[0])),
        ("empty protocol first", block_u16(b"\0\x02h2")),
        ("empty protocol last", block_u16(b"\x02h2\0")),
        ("a protocol length that is too long", block_u16(b"\x03h2")),
        ("a protocol length that is too short", block_u16(b"\x01h2")),
        ("a byte behind the list", [block_u16(b"\x02h2"), vec![0]].concat()),
        ("a list length that is too long", b"\0\x04\x02h2".to_vec()),
        ("a list length that is too short", b"\0\x02\x02h2".to_vec()),
    ];
    for (what, content) in cases {
        assert_eq!(answer_to_extensions(&[sni(b"a.example"), extension(16, &content)]), MALFORMED, "{what}");
    }
}

#[test]
fn broken_version_lists_are_malformed() {
    for content in [&b""[..], b"\0", b"\x01\x03", b"\x03\x03\x04\x03", b"\x02\x03", b"\x02\x03\x04\0", b"\x04\x03\x04"]
    {
        assert_eq!(answer_to_extensions(&[extension(43, content)]), MALFORMED, "{}", content.escape_ascii());
    }
}

#[test]
fn extensions_that_come_twice_are_malformed() {
    let name = sni(b"blog.example.com");
    let protocols = alpn(&[b"h2"]);
    let offered = versions(&[3, 4]);
    let other = extension(0x1a1a, b"x");
    for twice in [&name, &protocols, &offered] {
        assert_eq!(answer_to_extensions(&[twice.clone(), twice.clone()]), MALFORMED);
        assert_eq!(answer_to_extensions(&[twice.clone(), other.clone(), twice.clone()]), MALFORMED);
        assert!(matches!(answer_to_extensions(&[twice.clone(), other.clone()]), Answer::Hello { .. }));
    }
    assert_eq!(answer_to_extensions(&[sni(b"a.example"), sni(b"b.example")]), MALFORMED);
}

#[test]
fn broken_outlines_are_malformed() {
    let good = || Crafted { extensions: sni(b"blog.example.com"), ..Crafted::default() };
    assert!(matches!(good().answer(), Answer::Hello { .. }));
    assert!(matches!(Crafted { session_id: vec![0; 32], ..good() }.answer(), Answer::Hello { .. }));
    for (what, hello) in [
        ("a session id of 33 bytes", Crafted { session_id: vec![0; 33], ..good() }),
        ("no cipher suite", Crafted { cipher_suites: vec![], ..good() }),
        ("half a cipher suite", Crafted { cipher_suites: vec![0x13], ..good() }),
        ("one and a half cipher suites", Crafted { cipher_suites: vec![0x13, 1, 0x13], ..good() }),
        ("no compression method", Crafted { compression: vec![], ..good() }),
        ("a byte behind the extensions", Crafted { trailing: vec![0], ..good() }),
        ("extensions behind the extensions", Crafted { trailing: block_u16(&sni(b"b.example")), ..good() }),
        ("half an extension type", Crafted { extensions: [sni(b"a.example"), vec![0]].concat(), ..good() }),
        ("an extension type alone", Crafted { extensions: [sni(b"a.example"), vec![0, 23]].concat(), ..good() }),
        (
            "an extension longer than the rest",
            Crafted { extensions: [sni(b"a.example"), vec![0, 23, 0, 1]].concat(), ..good() },
        ),
    ] {
        assert_eq!(hello.answer(), MALFORMED, "{what}");
    }
    // A body that ends anywhere too early, the message's length being in order.
    let body = good().message().split_off(MESSAGE_HEADER);
    let without_extensions = Crafted::default().body_without_extensions().len();
    for end in (0..body.len()).filter(|end| *end != without_extensions) {
        assert_eq!(answer_in_full(&handshake(&body[..end])), MALFORMED, "a body of {end} bytes");
    }
}

// Anything at all

/// Pieces of `wire` that end at `cuts`.
fn cut<'a>(wire: &'a [u8], cuts: &[prop::sample::Index]) -> Vec<&'a [u8]> {
    let mut ends: Vec<usize> = cuts.iter().map(|cut| cut.index(wire.len() + 1)).collect();
    ends.push(wire.len());
    ends.sort_unstable();
    let mut start = 0;
    ends.into_iter().map(|end| &wire[std::mem::replace(&mut start, end)..end]).collect()
}

fn cuts() -> impl Strategy<Value = Vec<prop::sample::Index>> {
    prop::collection::vec(any::<prop::sample::Index>(), 0..8)
}

/// A capture in records of some size with some bytes changed: gets much further than bytes at
/// random.
fn damaged_hello() -> impl Strategy<Value = Vec<u8>> {
    let damage = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    (0..CAPTURES.len(), 1..2000_usize, damage, any::<bool>()).prop_map(|(which, chunk, damage, early)| {
        let mut wire = records(message(CAPTURES[which].wire).chunks(chunk));
        for (place, byte) in damage {
            // Half of the time where the headers and the outline are.
            let range = if early { wire.len().min(100) } else { wire.len() };
            wire[place.index(range)] = byte;
        }
        wire
    })
}

fn holds_for_any_cut(wire: &[u8], cuts: &[prop::sample::Index], max_bytes: usize) -> Result<(), TestCaseError> {
    let whole = answer_to_segments([wire], max_bytes);
    let mut machine = Machine::new(max_bytes);
    let mut last = Answer::NeedMore;
    for segment in cut(wire, cuts) {
        let answer = Answer::from(machine.input(Input::Bytes(segment)));
        prop_assert!(last == Answer::NeedMore || answer == last, "{last:?} became {answer:?}");
        if answer == Answer::NeedMore {
            prop_assert!(machine.bytes().len() < max_bytes);
        }
        last = answer;
    }
    prop_assert_eq!(&last, &whole);
    if !matches!(whole, Answer::Reject(_)) {
        prop_assert_eq!(machine.bytes(), wire);
    }
    Ok(())
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic_and_no_cut_changes_the_verdict(
        wire in prop::collection::vec(any::<u8>(), 0..200), cuts in cuts(), max_bytes in 9..300_usize,
    ) {
        holds_for_any_cut(&wire, &cuts, max_bytes)?;
    }

    #[test]
    fn no_cut_changes_the_verdict_on_a_body_at_random(
        body in prop::collection::vec(any::<u8>(), 0..200), cuts in cuts(), chunk in 1..250_usize,
    ) {
        holds_for_any_cut(&records(handshake(&body).chunks(chunk)), &cuts, MAX_BYTES)?;
    }

    #[test]
    fn no_cut_changes_the_verdict_on_damaged_hellos(
        wire in damaged_hello(), cuts in cuts(), max_bytes in prop_oneof![Just(MAX_BYTES), 9..6000_usize],
    ) {
        holds_for_any_cut(&wire, &cuts, max_bytes)?;
    }

    #[test]
    fn whatever_is_accepted_as_a_name_is_one(raw in prop::collection::vec(any::<u8>(), 0..300)) {
        if let Some(name) = ServerName::parse(&raw) {
            prop_assert_eq!(ServerName::parse(name.as_bytes()), Some(name));
        }
    }

    #[test]
    fn names_of_labels_are_accepted_and_folded(raw in "[a-zA-Z0-9_-]{1,63}(\\.[a-zA-Z0-9_-]{1,20}){0,5}\\.[a-zA-Z_-]{1,20}\\.?") {
        let name = ServerName::parse(raw.as_bytes()).unwrap();
        let folded = raw.to_ascii_lowercase();
        prop_assert_eq!(name.as_str(), folded.strip_suffix('.').unwrap_or(&folded));
    }
}
