//! The program that this process runs, and the one that a successor would run.

use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};

use super::{Channel, Message};
use crate::systemd;

/// Tells a successor that its standard input is the channel to its predecessor.
const SUCCESSOR: &str = "DATAPLANE_SUCCESSOR";

/// The hidden command that starts a successor.
pub const LAUNCH: &str = "launch";

/// For a program to print its version.
const PATIENCE: Duration = Duration::from_secs(3);

/// How this process was started.
#[derive(Debug)]
pub struct Program {
    path: PathBuf,
    identity: Option<Identity>,
    arguments: Vec<OsString>,
}

/// What tells one file from another that has taken its place.
#[derive(Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl From<Metadata> for Identity {
    fn from(of: Metadata) -> Self {
        Self { device: of.dev(), inode: of.ino(), size: of.size(), modified: (of.mtime(), of.mtime_nsec()) }
    }
}

impl Program {
    /// Of this process; to be asked when it has just started.
    pub fn of_this_process() -> Self {
        Self {
            path: std::env::current_exe().unwrap_or_else(|_| "/proc/self/exe".into()),
            identity: fs::metadata("/proc/self/exe").ok().map(Into::into),
            arguments: std::env::args_os().skip(1).collect(),
        }
    }

    /// Where it lay.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether another program lies there by now.
    pub fn is_another(&self) -> bool {
        let there = fs::metadata(&self.path).ok().map(Identity::from);
        there.is_some() && self.identity.is_some() && there != self.identity
    }

    /// Starts a successor from this program, as this process was started, with one end of the
    /// channel.
    ///
    /// # Errors
    /// It cannot be run, or others than root and this process's user could have written it: whoever
    /// may use the control socket must not come to more rights by that.
    pub fn start_successor(&self, program: &Path, far: OwnedFd, channel: &Channel) -> Result<Successor> {
        admit(program)?;
        if !systemd::is_told() {
            let child = successor(program, &self.arguments).stdin(far).spawn();
            return Ok(Successor::Child(child.with_context(|| format!("{} cannot be run", program.display()))?));
        }
        // systemd does not wait for the end of a main process that is not its own child: so this
        // process's child starts the successor, and ends.
        let launched =
            Command::new("/proc/self/exe").arg(LAUNCH).arg(program).args(&self.arguments).stdin(far).status();
        launched.context("this program cannot be run again")?;
        match channel.receive(PATIENCE)?.0 {
            Message::Launched(pid) => {
                let pid = Pid::from_raw(pid).context("no process id")?;
                Ok(Successor::Launched(pid, pidfd_open(pid, PidfdFlags::empty())?))
            }
            other => bail!("{other:?} out of turn"),
        }
    }

    /// Whether the program that lies where this one lay can be run at all: it is asked for its
    /// version.
    pub fn can_run(&self) -> Result<()> {
        let null = std::process::Stdio::null;
        let mut child =
            Command::new(&self.path).arg("--version").stdin(null()).stdout(null()).stderr(null()).spawn()?;
        let start = Instant::now();
        loop {
            match child.try_wait()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => bail!("`{} --version` failed: {status}", self.path.display()),
                None if start.elapsed() > PATIENCE => {
                    let _ = child.kill();
                    let _ = child.wait();
                    bail!("`{} --version` does not end", self.path.display())
                }
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }
}

/// A process that is to take over; killed when dropped, unless it is [left](Self::leave) in charge.
#[derive(Debug)]
pub enum Successor {
    Child(Child),
    /// Started by a child that has ended.
    Launched(Pid, OwnedFd),
}

impl Successor {
    pub fn pid(&self) -> u32 {
        match self {
            Self::Child(child) => child.id(),
            Self::Launched(pid, _) => pid.as_raw_pid() as u32,
        }
    }

    /// It goes on without this process.
    pub fn leave(self) {
        std::mem::forget(self);
    }

    pub fn send(&self, signal: Signal) {
        let _ = match self {
            Self::Child(child) => Pid::from_raw(child.id() as i32).map_or(Ok(()), |pid| kill_process(pid, signal)),
            Self::Launched(_, pidfd) => pidfd_send_signal(pidfd, signal),
        };
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        self.send(Signal::KILL);
        if let Self::Child(child) = self {
            let _ = child.wait();
        }
    }
}

fn successor(program: &Path, arguments: &[OsString]) -> Command {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env(SUCCESSOR, "1")
        // They name this process, or what it has taken already (sd_watchdog_enabled(3),
        // sd_listen_fds(3)).
        .env_remove("WATCHDOG_PID")
        .env_remove("LISTEN_PID")
        .env_remove("LISTEN_FDS")
        .env_remove("LISTEN_FDNAMES");
    command
}

/// Starts a successor on behalf of the process that has started this one, and tells it by standard
/// input, which is the channel.
pub fn launch(program: &Path, arguments: &[OsString]) -> Result<()> {
    let channel = Channel::new(rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?);
    match successor(program, arguments).spawn() {
        Ok(child) => channel.send(&Message::Launched(child.id() as i32)),
        Err(error) => {
            channel.fail(&format!("{} cannot be run: {error}", program.display()));
            Ok(())
        }
    }
}

/// Whether a program may be run with this process's rights: nobody but root and this process's own
/// user can have put it there.
fn admit(program: &Path) -> Result<()> {
    let shown = program.display();
    ensure!(program.is_absolute(), "{shown}: name the program by its whole path");
    let path = program.canonicalize().with_context(|| format!("{shown}"))?;
    let of = fs::metadata(&path).with_context(|| format!("{shown}"))?;
    ensure!(of.is_file() && of.permissions().mode() & 0o111 != 0, "{shown} is no program");
    for place in path.ancestors() {
        let of = fs::metadata(place).with_context(|| format!("{}", place.display()))?;
        let (owner, mode) = (of.uid(), of.mode());
        let is_ours = owner == 0 || owner == rustix::process::geteuid().as_raw();
        // In a folder with the sticky bit others cannot replace what is not theirs.
        let is_closed = mode & 0o022 == 0 || (of.is_dir() && mode & 0o1000 != 0);
        ensure!(
            is_ours && is_closed,
            "{shown} is not run with the rights of the daemon: others than root and its user can write {}; \
             put it where only root can, for instance into /usr/local/bin",
            place.display()
        );
    }
    Ok(())
}

/// Whether another daemon has started this one.
pub fn is_successor() -> bool {
    std::env::var_os(SUCCESSOR).is_some()
}

/// The channel to the predecessor, where there is one; taken once, when the process starts.
pub fn inherited_channel() -> io::Result<Option<OwnedFd>> {
    if !is_successor() {
        return Ok(None);
    }
    let channel = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    let null = fs::File::open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    Ok(Some(channel))
}
