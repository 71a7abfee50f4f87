//! What operators and dashboards read: metrics, health, status, connections, the access log.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::daemon::{Config, HOST, ROUTE};
use tests::netns::CLIENT;
use tests::rig::{PATIENCE, Rig, hello};
use tests::stream::{End, Pattern, client_hello};
use tests::{beside_others, eventually};

const PATTERN: Pattern = Pattern::new(13);

#[test]
fn promtool_has_nothing_to_say_about_the_metrics() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("auto"));
    drop(rig.pair());
    std::io::Write::write_all(&mut rig.connect(), b"x").expect("sent");
    rig.daemon.wait_metric("dataplane_connections_rejected_total", &[("reason", "not_tls")], 1.0);
    let (_, text) = rig.daemon.get("/metrics").expect("the admin listener answers");
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool is needed: apt-get install prometheus");
    std::io::Write::write_all(&mut promtool.stdin.take().expect("piped"), text.as_bytes()).expect("it reads");
    let out = promtool.wait_with_output().expect("it ends");
    let said = [out.stdout, out.stderr].concat();
    assert!(out.status.success() && said.is_empty(), "{}: {}", out.status, String::from_utf8_lossy(&said));
}

#[test]
fn promtool_finds_the_alert_rules_right_and_they_fire_when_they_should() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../dist/prometheus");
    for arguments in [["check", "rules", "dataplane.rules.yml"], ["test", "rules", "dataplane.rules.test.yml"]] {
        let out = Command::new("promtool").args(arguments).current_dir(&folder).output();
        let out = out.expect("promtool is needed: apt-get install prometheus");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&[out.stdout, out.stderr].concat()));
    }
}

#[test]
fn the_metrics_have_the_promised_names_and_labels() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("auto"));
    let pair = rig.pair();
    PATTERN.send(&pair.0, 0, 100).expect("sent");
    PATTERN.receive_exactly(&pair.1, 0, 100);
    let _second = rig.pair();
    drop(pair);
    rig.daemon.wait_metric("dataplane_connections_closed_total", &[], 1.0);
    let metrics = rig.daemon.metrics();
    for (name, labels) in [
        ("dataplane_build_info", &["engine", "kernel", "version"][..]),
        ("dataplane_config_info", &["commit", "hash"]),
        ("dataplane_config_last_reload_success", &[]),
        ("dataplane_config_last_reload_success_timestamp_seconds", &[]),
        ("dataplane_connections_accepted_total", &["listener"]),
        ("dataplane_connections_rejected_total", &["listener", "reason"]),
        ("dataplane_connections_active", &["engine", "route"]),
        ("dataplane_connections_closed_total", &["reason", "route"]),
        ("dataplane_bytes_total", &["direction", "path", "route"]),
        ("dataplane_hello_duration_seconds_count", &[]),
        ("dataplane_upstream_connect_duration_seconds_count", &["upstream"]),
        ("dataplane_upstream_target_up", &["target", "upstream"]),
    ] {
        assert_eq!(metrics.labels_of(name).as_deref(), Some(labels), "{name}");
    }
}

#[test]
fn labels_never_come_from_clients() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("auto"));
    let count = || rig.daemon.get("/metrics").expect("answers").1.lines().count();
    drop(rig.pair());
    for i in 0..50 {
        let client = rig.connect();
        let name = format!("host-{i}.apps.example.com");
        std::io::Write::write_all(&mut &client, &client_hello(Some(&name), &[])).expect("sent");
        tests::rig::accept(&rig.upstream, false);
        let stranger = rig.connect();
        let name = format!("host-{i}.example.org");
        std::io::Write::write_all(&mut &stranger, &client_hello(Some(&name), &[])).expect("sent");
        let _ = tests::stream::read_to_end(&stranger, PATIENCE);
    }
    rig.wait_idle();
    let before = count();
    let text = rig.daemon.get("/metrics").expect("answers").1;
    assert!(!text.contains("host-"), "a client's name became a label");
    assert!(before < 400, "{before} lines for one route");
}

#[test]
fn bytes_are_the_payload_that_was_delivered_by_the_path_that_it_took() {
    let _turn = beside_others();
    for (engine, proxy) in [("copy", "off"), ("splice", "v2")] {
        let rig = Rig::new(&Config::new(engine).upstream(&format!("send_proxy = \"{proxy}\"")));
        let client = rig.open();
        let (server, _) = tests::rig::accept(&rig.upstream, proxy != "off");
        let (up, down) = (3_000_001, 5_000_003);
        std::thread::scope(|s| {
            s.spawn(|| PATTERN.send(&client, 0, up).expect("sent"));
            s.spawn(|| PATTERN.receive_exactly(&server, 0, up));
            s.spawn(|| PATTERN.send(&server, 0, down).expect("sent"));
            s.spawn(|| PATTERN.receive_exactly(&client, 0, down));
        });
        // What waits for its reader in large numbers is bulk, whoever had the processors before;
        // what comes as it is read may be small.
        let down = {
            let sent = PATTERN.send_until_stalled(&server, down);
            PATTERN.receive_exactly(&client, down, sent);
            sent
        };
        drop((client, server));
        rig.wait_idle();
        let metrics = rig.daemon.metrics();
        let bytes = |direction, path: &[(&str, &str)]| {
            let labels = [&[("route", ROUTE), ("direction", direction)], path].concat();
            metrics.sum("dataplane_bytes_total", &labels) as u64
        };
        assert_eq!(bytes("to_upstream", &[]), up + hello().len() as u64, "{engine}");
        assert_eq!(bytes("to_client", &[]), down, "{engine}");
        let kernel = bytes("to_client", &[("path", "kernel")]);
        println!("{engine}: {kernel} bytes of {down} by the kernel");
        assert!(if engine == "splice" { kernel >= 64 << 10 } else { kernel == 0 }, "{engine}: {kernel} of {down}");
    }
}

#[test]
fn health_and_readiness_answer_and_readiness_ends_with_the_drain() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("auto"));
    assert_eq!(rig.daemon.get("/healthz").expect("answers").0, 200);
    assert_eq!(rig.daemon.get("/readyz").expect("answers").0, 200);
    assert_eq!(rig.daemon.get("/nothing").expect("answers").0, 404);
    let _open = rig.pair();
    rig.daemon.signal(rustix::process::Signal::TERM);
    eventually(PATIENCE, "a load balancer is told to look elsewhere", || {
        (rig.daemon.get("/readyz").expect("the drain is no reason to fall silent").0 == 503).then_some(())
    });
    assert_eq!(rig.daemon.get("/healthz").expect("answers").0, 200);
}

#[track_caller]
fn has_keys(value: &Value, keys: &[&str]) {
    let object = value.as_object().unwrap_or_else(|| panic!("no object: {value}"));
    for key in keys {
        assert!(object.contains_key(*key), "no {key} in {value}");
    }
}

#[test]
fn status_says_what_runs() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("auto"));
    let _open = rig.pair();
    let status = rig.daemon.json(&["status", "--json"]);
    has_keys(&status, &["version", "uptime", "engine", "config", "listeners", "routes", "upstreams", "limits"]);
    has_keys(&status["engine"], &["configured", "effective", "reasons"]);
    has_keys(&status["config"], &["hash", "path", "commit", "loaded_at", "last_error"]);
    assert_eq!(status["engine"]["configured"], "auto");
    assert_eq!(status["config"]["path"], rig.daemon.config_path().to_string_lossy().as_ref());
    assert_eq!(status["config"]["hash"], rig.daemon.metrics().values("dataplane_config_info", "hash").concat());
    assert!(status["uptime"].as_f64().is_some_and(|u| u < 600.0), "seconds");
    let upstream = &status["upstreams"][0];
    assert_eq!(upstream["name"], "cluster");
    has_keys(&upstream["targets"][0], &["target", "up", "reason", "active", "path"]);
    assert_eq!(upstream["targets"][0]["target"], "100.64.0.2:443");
    assert_eq!(upstream["targets"][0]["active"], 1);
    let prose = rig.daemon.cli(&["status"]);
    assert!(prose.status.success() && String::from_utf8_lossy(&prose.stdout).contains("100.64.0.2:443"));
}

#[test]
fn connections_lists_the_live_ones() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("splice"));
    assert_eq!(rig.daemon.json(&["connections", "--json"]), Value::Array(Vec::new()));
    let (client, server) = rig.pair();
    PATTERN.send(&client, 0, 1000).expect("sent");
    PATTERN.receive_exactly(&server, 0, 1000);
    PATTERN.send(&server, 0, 2000).expect("sent");
    PATTERN.receive_exactly(&client, 0, 2000);
    let list = eventually(PATIENCE, "the bytes are counted", || {
        let list = rig.daemon.json(&["connections", "--json"]);
        (list[0]["bytes_to_client"] == 2000).then_some(list)
    });
    let one = &list[0];
    let keys = "client listener server_name alpn route upstream target engine path bytes_to_upstream bytes_to_client bytes_kernel age idle backlog";
    has_keys(one, &keys.split(' ').collect::<Vec<_>>());
    assert_eq!(one["client"], client.local_addr().expect("bound").to_string());
    assert_eq!((&one["listener"], &one["server_name"]), (&"public".into(), &HOST.into()));
    assert_eq!((&one["upstream"], &one["target"]), (&"cluster".into(), &"100.64.0.2:443".into()));
    assert_eq!((&one["route"], &one["engine"]), (&ROUTE.into(), &"splice".into()));
    assert_eq!(one["bytes_to_upstream"], 1000 + hello().len());
    drop((client, server));
    rig.wait_idle();
    assert_eq!(rig.daemon.json(&["connections", "--json"]), Value::Array(Vec::new()));
}

#[test]
fn each_connection_leaves_one_access_line() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("copy"));
    let (client, server) = rig.pair();
    PATTERN.send(&server, 0, 2000).expect("sent");
    drop(server);
    assert_eq!(PATTERN.receive(&client, 0), (2000, End::Fin));
    drop(client);
    let line = eventually(PATIENCE, "an access line", || rig.daemon.access_log().pop());
    assert_eq!(rig.daemon.access_log().len(), 1);
    // Parsed, a key that came twice shows by the value that it has lost.
    let parsed: Value = serde_json::from_str(&line).expect("JSON");
    let text = parsed.to_string();
    for part in [CLIENT[0], HOST, "public", "100.64.0.2:443", "copy", "2000", "done"] {
        assert!(text.contains(part), "no {part} in {line}");
    }
}

#[test]
fn the_admin_side_answers_while_the_daemon_is_busy() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("copy"));
    let pairs: Vec<_> = (0..8).map(|_| rig.pair()).collect();
    std::thread::scope(|s| {
        for (client, server) in &pairs {
            s.spawn(|| PATTERN.send(server, 0, u64::MAX).expect_err("stopped below"));
            s.spawn(|| PATTERN.receive(client, 0));
        }
        let scrape = |_| {
            let start = Instant::now();
            let answer = rig.daemon.get("/metrics").map(|_| start.elapsed());
            std::thread::sleep(Duration::from_millis(20));
            answer
        };
        let took: Result<Vec<_>, _> = (0..20).map(scrape).collect();
        for (client, server) in &pairs {
            let _ = server.shutdown(std::net::Shutdown::Both);
            let _ = client.shutdown(std::net::Shutdown::Both);
        }
        let mut took = took.expect("each scrape is answered");
        took.sort_unstable();
        assert!(took[took.len() / 2] < Duration::from_secs(2), "scrapes took {took:?}");
    });
}
