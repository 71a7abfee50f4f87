//! `bench`: the harness, and the two processes of the load that it starts on the hosts. Use it by
//! `cargo xtask bench`.

use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::{Context, Result};
use bench::load::{client, control, server};
use bench::run;
use bench::workloads::Workload;
use clap::{Args, Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench", args_conflicts_with_subcommands = true)]
#[command(about = "Measures the dataplane side by side with its peers")]
struct Cli {
    #[command(flatten)]
    options: run::Options,
    #[command(subcommand)]
    process: Option<Process>,
}

/// What the harness starts.
#[derive(Subcommand)]
enum Process {
    #[command(hide = true)]
    Serve { address: SocketAddr },
    #[command(hide = true)]
    Load(Load),
}

#[derive(Args)]
struct Load {
    target: SocketAddr,
    workload: String,
    most_connections: usize,
    #[arg(long)]
    verify: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.process {
        Some(Process::Serve { address }) => server::run(address).map_err(|error| control::give_up(&error)),
        Some(Process::Load(load)) => load.run().map_err(|error| control::give_up(&error)),
        None => run::run(&cli.options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

impl Load {
    fn run(&self) -> Result<()> {
        let workload = Workload::named(&self.workload).with_context(|| format!("no workload {}", self.workload))?;
        client::run(self.target, workload, self.most_connections, self.verify)
    }
}
