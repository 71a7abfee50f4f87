//! Logs to stderr, from a thread of their own: a journal that stalls must not stall forwarding.

use std::io::IsTerminal;

use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::time::SystemTime;

/// `--log-format`
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts logging; what was logged is flushed when the guard is dropped. `RUST_LOG` sets the filter, default `info`.
pub fn init(format: Format) -> WorkerGuard {
    // Lossy: when the queue is full, lines are dropped and not waited for.
    let (writer, guard) = NonBlockingBuilder::default().lossy(true).finish(std::io::stderr());
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_writer(writer).with_env_filter(filter);
    match format {
        // Not flattened: an access line has a field `target`, and the event has a target too.
        Format::Json => builder.json().init(),
        // The journal has its own clock.
        Format::Text if std::env::var_os("JOURNAL_STREAM").is_some() => builder.with_ansi(false).without_time().init(),
        Format::Text => builder.with_ansi(std::io::stderr().is_terminal()).with_timer(SystemTime).init(),
    }
    guard
}
