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

use crate::connection;
use crate::handover::Inherited;
use crate::listen::{self, Stop};
use crate::parking::Parcel;
use crate::shared::Shared;

/// What the control thread asks of a worker.
pub enum Command {
    /// Accept on this socket, which is bound to this address.
    Listen(SocketAddr, StdListener),
    /// Stop accepting on this address, and answer when all that the kernel had completed was
    /// accepted; its connections go on.
    Close(SocketAddr, oneshot::Sender<()>),
    /// Stop accepting everywhere, at once: what the kernel has completed stays in the queues for
    /// whoever accepts next. Answer when that is done.
    Rest(oneshot::Sender<()>),
    /// Go on with these connections, and answer what became of them.
    Resume(Vec<Parcel>, oneshot::Sender<Inherited>),
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

/// A loop that accepts, and how it is told to stop.
type Accepting = (oneshot::Sender<Stop>, JoinHandle<()>);

async fn work(shared: Arc<Shared>, mut inbox: mpsc::UnboundedReceiver<Command>) {
    // A predecessor may have had more sockets on an address than there are workers.
    let mut listening: HashMap<SocketAddr, Vec<Accepting>> = HashMap::new();
    while let Some(command) = inbox.recv().await {
        match command {
            Command::Listen(addr, listener) => match TcpListener::from_std(listener) {
                Ok(listener) => {
                    let (stop, stopped) = oneshot::channel();
                    let accepting = tokio::spawn(listen::accept(shared.clone(), addr, listener, stopped));
                    listening.entry(addr).or_default().push((stop, accepting));
                }
                Err(error) => tracing::error!(%addr, %error, "a listener could not be registered with epoll"),
            },
            Command::Close(addr, closed) => stop(listening.remove(&addr), Stop::Drain, closed),
            Command::Rest(rests) => stop(listening.drain().map(|(_, all)| all), Stop::Leave, rests),
            Command::Resume(parcels, resumed) => {
                let generation = shared.generation.load_full();
                let mut inherited = Inherited::default();
                for parcel in parcels {
                    match connection::resume(&shared, &generation, parcel) {
                        Ok(()) => inherited.kept += 1,
                        Err(error) => {
                            inherited.reset += 1;
                            tracing::warn!(error = format!("{error:#}"), "a connection is reset");
                        }
                    }
                }
                let _ = resumed.send(inherited);
            }
            Command::Ping(pong) => drop(pong.send(())),
            Command::End => break,
        }
    }
}

/// Has loops stop, and answers when they have. In a task of its own: the next command does not wait
/// for clients that keep coming.
fn stop(loops: impl IntoIterator<Item = Vec<Accepting>>, how: Stop, stopped: oneshot::Sender<()>) {
    let loops: Vec<_> = loops
        .into_iter()
        .flatten()
        .map(|(stop, accepting)| {
            let _ = stop.send(how);
            accepting
        })
        .collect();
    tokio::spawn(async move {
        for accepting in loops {
            let _ = accepting.await;
        }
        let _ = stopped.send(());
    });
}
