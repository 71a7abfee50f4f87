//! The PROXY protocol against nginx and HAProxy, as receivers of what the daemon writes and as
//! senders of what it reads; version 1 and 2, IPv4 and IPv6.

use std::io::Write;
use std::path::PathBuf;

use tests::beside_others;
use tests::daemon::{Config, Daemon, HOST};
use tests::netns::{CLIENT, CLIENT_MORE, CLUSTER, ENTRANCE, Net};
use tests::peers::{Peer, certificate, curl};
use tests::rig::{Rig, accept, accept_within, hello, public};
use tests::stream::{End, read_to_end};

/// The entrance node's listener, the cluster's address and the client's, of each family, in the
/// form of a URL.
const FAMILIES: [(&str, &str, &str); 2] =
    [("198.51.100.1:443", CLUSTER[0], CLIENT[0]), ("[2001:db8:1::1]:443", CLUSTER[2], CLIENT[1])];

/// nginx on both addresses of the first cluster node; it answers with what the PROXY header told
/// it.
fn nginx(net: &Net, pem: &std::path::Path) -> Peer {
    let pem = pem.display();
    Peer::nginx(
        net,
        &net.cluster,
        &format!(
            "http {{ server {{
                listen {}:443 ssl proxy_protocol; listen [{}]:443 ssl proxy_protocol;
                ssl_certificate {pem}; ssl_certificate_key {pem};
                location / {{ return 200 '$proxy_protocol_addr $proxy_protocol_server_addr $proxy_protocol_tlv_authority $proxy_protocol_tlv_alpn'; }}
            }} }}",
            CLUSTER[0], CLUSTER[2]
        ),
    )
}

fn haproxy(net: &Net, pem: &std::path::Path) -> Peer {
    let pem = pem.display();
    Peer::haproxy(
        net,
        &net.cluster,
        &format!(
            "frontend f\n    mode http\n    bind {}:443 accept-proxy ssl crt {pem}\n    bind [{}]:443 v6only accept-proxy ssl crt {pem}\n    \
             http-request return status 200 content-type text/plain lf-string \"%[src] %[dst] %[fc_pp_authority]\"",
            CLUSTER[0], CLUSTER[2]
        ),
    )
}

fn target(cluster: &str) -> String {
    if cluster.contains(':') { format!("[{cluster}]:443") } else { format!("{cluster}:443") }
}

/// What `curl` gets through a daemon that writes this version, from a client of each family to a
/// target of each family.
fn told_by_receiver(
    receiver: fn(&Net, &std::path::Path) -> Peer,
    version: &str,
    expected: impl Fn(&str, &str) -> String,
) {
    let _turn = beside_others();
    let net = Net::new();
    let pem = certificate(&net, &[HOST]);
    let peer = receiver(&net, &pem);
    for (_, cluster, _) in FAMILIES {
        let config = Config::new("auto").targets([&target(cluster)]).upstream(&format!("send_proxy = \"{version}\""));
        let _daemon = Daemon::start(&net, &config);
        for (listener, _, client) in FAMILIES {
            let told = curl(&net.client, &pem, HOST, listener, &["--http1.1"])
                .unwrap_or_else(|e| panic!("{e} from {listener} to {cluster}\n{}", peer.log()));
            let ip = listener.trim_end_matches(":443").trim_matches(['[', ']']);
            assert_eq!(told.trim(), expected(client, ip), "through {listener} to {cluster}");
        }
    }
}

#[test]
fn nginx_learns_client_and_authority_from_version_2() {
    told_by_receiver(nginx, "v2", |client, entrance| format!("{client} {entrance} {HOST} http/1.1"));
}

#[test]
fn nginx_learns_the_client_from_version_1() {
    told_by_receiver(nginx, "v1", |client, entrance| format!("{client} {entrance}"));
}

#[test]
fn haproxy_learns_client_and_authority_from_version_2() {
    told_by_receiver(haproxy, "v2", |client, entrance| format!("{client} {entrance} {HOST}"));
}

#[test]
fn haproxy_learns_the_client_from_version_1() {
    told_by_receiver(haproxy, "v1", |client, entrance| format!("{client} {entrance}"));
}

#[test]
fn version_2_carries_authority_alpn_a_unique_id_and_a_correct_checksum() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("auto").upstream("send_proxy = \"v2\""));
    let mut ids = Vec::new();
    for _ in 0..3 {
        let client = rig.open();
        let (_server, preamble) = accept(&rig.upstream, true);
        let header = preamble.proxy.expect("asked for");
        assert_eq!((header.version, header.source), (2, client.local_addr().expect("bound")));
        assert_eq!(header.destination, public());
        let tlv = |kind: u8| header.tlvs.iter().find(|(k, _)| *k == kind).map(|(_, v)| v.clone());
        assert_eq!(tlv(0x02).as_deref(), Some(HOST.as_bytes()), "PP2_TYPE_AUTHORITY");
        assert!(tlv(0x01).is_some(), "PP2_TYPE_ALPN");
        // CRC32C itself is checked by HAProxy, which refuses a wrong one.
        assert_eq!(tlv(0x03).map(|v| v.len()), Some(4), "PP2_TYPE_CRC32C");
        let id = tlv(0x05).expect("PP2_TYPE_UNIQUE_ID");
        assert!(!id.is_empty() && id.len() <= 128);
        ids.push(id);
    }
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 3, "ids are unique");
}

#[test]
fn a_trusted_nginx_in_front_is_believed() {
    // nginx writes version 1 unless told otherwise.
    believed(|net, listener, source, entrance| {
        Peer::nginx(
            net,
            &net.client,
            &format!(
                "stream {{ server {{ listen {listener}; proxy_bind {source}; proxy_pass {entrance}; proxy_protocol on; }} }}"
            ),
        )
    });
}

#[test]
fn a_trusted_haproxy_with_version_1_in_front_is_believed() {
    believed(|net, listener, source, entrance| haproxy_in_front(net, listener, source, entrance, "send-proxy"));
}

#[test]
fn a_trusted_haproxy_with_version_2_in_front_is_believed() {
    believed(|net, listener, source, entrance| haproxy_in_front(net, listener, source, entrance, "send-proxy-v2"));
}

fn haproxy_in_front(net: &Net, listener: &str, source: &str, entrance: &str, option: &str) -> Peer {
    let source = if source.contains(':') { format!("[{source}]:0") } else { source.to_owned() };
    let text =
        format!("listen l\n    mode tcp\n    bind {listener}\n    source {source}\n    server e {entrance} {option}");
    Peer::haproxy(net, &net.client, &text)
}

/// A visitor (second extra address) goes through a proxy (first extra address) in front of the
/// entrance node; the ingress must learn of the visitor.
fn believed(front: impl Fn(&Net, &str, &str, &str) -> Peer) {
    let _turn = beside_others();
    let net = Net::new();
    let pem: PathBuf = certificate(&net, &[HOST]);
    let ingress = nginx(&net, &pem);
    let trusted = format!("accept_proxy = [\"{}/32\", \"{}/128\"]", CLIENT_MORE[0], CLIENT_MORE[2]);
    let config = Config::new("auto").listener(&trusted).upstream("send_proxy = \"v2\"");
    let daemon = Daemon::start(&net, &config);
    for (proxy, visitor, entrance) in
        [(CLIENT_MORE[0], CLIENT_MORE[1], ENTRANCE[0]), (CLIENT_MORE[2], CLIENT_MORE[3], ENTRANCE[1])]
    {
        let (listener, entrance) = if proxy.contains(':') {
            (format!("[{proxy}]:8443"), format!("[{entrance}]:443"))
        } else {
            (format!("{proxy}:8443"), format!("{entrance}:443"))
        };
        let front = front(&net, &listener, proxy, &entrance);
        let told = curl(&net.client, &pem, HOST, &listener, &["--http1.1", "--interface", visitor])
            .unwrap_or_else(|e| panic!("{e}\nfront: {}\ningress: {}", front.log(), ingress.log()));
        assert_eq!(told.trim(), format!("{visitor} {proxy} {HOST} http/1.1"));
        tests::eventually(tests::rig::PATIENCE, "the access log names the visitor", || {
            daemon.access_log().iter().any(|line| line.contains(visitor)).then_some(())
        });
    }
}

#[test]
fn nobody_elses_header_is_looked_at() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("auto").listener(&format!("accept_proxy = [\"{}/32\"]", CLIENT_MORE[0])));
    let mut stranger = rig.connect();
    stranger.write_all(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 443\r\n").expect("sent");
    let _ = stranger.write_all(&hello());
    let (answer, end) = read_to_end(&stranger, tests::rig::PATIENCE);
    assert_eq!(answer, b"");
    assert_ne!(end, End::Silence);
    rig.daemon.wait_metric("dataplane_connections_rejected_total", &[("reason", "not_tls")], 1.0);
    assert!(accept_within(&rig.upstream, std::time::Duration::ZERO).is_none());
    // Without a header the same stranger is welcome.
    rig.pair();
}

#[test]
fn a_header_and_hello_split_at_any_byte_are_understood() {
    let _turn = beside_others();
    let config =
        Config::new("auto").listener(&format!("accept_proxy = [\"{}/32\"]", CLIENT[0])).upstream("send_proxy = \"v1\"");
    let rig = Rig::new(&config);
    for at in (1..60).chain([100, 150]) {
        let sent = [&b"PROXY TCP4 192.0.2.1 192.0.2.2 5678 443\r\n"[..], &hello()].concat();
        let client = rig.connect();
        tests::stream::send_in_segments(&client, [&sent[..at], &sent[at..]]).expect("sent");
        let (_server, preamble) = accept(&rig.upstream, true);
        let header = preamble.proxy.expect("asked for");
        assert_eq!(header.source.to_string(), "192.0.2.1:5678", "split at {at}");
        assert_eq!(header.destination.to_string(), "192.0.2.2:443");
        assert!(tests::stream::is_alike(&preamble.hello, &hello()));
    }
}
