//! What the kernel says of the machine and of processes: CPU time, context switches, memory. Read
//! before and after a window; the difference is what it cost.

use std::collections::HashMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// The parent of all kernel threads.
const KTHREADD: u32 = 2;

/// The counters at one moment.
pub struct Snapshot {
    taken: Instant,
    machine: Machine,
    /// By process id.
    processes: HashMap<u32, Process>,
}

/// What a window cost; CPU in seconds.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Length of the window.
    pub seconds: f64,
    /// The whole machine: every tick that was not idle, softirqs and kernel threads included.
    pub cpu: f64,
    /// Of the subject's processes.
    pub subject_cpu: f64,
    /// Of the tailnet's two daemons.
    pub tunnel_cpu: f64,
    /// Of processes that have nothing to do with this run.
    pub foreign_cpu: f64,
    /// What the hypervisor gave to others.
    pub steal: f64,
    /// Context switches of the whole machine.
    pub switches: u64,
}

impl Snapshot {
    /// Reads the counters.
    pub fn take() -> Result<Self> {
        let stat = fs::read_to_string("/proc/stat").context("/proc/stat")?;
        let machine = Machine::parse(&stat).context("/proc/stat is not as expected")?;
        Ok(Self { taken: Instant::now(), machine, processes: processes() })
    }

    /// What happened since then. `subject` and `tunnel` are the first processes of each.
    pub fn until_now(&self, subject: Option<u32>, tunnel: &[u32]) -> Result<Usage> {
        let now = Self::take()?;
        let ticks_per_second = rustix::param::clock_ticks_per_second() as f64;
        let seconds = |ticks: u64| ticks as f64 / ticks_per_second;
        let spent = |counts: &dyn Fn(&HashMap<u32, Process>, u32) -> bool| {
            let sum = |processes: &HashMap<u32, Process>| -> u64 {
                processes.iter().filter(|(pid, _)| counts(processes, **pid)).map(|(_, process)| process.ticks).sum()
            };
            seconds(sum(&now.processes).saturating_sub(sum(&self.processes)))
        };
        let own = std::process::id();
        Ok(Usage {
            seconds: (now.taken - self.taken).as_secs_f64(),
            cpu: seconds(now.machine.busy - self.machine.busy),
            subject_cpu: subject.map_or(0.0, |root| spent(&|all, pid| descends(all, pid, root))),
            tunnel_cpu: spent(&|all, pid| tunnel.iter().any(|root| descends(all, pid, *root))),
            foreign_cpu: spent(&|all, pid| !descends(all, pid, own) && !descends(all, pid, KTHREADD)),
            steal: seconds(now.machine.steal - self.machine.steal),
            switches: now.machine.switches - self.machine.switches,
        })
    }
}

impl Usage {
    /// Why the figures of this window are not to be trusted, if so.
    pub fn disturbance(&self) -> Option<String> {
        // Of one core; three hundredths of the time are within what rounds differ by anyway.
        const TOLERABLE: f64 = 0.03;
        let share = |cpu: f64| cpu / self.seconds.max(0.001);
        let (steal, foreign) = (share(self.steal), share(self.foreign_cpu));
        (steal > TOLERABLE || foreign > TOLERABLE)
            .then(|| format!("steal {:.0} % and other processes {:.0} % of a core", 100.0 * steal, 100.0 * foreign))
    }
}

/// The proportional set size of a process and its descendants, bytes.
pub fn pss(root: u32) -> u64 {
    let all = processes();
    let of = |pid: u32| {
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
        kilobytes(&rollup, "Pss:")
    };
    all.keys().filter(|pid| descends(&all, **pid, root)).filter_map(|pid| of(*pid)).sum()
}

/// Memory that the kernel could still give away, bytes.
pub fn available() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?;
    kilobytes(&text, "MemAvailable:").context("no MemAvailable in /proc/meminfo")
}

fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

#[derive(Debug, PartialEq, Eq)]
struct Machine {
    /// Ticks.
    busy: u64,
    /// Ticks.
    steal: u64,
    switches: u64,
}

impl Machine {
    /// proc_stat(5)
    fn parse(stat: &str) -> Option<Self> {
        let line = |name: &str| stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let cpu: Vec<u64> = line("cpu")?.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
        // Guest time is in user time already.
        let [user, nice, system, _idle, _iowait, irq, softirq, steal, ..] = cpu[..] else { return None };
        Some(Self { busy: user + nice + system + irq + softirq, steal, switches: line("ctxt")?.trim().parse().ok()? })
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Process {
    parent: u32,
    /// Of itself and of all children that it has waited for: so the sum over a family does not lose
    /// what an ended member has used.
    ticks: u64,
}

impl Process {
    /// proc_pid_stat(5)
    fn parse(stat: &str) -> Option<Self> {
        let fields: Vec<_> = stat.rsplit_once(") ")?.1.split(' ').collect();
        let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
        let ticks = (11..15).map(number).sum::<Option<u64>>()?;
        Some(Self { parent: number(1)? as u32, ticks })
    }
}

fn processes() -> HashMap<u32, Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return HashMap::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            // It may have ended by now.
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            Some((pid, Process::parse(&stat)?))
        })
        .collect()
}

/// Whether a process is `root` or comes of it.
fn descends(all: &HashMap<u32, Process>, mut pid: u32, root: u32) -> bool {
    // The table was not read at one moment, so nothing is certain; no family is that deep.
    for _ in 0..100 {
        if pid == root {
            return true;
        }
        match all.get(&pid) {
            Some(process) if process.parent != 0 => pid = process.parent,
            _ => return false,
        }
    }
    false
}

/// Waits until the machine has calmed down after what went before, at most for `limit`.
pub fn settle(limit: Duration) -> Result<()> {
    let start = Instant::now();
    loop {
        let before = Snapshot::take()?;
        std::thread::sleep(Duration::from_millis(50));
        let usage = before.until_now(None, &[])?;
        if usage.cpu / usage.seconds < 0.3 || start.elapsed() > limit {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_is_busy_with_everything_but_waiting() {
        let stat = "cpu  10 20 30 1000 500 1 2 7 3 0\ncpu0 1 2 3 4 5 6 7 8 9 0\nctxt 12345\n";
        assert_eq!(Machine::parse(stat), Some(Machine { busy: 63, steal: 7, switches: 12345 }));
        assert_eq!(Machine::parse("cpu  1 2 3"), None);
    }

    #[test]
    fn a_process_may_have_any_name() {
        let stat = "42 (a) b (c) S 7 42 42 0 -1 4194560 100 0 0 0 11 22 33 44 20 0 1 0";
        assert_eq!(Process::parse(stat), Some(Process { parent: 7, ticks: 110 }));
    }

    #[test]
    fn grandchildren_descend_and_neighbours_do_not() {
        let process = |parent| Process { parent, ticks: 0 };
        let all =
            HashMap::from([(1, process(0)), (10, process(1)), (11, process(10)), (12, process(11)), (20, process(1))]);
        assert!(descends(&all, 12, 10));
        assert!(descends(&all, 10, 10));
        assert!(!descends(&all, 20, 10));
        assert!(!descends(&all, 99, 10));
    }

    #[test]
    fn work_in_a_child_process_is_not_foreign() {
        let before = Snapshot::take().expect("procfs");
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(120) {
            std::hint::spin_loop();
        }
        let usage = before.until_now(Some(std::process::id()), &[]).expect("procfs");
        assert!(usage.subject_cpu >= 0.05, "{usage:?}");
        assert!(usage.cpu >= 0.05, "{usage:?}");
    }
}
