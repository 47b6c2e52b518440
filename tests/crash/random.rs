//! Random choices that a seed repeats.

/// The variable that gives the seed of a run that is to be repeated.
pub const SEED: &str = "EXPORT_CRASH_SEED";

/// SplitMix64.
pub struct Random(u64);

impl Random {
    /// From the variable, or another one each time.
    pub fn seed() -> u64 {
        match std::env::var(SEED) {
            Ok(seed) => seed.parse().unwrap(),
            Err(_) => uuid::Uuid::now_v7().as_u64_pair().1,
        }
    }

    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Less than `end`.
    pub fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).unwrap()
    }

    pub fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}
