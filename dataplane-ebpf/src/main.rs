//! The programs that run in the kernel, one room for each engine, one file a program type.
//!
//! Names and sizes that userspace must know are in `common`; what the programs do, and why, is in
//! their own files.
#![no_std]
#![no_main]

mod sockmap;

/// Never called: the verifier refuses a program from which a panic could be reached, but `core`
/// wants a handler.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// How the kernel writes the licence of code that is under MIT among others; some helpers are for
/// such programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
