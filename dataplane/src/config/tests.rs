//! The configuration as its owner meets it: whole files, their warnings and the explanations of
//! what is wrong with them.

use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use sha2::{Digest, Sha256};

use super::*;

fn source(text: &str) -> Arc<Source> {
    Arc::new(Source::new("dataplane.toml", text.into()))
}

/// The configuration, and its warnings as people see them.
fn read(text: &str) -> (Config, String) {
    let source = source(text);
    match parse(source.clone()) {
        Ok((config, warnings)) => (config, warnings.iter().map(|w| w.render(&source).to_string()).collect()),
        Err(diagnostics) => panic!("{}", LoadError::Report { source, diagnostics }),
    }
}

fn refusal(text: &str) -> String {
    let source = source(text);
    let diagnostics = parse(source.clone()).expect_err("the text is wrong");
    LoadError::Report { source, diagnostics }.to_string()
}

const SMALL: &str = r#"
[listeners.public]
bind = ["0.0.0.0:443"]
[upstreams.cluster]
targets = ["thinkpad-1:443"]
[[routes]]
hosts = ["blog.example.com"]
upstream = "cluster"
"#;

/// The one in the documentation.
const EVERY_KEY: &str = r#"
engine = "auto"

[listeners.public]
bind = ["0.0.0.0:443", "[::]:443"]
accept_proxy = ["10.0.0.0/8"]
allow = ["0.0.0.0/0"]
deny = ["192.0.2.7"]

[listeners.web]
mode = "http"
bind = ["0.0.0.0:80", "[::]:80"]
acme_port = 8080

[listeners.git]
mode = "tcp"
bind = ["0.0.0.0:2222"]
upstream = "git-ssh"

[upstreams.cluster]
targets = ["thinkpad-1:443", "thinkpad-2.tailnet.example:443", "100.64.0.7:443", "[fd7a:115c:a1e0::7]:443"]
send_proxy = "v2"
balance = "least-connections"
health = { interval = "5s", timeout = "2s", fall = 2, rise = 2 }
connect_timeout = "3s"
max_connections_per_target = 0
hedge_delay = "250ms"
on_down = "keep"
prefer_direct = false

[upstreams.headscale]
targets = ["127.0.0.1:8443"]
send_proxy = "off"

[upstreams.git-ssh]
targets = ["thinkpad-1:22"]

[[routes]]
hosts = ["headscale.example.com"]
upstream = "headscale"

[[routes]]
hosts = ["blog.example.com", "*.apps.example.com"]
alpn = ["h2", "http/1.1"]
listeners = ["public"]
upstream = "cluster"

[[routes]]
hosts = ["secret.apps.example.com"]
action = "refuse"

[limits]
hello_timeout = "5s"
hello_max_bytes = 16384
idle_timeout = "1h"
dead_peer_timeout = "60s"
drain_timeout = "30s"
max_connections = 0
max_connections_per_client = 0
kernel_memory = "64MiB"

[admin]
bind = "127.0.0.1:9443"
socket = "/run/dataplane/admin.sock"

[resolver]
servers = ["100.100.100.100", "[::1]:5353"]

[tailnet]
socket = "/run/tailscaled.sock"
prefer_direct = true
"#;

#[test]
fn every_key_is_read_into_its_place() {
    let (config, warnings) = read(EVERY_KEY);
    assert_eq!(config.engine, EngineChoice::Auto);

    let names: Vec<&str> = config.listeners.iter().map(|listener| &*listener.name).collect();
    assert_eq!(names, ["public", "web", "git"], "in the order of the file");
    let public = &config.listeners[0];
    let binds: Vec<String> = public.bind.iter().map(|bind| bind.addr.to_string()).collect();
    assert_eq!(binds, ["0.0.0.0:443", "[::]:443"]);
    assert_eq!(&EVERY_KEY[public.bind[1].span.clone()], "\"[::]:443\"");
    assert_eq!(public.mode, Mode::Tls);
    let nets = |nets: &[IpNet]| nets.iter().map(IpNet::to_string).collect::<Vec<_>>();
    assert_eq!(nets(&public.accept_proxy), ["10.0.0.0/8"]);
    assert_eq!(nets(&public.allow), ["0.0.0.0/0"]);
    assert_eq!(nets(&public.deny), ["192.0.2.7/32"]);
    assert_eq!(config.listeners[1].mode, Mode::Http { acme_port: 8080 });
    assert_eq!(config.listeners[2].mode, Mode::Tcp { upstream: 2 });

    let cluster = &config.upstreams[0];
    assert_eq!(&*cluster.targets[1].text, "thinkpad-2.tailnet.example:443");
    assert_eq!(&EVERY_KEY[cluster.targets[3].span.clone()], "\"[fd7a:115c:a1e0::7]:443\"");
    assert_eq!(cluster.send_proxy, SendProxy::V2);
    assert_eq!(cluster.balance, Balance::LeastConnections);
    assert_eq!(cluster.connect_timeout, Duration::from_secs(3));

    let route = &config.routes[1];
    assert_eq!(&*route.name, "blog.example.com");
    let hosts = [HostPattern::Exact("blog.example.com".into()), HostPattern::Wildcard("apps.example.com".into())];
    assert_eq!(route.hosts, hosts);
    assert_eq!(route.alpn, ["h2", "http/1.1"]);
    assert_eq!((route.listeners.as_slice(), route.upstream()), ([0].as_slice(), Some(0)));
    assert_eq!(config.routes[2].action, Action::Refuse);
    assert!(config.routes[0].listeners.is_empty());

    assert_eq!(config.limits, Limits::default());
    assert_eq!(config.admin.bind.addr.to_string(), "127.0.0.1:9443");
    assert_eq!(config.admin.socket.to_str(), Some("/run/dataplane/admin.sock"));

    let health =
        HealthCheck { interval: Duration::from_secs(5), timeout: Duration::from_secs(2), fall: 2, rise: 2, tls: None };
    assert_eq!(cluster.health, Some(health));
    assert_eq!((cluster.hedge_delay, cluster.on_down), (Duration::from_millis(250), OnDown::Keep));
    assert_eq!(config.upstreams[1].health, None);
    let servers: Vec<String> = config.resolver.servers.iter().map(ToString::to_string).collect();
    assert_eq!(servers, ["100.100.100.100:53", "[::1]:5353"]);
    assert_eq!(config.tailnet.socket.to_str(), Some("/run/tailscaled.sock"));
    assert!(
        !cluster.prefer_direct && config.upstreams[1].prefer_direct,
        "an upstream may say otherwise than [tailnet]"
    );
    assert_eq!(warnings, "");
}

#[test]
fn limits_that_are_given_replace_the_defaults() {
    let limits = read(&format!(
        "{SMALL}[limits]\nhello_timeout = \"500ms\"\nhello_max_bytes = \"8KiB\"\nidle_timeout = \"1h30m\"\nhalf_closed_timeout = \"2m\"\ndead_peer_timeout = \"5s\"\n\
         drain_timeout = \"0s\"\nmax_connections = 10_000\nmax_connections_per_client = 0x10\nkernel_memory = \"10MB\"\n"
    ))
    .0
    .limits;
    let expected = Limits {
        hello_timeout: Duration::from_millis(500),
        hello_max_bytes: 8192,
        idle_timeout: Duration::from_secs(5400),
        half_closed_timeout: Duration::from_secs(120),
        dead_peer_timeout: Duration::from_secs(5),
        drain_timeout: Duration::ZERO,
        max_connections: 10_000,
        max_connections_per_client: 16,
        kernel_memory: 10_000_000,
    };
    assert_eq!(limits, expected);
}

#[test]
fn the_starter_configuration_passes_without_a_warning() {
    let (config, warnings) = read(STARTER);
    assert_eq!(warnings, "");
    assert_eq!(config.listeners[0].bind.len(), 2);
    assert_eq!(config.upstreams[0].send_proxy, SendProxy::V2);
}

#[test]
fn files_written_on_windows_are_read() {
    let (config, warnings) = read(&format!("\u{feff}{}", STARTER.replace('\n', "\r\n")));
    assert_eq!((config.routes.len(), warnings.as_str()), (2, ""));
    let refused = refusal(&SMALL.replace("bind", "bnid").replace('\n', "\r\n"));
    assert!(refused.contains("dataplane.toml:3:1: error: unknown key `bnid`") && !refused.contains('\r'), "{refused}");
}

#[test]
fn the_defaults_that_the_starter_shows_are_the_defaults() {
    let sections = ["[limits]", "[admin]", "[tailnet]"];
    let mut uncommented = String::new();
    let mut inside = false;
    for line in STARTER.lines() {
        inside |= sections.contains(&line.trim_start_matches("# "));
        writeln!(uncommented, "{}", if inside { line.trim_start_matches("# ") } else { line }).unwrap();
    }
    let (shown, _) = read(&uncommented);
    let (bare, _) = read(SMALL);
    assert!(inside && shown.limits == bare.limits);
    assert_eq!(shown.admin.bind.addr, bare.admin.bind.addr);
    assert_eq!(shown.admin.socket, bare.admin.socket);
    assert_eq!(shown.tailnet, bare.tailnet);
    assert!(!shown.admin.bind.span.is_empty(), "[admin] was uncommented");
}

#[test]
fn every_commented_key_of_the_starter_is_accepted() {
    // Prose ends in no value; a commented key or table does.
    let is_toml =
        |line: &str| line.starts_with('[') || line.split_once(" = ").is_some_and(|(key, _)| !key.contains(' '));
    let uncommented: String = STARTER
        .lines()
        .map(|line| line.strip_prefix("# ").filter(|rest| is_toml(rest)).unwrap_or(line))
        .flat_map(|line| [line, "\n"])
        .collect();
    let uncommented = format!("{uncommented}[upstreams.git-ssh]\ntargets = [\"cluster-1:22\"]\n");
    let (config, warnings) = read(&uncommented);
    assert_eq!(config.listeners.len(), 3);
    assert_eq!(config.routes[1].alpn, ["h2", "http/1.1"]);
    assert_eq!(warnings, "");
}

#[test]
fn the_hash_is_that_of_sha256sum() {
    // printf … | sha256sum
    let (config, _) = read(SMALL);
    assert_eq!(config.hash, SMALL_SHA256);
    assert_ne!(read(&format!("{SMALL}# a comment\n")).0.hash, config.hash);
}
const SMALL_SHA256: &str = "e97331b553849fb1";

#[test]
fn a_check_has_defaults_and_may_be_a_handshake() {
    let with = |line: &str| SMALL.replace("[[routes]]", &format!("{line}\n[[routes]]"));
    let health = |line: &str| read(&with(line)).0.upstreams[0].health.clone();
    let default = health("health = {}").unwrap();
    assert_eq!(default.tls, None);
    let named = health("health = { tls = \"Blog.example.com\" }").unwrap();
    assert_eq!(named, HealthCheck { tls: Some("blog.example.com".into()), ..default });
    assert_eq!(health(""), None);
}

#[test]
fn a_hedge_that_never_comes_is_a_warning() {
    let with = |line: &str| read(&SMALL.replace("[[routes]]", &format!("{line}\n[[routes]]"))).1;
    assert!(with("hedge_delay = \"3s\"").contains("a second target is never dialled"));
    assert_eq!(with("hedge_delay = \"0s\""), "");
}

#[test]
fn engines_of_later_versions_are_accepted() {
    for (word, engine) in [("sockmap", EngineChoice::Sockmap), ("translate", EngineChoice::Translate)] {
        assert_eq!(read(&format!("engine = \"{word}\"\n{SMALL}")).0.engine, engine);
    }
}

#[test]
fn what_is_likely_not_meant_is_a_warning() {
    let unreached = format!("{SMALL}listeners = [\"public\"]\n[listeners.inside]\nbind = [\"127.0.0.1:8443\"]\n");
    assert!(read(&unreached).1.contains("no route is for listener \"inside\""));
    let unused = format!("{SMALL}[upstreams.spare]\ntargets = [\"thinkpad-2:443\"]\n");
    assert!(read(&unused).1.contains("nothing uses upstream \"spare\""));
    for bind in ["0.0.0.0:9443", "[::]:9443"] {
        assert!(read(&format!("{SMALL}[admin]\nbind = \"{bind}\"\n")).1.contains("open to everybody"));
    }
    assert_eq!(read(&format!("{SMALL}[admin]\nbind = \"100.64.0.7:9443\"\n")).1, "");
    let on_this_machine = SMALL.replace("thinkpad-1:443", "127.0.0.1:8443");
    let web = "[listeners.web]\nmode = \"http\"\nbind = [\"0.0.0.0:80\"]\n";
    let (config, warnings) = read(&format!("{on_this_machine}{web}"));
    assert_eq!(config.listeners[1].mode, Mode::Http { acme_port: 80 });
    assert!(warnings.contains("ACME challenges for `127.0.0.1:8443` cannot be passed on"), "{warnings}");
    assert_eq!(read(&format!("{on_this_machine}{web}acme_port = 8080\n")).1, "");
    assert_eq!(read(&format!("{SMALL}{web}")).1, "");
    assert!(read(&format!("{SMALL}listeners = [\"public\"]\n{web}")).1.contains("no route is for listener \"web\""));
}

#[test]
fn a_host_may_have_one_route_for_a_protocol_and_one_for_all_else() {
    let text = format!("{SMALL}alpn = [\"h2\"]\n[[routes]]\nhosts = [\"blog.example.com\"]\nupstream = \"cluster\"\n");
    assert_eq!(read(&text).0.routes.len(), 2);
    let three =
        format!("{text}alpn = [\"http/1.1\"]\n[[routes]]\nhosts = [\"blog.example.com\"]\nupstream = \"cluster\"\n");
    assert_eq!(read(&three).0.routes.len(), 3);
}

#[test]
fn a_host_may_have_a_route_on_each_listener() {
    let second = "[listeners.inside]\nbind = [\"0.0.0.0:8443\"]\n[[routes]]\nhosts = [\"blog.example.com\"]\nupstream = \"cluster\"\n";
    let apart = format!("{SMALL}listeners = [\"public\"]\n{second}listeners = [\"inside\"]\n");
    assert_eq!(read(&apart).0.routes[1].listeners, [1]);
    let both = format!("{SMALL}{second}listeners = [\"inside\"]\n");
    assert!(refusal(&both).contains("host `blog.example.com` has a route already"));
}

#[test]
fn addresses_of_the_machine_reveal_a_target_that_is_a_listener() {
    let (config, _) = read(&SMALL.replace("thinkpad-1:443", "192.0.2.1:443"));
    assert_eq!(own_listener_targets(&config, &[]), []);
    assert_eq!(own_listener_targets(&config, &["192.0.2.2".parse().unwrap(), "2001:db8::1".parse().unwrap()]), []);
    let found = own_listener_targets(&config, &["192.0.2.1".parse().unwrap()]);
    assert_eq!(found.len(), 1);
    assert!(found[0].is_error());
    assert_eq!(&config.source.text[found[0].span.clone()], "\"192.0.2.1:443\"");
}

#[test]
fn targets_are_equal_when_written_alike() {
    let at = |span| host_target("thinkpad-1:443", span);
    assert_eq!(at(0..5), at(7..12));
    assert_ne!(at(0..5), host_target("thinkpad-2:443", 0..5));
}

fn host_target(text: &str, span: Span) -> Target {
    Target::parse(text, span).unwrap()
}

#[test]
fn the_routing_table_shows_what_wins_first() {
    let text = r#"
[listeners.public]
bind = ["0.0.0.0:443"]
deny = ["192.0.2.7"]
accept_proxy = ["10.0.0.0/8"]
[listeners.inside]
bind = ["127.0.0.1:8443"]
[listeners.web]
mode = "http"
bind = ["0.0.0.0:80"]
acme_port = 8080
[listeners.git]
mode = "tcp"
bind = ["0.0.0.0:2222", "[::]:2222"]
upstream = "git-ssh"
[upstreams.cluster]
targets = ["thinkpad-1:443", "thinkpad-2:443"]
send_proxy = "v2"
[upstreams.git-ssh]
targets = ["thinkpad-1:22"]
[[routes]]
hosts = ["*.example.com", "*.apps.example.com"]
listeners = ["public"]
upstream = "cluster"
[[routes]]
hosts = ["Blog.example.com"]
upstream = "cluster"
[[routes]]
hosts = ["blog.example.com"]
alpn = ["h2", "http/1.1"]
upstream = "cluster"
[[routes]]
hosts = ["secret.example.com"]
action = "refuse"
"#;
    let expected = "\
HOST                LISTENERS          ALPN         UPSTREAM  TARGETS                        PROXY
blog.example.com    public,inside,web  h2,http/1.1  cluster   thinkpad-1:443,thinkpad-2:443  v2
blog.example.com    public,inside,web  any          cluster   thinkpad-1:443,thinkpad-2:443  v2
secret.example.com  public,inside,web  any          refused
*.apps.example.com  public             any          cluster   thinkpad-1:443,thinkpad-2:443  v2
*.example.com       public             any          cluster   thinkpad-1:443,thinkpad-2:443  v2
Every other server name is refused.
Listener web speaks HTTP: ACME challenges go to port 8080 of these targets, the rest is sent to https.

LISTENER  MODE  BIND                    DENY          ALLOW  ACCEPT_PROXY  UPSTREAM  TARGETS        PROXY
public    tls   0.0.0.0:443             192.0.2.7/32  all    10.0.0.0/8    by host
inside    tls   127.0.0.1:8443          nobody        all    nobody        by host
web       http  0.0.0.0:80              nobody        all    nobody        by host
git       tcp   0.0.0.0:2222,[::]:2222  nobody        all    nobody        git-ssh   thinkpad-1:22  off

Metrics on 127.0.0.1:9443, control socket /run/dataplane/admin.sock.
";
    assert_eq!(routing_table(&read(text).0), expected);
    let all = SMALL.replace("blog.example.com", "*");
    assert!(!routing_table(&read(&all).0).contains("refused"));
}

#[test]
fn mistakes_that_people_make_are_explained() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/config/testdata/bad");
    let update = std::env::var_os("UPDATE_GOLDEN").is_some();
    let mut names = 0;
    let mut differences = String::new();
    let mut files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    for file in files.iter().filter(|file| file.extension().is_some_and(|extension| extension == "toml")) {
        names += 1;
        let name = file.file_name().unwrap();
        let source = Arc::new(Source::new(name, std::fs::read_to_string(file).unwrap()));
        let shown = match parse(source.clone()) {
            Ok(_) => format!("{} passes\n", name.display()),
            Err(diagnostics) => format!("{}\n", LoadError::Report { source, diagnostics }),
        };
        let golden = file.with_extension("txt");
        if update {
            std::fs::write(&golden, &shown).unwrap();
        }
        let expected = std::fs::read_to_string(&golden).unwrap_or_default();
        if shown != expected {
            write!(differences, "--- {}\nexpected:\n{expected}\nshown:\n{shown}\n", name.display()).unwrap();
        }
        if shown.ends_with(" passes\n") {
            writeln!(differences, "--- {} should not pass", name.display()).unwrap();
        }
    }
    assert!(names >= 25, "{} has {names} mistakes", folder.display());
    assert!(
        differences.is_empty(),
        "{differences}If what is shown is right: UPDATE_GOLDEN=1 cargo test -p dataplane mistakes_that_people_make"
    );
}

#[test]
fn a_file_that_cannot_be_read_says_what_to_do() {
    let folder = std::env::temp_dir().join(format!("dataplane-config-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let shown = |path: &Path| super::read(path).unwrap_err().to_string();

    let missing = folder.join("dataplane.toml");
    assert!(shown(&missing).contains(&missing.display().to_string()));
    assert!(shown(&missing).ends_with(&format!("with `dataplane init > {}`", missing.display())));
    let deeper = folder.join("etc/dataplane.toml");
    assert!(shown(&deeper).contains(&format!("`mkdir -p {} && ", folder.join("etc").display())));
    assert!(shown(&folder).contains(&format!("`--config {}`", missing.display())));

    std::fs::write(&missing, b"engine = \"auto\"\n# caf\xe9\n").unwrap();
    assert!(shown(&missing).starts_with(&format!("{}:2: error: this is not UTF-8", missing.display())));
    std::fs::write(&missing, STARTER).unwrap();
    assert_eq!(super::read(&missing).unwrap().path, missing);
    std::fs::remove_dir_all(&folder).unwrap();
}

/// Files below a new folder; the first one includes.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new(files: &[(&str, &str)]) -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        for (name, text) in files {
            let path = folder.0.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        folder
    }

    /// What comes of `main.toml`, with the folder's name left out.
    fn read(&self) -> Result<(Config, String), String> {
        let shown = |text: String| text.replace(&format!("{}/", self.0.path().display()), "");
        let source = Arc::new(super::read(&self.0.path().join("main.toml")).map_err(|e| shown(e.to_string()))?);
        match parse(source.clone()) {
            Ok((config, warnings)) => {
                let warnings = warnings.iter().map(|w| w.render(&source).to_string()).collect();
                Ok((config, shown(warnings)))
            }
            Err(diagnostics) => Err(shown(LoadError::Report { source, diagnostics }.to_string())),
        }
    }
}

const ROUTE: &str = "[[routes]]\nhosts = [\"HOST\"]\nupstream = \"cluster\"\n";

#[test]
fn included_files_are_read_as_one_with_the_file_that_includes_them() {
    let main = format!("include = [\"routes.d/*.toml\", \"more/up.toml\", \"*.toml\"]\n{SMALL}");
    let more = "[upstreams.other]\ntargets = [\"thinkpad-2:443\"]\n";
    let folder = Folder::new(&[
        ("main.toml", &main),
        ("routes.d/b.toml", &ROUTE.replace("HOST", "b.example.com").replace("cluster", "other")),
        ("routes.d/a.toml", &ROUTE.replace("HOST", "a.example.com")),
        ("routes.d/.b.toml.swp", "not for us"),
        ("routes.d/.hidden.toml", "not for us"),
        ("more/up.toml", more),
    ]);
    let (config, warnings) = folder.read().unwrap();
    let hosts: Vec<_> = config.routes.iter().map(|route| &*route.name).collect();
    assert_eq!(hosts, ["blog.example.com", "a.example.com", "b.example.com"]);
    assert_eq!(config.upstreams[config.routes[2].upstream().unwrap()].name, "other".into());
    assert_eq!(warnings, "");
    let local: Vec<_> = config.source.local_files().collect();
    assert_eq!(local.len(), 4);
    let whole = local.iter().map(|path| std::fs::read_to_string(path).unwrap()).collect::<String>();
    let alone = Sha256::digest(whole.as_bytes());
    assert!(
        config.hash == alone[..8].iter().map(|byte| format!("{byte:02x}")).collect::<String>(),
        "as cat | sha256sum"
    );
}

#[test]
fn what_two_files_define_is_an_error_that_names_both_places() {
    let main = format!("include = [\"*.d/*.toml\"]\nengine = \"auto\"\n{SMALL}");
    let second =
        "engine = \"copy\"\n[upstreams.cluster]\ntargets = [\"thinkpad-2:443\"]\n[limits]\nidle_timeout = \"1m\"\n";
    let folder = Folder::new(&[
        ("main.toml", &main),
        ("a.d/x.toml", &ROUTE.replace("HOST", "Blog.example.com")),
        ("a.d/y.toml", second),
        ("a.d/z.toml", "[limits]\nidle_timeout = \"2m\"\n"),
    ]);
    let shown = folder.read().unwrap_err();
    for (error, note) in [
        (
            "a.d/x.toml:2:10: error: host `blog.example.com` has a route already",
            "main.toml:9:10: note: first listed here",
        ),
        (
            "a.d/y.toml:1:10: error: `engine` is defined in another file already",
            "main.toml:2:10: note: first defined here",
        ),
        (
            "a.d/y.toml:2:12: error: [upstreams.cluster] is defined in another file already",
            "main.toml:6:12: note: first",
        ),
        ("a.d/z.toml:1:1: error: `limits` is defined in another file already", "a.d/y.toml:4:1: note: first"),
    ] {
        let at = shown.find(error).unwrap_or_else(|| panic!("{error} in:\n{shown}"));
        assert!(shown[at..].split("help:").next().unwrap().contains(note), "{note} in:\n{shown}");
    }
    assert!(shown.contains("main.toml: 4 errors"), "{shown}");
}

#[test]
fn mistakes_in_included_files_are_told_there_and_all_at_once() {
    let main = format!("include = [\"gone.toml\", \"none.d/*.toml\", \"*.d/*.toml\", \"a**b\"]\nbroken = 1\n{SMALL}");
    let folder = Folder::new(&[
        ("main.toml", &main),
        ("a.d/1.toml", "[[routes]]\nhost = [\"x.example.com\"]\nupstream = \"clutser\"\n"),
        ("a.d/2.toml", "[source]\ngit = \"/srv/x\"\n"),
        ("a.d/3.toml", "# fine\n[upstreams.b]\ntargets = [\"b:1\"\n"),
        ("a.d/4.toml", &ROUTE.replace("HOST", "https://x.example.com/")),
    ]);
    let shown = folder.read().unwrap_err();
    for expected in [
        "main.toml:1:12: error: cannot read gone.toml: No such file or directory",
        "main.toml:1:25: warning: `none.d/*.toml` matches no file",
        "main.toml:1:56: error: `a**b`: ",
        "main.toml:2:1: error: unknown key `broken` at the top level",
        "a.d/1.toml:2:1: error: unknown key `host` in [[routes]]",
        "a.d/2.toml:1:2: error: unknown key `source` at the top level of an included file",
        "a.d/3.toml:3:",
        "a.d/4.toml:2:10: error: `https://x.example.com/` is a URL",
    ] {
        assert!(shown.contains(expected), "{expected} in:\n{shown}");
    }
    assert!(!shown.contains("no upstream"), "a file with a syntax error may hold it:\n{shown}");
}

#[test]
fn ten_thousand_hosts_in_two_hundred_files_are_read_in_well_under_a_second() {
    let files: Vec<_> = (0..200)
        .map(|file| {
            let route = |n: usize| {
                let hosts: Vec<_> = (0..10).map(|host| format!("\"h{host}.r{n}.f{file}.example.com\"")).collect();
                format!("[[routes]]\nhosts = [{}]\nupstream = \"u{file}\"\n", hosts.join(", "))
            };
            let routes: String = (0..5).map(route).collect();
            (
                format!("routes.d/{file:03}.toml"),
                format!("[upstreams.u{file}]\ntargets = [\"100.64.0.2:443\"]\n{routes}"),
            )
        })
        .collect();
    let main = format!("include = [\"routes.d/*.toml\"]\n{SMALL}");
    let files: Vec<_> = files.iter().map(|(name, text)| (&**name, &**text)).chain([("main.toml", &*main)]).collect();
    let folder = Folder::new(&files);
    // The best of several: another program may have the processor.
    let once = || {
        let start = std::time::Instant::now();
        let (config, _) = folder.read().unwrap();
        assert_eq!(config.routes.iter().map(|route| route.hosts.len()).sum::<usize>(), 10_001);
        start.elapsed()
    };
    let best = (0..5).map(|_| once()).min().unwrap();
    assert!(best < Duration::from_millis(500), "{best:?}");
}

#[test]
fn the_repository_of_a_node_is_checked_like_everything_else() {
    let all = r#"[source]
git = "https://git.example.com/me/entrance.git"
ref = "main"
path = "entrance/dataplane.toml"
interval = "30s"
token_file = "/etc/dataplane/token"
timeout = "10s"
max_size = "1MiB"
state_directory = "/var/lib/dataplane"
webhook = { bind = "127.0.0.1:9080", secret_file = "/etc/dataplane/secret" }
"#;
    let read = |text: &str| repository(&Source::new("dataplane.toml", text.into()));
    let found = read(all).unwrap().unwrap();
    assert_eq!((&*found.reference, found.interval), ("main", Duration::from_secs(30)));
    assert_eq!(found.webhook.unwrap().bind.addr.port(), 9080);
    assert_eq!(read(SMALL).unwrap(), None);
    let refused = |text: &str| {
        let source = source(text);
        let diagnostics = repository(&source).unwrap_err();
        LoadError::Report { source, diagnostics }.to_string()
    };
    let ssh = refused(
        "[source]\ngit = \"ssh://git@example.com/x.git\"\ntoken_file = \"/x\"\nwebhook = { bind = \"0.0.0.0\" }\n",
    );
    for expected in
        ["[source] has no `ssh_key_file`", "`token_file` is for http", "`webhook` has no `secret_file`", "has no port"]
    {
        assert!(ssh.contains(expected), "{expected} in:\n{ssh}");
    }
    assert!(refused("[source]\nref = \"main\"\n").contains("[source] has no `git`"));
    assert!(refused("[source]\ngit = \"x\n").contains("this is not TOML"));
    assert!(refused("[source]\ngit = \"/srv/x\"\nssh_key_file = \"/a'b\"\n").contains("without quotes"));
}

#[test]
fn the_file_in_a_repository_is_read_as_one_with_the_nodes_own() {
    struct Commit;
    impl Files for Commit {
        fn matching(&self, _: &Path, _: &str) -> Result<Vec<std::path::PathBuf>, String> {
            Ok(vec!["deep/a.toml".into()])
        }
        fn read(&self, path: &Path) -> std::io::Result<Vec<u8>> {
            let text = match path.to_str() {
                Some("deep/main.toml") => format!("include = [\"*.toml\"]\n{SMALL}"),
                Some("deep/a.toml") => ROUTE.replace("HOST", "a.example.com"),
                _ => return Err(std::io::ErrorKind::NotFound.into()),
            };
            Ok(text.into_bytes())
        }
    }
    let whole = |local: &str, path: &str| {
        let mut source = Source::new("node.toml", local.into());
        add_repository(&mut source, "0123456789abcdef", Path::new(path), &Commit).map_err(|e| e.to_string())?;
        let source = Arc::new(source);
        parse(source.clone()).map_err(|diagnostics| LoadError::Report { source, diagnostics }.to_string())
    };
    let node = "[source]\ngit = \"/srv/x.git\"\n[admin]\nbind = \"127.0.0.1:2\"\n";
    let (config, _) = whole(node, "deep/main.toml").unwrap();
    assert_eq!(config.routes.len(), 2);
    assert_eq!(config.admin.bind.addr.port(), 2);
    assert_eq!(config.source.revision.as_deref(), Some("0123456789abcdef"));
    let (other, _) = whole("[source]\ngit = \"/srv/x.git\"\n", "deep/main.toml").unwrap();
    assert_eq!(config.hash, other.hash, "nodes that run one commit have one hash");
    let (more, _) = whole(&format!("{node}{ROUTE}"), "deep/main.toml").expect("the upstream is in the repository");
    assert_eq!(more.routes.len(), 3);
    let twice = whole(&format!("{node}{}", ROUTE.replace("HOST", "a.example.com")), "deep/main.toml").unwrap_err();
    assert!(
        twice.contains("0123456789ab:deep/a.toml:2:10: error: host `a.example.com` has a route already"),
        "{twice}"
    );
    assert!(whole(node, "gone.toml").unwrap_err().contains("0123456789ab:gone.toml"));
}

/// About this many bytes of a text, from a line that is told its number.
fn repeated(bytes: usize, line: impl Fn(usize) -> String) -> String {
    let mut text = String::new();
    for n in 0.. {
        let line = line(n);
        if text.len() + line.len() > bytes {
            break;
        }
        text += &line;
    }
    text
}

#[test]
fn no_text_takes_long_to_read_or_makes_a_long_answer() {
    let half = LARGEST / 2;
    let wrong_routes =
        || repeated(half, |n| format!("[[routes]]\nhosts = [\"h{n}.example.com\"]\nupstream = \"no{n}\"\n"));
    let upstreams = || repeated(half - 200, |n| format!("[upstreams.u{n}]\ntargets = [\"a:{}\"]\n", n % 65535 + 1));
    let listener = "[listeners.a]\nbind = [\"0.0.0.0:443\"]\n[upstreams.a]\ntargets = [\"a:443\"]\n";
    let list = |entry: &dyn Fn(usize) -> String| repeated(LARGEST - 200, |n| entry(n) + ",");
    let texts: Vec<(&str, String)> = vec![
        ("lines that are not TOML", repeated(LARGEST, |n| format!("x{n} y\n"))),
        ("duplicates", repeated(LARGEST, |_| "a = 1\n".into())),
        ("duplicates of a table", repeated(LARGEST, |n| format!("[t]\nk{n} = 1\n"))),
        (
            "duplicates in a table that is there twice",
            format!("[t]\na = 1\n[t]\n{}", repeated(LARGEST - 20, |_| "a = 1\n".into())),
        ),
        ("mistakes in one line", format!("a = [{}", list(&|n| format!("x{n} y")))),
        ("text without quotes", repeated(LARGEST, |n| format!("k{n} = abc\n"))),
        ("unknown keys", repeated(LARGEST, |n| format!("listenrs{n} = 1\n"))),
        ("one long key", format!("{} = 1\n", "a".repeat(LARGEST - 10))),
        ("a key of many parts", format!("{}a = 1\n", "a.".repeat(half - 10))),
        ("deep lists", format!("a = {}", "[".repeat(LARGEST - 10))),
        ("deep tables", format!("a = {}", "{a=".repeat(LARGEST / 3 - 10))),
        ("upstreams that are not there", format!("{listener}{}{}", upstreams(), wrong_routes())),
        ("hosts misspelt", repeated(LARGEST, |n| format!("[[routes]]\nhost = [\"h{n}.example.com\"]\n"))),
        ("targets", format!("{listener}[upstreams.b]\ntargets = [{}]", list(&|n| format!("\"t{n}:1\"")))),
        ("the same target", format!("{listener}[upstreams.b]\ntargets = [{}]", list(&|_| "\"t:1\"".into()))),
        (
            "addresses",
            format!(
                "[listeners.b]\nbind = [{}]",
                list(&|n| format!("\"10.0.{}.{}:{}\"", n / 256 % 256, n % 256, n / 65536 + 1))
            ),
        ),
        ("listeners", repeated(LARGEST, |n| format!("[listeners.l{n}]\nbind = [\"0.0.0.0:{}\"]\n", n % 65535 + 1))),
        (
            "routes of one host",
            format!(
                "{listener}{}",
                repeated(LARGEST - 200, |n| format!(
                    "[[routes]]\nhosts = [\"a\"]\nalpn = [\"p{n}\"]\nupstream = \"a\"\n"
                ))
            ),
        ),
        ("the same host", format!("{listener}[[routes]]\nupstream = \"a\"\nhosts = [{}]", list(&|_| "\"a.b\"".into()))),
        (
            "protocols",
            format!(
                "{listener}[[routes]]\nupstream = \"a\"\nhosts = [\"a\"]\nalpn = [{}]",
                list(&|n| format!("\"{n}\""))
            ),
        ),
        (
            "listeners of a route",
            format!(
                "{listener}[[routes]]\nupstream = \"a\"\nhosts = [\"a\"]\nlisteners = [{}]",
                list(&|n| format!("\"{n}\""))
            ),
        ),
        (
            "a long name in many messages",
            format!("{listener}[listeners.{}]\nbind = [{}]", "x".repeat(half), "\"y\",".repeat(half / 4 - 100)),
        ),
        ("wrong values", format!("{listener}[limits]\n{}", repeated(LARGEST - 200, |n| format!("k{n} = \"v\"\n")))),
        ("a long wrong value", format!("{listener}[limits]\nidle_timeout = \"{}\"", "1x".repeat(half - 200))),
    ];
    for (what, text) in texts {
        assert!(text.len() <= LARGEST, "{what}: {}", text.len());
        let start = std::time::Instant::now();
        let source = source(&text);
        let shown = match parse(source.clone()) {
            Ok((config, warnings)) => {
                let shown: Vec<_> = warnings.iter().map(|warning| warning.render(&source).to_string()).collect();
                format!("{}{}", shown.concat(), config.hash)
            }
            Err(diagnostics) => LoadError::Report { source, diagnostics }.to_string(),
        };
        let took = start.elapsed();
        eprintln!("{what}: {took:?}, {} bytes", shown.len());
        // Quadratic work on a text of this size takes minutes.
        assert!(took < Duration::from_secs(5), "{what}: {took:?}");
        assert!(shown.len() < 200 * 1500, "{what}: {} bytes", shown.len());
    }
    let shown = refusal(&wrong_routes());
    assert!(shown.contains(" more errors are not shown"), "{}", &shown[shown.len() - 500..]);
}

#[test]
fn a_configuration_has_at_most_a_mebibyte_of_text() {
    let comment = "#".repeat(LARGEST / 2) + "\n";
    let main = format!("include = [\"more/*.toml\"]\n{SMALL}");
    let folder = Folder::new(&[("main.toml", &main), ("more/a.toml", &comment)]);
    assert!(folder.read().is_ok());
    let folder = Folder::new(&[("main.toml", &main), ("more/a.toml", &comment), ("more/b.toml", &comment)]);
    let said = folder.read().unwrap_err();
    assert!(said.contains("more/b.toml: all files together are larger than 1MiB"), "{said}");
    let folder = Folder::new(&[("main.toml", &(comment.clone() + &comment))]);
    let said = folder.read().unwrap_err();
    assert!(
        said.contains("main.toml: error: with this file the configuration is larger than 1MiB")
            && said.contains("help: "),
        "{said}"
    );
    // Endless, and not a text.
    assert!(matches!(crate::config::read(Path::new("/dev/zero")), Err(LoadError::TooLarge { .. })));
    let many = repeated(50_000, |n| format!("\"more/{n}.toml\","));
    let folder = Folder::new(&[("main.toml", &format!("include = [{many}]\n{SMALL}"))]);
    let said = folder.read().unwrap_err();
    assert!(said.contains("more than 1000 files would be included"), "{}", &said[said.len() - 300..]);
}

#[test]
fn a_file_without_permission_says_so() {
    let error = std::io::Error::from(std::io::ErrorKind::PermissionDenied);
    let shown = LoadError::Unreadable { path: DEFAULT_PATH.into(), error }.to_string();
    assert!(shown.contains(DEFAULT_PATH) && shown.contains("permission denied") && shown.contains("help: "), "{shown}");
}

#[test]
fn a_syntax_error_is_never_taken_for_the_consequence_of_another() {
    // The header is twice in the text, but once in the tree.
    let text =
        format!("{SMALL}alpn = [\"\"\"\n[admin]\n\"\"\"]\n[admin]\nbind = \"127.0.0.1:1\"\nbind = \"127.0.0.1:2\"\n");
    assert!(refusal(&text).contains("duplicate key"));
}

/// Parses and renders: neither may panic, whatever the text; and every place must lie in the text.
fn survives(text: &str) -> Result<(), TestCaseError> {
    let source = source(text);
    match parse(source.clone()) {
        Ok((config, warnings)) => {
            let shown: String = warnings.iter().map(|warning| warning.render(&source).to_string()).collect();
            prop_assert!(!shown.contains(": error: "));
            prop_assert!(!routing_table(&config).is_empty());
        }
        Err(diagnostics) => {
            prop_assert!(diagnostics.iter().any(Diagnostic::is_error));
            prop_assert!(diagnostics.iter().all(|diagnostic| diagnostic.span.end <= text.len()));
            let shown = LoadError::Report { source, diagnostics }.to_string();
            prop_assert!(shown.contains("dataplane.toml:"));
        }
    }
    Ok(())
}

fn piece() -> impl Strategy<Value = String> {
    prop_oneof![
        ".{0,8}",
        "[\\[\\]{}=\",.#'\\n\\r\\t\\\\ ]{1,4}",
        prop::sample::select(vec![
            "\"\"\"", "[[", "]]", "\r\n", "\0", "é", "*.", "443", "true", "-1", "[]", "{}", "\"\"", "\u{feff}"
        ])
        .prop_map(String::from),
    ]
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in "(?s).{0,200}") {
        survives(&text)?;
    }

    #[test]
    fn no_mutation_of_a_configuration_makes_it_panic(
        whole in prop::sample::select(vec![STARTER, EVERY_KEY]),
        cuts in prop::collection::vec((any::<prop::sample::Index>(), 0..12_usize, piece()), 1..4),
    ) {
        let mut characters: Vec<char> = whole.chars().collect();
        for (at, removed, inserted) in cuts {
            let at = at.index(characters.len() + 1);
            let end = (at + removed).min(characters.len());
            characters.splice(at..end, inserted.chars());
        }
        survives(&characters.into_iter().collect::<String>())?;
    }
}

#[test]
fn whoever_believes_everybodys_proxy_header_is_warned_and_loudly_where_networks_were_to_protect() {
    let listener = |more: &str| SMALL.replacen("bind =", &format!("{more}\nbind ="), 1);
    for everybody in [
        "\"0.0.0.0/0\"",
        "\"::/0\"",
        "\"0.0.0.0/1\", \"128.0.0.0/1\"",
        "\"::ffff:0:0/96\"",
        // All that is public.
        "\"2000::/3\", \"fc00::/7\"",
        "\"3000::/4\", \"192.0.2.7\", \"2000::/4\"",
        "\"0.0.0.0/1\", \"128.0.0.0/2\", \"192.0.0.0/3\"",
        "\"::/1\"",
    ] {
        let warnings = read(&listener(&format!("accept_proxy = [{everybody}]"))).1;
        assert!(warnings.contains("believes everybody's PROXY header"), "{everybody}: {warnings}");
        let warnings = read(&listener(&format!("accept_proxy = [{everybody}]\nallow = [\"192.168.7.0/24\"]"))).1;
        assert!(warnings.contains("PROTECT NOTHING"), "{everybody}: {warnings}");
    }
    for some in ["\"10.0.0.0/8\"", "\"fc00::/7\", \"10.0.0.0/8\"", "\"2000::/4\"", "\"0.0.0.0/1\", \"128.0.0.0/2\""] {
        assert_eq!(read(&listener(&format!("accept_proxy = [{some}]\nallow = [\"192.168.7.0/24\"]"))).1, "", "{some}");
    }
}

#[test]
fn what_a_start_would_refuse_a_check_refuses() {
    let source = "[source]\ngit = \"/srv/x.git\"\n";
    let webhook = |bind: &str| format!("{SMALL}{source}webhook = {{ bind = \"{bind}\", secret_file = \"/s\" }}\n");
    for taken in ["192.0.2.1:443", "127.0.0.1:9443", "0.0.0.0:9443"] {
        let said = refusal(&webhook(taken));
        assert!(said.contains("the webhook's address") && said.contains("choose another port"), "{taken}: {said}");
    }
    read(&webhook("127.0.0.1:9080"));
    // A family each: these do not meet.
    let beside = SMALL.replace("443\"]\n[up", "8443\"]\n[up");
    read(&format!("{beside}[admin]\nbind = \"[::]:8443\"\n"));
    for of_many in ["[ff02::1]:443", "[ff0e::101]:443", "224.0.0.1:443", "239.1.2.3:443", "255.255.255.255:443"] {
        let webhook = webhook(of_many);
        let admin = format!("{SMALL}[admin]\nbind = \"{of_many}\"\n");
        for text in [SMALL.replace("0.0.0.0:443", of_many), admin, webhook] {
            let said = refusal(&text);
            let any = if of_many.starts_with('[') { "\"[::]:443\"" } else { "\"0.0.0.0:443\"" };
            assert!(said.contains("is a multicast or broadcast address") && said.contains(any), "{text}: {said}");
        }
        refusal(&SMALL.replace("thinkpad-1:443", of_many));
    }
    for zoned in ["[fe80::1]:443", "[fe80::1%eth0]:443", "[fe80::1%2]:443"] {
        for text in [
            SMALL.replace("0.0.0.0:443", zoned),
            SMALL.replace("thinkpad-1:443", zoned),
            format!("{SMALL}[admin]\nbind = \"{zoned}\"\n"),
            format!("{SMALL}[resolver]\nservers = [\"{zoned}\"]\n"),
        ] {
            let said = refusal(&text);
            assert!(said.contains("is a link-local address: it belongs to one interface"), "{text}: {said}");
        }
    }
}

/// What is obeyed to the letter must lead to what was meant.
#[test]
fn a_remedy_that_is_obeyed_leads_to_what_was_meant() {
    let with = |from: &str, to: &str| SMALL.replacen(from, to, 1);
    for (wrong, place, remedy) in [
        (with("\"blog.example.com\"", "“blog.example.com”"), "7:10", "write \"blog.example.com\""),
        (
            with("\"blog.example.com\"", "\"“blog.example.com”\""),
            "7:10",
            "write \"blog.example.com\", in plain quotes, those of the keyboard",
        ),
        (with("bind =", "mode = \"https\"\nbind ="), "3:8", "did you mean \"tls\"?"),
        (with("targets", "balance = \"least_conn\"\ntargets"), "5:11", "did you mean \"least-connections\"?"),
        (with("targets", "send_proxy = \"v3\"\ntargets"), "5:14", "write one of \"off\", \"v1\" or \"v2\""),
        (with("targets", "health = true\ntargets"), "5:10", "write `health = {}` for the defaults"),
        (with("\"thinkpad-1:443\"", "\"thinkpad-1:443\" \"b:443\""), "5:28", "put `,` between the entries"),
        (with("\"thinkpad-1:443\"", "\n  \"thinkpad-1:443\"\n  \"b:443\"\n"), "6:19", "put `,` between the entries"),
        (
            SMALL.replace("upstreams.cluster]", "upstreams.clu.ster]").replace("\"cluster\"", "\"clu.ster\""),
            "4:12",
            "write `[upstreams.\"clu.ster\"]`",
        ),
        (with("0.0.0.0:443", "::443"), "3:9", "write \"[::]:443\""),
        (
            with("thinkpad-1:443", "fd7a::1:443"),
            "5:12",
            "write \"[fd7a::1]:443\", or \"[fd7a::1:443]:443\" if `443` belongs to the address",
        ),
        (
            with("thinkpad-1:443", "unix:/run/x"),
            "5:12",
            "have the service listen on an address of this machine, and write that: \"127.0.0.1:8443\"",
        ),
        (
            format!("{SMALL}[limits]\nidle_timeout = \"1s\"\n[limits]\nhello_timeout = \"1s\"\n"),
            "11:2",
            "write its keys below the first one, and remove this header",
        ),
        (with("blog.example", "blog\u{1}.example"), "7:15", "remove it: an editor may not show it"),
    ] {
        let said = refusal(&wrong);
        assert!(said.starts_with(&format!("dataplane.toml:{place}: error: ")), "{said}");
        assert!(said.contains(&format!("  help: {remedy}\n")), "{remedy}\n{said}");
        assert!(said.ends_with("dataplane.toml: 1 error"), "{said}");
    }
}

#[test]
fn a_mode_on_the_port_of_another_is_a_warning() {
    let (_, said) = read(&SMALL.replace("0.0.0.0:443", "0.0.0.0:80"));
    assert!(said.contains("3:9: warning: ") && said.contains("write `mode = \"http\"`, or another port"), "{said}");
    let (_, said) = read(&SMALL.replace("bind = [", "mode = \"http\"\nbind = ["));
    assert!(said.contains("4:9: warning: ") && said.contains("write `mode = \"tls\"`, or another port"), "{said}");
}

#[test]
fn what_is_wrong_beside_a_source_that_is_wrong_is_told_with_it() {
    let text = "[source]\ngit = 3\nbranch = \"main\"\n[limits]\nidle_timeout = 5\n[admin]\nbogus = 1\n";
    let source = source(text);
    let diagnostics = super::repository(&source).expect_err("it is wrong");
    let said = LoadError::Report { source, diagnostics }.to_string();
    for place in ["2:7", "3:1", "5:16", "7:1"] {
        assert!(said.contains(&format!("dataplane.toml:{place}: error: ")), "{place}\n{said}");
    }
    assert!(said.ends_with("4 errors"), "listeners and routes may be in the repository: {said}");
}

#[test]
fn the_table_of_a_long_list_is_shown() {
    let networks: Vec<_> = (0..6000).map(|n| format!("\"10.{}.{}.1\"", n / 256, n % 256)).collect();
    let text = SMALL.replace("bind =", &format!("deny = [{}]\nbind =", networks.join(", ")));
    let table = routing_table(&read(&text).0);
    assert!(table.contains("10.23.111.1/32") && table.lines().filter(|line| line.len() > 1000).count() == 1);
}

#[test]
fn what_nobody_may_have_can_be_refused_and_a_listener_that_refuses_all_is_told() {
    let refused =
        |hosts: &str, more: &str| format!("{SMALL}[[routes]]\nhosts = [{hosts}]\naction = \"refuse\"\n{more}");
    let (config, warnings) = read(&refused("\"x.example.com\", \"-a.example.com\", \"*.b-.example.com\"", ""));
    assert_eq!((config.routes[1].action, warnings.as_str()), (Action::Refuse, ""));
    let hosts: Vec<_> = config.routes[1].hosts.iter().map(ToString::to_string).collect();
    assert_eq!(hosts, ["x.example.com", "-a.example.com", "*.b-.example.com"]);
    assert!(refusal(&refused("\"-a..example.com\"", "")).contains("is not a host name"));
    assert!(refusal(&SMALL.replace("blog.", "-blog.")).contains("is not a host name"), "to forward it takes a name");
    let alone = SMALL.replace("upstream = \"cluster\"", "action = \"refuse\"");
    let (_, warnings) = read(&alone);
    assert!(warnings.contains("no route is for listener \"public\""), "{warnings}");
}
