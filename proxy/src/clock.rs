//! What time it is, on both clocks: decisions get it as a value, so that they can be tested with clocks
//! that jump.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Now {
    /// Goes on evenly, whatever is done to the node's clock: for all that waits.
    pub(crate) steady: Instant,
    /// What people and other machines call the time, and may jump: for showing, and to compare with what
    /// others have stamped.
    pub(crate) wall: SystemTime,
}

impl Now {
    pub(crate) fn read() -> Self {
        Now { steady: Instant::now(), wall: SystemTime::now() }
    }

    /// How long ago that was, by the stamp of another machine: nothing when its clock is ahead of ours.
    pub(crate) fn since(self, stamp: SystemTime) -> Duration {
        self.wall.duration_since(stamp).unwrap_or(Duration::ZERO)
    }

    /// Seconds since the epoch.
    pub(crate) fn unix_secs(self) -> f64 {
        self.since(UNIX_EPOCH).as_secs_f64()
    }
}
