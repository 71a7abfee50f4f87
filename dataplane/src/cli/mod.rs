//! The command line: what each command does is elsewhere, here is what they are called and what they print.

mod client;
mod explain;
mod show;

use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use hyper::Method;
use serde_json::{Value, json};

use client::{about, ask};
use show::{describe_connections, describe_status, shown};

use crate::config::{self, Config, LoadError};
use crate::source::{self, Loaded};
use crate::upstream::resolver;
use crate::{daemon, doctor, import, logging};

/// Forwards TLS connections by server name to the nodes of a cluster, without decrypting them.
#[derive(Parser)]
#[command(version)]
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
    /// Validate the configuration, with the newest commit of its repository if it has one, and print the routing table.
    Check {
        /// For people, or one JSON document with file, line and column of everything that is wrong.
        #[arg(long, value_enum, default_value = "text")]
        format: Format,
        /// Check the content of a repository instead, which lies in this folder: without a network, without a file outside of it, and as strictly as a node does.
        #[arg(long, value_name = "DIR")]
        repository: Option<PathBuf>,
        /// The file in the repository, as `path` in [source].
        #[arg(long, value_name = "FILE", default_value = "dataplane.toml", requires = "repository")]
        path: PathBuf,
        /// A node's own file, of which `allow_hosts`, `allow_listeners` and `allow_targets` in [source] count; their defaults when left out.
        #[arg(long, value_name = "FILE", requires = "repository")]
        node: Option<PathBuf>,
    },
    /// Say in words what a change of the configuration does to the routing table.
    Diff {
        /// The configuration before.
        old: PathBuf,
        /// The configuration after; the one of --config when left out.
        new: Option<PathBuf>,
    },
    /// Print a commented starter configuration.
    Init,
    /// Write another program's configuration as one of ours, to stdout; on stderr, what could not be carried over.
    Import {
        /// Whose configuration it is.
        #[arg(value_enum)]
        from: Foreign,
        /// Its main file; includes are followed.
        file: PathBuf,
    },
    /// Say what this machine can do, and why an engine is refused.
    Doctor {
        #[arg(long)]
        json: bool,
        /// Say what each target answers to a hello, with and without the PROXY header, and what to change.
        #[arg(long)]
        upstreams: bool,
    },
    /// Ask the running daemon for its listeners, routes, targets and engine.
    Status {
        #[arg(long)]
        json: bool,
    },
    /// Ask the running daemon for its connections.
    Connections {
        #[arg(long)]
        json: bool,
    },
    /// Say which route a server name takes, or why it is rejected; from the configuration alone.
    Explain {
        /// The server name, as a client would send it.
        host: String,
        /// Only on this listener.
        #[arg(long, value_name = "NAME")]
        listener: Option<String>,
        /// A protocol that the client offers; may be repeated.
        #[arg(long, value_name = "P")]
        alpn: Vec<String>,
    },
    /// Make the running daemon read its configuration again.
    Reload,
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
            ExitCode::FAILURE
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
        Command::Check { format, repository, path: inside, node } => {
            let outcome = match repository {
                Some(folder) => source::content(folder, inside, node.as_deref()),
                None => source::newest(path, say_where_to).map(|mut loaded| {
                    loaded.warnings.extend(resolver::ambiguous(&loaded.config));
                    loaded
                }),
            };
            if matches!(format, Format::Text) {
                write!(out, "{}", config::routing_table(&shown_warnings(outcome?)))?;
                return Ok(ExitCode::SUCCESS);
            }
            writeln!(out, "{:#}", checked(&outcome))?;
            return Ok(if outcome.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Command::Diff { old, new } => {
            let (old, new) = (source::kept(old)?.config, source::kept(new.as_ref().unwrap_or(path))?.config);
            let text = config::diff(&old, &new);
            write!(out, "{}", if text.is_empty() { "nothing changes\n" } else { &text })?;
        }
        Command::Init => write!(out, "{}", config::STARTER)?,
        Command::Import { from: Foreign::Nginx, file } => {
            let imported = import::nginx(file)?;
            for note in &imported.notes {
                let _ = writeln!(std::io::stderr(), "{note}");
            }
            write!(out, "{}", imported.toml)?;
        }
        Command::Doctor { json, upstreams: true } => {
            let answers = doctor::upstreams::ask(&shown_warnings(source::kept(path)?))?;
            if *json {
                writeln!(out, "{:#}", serde_json::to_value(&answers)?)?;
            } else {
                write!(out, "{}", doctor::upstreams::text(&answers))?;
            }
            return Ok(if answers.iter().all(|a| a.ok) { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Command::Doctor { json, upstreams: false } => {
            let findings = doctor::Findings::gather(path);
            if *json {
                writeln!(out, "{:#}", findings.json())?;
            } else {
                write!(out, "{}", findings.text())?;
            }
            return Ok(if findings.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Command::Status { json } => {
            let status = ask(path, Method::GET, "/status")?;
            write!(out, "{}", shown(status, *json, describe_status)?)?;
        }
        Command::Connections { json } => {
            let connections = ask(path, Method::GET, "/connections")?;
            write!(out, "{}", shown(connections, *json, describe_connections)?)?;
        }
        Command::Explain { host, listener, alpn } => {
            let config = shown_warnings(source::kept(path)?);
            let (text, routed) = explain::explain(&config, host, listener.as_deref(), alpn)?;
            write!(out, "{text}")?;
            return Ok(if routed { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
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
            "commit": config.source.commit,
            "diagnostics": warnings.iter().map(|warning| warning.json(&config.source)).collect::<Vec<_>>(),
        }),
        Err(error) => json!({ "valid": false, "hash": null, "commit": null, "diagnostics": error.json() }),
    }
}
