//! The keys: what each is called, may hold and means, and what it is when left out. This is the one
//! place that says so: the parser, the reference in `docs/configuration.md` and the starter follow
//! it.

/// A key of a table.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    pub name: &'static str,
    /// In words, as the reference says it.
    pub kind: &'static str,
    /// As it would be written, in backquotes, or in words.
    pub default: &'static str,
    /// In Markdown.
    pub meaning: &'static str,
}

/// Whether one of the keys is called so.
pub fn has(keys: &[Key], name: &str) -> bool {
    keys.iter().any(|key| key.name == name)
}

/// A table of the file, which has a section of its own in the reference.
const fn table(name: &'static str) -> Key {
    Key { name, kind: "table", default: "none", meaning: "" }
}

pub const ROOT: &[Key] = &[
    Key {
        name: "include",
        kind: "list of files",
        default: "`[]`",
        meaning: "more files, or patterns such as `\"routes.d/*.toml\"`, relative to the folder of this file. All files are read as one. If two files define the same thing, that is an error that names both places. A pattern has at most three `*`. An included file cannot have `include`, `watch` or `[source]`",
    },
    Key {
        name: "watch",
        kind: "boolean",
        default: "`false`",
        meaning: "`true`: a change of these files is a reload. This includes a write, a rename and a symbolic link that is swapped",
    },
    Key {
        name: "on_removed_route",
        kind: "`drain`, `close`",
        default: "`drain`",
        meaning: "what happens to the connections of a route that a reload removes. `drain`: they have `drain_timeout` to end. `close`: they are reset at once",
    },
    Key {
        name: "engine",
        kind: "`auto`, `sockmap`, `splice`, `copy`, `translate`",
        default: "`auto`",
        meaning: "how bytes are forwarded, see below",
    },
    table("listeners"),
    table("upstreams"),
    table("routes"),
    table("limits"),
    table("admin"),
    table("resolver"),
    table("tailnet"),
    table("source"),
];
/// Of a file that another one includes: what is not for the main file alone.
pub const INCLUDED: &[Key] = &[
    ROOT[2],
    ROOT[3],
    table("listeners"),
    table("upstreams"),
    table("routes"),
    table("limits"),
    table("admin"),
    table("resolver"),
    table("tailnet"),
];
/// What a node alone decides: no file of a repository may have them.
pub const NODE_ONLY: &[&str] = &["engine", "admin", "resolver", "tailnet", "watch", "source"];
/// The same of `[limits]`: what fits a machine depends on the machine.
pub const NODE_ONLY_LIMITS: &[&str] = &["max_connections", "kernel_memory"];

pub const LISTENER: &[Key] = &[
    Key {
        name: "bind",
        kind: "list of addresses",
        default: "required",
        meaning: "where to listen: `[\"0.0.0.0:443\", \"[::]:443\"]`. IPv6 sockets accept IPv6 only",
    },
    Key {
        name: "mode",
        kind: "`tls`, `http`, `tcp`",
        default: "`tls`",
        meaning: "`tls`: the server name of the ClientHello selects the route. `http`: an ACME challenge for a listed Host goes to the upstream of its route; every other request for a listed Host gets a 308 redirection to https. `tcp`: every connection goes to `upstream`",
    },
    Key {
        name: "upstream",
        kind: "name",
        default: "required with `tcp`",
        meaning: "mode `tcp` only: the upstream of this port",
    },
    Key {
        name: "acme_port",
        kind: "port",
        default: "`80`",
        meaning: "mode `http` only: the port of the targets that answers challenges. `send_proxy` of the upstream applies to it",
    },
    Key {
        name: "accept_proxy",
        kind: "list of networks",
        default: "`[]`",
        meaning: "peers in these networks must send a PROXY header (v1 or v2) first. A PROXY header of other peers is not interpreted",
    },
    Key { name: "allow", kind: "list of networks", default: "`[]`: all", meaning: "client networks that may connect" },
    Key {
        name: "deny",
        kind: "list of networks",
        default: "`[]`: none",
        meaning: "client networks that may not connect. `deny` is evaluated before `allow`",
    },
];

pub const UPSTREAM: &[Key] = &[
    Key {
        name: "targets",
        kind: "list of `host:port`",
        default: "required",
        meaning: "names or addresses: `\"thinkpad-1:443\"`, `\"100.64.0.7:443\"`, `\"[fd7a:115c:a1e0::7]:443\"`",
    },
    Key {
        name: "send_proxy",
        kind: "`off`, `v1`, `v2`",
        default: "`off`",
        meaning: "the PROXY header that the target receives first. The ingress must be configured to expect it. v1 and v2 carry the client's address. v2 also carries the server name, ALPN and a unique id",
    },
    Key {
        name: "balance",
        kind: "`least-connections`, `round-robin`, `hash`, `first`",
        default: "`least-connections`",
        meaning: "`hash`: by the client's address; the result is the same on every entrance node. `first`: the first target in the list that is up",
    },
    Key {
        name: "health",
        kind: "table",
        default: "none",
        meaning: "active checks, see below. Without it, only the connections of clients, the tailnet and the resolver decide whether a target is up",
    },
    Key {
        name: "connect_timeout",
        kind: "duration",
        default: "`3s`",
        meaning: "how long one target may take to accept, and how long a connection waits for a target that has room",
    },
    Key {
        name: "hedge_delay",
        kind: "duration",
        default: "`250ms`",
        meaning: "if the first target has not answered after this time, a second one is dialled beside it. `0s`: the second is dialled only after the first has failed",
    },
    Key {
        name: "max_connections_per_target",
        kind: "number",
        default: "`0`: no limit",
        meaning: "if all targets are at this limit, up to 1,024 connections wait",
    },
    Key {
        name: "on_down",
        kind: "`keep`, `reset`",
        default: "`keep`",
        meaning: "established connections of a target that goes down. `keep`: they end by `dead_peer_timeout`. `reset`: they are reset, so that browsers reconnect. One failed dial is not enough for this, nor is the check of another upstream: a second sign (a probe, a check, the tailnet) must confirm it",
    },
    Key {
        name: "prefer_direct",
        kind: "boolean",
        default: "as in `[tailnet]`",
        meaning: "whether this upstream avoids relayed targets",
    },
];

pub const HEALTH: &[Key] = &[
    Key {
        name: "interval",
        kind: "duration",
        default: "`5s`",
        meaning: "time between two checks, plus or minus a tenth",
    },
    Key { name: "timeout", kind: "duration", default: "`2s`", meaning: "for a whole check" },
    Key { name: "fall", kind: "number", default: "`2`", meaning: "this many failures in a row: down" },
    Key { name: "rise", kind: "number", default: "`2`", meaning: "this many successes in a row: up" },
    Key {
        name: "tls",
        kind: "host",
        default: "none: a TCP connection is enough",
        meaning: "a ClientHello for this name must be answered with a ServerHello",
    },
];

pub const ROUTE: &[Key] = &[
    Key {
        name: "hosts",
        kind: "list of hosts",
        default: "required",
        meaning: "exact names are matched before wildcards, and the longest wildcard first. `*.x` matches one or more labels before `x`, but not `x` itself. `*` matches every name",
    },
    Key {
        name: "upstream",
        kind: "name",
        default: "required to forward",
        meaning: "where the connections go. Not with `action = \"refuse\"`",
    },
    Key {
        name: "action",
        kind: "`forward`, `refuse`",
        default: "`forward`",
        meaning: "`refuse`: these hosts are rejected (`unknown_host`), although a wildcard covers them",
    },
    Key {
        name: "alpn",
        kind: "list of protocols",
        default: "any",
        meaning: "the route applies to clients that offer one of these, for example `[\"h2\"]`",
    },
    Key {
        name: "listeners",
        kind: "list of names",
        default: "all",
        meaning: "the route applies to these listeners (modes `tls` and `http`)",
    },
];

pub const LIMITS: &[Key] = &[
    Key {
        name: "hello_timeout",
        kind: "duration",
        default: "`5s`",
        meaning: "from accept to the last byte of the ClientHello, or of the head of an HTTP request",
    },
    Key {
        name: "hello_max_bytes",
        kind: "size",
        default: "`16384`",
        meaning: "size of the ClientHello, TLS record headers included, or of the head of an HTTP request. 512 to 65,536",
    },
    Key {
        name: "idle_timeout",
        kind: "duration",
        default: "`1h`",
        meaning: "no byte in either direction. An ACME challenge has 30 s in all",
    },
    Key {
        name: "half_closed_timeout",
        kind: "duration",
        default: "`5m`",
        meaning: "no byte in either direction after one side has sent FIN, and none that a slow reader takes",
    },
    Key {
        name: "dead_peer_timeout",
        kind: "duration",
        default: "`60s`",
        meaning: "a peer that vanished, on either side. A slow reader is not a dead peer. 1 s to 9 h",
    },
    Key {
        name: "drain_timeout",
        kind: "duration",
        default: "`30s`",
        meaning: "how long a stopping daemon waits for its connections, and how long the connections of a removed route may continue",
    },
    Key {
        name: "max_connections",
        kind: "number",
        default: "`0`",
        meaning: "`0`: as many as file descriptors and half of the memory allow, at 32 KiB for each. See [limits and memory](operations.md#limits-and-memory)",
    },
    Key {
        name: "max_connections_per_client",
        kind: "number",
        default: "`0`: no limit",
        meaning: "for one IPv4 address or one IPv6 /64",
    },
    Key {
        name: "kernel_memory",
        kind: "size",
        default: "`64MiB`",
        meaning: "bytes in all pipes and in the queues of the sockmap. If the sockmap is in use, each gets half",
    },
];

pub const ADMIN: &[Key] = &[
    Key {
        name: "bind",
        kind: "address",
        default: "`127.0.0.1:9443`",
        meaning: "serves `/metrics`, `/healthz` and `/readyz` over HTTP; one address. An IPv6 socket accepts IPv6 only",
    },
    Key {
        name: "socket",
        kind: "path",
        default: "`/run/dataplane/admin.sock`",
        meaning: "control socket of `status`, `connections`, `reload`, `drain` and `undrain`",
    },
];

pub const RESOLVER: &[Key] = &[Key {
    name: "servers",
    kind: "list of addresses, port optional",
    default: "those in `/etc/resolv.conf`",
    meaning: "DNS servers for the names of targets. `/etc/hosts` is read in any case",
}];

pub const TAILNET: &[Key] = &[
    Key {
        name: "socket",
        kind: "path",
        default: "`/var/run/tailscale/tailscaled.sock`",
        meaning: "the socket of tailscaled. Without tailscaled everything works, but with less information",
    },
    Key {
        name: "prefer_direct",
        kind: "boolean",
        default: "`true`",
        meaning: "targets that the tailnet reaches through a relay get connections only if no direct target is up",
    },
];

pub const SOURCE: &[Key] = &[
    Key {
        name: "git",
        kind: "URL or path",
        default: "required",
        meaning: "`https://…`, `ssh://…`, `git@host:path` or an absolute path; without a password, a query or a fragment",
    },
    Key {
        name: "ref",
        kind: "branch or tag",
        default: "`HEAD`",
        meaning: "what to follow. `HEAD` is the default branch of the repository",
    },
    Key { name: "path", kind: "path in the repository", default: "`dataplane.toml`", meaning: "the file to read" },
    Key {
        name: "interval",
        kind: "duration",
        default: "`60s`",
        meaning: "time between two looks, plus or minus a tenth",
    },
    Key { name: "token_file", kind: "path", default: "none", meaning: "https only: a file with an access token" },
    Key { name: "ssh_key_file", kind: "path", default: "required with ssh", meaning: "ssh only: a private key" },
    Key {
        name: "known_hosts_file",
        kind: "path",
        default: "none",
        meaning: "ssh only: the host keys to accept. Without it, the first key that the host shows is accepted, and no other one after that",
    },
    Key { name: "timeout", kind: "duration", default: "`30s`", meaning: "for one fetch" },
    Key { name: "max_size", kind: "size", default: "`16MiB`", meaning: "of one fetch" },
    Key {
        name: "state_directory",
        kind: "path",
        default: "`/var/lib/dataplane`",
        meaning: "where the last good commit is kept",
    },
    Key {
        name: "webhook",
        kind: "table",
        default: "none",
        meaning: "`{ bind = \"100.64.0.1:9080\", secret_file = \"…\" }`. `POST /hook` at this address, signed with the secret, triggers a look at the repository",
    },
    Key {
        name: "allow_hosts",
        kind: "list of hosts",
        default: "names of two labels and more",
        meaning: "the host patterns that the repository may list",
    },
    Key {
        name: "allow_listeners",
        kind: "list of addresses",
        default: "`[\"*:80\", \"*:443\"]`",
        meaning: "addresses and ports that the repository may listen on",
    },
    Key {
        name: "allow_targets",
        kind: "list",
        default: "everything but this machine",
        meaning: "networks, addresses and names that the repository may lead to",
    },
];

pub const WEBHOOK: &[Key] = &[
    Key { name: "bind", kind: "address", default: "required", meaning: "where `POST /hook` is served" },
    Key { name: "secret_file", kind: "path", default: "required", meaning: "a file with the secret" },
];

/// The tables in the order of the reference, with their keys.
pub const REFERENCE: [(&str, &[Key]); 11] = [
    ("top level", ROOT),
    ("[listeners.NAME]", LISTENER),
    ("[upstreams.NAME]", UPSTREAM),
    ("health in [upstreams.NAME]", HEALTH),
    ("[[routes]]", ROUTE),
    ("[limits]", LIMITS),
    ("[resolver]", RESOLVER),
    ("[tailnet]", TAILNET),
    ("[admin]", ADMIN),
    ("[source]", SOURCE),
    ("webhook in [source]", WEBHOOK),
];

/// Where each key is at home, for those that stand in the wrong place.
pub const ALL: [(&str, &[Key]); 9] = [
    ("the top level", ROOT),
    ("[limits]", LIMITS),
    ("[admin]", ADMIN),
    ("[[routes]]", ROUTE),
    ("[upstreams.NAME]", UPSTREAM),
    ("[listeners.NAME]", LISTENER),
    ("[resolver]", RESOLVER),
    ("[tailnet]", TAILNET),
    ("[source]", SOURCE),
];

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;
    use std::sync::Arc;

    use super::*;
    use crate::config::{STARTER, Source, diff, parse};

    /// The heading in the reference, the heading of the column, and how a key is set in a file.
    const TABLES: [(&str, &str, &[Key], &str); 10] = [
        ("## Top level\n", "key", ROOT, "@KEY\n#"),
        ("## `[listeners.NAME]`\n", "key", LISTENER, "bind = [\"0.0.0.0:443\"]"),
        ("## `[upstreams.NAME]`\n", "key", UPSTREAM, "targets = [\"a:443\"]"),
        ("## `[upstreams.NAME]`\n", "key in `health`", HEALTH, "health = { }"),
        ("## `[[routes]]`\n", "key", ROUTE, "hosts = [\"a.example.com\"]"),
        ("## `[limits]`\n", "key", LIMITS, "[limits]"),
        ("## `[resolver]`\n", "key", RESOLVER, "[resolver]"),
        ("## `[tailnet]`\n", "key", TAILNET, "[tailnet]"),
        ("## `[admin]`\n", "key", ADMIN, "[admin]"),
        ("## `[source]`\n", "key", SOURCE, "git = \"/srv/x\""),
    ];

    fn reference() -> std::path::PathBuf {
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md")
    }

    fn rows(column: &str, keys: &[Key]) -> String {
        let mut text = format!("| {column} | type | default | meaning |\n| --- | --- | --- | --- |\n");
        for Key { name, kind, default, meaning } in
            keys.iter().filter(|key| key.kind != "table" || !key.meaning.is_empty())
        {
            let _ = writeln!(text, "| `{name}` | {kind} | {default} | {meaning} |");
        }
        text
    }

    #[test]
    fn the_reference_has_every_key_as_it_stands_here() {
        let page = std::fs::read_to_string(reference()).unwrap();
        let mut updated = page.clone();
        for (heading, column, keys, _) in TABLES {
            let section = updated.find(heading).unwrap_or_else(|| panic!("no {heading}"));
            let start = section + updated[section..].find(&format!("| {column} |")).unwrap();
            let end = start + updated[start..].find("\n\n").unwrap() + 1;
            updated.replace_range(start..end, &rows(column, keys));
        }
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(reference(), &updated).unwrap();
        }
        assert!(
            page == updated,
            "docs/configuration.md differs: UPDATE_GOLDEN=1 cargo test -p dataplane the_reference"
        );
    }

    #[test]
    fn the_starter_shows_every_key() {
        for (_, _, keys, _) in TABLES {
            for Key { name, .. } in keys {
                let shown = |line: &str| {
                    let line = line.trim_start_matches("# ");
                    line.starts_with(&format!("{name} = "))
                        || line.starts_with(&format!("[{name}"))
                        || line.starts_with(&format!("[[{name}"))
                        || line.contains(&format!(" {name} = "))
                };
                assert!(STARTER.lines().any(shown), "the starter does not show `{name}`");
            }
        }
    }

    #[test]
    fn a_key_that_has_its_default_changes_nothing() {
        const TEXT: &str = "@KEY\n#\n[limits]\n[resolver]\n[tailnet]\n[admin]\n[source]\ngit = \"/srv/x\"\n\
            [listeners.a]\nbind = [\"0.0.0.0:443\"]\n[upstreams.u]\ntargets = [\"a:443\"]\nhealth = { }\n\
            [[routes]]\nhosts = [\"a.example.com\"]\nupstream = \"u\"\n";
        let config = |text: &str| {
            let source = Arc::new(Source::new("x", text.replace("@KEY", "")));
            parse(source).unwrap_or_else(|found| panic!("{text}\n{found:?}")).0
        };
        let mut tried = 0;
        for (_, _, keys, place) in TABLES {
            for Key { name, kind, default, .. } in keys {
                // In words, or for another mode.
                let Some(value) = default.strip_prefix('`').and_then(|value| value.split('`').next()) else { continue };
                if *name == "acme_port" || *name == "include" {
                    continue;
                }
                let is_bare = value.parse::<u64>().is_ok() || matches!(*kind, "boolean") || value.starts_with('[');
                let set = if is_bare { format!("{name} = {value}") } else { format!("{name} = \"{value}\"") };
                let with = match place.strip_suffix('}') {
                    Some(open) => TEXT.replacen(place, &format!("{open}{set} }}"), 1),
                    None if place.starts_with('@') => TEXT.replacen(place, &format!("{set}\n#"), 1),
                    None => TEXT.replacen(place, &format!("{place}\n{set}"), 1),
                };
                let changes = diff(&config(TEXT), &config(&with));
                assert!(changes.is_empty(), "{set} is not the default: {changes:?}");
                tried += 1;
            }
        }
        assert!(tried > 30, "{tried}");
    }

    #[test]
    fn lists_of_some_keys_name_keys() {
        assert!(NODE_ONLY.iter().all(|name| has(ROOT, name)));
        assert!(NODE_ONLY_LIMITS.iter().all(|name| has(LIMITS, name)));
        let of_main = ["include", "watch", "source"];
        let included = ROOT.iter().filter(|key| !of_main.contains(&key.name)).map(|key| key.name);
        assert!(included.eq(INCLUDED.iter().map(|key| key.name)));
    }
}
