//! `cargo xtask deny`: holds the three lock files to what `deny.toml` lets in, with cargo-deny.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};

use crate::run::{self, find_program, output, step};

const CARGO_DENY: &str = "0.20.2";

/// What has a lock file of its own.
const MANIFESTS: [&str; 3] = ["Cargo.toml", "dataplane-ebpf/Cargo.toml", "dataplane/fuzz/Cargo.toml"];

#[derive(clap::Args)]
pub struct Options {
    /// Look for known vulnerabilities and yanked versions, too: fetches the database from GitHub
    #[arg(long)]
    advisories: bool,
}

pub fn run(options: &Options) -> Result<()> {
    let program = program()?;
    let mut failed = Vec::new();
    for manifest in MANIFESTS {
        step(format_args!("cargo deny: {manifest}"));
        let mut deny = Command::new(&program);
        deny.current_dir(run::workspace()).args(["--locked", "--manifest-path", manifest, "--config", "deny.toml"]);
        deny.args(["check", "--hide-inclusion-graph", "licenses", "bans", "sources"]);
        if options.advisories {
            deny.arg("advisories");
        }
        if run::run(&mut deny).is_err() {
            failed.push(manifest);
        }
    }
    if !failed.is_empty() {
        bail!("deny.toml does not let in what is told above, of {}", failed.join(", "));
    }
    Ok(())
}

/// cargo-deny as it is in `PATH` if that is the right version, else in `target/tools`.
fn program() -> Result<PathBuf> {
    let is_right = |program: &PathBuf| {
        output(Command::new(program).arg("--version")).is_some_and(|v| v == format!("cargo-deny {CARGO_DENY}"))
    };
    let tools = run::target().join("tools");
    let own = tools.join("bin/cargo-deny");
    if let Some(program) = [Some(own.clone()), find_program("cargo-deny")].into_iter().flatten().find(is_right) {
        return Ok(program);
    }
    step(format_args!("cargo install cargo-deny {CARGO_DENY} into target/tools (about two minutes)"));
    // It runs for a second, so a build that is slow to make would never pay.
    run::run(
        run::cargo()
            .args(["install", "cargo-deny", "--version", CARGO_DENY, "--locked", "--force", "--quiet"])
            .args(["--debug", "--no-default-features", "--root"])
            .arg(&tools)
            .env_remove("CARGO_TARGET_DIR"),
    )?;
    Ok(own)
}
