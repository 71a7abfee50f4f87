//! `[source]`: the repository that holds the configuration of all entrance nodes, and how this node
//! reaches it.

use std::net::Ipv6Addr;
use std::ops::RangeInclusive;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use crate::config::fence::Fence;
use crate::config::reader::{Field, Reader, Section, quoted};
use crate::config::values::{Refused, parse_bind, refuse};
use crate::config::{Bind, keys};

const INTERVAL: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(24 * 3600);
const TIMEOUT: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(3600);
const MAX_SIZE: RangeInclusive<u64> = 4 << 10..=4 << 30;

/// `[source]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repository {
    /// URL or path, as git takes it. There is nothing secret in it.
    pub git: String,
    /// Branch or tag; `HEAD`: the one that the repository prefers.
    pub reference: String,
    /// The file in the repository.
    pub path: PathBuf,
    /// How often to look, give or take a tenth.
    pub interval: Duration,
    /// Holds a token for HTTP.
    pub token_file: Option<PathBuf>,
    /// Holds the private key for ssh.
    pub ssh_key_file: Option<PathBuf>,
    /// Host keys that ssh accepts. `None`: the one that the host shows first, ever after.
    pub known_hosts_file: Option<PathBuf>,
    /// How long a fetch may take.
    pub timeout: Duration,
    /// Bytes of a fetch, packed and unpacked.
    pub max_size: u64,
    /// Where the last good commit is kept.
    pub state_directory: PathBuf,
    /// Where pushes are announced.
    pub webhook: Option<Webhook>,
    /// What it may decide.
    pub fence: Fence,
}

impl Repository {
    /// For people: without a password.
    pub fn shown(&self) -> String {
        crate::config::redacted(&self.git)
    }
}

/// `webhook = { … }`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Webhook {
    /// Where `POST /hook` is served.
    pub bind: Bind,
    /// Holds the secret that the forge signs with.
    pub secret_file: PathBuf,
}

pub(super) fn read(reader: &mut Reader, field: Field<'_>) -> Option<Repository> {
    let section = reader.section(field, "[source]".into(), keys::SOURCE)?;
    let Some(git) = section.get("git") else {
        reader.missing(&section, "git", "\"https://git.example.com/me/entrance.git\"");
        return None;
    };
    let span = git.span();
    let text = reader.string(git, "a URL or a path", "\"https://git.example.com/me/entrance.git\"")?;
    let transport = reader.accept(span.clone(), transport(text))?;
    let git = text.to_owned();

    let reference = section.get("ref").and_then(|field| {
        let text = reader.string(field, "a branch or a tag", "\"main\"")?;
        reader.accept(field.span(), reference(text))
    });
    let path = section.get("path").and_then(|field| {
        let text = reader.string(field, "the path of a file in the repository", "\"dataplane.toml\"")?;
        reader.accept(field.span(), inside(text))
    });
    let interval = section.get("interval").and_then(|field| reader.duration(field, &INTERVAL));
    let timeout = section.get("timeout").and_then(|field| reader.duration(field, &TIMEOUT));
    let max_size = section.get("max_size").and_then(|field| reader.size(field, &MAX_SIZE));
    let token_file = absolute(reader, &section, "token_file");
    let ssh_key_file = absolute(reader, &section, "ssh_key_file");
    let known_hosts_file = absolute(reader, &section, "known_hosts_file");
    for (key, wanted, scheme) in [
        ("token_file", Transport::Http, "http:// and https://"),
        ("ssh_key_file", Transport::Ssh, "ssh://"),
        ("known_hosts_file", Transport::Ssh, "ssh://"),
    ] {
        if let (Some(field), true) = (section.get(key), transport != wanted) {
            let message = format!("`{key}` is for {scheme} alone");
            reader.error(field.span(), message, "remove it, or write `git` as a URL of that kind");
        }
    }
    if transport == Transport::Ssh && section.get("ssh_key_file").is_none() {
        reader.missing(&section, "ssh_key_file", "\"/etc/dataplane/deploy_key\"");
    }
    if let (Some(field), true, Some(file)) = (section.get("token_file"), text.starts_with("http://"), &token_file) {
        let message =
            format!("the token of {} would go over http:// as it is: anybody on the way could read it", file.display());
        reader.error(field.span(), message, "write `git` as an https:// URL, or remove `token_file`");
    }
    let state_directory = absolute(reader, &section, "state_directory");
    let webhook = section.get("webhook").and_then(|field| webhook(reader, field));
    Some(Repository {
        git,
        reference: reference.unwrap_or_else(|| "HEAD".into()),
        path: path.unwrap_or_else(|| "dataplane.toml".into()),
        interval: interval.unwrap_or(Duration::from_secs(60)),
        token_file,
        ssh_key_file,
        known_hosts_file,
        timeout: timeout.unwrap_or(Duration::from_secs(30)),
        max_size: max_size.unwrap_or(16 << 20),
        state_directory: state_directory.unwrap_or_else(|| "/var/lib/dataplane".into()),
        webhook,
        fence: Fence::read(reader, &section),
    })
}

fn webhook(reader: &mut Reader, field: Field<'_>) -> Option<Webhook> {
    let section = reader.section(field, "`webhook`".into(), keys::WEBHOOK)?;
    let secret_file = absolute(reader, &section, "secret_file");
    if section.get("secret_file").is_none() {
        reader.missing(&section, "secret_file", "\"/etc/dataplane/webhook_secret\"");
    }
    let Some(field) = section.get("bind") else {
        reader.missing(&section, "bind", "\"127.0.0.1:9080\"");
        return None;
    };
    let text = reader.string(field, "an address", "\"127.0.0.1:9080\"")?;
    let addr = reader.accept(field.span(), parse_bind(text))?;
    Some(Webhook { bind: Bind { addr, span: field.span() }, secret_file: secret_file? })
}

/// A path on this machine.
fn absolute(reader: &mut Reader, section: &Section<'_>, key: &str) -> Option<PathBuf> {
    let field = section.get(key)?;
    let text = reader.string(field, "a path", "\"/etc/dataplane/…\"")?;
    // ssh reads its options line by line, and `%` and `"` as its own.
    if !text.starts_with('/') || text.contains(|c: char| c.is_control() || matches!(c, '"' | '\'' | '%' | '\\')) {
        let message = format!("{} is not an absolute path without quotes, backslashes and `%`", quoted(text));
        reader.error(field.span(), message, "write a path from the root: \"/etc/dataplane/…\"");
        return None;
    }
    Some(PathBuf::from(text))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Transport {
    Http,
    Ssh,
    File,
}

/// What git would do with the text. Forms that run programs or send nothing but clear text are not
/// among them, nor is anything that may hold a secret: what passes is shown in log and `status`. No
/// message quotes what does not.
fn transport(text: &str) -> Result<Transport, Refused> {
    const FORMS: &str = "write \"https://HOST/PATH\", \"ssh://git@HOST/PATH\" or an absolute path";
    const TOKEN: &str = "write the token into a file, and the file as `token_file`";
    let no_form = |what: &str| refuse(format!("`git` {what}"), FORMS);
    if text.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return refuse("`git` has blanks or control characters in it", format!("{FORMS}; a token: {TOKEN}"));
    }
    let (transport, rest) = match text.split_once("://") {
        Some(("http" | "https", rest)) => (Transport::Http, rest),
        Some(("ssh", rest)) => (Transport::Ssh, rest),
        Some(("file", rest)) => (Transport::File, rest),
        None if text.starts_with('/') => return Ok(Transport::File),
        None if scp_like(text) => return Ok(Transport::Ssh),
        _ => return no_form("is not a repository that this reaches"),
    };
    let authority = rest.split('/').next().unwrap_or_default();
    let (user, host) = authority.rsplit_once('@').map_or((None, authority), |(user, host)| (Some(user), host));
    if rest.is_empty() || rest.starts_with('-') || user.is_some_and(|user| user.starts_with('-')) {
        return no_form("names no repository");
    }
    // A name or a token may have a slash in it.
    if transport == Transport::Http && (rest.contains('@') || authority.contains("%40")) {
        return refuse("`git` has a name or a password in it", TOKEN);
    }
    if user.is_some_and(|user| user.is_empty() || !user.chars().all(is_of_name)) {
        let remedy = "write the key into a file, and the file as `ssh_key_file`";
        return refuse("`git` has more than a user's name before the `@`", remedy);
    }
    if rest.contains(['?', '#']) {
        let remedy = format!("leave out `?` or `#` and what comes after it; {TOKEN}");
        return refuse("`git` has a query or a fragment in it", remedy);
    }
    if transport != Transport::File && !is_host(host) {
        return no_form("does not name a host, or the colon after it is not followed by the number of a port");
    }
    Ok(transport)
}

/// `git.example.com`, `[2001:db8::1]`, with a port or without.
fn is_host(text: &str) -> bool {
    let (is_name, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((ip, "")) => (ip.parse::<Ipv6Addr>().is_ok(), None),
        Some((ip, port)) => (ip.parse::<Ipv6Addr>().is_ok(), Some(port.strip_prefix(':').unwrap_or_default())),
        None => {
            let (name, port) = text.split_once(':').map_or((text, None), |(name, port)| (name, Some(port)));
            // Also a name that is not ASCII; never an option of a program.
            (
                !name.is_empty()
                    && !name.starts_with('-')
                    && name.chars().all(|c| is_of_name(c) || c.is_alphanumeric()),
                port,
            )
        }
    };
    let is_port =
        |port: &str| port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0);
    is_name && port.is_none_or(is_port)
}

fn is_of_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')
}

/// `git@host:path`
fn scp_like(text: &str) -> bool {
    let Some((host, path)) = text.split_once(':') else { return false };
    let name = |part: &str| !part.is_empty() && !part.starts_with('-') && part.chars().all(is_of_name);
    host.split_once('@').is_some_and(|(user, host)| name(user) && name(host))
        && !path.is_empty()
        && !path.starts_with(':')
}

/// A name that git takes for a branch or a tag, and for nothing else (git-check-ref-format(1)).
fn reference(text: &str) -> Result<String, Refused> {
    let bad = |c: char| c.is_whitespace() || c.is_control() || "~^:?*[\\+@{".contains(c);
    let parts = || text.split('/');
    if text.is_empty()
        || text.starts_with('-')
        || text.contains(bad)
        || text.contains("..")
        || parts().any(|part| {
            part.is_empty() || part.starts_with('.') || Path::new(part).extension().is_some_and(|end| end == "lock")
        })
    {
        return refuse(format!("{} is not the name of a branch or a tag", quoted(text)), "write its name: \"main\"");
    }
    Ok(text.to_owned())
}

/// A path that stays where it begins.
fn inside(text: &str) -> Result<PathBuf, Refused> {
    let path = Path::new(text);
    if text.is_empty() || text.ends_with('/') || !path.components().all(|c| matches!(c, Component::Normal(_))) {
        return refuse(
            format!("{} is not the path of a file in the repository", quoted(text)),
            "write it from the top of the repository, without a slash in front: \"dataplane.toml\"",
        );
    }
    Ok(path.components().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repository_is_reached_by_http_ssh_or_path_and_by_nothing_that_runs_a_program() {
        for text in [
            "https://git.example.com/me/entrance.git",
            "http://127.0.0.1:8080/entrance.git",
            "https://[2001:db8::1]:8443/~me/a%20b.git",
            "https://gît.example/x",
            "ssh://git@git.example.com:2222/me/entrance.git",
            "git@git.example.com:me/entrance.git",
            "file:///srv/entrance.git",
            "/srv/entrance.git",
        ] {
            assert!(transport(text).is_ok(), "{text}");
        }
        for text in [
            "",
            "entrance.git",
            "-oProxyCommand=x",
            "ext::sh -c x",
            "ext::x",
            "git://git.example.com/x",
            "ssh://-oProxyCommand=x/y",
            "ssh://-l@host/y",
            "-x@host:y",
            "a@-x:y",
            "https://",
            "https://user:secret@git.example.com/x",
            "https://token@git.example.com/x",
            "https://git.example.com/a b",
            "https://:443/x",
            "ssh://git@-x/y",
            "https://[2001:db8::1]443/x",
            "https://git.example.com:0/x",
        ] {
            assert!(transport(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_may_be_secret_is_refused_with_a_remedy_and_never_quoted() {
        for text in [
            "https://me:hun s3cret@h/x.git",
            "https://me:s3cret\n@h/x.git",
            "https://me:s3cret@h/x.git",
            "https://me:s3/cret@h/x.git",
            "https://s3/cret@h/x.git",
            "https://s3cret@h/x.git",
            "https://s3cret%40h/x.git",
            "https://me:s3cret%40h/x.git",
            "https://h/x.git?private_token=s3cret",
            "https://h/x.git#s3cret",
            "ssh://git:s3cret@h/x.git",
            "ssh://git:s3cret%40h/x.git",
            "ssh://git@h:s3cret/x.git",
            "ssh://git@h/x.git?s3cret",
            "file:///srv/x.git?s3cret",
            "https://h:s3cret/x.git",
            "me:s3cret@h:x.git",
            "me:s3cret%40h:x.git",
        ] {
            let Err(Refused { message, remedy }) = transport(text) else { panic!("{text}") };
            assert!(message.starts_with("`git` ") && !message.contains("cret"), "{text}: {message}");
            assert!(!remedy.is_empty() && !remedy.contains("s3cret"), "{text}: {remedy}");
            let from_url = text.starts_with("https://") && !text.contains(":s3cret/") && !text.contains("s3cret%");
            assert!(!from_url || remedy.contains("token_file"), "{text}: {remedy}");
        }
    }

    #[test]
    fn a_ref_is_a_name_and_never_an_option_or_a_range() {
        for text in ["main", "HEAD", "release/v1", "refs/heads/main", "v1.2"] {
            assert!(reference(text).is_ok(), "{text}");
        }
        for text in
            ["", "-x", "--upload-pack=x", "a..b", "a:b", "+main", "a b", "a^", "a~1", "/a", "a//b", "a@{1}", "x.lock"]
        {
            assert!(reference(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_path_stays_in_the_repository() {
        assert_eq!(inside("entrance/dataplane.toml").unwrap(), Path::new("entrance/dataplane.toml"));
        for text in ["", "/etc/passwd", "../x", "a/../../x", "./x", "a/"] {
            assert!(inside(text).is_err(), "{text}");
        }
    }
}
