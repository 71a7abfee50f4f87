//! What the first process becomes when a successor has taken over and no service manager was told:
//! whoever has started it waits for it, and sends it signals. It passes them on, and ends as the
//! last daemon ends. Successors of successors need no other one.

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, WaitOptions, getpid, kill_process, set_child_subreaper, wait};
use tokio::signal::unix::{SignalKind, signal};

/// How long after a signal a daemon may begin and still gets it.
const AGAIN: Duration = Duration::from_secs(5);

/// The hidden command of the program.
pub const COMMAND: &str = "supervise";

/// Becomes one: of the daemon nothing is left in this process.
///
/// # Errors
/// The program cannot be run again.
pub fn become_one() -> Result<()> {
    Err(Command::new("/proc/self/exe").arg(COMMAND).exec()).context("the supervisor cannot be run")
}

/// Waits until there is no daemon below this process any more.
pub fn run() -> Result<ExitCode> {
    let _ = rustix::thread::set_name(c"dataplane");
    // Successors of successors become children of this process when those before them end.
    set_child_subreaper(Some(getpid()))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut ended = signal(SignalKind::child())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hangup = signal(SignalKind::hangup())?;
        let mut last = ExitCode::FAILURE;
        // One that ends in favour of a successor may not have passed the signal on.
        let mut passed_on: Option<(Signal, Instant)> = None;
        loop {
            let mut has_ended = false;
            loop {
                match wait(WaitOptions::NOHANG) {
                    Ok(Some((_, status))) => {
                        has_ended = true;
                        last = match (status.exit_status(), status.terminating_signal()) {
                            (Some(code), _) => ExitCode::from(code as u8),
                            (None, signal) => ExitCode::from(128 + signal.unwrap_or_default() as u8),
                        };
                    }
                    Ok(None) => break,
                    // There is none left.
                    Err(_) => return Ok(last),
                }
            }
            if let Some((signal, at)) = passed_on
                && has_ended
                && at.elapsed() < AGAIN
            {
                send(signal);
            }
            let signal = tokio::select! {
                _ = ended.recv() => continue,
                _ = terminate.recv() => Signal::TERM,
                _ = interrupt.recv() => Signal::INT,
                _ = hangup.recv() => Signal::HUP,
            };
            passed_on = Some((signal, Instant::now()));
            send(signal);
        }
    })
}

fn send(signal: Signal) {
    for child in children() {
        let _ = kill_process(child, signal);
    }
}

fn children() -> Vec<Pid> {
    let text = std::fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
    text.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
}
