//! Go, for peers that are built from source: the machine's own when it is new enough, else a
//! toolchain from the module proxy.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::target_dir;

/// The oldest Go that builds the peers: 1.x.y.
const OLDEST: [u32; 2] = [26, 6];
/// What is fetched when there is none.
const TOOLCHAIN: &str = "v0.0.1-go1.26.6.linux-amd64";

/// Runs go(1); the error is what it said.
pub fn go(set_up: impl FnOnce(&mut Command) -> &mut Command) -> Result<(), String> {
    let mut command = Command::new(program()?);
    let out = set_up(&mut command).output().map_err(|e| format!("{command:?}: {e}"))?;
    if out.status.success() { Ok(()) } else { Err(format!("{command:?}: {}", String::from_utf8_lossy(&out.stderr))) }
}

fn program() -> Result<PathBuf, String> {
    let installed =
        ["go", "/usr/local/go/bin/go"].map(PathBuf::from).into_iter().find(|program| is_new_enough(program));
    installed.map_or_else(fetch, Ok)
}

fn is_new_enough(program: &Path) -> bool {
    let Ok(out) = Command::new(program).arg("version").output() else { return false };
    version(&String::from_utf8_lossy(&out.stdout)).is_some_and(|version| version >= OLDEST)
}

/// Of what `go version` says: x.y of 1.x.y.
fn version(said: &str) -> Option<[u32; 2]> {
    let mut numbers = said.split_once("go1.")?.1.split(|c: char| !c.is_ascii_digit());
    Some([numbers.next()?.parse().ok()?, numbers.next()?.parse().unwrap_or(0)])
}

/// The toolchain as the go command itself would fetch it.
fn fetch() -> Result<PathBuf, String> {
    let home = target_dir().join("peers").join(format!("golang-{TOOLCHAIN}"));
    std::fs::create_dir_all(&home).map_err(|e| format!("{}: {e}", home.display()))?;
    let lock = std::fs::File::create(home.join("lock")).map_err(|e| format!("{}: {e}", home.display()))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).map_err(|e| format!("flock: {e}"))?;
    let root = home.join(format!("golang.org/toolchain@{TOOLCHAIN}"));
    if !home.join("complete").exists() {
        eprintln!("==> no Go that is new enough here: fetching {TOOLCHAIN} into {}", home.display());
        let zip = home.join("go.zip");
        let url = format!("https://proxy.golang.org/golang.org/toolchain/@v/{TOOLCHAIN}.zip");
        run(Command::new("curl")
            .args(["--silent", "--show-error", "--fail", "--location", "--output"])
            .arg(&zip)
            .arg(url))?;
        run(Command::new("python3").args(["-m", "zipfile", "-e"]).arg(&zip).arg(&home))?;
        // The archive has no permissions.
        let (bin, tools) = (root.join("bin"), root.join("pkg/tool"));
        run(Command::new("chmod").args(["-R", "a+x"]).arg(bin).arg(tools))?;
        std::fs::File::create(home.join("complete")).map_err(|e| format!("{}: {e}", home.display()))?;
    }
    Ok(root.join("bin/go"))
}

fn run(command: &mut Command) -> Result<(), String> {
    let out = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    if out.status.success() { Ok(()) } else { Err(format!("{command:?}: {}", String::from_utf8_lossy(&out.stderr))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn go_is_new_enough_or_not() {
        assert!(version("go version go1.26.8 linux/amd64") >= Some(OLDEST));
        assert!(version("go version go1.27 linux/amd64") >= Some(OLDEST));
        for old in [
            "go version go1.26.5 linux/amd64",
            "go version go1.19.8 linux/amd64",
            "go version go1.26rc1 linux/amd64",
            "",
        ] {
            assert!(version(old) < Some(OLDEST), "{old}");
        }
    }
}
