//! What connections cost in memory when nobody reads, and when nobody speaks. Timing never decides
//! here.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};
use tests::daemon::{Config, Daemon, HOST, Limits};
use tests::netns::{CLIENT, CLUSTER, Net};
use tests::rig::{Rig, accept_within, hello, public};
use tests::stream::{Pattern, client_hello, never_hang, read_preamble};
use tests::{PATIENCE, alone, eventually};

macro_rules! engines {
    ($($engine:ident),+) => { $(
        mod $engine {
            #[test]
            fn two_hundred_stalled_readers_cost_socket_buffers_and_pipes_only() {
                super::stalled(stringify!($engine), false);
            }

            #[test]
            fn two_hundred_connections_stalled_both_ways_cost_socket_buffers_and_pipes_only() {
                super::stalled(stringify!($engine), true);
            }

            #[test]
            fn eight_thousand_idle_connections_cost_at_most_8_kib_each() {
                super::idle(stringify!($engine));
            }
        }
    )+ };
}

engines!(copy, splice, sockmap, auto);

const CONNECTIONS: usize = 200;
/// Bytes of one direction of a connection that may be held outside TCP queues and pipes.
const HELD_EACH_WAY: u64 = 64 << 10;
/// Userspace memory that a stalled connection may hold: the copy engine's buffers.
const USERSPACE_EACH: u64 = 160 << 10;
/// What the rest of the machine may take or give back meanwhile, with the kernel's own bookkeeping
/// for 800 sockets.
const NOISE: u64 = 96 << 20;
/// Somebody else's compiler may start in the middle of a measurement of the whole machine: then it
/// is taken again.
const ATTEMPTS: u32 = 4;

fn stalled(engine: &str, both_ways: bool) {
    let _turn = alone();
    let mut verdict = Ok(());
    for _ in 0..ATTEMPTS {
        verdict = measure_stalled(engine, both_ways);
        if verdict.is_ok() {
            return;
        }
    }
    verdict.unwrap();
}

/// `Err` is what the noise of other programs could also explain; what it cannot is a panic.
fn measure_stalled(engine: &str, both_ways: bool) -> Result<(), String> {
    let rig = Rig::new(&Config::new(engine));
    drop(rig.pair());
    rig.wait_idle();
    let before = Memory::now(&rig);
    let pairs: Vec<_> = (0..CONNECTIONS).map(|_| rig.pair()).collect();
    let mut senders: Vec<&TcpStream> = pairs.iter().map(|(_, server)| server).collect();
    if both_ways {
        senders.extend(pairs.iter().map(|(client, _)| client));
    }
    let accepted = fill(&senders);
    assert!(accepted > (senders.len() as u64) * 64 * 1024, "only {accepted} bytes were taken: nothing has stalled");
    let during = Memory::now(&rig);
    // Exact, whatever else the machine does: what the senders got rid of is in a TCP queue, or the
    // daemon keeps it.
    let kept = accepted.saturating_sub(rig.net.queued_bytes());
    println!(
        "{engine}: {} bytes are redirected and not sent",
        rig.daemon.metric("dataplane_sockmap_backlog_bytes", &[])
    );
    let kept_bound = during.pipes + senders.len() as u64 * HELD_EACH_WAY;
    assert!(kept <= kept_bound, "{kept} bytes are in no TCP queue, the bound is {kept_bound}");
    println!("{engine}: of {accepted} bytes sent {kept} are in no TCP queue, the bound is {kept_bound}");
    let own = during.daemon.saturating_sub(before.daemon);
    let own_bound = CONNECTIONS as u64 * USERSPACE_EACH + (8 << 20);
    assert!(own <= own_bound, "the daemon's own memory grew by {own} bytes, the bound is {own_bound}");
    let fell = before.available.saturating_sub(during.available);
    let accounted = during.sockets.saturating_sub(before.sockets) + during.pipes + own;
    println!("{engine}: available memory fell by {fell} bytes, sockets, pipes and buffers account for {accounted}");
    if fell > accounted + NOISE {
        return Err(format!("available memory fell by {fell}, sockets and pipes account for {accounted}: {during:?}"));
    }
    drop(pairs);
    rig.wait_idle();
    let start = Instant::now();
    loop {
        let after = Memory::now(&rig);
        let missing = before.available.saturating_sub(after.available);
        if missing <= NOISE {
            let kept = after.daemon.saturating_sub(before.daemon);
            // Freed arenas may stay; buffers in use may not.
            assert!(kept <= own_bound / 2, "the daemon kept {kept} bytes");
            return Ok(());
        }
        if start.elapsed() > PATIENCE {
            return Err(format!("{missing} bytes did not come back: {after:?}"));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn stalled_readers_cost_little_more_memory_with_sockmap_than_with_splice() {
    compare_stalled(false);
}

#[test]
fn connections_stalled_both_ways_cost_little_more_memory_with_sockmap_than_with_splice() {
    compare_stalled(true);
}

/// The whole machine, since what is queued in the kernel on behalf of nobody shows nowhere else.
fn compare_stalled(both_ways: bool) {
    const MARGIN: u64 = 16 << 20;
    let _turn = alone();
    let mut told = String::new();
    for _ in 0..ATTEMPTS {
        let [splice, sockmap] = ["splice", "sockmap"].map(|engine| lost_to_stalled(engine, both_ways));
        let bound = splice * 12 / 10 + MARGIN;
        told = format!("splice lost {splice} bytes of available memory, sockmap {sockmap}, the bound is {bound}");
        println!("{told}");
        if sockmap <= bound {
            return;
        }
    }
    panic!("{told}");
}

/// By how much available memory falls at most while senders push as fast as they can for 30 s at
/// readers that do not read.
fn lost_to_stalled(engine: &str, both_ways: bool) -> u64 {
    const PUSH: Duration = Duration::from_secs(30);
    let rig = Rig::new(&Config::new(engine));
    let pairs: Vec<_> = (0..CONNECTIONS).map(|_| rig.pair()).collect();
    let pattern = Pattern::new(5);
    for _ in 0..10 {
        for (client, server) in &pairs {
            pattern.send(client, 0, 200).expect("sent");
            pattern.receive_exactly(server, 0, 200);
            pattern.send(server, 0, 200).expect("sent");
            pattern.receive_exactly(client, 0, 200);
        }
    }
    let by_engine = rig.daemon.metric("dataplane_connections_active", &[("engine", engine)]);
    assert_eq!(by_engine as usize, CONNECTIONS, "connections that {engine} forwards");
    let mut senders: Vec<&TcpStream> = pairs.iter().map(|(_, server)| server).collect();
    if both_ways {
        senders.extend(pairs.iter().map(|(client, _)| client));
    }
    let before = available();
    let mut least = before;
    let start = Instant::now();
    while start.elapsed() < PUSH {
        push(&senders);
        least = least.min(available());
        std::thread::sleep(Duration::from_millis(10));
    }
    if engine == "sockmap" {
        let metric = |name, labels: &[(&str, &str)]| rig.daemon.metric(name, labels) as u64;
        assert!(metric("dataplane_bytes_total", &[("path", "kernel")]) > 0, "the kernel has forwarded");
        let spills = metric("dataplane_sockmap_spills_total", &[]) as usize;
        assert!(spills >= senders.len(), "{spills} directions left the kernel's path, of {}", senders.len());
    }
    drop(pairs);
    rig.wait_idle();
    before - least
}

/// MemAvailable of the machine, bytes.
fn available() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").expect("procfs");
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:")).expect("a MemAvailable line");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}

/// All in bytes.
#[derive(Debug)]
struct Memory {
    /// MemAvailable of the machine.
    available: u64,
    /// What the kernel charges to the TCP sockets of the three hosts.
    sockets: u64,
    /// Capacity of the daemon's pipes.
    pipes: u64,
    /// PSS of the daemon.
    daemon: u64,
}

impl Memory {
    fn now(rig: &Rig) -> Self {
        Self {
            available: available(),
            sockets: rig.net.socket_memory(),
            pipes: pipe_capacity(&rig.daemon),
            daemon: rig.daemon.pss(),
        }
    }
}

/// The sum of the capacities of the daemon's pipes.
fn pipe_capacity(daemon: &Daemon) -> u64 {
    let nonblock = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let mut seen = Vec::new();
    let mut sum = 0;
    for entry in std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).expect("the daemon runs").flatten() {
        let Ok(target) = std::fs::read_link(entry.path()) else { continue };
        if target.to_string_lossy().starts_with("pipe:") && !seen.contains(&target) {
            seen.push(target);
            if let Ok(pipe) = File::options().read(true).custom_flags(nonblock).open(entry.path()) {
                sum += rustix::pipe::fcntl_getpipe_size(&pipe).expect("a pipe") as u64;
            }
        }
    }
    sum
}

/// Sends on all streams until none of them takes a byte for a second; says how many went.
fn fill(streams: &[&TcpStream]) -> u64 {
    let mut sent = 0;
    let mut last = Instant::now();
    while last.elapsed() < Duration::from_secs(1) {
        let more = push(streams);
        if more > 0 {
            sent += more;
            last = Instant::now();
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    sent
}

/// Sends on all streams what they take now.
fn push(streams: &[&TcpStream]) -> u64 {
    let chunk = Pattern::new(7).at(0, 64 << 10);
    let mut sent = 0;
    for mut stream in streams.iter().copied() {
        stream.set_nonblocking(true).expect("fcntl");
        while let Ok(n) = stream.write(chunk) {
            sent += n as u64;
        }
    }
    sent
}

fn idle(engine: &str) {
    const IDLE: usize = 8000;
    let _turn = alone();
    let rig = Rig::new(&Config::new(engine));
    let open = |count: usize| {
        std::thread::scope(|s| {
            let clients = s.spawn(|| {
                rig.net.client.run(|| {
                    let open = |_| {
                        let mut client = TcpStream::connect(public()).expect("the daemon accepts");
                        client.write_all(&hello()).expect("sent");
                        client
                    };
                    (0..count).map(open).collect::<Vec<_>>()
                })
            });
            let servers: Vec<_> = (0..count).map(|_| rig.accept()).collect();
            (clients.join().expect("no panic"), servers)
        })
    };
    // Arenas, pools and threads come with the first connections.
    drop(open(100));
    rig.wait_idle();
    let before = rig.daemon.pss();
    let connections = open(IDLE);
    rig.daemon.wait_metric("dataplane_connections_active", &[], IDLE as f64);
    let grown = rig.daemon.pss().saturating_sub(before);
    let each = grown / IDLE as u64;
    assert!(each <= 8 << 10, "{each} bytes each ({grown} in all)");
    println!("{engine}: {each} bytes of PSS for each of {IDLE} idle connections");
    // They are not only remembered, they work.
    let pattern = Pattern::new(3);
    for i in (0..IDLE).step_by(500) {
        pattern.send(&connections.1[i], 0, 5000).expect("sent");
    }
    // Connections are accepted in the order in which clients opened them, or nearly: the pattern is
    // the same on all.
    let mut served = 0;
    for client in &connections.0 {
        client.set_nonblocking(true).expect("fcntl");
    }
    let start = Instant::now();
    let mut received = vec![0; IDLE];
    while served < IDLE.div_ceil(500) && start.elapsed() < PATIENCE {
        for (i, mut client) in connections.0.iter().enumerate() {
            let mut buffer = [0; 5000];
            if let Ok(n) = std::io::Read::read(&mut client, &mut buffer[received[i]..]) {
                assert_eq!(buffer[received[i]..received[i] + n], *pattern.at(received[i] as u64, n as u64));
                received[i] += n;
                served += usize::from(n > 0 && received[i] == 5000);
            }
        }
    }
    assert_eq!(served, IDLE.div_ceil(500), "connections that were idle and then carried 5,000 bytes");
}

#[test]
fn a_flood_of_silent_connections_keeps_nobody_out_of_a_machine_of_one_gibibyte() {
    /// Many addresses, as a botnet has.
    const FLOOD: &str = "203.0.113";
    /// Open at a time: what this process may have.
    const OPEN: usize = 12_000;
    /// Connections that may wait to be accepted: half of what one queue takes.
    const AHEAD: u64 = 2048;
    let seconds = std::env::var("DATAPLANE_TEST_FLOOD_SECONDS").map_or(0, |text| text.parse().expect("seconds"));
    let lasts = Duration::from_secs(seconds);
    let _turn = alone();
    let net = Net::new();
    net.client.ip(&format!("route add local {FLOOD}.0/24 dev lo\n"));
    net.entrance.ip(&format!("route add {FLOOD}.0/24 via {}\n", CLIENT[0]));
    let upstream = net.cluster.listen(&format!("{}:443", CLUSTER[0]));
    let limits = Limits { memory: Some(1 << 30), ..Limits::default() };
    let daemon = Daemon::start_with(&net, &Config::new("auto").limits("hello_timeout = \"60s\""), limits);
    let status = daemon.json(&["status", "--json"]);
    assert!(status["limits"]["max_connections"].as_u64() <= Some(16384), "{}", status["limits"]);
    // As long as a browser's: it comes in two segments.
    let protocols = ["0123456789012345678901234567"; 60];
    // None is refused, not even to try again.
    let good = || {
        let mut client = net.client.connect(public()).expect("the daemon accepts");
        never_hang(&client);
        client.write_all(&client_hello(Some(HOST), &protocols)).expect("sent");
        let server = accept_within(&upstream, PATIENCE).expect("a good hello gets through");
        read_preamble(&server, false).expect("the hello");
        never_hang(&server);
        (client, server)
    };
    let established = good();
    let (stop, pattern) = (AtomicBool::new(false), Pattern::new(6));
    let accepted = AtomicU64::new(0);
    let opened = std::thread::scope(|s| {
        // Also when a step below fails.
        let _stop = StopWhenDropped(&stop);
        s.spawn(|| {
            while !stop.load(Relaxed) {
                accepted.store(daemon.metric("dataplane_connections_accepted_total", &[]) as u64, Relaxed);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let flood = s.spawn(|| {
            net.client.run(|| {
                let mut open: VecDeque<Socket> = VecDeque::new();
                let mut opened = 0_u64;
                while !stop.load(Relaxed) {
                    // As fast as this machine accepts: beyond that the kernel drops SYNs, good ones
                    // with the others.
                    if opened > accepted.load(Relaxed) + AHEAD {
                        std::thread::sleep(Duration::from_millis(1));
                        continue;
                    }
                    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
                    socket.set_nonblocking(true).expect("fcntl");
                    let from: SocketAddr = format!("{FLOOD}.{}:0", opened % 250 + 1).parse().expect("an address");
                    socket.bind(&from.into()).expect("bound");
                    let _ = socket.connect(&public().into());
                    open.push_back(socket);
                    opened += 1;
                    if open.len() > OPEN {
                        open.pop_front();
                    }
                }
                opened
            })
        });
        // Until the limit was met many times over, whatever this machine's pace is.
        let refused = || daemon.metric("dataplane_connections_rejected_total", &[("reason", "total_limit")]);
        let mut moved = 0;
        let mut exchange = || {
            pattern.send(&established.0, moved, moved + 1000).expect("sent");
            pattern.receive_exactly(&established.1, moved, moved + 1000);
            moved += 1000;
        };
        let mut all = Vec::new();
        let begin = Instant::now();
        let (mut good_ones, mut slowest) = (0, Duration::ZERO);
        eventually(PATIENCE * 6 + lasts, "the lobby is full, and full again", || {
            exchange();
            all.truncate(100);
            let asked = Instant::now();
            all.push(good());
            slowest = slowest.max(asked.elapsed());
            good_ones += 1;
            (refused() > 100_000.0 && begin.elapsed() >= lasts).then_some(())
        });
        let rate = refused() / begin.elapsed().as_secs_f64();
        println!("{rate:.0} refused a second, {good_ones} good hellos, the slowest in {slowest:?}");
        stop.store(true, Relaxed);
        flood.join().expect("no panic")
    });
    assert!(opened > 10_000);
    let pss = daemon.pss();
    assert!(pss < 300 << 20, "{} MiB", pss >> 20);
    println!("{opened} silent connections: {} MiB of PSS", pss >> 20);
}

/// Tells threads to end.
struct StopWhenDropped<'a>(&'a AtomicBool);

impl Drop for StopWhenDropped<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}
