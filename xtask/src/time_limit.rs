//! `xtask test-binary`: runs one test binary for cargo, notes how long it took, and kills it with
//! all that it has started when it takes too long. Cargo sees an exit code, as it would without.

use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, getpid, kill_process, pidfd_open, set_child_subreaper, wait,
};

use crate::run::{output, step};

/// What timeout(1) exits with.
const TIMED_OUT: i32 = 124;

/// How long what was killed may take to be gone; only a process that hangs in the kernel does.
const LAST_RITES: Duration = Duration::from_secs(10);

#[derive(clap::Args)]
pub struct Options {
    /// How long it may take
    #[arg(long)]
    seconds: u64,
    /// A file that gets a line
    #[arg(long)]
    times: PathBuf,
    /// The test binary and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    command: Vec<OsString>,
}

/// Gives the exit code.
pub fn run(options: &Options) -> Result<i32> {
    let [program, arguments @ ..] = &*options.command else { bail!("no test binary") };
    let name = name(Path::new(program));
    let limit = Duration::from_secs(options.seconds);
    let begin = Instant::now();
    let mut child = Command::new(program)
        .args(arguments)
        .spawn()
        .with_context(|| format!("cannot start {}", Path::new(program).display()))?;
    let status = ends_within(&mut child, limit)?;
    if status.is_none() {
        let under_way = under_way(&child, Path::new(program)).join(", ");
        step(format_args!("{name} is killed: it takes longer than {} s. Under way: {under_way}", limit.as_secs()));
        kill_all(&mut child)?;
    }
    let killed = if status.is_none() { " (killed)" } else { "" };
    let line = format!("{:.2} {name}{killed}\n", begin.elapsed().as_secs_f64());
    let times = fs::OpenOptions::new().append(true).open(&options.times);
    times
        .and_then(|mut file| file.write_all(line.as_bytes()))
        .with_context(|| format!("cannot write {}", options.times.display()))?;
    Ok(match status {
        Some(status) => status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default()),
        None => TIMED_OUT,
    })
}

/// `package/binary`, without the hash that cargo puts behind it.
fn name(program: &Path) -> String {
    let file = program.file_name().unwrap_or_default().to_string_lossy();
    let binary = file.rsplit_once('-').map_or(&*file, |(binary, _)| binary);
    match std::env::var("CARGO_PKG_NAME") {
        Ok(package) => format!("{package}/{binary}"),
        Err(_) => binary.to_owned(),
    }
}

fn ends_within(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let pid = Pid::from_child(child);
    let handle = pidfd_open(pid, PidfdFlags::empty()).context("pidfd_open(2)")?;
    let until = Instant::now() + limit;
    loop {
        let left = Timespec::try_from(until.saturating_duration_since(Instant::now()))?;
        match poll(&mut [PollFd::new(&handle, PollFlags::IN)], Some(&left)) {
            Ok(0) => return Ok(None),
            Ok(_) => return Ok(Some(child.wait()?)),
            Err(rustix::io::Errno::INTR) => (),
            Err(error) => return Err(error).context("poll(2)"),
        }
    }
}

/// The tests that run just now: libtest names their threads after them. The kernel keeps 15 bytes
/// of a thread's name, so a test whose name begins alike may be among them.
fn under_way(child: &Child, program: &Path) -> Vec<String> {
    let list = output(Command::new(program).args(["--list", "--format", "terse"])).unwrap_or_default();
    let threads = fs::read_dir(format!("/proc/{}/task", child.id())).into_iter().flatten();
    let threads: Vec<String> =
        threads.filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("comm")).ok()).collect();
    let tests = list.lines().filter_map(|line| line.strip_suffix(": test"));
    let is_under_way = |test: &&str| threads.iter().any(|thread| test.get(..15).unwrap_or(test) == thread.trim_end());
    tests.filter(is_under_way).map(str::to_owned).collect()
}

/// Kills it and its descendants, also those in sessions of their own: orphans become our children.
fn kill_all(child: &mut Child) -> Result<()> {
    set_child_subreaper(Some(getpid())).context("prctl(2)")?;
    child.kill()?;
    child.wait()?;
    let until = Instant::now() + LAST_RITES;
    while Instant::now() < until {
        for orphan in children() {
            let _ = kill_process(orphan, Signal::KILL);
        }
        match wait(WaitOptions::NOHANG) {
            Ok(Some(_)) => (),
            Ok(None) => std::thread::sleep(Duration::from_millis(10)),
            Err(_) => return Ok(()),
        }
    }
    step("something that it has started cannot be killed");
    Ok(())
}

/// Processes whose parent we are.
fn children() -> Vec<Pid> {
    let own = getpid().as_raw_nonzero().to_string();
    let processes = fs::read_dir("/proc").into_iter().flatten();
    let child = |process: std::io::Result<fs::DirEntry>| {
        let process = process.ok()?;
        let pid = process.file_name().to_str()?.parse().ok()?;
        // proc_pid_stat(5): the name, which may contain anything, is in brackets; state and parent
        // follow.
        let stat = fs::read_to_string(process.path().join("stat")).ok()?;
        let parent = stat.rsplit_once(") ")?.1.split(' ').nth(1)?;
        if parent == own { Pid::from_raw(pid) } else { None }
    };
    processes.filter_map(child).collect()
}
