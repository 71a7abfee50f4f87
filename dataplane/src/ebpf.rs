//! The programs that run in the kernel: embedded at build time, loaded and attached here.
//!
//! What they do is in `dataplane-ebpf`, what both sides share in `common`. This module knows no connection: whoever forwards through the map puts its
//! sockets in.

use std::error::Error;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Mutex;
use std::{fmt, io};

use aya::maps::{HashMap, Map, MapData, MapError, RingBuf, SockMap};
use aya::programs::{SkSkb, SocketFilter};
use aya::{Ebpf, EbpfError, EbpfLoader};
use common::{Budget, Row, offset};
use rustix::io::Errno;
use rustix::thread::CapabilitySet;

use crate::btf;
use crate::sys::{Shareable, SharedArray};

/// What bpf(2) asks for when it makes a socket map, loads a program for it (kernel: kernel/bpf/syscall.c), and when that program reads a socket's structure
/// (kernel/bpf/verifier.c, `check_ptr_to_btf_access`).
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

/// The programs in the kernel, and the maps that they share with the daemon. All is gone when it is dropped.
pub struct Programs {
    /// The forwarded sockets, by key.
    pub sockets: Mutex<SockMap<MapData>>,
    /// Cookie of a socket to its key.
    pub keys: Mutex<HashMap<MapData, u64, u32>>,
    /// One a key.
    pub rows: SharedArray<Row>,
    /// One.
    pub budget: SharedArray<Budget>,
    /// Keys of directions that left the kernel's path; whoever reads them takes it.
    pub events: Option<RingBuf<MapData>>,
    verdict_id: u32,
    /// Keeps the verdict attached.
    ebpf: Ebpf,
}

impl fmt::Debug for Programs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Programs").field("verdict_id", &self.verdict_id).finish_non_exhaustive()
    }
}

impl Programs {
    /// The kernel's number for the stream verdict program, as in `bpftool prog`.
    #[must_use]
    pub fn verdict_id(&self) -> u32 {
        self.verdict_id
    }

    /// From now on the socket takes no data while more is unread than is bounded; before that, [`KEYS`](common::KEYS) has it.
    pub fn brake(&self, socket: impl AsFd) -> io::Result<()> {
        self.filter(common::BRAKE, socket)
    }

    /// From now on only acknowledgements and resets reach the socket.
    pub fn quiesce(&self, socket: impl AsFd) -> io::Result<()> {
        self.filter(common::QUIESCE, socket)
    }

    /// [`brake`](Self::brake), and no FIN reaches the socket.
    pub fn postpone_end(&self, socket: impl AsFd) -> io::Result<()> {
        self.filter(common::POSTPONE_END, socket)
    }

    fn filter(&self, name: &str, socket: impl AsFd) -> io::Result<()> {
        let program = self.ebpf.program(name).expect("load() found it");
        let filter: &SocketFilter = program.try_into().expect("load() found it to be a socket filter");
        filter.attach(socket).map_err(io::Error::other)
    }

    /// From now on everything reaches the socket.
    pub fn unfilter(socket: impl AsFd) -> io::Result<()> {
        SocketFilter::detach(socket).map_err(io::Error::other)
    }
}

/// Loads the embedded programs, with room for so many connections, and attaches the stream verdict to its map.
pub fn load(connections: u32) -> Result<Programs, LoadError> {
    let object = object().ok_or(LoadError::NotBuiltIn)?;
    let offsets = btf::offsets(
        Path::new(btf::KERNEL),
        [("tcp_sock", "write_seq"), ("tcp_sock", "copied_seq"), ("sock", "sk_wmem_queued"), ("sock", "sk_sndbuf")],
    )
    .map_err(LoadError::KernelTypes)?;
    load_object(object, offsets, connections * 2).map_err(LoadError::from)
}

fn load_object(object: &[u8], offsets: [u32; 4], keys: u32) -> Result<Programs, EbpfError> {
    let names = [offset::WRITE_SEQ, offset::COPIED_SEQ, offset::WMEM_QUEUED, offset::SNDBUF];
    let mut loader = EbpfLoader::new();
    for (name, offset) in names.into_iter().zip(&offsets) {
        loader.override_global(name, offset, true);
    }
    for map in [common::SOCKS, common::KEYS, common::ROWS] {
        loader.map_max_entries(map, keys);
    }
    loader.map_max_entries(common::EVENTS, common::events_bytes(keys));
    let mut ebpf = loader.load(object)?;

    let sockets = SockMap::try_from(take(&mut ebpf, common::SOCKS))?;
    let sockets_fd = sockets.fd().try_clone().map_err(MapError::IoError)?;
    let verdict: &mut SkSkb = ebpf.program_mut(common::VERDICT).expect("in dataplane-ebpf").try_into()?;
    verdict.load()?;
    verdict.attach(&sockets_fd)?;
    let verdict_id = verdict.info()?.id();
    for name in [common::BRAKE, common::QUIESCE, common::POSTPONE_END] {
        let filter: &mut SocketFilter = ebpf.program_mut(name).expect("in dataplane-ebpf").try_into()?;
        filter.load()?;
    }
    Ok(Programs {
        sockets: Mutex::new(sockets),
        keys: Mutex::new(HashMap::try_from(take(&mut ebpf, common::KEYS))?),
        rows: shared(&take(&mut ebpf, common::ROWS), keys as usize)?,
        budget: shared(&take(&mut ebpf, common::BUDGET), 1)?,
        events: Some(RingBuf::try_from(take(&mut ebpf, common::EVENTS))?),
        verdict_id,
        ebpf,
    })
}

fn take(ebpf: &mut Ebpf, map: &str) -> Map {
    ebpf.take_map(map).expect("in dataplane-ebpf")
}

/// The mapping holds the map: the file descriptor may go.
fn shared<T: Shareable>(map: &Map, len: usize) -> Result<SharedArray<T>, MapError> {
    let Map::Array(data) = map else { unreachable!("an array in dataplane-ebpf") };
    SharedArray::new(data.fd(), len).map_err(MapError::IoError)
}

/// Why the programs are not in the kernel, in words that say what to change.
#[derive(Debug)]
pub enum LoadError {
    /// The binary was built without an object.
    NotBuiltIn,
    /// The kernel was built without `CONFIG_DEBUG_INFO_BTF`, /sys is not mounted here, or a structure is not as expected.
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
