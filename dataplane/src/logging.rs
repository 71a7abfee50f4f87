//! Logs to stderr, from a thread of their own: a journal that stalls must not stall forwarding.
//!
//! A line costs the worker that wrote it a copy. The thread writes what has come in one go, at most
//! every `PAUSE`: woken for each line, it would cost a short connection a tenth of its processor
//! time.

use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::time::SystemTime;

/// How long lines gather after some were written. The first one after a silence does not wait.
const PAUSE: Duration = Duration::from_millis(10);

/// Bytes that may wait; lines beyond it are dropped and counted. Tens of thousands of lines.
const MOST: usize = 8 << 20;

/// `--log-format`
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts logging; what was logged is written when the guard is dropped. `RUST_LOG` sets the
/// filter, default `info`.
pub fn init(format: Format) -> Guard {
    let queue = Arc::new(Queue::default());
    let guard = Guard::start(queue.clone(), io::stderr());
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_writer(queue).with_env_filter(filter);
    match format {
        // Not flattened: an access line has a field `target`, and the event has a target too.
        Format::Json => builder.json().init(),
        // The journal has its own clock.
        Format::Text if std::env::var_os("JOURNAL_STREAM").is_some() => builder.with_ansi(false).without_time().init(),
        Format::Text => builder.with_ansi(io::stderr().is_terminal()).with_timer(SystemTime).init(),
    }
    guard
}

/// Seconds since 1970, as log lines, metrics and `status` tell times.
pub fn unix_seconds(time: std::time::SystemTime) -> f64 {
    time.duration_since(std::time::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs_f64()
}

/// Lines on their way to the thread that writes them.
#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    lines: Vec<u8>,
    dropped: u64,
    ended: bool,
}

impl Queue {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().expect("no panic while held")
    }
}

/// One call is one line, or several.
impl Write for &Queue {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        let mut waiting = self.waiting();
        if waiting.lines.len() + lines.len() > MOST {
            waiting.dropped += 1;
            return Ok(lines.len());
        }
        let first = waiting.lines.is_empty();
        waiting.lines.extend_from_slice(lines);
        drop(waiting);
        if first {
            self.changed.notify_one();
        }
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Ends the thread when dropped, after everything was written.
pub struct Guard {
    queue: Arc<Queue>,
    thread: Option<JoinHandle<()>>,
}

impl Guard {
    fn start(queue: Arc<Queue>, output: impl Write + Send + 'static) -> Self {
        let own = queue.clone();
        let thread = thread::Builder::new().name("log".to_owned()).spawn(move || write_out(&own, output)).ok();
        Self { queue, thread }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.queue.waiting().ended = true;
        self.queue.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn write_out(queue: &Queue, mut output: impl Write) {
    let mut lines = Vec::new();
    loop {
        let mut waiting = queue
            .changed
            .wait_while(queue.waiting(), |waiting| waiting.lines.is_empty() && !waiting.ended)
            .expect("no panic while held");
        if waiting.lines.is_empty() {
            return;
        }
        std::mem::swap(&mut lines, &mut waiting.lines);
        let (dropped, ended) = (std::mem::take(&mut waiting.dropped), waiting.ended);
        drop(waiting);
        // Nobody is left to tell of an error here.
        let _ = output.write_all(&lines);
        if dropped > 0 {
            // To the same queue, which has room now.
            tracing::warn!(lines = dropped, "the log was dropped: whoever reads it is too slow");
        }
        // A burst must not be paid for with memory for ever.
        lines.clear();
        lines.shrink_to(MOST / 128);
        if !ended {
            thread::sleep(PAUSE);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Takes a buffer at a time, when it is asked to.
    struct Slow {
        go_on: mpsc::Receiver<()>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.go_on.recv();
            self.written.lock().expect("no panic").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_arrive_in_order_and_those_too_many_are_counted() {
        let (queue, written) = (Arc::new(Queue::default()), Arc::new(Mutex::new(Vec::new())));
        let (go_on, gate) = mpsc::channel();
        let guard = Guard::start(queue.clone(), Slow { go_on: gate, written: written.clone() });
        let line = format!("{}\n", "x".repeat(1 << 20));
        let log = |text: &str| (&*queue).write_all(text.as_bytes()).expect("never fails");
        log("first\n");
        // Taken by the thread, which the output keeps waiting.
        while !queue.waiting().lines.is_empty() {
            thread::yield_now();
        }
        for _ in 0..10 {
            log(&line);
        }
        assert_eq!(queue.waiting().dropped, 3);
        drop(go_on);
        drop(guard);
        assert!(*written.lock().expect("no panic") == format!("first\n{}", line.repeat(7)).into_bytes());
    }
}
