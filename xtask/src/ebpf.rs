//! Builds the eBPF object into `target/ebpf`, where the build script of `dataplane` finds it.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::run::{self, replace_file, step};
use crate::toolchain;

/// All that the object is made of, besides the compiler.
const SOURCES: [&str; 2] = ["dataplane-ebpf", "common"];

/// Builds the object, unless it was built of the same sources by the same compiler before.
pub fn build() -> Result<PathBuf> {
    let folder = run::target().join("ebpf");
    let object = folder.join("dataplane-ebpf");
    let stamp = folder.join("inputs");

    let compiler = toolchain::compiler()?;
    let linker = toolchain::linker(&compiler)?;
    let inputs = inputs(&compiler.version)?;
    if object.exists() && fs::read_to_string(&stamp).is_ok_and(|built| built == inputs) {
        return Ok(object);
    }

    step("building the eBPF programs");
    // Not under `folder`: the build script of `dataplane` watches that.
    let scratch = run::target().join("ebpf-build");
    run::run(
        compiler
            .cargo_build(&linker)
            .args(["--release", "--locked", "--target-dir"])
            .arg(&scratch)
            .current_dir(run::workspace().join("dataplane-ebpf")),
    )?;
    let built = scratch.join("bpfel-unknown-none/release/dataplane-ebpf");
    let content = fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
    // An equal object keeps its time stamp, so that `dataplane` need not be compiled again.
    if fs::read(&object).ok().as_ref() != Some(&content) {
        replace_file(&object, &content, 0o644)?;
    }
    replace_file(&stamp, inputs.as_bytes(), 0o644)?;
    Ok(object)
}

/// A hash of the sources and the compiler's version. Another Rust release may hash differently,
/// which costs one build.
fn inputs(compiler: &str) -> Result<String> {
    let mut hasher = DefaultHasher::new();
    compiler.hash(&mut hasher);
    for source in SOURCES {
        hash_folder(&run::workspace().join(source), &mut hasher)?;
    }
    Ok(format!("{:016x}", hasher.finish()))
}

fn hash_folder(folder: &Path, hasher: &mut DefaultHasher) -> Result<()> {
    let read = || -> std::io::Result<Vec<_>> { fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect() };
    let mut paths = read().with_context(|| format!("cannot read {}", folder.display()))?;
    paths.sort();
    for path in paths {
        if path.is_dir() {
            // A `target` of somebody who ran cargo in the folder is not a source.
            if path.file_name().is_some_and(|name| name != "target") {
                hash_folder(&path, hasher)?;
            }
        } else {
            path.hash(hasher);
            fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?.hash(hasher);
        }
    }
    Ok(())
}
