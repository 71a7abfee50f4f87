//! What it takes to compile for `bpfel-unknown-none`: a compiler with the source of its standard
//! library, bpf-linker, and the LLVM that both use.
//!
//! Knows nothing of what is compiled with it.

use std::env;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::packages;
use crate::run::{self, find_program, output, step};

/// Reads the bitcode of LLVM 22 and no newer one.
const BPF_LINKER: &str = "0.10.3";

/// Major version of LLVM: the compiler's and the one that bpf-linker loads must be the same.
const LLVM: u32 = 22;

/// Debian's compiler for its browsers: the newest Rust in a stable release, and the source of the
/// standard library with it.
const DEBIAN: [&str; 3] = ["rustc-web", "cargo-web", "rust-web-src"];

/// A compiler that can build `core` for another target.
pub struct Compiler {
    /// Folder with `bin/rustc`, `bin/cargo` and `lib/rustlib/src`.
    sysroot: PathBuf,
    /// The shared library of LLVM that belongs to it.
    llvm: PathBuf,
    /// All that `rustc -vV` says.
    pub version: String,
}

impl Compiler {
    /// A `cargo build` with this compiler, also if it is a stable one: `build-std` is for nightly
    /// compilers otherwise.
    pub fn cargo_build(&self, linker: &Linker) -> Command {
        let mut command = Command::new(self.sysroot.join("bin/cargo"));
        command
            .arg("build")
            .env("RUSTC", self.sysroot.join("bin/rustc"))
            .env("RUSTC_BOOTSTRAP", "1")
            .env("PATH", run::path_with(&linker.folder))
            .env("LD_LIBRARY_PATH", &linker.llvm);
        // Meant for the workspace: these would override the configuration of the programs' own
        // folder.
        for variable in
            ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_TARGET", "CARGO_TARGET_DIR", "RUSTUP_TOOLCHAIN"]
        {
            command.env_remove(variable);
        }
        command
    }
}

/// bpf-linker, and the LLVM that it is to load.
pub struct Linker {
    folder: PathBuf,
    /// A folder with nothing in it but the right library: bpf-linker opens the first that it finds.
    llvm: PathBuf,
}

/// The installed compiler, or one that can be installed.
pub fn compiler() -> Result<Compiler> {
    if let Some(compiler) = installed_compiler() {
        return Ok(compiler);
    }
    if find_program("rustup").is_some() {
        step("rustup component add rust-src");
        // Fails without a network, and then there may be another way.
        let _ = run::run(Command::new("rustup").args(["component", "add", "rust-src"]));
        if let Some(compiler) = installed_compiler() {
            return Ok(compiler);
        }
    }
    if packages::can_install() {
        packages::install(&DEBIAN)?;
        if let Some(compiler) = installed_compiler() {
            return Ok(compiler);
        }
    }
    bail!(
        "no Rust compiler with LLVM {LLVM} and the source of its standard library: run `rustup toolchain install 1.95 --component rust-src`, \
         or on Debian `apt-get install {}`",
        DEBIAN.join(" ")
    )
}

/// The compiler in use first, then rustup's others, then the system's.
fn installed_compiler() -> Option<Compiler> {
    let in_use = output(Command::new("rustc").args(["--print", "sysroot"])).map(PathBuf::from);
    let rustup = env::var_os("RUSTUP_HOME").map(PathBuf::from).or_else(|| Some(env::home_dir()?.join(".rustup")));
    let others = rustup.map(|home| entries(&home.join("toolchains"))).unwrap_or_default();
    in_use.into_iter().chain(others).chain([PathBuf::from("/usr")]).find_map(|sysroot| {
        sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").exists().then_some(())?;
        let llvm = find_llvm(&sysroot.join("lib"))?;
        let version = output(Command::new(sysroot.join("bin/rustc")).arg("-vV"))?;
        version.contains(&format!("LLVM version: {LLVM}.")).then_some(Compiler { sysroot, llvm, version })
    })
}

/// The library itself in `lib` or in Debian's `lib/x86_64-linux-gnu`, not the linker scripts and
/// links beside it.
fn find_llvm(lib: &Path) -> Option<PathBuf> {
    let prefix = format!("libLLVM.so.{LLVM}");
    let is_llvm = |file: &PathBuf| file.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix));
    let multiarch = lib.join(format!("{}-linux-gnu", env::consts::ARCH));
    entries(lib).into_iter().chain(entries(&multiarch)).find(is_llvm)
}

/// bpf-linker as it is in `PATH` if that is the right version, else in `target/tools`.
pub fn linker(compiler: &Compiler) -> Result<Linker> {
    let tools = run::target().join("tools");
    let llvm = tools.join("llvm");
    fs::create_dir_all(&llvm).with_context(|| format!("cannot make {}", llvm.display()))?;
    let link = llvm.join("libLLVM.so");
    if fs::read_link(&link).ok().as_ref() != Some(&compiler.llvm) {
        let _ = fs::remove_file(&link);
        symlink(&compiler.llvm, &link).with_context(|| format!("cannot make {}", link.display()))?;
    }
    let is_right = |program: &PathBuf| {
        output(Command::new(program).arg("--version").env("LD_LIBRARY_PATH", &llvm))
            .is_some_and(|version| version == format!("bpf-linker {BPF_LINKER}"))
    };
    let own = tools.join("bin/bpf-linker");
    if !own.exists()
        && let Some(program) = find_program("bpf-linker").filter(is_right)
    {
        let folder = program.parent().expect("a program is in a folder").to_owned();
        return Ok(Linker { folder, llvm });
    }
    if !is_right(&own) {
        step(format_args!("cargo install bpf-linker {BPF_LINKER} into target/tools (about a minute)"));
        run::run(
            run::cargo()
                .args(["install", "bpf-linker", "--version", BPF_LINKER, "--locked", "--force", "--quiet", "--root"])
                .arg(&tools),
        )?;
    }
    Ok(Linker { folder: tools.join("bin"), llvm })
}

/// What is in a folder, in the order of the names; nothing if it cannot be read.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut paths: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    paths
}
