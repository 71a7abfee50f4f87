//! Changing the configuration of a daemon that is in use: nothing is lost, and nothing changes by
//! halves.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tests::daemon::{Config, Daemon, HOST};
use tests::netns::CLUSTER;
use tests::rig::{PATIENCE, Rig, Server, accept, public};
use tests::stream::{Pattern, client_hello, never_hang, read_preamble, reset_within};
use tests::{alone, beside_others, eventually};

const PATTERN: Pattern = Pattern::new(17);
const OTHER: &str = "other.example.net";

#[track_caller]
fn works((client, server): &(TcpStream, TcpStream)) {
    PATTERN.send(client, 0, 10_000).expect("sent");
    PATTERN.receive_exactly(server, 0, 10_000);
    PATTERN.send(server, 0, 10_000).expect("sent");
    PATTERN.receive_exactly(client, 0, 10_000);
}

/// A table that routes `host` to the second cluster node.
fn also(host: &str) -> String {
    format!(
        "[[routes]]\nhosts = [\"{host}\"]\nupstream = \"other\"\n[upstreams.other]\ntargets = [\"{}:443\"]\n",
        CLUSTER[1]
    )
}

#[track_caller]
fn reload(rig: &Rig) {
    let out = rig.daemon.cli(&["reload"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

/// A connection for the host of [`also`].
#[track_caller]
fn pair_of(rig: &Rig, upstream: &std::net::TcpListener, host: &str) -> (TcpStream, TcpStream) {
    let mut client = rig.connect();
    client.write_all(&client_hello(Some(host), &[])).expect("sent");
    (client, accept(upstream, false).0)
}

#[test]
fn connections_of_a_removed_route_have_drain_timeout_to_end_and_others_are_left_alone() {
    let _turn = beside_others();
    let config = Config::new("auto").limits("drain_timeout = \"3s\"");
    let rig = Rig::new(&config.clone().more(&also(OTHER)));
    let upstream = rig.net.cluster.listen(&format!("{}:443", CLUSTER[1]));
    let (kept, removed) = (rig.pair(), pair_of(&rig, &upstream, OTHER));
    let start = Instant::now();
    rig.daemon.rewrite(&config);
    reload(&rig);
    works(&removed);
    works(&kept);
    for end in [&removed.0, &removed.1] {
        assert!(reset_within(end, PATIENCE).is_some());
    }
    assert!(start.elapsed() >= Duration::from_secs(3), "after {:?}", start.elapsed());
    rig.daemon.wait_metric("dataplane_connections_closed_total", &[("reason", "route_removed"), ("route", OTHER)], 1.0);
    works(&kept);

    // A route that comes back in time was not away.
    rig.daemon.rewrite(&config.clone().more(&also(OTHER)));
    reload(&rig);
    let spared = pair_of(&rig, &upstream, OTHER);
    rig.daemon.rewrite(&config);
    reload(&rig);
    rig.daemon.rewrite(&config.clone().more(&also(OTHER)).limits("idle_timeout = \"2h\""));
    reload(&rig);
    std::thread::sleep(Duration::from_secs(4));
    works(&spared);
}

#[test]
fn with_close_connections_of_a_removed_route_or_listener_are_cut_at_once() {
    let _turn = beside_others();
    for engine in ["copy", "splice", "sockmap"] {
        let mut config = Config::new(engine);
        config.engine = format!("{engine}\"\non_removed_route = \"close");
        let tcp = "[listeners.plain]\nmode = \"tcp\"\nbind = [\"198.51.100.1:2222\"]\nupstream = \"other\"\n";
        let rig = Rig::new(&config.clone().more(&also(OTHER)).more(tcp));
        let upstream = rig.net.cluster.listen(&format!("{}:443", CLUSTER[1]));
        let (kept, removed) = (rig.pair(), pair_of(&rig, &upstream, OTHER));
        let mut plain = rig.net.client.connect("198.51.100.1:2222".parse().expect("an address")).expect("accepted");
        plain.write_all(&client_hello(Some(OTHER), &[])).expect("sent");
        let plain = (plain, accept(&upstream, false).0);
        for pair in [&kept, &removed, &plain] {
            works(pair);
        }
        rig.daemon.rewrite(&config);
        reload(&rig);
        for end in [&removed.0, &removed.1, &plain.0, &plain.1] {
            assert!(reset_within(end, PATIENCE).is_some(), "{engine}");
        }
        works(&kept);
        rig.daemon.wait_metric("dataplane_connections_active", &[], 1.0);
    }
}

#[test]
fn a_change_of_the_file_by_write_rename_or_link_is_a_reload_and_a_broken_one_is_told() {
    let _turn = beside_others();
    let mut watching = Config::new("auto");
    watching.engine = "auto\"\nwatch = true\ninclude = [\"routes.d/*.toml\"]\non_removed_route = \"drain".into();
    let rig = Rig::new(&watching);
    let dir = rig.daemon.dir().to_path_buf();
    let file = rig.daemon.config_path();
    let hash = || rig.daemon.metrics().values("dataplane_config_info", "hash").concat();
    // In one step: a file that is written is empty for a moment, which may last, and would be taken
    // for what it should be.
    let replace = |name: &str, text: String| {
        std::fs::write(dir.join("other"), text).expect("written");
        std::fs::rename(dir.join("other"), dir.join(name)).expect("renamed");
    };
    let changes = |what: &str, change: &dyn Fn()| {
        let before = hash();
        change();
        eventually(PATIENCE, what, || (hash() != before).then_some(()));
    };
    changes("a write", &|| rig.daemon.rewrite(&watching.clone().limits("idle_timeout = \"2h\"")));
    changes("a rename", &|| {
        replace("dataplane.toml", std::fs::read_to_string(&file).expect("it is there") + "# new\n");
    });
    changes("a folder with a file that is included", &|| {
        std::fs::create_dir(dir.join("routes.d")).expect("made");
        replace("routes.d/a.toml", also(OTHER));
    });
    let upstream = rig.net.cluster.listen(&format!("{}:443", CLUSTER[1]));
    works(&pair_of(&rig, &upstream, OTHER));
    changes("a change of that file", &|| {
        replace("routes.d/a.toml", also("changed.example.net"));
    });
    // As Kubernetes does it: the file is a link through a link that is swapped.
    let text = std::fs::read_to_string(&file).expect("it is there");
    for version in ["..1", "..2"] {
        std::fs::create_dir(dir.join(version)).expect("made");
        std::fs::write(dir.join(version).join("dataplane.toml"), format!("{text}# {version}\n")).expect("written");
    }
    std::os::unix::fs::symlink("..1", dir.join("..data")).expect("a link");
    changes("a link in the place of the file", &|| {
        std::os::unix::fs::symlink("..data/dataplane.toml", dir.join("link")).expect("a link");
        std::fs::rename(dir.join("link"), &file).expect("renamed");
    });
    changes("a swap of the link in the middle", &|| {
        std::os::unix::fs::symlink("..2", dir.join("..tmp")).expect("a link");
        std::fs::rename(dir.join("..tmp"), dir.join("..data")).expect("renamed");
    });

    let good = hash();
    replace("routes.d/a.toml", also(HOST));
    rig.daemon.wait_metric("dataplane_config_last_reload_success", &[], 0.0);
    assert_eq!(hash(), good);
    let error = rig.daemon.wait_last_error();
    assert!(
        error.contains("routes.d/a.toml:2:10: error: host") && error.contains("dataplane.toml:"),
        "both places: {error}"
    );
    works(&rig.pair());
    std::fs::remove_file(dir.join("routes.d/a.toml")).expect("removed");
    rig.daemon.wait_metric("dataplane_config_last_reload_success", &[], 1.0);
}

#[test]
fn a_listener_that_cannot_be_bound_leaves_all_as_it_was_and_a_name_that_does_not_resolve_does_not_matter() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("auto"));
    let taken = rig.net.entrance.listen("198.51.100.1:8444");
    let two = "[listeners.one]\nbind = [\"198.51.100.1:8443\"]\n[listeners.two]\nbind = [\"198.51.100.1:8444\"]\n";
    rig.daemon.rewrite(&Config::new("auto").more(two).more(&also(OTHER)));
    let out = rig.daemon.cli(&["reload"]);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success() && said.contains("198.51.100.1:8444"), "{said}");
    assert!(
        rig.net.client.connect("198.51.100.1:8443".parse().expect("an address")).is_err(),
        "the one that could be is not"
    );
    works(&rig.pair());
    drop(taken);
    reload(&rig);
    rig.net.client.connect("198.51.100.1:8443".parse().expect("an address")).expect("accepted");

    let unknown =
        "[[routes]]\nhosts = [\"x.example\"]\nupstream = \"x\"\n[upstreams.x]\ntargets = [\"nobody.invalid:443\"]\n";
    rig.daemon.rewrite(&Config::new("auto").more(unknown));
    reload(&rig);
    works(&rig.pair());
}

#[test]
fn before_a_push_check_tells_programs_where_mistakes_are_and_diff_says_what_changes() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("auto"));
    let dir = rig.daemon.dir().to_path_buf();
    let check = || {
        let out = rig.daemon.cli(&["check", "--format", "json"]);
        let document: serde_json::Value = serde_json::from_slice(&out.stdout).expect("one JSON document");
        (out.status.code(), document)
    };
    let (code, document) = check();
    assert_eq!((code, &document["valid"], &document["diagnostics"]), (Some(0), &true.into(), &serde_json::json!([])));
    let old = dir.join("old.toml");
    std::fs::copy(rig.daemon.config_path(), &old).expect("copied");

    rig.daemon.rewrite(&Config::new("auto").more(&also(OTHER)));
    let out = rig.daemon.cli(&["diff", &old.to_string_lossy()]);
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    // As diff(1): the same, different, trouble.
    assert_eq!(out.status.code(), Some(1));
    assert!(said.starts_with(&format!("WIDER: {OTHER} is let through, to `other` ")), "{said}");
    let same = rig.daemon.cli(&["diff", &old.to_string_lossy(), &old.to_string_lossy()]);
    assert_eq!((same.status.code(), &*String::from_utf8_lossy(&same.stdout)), (Some(0), "nothing changes\n"));
    let out = rig.daemon.cli(&["diff", &old.to_string_lossy(), "--format", "json"]);
    let document: serde_json::Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert_eq!(document["changes"][0]["widens"], true, "{document}");
    assert_eq!(rig.daemon.cli(&["diff", "/nowhere"]).status.code(), Some(2));

    std::fs::create_dir(dir.join("routes.d")).expect("made");
    std::fs::write(dir.join("routes.d/a.toml"), also(HOST)).expect("written");
    let mut including = Config::new("auto");
    including.engine = "auto\"\ninclude = [\"routes.d/*.toml\"]\non_removed_route = \"drain".into();
    rig.daemon.rewrite(&including.listener("bindd = 3"));
    let (code, document) = check();
    assert_eq!((code, &document["valid"]), (Some(1), &false.into()));
    let found = document["diagnostics"].as_array().expect("a list");
    let place = |of: &serde_json::Value| (of["file"].clone(), of["line"].clone(), of["column"].clone());
    let file = |name: &str| serde_json::json!(dir.join(name));
    assert_eq!(found.len(), 2, "{document:#}");
    assert_eq!(place(&found[0]), (file("dataplane.toml"), 6.into(), 1.into()));
    assert_eq!((&found[0]["severity"], &found[0]["help"]), (&"error".into(), &"did you mean `bind`?".into()));
    assert_eq!(place(&found[1]), (file("routes.d/a.toml"), 2.into(), 10.into()));
    assert_eq!(place(&found[1]["note"]).0, file("dataplane.toml"));
}

/// One connection for a name: whether the right upstream answered, to the end.
fn visit(name: &str, tag: u8) -> Result<(), String> {
    let mut stream =
        TcpStream::connect_timeout(&public(), Duration::from_secs(20)).map_err(|e| format!("connect: {e}"))?;
    never_hang(&stream);
    let said = [0x5a; 300];
    stream.write_all(&[client_hello(Some(name), &[]), said.to_vec()].concat()).map_err(|e| format!("send: {e}"))?;
    stream.shutdown(std::net::Shutdown::Write).map_err(|e| format!("FIN: {e}"))?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).map_err(|e| format!("receive: {e}"))?;
    let expected = [&[tag][..], &said].concat();
    if answer == expected {
        Ok(())
    } else {
        Err(format!("{name}: an answer of {} bytes, by {:?}", answer.len(), answer.first()))
    }
}

/// Says who it is, then sends back what comes.
fn tagged(listener: std::net::TcpListener, tag: u8) -> Server {
    Server::start(listener, move |mut stream| {
        if read_preamble(&stream, false).is_ok() && stream.write_all(&[tag]).is_ok() {
            let _ = std::io::copy(&mut &stream, &mut &stream);
        }
    })
}

#[test]
fn a_thousand_reloads_under_load_lose_refuse_and_misroute_nothing_and_leave_nothing_behind() {
    const RELOADS: usize = 1000;
    const THREADS: usize = 8;
    const RATE: u32 = 200;
    let _turn = alone();
    let variant = |n: usize| {
        // What is there in each: the two names. What changes: everything around them.
        let config = Config::new("auto").more(&also(OTHER)).limits(&format!("idle_timeout = \"{}s\"", 600 + n % 7));
        let config = match n % 3 {
            0 => config.more("[listeners.third]\nbind = [\"198.51.100.1:8443\"]"),
            1 => config.more("[[routes]]\nhosts = [\"*.example.net\", \"third.example.org\"]\nupstream = \"cluster\""),
            _ => config.listener("deny = [\"192.0.2.0/24\"]"),
        };
        if n.is_multiple_of(2) { config } else { config.upstream("balance = \"first\"") }
    };
    let mut rig = Rig::new(&variant(0));
    let first = tagged(std::mem::replace(&mut rig.upstream, rig.net.cluster.listen("127.0.0.1:1")), 1);
    let second = tagged(rig.net.cluster.listen(&format!("{}:443", CLUSTER[1])), 2);
    let (stop, done) = (AtomicBool::new(false), AtomicUsize::new(0));

    let client = rig.net.client.clone();
    let load = |thread: usize| {
        client.run(|| {
            let start = Instant::now();
            let mut errors = Vec::new();
            let mut next = start;
            while !stop.load(Relaxed) {
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
                next += Duration::from_secs(1) * THREADS as u32 / RATE;
                let (name, tag) =
                    if (done.fetch_add(1, Relaxed) + thread).is_multiple_of(2) { (HOST, 1) } else { (OTHER, 2) };
                errors.extend(visit(name, tag).err());
            }
            errors
        })
    };
    let measure = |rig: &Rig| {
        rig.wait_idle();
        (rig.daemon.pss(), rig.daemon.fds().len() - 2 * rig.daemon.pipes())
    };
    let (errors, took, flat) = std::thread::scope(|s| {
        let _stopped = Stop(&stop);
        let threads: Vec<_> = (0..THREADS).map(|thread| s.spawn(move || load(thread))).collect();
        let begun = Instant::now();
        let mut settled = 0;
        for n in 1..=RELOADS {
            rig.daemon.rewrite(&variant(n));
            ask_reload(&rig.daemon);
            // Else all of them would be over before a hundred connections have come.
            std::thread::sleep(Duration::from_millis(10));
            if n == RELOADS / 4 {
                settled = rig.daemon.pss();
            }
        }
        let took = begun.elapsed();
        let end = rig.daemon.pss();
        eventually(Duration::from_secs(60), "a thousand connections", || (done.load(Relaxed) >= 1000).then_some(()));
        stop.store(true, Relaxed);
        let errors: Vec<_> = threads.into_iter().flat_map(|t| t.join().expect("no panic")).collect();
        (errors, took, (settled, end))
    });
    let connections = done.load(Relaxed);
    assert!(errors.is_empty(), "{} of {connections} connections: {:?}", errors.len(), &errors[..errors.len().min(5)]);
    assert_eq!(first.accepted() + second.accepted(), connections, "each connection reached one upstream");
    rig.daemon.rewrite(&variant(RELOADS));
    let (_, fds) = measure(&rig);
    let (settled, end) = flat;
    eprintln!(
        "{RELOADS} reloads in {took:?}, {connections} connections; PSS {} KiB after {}, {} KiB at the end",
        settled / 1024,
        RELOADS / 4,
        end / 1024
    );
    assert!(end < settled + (4 << 20), "PSS grew from {settled} to {end} bytes in {} reloads", RELOADS * 3 / 4);
    // The same configuration, freshly begun, needs as many.
    drop((first, second));
    drop(rig);
    let fresh = Rig::new(&variant(RELOADS));
    let _first = tagged(fresh.net.cluster.listen(&format!("{}:443", CLUSTER[1])), 2);
    let few = measure(&fresh).1;
    assert!(fds <= few + 4, "{fds} descriptors, a fresh daemon has {few}");
}

/// Ends the load, also when the test has failed.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// As `dataplane reload` asks, without a process for each.
fn ask_reload(daemon: &Daemon) {
    let mut stream = UnixStream::connect(daemon.dir().join("admin.sock")).expect("the control socket");
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a time limit");
    stream.write_all(b"POST /reload HTTP/1.1\r\nHost: dataplane\r\nConnection: close\r\n\r\n").expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[test]
fn ten_thousand_hosts_in_two_hundred_files_are_in_force_within_a_second() {
    let _turn = beside_others();
    let rig = Rig::new(&Config::new("auto"));
    let dir = rig.daemon.dir().join("routes.d");
    std::fs::create_dir(&dir).expect("made");
    for file in 0..200 {
        let route = |n: usize| {
            let hosts: Vec<_> = (0..10).map(|host| format!("h{host}.r{n}.f{file}.example.org")).collect();
            format!("[[routes]]\nhosts = {hosts:?}\nupstream = \"u{file}\"\n")
        };
        let routes: String = (0..5).map(route).collect();
        let text = format!("[upstreams.u{file}]\ntargets = [\"{}:443\"]\n{routes}", CLUSTER[0]);
        std::fs::write(dir.join(format!("{file:03}.toml")), text).expect("written");
    }
    let config = |n: usize| {
        let mut config = Config::new("auto").limits(&format!("idle_timeout = \"{}s\"", 600 + n));
        config.engine = "auto\"\ninclude = [\"routes.d/*.toml\"]\non_removed_route = \"drain".into();
        config
    };
    let once = |n: usize| {
        rig.daemon.rewrite(&config(n));
        let start = Instant::now();
        ask_reload(&rig.daemon);
        start.elapsed()
    };
    // The first one makes 1,000 routes' metrics, the others keep them; the best of each kind:
    // another program may have the processors.
    let mut first = once(0);
    for n in 1..4 {
        rig.daemon.rewrite(&Config::new("auto"));
        ask_reload(&rig.daemon);
        first = first.min(once(n));
    }
    eprintln!("10,000 hosts in 200 files: {first:?}");
    assert!(first < Duration::from_secs(1), "{first:?}");
    let mut client = rig.connect();
    client.write_all(&client_hello(Some("h9.r4.f199.example.org"), &[])).expect("sent");
    works(&(client, accept(&rig.upstream, false).0));
    // Nobody who is connected is kept waiting by it, nor a signal.
    rig.daemon.signal(Signal::HUP);
    works(&rig.pair());
}
