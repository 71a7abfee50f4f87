//! Benchmarks of the code that every connection passes: `cargo bench --package bench`.
