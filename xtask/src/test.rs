//! `cargo xtask test`: brings what the tests need, builds the daemon with the eBPF programs in it,
//! runs `cargo test`, and says which test binary took how long.
//!
//! Knows no test but the few of `--fast`: they are in the crates, and the end-to-end ones find the
//! daemon by `DATAPLANE_BIN`. Cargo starts each binary through [`crate::time_limit`].

use std::fs;
use std::path::Path;
use std::process::{Command, ExitStatus, exit};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::run::{self, step};
use crate::{ebpf, matrix, packages};

/// Programs that the end-to-end tests run, and the Debian packages that bring them. nginx and
/// HAProxy come as newer builds from PyPI.
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
    /// Unit tests, the documents, and one test end to end: under two minutes when all is built
    #[arg(long, conflicts_with = "kernel")]
    fast: bool,
    /// A test binary that takes longer is killed and has failed
    #[arg(long, value_name = "MINUTES", default_value_t = 15)]
    limit: u64,
    /// Run the end-to-end tests that a kernel can break on this one, in a virtual machine
    #[arg(long, value_name = "VERSION")]
    kernel: Option<matrix::Kernel>,
}

/// The test targets of `--fast`, beside the unit tests: one end to end, and what the documents
/// promise.
const FAST: [&str; 6] = ["--lib", "--bins", "--test", "smoke", "--test", "documents"];

pub fn run(options: &Options) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("the end-to-end tests make network namespaces and load eBPF programs: run them as root");
    }
    if let Some(kernel) = options.kernel {
        return matrix::run(kernel, options.release, &options.filter);
    }
    packages::ensure(PROGRAMS)?;
    let unpacked = run::target().join("tools/debian");
    if options.fast {
        ebpf::build()?;
        step("building the daemon and the fast tests");
        // With a test, so that the dependencies have the features that the tests ask for.
        let profile = run::profile(options.release);
        run::run(run::cargo().args(["build", "--workspace", "--bins", "--test", "smoke"]).args(profile))?;
        run::run(run::cargo().args(["test", "--workspace", "--no-run"]).args(FAST).args(profile))?;
    } else {
        packages::unpack("promtool", "prometheus", &unpacked)?;
        // For the forge of the end-to-end tests; the library is sshd's.
        packages::unpack("lighttpd", "lighttpd", &unpacked)?;
        if packages::unpack("sshd", "openssh-server", &unpacked)? {
            packages::extract("libwrap0", &unpacked)?;
        }
        // Go takes its time, once; beside the other builds, and not beside tests that measure.
        let tailnet = std::thread::spawn(::tests::tailnet::build);
        ebpf::build()?;

        step("building the daemon and the tests");
        run::run(&mut run::build_tests(options.release))?;
        match tailnet.join() {
            Ok(built) => built.map_err(anyhow::Error::msg)?,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
    let status = run_tests(options, &unpacked.join("usr/bin"))?;
    exit(status.code().unwrap_or(1));
}

/// `cargo test`, with a list of what took how long behind its own output.
fn run_tests(options: &Options, programs: &Path) -> Result<ExitStatus> {
    let times = run::target().join("test-times");
    run::replace_file(&times, b"", 0o644)?;
    let mut cargo = run::cargo();
    cargo.args(["test", "--workspace", "--no-fail-fast"]).args(run::profile(options.release));
    if options.fast {
        cargo.args(FAST);
    }
    time_limited(&mut cargo, Duration::from_secs(options.limit * 60), &times)?;

    step("running the tests");
    let begin = Instant::now();
    let status = cargo
        .arg("--")
        .args(&options.filter)
        .env("DATAPLANE_BIN", run::binaries(options.release)?.join("dataplane"))
        .env("PATH", run::path_with(programs))
        .status()
        .context("cannot start cargo")?;
    let listed = fs::read_to_string(&times).with_context(|| format!("cannot read {}", times.display()))?;
    eprint!("\n{}", slowest_first(&listed, begin.elapsed()));
    Ok(status)
}

/// Has cargo start each test binary through `xtask test-binary`, on whichever target that is.
fn time_limited(cargo: &mut Command, limit: Duration, times: &Path) -> Result<()> {
    let runner = [
        run::binaries(false)?.join("xtask").display().to_string(),
        "test-binary".to_owned(),
        format!("--seconds={}", limit.as_secs()),
        format!("--times={}", times.display()),
    ];
    // A list of strings looks the same in JSON and in TOML.
    let runner = serde_json::to_string(&runner)?;
    cargo.args(["--config", &format!("target.'cfg(all())'.runner = {runner}")]);
    Ok(())
}

/// The lines of [`crate::time_limit`], the longest first, without those of less than a second.
fn slowest_first(listed: &str, together: Duration) -> String {
    let mut rows: Vec<(f64, &str)> = listed
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(seconds, name)| Some((seconds.parse().ok()?, name)))
        .collect();
    rows.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut text = String::new();
    for (seconds, name) in rows.iter().filter(|(seconds, _)| *seconds >= 1.0) {
        text += &format!("{seconds:8.1} s  {name}\n");
    }
    text + &format!("{:8.1} s  all {} test binaries\n", together.as_secs_f64(), rows.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_took_longest_comes_first_and_what_took_no_time_is_counted_alone() {
        let listed = "2.25 tests/rig\n0.03 xtask/xtask\n40.50 tests/memory (killed)\n";
        assert_eq!(
            slowest_first(listed, Duration::from_millis(44_100)),
            "    40.5 s  tests/memory (killed)\n     2.2 s  tests/rig\n    44.1 s  all 3 test binaries\n"
        );
    }
}
