//! Debian packages: what a command needs is installed as root on Debian, and named elsewhere.

use std::process::Command;

use anyhow::{Result, bail};

use crate::run::{self, find_program, step};

/// Installs the packages of those programs that are missing. Each entry is a program and the Debian package that brings it.
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
    run::run(apt_get(&["install", "--yes", "--no-install-recommends"]).args(packages))
}

fn apt_get(arguments: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").args(["--quiet", "--quiet"]).args(arguments);
    command
}
