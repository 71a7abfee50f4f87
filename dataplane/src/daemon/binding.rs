//! The sockets that the daemon listens on: bound as a whole before anything changes, and what to do
//! about those that cannot be.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::admin;
use crate::config::{Bind, Config, Diagnostic, Webhook};
use crate::handover::Listening;
use crate::listen;
use crate::shared::{Role, Waiting};
use crate::source::webhook;

/// The sockets of the workers, by address.
pub(super) type Bound = HashMap<SocketAddr, Vec<TcpListener>>;

/// Binds the addresses of `config` that are not bound already; all or none, with every failure
/// told. Addresses that this machine does not have are no failure.
pub(super) fn bind_all(config: &Config, bound: &[SocketAddr], workers: usize) -> Result<(Bound, Vec<Waiting>)> {
    let (sockets, waiting, errors) = bind_each(config, bound, workers);
    if errors.is_empty() { Ok((sockets, waiting)) } else { bail!(errors) }
}

/// Binds those of the addresses that can be, and says of each of the others why it cannot.
pub(super) fn bind_each(config: &Config, bound: &[SocketAddr], workers: usize) -> (Bound, Vec<Waiting>, String) {
    let (mut sockets, mut waiting, mut errors) = (HashMap::new(), Vec::new(), String::new());
    let beside_own = |addr: SocketAddr| bound.iter().any(|b| b.port() == addr.port() && b.is_ipv4() == addr.is_ipv4());
    let all = config.listeners.iter().flat_map(|l| l.bind.iter().map(move |bind| (l, bind)));
    for (listener, bind) in all.filter(|(_, bind)| !bound.contains(&bind.addr)) {
        match listen::bind(bind.addr, workers, beside_own(bind.addr)) {
            Ok(listeners) => {
                sockets.insert(bind.addr, listeners);
            }
            Err(error) if listen::is_no_ipv6(bind.addr, &error) => {
                tracing::warn!(addr = %bind.addr, "this machine has no IPv6: not listening there");
            }
            Err(error) if is_missing(&error) => {
                let role = Role::Listener(listener.name.clone());
                waiting.push(Waiting::new(bind.addr, role, &error));
            }
            Err(error) => {
                let _ = write!(errors, "{}", bind_failure(config, bind, &error));
            }
        }
    }
    (sockets, waiting, errors)
}

/// An address of a device that is not up yet, tailscale0's above all.
fn is_missing(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable
}

/// The sockets of the admin thread.
#[derive(Debug, Default)]
pub(super) struct AdminSockets {
    /// For Prometheus and health checks; `None` when this machine does not have the address yet.
    pub(super) public: Option<TcpListener>,
    /// For the command line; `None` when it could not be made.
    pub(super) control: Option<(PathBuf, UnixListener)>,
}

/// Binds them, but for those that a predecessor has.
pub(super) fn bind_admin(config: &Config, offered: &[Listening], waiting: &mut Vec<Waiting>) -> Result<AdminSockets> {
    let bind = &config.admin.bind;
    let is_offered = |socket: &Listening| offered.contains(socket);
    let bound = if is_offered(&Listening::Admin(bind.addr)) { Ok(None) } else { listen::bind_one(bind.addr).map(Some) };
    let public = match bound {
        Ok(public) => public,
        Err(error) if is_missing(&error) => {
            waiting.push(Waiting::new(bind.addr, Role::Admin, &error));
            None
        }
        Err(error) => bail!(bind_failure(config, bind, &error)),
    };
    let socket = &config.admin.socket;
    if is_offered(&Listening::Control(socket.clone())) {
        return Ok(AdminSockets { public, control: None });
    }
    let control = match admin::bind_unix(socket) {
        Ok(unix) => Some((socket.clone(), unix)),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            tracing::warn!(
                socket = %socket.display(),
                "no permission to make the control socket: the commands status, connections, reload, drain and undrain \
                 will not work; set admin.socket to a path in a directory of yours"
            );
            None
        }
        Err(error) => {
            let remedy = if error.kind() == io::ErrorKind::AddrInUse {
                "stop the other daemon, or set `socket` in [admin] to another path"
            } else {
                "set `socket` in [admin] to a path where nothing is, in a folder that this program may write into"
            };
            bail!("cannot make the control socket {}: {error}\n  help: {remedy}", socket.display())
        }
    };
    Ok(AdminSockets { public, control })
}

/// The webhook's socket, and what is served with a copy of it.
pub(super) type Serving = (TcpListener, webhook::Served);

/// Binds the webhook's address, unless it is bound already, or a predecessor has it.
pub(super) fn bind_webhook(
    config: &Config,
    offered: &[Listening],
    bound: Option<&TcpListener>,
    waiting: &mut Vec<Waiting>,
) -> Result<Option<Serving>> {
    let Some(webhook) = config.webhook() else { return Ok(None) };
    if offered.contains(&Listening::Webhook(webhook.bind.addr)) {
        return Ok(None);
    }
    match try_webhook(webhook, bound) {
        Ok(serving) => Ok(Some(serving)),
        Err(error) if is_missing(&error) => {
            waiting.push(Waiting::new(webhook.bind.addr, Role::Webhook, &error));
            Ok(None)
        }
        Err(error) => bail!(bind_failure(config, &webhook.bind, &error)),
    }
}

pub(super) fn try_webhook(Webhook { bind, secret_file }: &Webhook, bound: Option<&TcpListener>) -> io::Result<Serving> {
    let bound = bound.filter(|bound| bound.local_addr().is_ok_and(|addr| addr == bind.addr));
    let listener = bound.map_or_else(|| listen::bind_one(bind.addr), TcpListener::try_clone)?;
    Ok((listener.try_clone()?, webhook::Served { listener, secret_file: secret_file.clone() }))
}

fn bind_failure(config: &Config, bind: &Bind, error: &io::Error) -> String {
    let port = bind.addr.port();
    let remedy = match error.kind() {
        io::ErrorKind::AddrInUse => {
            format!(
                "another program listens there: find it with `ss -ltnp 'sport = :{port}'` and stop it, or choose another port"
            )
        }
        io::ErrorKind::PermissionDenied => {
            format!(
                "ports below 1024 need root or CAP_NET_BIND_SERVICE: run as root, by the systemd unit, or choose a port above {port}"
            )
        }
        io::ErrorKind::AddrNotAvailable => {
            "this machine does not have that address: `ip address` lists those that it has".to_owned()
        }
        _ => "choose another address".to_owned(),
    };
    let message = format!("cannot listen on {}: {error}", bind.addr);
    if bind.span.is_empty() {
        // A default stands nowhere in the file.
        return format!(
            "{}: error: {message}\n  help: this is the default of `bind` in [admin], where metrics are served. {remedy}: `bind = \"127.0.0.1:{}\"` in [admin]\n",
            config.source.path.display(),
            if port == 9443 { 9444 } else { 9443 }
        );
    }
    Diagnostic::error(bind.span.clone(), message, remedy).render(&config.source).to_string()
}
