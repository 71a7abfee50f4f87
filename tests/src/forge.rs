//! A forge: a bare repository on a host, served by git's own http-backend behind lighttpd, which
//! nginx serves as https, and by OpenSSH's sshd, and a clone to push from.
//!
//! A push tells the webhooks of it, signed as forges sign, from git's post-receive hook.

use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use crate::netns::{CLUSTER, ENTRANCE, ENTRANCE_INSIDE, Host, Net, Process};
use crate::peers::Peer;
use crate::{eventually, target_dir};

/// What HTTP asks for; the user is anyone.
pub const TOKEN: &str = "s3cret-token";
/// What webhooks are signed with.
pub const SECRET: &str = "It's a Secret to Everybody";
/// Where lighttpd, nginx and sshd listen.
pub const HTTP_PORT: u16 = 8080;
/// See [`HTTP_PORT`].
pub const HTTPS_PORT: u16 = 8443;
/// See [`HTTP_PORT`].
pub const SSH_PORT: u16 = 2222;

/// See the module. The servers end when it is dropped.
pub struct Forge {
    dir: PathBuf,
    host: Host,
    http: Option<Process>,
    _https: Peer,
    _sshd: Process,
}

impl Forge {
    /// Starts it on a host, with an empty repository.
    #[track_caller]
    pub fn start(net: &Net, host: &Host) -> Self {
        let dir = net.dir().join("forge");
        std::fs::create_dir(&dir).expect("one forge for a test");
        std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o755)).expect("chmod");
        let (tls, sshd) = (serve_tls(net, host, &dir), start_sshd(host, &dir));
        let forge = Self { http: None, _https: tls, _sshd: sshd, dir, host: host.clone() };
        git(Command::new("git").args(["init", "--quiet", "--bare", "--initial-branch=main"]).arg(forge.repository()));
        git(Command::new("git").args(["init", "--quiet", "--initial-branch=main"]).arg(forge.clone_dir()));
        let mut forge = forge;
        forge.serve();
        forge
    }

    /// The bare repository.
    pub fn repository(&self) -> PathBuf {
        self.dir.join("git/entrance.git")
    }

    fn clone_dir(&self) -> PathBuf {
        self.dir.join("clone")
    }

    /// The private key that sshd lets in.
    pub fn key(&self) -> PathBuf {
        self.dir.join("key")
    }

    /// A file with [`TOKEN`], as `token_file` wants it.
    pub fn token_file(&self) -> PathBuf {
        let file = self.dir.join("token");
        std::fs::write(&file, format!("{TOKEN}\n")).expect("written");
        file
    }

    /// A file with [`SECRET`], as `secret_file` wants it.
    pub fn secret_file(&self) -> PathBuf {
        let file = self.dir.join("secret");
        std::fs::write(&file, format!("{SECRET}\n")).expect("written");
        file
    }

    /// The lines of `[source]` that lead to it by https, with its token.
    pub fn by_https(&self, address: &str) -> String {
        let token = self.token_file();
        format!("git = \"https://{address}:{HTTPS_PORT}/git/entrance.git\"\ntoken_file = \"{}\"\n", token.display())
    }

    /// Starts the web server.
    #[track_caller]
    pub fn serve(&mut self) {
        let d = self.dir.display();
        let users = self.dir.join("users");
        std::fs::write(&users, format!("x-access-token:{TOKEN}\n")).expect("written");
        let config = format!(
            "server.modules = (\"mod_alias\", \"mod_setenv\", \"mod_auth\", \"mod_authn_file\", \"mod_cgi\")\n\
             server.document-root = \"{d}\"\nserver.port = {HTTP_PORT}\nserver.errorlog = \"{d}/http.log\"\n\
             auth.backend = \"plain\"\nauth.backend.plain.userfile = \"{}\"\n\
             auth.require = (\"/\" => (\"method\" => \"basic\", \"realm\" => \"git\", \"require\" => \"valid-user\"))\n\
             alias.url = (\"/git\" => \"/usr/lib/git-core/git-http-backend\")\n\
             cgi.assign = (\"\" => \"\")\n\
             setenv.set-environment = (\"GIT_PROJECT_ROOT\" => \"{d}/git\", \"GIT_HTTP_EXPORT_ALL\" => \"1\")\n",
            users.display()
        );
        let file = self.dir.join("lighttpd.conf");
        std::fs::write(&file, config).expect("written");
        let (lighttpd, root) = program("lighttpd");
        let mut command = Command::new(lighttpd);
        command.arg("-D").arg("-f").arg(&file).arg("-m").arg(root.join("usr/lib/lighttpd"));
        self.http = Some(listening(&self.host, &mut command, HTTP_PORT, &self.dir.join("http.out")));
    }

    /// Stops the web server.
    pub fn go_away(&mut self) {
        self.http = None;
    }

    /// Has pushes tell these URLs.
    pub fn announce(&self, urls: &[String]) {
        let mut hook = String::from("#!/bin/sh\nbody=$(cat)\n");
        let secret = self.secret_file();
        let _ = writeln!(hook, "key=$(cat '{}')", secret.display());
        hook += "signature=$(printf %s \"$body\" | openssl dgst -sha256 -hmac \"$key\" | sed 's/.* //')\n";
        for url in urls {
            let _ = writeln!(
                hook,
                "curl --silent --show-error --fail --max-time 20 --noproxy '*' -H \"X-Hub-Signature-256: sha256=$signature\" \
                 --data-binary \"$body\" '{url}' >&2 || echo 'the webhook was refused' >&2"
            );
        }
        self.hook("post-receive", &hook);
    }

    /// Has pushes checked by the hook that the project ships.
    pub fn guard(&self, dataplane: &Path) {
        self.guard_for(dataplane, Path::new(""));
    }

    /// The same, with the lists of what is allowed in this file of a node.
    pub fn guard_for(&self, dataplane: &Path, node: &Path) {
        let hook = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dist/git/pre-receive");
        let text = std::fs::read_to_string(hook).expect("it is shipped");
        let text = text.replace(":-dataplane}", &format!(":-{}}}", dataplane.display()));
        self.hook("pre-receive", &text.replace("NODE:-}", &format!("NODE:-{}}}", node.display())));
    }

    fn hook(&self, name: &str, text: &str) {
        let file = self.repository().join("hooks").join(name);
        std::fs::create_dir_all(file.parent().expect("a folder")).expect("made");
        std::fs::write(&file, text).expect("written");
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o755)).expect("chmod");
    }

    /// Commits these files and pushes; the commit's id.
    #[track_caller]
    pub fn push(&self, files: &[(&str, &str)]) -> String {
        self.try_push(files).unwrap_or_else(|said| panic!("the push was refused: {said}"))
    }

    /// As [`push`](Self::push); or what the repository said.
    #[track_caller]
    pub fn try_push(&self, files: &[(&str, &str)]) -> Result<String, String> {
        let clone = self.clone_dir();
        for (name, text) in files {
            let path = clone.join(name);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            std::fs::write(path, text).expect("written");
        }
        let run = |arguments: &[&str]| {
            let mut command = Command::new("git");
            command.args(["-c", "user.name=owner", "-c", "user.email=owner@example.com"]).args(arguments);
            self.host.run(|| run_git(command.current_dir(&clone)))
        };
        run(&["add", "--all"])?;
        run(&["commit", "--quiet", "--allow-empty", "--message", "A change"])?;
        let out = run(&["push", "--quiet", &self.repository().to_string_lossy(), "main"])?;
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(!said.contains("the webhook was refused"), "{said}");
        Ok(String::from_utf8_lossy(&run(&["rev-parse", "HEAD"])?.stdout).trim().to_owned())
    }
}

/// The HMAC-SHA256 by which a webhook's body is signed, in hex.
pub fn signature(secret: &str, body: &str) -> String {
    let mut command = Command::new("sh");
    command.args(["-c", "printf %s \"$2\" | openssl dgst -sha256 -hmac \"$1\" | sed 's/.* //'", "sh", secret, body]);
    String::from_utf8_lossy(&command.output().expect("openssl is needed").stdout).trim().to_owned()
}

#[track_caller]
fn git(command: &mut Command) -> Output {
    run_git(command).unwrap_or_else(|said| panic!("{command:?}: {said}"))
}

/// What it said when it failed.
#[track_caller]
fn run_git(command: &mut Command) -> Result<Output, String> {
    for variable in ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"] {
        command.env_remove(variable);
    }
    let out = command.stdin(Stdio::null()).output().expect("git is needed: apt-get install git");
    if out.status.success() { Ok(out) } else { Err(String::from_utf8_lossy(&out.stderr).into_owned()) }
}

/// A server program of Debian, and the folder that its package lies below: installed, or unpacked
/// by `cargo xtask test`.
#[track_caller]
fn program(name: &str) -> (PathBuf, PathBuf) {
    let roots = [PathBuf::from("/"), target_dir().join("tools/debian")];
    let found = roots.into_iter().map(|root| (root.join("usr/sbin").join(name), root)).find(|(file, _)| file.exists());
    found.unwrap_or_else(|| panic!("{name} is needed: `cargo xtask test` brings it"))
}

/// sshd for one user, who is root by another name. It wants a user of its own and one to let in, so
/// it sees another list of users than this machine has.
#[track_caller]
fn start_sshd(host: &Host, dir: &Path) -> Process {
    for key in ["host_key", "key"] {
        let mut command = Command::new("ssh-keygen");
        command.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(dir.join(key));
        let out = command.output().expect("ssh-keygen is needed: apt-get install openssh-client");
        assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    }
    let d = dir.display();
    let write = |name: &str, text: &str| {
        std::fs::write(dir.join(name), text).expect("written");
        dir.join(name)
    };
    write("authorized_keys", &std::fs::read_to_string(dir.join("key.pub")).expect("made above"));
    let config = write(
        "sshd_config",
        &format!(
            "Port {SSH_PORT}\nHostKey {d}/host_key\nAuthorizedKeysFile {d}/authorized_keys\nPidFile none\n\
             StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\n"
        ),
    );
    let users = write(
        "passwd",
        "root:*:0:0:root:/root:/bin/sh\ngit:*:0:0::/tmp:/bin/sh\nsshd:*:65533:65534::/run/sshd:/usr/sbin/nologin\n",
    );
    let (sshd, root) = program("sshd");
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-c"])
        .arg("mount --bind \"$1\" /etc/passwd && mkdir -p -m 755 /run/sshd && exec \"$2\" -D -e -f \"$3\"")
        .arg("sh")
        .args([&users, &sshd, &config])
        // libwrap lies beside it.
        .env("LD_LIBRARY_PATH", root.join("usr/lib/x86_64-linux-gnu"));
    listening(host, &mut command, SSH_PORT, &dir.join("sshd.log"))
}

/// Starts a server and waits until it listens.
#[track_caller]
fn listening(host: &Host, command: &mut Command, port: u16, log: &Path) -> Process {
    let out = std::fs::File::create(log).expect("a log file");
    command.stdin(Stdio::null()).stdout(out.try_clone().expect("dup")).stderr(out);
    let mut process = host.spawn(command).unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let filter = format!("sport = :{port}");
    eventually(Duration::from_secs(20), "the server listens", || {
        let ended = process.child().try_wait().expect("it is our child");
        assert!(ended.is_none(), "{command:?}: {}", std::fs::read_to_string(log).unwrap_or_default());
        (!host.output(Command::new("ss").args(["-ltnH", &filter])).is_empty()).then_some(())
    });
    process
}

/// What a forge's certificate is signed with, for whoever runs git below the test's folder.
pub fn authority(dir: &Path) -> PathBuf {
    dir.join("forge.pem")
}

fn serve_tls(net: &Net, host: &Host, dir: &Path) -> Peer {
    let (key, certificate) = (dir.join("tls.key"), authority(net.dir()));
    let addresses = [ENTRANCE[0], ENTRANCE_INSIDE[0], CLUSTER[0]].map(|address| format!("IP:{address}")).join(",");
    let out = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=forge", "-addext", &format!("subjectAltName={addresses}"), "-keyout"])
        .arg(&key)
        .arg("-out")
        .arg(&certificate)
        .output()
        .expect("openssl makes the certificate: apt-get install openssl");
    assert!(out.status.success(), "openssl: {}", String::from_utf8_lossy(&out.stderr));
    let (key, certificate) = (key.display(), certificate.display());
    Peer::nginx(
        net,
        host,
        &format!(
            "http {{ server {{ listen {HTTPS_PORT} ssl; ssl_certificate {certificate}; ssl_certificate_key {key}; \
             client_max_body_size 64m; location / {{ proxy_pass http://127.0.0.1:{HTTP_PORT}; }} }} }}"
        ),
    )
}
