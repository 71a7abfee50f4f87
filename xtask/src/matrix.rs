//! `cargo xtask test --kernel 6.1`: the end-to-end tests on one of Debian's cloud kernels, in a
//! virtual machine.
//!
//! The machine has no disk and no network card. Its initramfs holds all there is: the kernel
//! package with every module, busybox, and the tests, the daemon, ip(8) and ss(8) as they are on
//! this machine, with the libraries that they load. A script is its init; what it says comes over
//! the serial line.
//!
//! qemu interprets the processor (TCG), since a test machine rarely may run virtual machines: it
//! says what is right on a kernel, never how fast it is. Knows no test but the names of those that
//! are of no use there.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::run::{self, output, step};
use crate::{ebpf, packages};

const PROGRAMS: &[(&str, &str)] =
    &[("ip", "iproute2"), ("qemu-system-x86_64", "qemu-system-x86"), ("ss", "iproute2"), ("strip", "binutils")];

/// Executables of the end-to-end tests that run there. The others are about real peers, systemd or
/// the rig itself, not about what a kernel decides.
const TESTS: [&str; 7] = ["conformance", "ebpf", "memory", "rejects", "running", "sockmap", "upstreams"];

/// Tests of those executables that do not run there, and why.
const LEFT_OUT: &[(&str, &str)] = &[
    ("when_one_nginx_is_killed_the_next_request_succeeds", "there is no nginx"),
    ("curl_and_nginx_", "there is no nginx"),
    ("a_million_", "an emulated processor takes too long"),
    ("ten_thousand_connections_later_", "an emulated processor takes too long"),
    ("_with_sockmap_than_with_splice", "it is about the memory of a larger machine"),
];

/// Size of the transfer that is a gigabyte elsewhere: a switch of engines or a full window shows in
/// less.
const MEGABYTES: &str = "100";

/// Several times what a run takes: a machine that hangs ends too.
const LIMIT: &str = "1h";

/// What the script says at the end, in front of the executables that failed.
const FINISHED: &str = "matrix: finished, failed:";

/// Debian 12's kernels.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum Kernel {
    /// Debian 12's own
    #[value(name = "6.1")]
    V6_1,
    /// Debian 13's, for Debian 12
    #[value(name = "6.12")]
    V6_12,
}

impl Kernel {
    fn version(self) -> &'static str {
        match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
        }
    }

    /// The package that depends on the newest build.
    fn package(self) -> &'static str {
        match self {
            Self::V6_1 => "linux-image-cloud-amd64",
            Self::V6_12 => "linux-image-6.12-cloud-amd64",
        }
    }
}

/// Runs those tests whose names contain one of the filters, all if there is none.
pub fn run(kernel: Kernel, release: bool, filter: &[String]) -> Result<()> {
    packages::ensure(PROGRAMS)?;
    ebpf::build()?;
    step("building the daemon and the tests");
    let tests = build(release)?;
    let daemon = run::binaries(release)?.join("dataplane");

    let folder = run::target().join("kernels").join(kernel.version());
    let root = Root::unpack(kernel, folder.join("root"))?;
    step("making the initramfs");
    root.fill(&daemon, &tests, filter)?;
    let initramfs = folder.join("initramfs");
    root.pack(&initramfs)?;

    for (test, why) in LEFT_OUT {
        step(format_args!("left out: {test} ({why})"));
    }
    step(format_args!("booting {}", root.kernel().display()));
    boot(&root.kernel(), &initramfs)
}

/// Builds the daemon and all tests, as `cargo xtask test` does, and finds the executables of
/// [`TESTS`].
fn build(release: bool) -> Result<Vec<(&'static str, PathBuf)>> {
    let mut cargo = run::build_tests(release);
    let built = cargo.arg("--message-format=json-render-diagnostics").stderr(Stdio::inherit()).output();
    let built = built.context("cannot start cargo")?;
    ensure!(built.status.success(), "cargo build failed: {}", built.status);
    let messages: Vec<Value> =
        built.stdout.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect();
    let executable = |name: &'static str| {
        let found = messages.iter().find_map(|message| {
            let target = &message["target"];
            (target["kind"][0] == "test" && target["name"] == name).then(|| message["executable"].as_str())?
        });
        Ok((name, PathBuf::from(found.with_context(|| format!("cargo built no test {name}"))?)))
    };
    TESTS.into_iter().map(executable).collect()
}

/// The root file system, as a folder.
struct Root {
    folder: PathBuf,
    /// What uname(1) says there.
    release: String,
}

impl Root {
    /// The packages of kernel and busybox, unpacked once: remove the folder to have newer ones.
    fn unpack(kernel: Kernel, folder: PathBuf) -> Result<Self> {
        let complete = folder.with_file_name("complete");
        if let Ok(release) = fs::read_to_string(&complete) {
            return Ok(Self { folder, release });
        }
        remove(&folder)?;
        packages::extract("busybox-static", &folder)?;
        packages::extract(&newest(kernel)?, &folder)?;
        let modules = folder.join("lib/modules");
        let mut releases = fs::read_dir(&modules).with_context(|| format!("cannot read {}", modules.display()))?;
        let release = releases.next().context("a kernel without modules")??.file_name();
        let release = release.into_string().expect("Debian names its kernels in ASCII");
        // What the installation of the package would do for modprobe.
        let index = r#"find lib/modules -name '*.ko.xz' -exec bin/busybox unxz {} +; bin/busybox depmod -b . "$1""#;
        run::run(Command::new("sh").args(["-ec", index, "sh", &release]).current_dir(&folder))?;
        run::replace_file(&complete, release.as_bytes(), 0o644)?;
        Ok(Self { folder, release })
    }

    fn kernel(&self) -> PathBuf {
        self.folder.join("boot").join(format!("vmlinuz-{}", self.release))
    }

    /// Puts in the daemon, the tests, what they need, and the script that runs them.
    fn fill(&self, daemon: &Path, tests: &[(&str, PathBuf)], filter: &[String]) -> Result<()> {
        remove(&self.folder.join("rig"))?;
        for name in ["ip", "ss"] {
            self.install(name, &run::find_program(name).expect("ensured"))?;
        }
        self.install("dataplane", daemon)?;
        for (name, executable) in tests {
            self.install(name, executable)?;
        }
        let skipped = LEFT_OUT.iter().flat_map(|(test, _)| ["--skip", test]);
        let arguments: Vec<_> = filter
            .iter()
            .map(String::as_str)
            .chain(skipped)
            .map(|argument| format!("'{}'", argument.replace('\'', r"'\''")))
            .collect();
        let init = INIT
            .replace("{FINISHED}", FINISHED)
            .replace("{MEGABYTES}", MEGABYTES)
            .replace("{TESTS}", &TESTS.join(" "))
            .replace("{ARGUMENTS}", &arguments.join(" "));
        run::replace_file(&self.folder.join("init"), init.as_bytes(), 0o755)?;
        run::replace_file(&self.folder.join("etc/hosts"), b"127.0.0.1 localhost\n::1 localhost\n", 0o644)
    }

    /// Copies a program into `/rig`, and the libraries that it loads to where they are here.
    fn install(&self, name: &str, program: &Path) -> Result<()> {
        let rig = self.folder.join("rig");
        fs::create_dir_all(&rig).with_context(|| format!("cannot make {}", rig.display()))?;
        run::run(Command::new("strip").arg("--strip-debug").arg("-o").arg(rig.join(name)).arg(program))?;
        let libraries = output(Command::new("ldd").arg(program));
        let libraries = libraries.with_context(|| format!("cannot tell the libraries of {}", program.display()))?;
        for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
            let content = fs::read(library).with_context(|| format!("cannot read {library}"))?;
            run::replace_file(&self.folder.join(&library[1..]), &content, 0o755)?;
        }
        Ok(())
    }

    /// Makes one file of it (kernel: Documentation/driver-api/early-userspace/buffer-format.rst).
    fn pack(&self, file: &Path) -> Result<()> {
        let pack = r#"find . | bin/busybox cpio -o -H newc 2>/dev/null >"$1""#;
        run::run(Command::new("sh").args(["-ec", pack, "sh"]).arg(file).current_dir(&self.folder))
    }
}

/// The name of the newest build's package.
fn newest(kernel: Kernel) -> Result<String> {
    let depends = output(Command::new("apt-cache").args(["depends", kernel.package()])).unwrap_or_default();
    let prefix = format!("linux-image-{}.", kernel.version());
    let mut packages = depends.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    let newest = packages.find(|package| package.starts_with(&prefix));
    newest.map(str::to_owned).with_context(|| {
        format!("{} brings no kernel {}: the package lists must be Debian 12's", kernel.package(), kernel.version())
    })
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}

/// Boots it, shows what it says, and fails if it does not say that all went well.
fn boot(kernel: &Path, initramfs: &Path) -> Result<()> {
    let mut machine = Command::new("timeout")
        .args(["--foreground", LIMIT, "qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-cpu", "max"])
        .args(["-smp", "2", "-m", "2048", "-nodefaults", "-nic", "none", "-display", "none", "-serial", "stdio"])
        .args(["-no-reboot", "-append", "console=ttyS0 loglevel=3 panic=-1", "-kernel"])
        .arg(kernel)
        .arg("-initrd")
        .arg(initramfs)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start qemu")?;
    let mut failed = None;
    for line in BufReader::new(machine.stdout.take().expect("piped")).split(b'\n') {
        let line = line.context("cannot read the serial line")?;
        let line = String::from_utf8_lossy(&line);
        println!("{}", line.trim_end());
        failed = failed.or_else(|| Some(line.trim().strip_prefix(FINISHED)?.trim().to_owned()));
    }
    let status = machine.wait().context("cannot wait for qemu")?;
    match failed {
        None => bail!("the machine ended before its tests ({status}; it has {LIMIT})"),
        Some(failed) if !failed.is_empty() => bail!("failed there: {failed}"),
        Some(_) => Ok(()),
    }
}

/// Process 1.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /dev /proc /run /sbin /sys /tmp /usr/bin /usr/sbin
/bin/busybox --install -s
mount -t devtmpfs devtmpfs /dev
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /tmp

export PATH=/rig:/usr/sbin:/usr/bin:/sbin:/bin
export CARGO_TARGET_DIR=/tmp DATAPLANE_BIN=/rig/dataplane DATAPLANE_TEST_MEGABYTES={MEGABYTES}
ulimit -n 65536
ip link set lo up

failed=
dataplane doctor || failed="$failed doctor"
for test in {TESTS}; do
    echo "--- $test"
    $test --test-threads=1 {ARGUMENTS} || failed="$failed $test"
done
# A kernel that warns about what it was made to do has a bug, or we have.
dmesg | grep -E 'WARNING: |BUG: |Oops' && failed="$failed kernel"
echo "{FINISHED}$failed"
poweroff -f
"#;
