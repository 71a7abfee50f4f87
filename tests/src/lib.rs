//! Hosts made of network namespaces, real peers, and streams that verify themselves.
//!
//! A test makes a [`netns::Net`] (three hosts), starts a [`daemon::Daemon`] on the middle one and
//! talks through it, either with plain sockets and a self-verifying [`stream::Pattern`], or with
//! the real programs of [`peers`]. The daemon is known only by what it promises in public: its
//! command line, configuration, metrics and sockets; nothing here may use the `dataplane` library.
//!
//! What a test needs and cannot have (root, a peer program, a built daemon) is a failure that says
//! what to do, never a skip.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub mod acme;
pub mod daemon;
pub mod documents;
pub mod forge;
pub mod golang;
pub mod load;
pub mod netns;
pub mod peers;
pub mod random;
pub mod rig;
pub mod stream;
pub mod systemd;
pub mod tailnet;

/// Has this thread, and the programs that it starts from now on, see the kernel as a 2.6: uname(2)
/// says so to what has this personality(2).
pub fn see_an_old_kernel() {
    // SAFETY: a bare system call that changes what uname(2) says to this thread, and to threads and
    // processes that it begins.
    let before = unsafe { libc::personality(libc::UNAME26 as libc::c_ulong) };
    assert!(before >= 0, "personality(2): {}", std::io::Error::last_os_error());
}

/// How long what is healthy may take on a busy machine: a connection to show up, a counter to be
/// counted.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Polls `probe` every 10 ms until it gives something; panics with `what` after `limit`.
#[track_caller]
pub fn eventually<T>(limit: Duration, what: &str, probe: impl FnMut() -> Option<T>) -> T {
    within(limit, probe).unwrap_or_else(|| panic!("not within {limit:?}: {what}"))
}

/// Polls `probe` every 10 ms until it gives something; `None`: it did not within `limit`.
pub fn within<T>(limit: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    loop {
        if let Some(found) = probe() {
            return Some(found);
        }
        if start.elapsed() >= limit {
            return None;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The build directory of the workspace.
pub(crate) fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a workspace").join("target"),
        PathBuf::from,
    )
}

/// Holds the machine for one kind of test; dropped, it lets the next one in.
#[must_use]
pub struct Turn {
    _locked: File,
}

/// This test may run beside others, but not while an [`alone`] one measures.
pub fn beside_others() -> Turn {
    turn(rustix::fs::FlockOperation::LockShared)
}

/// This test measures the machine or fills it: no other test of this workspace runs meanwhile, in
/// this process or another.
pub fn alone() -> Turn {
    turn(rustix::fs::FlockOperation::LockExclusive)
}

fn turn(how: rustix::fs::FlockOperation) -> Turn {
    let dir = target_dir();
    std::fs::create_dir_all(&dir).expect("the target directory can be made");
    // Readers would keep a waiting writer out for ever; both therefore pass through a gate first.
    let gate = File::create(dir.join("tests.gate")).expect("the target directory can be written");
    rustix::fs::flock(&gate, rustix::fs::FlockOperation::LockExclusive).expect("flock");
    let file = File::create(dir.join("tests.lock")).expect("the target directory can be written");
    rustix::fs::flock(&file, how).expect("flock");
    Turn { _locked: file }
}
