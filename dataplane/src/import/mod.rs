//! Configurations of other programs, written as ours.
//!
//! A name goes where the other program sends it, or is refused, and then a [`Note`] says so. Knows
//! nothing of the running daemon.

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
    /// What is lost first, each kind in the order of the files.
    pub notes: Vec<Note>,
}

impl Imported {
    /// Whether something was lost.
    pub fn has_losses(&self) -> bool {
        self.notes.iter().any(|note| note.kind == Kind::Lost)
    }
}

/// How much a note matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Something does less than it did, or its owner has to do something.
    Lost,
    /// It is as it was, by other means.
    Changed,
    /// It has no counterpart and needs none.
    Needless,
}

/// Characters of a note that are shown.
const LONGEST_NOTE: usize = 500;

/// Something that was not carried over, or not as it was.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Note {
    /// How much it matters.
    pub kind: Kind,
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
        let kind = match self.kind {
            Kind::Lost => "lost: ",
            Kind::Changed | Kind::Needless => "",
        };
        write!(f, "{}: {kind}{message}{more}", self.place)
    }
}

/// Reads the `stream` block of nginx's main configuration file, of a file that is included in one,
/// or of the output of `nginx -T`. `-` is standard input.
///
/// # Errors
/// A file that cannot be read or is no configuration, or of which nothing could be carried over.
pub fn nginx(path: &Path) -> Result<Imported> {
    nginx::translate(path, &syntax::read(path)?)
}

/// The same for a text. No other file is read.
///
/// # Errors
/// As [`nginx`].
pub fn nginx_text(name: &Path, text: &str) -> Result<Imported> {
    nginx::translate(name, &syntax::read_text(name, text)?)
}
