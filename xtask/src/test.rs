//! `cargo xtask test`: brings what the tests need, builds the daemon with the eBPF programs in it, runs `cargo test`.
//!
//! Knows no test: those are in the crates, and the end-to-end ones find the daemon by `DATAPLANE_BIN`.

use std::process::exit;

use anyhow::{Context, Result, bail};

use crate::run::{self, step};
use crate::{ebpf, packages};

/// Programs that the end-to-end tests run, and the Debian packages that bring them. nginx and HAProxy come as newer builds from PyPI.
pub const PROGRAMS: &[(&str, &str)] = &[
    ("curl", "curl"),
    ("ip", "iproute2"),
    ("openssl", "openssl"),
    ("pip3", "python3-pip"),
    ("python3", "python3"),
    ("systemd-nspawn", "systemd-container"),
];

#[derive(clap::Args)]
pub struct Options {
    /// Run those tests only whose names contain one of these
    filter: Vec<String>,
    /// Test the release build
    #[arg(long)]
    release: bool,
}

pub fn run(options: &Options) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("the end-to-end tests make network namespaces and load eBPF programs: run them as root");
    }
    packages::ensure(PROGRAMS)?;
    let unpacked = run::target().join("tools/debian");
    packages::unpack("promtool", "prometheus", &unpacked)?;
    ebpf::build()?;

    // The development profile by default: its debug assertions and overflow checks are on.
    let profile: &[&str] = if options.release { &["--release"] } else { &[] };
    step("building the daemon and the tests");
    // In one go: the daemon by itself would have its dependencies compiled once more, with the features that it alone asks for.
    run::run(run::cargo().args(["build", "--workspace", "--bins", "--tests"]).args(profile))?;
    let daemon = run::binaries(options.release)?.join("dataplane");

    step("running the tests");
    let status = run::cargo()
        .args(["test", "--workspace", "--no-fail-fast"])
        .args(profile)
        .arg("--")
        .args(&options.filter)
        .env("DATAPLANE_BIN", daemon)
        .env("PATH", run::path_with(&unpacked.join("usr/bin")))
        .status()
        .context("cannot start cargo")?;
    exit(status.code().unwrap_or(1));
}
