//! The text of a configuration: one file or several, told apart by their places in one long text.
//!
//! Positions count through all files, as if they stood one after the other; so a [`Span`] alone
//! says in which file it lies.

use std::ops::Range;
use std::path::{Path, PathBuf};

use super::{Diagnostic, Span};

/// The text that a configuration was read from; diagnostics quote it.
#[derive(Debug, Clone)]
pub struct Source {
    /// The file that the user named, as given.
    pub path: PathBuf,
    /// All files one after the other, each with a newline behind it that is not part of it.
    pub text: String,
    /// The commit of the files that are of a repository.
    pub revision: Option<String>,
    /// Where `include` looks for files, besides the folders of those that it found; of this machine
    /// alone.
    pub folders: Vec<PathBuf>,
    files: Vec<File>,
    /// What was noticed while the files were put together.
    pub(super) findings: Vec<Diagnostic>,
}

/// One file of a [`Source`].
#[derive(Debug, Clone)]
pub(super) struct File {
    /// As shown to people.
    pub(super) path: PathBuf,
    /// Its part of the text.
    pub(super) range: Range<usize>,
    pub(super) role: Role,
}

/// What a file may say follows from how it came to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// The one that the user named.
    Main,
    /// Named by `include`.
    Included,
    /// The file in the repository of `[source]`.
    Repository,
    /// Named by `include` there.
    RepositoryIncluded,
}

impl Role {
    pub(super) const fn is_of_repository(self) -> bool {
        matches!(self, Self::Repository | Self::RepositoryIncluded)
    }
}

impl Source {
    /// Of one file.
    pub fn new(path: impl Into<PathBuf>, text: String) -> Self {
        let path = path.into();
        let file = File { path: path.clone(), range: 0..text.len(), role: Role::Main };
        Self { path, text: text + "\n", revision: None, folders: Vec::new(), files: vec![file], findings: Vec::new() }
    }

    /// Of a repository's file alone.
    pub fn of_repository(path: impl Into<PathBuf>, text: String) -> Self {
        let mut source = Self::new(path, text);
        source.files[0].role = Role::Repository;
        source
    }

    /// Where the files of a repository begin.
    pub(super) fn repository_start(&self) -> usize {
        let mut of_repository = self.files.iter().filter(|file| file.role.is_of_repository());
        of_repository.next().map_or(usize::MAX, |file| file.range.start)
    }

    pub(super) fn add(&mut self, path: PathBuf, text: &str, role: Role) {
        let start = self.text.len();
        self.text += text;
        self.files.push(File { path, range: start..self.text.len(), role });
        self.text.push('\n');
    }

    pub(super) fn files(&self) -> &[File] {
        &self.files
    }

    /// The files that lie on this machine.
    pub fn local_files(&self) -> impl Iterator<Item = &Path> {
        self.local_texts().map(|(path, _)| path)
    }

    /// The same, with what they say.
    pub fn local_texts(&self) -> impl Iterator<Item = (&Path, &str)> {
        let local = |file: &&File| !file.role.is_of_repository();
        self.files.iter().filter(local).map(|file| (&*file.path, &self.text[file.range.clone()]))
    }

    /// Without what came from a repository: as it was read from this machine.
    #[must_use]
    pub fn local(&self) -> Self {
        let mut local = Self { revision: None, ..self.clone() };
        local.files.retain(|file| !file.role.is_of_repository());
        local.text.truncate(local.files.last().map_or(0, |file| file.range.end + 1));
        local.findings.retain(|finding| finding.span.start < local.text.len());
        local
    }

    /// The texts that are the same on all entrance nodes: those of the repository, or else all.
    pub(super) fn shared_texts(&self) -> impl Iterator<Item = &str> {
        let of_repository = |file: &&File| file.role.is_of_repository();
        let any = self.files.iter().any(|file| of_repository(&file));
        self.files.iter().filter(move |file| !any || of_repository(file)).map(|file| &self.text[file.range.clone()])
    }

    /// The file of a position.
    pub(super) fn file(&self, offset: usize) -> &File {
        let after = self.files.partition_point(|file| file.range.start <= offset);
        &self.files[after.max(1) - 1]
    }

    /// The file of a position, line and column, both from 1; columns count characters.
    pub fn position(&self, offset: usize) -> (&Path, usize, usize) {
        let file = self.file(offset);
        let offset = self.floor(offset.min(file.range.end));
        let start = self.line_start(offset);
        let line = self.text[file.range.start..start].matches('\n').count() + 1;
        (&file.path, line, self.text[start..offset].chars().count() + 1)
    }

    /// The line around a position, without its end.
    pub(super) fn line_at(&self, offset: usize) -> &str {
        let rest = &self.text[self.line_start(offset)..];
        let line = rest.split('\n').next().unwrap_or_default();
        line.strip_suffix('\r').unwrap_or(line)
    }

    /// Where the line around a position begins.
    pub(super) fn line_start(&self, offset: usize) -> usize {
        self.text[..self.floor(offset)].rfind('\n').map_or(0, |newline| newline + 1)
    }

    /// The nearest start of a character at or before `offset`.
    pub(super) fn floor(&self, offset: usize) -> usize {
        let mut offset = offset.min(self.text.len());
        while !self.text.is_char_boundary(offset) {
            offset -= 1;
        }
        offset
    }

    /// The place of `span`, which counts from the beginning of a file, in the whole text.
    pub(super) fn placed(file: &File, span: &Span) -> Span {
        file.range.start + span.start..file.range.start + span.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_knows_its_file_also_at_both_ends_of_it() {
        let mut source = Source::new("a.toml", "x = 1\ny".into());
        source.add("b.toml".into(), "", Role::Included);
        source.add("c.toml".into(), "é\nz = 2", Role::Included);
        let at = |offset| {
            let (path, line, column) = source.position(offset);
            format!("{}:{line}:{column}", path.display())
        };
        assert_eq!(at(0), "a.toml:1:1");
        assert_eq!(at(7), "a.toml:2:2");
        assert_eq!(at(8), "b.toml:1:1");
        assert_eq!(at(9), "c.toml:1:1");
        assert_eq!(at(11), "c.toml:1:2");
        assert_eq!(at(12), "c.toml:2:1");
        assert_eq!(at(1000), "c.toml:2:6");
        assert_eq!(source.line_at(7), "y");
        assert_eq!(source.line_at(8), "");
    }
}
