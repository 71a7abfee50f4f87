//! Metrics and health over TCP, status and control over a unix socket: HTTP on a thread and a
//! runtime of its own.
//!
//! Nothing here is on the way of a connection's bytes: it reads shared state, and asks other
//! threads for what changes it.

use std::io;
use std::net::TcpListener as StdTcpListener;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream};
use std::path::{Path, PathBuf};
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
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

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
    upgrade: mpsc::Sender<UpgradeRequest>,
}

/// Asked by an operator: another process is to take over.
pub struct UpgradeRequest {
    /// What it is to run; `None`: what lies where this process's program lay.
    pub program: Option<PathBuf>,
    /// Where to send the outcome.
    pub answer: oneshot::Sender<Result<String, String>>,
}

/// What is asked of the admin thread.
pub enum Order {
    /// Serve metrics and health there.
    Public(StdTcpListener),
    /// Take commands there.
    Control(StdUnixListener),
    /// Stop accepting, finish the answers that are under way, and say so.
    Finish(oneshot::Sender<()>),
}

/// Connections to metrics and health at a time, and to the control socket.
pub const AT_A_TIME: usize = 16;

/// Prometheus asks again after 15 s to a minute.
const PUBLIC: Bounds = Bounds { connections: AT_A_TIME, age: Duration::from_secs(120), grace: Duration::from_secs(30) };
/// A reload waits for the repository.
const CONTROL: Bounds =
    Bounds { connections: AT_A_TIME, age: Duration::from_secs(30), grace: Duration::from_secs(3600) };

/// Starts the thread, which serves where it is told to.
pub fn start(
    shared: Arc<Shared>,
    reload: mpsc::Sender<ReloadRequest>,
    upgrade: mpsc::Sender<UpgradeRequest>,
) -> io::Result<mpsc::UnboundedSender<Order>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (orders, inbox) = mpsc::unbounded_channel();
    std::thread::Builder::new().name("admin".into()).spawn(move || {
        let app = App { shared, reload, upgrade };
        if let Err(error) = runtime.block_on(serve(app, inbox)) {
            tracing::error!(%error, "metrics and control ended; forwarding goes on");
        }
    })?;
    Ok(orders)
}

async fn serve(app: App, mut orders: mpsc::UnboundedReceiver<Order>) -> io::Result<()> {
    let public = public(app.clone());
    let control = public.clone().merge(control(app));
    let (mut end, _) = watch::channel(false);
    let mut serving = JoinSet::new();
    while let Some(order) = orders.recv().await {
        match order {
            Order::Public(tcp) => {
                tcp.set_nonblocking(true)?;
                let listener = TcpListener::from_std(tcp)?;
                serving.spawn(bounded_server::serve(listener, public.clone(), PUBLIC, end.subscribe()));
            }
            Order::Control(unix) => {
                unix.set_nonblocking(true)?;
                let listener = UnixListener::from_std(unix)?;
                serving.spawn(bounded_server::serve(listener, control.clone(), CONTROL, end.subscribe()));
            }
            Order::Finish(finished) => {
                end.send_replace(true);
                end = watch::channel(false).0;
                let ended = std::mem::take(&mut serving).join_all();
                tokio::spawn(async move {
                    ended.await;
                    let _ = finished.send(());
                });
            }
        }
    }
    Ok(())
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
        .route("/upgrade", post(upgrade))
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

/// Where another program lies in the place of ours, it takes over, with the configuration of now.
async fn reload(State(app): State<App>) -> (StatusCode, String) {
    if app.shared.program.is_another() {
        return take_over(&app, None).await;
    }
    let (outcome, answer) = oneshot::channel();
    let _ = app.reload.send(outcome).await;
    said(answer).await
}

#[derive(Deserialize)]
struct Binary {
    binary: Option<PathBuf>,
}

async fn upgrade(State(app): State<App>, Query(Binary { binary }): Query<Binary>) -> (StatusCode, String) {
    take_over(&app, binary).await
}

async fn take_over(app: &App, program: Option<PathBuf>) -> (StatusCode, String) {
    let (outcome, answer) = oneshot::channel();
    let _ = app.upgrade.send(UpgradeRequest { program, answer: outcome }).await;
    said(answer).await
}

async fn said(answer: oneshot::Receiver<Result<String, String>>) -> (StatusCode, String) {
    match answer.await {
        Ok(Ok(text)) => (StatusCode::OK, text),
        Ok(Err(text)) => (StatusCode::UNPROCESSABLE_ENTITY, text),
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, "the daemon is stopping\n".to_owned()),
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
        "handover": shared.lineage.descent(),
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
