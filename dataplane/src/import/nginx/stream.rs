//! Where nginx sends a connection: from the address that it comes in by to the upstream.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Result, bail};

use super::super::syntax::{Directive, Place, named};
use super::access::Access;
use super::map::{INFINITE, Map, PORT, SNI, captures, read_map, variables, with_port};
use super::names::{Found, Key, Names, Written};
use super::notes::Notes;
use super::server::{Guard, Server, Settings, Unknown, leave};
use super::upstream::{self, Members};
use crate::config::{HostPattern, Target, TargetHost};

/// Addresses of all servers together; one counts for each server that has it.
const MOST_ADDRESSES: usize = 100_000;
/// Listeners of nginx's own that a connection goes through.
const MOST_HOPS: usize = 8;

/// An upstream as servers use it. By index, see [`Stream::uses`].
#[derive(Debug, Clone)]
pub struct Use {
    /// The name of the block, or `host:port`.
    pub name: String,
    pub members: Members,
    pub send_proxy: bool,
    pub connect_timeout: Option<Duration>,
}

/// What is said of one address. Addresses of which the same is said are one group.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct Socket {
    servers: Vec<usize>,
    default: usize,
    proxy_protocol: bool,
    ssl: bool,
    /// It takes clients of both families.
    takes_both: bool,
    /// See [`Group::port`].
    port: Option<u16>,
}

/// The servers of one address.
pub struct Group {
    servers: Vec<usize>,
    /// The one that nginx begins with. Its rules hold for all.
    pub default: usize,
    /// Every client has to send a PROXY header.
    pub proxy_protocol: bool,
    /// That of the address, where a server asks for it.
    port: Option<u16>,
    names: Names<usize>,
    /// `None`: it cannot be carried over, and that was told.
    pub guard: Option<Guard>,
    /// Whether every client is let in.
    is_open: bool,
    /// Servers with rules that were meant to let in fewer than those that hold.
    stricter: HashSet<usize>,
}

/// What `proxy_pass` says.
enum Way<'a> {
    /// It cannot be carried over, and that was told.
    Refused,
    Fixed(String, &'a Place),
    /// What stands before and after the value of a map.
    Mapped(Rc<Map<'a>>, String, String),
}

/// Where a destination leads.
#[derive(Debug, Clone, Copy)]
enum Resolved {
    Refused,
    Use(usize),
    /// To a listener of nginx itself, from this address.
    Hop(usize, IpAddr),
}

/// The `stream` block.
pub struct Stream<'a> {
    pub notes: Notes,
    pub servers: Vec<Server<'a>>,
    ways: Vec<Way<'a>>,
    blocks: HashMap<String, (&'a Directive, Option<Members>)>,
    /// What stands in a `proxy_pass` without variables: nginx knows it before it starts.
    fixed: HashSet<String>,
    /// Addresses, in the order of the file, and their groups.
    pub sockets: Vec<(SocketAddr, usize)>,
    by_addr: HashMap<SocketAddr, usize>,
    groups: Vec<Rc<Group>>,
    pub uses: Vec<Use>,
    use_of: HashMap<(String, bool, Option<Duration>), usize>,
    resolved: HashMap<(usize, String), Resolved>,
    /// Servers that a connection which is carried over goes through.
    pub used: HashSet<usize>,
    used_blocks: HashSet<String>,
    pub resolvers: Vec<&'a Directive>,
}

impl<'a> Stream<'a> {
    /// Reads the directives of the block.
    ///
    /// # Errors
    /// A file that belongs to it is missing: what it says about names and clients is not known.
    pub fn read(directives: &[&'a Directive], mut notes: Notes) -> Result<Self> {
        if let Some(missing) = directives.iter().find(|d| d.is_missing_file()) {
            bail!(
                "{}: error: `include {}`: there is no such file here; it may say which names and clients are refused, so nothing is carried over\n  help: read the configuration where nginx runs, or read the output of `nginx -T`",
                missing.place,
                missing.text()
            );
        }
        let settings = Settings::new(directives);
        let mut stream = Self {
            servers: Vec::new(),
            ways: Vec::new(),
            blocks: HashMap::new(),
            fixed: HashSet::new(),
            sockets: Vec::new(),
            by_addr: HashMap::new(),
            groups: Vec::new(),
            uses: Vec::new(),
            use_of: HashMap::new(),
            resolved: HashMap::new(),
            used: HashSet::new(),
            used_blocks: HashSet::new(),
            resolvers: settings.of_all("resolver").to_vec(),
            notes: Notes::default(),
        };
        let mut maps: HashMap<String, &Directive> = HashMap::new();
        for directive in directives {
            match &*directive.name {
                "server" => stream.servers.push(Server::read(directive, &settings, &mut notes)),
                "upstream" => {
                    let members = upstream::read(directive, &mut notes);
                    stream.blocks.insert(directive.text().to_ascii_lowercase(), (directive, members));
                }
                "map" => {
                    if let Some(variable) = directive.words.get(1).and_then(|word| word.strip_prefix('$')) {
                        maps.insert(variable.to_ascii_lowercase(), directive);
                    }
                }
                // A server that uses what they set is told.
                "geo"
                | "split_clients"
                | "js_set"
                | "js_var"
                | "js_import"
                | "js_path"
                | "js_engine"
                | "keyval"
                | "keyval_zone"
                | "js_shared_dict_zone"
                | "js_preload_object"
                | "match" => {}
                name if leave(directive, &mut notes) || name.starts_with("geoip") || name.starts_with("js_fetch_") => {}
                name => bail!(
                    "{}: error: {} has no counterpart, stands for all servers, and may decide who is let in or where to\n  help: if it does not, import a copy of the configuration without it",
                    directive.place,
                    named(name)
                ),
            }
        }
        stream.notes = notes;
        if stream.servers.iter().map(|server| server.listens.len()).sum::<usize>() > MOST_ADDRESSES {
            bail!("error: the servers have more than {MOST_ADDRESSES} addresses together");
        }
        stream.read_ways(&maps, &set_elsewhere(directives));
        stream.read_groups();
        Ok(stream)
    }

    /// Blocks that lead nowhere.
    pub fn unused_blocks(&self) -> Vec<&'a Directive> {
        let unused =
            self.blocks.iter().filter(|(name, (_, members))| members.is_some() && !self.used_blocks.contains(*name));
        unused.map(|(_, (block, _))| *block).collect()
    }

    fn read_ways(&mut self, maps: &HashMap<String, &'a Directive>, elsewhere: &HashSet<String>) {
        let mut read: HashMap<&str, Option<Rc<Map<'a>>>> = HashMap::new();
        for server in &self.servers {
            let Some(pass) = server.pass else {
                self.ways.push(Way::Refused);
                continue;
            };
            let text = pass.text();
            let mut variables = variables(&text);
            variables.retain(|(name, _)| *name != PORT);
            let refused = |why: String| format!("`proxy_pass {text}` is not carried over: {why}");
            let way = match &variables[..] {
                [] => {
                    if !text.contains('$') {
                        self.fixed.insert(text.to_ascii_lowercase());
                    }
                    Way::Fixed(text.clone(), &pass.place)
                }
                [(SNI, _)] => {
                    let why = "it dials whatever name a client asks for; list the names in routes";
                    self.notes.lost(&pass.place, refused(why.into()));
                    Way::Refused
                }
                [(variable, at)] => {
                    // nginx does not tell capitals in the name of a variable from small letters.
                    let map = maps.get(&variable.to_ascii_lowercase()).copied();
                    let map = if elsewhere.contains(&variable.to_ascii_lowercase()) {
                        let why = format!("${variable} is not set by a `map` of the server name alone");
                        self.notes.lost(&pass.place, refused(why));
                        None
                    } else if let Some(map) = map {
                        read.entry(&map.words[1]).or_insert_with(|| read_map(map, &mut self.notes)).clone()
                    } else {
                        self.notes.lost(&pass.place, refused(format!("no `map` here sets ${variable}")));
                        None
                    };
                    match map {
                        Some(map) => Way::Mapped(map, text[..at.start].to_owned(), text[at.end..].to_owned()),
                        None => Way::Refused,
                    }
                }
                _ => {
                    self.notes.lost(&pass.place, refused("it has more than one variable".into()));
                    Way::Refused
                }
            };
            self.ways.push(way);
        }
    }

    /// Whether what a server does depends on the port of the address.
    fn asks_port(&self, server: usize) -> bool {
        let asks = |text: &str| variables(text).iter().any(|(name, _)| *name == PORT);
        match &self.ways[server] {
            Way::Refused => false,
            Way::Fixed(text, _) => asks(text),
            Way::Mapped(map, before, after) => {
                asks(before) || asks(after) || map.values.iter().any(|(value, _)| asks(value))
            }
        }
    }

    /// Groups the servers by their addresses, as `ngx_stream_add_addresses` does.
    fn read_groups(&mut self) {
        let is_all_v6 = |addr: &SocketAddr| addr.ip() == IpAddr::from(Ipv6Addr::UNSPECIFIED);
        // It is a property of the socket, whichever server says so.
        let listens = self.servers.iter().flat_map(|server| &server.listens);
        let takes_both = listens.filter(|listen| is_all_v6(&listen.addr) && listen.has("ipv6only=off"));
        let takes_both: HashSet<u16> = takes_both.map(|listen| listen.addr.port()).collect();
        let mut order: Vec<SocketAddr> = Vec::new();
        let mut sockets: HashMap<SocketAddr, (Socket, bool)> = HashMap::new();
        for (index, server) in self.servers.iter().enumerate() {
            for listen in &server.listens {
                let port = listen.addr.port();
                let takes_both = takes_both.contains(&port);
                let v4 = (takes_both && is_all_v6(&listen.addr)).then(|| SocketAddr::from(([0; 4], port)));
                for addr in v4.into_iter().chain([listen.addr]) {
                    let (socket, has_default) = sockets.entry(addr).or_insert_with(|| {
                        order.push(addr);
                        let takes_both = takes_both && addr.ip().is_unspecified();
                        (Socket { default: index, takes_both, ..Socket::default() }, false)
                    });
                    if socket.servers.last() != Some(&index) {
                        socket.servers.push(index);
                    }
                    if listen.is_default && !*has_default {
                        (socket.default, *has_default) = (index, true);
                    }
                    socket.proxy_protocol |= listen.has("proxy_protocol");
                    socket.ssl |= listen.has("ssl");
                }
                if listen.has("ssl") {
                    let message =
                        "what listens here is not carried over: it terminates TLS, which is the upstream's to do";
                    self.notes.lost(&listen.directive.place, message);
                }
            }
        }
        let mut known: HashMap<Socket, usize> = HashMap::new();
        for addr in order {
            let Some((mut socket, _)) = sockets.remove(&addr) else { continue };
            socket.port = socket.servers.iter().any(|server| self.asks_port(*server)).then_some(addr.port());
            let group = if let Some(group) = known.get(&socket) {
                *group
            } else {
                let group = self.read_group(socket.clone());
                self.groups.push(Rc::new(group));
                known.insert(socket, self.groups.len() - 1);
                self.groups.len() - 1
            };
            self.sockets.push((addr, group));
            self.by_addr.insert(addr, group);
        }
    }

    fn read_group(&mut self, socket: Socket) -> Group {
        let names = self.names_on(&socket);
        let guard = self.guard_of(&socket);
        let stricter = guard.as_ref().map_or_else(HashSet::new, |guard| self.stricter_than(guard, &socket));
        let is_open = guard.as_ref().is_some_and(|guard| guard.access.is_open());
        let Socket { servers, default, proxy_protocol, port, .. } = socket;
        if guard.is_some() && !self.servers[default].preread {
            for index in servers.iter().filter(|index| **index != default) {
                let message = format!(
                    "nothing comes to this server: the default server of its address ({}) has `ssl_preread off`",
                    self.servers[default].place
                );
                self.notes.changed(self.servers[*index].place, message);
            }
        }
        Group { servers, default, proxy_protocol, port, names, guard, is_open, stricter }
    }

    /// The names of all servers of an address.
    fn names_on(&mut self, socket: &Socket) -> Names<usize> {
        let mut names = Names::default();
        for index in &socket.servers {
            for (written, place) in &self.servers[*index].names {
                let (infinite, text) = match written {
                    Written::Regex(text) => (names.written_out(text).is_none(), format!("~{text}")),
                    Written::Prefix(text) => (true, format!("{text}.*")),
                    Written::Name(text) => (false, text.clone()),
                    Written::Below(text, _) => (false, format!("*.{text}")),
                    Written::Never(_) => continue,
                    Written::Unknown => (false, String::new()),
                };
                if infinite {
                    self.notes.lost(place, format!("`{text}` is not carried over: {INFINITE}"));
                }
                if !names.add(written.clone(), *index, place) {
                    self.notes.changed(place, format!("`{text}` is listed twice on these addresses: the first counts"));
                }
            }
        }
        names
    }

    /// The rules about clients on an address: those of its default server. `None`: they cannot be
    /// carried over, and that was told.
    fn guard_of(&mut self, socket: &Socket) -> Option<Guard> {
        if socket.ssl {
            return None;
        }
        let servers = socket.servers.iter().map(|index| &self.servers[*index]);
        if let Some(partial) = servers.into_iter().find(|server| server.unknown == Some(Unknown::File)) {
            let message = "what listens here is not carried over: this server includes a file that is not here, which may say who is let in";
            self.notes.lost(partial.place, message);
            return None;
        }
        let first = &self.servers[socket.default];
        if first.unknown.is_some() {
            let message = "what listens here is not carried over: what is not known of the default server may decide who is let in to all of them";
            self.notes.lost(first.place, message);
            return None;
        }
        let guard = match &first.guard {
            Ok(Guard { trusted, access }) => Guard { trusted: trusted.clone(), access: access.on(socket.takes_both) },
            Err((place, why)) => {
                self.notes.lost(place, format!("what it guards is not carried over: {why}"));
                return None;
            }
        };
        if socket.proxy_protocol && guard.trusted.is_empty() && !guard.access.is_open() {
            let message = "this server is not carried over: without `set_real_ip_from` nginx judges `allow` and `deny` by the address of the proxy in front; here a PROXY header that is taken is believed, and anybody could forge one";
            self.notes.lost(first.place, message);
            return None;
        }
        Some(guard)
    }

    /// The servers of an address with rules that were meant to let in fewer than those that hold.
    /// nginx never looks at them, so these servers are refused.
    fn stricter_than(&mut self, guard: &Guard, socket: &Socket) -> HashSet<usize> {
        let mut stricter = HashSet::new();
        let first = self.servers[socket.default].place;
        for index in socket.servers.iter().filter(|index| **index != socket.default) {
            let server = &self.servers[*index];
            if differs(&server.guard, &guard.access, socket.takes_both) {
                stricter.insert(*index);
                let message = format!(
                    "the names of this server are refused: nginx judges clients by the rules of the default server of the address ({first}), and never by those that stand here; give them a listener of their own"
                );
                self.notes.lost(server.place, message);
            }
        }
        stricter
    }

    /// The group of this index.
    pub fn group(&self, index: usize) -> Rc<Group> {
        Rc::clone(&self.groups[index])
    }

    /// All patterns that tell names apart on some address, each once, in the order of the file.
    pub fn patterns(&mut self) -> Vec<(HostPattern, Place)> {
        let mut found: Vec<(HostPattern, Place)> = Vec::new();
        let mut maps = HashSet::new();
        for index in 0..self.groups.len() {
            if self.is_blind(index) {
                continue;
            }
            let group = self.group(index);
            found.extend_from_slice(group.names.patterns());
            for server in &group.servers {
                if let Way::Mapped(map, ..) = &self.ways[*server]
                    && maps.insert(Rc::as_ptr(map))
                {
                    found.extend_from_slice(map.names.patterns());
                }
            }
        }
        let mut seen = HashSet::new();
        found.retain(|(pattern, _)| seen.insert(pattern.clone()));
        found.sort_by(|(_, a), (_, b)| a.cmp(b));
        found
    }

    /// Whether all connections of a group go the same way, whatever their name.
    pub fn is_blind(&mut self, group: usize) -> bool {
        self.is_blind_from(group, 0)
    }

    fn is_blind_from(&mut self, group: usize, hops: usize) -> bool {
        let group = self.group(group);
        let server = group.default;
        if self.servers[server].preread && group.servers.len() > 1 {
            return false;
        }
        let blind = matches!(&self.ways[server], Way::Mapped(..)) && self.servers[server].preread;
        if blind || hops > MOST_HOPS {
            return false;
        }
        match self.way_on(&group, server, Key::Nameless) {
            Resolved::Hop(inner, _) => self.is_blind_from(inner, hops + 1),
            Resolved::Refused | Resolved::Use(_) => true,
        }
    }

    /// Where nginx sends connections of a name, by index into [`Self::uses`]. `None`: nowhere, or
    /// where they cannot be sent here; then that was told.
    pub fn decide(&mut self, group: usize, key: Key<'_>) -> Option<usize> {
        self.decide_from(group, key, 0)
    }

    fn decide_from(&mut self, group: usize, key: Key<'_>, hops: usize) -> Option<usize> {
        let group = self.group(group);
        let guard = group.guard.as_ref()?;
        let default = &self.servers[group.default];
        let found = if default.preread && key != Key::Nameless { group.names.find(key) } else { Found::Nothing };
        let server = match found {
            Found::One(server) => *server,
            Found::Nothing => group.default,
            Found::Unknown => {
                let place = default.place;
                self.unknown(key, place);
                return None;
            }
        };
        if group.stricter.contains(&server) {
            return None;
        }
        let send_proxy = self.servers[server].send_proxy;
        let forged = group.proxy_protocol && guard.trusted.is_empty();
        let key_here = if default.preread { key } else { Key::Nameless };
        let resolved = self.way_on(&group, server, key_here);
        let found = match resolved {
            Resolved::Refused => return None,
            Resolved::Use(found) => {
                if forged && (send_proxy || self.uses[found].members.is_hashed()) {
                    self.forged(server);
                    return None;
                }
                found
            }
            Resolved::Hop(inner, source) => {
                if forged && send_proxy {
                    self.forged(server);
                    return None;
                }
                let is_believed = match self.hop(server, inner, source, hops) {
                    Ok(is_believed) => is_believed,
                    Err(why) => {
                        let place = self.servers[server].pass.map_or(self.servers[server].place, |pass| &pass.place);
                        let message = format!("what goes on to a `listen` of this file is not carried over: {why}");
                        self.notes.lost(place, message);
                        return None;
                    }
                };
                let found = self.decide_from(inner, key, hops + 1)?;
                if self.uses[found].send_proxy && !is_believed {
                    let message =
                        format!("targets behind this hop learn the client's address; nginx told them {source}");
                    self.notes.changed(self.servers[server].place, message);
                }
                found
            }
        };
        self.used.insert(server);
        Some(found)
    }

    fn forged(&mut self, server: usize) {
        self.notes.lost(
            self.servers[server].place,
            "this server is not carried over: without `set_real_ip_from` nginx takes PROXY headers and does not believe them; here what is taken is believed, and the upstream would learn an address that anybody can forge",
        );
    }

    fn unknown(&mut self, key: Key<'_>, place: &Place) {
        let who = match key {
            Key::Name(name) => format!("`{name}` is refused"),
            Key::Below(suffix) => format!("names below `{suffix}` that are not listed are refused"),
            Key::Other | Key::Nameless => "names that are not listed are refused".into(),
        };
        self.notes.lost(
            place,
            format!(
                "{who}: what cannot be carried over here may send some of them elsewhere; list those that are meant"
            ),
        );
    }

    /// Whether the client is known at a listener of the same nginx that a server connects to. An
    /// error if a connection from there is not as one that comes from the client.
    fn hop(&self, server: usize, inner: usize, source: IpAddr, hops: usize) -> Result<bool, String> {
        let inner = &self.groups[inner];
        if hops == MOST_HOPS {
            return Err("it goes round in a circle".into());
        }
        if self.servers[server].send_proxy != inner.proxy_protocol {
            return Err("one of the two sides speaks the PROXY protocol, the other does not".into());
        }
        let Some(guard) = &inner.guard else { return Err("that one could not be carried over".into()) };
        let is_believed = inner.proxy_protocol && guard.trusted.iter().any(|network| network.contains(&source));
        if is_believed && !inner.is_open {
            return Err("that one has `allow` or `deny` for the clients behind this one".into());
        }
        if !is_believed && !guard.access.allows(source) {
            return Err(format!("that one denies {source}"));
        }
        Ok(is_believed)
    }

    /// Where a server of a group sends connections of a name.
    fn way_on(&mut self, group: &Group, server: usize, key: Key<'_>) -> Resolved {
        let (text, place, is_fixed) = match &self.ways[server] {
            Way::Refused => return Resolved::Refused,
            Way::Fixed(text, place) => (text.clone(), *place, !text.contains('$')),
            Way::Mapped(map, before, after) => {
                let (value, place) = match map.names.find(key) {
                    Found::One(value) => (&*map.values[*value].0, map.values[*value].1),
                    Found::Nothing => ("", map.place),
                    Found::Unknown => {
                        // Without a default it is what was told of the entry.
                        let place = if key == Key::Other { map.default } else { Some(map.place) };
                        if let Some(place) = place {
                            self.unknown(key, place);
                        }
                        return Resolved::Refused;
                    }
                };
                if let Some((inner, _)) = variables(value).iter().find(|(name, _)| *name != PORT) {
                    let why = if *inner == SNI {
                        "it dials whatever name a client asks for; list the names in routes"
                    } else {
                        "its value is another variable"
                    };
                    let message = format!("`{value}` is not carried over: {why}");
                    self.notes.lost(place, message);
                    return Resolved::Refused;
                }
                // What is refused as it is, is nothing to tell.
                if value.is_empty()
                    && upstream::target(&format!("{before}{after}")).is_err()
                    && !self.blocks.contains_key(&format!("{before}{after}").to_ascii_lowercase())
                {
                    return Resolved::Refused;
                }
                (format!("{before}{value}{after}"), place, false)
            }
        };
        let text = match group.port {
            Some(port) => with_port(&text, port),
            None => text,
        };
        if let Some(resolved) = self.resolved.get(&(server, text.clone())) {
            return *resolved;
        }
        let resolved = match self.resolve(server, &text, place, is_fixed) {
            Ok(resolved) => resolved,
            Err(why) => {
                if let Some(why) = why {
                    self.notes.lost(place, format!("`{text}` is not carried over: {why}"));
                }
                Resolved::Refused
            }
        };
        self.resolved.insert((server, text), resolved);
        resolved
    }

    /// Reads a destination of a server; an error without a text was told before.
    fn resolve(
        &mut self,
        server: usize,
        text: &str,
        place: &Place,
        is_fixed: bool,
    ) -> Result<Resolved, Option<String>> {
        let name = text.to_ascii_lowercase();
        // nginx never finds a block by a name with a port.
        let block = self.blocks.get(&name).filter(|_| !name.contains(':'));
        let members = if let Some((block, members)) = block {
            self.used_blocks.insert(name);
            let Some(members) = members.clone() else { return Err(None) };
            self.resolvers.extend(block.inside().iter().filter(|d| d.name == "resolver"));
            members
        } else {
            let target = upstream::target(text)?;
            let is_name = matches!(target.host, TargetHost::Name(_));
            let known = is_fixed || self.fixed.contains(&name);
            if is_name && !known && self.servers[server].resolvers.is_empty() {
                return Err(Some("there is no `resolver`, so nginx cannot look it up and refuses it".into()));
            }
            Members::one(target)
        };
        let own: Vec<Option<(usize, IpAddr)>> = members.targets.iter().map(|target| self.own(target)).collect();
        match &own[..] {
            [Some((group, source))] => return Ok(Resolved::Hop(*group, *source)),
            _ if own.iter().any(Option::is_some) => {
                return Err(Some("one of its targets is a `listen` of this file".into()));
            }
            _ => {}
        }
        let (send_proxy, connect_timeout) = (self.servers[server].send_proxy, self.servers[server].connect_timeout);
        let connect_timeout = connect_timeout.filter(|timeout| (1..=3_600_000).contains(&timeout.as_millis()));
        if self.servers[server].connect_timeout.is_some() && connect_timeout.is_none() {
            self.notes.lost(place, "its `proxy_connect_timeout` is not carried over: it is not between 1 ms and 1 h");
        }
        self.resolvers.extend(&self.servers[server].resolvers);
        let next = self.uses.len();
        let index = *self.use_of.entry((text.to_ascii_lowercase(), send_proxy, connect_timeout)).or_insert(next);
        if index == next {
            self.uses.push(Use { name: text.to_owned(), members, send_proxy, connect_timeout });
        }
        Ok(Resolved::Use(index))
    }

    /// The group behind a target that is an address of ours, and from where we would connect to it.
    fn own(&self, target: &Target) -> Option<(usize, IpAddr)> {
        let ip = match &target.host {
            TargetHost::Ip(ip) => *ip,
            TargetHost::Name(name) if name == "localhost" => Ipv4Addr::LOCALHOST.into(),
            TargetHost::Name(_) => return None,
        };
        let group = |ip| self.by_addr.get(&SocketAddr::new(ip, target.port)).copied();
        let unspecified: IpAddr =
            if ip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let any = || group(unspecified).filter(|_| ip.is_loopback() || ip.is_unspecified());
        group(ip).or_else(any).map(|group| (group, if ip.is_unspecified() { Ipv4Addr::LOCALHOST.into() } else { ip }))
    }

    /// Where it is written what becomes of names that are not listed.
    pub fn place_of_others(&self, group: usize) -> &'a Place {
        let server = self.groups[group].default;
        match &self.ways[server] {
            Way::Mapped(map, ..) => map.default.unwrap_or(map.place),
            _ => self.servers[server].place,
        }
    }
}

/// Whether rules were meant to let in fewer than those that hold.
fn differs(guard: &Result<Guard, (Place, String)>, holds: &Access, takes_both: bool) -> bool {
    match guard {
        Ok(guard) => {
            let access = guard.access.on(takes_both);
            access != *holds && !access.is_open() && access.lists() != holds.lists()
        }
        Err(_) => true,
    }
}

/// The variables that something else than a `map` sets, in small letters: whichever comes last
/// counts.
fn set_elsewhere(directives: &[&Directive]) -> HashSet<String> {
    let mut set = HashSet::new();
    for directive in directives {
        let inside = directive.inside();
        let texts: Vec<&str> = match &*directive.name {
            "map" => inside.iter().flat_map(|entry| captures(&entry.name)).collect(),
            "server" => {
                let names = inside.iter().filter(|d| d.name == "server_name").flat_map(|d| &d.words);
                names.flat_map(|word| captures(word)).collect()
            }
            "geo" | "split_clients" | "js_set" | "js_var" | "keyval" => {
                directive.words.iter().filter_map(|word| word.strip_prefix('$')).collect()
            }
            name if name.starts_with("geoip") => {
                let words = directive.words.iter().chain(inside.iter().map(|d| &d.name));
                words.filter_map(|word| word.strip_prefix('$')).collect()
            }
            _ => Vec::new(),
        };
        set.extend(texts.iter().map(|name| name.to_ascii_lowercase()));
    }
    set
}
