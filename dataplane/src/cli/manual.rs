//! The manual pages: those of the commands from their definitions, that of the file from the keys.

use std::fs;
use std::io;
use std::path::Path;

use roff::{Inline, Roff, bold, roman};

use crate::config::REFERENCE;

/// Writes them into an existing folder.
pub fn write(commands: clap::Command, folder: &Path) -> io::Result<()> {
    clap_mangen::generate_to(commands, folder)?;
    fs::write(folder.join("dataplane.toml.5"), file().render())
}

/// dataplane.toml(5)
fn file() -> Roff {
    let mut page = Roff::new();
    page.control("TH", ["dataplane.toml", "5"]);
    page.control("SH", ["NAME"]);
    page.text([roman("dataplane.toml - the configuration of dataplane(1)")]);
    page.control("SH", ["DESCRIPTION"]);
    page.text(plain(
        "TOML. Unknown keys are errors. `dataplane check` says what is wrong with a file, \
         `dataplane init` prints a commented one.",
    ));
    for (table, keys) in REFERENCE {
        page.control("SH", [table]);
        for key in keys.iter().filter(|key| !key.meaning.is_empty()) {
            page.control("TP", []);
            page.text([bold(key.name)]);
            page.text(plain(&format!("{}. Default: {}. {}.", key.kind, key.default, key.meaning)));
        }
    }
    page
}

/// Markdown, as far as the reference has it: code in bold, links as their text.
fn plain(markdown: &str) -> Vec<Inline> {
    let mut text = String::new();
    let mut rest = markdown;
    while let Some((before, link)) = rest.split_once("](") {
        let (before, shown) = before.rsplit_once('[').unwrap_or((before, ""));
        text += before;
        text += shown;
        rest = link.split_once(')').map_or("", |(_, rest)| rest);
    }
    text += rest;
    let pieces = text.split('`').enumerate();
    pieces.map(|(n, piece)| if n % 2 == 1 { bold(piece) } else { roman(piece) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_of_the_file_has_every_key_and_no_markdown() {
        let page = file().render();
        for (_, keys) in REFERENCE {
            assert!(keys.iter().filter(|key| !key.meaning.is_empty()).all(|key| page.contains(key.name)));
        }
        assert!(page.contains("hello_timeout") && !page.contains('`') && !page.contains("]("), "{page}");
    }
}
