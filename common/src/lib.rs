//! What the programs in the kernel and the daemon must agree on.
#![no_std]
