//! The syntax of nginx's configuration: directives of words, ended by a semicolon or followed by a
//! block. Includes are put in their place; the directive of one that cannot be read remains.
//!
//! Knows no directive's meaning but `include`'s. There is no crate for this that is kept up, and
//! the syntax is small.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use crate::config::shown;

/// Includes inside each other; deeper is a circle.
const DEEPEST: usize = 16;
/// Blocks inside each other; nginx has four.
const DEEPEST_BLOCK: usize = 32;
/// Bytes of all files, those counted again that are included again.
const LARGEST: usize = 64 << 20;
/// Their insides have another syntax, or are of no interest.
const CLOSED: [&str; 4] = ["http", "mail", "events", "types"];
/// What stands before each file in the output of `nginx -T`, and what after its name.
const DUMPED: (&str, &str) = ("# configuration file ", ":");

/// A line of a file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// As it was named.
    pub file: Arc<Path>,
    /// From 1.
    pub line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A file may be called anything.
        let file: String = self.file.display().to_string().chars().map(shown).collect();
        write!(f, "{file}:{}", self.line)
    }
}

/// One directive.
#[derive(Debug, Clone)]
pub struct Directive {
    /// Its first word.
    pub name: String,
    /// The other words, quotes and escapes taken away.
    pub words: Vec<String>,
    /// What follows in braces.
    pub block: Option<Vec<Directive>>,
    /// Of its first word.
    pub place: Place,
}

impl Directive {
    /// The inside of its block.
    pub fn inside(&self) -> &[Self] {
        self.block.as_deref().unwrap_or_default()
    }

    /// Its words as one text.
    pub fn text(&self) -> String {
        self.words.join(" ")
    }

    /// Whether it names a file that could not be read.
    pub fn is_missing_file(&self) -> bool {
        self.name == "include" && self.block.is_none()
    }
}

/// Where included files come from.
enum Files {
    /// This folder, for paths that are not absolute.
    Folder(PathBuf),
    /// The output of `nginx -T`: texts by path, and that folder.
    Dump(BTreeMap<PathBuf, String>, PathBuf),
    Nowhere,
}

/// Reads a file with all that it includes. Paths that are not absolute are looked for beside it, as
/// nginx does.
pub fn read(path: &Path) -> Result<Vec<Directive>> {
    let home = path.parent().unwrap_or(Path::new("")).to_owned();
    if path == Path::new("-") {
        let mut bytes = Vec::new();
        std::io::stdin().take(LARGEST as u64 + 1).read_to_end(&mut bytes).context("cannot read standard input")?;
        return Reading::new(Files::Folder(home)).all(Path::new("stdin"), &String::from_utf8_lossy(&bytes));
    }
    let text = text_of(path).with_context(|| format!("cannot read {}", path.display()))?;
    Reading::new(Files::Folder(home)).all(path, &text)
}

/// Reads a text, and no file.
pub fn read_text(name: &Path, text: &str) -> Result<Vec<Directive>> {
    Reading::new(Files::Nowhere).all(name, text)
}

fn text_of(path: &Path) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(LARGEST as u64 + 1).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

struct Reading {
    files: Files,
    bytes_left: usize,
}

impl Reading {
    fn new(files: Files) -> Self {
        Self { files, bytes_left: LARGEST }
    }

    fn all(mut self, path: &Path, text: &str) -> Result<Vec<Directive>> {
        let Some(mut dumped) = dumped(text) else { return self.file(path, text, 0) };
        let (main, text) = dumped.swap_remove(0);
        let home = main.parent().unwrap_or(Path::new("")).to_owned();
        self.files = Files::Dump(dumped.into_iter().collect(), home);
        self.file(&main, &text, 0)
    }

    fn file(&mut self, path: &Path, text: &str, depth: usize) -> Result<Vec<Directive>> {
        self.bytes_left = match self.bytes_left.checked_sub(text.len()) {
            Some(left) => left,
            None => bail!("{}: error: with this file there are more than {LARGEST} bytes", path.display()),
        };
        self.expand(parse(path, text)?, depth)
    }

    fn expand(&mut self, directives: Vec<Directive>, depth: usize) -> Result<Vec<Directive>> {
        let mut expanded = Vec::new();
        for mut directive in directives {
            if directive.name != "include" || directive.block.is_some() {
                if let Some(block) = directive.block.take() {
                    let closed = CLOSED.contains(&&*directive.name);
                    directive.block = Some(if closed { block } else { self.expand(block, depth)? });
                }
                expanded.push(directive);
                continue;
            }
            let pattern = directive.text();
            if depth == DEEPEST {
                bail!("{}: error: `include {pattern}` goes round in a circle", directive.place);
            }
            let Some(files) = self.included(&pattern) else {
                expanded.push(directive);
                continue;
            };
            for (file, text) in files {
                match text {
                    Some(text) => expanded.extend(self.file(&file, &text, depth + 1)?),
                    None => expanded.push(directive.clone()),
                }
            }
        }
        Ok(expanded)
    }

    /// The files that an include names, in the order of their names, and their texts if they can be
    /// read. `None`: what it names is not known.
    fn included(&self, pattern: &str) -> Option<Vec<(PathBuf, Option<String>)>> {
        match &self.files {
            Files::Nowhere => None,
            Files::Dump(texts, home) => {
                let wanted = home.join(pattern);
                if let Some(text) = texts.get(&wanted) {
                    return Some(vec![(wanted, Some(text.clone()))]);
                }
                if !is_pattern(pattern) {
                    return None;
                }
                let glob = glob::Pattern::new(&as_glob(&wanted)).ok()?;
                let fits = |path: &Path| glob.matches_path_with(path, GLOB) && !is_hidden(path, &wanted);
                let found = texts.iter().filter(|(path, _)| fits(path));
                Some(found.map(|(path, text)| (path.clone(), Some(text.clone()))).collect())
            }
            Files::Folder(home) => {
                let path = home.join(pattern);
                let read = |path: PathBuf| {
                    let text = text_of(&path).ok();
                    (path, text)
                };
                if !is_pattern(pattern) {
                    return path.is_file().then(|| vec![read(path)]);
                }
                let found = glob::glob_with(&as_glob(&path), GLOB).ok()?;
                let found = found.flatten().filter(|found| found.is_file() && !is_hidden(found, &path));
                Some(found.map(read).collect())
            }
        }
    }
}

/// Whether a part of a path begins with a dot that the pattern does not have. From the end, for a
/// `./` at the beginning of the pattern is not in what is found.
fn is_hidden(path: &Path, pattern: &Path) -> bool {
    let begins = |part: std::path::Component<'_>| part.as_os_str().as_encoded_bytes().starts_with(b".");
    path.components().rev().zip(pattern.components().rev()).any(|(part, pattern)| begins(part) && !begins(pattern))
}

/// As glob(3) without flags, but for [`is_hidden`].
const GLOB: glob::MatchOptions =
    glob::MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: false };

/// A pattern of glob(3) in the words of the crate: there `**` is any depth, and `[^` no negation.
fn as_glob(pattern: &Path) -> String {
    let mut text = pattern.to_string_lossy().replace("[^", "[!");
    while text.contains("**") {
        text = text.replace("**", "*");
    }
    text
}

/// The files in the output of `nginx -T`, the main one first.
fn dumped(text: &str) -> Option<Vec<(PathBuf, String)>> {
    let path = |line: &str| line.strip_prefix(DUMPED.0)?.strip_suffix(DUMPED.1).map(PathBuf::from);
    // What nginx says on stderr may stand before.
    let mut lines = text.lines().skip_while(|line| line.starts_with("nginx: ") || line.trim().is_empty());
    let mut files = vec![(path(lines.next()?)?, String::new())];
    for line in lines {
        match path(line) {
            Some(path) => files.push((path, String::new())),
            None => files.last_mut()?.1.extend([line, "\n"]),
        }
    }
    Some(files)
}

fn is_pattern(text: &str) -> bool {
    text.contains(['*', '?', '['])
}

/// A directive for messages, by its name if it may be one: what is included may be another kind of
/// file, of which a line is one word.
pub fn named(word: &str) -> String {
    /// nginx has none that is longer.
    const LONGEST: usize = 40;
    let is_name = word.len() <= LONGEST && word.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    if is_name { format!("`{word}`") } else { "this directive".to_owned() }
}

/// A word, or what stands between words.
#[derive(Debug, PartialEq)]
enum Token {
    Word(String),
    Semicolon,
    Open,
    Close,
}

/// Reads one file's text.
pub fn parse(path: &Path, text: &str) -> Result<Vec<Directive>> {
    let file: Arc<Path> = path.into();
    let at = |line| Place { file: file.clone(), line };
    // The directives of each block that is open, and the directive that the block belongs to.
    let mut open: Vec<(Vec<Directive>, Option<Directive>)> = vec![(Vec::new(), None)];
    let mut words: Vec<(usize, String)> = Vec::new();
    let mut lexer = Lexer { text: text.trim_start_matches('\u{feff}').chars().peekable(), line: 1 };
    while let Some((line, token)) =
        lexer.token().map_err(|(line, what)| anyhow::anyhow!("{}: error: {what}", at(line)))?
    {
        let directive = |words: &mut Vec<(usize, String)>| {
            let mut all = std::mem::take(words).into_iter();
            let (line, name) = all.next()?;
            Some(Directive { name, words: all.map(|(_, word)| word).collect(), block: None, place: at(line) })
        };
        match token {
            Token::Word(word) => words.push((line, word)),
            Token::Semicolon => {
                let Some(directive) = directive(&mut words) else {
                    bail!("{}: error: `;` ends nothing", at(line));
                };
                open.last_mut().expect("the file is never closed").0.push(directive);
            }
            Token::Open => {
                let Some(directive) = directive(&mut words) else {
                    bail!("{}: error: `{{` belongs to nothing", at(line));
                };
                if directive.name.ends_with("_by_lua_block") {
                    lexer.skip_lua().map_err(|line| anyhow::anyhow!("{}: error: this block does not end", at(line)))?;
                    let directive = Directive { block: Some(Vec::new()), ..directive };
                    open.last_mut().expect("the file is never closed").0.push(directive);
                    continue;
                }
                if open.len() == DEEPEST_BLOCK {
                    bail!("{}: error: there are blocks inside each other, {DEEPEST_BLOCK} deep", at(line));
                }
                open.push((Vec::new(), Some(directive)));
            }
            Token::Close => {
                if let Some((line, word)) = words.first() {
                    bail!("{}: error: {} is not ended by `;`", at(*line), named(word));
                }
                let Some((inside, Some(mut directive))) = open.pop() else {
                    bail!("{}: error: `}}` closes nothing", at(line));
                };
                directive.block = Some(inside);
                open.last_mut().expect("the file is never closed").0.push(directive);
            }
        }
    }
    if let Some((line, word)) = words.first() {
        bail!("{}: error: {} is not ended by `;`", at(*line), named(word));
    }
    match open.pop() {
        Some((_, Some(directive))) => {
            bail!("{}: error: the block of {} is not closed", directive.place, named(&directive.name))
        }
        Some((directives, None)) => Ok(directives),
        None => unreachable!("the file is never closed"),
    }
}

struct Lexer<'a> {
    text: std::iter::Peekable<std::str::Chars<'a>>,
    line: usize,
}

impl Lexer<'_> {
    /// The next token and its line; an error with its line.
    fn token(&mut self) -> Result<Option<(usize, Token)>, (usize, String)> {
        while let Some(c) = self.text.peek() {
            match c {
                '#' => {
                    while self.text.peek().is_some_and(|c| *c != '\n') {
                        self.take();
                    }
                }
                ' ' | '\t' | '\r' | '\n' => drop(self.take()),
                _ => break,
            }
        }
        let line = self.line;
        let token = match self.text.peek() {
            None => return Ok(None),
            Some(';') => Token::Semicolon,
            Some('{') => Token::Open,
            Some('}') => Token::Close,
            Some(_) => return self.word().map(|word| Some((line, Token::Word(word)))),
        };
        self.take();
        Ok(Some((line, token)))
    }

    fn word(&mut self) -> Result<String, (usize, String)> {
        let begin = self.line;
        let mut word = String::new();
        let quote = self.text.next_if(|c| matches!(c, '"' | '\''));
        while let Some(c) = self.text.peek().copied() {
            match (quote, c) {
                (Some(quote), c) if c == quote => {
                    self.take();
                    return Ok(word);
                }
                (None, ';' | '{') if !(c == '{' && word.ends_with('$')) => return Ok(word),
                (None, ' ' | '\t' | '\r' | '\n') => return Ok(word),
                (_, '\\') => {
                    self.take();
                    match self.take() {
                        Some(c @ ('"' | '\'' | '\\')) => word.push(c),
                        Some('t') => word.push('\t'),
                        Some('r') => word.push('\r'),
                        Some('n') => word.push('\n'),
                        // What else is escaped keeps its backslash (ngx_conf_read_token).
                        Some(c) => word.extend(['\\', c]),
                        None => word.push('\\'),
                    }
                }
                _ => word.extend(self.take()),
            }
        }
        match quote {
            Some(quote) => Err((begin, format!("a text that begins with {quote} does not end"))),
            None => Ok(word),
        }
    }

    /// Goes behind the brace that ends a block of Lua; an error with the line of its beginning.
    fn skip_lua(&mut self) -> Result<(), usize> {
        let begin = self.line;
        let mut depth = 1;
        while depth > 0 {
            match self.take().ok_or(begin)? {
                '{' => depth += 1,
                '}' => depth -= 1,
                '-' if self.text.peek() == Some(&'-') => while self.take().ok_or(begin)? != '\n' {},
                quote @ ('"' | '\'') => loop {
                    match self.take().ok_or(begin)? {
                        '\\' => drop(self.take()),
                        c if c == quote => break,
                        _ => {}
                    }
                },
                _ => {}
            }
        }
        Ok(())
    }

    fn take(&mut self) -> Option<char> {
        let c = self.text.next();
        if c == Some('\n') {
            self.line += 1;
        }
        c
    }
}
