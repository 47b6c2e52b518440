//! What time it is for the exports.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::export::Millis;

/// Two counts of milliseconds that go on evenly from the start of the process: a clock that is set
/// right meanwhile, as at the boot of a box without one of its own, must neither end nor prolong a
/// wait. The first are Unix milliseconds, which are stored by the wall clock: see
/// [`super::store::Store::clock_was_set`]. The second is the running time, which goes on from one run to the next.
pub struct Clock {
    started: Instant,
    /// The wall clock at the start.
    pub wall: Millis,
    /// The running time at the start.
    ran: Millis,
}

impl Clock {
    /// Starts counting; so much running time has been counted before.
    pub fn new(ran: Millis) -> Self {
        Self {
            started: Instant::now(),
            wall: wall_clock(),
            ran,
        }
    }

    /// Unix milliseconds.
    pub fn now(&self) -> Millis {
        self.wall.saturating_add(as_millis(self.started.elapsed()))
    }

    /// The running time.
    pub fn running(&self) -> Millis {
        self.ran.saturating_add(as_millis(self.started.elapsed()))
    }

    /// By how much the wall clock is ahead of this one by now.
    pub fn behind(&self) -> Millis {
        wall_clock().saturating_sub(self.now())
    }
}

fn wall_clock() -> Millis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    as_millis(since.unwrap_or_default())
}

fn as_millis(duration: Duration) -> Millis {
    Millis::try_from(duration.as_millis()).unwrap_or(Millis::MAX)
}
