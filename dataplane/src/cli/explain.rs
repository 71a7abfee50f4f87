//! `dataplane explain`: what becomes of a name, from the configuration alone.

use std::fmt::Write as _;
use std::net::SocketAddr;

use anyhow::{Result, bail};
use ipnet::IpNet;
use serde::Serialize;

use crate::config::{Config, HostPattern, Listener, Mode};
use crate::reject::Reason;
use crate::route::{By, Match, Table};

/// What somebody wants to know of.
#[derive(Debug, PartialEq, Eq)]
struct Question<'q> {
    host: &'q str,
    /// `None`: on any.
    port: Option<u16>,
}

impl<'q> Question<'q> {
    /// Reads a host name, `host:port` or a URL.
    fn parse(text: &'q str) -> Result<Self> {
        let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let authority = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
        let (host, port) = match authority.rsplit_once(':').filter(|(host, _)| !host.contains(':')) {
            Some((host, port)) => match port.parse() {
                Ok(port) => (host, Some(port)),
                Err(_) => bail!("`{port}` is not a port: write a host, host:port or a URL"),
            },
            None => (authority, None),
        };
        let usual = match scheme {
            "" => None,
            "https" | "wss" => Some(443),
            "http" | "ws" => Some(80),
            other => bail!("`{other}` is not a scheme that says a port: write a host or host:port"),
        };
        Ok(Self { host, port: port.or(usual) })
    }
}

/// What one listener does with it.
#[derive(Debug, Serialize)]
pub struct Answer {
    listener: String,
    mode: &'static str,
    addresses: Vec<SocketAddr>,
    /// Whether a client that may connect gets through.
    forwarded: bool,
    /// Why not: the reason of the metric and the log.
    reason: Option<&'static str>,
    route: Option<String>,
    upstream: Option<String>,
    targets: Vec<String>,
    /// Clients that may connect; empty: all.
    allow: Vec<IpNet>,
    deny: Vec<IpNet>,
    accept_proxy: Vec<IpNet>,
    #[serde(rename = "why")]
    text: String,
}

/// The answers of all listeners that are asked.
#[derive(Debug, Serialize)]
pub struct Explanation {
    name: String,
    /// Whether any of them forwards it.
    pub forwarded: bool,
    answers: Vec<Answer>,
}

impl Explanation {
    /// For people.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for answer in &self.answers {
            let _ = writeln!(text, "{}", answer.text);
        }
        if self.answers.is_empty() {
            let _ = writeln!(text, "{}: nothing listens there", self.name);
        }
        text
    }
}

/// Asks the listeners, or the one of that name.
///
/// # Errors
/// The question cannot be answered.
pub fn explain(config: &Config, question: &str, listener: Option<&str>, alpn: &[String]) -> Result<Explanation> {
    let Question { host, port } = Question::parse(question)?;
    if let Some(wanted) = listener
        && !config.listeners.iter().any(|l| *l.name == *wanted)
    {
        let known: Vec<_> = config.listeners.iter().map(|l| &*l.name).collect();
        bail!("no listener is called `{wanted}`; there are: {}", known.join(", "));
    }
    let name = match HostPattern::parse(host) {
        Ok(HostPattern::Exact(name)) => Some(name),
        _ => None,
    };
    let table = Table::new(config);
    let asked = config.listeners.iter().enumerate().filter(|(_, l)| {
        listener.is_none_or(|wanted| *l.name == *wanted)
            && port.is_none_or(|port| l.bind.iter().any(|bind| bind.addr.port() == port))
    });
    let answers: Vec<_> = asked.map(|(index, _)| answer(config, &table, index, host, name.as_deref(), alpn)).collect();
    // A port that forwards everything says nothing of a name, unless it was meant.
    let is_meant = |answer: &&Answer| listener.is_some() || port.is_some() || answer.mode != "tcp";
    let forwarded = answers.iter().filter(is_meant).any(|answer| answer.forwarded);
    Ok(Explanation { name: host.to_owned(), forwarded, answers })
}

fn answer(config: &Config, table: &Table, index: usize, host: &str, name: Option<&str>, alpn: &[String]) -> Answer {
    let listener = &config.listeners[index];
    let found = match (listener.mode, name) {
        (Mode::Tcp { upstream }, _) => Ok((None, upstream, "it forwards whatever comes".to_owned())),
        (_, None) => Err((Reason::BadServerName, "it is no name that a client could send".to_owned())),
        (mode, Some(name)) => {
            let found = match mode {
                Mode::Http { .. } => table.find_plain(index, Some(name)),
                _ => table.find(index, Some(name), alpn.iter().map(String::as_bytes)),
            };
            match found.map(|Match { route, by }| config.routes[route].upstream().map(|upstream| (route, upstream, by)))
            {
                Ok(Some((route, upstream, by))) => Ok((Some(route), upstream, listed(by, name))),
                Err(reason @ Reason::AlpnMismatch) => {
                    Err((reason, "its routes want an ALPN protocol that is not offered; try --alpn".to_owned()))
                }
                Ok(None) | Err(_) => Err((
                    Reason::UnknownHost,
                    match table.refused_by(index, name) {
                        Some(found) => {
                            format!("a route with `action = \"refuse\"` says so: {}", listed(found.by, name))
                        }
                        None => "no route lists it here".to_owned(),
                    },
                )),
            }
        }
    };
    let shown = name.unwrap_or(host);
    let at = format!("{shown} on {}", listener.name);
    let mut answer = Answer {
        listener: listener.name.to_string(),
        mode: listener.mode.as_str(),
        addresses: listener.bind.iter().map(|bind| bind.addr).collect(),
        forwarded: found.is_ok(),
        reason: None,
        route: None,
        upstream: None,
        targets: Vec::new(),
        allow: listener.allow.clone(),
        deny: listener.deny.clone(),
        accept_proxy: listener.accept_proxy.clone(),
        text: String::new(),
    };
    match found {
        Ok((route, upstream, by)) => {
            let upstream = &config.upstreams[upstream];
            let route = route.map(|route| config.routes[route].name.to_string());
            answer.targets = upstream.targets.iter().map(|target| target.text.to_string()).collect();
            let what = match listener.mode {
                Mode::Http { acme_port } => {
                    format!("308 to https://{shown}/, ACME challenges to port {acme_port} of upstream")
                }
                _ => "upstream".to_owned(),
            };
            let by_route = route.as_ref().map(|route| format!(" by route `{route}`")).unwrap_or_default();
            answer.text = format!("{at}: {what} `{}` ({}){by_route}: {by}", upstream.name, answer.targets.join(", "));
            (answer.route, answer.upstream) = (route, Some(upstream.name.to_string()));
        }
        Err((reason, why)) => {
            answer.reason = Some(reason.as_str());
            answer.text = format!("{at}: rejected, `{reason}`: {why}");
        }
    }
    answer.text += &conditions(listener, answer.forwarded);
    answer
}

/// Why a route decides.
fn listed(by: By<'_>, name: &str) -> String {
    match by {
        By::Exact => format!("`{name}` is listed"),
        By::Wildcard(suffix) => format!("`*.{suffix}` is the longest wildcard that matches, no exact host does"),
        By::Any => "`*` matches, nothing else does".to_owned(),
    }
}

/// Who does not get that far.
fn conditions(listener: &Listener, forwarded: bool) -> String {
    let nets = |nets: &[IpNet]| nets.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let mut text = String::new();
    if forwarded && !listener.deny.is_empty() {
        let _ = write!(text, "; refused for clients in {}", nets(&listener.deny));
    }
    if forwarded && !listener.allow.is_empty() {
        let _ = write!(text, "; refused for clients outside {}", nets(&listener.allow));
    }
    if !listener.accept_proxy.is_empty() {
        let _ = write!(text, "; peers in {} must send a PROXY header", nets(&listener.accept_proxy));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::config::{Source, parse};

    const TEXT: &str = "\
[listeners.public]
bind = [\"0.0.0.0:443\"]
allow = [\"100.64.0.0/10\"]
deny = [\"100.64.0.7\"]
accept_proxy = [\"10.0.0.0/8\"]
[listeners.web]
mode = \"http\"
bind = [\"0.0.0.0:80\"]
[listeners.git]
mode = \"tcp\"
bind = [\"0.0.0.0:2222\"]
upstream = \"ssh\"
[upstreams.cluster]
targets = [\"a:443\"]
[upstreams.ssh]
targets = [\"a:22\"]
[[routes]]
hosts = [\"blog.example.com\", \"*.apps.example.com\"]
upstream = \"cluster\"
[[routes]]
hosts = [\"secret.apps.example.com\"]
action = \"refuse\"
";

    fn ask(question: &str, listener: Option<&str>) -> Result<(bool, String)> {
        let config = parse(Arc::new(Source::new("x", TEXT.into()))).unwrap().0;
        explain(&config, question, listener, &[]).map(|found| (found.forwarded, found.text()))
    }

    #[test]
    fn who_is_refused_in_spite_of_a_route_is_told() {
        let (forwarded, text) = ask("https://Blog.Example.com/page?x", None).unwrap();
        assert!(forwarded);
        assert_eq!(
            text,
            "blog.example.com on public: upstream `cluster` (a:443) by route `blog.example.com`: \
             `blog.example.com` is listed; refused for clients in 100.64.0.7/32; refused for clients \
             outside 100.64.0.0/10; peers in 10.0.0.0/8 must send a PROXY header\n"
        );
    }

    #[test]
    fn a_port_asks_who_listens_there_and_a_name_alone_everybody() {
        assert!(ask("blog.example.com:80", None).unwrap().1.contains("308 to https://blog.example.com/"));
        let (forwarded, text) = ask("wiki.example.com:2222", None).unwrap();
        assert!(forwarded && text.contains("on git: upstream `ssh` (a:22): it forwards whatever comes"), "{text}");
        let (forwarded, text) = ask("wiki.example.com", None).unwrap();
        assert!(!forwarded && text.lines().count() == 3, "the tcp port is told, and makes nothing public: {text}");
        assert_eq!(
            ask("blog.example.com:8443", None).unwrap(),
            (false, "blog.example.com: nothing listens there\n".into())
        );
        assert!(ask("anything", Some("git")).unwrap().0);
    }

    #[test]
    fn what_is_refused_by_name_is_told_from_what_nobody_lists() {
        let (forwarded, text) = ask("secret.apps.example.com", Some("public")).unwrap();
        assert!(!forwarded);
        assert!(
            text.starts_with(
                "secret.apps.example.com on public: rejected, `unknown_host`: a route with `action = \"refuse\"` \
                 says so: `secret.apps.example.com` is listed"
            ),
            "{text}"
        );
        assert!(ask("wiki.example.com", Some("public")).unwrap().1.contains("no route lists it here"));
    }

    #[test]
    fn what_cannot_be_answered_is_no_refusal() {
        assert!(ask("blog.example.com", Some("nowhere")).is_err());
        assert!(ask("ftp://blog.example.com/", None).is_err());
        assert!(ask("blog.example.com:https", None).is_err());
        let (forwarded, text) = ask("not a name", Some("public")).unwrap();
        assert!(!forwarded && text.contains("rejected, `bad_server_name`"), "{text}");
    }
}
