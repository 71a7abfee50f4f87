//! The configuration as its owner meets it: whole files, their warnings and the explanations of what is wrong with them.

use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use super::*;

fn source(text: &str) -> Arc<Source> {
    Arc::new(Source { path: "dataplane.toml".into(), text: text.into() })
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
    assert_eq!((route.listeners.as_slice(), route.upstream), ([0].as_slice(), 0));
    assert!(config.routes[0].listeners.is_empty());

    assert_eq!(config.limits, Limits::default());
    assert_eq!(config.admin.bind.addr.to_string(), "127.0.0.1:9443");
    assert_eq!(config.admin.socket.to_str(), Some("/run/dataplane/admin.sock"));

    let of: Vec<&str> = warnings.lines().filter(|line| line.contains("warning:")).collect();
    assert_eq!(of.len(), 2, "`health` and `hedge_delay`, which are accepted but not acted on: {warnings}");
}

#[test]
fn limits_that_are_given_replace_the_defaults() {
    let limits = read(&format!(
        "{SMALL}[limits]\nhello_timeout = \"500ms\"\nhello_max_bytes = \"8KiB\"\nidle_timeout = \"1h30m\"\ndead_peer_timeout = \"5s\"\n\
         drain_timeout = \"0s\"\nmax_connections = 10_000\nmax_connections_per_client = 0x10\nkernel_memory = \"10MB\"\n"
    ))
    .0
    .limits;
    let expected = Limits {
        hello_timeout: Duration::from_millis(500),
        hello_max_bytes: 8192,
        idle_timeout: Duration::from_secs(5400),
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
    let sections = ["[limits]", "[admin]"];
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
fn keys_of_later_versions_warn_when_they_would_change_something() {
    let with = |line: &str| read(&SMALL.replace("[[routes]]", &format!("{line}\n[[routes]]"))).1;
    assert!(with("on_down = \"reset\"").contains("does not act on `on_down = \"reset\"` yet"));
    assert!(with("hedge_delay = \"1s\"").contains("does not act on `hedge_delay` yet"));
    assert!(with("health = { interval = \"5s\" }").contains("does not act on `health` yet"));
    assert_eq!(with("on_down = \"keep\"\nhedge_delay = \"0s\""), "");
    let wrong = SMALL.replace("[[routes]]", "health = { fall = 0, intervall = \"5s\" }\n[[routes]]");
    let refused = refusal(&wrong);
    assert!(refused.contains("`fall` is too small") && refused.contains("did you mean `interval`?"), "{refused}");
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
"#;
    let expected = "\
HOST                LISTENERS          ALPN         UPSTREAM  TARGETS                        PROXY
blog.example.com    public,inside,web  h2,http/1.1  cluster   thinkpad-1:443,thinkpad-2:443  v2
blog.example.com    public,inside,web  any          cluster   thinkpad-1:443,thinkpad-2:443  v2
*.apps.example.com  public             any          cluster   thinkpad-1:443,thinkpad-2:443  v2
*.example.com       public             any          cluster   thinkpad-1:443,thinkpad-2:443  v2
Every other server name is refused.
Listener web speaks HTTP: ACME challenges go to port 8080 of these targets, the rest is sent to https.

LISTENER  BIND                    UPSTREAM  TARGETS        PROXY
git       0.0.0.0:2222,[::]:2222  git-ssh   thinkpad-1:22  off
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
        let source = Arc::new(Source { path: name.into(), text: std::fs::read_to_string(file).unwrap() });
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
    let shown = |path: &Path| load(path).unwrap_err().to_string();

    let missing = folder.join("dataplane.toml");
    assert!(shown(&missing).contains(&missing.display().to_string()));
    assert!(shown(&missing).ends_with(&format!("with `dataplane init > {}`", missing.display())));
    let deeper = folder.join("etc/dataplane.toml");
    assert!(shown(&deeper).contains(&format!("`mkdir -p {} && ", folder.join("etc").display())));
    assert!(shown(&folder).contains(&format!("`--config {}`", missing.display())));

    std::fs::write(&missing, b"engine = \"auto\"\n# caf\xe9\n").unwrap();
    assert!(shown(&missing).starts_with(&format!("{}:2: error: this is not UTF-8", missing.display())));
    std::fs::write(&missing, STARTER).unwrap();
    assert_eq!(load(&missing).unwrap().0.source.path, missing);
    std::fs::remove_dir_all(&folder).unwrap();
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
