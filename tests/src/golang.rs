//! Go, for peers that are built from source: the machine's own when it is new enough, else a toolchain from the module proxy.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::target_dir;

/// The oldest minor version of Go 1 that builds the peers.
const MINOR: u32 = 26;
/// What is fetched when there is none.
const TOOLCHAIN: &str = "v0.0.1-go1.26.0.linux-amd64";

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
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    let minor =
        said.split("go1.").nth(1).and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok());
    minor.is_some_and(|minor: u32| minor >= MINOR)
}

/// The toolchain as the go command itself would fetch it.
fn fetch() -> Result<PathBuf, String> {
    let home = target_dir().join("peers").join(format!("golang-{TOOLCHAIN}"));
    std::fs::create_dir_all(&home).map_err(|e| format!("{}: {e}", home.display()))?;
    let lock = std::fs::File::create(home.join("lock")).map_err(|e| format!("{}: {e}", home.display()))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).map_err(|e| format!("flock: {e}"))?;
    let root = home.join(format!("golang.org/toolchain@{TOOLCHAIN}"));
    if !home.join("complete").exists() {
        eprintln!("==> no Go 1.{MINOR} here: fetching {TOOLCHAIN} into {}", home.display());
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
