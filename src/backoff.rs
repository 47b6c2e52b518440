//! How long to wait after failures: exponential backoff with jitter; pure except for [`jitter`].
//!
//! Not here: what is waited for.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

/// Waits differ by up to this fraction either way, so that boxes do not all retry at the same time.
const SPREAD: f64 = 0.2;
/// More doublings than any wait here needs, and few enough not to overflow.
const MOST_DOUBLINGS: u32 = 20;

/// The wait after this many failures in a row: `first` after one, twice that after two and so on, at most
/// `longest`, spread by `jitter` from 0 to 1: see [`jittered`].
pub fn backoff(first: Duration, longest: Duration, failures: u32, jitter: f64) -> Duration {
    let doublings = failures.saturating_sub(1).min(MOST_DOUBLINGS);
    jittered((first * (1 << doublings)).min(longest), jitter)
}

/// A wait that differs from `wait` by up to a fifth: less for a `jitter` of 0, more for 1, none for 0.5.
pub fn jittered(wait: Duration, jitter: f64) -> Duration {
    wait.mul_f64(1.0 + SPREAD * (2.0 * jitter - 1.0))
}

/// A random number, uniform from 0 to 1. std seeds its hash maps from the system's randomness, which is good
/// enough for waits.
pub fn jitter() -> f64 {
    RandomState::new().build_hasher().finish() as f64 / u64::MAX as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FIRST: Duration = Duration::from_secs(1);
    const LONGEST: Duration = Duration::from_secs(30);

    #[test]
    fn waits_double_up_to_the_longest_and_differ_by_a_fifth() {
        let even = |failures| backoff(FIRST, LONGEST, failures, 0.5).as_secs();
        assert_eq!([1, 2, 3, 4, 5, 6, 7].map(even), [1, 2, 4, 8, 16, 30, 30]);
        assert_eq!(even(u32::MAX), 30);
        assert_eq!(backoff(FIRST, LONGEST, 1, 0.0), Duration::from_millis(800));
        assert_eq!(backoff(FIRST, LONGEST, 99, 1.0), Duration::from_secs(36));
    }

    proptest! {
        #[test]
        fn no_wait_leaves_its_bounds(failures: u32, longest in 1_u64..100_000, jitter in 0.0..=1.0) {
            let longest = Duration::from_secs(longest);
            let wait = backoff(FIRST, longest, failures, jitter);
            prop_assert!(wait >= FIRST.mul_f64(0.79) && wait <= longest.mul_f64(1.21));
        }
    }
}
