//! File descriptors: how many there are, and what they are shared out for.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::admin;
use crate::engine::splice;
use crate::source::webhook;

/// Raises RLIMIT_NOFILE to its hard limit; how many descriptors that leaves for workers, listeners,
/// connections and pipes.
pub(super) fn available() -> u64 {
    raise_descriptor_limit().saturating_sub(open_descriptors() + DESCRIPTORS_FOR_US)
}

/// Descriptors that are neither a connection's nor a pipe's nor a listener's: admin clients, the
/// configuration, eBPF maps and programs, webhooks, git's pipes, and of the maintenance thread
/// epoll, its wake-up, tailscaled, the resolver's questions and checks.
const DESCRIPTORS_FOR_US: u64 = 40 + (webhook::AT_A_TIME + 2 * admin::AT_A_TIME) as u64;

/// Of a worker: epoll, its wake-up, signals' pipe, epoll for the sockmap.
pub(super) const DESCRIPTORS_PER_WORKER: u64 = 5;

/// How the process's file descriptors are shared out.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Budget {
    pub(super) connections: usize,
    pub(super) pipes: usize,
}

impl Budget {
    /// Shares out `free` descriptors and `memory` bytes.
    pub(super) fn new(free: u64, memory: u64) -> Self {
        // A pipe is two descriptors and holds up to its capacity; without a pipe a connection is
        // copied, so an eighth is plenty.
        let by_memory = memory / splice::CAPACITY as u64;
        let pipes = by_memory.min(free / 8 / 2);
        Self { connections: ((free - 2 * pipes) / 2) as usize, pipes: pipes as usize }
    }
}

/// Raises RLIMIT_NOFILE to its hard limit, which it returns.
fn raise_descriptor_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        tracing::warn!(%error, "RLIMIT_NOFILE cannot be raised to its hard limit");
    }
    // No limit at all is no number to plan with.
    getrlimit(Resource::Nofile).current.unwrap_or(1 << 20)
}

fn open_descriptors() -> u64 {
    std::fs::read_dir("/proc/self/fd").map_or(32, |entries| entries.count() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_and_pipes_never_need_more_descriptors_than_there_are() {
        for free in [0, 1, 7, 64, 1000, 20_000, 1 << 20] {
            for memory in [64 << 10, 64 << 20, 1 << 40] {
                let budget = Budget::new(free, memory);
                assert!(2 * (budget.connections + budget.pipes) as u64 <= free, "{budget:?} of {free}");
                assert!((budget.pipes * splice::CAPACITY) as u64 <= memory);
            }
        }
        assert_eq!(Budget::new(19_900, 64 << 20), Budget { connections: 9694, pipes: 256 });
    }
}
