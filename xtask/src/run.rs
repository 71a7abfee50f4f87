//! Small things that every command needs: paths, child processes, a line of progress.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};

use anyhow::{Context, Result, bail};

/// The root of the workspace.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a folder of the workspace")
}

/// What is kept between builds but does not come from the workspace's own `cargo build`. Not under
/// `CARGO_TARGET_DIR`: the build script of `dataplane` must find the eBPF object without knowing
/// what that was.
pub fn target() -> PathBuf {
    workspace().join("target")
}

/// Where `cargo build` puts the binaries of a profile: xtask is one of them itself.
pub fn binaries(release: bool) -> Result<PathBuf> {
    let own = env::current_exe().context("where this program is")?;
    let debug = own.parent().context("where this program is")?;
    Ok(if release { debug.with_file_name("release") } else { debug.to_owned() })
}

/// The cargo that runs us.
pub fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    command
}

/// A `cargo build` of the daemon and all tests. In one go: the daemon by itself would have its
/// dependencies compiled once more, with the features that it alone asks for.
pub fn build_tests(release: bool) -> Command {
    let mut cargo = cargo();
    cargo.args(["build", "--workspace", "--bins", "--tests"]).args(profile(release));
    cargo
}

/// The development profile by default: its debug assertions and overflow checks are on.
pub fn profile(release: bool) -> &'static [&'static str] {
    if release { &["--release"] } else { &[] }
}

/// Says what comes next, on stderr.
pub fn step(what: impl std::fmt::Display) {
    eprintln!("==> {what}");
}

/// Runs a command with our own output streams.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot start {}", name(command)))?;
    if !status.success() {
        bail!("{} failed: {status}", name(command));
    }
    Ok(())
}

/// What a command writes to stdout, without the last newline; nothing if it cannot run or fails.
pub fn output(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

/// A program's place in `PATH`, or in the folders of system programs that a user's `PATH` may lack.
pub fn find_program(name: impl AsRef<OsStr>) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(name.as_ref()))
        .find(|file| file.is_file())
}

/// `PATH` with one more folder in front.
pub fn path_with(folder: &Path) -> OsString {
    let path = env::var_os("PATH").unwrap_or_default();
    env::join_paths([folder.to_owned()].into_iter().chain(env::split_paths(&path)))
        .expect("no colon in the workspace's path")
}

/// Writes a file by rename, so that a program that runs keeps its old file, and nobody reads half
/// of the new one.
pub fn replace_file(file: &Path, content: &[u8], mode: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let folder = file.parent().with_context(|| format!("{} has no folder", file.display()))?;
    let mut temporary = file.as_os_str().to_owned();
    temporary.push(".new");
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(folder)?;
        fs::write(&temporary, content)?;
        fs::set_permissions(&temporary, fs::Permissions::from_mode(mode))?;
        fs::rename(&temporary, file)
    };
    write().with_context(|| format!("cannot write {}", file.display()))
}

fn name(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or_default();
    let arguments = command.get_args().map(OsStr::to_string_lossy);
    [program.to_string_lossy()].into_iter().chain(arguments).collect::<Vec<_>>().join(" ")
}
