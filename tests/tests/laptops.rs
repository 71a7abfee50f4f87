//! A minute in the life of an entrance node whose laptops come and go.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tests::daemon::{Config, Daemon, HOST};
use tests::netns::{CLUSTER, Net};
use tests::peers::{Peer, certificate};
use tests::rig::{hello, public};
use tests::{alone, eventually};

/// Connections a second, and for how many seconds.
const RATE: u32 = 200;
const SECONDS: u32 = 60;
/// A first byte of an answer that comes later than this is an error. Longer than a target is ever
/// silent.
const PATIENCE: Duration = Duration::from_secs(30);
/// What happens to the targets in turn.
const WHAT: [&str; 4] = ["stopped", "black-holed", "refusing", "silent"];
/// How long a target is away, and how long all are there in between.
const AWAY: Duration = Duration::from_secs(5);
const THERE: Duration = Duration::from_secs(2);
/// Around a kill: the hello of connections that the target had then had gone out, so no second
/// attempt could be made. All other errors could have been avoided.
///
/// A silent target (SIGSTOP: its kernel accepts for it) swallows the hellos of those that come
/// until a check has found it out, and answers them when it goes on. They are late, and no attempt
/// of the proxy could help them: a hello that was sent may have been acted upon. Nobody who comes
/// after that may wait for it.
const IN_FLIGHT: Duration = Duration::from_millis(500);
/// Who came less than this before a silent target went on may have waited for something else.
const BUSY: Duration = Duration::from_secs(2);

/// What became of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Served,
    /// The proxy gave up: it found no target.
    Refused,
    /// The target's connection broke.
    Broken,
    Silent,
}

fn connect() -> Outcome {
    let mut answer = [0; 7];
    let asked = TcpStream::connect_timeout(&public(), PATIENCE).and_then(|mut client| {
        client.set_read_timeout(Some(PATIENCE))?;
        client.write_all(&hello())?;
        client.read_exact(&mut answer)
    });
    match asked {
        Ok(()) if answer[0] == 22 => Outcome::Served,
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Outcome::Silent,
        Err(e) if e.kind() == ErrorKind::ConnectionReset => Outcome::Broken,
        Ok(()) | Err(_) => Outcome::Refused,
    }
}

#[test]
fn no_client_meets_an_error_that_a_second_attempt_could_have_avoided() {
    let _turn = alone();
    let net = Net::new();
    let pem = certificate(&net, &[HOST]);
    let targets = [CLUSTER[0], CLUSTER[1], CLUSTER[2]]
        .map(|ip| if ip.contains(':') { format!("[{ip}]:443") } else { format!("{ip}:443") });
    let start = |target: &str| {
        let pem = pem.display();
        let server = format!("listen {target} ssl; ssl_certificate {pem}; ssl_certificate_key {pem}; return 200;");
        Peer::nginx(&net, &net.cluster, &format!("http {{ server {{ {server} }} }}"))
    };
    let mut nginx = targets.each_ref().map(|target| Some(start(target)));
    let health =
        format!("health = {{ interval = \"1s\", timeout = \"1s\", tls = \"{HOST}\" }}\nbalance = \"round-robin\"");
    let config = Config::new("auto").targets(targets.each_ref().map(String::as_str)).upstream(&health);
    let daemon = Daemon::start(&net, &config);

    let begun = Instant::now();
    let done = AtomicBool::new(false);
    // Of each connection: when it began, how long it took, what became of it.
    let all: Mutex<Vec<(Duration, Duration, Outcome)>> = Mutex::default();
    let mut kills = Vec::new();
    // From when on a silent target was known to be, and until when it was.
    let mut silences = Vec::new();
    std::thread::scope(|scope| {
        let (net, all, done) = (&net, &all, &done);
        scope.spawn(move || {
            net.client.run(|| {
                // A thread for each, which is in the namespace of this one: who waits holds up none
                // of the others.
                std::thread::scope(|clients| {
                    let mut due = begun;
                    while !done.load(Relaxed) {
                        std::thread::sleep(due.saturating_duration_since(Instant::now()));
                        clients.spawn(move || {
                            let (at, start) = (begun.elapsed(), Instant::now());
                            let outcome = connect();
                            all.lock().expect("no panic").push((at, start.elapsed(), outcome));
                        });
                        due += Duration::from_secs(1) / RATE;
                    }
                });
            });
        });
        let up = |index: usize| daemon.metric("dataplane_upstream_target_up", &[("target", &targets[index])]) > 0.5;
        let mut event = 0;
        while event < WHAT.len() || begun.elapsed() + AWAY + THERE < Duration::from_secs(SECONDS.into()) {
            std::thread::sleep(THERE);
            let what = WHAT[event % WHAT.len()];
            // The one that is black-holed is CLUSTER[1], see below.
            let index = event % WHAT.len() % targets.len();
            let swallow = format!("neigh replace {} lladdr 02:00:00:00:66:66 dev inside nud permanent\n", CLUSTER[1]);
            let send = |peer: &Peer, signal: Signal| {
                kill_process(Pid::from_raw(peer.pid() as i32).expect("a process id"), signal).expect("our child");
            };
            match what {
                "black-holed" => net.entrance.ip(&swallow),
                "silent" => send(nginx[index].as_ref().expect("it runs"), Signal::STOP),
                _ => {
                    kills.push(begun.elapsed());
                    let signal = if what == "stopped" { Signal::TERM } else { Signal::KILL };
                    send(&nginx[index].take().expect("it runs"), signal);
                }
            }
            let since = Instant::now();
            eventually(Duration::from_secs(30), "it is found out", || (!up(index)).then_some(()));
            let found = since.elapsed();
            let found_at = begun.elapsed();
            std::thread::sleep(AWAY);
            println!(
                "{:5.1} s: {} is {what}; found out after {found:?}",
                begun.elapsed().as_secs_f64(),
                targets[index]
            );
            match what {
                "black-holed" => net.entrance.ip(&format!("neigh del {} dev inside\n", CLUSTER[1])),
                "silent" => {
                    silences.push((found_at, begun.elapsed()));
                    send(nginx[index].as_ref().expect("it runs"), Signal::CONT);
                }
                _ => nginx[index] = Some(start(&targets[index])),
            }
            eventually(Duration::from_secs(40), "it comes back", || up(index).then_some(()));
            event += 1;
        }
        std::thread::sleep(Duration::from_secs(SECONDS.into()).saturating_sub(begun.elapsed()));
        done.store(true, Relaxed);
    });

    let lasted = begun.elapsed();
    let mut all = all.into_inner().expect("no panic");
    let count = |outcome: Outcome| all.iter().filter(|(_, _, o)| *o == outcome).count();
    let in_flight = |at: Duration, took: Duration| {
        kills.iter().any(|kill| at <= *kill + IN_FLIGHT && *kill <= at + took + IN_FLIGHT)
    };
    let unavoidable =
        all.iter().filter(|(at, took, outcome)| *outcome == Outcome::Broken && in_flight(*at, *took)).count();
    let errors = all.len() - count(Outcome::Served) - unavoidable;
    let [refused, broken, silent] = [Outcome::Refused, Outcome::Broken, Outcome::Silent].map(count);
    for (found, resumed) in &silences {
        let of_silence = |at: Duration| at > *found + IN_FLIGHT && at + BUSY < *resumed;
        let came: Vec<_> = all.iter().filter(|(at, ..)| of_silence(*at)).collect();
        let waited = came.iter().filter(|(at, took, _)| *at + *took >= *resumed).count();
        println!("{} came while a target was known to be silent; {waited} waited for it", came.len());
        assert!(!came.is_empty() && waited == 0, "nobody is sent to a target that is known to be silent");
    }
    all.sort_unstable_by_key(|(_, took, _)| *took);
    let percentile = |p: usize| all[(all.len() - 1) * p / 1000].1;
    println!(
        "{} connections in {:.0} s: {errors} errors that a second attempt could have avoided \
         ({refused} refused, {broken} broken of which {unavoidable} in flight at a kill, {silent} silent); \
         p50 {:?}, p99 {:?}, p99.9 {:?}, longest {:?}",
        all.len(),
        lasted.as_secs_f64(),
        percentile(500),
        percentile(990),
        percentile(999),
        percentile(1000)
    );
    assert_eq!(errors, 0);
    assert!(all.len() as u32 >= RATE * SECONDS * 9 / 10, "the clients kept their rhythm");
    assert!(unavoidable < 100, "no more than what was in flight");
}
