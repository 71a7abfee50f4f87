//! The load, which checks every byte, through the sockmap. TCP joins what it brings again under no
//! other load that was tried: 197 KB in one segment, of which the verdict program has to cut all
//! off.

use std::process::Command;

#[test]
fn sixteen_uploads_at_once_arrive_as_they_were_sent() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench"));
    command.args([
        "--verify",
        "--network",
        "veth",
        "--subject",
        "sockmap",
        "--workload",
        "bulk-up-16",
        "--rounds",
        "8",
    ]);
    let out = command.env("RUST_LOG", "warn").output().expect("it was built");
    let said = [out.stdout, out.stderr].concat();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&said));
}
