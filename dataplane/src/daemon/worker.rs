//! Worker threads: each runs accept loops and connections on a runtime of its own, and shares
//! nothing with the others but [`Shared`].

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::thread;

use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::listen;
use crate::shared::Shared;

/// What the control thread asks of a worker.
pub enum Command {
    /// Accept on this socket, which is bound to this address.
    Listen(SocketAddr, StdListener),
    /// Stop accepting on this address, and answer when all that the kernel had completed was
    /// accepted; its connections go on.
    Close(SocketAddr, oneshot::Sender<()>),
    /// Answer, to prove that the thread is not stuck.
    Ping(oneshot::Sender<()>),
    /// End now: connections that are left are reset.
    End,
}

/// Polls of tasks between two looks at epoll. Tokio's default of 61 lets bulk transfers, which are
/// always ready, keep everybody else waiting.
pub const EVENT_INTERVAL: u32 = 4;

pub struct Worker {
    commands: mpsc::UnboundedSender<Command>,
    thread: thread::JoinHandle<()>,
}

impl Worker {
    pub fn start(index: usize, shared: Arc<Shared>) -> io::Result<Self> {
        let (commands, inbox) = mpsc::unbounded_channel();
        // A connection that has to give way to one of another worker is woken from there. By default
        // 31 others go first, and while clients keep coming there are always others.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .event_interval(EVENT_INTERVAL)
            .global_queue_interval(1)
            .build()?;
        let thread = thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
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
    let mut listening: HashMap<SocketAddr, (oneshot::Sender<()>, JoinHandle<()>)> = HashMap::new();
    while let Some(command) = inbox.recv().await {
        match command {
            Command::Listen(addr, listener) => match TcpListener::from_std(listener) {
                Ok(listener) => {
                    let (stop, stopped) = oneshot::channel();
                    let accepting = tokio::spawn(listen::accept(shared.clone(), addr, listener, stopped));
                    listening.insert(addr, (stop, accepting));
                }
                Err(error) => tracing::error!(%addr, %error, "a listener could not be registered with epoll"),
            },
            Command::Close(addr, closed) => {
                let accepting = listening.remove(&addr).map(|(stop, accepting)| {
                    drop(stop);
                    accepting
                });
                // In a task of its own: the next command does not wait for clients that keep
                // coming.
                tokio::spawn(async move {
                    if let Some(accepting) = accepting {
                        let _ = accepting.await;
                    }
                    let _ = closed.send(());
                });
            }
            Command::Ping(pong) => drop(pong.send(())),
            Command::End => break,
        }
    }
}
