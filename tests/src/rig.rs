//! The usual set: three hosts, a daemon on the middle one, and an upstream that the test itself
//! plays.
//!
//! [`Rig::pair`] gives both ends of a connection through the daemon, so a test scripts client and
//! upstream side by side.

use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

pub use crate::PATIENCE;
use crate::daemon::{Config, Daemon, HOST};
use crate::netns::{CLUSTER, ENTRANCE, Net};
use crate::stream::{Preamble, client_hello, is_alike, never_hang, read_preamble};

/// Hosts, daemon and upstream.
pub struct Rig {
    /// The daemon on the entrance node.
    pub daemon: Daemon,
    /// The upstream, `100.64.0.2:443`.
    pub upstream: TcpListener,
    /// The hosts. Declared last: they go when nothing runs on them any more.
    pub net: Net,
}

impl Rig {
    /// Starts all three.
    #[track_caller]
    pub fn new(config: &Config) -> Self {
        let net = Net::new();
        let upstream = net.cluster.listen(&format!("{}:443", CLUSTER[0]));
        let daemon = Daemon::start(&net, config);
        Self { daemon, upstream, net }
    }

    /// A client that has connected to the listener's IPv4 address and has sent nothing.
    #[track_caller]
    pub fn connect(&self) -> TcpStream {
        let client = self.net.client.connect(public()).expect("the daemon accepts");
        never_hang(&client);
        client
    }

    /// A client that has connected and sent the hello of the routed host.
    #[track_caller]
    pub fn open(&self) -> TcpStream {
        let mut client = self.connect();
        client.write_all(&hello()).expect("sent");
        client
    }

    /// The upstream's end of the next connection, its hello read.
    #[track_caller]
    pub fn accept(&self) -> TcpStream {
        let (stream, preamble) = accept(&self.upstream, false);
        assert!(is_alike(&preamble.hello, &hello()), "the hello arrives as it was sent");
        stream
    }

    /// Both ends of a connection through the daemon: the client's and the upstream's, the hello
    /// behind them.
    #[track_caller]
    pub fn pair(&self) -> (TcpStream, TcpStream) {
        let client = self.open();
        (client, self.accept())
    }

    /// Waits until the daemon has no connection any more.
    #[track_caller]
    pub fn wait_idle(&self) {
        self.daemon.wait_metric("dataplane_connections_active", &[], 0.0);
    }
}

/// The listener's IPv4 address.
pub fn public() -> SocketAddr {
    format!("{}:443", ENTRANCE[0]).parse().expect("an address")
}

/// The hello of the routed host.
pub fn hello() -> Vec<u8> {
    client_hello(Some(HOST), &["h2", "http/1.1"])
}

/// The next connection of an upstream, with what stood before its payload; panics when none comes.
///
/// One that ends without a word is not meant; see [`ended_at_once`].
#[track_caller]
pub fn accept(listener: &TcpListener, proxied: bool) -> (TcpStream, Preamble) {
    let stream = loop {
        let stream = accept_within(listener, PATIENCE).expect("a connection reaches the upstream");
        stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
        if !ended_at_once(&stream) {
            break stream;
        }
    };
    let preamble = read_preamble(&stream, proxied).expect("a hello reaches the upstream");
    never_hang(&stream);
    (stream, preamble)
}

/// Waits for the first byte of an upstream's connection; whether it ended without one. A target
/// that has reset a connection before its first byte is put aside and tried out a second later, and
/// of two targets that are dialled side by side one is not needed.
pub fn ended_at_once(stream: &TcpStream) -> bool {
    matches!(stream.peek(&mut [0]), Ok(0))
}

/// The next connection of an upstream, if one comes in time.
pub fn accept_within(listener: &TcpListener, limit: Duration) -> Option<TcpStream> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let timeout = Timespec::try_from(limit).expect("a short time");
    let ready = poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&timeout)).expect("poll");
    (ready > 0).then(|| {
        let stream = listener.accept().expect("accept").0;
        never_hang(&stream);
        stream
    })
}

/// An upstream that answers each connection on a thread of its own; stops when dropped.
pub struct Server {
    accepted: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    acceptor: Option<JoinHandle<()>>,
}

impl Server {
    /// Takes over the listener.
    pub fn start(listener: TcpListener, handler: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        let accepted = Arc::new(AtomicUsize::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let (count, stopped) = (Arc::clone(&accepted), Arc::clone(&stop));
        let handler = Arc::new(handler);
        let acceptor = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                if let Some(stream) = accept_within(&listener, Duration::from_millis(50)) {
                    count.fetch_add(1, Ordering::Relaxed);
                    let handler = Arc::clone(&handler);
                    std::thread::spawn(move || handler(stream));
                }
            }
        });
        Self { accepted, stop, acceptor: Some(acceptor) }
    }

    /// Reads the hello, then sends back what comes, to the end.
    pub fn echo(listener: TcpListener) -> Self {
        Self::start(listener, |stream| {
            if read_preamble(&stream, false).is_ok() {
                // A reset connection is the client's business.
                let _ = std::io::copy(&mut &stream, &mut &stream);
            }
        })
    }

    /// TCP connections that it has accepted.
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let acceptor = self.acceptor.take().expect("dropped once");
        let ended = acceptor.join();
        assert!(ended.is_ok() || std::thread::panicking(), "the upstream's acceptor panicked");
    }
}
