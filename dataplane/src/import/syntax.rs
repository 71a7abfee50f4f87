//! The syntax of nginx's configuration: directives of words, ended by a semicolon or followed by a
//! block. Includes are put in their place.
//!
//! Knows no directive's meaning but `include`'s. There is no crate for this that is kept up, and
//! the syntax is small.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use super::Note;

/// Includes inside each other; deeper is a circle.
const DEEPEST: usize = 16;
/// Their insides have another syntax, or are of no interest.
const CLOSED: [&str; 4] = ["http", "mail", "events", "types"];

/// A line of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// As it was named.
    pub file: Arc<Path>,
    /// From 1.
    pub line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
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
}

/// Reads a file with all that it includes. Paths that are not absolute are looked for beside it, as
/// nginx does.
pub fn read(path: &Path, notes: &mut Vec<Note>) -> Result<Vec<Directive>> {
    let home = path.parent().unwrap_or(Path::new(""));
    expand(parse_file(path)?, home, 0, notes)
}

fn parse_file(path: &Path) -> Result<Vec<Directive>> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse(path, &String::from_utf8_lossy(&bytes))
}

fn expand(directives: Vec<Directive>, home: &Path, depth: usize, notes: &mut Vec<Note>) -> Result<Vec<Directive>> {
    let mut expanded = Vec::new();
    for mut directive in directives {
        let [pattern] = &directive.words[..] else {
            expand_block(&mut directive, home, depth, notes)?;
            expanded.push(directive);
            continue;
        };
        if directive.name != "include" {
            expand_block(&mut directive, home, depth, notes)?;
            expanded.push(directive);
            continue;
        }
        if depth == DEEPEST {
            bail!("{}: error: `include {pattern}` goes round in a circle", directive.place);
        }
        let files = included(&home.join(pattern));
        if files.is_empty() && !is_pattern(pattern) {
            notes.push(Note {
                place: directive.place.clone(),
                message: format!("`include {pattern}`: there is no such file here; what is in it is not carried over"),
            });
        }
        for file in files {
            expanded.extend(expand(parse_file(&file)?, home, depth + 1, notes)?);
        }
    }
    Ok(expanded)
}

fn expand_block(directive: &mut Directive, home: &Path, depth: usize, notes: &mut Vec<Note>) -> Result<()> {
    if let Some(block) = directive.block.take() {
        let closed = CLOSED.contains(&&*directive.name);
        directive.block = Some(if closed { block } else { expand(block, home, depth, notes)? });
    }
    Ok(())
}

fn is_pattern(text: &str) -> bool {
    text.contains(['*', '?', '['])
}

/// The files that an include names, in the order of their names.
fn included(path: &Path) -> Vec<PathBuf> {
    if !is_pattern(&path.to_string_lossy()) {
        return if path.is_file() { vec![path.to_owned()] } else { Vec::new() };
    }
    let found = glob::glob(&path.to_string_lossy()).into_iter().flatten().flatten();
    found.filter(|path| path.is_file()).collect()
}

/// A directive for messages, by its name if it may be one: what is included may be another kind of
/// file, of which a line is one word.
pub(super) fn named(word: &str) -> String {
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
pub(super) fn parse(path: &Path, text: &str) -> Result<Vec<Directive>> {
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
                c if c.is_whitespace() => drop(self.take()),
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
                (None, c) if c.is_whitespace() => return Ok(word),
                (_, '\\') => {
                    self.take();
                    match self.take() {
                        // What else is escaped is a regular expression's, which keeps its
                        // backslash.
                        Some(c @ ('"' | '\'' | '\\' | ' ' | ';' | '{' | '}')) => word.push(c),
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

    fn take(&mut self) -> Option<char> {
        let c = self.text.next();
        if c == Some('\n') {
            self.line += 1;
        }
        c
    }
}
