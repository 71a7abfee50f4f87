//! The daemon's documents, for people.

use std::fmt::Write as _;
use std::time::SystemTime;

use anyhow::Result;
use serde_json::Value;

use crate::logging::unix_seconds;

/// The daemon's document as it is, or for people.
pub fn shown(document: String, json: bool, describe: fn(&Value) -> String) -> Result<String> {
    Ok(if json { document + "\n" } else { describe(&serde_json::from_str(&document)?) })
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or("-")
}

fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn words(value: &Value) -> String {
    items(value).iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" ")
}

/// What `status` says.
pub fn describe_status(status: &Value) -> String {
    let mut out = String::new();
    let (engine, config, limits) = (&status["engine"], &status["config"], &status["limits"]);
    let uptime = status["uptime"].as_f64().unwrap_or(0.0);
    let now = unix_seconds(SystemTime::now());
    let _ = writeln!(out, "dataplane {}, up {uptime:.0} s", text(status, "version"));
    let _ = writeln!(
        out,
        "engine    {} ({} configured) {}",
        text(engine, "effective"),
        text(engine, "configured"),
        words(&engine["reasons"])
    );
    for warning in items(&engine["warnings"]).iter().filter_map(Value::as_str) {
        let _ = writeln!(out, "          warning: {warning}");
    }
    let _ = writeln!(out, "config    {} {}", text(config, "hash"), text(config, "path"));
    if let Some(commit) = config["commit"].as_str() {
        let _ = writeln!(out, "commit    {commit} of {}", text(&config["repository"], "git"));
    }
    let ago = |time: &Value| time.as_f64().map_or(0.0, |time| (now - time).max(0.0));
    let _ = writeln!(out, "          last found good {:.0} s ago", ago(&config["last_success"]));
    if let Some(error) = config["last_error"].as_str() {
        let _ = writeln!(out, "          not any more, {:.0} s ago: {error}", ago(&config["last_error_at"]));
    }
    let _ = writeln!(
        out,
        "open      {} of {} connections (the limit is by {})",
        limits["connections"],
        limits["max_connections"],
        text(limits, "max_connections_by")
    );
    for shortage in items(&status["shortages"]) {
        let (times, last) = (&shortage["times"], ago(&shortage["last"]));
        let _ = writeln!(out, "SHORTAGE  {} ({times} times, last {last:.0} s ago)", text(shortage, "reason"));
    }
    for waiting in items(&status["waiting"]) {
        let _ = writeln!(
            out,
            "waiting   for {} ({}): {}",
            text(waiting, "address"),
            text(waiting, "for"),
            text(waiting, "reason")
        );
    }
    for listener in items(&status["listeners"]) {
        let _ = writeln!(
            out,
            "listener  {} ({}) on {}",
            text(listener, "name"),
            text(listener, "mode"),
            words(&listener["bind"])
        );
    }
    for route in items(&status["routes"]) {
        let to = if route["action"] == "refuse" { "refused" } else { text(route, "upstream") };
        let _ = writeln!(out, "route     {} -> {to}", words(&route["hosts"]));
    }
    for upstream in items(&status["upstreams"]) {
        for target in items(&upstream["targets"]) {
            let up = if target["up"] == true { "up" } else { "down" };
            let drained = if target["drained"] == true { ", drained" } else { "" };
            let path = target["path"].as_str().map(|path| format!(", {path}")).unwrap_or_default();
            let _ = writeln!(
                out,
                "target    {} of {}: {up}{drained}{path}, {} active, {}",
                text(target, "target"),
                text(upstream, "name"),
                target["active"],
                text(target, "reason")
            );
            if let Some(count) = target["loops"][0].as_u64() {
                let last = ago(&target["loops"][1]);
                let connections = if count == 1 { "connection" } else { "connections" };
                let _ = writeln!(
                    out,
                    "            {count} {connections} may have come back from there to this node, the last one {last:.0} s ago"
                );
            }
            for change in items(&target["history"]) {
                let what = if change["up"] == true { "up" } else { "down" };
                let _ =
                    writeln!(out, "            {:.0} s ago: {what}, {}", ago(&change["at"]), text(change, "reason"));
            }
        }
    }
    out
}

/// What `connections` says.
pub fn describe_connections(connections: &Value) -> String {
    let mut out = format!(
        "{:<40} {:<30} {:<28} {:<7} {:<9} {:>14} {:>14} {:>9} {:>9} {:>9}\n",
        "CLIENT", "SERVER NAME", "TARGET", "ENGINE", "PATH", "TO UPSTREAM", "TO CLIENT", "BACKLOG", "AGE s", "IDLE s"
    );
    for c in items(connections) {
        let _ = writeln!(
            out,
            "{:<40} {:<30} {:<28} {:<7} {:<9} {:>14} {:>14} {:>9} {:>9.0} {:>9.0}",
            text(c, "client"),
            text(c, "server_name"),
            text(c, "target"),
            text(c, "engine"),
            text(c, "path"),
            c["bytes_to_upstream"],
            c["bytes_to_client"],
            c["backlog"],
            c["age"].as_f64().unwrap_or(0.0),
            c["idle"].as_f64().unwrap_or(0.0)
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_names_targets_that_connections_may_have_come_back_from() {
        let target = |loops: Value| {
            let target = serde_json::json!({ "target": "laptop:443", "up": true, "loops": loops });
            let status = serde_json::json!({ "upstreams": [{ "name": "cluster", "targets": [target] }] });
            describe_status(&status)
        };
        assert!(!target(Value::Null).contains("come back"));
        let now = unix_seconds(SystemTime::now());
        let said = target(serde_json::json!([3, now - 60.0]));
        let (_, below) = said.split_once("target    laptop:443 of cluster").expect("the target");
        let words = "3 connections may have come back from there to this node, the last one 6";
        assert!(below.contains(words) && below.trim_end().ends_with(" s ago"), "{said}");
        assert!(target(serde_json::json!([1, now])).contains(" 1 connection may"));
    }
}
