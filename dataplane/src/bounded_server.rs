//! HTTP/1 on a listener, within bounds: so many connections at a time, each for so long. When all
//! places are taken the oldest connection gives way, so that idle ones keep nobody out.
//!
//! It must not know what is served.

use std::collections::VecDeque;
use std::io;
use std::pin::pin;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};

/// For a request's head, and for the next one on a connection that is kept.
const HEAD: Duration = Duration::from_secs(10);
/// Bytes of a request that are held at a time: heads of browsers have some KiB.
const BUFFER: usize = 16 << 10;
/// After a failure to accept: long enough not to spin.
const BREATHER: Duration = Duration::from_millis(200);

/// What a server may use.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Connections at a time.
    pub connections: usize,
    /// How long a connection may go on to its next request.
    pub age: Duration,
    /// For the answer that is under way then.
    pub grace: Duration,
}

pub trait Listen {
    type Io: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    fn accept(&self) -> impl Future<Output = io::Result<Self::Io>> + Send;
}

impl Listen for TcpListener {
    type Io = TcpStream;

    async fn accept(&self) -> io::Result<TcpStream> {
        Self::accept(self).await.map(|(stream, _)| stream)
    }
}

impl Listen for UnixListener {
    type Io = UnixStream;

    async fn accept(&self) -> io::Result<UnixStream> {
        Self::accept(self).await.map(|(stream, _)| stream)
    }
}

/// Serves until `end` says so, then finishes the answers that are under way.
pub async fn serve(listener: impl Listen, router: Router, bounds: Bounds, mut end: watch::Receiver<bool>) {
    let mut open = JoinSet::new();
    let mut oldest: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        let accepted = tokio::select! {
            biased;
            _ = end.wait_for(|end| *end) => break,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => {
                tracing::debug!(%error, "admin");
                sleep(BREATHER).await;
                continue;
            }
        };
        while open.try_join_next().is_some() {}
        oldest.retain(|connection| !connection.is_finished());
        if oldest.len() >= bounds.connections
            && let Some(first) = oldest.pop_front()
        {
            first.abort();
        }
        oldest.push_back(open.spawn(connection(stream, router.clone(), bounds, end.clone())));
    }
    drop(listener);
    open.join_all().await;
}

async fn connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    router: Router,
    bounds: Bounds,
    mut end: watch::Receiver<bool>,
) {
    let served = http1::Builder::new()
        .max_buf_size(BUFFER)
        .header_read_timeout(HEAD)
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut served = pin!(served);
    tokio::select! {
        _ = served.as_mut() => return,
        () = sleep(bounds.age) => {}
        _ = end.wait_for(|end| *end) => {}
    }
    served.as_mut().graceful_shutdown();
    let _ = timeout(bounds.grace, served).await;
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const REQUEST: &[u8] = b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n";

    async fn server(bounds: Bounds) -> std::net::SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let (end, ends) = watch::channel(false);
        tokio::spawn(async move {
            serve(listener, Router::new().route("/x", get(|| async { "hello" })), bounds, ends).await;
            drop(end);
        });
        at
    }

    #[tokio::test]
    async fn idle_connections_give_way_to_whoever_asks() {
        let bounds = Bounds { connections: 4, age: Duration::from_secs(60), grace: Duration::from_secs(60) };
        let at = server(bounds).await;
        let mut idle = Vec::new();
        for _ in 0..100 {
            idle.push(TcpStream::connect(at).await.unwrap());
        }
        let mut asks = TcpStream::connect(at).await.unwrap();
        asks.write_all(REQUEST).await.unwrap();
        let mut answer = [0; 15];
        asks.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200 OK");
        let gone = timeout(Duration::from_secs(20), idle[0].read(&mut [0; 1])).await.expect("it ends");
        assert!(!matches!(gone, Ok(1)), "the oldest gave way");
    }

    #[tokio::test]
    async fn a_connection_ends_when_its_time_is_over_however_slowly_it_reads() {
        let bounds = Bounds { connections: 4, age: Duration::from_millis(50), grace: Duration::from_millis(50) };
        let at = server(bounds).await;
        let mut stalls = TcpStream::connect(at).await.unwrap();
        stalls.write_all(b"GET /x HTTP/1.1\r\n").await.unwrap();
        let end = timeout(Duration::from_secs(20), stalls.read_to_end(&mut Vec::new())).await;
        assert!(end.is_ok(), "it ends");
    }
}
