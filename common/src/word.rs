//! Words of memory that kernel and daemon share, each written by one of them.
//!
//! For the daemon they are atomics. The BPF target has no 32-bit atomics; there an aligned load or
//! store is one instruction, which is all that is needed.

use core::fmt;

macro_rules! word {
    ($(#[$doc:meta])* $name:ident, $value:ty, $atomic:ident) => {
        $(#[$doc])*
        #[repr(transparent)]
        #[derive(Default)]
        pub struct $name(imp::$name);

        impl $name {
            #[inline(always)]
            pub fn get(&self) -> $value {
                imp::$name::get(&self.0)
            }

            #[inline(always)]
            pub fn set(&self, value: $value) {
                imp::$name::set(&self.0, value);
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.get())
            }
        }
    };
}

word!(Word, u32, AtomicU32);
word!(Long, u64, AtomicU64);

impl Long {
    /// Adds, says what was there before, and is a full memory barrier.
    #[inline(always)]
    pub fn add(&self, value: u64) -> u64 {
        self.0.add(value)
    }
}

#[cfg(not(target_arch = "bpf"))]
mod imp {
    use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

    macro_rules! atomic {
        ($name:ident, $value:ty, $atomic:ident) => {
            #[derive(Default)]
            #[repr(transparent)]
            pub struct $name($atomic);

            impl $name {
                pub fn get(&self) -> $value {
                    self.0.load(SeqCst)
                }

                pub fn set(&self, value: $value) {
                    self.0.store(value, SeqCst);
                }
            }
        };
    }

    atomic!(Word, u32, AtomicU32);
    atomic!(Long, u64, AtomicU64);

    impl Long {
        pub fn add(&self, value: u64) -> u64 {
            self.0.fetch_add(value, SeqCst)
        }
    }
}

#[cfg(target_arch = "bpf")]
mod imp {
    use core::arch::asm;
    use core::cell::UnsafeCell;
    use core::ptr::{read_volatile, write_volatile};

    macro_rules! plain {
        ($name:ident, $value:ty) => {
            #[derive(Default)]
            #[repr(transparent)]
            pub struct $name(UnsafeCell<$value>);

            impl $name {
                #[inline(always)]
                pub fn get(&self) -> $value {
                    // SAFETY: the cell is borrowed, and an aligned load is one instruction.
                    unsafe { read_volatile(self.0.get()) }
                }

                #[inline(always)]
                pub fn set(&self, value: $value) {
                    // SAFETY: as above, and the program writes under the lock of the socket that
                    // the word is about.
                    unsafe { write_volatile(self.0.get(), value) }
                }
            }

            // SAFETY: access is by single instructions.
            unsafe impl Sync for $name {}
        };
    }

    plain!(Word, u32);
    plain!(Long, u64);

    impl Long {
        #[inline(always)]
        pub fn add(&self, value: u64) -> u64 {
            let old;
            // SAFETY: an atomic instruction on an aligned word that is borrowed. With a result it
            // is a full barrier (kernel: Documentation/bpf/standardization/ instruction-set.rst,
            // and net/bpf's JITs). `AtomicU64::fetch_add` does not compile for this target.
            unsafe {
                asm!("{old} = atomic_fetch_add((u64 *)({to} + 0), {old})", to = in(reg) self.0.get(), old = inout(reg) value => old);
            }
            old
        }
    }
}
