//! The project's own commands: `cargo xtask --help`.
//!
//! Each brings what it needs where it can (rustup, apt as root on Debian, `cargo install` into `target/tools`), and otherwise says in one line what to install.

mod bench;
mod demo;
mod ebpf;
mod install;
mod matrix;
mod packages;
mod run;
mod test;
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
