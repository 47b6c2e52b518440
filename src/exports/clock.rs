//! The two clocks that exports go by.
//!
//! Not here: correcting what was stored when the wall clock is set (`writer`).

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::export::Millis;

/// Two counts of milliseconds, both monotonic within a run: setting the wall clock, as a box without a
/// battery does at boot, must neither end nor prolong a wait. One is Unix time, which the store corrects
/// for the wall clock: see [`super::store::Store::clock_was_set`]. The other is the running time, which
/// continues from one run to the next.
pub struct Clock {
    started: Instant,
    /// The wall clock at the start.
    pub wall: Millis,
    /// The running time at the start.
    ran: Millis,
}

impl Clock {
    /// Starts both. `ran` is the running time of all earlier runs.
    pub fn new(ran: Millis) -> Self {
        Self {
            started: Instant::now(),
            wall: wall_clock(),
            ran,
        }
    }

    /// Unix milliseconds; not affected by the wall clock being set during this run.
    pub fn now(&self) -> Millis {
        self.wall.saturating_add(as_millis(self.started.elapsed()))
    }

    /// The running time in milliseconds.
    pub fn running(&self) -> Millis {
        self.ran.saturating_add(as_millis(self.started.elapsed()))
    }

    /// By how many milliseconds the wall clock is now ahead of [`Clock::now`].
    pub fn behind(&self) -> Millis {
        wall_clock().saturating_sub(self.now())
    }
}

/// Unix milliseconds by the wall clock, whatever it says now.
pub fn wall_clock() -> Millis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    as_millis(since.unwrap_or_default())
}

fn as_millis(duration: Duration) -> Millis {
    Millis::try_from(duration.as_millis()).unwrap_or(Millis::MAX)
}
