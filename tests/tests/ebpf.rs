//! The eBPF programs in the running kernel. Needs root and the object of `cargo xtask build-ebpf`.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use aya::programs::{ProgramInfo, loaded_programs};
use aya::sys::{Stats, enable_stats};
use dataplane::ebpf::{self, Loaded};

fn load() -> Loaded {
    assert!(rustix::process::geteuid().is_root(), "loads eBPF programs: run `cargo xtask test` as root");
    ebpf::load().unwrap_or_else(|error| panic!("{error}"))
}

fn find(program_id: u32) -> Option<ProgramInfo> {
    loaded_programs().filter_map(Result::ok).find(|program| program.id() == program_id)
}

fn connected_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let client = TcpStream::connect(listener.local_addr().expect("is bound")).expect("listens");
    let (server, _) = listener.accept().expect("connected");
    (client, server)
}

/// A program goes only after an RCU grace period, and the last skb may still be on its way.
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !holds() {
        assert!(Instant::now() < deadline, "not within 5 s: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn the_verdict_is_in_the_kernel_while_loaded_is_held_and_gone_after_it() {
    let loaded = load();
    let program = find(loaded.program_id()).expect("listed by the kernel");
    assert_eq!(program.name_as_str(), Some(common::VERDICT));

    let id = loaded.program_id();
    drop(loaded);
    eventually("the program is unloaded", || find(id).is_none());
}

#[test]
fn the_verdict_runs_for_a_socket_in_the_map_and_lets_its_bytes_and_end_of_stream_through() {
    let _stats = enable_stats(Stats::RunTime).expect("the kernel counts runs");
    let mut loaded = load();
    let (mut client, mut server) = connected_pair();
    server.set_read_timeout(Some(Duration::from_secs(5))).expect("a timeout");
    loaded.sockets().set(0, &server, 0).expect("an established socket goes in");

    client.write_all(b"hello").expect("connected");
    let mut received = [0; 5];
    server.read_exact(&mut received).expect("PASS leaves the bytes to us");
    assert_eq!(&received, b"hello");
    let runs = || find(loaded.program_id()).expect("still loaded").run_count();
    eventually("one run for the data", || runs() == 1);

    client.shutdown(Shutdown::Write).expect("connected");
    assert_eq!(server.read(&mut received).expect("no error for the dropped FIN"), 0);
    eventually("one run for the bare FIN", || runs() == 2);

    server.write_all(b"goodbye").expect("half-closed only");
    drop(server);
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).expect("a clean end");
    assert_eq!(answer, b"goodbye");
}
