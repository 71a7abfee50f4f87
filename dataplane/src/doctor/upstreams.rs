//! `dataplane doctor --upstreams`: what each target answers to a hello with and without the PROXY
//! header, and what to change when the configured way is not the one that works.
//!
//! It dials from this process; no daemon need run.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use crate::config::{Config, HostPattern, Mode, SendProxy, Target, TargetHost, Upstream};
use crate::kernel::socket;
use crate::tailnet::{self, View};
use crate::upstream::probe::{self, Greeting};
use crate::upstream::resolver::Resolver;

/// For one attempt, at most: an owner waits for the answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// The ways in which a connection can begin.
const WAYS: [SendProxy; 3] = [SendProxy::Off, SendProxy::V1, SendProxy::V2];

/// What one target answers.
#[derive(Debug, Serialize)]
pub struct Answers {
    upstream: String,
    target: String,
    address: Option<SocketAddr>,
    /// The server name of the hello; `None`: nobody sends hellos there.
    host: Option<String>,
    configured: SendProxy,
    attempts: Vec<Attempt>,
    /// It works as it is configured.
    pub ok: bool,
    advice: Option<String>,
    /// What cannot be told from here.
    unknown: Option<String>,
    challenges: Vec<Challenge>,
}

/// One attempt.
#[derive(Debug, Serialize)]
struct Attempt {
    send_proxy: SendProxy,
    /// Whether a ServerHello came; where no hello was sent: whether the connection stayed open.
    ok: bool,
    error: Option<String>,
    /// What came where no hello was sent.
    answer: Option<String>,
}

/// Asks every target.
pub fn ask(config: &Config) -> Result<Vec<Answers>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let view = tailnet::look(&config.tailnet.socket).await.ok();
        let names = Resolver::new(config.resolver.clone());
        let mut all = Vec::new();
        for (index, upstream) in config.upstreams.iter().enumerate() {
            let mut ports = config.challenge_ports(index);
            // By the way of each mode that leads there.
            for host in hosts_of(config, index) {
                for target in &upstream.targets {
                    all.push(of_target(upstream, target, host.as_deref(), &ports, &names, view.as_ref()).await);
                }
                ports.clear();
            }
        }
        Ok(all)
    })
}

/// A host that routes send to the upstream; `None` for listeners of mode `tcp`, which forward
/// anything.
fn hosts_of(config: &Config, upstream: usize) -> Vec<Option<String>> {
    let hosts = config.routes.iter().filter(|route| route.upstream() == Some(upstream)).flat_map(|route| &route.hosts);
    let mut hosts: Vec<&HostPattern> = hosts.collect();
    hosts.sort_by_key(|host| !matches!(host, HostPattern::Exact(_)));
    let forwards_all = config.listeners.iter().any(|l| matches!(l.mode, Mode::Tcp { upstream: u } if u == upstream));
    let by_name = hosts.first().and_then(|host| match host {
        HostPattern::Exact(name) => Some(name.clone()),
        HostPattern::Wildcard(suffix) => Some(format!("doctor.{suffix}")),
        HostPattern::Any => (!forwards_all).then(|| "doctor.invalid".to_owned()),
    });
    let as_it_is = (forwards_all || by_name.is_none()).then_some(None);
    by_name.map(Some).into_iter().chain(as_it_is).collect()
}

async fn of_target(
    upstream: &Upstream,
    target: &Target,
    host: Option<&str>,
    challenge_ports: &[u16],
    names: &Resolver,
    view: Option<&View>,
) -> Answers {
    let mut answers = Answers {
        upstream: upstream.name.to_string(),
        target: target.text.to_string(),
        address: None,
        host: host.map(str::to_owned),
        configured: upstream.send_proxy,
        attempts: Vec::new(),
        ok: false,
        advice: None,
        unknown: None,
        challenges: Vec::new(),
    };
    let found = match &target.host {
        TargetHost::Ip(ip) => Ok(vec![*ip]),
        TargetHost::Name(name) => {
            names.look_up(name, view).await.and_then(|(found, _)| target.admit(found, socket::is_of_this_machine))
        }
    };
    let addresses = match found {
        Ok(addresses) => addresses,
        Err(reason) => {
            answers.advice =
                Some(format!("the name has no address here: {reason}; name its address, or see [resolver]"));
            return answers;
        }
    };
    let patience = PATIENCE.min(upstream.connect_timeout);
    for ip in addresses {
        let address = SocketAddr::new(ip, target.port);
        answers.address = Some(address);
        answers.attempts.clear();
        for way in WAYS {
            answers.attempts.push(match host {
                Some(_) => {
                    let error = probe::check(address, way, host, patience).await.err();
                    Attempt { send_proxy: way, ok: error.is_none(), error, answer: None }
                }
                None => judge_greeting(way, probe::greeting(address, way, b"", patience).await),
            });
        }
        if answers.attempts.iter().any(|attempt| attempt.ok) {
            break;
        }
    }
    if host.is_none() {
        let greets = |attempt: &Attempt| attempt.answer.as_deref().is_some_and(|answer| answer != SILENT);
        if answers.attempts.iter().any(greets) {
            // Where one way is greeted, silence is no success.
            for attempt in answers.attempts.iter_mut().filter(|attempt| attempt.answer.as_deref() == Some(SILENT)) {
                attempt.ok = false;
            }
        } else if answers.attempts.iter().any(|attempt| attempt.ok) {
            answers.unknown = Some(
                "it waits for the client to speak first, so nobody can tell from here whether it expects a PROXY header".to_owned(),
            );
        }
    }
    answers.ok = answers.attempts.iter().any(|attempt| attempt.send_proxy == upstream.send_proxy && attempt.ok);
    answers.advice = advice(&answers.attempts, upstream.send_proxy, &upstream.name, host);
    for port in challenge_ports {
        let Some(address) = answers.address else { break };
        let address = SocketAddr::new(address.ip(), *port);
        if !target.admits(address, socket::is_of_this_machine) {
            let text = "`allow_targets` of [source] does not let a repository go there".to_owned();
            answers.ok = false;
            answers.challenges.push(Challenge { port: *port, ok: false, text });
            continue;
        }
        let host = host.unwrap_or("doctor.invalid");
        let request =
            format!("GET /.well-known/acme-challenge/doctor HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        let found = probe::greeting(address, upstream.send_proxy, request.as_bytes(), patience).await;
        let challenge = judge_challenge(*port, found);
        answers.ok &= challenge.ok;
        answers.challenges.push(challenge);
    }
    answers
}

/// What is said of a target that stays silent.
const SILENT: &str = "connected, it says nothing";

fn judge_greeting(send_proxy: SendProxy, found: Result<Greeting, String>) -> Attempt {
    let (answer, error) = match found {
        Ok(Greeting::Greeted(line)) => (Some(format!("it greets: {line}")), None),
        Ok(Greeting::Silent) => (Some(SILENT.to_owned()), None),
        Ok(Greeting::Closed(line)) if line.is_empty() => (None, Some("it closes the connection".to_owned())),
        Ok(Greeting::Closed(line)) => (None, Some(format!("it closes the connection after: {line}"))),
        Err(why) => (None, Some(why)),
    };
    Attempt { send_proxy, ok: error.is_none(), error, answer }
}

fn judge_challenge(port: u16, found: Result<Greeting, String>) -> Challenge {
    let (ok, text) = match found {
        Ok(Greeting::Greeted(line) | Greeting::Closed(line)) => {
            let status: Option<u16> =
                line.strip_prefix("HTTP/1.").and_then(|line| line.split(' ').nth(1)?.parse().ok());
            match status {
                Some(400) => (false, format!("{line}: does it expect a PROXY header there, or TLS?")),
                Some(status) if status < 500 => (true, line),
                Some(_) => (false, line),
                None if line.is_empty() => (false, "it closes the connection".to_owned()),
                None => (false, format!("the answer is not HTTP: {line}")),
            }
        }
        Ok(Greeting::Silent) => (false, "no answer".to_owned()),
        Err(why) => (false, why),
    };
    Challenge { port, ok, text }
}

/// What the port for ACME challenges answers.
#[derive(Debug, Serialize)]
struct Challenge {
    port: u16,
    ok: bool,
    text: String,
}

fn advice(attempts: &[Attempt], configured: SendProxy, upstream: &str, host: Option<&str>) -> Option<String> {
    let of = |way: SendProxy| attempts.iter().find(|attempt| attempt.send_proxy == way);
    let works = |way: SendProxy| of(way).is_some_and(|attempt| attempt.ok);
    if works(configured) {
        return None;
    }
    // The newest version first: it carries the most.
    if let Some(way) = [SendProxy::V2, SendProxy::V1].into_iter().find(|way| works(*way)) {
        let text = if configured == SendProxy::Off {
            "the ingress wants a PROXY header"
        } else {
            "the ingress wants the other version"
        };
        return Some(format!("{text}: write `send_proxy = \"{}\"` in [upstreams.{upstream}]", word(way)));
    }
    if works(SendProxy::Off) {
        return Some(format!(
            "the ingress does not expect the PROXY header: write `send_proxy = \"off\"` in [upstreams.{upstream}], or better have it expect one \
             (nginx: `listen … proxy_protocol`; HAProxy: `accept-proxy`; Traefik: `proxyProtocol.trustedIPs` of the entry point), so that it learns who the client is"
        ));
    }
    let error = of(configured).and_then(|attempt| attempt.error.as_deref()).unwrap_or_default();
    if error.contains(probe::BLACK_HOLE) {
        return Some(probe::REMEDY.to_owned());
    }
    Some(match host {
        Some(host) if error.starts_with("tls: alert") => {
            format!("the ingress answers, but does not serve {host}: give it that host and a certificate for it")
        }
        Some(_) if error.starts_with("tls:") => {
            "something answers that does not speak TLS this way: is it the port of the ingress for HTTPS?".to_owned()
        }
        _ => {
            "nothing answers there: is the machine on, and the service, and may this machine reach the port?".to_owned()
        }
    })
}

fn word(way: SendProxy) -> &'static str {
    match way {
        SendProxy::Off => "off",
        SendProxy::V1 => "v1",
        SendProxy::V2 => "v2",
    }
}

/// For people.
pub fn text(all: &[Answers]) -> String {
    let mut out = String::new();
    for answers in all {
        let mark = if answers.ok { "ok  " } else { "no  " };
        let address = answers.address.map(|address| format!(" ({address})")).unwrap_or_default();
        let host = answers.host.as_ref().map(|host| format!(", hello for {host}")).unwrap_or_default();
        let _ = writeln!(out, "{mark}{} of {}{address}{host}", answers.target, answers.upstream);
        for attempt in &answers.attempts {
            let configured = if attempt.send_proxy == answers.configured { " (configured)" } else { "" };
            let answered = attempt.answer.as_deref().unwrap_or("ServerHello");
            let outcome = attempt.error.as_deref().unwrap_or(answered);
            let _ = writeln!(out, "      send_proxy = \"{}\"{configured}: {outcome}", word(attempt.send_proxy));
        }
        for challenge in &answers.challenges {
            let mark = if challenge.ok { "" } else { "no: " };
            let _ = writeln!(out, "      ACME challenge to port {}: {mark}{}", challenge.port, challenge.text);
        }
        if let Some(unknown) = &answers.unknown {
            let _ = writeln!(out, "      not known: {unknown}");
        }
        if let Some(advice) = &answers.advice {
            let _ = writeln!(out, "      help: {advice}");
        }
    }
    out
}
