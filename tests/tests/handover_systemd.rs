//! What connections notice of `systemctl restart`, `reload`, `stop`, and of a daemon that is
//! killed, under a real systemd.

use std::time::Duration;

use serde_json::Value;
use tests::load::{Numbers, under_load};
use tests::rig::PATIENCE;
use tests::stream::reset_within;
use tests::systemd::{CONFIG, Node, config, works};
use tests::{alone, daemon, eventually};

/// Restarts in a row; `DATAPLANE_TEST_HANDOVERS` makes it more for a long run.
fn handovers() -> usize {
    std::env::var("DATAPLANE_TEST_HANDOVERS").map_or(3, |n| n.parse().expect("a number"))
}

fn started(engine: &str) -> Node {
    let node = Node::booted();
    node.machine.write(CONFIG, &format!("engine = \"{engine}\"\n{}", config(daemon::HOST)));
    node.machine.output(&["systemctl", "start", "dataplane"]);
    node
}

fn handover(node: &Node) -> Value {
    let status = node.machine.output(&["dataplane", "status", "--json"]);
    serde_json::from_str::<Value>(&status).expect("a document")["handover"].take()
}

fn restarts_under_load(engine: &str) {
    let _turn = alone();
    let node = started(engine);
    let numbers = if handovers() > 3 { Numbers::FULL } else { Numbers::TENTH };
    let ((), report) = under_load(&node.net, &node.upstream, numbers, || {
        for n in 1..=handovers() {
            node.machine.output(&["systemctl", "restart", "dataplane"]);
            let handover = handover(&node);
            println!("{handover}");
            assert_eq!((&handover["generation"], &handover["predecessor"]["by"]), (&n.into(), &"restart".into()));
            assert_eq!(handover["inherited"]["reset"], 0);
        }
    });
    println!("{engine}: {}", report.summary());
    report.assert_unnoticed();
    assert_eq!(node.machine.property("NRestarts"), "0");
}

#[test]
fn restarts_under_load_with_copy() {
    restarts_under_load("copy");
}

#[test]
fn restarts_under_load_with_splice() {
    restarts_under_load("splice");
}

#[test]
fn restarts_under_load_with_sockmap() {
    restarts_under_load("sockmap");
}

#[test]
fn restarts_under_load_with_auto() {
    restarts_under_load("auto");
}

#[test]
fn reload_has_another_program_take_over_and_else_reads_the_configuration() {
    let _turn = alone();
    let node = started("auto");
    let main = || node.machine.property("MainPID");
    let ((), report) = under_load(&node.net, &node.upstream, Numbers::TENTH, || {
        let first = main();
        node.machine.output(&["systemctl", "reload", "dataplane"]);
        assert_eq!(main(), first);
        // As packages and `install` do it.
        node.machine.output(&["cp", "/usr/local/bin/dataplane", "/usr/local/bin/dataplane.new"]);
        node.machine.output(&["mv", "/usr/local/bin/dataplane.new", "/usr/local/bin/dataplane"]);
        node.machine.output(&["systemctl", "reload", "dataplane"]);
        assert_ne!(main(), first);
        assert_eq!(handover(&node)["predecessor"]["by"], "upgrade");
        // The service is the successor's: its watchdog, its end.
        node.machine.output(&["systemctl", "restart", "dataplane"]);
        assert_eq!(handover(&node)["generation"], 2);
    });
    report.assert_unnoticed();
    let second = main();
    node.machine.write(CONFIG, "listeners = 7\n");
    let out = node.machine.run(&["dataplane", "upgrade"]);
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("listeners"), "{out:?}");
    assert_eq!((main(), node.machine.property("ActiveState")), (second, "active".into()));
    assert!(handover(&node)["last_error"].as_str().expect("a text").contains("listeners"));
    assert!(node.machine.journal().contains("no successor has taken over"));
}

#[test]
fn a_killed_daemon_refuses_nobody_and_its_connections_end_in_reset() {
    let _turn = alone();
    let node = started("auto");
    let pairs: Vec<_> = (0..20).map(|_| node.pair()).collect();
    for _ in 0..3 {
        let before = node.machine.property("NRestarts");
        node.machine.output(&["systemctl", "kill", "--kill-who=main", "--signal", "SIGKILL", "dataplane"]);
        // Without a wait: whoever connects now, is served when the next one is there.
        let early: Vec<_> = (0..20).map(|_| node.says_hello(daemon::HOST)).collect();
        eventually(PATIENCE, "the next one", || (node.machine.property("NRestarts") != before).then_some(()));
        for client in &early {
            assert!(reset_within(client, Duration::from_millis(0)).is_none());
        }
        for _ in early {
            assert!(tests::rig::accept_within(&node.upstream, PATIENCE).is_some());
        }
        assert_eq!(handover(&node)["predecessor"]["by"], "crash");
    }
    for (client, server) in &pairs {
        assert!(reset_within(client, PATIENCE).is_some() && reset_within(server, PATIENCE).is_some());
    }
}

#[test]
fn connections_that_nobody_takes_over_end_in_reset() {
    let _turn = alone();
    let node = started("auto");
    let pairs: Vec<_> = (0..5).map(|_| node.pair()).collect();
    node.machine.write(CONFIG, "listeners = 7\n");
    assert!(!node.machine.run(&["systemctl", "restart", "dataplane"]).status.success());
    for (client, _) in &pairs {
        assert!(reset_within(client, Duration::from_millis(100)).is_none(), "they wait for a start that succeeds");
    }
    for (client, server) in &pairs {
        let limit = Duration::from_secs(60);
        assert!(reset_within(client, limit).is_some() && reset_within(server, limit).is_some());
    }
    node.machine.write(CONFIG, &config(daemon::HOST));
    node.machine.output(&["systemctl", "restart", "dataplane"]);
    node.forwards(daemon::HOST);
}

#[test]
fn nine_thousand_connections_survive_a_restart_and_an_upgrade() {
    let _turn = alone();
    let node = started("auto");
    let machine = &node.machine;
    // Both ends are this process's; its hard limit may be 20,000 descriptors.
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum.unwrap_or(20_000);
    let count = (files.min(20_000) / 2 - 1_000) as usize;
    let pairs: Vec<_> = (0..count).map(|_| node.pair()).collect();
    // Ticks in user mode and in the kernel, proc(5).
    let cpu_of_systemd = || {
        let stat = machine.output(&["cat", "/proc/1/stat"]);
        let fields: Vec<_> = stat.rsplit(") ").next().expect("a stat line").split(' ').collect();
        let ticks: u64 = fields[11..13].iter().map(|field| field.parse::<u64>().expect("a number")).sum();
        Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
    };
    for how in ["restart", "reload"] {
        if how == "reload" {
            machine.output(&["cp", "/usr/local/bin/dataplane", "/usr/local/bin/dataplane.new"]);
            machine.output(&["mv", "/usr/local/bin/dataplane.new", "/usr/local/bin/dataplane"]);
        }
        let before = cpu_of_systemd();
        machine.output(&["systemctl", how, "dataplane"]);
        let handover = handover(&node);
        println!("{how} with {count} connections: systemd {:?}, {handover}", cpu_of_systemd().saturating_sub(before));
        assert_eq!((&handover["inherited"]["kept"], &handover["inherited"]["reset"]), (&count.into(), &0.into()));
        pairs.iter().step_by(count / 100).for_each(works);
    }
}
