//! Dials of a whole pool, over loopback. A target that never answers is one whose name is never
//! resolved.

use std::net::{Ipv4Addr, TcpListener};

use super::connect::Dial;
use super::*;
use crate::config::{Config, Source, parse};
use maintenance::Maintenance;

/// For what takes milliseconds where nobody takes the processor away.
const PATIENCE: Duration = Duration::from_secs(20);

fn config(targets: &[&str], more: &str) -> Config {
    let text = format!(
        "tailnet.socket = \"/nowhere/tailscaled.sock\"\n[listeners.a]\nmode = \"tcp\"\nbind = [\"192.0.2.1:1\"]\nupstream = \"u\"\n\
         [upstreams.u]\ntargets = {targets:?}\n{more}"
    );
    parse(Arc::new(Source::new("test.toml", text))).unwrap().0
}

fn pool(targets: &[&str], more: &str) -> Arc<Pool> {
    pool_of(&config(targets, more))
}

fn pool_of(config: &Config) -> Arc<Pool> {
    pool_with(config, &Arc::default())
}

fn pool_with(config: &Config, inventory: &Arc<Inventory>) -> Arc<Pool> {
    Arc::new(Pool::new(&config.upstreams[0], None, inventory, &crate::metrics::Metrics::new().upstreams))
}

fn refused() -> Event {
    Event::DialFailed { started: Instant::now(), reason: "refused".into() }
}

/// The second sign.
fn still_refused() -> Event {
    Event::ProbeFailed { reason: "refused".into(), answers: false }
}

/// A server that accepts, and its address.
fn server() -> (TcpListener, SocketAddr) {
    let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let at = server.local_addr().unwrap();
    (server, at)
}

fn dial() -> Dial {
    Dial { client: ([192, 0, 2, 9], 1).into(), own: [].into(), port: None, speaks_first: false, is_probe: false }
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("it is done soon")
}

async fn looked_after_until_up(config: &Config, pool: &Arc<Pool>) {
    let maintenance = Maintenance::start().unwrap();
    maintenance.follow(config, std::slice::from_ref(pool));
    soon(async {
        while !pool.targets[0].is_up.load(Relaxed) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_name_that_leads_back_to_a_listener_of_ours_is_no_target() {
    let (_server, at) = server();
    let pool = pool(&[&format!("laptop:{}", at.port())], "");
    // What filters of advertisements answer, and two ways to write what leads to the same place.
    for ip in ["0.0.0.0", "127.0.0.1", "::ffff:127.0.0.1", "::ffff:0.0.0.0"] {
        pool.targets[0].resolved(Ok(vec![ip.parse().unwrap()]));
        for listener in [at, (Ipv4Addr::UNSPECIFIED, at.port()).into()] {
            let dial = Dial { own: [listener].into(), ..dial() };
            assert!(soon(pool.dial(dial)).await.is_err(), "{ip} with a listener at {listener}");
        }
    }
    assert!(soon(pool.dial(dial())).await.is_ok(), "but for another's service on this machine it is one");
}

#[tokio::test]
async fn a_dial_to_another_port_is_judged_by_that_port() {
    let (own, at) = server();
    let (secret, elsewhere) = server();
    secret.set_nonblocking(true).unwrap();
    for host in ["laptop", "127.0.0.1"] {
        let node = format!(
            "[source]\ngit = \"/srv/x.git\"\nallow_listeners = [\"*:1\"]\nallow_targets = [\"*\", \"127.0.0.1:{}\"]\n",
            at.port()
        );
        let fence = crate::config::repository(&Source::new("node.toml", node)).unwrap().unwrap().fence;
        let text = format!(
            "[listeners.a]\nmode = \"tcp\"\nbind = [\"192.0.2.1:1\"]\nupstream = \"u\"\n\
             [upstreams.u]\ntargets = [\"{host}:{}\"]\n",
            at.port()
        );
        let source = Arc::new(Source::of_repository("dataplane.toml", text));
        let pool = pool_of(&crate::config::parse_within(source, Some(fence)).unwrap().0);
        if host == "laptop" {
            pool.targets[0].resolved(Ok(vec![at.ip()]));
        }
        assert!(soon(pool.dial(dial())).await.is_ok(), "{host}");
        own.accept().unwrap();
        let challenge = Dial { port: Some(elsewhere.port()), ..dial() };
        assert!(soon(pool.dial(challenge)).await.is_err() && secret.accept().is_err(), "{host}");
        assert!(pool.targets[0].is_up.load(Relaxed), "which says nothing of the target");
    }
}

#[tokio::test]
async fn a_slow_answer_makes_a_target_overdue_but_not_at_another_port_than_its_own() {
    let (_server, at) = server();
    for (port, standing) in [(None, Standing::Overdue), (Some(at.port()), Standing::Good)] {
        let pool = pool(&["laptop:443", &at.to_string()], "balance = \"first\"\nhedge_delay = \"1ms\"");
        let dialled = soon(pool.dial(Dial { port, ..dial() })).await.unwrap();
        assert_eq!(**dialled.lease.target(), at.to_string());
        assert_eq!(pool.targets[0].standing(false), standing);
    }
}

#[tokio::test]
async fn what_has_room_or_comes_back_while_a_dial_waits_is_dialled_beside_it() {
    let (_server, at) = server();
    let pool = pool(
        &["laptop:443", &at.to_string()],
        "balance = \"first\"\nhedge_delay = \"10ms\"\nconnect_timeout = \"60s\"",
    );
    pool.targets[1].set_drained(true);
    let undrain = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        pool.targets[1].set_drained(false);
    };
    let (dialled, ()) = soon(async { tokio::join!(pool.dial(dial()), undrain) }).await;
    assert_eq!(**dialled.unwrap().lease.target(), at.to_string());
}

#[tokio::test]
async fn a_connection_made_after_its_target_was_lost_is_not_lost() {
    let (_server, at) = server();
    let pool = pool(&[&format!("laptop:{}", at.port())], "on_down = \"reset\"");
    let target = &pool.targets[0];
    let comes_back = async {
        tokio::task::yield_now().await;
        assert_eq!(target.active.load(Relaxed), 1, "the dial is under way");
        target.apply(refused());
        target.apply(still_refused());
        target.resolved(Ok(vec![at.ip()]));
    };
    let (dialled, ()) = soon(async { tokio::join!(pool.dial(dial()), comes_back) }).await;
    let mut lease = dialled.unwrap().lease;
    let lost = async |lease: &mut Lease| tokio::time::timeout(Duration::ZERO, lease.lost()).await.is_ok();
    assert!(!lost(&mut lease).await);
    target.apply(refused());
    assert!(!lost(&mut lease).await, "one refused dial may be a full accept queue");
    target.apply(still_refused());
    assert!(lost(&mut lease).await, "but it is when that happens later");
}

#[tokio::test]
async fn each_address_of_a_name_gets_its_share() {
    let server = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    let port = server.local_addr().unwrap().port();
    std::thread::spawn(move || server.incoming().for_each(drop));
    let v6 = |n: u16| IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, n]);
    for count in 1..=5_u8 {
        for others in [vec![], vec![v6(1), v6(2), v6(3)]] {
            let pool = pool(&[&format!("laptop:{port}")], "");
            // In another order than their families'.
            let own = (1..=count).map(|n| [127, 0, 0, n].into());
            pool.targets[0].resolved(Ok(others.into_iter().chain(own).collect()));
            let mut shares = HashMap::<IpAddr, u32>::new();
            for _ in 0..12 * count {
                let dialled = soon(pool.dial(dial())).await.unwrap();
                *shares.entry(dialled.stream.peer_addr().unwrap().ip()).or_default() += 1;
                // Looking on takes no turn.
                let _ = pool.targets[0].status();
            }
            assert!(shares.len() == usize::from(count) && shares.values().all(|n| *n == 12), "{count}: {shares:?}");
        }
    }
}

#[tokio::test]
async fn what_one_upstream_learns_of_a_machine_the_other_knows() {
    let inventory = Arc::default();
    let first = pool_with(&config(&["192.0.2.1:443", "192.0.2.2:443"], ""), &inventory);
    let second = pool_with(&config(&["[::ffff:192.0.2.1]:443", "192.0.2.1:80"], ""), &inventory);
    let is_up = |pool: &Pool| pool.targets.iter().map(|target| target.is_up.load(Relaxed)).collect::<Vec<_>>();
    first.targets[0].apply(refused());
    assert_eq!((is_up(&first), is_up(&second)), (vec![false, true], vec![false, true]), "and nothing of another port");
    let third = pool_with(&config(&["192.0.2.1:443"], ""), &inventory);
    assert_eq!(is_up(&third), [false], "one that comes later knows it, too");
    second.targets[0].apply(Event::DialPassed);
    assert_eq!((is_up(&first), is_up(&second), is_up(&third)), (vec![true; 2], vec![true; 2], vec![true]));
    // How it takes the PROXY header is each upstream's own affair.
    first.targets[0].apply(Event::ResetEarly { started: Instant::now() });
    assert_eq!((is_up(&first), is_up(&second)), (vec![false, true], vec![true; 2]));
    second.targets[0].apply(Event::DialPassed);
    assert_eq!(is_up(&first), [false, true], "a connection that is made says nothing of resets");
}

#[tokio::test]
async fn the_last_good_answer_belongs_to_the_name_and_outlives_reloads() {
    let inventory = Arc::default();
    let before = config(&["Laptop.example:443"], "");
    let pool = pool_with(&before, &inventory);
    pool.targets[0].resolved(Ok(vec![[192, 0, 2, 1].into()]));
    drop(pool);
    for target in ["laptop.example:443", "laptop.example:8443", "laptop.example.:443"] {
        let after = config(&[target], "");
        inventory.retain([&before, &after]);
        let pool = pool_with(&after, &inventory);
        pool.targets[0].resolved(Err("SERVFAIL".to_owned()));
        assert!(pool.targets[0].is_up.load(Relaxed), "{target}");
        assert!(matches!(&*pool.targets[0].resolution.borrow(), Resolution::Known(all) if all.len() == 1), "{target}");
    }
    inventory.retain([&config(&["other.example:443"], "")]);
    assert!(inventory.last_answer("laptop.example").is_none(), "what nobody asks for is not kept");
}

#[tokio::test]
async fn a_client_that_has_nowhere_else_to_go_has_the_name_looked_up() {
    let (_server, at) = server();
    let pool = pool(&[&format!("laptop:{}", at.port())], "connect_timeout = \"60s\"");
    let target = &pool.targets[0];
    target.resolved(Err("SERVFAIL".to_owned()));
    let answers = async {
        target.wanted.notified().await;
        target.resolved(Ok(vec![at.ip()]));
    };
    let (dialled, ()) = soon(async { tokio::join!(pool.dial(dial()), answers) }).await;
    assert!(dialled.is_ok());
}

#[tokio::test]
async fn an_answer_that_may_not_be_used_is_asked_for_again_and_nobody_waits_for_it() {
    let node = "[source]\ngit = \"/srv/x.git\"\nallow_listeners = [\"*:1\"]\n";
    let fence = crate::config::repository(&Source::new("node.toml", node.to_owned())).unwrap().unwrap().fence;
    let text = "[listeners.a]\nmode = \"tcp\"\nbind = [\"192.0.2.1:1\"]\nupstream = \"u\"\n\
                [upstreams.u]\ntargets = [\"localhost.example:443\"]\nconnect_timeout = \"60s\"\n";
    let source = Arc::new(Source::of_repository("dataplane.toml", text.into()));
    let pool = pool_of(&crate::config::parse_within(source, Some(fence)).unwrap().0);
    let target = &pool.targets[0];
    assert!(!target.resolved(Ok(vec![Ipv4Addr::LOCALHOST.into()])), "it is of no use");
    assert!(soon(pool.dial(dial())).await.is_err());
    assert!(soon(pool.dial(dial())).await.is_err(), "nobody waits, however many come");
    soon(target.wanted.notified()).await;
    assert!(target.resolved(Ok(vec![[192, 0, 2, 1].into()])));
    assert!(target.is_up.load(Relaxed));
    assert!(!target.resolved(Ok(vec![Ipv4Addr::LOCALHOST.into()])), "nor is it when there was a good one");
}

#[tokio::test]
async fn checks_and_probes_take_no_turn_of_clients() {
    let pool = pool(&["laptop.example:443"], "");
    let target = &pool.targets[0];
    target.resolved(Ok(vec![[192, 0, 2, 1].into(), [192, 0, 2, 2].into()]));
    let addresses = match &*target.resolution.borrow() {
        Resolution::Known(known) => known.clone(),
        other => panic!("{other:?}"),
    };
    let first = |dial: &Dial| target.in_turn(&addresses, dial)[0].at;
    let client = first(&dial());
    first(&Dial { is_probe: true, ..dial() });
    assert_ne!(first(&dial()), client, "the other address has its turn");
}

#[tokio::test]
async fn a_machine_that_answers_no_check_is_down_in_every_upstream_until_it_does() {
    let text = "[listeners.a]\nmode = \"tcp\"\nbind = [\"192.0.2.1:1\"]\nupstream = \"u\"\n\
                [upstreams.u]\ntargets = [\"192.0.2.9:1\"]\n[upstreams.v]\ntargets = [\"192.0.2.9:1\"]\n";
    let config = parse(Arc::new(Source::new("test.toml", text.to_owned()))).unwrap().0;
    let inventory = Arc::default();
    let metrics = crate::metrics::Metrics::new();
    let pool = |index: usize| Pool::new(&config.upstreams[index], None, &inventory, &metrics.upstreams);
    let (checking, other) = (pool(0), pool(1));
    let failed = || Event::CheckFailed { fall: 1, reason: "check: timeout".into(), answers: false };
    checking.targets[0].apply(failed());
    assert_eq!(other.targets[0].health().reason(), Some("check: timeout"));
    assert_eq!(pool(1).targets[0].health().reason(), Some("check: timeout"), "who comes later learns it, too");
    checking.targets[0].apply(Event::CheckPassed { rise: 1 });
    assert!(other.targets[0].is_up.load(Relaxed));
    checking.targets[0].apply(failed());
    drop(checking);
    assert!(other.targets[0].is_up.load(Relaxed), "nobody checks it any more");
}

#[tokio::test]
async fn the_word_of_a_check_ends_with_the_configuration_that_has_it() {
    // It never answers: only the test says what the check found.
    let (_server, at) = server();
    let target = at.to_string();
    let checking = "health = { interval = \"60s\", timeout = \"60s\", tls = \"a.example.com\" }";
    let text = format!(
        "tailnet.socket = \"/nowhere/tailscaled.sock\"\n[listeners.a]\nmode = \"tcp\"\nbind = [\"192.0.2.1:1\"]\nupstream = \"v\"\n\
         [upstreams.u]\ntargets = [\"{target}\"]\n{checking}\n[upstreams.v]\ntargets = [\"{target}\"]\n"
    );
    let config = parse(Arc::new(Source::new("test.toml", text))).unwrap().0;
    let (inventory, metrics) = (Arc::default(), crate::metrics::Metrics::new());
    let pool = |index: usize| Arc::new(Pool::new(&config.upstreams[index], None, &inventory, &metrics.upstreams));
    let failed = || Event::CheckFailed { fall: 1, reason: "check: timeout".into(), answers: false };
    let gauge = || metrics.upstreams.target_up("u", &target).get();
    let reason = |pool: &Pool| pool.targets[0].health().reason().map(str::to_owned);
    let (before, other) = (pool(0), pool(1));
    let maintenance = Maintenance::start().unwrap();
    maintenance.follow(&config, &[before.clone(), other.clone()]);
    before.targets[0].apply(failed());
    assert_eq!(reason(&other).as_deref(), Some("check: timeout"));
    // Connections keep the one of before; the next one has its name, and is down for a reason of
    // its own.
    let after = pool(0);
    after.targets[0].apply(Event::Unresolved { reason: "no such name".into() });
    maintenance.follow(&config, &[after.clone(), other.clone()]);
    soon(async {
        while reason(&other).is_some() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    assert_eq!(reason(&pool(1)), None, "nor does who comes later learn it");
    assert_eq!(gauge(), 0, "the gauge is that of the configuration in force");
    after.targets[0].apply(failed());
    drop(before);
    assert_eq!(reason(&other).as_deref(), Some("check: timeout"), "by the word of the other one");
}

#[tokio::test]
async fn who_waits_for_room_is_served_in_turn() {
    let (_server, at) = server();
    let pool = pool(&[&at.to_string()], "max_connections_per_target = 1\nconnect_timeout = \"60s\"");
    let first = soon(pool.dial(dial())).await.unwrap();
    let (served, mut order) = tokio::sync::mpsc::unbounded_channel();
    for number in 0..8 {
        let (waits, served) = (pool.clone(), served.clone());
        tokio::spawn(async move {
            let dialled = waits.dial(dial()).await;
            served.send((number, dialled.is_ok())).unwrap();
        });
        // Long enough that they look at different times for room that nobody told them of.
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    drop(first);
    for number in 0..8 {
        assert_eq!(soon(order.recv()).await, Some((number, true)));
    }
}

#[tokio::test]
async fn addresses_that_fail_while_they_are_put_in_order_do_no_harm() {
    let pool = pool(&["laptop:443"], "");
    let target = &pool.targets[0];
    target.resolved(Ok((1..9).map(|n| [192, 0, 2, n].into()).collect()));
    let Resolution::Known(all) = &*target.resolution.borrow() else { unreachable!("it was told") };
    // Another thread's clock is read after ours.
    all[3].failed_at.store(target.now() + 1000, Relaxed);
    assert_eq!(target.in_turn(all, &dial()).last().unwrap().at, all[3].at);
}

#[tokio::test]
async fn a_name_of_hundreds_of_addresses_is_checked_and_remembered_within_bounds() {
    // On every address of loopback; it thinks before it answers.
    let server = tokio::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).await.unwrap();
    let port = server.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = server.accept().await.unwrap();
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(500)).await;
                let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, &[22, 3, 3, 0, 2, 2, 0]).await;
                tokio::time::sleep(PATIENCE).await;
            });
        }
    });
    let config = config(
        &[&format!("laptop:{port}")],
        "health = { interval = \"1ms\", timeout = \"4s\", fall = 1000, rise = 1, tls = \"a.example.com\" }",
    );
    let pool = pool_of(&config);
    let target = &pool.targets[0];
    target.resolved(Ok((1..=200).map(|n| [127, 0, 0, n].into()).collect()));
    assert!(matches!(&*target.resolution.borrow(), Resolution::Known(all) if all.len() <= 16));
    target.apply(Event::CheckFailed { fall: 1, reason: "once".into(), answers: false });
    looked_after_until_up(&config, &pool).await;
}

#[tokio::test]
async fn a_check_that_ends_while_a_reload_takes_it_out_of_the_configuration_is_forgotten() {
    let (_server, at) = server();
    let config = config(&[&at.to_string()], "");
    let pool = pool_of(&config);
    let target = &pool.targets[0];
    target.apply(Event::CheckFailed { fall: 1, reason: "too late".into(), answers: false });
    looked_after_until_up(&config, &pool).await;
}
