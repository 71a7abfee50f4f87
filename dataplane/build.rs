//! Embeds the eBPF object, if one was built: `cargo xtask build-ebpf` puts it into `target/ebpf`. Without one the daemon is built too, and says so when it
//! would need it.
//!
//! `DATAPLANE_EBPF_OBJECT` names another object, for packagers.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
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
        // The folder, not the file: cargo would run this every time for a file that does not exist. A fixed place, whatever CARGO_TARGET_DIR says.
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
