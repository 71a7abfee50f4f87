//! A connection in the map, for whoever forwards it and for whoever only looks.

use std::io;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::Duration;

use common::sockmap::governor::RUN;

use super::table::Slot;
use crate::engine::pair::{Kind, PerSide, SIDES, Side};
use crate::engine::traffic::Offload;
use crate::kernel::sys;

/// A connection in the map; what others may look at while the connection is in the map. Dropped in
/// this order: the slot goes when the sockets are closed.
#[derive(Debug)]
pub struct Engaged {
    /// By side.
    pub sockets: PerSide<TcpStream>,
    /// By side of the sink: bytes that its send queue had accepted before.
    pub accepted_before: PerSide<u64>,
    pub slot: Slot,
}

impl Engaged {
    /// What is queued of the direction from this side.
    pub fn backlog_from(&self, from: Side) -> io::Result<u64> {
        let row = self.slot.row(from);
        let sent_on = row.redirected.get() + row.consumed.get();
        Ok(sent_on.saturating_sub(self.accepted(from.other())?))
    }

    /// Bytes that this side's send queue has accepted since it went into the map, at least.
    pub fn accepted(&self, side: Side) -> io::Result<u64> {
        // Less than at the beginning, when an acknowledgement of earlier bytes comes between the
        // two questions.
        Ok(accepted(&self.sockets[side])?.saturating_sub(self.accepted_before[side]))
    }
}

impl Offload for Engaged {
    fn kind(&self) -> Kind {
        Kind::Sockmap
    }

    fn redirected(&self, from: Side) -> u64 {
        self.slot.row(from).redirected.get()
    }

    fn backlog(&self) -> u64 {
        // A socket that cannot be asked has none.
        SIDES.into_iter().map(|from| self.backlog_from(from).unwrap_or(0)).sum()
    }

    fn idle(&self) -> Duration {
        // The clock is asked last: it has not been before any of them.
        let last = SIDES.map(|from| self.slot.row(from).last_ms.get());
        let now = coarse_ms();
        Duration::from_millis(last.map(|last| u64::from(now.wrapping_sub(last))).into_iter().min().unwrap_or(0))
    }

    fn is_asleep(&self) -> bool {
        let runs = |from: Side| {
            let row = self.slot.row(from);
            row.mode.get() == RUN && row.passed.get() == row.consumed.get()
        };
        SIDES.into_iter().all(runs)
    }
}

/// The clock of [`Row::last_ms`].
pub fn coarse_ms() -> u32 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicCoarse);
    (now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000) as u32
}

/// Bytes that a socket's send queue has ever accepted, at least: what was acknowledged is asked
/// first, so that what is acknowledged meanwhile counts once.
fn accepted(socket: impl AsFd + Copy) -> io::Result<u64> {
    let acknowledged = sys::tcp_info(socket)?.bytes_acked;
    Ok(acknowledged + u64::from(sys::unacknowledged(socket)?))
}
