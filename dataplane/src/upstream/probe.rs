//! One check of one target: a TCP connection, or a TLS handshake up to the ServerHello.
//!
//! It must not know what follows from the outcome.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::config::SendProxy;
use crate::kernel::sys;
use crate::proxy_protocol;

/// Content types of TLS records (RFC 8446 section 5.1), and the message that is waited for (section
/// 4).
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const SERVER_HELLO: u8 = 2;
/// Zeros that make a hello as long as one with a share of X25519MLKEM768: some 1.8 KB, more than a
/// packet takes. A smaller one would pass where a browser's is lost.
const PADDING: usize = 1550;

/// Connects and [`speak`]s, within `patience`.
///
/// # Errors
/// Why the target counts as down, for people.
pub async fn check(
    address: SocketAddr,
    send_proxy: SendProxy,
    server_name: Option<&str>,
    patience: Duration,
) -> Result<(), String> {
    let late = |_| format!("timeout: no answer within {patience:?}");
    let connect = async { TcpStream::connect(address).await.map_err(|error| in_words(&error)) };
    let mut stream = timeout(patience, connect).await.map_err(late)??;
    let spoken = timeout(patience, speak(&mut stream, send_proxy, server_name)).await;
    let Err(late_by) = spoken else { return spoken.unwrap_or(Ok(())) };
    if server_name.is_none() || !is_unacknowledged(&stream) {
        return Err(late(late_by));
    }
    // Only a small one that gets through shows that it is the size.
    let connect = async { TcpStream::connect(address).await.map_err(|error| in_words(&error)) };
    let mut small = timeout(patience, connect).await.map_err(late)??;
    match timeout(patience, speak_in(&mut small, send_proxy, server_name, false)).await {
        Err(_) if !is_unacknowledged(&small) => {
            Err(format!("timeout: {BLACK_HOLE}; a small hello is acknowledged. {REMEDY}"))
        }
        Ok(answer) if answer.as_ref().map_or_else(|error| error.starts_with("tls:"), |()| true) => {
            Err(format!("timeout: {BLACK_HOLE}; a small hello gets through. {REMEDY}"))
        }
        _ => Err(late(late_by)),
    }
}

/// What a large hello shows that nobody acknowledges.
pub const BLACK_HOLE: &str = "the hello of a browser's size (1.8 KB) was never acknowledged";
/// What to do about it.
pub const REMEDY: &str = "Large packets are lost on the way (an MTU black hole): `sysctl -w net.ipv4.tcp_mtu_probing=1` \
     on both machines, or a smaller MTU on the interface to the target, or have the router clamp the MSS \
     (`iptables -t mangle -A FORWARD -p tcp --syn -j TCPMSS --clamp-mss-to-pmtu`)";

/// What to say when no answer came in time on an open connection.
pub fn late(stream: &TcpStream, patience: Duration) -> String {
    if is_unacknowledged(stream) {
        format!("timeout: {BLACK_HOLE} within {patience:?}, though the connection was opened. {REMEDY}")
    } else {
        format!("timeout: no answer within {patience:?}")
    }
}

/// Whether the peer has not acknowledged all that was sent.
fn is_unacknowledged(stream: &TcpStream) -> bool {
    sys::unacknowledged(stream).is_ok_and(|bytes| bytes > 0)
}

/// Says that the connection is nobody's where `send_proxy` wants a header; with a server name sends
/// a hello and waits for the answer.
///
/// # Errors
/// What came instead of a ServerHello, for people.
pub async fn speak(stream: &mut TcpStream, send_proxy: SendProxy, server_name: Option<&str>) -> Result<(), String> {
    speak_in(stream, send_proxy, server_name, true).await
}

async fn speak_in(
    stream: &mut TcpStream,
    send_proxy: SendProxy,
    server_name: Option<&str>,
    large: bool,
) -> Result<(), String> {
    let mut first = Vec::new();
    match send_proxy {
        SendProxy::Off => {}
        SendProxy::V1 => proxy_protocol::encode_local_v1(&mut first),
        SendProxy::V2 => proxy_protocol::encode_local_v2(&mut first),
    }
    let Some(name) = server_name else {
        // A check that fails to say goodbye has still found what it came for.
        let _ = stream.write_all(&first).await;
        let _ = stream.shutdown().await;
        return Ok(());
    };
    client_hello(&mut first, name, if large { PADDING } else { 0 });
    stream.write_all(&first).await.map_err(|error| format!("the hello: {}", in_words(&error)))?;
    server_hello(stream).await
}

/// What a connection without a hello meets.
#[derive(Debug, PartialEq, Eq)]
pub enum Greeting {
    /// Bytes came, and the connection stayed open; the first line of them.
    Greeted(String),
    /// It stayed open and nothing came.
    Silent,
    /// The peer closed it; what it had said before.
    Closed(String),
}

/// Connects, sends the header that `send_proxy` wants, then `request`, and looks what comes in
/// `patience`, or until the peer closes. At most 1 KiB is read.
///
/// # Errors
/// Why the connection was not made, for people.
pub async fn greeting(
    address: SocketAddr,
    send_proxy: SendProxy,
    request: &[u8],
    patience: Duration,
) -> Result<Greeting, String> {
    let connect = async { TcpStream::connect(address).await.map_err(|error| in_words(&error)) };
    let late = |_| format!("timeout: no answer within {patience:?}");
    let mut stream = timeout(patience, connect).await.map_err(late)??;
    let mut first = Vec::new();
    match send_proxy {
        SendProxy::Off => {}
        SendProxy::V1 => proxy_protocol::encode_local_v1(&mut first),
        SendProxy::V2 => proxy_protocol::encode_local_v2(&mut first),
    }
    first.extend_from_slice(request);
    let mut said = Vec::new();
    let listen = async {
        let _ = stream.write_all(&first).await;
        let mut buffer = [0; 256];
        while said.len() < 1024 {
            match stream.read(&mut buffer).await {
                Ok(0) | Err(_) => return true,
                Ok(n) => said.extend_from_slice(&buffer[..n]),
            }
        }
        false
    };
    let closed = timeout(patience, listen).await.unwrap_or(false);
    let line = said.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = String::from_utf8_lossy(&line[..line.len().min(80)]).trim_end().escape_debug().to_string();
    Ok(match (closed, said.is_empty()) {
        (true, _) => Greeting::Closed(line),
        (false, true) => Greeting::Silent,
        (false, false) => Greeting::Greeted(line),
    })
}

fn in_words(error: &io::Error) -> String {
    format!("{}: {error}", super::connect::Cause::from(error).as_str())
}

async fn server_hello(stream: &mut TcpStream) -> Result<(), String> {
    // Record header; then the type of the first message, or level and description of an alert.
    let mut answer = [0; 7];
    if let Err(error) = stream.read_exact(&mut answer).await {
        return Err(match error.kind() {
            io::ErrorKind::UnexpectedEof => "tls: the connection was closed instead of a ServerHello".to_owned(),
            _ => format!("tls: {} instead of a ServerHello", in_words(&error)),
        });
    }
    match (answer[0], answer[1], answer[5]) {
        (HANDSHAKE, 3, SERVER_HELLO) => Ok(()),
        (ALERT, 3, _) => Err(format!("tls: alert {} instead of a ServerHello", answer[6])),
        _ => Err("tls: the answer is not TLS".to_owned()),
    }
}

/// A ClientHello that any TLS 1.2 or 1.3 server can answer (RFC 8446 section 4.1.2), with this
/// server name. Nobody means to finish the handshake, so the key share is a number that everybody
/// knows: the base point of X25519 (RFC 7748 section 4.1). `padding` zeros make it as long as a
/// browser's, which has a share of ML-KEM.
fn client_hello(out: &mut Vec<u8>, name: &str, padding: usize) {
    const SUITES: [u16; 9] = [0x1301, 0x1302, 0x1303, 0xc02b, 0xc02f, 0xc02c, 0xc030, 0xcca9, 0xcca8];
    const GROUPS: [u16; 3] = [29, 23, 24];
    const SIGNATURES: [u16; 8] = [0x0403, 0x0503, 0x0603, 0x0804, 0x0805, 0x0806, 0x0807, 0x0401];
    let numbers = |list: &[u16]| list.iter().flat_map(|n| n.to_be_bytes()).collect::<Vec<_>>();
    let mut base_point = [0; 32];
    base_point[0] = 9;
    let host_name = [&[0][..], &prefixed(2, name.as_bytes())].concat();
    let share = [&29_u16.to_be_bytes()[..], &prefixed(2, &base_point)].concat();
    let extensions = [
        (0, prefixed(2, &host_name)),         // server_name
        (10, prefixed(2, &numbers(&GROUPS))), // supported_groups
        (11, prefixed(1, &[0])),              // ec_point_formats: uncompressed
        (13, prefixed(2, &numbers(&SIGNATURES))),
        (23, Vec::new()),                 // extended_main_secret
        (43, prefixed(1, &[3, 4, 3, 3])), // supported_versions: 1.3, 1.2
        (51, prefixed(2, &share)),        // key_share
        (21, vec![0; padding]),           // padding (RFC 7685)
    ];
    let extensions: Vec<u8> = extensions
        .iter()
        .flat_map(|(kind, body)| [&u16::to_be_bytes(*kind)[..], &prefixed(2, body)].concat())
        .collect();
    let random: [u8; 32] = std::array::from_fn(|_| fastrand::u8(..));
    let body = [
        &[3, 3][..],
        &random,
        &prefixed(1, &random),
        &prefixed(2, &numbers(&SUITES)),
        &prefixed(1, &[0]),
        &prefixed(2, &extensions),
    ]
    .concat();
    let message = [&[1][..], &prefixed(3, &body)].concat();
    out.extend_from_slice(&[HANDSHAKE, 3, 1]);
    out.extend_from_slice(&prefixed(2, &message));
}

/// The bytes behind their number, which takes so many bytes.
fn prefixed(width: usize, bytes: &[u8]) -> Vec<u8> {
    let length = (bytes.len() as u32).to_be_bytes();
    [&length[4 - width..], bytes].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hello::{Input, Machine, Progress};

    #[test]
    fn our_own_reader_of_hellos_finds_the_server_name_in_ours() {
        let mut bytes = Vec::new();
        client_hello(&mut bytes, "blog.example.com", PADDING);
        assert!((1700..2000).contains(&bytes.len()), "a browser's hello is of some 1.8 KB: {}", bytes.len());
        let mut machine = Machine::new(16384);
        machine.input(Input::Bytes(&bytes));
        match machine.progress() {
            Progress::Hello(hello) => assert_eq!(hello.server_name.as_deref(), Some("blog.example.com")),
            other => panic!("{other:?}"),
        }
    }
}
