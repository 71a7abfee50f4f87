//! Configurations of the shapes that people publish, and what comes of them.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::config::{Source, parse};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/import/testdata")
}

/// What the command shows for a file, notes first; paths as from within the folder.
fn shown(file: &Path) -> String {
    let said = match nginx(file) {
        Ok(Imported { toml, notes, .. }) => notes.iter().map(|note| format!("{note}\n")).collect::<String>() + &toml,
        Err(error) => format!("{error:#}\n"),
    };
    said.replace(&format!("{}/", folder().display()), "")
}

#[test]
fn published_shapes_become_ours_and_what_cannot_is_told() {
    let update = std::env::var_os("UPDATE_GOLDEN").is_some();
    let mut files: Vec<_> = std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "conf"));
    files.sort();
    let mut differences = String::new();
    for file in &files {
        let golden = file.with_extension("txt");
        let shown = shown(file);
        if update {
            std::fs::write(&golden, &shown).unwrap();
        }
        let expected = std::fs::read_to_string(&golden).unwrap_or_default();
        if shown != expected {
            write!(differences, "--- {}\nexpected:\n{expected}\nshown:\n{shown}\n", file.display()).unwrap();
        }
    }
    assert!(files.len() >= 12, "{} shapes", files.len());
    assert!(
        differences.is_empty(),
        "{differences}If what is shown is right: UPDATE_GOLDEN=1 cargo test -p dataplane published_shapes"
    );
}

#[test]
fn what_is_written_checks_without_an_error() {
    let mut imported = 0;
    for entry in std::fs::read_dir(folder()).unwrap() {
        let file = entry.unwrap().path();
        let Ok(Imported { toml, .. }) = nginx(&file) else { continue };
        imported += 1;
        assert!(parse(Arc::new(Source::new(file, toml))).is_ok());
    }
    assert!(imported >= 12, "{imported} of them");
}

fn error(text: &str) -> String {
    syntax::parse(Path::new("nginx.conf"), text).expect_err(text).to_string()
}

#[test]
fn broken_files_are_told_with_their_line() {
    assert_eq!(
        error("stream {\n server {\n  listen 1;\n }\n"),
        "nginx.conf:1: error: the block of `stream` is not closed"
    );
    assert_eq!(error("a b;\n}\n"), "nginx.conf:2: error: `}` closes nothing");
    assert_eq!(error("stream {\n listen 1\n}\n"), "nginx.conf:2: error: `listen` is not ended by `;`");
    assert_eq!(error("a\nb"), "nginx.conf:1: error: `a` is not ended by `;`");
    assert_eq!(error("\n;"), "nginx.conf:2: error: `;` ends nothing");
    assert_eq!(error("{ a; }"), "nginx.conf:1: error: `{` belongs to nothing");
    assert_eq!(error("a 'b;\n\n"), "nginx.conf:1: error: a text that begins with ' does not end");
}

#[test]
fn of_a_file_that_is_none_of_nginx_no_line_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let main = folder.path().join("nginx.conf");
    let other = folder.path().join("other");
    let secret = "root:$6$s3cret:19000::\n";
    for (text, including) in [
        (secret.to_owned(), "include other;"),
        (secret.to_owned(), "stream { include other; }"),
        (secret.replace('\n', ";\n"), "stream { server { listen 1; proxy_pass a:1; include other; } }"),
        (secret.replace('\n', " {\n"), "stream { include other; }"),
        ("'s3cret \n s3cret'".to_owned(), "stream { include other; }"),
        ("pass s3cret".to_owned(), "include other;"),
        ("pass s3cret;\u{1b}[2J s3cret;".to_owned(), "stream { server { listen 1; proxy_pass a:1; include other; } }"),
    ] {
        std::fs::write(&other, text).unwrap();
        std::fs::write(&main, including).unwrap();
        let said = shown(&main);
        assert!(
            said.contains("other:1: ") && !said.contains("s3cret") && !said.contains('\u{1b}'),
            "{including}: {said}"
        );
    }
}

#[test]
fn words_are_read_as_nginx_reads_them() {
    let text = "# no word\nlog 'a \"b\" \\'c' \"d;{}\" e\\ f ~^\\d\\.x$ g#h ${i}j k'l; block m { n; }";
    let directives = syntax::parse(Path::new("x"), text).unwrap();
    assert_eq!(directives[0].words, ["a \"b\" 'c", "d;{}", "e\\ f", "~^\\d\\.x$", "g#h", "${i}j", "k'l"]);
    assert_eq!((directives[0].place.line, directives[0].block.is_none()), (2, true));
    assert_eq!((directives[1].text(), directives[1].inside()[0].name.as_str()), ("m".to_owned(), "n"));
}

#[test]
fn a_circle_of_includes_is_an_error() {
    let folder = std::env::temp_dir().join(format!("dataplane-import-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let file = folder.join("nginx.conf");
    std::fs::write(&file, "include nginx.conf;").unwrap();
    assert!(nginx(&file).unwrap_err().to_string().contains("goes round in a circle"));
    assert!(format!("{:#}", nginx(&folder.join("none.conf")).unwrap_err()).starts_with("cannot read "));
    std::fs::remove_dir_all(&folder).unwrap();
}

fn text(text: &str) -> Imported {
    nginx_text(Path::new("nginx.conf"), text).unwrap_or_else(|error| panic!("{text}\n{error:#}"))
}

fn lost(imported: &Imported) -> Vec<String> {
    imported.notes.iter().filter(|note| note.kind == Kind::Lost).map(ToString::to_string).collect()
}

#[test]
fn the_output_of_nginx_is_read_as_the_files_that_it_has() {
    let dump = "nginx: the configuration file /etc/nginx/nginx.conf syntax is ok\n\
         # configuration file /etc/nginx/nginx.conf:\nuser www-data;\nstream {\n\
         include streams/*.conf;\n include /etc/nginx/one.conf;\n}\n\n\
         # configuration file /etc/nginx/streams/sni.conf:\n\
         map $ssl_preread_server_name $b { include names.map; }\n\
         server { listen 443; ssl_preread on; proxy_pass $b; limit_conn a 1; }\n\n\
         # configuration file /etc/nginx/names.map:\nblog.test 10.9.59.2:443;\n\
         # configuration file /etc/nginx/one.conf:\nserver { listen 2222; proxy_pass 10.9.59.1:22; }\n";
    let imported = text(dump);
    for part in ["hosts = [\"blog.test\"]", "targets = [\"10.9.59.2:443\"]", "targets = [\"10.9.59.1:22\"]"] {
        assert!(imported.toml.contains(part), "{part}: {}", imported.toml);
    }
    assert!(
        lost(&imported)[0].starts_with("/etc/nginx/streams/sni.conf:2: lost: `limit_conn`"),
        "{:?}",
        lost(&imported)
    );
    let without = dump.replace("# configuration file /etc/nginx/one.conf:", "# ");
    let error = nginx_text(Path::new("dump"), &without).unwrap_err().to_string();
    assert!(error.contains("/etc/nginx/nginx.conf:4: error: `include /etc/nginx/one.conf`"), "{error}");
}

#[test]
fn what_a_missing_file_may_have_said_is_refused() {
    let server = |inside: &str| format!("server {{ listen 443; ssl_preread on; {inside} }}");
    let other = "server { listen 22; proxy_pass 10.0.0.1:22; }";
    // Who is let in: nothing but the other address is left.
    let imported = text(&format!("stream {{ {} {other} }}", server("include guard.conf; proxy_pass 10.0.0.1:443;")));
    assert!(imported.has_losses() && !imported.toml.contains(":443") && imported.toml.contains("10.0.0.1:22"));
    // Names: those that are listed are left, and no wildcard.
    let map = "map $ssl_preread_server_name $x { hostnames; a.test 10.0.0.1:443; *.b.test 10.0.0.1:443; include more; default 10.0.0.1:443; }";
    let imported = text(&format!("stream {{ {map} {} }}", server("proxy_pass $x;")));
    assert!(imported.toml.contains("hosts = [\"a.test\"]\nupstream"), "{}", imported.toml);
    assert!(imported.toml.contains("hosts = [\"*.b.test\"]\naction = \"refuse\""), "{}", imported.toml);
    assert!(!imported.toml.contains("\"*\""), "{}", imported.toml);
    // Targets: the others are left.
    let upstream = "upstream u { server 10.0.0.1:443; include more; }";
    let imported = text(&format!("stream {{ {upstream} {} }}", server("proxy_pass u;")));
    assert!(imported.has_losses() && imported.toml.contains("10.0.0.1:443"));
}

#[test]
fn losses_come_first_and_trivia_are_one_line() {
    let imported = text(
        "stream { access_log a; log_format b c;\nserver { listen 1; proxy_pass u; tcp_nodelay on; }\n\
         upstream u { server 10.0.0.1:1 down; server 10.0.0.2:1 weight=2; } }",
    );
    let said: Vec<String> = imported.notes.iter().map(ToString::to_string).collect();
    assert_eq!(
        said,
        [
            "nginx.conf:3: lost: `weight=2` is not carried over: targets have no weights",
            "nginx.conf:3: `10.0.0.1:1` is not carried over: it is down",
            "nginx.conf:1: needs no counterpart: `access_log`, `log_format`, `tcp_nodelay`",
        ]
    );
    assert!(imported.has_losses());
    assert!(!text("stream { server { listen 1; proxy_pass 10.0.0.1:1; access_log off; } }").has_losses());
}

#[test]
fn what_is_not_known_may_guard_and_is_refused() {
    let other = "server { listen 2; proxy_pass 10.0.0.1:2; }";
    for directive in
        ["js_access main.check;", "set $x 1;", "if ($x) { return 1; }", "return 1;", "preread_by_lua_block { x; }"]
    {
        let imported = text(&format!("stream {{ server {{ listen 1; proxy_pass 10.0.0.1:1; {directive} }} {other} }}"));
        assert!(imported.has_losses() && !imported.toml.contains("10.0.0.1:1\""), "{directive}: {}", imported.toml);
        let error = nginx_text(Path::new("x"), &format!("stream {{ {directive} {other} }}")).unwrap_err().to_string();
        assert!(error.contains("stands for all servers"), "{directive}: {error}");
    }
}

#[test]
fn what_the_default_server_has_of_unknown_meaning_guards_all_names() {
    let servers = |directive: &str| {
        format!(
            "stream {{ ssl_preread on; server {{ listen 1; proxy_pass 10.0.0.1:1; {directive} }} server {{ listen 1; server_name b.test; proxy_pass 10.0.0.2:1; }} }}"
        )
    };
    assert!(text(&servers("")).toml.contains("10.0.0.2:1"));
    assert!(nginx_text(Path::new("x"), &servers("js_access m.f;")).is_err());
    // It ends connections of other names, and guards none.
    let default = "stream { ssl_preread on; server { listen 1; return x; } server { listen 1; server_name b.test; proxy_pass 10.0.0.2:1; } }";
    assert!(text(default).toml.contains("10.0.0.2:1"));
}

#[test]
fn a_network_that_no_peer_is_in_for_nginx_is_not_believed_here() {
    let server = |from: &str| {
        format!(
            "stream {{ server {{ listen 1 proxy_protocol; set_real_ip_from {from}; proxy_protocol on; proxy_pass 10.0.0.1:1; }} }}"
        )
    };
    assert!(text(&server("10.0.0.0/8")).toml.contains("accept_proxy = [\"10.0.0.0/8\"]"));
    let error = nginx_text(Path::new("x"), &server("::ffff:10.0.0.0/104")).unwrap_err().to_string();
    assert!(error.contains("anybody can forge"), "{error}");
}

#[test]
fn a_port_of_which_an_address_is_not_known_is_refused() {
    let imported = text(
        "stream { server { listen 1; proxy_pass 10.0.0.1:1; } server { listen host.test:1; proxy_pass 10.0.0.2:1; } server { listen 2; proxy_pass 10.0.0.3:1; } }",
    );
    assert!(imported.has_losses() && !imported.toml.contains("0.0.0.0:1\""), "{}", imported.toml);
}

#[test]
fn patterns_of_includes_are_those_of_glob_3() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, port: u16| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, format!("server {{ listen {port}; proxy_pass 10.0.0.1:1; }}")).unwrap();
    };
    for (name, port) in [("a.conf", 1), (".b.conf", 2), ("z.conf", 3), ("in/c.conf", 4), ("in/to/d.conf", 5)] {
        write(name, port);
    }
    for (pattern, ports) in [
        ("*.conf", vec![1, 3]),
        ("**.conf", vec![1, 3]),
        ("[^z]*.conf", vec![1]),
        ("[!z]*.conf", vec![1]),
        ("**/*.conf", vec![4]),
        (".*.conf", vec![2]),
    ] {
        let main = folder.path().join("nginx");
        std::fs::write(&main, format!("stream {{ include {pattern}; server {{ listen 9; proxy_pass 10.0.0.1:1; }} }}"))
            .unwrap();
        let toml = nginx(&main).unwrap().toml;
        let found: Vec<u16> = (1..9).filter(|port| toml.contains(&format!("0.0.0.0:{port}\""))).collect();
        assert_eq!(found, ports, "{pattern}");
    }
}

#[test]
fn lua_is_skipped_and_names_of_files_are_shown() {
    let lua = "http { content_by_lua_block { -- don't {\n x = { 'a}', \"}\" } } } stream { server { listen 1; proxy_pass 10.0.0.1:1; } }";
    assert!(text(lua).toml.contains("10.0.0.1:1"));
    let imported =
        nginx_text(Path::new("a\nb"), "stream { server { listen 1; proxy_pass 10.0.0.1:1; limit_conn x 1; } }")
            .unwrap();
    assert!(imported.toml.lines().all(|line| !line.starts_with("b:")), "{}", imported.toml);
}

#[test]
fn limits_that_would_be_lost_are_told() {
    for directive in
        ["proxy_download_rate 1k", "proxy_upload_rate 1k", "limit_conn zone 4", "proxy_bind $remote_addr transparent"]
    {
        let imported = text(&format!("stream {{ server {{ listen 1; proxy_pass 10.0.0.1:1; {directive}; }} }}"));
        assert!(imported.has_losses(), "{directive}");
    }
    assert!(
        !text("stream { server { listen 1; proxy_pass 10.0.0.1:1; proxy_download_rate 0; deny unix:; } }").has_losses()
    );
}

#[test]
fn a_name_that_nginx_cannot_look_up_is_refused_here_too() {
    let server = |pass: &str| format!("server {{ listen 1; proxy_pass {pass}; }}");
    assert!(text(&format!("stream {{ {} }}", server("a.test:1"))).toml.contains("a.test:1"));
    let asked = format!("stream {{ {} server {{ listen 2; proxy_pass 10.0.0.1:1; }} }}", server("a.test:$server_port"));
    assert!(!text(&asked).toml.contains("\"a.test:1\""), "there is no resolver");
    let asked = asked.replace("stream {", "stream { resolver 192.0.2.53;");
    assert!(text(&asked).toml.contains("a.test:1"));
}

#[test]
fn the_resolver_has_a_place() {
    let names = "upstream u { server a.test:1; resolver 192.0.2.53 valid=10s; }";
    let imported = text(&format!("stream {{ {names} server {{ listen 1; proxy_pass u; }} }}"));
    assert!(imported.toml.contains("[resolver]\nservers = [\"192.0.2.53:53\"]"), "{}", imported.toml);
    let imported = text(&format!("stream {{ {names} server {{ listen 1; resolver [2001:db8::53]; proxy_pass u; }} }}"));
    assert!(imported.has_losses(), "two of them: {}", imported.toml);
    let addresses = "stream { resolver 192.0.2.53; server { listen 1; proxy_pass 10.0.0.1:1; } }";
    assert!(!text(addresses).toml.contains("resolver"));
}

#[test]
fn many_names_targets_and_ports_are_carried_over() {
    let names: String = (0..8000).map(|n| format!("n{n}.x.test 10.0.{}.{}:443;\n", n / 250, n % 250 + 1)).collect();
    let server = "server { listen 443; listen 8443; ssl_preread on; proxy_pass $x; }";
    let imported = text(&format!(
        "stream {{ map $ssl_preread_server_name $x {{ hostnames; {names} *.x.test 10.0.0.1:1; }} {server} }}"
    ));
    assert_eq!(imported.toml.matches("[upstreams.").count(), 8001);
    let members: String = (0..20_000).map(|n| format!("server 10.1.{}.{}:443;\n", n / 250, n % 250 + 1)).collect();
    let imported = text(&format!("stream {{ upstream u {{ {members} }} server {{ listen 1; proxy_pass u; }} }}"));
    assert_eq!(imported.toml.matches("\"10.1.").count(), 20_000);
    let ports: String = (1..4000).map(|n| format!("server {{ listen {n}; proxy_pass 10.1.1.1:{n}; }}\n")).collect();
    let imported = text(&format!("stream {{ {ports} }}"));
    assert_eq!((imported.toml.matches("[listeners.").count(), imported.has_losses()), (256, true));
    assert!(text("stream { server { listen 10000-11023; proxy_pass 10.1.1.1:1; } }").toml.contains(":11023"));
}

#[test]
fn texts_that_ask_for_much_are_bounded() {
    let repeated = |entry: &dyn Fn(usize) -> String, size: usize| {
        let mut text = String::new();
        let mut n = 0;
        while text.len() < size {
            text += &entry(n);
            n += 1;
        }
        text
    };
    let map = |entries: &str| {
        format!(
            "stream {{ map $ssl_preread_server_name $x {{ hostnames; {entries} a.test 10.0.0.1:1; }} server {{ listen 1; ssl_preread on; proxy_pass $x; }} }}"
        )
    };
    let size = 300_000;
    for whole in [
        map(&repeated(&|n| format!("~^[a-p][a-p]{n}$ 10.0.0.1:{n};\n"), size)),
        map(&repeated(&|n| format!("~x{n} 10.0.0.1:{n};\n"), size)),
        map(&repeated(&|n| format!("x{n}.* 10.0.0.1:{n};\n"), size)),
        map(&repeated(&|n| format!("{}{n}.test 10.0.0.1:1;\n", "a.".repeat(100)), size)),
        map(&repeated(&|n| format!("a{n}.test x{n}.test:1;\n"), size)),
        format!("stream {{ {} }}", repeated(&|_| "server { listen 1-1024; proxy_pass a:1; }\n".into(), size)),
        format!(
            "stream {{ {} }}",
            repeated(&|n| format!("server {{ listen 1; server_name a{n}.test; proxy_pass a:1; }}\n"), size)
        ),
        format!(
            "stream {{ {} }}",
            repeated(
                &|n| format!("server {{ listen {}; proxy_pass 127.0.0.1:{}; }}\n", n % 9000 + 1, n % 9000 + 2),
                size
            )
        ),
        format!(
            "stream {{ server {{ listen 1; proxy_pass a:1; {} }} }}",
            repeated(&|n| format!("allow 10.{}.{}.0/24; deny 10.0.0.0/8;\n", n % 256, n / 256 % 256), size)
        ),
        "stream { ".repeat(100_000),
        format!("stream {{ server {{ listen 1; proxy_pass \"a:{}\"; }} }}", "$server_port".repeat(20_000)),
        format!(
            "stream {{ ssl_preread on; server {{ listen 1; proxy_pass a:1; }} server {{ listen 1; {} server_name {}; proxy_pass a:1; }} }}",
            repeated(&|n| format!("allow 10.{}.{}.0/24; deny 10.0.0.0/8;\n", n % 256, n / 256 % 256), 60_000),
            repeated(&|n| format!("a{n}.test\n"), 200_000)
        ),
    ] {
        let _ = nginx_text(Path::new("nginx.conf"), &whole);
    }
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(
        pieces in prop::collection::vec(prop::sample::select(vec![
            "stream ", "server ", "map $ssl_preread_server_name $a ", "upstream u ", "listen 443", "listen [::]:1 udp", "proxy_pass $a", "proxy_pass u",
            "proxy_pass a:1", "{", "}", ";", "\n", "'", "\"", "\\", "$", "#", "default u", "a.example u", "server a:1 backup", "ssl_preread on",
            "proxy_timeout 99999999999999999999d", "proxy_timeout 9w", "allow all", "deny 1.2.3.4", "hostnames", ".x a:1", "* a:1", "é",
        ]), 0..40),
    ) {
        let path = Path::new("nginx.conf");
        if let Ok(directives) = syntax::parse(path, &pieces.concat()) {
            let _ = super::nginx::translate(path, &directives);
        }
    }
}
