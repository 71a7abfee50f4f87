//! What a SYN from outside to one of our listeners meets before our socket: rules of iptables and
//! of nftables that rewrite where it goes, or drop it. A pure function of the packet and of what
//! the programs print.
//!
//! Who the client is, is open: a condition on that holds for some. A rule that drops some clients
//! is what its owner wants; one that drops all of them is told.

use std::collections::HashMap;
use std::net::IpAddr;

use serde_json::Value;

/// For one packet through one set of rules, at most: jumps can multiply.
const STEPS: u32 = 200_000;
/// As deep as the kernel lets nftables jump (NFT_JUMP_STACK_SIZE in net/netfilter/nf_tables.h).
const DEPTH: u32 = 16;

/// A SYN.
#[derive(Clone, Copy, Debug)]
pub struct Syn<'a> {
    /// An address of ours that it is sent to.
    pub to: IpAddr,
    /// The port of the listener.
    pub port: u16,
    /// The device by which it comes. `None`: any but loopback.
    pub by: Option<&'a str>,
}

/// What it met. None of these: it arrives.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Met {
    /// The first rule that sends it elsewhere, at least from some clients.
    pub taken: Option<String>,
    /// The first rule that drops it, whoever the client is.
    pub dropped: Option<String>,
    /// Rules that may send it elsewhere: what they ask for was not understood.
    pub unreadable: Vec<String>,
}

impl Met {
    /// Where the kernel has decided that the packet is for this machine, nothing sends it elsewhere.
    fn behind_prerouting(self, behind: bool) -> Self {
        if behind { Self { dropped: self.dropped, ..Self::default() } } else { self }
    }
}

/// Whether a condition holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Holds {
    Never,
    /// Nobody here can tell.
    Unreadable,
    /// For some clients.
    Some,
    Always,
}

impl Holds {
    fn of(condition: bool) -> Self {
        if condition { Self::Always } else { Self::Never }
    }

    fn and(self, other: Self) -> Self {
        self.min(other)
    }

    fn or(self, other: Self) -> Self {
        match (self, other) {
            (Self::Always, _) | (_, Self::Always) => Self::Always,
            (Self::Unreadable, _) | (_, Self::Unreadable) => Self::Unreadable,
            (a, b) => a.max(b),
        }
    }

    fn negated_if(self, negated: bool) -> Self {
        match self {
            Self::Never if negated => Self::Always,
            Self::Always if negated => Self::Never,
            other => other,
        }
    }
}

/// What a rule does with a packet that it matches.
enum Action {
    Nothing,
    Takes,
    /// No later rule of this table sees it.
    Accepts,
    Drops,
    Returns,
    Jump(String),
    Goto(String),
    Unreadable,
}

/// One rule for one packet.
struct Step {
    holds: Holds,
    action: Action,
    text: String,
}

/// Where a packet is after a chain.
#[derive(PartialEq, Eq)]
enum Way {
    Ended,
    Returned,
}

struct Walk<'a> {
    chains: &'a HashMap<String, Vec<Step>>,
    steps: u32,
    met: Met,
    /// Some clients may get past what comes next.
    lets_some_by: bool,
}

impl Walk<'_> {
    fn chain(&mut self, name: &str, sure: Holds, depth: u32) -> Way {
        let chains = self.chains;
        let Some(steps) = chains.get(name) else { return Way::Returned };
        for step in steps {
            if self.steps == 0 || depth == 0 {
                self.unreadable(&format!("chain {name}: too many rules to follow"));
                return Way::Ended;
            }
            self.steps -= 1;
            let holds = sure.and(step.holds);
            if step.holds == Holds::Never {
                continue;
            }
            match &step.action {
                Action::Takes if holds == Holds::Unreadable => self.unreadable(&step.text),
                Action::Takes => {
                    self.met.taken = Some(step.text.clone());
                    return Way::Ended;
                }
                Action::Unreadable => {
                    self.lets_some_by = true;
                    self.unreadable(&step.text);
                }
                Action::Accepts => {
                    self.lets_some_by = true;
                    if step.holds == Holds::Always {
                        return Way::Ended;
                    }
                }
                Action::Drops if step.holds == Holds::Always => {
                    if holds == Holds::Always {
                        self.drops(&step.text);
                    }
                    return Way::Ended;
                }
                Action::Returns if step.holds == Holds::Always => return Way::Returned,
                Action::Returns => self.lets_some_by = true,
                Action::Nothing | Action::Drops => {}
                Action::Jump(to) | Action::Goto(to) => {
                    let before = self.met.unreadable.len();
                    let way = self.chain(to, holds, depth - 1);
                    if step.holds == Holds::Unreadable && self.met.unreadable.len() > before {
                        // What is not understood is the jump.
                        self.met.unreadable.truncate(before);
                        self.unreadable(&step.text);
                    }
                    if self.met.taken.is_some() {
                        return Way::Ended;
                    }
                    if step.holds == Holds::Always {
                        if way == Way::Ended {
                            return way;
                        }
                        if matches!(step.action, Action::Goto(_)) {
                            return Way::Returned;
                        }
                    }
                }
            }
        }
        Way::Returned
    }

    fn drops(&mut self, text: &str) {
        if !self.lets_some_by {
            self.met.dropped = Some(text.to_owned());
        }
    }

    fn unreadable(&mut self, text: &str) {
        if !self.met.unreadable.iter().any(|known| known == text) {
            self.met.unreadable.push(text.to_owned());
        }
    }
}

/// `policy` is what says that the chain drops what none of its rules decides, if it does.
fn walk(chains: &HashMap<String, Vec<Step>>, base: &str, policy: Option<&str>) -> Met {
    let mut walk = Walk { chains, steps: STEPS, met: Met::default(), lets_some_by: false };
    let way = walk.chain(base, Holds::Always, DEPTH);
    if let (Way::Returned, Some(policy)) = (way, policy) {
        walk.drops(policy);
    }
    walk.met
}

pub fn add(met: &mut Met, more: Met) {
    met.unreadable.extend(more.unreadable);
    met.taken = met.taken.take().or(more.taken);
    met.dropped = met.dropped.take().or(more.dropped);
}

fn contains(network: &str, ip: IpAddr) -> Option<bool> {
    let (address, length) = network.split_once('/').map_or((network, None), |(a, l)| (a, Some(l)));
    let address: IpAddr = address.parse().ok()?;
    let (ours, theirs, bits) = match (ip, address) {
        (IpAddr::V4(ip), IpAddr::V4(of)) => (u128::from(ip.to_bits()), u128::from(of.to_bits()), 32),
        (IpAddr::V6(ip), IpAddr::V6(of)) => (ip.to_bits(), of.to_bits(), 128),
        _ => return Some(false),
    };
    let mask = match length {
        None => u128::MAX,
        Some(length) => match length.parse::<u32>() {
            Ok(length) if length > bits => return None,
            Ok(0) => 0,
            Ok(length) => u128::MAX << (bits - length),
            // iptables writes a mask that is no prefix as an address.
            Err(_) => match length.parse().ok()? {
                IpAddr::V4(mask) => u128::from(mask.to_bits()),
                IpAddr::V6(mask) => mask.to_bits(),
            },
        },
    };
    Some(ours & mask == theirs & mask)
}

/// What `iptables-save` or `ip6tables-save` prints, for a packet of its family.
pub fn of_iptables(dump: &str, syn: Syn<'_>) -> Met {
    let mut met = Met::default();
    for table in dump.split("\n*").map(|table| table.trim_start_matches('*')) {
        // The first part may be a comment before the first table.
        let table = table.rsplit_once("\n*").map_or(table, |(_, table)| table);
        let name = table.lines().next().unwrap_or_default().trim();
        let bases: &[&str] = match name {
            "raw" | "nat" => &["PREROUTING"],
            "mangle" => &["PREROUTING", "INPUT"],
            "filter" => &["INPUT"],
            _ => continue,
        };
        let own: Vec<&str> =
            table.lines().filter_map(|line| line.strip_prefix(':')?.split_whitespace().next()).collect();
        let mut chains: HashMap<String, Vec<Step>> = HashMap::new();
        for line in table.lines().filter(|line| line.starts_with("-A ")) {
            let words = words(line);
            let Some(chain) = words.get(1) else { continue };
            chains.entry(chain.clone()).or_default().push(rule(&words[2..], line, &own, syn));
        }
        for base in bases {
            let policy = table.lines().find(|line| line.starts_with(&format!(":{base} DROP")));
            let policy = policy.map(|_| format!("the policy of chain {base} in table {name} is DROP"));
            add(&mut met, walk(&chains, base, policy.as_deref()).behind_prerouting(*base == "INPUT"));
        }
    }
    met
}

/// The words of a line, without the quotes.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let (mut word, mut quoted, mut any) = (String::new(), false, false);
    let mut letters = line.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '\\' if quoted => word.extend(letters.next()),
            '"' => {
                quoted = !quoted;
                any = true;
            }
            ' ' if !quoted => {
                if any || !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                any = false;
            }
            letter => word.push(letter),
        }
    }
    if any || !word.is_empty() {
        words.push(word);
    }
    words
}

fn rule(words: &[String], text: &str, own: &[&str], syn: Syn<'_>) -> Step {
    let mut holds = Holds::Always;
    let mut action = Action::Nothing;
    let mut negated = false;
    let mut module = "";
    let mut rest = words.iter().map(String::as_str);
    while let Some(word) = rest.next() {
        if word == "!" {
            negated = true;
            continue;
        }
        let mut value = || rest.next().unwrap_or_default();
        let one = match word {
            "-m" => {
                module = value();
                // Conditions that some packets of any client meet, whatever follows.
                Holds::Always
            }
            "--comment" => {
                value();
                Holds::Always
            }
            "-p" => Holds::of(matches!(value(), "tcp" | "6" | "all" | "0")),
            "-d" => contains(value(), syn.to).map_or(Holds::Unreadable, Holds::of),
            "-s" | "--sport" | "--sports" => {
                value();
                Holds::Some
            }
            "-i" => by_device(value(), '+', syn),
            "--dport" | "--dports" => among(value(), syn.port),
            "--ports" => match among(value(), syn.port) {
                Holds::Never => Holds::Some,
                other => other,
            },
            "--syn" => Holds::Always,
            "--tcp-flags" => {
                let (mask, wanted) = (value(), value());
                let wanted: Vec<&str> = wanted.split(',').filter(|flag| *flag != "NONE").collect();
                let looks_at_syn = mask.split(',').any(|flag| matches!(flag, "SYN" | "ALL"));
                Holds::of(if looks_at_syn { wanted == ["SYN"] } else { wanted.is_empty() })
            }
            "--dst-type" => Holds::of(value().split(',').any(|kind| kind == "LOCAL")),
            "--src-type" => match value() {
                "LOCAL" => Holds::Never,
                "UNICAST" => Holds::Always,
                _ => Holds::Unreadable,
            },
            "--ctstate" | "--state" => Holds::of(value().split(',').any(|state| state == "NEW")),
            "--mark" if matches!(module, "mark" | "connmark") => {
                value();
                Holds::Some
            }
            "--probability" | "--mode" | "--every" | "--packet" if module == "statistic" => {
                value();
                Holds::Some
            }
            "--limit" | "--limit-burst" if module == "limit" => {
                value();
                Holds::Some
            }
            "-j" | "-g" => {
                let goto = word == "-g";
                let target = value();
                action = match target {
                    "DNAT" | "REDIRECT" | "NETMAP" | "TPROXY" => Action::Takes,
                    "ACCEPT" => Action::Accepts,
                    "DROP" | "REJECT" => Action::Drops,
                    "RETURN" => Action::Returns,
                    "LOG" | "NFLOG" | "MARK" | "CONNMARK" | "TRACE" | "TCPMSS" | "TOS" | "DSCP" | "CT" | "NOTRACK"
                    | "SET" | "CHECKSUM" | "HL" | "TTL" | "CLASSIFY" | "AUDIT" | "SECMARK" | "CONNSECMARK" => {
                        Action::Nothing
                    }
                    chain if own.contains(&chain) && goto => Action::Goto(chain.to_owned()),
                    chain if own.contains(&chain) => Action::Jump(chain.to_owned()),
                    _ => Action::Unreadable,
                };
                // What follows are the options of the target.
                break;
            }
            _ => Holds::Unreadable,
        };
        holds = holds.and(one.negated_if(negated));
        negated = false;
    }
    Step { holds, action, text: text.trim().to_owned() }
}

/// Whether it comes by a device that a rule names; `any` at the end of a name stands for the rest
/// of it.
fn by_device(name: &str, any: char, syn: Syn<'_>) -> Holds {
    let Some(device) = syn.by else {
        return match name.strip_suffix(any) {
            Some("") => Holds::Always,
            _ if name == "lo" => Holds::Never,
            _ => Holds::Some,
        };
    };
    Holds::of(name.strip_suffix(any).map_or(name == device, |start| device.starts_with(start)))
}

/// Whether the port is in `22,400:500`.
fn among(list: &str, port: u16) -> Holds {
    let mut found = Holds::Never;
    for item in list.split(',') {
        let (from, to) = item.split_once([':', '-']).unwrap_or((item, item));
        found = found.or(match (from.parse(), to.parse()) {
            (Ok(from), Ok(to)) => Holds::of((from..=to).contains(&port)),
            _ => Holds::Unreadable,
        });
    }
    found
}

/// What `nft -j list ruleset` prints; `text` gives a rule's text by family, table and handle.
/// `skip` are tables that were read in another way.
pub fn of_nft(
    ruleset: &Value,
    syn: Syn<'_>,
    text: &dyn Fn(&str, &str, u64) -> Option<String>,
    skip: &dyn Fn(&str, &str) -> bool,
) -> Met {
    let empty = Vec::new();
    let all = ruleset["nftables"].as_array().unwrap_or(&empty);
    let mine = if syn.to.is_ipv4() { "ip" } else { "ip6" };
    let place = |of: &Value| (word(&of["family"]).to_owned(), word(&of["table"]).to_owned());
    let mut base: Vec<&Value> = all
        .iter()
        .map(|object| &object["chain"])
        .filter(|c| c["hook"] == "prerouting" || c["hook"] == "input")
        .collect();
    base.retain(|c| c["family"] == mine || c["family"] == "inet");
    base.sort_by_key(|chain| (chain["hook"] == "input", chain["prio"].as_i64()));
    let mut met = Met::default();
    for chain in base {
        let here = place(chain);
        if skip(&here.0, &here.1) {
            continue;
        }
        let sets: HashMap<&str, &Value> = all
            .iter()
            .flat_map(|object| [&object["set"], &object["map"]])
            .filter(|set| set.is_object() && place(set) == here)
            .map(|set| (word(&set["name"]), &set["elem"]))
            .collect();
        let reader = Reader { syn, sets };
        let mut chains: HashMap<String, Vec<Step>> = HashMap::new();
        for rule in all.iter().map(|object| &object["rule"]).filter(|rule| rule.is_object() && place(rule) == here) {
            let handle = rule["handle"].as_u64().unwrap_or_default();
            let told = text(&here.0, &here.1, handle).unwrap_or_else(|| format!("handle {handle}"));
            let told = format!("{told} (chain {} of table {} {})", word(&rule["chain"]), here.0, here.1);
            chains.entry(word(&rule["chain"]).to_owned()).or_default().extend(reader.rule(&rule["expr"], &told));
        }
        let name = word(&chain["name"]);
        let policy = format!("the policy of chain {name} of table {} {} is drop", here.0, here.1);
        let policy = (chain["policy"] == "drop").then_some(&*policy);
        add(&mut met, walk(&chains, name, policy).behind_prerouting(chain["hook"] == "input"));
    }
    met
}

fn word(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// What the packet has where an expression looks.
enum Has {
    Port(u16),
    Address(IpAddr),
    /// One of these words or numbers.
    Word(&'static [&'static str]),
    /// It depends on the client.
    Varies,
    Device,
    Unreadable,
    All(Vec<Has>),
}

/// Whether a part of a packet says where it goes.
fn is_destination(payload: &Value) -> bool {
    let part = (payload["protocol"].as_str(), payload["field"].as_str());
    matches!(part, (Some("tcp" | "th"), Some("dport")) | (Some("ip" | "ip6"), Some("daddr")))
}

struct Reader<'a> {
    syn: Syn<'a>,
    sets: HashMap<&'a str, &'a Value>,
}

impl Reader<'_> {
    fn rule(&self, expressions: &Value, text: &str) -> Vec<Step> {
        let mut holds = Holds::Always;
        let mut steps = Vec::new();
        let mut step = |holds, action| steps.push(Step { holds, action, text: text.to_owned() });
        for expression in expressions.as_array().into_iter().flatten() {
            let Some((kind, body)) = expression.as_object().and_then(|object| object.iter().next()) else { continue };
            match kind.as_str() {
                "match" => holds = holds.and(self.matches(body)),
                "limit" | "quota" | "ct count" => holds = holds.and(Holds::Some),
                // Stateless: what arrives has another port or address then.
                "mangle" if is_destination(&body["key"]["payload"]) => step(holds, Action::Takes),
                "counter" | "log" | "comment" | "mangle" | "notrack" | "ct helper" | "ct timeout" | "set" | "meter"
                | "continue" => {}
                "accept" => step(holds, Action::Accepts),
                "drop" | "reject" => step(holds, Action::Drops),
                "return" => step(holds, Action::Returns),
                "jump" => step(holds, Action::Jump(word(&body["target"]).to_owned())),
                "goto" => step(holds, Action::Goto(word(&body["target"]).to_owned())),
                "dnat" | "redirect" | "tproxy" => {
                    let mapped =
                        ["addr", "port"].into_iter().map(|key| self.mapped(&body[key])).fold(Holds::Always, Holds::and);
                    step(holds.and(mapped), Action::Takes);
                }
                "vmap" => {
                    let has = self.has(&body["key"]);
                    for pair in self.elements(&body["data"]).into_iter().flatten() {
                        let hit = holds.and(self.equals(&has, &pair[0]));
                        let verdict = self.rule(&Value::Array(vec![pair[1].clone()]), text);
                        for Step { action, .. } in verdict {
                            step(hit, action);
                        }
                    }
                    if self.elements(&body["data"]).is_none() {
                        step(holds.and(Holds::Unreadable), Action::Unreadable);
                    }
                }
                _ => step(holds, Action::Unreadable),
            }
        }
        steps
    }

    /// `dnat to tcp dport map { 443 : 10.0.0.2 }`: a key that the map lacks ends the rule.
    fn mapped(&self, value: &Value) -> Holds {
        let map = &value["map"];
        if map.is_null() {
            return Holds::Always;
        }
        let has = self.has(&map["key"]);
        match self.elements(&map["data"]) {
            Some(pairs) => pairs.iter().map(|pair| self.equals(&has, &pair[0])).fold(Holds::Never, Holds::or),
            None => Holds::Unreadable,
        }
    }

    fn elements(&self, data: &Value) -> Option<Vec<Value>> {
        match data {
            Value::String(name) => {
                let of = self.sets.get(name.strip_prefix('@')?)?;
                Some(of.as_array().cloned().unwrap_or_default())
            }
            Value::Object(set) => Some(match set.get("set")? {
                Value::Array(elements) => elements.clone(),
                one => vec![one.clone()],
            }),
            Value::Array(elements) => Some(elements.clone()),
            _ => None,
        }
    }

    fn has(&self, left: &Value) -> Has {
        let version = if self.syn.to.is_ipv4() { "ip" } else { "ip6" };
        if let Some(parts) = left["concat"].as_array() {
            return Has::All(parts.iter().map(|part| self.has(part)).collect());
        }
        let payload = &left["payload"];
        match (word(&payload["protocol"]), word(&payload["field"])) {
            ("tcp" | "th", "dport") => return Has::Port(self.syn.port),
            ("ip" | "ip6", "daddr") => return Has::Address(self.syn.to),
            ("ip" | "ip6", "saddr") | ("tcp" | "th", "sport") | ("ether", _) => return Has::Varies,
            ("ip", "protocol") | ("ip6", "nexthdr") => return Has::Word(&["tcp", "6"]),
            _ => {}
        }
        match word(&left["meta"]["key"]) {
            "l4proto" => return Has::Word(&["tcp", "6"]),
            "nfproto" if version == "ip" => return Has::Word(&["ipv4", "2"]),
            "nfproto" => return Has::Word(&["ipv6", "10"]),
            "protocol" if version == "ip" => return Has::Word(&["ip"]),
            "protocol" => return Has::Word(&["ip6"]),
            "iifname" | "iif" => return Has::Device,
            "iifgroup" | "iiftype" | "mark" | "random" => return Has::Varies,
            _ => {}
        }
        if left["ct"]["key"] == "state" {
            return Has::Word(&["new"]);
        }
        if left["fib"]["result"] == "type" {
            let flags = &left["fib"]["flags"];
            let flags: Vec<&str> = flags.as_array().map_or(vec![word(flags)], |all| all.iter().map(word).collect());
            return if flags.contains(&"daddr") { Has::Word(&["local"]) } else { Has::Unreadable };
        }
        if left["numgen"].is_object() || left["jhash"].is_object() || left["symhash"].is_object() {
            return Has::Varies;
        }
        Has::Unreadable
    }

    fn matches(&self, body: &Value) -> Holds {
        // `tcp dport` also says that it is TCP, and `ip daddr` that it is IPv4.
        let protocol = word(&body["left"]["payload"]["protocol"]);
        let other_family = if self.syn.to.is_ipv4() { "ip6" } else { "ip" };
        if protocol == other_family || matches!(protocol, "udp" | "icmp" | "icmpv6" | "sctp" | "dccp" | "udplite") {
            return Holds::Never;
        }
        let has = self.has(&body["left"]);
        let right = &body["right"];
        match word(&body["op"]) {
            "==" | "in" => self.equals(&has, right),
            "!=" => self.equals(&has, right).negated_if(true),
            op => match (&has, right.as_u64()) {
                (Has::Port(port), Some(than)) => {
                    let port = u64::from(*port);
                    Holds::of(match op {
                        "<" => port < than,
                        ">" => port > than,
                        "<=" => port <= than,
                        ">=" => port >= than,
                        _ => return Holds::Unreadable,
                    })
                }
                (Has::Varies, _) => Holds::Some,
                _ => Holds::Unreadable,
            },
        }
    }

    fn equals(&self, has: &Has, right: &Value) -> Holds {
        let right = if right["elem"].is_object() { &right["elem"]["val"] } else { right };
        if let Has::All(parts) = has
            && let Some(values) = right["concat"].as_array()
        {
            if values.len() != parts.len() {
                return Holds::Unreadable;
            }
            return parts.iter().zip(values).map(|(has, v)| self.equals(has, v)).fold(Holds::Always, Holds::and);
        }
        if right["set"].is_array() || right.is_array() || word(right).starts_with('@') {
            return match self.elements(right) {
                Some(all) => all.iter().map(|one| self.equals(has, one)).fold(Holds::Never, Holds::or),
                None => Holds::Unreadable,
            };
        }
        if right == "*" {
            return Holds::Always;
        }
        let range = right["range"].as_array().filter(|range| range.len() == 2);
        let said = match right {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        match has {
            Has::Port(port) => match (right.as_u64(), range) {
                (Some(one), _) => Holds::of(one == u64::from(*port)),
                (_, Some(ends)) => match (ends[0].as_u64(), ends[1].as_u64()) {
                    (Some(a), Some(b)) => Holds::of((a..=b).contains(&u64::from(*port))),
                    _ => Holds::Unreadable,
                },
                _ => Holds::Unreadable,
            },
            Has::Address(ip) => {
                let prefix = &right["prefix"];
                let network = match (range, prefix.is_object()) {
                    (Some(ends), _) => {
                        return match (word(&ends[0]).parse::<IpAddr>(), word(&ends[1]).parse::<IpAddr>()) {
                            (Ok(a), Ok(b)) => Holds::of((a..=b).contains(ip)),
                            _ => Holds::Unreadable,
                        };
                    }
                    (_, true) => format!("{}/{}", word(&prefix["addr"]), prefix["len"]),
                    _ => said,
                };
                contains(&network, *ip).map_or(Holds::Unreadable, Holds::of)
            }
            Has::Word(words) => {
                if right.is_string() || right.is_number() {
                    Holds::of(words.contains(&said.as_str()))
                } else {
                    Holds::Unreadable
                }
            }
            Has::Device => by_device(&said, '*', self.syn),
            Has::Varies => Holds::Some,
            Has::Unreadable | Has::All(_) => Holds::Unreadable,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Syn<'_> = Syn { to: IpAddr::V4(std::net::Ipv4Addr::new(203, 0, 113, 7)), port: 443, by: None };

    fn iptables(rules: &[&str]) -> Met {
        let chains =
            ":PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:A - [0:0]\n:KUBE-SERVICES - [0:0]\n:KUBE-EXT - [0:0]";
        of_iptables(&format!("# Generated by iptables-save\n*nat\n{chains}\n{}\nCOMMIT\n", rules.join("\n")), US)
    }

    #[test]
    fn rules_that_take_a_connection_are_found() {
        for rules in [
            &["-A PREROUTING -i eth0 -p tcp -j DNAT --to-destination 10.0.0.2"][..],
            &["-A PREROUTING -d 203.0.113.7/32 -p tcp -j DNAT --to-destination 10.0.0.2"],
            &["-A PREROUTING -d 203.0.113.0/24 -p tcp -j DNAT --to-destination 10.0.0.2"],
            &["-A PREROUTING -d 203.0.113.7/255.255.0.255 -p tcp -j DNAT --to-destination 10.0.0.2"],
            &["-A PREROUTING -p tcp -m tcp ! --dport 22 -j DNAT --to-destination 10.0.0.2"],
            &["-A PREROUTING -p tcp -m multiport ! --dports 22,51820 -j DNAT --to-destination 10.0.0.2"],
            &["-A PREROUTING -p tcp -m tcp --dport 400:500 -j REDIRECT --to-ports 8443"],
            &["-A PREROUTING -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -j REDIRECT --to-ports 8443"],
            &["-A PREROUTING -j DNAT --to-destination 10.0.0.2"],
            &["-A PREROUTING -s 192.0.2.0/24 -j RETURN", "-A PREROUTING -p tcp -j REDIRECT --to-ports 1"],
            &[
                "-A PREROUTING -m addrtype --dst-type LOCAL -j A",
                "-A A -p tcp -m comment --comment \"dnat name: \\\"cbr0\\\" -j RETURN\" -m multiport --dports 80,443 -j DNAT --to-destination 10.42.0.8:443",
            ],
            &[
                "-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES",
                "-A KUBE-SERVICES -d 203.0.113.7/32 -p tcp -m tcp --dport 443 -j KUBE-EXT",
                "-A KUBE-EXT -m addrtype --src-type LOCAL -j RETURN",
                "-A KUBE-EXT -p tcp -m statistic --mode random --probability 0.5 -j DNAT --to-destination 10.42.0.8:443",
            ],
        ] {
            let met = iptables(rules);
            assert!(met.taken.is_some() && met.unreadable.is_empty(), "{rules:?}: {met:?}");
        }
    }

    #[test]
    fn rules_for_others_are_none() {
        for rules in [
            &["-A PREROUTING -d 203.0.113.8/32 -p tcp -j DNAT --to-destination 10.0.0.2"][..],
            &["-A PREROUTING -p udp -j DNAT --to-destination 10.0.0.2"],
            &["-A PREROUTING -i lo -p tcp -j DNAT --to-destination 10.0.0.2"],
            &["-A PREROUTING -p tcp -m multiport ! --dports 22,443 -j DNAT --to-destination 10.0.0.2"],
            &["-A PREROUTING -p tcp -m tcp ! --dport 443 -j REDIRECT --to-ports 1"],
            &["-A OUTPUT -p tcp -m tcp --dport 443 -j REDIRECT --to-ports 8443"],
            &[
                "-A PREROUTING -p tcp -m tcp --dport 443 -j ACCEPT",
                "-A PREROUTING -p tcp -j DNAT --to-destination 10.0.0.2",
            ],
            &["-A PREROUTING -m addrtype ! --dst-type LOCAL -j DNAT --to-destination 10.0.0.2"],
            // Not understood, and harmless: nothing there takes anything.
            &["-A PREROUTING -m set --match-set KUBE dst,dst -j A", "-A A -j MARK --set-xmark 0x4000/0x4000"],
            // A chain that nothing jumps to.
            &["-A A -p tcp -j DNAT --to-destination 10.0.0.2"],
        ] {
            assert_eq!(iptables(rules), Met::default(), "{rules:?}");
        }
    }

    #[test]
    fn a_rule_that_cannot_be_read_is_told() {
        let rule = "-A PREROUTING -m set --match-set ours dst,dst -j DNAT --to-destination 10.0.0.2";
        assert_eq!(iptables(&[rule]).unreadable, [rule]);
        let jump = "-A PREROUTING -m bpf --bytecode \"1,6 0 0 1\" -j A";
        assert_eq!(iptables(&[jump, "-A A -p tcp -j REDIRECT --to-ports 1"]).unreadable, [jump]);
        assert_eq!(iptables(&["-A PREROUTING -j NEWTARGET --way 1"]).unreadable.len(), 1);
        // It ends nothing either: what comes behind it is looked at.
        let behind = iptables(&["-A PREROUTING -m new --x 1 -j ACCEPT", "-A PREROUTING -p tcp -j REDIRECT"]);
        assert!(behind.taken.is_some());
    }

    #[test]
    fn a_firewall_that_drops_every_client_is_told_and_one_that_drops_some_is_not() {
        let filter = |policy: &str, rules: &[&str]| {
            let chains = format!(":INPUT {policy} [0:0]\n:A - [0:0]\n:ts-input - [0:0]");
            let syn = Syn { by: Some("eth0"), ..US };
            of_iptables(&format!("*filter\n{chains}\n{}\nCOMMIT\n", rules.join("\n")), syn).dropped
        };
        // As ufw and tailscale write them.
        let usual = [
            "-A INPUT -j ts-input",
            "-A ts-input -s 100.64.0.0/10 ! -i tailscale0 -j DROP",
            "-A ts-input -i tailscale0 -j ACCEPT",
            "-A INPUT -i lo -j ACCEPT",
            "-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            "-A INPUT -m conntrack --ctstate INVALID -j DROP",
            "-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT",
        ];
        let with = |more: &'static str| [&usual[..], &[more]].concat();
        assert_eq!(filter("DROP", &usual).unwrap(), "the policy of chain INPUT in table filter is DROP");
        assert_eq!(filter("ACCEPT", &usual), None);
        let last = "-A INPUT -j REJECT --reject-with icmp-host-prohibited";
        assert_eq!(filter("ACCEPT", &with(last)).as_deref(), Some(last));
        assert_eq!(filter("DROP", &with("-A INPUT -p tcp -m tcp --dport 443 -j ACCEPT")), None);
        assert_eq!(filter("DROP", &with("-A INPUT -s 192.0.2.0/24 -p tcp -j ACCEPT")), None, "some get by");
        assert_eq!(filter("DROP", &with("-A INPUT -m set --match-set ours src -j ACCEPT")), None, "perhaps");
        assert_eq!(filter("ACCEPT", &["-A INPUT -p tcp --dport 443 -s 192.0.2.0/24 -j DROP"]), None);
        assert_eq!(filter("ACCEPT", &["-A INPUT -j A", "-A A -s 192.0.2.0/24 -j RETURN", "-A A -j DROP"]), None);
        assert!(filter("ACCEPT", &["-A INPUT -p tcp -j A", "-A A -j DROP"]).is_some());
        assert_eq!(filter("ACCEPT", &["-A INPUT -i tun0 -j DROP"]), None);
        assert!(filter("ACCEPT", &["-A INPUT -i eth+ -p tcp --dport 443 -j DROP"]).is_some());
    }

    #[test]
    fn jumps_that_multiply_are_cut() {
        let rules: Vec<String> = (0..40).map(|_| "-A A -j A".to_owned()).collect();
        let mut rules: Vec<&str> = rules.iter().map(String::as_str).collect();
        rules.push("-A PREROUTING -j A");
        assert!(iptables(&rules).unreadable.iter().any(|text| text.contains("too many")));
    }
}
