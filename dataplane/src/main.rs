//! The command line.

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use dataplane::config::{self, Config, HostPattern, LoadError, Mode};
use dataplane::logging::unix_seconds;
use dataplane::route::{By, Table};
use dataplane::source::{self, Loaded};
use dataplane::upstream::names;
use dataplane::{control, daemon, doctor, import, logging};
use hyper::Method;
use serde_json::{Value, json};

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

fn main() -> ExitCode {
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
                    loaded.warnings.extend(names::ambiguous(&loaded.config));
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
            let text = dataplane::diff::diff(&old, &new);
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
            let (text, routed) = explain(&config, host, listener.as_deref(), alpn)?;
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

/// The daemon's document as it is, or for people.
fn shown(document: String, json: bool, describe: fn(&Value) -> String) -> Result<String> {
    Ok(if json { document + "\n" } else { describe(&serde_json::from_str(&document)?) })
}

fn about(command: &str, target: &str) -> String {
    format!("{command}?target={}", escape(target))
}

/// Asks the daemon.
fn ask(path: &Path, method: Method, request: &str) -> Result<String> {
    control::ask(&control_socket(path), method, request)
}

/// Where the daemon listens for commands. A configuration that is invalid just now must not keep its owner from the daemon that runs on the old one,
/// so this looks at nothing else in it; only where it may be in a file that is included, the whole is asked.
fn control_socket(path: &Path) -> PathBuf {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let document: toml::Table = text.parse().unwrap_or_default();
    let socket = document.get("admin").and_then(|admin| admin.get("socket")).and_then(toml::Value::as_str);
    if let (None, true) = (socket, document.contains_key("include"))
        && let Ok(loaded) = source::kept(path)
    {
        return loaded.config.admin.socket;
    }
    PathBuf::from(socket.unwrap_or(config::DEFAULT_SOCKET))
}

/// Percent-encodes what a query must not hold.
fn escape(text: &str) -> String {
    text.bytes()
        .map(|b| if b.is_ascii_alphanumeric() { char::from(b).to_string() } else { format!("%{b:02X}") })
        .collect()
}

fn explain(config: &Config, host: &str, listener: Option<&str>, alpn: &[String]) -> Result<(String, bool)> {
    let Ok(HostPattern::Exact(name)) = HostPattern::parse(host) else {
        return Ok((format!("{host}: rejected on every listener: `malformed`, it is no server name\n"), false));
    };
    let table = Table::new(config);
    let mut text = String::new();
    let mut routed = false;
    let by_name = config.listeners.iter().enumerate().filter(|(_, l)| l.mode.has_routes());
    let asked: Vec<_> = by_name.filter(|(_, l)| listener.is_none_or(|wanted| *l.name == *wanted)).collect();
    if asked.is_empty() {
        let wanted = listener.unwrap_or_default();
        let known: Vec<_> = config.listeners.iter().map(|l| &*l.name).collect();
        bail!("no listener of mode `tls` or `http` is called `{wanted}`; there are: {}", known.join(", "));
    }
    for (index, listener) in asked {
        let found = match listener.mode {
            Mode::Http { .. } => table.find_plain(index, Some(&name)),
            _ => table.find(index, Some(&name), alpn.iter().map(String::as_bytes)),
        };
        text += &match found {
            Ok(found) => {
                routed = true;
                let route = &config.routes[found.route];
                let upstream = &config.upstreams[route.upstream];
                let targets: Vec<_> = upstream.targets.iter().map(|t| &*t.text).collect();
                let by = match found.by {
                    By::Exact => format!("`{name}` is listed"),
                    By::Wildcard(suffix) => {
                        format!("`*.{suffix}` is the longest wildcard that matches, no exact host does")
                    }
                    By::Any => "`*` matches, nothing else does".to_owned(),
                };
                let what = match listener.mode {
                    Mode::Http { acme_port } => {
                        format!("308 to https://{name}/, ACME challenges to port {acme_port} of upstream")
                    }
                    _ => "upstream".to_owned(),
                };
                format!(
                    "{name} on {}: {what} `{}` ({}) by route `{}`: {by}\n",
                    listener.name,
                    upstream.name,
                    targets.join(", "),
                    route.name
                )
            }
            Err(reason) => {
                let why = match reason {
                    dataplane::reject::Reason::AlpnMismatch => {
                        "its routes want an ALPN protocol that is not offered; try --alpn"
                    }
                    _ => "no route lists it here",
                };
                format!("{name} on {}: rejected, `{reason}`: {why}\n", listener.name)
            }
        };
    }
    Ok((text, routed))
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or("-")
}

fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn words(value: &Value) -> String {
    items(value).iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" ")
}

fn describe_status(status: &Value) -> String {
    use std::fmt::Write as _;
    let mut out = String::new();
    let (engine, config, limits) = (&status["engine"], &status["config"], &status["limits"]);
    let uptime = status["uptime"].as_f64().unwrap_or(0.0);
    let now = unix_seconds(SystemTime::now());
    let _ = writeln!(out, "dataplane {}, up {uptime:.0} s", text(status, "version"));
    let _ = writeln!(
        out,
        "engine    {} ({} configured) {}",
        text(engine, "effective"),
        text(engine, "configured"),
        words(&engine["reasons"])
    );
    for warning in items(&engine["warnings"]).iter().filter_map(Value::as_str) {
        let _ = writeln!(out, "          warning: {warning}");
    }
    let _ = writeln!(out, "config    {} {}", text(config, "hash"), text(config, "path"));
    if let Some(commit) = config["commit"].as_str() {
        let _ = writeln!(out, "commit    {commit} of {}", text(&config["repository"], "git"));
    }
    let ago = |time: &Value| time.as_f64().map_or(0.0, |time| (now - time).max(0.0));
    let _ = writeln!(out, "          last found good {:.0} s ago", ago(&config["last_success"]));
    if let Some(error) = config["last_error"].as_str() {
        let _ = writeln!(out, "          not any more, {:.0} s ago: {error}", ago(&config["last_error_at"]));
    }
    let _ = writeln!(
        out,
        "open      {} of {} connections (the limit is by {})",
        limits["connections"],
        limits["max_connections"],
        text(limits, "max_connections_by")
    );
    for shortage in items(&status["shortages"]) {
        let (times, last) = (&shortage["times"], ago(&shortage["last"]));
        let _ = writeln!(out, "SHORTAGE  {} ({times} times, last {last:.0} s ago)", text(shortage, "reason"));
    }
    for waiting in items(&status["waiting"]) {
        let _ = writeln!(
            out,
            "waiting   for {} ({}): {}",
            text(waiting, "address"),
            text(waiting, "for"),
            text(waiting, "reason")
        );
    }
    for listener in items(&status["listeners"]) {
        let _ = writeln!(
            out,
            "listener  {} ({}) on {}",
            text(listener, "name"),
            text(listener, "mode"),
            words(&listener["bind"])
        );
    }
    for route in items(&status["routes"]) {
        let _ = writeln!(out, "route     {} -> {}", words(&route["hosts"]), text(route, "upstream"));
    }
    for upstream in items(&status["upstreams"]) {
        for target in items(&upstream["targets"]) {
            let up = if target["up"] == true { "up" } else { "down" };
            let drained = if target["drained"] == true { ", drained" } else { "" };
            let path = target["path"].as_str().map(|path| format!(", {path}")).unwrap_or_default();
            let _ = writeln!(
                out,
                "target    {} of {}: {up}{drained}{path}, {} active, {}",
                text(target, "target"),
                text(upstream, "name"),
                target["active"],
                text(target, "reason")
            );
            for change in items(&target["history"]) {
                let what = if change["up"] == true { "up" } else { "down" };
                let _ =
                    writeln!(out, "            {:.0} s ago: {what}, {}", ago(&change["at"]), text(change, "reason"));
            }
        }
    }
    out
}

fn describe_connections(connections: &Value) -> String {
    use std::fmt::Write as _;
    let mut out = format!(
        "{:<40} {:<30} {:<28} {:<7} {:<9} {:>14} {:>14} {:>9} {:>9} {:>9}\n",
        "CLIENT", "SERVER NAME", "TARGET", "ENGINE", "PATH", "TO UPSTREAM", "TO CLIENT", "BACKLOG", "AGE s", "IDLE s"
    );
    for c in items(connections) {
        let _ = writeln!(
            out,
            "{:<40} {:<30} {:<28} {:<7} {:<9} {:>14} {:>14} {:>9} {:>9.0} {:>9.0}",
            text(c, "client"),
            text(c, "server_name"),
            text(c, "target"),
            text(c, "engine"),
            text(c, "path"),
            c["bytes_to_upstream"],
            c["bytes_to_client"],
            c["backlog"],
            c["age"].as_f64().unwrap_or(0.0),
            c["idle"].as_f64().unwrap_or(0.0)
        );
    }
    out
}
