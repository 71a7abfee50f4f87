//! No input makes the hello machine panic; no cut of the input, into segments or into records,
//! changes its verdict; and a hello that it accepts is one to tls-parser too, with the same names,
//! protocols and versions.

#![no_main]

use dataplane::hello::{Input, Machine, Progress};
use dataplane::reject::Reason;
use libfuzzer_sys::fuzz_target;
use tls_parser::{TlsExtension, TlsExtensionType};

const MAX_BYTES: usize = 16384;
const RECORD_HEADER: usize = 5;

#[derive(Debug, Clone, PartialEq)]
enum Answer {
    NeedMore,
    Hello(Offer),
    Reject(Reason),
}

#[derive(Debug, Clone, PartialEq)]
struct Offer {
    server_name: Option<String>,
    alpn: Vec<Vec<u8>>,
    versions: Vec<u16>,
    ech: bool,
    len: usize,
}

impl From<Progress<'_>> for Answer {
    fn from(progress: Progress<'_>) -> Self {
        match progress {
            Progress::NeedMore => Self::NeedMore,
            Progress::Reject(reason) => Self::Reject(reason),
            Progress::Hello(hello) => Self::Hello(Offer {
                server_name: hello.server_name.map(|name| name.as_str().to_owned()),
                alpn: hello.alpn.map(<[u8]>::to_vec).collect(),
                versions: hello.versions.map(|version| version.0).collect(),
                ech: hello.ech,
                len: hello.len,
            }),
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let mut machine = Machine::new(MAX_BYTES);
    let whole = Answer::from(machine.input(Input::Bytes(data)));
    assert!(whole != Answer::NeedMore || data.len() < MAX_BYTES);
    let mut lengths = Lengths::from(data);
    assert_eq!(answer_in_segments(data, &mut lengths), whole);
    if let Answer::Hello(offer) = &whole {
        assert_eq!(machine.bytes(), data);
        let message = join_records(&data[..offer.len]);
        agrees_with_tls_parser(offer, &message);
        let cut = cut_into_records(&message, &mut lengths);
        if cut.len() <= MAX_BYTES {
            let same = Answer::Hello(Offer { len: cut.len(), ..offer.clone() });
            assert_eq!(answer_in_segments(&cut, &mut lengths), same);
        }
    }
});

fn answer_in_segments(mut data: &[u8], lengths: &mut Lengths) -> Answer {
    let mut machine = Machine::new(MAX_BYTES);
    let mut last = Answer::NeedMore;
    while !data.is_empty() {
        let (segment, rest) = data.split_at(lengths.next(data.len()));
        data = rest;
        let answer = Answer::from(machine.input(Input::Bytes(segment)));
        assert!(last == Answer::NeedMore || answer == last, "{last:?} became {answer:?}");
        last = answer;
    }
    last
}

fn join_records(mut wire: &[u8]) -> Vec<u8> {
    let mut message = Vec::new();
    while !wire.is_empty() {
        let (header, rest) = wire.split_at(RECORD_HEADER);
        let (payload, rest) = rest.split_at(usize::from(u16::from_be_bytes([header[3], header[4]])));
        message.extend_from_slice(payload);
        wire = rest;
    }
    message
}

fn cut_into_records(mut message: &[u8], lengths: &mut Lengths) -> Vec<u8> {
    let mut wire = Vec::new();
    while !message.is_empty() {
        let (payload, rest) = message.split_at(lengths.next(message.len()));
        wire.extend_from_slice(&[22, 3, 1]);
        wire.extend_from_slice(&(payload.len() as u16).to_be_bytes());
        wire.extend_from_slice(payload);
        message = rest;
    }
    wire
}

fn agrees_with_tls_parser(offer: &Offer, message: &[u8]) {
    let (rest, hello) =
        tls_parser::parse_tls_handshake_client_hello(&message[4..]).expect("tls-parser reads the hello");
    assert!(rest.is_empty());
    let mut theirs =
        Offer { server_name: None, alpn: vec![], versions: vec![hello.version.0], ech: false, len: offer.len };
    let mut extensions = hello.ext.unwrap_or_default();
    while !extensions.is_empty() {
        let kind = u16::from_be_bytes([extensions[0], extensions[1]]);
        let (extension, rest) =
            extensions.split_at(4 + usize::from(u16::from_be_bytes([extensions[2], extensions[3]])));
        extensions = rest;
        // Extensions that routing does not ask for may be broken inside: those are the server's to
        // refuse.
        let Ok((_, parsed)) = tls_parser::parse_tls_client_hello_extension(extension) else {
            assert!(![0, 16, 43, 0xfe0d].contains(&kind), "tls-parser refuses extension {kind}");
            continue;
        };
        match parsed {
            TlsExtension::SNI(names) => {
                assert_eq!(names.len(), 1);
                let name = str::from_utf8(names[0].1).expect("a name in ASCII").to_ascii_lowercase();
                theirs.server_name = Some(name.strip_suffix('.').unwrap_or(&name).to_owned());
            }
            TlsExtension::ALPN(protocols) => theirs.alpn = protocols.into_iter().map(<[u8]>::to_vec).collect(),
            TlsExtension::SupportedVersions(versions) => {
                theirs.versions = versions.into_iter().map(|version| version.0).collect();
            }
            TlsExtension::Unknown(TlsExtensionType(0xfe0d), _) => theirs.ech = true,
            _ => {}
        }
    }
    assert_eq!(*offer, theirs);
}

/// Lengths of pieces, derived from the input: some tiny, some as long as a TCP segment, so that the
/// cuts fall everywhere.
struct Lengths(u64);

impl From<&[u8]> for Lengths {
    /// FNV-1a.
    fn from(data: &[u8]) -> Self {
        Self(
            data.iter()
                .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)),
        )
    }
}

impl Lengths {
    /// Between 1 and `most`.
    fn next(&mut self, most: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let scale = [1, 4, 40, 1460][(self.0 >> 60) as usize % 4];
        (1 + (self.0 >> 33) as usize % scale).min(most)
    }
}
