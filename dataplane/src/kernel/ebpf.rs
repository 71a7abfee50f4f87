//! The programs that run in the kernel: embedded at build time, and why a kernel does not take
//! them.
//!
//! What they do is in `dataplane-ebpf`, what both sides share in `common`; which of them are
//! loaded, and what they are attached to, each engine decides for itself.

use std::error::Error;
use std::path::Path;
use std::{fmt, io};

use aya::maps::{Map, MapError};
use aya::{Ebpf, EbpfError, EbpfLoader};
use rustix::io::Errno;
use rustix::thread::CapabilitySet;

use super::btf;
use super::sys::{Shareable, SharedArray};

/// What bpf(2) asks for when it makes a socket map, loads a program for it (kernel:
/// kernel/bpf/syscall.c), and when that program reads a socket's structure (kernel/bpf/verifier.c,
/// `check_ptr_to_btf_access`).
const CAPABILITIES: [(CapabilitySet, &str); 3] = [
    (CapabilitySet::BPF, "CAP_BPF"),
    (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN"),
    (CapabilitySet::PERFMON, "CAP_PERFMON"),
];

/// The eBPF object that this binary was built with, aligned for ELF.
#[cfg(embedded_ebpf)]
#[must_use]
pub fn object() -> Option<&'static [u8]> {
    Some(aya::include_bytes_aligned!(env!("EBPF_OBJECT")))
}

/// The eBPF object that this binary was built with: none.
#[cfg(not(embedded_ebpf))]
#[must_use]
pub fn object() -> Option<&'static [u8]> {
    None
}

/// Makes the maps of the embedded object, and readies its programs to be loaded one by one: an
/// engine's that are refused cost another engine nothing.
///
/// `offsets` are members of the kernel's structures, by the global that holds each; `entries` are
/// the sizes of maps that the object leaves open.
pub fn open<const N: usize>(
    offsets: [(&str, (&str, &str)); N],
    entries: &[(&'static str, u32)],
) -> Result<Ebpf, LoadError> {
    let object = object().ok_or(LoadError::NotBuiltIn)?;
    let values =
        btf::offsets(Path::new(btf::KERNEL), offsets.map(|(_, member)| member)).map_err(LoadError::KernelTypes)?;
    let mut loader = EbpfLoader::new();
    for ((global, _), value) in offsets.iter().zip(&values) {
        loader.override_global(global, value, true);
    }
    for (map, size) in entries {
        loader.map_max_entries(map, *size);
    }
    loader.load(object).map_err(LoadError::from)
}

/// Takes a map that the object has.
pub fn take(ebpf: &mut Ebpf, map: &str) -> Map {
    ebpf.take_map(map).expect("in dataplane-ebpf")
}

/// The array as memory. The mapping holds the map: the file descriptor may go.
pub fn shared<T: Shareable>(map: &Map, len: usize) -> Result<SharedArray<T>, MapError> {
    let Map::Array(data) = map else { unreachable!("an array in dataplane-ebpf") };
    SharedArray::new(data.fd(), len).map_err(MapError::IoError)
}

/// Why the programs are not in the kernel, in words that say what to change.
#[derive(Debug)]
pub enum LoadError {
    /// The binary was built without an object.
    NotBuiltIn,
    /// The kernel was built without `CONFIG_DEBUG_INFO_BTF`, /sys is not mounted here, or a
    /// structure is not as expected.
    KernelTypes(io::Error),
    /// bpf(2) said EPERM. Holds the capabilities that the process lacks; none if it has all.
    NotPermitted(Vec<&'static str>),
    /// The kernel was built without bpf(2).
    NoBpf,
    /// The kernel refused a map, a program, or its attachment.
    Refused(EbpfError),
}

impl From<EbpfError> for LoadError {
    fn from(error: EbpfError) -> Self {
        match errno(&error) {
            Some(Errno::PERM) => Self::NotPermitted(missing_capabilities()),
            Some(Errno::NOSYS) => Self::NoBpf,
            _ => Self::Refused(error),
        }
    }
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotBuiltIn => {
                f.write_str("this binary was built without the eBPF programs: run `cargo xtask build-ebpf`, then build it again")
            }
            Self::KernelTypes(error) => write!(
                f,
                "the kernel's type information cannot be read: {}: {error}: needs a kernel with CONFIG_DEBUG_INFO_BTF, and /sys",
                btf::KERNEL
            ),
            Self::NotPermitted(missing) if missing.is_empty() => f.write_str(
                "bpf(2) is forbidden although the capabilities are there: allow it in the container's seccomp filter (in a systemd unit, SystemCallFilter=bpf), \
                 run outside of a user namespace, and look at the kernel's lockdown mode",
            ),
            Self::NotPermitted(missing) => {
                write!(f, "needs {}: run as root, or give it to the process (in a systemd unit, AmbientCapabilities=)", missing.join(" and "))
            }
            Self::NoBpf => f.write_str("the kernel was built without bpf(2): needs CONFIG_BPF_SYSCALL"),
            Self::Refused(error) => {
                f.write_str("the kernel refused the eBPF programs (is it built with CONFIG_BPF_STREAM_PARSER?): ")?;
                f.write_str(&chain(error))
            }
        }
    }
}

impl Error for LoadError {}

/// An error and its causes, each told once: some of aya's errors repeat their cause, some leave it
/// out.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        next = error.source();
    }
    text
}

/// What the kernel said at the bottom of an error.
fn errno(error: &(dyn Error + 'static)) -> Option<Errno> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return Errno::from_io_error(error);
        }
        next = error.source();
    }
    None
}

fn missing_capabilities() -> Vec<&'static str> {
    let effective = rustix::thread::capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective);
    CAPABILITIES.into_iter().filter(|(capability, _)| !effective.contains(*capability)).map(|(_, name)| name).collect()
}

#[cfg(test)]
mod tests {
    use aya::sys::SyscallError;

    use super::*;

    fn bpf_fails_with(errno: Errno) -> LoadError {
        let error = SyscallError { call: "bpf_prog_attach", io_error: errno.into() };
        EbpfError::ProgramError(error.into()).into()
    }

    #[test]
    fn a_refusal_of_the_kernel_is_told_from_a_lack_of_privileges() {
        assert!(matches!(bpf_fails_with(Errno::PERM), LoadError::NotPermitted(_)));
        assert!(matches!(bpf_fails_with(Errno::NOSYS), LoadError::NoBpf));
        let refused = bpf_fails_with(Errno::INVAL);
        assert!(matches!(refused, LoadError::Refused(_)));
        assert!(refused.to_string().ends_with("Invalid argument (os error 22)"), "{refused}");
    }

    #[test]
    fn a_missing_capability_is_named() {
        let error = LoadError::NotPermitted(vec!["CAP_BPF", "CAP_NET_ADMIN"]);
        assert!(error.to_string().starts_with("needs CAP_BPF and CAP_NET_ADMIN: "), "{error}");
    }
}
