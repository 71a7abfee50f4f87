//! Puts the files of a configuration together; what can go wrong before there is text to point
//! into.
//!
//! Where files are is the business of [`Files`]; what they say is the parser's.

use std::collections::HashSet;
use std::fmt;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use toml::de::{DeTable, DeValue};

use super::source::Role;
use super::{Diagnostic, Source, Span};

/// Bytes of all files of a configuration together: room for some 20,000 hosts, and read within a
/// moment however wrong it is.
pub const LARGEST: usize = 1 << 20;

/// Files of a configuration, and entries of one `include`.
const MOST_FILES: usize = 1000;

/// `*` in one pattern: each may stand for any part of a name, and all combinations are tried.
const MOST_WILDCARDS: usize = 3;

/// Where included files are.
pub trait Files {
    /// The files that a pattern, seen from a folder, matches, sorted by name; one without wildcards
    /// matches itself, whether it is there or not.
    ///
    /// # Errors
    /// Why it is no pattern, or what could not be listed.
    fn matching(&self, folder: &Path, pattern: &str) -> Result<Vec<PathBuf>, String>;

    /// The bytes of a file; of a larger one than [`LARGEST`] enough to see that it is.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;
}

/// In the place of a file's name.
const STANDARD_INPUT: &str = "-";

const LARGER: &str = "larger than 1MiB";

/// Why there is no configuration.
#[derive(Debug)]
pub enum LoadError {
    /// The file could not be read.
    Unreadable {
        /// As given by the user.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The file is not text.
    NotUtf8 {
        /// As given by the user.
        path: PathBuf,
        /// Where the first byte is that cannot be; from 1.
        line: usize,
    },
    /// With this file the configuration is larger than [`LARGEST`].
    TooLarge {
        /// As given by the user.
        path: PathBuf,
    },
    /// The files were read, and are wrong.
    Report {
        /// For rendering.
        source: Arc<Source>,
        /// At least one error; warnings too, in the order of the files.
        diagnostics: Vec<Diagnostic>,
    },
}

/// Reads a file of this machine, and what it includes.
pub fn read(path: &Path) -> Result<Source, LoadError> {
    let bytes = Disk.read(path).map_err(|error| LoadError::Unreadable { path: path.into(), error })?;
    let text = text(path, bytes, 0)?;
    let mut source = Source::new(path, text);
    include(&mut source, folder_of(path), &Disk, Role::Included, Path::to_path_buf);
    Ok(source)
}

/// Adds the file `path` of a commit, and what it includes.
pub fn add_repository(source: &mut Source, revision: &str, path: &Path, files: &impl Files) -> Result<(), LoadError> {
    let shown = |path: &Path| PathBuf::from(format!("{}:{}", &revision[..revision.len().min(12)], path.display()));
    let bytes = files.read(path).map_err(|error| LoadError::Unreadable { path: shown(path), error })?;
    let text = text(&shown(path), bytes, source.text.len())?;
    source.revision = Some(revision.to_owned());
    source.add(shown(path), &text, Role::Repository);
    include(source, folder_of(path), files, Role::RepositoryIncluded, shown);
    Ok(())
}

/// Reads the file `path` of a repository alone, and what it includes.
pub fn read_repository(path: &Path, files: &impl Files) -> Result<Source, LoadError> {
    let bytes = files.read(path).map_err(|error| LoadError::Unreadable { path: path.into(), error })?;
    let mut source = Source::of_repository(path, text(path, bytes, 0)?);
    include(&mut source, folder_of(path), files, Role::RepositoryIncluded, Path::to_path_buf);
    Ok(source)
}

fn folder_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new(""))
}

/// The text of a file, beside as much of others.
fn text(path: &Path, bytes: Vec<u8>, beside: usize) -> Result<String, LoadError> {
    if bytes.len() + beside > LARGEST {
        return Err(LoadError::TooLarge { path: path.into() });
    }
    utf8(path, bytes)
}

fn utf8(path: &Path, bytes: Vec<u8>) -> Result<String, LoadError> {
    String::from_utf8(bytes).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        LoadError::NotUtf8 { path: path.into(), line: valid.split(|byte| *byte == b'\n').count() }
    })
}

/// Adds what the last file of `source` includes, from `folder` on.
fn include(source: &mut Source, folder: &Path, files: &impl Files, role: Role, shown: impl Fn(&Path) -> PathBuf) {
    let Some(including) = source.files().last().cloned() else { return };
    let mut seen: HashSet<PathBuf> = HashSet::from([including.path.clone()]);
    let patterns = patterns(&source.text[including.range.clone()]);
    if let Some((span, _)) = patterns.get(MOST_FILES) {
        source.findings.push(too_many_files(Source::placed(&including, span)));
        return;
    }
    for (span, pattern) in patterns {
        let span = Source::placed(&including, &span);
        if role == Role::Included {
            let fixed = folder.join(&pattern);
            let fixed = fixed.ancestors().find(|path| !is_pattern(&path.to_string_lossy()));
            source.folders.extend(fixed.map(Path::to_path_buf));
        }
        let found = match files.matching(folder, &pattern) {
            Ok(found) => found,
            Err(error) => {
                let remedy = "write the path of a file or a pattern: \"routes.d/*.toml\"";
                source.findings.push(Diagnostic::error(span, format!("`{pattern}`: {error}"), remedy));
                continue;
            }
        };
        if seen.len() + found.len() > MOST_FILES {
            source.findings.push(too_many_files(span));
            return;
        }
        if found.is_empty() {
            let message = format!("`{pattern}` matches no file");
            let remedy = format!("patterns are looked up from the folder of {}", including.path.display());
            source.findings.push(Diagnostic::warning(span.clone(), message, remedy));
        }
        // A file that is matched twice, or by its own pattern, is read once.
        for file in found.into_iter().filter(|file| seen.insert(shown(file))) {
            let beside = source.text.len();
            let text = files.read(&file).map_err(|error| error.to_string()).and_then(|bytes| {
                text(&file, bytes, beside).map_err(|error| match error {
                    LoadError::TooLarge { .. } => format!("all files together are {LARGER}"),
                    _ => "it is not UTF-8 text".to_owned(),
                })
            });
            match text {
                Ok(text) => source.add(shown(&file), &text, role),
                Err(error) => {
                    let message = format!("cannot read {}: {error}", shown(&file).display());
                    let remedy = "name files that are there and can be read";
                    source.findings.push(Diagnostic::error(span.clone(), message, remedy));
                }
            }
        }
    }
}

fn too_many_files(span: Span) -> Diagnostic {
    let message = format!("more than {MOST_FILES} files would be included");
    Diagnostic::error(span, message, "put what belongs together into one file")
}

/// What a file includes: the entries of `include`, as many as are looked at.
pub fn includes(text: &str) -> Vec<String> {
    patterns(text).into_iter().take(MOST_FILES).map(|(_, pattern)| pattern).collect()
}

/// The strings of `include`; whatever is wrong with the file is told when it is parsed.
fn patterns(text: &str) -> Vec<(Span, String)> {
    let (table, _) = DeTable::parse_recoverable(text);
    let list = table.get_ref().get("include").and_then(|value| value.get_ref().as_array());
    let strings = list.into_iter().flat_map(|items| items.iter()).filter_map(|item| match item.get_ref() {
        DeValue::String(text) => Some((item.span(), text.to_string())),
        _ => None,
    });
    strings.collect()
}

/// `*` stands for a part of one name; names that begin with a dot have to be written out: editors
/// leave such files behind.
pub const WILDCARDS: glob::MatchOptions =
    glob::MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: true };

/// Whether it may match more than one file.
pub fn is_pattern(text: &str) -> bool {
    text.contains(['*', '?', '['])
}

/// The pattern as the library has it.
///
/// # Errors
/// Why it is none.
pub fn glob(pattern: &str) -> Result<glob::Pattern, String> {
    if pattern.matches('*').count() > MOST_WILDCARDS {
        return Err(format!("it has more than {MOST_WILDCARDS} `*`"));
    }
    glob::Pattern::new(pattern).map_err(|error| error.to_string())
}

struct Disk;

impl Files for Disk {
    fn matching(&self, folder: &Path, pattern: &str) -> Result<Vec<PathBuf>, String> {
        if !is_pattern(pattern) {
            return Ok(vec![folder.join(pattern)]);
        }
        glob(pattern)?;
        let folder = glob::Pattern::escape(&folder.to_string_lossy());
        let found = glob::glob_with(&Path::new(&folder).join(pattern).to_string_lossy(), WILDCARDS);
        let found: Result<Vec<_>, _> = found.map_err(|error| error.to_string())?.collect();
        Ok(found.map_err(|error| error.to_string())?.into_iter().filter(|path| !path.is_dir()).collect())
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let file: Box<dyn io::Read> = if path == Path::new(STANDARD_INPUT) {
            Box::new(io::stdin())
        } else {
            Box::new(std::fs::File::open(path)?)
        };
        file.take(LARGEST as u64 + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

impl LoadError {
    /// What `dataplane check --format json` lists.
    pub fn json(&self) -> Vec<serde_json::Value> {
        let whole = |file: &Path, line: Option<usize>, message: String| {
            vec![serde_json::json!({
                "severity": "error", "file": file, "line": line, "column": line.map(|_| 1), "end_line": line, "end_column": line.map(|_| 1),
                "message": message, "help": self.to_string().rsplit_once("help: ").map(|(_, help)| help), "note": null,
            })]
        };
        match self {
            Self::Unreadable { path, error } => whole(path, None, format!("cannot read the configuration: {error}")),
            Self::NotUtf8 { path, line } => whole(path, Some(*line), "this is not UTF-8".into()),
            Self::TooLarge { path } => whole(path, None, format!("the configuration is {LARGER}")),
            Self::Report { source, diagnostics } => diagnostics.iter().map(|d| d.json(source)).collect(),
        }
    }
}

impl std::error::Error for LoadError {}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable { path, error } => {
                write!(f, "{}: error: cannot read the configuration: {error}\n  help: ", path.display())?;
                let shown = path.display();
                match error.kind() {
                    io::ErrorKind::NotFound => match path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
                        Some(parent) if !parent.exists() => write!(
                            f,
                            "write a starter configuration with `mkdir -p {} && dataplane init > {shown}`",
                            parent.display()
                        ),
                        _ => write!(f, "write a starter configuration with `dataplane init > {shown}`"),
                    },
                    io::ErrorKind::PermissionDenied => {
                        write!(f, "run as a user who may read it, or allow it: `ls -l {shown}` shows who may")
                    }
                    io::ErrorKind::IsADirectory => {
                        write!(f, "name the file in it: `--config {}`", path.join("dataplane.toml").display())
                    }
                    _ => write!(f, "name another file with `--config FILE`"),
                }
            }
            Self::NotUtf8 { path, line } => {
                write!(f, "{}:{line}: error: this is not UTF-8\n  help: save the file as UTF-8 text", path.display())
            }
            Self::TooLarge { path } => write!(
                f,
                "{}: error: with this file the configuration is {LARGER}\n  help: name the file that is meant; 1MiB holds some 20,000 hosts, and more where a wildcard stands for many",
                path.display()
            ),
            Self::Report { source, diagnostics } => {
                for diagnostic in diagnostics {
                    write!(f, "{}", diagnostic.render(source))?;
                }
                let errors = diagnostics.iter().filter(|diagnostic| diagnostic.is_error()).count();
                let warnings = diagnostics.len() - errors;
                write!(f, "{}: {}", source.path.display(), count(errors, "error"))?;
                if warnings > 0 { write!(f, ", {}", count(warnings, "warning")) } else { Ok(()) }
            }
        }
    }
}

fn count(number: usize, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}
