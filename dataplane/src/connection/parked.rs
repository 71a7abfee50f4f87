//! How a connection stops for another process, and goes on there. Whatever it waits for, it can.
//!
//! It must not know how state and sockets get to the other process.

use std::io;
use std::net::TcpStream as StdStream;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow};
use tokio::net::TcpStream;

use super::{Arrival, Client, Established, Permits, Start, forward, go_on, timeouts};
use crate::admission::Permit;
use crate::engine::splice::Pipe;
use crate::engine::{Kind, Legs, PerSide, StreamState, Traffic, Unsent};
use crate::generation::Generation;
use crate::loops;
use crate::moment::Moment;
use crate::parking::{Arriving, Begun, Bytes, Parcel, Rest, Running, State};
use crate::registry::{Entry, Orders, Record};
use crate::shared::Shared;

impl From<Start> for Begun {
    fn from(Start { wall, at }: Start) -> Self {
        let wall = wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self { wall: wall.as_micros() as u64, at: at.into() }
    }
}

impl From<Begun> for Start {
    fn from(Begun { wall, at }: Begun) -> Self {
        Self { wall: SystemTime::UNIX_EPOCH + Duration::from_micros(wall), at: at.instant() }
    }
}

/// Leaves a connection to whoever hands over. When that was done without it, it goes on here.
pub(super) fn park(shared: &Arc<Shared>, parcel: Parcel) {
    let Some(parcel) = shared.parking.park(parcel) else { return };
    let generation = shared.generation.load_full();
    if let Err(error) = resume(shared, &generation, parcel) {
        tracing::warn!(error = format!("{error:#}"), "a connection is reset");
    }
}

/// Of a connection that has no target yet. What was looked up and dialled for it is given up. The
/// permit is to be kept until it is parked: whoever hands over waits for the last one.
pub(super) fn arrival(arrival: Arrival) -> (Parcel, Permit) {
    let Arrival { generation, listener, stream, peer, start, permit, client, answer, .. } = arrival;
    let state = State::Arriving(Arriving {
        listener: generation.config.listeners[listener].name.clone(),
        start: start.into(),
        peer,
        client: client.address,
        server: client.server,
        is_introduced: client.is_introduced,
        unique_id: client.unique_id.map(Bytes),
        read: Bytes(client.read),
        answer: answer.map(Bytes),
    });
    let descriptors = into_descriptor(stream).into_iter().collect();
    (Parcel { state, descriptors, bytes: Vec::new() }, permit)
}

/// Of a connection that an engine has stopped forwarding.
pub(super) fn established(is_exchange: bool, legs: Legs, entry: Entry, permits: &Permits) -> Parcel {
    let record = entry.hand_over();
    let Legs { client, upstream, streams, unsent } = legs;
    let mut descriptors: Vec<OwnedFd> = [client, upstream].into_iter().filter_map(into_descriptor).collect();
    let PerSide { client: to_upstream, upstream: to_client } = unsent;
    let mut all = Vec::new();
    let mut rest = |unsent| match unsent {
        Unsent::Nothing => Rest::Nothing,
        Unsent::Bytes { mut bytes, header } => {
            let len = bytes.len();
            if all.is_empty() {
                all = bytes;
            } else {
                all.append(&mut bytes);
            }
            Rest::Bytes { len, header }
        }
        Unsent::Pipe(pipe) => {
            let (ends, len) = pipe.into_parts();
            descriptors.extend(ends);
            Rest::Pipe(len)
        }
    };
    let unsent = PerSide { client: rest(to_upstream), upstream: rest(to_client) };
    let is_unanswered = record.traffic.look().is_unanswered();
    let state = State::Established(Box::new(Running {
        start: Start { wall: record.start, at: record.accepted }.into(),
        client: record.client,
        listener: record.listener.clone(),
        server_name: record.server_name.clone(),
        alpn: record.alpn.clone(),
        route: record.route.clone(),
        upstream: record.upstream.clone(),
        target: record.target.clone(),
        listed: record.listed,
        dialled: record.dialled,
        is_exchange,
        counts: permits.client.is_some(),
        mark: permits.in_flight.as_ref().filter(|_| is_unanswered).map(loops::Guard::mark),
        carried: record.traffic.carried(),
        ends: record.orders.end().map(Into::into),
        streams,
        unsent,
    }));
    Parcel { state, descriptors, bytes: all }
}

/// `None`: the descriptor could not be taken from epoll. Then it is closed, and the connection is
/// lost.
fn into_descriptor(stream: TcpStream) -> Option<OwnedFd> {
    stream.into_std().map(OwnedFd::from).inspect_err(|error| tracing::warn!(%error, "epoll")).ok()
}

/// Goes on with a connection that has stopped, in this process or in another one; on a worker.
///
/// # Errors
/// It cannot be gone on with, and is reset.
pub fn resume(shared: &Arc<Shared>, generation: &Arc<Generation>, parcel: Parcel) -> Result<()> {
    let Parcel { state, descriptors, mut bytes } = parcel;
    if bytes.len() != state.bytes() {
        return Err(anyhow!("it has {} bytes, not {}", bytes.len(), state.bytes()));
    }
    if descriptors.len() != state.descriptors() {
        return Err(anyhow!("it has {} descriptors, not {}", descriptors.len(), state.descriptors()));
    }
    let mut descriptors = descriptors.into_iter();
    let mut next = || descriptors.next().expect("counted above");
    match state {
        State::Arriving(arriving) => {
            let arrival = arrive(arriving, shared, generation, into_stream(next())?)?;
            tokio::spawn(go_on(arrival));
        }
        State::Established(running) => {
            let (client, upstream) = (into_stream(next())?, into_stream(next())?);
            let mut unsent = |rest| match rest {
                Rest::Nothing => Unsent::Nothing,
                Rest::Bytes { len, header } => {
                    let behind = bytes.split_off(len);
                    Unsent::bytes(std::mem::replace(&mut bytes, behind), header)
                }
                Rest::Pipe(len) => Unsent::Pipe(Pipe::adopt([next(), next()], len)),
            };
            let PerSide { client: to_upstream, upstream: to_client } = running.unsent.clone();
            let unsent = PerSide { client: unsent(to_upstream), upstream: unsent(to_client) };
            let legs = Legs { client, upstream, streams: running.streams, unsent };
            let established = run(*running, shared, generation, legs);
            tokio::spawn(forward(established));
        }
    }
    Ok(())
}

fn into_stream(descriptor: OwnedFd) -> io::Result<TcpStream> {
    TcpStream::from_std(StdStream::from(descriptor))
}

fn arrive(state: Arriving, shared: &Arc<Shared>, generation: &Arc<Generation>, stream: TcpStream) -> Result<Arrival> {
    let listeners = &generation.config.listeners;
    let listener = listeners.iter().position(|listener| listener.name == state.listener);
    let listener = listener.with_context(|| format!("there is no listener {} any more", state.listener))?;
    let client = Client {
        address: state.client,
        server: state.server,
        server_name: None,
        bad_name: None,
        is_introduced: state.is_introduced,
        unique_id: state.unique_id.map(|id| id.0),
        alpn: None,
        alpn_text: None,
        read: state.read.0,
        in_flight: None,
    };
    Ok(Arrival {
        shared: shared.clone(),
        generation: generation.clone(),
        listener,
        stream,
        peer: state.peer,
        start: state.start.into(),
        permit: shared.admission.adopt(),
        client,
        answer: state.answer.map(|answer| answer.0),
    })
}

fn run(state: Running, shared: &Arc<Shared>, generation: &Arc<Generation>, legs: Legs) -> Established {
    let relay = if state.is_exchange { Kind::Copy } else { generation.engine.plan.relay };
    let traffic = Arc::new(Traffic::resumed(relay, &state.carried));
    let has_closed = legs.streams.upstream != StreamState::Open;
    let lease = generation.adopt(&state.upstream, &state.target, !has_closed);
    let in_flight = state.mark.map(|mark| {
        let guard = shared.in_flight.adopt(mark, shared.next_id.fetch_add(1, Relaxed));
        guard.sent(lease.of(), &traffic);
        guard
    });
    let permits = Permits {
        _connection: shared.admission.adopt(),
        client: state.counts.then(|| shared.admission.adopt_client(state.client.ip())),
        in_flight,
    };
    let start = Start::from(state.start);
    let record = Record {
        start: start.wall,
        accepted: start.at,
        client: state.client,
        listener: state.listener,
        server_name: state.server_name,
        alpn: state.alpn,
        route: state.route.clone(),
        upstream: state.upstream,
        target: state.target,
        listed: state.listed,
        dialled: state.dialled,
        traffic,
        orders: Orders::new(state.ends.map(Moment::instant)),
    };
    let entry = shared.registry.enter(record, shared.metrics.registry.of(&state.route));
    entry.record.judge(generation);
    Established {
        shared: shared.clone(),
        engine: (!state.is_exchange).then(|| generation.engine.clone()),
        legs,
        timeouts: timeouts(generation),
        entry,
        permits,
        lease,
    }
}
