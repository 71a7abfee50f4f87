//! What somebody who may push to the repository cannot do to a node, and what a node does when its
//! last good commit is none any more.

use std::io::Read;
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tests::beside_others;
use tests::daemon::{Daemon, binary};
use tests::forge::{Forge, TOKEN};
use tests::netns::{ENTRANCE, Net};
use tests::rig::PATIENCE;

/// What a stranger may write.
const GOOD: &str = "[listeners.public]\nbind = [\"0.0.0.0:443\"]\n[upstreams.cluster]\ntargets = [\"100.64.0.2:443\"]\n\
                    [[routes]]\nhosts = [\"one.example\"]\nupstream = \"cluster\"\n";

fn check(arguments: &[&str], folder: &Path) -> (bool, String) {
    let mut command = Command::new(binary());
    command.env("GIT_SSL_CAINFO", folder.join("forge.pem")).current_dir(folder);
    let out = command.arg("check").args(arguments).output().expect("the daemon's binary can be run");
    (out.status.success(), String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned())
}

#[test]
fn a_check_of_pushed_content_reads_nothing_outside_and_sends_nothing_anywhere() {
    let _turn = beside_others();
    let folder = tempfile::tempdir().expect("a folder");
    let (inside, secret) = (folder.path().join("pushed"), folder.path().join("secret"));
    std::fs::create_dir(&inside).expect("made");
    std::fs::write(&secret, "hunter2 is no TOML\n").expect("written");
    symlink(&secret, inside.join("link.toml")).expect("linked");
    let listens = TcpListener::bind("127.0.0.1:0").expect("bound");
    listens.set_nonblocking(true).expect("fcntl");
    let at = listens.local_addr().expect("bound");
    let secret = secret.display();
    let pushed = |text: String| {
        std::fs::write(inside.join("dataplane.toml"), text).expect("written");
        check(&["--repository", "pushed"], folder.path())
    };
    let (good, said) = pushed(GOOD.to_owned());
    assert!(good, "{said}");
    for wrong in [
        format!("include = [\"{secret}\"]\n{GOOD}"),
        format!("include = [\"../secret\"]\n{GOOD}"),
        format!("include = [\"link.toml\"]\n{GOOD}"),
        format!("{GOOD}[source]\ngit = \"http://{at}/x.git\"\ntoken_file = \"{secret}\"\n"),
        format!("{GOOD}[source]\ngit = \"https://{at}/x.git\"\ntoken_file = \"{secret}\"\n"),
    ] {
        let (good, said) = pushed(wrong.clone());
        assert!(!good && said.contains("error: ") && said.contains("help: "), "{wrong}:\n{said}");
        assert!(!said.contains("hunter2"), "{said}");
    }
    assert!(listens.accept().is_err(), "nobody was asked");
}

#[test]
fn what_a_push_changes_is_said_without_reading_outside_of_it() {
    let _turn = beside_others();
    let folder = tempfile::tempdir().expect("a folder");
    let secret = folder.path().join("secret");
    std::fs::write(&secret, "hunter2 is no TOML\n").expect("written");
    let write = |name: &str, text: &str| {
        let folder = folder.path().join(name);
        std::fs::create_dir_all(&folder).expect("made");
        std::fs::write(folder.join("nodes.toml"), text).expect("written");
    };
    let diff = |arguments: &[&str]| {
        let mut command = Command::new(binary());
        let out = command.arg("diff").args(arguments).current_dir(folder.path()).output();
        let out = out.expect("the daemon's binary can be run");
        // 2: they could not be compared.
        let good = matches!(out.status.code(), Some(0 | 1));
        (good, String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned())
    };
    let inside = ["--repository", "old", "new", "--path", "nodes.toml"];
    write("old", GOOD);
    write("new", &GOOD.replace("one.example", "two.example"));
    let (good, said) = diff(&inside);
    assert!(good && said.contains("two.example is let through"), "{said}");
    for include in [&*secret.to_string_lossy(), "../secret"] {
        write("new", &format!("include = [\"{include}\"]\n{GOOD}"));
        let (good, said) = diff(&inside);
        assert!(!good && said.contains("new: nodes.toml:1:") && !said.contains("hunter2"), "{said}");
    }
    // As strict as a node: its owner's lists count.
    write("new", &GOOD.replace("100.64.0.2:443", "127.0.0.1:8443"));
    let (good, said) = diff(&inside);
    assert!(!good && said.contains("`allow_targets`"), "{said}");
    std::fs::write(folder.path().join("node.toml"), "[source]\ngit = \"/x\"\nallow_targets = [\"127.0.0.1\"]\n")
        .expect("written");
    write("old", &GOOD.replace("100.64.0.2:443", "127.0.0.2:8443"));
    let (good, said) = diff(&[&inside[..], &["--node", "node.toml"]].concat());
    assert!(!good && said.contains("old: nodes.toml:"), "{said}");
    write("old", &GOOD.replace("100.64.0.2:443", "127.0.0.1:8443").replace("one.example", "two.example"));
    let (good, said) = diff(&[&inside[..], &["--node", "node.toml"]].concat());
    assert!(good && said.contains("one.example is let through"), "{said}");
    let (good, said) = diff(&["--repository", "old"]);
    assert!(!good && said.contains("<NEW>"), "{said}");
}

#[test]
fn a_repository_decides_nothing_that_its_node_has_not_given_it() {
    let _turn = beside_others();
    let net = Net::new();
    let forge = Forge::start(&net, &net.entrance);
    let node = |lines: &str| {
        let git = forge.repository();
        let text = format!(
            "[source]\nref = \"main\"\nstate_directory = \"{}/state\"\ngit = \"file://{}\"\n{lines}",
            net.dir().display(),
            git.display()
        );
        net.file("node.toml", text);
        check(&["--config", "node.toml"], net.dir())
    };
    forge.push(&[("dataplane.toml", GOOD)]);
    let (good, said) = node("");
    assert!(good, "{said}");
    let other = |from: &str, to: &str| GOOD.replace(from, to);
    let cases = [
        (format!("{GOOD}[admin]\nbind = \"0.0.0.0:9443\"\n"), "admin", None),
        (format!("{GOOD}[admin]\nsocket = \"/run/other.sock\"\n"), "admin", None),
        (format!("{GOOD}[resolver]\nservers = [\"203.0.113.1\"]\n"), "resolver", None),
        (other("0.0.0.0:443", "127.0.0.1:22"), "127.0.0.1:22", Some("allow_listeners = [\"127.0.0.1:22\"]")),
        (other("0.0.0.0:443", "0.0.0.0:22"), "0.0.0.0:22", Some("allow_listeners = [\"*:22\"]")),
        (other("100.64.0.2:443", "169.254.169.254:80"), "169.254.169.254:80", None),
        (other("100.64.0.2:443", "[fe80::1%1]:80"), "fe80", None),
        (
            other("100.64.0.2:443", "127.0.0.1:9443"),
            "127.0.0.1:9443",
            Some("allow_targets = [\"127.0.0.1:9443\"]\n[admin]\nbind = \"127.0.0.1:9444\""),
        ),
        (
            other("100.64.0.2:443", "localhost:8443"),
            "localhost:8443",
            Some("allow_targets = [\"127.0.0.0/8\", \"::1\"]"),
        ),
        (other("one.example", "*"), "`*`", Some("allow_hosts = [\"*\"]")),
        (other("one.example", "*.com"), "*.com", Some("allow_hosts = [\"*.com\"]")),
    ];
    for (pushed, named, allowed_by) in cases {
        forge.push(&[("dataplane.toml", &pushed)]);
        let (good, said) = node("");
        assert!(!good && said.contains(named) && said.contains("help: "), "{pushed}\n{said}");
        if let Some(lines) = allowed_by {
            let (good, said) = node(lines);
            assert!(good, "{lines}\n{pushed}\n{said}");
        }
    }
    forge.push(&[("dataplane.toml", GOOD)]);
    let (good, said) = node("allow_hosts = [\"*.example.com\"]");
    assert!(!good && said.contains("one.example") && said.contains("allow_hosts"), "{said}");
}

#[test]
fn a_tag_does_not_take_the_place_of_the_branch() {
    let _turn = beside_others();
    let net = Net::new();
    let forge = Forge::start(&net, &net.entrance);
    let first = forge.push(&[("dataplane.toml", GOOD)]);
    let evil = forge.push(&[("dataplane.toml", &GOOD.replace("one.example", "evil.example"))]);
    let git = |arguments: &[&str]| {
        let out = Command::new("git").arg("-C").arg(forge.repository()).args(arguments).output().expect("git");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    };
    git(&["update-ref", "refs/heads/main", &first]);
    git(&["update-ref", "refs/tags/main", &evil]);
    let at = forge.repository();
    let node = |reference: &str| {
        let state = net.dir().join("state");
        let text = format!(
            "[source]\nref = \"{reference}\"\nstate_directory = \"{}\"\ngit = \"file://{}\"\n",
            state.display(),
            at.display()
        );
        net.file("node.toml", text);
        check(&["--config", "node.toml"], net.dir())
    };
    let (good, said) = node("main");
    assert!(!good && said.contains("refs/heads/main") && said.contains("refs/tags/main"), "{said}");
    let (good, said) = node("refs/heads/main");
    assert!(good && said.contains("one.example") && !said.contains("evil.example"), "{said}");
    git(&["update-ref", "-d", "refs/tags/main"]);
    let (good, said) = node("main");
    assert!(good && !said.contains("evil.example"), "{said}");
}

#[test]
fn passwords_and_tokens_are_told_to_nobody_and_wrong_ones_are_named_by_their_file() {
    let _turn = beside_others();
    let net = Net::new();
    let forge = Forge::start(&net, &net.entrance);
    forge.push(&[("dataplane.toml", GOOD)]);
    let node = |lines: &str| {
        let text = format!("[source]\nref = \"main\"\nstate_directory = \"{}/state\"\n{lines}", net.dir().display());
        let file = net.file("node.toml", text);
        let mut command = Command::new(binary());
        command.env("GIT_SSL_CAINFO", tests::forge::authority(net.dir())).args(["check", "--config"]).arg(file);
        let out = net.client.run(|| command.output()).expect("the daemon's binary can be run");
        (out.status.success(), String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned())
    };
    let (good, said) = node(&forge.by_https(ENTRANCE[0]));
    assert!(good && said.contains(&format!("fetching https://{}", ENTRANCE[0])), "{said}");
    for url in ["https://me:hunter2@198.51.100.1:1/x.git", "ssh://git:hunter2@198.51.100.1:1/x.git"] {
        let (good, said) = node(&format!("git = \"{url}\"\nhunter2 = 1"));
        assert!(!good && !said.contains(":hunter2@"), "{said}");
    }
    // Whatever is wrong, and in whatever form it is told.
    for git in [
        "\"https://me:hun hunter2@198.51.100.1:1/x.git\"",
        "\"https://198.51.100.1:1/x.git?private_token=hunter2\"",
        "\"https://198.51.100.1:1/x.git#hunter2\"",
        "\"https://me:hunter2%40198.51.100.1/x.git\"",
        "\"https://198.51.100.1:hunter2/x.git\"",
        "\"\"\"https://me:\nhunter2\n@198.51.100.1/x.git\"\"\"",
        "'''https://me:hunter2\\@198.51.100.1/x.git'''",
        "https://me:hun hunter2@198.51.100.1/x.git",
        "\"https://me:hunter2\\q@198.51.100.1/x.git\"",
        "\"\"\"https://me:\nhunter2\\q@198.51.100.1/x.git\"\"\"",
    ] {
        for lines in [format!("git = {git}"), format!("gti = {git}"), format!("git = {git}\nother = 1")] {
            let (good, said) = node(&lines);
            assert!(!good && said.contains("help: ") && !said.contains("hunter2"), "{lines}:\n{said}");
            let out = Command::new(binary())
                .args(["check", "--format", "json", "--config", "node.toml"])
                .current_dir(net.dir())
                .output()
                .expect("the daemon's binary can be run");
            let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
            assert!(
                !out.status.success() && said.contains("\"help\"") && !said.contains("hunter2"),
                "{lines}:\n{said}"
            );
        }
    }
    let file = forge.token_file();
    for text in [format!("{TOKEN}\nsecond\n"), String::new(), "\n".to_owned()] {
        let by_https = forge.by_https(ENTRANCE[0]);
        std::fs::write(&file, &text).expect("written");
        let (good, said) = node(&by_https);
        assert!(!good && said.contains(&*file.to_string_lossy()) && !said.contains(TOKEN), "{text:?}: {said}");
    }
    let by_http = forge.by_https(ENTRANCE[0]).replace("https", "http").replace("8443", "8080");
    let (good, said) = node(&by_http);
    assert!(!good && said.contains(&*file.to_string_lossy()) && said.contains("http://"), "{said}");
}

#[test]
fn a_kept_commit_that_cannot_be_put_in_force_any_more_gives_way_to_the_newest() {
    let _turn = beside_others();
    let net = Net::new();
    let forge = Forge::start(&net, &net.entrance);
    let at = |address: &str| GOOD.replace("0.0.0.0:443", &format!("{address}:443"));
    net.client.ip("addr add 198.51.100.77/32 dev public\n");
    forge.push(&[("dataplane.toml", &at("198.51.100.77"))]);
    let state = net.dir().join("state");
    let node = |dir: &Path| {
        format!(
            "[source]\nref = \"main\"\ninterval = \"1h\"\nstate_directory = \"{}\"\ngit = \"file://{}\"\n\
             [admin]\nbind = \"127.0.0.1:9443\"\nsocket = \"{}/admin.sock\"\n",
            state.display(),
            forge.repository().display(),
            dir.display()
        )
    };
    run_once(&net, &state, node);
    // The provider has given the machine another address, and the owner has pushed that.
    net.client.ip("addr del 198.51.100.77/32 dev public\n");
    let fixed = forge.push(&[("dataplane.toml", &at("0.0.0.0"))]);
    let daemon = Daemon::start_on(&net, &net.client, node);
    tests::eventually(PATIENCE, "the fixed commit is in force", || {
        (daemon.metrics().values("dataplane_config_info", "commit").concat() == fixed).then_some(())
    });
}

/// Starts a daemon, and ends it when it has kept its commit.
fn run_once(net: &Net, state: &Path, node: impl FnOnce(&Path) -> String) {
    let daemon = Daemon::start_on(net, &net.client, node);
    tests::eventually(PATIENCE, "the commit is kept", || state.join("last-good.json").exists().then_some(()));
    drop(daemon);
}

/// What a start says that comes to nothing.
fn refused(net: &Net, text: &str) -> String {
    let file = net.file("refused.toml", text);
    let mut command = Command::new(binary());
    command.args(["run", "--config"]).arg(file);
    let out = net.client.run(|| command.output()).expect("the daemon's binary can be run");
    let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    assert!(!out.status.success(), "{said}");
    said
}

#[test]
fn why_the_kept_commit_was_refused_is_told_also_when_the_repository_is_away() {
    let _turn = beside_others();
    let net = Net::new();
    let forge = Forge::start(&net, &net.entrance);
    forge.push(&[("dataplane.toml", GOOD)]);
    let state = net.dir().join("state");
    let node = |dir: &Path, lines: &str| {
        format!(
            "[source]\nref = \"main\"\ninterval = \"1h\"\nstate_directory = \"{}\"\ngit = \"file://{}\"\n{lines}\
             [admin]\nbind = \"127.0.0.1:9443\"\nsocket = \"{}/admin.sock\"\n",
            state.display(),
            forge.repository().display(),
            dir.display()
        )
    };
    run_once(&net, &state, |dir| node(dir, ""));
    let away = net.dir().join("away");
    std::fs::rename(forge.repository(), &away).expect("moved");
    // The owner lets less pass than before.
    let said = refused(&net, &node(net.dir(), "allow_hosts = [\"*.example.com\"]\n"));
    assert!(said.contains("one.example") && said.contains("`allow_hosts`"), "{said}");
    assert!(said.contains(".toml:5:7: error: fatal: ") && !said.starts_with("error:"), "{said}");
    // What is wrong with the node's own file is told once.
    std::fs::rename(&away, forge.repository()).expect("moved");
    let said = refused(&net, &(node(net.dir(), "") + "ports = 1\n"));
    assert_eq!(said.matches("unknown key `ports`").count(), 1, "{said}");
}

#[test]
fn of_a_kept_commit_what_can_be_served_is_while_the_repository_is_away() {
    let _turn = beside_others();
    let net = Net::new();
    let forge = Forge::start(&net, &net.entrance);
    let at = |addresses: &[&str]| {
        let all: Vec<_> = addresses.iter().map(|address| format!("\"{address}:443\"")).collect();
        GOOD.replace("\"0.0.0.0:443\"", &all.join(", "))
    };
    let (gone, taken) = ("198.51.100.77", "198.51.100.78");
    for address in [gone, taken] {
        net.client.ip(&format!("addr add {address}/32 dev public\n"));
    }
    forge.push(&[("dataplane.toml", &at(&[gone, taken]))]);
    let state = net.dir().join("state");
    let node = |dir: &Path| {
        format!(
            "[source]\nref = \"main\"\ninterval = \"1s\"\nstate_directory = \"{}\"\ngit = \"file://{}\"\n\
             [admin]\nbind = \"127.0.0.1:9443\"\nsocket = \"{}/admin.sock\"\n",
            state.display(),
            forge.repository().display(),
            dir.display()
        )
    };
    run_once(&net, &state, node);
    let away = net.dir().join("away");
    std::fs::rename(forge.repository(), &away).expect("moved");
    net.client.ip(&format!("addr del {gone}/32 dev public\n"));
    let other = net.client.listen(&format!("{taken}:443"));

    // One address is missing and the other is taken.
    let daemon = Daemon::start_on(&net, &net.client, node);
    let status = daemon.json(&["status", "--json"]);
    assert_eq!(status["waiting"][0]["address"], format!("{gone}:443"), "{status:#}");
    let error = status["config"]["last_error"].as_str().unwrap_or_default();
    assert!(error.contains(&format!("cannot listen on {taken}:443")) && error.contains("entrance.git"), "{error}");
    net.client.ip(&format!("addr add {gone}/32 dev public\n"));
    let listens = |address: &str| net.client.connect(format!("{address}:443").parse().expect("an address"));
    drop(tests::eventually(PATIENCE, "it listens", || listens(gone).ok()));
    // The repository is back, and the other program is gone.
    drop(other);
    std::fs::rename(&away, forge.repository()).expect("moved");
    drop(tests::eventually(PATIENCE, "all is in force", || listens(taken).ok()));
    tests::eventually(PATIENCE, "nothing is wrong any more", || {
        daemon.json(&["status", "--json"])["config"]["last_error"].is_null().then_some(())
    });
    drop(daemon);

    // Where all are taken there is nothing to serve, and both reasons are told.
    std::fs::rename(forge.repository(), &away).expect("moved");
    let _others = [gone, taken].map(|address| net.client.listen(&format!("{address}:443")));
    let said = refused(&net, &node(net.dir()));
    assert!(said.contains(&format!("cannot listen on {taken}:443")) && said.contains("entrance.git"), "{said}");
}

#[test]
fn git_has_no_capabilities_whoever_started_us() {
    let _turn = beside_others();
    let net = Net::new();
    // A server that accepts and says nothing keeps git waiting.
    let silent = TcpListener::bind("127.0.0.1:0").expect("bound");
    let at = silent.local_addr().expect("bound");
    let state = net.dir().display().to_string();
    let file = net.file(
        "node.toml",
        format!("[source]\ngit = \"http://{at}/x.git\"\nstate_directory = \"{state}\"\ntimeout = \"30s\"\n"),
    );
    let mut child = Command::new(binary()).args(["check", "--config"]).arg(file).spawn().expect("it runs");
    let (mut asks, _) = silent.accept().expect("git asks");
    asks.set_read_timeout(Some(Duration::from_secs(20))).expect("a limit");
    let _ = asks.read(&mut [0; 1]);
    let port = at.port().to_string();
    let mut seen = 0;
    for entry in std::fs::read_dir("/proc").expect("procfs").flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if !(line.contains("git") && line.contains(&format!(":{port}/"))) {
            continue;
        }
        let status = std::fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
            let bits = status.lines().find_map(|line| line.strip_prefix(set)).unwrap_or("0").trim();
            assert_eq!(u64::from_str_radix(bits, 16), Ok(0), "{line}: {set}{bits}");
        }
        seen += 1;
    }
    assert!(seen > 0, "git runs");
    drop(asks);
    let _ = child.kill();
    let _ = child.wait();
}
