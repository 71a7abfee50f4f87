//! `cargo xtask install`: the release build with the eBPF programs in it, the systemd unit, and a
//! starter configuration if there is none.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use rustix::fs::Mode;

use crate::ebpf;
use crate::run::{self, replace_file, step};

/// What the unit in `dist` starts; replaced when `--prefix` says otherwise. In the `secure_path` of
/// Debian's sudo.
const PREFIX: &str = "/usr/local";

#[derive(clap::Args)]
pub struct Options {
    /// Install below this folder instead of /, for packages; nothing of the running system is
    /// touched
    #[arg(long, value_name = "FOLDER", default_value = "/")]
    root: PathBuf,
    /// Where bin/dataplane goes
    #[arg(long, value_name = "FOLDER", default_value = PREFIX)]
    prefix: PathBuf,
    /// Install this build of the daemon instead of making one
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
}

pub fn run(options: &Options) -> Result<()> {
    let is_live = options.root == Path::new("/");
    if is_live && !rustix::process::geteuid().is_root() {
        bail!("needs root to write to {} and /etc; `--root FOLDER` installs elsewhere", options.prefix.display());
    }
    if !options.prefix.is_absolute() {
        bail!("--prefix must be an absolute path, got {}", options.prefix.display());
    }
    let built = match &options.binary {
        Some(binary) => fs::canonicalize(binary).with_context(|| format!("cannot read {}", binary.display()))?,
        None => build()?,
    };
    // The daemon is another user, whatever umask the caller has.
    rustix::process::umask(Mode::from_raw_mode(0o022));

    let program = options.prefix.join("bin/dataplane");
    let content = fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
    put(&options.root, &program, &content, 0o755)?;

    let unit = run::workspace().join("dist/dataplane.service");
    let unit = fs::read_to_string(&unit).with_context(|| format!("cannot read {}", unit.display()))?;
    let unit = unit.replace(&format!("{PREFIX}/bin/dataplane"), &program.to_string_lossy());
    put(&options.root, Path::new("/etc/systemd/system/dataplane.service"), unit.as_bytes(), 0o644)?;

    let configuration = Path::new("/etc/dataplane/dataplane.toml");
    let is_new = !below(&options.root, configuration).exists();
    if is_new {
        put(&options.root, configuration, &said(Command::new(&built).arg("init"))?, 0o644)?;
    } else {
        step(format_args!("{} is left as it is", configuration.display()));
    }

    put_manual(&options.root, &options.prefix, &built)?;

    if is_live {
        // What sd_booted(3) looks at.
        let mut is_running = false;
        if Path::new("/run/systemd/system").exists() {
            run::run(Command::new("systemctl").arg("daemon-reload"))?;
            is_running = Command::new("systemctl").args(["is-active", "--quiet", "dataplane"]).status()?.success();
        }
        if is_running {
            take_over(&program)?;
        }
        print_next_steps(configuration, is_new, is_running);
    }
    Ok(())
}

/// Where each shell looks for completions, below the prefix's `share`.
const COMPLETIONS: [(&str, &str); 3] = [
    ("bash", "bash-completion/completions/dataplane"),
    ("zsh", "zsh/site-functions/_dataplane"),
    ("fish", "fish/vendor_completions.d/dataplane.fish"),
];

/// Completions and manual pages, of which the program itself knows the text.
fn put_manual(root: &Path, prefix: &Path, built: &Path) -> Result<()> {
    let share = prefix.join("share");
    for (shell, path) in COMPLETIONS {
        let text = said(Command::new(built).args(["completions", shell]))?;
        put(root, &share.join(path), &text, 0o644)?;
    }
    let manual = below(root, &share.join("man"));
    let pages = manual.join("man1");
    let file = "dataplane.toml.5";
    for folder in [&pages, &manual.join("man5")] {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    said(Command::new(built).arg("man").arg(&pages))?;
    fs::rename(pages.join(file), manual.join("man5").join(file))?;
    step(format_args!("{} has the manual pages", manual.display()));
    Ok(())
}

/// What the daemon's program prints.
fn said(command: &mut Command) -> Result<Vec<u8>> {
    let out = command.output().context("cannot start the daemon just built")?;
    if !out.status.success() {
        bail!("{command:?} failed: {}", String::from_utf8_lossy(&out.stderr));
    }
    Ok(out.stdout)
}

/// The release build, with the eBPF programs in it.
fn build() -> Result<PathBuf> {
    ebpf::build()?;
    step("building the daemon (release; some minutes the first time)");
    run::run(run::cargo().args(["build", "--release", "--locked", "--package", "dataplane"]))?;
    Ok(run::binaries(true)?.join("dataplane"))
}

/// Has what was installed take over from the daemon that runs, with its connections.
fn take_over(program: &Path) -> Result<()> {
    step("the new program takes over from the running one");
    let out = Command::new(program).arg("upgrade").output().context("cannot start the daemon just installed")?;
    if !out.status.success() {
        bail!(
            "the running daemon goes on:\n{}\n`systemctl restart dataplane` starts the new one in any case",
            String::from_utf8_lossy(&out.stderr).trim_end()
        );
    }
    print!("{}", String::from_utf8_lossy(&out.stdout));
    Ok(())
}

fn print_next_steps(configuration: &Path, is_new: bool, is_running: bool) {
    println!("\nNext:");
    if is_new {
        println!("  {}   list your domains and cluster nodes", configuration.display());
    }
    println!("  dataplane check                   says what the configuration means, or what is wrong with it");
    println!("  dataplane doctor                  says what this machine can do");
    if !is_running {
        println!("  systemctl enable --now dataplane  starts it, now and at boot");
    }
}

/// Installs one file, and says so.
fn put(root: &Path, path: &Path, content: &[u8], mode: u32) -> Result<()> {
    let file = below(root, path);
    replace_file(&file, content, mode)?;
    step(format_args!("{} installed", file.display()));
    Ok(())
}

/// `path`, which is absolute, taken from `root` on.
fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").expect("an absolute path"))
}
