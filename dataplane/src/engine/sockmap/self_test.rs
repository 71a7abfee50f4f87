//! Whether this kernel can be trusted with connections: its behaviour is tried out, since version
//! numbers do not tell what a distribution has mended.
//!
//! Real connections over a loopback interface, through the whole engine, in a network namespace of
//! its own where that is allowed. Well under a second.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream as StdStream};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use socket2::SockRef;
use tokio::net::TcpStream;

use super::table::Table;
use crate::engine::driver::{self, Plan};
use crate::engine::pair::{End, Forwarded, Halt, Kind, Legs, Side, Timeouts, Unsent};
use crate::engine::traffic::Traffic;
use crate::kernel::{socket, sys};

/// A test that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(5);

/// What the connections of the test may queue.
const MEMORY: u64 = 1 << 20;

/// Runs it.
///
/// # Errors
/// What the kernel did wrong.
pub fn run(table: &Arc<Table>) -> Result<(), String> {
    sys::grace_period().map_err(|error| {
        format!("membarrier(2) does not work, and without it no socket can leave the map safely: {error}")
    })?;
    table.set_memory(MEMORY);
    let table = table.clone();
    let (result, outcome) = channel();
    let tester = thread::Builder::new().name("self-test".to_owned()).spawn(move || {
        // Elsewhere it is done on the loopback interface that there is.
        let _ = sys::own_network();
        let _ = result.send(all(&table));
    });
    tester.map_err(|error| format!("no thread for the self-test: {error}"))?;
    outcome.recv_timeout(LIMIT).unwrap_or_else(|_| Err(format!("the self-test hung for {LIMIT:?}")))
}

fn all(table: &Arc<Table>) -> Result<(), String> {
    type Check = fn(Circuit) -> io::Result<()>;
    const CHECKS: [(&str, Check, End); 6] = [
        ("small messages there and back", Circuit::exchanges, End::Done),
        ("a stalled reader behind a tiny send buffer", Circuit::stalled_reader, End::Done),
        ("a FIN in the segment of the last byte", Circuit::fin_with_data, End::Done),
        ("a half-close, and an answer after it", Circuit::half_close, End::Done),
        ("a retransmit that overlaps", Circuit::overlap, End::Reset(Side::Client)),
        ("a reset", Circuit::reset, End::Reset(Side::Client)),
    ];
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("the self-test cannot start: {error}"))?;
    let plan = Arc::new(Plan { relay: Kind::Copy, in_kernel: Some(table.clone()), must_earn: false });
    runtime.block_on(async {
        for (what, check, expected) in CHECKS {
            let failed = |error: io::Error| format!("the self-test failed: {what}: {error}");
            let traffic = Arc::new(Traffic::by(plan.relay));
            let (circuit, legs) = Circuit::new(table, &traffic).map_err(failed)?;
            let timeouts = Timeouts { idle: LIMIT, half_closed: LIMIT, dead_peer: LIMIT };
            let forwarding = {
                let plan = plan.clone();
                tokio::spawn(async move { driver::forward(&plan, legs, timeouts, &traffic, &Halt::default()).await })
            };
            let checked = tokio::task::spawn_blocking(move || check(circuit)).await;
            checked.map_err(io::Error::other).and_then(|checked| checked).map_err(failed)?;
            let forwarded = forwarding.await.map_err(|error| failed(io::Error::other(error)))?;
            if !matches!(forwarded, Forwarded::Ended(end) if end == expected) {
                return Err(failed(io::Error::other(format!("the connection ended as {forwarded:?}"))));
            }
        }
        Ok(())
    })
}

/// Both ends of a connection through the engine.
struct Circuit {
    client: StdStream,
    server: StdStream,
    table: Arc<Table>,
    traffic: Arc<Traffic>,
}

impl Circuit {
    fn new(table: &Arc<Table>, traffic: &Arc<Traffic>) -> io::Result<(Self, Legs)> {
        let connect = || -> io::Result<(StdStream, StdStream)> {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            let far = StdStream::connect(listener.local_addr()?)?;
            far.set_nodelay(true)?;
            far.set_read_timeout(Some(LIMIT))?;
            far.set_write_timeout(Some(LIMIT))?;
            let (near, _) = listener.accept()?;
            socket::prepare(&near)?;
            near.set_nonblocking(true)?;
            Ok((far, near))
        };
        let ((client, client_near), (server, server_near)) = (connect()?, connect()?);
        let (client_near, server_near) = (TcpStream::from_std(client_near)?, TcpStream::from_std(server_near)?);
        SockRef::from(&server_near).set_send_buffer_size(1)?;
        let legs = Legs::new(client_near, server_near, Unsent::Nothing);
        Ok((Self { client, server, table: table.clone(), traffic: traffic.clone() }, legs))
    }

    /// Bytes that the kernel has forwarded, each way.
    fn redirected(&self) -> [u64; 2] {
        let look = self.traffic.look();
        [look.to_upstream[0], look.to_client[0]]
    }

    /// Sends there and back until the kernel forwards both.
    fn engage(&self) -> io::Result<()> {
        for round in 0..1000 {
            let before = self.redirected();
            message(&self.client, &self.server, 0)?;
            message(&self.server, &self.client, 0)?;
            if self.redirected() == before.map(|bytes| bytes + MESSAGE as u64) {
                return Ok(());
            }
            if round > 10 {
                thread::sleep(Duration::from_millis(1));
            }
        }
        Err(wrong("nothing was redirected"))
    }
}

fn wrong(what: &str) -> io::Error {
    io::Error::other(what.to_owned())
}

/// A stream of which no two places look alike.
fn stream(from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(|at| (at ^ at >> 8 ^ at >> 16) as u8).collect()
}

const MESSAGE: usize = 200;

fn message(from: &StdStream, to: &StdStream, at: usize) -> io::Result<()> {
    let sent = stream(at, MESSAGE);
    (&*from).write_all(&sent)?;
    expect(to, &sent)
}

fn expect(mut from: &StdStream, expected: &[u8]) -> io::Result<()> {
    let mut received = vec![0; expected.len()];
    from.read_exact(&mut received)?;
    if received == expected { Ok(()) } else { Err(wrong("bytes were lost, doubled or changed")) }
}

fn expect_end(mut from: &StdStream) -> io::Result<()> {
    match from.read(&mut [0])? {
        0 => Ok(()),
        _ => Err(wrong("bytes came that nobody sent")),
    }
}

/// Both sides end well.
fn finish(circuit: &Circuit) -> io::Result<()> {
    circuit.client.shutdown(Shutdown::Write)?;
    expect_end(&circuit.server)?;
    circuit.server.shutdown(Shutdown::Write)?;
    expect_end(&circuit.client)
}

/// The checks, each with a circuit of its own.
impl Circuit {
    fn exchanges(self) -> io::Result<()> {
        self.engage()?;
        let before = self.redirected();
        for round in 0..100 {
            message(&self.client, &self.server, round)?;
            message(&self.server, &self.client, round)?;
        }
        let forwarded = self.redirected().iter().sum::<u64>() - before.iter().sum::<u64>();
        if forwarded < (MESSAGE * 100) as u64 {
            return Err(wrong("most bytes came to userspace"));
        }
        finish(&self)
    }

    fn stalled_reader(self) -> io::Result<()> {
        self.engage()?;
        let sent = stream(7, 300_000);
        thread::scope(|scope| {
            let sending = scope.spawn(|| -> io::Result<()> {
                for part in sent.chunks(10_000) {
                    (&self.client).write_all(part)?;
                }
                self.client.shutdown(Shutdown::Write)
            });
            // Nothing is read before userspace has what did not fit, however busy the machine is.
            let start = Instant::now();
            while self.table.spills[Side::Client as usize].get() == 0 {
                if start.elapsed() > LIMIT / 2 {
                    return Err(wrong("the kernel went on redirecting to a full socket"));
                }
                thread::sleep(Duration::from_millis(1));
            }
            expect(&self.server, &sent)?;
            expect_end(&self.server)?;
            sending.join().map_err(|_| wrong("the sender panicked"))?
        })?;
        message(&self.server, &self.client, 3)?;
        self.server.shutdown(Shutdown::Write)?;
        expect_end(&self.client)
    }

    fn fin_with_data(self) -> io::Result<()> {
        self.engage()?;
        for (from, to) in [(&self.client, &self.server), (&self.server, &self.client)] {
            let sent = stream(11, MESSAGE);
            SockRef::from(from).set_tcp_cork(true)?;
            (&*from).write_all(&sent)?;
            from.shutdown(Shutdown::Write)?;
            expect(to, &sent)?;
            expect_end(to)?;
        }
        Ok(())
    }

    fn half_close(self) -> io::Result<()> {
        self.engage()?;
        self.client.shutdown(Shutdown::Write)?;
        expect_end(&self.server)?;
        let sent = stream(13, 100_000);
        thread::scope(|scope| {
            let sending = scope.spawn(|| (&self.server).write_all(&sent));
            expect(&self.client, &sent)?;
            sending.join().map_err(|_| wrong("the sender panicked"))?
        })?;
        self.server.shutdown(Shutdown::Write)?;
        expect_end(&self.client)
    }

    fn overlap(self) -> io::Result<()> {
        const AGAIN: usize = 50;
        self.engage()?;
        message(&self.client, &self.server, 17)?;
        let trimmed = || self.table.programs.rows.iter().map(|row| u64::from(row.trimmed.get())).sum::<u64>();
        let before = trimmed();
        let client = sys::rewind(self.client, AGAIN as u32)?;
        let sent = stream(17, MESSAGE * 2);
        (&client).write_all(&sent[MESSAGE - AGAIN..])?;
        expect(&self.server, &sent[MESSAGE..])?;
        if trimmed() != before + AGAIN as u64 {
            return Err(wrong("the retransmit did not overlap as it was meant to"));
        }
        SockRef::from(&client).set_linger(Some(Duration::ZERO))?;
        Ok(())
    }

    fn reset(self) -> io::Result<()> {
        self.engage()?;
        SockRef::from(&self.client).set_linger(Some(Duration::ZERO))?;
        Ok(())
    }
}
