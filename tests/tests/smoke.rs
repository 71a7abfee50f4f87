//! The whole in a few seconds, for `cargo xtask test --fast`: each promise is proven at length
//! elsewhere.

use std::io::Write;
use std::time::Duration;

use rustix::process::Signal;
use tests::beside_others;
use tests::daemon::{Config, HOST};
use tests::rig::{PATIENCE, Rig, accept_within};
use tests::stream::{End, Pattern, client_hello, read_to_end};

const SIZE: u64 = 1_000_000;

/// RFC 6066 section 3, as the last byte of the alert.
const UNRECOGNIZED_NAME: u8 = 112;

#[test]
fn a_listed_name_is_forwarded_whole_an_unlisted_one_refused_and_sigterm_drains() {
    let _turn = beside_others();
    let mut rig = Rig::new(&Config::new("auto"));
    let (client, server) = rig.pair();

    let mut stranger = rig.connect();
    stranger.write_all(&client_hello(Some("other.example.net"), &[])).expect("sent");
    let (answer, end) = read_to_end(&stranger, PATIENCE);
    assert_eq!((answer.last(), end), (Some(&UNRECOGNIZED_NAME), End::Fin));
    assert!(accept_within(&rig.upstream, Duration::ZERO).is_none(), "no upstream hears of it");
    let rejected = [("listener", "public"), ("reason", "unknown_host")];
    rig.daemon.wait_metric("dataplane_connections_rejected_total", &rejected, 1.0);

    assert!(rig.daemon.cli(&["check"]).status.success());
    assert!(rig.daemon.cli(&["explain", HOST]).status.success());
    assert!(rig.daemon.cli(&["reload"]).status.success());
    let connections = rig.daemon.json(&["connections", "--json"]);
    assert_eq!(connections[0]["server_name"], HOST);

    // The connection goes on through the reload, and through the drain to its end.
    rig.daemon.signal(Signal::TERM);
    for (from, to) in [(&client, &server), (&server, &client)] {
        std::thread::scope(|s| {
            s.spawn(|| {
                Pattern::new(3).send(from, 0, SIZE).expect("sent");
                from.shutdown(std::net::Shutdown::Write).expect("FIN");
            });
            assert_eq!(Pattern::new(3).receive(to, 0), (SIZE, End::Fin));
        });
    }
    assert_eq!(rig.daemon.wait_end(PATIENCE).code(), Some(0));
}
