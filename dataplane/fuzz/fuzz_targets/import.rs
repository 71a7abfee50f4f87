//! No text makes the import of nginx's configuration panic, and what it writes checks.

#![no_main]

use std::path::Path;
use std::sync::Arc;

use dataplane::config::{Source, parse};
use dataplane::import::nginx_text;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(imported) = nginx_text(Path::new("nginx.conf"), text) else { return };
    for note in &imported.notes {
        let _ = note.to_string();
    }
    let source = Arc::new(Source::new("dataplane.toml", imported.toml));
    assert!(parse(source).is_ok(), "what is imported does not check");
});
