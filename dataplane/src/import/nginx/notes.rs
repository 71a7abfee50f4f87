//! What has to be told, each once.

use std::collections::HashSet;

use super::super::syntax::{Directive, Place, named};
use super::super::{Kind, Note};

/// The notes of one import.
#[derive(Default)]
pub struct Notes {
    notes: Vec<Note>,
    seen: HashSet<Note>,
}

impl Notes {
    /// Something does less than it did.
    pub fn lost(&mut self, place: &Place, message: impl Into<String>) {
        self.add(Kind::Lost, place, message.into());
    }

    /// It is as it was, by other means.
    pub fn changed(&mut self, place: &Place, message: impl Into<String>) {
        self.add(Kind::Changed, place, message.into());
    }

    /// A directive that needs no counterpart.
    pub fn needless(&mut self, directive: &Directive) {
        self.add(Kind::Needless, &directive.place, named(&directive.name));
    }

    /// Something of a directive that needs no counterpart.
    pub fn needless_part(&mut self, place: &Place, part: &str) {
        self.add(Kind::Needless, place, format!("`{part}`"));
    }

    fn add(&mut self, kind: Kind, place: &Place, message: String) {
        let note = Note { kind, place: place.clone(), message };
        if self.seen.insert(note.clone()) {
            self.notes.push(note);
        }
    }

    /// What is lost first, then what has changed; what is needless in one note.
    pub fn sorted(mut self) -> Vec<Note> {
        /// Directives that the note of the needless ones names.
        const NAMED: usize = 30;
        self.notes.sort_by(|a, b| (a.kind, &a.place).cmp(&(b.kind, &b.place)));
        let at = self.notes.partition_point(|note| note.kind < Kind::Needless);
        let mut needless: Vec<Note> = self.notes.split_off(at);
        let mut names = HashSet::new();
        needless.retain(|note| names.insert(note.message.clone()));
        if let Some(first) = needless.first() {
            let mut all: Vec<&str> = needless.iter().take(NAMED).map(|note| &*note.message).collect();
            if needless.len() > NAMED {
                all.push("…");
            }
            let message = format!("needs no counterpart: {}", all.join(", "));
            self.notes.push(Note { kind: Kind::Needless, place: first.place.clone(), message });
        }
        self.notes
    }
}
