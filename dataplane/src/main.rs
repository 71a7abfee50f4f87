//! The program.

use std::process::ExitCode;

fn main() -> ExitCode {
    dataplane::cli::main()
}
