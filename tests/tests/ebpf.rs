//! The eBPF programs in the running kernel. Needs root and the object of `cargo xtask build-ebpf`.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use aya::programs::{ProgramInfo, loaded_programs};
use aya::sys::{Stats, enable_stats};
use dataplane::engine::sockmap::Table;
use dataplane::engine::sockmap::programs::{self, Programs};
use dataplane::engine::{Halt, InKernel, Kind, Left, Legs, Outcome, PerSide, StreamState, Timeouts, Traffic, Unsent};
use dataplane::metrics::Metrics;
use rustix::net::sockopt::socket_cookie;

/// What a busy machine may take.
const LIMIT: Duration = Duration::from_secs(20);

fn load() -> Programs {
    assert!(rustix::process::geteuid().is_root(), "loads eBPF programs: run `cargo xtask test` as root");
    programs::load(4).unwrap_or_else(|error| panic!("{error}"))
}

fn find(program_id: u32) -> Option<ProgramInfo> {
    loaded_programs().filter_map(Result::ok).find(|program| program.id() == program_id)
}

fn connected_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let client = TcpStream::connect(listener.local_addr().expect("is bound")).expect("listens");
    let (server, _) = listener.accept().expect("connected");
    server.set_read_timeout(Some(LIMIT)).expect("a timeout");
    client.set_nodelay(true).expect("TCP_NODELAY");
    (client, server)
}

/// Puts a socket into the map, as the source of the direction with this key.
fn insert(programs: &Programs, key: u32, socket: &TcpStream) {
    let cookie = socket_cookie(socket).expect("SO_COOKIE");
    programs.keys.lock().expect("no panic").insert(cookie, key, 0).expect("room");
    programs.sockets.lock().expect("no panic").set(key, socket, 0).expect("an established socket goes in");
}

/// A program goes only after an RCU grace period, and the last skb may still be on its way.
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {LIMIT:?}: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn the_verdict_is_in_the_kernel_while_the_programs_are_held_and_gone_after_it() {
    let programs = load();
    let id = programs.verdict_id();
    assert_eq!(find(id).expect("listed by the kernel").name_as_str(), Some(common::sockmap::VERDICT));
    drop(programs);
    eventually("the program is unloaded", || find(id).is_none());
}

#[test]
fn on_hold_the_verdict_counts_and_lets_bytes_and_end_of_stream_through() {
    let _stats = enable_stats(Stats::RunTime).expect("the kernel counts runs");
    let programs = load();
    let (mut client, mut server) = connected_pair();
    insert(&programs, 0, &server);

    client.write_all(b"hello").expect("connected");
    let mut received = [0; 5];
    server.read_exact(&mut received).expect("PASS leaves the bytes to us");
    assert_eq!(&received, b"hello");
    assert_eq!(programs.rows[0].passed.get(), 5);
    let runs = || find(programs.verdict_id()).expect("still loaded").run_count();
    eventually("one run for the data", || runs() == 1);

    client.shutdown(Shutdown::Write).expect("connected");
    assert_eq!(server.read(&mut received).expect("no error for the dropped FIN"), 0);
    eventually("one run for the bare FIN", || runs() == 2);
    assert_eq!(programs.rows[0].passed.get(), 5);

    server.write_all(b"goodbye").expect("half-closed only");
    drop(server);
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).expect("a clean end");
    assert_eq!(answer, b"goodbye");
}

#[test]
fn running_the_verdict_redirects_to_the_peer_and_tells_when_it_has_to_stop() {
    let mut programs = load();
    let mut events = programs.events.take().expect("nobody took it");
    let (mut client, client_near) = connected_pair();
    let (mut server, upstream_near) = connected_pair();
    server.set_read_timeout(Some(LIMIT)).expect("a timeout");
    insert(&programs, 1, &upstream_near);
    insert(&programs, 0, &client_near);
    programs.budget[0].queue.set(10_000);
    programs.budget[0].unread.set(1 << 20);
    programs.budget[0].flood.set(2 << 20);
    programs.rows[0].mode.set(common::sockmap::governor::RUN);

    client.write_all(b"hello").expect("connected");
    let mut received = [0; 5];
    server.read_exact(&mut received).expect("redirected");
    assert_eq!(&received, b"hello");
    assert_eq!((programs.rows[0].redirected.get(), programs.rows[0].passed.get()), (5, 0));
    assert!(events.next().is_none());

    // Less than the next segment needs.
    programs.budget[0].queue.set(1);
    client.write_all(b"slow").expect("connected");
    eventually("the segment is passed", || programs.rows[0].passed.get() == 4);
    // A moment after the count.
    eventually("told", || events.next().is_some_and(|event| *event == 0_u32.to_ne_bytes()));
    client.write_all(b"more").expect("connected");
    eventually("the next one, too", || programs.rows[0].passed.get() == 8);
    assert!(events.next().is_none(), "told once");
    programs.budget[0].queue.set(10_000);
    let mut left = [0; 8];
    (&client_near).read_exact(&mut left).expect("passed");
    assert_eq!(&left, b"slowmore");
    // Userspace has sent it on: the kernel takes over.
    (&upstream_near).write_all(&left).expect("sent");
    programs.rows[0].consumed.set(8);
    client.write_all(b"again").expect("connected");
    let mut rest = [0; 13];
    server.read_exact(&mut rest).expect("in order");
    assert_eq!(&rest, b"slowmoreagain");
    assert_eq!(programs.rows[0].redirected.get(), 10);
}

#[test]
fn quiesced_a_socket_gets_no_data_until_it_is_let_in_again_and_resets_at_once() {
    let programs = load();
    let (mut client, mut server) = connected_pair();
    programs.quiesce(&server).expect("attached");
    client.write_all(b"later").expect("connected");
    server.set_read_timeout(Some(Duration::from_millis(100))).expect("a timeout");
    let mut received = [0; 5];
    assert!(server.read(&mut received).is_err(), "nothing comes");
    // What goes the other way is acknowledged meanwhile.
    server.write_all(b"now").expect("connected");
    eventually("acknowledged", || dataplane::kernel::sys::unacknowledged(&server).expect("SIOCOUTQ") == 0);
    Programs::unfilter(&server).expect("detached");
    server.set_read_timeout(Some(LIMIT)).expect("a timeout");
    server.read_exact(&mut received).expect("sent again");
    assert_eq!(&received, b"later");

    programs.quiesce(&server).expect("attached");
    socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).expect("SO_LINGER");
    drop(client);
    assert_eq!(server.read(&mut received).expect_err("reset").kind(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn braked_a_socket_gets_no_data_while_too_much_is_unread() {
    let programs = load();
    programs.budget[0].unread.set(1 << 20);
    programs.budget[0].flood.set(2 << 20);
    let (mut client, mut server) = connected_pair();
    insert(&programs, 0, &server);
    programs.brake(&server).expect("attached");
    client.write_all(b"first").expect("connected");
    eventually("counted", || programs.rows[0].passed.get() == 5);

    programs.rows[0].passed.set((1 << 20) + 1);
    client.write_all(b" second").expect("connected");
    let lost = || dataplane::kernel::sys::unacknowledged(&client).expect("SIOCOUTQ") == 7;
    thread::sleep(Duration::from_millis(300));
    assert!(lost(), "nothing came");
    // What goes the other way is acknowledged meanwhile.
    server.write_all(b"now").expect("connected");
    eventually("acknowledged", || dataplane::kernel::sys::unacknowledged(&server).expect("SIOCOUTQ") == 0);
    programs.rows[0].consumed.set(1);
    let mut received = [0; 12];
    server.read_exact(&mut received).expect("sent again");
    assert_eq!(&received, b"first second");
    assert_eq!(programs.rows[0].passed.get(), (1 << 20) + 8);
}

/// The last entry of a full map is taken by somebody else, as if the client had sent FIN between
/// the look at its state and the insertion.
#[test]
fn a_connection_of_which_only_one_socket_can_be_inserted_goes_on_with_the_relay() {
    let table = Table::load(1, Metrics::new().engine.spills()).unwrap_or_else(|error| panic!("{error}"));
    table.set_memory(1 << 20);
    table.programs.keys.lock().expect("no panic").insert(u64::MAX, 0, 0).expect("room for two");
    let ((mut client, client_near), (mut server, upstream_near)) = (connected_pair(), connected_pair());
    server.set_read_timeout(Some(LIMIT)).expect("a timeout");
    client.write_all(b"before").expect("connected");
    let traffic = Traffic::by(Kind::Copy);
    let timeouts = Timeouts { idle: LIMIT, half_closed: LIMIT, dead_peer: LIMIT };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let (client_near, upstream_near) = runtime.block_on(async {
        let tokio_stream = |stream: TcpStream| {
            stream.set_nonblocking(true).expect("fcntl");
            tokio::net::TcpStream::from_std(stream).expect("registered")
        };
        let legs = Legs::new(tokio_stream(client_near), tokio_stream(upstream_near), Unsent::Nothing);
        let halt = Halt::default();
        let Outcome::Left(legs, why) = table.clone().forward(legs, false, timeouts, &traffic, &halt).await else {
            panic!("the connection ended");
        };
        assert_eq!((why, legs.streams), (Left::Refused, PerSide::new(|_| StreamState::Open)));
        (legs.client.into_std().expect("a socket"), legs.upstream.into_std().expect("a socket"))
    });
    // What came meanwhile is still there, and no verdict gets in the way.
    for stream in [&client_near, &upstream_near] {
        stream.set_nonblocking(false).expect("fcntl");
    }
    client.write_all(b" and after").expect("connected");
    let mut received = [0; 16];
    (&client_near).read_exact(&mut received).expect("nothing is lost");
    assert_eq!(&received, b"before and after");
    server.write_all(b"answer").expect("connected");
    let mut answer = [0; 6];
    (&upstream_near).read_exact(&mut answer).expect("nothing is lost");
    assert_eq!(&answer, b"answer");
    assert_eq!(table.programs.keys.lock().expect("no panic").keys().count(), 1);
    drop(Arc::into_inner(table));
}
