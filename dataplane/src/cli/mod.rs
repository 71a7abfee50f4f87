//! The command line: what each command does is elsewhere, here is what they are called and what
//! they print.

mod client;
mod explain;
mod manual;
mod show;

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{CommandFactory, Parser, Subcommand};
use hyper::Method;
use serde_json::{Value, json};

use client::{about, ask, upgrade_to};
use show::{describe_connections, describe_status, shown};

use crate::config::{self, Config, LoadError};
use crate::source::{self, Loaded};
use crate::upstream::resolver;
use crate::{daemon, doctor, handover, import, logging};

/// Forwards TLS connections by server name to the nodes of a cluster, without decrypting them.
#[derive(Parser)]
#[command(version = env!("DATAPLANE_VERSION"), max_term_width = 80)]
struct Arguments {
    /// The configuration.
    #[arg(long, global = true, default_value = config::DEFAULT_PATH, value_name = "FILE")]
    config: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run in the foreground until SIGTERM; SIGHUP reloads the configuration.
    Run {
        /// The format of the log on stderr.
        #[arg(long, value_enum, default_value = "text")]
        log_format: logging::Format,
    },
    /// Validate the configuration, with the newest commit of its repository if it has one, and
    /// print the routing table.
    Check {
        /// The configuration, in the place of --config; `-` is standard input.
        #[arg(conflicts_with = "repository")]
        file: Option<PathBuf>,
        #[command(flatten)]
        output: Output,
        /// Check the content of a repository instead, which lies in this folder: without a network,
        /// without a file outside of it, and as strictly as a node does.
        #[arg(long, value_name = "DIR")]
        repository: Option<PathBuf>,
        /// The file in the repository, as `path` in [source].
        #[arg(long, value_name = "FILE", default_value = "dataplane.toml", requires = "repository")]
        path: PathBuf,
        /// A node's own file, of which `allow_hosts`, `allow_listeners` and `allow_targets` in
        /// [source] count; their defaults when left out.
        #[arg(long, value_name = "FILE", requires = "repository")]
        node: Option<PathBuf>,
    },
    /// Say in words what a change of the configuration does to the routing table.
    ///
    /// Without --repository it reads whatever file `include` names, and quotes lines of it in
    /// errors: for files of your own.
    Diff {
        /// The configuration before.
        old: PathBuf,
        /// The configuration after; the one of --config when left out.
        #[arg(required_if_eq("repository", "true"))]
        new: Option<PathBuf>,
        #[command(flatten)]
        output: Output,
        /// Both are folders with the content of a repository: compared without a network, without a
        /// file outside of them, and as strictly as a node does.
        #[arg(long)]
        repository: bool,
        /// The file in the repository, as `path` in [source].
        #[arg(long, value_name = "FILE", default_value = "dataplane.toml", requires = "repository")]
        path: PathBuf,
        /// A node's own file, of which `allow_hosts`, `allow_listeners` and `allow_targets` in
        /// [source] count; their defaults when left out.
        #[arg(long, value_name = "FILE", requires = "repository")]
        node: Option<PathBuf>,
    },
    /// Print a commented starter configuration.
    Init,
    /// Write another program's configuration as one of ours, to stdout; on stderr, what could not
    /// be carried over.
    ///
    /// A name goes where the other program sends it, or is refused. Exit 0: nothing is lost, 2:
    /// something is lost, 1: nothing is written. It reads whatever file `include` names: for files
    /// of your own.
    Import {
        /// Whose configuration it is.
        #[arg(value_enum)]
        from: Foreign,
        /// Its main file; includes are followed. Of nginx also the output of `nginx -T`; `-` reads
        /// standard input.
        file: PathBuf,
    },
    /// Say what this machine can do, and why an engine is refused.
    Doctor {
        #[command(flatten)]
        output: Output,
        /// Say what each target answers to a hello, with and without the PROXY header, and what to
        /// change.
        #[arg(long)]
        upstreams: bool,
    },
    /// Ask the running daemon for its listeners, routes, targets and engine.
    Status {
        #[command(flatten)]
        output: Output,
    },
    /// Ask the running daemon for its connections.
    Connections {
        #[command(flatten)]
        output: Output,
    },
    /// Say which route a server name takes, or why it is rejected; from the configuration alone.
    ///
    /// It reads whatever file `include` names, and quotes lines of it in errors: for files of your
    /// own.
    Explain {
        /// The server name, as a client would send it, `host:port` or a URL.
        host: String,
        /// Only on this listener.
        #[arg(long, value_name = "NAME")]
        listener: Option<String>,
        /// A protocol that the client offers; may be repeated.
        #[arg(long, value_name = "P")]
        alpn: Vec<String>,
        #[command(flatten)]
        output: Output,
    },
    /// Make the running daemon read its configuration again. Where another program lies in its
    /// place by now, that takes over, as with `upgrade`.
    Reload,
    /// Have another process take over from the running daemon, with every connection.
    ///
    /// It starts beside the running one, reads the configuration, tests the machine, and takes over
    /// when all is well; otherwise the running one goes on, and this says why.
    Upgrade {
        /// The program that takes over; the one that lies where the running one lay when left out.
        binary: Option<PathBuf>,
    },
    /// Wait for a daemon that has taken over from this process.
    #[command(hide = true)]
    Supervise,
    /// Start a daemon that is to take over.
    #[command(hide = true)]
    Launch {
        program: PathBuf,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<std::ffi::OsString>,
    },
    /// Print the completions of a shell.
    Completions {
        /// Whose.
        shell: clap_complete::Shell,
    },
    /// Write the manual pages into a folder.
    #[command(hide = true)]
    Man {
        /// An existing one.
        folder: PathBuf,
    },
    /// Give a target no new connections.
    Drain {
        /// As written in the configuration.
        target: String,
    },
    /// Give a drained target new connections again.
    Undrain {
        /// As written in the configuration.
        target: String,
    },
}

impl Command {
    /// The exit code where it could not do its work.
    fn trouble(&self) -> ExitCode {
        match self {
            // 1 is an answer of theirs.
            Self::Diff { .. } | Self::Explain { .. } => ExitCode::from(2),
            _ => ExitCode::FAILURE,
        }
    }
}

/// How a command prints.
#[derive(clap::Args)]
struct Output {
    /// For people, or one JSON document.
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
    /// The same as `--format json`.
    #[arg(long, conflicts_with = "format")]
    json: bool,
}

impl Output {
    fn is_json(&self) -> bool {
        self.json || matches!(self.format, Format::Json)
    }
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Format {
    Text,
    Json,
}

/// Whose configurations can be read.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Foreign {
    /// The stream blocks of an nginx.conf.
    Nginx,
}

/// Parses the arguments, does what they say, tells what went wrong.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(code) => code,
        // `dataplane connections | head`
        Err(error) if error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == ErrorKind::BrokenPipe) => {
            ExitCode::SUCCESS
        }
        Err(error) => {
            let text = format!("{error:#}");
            // Diagnostics of the configuration name their place first and need no prefix.
            let prefix = if text.contains(": error: ") { "" } else { "error: " };
            let _ = writeln!(std::io::stderr(), "{prefix}{}", text.trim_end());
            arguments.command.trouble()
        }
    }
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let path = &arguments.config;
    let mut out = std::io::stdout().lock();
    match &arguments.command {
        Command::Run { log_format } => {
            drop(out);
            let _flush = logging::init(*log_format);
            daemon::run(path)?;
        }
        Command::Check { file, output, repository, path: inside, node } => {
            let outcome = match repository {
                Some(folder) => source::content(folder, inside, node.as_deref()),
                None => source::newest(file.as_ref().unwrap_or(path), say_where_to).map(|mut loaded| {
                    loaded.warnings.extend(resolver::ambiguous(&loaded.config));
                    loaded
                }),
            };
            if !output.is_json() {
                write!(out, "{}", config::routing_table(&shown_warnings(outcome?)))?;
                return Ok(ExitCode::SUCCESS);
            }
            writeln!(out, "{:#}", checked(&outcome))?;
            return Ok(if outcome.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Command::Diff { old, new, output, repository, path: inside, node } => {
            let load = |given: &Path| {
                if !repository {
                    return Ok(source::kept(given, None)?.config);
                }
                // Both have files of the same names.
                let content = source::content(given, inside, node.as_deref());
                anyhow::Ok(content.with_context(|| given.display().to_string())?.config)
            };
            let changes = config::diff(&load(old)?, &load(new.as_ref().unwrap_or(path))?);
            if output.is_json() {
                writeln!(out, "{:#}", json!({ "changes": changes }))?;
            } else if changes.is_empty() {
                writeln!(out, "nothing changes")?;
            }
            for change in changes.iter().filter(|_| !output.is_json()) {
                writeln!(out, "{change}")?;
            }
            // As diff(1).
            return Ok(ExitCode::from(u8::from(!changes.is_empty())));
        }
        Command::Init => write!(out, "{}", config::STARTER)?,
        Command::Import { from: Foreign::Nginx, file } => {
            let imported = import::nginx(file)?;
            for note in &imported.notes {
                let _ = writeln!(std::io::stderr(), "{note}");
            }
            write!(out, "{}", imported.toml)?;
            return Ok(ExitCode::from(if imported.has_losses() { 2 } else { 0 }));
        }
        Command::Doctor { output, upstreams: true } => {
            let answers = doctor::upstreams::ask(&shown_warnings(source::kept(path, None)?))?;
            if output.is_json() {
                writeln!(out, "{:#}", serde_json::to_value(&answers)?)?;
            } else {
                write!(out, "{}", doctor::upstreams::text(&answers))?;
            }
            return Ok(if answers.iter().all(|a| a.ok) { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Command::Doctor { output, upstreams: false } => {
            let findings = {
                // Whoever asks before the first start gets what can be told without it.
                let running = ask(path, Method::GET, "/status").ok().and_then(|text| serde_json::from_str(&text).ok());
                doctor::Findings::gather(path, running.as_ref())
            };
            if output.is_json() {
                writeln!(out, "{:#}", findings.json())?;
            } else {
                write!(out, "{}", findings.text())?;
            }
            return Ok(if findings.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Command::Status { output } => {
            let status = ask(path, Method::GET, "/status")?;
            write!(out, "{}", shown(status, output.is_json(), describe_status)?)?;
        }
        Command::Connections { output } => {
            let connections = ask(path, Method::GET, "/connections")?;
            write!(out, "{}", shown(connections, output.is_json(), describe_connections)?)?;
        }
        Command::Explain { host, listener, alpn, output } => {
            let config = shown_warnings(source::kept(path, None)?);
            let found = explain::explain(&config, host, listener.as_deref(), alpn)?;
            if output.is_json() {
                writeln!(out, "{:#}", serde_json::to_value(&found)?)?;
            } else {
                write!(out, "{}", found.text())?;
            }
            return Ok(if found.forwarded { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Command::Completions { shell } => {
            clap_complete::generate(*shell, &mut Arguments::command(), "dataplane", &mut out);
        }
        Command::Man { folder } => {
            manual::write(Arguments::command().disable_help_subcommand(true), folder)?;
        }
        Command::Upgrade { binary } => write!(out, "{}", ask(path, Method::POST, &upgrade_to(binary.as_deref())?)?)?,
        Command::Launch { program, arguments } => handover::program::launch(program, arguments)?,
        Command::Supervise => return handover::supervisor::run(),
        Command::Reload => write!(out, "{}", ask(path, Method::POST, "/reload")?)?,
        Command::Drain { target } => write!(out, "{}", ask(path, Method::POST, &about("/drain", target))?)?,
        Command::Undrain { target } => write!(out, "{}", ask(path, Method::POST, &about("/undrain", target))?)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Who reads a file that somebody else has written learns where its token goes before it does.
fn say_where_to(repository: &config::Repository) {
    let with = repository.token_file.as_ref().or(repository.ssh_key_file.as_ref());
    let with = with.map(|file| format!(" with {}", file.display())).unwrap_or_default();
    let _ = writeln!(std::io::stderr(), "fetching {}{with}", config::redacted(&repository.git));
}

/// Shows the warnings, on stderr.
fn shown_warnings(Loaded { config, warnings, .. }: Loaded) -> Config {
    for warning in &warnings {
        let _ = write!(std::io::stderr(), "{}", warning.render(&config.source));
    }
    config
}

/// The document of `check --format json`.
fn checked(outcome: &Result<Loaded, LoadError>) -> Value {
    match outcome {
        Ok(Loaded { config, warnings, .. }) => json!({
            "valid": true,
            "hash": config.hash,
            "commit": config.source.revision,
            "diagnostics": warnings.iter().map(|warning| warning.json(&config.source)).collect::<Vec<_>>(),
        }),
        Err(error) => json!({ "valid": false, "hash": null, "commit": null, "diagnostics": error.json() }),
    }
}
