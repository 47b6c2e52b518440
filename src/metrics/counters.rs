//! What counts: plain atomics, in no order among each other.
//!
//! Not here: what is counted, and by which names ([`super::Metrics`]).

use std::array;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// The last name of a [`Family`], which counts whatever has none of its own.
pub const OTHER: &str = "other";

/// A number that only rises.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    pub fn one(&self) {
        self.add(1);
    }

    /// Adds this many.
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Relaxed);
    }

    /// The count.
    pub fn value(&self) -> f64 {
        self.0.load(Relaxed) as f64
    }
}

/// A number as it was last found.
#[derive(Debug, Default)]
pub struct Found(AtomicU64);

impl Found {
    /// From now on it is this one.
    pub fn set(&self, number: u64) {
        self.0.store(number, Relaxed);
    }

    /// The number.
    pub fn value(&self) -> f64 {
        self.0.load(Relaxed) as f64
    }
}

/// How many there are at present.
#[derive(Debug, Default)]
pub struct Level(AtomicU64);

impl Level {
    /// Counts one more until the returned value is dropped.
    pub fn enter(&self) -> Entered<'_> {
        self.0.fetch_add(1, Relaxed);
        Entered(self)
    }

    /// The count.
    pub fn value(&self) -> f64 {
        self.0.load(Relaxed) as f64
    }
}

/// One of those that a [`Level`] counts.
#[must_use]
pub struct Entered<'a>(&'a Level);

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Relaxed);
    }
}

/// Counters of one metric, one for each value of its label. The values are fixed, and the last one counts
/// whatever has none of its own.
#[derive(Debug)]
pub struct Family<const N: usize> {
    /// The values of the label.
    pub names: [&'static str; N],
    /// Their counters.
    pub counts: [Counter; N],
}

impl<const N: usize> Family<N> {
    /// For these names, the last of which is [`OTHER`].
    pub fn new(names: [&'static str; N]) -> Self {
        Self {
            names,
            counts: array::from_fn(|_| Counter::default()),
        }
    }

    /// Adds one to the counter of this name.
    pub fn count(&self, name: &str) {
        let known = self.names.iter().position(|known| *known == name);
        if let Some(count) = self.counts.get(known.unwrap_or(N - 1)) {
            count.one();
        }
    }
}

/// Counts durations in buckets with fixed bounds.
#[derive(Debug)]
pub struct Histogram<const N: usize> {
    /// Upper bounds in microseconds, rising.
    pub bounds: [u64; N],
    /// How many durations are in each bucket, and in none before it.
    pub counts: [Counter; N],
    /// How many are longer than the last bound.
    pub longer: Counter,
    /// Microseconds of all together.
    pub sum: Counter,
}

impl<const N: usize> Histogram<N> {
    /// For these upper bounds, in microseconds and rising.
    pub fn new(bounds: [u64; N]) -> Self {
        Self {
            bounds,
            counts: array::from_fn(|_| Counter::default()),
            longer: Counter::default(),
            sum: Counter::default(),
        }
    }

    /// Counts a duration.
    pub fn observe(&self, duration: Duration) {
        let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let bucket = self.bounds.iter().position(|bound| micros <= *bound);
        let counts = bucket.and_then(|bucket| self.counts.get(bucket));
        counts.unwrap_or(&self.longer).one();
        self.sum.add(micros);
    }
}
