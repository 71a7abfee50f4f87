//! Embeds the eBPF object, if one was built: `cargo xtask build-ebpf` puts it into `target/ebpf`.
//! Without one the daemon is built too, and says so when it would need it.
//!
//! `DATAPLANE_EBPF_OBJECT` names another object, for packagers.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn main() {
    println!("cargo::rustc-env=DATAPLANE_VERSION={}", version());
    println!("cargo::rustc-check-cfg=cfg(embedded_ebpf)");
    println!("cargo::rerun-if-env-changed=DATAPLANE_EBPF_OBJECT");

    let object = if let Some(object) = env::var_os("DATAPLANE_EBPF_OBJECT") {
        let object = PathBuf::from(object);
        assert!(
            object.is_absolute() && object.is_file(),
            "DATAPLANE_EBPF_OBJECT={}: no such file, or the path is not absolute",
            object.display()
        );
        println!("cargo::rerun-if-changed={}", object.display());
        object
    } else {
        // The folder, not the file: cargo would run this every time for a file that does not exist.
        // A fixed place, whatever CARGO_TARGET_DIR says.
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("target").join("ebpf");
        fs::create_dir_all(&folder).unwrap_or_else(|error| panic!("cannot make {}: {error}", folder.display()));
        println!("cargo::rerun-if-changed={}", folder.display());
        folder.join("dataplane-ebpf")
    };
    if object.exists() {
        println!("cargo::rustc-cfg=embedded_ebpf");
        println!("cargo::rustc-env=EBPF_OBJECT={}", object.display());
    }
}

/// The version, and in a release build the commit, if git knows it or `DATAPLANE_COMMIT` says it:
/// not in others, which would all be built again for each commit.
fn version() -> String {
    println!("cargo::rerun-if-env-changed=DATAPLANE_COMMIT");
    let version = env!("CARGO_PKG_VERSION");
    let said = env::var("DATAPLANE_COMMIT").ok();
    let commit = said.or_else(|| if env::var("PROFILE").as_deref() == Ok("release") { head() } else { None });
    commit.map_or_else(|| version.to_owned(), |commit| format!("{version} ({commit})"))
}

fn head() -> Option<String> {
    let git = |arguments: &[&str]| {
        let out = Command::new("git").args(arguments).output().ok().filter(|out| out.status.success())?;
        Some(String::from_utf8(out.stdout).ok()?.trim().to_owned())
    };
    // HEAD and what it points at change with a commit.
    for file in ["HEAD", "logs/HEAD"] {
        println!("cargo::rerun-if-changed={}", git(&["rev-parse", "--git-path", file])?);
    }
    git(&["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"])
}
