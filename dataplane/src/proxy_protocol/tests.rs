use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

use ppp::v2::TypeLengthValue;
use proptest::prelude::*;

use super::*;

macro_rules! capture {
    ($name:literal) => {
        include_bytes!(concat!("../../testdata/proxy_protocol/", $name, ".bin")).as_slice()
    };
}

/// The client, and the address that it connected to.
type Ends = (&'static str, &'static str);

/// From `testdata/proxy_protocol`, with what the header says; `None` where the sender names nobody.
const CAPTURES: [(&[u8], Option<Ends>); 19] = [
    (capture!("haproxy-v1-tcp4"), Some(("192.0.2.7:50001", "198.51.100.1:9101"))),
    (capture!("haproxy-v1-tcp6"), Some(("[2001:db8::7]:50002", "[2001:db8:1::1]:9101"))),
    (capture!("haproxy-v1-mapped"), Some(("192.0.2.7:50003", "198.51.100.1:9201"))),
    (capture!("haproxy-v1-unix"), None),
    (capture!("haproxy-v1-health-check"), Some(("127.0.0.1:46046", "127.0.0.1:9002"))),
    (capture!("haproxy-v2-tcp4"), Some(("192.0.2.7:50004", "198.51.100.1:9102"))),
    (capture!("haproxy-v2-tcp6"), Some(("[2001:db8::7]:50005", "[2001:db8:1::1]:9102"))),
    (capture!("haproxy-v2-mapped"), Some(("192.0.2.7:50006", "198.51.100.1:9202"))),
    (capture!("haproxy-v2-unix"), None),
    (capture!("haproxy-v2-health-check"), None),
    (capture!("haproxy-v2-crc32c-tcp4"), Some(("192.0.2.7:50007", "198.51.100.1:9104"))),
    (capture!("haproxy-v2-crc32c-tcp6"), Some(("[2001:db8::7]:50009", "[2001:db8:1::1]:9104"))),
    (capture!("haproxy-v2-tls-tcp4"), Some(("192.0.2.7:50008", "198.51.100.1:9103"))),
    (capture!("haproxy-v2-tls-tcp6"), Some(("[2001:db8::7]:50010", "[2001:db8:1::1]:9103"))),
    (capture!("haproxy-v2-tls-no-alpn-tcp4"), Some(("192.0.2.7:50011", "198.51.100.1:9103"))),
    (capture!("nginx-v1-tcp4"), Some(("192.0.2.7:50012", "198.51.100.1:9301"))),
    (capture!("nginx-v1-tcp6"), Some(("[2001:db8::7]:50013", "[2001:db8:1::1]:9301"))),
    (capture!("nginx-v1-mapped"), Some(("192.0.2.7:50014", "198.51.100.1:9302"))),
    (capture!("nginx-v1-unix"), None),
];

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn source(bytes: &[u8]) -> Option<Source<'_>> {
    match decode(bytes) {
        Decoded::Header { source, .. } => source,
        other => panic!("{other:?}: {}", bytes.escape_ascii()),
    }
}

fn v1(client: SocketAddr, server: SocketAddr) -> Vec<u8> {
    let mut out = Vec::new();
    encode_v1(&mut out, client, server);
    out
}

fn v2(header: &Header) -> Vec<u8> {
    let mut out = Vec::new();
    encode_v2(&mut out, header);
    out
}

fn plain(client: &str, server: &str) -> Header<'static> {
    Header { client: addr(client), server: addr(server), authority: None, alpn: None, unique_id: b"" }
}

/// A version 2 header put together by hand.
fn raw_v2(command: u8, family: u8, block: &[u8]) -> Vec<u8> {
    let mut out = SIGNATURE.to_vec();
    out.extend([command, family]);
    out.extend((block.len() as u16).to_be_bytes());
    out.extend(block);
    out
}

/// TCP over IPv4 with TLVs.
fn raw_tcp4(tlvs: &[u8]) -> Vec<u8> {
    let mut block = vec![192, 0, 2, 7, 198, 51, 100, 1, 0xc3, 0x51, 0x01, 0xbb];
    block.extend(tlvs);
    raw_v2(PROXY, TCP4, &block)
}

fn ppp_v2(bytes: &[u8]) -> (ppp::v2::Header<'_>, Vec<TypeLengthValue<'_>>) {
    let header = ppp::v2::Header::try_from(bytes).unwrap();
    // Its iterator borrows from the header: read the TLVs from the input instead.
    let tlvs = header.tlv_bytes().len();
    let tlvs = ppp::v2::TypeLengthValues::from(&bytes[header.len() - tlvs..header.len()]).map(Result::unwrap).collect();
    (header, tlvs)
}

#[test]
fn headers_captured_from_haproxy_and_nginx_name_client_and_server() {
    for (bytes, ends) in CAPTURES {
        let found = source(bytes);
        let ends = ends.map(|(client, server)| (addr(client), addr(server)));
        assert_eq!(found.map(|source| (source.client, source.server)), ends, "{}", bytes.escape_ascii());
    }
}

#[test]
fn every_prefix_needs_more_and_what_follows_the_header_is_left_alone() {
    for (bytes, _) in CAPTURES {
        for end in 0..bytes.len() {
            assert_eq!(decode(&bytes[..end]), Decoded::NeedMore, "{}", bytes[..end].escape_ascii());
        }
        let whole = decode(bytes);
        assert!(matches!(whole, Decoded::Header { len, .. } if len == bytes.len()), "{whole:?}");
        for following in [b"\x16\x03\x01".as_slice(), b"\r\n", b"PROXY ", SIGNATURE, &[0; 5000]] {
            assert_eq!(decode(&[bytes, following].concat()), whole);
        }
    }
}

#[test]
fn the_header_of_a_connection_of_our_own_names_nobody() {
    let (mut v1, mut v2) = (Vec::new(), Vec::new());
    encode_local_v1(&mut v1);
    encode_local_v2(&mut v2);
    for header in [&v1, &v2] {
        assert_eq!(decode(header), Decoded::Header { len: header.len(), source: None });
    }
    assert_eq!(ppp_v2(&v2).0.command, ppp::v2::Command::Local);
    assert!(ppp::v1::Header::try_from(&*v1).is_ok());
}

#[test]
fn the_unique_id_of_haproxy_arrives() {
    let id = source(capture!("haproxy-v2-tls-tcp4")).unwrap().unique_id;
    assert_eq!(id, Some(b"C0000207:C358_C6336401:238F_0009".as_slice()));
    assert_eq!(source(capture!("haproxy-v2-tcp4")).unwrap().unique_id, None);
}

#[test]
fn a_flipped_bit_behind_the_fixed_part_of_a_header_with_a_checksum_is_noticed() {
    // HAProxy puts the checksum right behind the addresses; as another type, it is one that nobody
    // looks at.
    for (bytes, kind) in [
        (capture!("haproxy-v2-tls-tcp4"), FIXED_V2 + ADDRESSES_TCP4),
        (capture!("haproxy-v2-crc32c-tcp6"), FIXED_V2 + ADDRESSES_TCP6),
    ] {
        assert_eq!(bytes[kind], TYPE_CRC32C);
        for bit in (FIXED_V2 * 8..bytes.len() * 8).filter(|bit| bit / 8 != kind) {
            let mut broken = bytes.to_vec();
            broken[bit / 8] ^= 1 << (bit % 8);
            let decoded = decode(&broken);
            assert!(matches!(decoded, Decoded::Invalid(Invalid::Checksum | Invalid::Tlv)), "bit {bit}: {decoded:?}");
        }
    }
}

#[test]
fn the_first_byte_that_cannot_be_right_is_invalid_at_once() {
    for first in 0..=255u8 {
        let expected =
            if matches!(first, b'P' | b'\r') { Decoded::NeedMore } else { Decoded::Invalid(Invalid::Signature) };
        assert_eq!(decode(&[first]), expected, "{first:#x}");
    }
    let fixed = [SIGNATURE.as_slice(), &[PROXY, TCP4]].concat();
    for (start, checked, why) in [
        (b"PROXY ".as_slice(), 0..6, Invalid::Signature),
        (b"PROXY TCP4 ", 6..11, Invalid::Line),
        (b"PROXY TCP6 ", 6..11, Invalid::Line),
        (b"PROXY UNKNOWN", 6..13, Invalid::Line),
        (b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2\r\n", 31..32, Invalid::Line),
        (&fixed, 0..12, Invalid::Signature),
    ] {
        for at in checked {
            let mut bytes = start[..=at].to_vec();
            bytes[at] ^= 0x80;
            assert_eq!(decode(&bytes), Decoded::Invalid(why), "{}", bytes.escape_ascii());
        }
    }
    for (byte, why) in
        [(0x11, Invalid::Version), (0x31, Invalid::Version), (0x22, Invalid::Command), (0x2f, Invalid::Command)]
    {
        assert_eq!(decode(&[SIGNATURE.as_slice(), &[byte]].concat()), Decoded::Invalid(why));
    }
    for family in [0x13, 0x1f, 0x41, 0xf0] {
        assert_eq!(decode(&[SIGNATURE.as_slice(), &[PROXY, family]].concat()), Decoded::Invalid(Invalid::Family));
    }
}

#[test]
fn a_broken_line_of_version_1_is_invalid() {
    for line in [
        "PROXY\r\n",
        "PROXY \r\n",
        "proxy TCP4 1.1.1.1 2.2.2.2 1 2\r\n",
        "PROXY  TCP4 1.1.1.1 2.2.2.2 1 2\r\n",
        "PROXY\tTCP4 1.1.1.1 2.2.2.2 1 2\r\n",
        "PROXY TCP5 1.1.1.1 2.2.2.2 1 2\r\n",
        "PROXY TCP 1.1.1.1 2.2.2.2 1 2\r\n",
        "PROXY UDP4 1.1.1.1 2.2.2.2 1 2\r\n",
        "PROXY UNKNOW\r\n",
        "PROXY TCP4\r\n",
        "PROXY TCP4 \r\n",
        "PROXY TCP4 1.1.1.1\r\n",
        "PROXY TCP4 1.1.1.1 2.2.2.2\r\n",
        "PROXY TCP4 1.1.1.1 2.2.2.2 1\r\n",
        "PROXY TCP4 1.1.1.1 2.2.2.2 1 \r\n",
        "PROXY TCP4 1.1.1.1  2.2.2.2 1 2\r\n",
        "PROXY TCP4 1.1.1.1 2.2.2.2 1 2 \r\n",
        "PROXY TCP4 1.1.1.1 2.2.2.2 1 2 3\r\n",
        "PROXY TCP4 1.1.1.1 2.2.2.2 1 2\n",
        "PROXY TCP4 1.1.1.1 2.2.2.2 1 2\r\r\n",
        "PROXY TCP4 1.1.1.1\r2.2.2.2 1 2\r\n",
        "PROXY TCP4 1.1.1.1 2.2.2.256 1 2\r\n",
        "PROXY TCP4 1.1.1 2.2.2.2 1 2\r\n",
        "PROXY TCP4 1.1.1.1.1 2.2.2.2 1 2\r\n",
        "PROXY TCP4 01.1.1.1 2.2.2.2 1 2\r\n",
        "PROXY TCP4 0x1.1.1.1 2.2.2.2 1 2\r\n",
        "PROXY TCP4 16843009 2.2.2.2 1 2\r\n",
        "PROXY TCP4 ::1 ::1 1 2\r\n",
        "PROXY TCP4 1.1.1.1 ::1 1 2\r\n",
        "PROXY TCP4 1.1.1.1 2.2.2.2 65536 2\r\n",
        "PROXY TCP4 1.1.1.1 2.2.2.2 1 100000\r\n",
        "PROXY TCP4 1.1.1.1 2.2.2.2 01 2\r\n",
        "PROXY TCP4 1.1.1.1 2.2.2.2 1 00\r\n",
        "PROXY TCP4 1.1.1.1 2.2.2.2 +1 2\r\n",
        "PROXY TCP4 1.1.1.1 2.2.2.2 1 -2\r\n",
        "PROXY TCP4 1.1.1.1 2.2.2.2 1 0x2\r\n",
        "PROXY TCP6 1.1.1.1 2.2.2.2 1 2\r\n",
        "PROXY TCP6 ::1 1.1.1.1 1 2\r\n",
        "PROXY TCP6 1:2:3:4:5:6:7 ::1 1 2\r\n",
        "PROXY TCP6 1:2:3:4:5:6:7:8:9 ::1 1 2\r\n",
        "PROXY TCP6 1::2::3 ::1 1 2\r\n",
        "PROXY TCP6 12345::1 ::1 1 2\r\n",
        "PROXY TCP6 g::1 ::1 1 2\r\n",
        "PROXY TCP6 fe80::1%lo ::1 1 2\r\n",
        "PROXY TCP6 [::1] ::1 1 2\r\n",
    ] {
        let decoded = decode(line.as_bytes());
        assert!(matches!(decoded, Decoded::Invalid(Invalid::Line | Invalid::Signature)), "{line:?}: {decoded:?}");
    }
}

#[test]
fn a_broken_header_of_version_2_is_invalid() {
    let crc_of_nothing = [TYPE_CRC32C, 0, 4, 0, 0, 0, 0];
    let mut two_checksums = raw_tcp4(&[crc_of_nothing, crc_of_nothing].concat());
    let crc = crc32c::crc32c(&two_checksums).to_be_bytes();
    two_checksums[31..35].copy_from_slice(&crc);
    let long_id = [[TYPE_UNIQUE_ID, 0, 129].as_slice(), &[b'x'; 129]].concat();
    for (bytes, why) in [
        (raw_v2(PROXY, TCP4, &[0; 11]), Invalid::Addresses),
        (raw_v2(PROXY, TCP4, &[]), Invalid::Addresses),
        (raw_v2(PROXY, TCP6, &[0; 35]), Invalid::Addresses),
        (raw_tcp4(&[0x04]), Invalid::Tlv),
        (raw_tcp4(&[0x04, 0]), Invalid::Tlv),
        (raw_tcp4(&[0x04, 0, 1]), Invalid::Tlv),
        (raw_tcp4(&[0x04, 0xff, 0xff, 0]), Invalid::Tlv),
        (raw_tcp4(&[0x04, 0, 0, 0]), Invalid::Tlv),
        (raw_tcp4(&[TYPE_CRC32C, 0, 0]), Invalid::Tlv),
        (raw_tcp4(&[TYPE_CRC32C, 0, 5, 0, 0, 0, 0, 0]), Invalid::Tlv),
        (raw_tcp4(&crc_of_nothing), Invalid::Checksum),
        (two_checksums, Invalid::Tlv),
        (raw_tcp4(&long_id), Invalid::Tlv),
        (raw_tcp4(&[TYPE_UNIQUE_ID, 0, 1, b'a', TYPE_UNIQUE_ID, 0, 1, b'b']), Invalid::Tlv),
    ] {
        assert_eq!(decode(&bytes), Decoded::Invalid(why), "{}", bytes.escape_ascii());
    }
}

#[test]
fn the_examples_of_the_specification_are_read_as_it_says() {
    let request = b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\nGET / HTTP/1.1\r\nHost: 192.168.0.11\r\n\r\n";
    let expected = Source { client: addr("192.168.0.1:56324"), server: addr("192.168.0.11:443"), unique_id: None };
    assert_eq!(decode(request), Decoded::Header { len: 47, source: Some(expected) });

    let longest = "255.255.255.255:65535";
    let line = b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n";
    assert_eq!(line.len(), 56);
    assert_eq!(source(line), Some(Source { client: addr(longest), server: addr(longest), unique_id: None }));
    assert_eq!(v1(addr(longest), addr(longest)), line);

    let longest = "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535";
    let ip = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff";
    let line = format!("PROXY TCP6 {ip} {ip} 65535 65535\r\n");
    assert_eq!(line.len(), 104);
    assert_eq!(source(line.as_bytes()), Some(Source { client: addr(longest), server: addr(longest), unique_id: None }));
    assert_eq!(v1(addr(longest), addr(longest)), line.as_bytes());

    let line = format!("PROXY UNKNOWN {ip} {ip} 65535 65535\r\n");
    assert_eq!(decode(line.as_bytes()), Decoded::Header { len: 107, source: None });
    assert_eq!(decode(b"PROXY UNKNOWN\r\n"), Decoded::Header { len: 15, source: None });
}

#[test]
fn port_0_and_upper_case_are_within_the_grammar_of_version_1() {
    let found = source(b"PROXY TCP6 2001:DB8::A ::1 0 443\r\n").unwrap();
    assert_eq!((found.client, found.server), (addr("[2001:db8::a]:0"), addr("[::1]:443")));
}

#[test]
fn a_line_of_version_1_ends_within_107_bytes() {
    let unknown = |filling: usize| [b"PROXY UNKNOWN".as_slice(), &vec![0xff; filling]].concat();
    let fits = [unknown(92).as_slice(), b"\r\n"].concat();
    assert_eq!(decode(&fits), Decoded::Header { len: MAX_LINE, source: None });
    for end in 0..MAX_LINE {
        assert_eq!(decode(&fits[..end]), Decoded::NeedMore);
    }
    assert_eq!(decode(&unknown(93)), Decoded::Invalid(Invalid::TooLong));
    assert_eq!(decode(&[unknown(93).as_slice(), b"\r\n"].concat()), Decoded::Invalid(Invalid::TooLong));
    assert_eq!(decode(&[unknown(92).as_slice(), b"\r\r\n"].concat()), Decoded::Invalid(Invalid::TooLong));

    let ip = "0000:0000:0000:0000:0000:ffff:255.255.255.255";
    let line = format!("PROXY TCP6 {ip} {ip} 65535 65535\r\n");
    assert_eq!(decode(line.as_bytes()), Decoded::Invalid(Invalid::TooLong));
}

#[test]
fn only_crlf_ends_an_unknown_line() {
    let line = b"PROXY UNKNOWN a\nb\rc \xff\0 d e f g h i\r\n";
    assert_eq!(decode(&[line, b"rest".as_slice()].concat()), Decoded::Header { len: line.len(), source: None });
    assert_eq!(decode(b"PROXY UNKNOWN\n"), Decoded::NeedMore);
}

#[test]
fn a_header_of_version_2_is_at_most_4_kib() {
    let padding = |total: usize| {
        let value = total - FIXED_V2 - ADDRESSES_TCP4 - 3;
        raw_tcp4(&[[0x04].as_slice(), &(value as u16).to_be_bytes(), &vec![0; value]].concat())
    };
    let longest = padding(MAX_HEADER);
    assert!(matches!(decode(&longest), Decoded::Header { len: MAX_HEADER, source: Some(_) }));
    let too_long = padding(MAX_HEADER + 1);
    assert_eq!(decode(&too_long), Decoded::Invalid(Invalid::TooLong));
    assert_eq!(decode(&too_long[..FIXED_V2]), Decoded::Invalid(Invalid::TooLong));
    assert_eq!(decode(&raw_v2(LOCAL, 0, &[0; 5000])[..FIXED_V2]), Decoded::Invalid(Invalid::TooLong));
}

#[test]
fn headers_that_name_no_tcp_client_are_skipped_whole() {
    for (command, family, length) in [
        (LOCAL, 0x00, 0),
        (LOCAL, 0x00, 7),
        (LOCAL, TCP4, 0),
        (LOCAL, TCP4, 12),
        (LOCAL, 0xff, 3),
        (PROXY, 0x00, 0),
        (PROXY, 0x00, 12),
        (PROXY, 0x01, 1),
        (PROXY, 0x10, 12),
        (PROXY, 0x12, 12),
        (PROXY, 0x22, 36),
        (PROXY, 0x31, 216),
        (PROXY, 0x32, 216),
    ] {
        let bytes = raw_v2(command, family, &vec![0xff; length]);
        assert_eq!(
            decode(&bytes),
            Decoded::Header { len: FIXED_V2 + length, source: None },
            "{command:#x} {family:#x}"
        );
        for end in 0..bytes.len() {
            assert_eq!(decode(&bytes[..end]), Decoded::NeedMore, "{command:#x} {family:#x}");
        }
    }
}

#[test]
fn mapped_addresses_are_written_and_read_as_ipv4() {
    let (client, server) = (addr("[::ffff:192.0.2.7]:1"), addr("[::ffff:198.51.100.1]:2"));
    assert_eq!(v1(client, server), b"PROXY TCP4 192.0.2.7 198.51.100.1 1 2\r\n");
    let bytes = v2(&Header { client, server, ..plain("[::1]:1", "[::1]:2") });
    assert_eq!(bytes[..28], *b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x13\xc0\0\x02\x07\xc6\x33\x64\x01\0\x01\0\x02");
    assert_eq!(source(b"PROXY TCP6 ::ffff:c000:207 ::1 1 2\r\n").unwrap().client, addr("192.0.2.7:1"));
}

#[test]
fn a_mixed_pair_is_written_as_ipv6() {
    let (v4, v6) = (addr("192.0.2.7:1"), addr("[2001:db8::1]:2"));
    assert_eq!(v1(v4, v6), b"PROXY TCP6 ::ffff:192.0.2.7 2001:db8::1 1 2\r\n");
    assert_eq!(v1(v6, v4), b"PROXY TCP6 2001:db8::1 ::ffff:192.0.2.7 2 1\r\n");
    for (client, server) in [(v4, v6), (v6, v4)] {
        let bytes = v2(&Header { client, server, ..plain("[::1]:1", "[::1]:2") });
        assert_eq!(bytes[13], TCP6);
        assert_eq!(source(&bytes), Some(Source { client, server, unique_id: None }));
    }
}

#[test]
fn what_haproxy_wrote_is_written_alike() {
    for (bytes, ends) in CAPTURES {
        let Some((client, server)) = ends else { continue };
        let (client, server) = (addr(client), addr(server));
        if bytes.starts_with(b"PROXY TCP4") || bytes.starts_with(b"PROXY TCP6 2001") {
            assert_eq!(v1(client, server), bytes);
        }
    }
    let bytes = capture!("haproxy-v2-crc32c-tcp4");
    let unique_id = b"C0000207:C357_C6336401:2390_0008";
    assert_eq!(v2(&Header { unique_id, ..plain("192.0.2.7:50007", "198.51.100.1:9104") }), bytes);
    let bytes = capture!("haproxy-v2-crc32c-tcp6");
    let unique_id = b"20010DB8000000000000000000000007:C359_20010DB8000100000000000000000001:2390_000A";
    assert_eq!(v2(&Header { unique_id, ..plain("[2001:db8::7]:50009", "[2001:db8:1::1]:9104") }), bytes);
}

#[test]
fn headers_are_appended_without_allocation() {
    let name = "n".repeat(MAX_AUTHORITY);
    let header = Header {
        authority: Some(&name),
        alpn: Some(&[b'a'; MAX_ALPN]),
        unique_id: &[7; MAX_UNIQUE_ID],
        ..plain("[2001:db8::7]:1", "[2001:db8::8]:2")
    };
    let mut out = Vec::with_capacity(5 + MAX_ENCODED);
    let room = out.capacity();
    out.extend_from_slice(b"first");
    encode_v2(&mut out, &header);
    assert_eq!((out.len(), out.capacity()), (5 + MAX_ENCODED, room));
    assert!(out.starts_with(b"first\r\n\r\n\0"));
    assert!(matches!(decode(&out[5..]), Decoded::Header { len: MAX_ENCODED, source: Some(_) }));
}

#[test]
fn values_that_are_too_long_are_left_out() {
    let name = "n".repeat(MAX_AUTHORITY + 1);
    let header = plain("192.0.2.7:1", "198.51.100.1:2");
    let too_long = Header {
        authority: Some(&name),
        alpn: Some(&[b'a'; MAX_ALPN + 1]),
        unique_id: &[7; MAX_UNIQUE_ID + 1],
        ..header
    };
    assert_eq!(v2(&too_long), v2(&header));
}

fn any_addr() -> impl Strategy<Value = SocketAddr> {
    let v4 = any::<(u32, u16)>().prop_map(|(ip, port)| SocketAddrV4::new(Ipv4Addr::from(ip), port).into());
    let v6 = any::<(u128, u16)>().prop_map(|(ip, port)| SocketAddrV6::new(Ipv6Addr::from(ip), port, 0, 0).into());
    let mapped = any::<(u32, u16)>()
        .prop_map(|(ip, port)| SocketAddr::new(IpAddr::V6(Ipv4Addr::from(ip).to_ipv6_mapped()), port));
    prop_oneof![v4, v6, mapped]
}

fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

/// As `ppp` has it.
fn ppp_ends(addresses: ppp::v2::Addresses) -> (SocketAddr, SocketAddr) {
    match addresses {
        ppp::v2::Addresses::IPv4(v4) => {
            ((v4.source_address, v4.source_port).into(), (v4.destination_address, v4.destination_port).into())
        }
        ppp::v2::Addresses::IPv6(v6) => {
            ((v6.source_address, v6.source_port).into(), (v6.destination_address, v6.destination_port).into())
        }
        other => panic!("{other:?}"),
    }
}

/// Bytes that get past the signature more often than chance would have it.
fn almost_a_header() -> impl Strategy<Value = Vec<u8>> {
    let noise = prop::collection::vec(any::<u8>(), 0..200);
    let v2 = (prop_oneof![Just(LOCAL), Just(PROXY)], any::<u8>(), prop::collection::vec(any::<u8>(), 0..300))
        .prop_map(|(command, family, block)| raw_v2(command, family, &block));
    let tlvs = prop::collection::vec((0u8..7, prop::collection::vec(any::<u8>(), 0..9)), 0..5).prop_map(|tlvs| {
        let tlvs: Vec<u8> =
            tlvs.iter().flat_map(|(kind, value)| [&[*kind, 0, value.len() as u8], value.as_slice()].concat()).collect();
        raw_tcp4(&tlvs)
    });
    let line = "PROXY (TCP[46]|UNKNOWN) [0-9a-f.: \r\n]{0,100}(\r\n)?".prop_map(String::into_bytes);
    let capture = (0..CAPTURES.len(), any::<prop::sample::Index>(), any::<u8>()).prop_map(|(capture, at, byte)| {
        let mut bytes = CAPTURES[capture].0.to_vec();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        bytes
    });
    prop_oneof![noise, v2, tlvs, line, capture]
}

proptest! {
    #[test]
    fn the_answer_never_changes_once_it_is_not_need_more(bytes in almost_a_header()) {
        let mut answer = Decoded::NeedMore;
        for end in 0..=bytes.len() {
            let now = decode(&bytes[..end]);
            if answer == Decoded::NeedMore {
                answer = now;
                if let Decoded::Header { len, .. } = now {
                    prop_assert_eq!(len, end);
                }
            } else {
                prop_assert_eq!(now, answer);
            }
        }
    }

    #[test]
    fn what_ppp_accepts_of_version_2_is_accepted_alike(bytes in almost_a_header()) {
        let Ok(header) = ppp::v2::Header::try_from(bytes.as_slice()) else { return Ok(()) };
        match decode(&bytes) {
            Decoded::NeedMore => prop_assert!(false, "ppp has a whole header"),
            Decoded::Header { len, source } => {
                prop_assert_eq!(len, header.len());
                let stream = header.protocol == ppp::v2::Protocol::Stream && header.command == ppp::v2::Command::Proxy;
                let tcp = matches!(header.addresses, ppp::v2::Addresses::IPv4(_) | ppp::v2::Addresses::IPv6(_));
                prop_assert_eq!(source.is_some(), stream && tcp);
                if let Some(source) = source {
                    let (client, server) = ppp_ends(header.addresses);
                    prop_assert_eq!((source.client, source.server), (canonical(client), canonical(server)));
                }
            }
            Decoded::Invalid(why) => prop_assert!(matches!(why, Invalid::Tlv | Invalid::Checksum), "{}", why),
        }
    }

    #[test]
    fn version_1_comes_back_as_it_was_sent(client in any_addr(), server in any_addr()) {
        let bytes = v1(client, server);
        prop_assert!(bytes.len() <= MAX_LINE);
        let expected = Source { client: canonical(client), server: canonical(server), unique_id: None };
        prop_assert_eq!(decode(&bytes), Decoded::Header { len: bytes.len(), source: Some(expected) });

        let oracle = ppp::v1::Header::try_from(bytes.as_slice()).unwrap();
        let (from, to) = match oracle.addresses {
            ppp::v1::Addresses::Tcp4(v4) => ppp_ends(ppp::v2::Addresses::IPv4(v4)),
            ppp::v1::Addresses::Tcp6(v6) => ppp_ends(ppp::v2::Addresses::IPv6(v6)),
            ppp::v1::Addresses::Unknown => panic!("addresses lost"),
        };
        prop_assert_eq!((canonical(from), canonical(to)), (expected.client, expected.server));
    }

    #[test]
    fn version_2_comes_back_as_it_was_sent(
        client in any_addr(),
        server in any_addr(),
        authority in prop::option::of("[a-z0-9.-]{0,255}"),
        alpn in prop::option::of(prop::collection::vec(any::<u8>(), 0..=MAX_ALPN)),
        unique_id in prop::collection::vec(any::<u8>(), 0..=MAX_UNIQUE_ID),
    ) {
        let sent = Header { client, server, authority: authority.as_deref(), alpn: alpn.as_deref(), unique_id: &unique_id };
        let bytes = v2(&sent);
        prop_assert!(bytes.len() <= MAX_ENCODED);
        let expected = Source {
            client: canonical(client),
            server: canonical(server),
            unique_id: (!unique_id.is_empty()).then_some(unique_id.as_slice()),
        };
        prop_assert_eq!(decode(&bytes), Decoded::Header { len: bytes.len(), source: Some(expected) });

        let (oracle, tlvs) = ppp_v2(&bytes);
        let (from, to) = ppp_ends(oracle.addresses);
        prop_assert_eq!((canonical(from), canonical(to)), (expected.client, expected.server));
        let value = |kind| tlvs.iter().find(|tlv| tlv.kind == kind).map(|tlv| &*tlv.value);
        prop_assert_eq!(value(TYPE_AUTHORITY), authority.as_deref().map(str::as_bytes));
        prop_assert_eq!(value(TYPE_ALPN), alpn.as_deref());
        prop_assert_eq!(value(TYPE_UNIQUE_ID), expected.unique_id);
        prop_assert_eq!(value(TYPE_CRC32C).map(<[u8]>::len), Some(4));
    }
}
