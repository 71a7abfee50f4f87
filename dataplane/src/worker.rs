//! Worker threads: each runs accept loops and connections on a runtime of its own, and shares nothing with the others but [`Shared`].

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::thread::JoinHandle;

use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};

use crate::listen;
use crate::shared::Shared;

/// What the control thread asks of a worker.
pub enum Command {
    /// Accept on this socket, which is bound to this address.
    Listen(SocketAddr, StdListener),
    /// Stop accepting on this address; its connections go on.
    Close(SocketAddr),
    /// Answer, to prove that the thread is not stuck.
    Ping(oneshot::Sender<()>),
    /// End now: connections that are left are reset.
    End,
}

/// A running worker.
pub struct Worker {
    commands: mpsc::UnboundedSender<Command>,
    thread: JoinHandle<()>,
}

impl Worker {
    /// Starts one.
    pub fn start(index: usize, shared: Arc<Shared>) -> io::Result<Self> {
        let (commands, inbox) = mpsc::unbounded_channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
            runtime.block_on(work(shared, inbox));
            // Drops the connections, and does not wait for a resolver that hangs.
            runtime.shutdown_background();
        })?;
        Ok(Self { commands, thread })
    }

    /// Sends a command; a worker that is gone gets none.
    pub fn send(&self, command: Command) {
        let _ = self.commands.send(command);
    }

    /// Ends the thread, and with it every connection that it has.
    pub fn end(self) {
        self.send(Command::End);
        let _ = self.thread.join();
    }
}

async fn work(shared: Arc<Shared>, mut inbox: mpsc::UnboundedReceiver<Command>) {
    let mut listening: HashMap<SocketAddr, oneshot::Sender<()>> = HashMap::new();
    while let Some(command) = inbox.recv().await {
        match command {
            Command::Listen(addr, listener) => match TcpListener::from_std(listener) {
                Ok(listener) => {
                    let (stop, stopped) = oneshot::channel();
                    listening.insert(addr, stop);
                    tokio::spawn(listen::accept(shared.clone(), addr, listener, stopped));
                }
                Err(error) => tracing::error!(%addr, %error, "a listener could not be registered with epoll"),
            },
            Command::Close(addr) => drop(listening.remove(&addr)),
            Command::Ping(pong) => drop(pong.send(())),
            Command::End => break,
        }
    }
}
