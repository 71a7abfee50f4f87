//! The programs that run in the kernel: embedded at build time, loaded and attached here.
//!
//! What they do is in `dataplane-ebpf`, the names that both sides share in `common`. This module knows no connection: whoever forwards through the map
//! puts its sockets in.

use std::error::Error;
use std::path::Path;
use std::{fmt, io};

use aya::maps::{MapData, MapError, SockMap};
use aya::programs::SkSkb;
use aya::{Ebpf, EbpfError};
use rustix::io::Errno;
use rustix::thread::CapabilitySet;

/// The type information of the running kernel (kernel: Documentation/bpf/btf.rst).
const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

/// What bpf(2) asks for when it makes a socket map and loads a program for it (kernel: kernel/bpf/syscall.c).
const CAPABILITIES: [(CapabilitySet, &str); 2] =
    [(CapabilitySet::BPF, "CAP_BPF"), (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN")];

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

/// The programs in the kernel. They are detached and unloaded when it is dropped.
#[derive(Debug)]
pub struct Loaded {
    ebpf: Ebpf,
    program_id: u32,
}

impl Loaded {
    /// The kernel's number for the stream verdict program, as in `bpftool prog`.
    #[must_use]
    pub fn program_id(&self) -> u32 {
        self.program_id
    }

    /// The map of the forwarded sockets; empty at first.
    pub fn sockets(&mut self) -> SockMap<&mut MapData> {
        let map = self.ebpf.map_mut(common::SOCKS).expect("load() found it");
        SockMap::try_from(map).expect("load() found it to be a sockmap")
    }
}

/// Loads the embedded programs and attaches the stream verdict to its map.
pub fn load() -> Result<Loaded, LoadError> {
    let object = object().ok_or(LoadError::NotBuiltIn)?;
    if !Path::new(KERNEL_BTF).exists() {
        return Err(LoadError::NoKernelBtf);
    }
    load_object(object).map_err(LoadError::from)
}

fn load_object(object: &[u8]) -> Result<Loaded, EbpfError> {
    let mut ebpf = Ebpf::load(object)?;
    let sockets = SockMap::try_from(ebpf.map(common::SOCKS).expect("in dataplane-ebpf"))?;
    let sockets = sockets.fd().try_clone().map_err(MapError::IoError)?;
    let verdict: &mut SkSkb = ebpf.program_mut(common::VERDICT).expect("in dataplane-ebpf").try_into()?;
    verdict.load()?;
    verdict.attach(&sockets)?;
    let program_id = verdict.info()?.id();
    Ok(Loaded { ebpf, program_id })
}

/// Why the programs are not in the kernel, in words that say what to change.
#[derive(Debug)]
pub enum LoadError {
    /// The binary was built without an object.
    NotBuiltIn,
    /// The kernel was built without `CONFIG_DEBUG_INFO_BTF`, or /sys is not mounted here.
    NoKernelBtf,
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
            Self::NoKernelBtf => write!(f, "the kernel's type information is missing ({KERNEL_BTF}): needs a kernel with CONFIG_DEBUG_INFO_BTF, and /sys"),
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

/// An error and its causes, each told once: some of aya's errors repeat their cause, some leave it out.
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
