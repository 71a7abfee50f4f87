//! `cargo xtask test`: brings what the tests need, builds the daemon with the eBPF programs in it, runs `cargo test`.
//!
//! Knows no test: those are in the crates, and the end-to-end ones find the daemon by `DATAPLANE_BIN`.

use std::process::exit;

use anyhow::{Context, Result, bail};

use crate::run::{self, step};
use crate::{ebpf, matrix, packages};

/// Programs that the end-to-end tests run, and the Debian packages that bring them. nginx and HAProxy come as newer builds from PyPI.
pub const PROGRAMS: &[(&str, &str)] = &[
    ("curl", "curl"),
    ("dnsmasq", "dnsmasq-base"),
    ("git", "git"),
    ("ip", "iproute2"),
    ("iptables", "iptables"),
    ("nft", "nftables"),
    ("openssl", "openssl"),
    ("pip3", "python3-pip"),
    ("python3", "python3"),
    ("ssh", "openssh-client"),
    ("systemd-nspawn", "systemd-container"),
];

#[derive(clap::Args)]
pub struct Options {
    /// Run those tests only whose names contain one of these
    filter: Vec<String>,
    /// Test the release build
    #[arg(long)]
    release: bool,
    /// Run the end-to-end tests that a kernel can break on this one, in a virtual machine
    #[arg(long, value_name = "VERSION")]
    kernel: Option<matrix::Kernel>,
}

pub fn run(options: &Options) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("the end-to-end tests make network namespaces and load eBPF programs: run them as root");
    }
    if let Some(kernel) = options.kernel {
        return matrix::run(kernel, options.release, &options.filter);
    }
    packages::ensure(PROGRAMS)?;
    let unpacked = run::target().join("tools/debian");
    packages::unpack("promtool", "prometheus", &unpacked)?;
    // For the forge of the end-to-end tests; the library is sshd's.
    packages::unpack("lighttpd", "lighttpd", &unpacked)?;
    if packages::unpack("sshd", "openssh-server", &unpacked)? {
        packages::extract("libwrap0", &unpacked)?;
    }
    // Go takes its time, once; beside the other builds, and not beside tests that measure.
    let tailnet = std::thread::spawn(tests::tailnet::build);
    ebpf::build()?;

    step("building the daemon and the tests");
    run::run(&mut run::build_tests(options.release))?;
    match tailnet.join() {
        Ok(built) => built.map_err(anyhow::Error::msg)?,
        Err(panic) => std::panic::resume_unwind(panic),
    }
    let daemon = run::binaries(options.release)?.join("dataplane");

    step("running the tests");
    let status = run::cargo()
        .args(["test", "--workspace", "--no-fail-fast"])
        .args(run::profile(options.release))
        .arg("--")
        .args(&options.filter)
        .env("DATAPLANE_BIN", daemon)
        .env("PATH", run::path_with(&unpacked.join("usr/bin")))
        .status()
        .context("cannot start cargo")?;
    exit(status.code().unwrap_or(1));
}
