//! What the programs in the kernel and the daemon must agree on: names, the shape of shared memory,
//! and rules as pure functions; one room for each engine that works in the kernel.
//!
//! Names are those of the `static`s and functions in `dataplane-ebpf`; the loader looks them up in
//! the object.
#![no_std]
// What the program consists of has to be in one piece: a call costs the verifier more than it costs
// the processor.
#![allow(clippy::inline_always)]
// The BPF target's compiler offers no atomic that returns what it found.
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

pub mod sockmap;
mod word;

pub use word::{Long, Word};
