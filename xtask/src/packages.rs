//! Debian packages: what a command needs is installed as root on Debian, and named elsewhere.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::run::{self, find_program, step};

/// Installs the packages of those programs that are missing. Each entry is a program and the Debian
/// package that brings it.
pub fn ensure(needed: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<_> = needed.iter().filter(|(program, _)| find_program(program).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut packages: Vec<_> = missing.iter().map(|(_, package)| *package).collect();
    packages.dedup();
    if !can_install() {
        let programs: Vec<_> = missing.iter().map(|(program, _)| *program).collect();
        bail!(
            "needs {}: install them, on Debian as root with `apt-get install {}`",
            programs.join(", "),
            packages.join(" ")
        );
    }
    install(&packages)?;
    match needed.iter().find(|(program, _)| find_program(program).is_none()) {
        Some((program, package)) => bail!("{package} is installed, but {program} is not in PATH"),
        None => Ok(()),
    }
}

/// Whether this is root on a Debian.
pub fn can_install() -> bool {
    rustix::process::geteuid().is_root() && find_program("apt-get").is_some()
}

/// Installs packages by name, of the newest lists that apt can get.
pub fn install(packages: &[&str]) -> Result<()> {
    step(format_args!("apt-get install {}", packages.join(" ")));
    // Also on old lists the packages may be there.
    let _ = run::run(&mut apt_get(&["update"]));
    // Errors go to stderr; stdout has a line or two for each package that comes along.
    run::run(apt_get(&["install", "--yes", "--no-install-recommends"]).args(packages).stdout(Stdio::null()))
}

/// Brings one program of a package that would start a service of its own if it were installed:
/// unpacked below `folder`, into its `usr/bin` or `usr/sbin`. Whether that was needed.
pub fn unpack(program: &str, package: &str, folder: &Path) -> Result<bool> {
    let folders = ["usr/bin", "usr/sbin"];
    let unpacked = folders.map(|bin| folder.join(bin)).into_iter().chain(["/usr/sbin".into()]);
    if find_program(program).is_some() || unpacked.into_iter().any(|bin: PathBuf| bin.join(program).exists()) {
        return Ok(false);
    }
    if !can_install() {
        bail!("needs {program}: on Debian it is in the package {package}");
    }
    extract(package, folder)?;
    Ok(true)
}

/// Downloads a package and unpacks it below `folder`; nothing is installed.
pub fn extract(package: &str, folder: &Path) -> Result<()> {
    step(format_args!("apt-get download {package}"));
    let download = folder.join("download");
    let _ = fs::remove_dir_all(&download);
    fs::create_dir_all(&download).with_context(|| format!("cannot make {}", download.display()))?;
    let _ = run::run(&mut apt_get(&["update"]));
    // apt would leave the download to a user of its own, who may not write here.
    run::run(apt_get(&["--option", "APT::Sandbox::User=root", "download", package]).current_dir(&download))?;
    for file in fs::read_dir(&download)? {
        run::run(Command::new("dpkg-deb").arg("--extract").arg(file?.path()).arg(folder))?;
    }
    fs::remove_dir_all(&download).with_context(|| format!("cannot remove {}", download.display()))
}

fn apt_get(arguments: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").args(["--quiet", "--quiet"]).args(arguments);
    command
}
