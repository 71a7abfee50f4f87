//! Connections that come back: a target that NAT leads to this machine again. One client costs a
//! bounded number of connections, and the target is named.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use tests::daemon::{Config, Daemon, HOST};
use tests::netns::{CLIENT, CLIENT_MORE, CLUSTER, ENTRANCE, ENTRANCE_INSIDE, Host, Net};
use tests::rig::{PATIENCE, accept_within, hello, public};
use tests::stream::{End, read_to_end};
use tests::{beside_others, eventually};

/// An address of nobody, which the entrance node's own NAT leads back to its public one, as a
/// provider's 1:1 NAT does.
const ELSEWHERE: &str = "203.0.113.7";

/// Leads connections of the entrance node to that address back to it; `source`: what they seem to
/// come from.
fn hairpin(net: &Net, port: u16, source: &str) {
    net.entrance.ip(&format!("route replace {ELSEWHERE}/32 via {}\n", CLIENT[0]));
    net.entrance.iptables(&format!(
        "-t nat -A OUTPUT -d {ELSEWHERE} -p tcp --dport {port} -j DNAT --to-destination {}:{port}\n\
         -t nat -A POSTROUTING -d {} -p tcp --dport {port} -o lo -j SNAT --to-source {source}",
        ENTRANCE[0], ENTRANCE[0]
    ));
}

fn refused_as_loop(daemon: &Daemon, listener: &str, most: f64) {
    daemon.wait_metric("dataplane_connections_rejected_total", &[("listener", listener), ("reason", "loop")], 1.0);
    daemon.wait_metric("dataplane_connections_active", &[], 0.0);
    let accepted = daemon.metric("dataplane_connections_accepted_total", &[("listener", listener)]);
    assert!(accepted <= most, "one client made {accepted} connections");
    daemon.wait_log(&["come back to this node", ELSEWHERE]);
}

#[test]
fn a_target_that_is_this_node_behind_nat_costs_a_client_two_connections_and_is_named() {
    let _turn = beside_others();
    for send_proxy in ["off", "v2"] {
        let net = Net::new();
        hairpin(&net, 443, "100.64.0.1");
        let target = format!("{ELSEWHERE}:443");
        let config = Config::new("auto").targets([&target]).upstream(&format!("send_proxy = \"{send_proxy}\""));
        let config = if send_proxy == "off" { config } else { config.listener("accept_proxy = [\"100.64.0.1\"]") };
        let daemon = Daemon::start(&net, &config);
        let mut client = net.client.connect(public()).expect("accepted");
        client.write_all(&hello()).expect("sent");
        let (answer, end) = read_to_end(&client, PATIENCE);
        assert!(end != End::Silence && answer.first().is_none_or(|kind| *kind == 21), "{answer:02x?}, {end:?}");
        drop(client);
        refused_as_loop(&daemon, "public", 2.0);
        let status = daemon.json(&["status", "--json"]);
        assert_eq!(status["upstreams"][0]["targets"][0]["loops"][0], 1, "{status:#}");
        let text = String::from_utf8(daemon.cli(&["status"]).stdout).expect("text");
        assert!(text.contains("1 connection may have come back"), "{text}");
    }
}

#[test]
fn a_challenge_that_comes_back_is_refused() {
    let _turn = beside_others();
    let net = Net::new();
    hairpin(&net, 80, "100.64.0.1");
    let target = format!("{ELSEWHERE}:443");
    let web = "[listeners.web]\nmode = \"http\"\nbind = [\"198.51.100.1:80\"]";
    let daemon = Daemon::start(&net, &Config::new("auto").targets([&target]).more(web));
    let mut client = connect(&net, 80);
    let request = format!("GET /.well-known/acme-challenge/abc HTTP/1.1\r\nHost: {HOST}\r\n\r\n");
    client.write_all(request.as_bytes()).expect("sent");
    assert_ne!(read_to_end(&client, PATIENCE).1, End::Silence);
    daemon.wait_metric("dataplane_connections_rejected_total", &[("listener", "web"), ("reason", "loop")], 1.0);
    let accepted = daemon.metric("dataplane_connections_accepted_total", &[("listener", "web")]);
    assert!(accepted <= 40.0, "one client made {accepted} connections");
}

#[test]
fn a_forwarded_port_that_leads_back_to_itself_ends_by_what_can_be_known() {
    let _turn = beside_others();
    // 1:1 NAT leaves the port as it is. Where a port is changed, too, only the number of
    // connections from there tells.
    for (source, most) in [(ELSEWHERE.to_owned(), 8.0), (format!("{ELSEWHERE}:20000-30000"), 80.0)] {
        let net = Net::new();
        hairpin(&net, 2222, &source);
        let port = format!(
            "[listeners.git]\nmode = \"tcp\"\nbind = [\"198.51.100.1:2222\"]\nupstream = \"git\"\n\
             [upstreams.git]\ntargets = [\"{ELSEWHERE}:2222\"]"
        );
        let daemon = Daemon::start(&net, &Config::new("auto").more(&port));
        let client = connect(&net, 2222);
        let _ = (&client).write_all(b"anything");
        let rejected = || daemon.metric("dataplane_connections_rejected_total", &[("reason", "loop")]) > 0.0;
        eventually(PATIENCE, "it is found out", || rejected().then_some(()));
        daemon.wait_log(&["come back to this node", ELSEWHERE]);
        drop(client);
        daemon.wait_metric("dataplane_connections_active", &[], 0.0);
        let accepted = daemon.metric("dataplane_connections_accepted_total", &[("listener", "git")]);
        assert!(accepted <= most, "one client made {accepted} connections");
    }
}

/// The port that forwards, with `targets`; `bind` is on the host.
fn forwarding(host: &Host, net: &Net, bind: &[&str], target: &str, limits: &str) -> Daemon {
    let bind: Vec<String> = bind.iter().map(|address| format!("{address}:2222")).collect();
    Daemon::start_on(net, host, |dir| {
        format!(
            "[listeners.git]\nmode = \"tcp\"\nbind = {bind:?}\nupstream = \"git\"\n\
             [upstreams.git]\ntargets = [\"{target}:2222\"]\n[limits]\n{limits}\n\
             [admin]\nbind = \"127.0.0.1:9443\"\nsocket = \"{}/admin.sock\"\n",
            dir.display()
        )
    })
}

#[test]
fn a_loop_through_two_nodes_that_dial_from_other_addresses_than_they_listen_on_is_bounded() {
    let _turn = beside_others();
    let net = Net::new();
    net.entrance.ip("addr add 100.64.0.4/24 dev inside\n");
    let limits = "max_connections = 3000";
    let one = forwarding(&net.entrance, &net, &[ENTRANCE[0], "100.64.0.4"], CLUSTER[1], limits);
    let other = forwarding(&net.cluster, &net, &[CLUSTER[1]], "100.64.0.4", limits);
    let client = connect(&net, 2222);
    let _ = (&client).write_all(b"anything");
    let rejected = |daemon: &Daemon| daemon.metric("dataplane_connections_rejected_total", &[("reason", "loop")]);
    eventually(PATIENCE, "it is found out", || (rejected(&one) + rejected(&other) > 0.5).then_some(()));
    let found = if rejected(&one) > 0.5 { (&one, CLUSTER[1]) } else { (&other, "100.64.0.4") };
    found.0.wait_log(&["back to this node", found.1]);
    // What is refused ends the whole loop, also while the client stays.
    assert_ne!(read_to_end(&client, PATIENCE).1, End::Silence);
    drop(client);
    for daemon in [&one, &other] {
        daemon.wait_metric("dataplane_connections_active", &[], 0.0);
        let accepted = daemon.metric("dataplane_connections_accepted_total", &[]);
        assert!(accepted < 120.0, "one client made {accepted} connections");
    }
}

#[test]
fn clients_that_a_service_leaves_without_a_word_are_no_loop() {
    let _turn = beside_others();
    let net = Net::new();
    let service = net.cluster.listen(&format!("{}:2222", CLUSTER[0]));
    let daemon = forwarding(&net.entrance, &net, &[ENTRANCE[0]], CLUSTER[0], "max_connections = 3000");
    let at = format!("{}:2222", ENTRANCE[0]).parse().expect("an address");
    let mut open = Vec::new();
    // The service that never speaks, with many clients; then one that does, with many more of one
    // address.
    for address in [CLIENT[0], CLIENT_MORE[0], CLIENT_MORE[1]] {
        for _ in 0..90 {
            let client = net.client.connect_from(address.parse().expect("an address"), at).expect("accepted");
            open.push((client, accept_within(&service, PATIENCE).expect("it is passed on")));
        }
    }
    for (client, server) in &mut open {
        server.write_all(b"!").expect("sent");
        client.read_exact(&mut [0]).expect("it is passed on");
    }
    for _ in 0..200 {
        let mut client = connect(&net, 2222);
        let mut server = accept_within(&service, PATIENCE).expect("it is passed on");
        server.write_all(b"!").expect("sent");
        client.read_exact(&mut [0]).expect("it is passed on");
        open.push((client, server));
    }
    // One behind the NAT of a target comes from a port that we have dialled that target from.
    let port = open[0].1.peer_addr().expect("connected").port();
    let home = format!("{}:{port}", CLUSTER[0]).parse().expect("an address");
    let inside = format!("{}:2222", ENTRANCE[0]).parse().expect("an address");
    net.cluster.ip(&format!("route add {}/32 via {}\n", ENTRANCE[0], ENTRANCE_INSIDE[0]));
    let client = net.cluster.connect_from_port(home, inside).expect("accepted");
    let _server = accept_within(&service, PATIENCE).expect("it is passed on");
    let rejected = daemon.metric("dataplane_connections_rejected_total", &[]);
    assert_eq!(rejected as u64, 0, "nobody is refused");
    drop(client);
}

fn connect(net: &Net, port: u16) -> TcpStream {
    let at: SocketAddr = format!("{}:{port}", ENTRANCE[0]).parse().expect("an address");
    net.client.connect(at).expect("accepted")
}
