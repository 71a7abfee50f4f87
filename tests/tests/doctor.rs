//! What the doctor says of targets and of the entrance node.

use std::process::Command;

use serde_json::Value;
use tests::beside_others;
use tests::daemon::{Config, Daemon, HOST};
use tests::forge::{Forge, SSH_PORT};
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
        let out = daemon.cli(&["doctor", "--json"]);
        let doctor: Value = serde_json::from_slice(&out.stdout).expect("JSON");
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

#[test]
fn what_a_syn_meets_in_each_kind_of_rules_reaches_the_exit_status() {
    let _turn = beside_others();
    let net = Net::new();
    let daemon = Daemon::start(&net, &Config::new("auto"));
    let run = |program: &str, arguments: &str| {
        let path = "/usr/sbin:/sbin:/usr/bin:/bin";
        net.entrance.output(Command::new(program).env("PATH", path).args(arguments.split_whitespace()));
    };
    let nat = || {
        let out = daemon.cli(&["doctor", "--json"]);
        let doctor: Value = serde_json::from_slice(&out.stdout).expect("JSON");
        let found = doctor["entrance"].as_array().expect("a list").iter().find(|f| f["check"] == "NAT");
        (found.expect("it looks").clone(), out.status.code())
    };
    let (before, _) = nat();
    assert_eq!(before["ok"], true, "{before}");
    let broken = daemon.dir().join("broken.toml");
    std::fs::write(&broken, "nothing = 1\n").expect("written");
    let mut command = Command::new(tests::daemon::binary());
    let out = net.entrance.run(|| command.arg("doctor").arg("--config").arg(&broken).output()).expect("it runs");
    assert_eq!(out.status.code(), Some(1), "a configuration that is wrong bites");
    for program in ["iptables-nft", "iptables-legacy"] {
        for rule in [
            "-i eth+ -p tcp -j DNAT --to-destination 10.0.0.2",
            "-d 198.51.100.1 -p tcp -j DNAT --to-destination 10.0.0.2",
            "-d 198.51.100.0/24 -p tcp -j DNAT --to-destination 10.0.0.2",
            "-p tcp ! --dport 22 -j DNAT --to-destination 10.0.0.2",
            "-p tcp -m multiport ! --dports 22,51820 -j REDIRECT --to-ports 1",
        ] {
            run(program, &format!("-t nat -A PREROUTING {rule}"));
            let (found, code) = nat();
            assert_eq!((&found["ok"], code), (&Value::Bool(false), Some(1)), "{program} {rule}: {found}");
            assert!(found["text"].as_str().is_some_and(|text| text.contains("a rule takes")), "{found}");
            run(program, "-t nat -F PREROUTING");
        }
        let unreadable = "-p tcp -m recent --rcheck --name ours -j DNAT --to-destination 10.0.0.2";
        run(program, &format!("-t nat -A PREROUTING {unreadable}"));
        let (found, code) = nat();
        assert_eq!((&found["ok"], code), (&Value::Bool(false), Some(1)), "{program}: {found}");
        assert!(found["text"].as_str().is_some_and(|text| text.contains("cannot be read")), "{found}");
        run(program, "-t nat -F PREROUTING");
        run(program, "-t nat -A PREROUTING -d 198.51.100.9 -p tcp -j DNAT --to-destination 10.0.0.2");
        assert_eq!(nat().0["ok"], true, "another machine's address");
        run(program, "-t nat -F PREROUTING");
    }
    let out = daemon.cli(&["doctor", "--json"]);
    let doctor: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    let all = doctor["entrance"].as_array().expect("a list");
    let limit = all.iter().find(|f| f["check"] == "connections").expect("it looks");
    let most = daemon.json(&["status", "--json"])["limits"]["max_connections"].clone();
    let says = format!("at most {most} in the daemon that runs, by ");
    assert!(limit["text"].as_str().is_some_and(|text| text.starts_with(&says)), "{limit}");
    run("nft", "add table ip early");
    run("nft", "add chain ip early arrive { type filter hook prerouting priority raw ; }");
    run("nft", "add rule ip early arrive tcp dport 443 tcp dport set 8443");
    let (found, code) = nat();
    assert_eq!((&found["ok"], code), (&Value::Bool(false), Some(1)), "{found}");
    run("nft", "delete table ip early");
    // A table with the name of one of iptables' own, as nft's manual has it, alone and beside those.
    run("nft", "delete table ip nat");
    run("nft", "add table ip nat");
    run("nft", "add chain ip nat arrive { type nat hook prerouting priority dstnat ; }");
    run("nft", "add rule ip nat arrive tcp dport 443 dnat to 10.0.0.2");
    let (found, code) = nat();
    assert_eq!((&found["ok"], code), (&Value::Bool(false), Some(1)), "{found}");
    run("iptables-nft", "-t nat -A PREROUTING -d 198.51.100.9 -p tcp -j ACCEPT");
    let (found, code) = nat();
    assert_eq!((&found["ok"], code), (&Value::Bool(false), Some(1)), "{found}");
    run("nft", "delete table ip nat");
    run("nft", "add table inet mine");
    run("nft", "add chain inet mine arrive { type nat hook prerouting priority -100 ; }");
    run("nft", "add set inet mine ports { type inet_service ; flags interval ; elements = { 80, 400-500 } ; }");
    run("nft", "add chain inet mine other");
    run("nft", "add rule inet mine other meta l4proto tcp redirect to :1");
    for (rule, takes) in [
        ("tcp dport != 22 dnat ip to 10.0.0.2", true),
        ("tcp dport @ports redirect to :1", true),
        ("tcp dport { 80, 443 } redirect to :1", true),
        ("ip daddr 198.51.100.0/24 meta l4proto tcp dnat ip to 10.0.0.2", true),
        ("iifname != lo meta l4proto tcp dnat ip to 10.0.0.2", true),
        ("fib daddr type local tcp dport vmap { 443 : goto other }", true),
        ("dnat ip to tcp dport map { 443 : 10.0.0.2 }", true),
        ("dnat ip to tcp dport map { 80 : 10.0.0.2 }", false),
        ("tcp dport vmap { 80 : goto other }", false),
        ("ip daddr 198.51.100.9 tcp dport 443 dnat ip to 10.0.0.2", false),
        ("udp dport 443 redirect to :1", false),
    ] {
        run("nft", &format!("add rule inet mine arrive {rule}"));
        let (found, code) = nat();
        assert_eq!(found["ok"], !takes, "{rule}: {found}");
        assert!(!takes || code == Some(1), "{rule}");
        run("nft", "flush chain inet mine arrive");
    }
}

#[test]
fn a_target_behind_an_mtu_black_hole_is_named_as_that() {
    let _turn = beside_others();
    let net = Net::new();
    let pem = certificate(&net, &[HOST]);
    let pem = pem.display();
    let server = format!("listen {FIRST} ssl; ssl_certificate {pem}; ssl_certificate_key {pem}; return 200;");
    let _node = Peer::nginx(&net, &net.cluster, &format!("http {{ server {{ {server} }} }}"));
    let health = "health = { interval = \"500ms\", timeout = \"1s\", fall = 1, rise = 1, tls = \"HOST\" }";
    let config = Config::new("auto").targets([FIRST]).upstream(&health.replace("HOST", HOST));
    let daemon = Daemon::start(&net, &config);
    assert!(daemon.cli(&["doctor", "--upstreams"]).status.success(), "a large hello gets through");
    // Large packets are lost without a word.
    net.cluster.iptables("-A INPUT -p tcp --dport 443 -m length --length 1281:65535 -j DROP");
    let out = daemon.cli(&["doctor", "--upstreams"]);
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(!out.status.success() && text.contains("a small hello gets through"), "{text}");
    assert!(text.contains("tcp_mtu_probing") && text.contains("clamp"), "{text}");
    daemon.wait_log(&["never acknowledged", "tcp_mtu_probing"]);
    let status = String::from_utf8_lossy(&daemon.cli(&["status"]).stdout).into_owned();
    assert!(status.contains("never acknowledged"), "{status}");
}

#[test]
fn a_greeting_that_the_header_spoils_and_a_challenge_that_is_refused_are_told() {
    let _turn = beside_others();
    let net = Net::new();
    let pem = certificate(&net, &[HOST]);
    let pem = pem.display();
    let server = format!("listen {FIRST} ssl; listen 100.64.0.2:80; ssl_certificate {pem}; ssl_certificate_key {pem};");
    let refuses = "server { listen 100.64.0.2:81; return 400; }";
    let _node = Peer::nginx(&net, &net.cluster, &format!("http {{ server {{ {server} return 404; }} {refuses} }}"));
    let _forge = Forge::start(&net, &net.cluster);
    let web =
        |port: u16| format!("[listeners.web]\nmode = \"http\"\nbind = [\"198.51.100.1:80\"]\nacme_port = {port}\n");
    let ssh = |send_proxy: &str| {
        format!(
            "[listeners.git]\nmode = \"tcp\"\nbind = [\"198.51.100.1:2222\"]\nupstream = \"ssh\"\n\
             [upstreams.ssh]\ntargets = [\"100.64.0.2:{SSH_PORT}\"]\nsend_proxy = \"{send_proxy}\"\n"
        )
    };
    let config = |send_proxy: &str, port: u16| {
        Config::new("auto").targets([FIRST]).more(&format!("{}{}", ssh(send_proxy), web(port)))
    };
    let daemon = Daemon::start(&net, &config("v2", 80));
    let asked = || {
        let out = daemon.cli(&["doctor", "--upstreams"]);
        (String::from_utf8_lossy(&out.stdout).into_owned(), out.status.success())
    };
    let (text, good) = asked();
    assert!(
        !good
            && text.contains("it greets: SSH-2.0")
            && text.contains("write `send_proxy = \"off\"` in [upstreams.ssh]"),
        "{text}"
    );
    assert!(text.contains("ACME challenge to port 80: HTTP/1.1 404"), "{text}");
    daemon.rewrite(&config("off", 80));
    let (text, good) = asked();
    assert!(good, "{text}");
    daemon.rewrite(&config("off", 81));
    let (text, good) = asked();
    assert!(!good && text.contains("ACME challenge to port 81: no: HTTP/1.1 400"), "{text}");
    daemon.rewrite(&config("off", 82));
    let (text, good) = asked();
    assert!(!good && text.contains("ACME challenge to port 82: no: refused"), "{text}");
}

#[test]
fn a_firewall_that_drops_every_client_of_the_port_is_named() {
    let _turn = beside_others();
    let net = Net::new();
    let daemon = Daemon::start(&net, &Config::new("auto"));
    let run = |program: &str, arguments: &str| {
        let path = "/usr/sbin:/sbin:/usr/bin:/bin";
        net.entrance.output(Command::new(program).env("PATH", path).args(arguments.split_whitespace()));
    };
    let firewall = || {
        let out = daemon.cli(&["doctor", "--json"]);
        let doctor: Value = serde_json::from_slice(&out.stdout).expect("JSON");
        let found = doctor["entrance"].as_array().expect("a list").iter().find(|f| f["check"] == "firewall");
        (found.expect("it looks").clone(), out.status.code())
    };
    let drops = |by: &str| {
        let (found, code) = firewall();
        assert_eq!((&found["ok"], code), (&Value::Bool(false), Some(1)), "{by}: {found}");
        let text = found["text"].as_str().unwrap_or_default();
        assert!(text.contains(by) && text.contains("ufw allow 443/tcp"), "{by}: {text}");
    };
    let passes = |why: &str| assert_eq!(firewall().0["ok"], true, "{why}: {}", firewall().0);
    passes("no rules at all");
    for program in ["iptables-nft", "iptables-legacy"] {
        for rule in
            ["-i lo -j ACCEPT", "-m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT", "-p tcp --dport 22 -j ACCEPT"]
        {
            run(program, &format!("-A INPUT {rule}"));
        }
        passes("the policy lets it in");
        run(program, "-P INPUT DROP");
        drops("the policy of chain INPUT in table filter is DROP");
        run(program, "-A INPUT -p tcp --dport 443 -j ACCEPT");
        passes("a rule lets it in");
        run(program, "-I INPUT 1 -p tcp -m multiport --dports 80,443 -j REJECT");
        drops("--dports 80,443 -j REJECT");
        run(program, "-D INPUT 1");
        run(program, "-I INPUT 1 -s 192.0.2.0/24 -j DROP");
        passes("it drops some clients");
        run(program, "-F INPUT");
        run(program, "-P INPUT ACCEPT");
    }
    run("nft", "add table inet wall");
    run("nft", "add chain inet wall in { type filter hook input priority 0 ; policy drop ; }");
    run("nft", "add rule inet wall in ct state established,related accept");
    run("nft", "add rule inet wall in iifname lo accept");
    run("nft", "add rule inet wall in tcp dport { 22, 80 } accept");
    drops("the policy of chain in of table inet wall is drop");
    run("nft", "insert rule inet wall in tcp dport { 80, 443 } accept");
    passes("a rule lets it in");
    run("nft", "insert rule inet wall in tcp dport 443 drop");
    drops("tcp dport 443 drop");
}
