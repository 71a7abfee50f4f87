//! How the harness and the two processes of the load talk: one line of text each way at a time,
//! over standard input and output.

use std::io::{BufRead, BufReader, Write};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};

use ::tests::netns::{Host, Process};
use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Writes one line.
pub fn say(what: impl Serialize) -> Result<()> {
    write(&Ok(what))
}

/// Tells the harness why it cannot go on, and ends the process.
pub fn give_up(error: &anyhow::Error) -> ! {
    // Without a harness there is nobody to tell.
    let _ = write(&Err::<(), _>(format!("{error:#}")));
    std::process::exit(1);
}

fn write(what: &Result<impl Serialize, String>) -> Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, what)?;
    out.write_all(b"\n")?;
    out.flush().context("standard output")
}

/// The harness's next line; `None`: it wants nothing more.
pub fn next_line() -> Result<Option<String>> {
    let mut line = String::new();
    let n = std::io::stdin().lock().read_line(&mut line).context("standard input")?;
    Ok((n > 0).then_some(line))
}

/// The harness's side: one of the two processes, on its host; killed when dropped.
pub struct Remote {
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// What to call it when it fails.
    name: &'static str,
    _process: Process,
}

impl Remote {
    /// Starts this program once more, with these arguments.
    pub fn start(host: &Host, name: &'static str, arguments: &[String]) -> Result<Self> {
        // Not by its path, where another build may have taken its place.
        let mut command = Command::new("/proc/self/exe");
        command.arg(name).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = host.spawn(&mut command).with_context(|| format!("cannot start the {name} process"))?;
        let child = process.child();
        let input = child.stdin.take().expect("piped");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        Ok(Self { input, output, name, _process: process })
    }

    /// Waits for its next line.
    pub fn hear<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            bail!("the {} process ended", self.name);
        }
        let said: Result<T, String> =
            serde_json::from_str(&line).with_context(|| format!("the {} process said {line:?}", self.name))?;
        said.map_err(|why| anyhow!("the {} process: {why}", self.name))
    }

    /// Tells it to go on.
    pub fn go(&mut self) -> Result<()> {
        self.input.write_all(b"\n").with_context(|| format!("the {} process is gone", self.name))
    }
}
