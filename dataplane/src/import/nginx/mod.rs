//! What the directives of nginx's `stream` module mean, in our terms.
//!
//! Read in this order: `server`, `map` and `upstream` read blocks; `names` finds what nginx finds
//! for a name; `stream` decides where a connection goes; `write` says the same in our
//! configuration. `access` and `regex` are parts of that. What cannot be carried over is refused
//! and told.

mod access;
mod map;
mod names;
mod notes;
mod regex;
mod server;
mod stream;
mod upstream;
mod write;

use std::path::Path;

use anyhow::{Result, bail};

use super::Imported;
use super::syntax::Directive;
use notes::Notes;
use stream::Stream;

/// Writes what a configuration of nginx does as one of ours.
///
/// # Errors
/// There is no `stream` block, or nothing of it could be carried over.
pub fn translate(path: &Path, directives: &[Directive]) -> Result<Imported> {
    let mut notes = Notes::default();
    let directives = stream_of(path, directives, &mut notes)?;
    let stream = Stream::read(&directives, notes)?;
    write::write(path, stream)
}

/// The inside of the `stream` block.
fn stream_of<'a>(path: &Path, directives: &'a [Directive], notes: &mut Notes) -> Result<Vec<&'a Directive>> {
    let blocks: Vec<&Directive> = directives.iter().filter(|d| d.name == "stream" && d.block.is_some()).collect();
    if blocks.is_empty() {
        let is_of_stream = |d: &Directive| match &*d.name {
            "server" => d.inside().iter().any(|d| d.name == "proxy_pass"),
            "map" => d.words.first().is_some_and(|word| word.starts_with("$ssl_preread")),
            _ => false,
        };
        if let Some(first) = directives.iter().find(|d| is_of_stream(d)) {
            notes.changed(
                &first.place,
                "this file is read as the inside of a `stream` block; what your `stream` block says beside it (`allow`, `deny`, `proxy_timeout`) is not known here: name the main file to have it read",
            );
            return Ok(directives.iter().collect());
        }
    }
    let inside: Vec<&Directive> = blocks.iter().flat_map(|block| block.inside()).collect();
    if inside.is_empty() {
        bail!(
            "{}: error: there is no `stream` block with anything in it\n  help: name the file that has it, or the main configuration file that includes it",
            path.display()
        );
    }
    for directive in directives {
        let place = &directive.place;
        match &*directive.name {
            "http" => notes.changed(
                place,
                "`http` is not carried over; if it answered ACME challenges or sent port 80 to https, a listener of mode \"http\" does both",
            ),
            "mail" => notes.lost(place, "`mail` is not carried over"),
            // There is one `stream` block, and it was found.
            "include" if directive.block.is_none() => notes.changed(
                place,
                format!("`include {}`: there is no such file here; it is not needed for `stream`", directive.text()),
            ),
            _ => {}
        }
    }
    Ok(inside)
}
