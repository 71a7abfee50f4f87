//! One repository for all entrance nodes: two daemons on two hosts follow it, from git's own
//! servers.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use tests::daemon::Daemon;
use tests::forge::{Forge, HTTP_PORT, SECRET, SSH_PORT, signature};
use tests::netns::{CLIENT, CLUSTER, ENTRANCE, ENTRANCE_INSIDE, Host, Net};
use tests::peers::{Peer, certificate};
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
        "[source]\nref = \"main\"\nstate_directory = \"{d}/state\"\nallow_targets = [\"127.0.0.0/8\"]\n{source}\n\
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
        let by_http = forge.by_https(ENTRANCE[0]) + lines;
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
    post_with(host, url, headers, body, &[])
}

/// The same, with more arguments.
fn post_with(host: &Host, url: &str, headers: &[String], body: &str, more: &[&str]) -> String {
    let mut command = Command::new("curl");
    command.args(["--silent", "--max-time", "20", "--noproxy", "*", "--output", "/dev/null", "--write-out"]);
    command.arg("%{http_code}").args(more);
    for header in headers {
        command.args(["-H", header]);
    }
    host.output(command.args(["--data-binary", body, url]))
}

/// `dataplane check` of a node with this `[source]`, with this folder for what is passing; whether
/// it is content, and what it says.
fn check(net: &Net, source: &str, tmp: &Path) -> (bool, String) {
    let file = net.file("node.toml", node(net.dir(), source));
    let mut command = Command::new(tests::daemon::binary());
    command.args(["check", "--config"]).arg(&file).env("TMPDIR", tmp);
    command.env("GIT_SSL_CAINFO", tests::forge::authority(net.dir()));
    let out = net.client.run(|| command.output()).expect("the daemon's binary can be run");
    (out.status.success(), String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned())
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
        let error = daemon.wait_last_error();
        let status = daemon.json(&["status", "--json"]);
        assert!(error.contains(":dataplane.toml:7:12: error: there is no upstream \"clutser\""), "{error}");
        assert!(status["config"]["last_success"].as_f64() < status["config"]["last_error_at"].as_f64());
        assert_eq!(status["routes"][0]["hosts"][0], "n3.example");
    }
    let reached = || nodes.daemons[0].metric("dataplane_config_repository_reached_timestamp_seconds", &[]);
    let before = reached();
    let mended = nodes.forge.push(&[("dataplane.toml", &truth("mended.example"))]);
    nodes.wait_for(&mended, PATIENCE);
    for daemon in &nodes.daemons {
        eventually(PATIENCE, "the error is gone", || {
            daemon.json(&["status", "--json"])["config"]["last_error"].is_null().then_some(())
        });
    }
    eventually(PATIENCE, "the look is over", || (reached() > before).then_some(()));

    // Forged, or for nobody: nothing is fetched.
    let body = "{\"ref\": \"refs/heads/main\"}";
    let (wrong, right) = (signature("guessed", body), signature(SECRET, body));
    let fetches = reached();
    for (headers, expected) in [
        (vec![], "401"),
        (vec![format!("X-Hub-Signature-256: sha256={wrong}")], "401"),
        (vec![format!("X-Gitea-Signature: {wrong}")], "401"),
        (vec!["X-Forgejo-Signature: ".to_owned() + &right[1..]], "401"),
    ] {
        assert_eq!(post(&nodes.net.entrance, &urls[0], &headers, body), expected, "{headers:?}");
    }
    let now = reached();
    assert!((fetches - now).abs() < 0.001, "the repository was looked at");
    assert_eq!(post(&nodes.net.entrance, &urls[0], &[format!("X-Forgejo-Signature: {right}")], body), "202");
    eventually(PATIENCE, "the repository is looked at", || (reached() > now).then_some(()));

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
    let error = nodes.daemons[0].wait_last_error();
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

    // A commit that is wrong is still wrong when the server goes away, and when it is back.
    nodes.forge.push(&[("dataplane.toml", "listeners = 3\n")]);
    let node = &nodes.daemons[0];
    let error = || node.json(&["status", "--json"])["config"]["last_error"].as_str().unwrap_or_default().to_owned();
    let wrong = eventually(PATIENCE, "it is refused", || Some(error()).filter(|text| text.contains("listeners")));
    let outages = || node.log().iter().filter(|line| line.contains("the repository was not reached")).count();
    let before = outages();
    nodes.forge.go_away();
    eventually(PATIENCE, "the outage is noticed", || (outages() > before).then_some(()));
    assert_eq!(error(), wrong);
    nodes.forge.serve();
    let mended = nodes.forge.push(&[("dataplane.toml", &truth("three.example"))]);
    nodes.wait_for(&mended, PATIENCE);
    assert_eq!(error(), "");
}

#[test]
fn a_webhook_comes_through_a_route_and_an_ingress_and_moves_without_a_restart() {
    let _turn = beside_others();
    let net = Net::new();
    let forge = Forge::start(&net, &net.entrance);
    forge.push(&[("dataplane.toml", &truth("hook.example"))]);
    let pem = certificate(&net, &["hook.example"]);
    let path = pem.display();
    let server = format!(
        "listen 127.0.0.1:8443 ssl; ssl_certificate {path}; ssl_certificate_key {path}; \
         location = /hook {{ proxy_pass http://127.0.0.1:9080; }}"
    );
    let _ingress = Peer::nginx(&net, &net.client, &format!("http {{ server {{ {server} }} }}"));
    let source = |port: u16, secret: &Path| {
        let git = forge.by_https(ENTRANCE[0]);
        format!(
            "{git}interval = \"1h\"\nwebhook = {{ bind = \"127.0.0.1:{port}\", secret_file = \"{}\" }}",
            secret.display()
        )
    };
    let daemon = Daemon::start_on(&net, &net.client, |dir| node(dir, &source(9080, &forge.secret_file())));
    let body = "{}";
    let hook = |secret: &str| {
        let resolve = format!("hook.example:443:{}", CLIENT[0]);
        let signed = format!("X-Hub-Signature-256: sha256={}", signature(secret, body));
        let more = ["--resolve", &resolve, "--cacert", pem.to_str().expect("a path of ours")];
        post_with(&net.entrance, "https://hook.example/hook", &[signed], body, &more)
    };
    let two = forge.push(&[("dataplane.toml", &truth("hook.example").replace("8443", "8443\", \"127.0.0.2:8443"))]);
    assert_eq!(hook("guessed"), "401");
    assert_eq!(hook(SECRET), "202");
    eventually(PATIENCE, "the commit is in force", || (running(&daemon) == two).then_some(()));

    // Another secret at the same address, another address, none.
    let other = net.file("other-secret", "other\n");
    let reload = |text: String| {
        std::fs::write(daemon.config_path(), text).expect("written");
        let out = daemon.cli(&["reload"]);
        (out.status.success(), String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned())
    };
    let (done, said) = reload(node(daemon.dir(), &source(9080, &other)));
    assert!(done, "{said}");
    eventually(PATIENCE, "the new secret counts", || (hook("other") == "202").then_some(()));
    assert_eq!(hook(SECRET), "401");
    let taken = net.client.listen("127.0.0.1:9081");
    let (done, said) = reload(node(daemon.dir(), &source(9081, &other)));
    assert!(!done && said.contains("another program listens there"), "{said}");
    assert_eq!(hook("other"), "202", "what was in force goes on");
    drop(taken);
    let (done, said) = reload(node(daemon.dir(), &source(9081, &other)));
    assert!(done, "{said}");
    eventually(PATIENCE, "the old address is free", || (hook("other") == "502").then_some(()));
    let url = "http://127.0.0.1:9081/hook";
    assert_eq!(post(&net.client, url, &[format!("X-Gitea-Signature: {}", signature("other", body))], body), "202");
    let without = node(daemon.dir(), source(9081, &other).split("webhook").next().expect("a part"));
    let (done, said) = reload(without);
    assert!(done, "{said}");
    let address = "127.0.0.1:9081".parse().expect("an address");
    eventually(PATIENCE, "nothing listens any more", || net.client.connect(address).is_err().then_some(()));
}

#[test]
fn a_hook_of_the_repository_refuses_what_the_nodes_would() {
    let _turn = beside_others();
    let net = Net::new();
    let forge = Forge::start(&net, &net.entrance);
    forge.guard(&tests::daemon::binary());
    let truth = truth("one.example").replace("127.0.0.1", "100.64.0.9");
    let include = format!("include = [\"routes.d/*.toml\"]\n{truth}");
    let more = "[[routes]]\nhosts = [\"more.example\"]\nupstream = \"cluster\"\n";
    forge.push(&[("dataplane.toml", &include), ("routes.d/more.toml", more)]);
    let wrong = more.replace("cluster", "clutser");
    let said = forge.try_push(&[("routes.d/more.toml", &wrong)]).expect_err("it is wrong");
    assert!(said.contains("routes.d/more.toml:3:12: error: there is no upstream \"clutser\""), "{said}");
    // An attribute of the commit hides nothing from it that the nodes would read.
    let hidden = [(".gitattributes", "routes.d/* export-ignore\n"), ("routes.d/more.toml", &*wrong)];
    let said = forge.try_push(&hidden).expect_err("it is as wrong as before");
    assert!(said.contains("there is no upstream \"clutser\""), "{said}");
    forge.push(&[("routes.d/more.toml", more)]);

    // What a node's owner allows, the hook allows where it knows of it.
    let private = [("dataplane.toml", &*include.replace("100.64.0.9", "127.0.0.1"))];
    let said = forge.try_push(&private).expect_err("nobody has allowed it");
    assert!(said.contains("`allow_targets`"), "{said}");
    let node = net.file("node.toml", "[source]\ngit = \"/srv/x.git\"\nallow_targets = [\"127.0.0.1:8443\"]\n");
    forge.guard_for(&tests::daemon::binary(), &node);
    forge.push(&private);
}

#[test]
fn a_repository_above_runs_nothing_and_a_redirect_gets_no_token() {
    let _turn = beside_others();
    let net = Net::new();
    let forge = Forge::start(&net, &net.entrance);
    forge.push(&[("dataplane.toml", &truth("one.example"))]);
    let by_http = |port: u16| format!("git = \"http://{}:{port}/git/entrance.git\"", ENTRANCE[0]);
    let token = format!("token_file = \"{}\"", forge.token_file().display());

    // Somebody else's repository in the folder that all users share.
    let (shared, ran) = (net.dir().join("shared"), net.dir().join("ran"));
    let inside = shared.join("deeper");
    std::fs::create_dir_all(&inside).expect("folders");
    let run = |command: &mut Command| net.client.run(|| command.output()).expect("git is needed");
    assert!(run(Command::new("git").args(["init", "--quiet"]).arg(&shared)).status.success());
    let settings = format!("[credential]\n\thelper = \"!touch {}; false\"\n", ran.display());
    let mut config = std::fs::File::options().append(true).open(shared.join(".git/config")).expect("it is there");
    std::io::Write::write_all(&mut config, settings.as_bytes()).expect("written");
    let url = format!("http://{}:{HTTP_PORT}/git/entrance.git", ENTRANCE[0]);
    run(Command::new("git").args(["ls-remote", &url]).env("GIT_TERMINAL_PROMPT", "0").current_dir(&inside));
    assert!(ran.exists(), "the trap works");
    std::fs::remove_file(&ran).expect("it is there");
    for tmp in [&shared, &inside] {
        let (good, said) = check(&net, &by_http(HTTP_PORT), tmp);
        assert!(!good && said.contains("Username"), "without a token it is not let in: {said}");
        assert!(!ran.exists(), "a setting of a repository above was followed");
    }

    // A server that sends elsewhere, and one that writes down what it is sent.
    let heard = net.dir().join("heard");
    let to = ENTRANCE[0];
    let (certificate, key) = (tests::forge::authority(net.dir()), net.dir().join("forge/tls.key"));
    let (certificate, key) = (certificate.display(), key.display());
    let by_https = by_http(8082).replace("http:", "https:");
    let servers = format!(
        "log_format sent \"$request_uri $http_authorization\"; \
         server {{ listen {to}:8082 ssl; ssl_certificate {certificate}; ssl_certificate_key {key}; \
         return 302 http://{to}:8083$request_uri; }} \
         server {{ listen {to}:8083; access_log {} sent; return 404; }}",
        heard.display()
    );
    let _nginx = Peer::nginx(&net, &net.entrance, &format!("http {{ {servers} }}"));
    let heard = || std::fs::read_to_string(&heard).unwrap_or_default();
    let (good, said) = check(&net, &format!("{by_https}\n{token}"), &inside);
    assert!(!good && said.contains("write `git` as the URL where the repository is now"), "{said}");
    assert_eq!(heard(), "");
    // Without a token there is nothing to lose.
    let (good, said) = check(&net, &by_https, &inside);
    assert!(!good, "{said}");
    eventually(PATIENCE, "the redirection is followed", || {
        heard().contains("/git/entrance.git/info/refs").then_some(())
    });
    assert!(!heard().contains("Basic"), "{}", heard());
}

#[test]
fn what_is_too_large_too_slow_or_a_link_is_not_fetched_and_no_secret_is_an_argument() {
    let _turn = beside_others();
    let net = Net::new();
    let forge = Forge::start(&net, &net.entrance);
    let check = |source: &str| check(&net, source, &std::env::temp_dir());
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
    // git's own patience with such a server has no end.
    assert!(start.elapsed() < PATIENCE);
    // Meanwhile a token is looked for in what every user can see.
    let by_token = format!(
        "git = \"https://{}:8081/x.git\"\ntimeout = \"4s\"\ntoken_file = \"{}\"",
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
    assert!(
        said.contains("path = \"gone.toml\"\n") && said.contains("name a file that is in the repository"),
        "{said}"
    );
    let (good, said) = check(&git.replace("entrance.git", "gone.git"));
    assert!(!good && said.contains("gone.git"), "{said}");
    assert!(said.contains("error: ") && said.contains(" | git = "), "at the line of `git`: {said}");
}
