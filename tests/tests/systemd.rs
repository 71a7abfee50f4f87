//! The daemon as the unit in `dist` runs it, under a real systemd: what an administrator does with
//! it, and what the hardening leaves it.

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use tests::daemon::HOST;
use tests::forge::{Forge, HTTPS_PORT, SECRET, SSH_PORT, TOKEN, signature};
use tests::netns::CLUSTER;
use tests::rig::{PATIENCE, public};
use tests::systemd::{CONFIG, Node, config, install, text, works};
use tests::{beside_others, eventually};

#[test]
fn install_keeps_an_edited_configuration_and_lets_the_service_read_it() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let root = dir.path();
    install(root);
    let file = root.join("etc/dataplane/dataplane.toml");
    let starter = std::fs::read_to_string(&file).expect("a starter configuration");
    assert!(starter.contains("[listeners.public]"), "{starter}");
    for (path, mode) in [
        ("usr/local/bin", 0o755),
        ("usr/local/bin/dataplane", 0o755),
        ("etc/dataplane", 0o755),
        ("etc/dataplane/dataplane.toml", 0o644),
        ("etc/systemd/system/dataplane.service", 0o644),
        ("usr/local/share/bash-completion/completions/dataplane", 0o644),
        ("usr/local/share/zsh/site-functions/_dataplane", 0o644),
        ("usr/local/share/fish/vendor_completions.d/dataplane.fish", 0o644),
        ("usr/local/share/man/man1", 0o755),
        ("usr/local/share/man/man1/dataplane.1", 0o644),
        ("usr/local/share/man/man1/dataplane-check.1", 0o644),
        ("usr/local/share/man/man5/dataplane.toml.5", 0o644),
    ] {
        let permissions = std::fs::metadata(root.join(path)).unwrap_or_else(|e| panic!("{path}: {e}")).permissions();
        assert_eq!(permissions.mode() & 0o777, mode, "{path}");
    }

    std::fs::write(&file, "# mine\n").expect("written");
    install(root);
    assert_eq!(std::fs::read_to_string(&file).expect("still there"), "# mine\n");
}

#[test]
fn a_fresh_install_starts_and_has_all_it_needs_and_no_more() {
    let _turn = beside_others();
    let node = Node::booted();
    let machine = &node.machine;
    let unit = "/etc/systemd/system/dataplane.service";
    let verified = machine.run(&["systemd-analyze", "verify", "--man=no", unit]);
    assert!(verified.status.success() && text(&verified).is_empty(), "{}", text(&verified));
    // In tenths: below 3.0.
    machine.output(&["systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold=29", unit]);

    // The starter configuration, as it is.
    machine.output(&["systemctl", "enable", "--now", "dataplane"]);
    assert_eq!(machine.output(&["systemctl", "is-active", "dataplane"]), "active");
    node.refuses(HOST);
    machine.write(CONFIG, &config(HOST));
    machine.output(&["systemctl", "reload", "dataplane"]);
    node.forwards(HOST);

    let pid = machine.property("MainPID");
    let process = machine.output(&["cat", &format!("/proc/{pid}/status")]);
    let field = |name: &str| process.lines().find_map(|l| l.strip_prefix(name)).expect("a field of proc(5)").trim();
    // CAP_NET_BIND_SERVICE (10), CAP_NET_ADMIN (12), CAP_PERFMON (38), CAP_BPF (39), in each set.
    for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
        assert_eq!(field(set), "000000c000001400", "{set}");
    }
    assert!(!field("Uid:").split('\t').any(|id| id == "0"), "runs as root: {}", field("Uid:"));
    assert_eq!((field("NoNewPrivs:"), field("Seccomp:")), ("1", "2"));

    for limit in ["MemoryHigh", "MemoryMax"] {
        assert!(machine.property(limit).parse::<u64>().is_ok(), "{limit}: {}", machine.property(limit));
    }

    let descriptors = machine.output(&["ls", "-l", &format!("/proc/{pid}/fd")]);
    for kind in ["anon_inode:bpf-map", "anon_inode:bpf-prog"] {
        assert!(
            descriptors.contains(kind),
            "the eBPF program is not loaded (`cargo xtask build-ebpf` before the daemon is built):\n{}",
            machine.journal()
        );
    }
    let status = machine.output(&["dataplane", "status", "--json"]);
    let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
    assert_eq!(status["engine"]["effective"], "auto", "{status}");
    let journal = machine.journal();
    // The starter's targets are names that do not exist here.
    let complaints =
        |line: &&str| (line.contains("WARN") || line.contains("ERROR")) && !line.contains("target is down");
    assert!(journal.contains("listening") && !journal.lines().any(|line| complaints(&line)), "{journal}");
}

#[test]
fn start_waits_until_it_is_ready_and_fails_with_the_mistake_in_the_journal() {
    let _turn = beside_others();
    let node = Node::booted();
    let machine = &node.machine;
    machine.write(CONFIG, &config(HOST).replace("upstream = \"cluster\"", "upstream = \"clutser\""));
    let failed = machine.run(&["systemctl", "start", "dataplane"]);
    assert!(!failed.status.success(), "the daemon never got ready: {}", text(&failed));
    let journal = machine.journal();
    assert!(journal.contains("dataplane.toml:7") && journal.contains("clutser"), "{journal}");

    // It is tried again for ever, so that a mistake is mended by mending it.
    machine.write(CONFIG, &config(HOST));
    eventually(PATIENCE, "systemd starts it again", || (machine.property("ActiveState") == "active").then_some(()));
    node.forwards(HOST);
}

#[test]
fn reload_takes_effect_or_fails_with_the_mistake_shown_and_changes_nothing() {
    let _turn = beside_others();
    let node = Node::started();
    let machine = &node.machine;
    let established = node.pair();
    let (one, two) = (HOST, "two.example.com");
    machine.write(CONFIG, &config(two));
    machine.output(&["systemctl", "reload", "dataplane"]);
    node.forwards(two);
    node.refuses(one);

    let taken = node.net.entrance.listen("0.0.0.0:8443");
    let broken = config(one).replace("upstream = \"cluster\"", "upstream = \"clutser\"");
    let conflict = config(one).replace("[::]:443", "0.0.0.0:8443");
    for (mistake, text_of_it) in [(broken, "clutser"), (conflict, "cannot listen on 0.0.0.0:8443")] {
        machine.write(CONFIG, &mistake);
        let failed = machine.run(&["systemctl", "reload", "dataplane"]);
        assert!(!failed.status.success(), "{text_of_it}");
        let shown = machine.output(&["systemctl", "status", "--no-pager", "--full", "dataplane"]);
        assert!(shown.contains("dataplane.toml:") && shown.contains(text_of_it), "{shown}");
        assert_eq!(machine.property("ActiveState"), "active");
        node.forwards(two);
        node.refuses(one);
    }
    drop(taken);
    machine.output(&["systemctl", "reload", "dataplane"]);
    node.forwards(one);
    works(&established);
    assert_eq!(machine.property("NRestarts"), "0");
}

#[test]
fn a_killed_daemon_and_one_that_hangs_are_started_again_and_a_sound_one_is_not() {
    let _turn = beside_others();
    let node = Node::booted();
    let machine = &node.machine;
    machine.write(CONFIG, &config(HOST));
    machine.write("/etc/systemd/system/dataplane.service.d/test.conf", "[Service]\nWatchdogSec=2s\n");
    machine.output(&["systemctl", "daemon-reload"]);
    machine.output(&["systemctl", "start", "dataplane"]);

    // Longer than the watchdog waits.
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!((machine.property("ActiveState"), machine.property("NRestarts")), ("active".into(), "0".into()));
    node.forwards(HOST);

    let kill =
        |signal: &str| machine.output(&["systemctl", "kill", "--kill-who=main", "--signal", signal, "dataplane"]);
    kill("SIGKILL");
    node.wait_restarts("1");
    node.forwards(HOST);

    kill("SIGSTOP");
    node.wait_restarts("2");
    node.forwards(HOST);
    let journal = machine.journal();
    assert!(journal.contains("Watchdog timeout"), "{journal}");
}

#[test]
fn stop_refuses_new_connections_lets_established_ones_finish_and_succeeds() {
    let _turn = beside_others();
    let node = Node::started();
    let machine = &node.machine;
    let pair = node.pair();
    let start = Instant::now();
    machine.output(&["systemctl", "stop", "--no-block", "dataplane"]);
    eventually(PATIENCE, "new connections are refused", || node.net.client.connect(public()).is_err().then_some(()));
    works(&pair);
    assert_eq!(machine.property("ActiveState"), "deactivating");
    drop(pair);
    eventually(PATIENCE, "the service ends", || (machine.property("ActiveState") == "inactive").then_some(()));
    assert!(start.elapsed() < Duration::from_secs(25), "it waited for drain_timeout: {:?}", start.elapsed());
    assert_eq!((machine.property("Result"), machine.property("ExecMainStatus")), ("success".into(), "0".into()));
    assert!(!machine.path("/run/dataplane").exists());
}

#[test]
fn the_service_follows_a_repository_of_another_user_and_starts_again_without_it() {
    let _turn = beside_others();
    let node = Node::booted();
    let machine = &node.machine;
    let git = |arguments: &[&str]| {
        let owner = ["git", "-C", "/srv/clone", "-c", "user.name=owner", "-c", "user.email=owner@example.com"];
        machine.output(&[&owner[..], arguments].concat());
    };
    let push = |host: &str| {
        machine.write("/srv/clone/dataplane.toml", &config(host));
        git(&["add", "--all"]);
        git(&["commit", "--quiet", "--message", host]);
        git(&["push", "--quiet", "/srv/entrance.git", "main"]);
        machine.output(&["chmod", "-R", "a+rX", "/srv/entrance.git"]);
    };
    machine.output(&["git", "init", "--quiet", "--initial-branch=main", "/srv/clone"]);
    machine.output(&["git", "init", "--quiet", "--bare", "--initial-branch=main", "/srv/entrance.git"]);
    push(HOST);

    machine.write(CONFIG, "[source]\ngit = \"/srv/entrance.git\"\ninterval = \"1s\"\n");
    machine.output(&["systemctl", "start", "dataplane"]);
    node.forwards(HOST);
    push("two.example.com");
    let status = || machine.output(&["dataplane", "status"]);
    eventually(PATIENCE, "the second commit is in force", || status().contains("two.example.com").then_some(()));

    machine.output(&["rm", "-r", "/srv/entrance.git"]);
    machine.output(&["systemctl", "restart", "dataplane"]);
    node.forwards("two.example.com");
    let journal = machine.journal();
    assert!(!journal.contains("cannot be kept"), "{journal}");
}

#[test]
fn secrets_are_the_services_own_credentials_by_http_by_ssh_and_for_the_webhook() {
    let _turn = beside_others();
    let node = Node::booted();
    let machine = &node.machine;
    let forge = Forge::start(&node.net, &node.net.cluster);
    let push = |host: &str| forge.push(&[("dataplane.toml", &config(host))]);
    push(HOST);
    let folder = "/etc/dataplane";
    let mut unit = String::from("[Service]\n");
    for (name, file) in [("token", forge.token_file()), ("key", forge.key()), ("hook", forge.secret_file())] {
        machine.write(&format!("{folder}/{name}"), &std::fs::read_to_string(file).expect("it is there"));
        machine.output(&["chmod", "600", &format!("{folder}/{name}")]);
        unit += &format!("LoadCredential={name}:{folder}/{name}\n");
    }
    let authority = std::fs::read_to_string(tests::forge::authority(node.net.dir())).expect("it is there");
    machine.write("/etc/dataplane/forge.pem", &authority);
    unit += "Environment=GIT_SSL_CAINFO=/etc/dataplane/forge.pem\n";
    machine.write("/etc/systemd/system/dataplane.service.d/secrets.conf", &unit);
    machine.output(&["systemctl", "daemon-reload"]);
    let credentials = "/run/credentials/dataplane.service";
    let source = |lines: &str| {
        let webhook = format!("webhook = {{ bind = \"127.0.0.1:9080\", secret_file = \"{credentials}/hook\" }}");
        format!("[source]\n{lines}\ninterval = \"1h\"\n{webhook}\n")
    };
    let status = || machine.output(&["dataplane", "status"]);
    let arrives = |host: &str| eventually(PATIENCE, "it is in force", || status().contains(host).then_some(()));

    let url = format!("https://{}:{HTTPS_PORT}/git/entrance.git", CLUSTER[0]);
    machine.write(CONFIG, &source(&format!("git = \"{url}\"\ntoken_file = \"{credentials}/token\"")));
    machine.output(&["systemctl", "start", "dataplane"]);
    node.forwards(HOST);
    push("two.example.com");
    let signed = format!("X-Gitea-Signature: {}", signature(SECRET, "x"));
    let post = ["curl", "--silent", "--show-error", "--fail", "--noproxy", "*", "--data-binary", "x", "-H", &signed];
    machine.output(&[&post[..], &["http://127.0.0.1:9080/hook"]].concat());
    arrives("two.example.com");

    let url = format!("ssh://git@{}:{SSH_PORT}{}", CLUSTER[0], forge.repository().display());
    machine.write(CONFIG, &source(&format!("git = \"{url}\"\nssh_key_file = \"{credentials}/key\"")));
    push("three.example.com");
    machine.output(&["systemctl", "reload", "dataplane"]);
    arrives("three.example.com");
    let journal = machine.journal();
    assert!(![TOKEN, SECRET].iter().any(|secret| journal.contains(secret)), "{journal}");
}
