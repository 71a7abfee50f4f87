//! One answer: what is to be sent first goes to the upstream, what it says until its FIN goes to
//! the client, and nothing else goes anywhere.
//!
//! For a request that was read and checked before: whatever the client says after it is thrown
//! away. Through a buffer, for an answer is small. Ends as the other engines do: [`End::Done`] with
//! FIN on both sides, after the last byte; anything else with RST.

use std::future::poll_fn;
use std::io;
use std::task::Poll;
use std::time::Duration;

use rustix::net::{Shutdown, shutdown};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::pin;
use tokio::time::timeout_at;

use super::copy;
use super::pair::{End, Forwarded, Halt, Legs, Side, Stop, StreamState, Timeouts, Unsent, ended_by};
use super::relay::{all_sent, prove_fin};
use super::traffic::{Counter, Path, Traffic};
use crate::kernel::socket;

/// The longest from the request to the client's FIN. Let's Encrypt waits 10 s for the answer to a
/// challenge.
const LIMIT: Duration = Duration::from_secs(30);

/// Forwards the answer, until it is told to stop. [`End::Idle`]: it was not over after 30 s, or
/// after the idle timeout if that is shorter.
pub async fn run(mut legs: Legs, timeouts: Timeouts, traffic: &Traffic, halt: &Halt) -> Forwarded {
    let deadline = traffic.begun() + LIMIT.min(timeouts.idle);
    let halted = poll_fn(|_| if halt.is_asked(Stop::All) { Poll::Ready(()) } else { Poll::Pending });
    // Dropped at any point where it waits, the exchange leaves in `legs` what is still to be done.
    let end = tokio::select! {
        biased;
        outcome = timeout_at(deadline.into(), exchange(&mut legs, traffic)) => match outcome {
            Ok(Ok(())) => End::Done,
            Ok(Err(end)) => end,
            Err(_) => End::Idle,
        },
        () = halted => return Forwarded::Halted(legs),
    };
    if end == End::Done {
        socket::close_with_fin(&legs.client);
        socket::close_with_fin(&legs.upstream);
    }
    Forwarded::Ended(end)
}

async fn exchange(Legs { client, upstream, streams, unsent }: &mut Legs, traffic: &Traffic) -> Result<(), End> {
    let (client, upstream) = (&*client, &*upstream);
    let left = socket::discard(client);
    pin!(left);
    {
        let (to_upstream, to_client) = (&mut unsent.client, &mut unsent.upstream);
        let answered = answer(client, upstream, to_upstream, to_client, &mut streams.upstream, traffic);
        pin!(answered);
        loop {
            tokio::select! {
                biased;
                discarded = &mut left, if streams.client == StreamState::Open => {
                    discarded.map_err(|e| ended_by(Side::Client, Ok(Some(e))))?;
                    streams.client = StreamState::Ended;
                }
                answered = &mut answered => break answered?,
            }
        }
    }
    traffic.note_target_closed();
    if streams.upstream != StreamState::Finished {
        shutdown(client, Shutdown::Write).map_err(|e| ended_by(Side::Client, Ok(Some(e.into()))))?;
        streams.upstream = StreamState::Finished;
    }
    if streams.client == StreamState::Open {
        left.await.map_err(|e| ended_by(Side::Client, Ok(Some(e))))?;
        streams.client = StreamState::Ended;
    }
    // A client that closed its side early may still be reading: the kernel gives up soon on a
    // closed socket whose reader is slow.
    while !all_sent(client) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

/// Sends what is unsent to the upstream, then forwards the answer to its FIN.
async fn answer(
    client: &TcpStream,
    upstream: &TcpStream,
    to_upstream: &mut Unsent,
    to_client: &mut Unsent,
    state: &mut StreamState,
    traffic: &Traffic,
) -> Result<(), End> {
    send(upstream, to_upstream, &traffic.to_upstream).await.map_err(|e| ended_by(Side::Upstream, Ok(Some(e))))?;
    loop {
        send(client, to_client, &traffic.to_client).await.map_err(|e| ended_by(Side::Client, Ok(Some(e))))?;
        if *state != StreamState::Open {
            return Ok(());
        }
        let step = upstream.async_io(Interest::READABLE, || copy::step(upstream, client)).await;
        let step = step.map_err(|e| ended_by(Side::Upstream, Ok(Some(e))))?;
        if step.read == 0 {
            prove_fin(upstream, false).map_err(|e| ended_by(Side::Upstream, Ok(Some(e))))?;
            *state = StreamState::Ended;
            continue;
        }
        traffic.to_client.add(Path::Userspace, step.written);
        traffic.touch(std::time::Instant::now());
        if let Some(error) = step.write_error {
            return Err(ended_by(Side::Client, Ok(Some(error))));
        }
        *to_client = Unsent::payload(step.rest);
    }
}

/// Sends all of it.
async fn send(to: &TcpStream, unsent: &mut Unsent, counter: &Counter) -> io::Result<()> {
    // An answer is never in a pipe.
    while let Unsent::Bytes { bytes, header } = unsent {
        let n = to.async_io(Interest::WRITABLE, || copy::write(to, bytes)).await?;
        let of_header = n.min(*header);
        *header -= of_header;
        counter.add(Path::Userspace, n - of_header);
        bytes.drain(..n);
        if bytes.is_empty() {
            *unsent = Unsent::Nothing;
        }
    }
    Ok(())
}
