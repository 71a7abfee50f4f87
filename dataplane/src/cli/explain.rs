//! `dataplane explain`: which route a name takes, from the configuration alone.

use anyhow::{Result, bail};

use crate::config::{Config, HostPattern, Mode};
use crate::reject::Reason;
use crate::route::{By, Table};

/// In words, and whether any listener forwards it.
pub fn explain(config: &Config, host: &str, listener: Option<&str>, alpn: &[String]) -> Result<(String, bool)> {
    let Ok(HostPattern::Exact(name)) = HostPattern::parse(host) else {
        return Ok((format!("{host}: rejected on every listener: `malformed`, it is no server name\n"), false));
    };
    let table = Table::new(config);
    let mut text = String::new();
    let mut routed = false;
    let by_name = config.listeners.iter().enumerate().filter(|(_, l)| l.mode.has_routes());
    let asked: Vec<_> = by_name.filter(|(_, l)| listener.is_none_or(|wanted| *l.name == *wanted)).collect();
    if asked.is_empty() {
        let wanted = listener.unwrap_or_default();
        let known: Vec<_> = config.listeners.iter().map(|l| &*l.name).collect();
        bail!("no listener of mode `tls` or `http` is called `{wanted}`; there are: {}", known.join(", "));
    }
    for (index, listener) in asked {
        let found = match listener.mode {
            Mode::Http { .. } => table.find_plain(index, Some(&name)),
            _ => table.find(index, Some(&name), alpn.iter().map(String::as_bytes)),
        };
        text += &match found {
            Ok(found) => {
                routed = true;
                let route = &config.routes[found.route];
                let upstream = &config.upstreams[route.upstream];
                let targets: Vec<_> = upstream.targets.iter().map(|t| &*t.text).collect();
                let by = match found.by {
                    By::Exact => format!("`{name}` is listed"),
                    By::Wildcard(suffix) => {
                        format!("`*.{suffix}` is the longest wildcard that matches, no exact host does")
                    }
                    By::Any => "`*` matches, nothing else does".to_owned(),
                };
                let what = match listener.mode {
                    Mode::Http { acme_port } => {
                        format!("308 to https://{name}/, ACME challenges to port {acme_port} of upstream")
                    }
                    _ => "upstream".to_owned(),
                };
                format!(
                    "{name} on {}: {what} `{}` ({}) by route `{}`: {by}\n",
                    listener.name,
                    upstream.name,
                    targets.join(", "),
                    route.name
                )
            }
            Err(reason) => {
                let why = match reason {
                    Reason::AlpnMismatch => "its routes want an ALPN protocol that is not offered; try --alpn",
                    _ => "no route lists it here",
                };
                format!("{name} on {}: rejected, `{reason}`: {why}\n", listener.name)
            }
        };
    }
    Ok((text, routed))
}
