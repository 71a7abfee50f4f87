//! The pages and the examples say what is so: the real program accepts their configurations and
//! knows their commands.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tests::daemon::binary;
use tests::documents::{Document, workspace};

fn dataplane<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Output {
    Command::new(binary()).args(arguments).output().expect("the daemon's binary can be run")
}

/// Runs `dataplane check` with these arguments, which must find nothing to say; `what` names the
/// configuration.
#[track_caller]
fn is_right(what: &str, arguments: &[&OsStr]) {
    let out = dataplane([OsStr::new("check"), "--format".as_ref(), "json".as_ref()].iter().chain(arguments));
    let said = String::from_utf8_lossy(&out.stdout);
    let document: Value = serde_json::from_str(&said)
        .unwrap_or_else(|e| panic!("{what}: {e}: {said}{}", String::from_utf8_lossy(&out.stderr)));
    assert!(document["valid"] == true && document["diagnostics"] == Value::Array(Vec::new()), "{what}: {said}");
    assert!(out.status.success(), "{what}: {}", out.status);
}

/// README.md's configuration, in a file.
fn of_readme(folder: &Path) -> PathBuf {
    let block = Document::read("README.md").blocks("toml").into_iter().find(|block| is_whole(block));
    let file = folder.join("readme.toml");
    fs::write(&file, block.expect("README.md shows a configuration")).expect("written");
    file
}

/// Whether a word stands for one that the reader puts in: `FILE`.
fn is_placeholder(word: &str) -> bool {
    word.chars().all(|c| c.is_ascii_uppercase())
}

/// Whether a block is more than a part of a configuration.
fn is_whole(block: &str) -> bool {
    block.contains("[listeners.") && block.contains("[[routes]]")
}

#[test]
fn every_configuration_of_the_pages_passes_check() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("dataplane.toml");
    let mut checked = 0;
    for page in Document::all() {
        for block in page.blocks("toml").iter().filter(|block| is_whole(block)) {
            fs::write(&file, block).expect("written");
            is_right(&format!("{}:\n{block}", page.path.display()), &["--config".as_ref(), file.as_ref()]);
            checked += 1;
        }
    }
    assert!(checked > 0, "no configuration was found");
}

#[test]
fn every_command_of_the_pages_exists_with_its_options() {
    let mut checked = 0;
    for page in Document::all() {
        for command in page.commands(&["dataplane"]) {
            // `--help` at the end has what stands before it parsed, and nothing done.
            let out = dataplane(command.words[1..].iter().map(String::as_str).chain(["--help"]));
            let said = String::from_utf8_lossy(&out.stderr);
            // Where only certain words may stand, what stands for one of them is known by its place.
            let is_known = out.status.success()
                || command.words.iter().any(|w| is_placeholder(w) && said.contains(&format!("invalid value '{w}'")));
            assert!(is_known, "{}: `{}`: {said}", page.path.display(), command.words.join(" "));
            checked += 1;
        }
    }
    assert!(checked > 0, "no command was found");
}

#[test]
fn readme_s_commands_that_only_look_are_run_on_its_configuration() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = of_readme(folder.path());
    let commands = Document::read("README.md").commands(&["dataplane"]);
    let mut run: Vec<&str> = Vec::new();
    for command in &commands {
        let has_placeholder = command.words.iter().any(|word| is_placeholder(word));
        if ["check", "explain", "init"].contains(&&*command.words[1]) && !has_placeholder {
            let arguments = command.words[1..].iter().map(AsRef::as_ref);
            let out = dataplane(arguments.chain([OsStr::new("--config"), file.as_ref()]));
            let said = String::from_utf8_lossy(&out.stderr);
            assert!(out.status.success(), "`{}`: {said}", command.words.join(" "));
            run.push(&command.words[1]);
        }
    }
    assert!(run.contains(&"check") && run.contains(&"explain"), "README.md names neither: {run:?}");
}

#[test]
fn every_example_passes_check_without_a_warning() {
    let examples = workspace().join("examples");
    let page = fs::read_to_string(examples.join("README.md")).expect("examples/README.md");
    let mut files = Vec::new();
    all_files(&examples, &mut files);
    let mut checked = 0;
    for file in &files {
        let shown = file.strip_prefix(&examples).expect("found there");
        let folders = shown.parent().expect("a file");
        let repository = folders.ancestors().find(|folder| folder.ends_with("repository"));
        match shown.extension().and_then(OsStr::to_str) {
            Some("md") => continue,
            Some("toml") => {}
            _ => panic!("examples/{}: no test knows what to do with it", shown.display()),
        }
        let listed = repository.map_or(shown.to_owned(), |repository| repository.join("dataplane.toml"));
        let link = format!("({})", listed.display());
        assert!(page.contains(&link), "examples/README.md says nothing of {}", shown.display());
        match repository {
            Some(repository) => is_read(&examples.join(repository), file),
            None if fs::read_to_string(file).expect("readable").contains("[source]") => follows(file),
            None => is_right(&shown.display().to_string(), &["--config".as_ref(), file.as_ref()]),
        }
        checked += 1;
    }
    assert!(checked > 0, "no example was found");
}

/// A node's own file: what it has of its own is right, and the repository beside it fits.
#[track_caller]
fn follows(file: &Path) {
    let shown = file.display().to_string();
    let repository = file.with_file_name("repository");
    is_right(&shown, &["--repository".as_ref(), repository.as_ref(), "--node".as_ref(), file.as_ref()]);

    // As a whole, with a clone in the place of a forge that does not exist; keys and tokens are for
    // forges alone.
    let folder = tempfile::tempdir().expect("a folder");
    let clone = folder.path().join("clone");
    copy(&repository, &clone);
    for arguments in [&["init", "--quiet", "--initial-branch", "main"] as &[_], &["add", "."], &["commit", "-qm", "x"]]
    {
        let mut git = Command::new("git");
        git.args(["-c", "user.name=x", "-c", "user.email=x@example.com"]).args(arguments).current_dir(&clone);
        assert!(git.status().expect("git is needed: apt-get install git").success());
    }
    let text = fs::read_to_string(file).expect("readable");
    let own: String = text
        .lines()
        .filter(|line| !["token_file", "ssh_key_file", "known_hosts_file"].iter().any(|key| line.starts_with(key)))
        .map(|line| {
            let is_git = line.starts_with("git = ");
            let line = if is_git { format!("git = \"{}\"", clone.display()) } else { line.to_owned() };
            line + "\n"
        })
        .collect();
    let node = folder.path().join("node.toml");
    fs::write(&node, own).expect("written");
    is_right(&shown, &["--config".as_ref(), node.as_ref()]);
}

/// A file of a repository: `check --repository` passes, and does not when this file is wrong.
#[track_caller]
fn is_read(repository: &Path, file: &Path) {
    is_right(&repository.display().to_string(), &["--repository".as_ref(), repository.as_ref()]);
    let folder = tempfile::tempdir().expect("a folder");
    let spoilt = folder.path().join("repository");
    copy(repository, &spoilt);
    let inside = file.strip_prefix(repository).expect("a file of it");
    fs::write(spoilt.join(inside), "no_such_key = 1\n").expect("written");
    let out = dataplane([OsStr::new("check"), "--repository".as_ref(), spoilt.as_ref()]);
    let said = String::from_utf8_lossy(&out.stderr);
    let (file, inside) = (file.display(), inside.display().to_string());
    assert!(said.contains("no_such_key") && said.contains(&inside), "nothing includes {file}: {said}");
}

fn all_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("readable").path();
        if path.is_dir() { all_files(&path, found) } else { found.push(path) }
    }
}

fn copy(from: &Path, to: &Path) {
    let mut files = Vec::new();
    all_files(from, &mut files);
    for file in files {
        let to = to.join(file.strip_prefix(from).expect("found there"));
        fs::create_dir_all(to.parent().expect("a file")).expect("made");
        fs::copy(&file, to).expect("copied");
    }
}
