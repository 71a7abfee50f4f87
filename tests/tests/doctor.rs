//! What the doctor says of targets and of the entrance node.

use std::process::Command;

use serde_json::Value;
use tests::beside_others;
use tests::daemon::{Config, Daemon, HOST};
use tests::netns::Net;
use tests::peers::{Peer, certificate};

const FIRST: &str = "100.64.0.2:443";
const SECOND: &str = "100.64.0.3:443";
const THIRD: &str = "[fd7a:115c:a1e0::2]:443";
const NOBODY: &str = "[fd7a:115c:a1e0::3]:443";

fn of<'a>(answers: &'a Value, target: &str) -> &'a Value {
    let answers = answers.as_array().expect("a list");
    answers.iter().find(|a| a["target"] == target).unwrap_or_else(|| panic!("{target} is missing: {answers:?}"))
}

#[test]
fn it_says_which_proxy_header_a_target_wants_and_what_to_change() {
    let _turn = beside_others();
    let net = Net::new();
    let pem = certificate(&net, &[HOST]);
    let node = |listen: &str, more: &str| {
        let pem = pem.display();
        let server = format!("listen {listen}; ssl_certificate {pem}; ssl_certificate_key {pem}; {more} return 200;");
        Peer::nginx(&net, &net.cluster, &format!("http {{ server {{ {server} }} }}"))
    };
    let _wants = node(&format!("{FIRST} ssl proxy_protocol"), "");
    let _plain = node(&format!("{SECOND} ssl"), "");
    let _other = node(&format!("{THIRD} ssl proxy_protocol"), "ssl_reject_handshake on;");
    let targets = [FIRST, SECOND, THIRD, NOBODY];

    let daemon = Daemon::start(&net, &Config::new("auto").targets(targets).upstream("send_proxy = \"v2\""));
    let out = daemon.cli(&["doctor", "--upstreams", "--json"]);
    assert!(!out.status.success(), "not all of them work as configured");
    let answers: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    let works = |target: &str| -> Vec<bool> {
        of(&answers, target)["attempts"].as_array().expect("a list").iter().map(|a| a["ok"] == true).collect()
    };
    let advice = |target: &str| of(&answers, target)["advice"].as_str().unwrap_or_default().to_owned();
    assert_eq!(of(&answers, FIRST)["host"], HOST);
    assert_eq!((works(FIRST), advice(FIRST)), (vec![false, true, true], String::new()), "off, v1, v2");
    assert_eq!(works(SECOND), [true, false, false]);
    assert!(advice(SECOND).contains("write `send_proxy = \"off\"` in [upstreams.cluster]"), "{}", advice(SECOND));
    assert!(advice(THIRD).contains(&format!("does not serve {HOST}")), "{}", advice(THIRD));
    assert!(advice(NOBODY).contains("nothing answers"), "{}", advice(NOBODY));
    let text = String::from_utf8(daemon.cli(&["doctor", "--upstreams"]).stdout).expect("text");
    assert!(text.contains("send_proxy = \"v2\" (configured): ServerHello"), "{text}");

    daemon.rewrite(&Config::new("auto").targets([FIRST]));
    let out = daemon.cli(&["doctor", "--upstreams", "--json"]);
    let answers: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    let advice = of(&answers, FIRST)["advice"].as_str().expect("advice");
    assert!(advice.contains("wants a PROXY header: write `send_proxy = \"v2\"`"), "{advice}");

    daemon.rewrite(&Config::new("auto").targets([SECOND]));
    let out = daemon.cli(&["doctor", "--upstreams"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
}

#[test]
fn a_rule_that_takes_the_port_before_our_socket_is_named() {
    let _turn = beside_others();
    let net = Net::new();
    let daemon = Daemon::start(&net, &Config::new("auto"));
    let nat = || {
        let doctor = daemon.json(&["doctor", "--json"]);
        doctor["entrance"].as_array().expect("a list").iter().find(|f| f["check"] == "NAT").expect("it looks").clone()
    };
    let before = nat();
    assert_eq!(
        (&before["ok"], before["text"].as_str()),
        (&Value::Bool(true), Some("no rule takes connections to port 443"))
    );
    // As servicelb's port mapping looks on a k3s node.
    let iptables = |arguments: &str| {
        let path = "/usr/sbin:/sbin:/usr/bin:/bin";
        net.entrance.output(Command::new("iptables").env("PATH", path).args(["-t", "nat"]).args(arguments.split(' ')));
    };
    iptables("-N CNI-HOSTPORT-DNAT");
    iptables("-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT");
    iptables("-A CNI-HOSTPORT-DNAT -p tcp -m multiport --dports 80,443 -j DNAT --to-destination 10.42.0.8:443");
    let after = nat();
    assert_eq!(after["ok"], false);
    assert!(
        after["text"].as_str().is_some_and(|t| t.contains("--dports 80,443") && t.contains("servicelb")),
        "{after}"
    );
}
