//! One repository for all entrance nodes: two daemons on two hosts follow it, from git's own servers.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use tests::daemon::Daemon;
use tests::forge::{Forge, HTTP_PORT, SECRET, SSH_PORT};
use tests::netns::{CLIENT, CLUSTER, ENTRANCE, ENTRANCE_INSIDE, Host, Net};
use tests::rig::PATIENCE;
use tests::{beside_others, eventually};

/// The configuration of all nodes, with this host.
fn truth(host: &str) -> String {
    format!(
        "[listeners.public]\nbind = [\"0.0.0.0:443\"]\n[upstreams.cluster]\ntargets = [\"127.0.0.1:8443\"]\n\
         [[routes]]\nhosts = [\"{host}\"]\nupstream = \"cluster\"\n"
    )
}

/// A node's own file: where the repository is, and what else is the node's alone.
fn node(dir: &Path, source: &str) -> String {
    let d = dir.display();
    format!(
        "[source]\nref = \"main\"\nstate_directory = \"{d}/state\"\n{source}\n\
         [admin]\nbind = \"127.0.0.1:9443\"\nsocket = \"{d}/admin.sock\"\n"
    )
}

/// Two nodes that reach one forge, one by HTTP, one by ssh.
struct Nodes {
    daemons: [Daemon; 2],
    forge: Forge,
    net: Net,
}

impl Nodes {
    /// The forge has `one.example`; each node's `[source]` has these lines too.
    #[track_caller]
    fn start(lines: &str) -> Self {
        let net = Net::new();
        let forge = Forge::start(&net, &net.entrance);
        forge.push(&[("dataplane.toml", &truth("one.example"))]);
        let daemons = Self::both(&net, &forge, lines);
        Self { daemons, forge, net }
    }

    #[track_caller]
    fn both(net: &Net, forge: &Forge, lines: &str) -> [Daemon; 2] {
        let by_http = format!(
            "git = \"http://{}:{HTTP_PORT}/git/entrance.git\"\ntoken_file = \"{}\"\n{lines}",
            ENTRANCE[0],
            forge.token_file().display()
        );
        let by_ssh = format!(
            "git = \"ssh://git@{}:{SSH_PORT}{}\"\nssh_key_file = \"{}\"\n{lines}",
            ENTRANCE_INSIDE[0],
            forge.repository().display(),
            forge.key().display()
        );
        [
            Daemon::start_on(net, &net.client, |dir| node(dir, &by_http)),
            Daemon::start_on(net, &net.cluster, |dir| node(dir, &by_ssh)),
        ]
    }

    /// Waits until both run this commit.
    #[track_caller]
    fn wait_for(&self, commit: &str, limit: Duration) {
        for daemon in &self.daemons {
            eventually(limit, "the commit is in force", || (running(daemon) == commit).then_some(()));
        }
    }
}

fn running(daemon: &Daemon) -> String {
    daemon.metrics().values("dataplane_config_info", "commit").concat()
}

/// POST on a host, by curl: the status.
fn post(host: &Host, url: &str, headers: &[String], body: &str) -> String {
    let mut command = Command::new("curl");
    command.args([
        "--silent",
        "--max-time",
        "10",
        "--noproxy",
        "*",
        "--output",
        "/dev/null",
        "--write-out",
        "%{http_code}",
    ]);
    for header in headers {
        command.args(["-H", header]);
    }
    host.output(command.args(["--data-binary", body, url]))
}

fn signature(secret: &str, body: &str) -> String {
    let mut command = Command::new("sh");
    command.args(["-c", "printf %s \"$2\" | openssl dgst -sha256 -hmac \"$1\" | sed 's/.* //'", "sh", secret, body]);
    String::from_utf8_lossy(&command.output().expect("openssl is needed").stdout).trim().to_owned()
}

#[test]
fn a_push_reaches_both_nodes_by_webhook_and_a_broken_one_changes_nothing_on_either() {
    let _turn = beside_others();
    let net = Net::new();
    let forge = Forge::start(&net, &net.entrance);
    let first = forge.push(&[("dataplane.toml", &truth("one.example"))]);
    let webhook =
        format!("webhook = {{ bind = \"0.0.0.0:9080\", secret_file = \"{}\" }}", forge.secret_file().display());
    // Longer than the test takes: what arrives was announced.
    let daemons = Nodes::both(&net, &forge, &format!("interval = \"1h\"\n{webhook}"));
    let nodes = Nodes { daemons, forge, net };
    nodes.wait_for(&first, PATIENCE);
    let urls = [CLIENT[0], CLUSTER[0]].map(|address| format!("http://{address}:9080/hook"));
    nodes.forge.announce(&urls);

    // The best of several: another program may have the processors.
    let push = |n: usize| {
        let commit = nodes.forge.push(&[("dataplane.toml", &truth(&format!("n{n}.example")))]);
        let start = Instant::now();
        nodes.wait_for(&commit, Duration::from_secs(30));
        start.elapsed()
    };
    let took: Vec<_> = (0..4).map(push).collect();
    eprintln!("from the end of a push to both nodes: {took:?}");
    assert!(took.iter().min() < Some(&Duration::from_secs(2)), "{took:?}");

    let good = running(&nodes.daemons[0]);
    nodes.forge.push(&[(
        "dataplane.toml",
        &truth("broken.example").replace("upstream = \"cluster\"", "upstream = \"clutser\""),
    )]);
    for daemon in &nodes.daemons {
        daemon.wait_metric("dataplane_config_last_reload_success", &[], 0.0);
        assert_eq!(running(daemon), good);
        let status = daemon.json(&["status", "--json"]);
        let error = status["config"]["last_error"].as_str().expect("an error");
        assert!(error.contains(":dataplane.toml:7:12: error: there is no upstream \"clutser\""), "{error}");
        assert!(status["config"]["last_success"].as_f64() < status["config"]["last_error_at"].as_f64());
        assert_eq!(status["routes"][0]["hosts"][0], "n3.example");
    }
    let mended = nodes.forge.push(&[("dataplane.toml", &truth("mended.example"))]);
    nodes.wait_for(&mended, PATIENCE);
    for daemon in &nodes.daemons {
        assert!(daemon.json(&["status", "--json"])["config"]["last_error"].is_null());
    }

    // Forged, or for nobody: nothing is fetched.
    let body = "{\"ref\": \"refs/heads/main\"}";
    let (wrong, right) = (signature("guessed", body), signature(SECRET, body));
    let fetches = nodes.daemons[0].metric("dataplane_config_repository_reached_timestamp_seconds", &[]);
    for (headers, expected) in [
        (vec![], "401"),
        (vec![format!("X-Hub-Signature-256: sha256={wrong}")], "401"),
        (vec![format!("X-Gitea-Signature: {wrong}")], "401"),
        (vec!["X-Forgejo-Signature: ".to_owned() + &right[1..]], "401"),
    ] {
        assert_eq!(post(&nodes.net.entrance, &urls[0], &headers, body), expected, "{headers:?}");
    }
    let now = nodes.daemons[0].metric("dataplane_config_repository_reached_timestamp_seconds", &[]);
    assert!((fetches - now).abs() < 0.001, "the repository was looked at");
    assert_eq!(post(&nodes.net.entrance, &urls[0], &[format!("X-Forgejo-Signature: {right}")], body), "202");
    eventually(PATIENCE, "the repository is looked at", || {
        (nodes.daemons[0].metric("dataplane_config_repository_reached_timestamp_seconds", &[]) > now).then_some(())
    });

    let log = nodes.daemons.iter().flat_map(Daemon::log).collect::<String>();
    for secret in [tests::forge::TOKEN, SECRET] {
        assert!(!log.contains(secret), "a secret is in the log");
    }
}

#[test]
fn without_a_webhook_a_push_arrives_within_the_interval_and_without_a_server_nodes_go_on_and_start() {
    let _turn = beside_others();
    let mut nodes = Nodes::start("interval = \"1s\"");
    let two = nodes.forge.push(&[
        ("dataplane.toml", &format!("include = [\"routes.d/*.toml\"]\n{}", truth("two.example"))),
        ("routes.d/more.toml", "[[routes]]\nhosts = [\"more.example\"]\nupstream = \"cluster\"\n"),
        ("README.md", "# Not a configuration\n"),
    ]);
    nodes.wait_for(&two, PATIENCE);
    assert_eq!(nodes.daemons[0].json(&["status", "--json"])["routes"][1]["hosts"][0], "more.example");
    let [one, other] = [0, 1].map(|n| nodes.daemons[n].metrics().values("dataplane_config_info", "hash").concat());
    assert_eq!(one, other, "nodes of one commit have one hash, whatever their own files say");

    nodes.forge.go_away();
    let status = || nodes.daemons[0].json(&["status", "--json"]);
    let error = eventually(PATIENCE, "it is noticed", || status()["config"]["last_error"].as_str().map(str::to_owned));
    assert!(error.contains(ENTRANCE[0]), "{error}");
    assert_eq!(running(&nodes.daemons[0]), two);
    assert!(
        (nodes.daemons[0].metric("dataplane_config_last_reload_success", &[]) - 1.0).abs() < 0.1,
        "nothing is wrong with it"
    );
    let explained = nodes.daemons[0].cli(&["explain", "more.example"]);
    assert!(explained.status.success(), "{}", String::from_utf8_lossy(&explained.stderr));
    let asked = nodes.daemons[0].cli(&["reload"]);
    assert!(!asked.status.success(), "an operator is told");

    // A node that starts now has what is kept.
    let (dir, text) = {
        let daemon = &nodes.daemons[0];
        (daemon.dir().to_path_buf(), std::fs::read_to_string(daemon.config_path()).expect("its file"))
    };
    nodes.daemons[0].signal(rustix::process::Signal::TERM);
    assert_eq!(nodes.daemons[0].wait_end(PATIENCE).code(), Some(0));
    let start = Instant::now();
    nodes.daemons[0] = Daemon::start_on(&nodes.net, &nodes.net.client, |new| {
        // The state is the old one's.
        text.replace(&format!("{}/admin", dir.display()), &format!("{}/admin", new.display()))
    });
    assert_eq!(running(&nodes.daemons[0]), two, "after {:?}", start.elapsed());

    // Where nothing is kept, there is nothing to run.
    let check = nodes.net.file("new.toml", text.replace("/state\"", "/other\""));
    let out = nodes.net.client.run(|| {
        Command::new(tests::daemon::binary()).args(["check", "--format", "json", "--config"]).arg(&check).output()
    });
    let out = out.expect("the daemon's binary can be run");
    assert_eq!(out.status.code(), Some(1));
    let document: serde_json::Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert_eq!((&document["valid"], &document["diagnostics"][0]["severity"]), (&false.into(), &"error".into()));

    let three = nodes.forge.push(&[("dataplane.toml", &truth("three.example"))]);
    nodes.forge.serve();
    nodes.wait_for(&three, PATIENCE);
}

#[test]
fn what_is_too_large_too_slow_or_a_link_is_not_fetched_and_no_secret_is_an_argument() {
    let _turn = beside_others();
    let net = Net::new();
    let forge = Forge::start(&net, &net.entrance);
    let check = |source: &str| {
        let file = net.file("node.toml", node(net.dir(), source));
        let out =
            net.client.run(|| Command::new(tests::daemon::binary()).args(["check", "--config"]).arg(&file).output());
        let out = out.expect("the daemon's binary can be run");
        (out.status.success(), String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned())
    };
    let git = format!("git = \"file://{}\"", forge.repository().display());
    forge.push(&[("dataplane.toml", &truth("one.example"))]);
    let (good, said) = check(&git);
    assert!(good, "{said}");

    // Random bytes, which do not pack.
    let noise = std::fs::File::open("/dev/urandom").map(|file| {
        use std::io::Read;
        let mut bytes = vec![0; 3 << 20];
        file.take(3 << 20).read_exact(&mut bytes).expect("random bytes");
        bytes.iter().map(|byte| char::from(b'!' + byte % 90)).collect::<String>()
    });
    forge.push(&[("noise.txt", &noise.expect("urandom"))]);
    let (good, said) = check(&format!("{git}\nmax_size = \"1MiB\""));
    assert!(!good && said.contains("larger than `max_size`, 1MiB"), "{said}");

    // A server that accepts and says nothing.
    let silent = net.entrance.listen(&format!("{}:8081", ENTRANCE[0]));
    let start = Instant::now();
    let (good, said) = check(&format!("git = \"http://{}:8081/x.git\"\ntimeout = \"2s\"", ENTRANCE[0]));
    assert!(!good && said.contains("not within `timeout`, 2s"), "{said}");
    assert!(start.elapsed() < Duration::from_secs(20));
    // Meanwhile a token is looked for in what every user can see.
    let by_token = format!(
        "git = \"http://{}:8081/x.git\"\ntimeout = \"4s\"\ntoken_file = \"{}\"",
        ENTRANCE[0],
        forge.token_file().display()
    );
    std::thread::scope(|s| {
        let checking = s.spawn(|| check(&by_token));
        let seen = eventually(PATIENCE, "git asks the server", || {
            let all: Vec<_> = std::fs::read_dir("/proc").expect("procfs").flatten().collect();
            let lines: Vec<_> =
                all.iter().filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok()).collect();
            let lines: Vec<_> = lines.iter().map(|line| String::from_utf8_lossy(line).replace('\0', " ")).collect();
            lines.iter().any(|line| line.contains("ls-remote") && line.contains("8081")).then_some(lines)
        });
        assert!(!seen.iter().any(|line| line.contains(tests::forge::TOKEN) || line.contains("Basic")), "{seen:?}");
        assert!(!checking.join().expect("it ends").0);
    });
    drop(silent);

    let clone = net.dir().join("forge/clone");
    std::fs::remove_file(clone.join("dataplane.toml")).expect("it is there");
    std::os::unix::fs::symlink("/etc/hostname", clone.join("dataplane.toml")).expect("a link");
    forge.push(&[]);
    let (good, said) = check(&git);
    assert!(!good && said.contains("symbolic link"), "{said}");
    let (good, said) = check(&format!("{git}\npath = \"gone.toml\""));
    assert!(!good && said.contains("has no file gone.toml"), "{said}");
    let (good, said) = check(&git.replace("entrance.git", "gone.git"));
    assert!(!good && said.contains("gone.git"), "{said}");
}
