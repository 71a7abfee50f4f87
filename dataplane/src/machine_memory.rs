//! How much memory this process may have, and how many connections that is.

use std::fs;
use std::path::{Path, PathBuf};

/// What a connection costs, kernel and userspace together, in bytes: two sockets with their
/// structures, 10 KiB; a task, 4 KiB; and as much again for what is on its way.
const EACH: u64 = 32 << 10;

/// The memory that bounds us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineMemory {
    bytes: u64,
    /// Where that is said.
    by: String,
}

impl MachineMemory {
    /// The least of the machine's memory and of the limits of our control group and of those above
    /// it (kernel: Documentation/admin-guide/cgroup-v2.rst).
    pub fn read() -> Self {
        Self::read_below(Path::new("/"))
    }

    fn read_below(root: &Path) -> Self {
        let mut least = Self { bytes: total(&root.join("proc/meminfo")), by: "memory (MemTotal)".to_owned() };
        let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
        let mounts = fs::read_to_string(root.join("proc/self/mounts")).unwrap_or_default();
        for line in groups.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else { continue };
            // The second version has no list of controllers.
            let (kind, files): (&str, &[&str]) = match controllers {
                "" => ("cgroup2", &["memory.max", "memory.high"]),
                "memory" => ("cgroup", &["memory.limit_in_bytes"]),
                _ => continue,
            };
            let Some(mount) = mount_of(&mounts, kind) else { continue };
            let mount = root.join(mount.strip_prefix("/").unwrap_or(&mount));
            // Where the group is hidden, what is mounted is its own.
            for group in Path::new(group.trim_start_matches('/')).ancestors() {
                for file in files {
                    let text = fs::read_to_string(mount.join(group).join(file)).unwrap_or_default();
                    if let Ok(bytes) = text.trim().parse::<u64>()
                        && bytes < least.bytes
                    {
                        least = Self { bytes, by: format!("memory ({file} of /{})", group.display()) };
                    }
                }
            }
        }
        least
    }

    /// How many connections half of it has room for, and what says so.
    pub fn connections(&self) -> (usize, String) {
        (((self.bytes / 2 / EACH) as usize).max(64), self.by.clone())
    }
}

/// `MemTotal:       16314480 kB`; a machine that does not say has much.
fn total(meminfo: &Path) -> u64 {
    let text = fs::read_to_string(meminfo).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.map_or(u64::MAX, |kib| kib << 10)
}

fn mount_of(mounts: &str, kind: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        let [_, at, of, options, ..] = fields[..] else { return None };
        let is_memory = kind == "cgroup2" || options.split(',').any(|option| option == "memory");
        (of == kind && is_memory).then(|| PathBuf::from(at))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(files: &[(&str, &str)]) -> MachineMemory {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        MachineMemory::read_below(root.path())
    }

    const MEMINFO: (&str, &str) = ("proc/meminfo", "MemTotal:        1048576 kB\nMemFree: 1 kB\n");

    #[test]
    fn the_least_of_the_machine_and_of_all_groups_above_us_counts() {
        let v2 = ("proc/self/mounts", "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n");
        let group = ("proc/self/cgroup", "0::/system.slice/dataplane.service\n");
        assert_eq!(machine(&[MEMINFO]).connections(), (16384, "memory (MemTotal)".to_owned()));
        let no_limit = ("sys/fs/cgroup/system.slice/dataplane.service/memory.max", "max\n");
        assert_eq!(machine(&[MEMINFO, v2, group, no_limit]).connections().0, 16384);
        let high = ("sys/fs/cgroup/system.slice/dataplane.service/memory.high", "268435456\n");
        let (most, by) = machine(&[MEMINFO, v2, group, no_limit, high]).connections();
        assert_eq!((most, &*by), (4096, "memory (memory.high of /system.slice/dataplane.service)"));
        let above = ("sys/fs/cgroup/system.slice/memory.max", "134217728\n");
        let (most, by) = machine(&[MEMINFO, v2, group, high, above]).connections();
        assert_eq!((most, &*by), (2048, "memory (memory.max of /system.slice)"));
        let v1 = ("proc/self/mounts", "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n");
        let own = ("proc/self/cgroup", "4:memory:/box\n0::/\n");
        let limit = ("sys/fs/cgroup/memory/box/memory.limit_in_bytes", "536870912\n");
        assert_eq!(machine(&[MEMINFO, v1, own, limit]).connections().0, 8192);
    }
}
