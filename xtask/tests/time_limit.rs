//! A test binary that hangs costs its time limit and no more, and leaves nothing behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A script in the place of a test binary: it is asked for the tests that it has, too.
fn test_binary(folder: &Path, script: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let file = folder.join("hangs-0123456789abcdef");
    fs::write(&file, format!("#!/bin/sh\n{script}\n")).expect("written");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).expect("chmod");
    file
}

fn run(binary: &Path, seconds: u32) -> (Output, String) {
    let times = binary.with_file_name("times");
    fs::write(&times, "").expect("written");
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.arg("test-binary").arg(format!("--seconds={seconds}")).arg(format!("--times={}", times.display()));
    let out = command.arg(binary).args(["--an-option", "a filter"]).env("CARGO_PKG_NAME", "tests").output();
    (out.expect("xtask runs"), fs::read_to_string(times).expect("readable"))
}

// One test, since a file that another thread's fork holds open for writing cannot be run.
#[test]
fn a_test_binary_has_its_own_exit_code_or_is_killed_with_all_that_it_has_started() {
    let folder = tempfile::tempdir().expect("a folder");
    for (script, code) in [("exit 0", 0), ("exit 101", 101), ("kill -9 $$", 137), ("[ \"$2\" = 'a filter' ]", 0)] {
        let (out, times) = run(&test_binary(folder.path(), script), 600);
        assert_eq!(out.status.code(), Some(code), "{script}");
        assert!(times.ends_with(" tests/hangs\n"), "{times}");
    }

    let started = folder.path().join("started");
    // One child in its process group, one in a session of its own, which has a child, too.
    let script = format!(
        "[ \"$1\" = --list ] && {{ echo 'hangs-012345678: test'; echo 'other: test'; exit; }}\n\
         sleep 1000 & echo $! >>{started}\n\
         setsid sh -c 'sleep 1000 & echo $! >>{started}; wait' & echo $! >>{started}\n\
         wait",
        started = started.display()
    );
    let hangs = test_binary(folder.path(), &script);
    // A busy machine may need longer to start them all.
    let all_started = [2, 8, 32].into_iter().any(|seconds| {
        let _ = fs::remove_file(&started);
        let (out, times) = run(&hangs, seconds);
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(124), "{said}");
        assert!(said.contains("tests/hangs is killed"), "{said}");
        assert!(times.ends_with(" tests/hangs (killed)\n"), "{times}");
        let pids = fs::read_to_string(&started).unwrap_or_default();
        for pid in pids.lines() {
            assert!(!Path::new("/proc").join(pid).exists(), "{pid} lives on");
        }
        // The kernel names a script's thread after its file: here it has the name of a test.
        pids.lines().count() == 3 && said.contains("Under way: hangs-012345678\n")
    });
    assert!(all_started);
}
