//! One answer: what is to be sent first goes to the upstream, what it says until its FIN goes to
//! the client, and nothing else goes anywhere.
//!
//! For a request that was read and checked before: whatever the client says after it is thrown
//! away. Through a buffer, for an answer is small. Ends as the other engines do: [`End::Done`] with
//! FIN on both sides, after the last byte; anything else with RST.

use std::io;
use std::time::Duration;

use rustix::net::{Shutdown, shutdown};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::pin;
use tokio::time::timeout;

use super::copy;
use super::pair::{End, First, Pair, Side, Timeouts, ended_by};
use super::relay::{all_sent, prove_fin};
use super::traffic::{Counter, Path, Traffic};
use crate::kernel::socket;

/// The longest from the request to the client's FIN. Let's Encrypt waits 10 s for the answer to a
/// challenge.
const LIMIT: Duration = Duration::from_secs(30);

/// Forwards the answer. [`End::Idle`]: it was not over after 30 s, or after the idle timeout if
/// that is shorter.
pub async fn run(pair: Pair, timeouts: Timeouts, traffic: &Traffic) -> End {
    let Pair { client, upstream, first } = pair;
    let end = match timeout(LIMIT.min(timeouts.idle), exchange(&client, &upstream, first, traffic)).await {
        Ok(Ok(())) => End::Done,
        Ok(Err(end)) => end,
        Err(_) => End::Idle,
    };
    if end == End::Done {
        socket::close_with_fin(&client);
        socket::close_with_fin(&upstream);
    }
    end
}

async fn exchange(client: &TcpStream, upstream: &TcpStream, first: First, traffic: &Traffic) -> Result<(), End> {
    let answered = answer(client, upstream, first, traffic);
    let left = socket::discard(client);
    pin!(answered, left);
    let mut client_ended = false;
    loop {
        tokio::select! {
            biased;
            discarded = &mut left, if !client_ended => {
                discarded.map_err(|e| ended_by(Side::Client, Ok(Some(e))))?;
                client_ended = true;
            }
            answered = &mut answered => break answered?,
        }
    }
    traffic.note_target_closed();
    shutdown(client, Shutdown::Write).map_err(|e| ended_by(Side::Client, Ok(Some(e.into()))))?;
    if !client_ended {
        left.await.map_err(|e| ended_by(Side::Client, Ok(Some(e))))?;
    }
    // A client that closed its side early may still be reading: the kernel gives up soon on a
    // closed socket whose reader is slow.
    while !all_sent(client) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

async fn answer(client: &TcpStream, upstream: &TcpStream, first: First, traffic: &Traffic) -> Result<(), End> {
    let First { bytes, header } = first;
    write_all(upstream, &bytes[..header], None).await.map_err(|e| ended_by(Side::Upstream, Ok(Some(e))))?;
    let counter = Some(&traffic.to_upstream);
    write_all(upstream, &bytes[header..], counter).await.map_err(|e| ended_by(Side::Upstream, Ok(Some(e))))?;
    loop {
        let step = upstream.async_io(Interest::READABLE, || copy::step(upstream, client)).await;
        let step = step.map_err(|e| ended_by(Side::Upstream, Ok(Some(e))))?;
        if step.read == 0 {
            return prove_fin(upstream, false).map_err(|e| ended_by(Side::Upstream, Ok(Some(e))));
        }
        traffic.to_client.add(Path::Userspace, step.written);
        traffic.touch(std::time::Instant::now());
        let written = match step.write_error {
            Some(error) => Err(error),
            None => write_all(client, &step.rest, Some(&traffic.to_client)).await,
        };
        written.map_err(|e| ended_by(Side::Client, Ok(Some(e))))?;
    }
}

async fn write_all(to: &TcpStream, mut bytes: &[u8], counter: Option<&Counter>) -> io::Result<()> {
    while !bytes.is_empty() {
        let n = to.async_io(Interest::WRITABLE, || copy::write(to, bytes)).await?;
        if let Some(counter) = counter {
            counter.add(Path::Userspace, n);
        }
        bytes = &bytes[n..];
    }
    Ok(())
}
