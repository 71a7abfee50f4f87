//! The project's own commands: `cargo xtask --help`.
//!
//! Each brings what it needs where it can (rustup, apt as root on Debian, `cargo install` into
//! `target/tools`), and otherwise says in one line what to install.

mod bench;
mod demo;
mod deny;
mod ebpf;
mod install;
mod matrix;
mod packages;
mod recording;
mod run;
mod test;
mod time_limit;
mod toolchain;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Builds, tests and installs the dataplane")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the programs that run in the kernel; `cargo build` embeds them from then on
    BuildEbpf,
    /// Run all tests, unit and end to end, as root; the exit code is that of `cargo test`
    Test(test::Options),
    /// Run one test binary within a time limit; `test` has cargo do so
    #[command(hide = true)]
    TestBinary(time_limit::Options),
    /// Check licences and sources of all dependencies
    Deny(deny::Options),
    /// Show what it does, on three hosts made of network namespaces
    Demo(demo::Options),
    /// Measure it side by side with nginx, HAProxy and Sōzu
    Bench(bench::Options),
    /// Put the release build, its systemd unit and a starter configuration in place
    Install(install::Options),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::BuildEbpf => ebpf::build().map(|object| println!("{}", object.display())),
        Command::Test(options) => test::run(&options),
        Command::TestBinary(options) => time_limit::run(&options).map(|code| std::process::exit(code)),
        Command::Deny(options) => deny::run(&options),
        Command::Demo(options) => demo::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Install(options) => install::run(&options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use ::tests::documents::{Document, workspace};
    use clap::error::ErrorKind;

    use super::*;

    /// What README.md has its reader run and `.ci/run` leaves out: one writes to /etc, and the
    /// other measures.
    const NOT_IN_CI: [&str; 2] = ["install", "bench"];

    #[test]
    fn every_command_of_the_pages_exists_with_its_options() {
        let mut checked = 0;
        for page in Document::all() {
            for command in page.commands(&["cargo", "xtask"]) {
                let shown = command.words.join(" ");
                match Cli::try_parse_from(&command.words[1..]) {
                    Err(error) if error.kind() != ErrorKind::DisplayHelp => {
                        panic!("{}: `{shown}`: {error}", page.path.display())
                    }
                    _ => checked += 1,
                }
            }
        }
        assert!(checked > 0, "no command was found");
    }

    #[test]
    fn what_readme_has_its_reader_run_is_run_in_ci() {
        let ci = fs::read_to_string(workspace().join(".ci/run")).expect(".ci/run");
        let in_blocks = Document::read("README.md").commands(&["cargo", "xtask"]).into_iter().filter(|c| c.in_block);
        for command in in_blocks {
            let command = &command.words[2];
            let is_run = ci.lines().any(|line| line.starts_with(&format!("cargo xtask {command}")));
            assert!(is_run || NOT_IN_CI.contains(&&**command), ".ci/run does not run `cargo xtask {command}`");
        }
    }
}
