//! Configurations of other programs, written as ours.
//!
//! What has no counterpart is never guessed at: it becomes a [`Note`] with its place. Knows nothing
//! of the running daemon.

mod nginx;
mod syntax;
#[cfg(test)]
mod tests;

use std::fmt;
use std::path::Path;

use anyhow::Result;

use crate::config::shown;

pub use syntax::Place;

/// A configuration of ours that passes `dataplane check`, and what its owner has to know.
#[derive(Debug)]
pub struct Imported {
    /// The text of the file.
    pub toml: String,
    /// In the order of the files.
    pub notes: Vec<Note>,
}

/// Characters of a note that are shown.
const LONGEST_NOTE: usize = 500;

/// Something that was not carried over, or not as it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// Where it stands.
    pub place: Place,
    /// What it is and what to do.
    pub message: String,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // It may quote what the file says, which may be anything.
        let message: String = self.message.chars().take(LONGEST_NOTE).map(shown).collect();
        let more = if self.message.chars().nth(LONGEST_NOTE).is_some() { "…" } else { "" };
        write!(f, "{}: {message}{more}", self.place)
    }
}

/// Reads the `stream` blocks of nginx's main configuration file, or of a file that is included in
/// one.
///
/// # Errors
/// A file that cannot be read or is no configuration, or of which nothing could be carried over.
pub fn nginx(path: &Path) -> Result<Imported> {
    let mut notes = Vec::new();
    let directives = syntax::read(path, &mut notes)?;
    nginx::translate(path, &directives, notes)
}
