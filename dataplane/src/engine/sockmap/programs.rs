//! The programs and maps of this engine, in the kernel.

use std::os::fd::AsFd;
use std::sync::Mutex;
use std::{fmt, io};

use aya::maps::{HashMap, MapData, MapError, RingBuf, SockMap};
use aya::programs::{SkSkb, SocketFilter};
use aya::{Ebpf, EbpfError};
use common::sockmap::{self, Budget, Row, offset};

use crate::kernel::ebpf::{self, LoadError};
use crate::kernel::sys::SharedArray;

/// Members of the kernel's structures of which the programs know the place by these globals.
const OFFSETS: [(&str, (&str, &str)); 4] = [
    (offset::WRITE_SEQ, ("tcp_sock", "write_seq")),
    (offset::COPIED_SEQ, ("tcp_sock", "copied_seq")),
    (offset::WMEM_QUEUED, ("sock", "sk_wmem_queued")),
    (offset::SNDBUF, ("sock", "sk_sndbuf")),
];

/// The programs in the kernel, and the maps that they share with the daemon. All is gone when it is
/// dropped.
pub struct Programs {
    /// The forwarded sockets, by key.
    pub sockets: Mutex<SockMap<MapData>>,
    /// Cookie of a socket to its key.
    pub keys: Mutex<HashMap<MapData, u64, u32>>,
    pub rows: SharedArray<Row>,
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

    /// From now on the socket takes no data while more is unread than is bounded; before that,
    /// [`KEYS`](sockmap::KEYS) has it.
    pub fn brake(&self, socket: impl AsFd) -> io::Result<()> {
        self.filter(sockmap::BRAKE, socket)
    }

    /// From now on only acknowledgements and resets reach the socket.
    pub fn quiesce(&self, socket: impl AsFd) -> io::Result<()> {
        self.filter(sockmap::QUIESCE, socket)
    }

    /// [`brake`](Self::brake), and no FIN reaches the socket.
    pub fn postpone_end(&self, socket: impl AsFd) -> io::Result<()> {
        self.filter(sockmap::POSTPONE_END, socket)
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

/// Loads the programs, with room for so many connections, and attaches the stream verdict to its
/// map.
pub fn load(connections: u32) -> Result<Programs, LoadError> {
    let keys = connections * 2;
    let entries = [
        (sockmap::SOCKS, keys),
        (sockmap::KEYS, keys),
        (sockmap::ROWS, keys),
        (sockmap::EVENTS, sockmap::events_bytes(keys)),
    ];
    attach(ebpf::open(OFFSETS, &entries)?, keys as usize).map_err(LoadError::from)
}

fn attach(mut ebpf: Ebpf, keys: usize) -> Result<Programs, EbpfError> {
    let sockets = SockMap::try_from(ebpf::take(&mut ebpf, sockmap::SOCKS))?;
    let sockets_fd = sockets.fd().try_clone().map_err(MapError::IoError)?;
    let verdict: &mut SkSkb = ebpf.program_mut(sockmap::VERDICT).expect("in dataplane-ebpf").try_into()?;
    verdict.load()?;
    verdict.attach(&sockets_fd)?;
    let verdict_id = verdict.info()?.id();
    for name in [sockmap::BRAKE, sockmap::QUIESCE, sockmap::POSTPONE_END] {
        let filter: &mut SocketFilter = ebpf.program_mut(name).expect("in dataplane-ebpf").try_into()?;
        filter.load()?;
    }
    // Only now: a program is loaded with the descriptors of the maps that it uses.
    let mut take = |map| ebpf::take(&mut ebpf, map);
    Ok(Programs {
        sockets: Mutex::new(sockets),
        keys: Mutex::new(HashMap::try_from(take(sockmap::KEYS))?),
        rows: ebpf::shared(&take(sockmap::ROWS), keys)?,
        budget: ebpf::shared(&take(sockmap::BUDGET), 1)?,
        events: Some(RingBuf::try_from(take(sockmap::EVENTS))?),
        verdict_id,
        ebpf,
    })
}
