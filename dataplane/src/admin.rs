//! Metrics and health over TCP, status and control over a unix socket: HTTP on a thread and a
//! runtime of its own.
//!
//! Nothing here is on the way of a connection's bytes: it reads shared state, and asks other
//! threads for what changes it.

use std::io;
use std::net::TcpListener as StdTcpListener;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{mpsc, oneshot};

use crate::bounded_server::{self, Bounds};
use crate::config::Mode;
use crate::logging::unix_seconds;
use crate::registry::Connection;
use crate::shared::{Role, Shared};
use crate::source::follow::ReloadRequest;

#[derive(Clone)]
struct App {
    shared: Arc<Shared>,
    reload: mpsc::Sender<ReloadRequest>,
}

/// The bound sockets.
pub struct Sockets {
    /// For Prometheus and health checks; `None` when this machine does not have the address yet.
    pub tcp: Option<StdTcpListener>,
    /// For the command line; `None` when it could not be made.
    pub unix: Option<StdUnixListener>,
}

/// Connections to metrics and health at a time, and to the control socket.
pub const AT_A_TIME: usize = 16;

/// Prometheus asks again after 15 s to a minute.
const PUBLIC: Bounds = Bounds { connections: AT_A_TIME, age: Duration::from_secs(120), grace: Duration::from_secs(30) };
/// A reload waits for the repository.
const CONTROL: Bounds =
    Bounds { connections: AT_A_TIME, age: Duration::from_secs(30), grace: Duration::from_secs(3600) };

/// Serves until the process ends. Where `[admin] bind` could not be bound yet, its socket may be
/// sent later.
pub fn start(
    shared: Arc<Shared>,
    sockets: Sockets,
    reload: mpsc::Sender<ReloadRequest>,
) -> io::Result<mpsc::UnboundedSender<StdTcpListener>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (later, mut bound) = mpsc::unbounded_channel();
    if let Some(tcp) = sockets.tcp {
        let _ = later.send(tcp);
    }
    std::thread::Builder::new().name("admin".into()).spawn(move || {
        let app = App { shared, reload };
        let outcome = runtime.block_on(async {
            let public = public(app.clone());
            if let Some(unix) = sockets.unix {
                unix.set_nonblocking(true)?;
                let control = public.clone().merge(control(app));
                tokio::spawn(bounded_server::serve(UnixListener::from_std(unix)?, control, CONTROL));
            }
            while let Some(tcp) = bound.recv().await {
                tcp.set_nonblocking(true)?;
                tokio::spawn(bounded_server::serve(TcpListener::from_std(tcp)?, public.clone(), PUBLIC));
            }
            io::Result::Ok(())
        });
        if let Err(error) = outcome {
            tracing::error!(%error, "metrics and control ended; forwarding goes on");
        }
    })?;
    Ok(later)
}

/// Binds the control socket. A socket left behind by a dead daemon is replaced. A live one is not,
/// and neither is anything that is no socket.
///
/// # Errors
/// `AddrInUse`: somebody else has the socket. `AlreadyExists`: something else lies there.
pub fn bind_unix(path: &Path) -> io::Result<StdUnixListener> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)
            .map_err(|error| io::Error::new(error.kind(), format!("the folder {}: {error}", parent.display())))?;
    }
    if let Ok(there) = std::fs::symlink_metadata(path) {
        let kind = there.file_type();
        if !kind.is_socket() {
            let what = match () {
                () if kind.is_dir() => "a folder",
                () if kind.is_symlink() => "a symbolic link",
                () => "a file that is no socket",
            };
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("{what} is there")));
        }
        match StdUnixStream::connect(path) {
            Ok(_) => return Err(io::Error::new(io::ErrorKind::AddrInUse, "another daemon answers on it")),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)?,
            Err(error) => {
                let text = format!("another program has a socket there, which cannot be asked: {error}");
                return Err(io::Error::new(io::ErrorKind::AddrInUse, text));
            }
        }
    }
    let listener = StdUnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

/// Removes the control socket, or leaves alone what lies in its place by now.
pub fn remove_unix(path: &Path) {
    if std::fs::symlink_metadata(path).is_ok_and(|there| there.file_type().is_socket()) {
        let _ = std::fs::remove_file(path);
    }
}

/// What anybody who reaches the address may see.
fn public(app: App) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .with_state(app)
}

/// What the owner of the socket may see and do.
fn control(app: App) -> Router {
    Router::new()
        .route("/status", get(|State(app): State<App>| async move { Json(status(&app.shared)) }))
        .route("/connections", get(connections))
        .route("/reload", post(reload))
        .route("/drain", post(|State(app), Query(query)| async move { set_drained(&app, &query, true) }))
        .route("/undrain", post(|State(app), Query(query)| async move { set_drained(&app, &query, false) }))
        .with_state(app)
}

async fn metrics(State(app): State<App>) -> Response {
    app.shared.metrics.engine.backlog.set(app.shared.registry.collect() as i64);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], app.shared.metrics.render()).into_response()
}

async fn ready(State(app): State<App>) -> (StatusCode, String) {
    if !app.shared.ready.load(Relaxed) {
        return (StatusCode::SERVICE_UNAVAILABLE, "draining\n".to_owned());
    }
    let waiting = app.shared.waiting.lock().expect("no panic while held");
    let text = waiting
        .iter()
        .map(|waiting| format!("not listening on {} ({}) yet: {}\n", waiting.addr, waiting.role, waiting.reason()));
    let listeners = app.shared.generation.load().config.listeners.iter().map(|l| l.bind.len()).sum::<usize>();
    let missing = waiting.iter().filter(|waiting| matches!(waiting.role, Role::Listener(_))).count();
    // Whatever else is missing, clients are served.
    let status = if missing < listeners { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, if missing < listeners { "ready\n" } else { "" }.to_owned() + &text.collect::<String>())
}

async fn connections(State(app): State<App>) -> Json<Vec<Connection>> {
    Json(app.shared.registry.connections())
}

async fn reload(State(app): State<App>) -> (StatusCode, String) {
    let (outcome, answer) = oneshot::channel();
    let asked = app.reload.send(outcome).await;
    match (asked, answer.await) {
        (Ok(()), Ok(Ok(text))) => (StatusCode::OK, text),
        (Ok(()), Ok(Err(text))) => (StatusCode::UNPROCESSABLE_ENTITY, text),
        _ => (StatusCode::SERVICE_UNAVAILABLE, "the daemon is stopping\n".to_owned()),
    }
}

#[derive(Deserialize)]
struct TargetName {
    target: String,
}

fn set_drained(app: &App, TargetName { target }: &TargetName, drained: bool) -> (StatusCode, String) {
    let generation = app.shared.generation.load();
    let mut text = String::new();
    for pool in &generation.pools {
        for t in pool.targets().iter().filter(|t| **t.text() == **target) {
            t.set_drained(drained);
            let what = if drained { "gets no new connections" } else { "gets new connections again" };
            text += &format!("{target} of upstream {} {what}\n", pool.config.name);
            tracing::info!(upstream = &*pool.config.name, target_name = target, drained, "operator");
        }
    }
    if text.is_empty() {
        let known: Vec<_> = generation.pools.iter().flat_map(|p| p.targets()).map(|t| t.text().to_string()).collect();
        let text = format!("no upstream has the target {target}; there are: {}\n", known.join(", "));
        return (StatusCode::NOT_FOUND, text);
    }
    (StatusCode::OK, text)
}

/// The document of `dataplane status --json`.
fn status(shared: &Shared) -> Value {
    let generation = shared.generation.load();
    let config = &generation.config;
    let limits = &config.limits;
    let load = shared.load.lock().expect("no panic while held");
    let failure = load.last_error.as_ref();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "uptime": shared.started.elapsed().as_secs_f64(),
        "engine": {
            "configured": generation.engine.configured,
            "effective": generation.engine.name(),
            "reasons": generation.engine.reasons,
            "warnings": generation.engine.warnings,
        },
        "config": {
            "hash": config.hash,
            "path": config.source.path,
            "commit": config.source.revision,
            "loaded_at": unix_seconds(generation.loaded_at),
            "last_success": load.last_success.map(unix_seconds),
            "last_error": failure.map(|failure| &failure.text),
            "last_error_at": failure.map(|failure| unix_seconds(failure.at)),
            "repository": config.repository.as_ref().map(|repository| json!({
                "git": repository.git,
                "ref": repository.reference,
                "path": repository.path,
                "interval": repository.interval.as_secs_f64(),
            })),
        },
        "shortages": shared.metrics.shortages.describe(),
        "waiting": shared.waiting.lock().expect("no panic while held").iter().map(|waiting| json!({
            "address": waiting.addr.to_string(),
            "for": waiting.role.to_string(),
            "reason": waiting.reason(),
        })).collect::<Vec<_>>(),
        "listeners": config.listeners.iter().map(|l| json!({
            "name": l.name,
            "mode": l.mode.as_str(),
            "acme_port": match l.mode { Mode::Http { acme_port } => Some(acme_port), _ => None },
            "bind": l.bind.iter().map(|b| b.addr.to_string()).collect::<Vec<_>>(),
        })).collect::<Vec<_>>(),
        "routes": config.routes.iter().map(|r| json!({
            "name": r.name,
            "hosts": r.hosts.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "alpn": r.alpn,
            "listeners": r.listeners.iter().map(|i| &*config.listeners[*i].name).collect::<Vec<_>>(),
            "action": if r.upstream().is_some() { "forward" } else { "refuse" },
            "upstream": r.upstream().map(|upstream| &*config.upstreams[upstream].name),
        })).collect::<Vec<_>>(),
        "upstreams": generation.pools.iter().map(|p| json!({
            "name": p.config.name,
            "balance": p.config.balance,
            "send_proxy": p.config.send_proxy,
            "targets": p.targets().iter().map(|t| t.status()).collect::<Vec<_>>(),
        })).collect::<Vec<_>>(),
        "limits": {
            "connections": shared.admission.open(),
            "max_connections": shared.admission.max(),
            "max_connections_by": *shared.limited_by.lock().expect("no panic while held"),
            "max_connections_per_client": limits.max_connections_per_client,
            "hello_timeout": limits.hello_timeout.as_secs_f64(),
            "hello_max_bytes": limits.hello_max_bytes,
            "idle_timeout": limits.idle_timeout.as_secs_f64(),
            "half_closed_timeout": limits.half_closed_timeout.as_secs_f64(),
            "dead_peer_timeout": limits.dead_peer_timeout.as_secs_f64(),
            "drain_timeout": limits.drain_timeout.as_secs_f64(),
            "kernel_memory": limits.kernel_memory,
        },
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn what_is_no_dead_socket_is_left_where_it_is_and_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::create_dir(path("folder")).unwrap();
        std::fs::write(path("file"), "text").unwrap();
        drop(StdUnixListener::bind(path("dead")).unwrap());
        for (link, to) in [("link", "dead"), ("dangling", "nothing")] {
            std::os::unix::fs::symlink(path(to), path(link)).unwrap();
        }
        let _live = StdUnixListener::bind(path("live")).unwrap();
        let _other = UnixDatagram::bind(path("other")).unwrap();
        for (name, kind, why) in [
            ("folder", io::ErrorKind::AlreadyExists, "a folder is there"),
            ("file", io::ErrorKind::AlreadyExists, "a file that is no socket is there"),
            ("link", io::ErrorKind::AlreadyExists, "a symbolic link is there"),
            ("dangling", io::ErrorKind::AlreadyExists, "a symbolic link is there"),
            ("file/below", io::ErrorKind::AlreadyExists, "the folder "),
            ("live", io::ErrorKind::AddrInUse, "another daemon answers on it"),
            ("other", io::ErrorKind::AddrInUse, "another program has a socket there"),
        ] {
            let error = bind_unix(&path(name)).unwrap_err();
            assert!(error.kind() == kind && error.to_string().contains(why), "{name}: {error:?}");
            remove_unix(&path("folder"));
            remove_unix(&path("file"));
            remove_unix(&path("link"));
            let is_there = std::fs::symlink_metadata(path(name)).is_ok() || name.contains('/');
            assert!(is_there, "{name} was removed");
        }
        drop(bind_unix(&path("dead")).unwrap());
        remove_unix(&path("dead"));
        assert!(!path("dead").exists());
    }
}
