//! Fetches the newest commit by the git program, as a child process with limits: of time, of size,
//! of what it can see and ask.
//!
//! Each fetch has a folder of its own that goes away with it: first a look at what the ref is,
//! then, if that is new, this one commit. Symbolic links in a commit are never followed: what is
//! read is what the commit holds.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use base64::Engine;
use rustix::process::{Pid, Signal, kill_process_group};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::time::{Instant, timeout_at};

use super::follow::Fetch;
use super::{Seen, Snapshot, Unreachable, matching, secret};
use crate::config::{self, Repository, format_duration, format_size};
use crate::kernel::sys;

/// Of the daemon's environment, what git and its helpers need to reach a server: proxies, and
/// certificates of one's own.
const PASSED_ON: [&str; 13] = [
    "PATH",
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "GIT_SSL_CAINFO",
    "GIT_SSL_CAPATH",
];

/// Nothing of it runs a program, keeps running, or holds a large file in memory. One pack, so that
/// one limit holds. A repository of another user is what a path may well name.
const SETTINGS: &str = "[safe]\n\tdirectory = *\n[core]\n\thooksPath = /dev/null\n\tbigFileThreshold = 1m\n\
    [fetch]\n\tunpackLimit = 1\n\tfsckObjects = true\n[gc]\n\tauto = 0\n[maintenance]\n\tauto = false\n";

/// Bytes of a message of git that are worth keeping.
const MESSAGE: u64 = 4096;

/// The user of HTTP's basic authentication: GitHub wants this one from its apps, others look at the
/// token alone.
const TOKEN_USER: &str = "x-access-token";

/// Reaches repositories by the git program.
pub struct Repositories;

impl Fetch for Repositories {
    async fn fetch(
        &self,
        repository: &Repository,
        seen: Option<&Seen>,
    ) -> Result<Option<(Seen, Snapshot)>, Unreachable> {
        fetch(repository, seen).await
    }
}

/// Fetches, unless the ref is still what was `seen` before.
///
/// # Errors
/// Why not.
pub async fn fetch(repository: &Repository, seen: Option<&Seen>) -> Result<Option<(Seen, Snapshot)>, Unreachable> {
    let git = Git::new(repository)?;
    let url = &*repository.git;
    let candidates = candidates(&repository.reference);
    let mut arguments = vec!["ls-remote", "--quiet", "--", url];
    arguments.extend(candidates.iter().map(|name| &**name));
    let listing = git.text(&arguments).await?;
    let (now, reference) = resolve(&repository.reference, &candidates, &listing)?;
    if seen == Some(&now) {
        return Ok(None);
    }
    git.text(&["init", "--quiet", "--bare", "--template=", "."]).await?;
    git.text(&["fetch", "--quiet", "--depth=1", "--no-tags", "--no-recurse-submodules", "--", url, &reference]).await?;
    let commit = git.text(&["rev-parse", "--verify", "--quiet", "FETCH_HEAD^{commit}"]).await?.trim().to_owned();
    let files = git.files(&commit).await?;
    Ok(Some((now, Snapshot { revision: commit, files })))
}

/// The whole names that a short one may stand for. git itself would take a tag before the branch,
/// and anything that ends in the name.
fn candidates(reference: &str) -> Vec<String> {
    if reference == "HEAD" || reference.starts_with("refs/") {
        return vec![reference.to_owned()];
    }
    ["heads", "tags"].iter().map(|kind| format!("refs/{kind}/{reference}")).collect()
}

/// Which of the candidates there is, by git-ls-remote(1), whose patterns match more than whole
/// names; and what it is.
fn resolve(reference: &str, candidates: &[String], listing: &str) -> Result<(Seen, String), Unreachable> {
    let there = |name: &&String| listing.lines().find(|line| line.split_once('\t').is_some_and(|(_, n)| n == *name));
    let mut found = candidates.iter().filter_map(|name| Some((there(&name)?.to_owned(), name.clone())));
    let none = || Unreachable::by("ref", format!("the repository has no branch or tag `{reference}`"));
    let first = found.next().ok_or_else(none)?;
    if let Some((_, tag)) = found.next() {
        let text = format!(
            "the repository has a branch and a tag `{reference}`: remove the tag, or write `ref = \"{}\"` for the branch and `ref = \"{tag}\"` for the tag",
            first.1
        );
        return Err(Unreachable::by("ref", text));
    }
    Ok(first)
}

/// A file of a commit.
struct Blob {
    id: String,
    size: u64,
    is_link: bool,
}

struct Git<'r> {
    repository: &'r Repository,
    folder: TempDir,
    /// The header that has the token.
    authorization: Option<String>,
    /// For ssh: the private key, and the host keys.
    key: Option<PathBuf>,
    known_hosts: PathBuf,
    deadline: Instant,
}

impl<'r> Git<'r> {
    fn new(repository: &'r Repository) -> Result<Self, Unreachable> {
        let folder = tempfile::Builder::new().prefix("dataplane-git-").tempdir();
        let folder = folder.map_err(|error| format!("no folder for the fetch: {error}"))?;
        std::fs::write(folder.path().join(".gitconfig"), SETTINGS)
            .map_err(|error| format!("git's settings: {error}"))?;
        let token = repository.token_file.as_ref().map(|file| {
            let token = secret::read(file).map_err(|text| Unreachable::by("token_file", text))?;
            let pair = format!("{TOKEN_USER}:{token}");
            Ok::<_, Unreachable>(format!("Authorization: Basic {}", base64::prelude::BASE64_STANDARD.encode(pair)))
        });
        let lend = |file: &Path, key| {
            let text = |error| format!("{}: {error}", file.display());
            lend(file, folder.path()).map_err(|error| Unreachable::by(key, text(error)))
        };
        let key = repository.ssh_key_file.as_deref().map(|file| lend(file, "ssh_key_file")).transpose()?;
        let known_hosts = repository.known_hosts_file.clone();
        let known_hosts = known_hosts.unwrap_or_else(|| repository.state_directory.join("known_hosts"));
        let known_hosts = lend(&known_hosts, "known_hosts_file")?;
        let deadline = Instant::now() + repository.timeout;
        Ok(Self { repository, folder, authorization: token.transpose()?, key, known_hosts, deadline })
    }

    /// The file of the configuration and what it includes.
    async fn files(&self, commit: &str) -> Result<BTreeMap<PathBuf, Vec<u8>>, Unreachable> {
        let listing = self.run(&["ls-tree", "-r", "-z", "-l", "--full-tree", commit], None).await?;
        let tree = parse_tree(&listing);
        let path = &self.repository.path;
        let mut files = self.read(&tree, BTreeSet::from([path.clone()])).await?;
        let Some(text) = files.get(path) else {
            return Err(Unreachable::by("path", format!("commit {commit} has no file {}", path.display())));
        };
        let folder = path.parent().unwrap_or(Path::new(""));
        let mut included = BTreeSet::new();
        for pattern in config::includes(&String::from_utf8_lossy(text)) {
            // A pattern that is none is told when the configuration is put together.
            // Both are somebody else's choice, and comparing them takes its time.
            let paths = tree.keys().map(|path| &**path).take_while(|_| Instant::now() < self.deadline);
            included.extend(matching(paths, folder, &pattern).unwrap_or_default());
            if Instant::now() >= self.deadline {
                return Err(self.late());
            }
            // Others are to be answered meanwhile.
            tokio::task::yield_now().await;
        }
        included.remove(path);
        files.append(&mut self.read(&tree, included).await?);
        Ok(files)
    }

    /// Those of the files that are there.
    async fn read(
        &self,
        tree: &BTreeMap<PathBuf, Blob>,
        paths: BTreeSet<PathBuf>,
    ) -> Result<BTreeMap<PathBuf, Vec<u8>>, Unreachable> {
        let wanted: Vec<_> = paths.into_iter().filter_map(|path| tree.get(&path).map(|blob| (path, blob))).collect();
        if let Some((path, _)) = wanted.iter().find(|(_, blob)| blob.is_link) {
            let text = format!("{} is a symbolic link: links of a commit are not followed", path.display());
            return Err(Unreachable::by("path", text));
        }
        if wanted.iter().map(|(_, blob)| blob.size).sum::<u64>() > self.repository.max_size {
            return Err(self.too_large());
        }
        let ids: String = wanted.iter().map(|(_, blob)| format!("{}\n", blob.id)).collect();
        let output = self.run(&["cat-file", "--batch"], Some(ids)).await?;
        let mut rest = &output[..];
        let mut files = BTreeMap::new();
        for (path, _) in wanted {
            let bytes =
                next_object(&mut rest).ok_or_else(|| "git cat-file gave something else than files".to_owned())?;
            files.insert(path, bytes.to_vec());
        }
        Ok(files)
    }

    fn late(&self) -> Unreachable {
        Unreachable::by("timeout", format!("not within `timeout`, {}", format_duration(self.repository.timeout)))
    }

    fn too_large(&self) -> Unreachable {
        Unreachable::by("max_size", format!("it is larger than `max_size`, {}", format_size(self.repository.max_size)))
    }

    async fn text(&self, arguments: &[&str]) -> Result<String, Unreachable> {
        let output = self.run(arguments, None).await?;
        Ok(String::from_utf8(output).map_err(|_| format!("git {} gave something else than text", arguments[0]))?)
    }

    /// Runs git to its end; what it wrote.
    async fn run(&self, arguments: &[&str], input: Option<String>) -> Result<Vec<u8>, Unreachable> {
        let mut child = self.command(arguments).spawn().map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => "the program git is not installed (`apt-get install git`)".to_owned(),
            _ => format!("git cannot be started: {error}"),
        })?;
        let group = Group::of(&child);
        let late = || self.late();
        let talk = timeout_at(self.deadline, self.talk(&mut child, input)).await.map_err(|_| late())?;
        let (output, message) = talk.map_err(|error| format!("git {}: {error}", arguments[0]))?;
        if output.len() as u64 > self.most_output() {
            return Err(self.too_large());
        }
        let status = timeout_at(self.deadline, child.wait()).await.map_err(|_| late())?;
        let status = status.map_err(|error| format!("git {}: {error}", arguments[0]))?;
        group.has_ended();
        if status.success() {
            return Ok(output);
        }
        // EFBIG, in the words of the C library in the locale C.
        if message.contains("File too large") {
            return Err(self.too_large());
        }
        let mut message = one_line(&message);
        if self.authorization.is_some() && message.contains("returned error: 30") {
            message += ": the server sends elsewhere, and the token goes nowhere else; write `git` as the URL where the repository is now (for GitLab: with .git at its end)";
        }
        Err(if message.is_empty() { format!("git {}: {status}", arguments[0]) } else { message }.into())
    }

    fn most_output(&self) -> u64 {
        // A listing, or the files with a line each.
        self.repository.max_size + (1 << 20)
    }

    async fn talk(&self, child: &mut Child, input: Option<String>) -> std::io::Result<(Vec<u8>, String)> {
        let (mut stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let say = async {
            if let (Some(stdin), Some(input)) = (&mut stdin, input) {
                // A child that has ended says why in its status.
                let _ = stdin.write_all(input.as_bytes()).await;
            }
            drop(stdin);
        };
        let hear = async {
            let mut bytes = Vec::new();
            stdout.expect("piped").take(self.most_output() + 1).read_to_end(&mut bytes).await.map(|_| bytes)
        };
        let complaints = async {
            let mut bytes = Vec::new();
            let mut stderr = stderr.expect("piped");
            (&mut stderr).take(MESSAGE).read_to_end(&mut bytes).await?;
            // A full pipe would stop it.
            tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await?;
            std::io::Result::Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let ((), output, message) = tokio::join!(say, hear, complaints);
        Ok((output?, message?))
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let home = self.folder.path();
        let mut command = Command::new("git");
        command.args(arguments).current_dir(home).env_clear();
        command.envs(PASSED_ON.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
        command
            .env("HOME", home)
            .env("LC_ALL", "C")
            .env("GIT_CONFIG_NOSYSTEM", "1")
            // The folder lies where others may write: no repository above it is one of ours, and
            // its settings may run programs.
            .env("GIT_CEILING_DIRECTORIES", home.parent().unwrap_or(home))
            .env("GIT_TERMINAL_PROMPT", "0")
            .env("GIT_ALLOW_PROTOCOL", "http:https:ssh:file")
            .env("GIT_PROTOCOL_FROM_USER", "0");
        if let Some(header) = &self.authorization {
            // In the environment: arguments can be read by every user of the machine. A header of
            // one's own goes wherever a redirect leads.
            command.env("GIT_CONFIG_COUNT", "2");
            command.env("GIT_CONFIG_KEY_0", "http.extraHeader").env("GIT_CONFIG_VALUE_0", header);
            command.env("GIT_CONFIG_KEY_1", "http.followRedirects").env("GIT_CONFIG_VALUE_1", "false");
        }
        if let Some(key) = &self.key {
            command.env("GIT_SSH_COMMAND", self.ssh(key)).env("GIT_SSH_VARIANT", "ssh");
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        // Of its own, for it has children; without our privileges, and with a limit for the pack
        // that it writes.
        command.process_group(0);
        sys::confine(command.as_std_mut(), self.repository.max_size);
        command
    }

    /// Paths were checked to need no other quotes than these.
    fn ssh(&self, key: &Path) -> OsString {
        let strict = if self.repository.known_hosts_file.is_some() { "yes" } else { "accept-new" };
        let known = &self.known_hosts;
        let mut command = String::from("ssh -F none -o BatchMode=yes -o IdentitiesOnly=yes -o IdentityAgent=none");
        let _ = write!(command, " -o ConnectTimeout=10 -o StrictHostKeyChecking={strict}");
        let _ = write!(command, " -o 'UserKnownHostsFile=\"{}\"' -i '{}'", known.display(), key.display());
        command.into()
    }
}

/// A file as a child can read it that has none of our capabilities: what root alone could read of
/// another user's is copied, for one fetch. It is never written back.
fn lend(file: &Path, folder: &Path) -> std::io::Result<PathBuf> {
    use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

    let of_another = || std::fs::metadata(file).is_ok_and(|metadata| metadata.uid() != 0);
    let (true, true, Some(name)) = (rustix::process::geteuid().is_root(), of_another(), file.file_name()) else {
        return Ok(file.into());
    };
    let copy = folder.join(name);
    let mut to = std::fs::File::options().write(true).create_new(true).mode(0o600).open(&copy)?;
    std::io::copy(&mut std::fs::File::open(file)?, &mut to)?;
    Ok(copy)
}

/// The processes of one command; ended with it when nobody waits any more.
struct Group(Option<Pid>);

impl Group {
    fn of(child: &Child) -> Self {
        Self(child.id().and_then(|id| Pid::from_raw(id as i32)))
    }

    fn has_ended(mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

/// `MODE blob ID SIZE<tab>PATH<nul>`, git-ls-tree(1) with `-z -l`; submodules are left out.
fn parse_tree(listing: &[u8]) -> BTreeMap<PathBuf, Blob> {
    let entry = |line: &[u8]| {
        let line = std::str::from_utf8(line).ok()?;
        let (head, path) = line.split_once('\t')?;
        let mut fields = head.split_ascii_whitespace();
        let (mode, kind, id, size) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        let blob = Blob { id: id.to_owned(), size: size.parse().ok()?, is_link: mode == "120000" };
        (kind == "blob").then(|| (PathBuf::from(path), blob))
    };
    listing.split(|byte| *byte == 0).filter_map(entry).collect()
}

/// `ID blob SIZE<newline>BYTES<newline>`, git-cat-file(1) with `--batch`.
fn next_object<'o>(rest: &mut &'o [u8]) -> Option<&'o [u8]> {
    let end = rest.iter().position(|byte| *byte == b'\n')?;
    let head = std::str::from_utf8(&rest[..end]).ok()?;
    let size: usize = head.strip_suffix('\r').unwrap_or(head).rsplit(' ').next()?.parse().ok()?;
    let bytes = rest.get(end + 1..end + 1 + size)?;
    *rest = rest.get(end + 2 + size..)?;
    Some(bytes)
}

/// A message of git, or of the server, for the log.
fn one_line(message: &str) -> String {
    let lines = message.lines().map(str::trim).filter(|line| !line.is_empty());
    let text = lines.collect::<Vec<_>>().join("; ");
    text.chars().filter(|c| !c.is_control()).take(500).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_branch_or_a_tag_and_nothing_that_ends_in_it() {
        let find = |reference: &str, lines: &[(&str, &str)]| {
            let listing: String = lines.iter().map(|(id, name)| format!("{id}\t{name}\n")).collect();
            resolve(reference, &candidates(reference), &listing)
        };
        let (branch, tag) = (("aa", "refs/heads/main"), ("bb", "refs/tags/main"));
        let is = |found: &str, (id, name): (&str, &str)| {
            assert_eq!(find(found, &[(id, name)]), Ok((format!("{id}\t{name}"), name.to_owned())));
        };
        is("main", branch);
        is("main", tag);
        is("HEAD", ("aa", "HEAD"));
        is("refs/tags/main", tag);
        let Unreachable { key, text } = find("main", &[branch, tag]).unwrap_err();
        assert!(key == "ref" && text.contains("refs/heads/main") && text.contains("refs/tags/main"), "{text}");
        assert_eq!(find("refs/heads/main", &[branch, tag]).unwrap().1, "refs/heads/main");
        for other in ["refs/heads/x/main", "refs/x/refs/heads/main", "refs/remotes/main", "refs/tags/main^{}", "main"] {
            assert!(find("main", &[("aa", other)]).is_err(), "{other}");
        }
        assert!(find("HEAD", &[("aa", "refs/tags/HEAD"), ("aa", "refs/heads/HEAD")]).is_err());
    }

    #[test]
    fn a_tree_lists_files_and_knows_links() {
        let tree = parse_tree(
            b"100644 blob aa      12\troutes.d/a b.toml\x00120000 blob bb       5\tlink\x00160000 commit cc       -\tmodule\x00",
        );
        assert_eq!(tree.len(), 2);
        assert_eq!(tree[Path::new("routes.d/a b.toml")].size, 12);
        assert!(tree[Path::new("link")].is_link && !tree[Path::new("routes.d/a b.toml")].is_link);
    }

    #[test]
    fn objects_are_cut_by_their_size_whatever_they_hold() {
        let mut rest = &b"aa blob 4\na\nb\n\nbb blob 0\n\ncc missing\n"[..];
        assert_eq!(next_object(&mut rest), Some(&b"a\nb\n"[..]));
        assert_eq!(next_object(&mut rest), Some(&b""[..]));
        assert_eq!(next_object(&mut rest), None);
        for cut in 0..12 {
            assert_eq!(next_object(&mut &b"aa blob 4\na\nb"[..cut]), None);
        }
    }

    #[test]
    fn what_a_server_says_stays_on_one_line() {
        assert_eq!(one_line("remote: no\x1b[2J\n\nfatal: x\n"), "remote: no[2J; fatal: x");
    }
}
