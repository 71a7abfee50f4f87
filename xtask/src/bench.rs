//! `cargo xtask bench`: brings what the benchmark needs, makes release builds of the daemon, with
//! the eBPF programs in it, and of the harness, and runs that.
//!
//! Knows no option: those are the harness's, in `bench/src/run.rs`.

use std::ffi::OsString;
use std::process::{Command, exit};

use anyhow::{Context, Result, bail};

use crate::run::{self, step};
use crate::{ebpf, packages};

/// Programs of the rig and of what brings the peers, and the Debian packages that bring them. Go,
/// for the tailnet, is named when it is missing: Debian's is too old.
const PROGRAMS: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("pip3", "python3-pip"),
    ("protoc", "protobuf-compiler"),
    ("python3", "python3"),
    ("ss", "iproute2"),
];

#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub struct Options {
    /// For the harness; `--help` lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTIONS")]
    arguments: Vec<OsString>,
}

pub fn run(options: &Options) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("the benchmark makes network namespaces and loads eBPF programs: run it as root");
    }
    packages::ensure(PROGRAMS)?;
    ebpf::build()?;
    step("building the daemon and the benchmark (release; some minutes the first time)");
    run::run(run::cargo().args(["build", "--release", "--locked", "--package", "dataplane", "--package", "bench"]))?;
    let binaries = run::binaries(true)?;
    let status = Command::new(binaries.join("bench"))
        .args(&options.arguments)
        .env("DATAPLANE_BIN", binaries.join("dataplane"))
        // No access log, as with the peers.
        .env("RUST_LOG", "warn")
        .status()
        .context("cannot start the benchmark")?;
    exit(status.code().unwrap_or(1));
}
