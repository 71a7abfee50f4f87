//! Points in time that all processes of this boot understand.
//!
//! It must not know what happens then.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// A point in time as CLOCK_MONOTONIC tells it, microseconds: `Instant` for other processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Moment(u64);

impl Moment {
    pub fn now() -> Self {
        let now = clock_gettime(ClockId::Monotonic);
        Self(now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1000)
    }

    pub const fn as_micros(self) -> u64 {
        self.0
    }

    /// The same point in time, or the nearest that this process can tell.
    pub fn instant(self) -> Instant {
        let (there, now) = (Self::now(), Instant::now());
        let apart = Duration::from_micros(self.0.abs_diff(there.0));
        let other = if self > there { now.checked_add(apart) } else { now.checked_sub(apart) };
        other.unwrap_or(now)
    }
}

impl From<Instant> for Moment {
    fn from(at: Instant) -> Self {
        let (there, now) = (Self::now(), Instant::now());
        let micros = |apart: Duration| u64::try_from(apart.as_micros()).unwrap_or(u64::MAX);
        if at > now {
            Self(there.0.saturating_add(micros(at - now)))
        } else {
            Self(there.0.saturating_sub(micros(now - at)))
        }
    }
}

/// For `#[serde(with = "moment::instant")]`.
pub mod instant {
    use super::{Deserialize, Instant, Moment, Serialize};

    pub fn serialize<S: serde::Serializer>(at: &Instant, serializer: S) -> Result<S::Ok, S::Error> {
        Moment::from(*at).serialize(serializer)
    }

    pub fn deserialize<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Instant, D::Error> {
        Moment::deserialize(deserializer).map(Moment::instant)
    }
}

/// The same, of one that may be missing.
pub mod maybe {
    use super::{Deserialize, Instant, Moment, Serialize};

    pub fn serialize<S: serde::Serializer>(at: &Option<Instant>, serializer: S) -> Result<S::Ok, S::Error> {
        at.map(Moment::from).serialize(serializer)
    }

    pub fn deserialize<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Instant>, D::Error> {
        Ok(Option::<Moment>::deserialize(deserializer)?.map(Moment::instant))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_in_time_comes_back_however_far_away() {
        for apart in [0, 1, 1_000, 3_600_000].map(Duration::from_millis) {
            for at in [Instant::now() + apart, Instant::now().checked_sub(apart).unwrap_or_else(Instant::now)] {
                let back = serde_json::from_str::<Moment>(&serde_json::to_string(&Moment::from(at)).unwrap()).unwrap();
                let back = back.instant();
                assert!(back.max(at) - back.min(at) < Duration::from_millis(50), "{apart:?}");
            }
        }
        let _ = (Moment(0).instant(), Moment(u64::MAX).instant());
    }
}
