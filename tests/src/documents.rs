//! What README.md and the other pages say, as far as a test can hold them to it: their code blocks,
//! and the commands that they name.
//!
//! Knows Markdown no further than these pages use it: fenced blocks, and code between backquotes
//! within a line.

use std::path::{Path, PathBuf};

/// The root of the workspace.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests is a folder of the workspace")
}

/// A page.
pub struct Document {
    /// Seen from the root of the workspace.
    pub path: PathBuf,
    text: String,
}

/// One command of a page, in words: `["dataplane", "explain", "blog.example.com"]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    /// At least two.
    pub words: Vec<String>,
    /// Whether it stands in a block of commands, where a reader copies it from.
    pub in_block: bool,
}

impl Document {
    /// Reads a page of the workspace.
    #[track_caller]
    pub fn read(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        let text =
            std::fs::read_to_string(workspace().join(&path)).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Self { path, text }
    }

    /// All pages but the changelog, which also tells of what is gone.
    #[track_caller]
    pub fn all() -> Vec<Self> {
        let mut found = Vec::new();
        for folder in ["", "docs", "bench", "tests", "examples"] {
            for entry in std::fs::read_dir(workspace().join(folder)).expect("a folder of the workspace") {
                let name = entry.expect("readable").file_name();
                let path = Path::new(folder).join(name);
                if path.extension().is_some_and(|e| e == "md") && path != Path::new("CHANGELOG.md") {
                    found.push(Self::read(path));
                }
            }
        }
        found.sort_by(|a, b| a.path.cmp(&b.path));
        found
    }

    /// The fenced blocks of a language.
    pub fn blocks(&self, language: &str) -> Vec<String> {
        self.split().0.into_iter().filter(|(l, _)| l == language).map(|(_, text)| text).collect()
    }

    /// The commands that begin with these words, in ```` ```sh ```` blocks and in code within the
    /// text.
    pub fn commands(&self, program: &[&str]) -> Vec<Command> {
        let (blocks, rest) = self.split();
        let blocks = blocks.iter().filter(|(language, _)| language == "sh").flat_map(|(_, text)| text.lines());
        let spans = rest.split('`').skip(1).step_by(2);
        let commands = blocks.map(|line| (line, true)).chain(spans.map(|span| (span, false)));
        let mut found = Vec::new();
        for (line, in_block) in commands {
            for words in simple_commands(line) {
                if words.len() > program.len() && words.iter().zip(program).all(|(a, b)| a == b) {
                    found.push(Command { words, in_block });
                }
            }
        }
        found
    }

    /// Fenced blocks with their language, and the text between them.
    fn split(&self) -> (Vec<(String, String)>, String) {
        let (mut blocks, mut rest) = (Vec::new(), String::new());
        let mut open: Option<(String, String)> = None;
        for line in self.text.lines() {
            match (line.trim_start().strip_prefix("```"), open.take()) {
                (Some(_), Some(block)) => blocks.push(block),
                (Some(info), None) => {
                    open = Some((info.split_whitespace().next().unwrap_or_default().to_owned(), String::new()));
                }
                (None, Some((language, text))) => open = Some((language, text + line + "\n")),
                (None, None) => rest += &format!("{line}\n"),
            }
        }
        assert!(open.is_none(), "{}: a block does not end", self.path.display());
        (blocks, rest)
    }
}

/// A line of shell as its commands, in words: without comment, sudo, variables in front,
/// redirections, and the brackets of a synopsis.
fn simple_commands(line: &str) -> Vec<Vec<String>> {
    let line = if line.starts_with('#') { "" } else { line.split(" #").next().unwrap_or_default() };
    let line = line.replace(['[', ']'], " ");
    let commands = line.split(['|', ';', '&', '\n']);
    commands
        .map(|command| {
            let command = command.split(['<', '>']).next().unwrap_or_default();
            let words = command.split_whitespace().map(|word| word.trim_matches(['\'', '"']).to_owned());
            words.skip_while(|word| word == "sudo" || word == "$" || word.contains('=')).collect()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_found_in_blocks_and_in_text_and_nothing_else_is_taken_for_one() {
        let text = "Run `dataplane run [--config FILE]`, `systemctl reload dataplane` or dataplane stop.\n\n\
                    ```sh\nA=b sudo dataplane check --json >file  # or `dataplane none`\n\
                    cargo build && dataplane status | less\n```\n```toml\ndataplane = 1\n```\n";
        let page = Document { path: "page.md".into(), text: text.into() };
        let found: Vec<_> =
            page.commands(&["dataplane"]).into_iter().map(|c| (c.words.join(" "), c.in_block)).collect();
        let wanted =
            [("dataplane check --json", true), ("dataplane status", true), ("dataplane run --config FILE", false)];
        assert_eq!(found, wanted.map(|(words, in_block)| (words.to_owned(), in_block)));
        assert_eq!(page.blocks("toml"), ["dataplane = 1\n"]);
    }
}
