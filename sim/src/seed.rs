//! Randomness that a seed replays on every machine and in every version.
//!
//! SplitMix64, in integers only: a crate's generator may change its stream between versions, and `ln` may differ in its
//! last bit between machines; either would change every golden workload.

/// The step of SplitMix64: 2⁶⁴ divided by the golden ratio, made odd.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Scrambles a number so that neighbours have nothing in common; a bijection.
#[must_use]
pub const fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// A stream of numbers that its seed determines.
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
}

impl Random {
    /// The stream of this seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self { state: mix(seed) }
    }

    /// The stream number `stream` of this seed: different numbers give unrelated streams.
    #[must_use]
    pub const fn stream(seed: u64, stream: u64) -> Self {
        Self {
            state: mix(mix(seed) ^ mix(stream.wrapping_add(GOLDEN))),
        }
    }

    /// The next number.
    pub const fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(GOLDEN);
        mix(self.state)
    }

    /// A number below `bound`; 0 for a bound of 0.
    pub const fn below(&mut self, bound: u64) -> u64 {
        ((self.next_u64() as u128 * bound as u128) >> 64) as u64
    }

    /// A position in a list of `len` entries; 0 for an empty one.
    pub const fn position(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }

    /// True in `parts` of a million cases.
    pub const fn happens(&mut self, parts_per_million: u32) -> bool {
        self.below(1_000_000) < parts_per_million as u64
    }

    /// Puts a list into a random order.
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for end in (1..list.len()).rev() {
            list.swap(end, self.position(end + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first outputs of SplitMix64 for state 0, as published by its author.
    #[test]
    fn the_stream_is_splitmix64() {
        let mut random = Random { state: 0 };
        assert_eq!(random.next_u64(), 0xe220_a839_7b1d_cdaf);
        assert_eq!(random.next_u64(), 0x6e78_9e6a_a1b9_65f4);
    }

    /// Draws many numbers below small bounds and checks the range and that every value occurs.
    #[test]
    fn numbers_below_a_bound_cover_it_and_stay_below() {
        let mut random = Random::new(7);
        for bound in 1..20_u64 {
            let mut seen = vec![false; bound as usize];
            for _ in 0..1_000 {
                seen[random.below(bound) as usize] = true;
            }
            assert!(seen.iter().all(|seen| *seen), "bound {bound}: {seen:?}");
        }
        assert_eq!(random.below(0), 0);
    }

    /// Shuffles a list and compares its sorted content with the original.
    #[test]
    fn a_shuffled_list_has_the_same_entries_in_another_order() {
        let original: Vec<u32> = (0..100).collect();
        let mut shuffled = original.clone();
        Random::stream(1, 2).shuffle(&mut shuffled);
        assert_ne!(shuffled, original);
        shuffled.sort_unstable();
        assert_eq!(shuffled, original);
    }
}
