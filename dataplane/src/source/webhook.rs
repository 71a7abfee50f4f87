//! `POST /hook`: a forge says that something was pushed, signed with a shared secret. It only has
//! the repository looked at.
//!
//! Anybody may reach the address, so everything that it may cost is bounded: connections, their
//! time and bytes, looks and log lines. Only signed requests count against their number.
//!
//! Strangers do not keep a forge or an ingress from being heard that connects from this machine or
//! the tailnet: these have places of their own. Elsewhere, when all places are taken, the address
//! that has most of them gives up its oldest, so one address cannot crowd out another; many
//! addresses together can, and then the repository is looked at when `interval` is over. An ingress
//! that passes everybody's requests on is one address, whoever they are from: limit them there.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::{IpAddr, TcpListener as StdTcpListener};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hmac::{Hmac, Mac};
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Bytes};
use hyper::header::HeaderMap;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use sha2::Sha256;
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc};
use tokio::task::{AbortHandle, JoinSet};

use super::secret;

/// Bytes of a request's body. What a forge tells of a push is some KiB; of a push too large for
/// this the next look learns.
const MOST_BYTES: usize = 1 << 20;

/// Bytes that are held of a request at a time.
const BUFFER: usize = 16 << 10;

/// Connections at a time from near (see [`is_near`]), and from elsewhere.
const PLACES: usize = 16;

/// Connections at a time.
pub const AT_A_TIME: usize = 2 * PLACES;

/// Connections that the kernel holds until they are accepted.
const BACKLOG: i32 = 1024;

/// For a request, from accept to its answer.
const DEADLINE: Duration = Duration::from_secs(10);

/// Signed requests in a row, and how long each takes to be forgotten; the same for lines in the log
/// that tell of others.
const BURST: u32 = 20;
const REFILL: Duration = Duration::from_millis(500);

/// Pause when a connection could not be accepted.
const BREATHER: Duration = Duration::from_millis(200);

/// The headers in which GitHub, Forgejo, Gitea and Gogs send the HMAC-SHA256 of the body, in hex;
/// GitHub's with a prefix, and the others send it too.
const SIGNATURES: [&str; 4] = ["x-hub-signature-256", "x-forgejo-signature", "x-gitea-signature", "x-gogs-signature"];

/// What is served, and where. The listener is bound by who puts configurations in force: one whose
/// address is taken is refused.
#[derive(Debug)]
pub struct Served {
    /// Speaks plain HTTP.
    pub listener: StdTcpListener,
    /// Holds what forges sign with.
    pub secret_file: PathBuf,
}

/// Serves what was told last; each good request is told to `pushed`. Until nobody is left to tell.
pub async fn serve(mut told: mpsc::UnboundedReceiver<Option<Served>>, pushed: Arc<Notify>) {
    let mut serving = JoinSet::new();
    while let Some(served) = told.recv().await {
        // Its connections end with it.
        serving.shutdown().await;
        if let Some(served) = served {
            let pushed = pushed.clone();
            serving.spawn(async move {
                if let Err(error) = accept(served, pushed).await {
                    tracing::error!(%error, "the webhook is not served");
                }
            });
        }
    }
}

async fn accept(Served { listener, secret_file }: Served, pushed: Arc<Notify>) -> std::io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    rustix::net::listen(&listener, BACKLOG)?;
    let hook = Arc::new(Hook::new(secret_file, pushed));
    let mut open = JoinSet::new();
    let (mut near, mut far) = (Places::default(), Places::default());
    loop {
        let (stream, from) = match listener.accept().await {
            Ok((stream, from)) => (stream, from.ip().to_canonical()),
            Err(error) => {
                tracing::debug!(%error, "webhook");
                tokio::time::sleep(BREATHER).await;
                continue;
            }
        };
        while open.try_join_next().is_some() {}
        let hook = hook.clone();
        let connection = open.spawn(async move {
            let answer = service_fn(|request| async { Ok::<_, Infallible>(hook.answer(request).await) });
            let connection = hyper::server::conn::http1::Builder::new()
                .keep_alive(false)
                .max_buf_size(BUFFER)
                .timer(TokioTimer::new())
                .serve_connection(TokioIo::new(stream), answer);
            let _ = tokio::time::timeout(DEADLINE, connection).await;
        });
        if is_near(from) { &mut near } else { &mut far }.take(from, connection);
    }
}

/// This machine, and Tailscale's networks.
fn is_near(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_loopback() || (ip.octets()[0] == 100 && ip.octets()[1] & 0xc0 == 64),
        IpAddr::V6(ip) => ip.is_loopback() || ip.segments()[..3] == [0xfd7a, 0x115c, 0xa1e0],
    }
}

/// Connections in the order in which they came, with who they are from: an IPv4 address or an IPv6
/// /64.
#[derive(Default)]
struct Places(VecDeque<(u64, AbortHandle)>);

impl Places {
    /// A place for one more: where all are taken, whoever has most of them gives up its oldest. A
    /// forge is done within milliseconds.
    fn take(&mut self, from: IpAddr, connection: AbortHandle) {
        let of = match from {
            IpAddr::V4(ip) => u64::from(ip.to_bits()),
            IpAddr::V6(ip) => (ip.to_bits() >> 64) as u64,
        };
        let places = &mut self.0;
        places.retain(|(_, connection)| !connection.is_finished());
        if places.len() == PLACES {
            let having = |of: u64| places.iter().filter(|(other, _)| *other == of).count();
            // Of those with as many, the one that came first.
            let first = (0..places.len()).rev().max_by_key(|n| having(places[*n].0)).expect("it is full");
            if let Some((_, connection)) = places.remove(first) {
                connection.abort();
            }
        }
        places.push_back((of, connection));
    }
}

struct Hook {
    secret_file: PathBuf,
    pushed: Arc<Notify>,
    pushes: Mutex<Rate>,
    refusals: Mutex<Rate>,
}

impl Hook {
    fn new(secret_file: PathBuf, pushed: Arc<Notify>) -> Self {
        Self { secret_file, pushed, pushes: Mutex::default(), refusals: Mutex::default() }
    }

    async fn answer<B>(&self, request: Request<B>) -> Response<Full<Bytes>>
    where
        B: Body<Data = Bytes> + Unpin,
    {
        let (status, text) = self.judge(request).await;
        if status != StatusCode::ACCEPTED && self.refusals.lock().expect("no panic while held").admits(Instant::now()) {
            tracing::warn!(status = status.as_u16(), why = text.trim_end(), "a webhook request was refused");
        }
        let mut response = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
        *response.status_mut() = status;
        response
    }

    async fn judge<B>(&self, request: Request<B>) -> (StatusCode, &'static str)
    where
        B: Body<Data = Bytes> + Unpin,
    {
        if request.uri().path() != "/hook" {
            return (StatusCode::NOT_FOUND, "the path is /hook\n");
        }
        if request.method() != Method::POST {
            return (StatusCode::METHOD_NOT_ALLOWED, "the method is POST\n");
        }
        let signatures = signatures(request.headers());
        if signatures.is_empty() {
            return (StatusCode::UNAUTHORIZED, "no signature: set a secret where the webhook is defined\n");
        }
        // Read each time: it may be changed without a restart.
        let secret = match secret::read(&self.secret_file) {
            Ok(secret) => secret,
            Err(error) => {
                if self.refusals.lock().expect("no panic while held").admits(Instant::now()) {
                    tracing::error!(error, "the webhook's secret cannot be used");
                }
                return (StatusCode::INTERNAL_SERVER_ERROR, "the secret cannot be read; see the log\n");
            }
        };
        let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("any length is a key");
        let (mut body, mut length) = (request.into_body(), 0);
        while let Some(frame) = body.frame().await {
            let Ok(frame) = frame else { return (StatusCode::BAD_REQUEST, "the request is cut short\n") };
            let data = frame.into_data().unwrap_or_default();
            length += data.len();
            if length > MOST_BYTES {
                return (StatusCode::PAYLOAD_TOO_LARGE, "too large\n");
            }
            mac.update(&data);
        }
        // In a time that does not depend on where a signature is wrong.
        let is_signed = |signature: &Vec<u8>| mac.clone().verify_slice(signature).is_ok();
        if !signatures.iter().any(is_signed) {
            return (StatusCode::UNAUTHORIZED, "the signature is wrong\n");
        }
        if !self.pushes.lock().expect("no panic while held").admits(Instant::now()) {
            return (StatusCode::TOO_MANY_REQUESTS, "too many requests\n");
        }
        tracing::info!("a push was announced");
        self.pushed.notify_one();
        (StatusCode::ACCEPTED, "the repository will be looked at\n")
    }
}

/// Those that a request has, as bytes.
fn signatures(headers: &HeaderMap) -> Vec<Vec<u8>> {
    let values = SIGNATURES.iter().filter_map(|name| headers.get(*name)?.to_str().ok());
    values.filter_map(|value| from_hex(value.strip_prefix("sha256=").unwrap_or(value))).collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    // SHA-256 has 32 bytes.
    let digits = |at: usize| u8::from_str_radix(text.get(at..at + 2)?, 16).ok();
    (text.len() == 64 && text.is_ascii()).then(|| (0..64).step_by(2).map(digits).collect())?
}

/// A bucket of [`BURST`] requests that fills by one each [`REFILL`].
struct Rate {
    left: u32,
    since: Instant,
}

impl Default for Rate {
    fn default() -> Self {
        Self { left: BURST, since: Instant::now() }
    }
}

impl Rate {
    fn admits(&mut self, now: Instant) -> bool {
        let refilled = (now.saturating_duration_since(self.since).as_millis() / REFILL.as_millis()) as u32;
        if refilled > 0 {
            self.left = self.left.saturating_add(refilled).min(BURST);
            self.since = now;
        }
        let admitted = self.left > 0;
        self.left = self.left.saturating_sub(1);
        admitted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BODY: &[u8] = b"Hello, World!";
    const SECRET: &str = "It's a Secret to Everybody";
    /// The example of GitHub's documentation ("Validating webhook deliveries").
    const SIGNATURE: &str = "757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17";

    fn hook() -> (tempfile::TempDir, Hook) {
        let folder = tempfile::tempdir().unwrap();
        let secret_file = folder.path().join("secret");
        std::fs::write(&secret_file, format!("{SECRET}\n")).unwrap();
        (folder, Hook::new(secret_file, Arc::default()))
    }

    async fn post(hook: &Hook, headers: &[(&str, &str)], body: &[u8]) -> u16 {
        let mut request = Request::post("/hook");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(Bytes::copy_from_slice(body))).unwrap();
        hook.judge(request).await.0.as_u16()
    }

    #[tokio::test]
    async fn what_each_forge_sends_is_accepted_and_tells_of_a_push() {
        let (_folder, hook) = hook();
        let prefixed = format!("sha256={SIGNATURE}");
        for (name, value) in [
            ("X-Hub-Signature-256", &*prefixed),
            ("X-Forgejo-Signature", SIGNATURE),
            ("X-Gitea-Signature", SIGNATURE),
            ("X-Gogs-Signature", SIGNATURE),
        ] {
            assert_eq!(post(&hook, &[(name, value)], BODY).await, 202, "{name}");
            hook.pushed.notified().await;
        }
    }

    #[tokio::test]
    async fn what_is_not_signed_with_the_secret_is_refused() {
        let (folder, hook) = hook();
        let wrong = SIGNATURE.replace('7', "8");
        for headers in [
            &[][..],
            &[("X-Hub-Signature-256", "")],
            &[("X-Hub-Signature-256", "sha256=")],
            &[("X-Hub-Signature-256", &wrong)],
            &[("X-Hub-Signature-256", &SIGNATURE[..63])],
            &[("X-Hub-Signature-256", "sha256=é757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e1")],
            &[("X-Hub-Signature", SIGNATURE)],
        ] {
            assert_eq!(post(&hook, headers, BODY).await, 401, "{headers:?}");
        }
        assert_eq!(post(&hook, &[("X-Gitea-Signature", SIGNATURE)], b"Hello, World?").await, 401);
        std::fs::write(folder.path().join("secret"), "\n").unwrap();
        let mut empty = Hmac::<Sha256>::new_from_slice(b"").unwrap();
        empty.update(BODY);
        let by_empty: String = empty.finalize().into_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(post(&hook, &[("X-Gitea-Signature", &by_empty)], BODY).await, 500, "an empty secret is none");
        std::fs::remove_file(folder.path().join("secret")).unwrap();
        assert_eq!(post(&hook, &[("X-Gitea-Signature", SIGNATURE)], BODY).await, 500);
        let unheard = tokio::time::timeout(Duration::from_millis(10), hook.pushed.notified()).await;
        assert!(unheard.is_err(), "none of them told of a push");
    }

    #[tokio::test]
    async fn other_paths_other_methods_and_large_bodies_are_refused() {
        let (_folder, hook) = hook();
        let large = vec![0; MOST_BYTES + 1];
        assert_eq!(post(&hook, &[("X-Gitea-Signature", SIGNATURE)], &large).await, 413);
        let ask = |request: Request<()>| request.map(|()| Full::new(Bytes::new()));
        let get = Request::get("/hook").body(()).unwrap();
        assert_eq!(hook.judge(ask(get)).await.0, StatusCode::METHOD_NOT_ALLOWED);
        let elsewhere = Request::post("/").body(()).unwrap();
        assert_eq!(hook.judge(ask(elsewhere)).await.0, StatusCode::NOT_FOUND);
    }

    #[tokio::test]
    async fn nobody_without_the_secret_keeps_a_forge_from_being_heard() {
        let (_folder, hook) = hook();
        let wrong = SIGNATURE.replace('7', "8");
        for headers in [&[][..], &[("X-Gitea-Signature", &*wrong)]] {
            for _ in 0..10 * BURST {
                assert_eq!(post(&hook, headers, BODY).await, 401);
            }
        }
        for _ in 0..BURST {
            assert_eq!(post(&hook, &[("X-Gitea-Signature", SIGNATURE)], BODY).await, 202);
        }
        // A signed request can be sent again by whoever has seen it.
        hook.pushes.lock().unwrap().left = 0;
        hook.pushes.lock().unwrap().since = Instant::now() + REFILL;
        assert_eq!(post(&hook, &[("X-Gitea-Signature", SIGNATURE)], BODY).await, 429);
    }

    #[tokio::test]
    async fn who_has_most_places_gives_way() {
        let mut places = Places::default();
        let mut tasks = JoinSet::new();
        let mut take = |from: &str| {
            let task = tasks.spawn(std::future::pending::<()>());
            places.take(from.parse().unwrap(), task.clone());
            task
        };
        let forge = take("192.0.2.1");
        let neighbour = take("2001:db8:0:1::1");
        let first = take("198.51.100.1");
        let flood: Vec<_> = (0..1000).map(|_| take("198.51.100.1")).collect();
        // One subnet is one client.
        let subnet: Vec<_> = (1..1000).map(|n| take(&format!("2001:db8:0:2::{n:x}"))).collect();
        // An aborted task ends at its next turn.
        for _ in 0..10_000 {
            tokio::task::yield_now().await;
        }
        assert!(first.is_finished() && flood[0].is_finished() && subnet[0].is_finished());
        assert!(!forge.is_finished() && !neighbour.is_finished());
        assert_eq!(places.0.len(), PLACES);
        for (near, far) in [("127.0.0.1", "192.0.2.1"), ("100.64.0.2", "100.128.0.1"), ("fd7a:115c:a1e0::2", "fd7a::2")]
        {
            assert!(is_near(near.parse().unwrap()) && !is_near(far.parse().unwrap()), "{near} {far}");
        }
    }

    #[tokio::test]
    async fn idle_connections_give_way() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        use tokio::net::TcpStream;
        let (folder, _) = hook();
        let listener = StdTcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let pushed = Arc::new(Notify::new());
        let (tell, told) = mpsc::unbounded_channel();
        tokio::spawn(serve(told, pushed.clone()));
        tell.send(Some(Served { listener, secret_file: folder.path().join("secret") })).unwrap();
        let mut idle = Vec::new();
        for _ in 0..2 * PLACES {
            idle.push(TcpStream::connect(address).await.unwrap());
        }
        let mut forge = TcpStream::connect(address).await.unwrap();
        let head = format!("POST /hook HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n", BODY.len());
        let request = [head.as_bytes(), b"X-Gitea-Signature: ", SIGNATURE.as_bytes(), b"\r\n\r\n", BODY].concat();
        forge.write_all(&request).await.unwrap();
        let mut answer = String::new();
        forge.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 202 "), "{answer}");
        pushed.notified().await;
        let mut byte = [0];
        let first = tokio::time::timeout(DEADLINE / 2, idle[0].read(&mut byte)).await;
        assert!(matches!(first, Ok(Ok(0) | Err(_))), "the oldest was closed long before its deadline: {first:?}");
        tell.send(None).unwrap();
        let last = tokio::time::timeout(DEADLINE / 2, idle[2 * PLACES - 1].read(&mut byte)).await;
        assert!(matches!(last, Ok(Ok(0) | Err(_))), "nothing is served any more: {last:?}");
    }

    #[test]
    fn a_flood_is_refused_and_forgotten() {
        let mut rate = Rate::default();
        let start = rate.since;
        assert_eq!((0..1000).filter(|_| rate.admits(start)).count(), BURST as usize);
        assert_eq!((0..10).filter(|_| rate.admits(start + REFILL)).count(), 1);
        assert_eq!((0..1000).filter(|_| rate.admits(start + REFILL * 1000)).count(), BURST as usize);
    }
}
