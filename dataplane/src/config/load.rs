//! Reads the configuration file; what can go wrong before there is text to point into.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Config, Diagnostic, Source, parse};

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
    /// The file was read, and is wrong.
    Report {
        /// For rendering.
        source: Arc<Source>,
        /// At least one error; warnings too, in the order of the file.
        diagnostics: Vec<Diagnostic>,
    },
}

/// Reads and checks a file. The list holds warnings.
pub fn load(path: &Path) -> Result<(Config, Vec<Diagnostic>), LoadError> {
    let bytes = std::fs::read(path).map_err(|error| LoadError::Unreadable { path: path.into(), error })?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        LoadError::NotUtf8 { path: path.into(), line: valid.split(|byte| *byte == b'\n').count() }
    })?;
    let source = Arc::new(Source { path: path.into(), text });
    parse(source.clone()).map_err(|diagnostics| LoadError::Report { source, diagnostics })
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
