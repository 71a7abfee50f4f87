//! From text to [`Config`]: the keys, what each may hold, and what stands in when it is left out.
//!
//! A value that is wrong is reported and replaced by a placeholder, so that everything wrong with a
//! file is said at once. No placeholder gets out: a configuration with an error is not returned.

mod listeners;
mod repository;
mod routes;
mod settings;
mod upstreams;

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};
use toml::de::{DeTable, Error};

pub use listeners::{MOST_BINDS, MOST_LISTENERS};
pub use repository::{Repository, Webhook};

use crate::config::check::Places;
use crate::config::diagnostic::shown_part;
use crate::config::keys::Key;
use crate::config::reader::{Field, Reader, Section, quoted};
use crate::config::source::{File, Role};
use crate::config::{
    Admin, Config, Diagnostic, EngineChoice, Fence, Limits, Listener, LoadError, OnRemovedRoute, Resolver, Route,
    Source, Span, Tailnet, Upstream, check, fence, keys, syntax,
};

const MILLISECOND: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);
/// A deadline that someone waits for.
const DEADLINE: RangeInclusive<Duration> = MILLISECOND..=HOUR;
const IDLE: RangeInclusive<Duration> = MILLISECOND..=Duration::from_secs(365 * 24 * 3600);

/// Reads a whole configuration. Gives the warnings with it, or else everything that is wrong,
/// warnings included, in the order of the files.
pub fn parse(source: Arc<Source>) -> Result<(Config, Vec<Diagnostic>), Vec<Diagnostic>> {
    parse_within(source, None)
}

/// As [`parse`], with another fence for the files of a repository than that of `[source]`.
pub fn parse_within(source: Arc<Source>, fence: Option<Fence>) -> Result<(Config, Vec<Diagnostic>), Vec<Diagnostic>> {
    let (parser, root, errors) = read(&source);
    let shared_from = parser.shared_from;
    let Root {
        engine,
        listeners,
        upstreams,
        routes,
        limits,
        admin,
        resolver,
        tailnet,
        on_removed_route,
        watch,
        repository,
    } = root;
    let Parser { mut reader, places, .. } = parser;

    let hash = hash(&source);
    let is_of_repository = |span: &Span| span.start >= shared_from;
    let fence = fence.or_else(|| Some(repository.as_ref()?.fence.clone())).unwrap_or_default();
    let mut config = Config {
        engine,
        listeners,
        upstreams,
        routes,
        limits,
        admin,
        resolver,
        tailnet,
        on_removed_route,
        watch,
        repository,
        source,
        hash,
    };
    let conflicts = check::conflicts(&config, &places).into_iter();
    let violations = fence::violations(&config, &places, &fence, is_of_repository);
    conflicts.chain(violations).for_each(|found| reader.push_absence(found));
    fence::mark(&mut config, &places, &fence, is_of_repository);

    let Reader { diagnostics, absences, mut left_out, .. } = reader;
    let mut diagnostics = syntax::combine(&config.source, &errors, diagnostics, absences, &mut left_out);
    if !diagnostics.iter().any(Diagnostic::is_error) {
        diagnostics.extend(check::unused(&config, &places));
    }
    let diagnostics = shown_part(diagnostics, left_out);
    if diagnostics.iter().any(Diagnostic::is_error) { Err(diagnostics) } else { Ok((config, diagnostics)) }
}

/// Reads all tables. With them, the errors of each file as TOML.
fn read(source: &Source) -> (Parser, Root, Vec<Vec<Error>>) {
    let shared_from = source.repository_start();
    let mut parser = Parser { local: source.local_files().count(), shared_from, ..Parser::default() };
    source.findings.iter().for_each(|finding| parser.reader.push(finding.clone()));
    let trees: Vec<_> =
        source.files().iter().map(|file| DeTable::parse_recoverable(&source.text[file.range.clone()])).collect();
    let roots = source.files().iter().zip(&trees);
    let roots: Vec<_> = roots.map(|(file, (tree, _))| parser.file(file, tree.get_ref())).collect();
    let root = parser.root(&roots);
    (parser, root, trees.into_iter().map(|(_, errors)| errors).collect())
}

/// Reads `[source]` alone: what it names has to be fetched before the whole can be read. Errors are
/// those of this table, and with them whatever else is wrong with the files.
pub fn repository(source: &Source) -> Result<Option<Repository>, Vec<Diagnostic>> {
    let mut reader = Reader::default();
    let file = &source.files()[0];
    let (tree, errors) = DeTable::parse_recoverable(&source.text[file.range.clone()]);
    let root = reader.root(tree.get_ref(), TOP_LEVEL, file.range.start, keys::ROOT);
    let Some(field) = root.get("source") else { return Ok(None) };
    let mut reader = Reader::default();
    let repository = repository::read(&mut reader, field);
    let Reader { diagnostics, absences, mut left_out, .. } = reader;
    let own = syntax::combine(source, &[errors], diagnostics, absences.clone(), &mut left_out);
    if !own.iter().any(Diagnostic::is_error) {
        return Ok(repository);
    }
    let (Parser { reader: Reader { diagnostics, mut left_out, .. }, .. }, _, errors) = read(source);
    // What is nowhere here may be in the repository; not so of this table.
    let diagnostics = syntax::combine(source, &errors, diagnostics, absences, &mut left_out);
    Err(shown_part(diagnostics, left_out))
}

/// An error with the repository, at the key of `[source]` that it depends on, or at `git` where
/// that key has its default.
pub fn at_source(source: &Source, key: &str, message: &str, remedy: &str) -> LoadError {
    let file = &source.files()[0];
    let (tree, _) = DeTable::parse_recoverable(&source.text[file.range.clone()]);
    let table = tree.get_ref().get("source").and_then(|value| value.get_ref().as_table());
    let span = table.and_then(|table| table.get(key).or_else(|| table.get("git"))).map_or(0..0, toml::Spanned::span);
    let diagnostic = Diagnostic::error(Source::placed(file, &span), message, remedy);
    LoadError::Report { source: Arc::new(source.clone()), diagnostics: vec![diagnostic] }
}

/// First 16 hex digits of the SHA-256 of the files that all entrance nodes share.
fn hash(source: &Source) -> String {
    let mut hasher = Sha256::new();
    source.shared_texts().for_each(|text| hasher.update(text));
    let first = hasher.finalize()[..8].iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
    format!("{first:016x}")
}

/// How messages call the root of the file that the user named.
const TOP_LEVEL: &str = "the top level";

#[derive(Default)]
struct Parser {
    reader: Reader,
    places: Places,
    /// Upstreams by name.
    upstreams: HashMap<Arc<str>, usize>,
    /// How many of the files, the first ones, lie on this machine.
    local: usize,
    /// Where the files of a repository begin.
    shared_from: usize,
    /// Addresses to listen on up to now.
    binds: usize,
}

/// The one table in a table, where that has nothing else and none of `keys`.
fn dotted<'t>(field: Field<'t>, keys: &[Key]) -> Option<(&'t str, Field<'t>)> {
    match &field.children()?[..] {
        [inner] if inner.is_table() && !keys::has(keys, inner.key) => Some((inner.key, *inner)),
        _ => None,
    }
}

/// Stands in for a reference that was reported as an error.
const NOWHERE: usize = usize::MAX;

/// What stands at the top level.
struct Root {
    engine: EngineChoice,
    listeners: Vec<Listener>,
    upstreams: Vec<Upstream>,
    routes: Vec<Route>,
    limits: Limits,
    admin: Admin,
    resolver: Resolver,
    tailnet: Tailnet,
    on_removed_route: OnRemovedRoute,
    watch: bool,
    repository: Option<Repository>,
}

impl Parser {
    /// The root table of one file.
    fn file<'t>(&mut self, file: &File, table: &'t DeTable<'t>) -> Section<'t> {
        let (name, keys) = match file.role {
            Role::Main => (TOP_LEVEL, keys::ROOT),
            Role::Included | Role::RepositoryIncluded => ("the top level of an included file", keys::INCLUDED),
            Role::Repository => ("the top level of the repository's file", keys::ROOT),
        };
        let root = self.reader.root(table, name, file.range.start, keys);
        if file.role.is_of_repository() {
            self.refuse_node_only(&root, keys::NODE_ONLY);
        }
        root
    }

    /// Reports what a repository has no business to say.
    fn refuse_node_only(&mut self, section: &Section<'_>, keys: &[&str]) {
        for (span, field) in section.entries() {
            if keys.contains(&field.key) {
                self.reader.error(
                    span,
                    format!("`{}` belongs to the node alone: a repository may not set it", field.key),
                    "move it into the node's own file, the one that the daemon is started with",
                );
            }
        }
    }

    fn root(&mut self, roots: &[Section<'_>]) -> Root {
        let own = &roots[..self.local];
        let engine = self.once(own, "engine").and_then(|field| self.reader.choice(field, &EngineChoice::WORDS));
        let on_removed_route =
            self.once(roots, "on_removed_route").and_then(|field| self.reader.choice(field, &OnRemovedRoute::WORDS));
        // Its patterns were looked at when the files were read.
        for field in roots.iter().filter_map(|root| root.get("include")) {
            self.reader.strings(field, "a file name or a pattern", "\"routes.d/*.toml\"");
        }
        let main = own.first();
        let watch = main.and_then(|main| main.get("watch")).and_then(|field| self.reader.boolean(field));
        let repository =
            main.and_then(|main| main.get("source")).and_then(|field| repository::read(&mut self.reader, field));
        let (tailnet, prefer_direct) = self.tailnet(own);
        let upstreams = self.upstreams(roots, prefer_direct);
        self.upstreams = upstreams.iter().enumerate().map(|(index, u)| (u.name.clone(), index)).collect();
        let listeners = self.listeners(roots, &upstreams);
        let routes = self.routes(roots, &listeners, &upstreams);
        Root {
            engine: engine.unwrap_or(EngineChoice::Auto),
            listeners,
            upstreams,
            routes,
            limits: self.limits(roots),
            admin: self.admin(own),
            resolver: self.resolver(own),
            tailnet,
            on_removed_route: on_removed_route.unwrap_or(OnRemovedRoute::Drain),
            watch: watch.unwrap_or(false),
            repository,
        }
    }

    /// The value of a key that only one of the files may have.
    fn once<'t>(&mut self, roots: &[Section<'t>], key: &str) -> Option<Field<'t>> {
        let mut fields = roots.iter().filter_map(|root| root.get(key));
        let first = fields.next()?;
        for again in fields {
            self.defined_twice(again.span(), &format!("`{key}`"), first.span());
        }
        Some(first)
    }

    fn defined_twice(&mut self, again: Span, what: &str, first: Span) {
        let message = format!("{what} is defined in another file already");
        let diagnostic = Diagnostic::error(again, message, "keep one of the two; all files are read as one");
        self.reader.push(diagnostic.note(first, "first defined here"));
    }

    /// The tables below `[listeners]` or `[upstreams]`, in the order of the files.
    fn named<'t>(&mut self, roots: &[Section<'t>], key: &str, keys: &[Key]) -> Vec<(Span, Arc<str>, Section<'t>)> {
        let mut sections = Vec::new();
        let mut seen: HashMap<&'t str, Span> = HashMap::new();
        for field in roots.iter().filter_map(|root| root.get(key)) {
            let Some(all) = self.reader.any_section(field, format!("[{key}.NAME]")) else { continue };
            for (span, field) in all.entries() {
                let name = field.key;
                if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')) {
                    self.reader.error(
                        span.clone(),
                        format!("{} is no name for one of `{key}`", quoted(name)),
                        "use letters, digits, `-`, `_` and `.`: names stand in metrics and log lines",
                    );
                }
                if let Some(first) = seen.get(name) {
                    self.defined_twice(span.clone(), &format!("[{key}.{name}]"), first.clone());
                } else {
                    seen.insert(name, span.clone());
                }
                if let Some((inner, field)) = dotted(field, keys) {
                    let message =
                        format!("[{key}.{name}.{inner}] is a table in [{key}.{name}]: a name with a dot needs quotes");
                    self.reader.error(span.clone(), message, format!("write `[{key}.\"{name}.{inner}\"]`"));
                    // It is there, under the name that was meant.
                    let name = format!("{name}.{inner}");
                    if let Some(section) = self.reader.section(field, format!("[{key}.{name}]"), keys) {
                        sections.push((span, Arc::from(name), section));
                    }
                    continue;
                }
                if let Some(section) = self.reader.section(field, format!("[{key}.{name}]"), keys) {
                    sections.push((span, Arc::from(name), section));
                }
            }
        }
        sections
    }
}
