//! The command line's side of the control socket: one HTTP request to the running daemon.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use crate::{config, source};

/// The request of a command about a target.
pub fn about(command: &str, target: &str) -> String {
    format!("{command}?target={}", escape(target))
}

/// The request to have this program take over, or the one that lies where the running one lay. The
/// daemon may have another working directory.
pub fn upgrade_to(program: Option<&Path>) -> Result<String> {
    let Some(program) = program else { return Ok("/upgrade".to_owned()) };
    let program = std::path::absolute(program)?;
    let program = program.to_str().context("the program's path is not UTF-8")?;
    Ok(format!("/upgrade?binary={}", escape(program)))
}

/// Asks the daemon that runs on this configuration.
pub fn ask(path: &Path, method: Method, request: &str) -> Result<String> {
    ask_at(&control_socket(path), method, request)
}

/// Where the daemon listens for commands. A configuration that is invalid just now must not keep
/// its owner from the daemon that runs on the old one, so this looks at nothing else in it; only
/// where it may be in a file that is included, the whole is asked.
fn control_socket(path: &Path) -> PathBuf {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let document: toml::Table = text.parse().unwrap_or_default();
    let socket = document.get("admin").and_then(|admin| admin.get("socket")).and_then(toml::Value::as_str);
    if let (None, true) = (socket, document.contains_key("include"))
        && let Ok(loaded) = source::kept(path, None)
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

/// Asks the daemon behind `socket`. The body of its answer.
///
/// # Errors
/// No daemon there, or its answer was no: then the error is what it said.
fn ask_at(socket: &Path, method: Method, path: &str) -> Result<String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let stream = UnixStream::connect(socket).await.with_context(|| {
            format!(
                "no daemon answers on {}; is it running (`systemctl status dataplane`), and may you use the socket?",
                socket.display()
            )
        })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request =
            Request::builder().method(method).uri(path).header("host", "dataplane").body(Empty::<Bytes>::new())?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        let text = String::from_utf8_lossy(&body).into_owned();
        if status.is_success() { Ok(text) } else { bail!("{}", text.trim_end()) }
    })
}
