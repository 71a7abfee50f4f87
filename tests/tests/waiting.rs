//! Addresses that this machine does not have yet, tailscale0's above all, and what else must not
//! keep clients out.

use std::io::Write;
use std::net::TcpStream;
use std::process::Command;

use tests::daemon::{Config, Daemon, Limits, binary};
use tests::netns::Net;
use tests::rig::{PATIENCE, Rig, accept, hello, public};
use tests::{beside_others, eventually};

/// Of a device that is not there yet.
const LATER: &str = "100.64.9.9";

fn add_address(net: &Net) {
    net.entrance.ip(&format!("addr add {LATER}/32 dev inside\n"));
}

#[test]
fn a_private_address_that_is_missing_keeps_no_public_one_shut_and_is_listened_on_when_it_comes() {
    let _turn = beside_others();
    let private = format!("[listeners.private]\nbind = [\"{LATER}:8443\"]");
    for by_reload in [false, true] {
        let config = Config::new("auto");
        let rig = Rig::new(&if by_reload { Config::new("auto") } else { Config::new("auto").more(&private) });
        if by_reload {
            rig.daemon.rewrite(&config.more(&private));
            let out = rig.daemon.cli(&["reload"]);
            let said = String::from_utf8_lossy(&out.stdout);
            assert!(out.status.success() && said.contains(&format!("{LATER}:8443")), "{said}");
        }
        rig.pair();
        let labels = [("listener", "private"), ("address", "100.64.9.9:8443")];
        assert_eq!(rig.daemon.metric("dataplane_listener_bound", &labels) as u64, 0);
        assert_eq!(rig.daemon.metric("dataplane_listener_bound", &[("listener", "public")]) as u64, 2, "IPv4 and IPv6");
        let status = rig.daemon.json(&["status", "--json"]);
        assert_eq!(status["waiting"][0]["address"], "100.64.9.9:8443", "{status:#}");
        assert_eq!(status["waiting"][0]["for"], "listener private");
        let (code, said) = rig.daemon.get("/readyz").expect("answers");
        assert!(code == 200 && said.contains("not listening on 100.64.9.9:8443 (listener private) yet"), "{said}");

        add_address(&rig.net);
        rig.daemon.wait_metric("dataplane_listener_bound", &labels, 1.0);
        let at = format!("{LATER}:8443").parse().expect("an address");
        let mut client = eventually(PATIENCE, "it listens", || rig.net.entrance.connect(at).ok());
        client.write_all(&hello()).expect("sent");
        rig.accept();
        assert_eq!(rig.daemon.json(&["status", "--json"])["waiting"], serde_json::json!([]));
        assert_eq!(rig.daemon.get("/readyz").expect("answers").1, "ready\n");
    }
}

#[test]
fn an_address_that_has_come_and_is_taken_is_told_as_taken() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("auto").more(&format!("[listeners.private]\nbind = [\"{LATER}:8443\"]")));
    let reason = || {
        let status = rig.daemon.json(&["status", "--json"]);
        status["waiting"][0]["reason"].as_str().unwrap_or_default().to_owned()
    };
    let missing = "this machine does not have the address yet";
    assert_eq!(reason(), missing);
    assert!(rig.daemon.status_line().contains(missing), "{}", rig.daemon.status_line());

    // It listens there before the daemon can.
    let taken = rig.net.entrance.listen_early(&format!("{LATER}:8443"));
    add_address(&rig.net);
    let why = "another program listens there";
    eventually(PATIENCE, "it is told as taken", || reason().contains(why).then_some(()));
    let (_, said) = rig.daemon.get("/readyz").expect("answers");
    assert!(said.contains(why) && !said.contains(missing), "{said}");
    assert!(rig.daemon.status_line().contains(why), "{}", rig.daemon.status_line());
    // It has been tried several times by the time that it is free.
    std::thread::sleep(std::time::Duration::from_secs(3));
    drop(taken);
    rig.daemon.wait_metric("dataplane_listener_bound", &[("listener", "private")], 1.0);
    let lines = rig.daemon.wait_log(&["WARN", "8443", why]);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert_eq!(rig.daemon.status_line(), "serving");
}

#[test]
fn metrics_and_webhook_on_a_missing_address_keep_no_client_out() {
    let _turn = beside_others();
    let net = Net::new();
    let upstream = net.cluster.listen("100.64.0.2:443");
    let secret = net.file("secret", "a secret\n");
    let repository = net.dir().join("none.git");
    let git = |arguments: &[&str]| {
        let out = Command::new("git").args(arguments).arg(&repository).output().expect("git is needed");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    };
    git(&["init", "--quiet", "--bare", "--initial-branch=main"]);
    let clone = net.dir().join("clone");
    let run = |arguments: &[&str]| {
        let mut command = Command::new("git");
        command.args(["-c", "user.name=owner", "-c", "user.email=owner@example.com"]).args(arguments);
        let out = command.current_dir(&clone).output().expect("git is needed");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    };
    std::fs::create_dir(&clone).expect("made");
    std::fs::write(
        clone.join("dataplane.toml"),
        "[[routes]]\nhosts = [\"*.apps.example.com\", \"app.example.com\"]\nupstream = \"cluster\"\n",
    )
    .expect("written");
    run(&["init", "--quiet", "--initial-branch=main"]);
    run(&["add", "--all"]);
    run(&["commit", "--quiet", "--message", "A change"]);
    run(&["push", "--quiet", &repository.to_string_lossy(), "main"]);
    let daemon = Daemon::start_on(&net, &net.entrance, |dir| {
        let d = dir.display();
        format!(
            "[listeners.public]\nbind = [\"198.51.100.1:443\"]\n[upstreams.cluster]\ntargets = [\"100.64.0.2:443\"]\n\
             [admin]\nbind = \"{LATER}:9443\"\nsocket = \"{d}/admin.sock\"\n\
             [source]\ngit = \"file://{}\"\nref = \"main\"\nstate_directory = \"{d}/state\"\n\
             webhook = {{ bind = \"{LATER}:9080\", secret_file = \"{}\" }}\n",
            repository.display(),
            secret.display()
        )
    });
    let mut client = net.client.connect(public()).expect("accepted");
    client.write_all(&hello()).expect("sent");
    accept(&upstream, false);
    let waiting = || daemon.json(&["status", "--json"])["waiting"].as_array().expect("a list").len();
    assert_eq!(waiting(), 2);
    // What has come and is taken is told as taken, and waited for all the same.
    let taken = [9443, 9080].map(|port| net.entrance.listen_early(&format!("{LATER}:{port}")));
    add_address(&net);
    let are_taken = || {
        let status = daemon.json(&["status", "--json"]);
        let reasons = status["waiting"].as_array().expect("a list").iter().map(|w| w["reason"].to_string());
        reasons.filter(|reason| reason.contains("another program listens there")).count() == 2
    };
    eventually(PATIENCE, "both are told as taken", || are_taken().then_some(()));
    drop(taken);
    eventually(PATIENCE, "all is listened on", || (waiting() == 0).then_some(()));
    for port in [9443, 9080] {
        let at = format!("{LATER}:{port}").parse().expect("an address");
        net.entrance.connect(at).expect("it listens");
    }
}

#[test]
fn a_default_address_that_is_taken_is_named_by_its_key() {
    let _turn = beside_others();
    let net = Net::new();
    let _taken = net.entrance.listen("127.0.0.1:9443");
    let text = "[listeners.public]\nbind = [\"198.51.100.1:443\"]\n[upstreams.a]\ntargets = [\"100.64.0.2:443\"]\n\
                [[routes]]\nhosts = [\"a.example\"]\nupstream = \"a\"\n";
    let file = net.file("dataplane.toml", text);
    let out = net.entrance.run(|| Command::new(binary()).args(["run", "--config"]).arg(&file).output()).expect("runs");
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && said.contains("`bind` in [admin]") && said.contains("127.0.0.1:9444"), "{said}");
    assert!(!said.contains(":1:1:"), "{said}");
}

#[test]
fn one_port_serves_clients_on_ipv4_and_metrics_on_ipv6() {
    let _turn = beside_others();
    let net = Net::new();
    let upstream = net.cluster.listen("100.64.0.2:443");
    let daemon = Daemon::start_on(&net, &net.entrance, |dir| {
        format!(
            "[listeners.public]\nbind = [\"0.0.0.0:443\"]\n[upstreams.a]\ntargets = [\"100.64.0.2:443\"]\n\
             [[routes]]\nhosts = [\"app.example.com\"]\nupstream = \"a\"\n\
             [admin]\nbind = \"[::]:443\"\nsocket = \"{}/admin.sock\"\n",
            dir.display()
        )
    });
    let mut client = net.client.connect(public()).expect("accepted");
    client.write_all(&hello()).expect("sent");
    accept(&upstream, false);
    let mut asks = net.entrance.connect("[::1]:443".parse().expect("an address")).expect("accepted");
    asks.write_all(b"GET /healthz HTTP/1.0\r\n\r\n").expect("sent");
    let mut answer = [0; 15];
    std::io::Read::read_exact(&mut asks, &mut answer).expect("an answer");
    assert_eq!(&answer, b"HTTP/1.0 200 OK");
    drop(daemon);
}

#[test]
fn a_control_socket_that_is_something_else_is_told_as_that_and_left_alone() {
    let _turn = beside_others();
    let net = Net::new();
    let folder = net.dir().join("folder");
    std::fs::create_dir(&folder).expect("made");
    let text = format!(
        "[listeners.public]\nbind = [\"198.51.100.1:443\"]\n[upstreams.a]\ntargets = [\"100.64.0.2:443\"]\n\
         [[routes]]\nhosts = [\"a.example\"]\nupstream = \"a\"\n[admin]\nsocket = \"{}\"\n",
        folder.display()
    );
    let file = net.file("dataplane.toml", text);
    let out = net.entrance.run(|| Command::new(binary()).args(["run", "--config"]).arg(&file).output()).expect("runs");
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(
        !out.status.success() && said.contains("a folder is there") && said.contains("`socket` in [admin]"),
        "{said}"
    );
    assert!(!said.contains("stop the other daemon") && folder.is_dir(), "{said}");
}

#[test]
fn idle_connections_to_metrics_and_control_take_nothing_from_clients() {
    let _turn = beside_others();
    let net = Net::new();
    let upstream = net.cluster.listen("100.64.0.2:443");
    let limits = Limits { files: Some(700), ..Limits::default() };
    let daemon = Daemon::start_with(&net, &Config::new("splice"), limits);
    let at = "127.0.0.1:9443".parse().expect("an address");
    let tcp: Vec<TcpStream> = (0..600).map(|_| net.entrance.connect(at).expect("accepted")).collect();
    let socket = daemon.dir().join("admin.sock");
    let unix: Vec<_> = (0..300).map(|_| std::os::unix::net::UnixStream::connect(&socket).expect("accepted")).collect();
    let mut open = Vec::new();
    for _ in 0..50 {
        let mut client = net.client.connect(public()).expect("accepted");
        client.write_all(&hello()).expect("sent");
        open.push((client, accept(&upstream, false)));
    }
    assert_eq!(
        daemon.metric("dataplane_connections_rejected_total", &[]) as u64,
        0,
        "metrics are told, and nobody was refused"
    );
    assert!(daemon.cli(&["status"]).status.success(), "and commands are heard");
    let fds = daemon.fds().len();
    assert!(fds < 400, "{fds} descriptors");
    drop((tcp, unix));
}
