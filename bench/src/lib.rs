//! The dataplane beside what people would use instead, in one run on one machine:
//! `cargo xtask bench`.
//!
//! In the order of a run: [`network`] makes the hosts, [`run`] goes through rounds of [`workloads`]
//! and [`subjects`], [`load`] makes the traffic, [`measure`] reads the kernel's counters around it,
//! [`statistics`] and [`claims`] judge the figures, [`report`] shows them. What is measured, and
//! how to doubt it, is in README.md. Benchmarks of the code that every connection passes are in
//! `benches/` (`cargo bench --package bench`).

pub mod claims;
pub mod figures;
pub mod load;
pub mod measure;
pub mod network;
pub mod report;
pub mod run;
pub mod statistics;
pub mod subjects;
pub mod workloads;
