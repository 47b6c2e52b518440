//! A bounded amount of memory that several threads share. Each grows its part as it needs more.
//!
//! Not here: what it is used for.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

/// Memory to be shared, in bytes. Clones share the same.
#[derive(Clone)]
pub struct Budget(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    free: usize,
    /// A reservation exceeds the budget: see [`Reservation::grow`].
    exceeded: bool,
    /// The tickets of waiting threads, in order of arrival.
    waiting: BTreeSet<u64>,
    last: u64,
}

impl Budget {
    /// A budget of this many bytes, all of them free.
    pub fn new(bytes: usize) -> Self {
        let state = State {
            free: bytes,
            exceeded: false,
            waiting: BTreeSet::new(),
            last: 0,
        };
        Self(Arc::new(Inner {
            state: Mutex::new(state),
            changed: Condvar::new(),
        }))
    }

    /// A new part of the budget, which is empty at first.
    pub fn part(&self) -> Reservation {
        Reservation {
            budget: self.clone(),
            bytes: 0,
            exceeds: false,
        }
    }
}

impl fmt::Debug for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Budget({} bytes free)", self.0.state.lock().free)
    }
}

/// A part of a [`Budget`], released when it is dropped.
#[derive(Debug)]
pub struct Reservation {
    budget: Budget,
    bytes: usize,
    exceeds: bool,
}

impl Reservation {
    /// Grows to this many bytes, if it has fewer. Blocks until others have released enough, first come, first
    /// served, but not beyond `deadline`. False if it stays as it was.
    ///
    /// If all threads held a part and waited for more, they would deadlock. So one at a time may exceed the
    /// budget, until it is dropped. Memory in use is bounded by the budget plus the largest single part.
    #[must_use]
    pub fn grow(&mut self, bytes: usize, deadline: Instant) -> bool {
        let more = bytes.saturating_sub(self.bytes);
        if more == 0 || self.exceeds {
            return true;
        }
        let inner = &self.budget.0;
        let mut state = inner.state.lock();
        state.last += 1;
        let ticket = state.last;
        state.waiting.insert(ticket);
        let grown = loop {
            if state.waiting.first() == Some(&ticket) {
                if state.free >= more {
                    state.free -= more;
                    self.bytes += more;
                    break true;
                }
                if !state.exceeded {
                    state.exceeded = true;
                    self.exceeds = true;
                    break true;
                }
            }
            if inner.changed.wait_until(&mut state, deadline).timed_out() {
                break false;
            }
        };
        state.waiting.remove(&ticket);
        drop(state);
        inner.changed.notify_all();
        grown
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.bytes > 0 || self.exceeds {
            let mut state = self.budget.0.state.lock();
            state.free += self.bytes;
            state.exceeded &= !self.exceeds;
            drop(state);
            self.budget.0.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;
    use std::time::Duration;

    #[test]
    fn one_at_a_time_may_exceed_the_budget_and_the_others_wait() {
        let budget = Budget::new(100);
        let [mut first, mut second, mut third] = [(); 3].map(|()| budget.part());
        let now = Instant::now();
        assert!(first.grow(60, now) && second.grow(40, now) && first.grow(60, now));
        assert!(second.grow(70, now), "to finish what it has begun");
        assert!(!first.grow(61, now) && !third.grow(1, now));
        drop(second);
        assert!(third.grow(40, now) && first.grow(61, now));
        drop((first, third));
        assert_eq!(format!("{budget:?}"), "Budget(100 bytes free)");
        assert!(!budget.0.state.lock().exceeded);
    }

    #[test]
    fn everybody_gets_to_an_end_however_many_grow_at_once() {
        let budget = Budget::new(100);
        let (used, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..32 {
                scope.spawn(|| {
                    let mut part = budget.part();
                    for step in 1..=4 {
                        let later = Instant::now() + Duration::from_secs(60);
                        assert!(part.grow(10 * step, later));
                        let now = used.fetch_add(10, Ordering::SeqCst) + 10;
                        most.fetch_max(now, Ordering::SeqCst);
                        thread::yield_now();
                    }
                    used.fetch_sub(40, Ordering::SeqCst);
                });
            }
        });
        assert!(most.into_inner() <= 140);
    }
}
