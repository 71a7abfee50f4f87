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
        Ok(Imported { toml, notes }) => notes.iter().map(|note| format!("{note}\n")).collect::<String>() + &toml,
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
    assert_eq!(directives[0].words, ["a \"b\" 'c", "d;{}", "e f", "~^\\d\\.x$", "g#h", "${i}j", "k'l"]);
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
            let _ = super::nginx::translate(path, &directives, Vec::new());
        }
    }
}
