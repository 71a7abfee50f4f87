//! No text makes the configuration's reader panic, and the diagnostics of every text can be shown.

#![no_main]

use std::sync::Arc;

use dataplane::config::{LARGEST, Source, parse, routing_table};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if text.len() > LARGEST {
        return;
    }
    let source = Arc::new(Source::new("dataplane.toml", text.to_owned()));
    match parse(Arc::clone(&source)) {
        Ok((config, warnings)) => {
            for warning in &warnings {
                let _ = warning.render(&source).to_string();
            }
            let _ = routing_table(&config);
        }
        Err(diagnostics) => {
            assert!(!diagnostics.is_empty(), "refused without a word");
            for diagnostic in &diagnostics {
                let _ = (diagnostic.render(&source).to_string(), diagnostic.json(&source));
            }
        }
    }
});
