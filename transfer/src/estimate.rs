//! How long a transfer will take, by what others took.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kvcache_core::{Error, Result};

/// What a backend is taken to cost before it has shown it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathCost {
    /// What a transfer takes that moves next to nothing.
    pub latency: Duration,
    /// How fast long ones are; not 0.
    pub bytes_per_s: u64,
}

impl PathCost {
    /// # Errors
    /// [`kvcache_core::ErrorKind::Invalid`] without bandwidth.
    pub(crate) fn check(&self) -> Result<()> {
        match self.bytes_per_s {
            0 => Err(Error::invalid("bytes a second", 0, 1..=u64::MAX)),
            _ => Ok(()),
        }
    }

    /// Of the usual machine: the order of magnitude, no more.
    pub(crate) fn usual(backend: &str) -> Self {
        let (latency_ns, bytes_per_s) = match backend {
            "memcpy" | "shm" => (800, 8_000_000_000),
            "cma" => (3_000, 6_000_000_000),
            "verbs" => (5_000, 10_000_000_000),
            "ucx" => (10_000, 5_000_000_000),
            "cuda" => (15_000, 20_000_000_000),
            "staged" => (150_000, 1_000_000_000),
            "file" | "gds" => (100_000, 1_000_000_000),
            "object" => (20_000_000, 200_000_000),
            _ => (30_000, 1_500_000_000),
        };
        Self {
            latency: Duration::from_nanos(latency_ns),
            bytes_per_s,
        }
    }

    fn ns(&self, bytes: u64) -> f64 {
        self.latency.as_nanos() as f64 + bytes as f64 * 1e9 / self.bytes_per_s as f64
    }
}

/// When a transfer will be done, and how that is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// The backend that would move it now.
    pub backend: &'static str,
    /// What is worth knowing of how it moves the bytes, such as the memory that they go through; empty if there is nothing.
    pub detail: String,
    /// From the post to its completion, if nothing else is in its way.
    pub expected: Duration,
    /// Whether transfers of about this size have shown it; otherwise it is what the backend is taken to cost.
    pub measured: bool,
    /// Backends that go before this one, with what kept them from being chosen.
    pub refused: Vec<(&'static str, String)>,
}

/// Sizes are told apart by their power of two, below the last.
const SIZES: usize = 41;

/// From here on it is mostly bytes that take time.
const LONG_BYTES_MIN: u64 = 64 << 10;

/// How much of an average the latest transfer is: one part in this many.
const WEIGHT: u64 = 8;

/// What transfers of each size took: nanoseconds, a moving average; 0: none was seen.
pub(crate) struct Costs([AtomicU64; SIZES]);

impl Default for Costs {
    fn default() -> Self {
        Self([const { AtomicU64::new(0) }; SIZES])
    }
}

impl Costs {
    fn size(bytes: u64) -> usize {
        (bytes.max(1).ilog2() as usize).min(SIZES - 1)
    }

    /// A transfer is done. Racing threads may lose one to another.
    pub(crate) fn saw(&self, bytes: u64, elapsed: Duration) {
        let entry = &self.0[Self::size(bytes)];
        let ns = elapsed.as_nanos() as f64;
        // Of long ones as if they had been of the least of their sizes: averages are of one size.
        let ns = match bytes {
            ..LONG_BYTES_MIN => ns,
            _ => ns * (1_u64 << Self::size(bytes)) as f64 / bytes as f64,
        };
        let ns = (ns as u64).max(1);
        let average = match entry.load(Ordering::Relaxed) {
            0 => ns,
            average => average - average / WEIGHT + ns / WEIGHT,
        };
        entry.store(average.max(1), Ordering::Relaxed);
    }

    /// Nanoseconds for so many bytes, and whether they were measured. What was seen of other sizes corrects `usual`.
    pub(crate) fn expect(&self, bytes: u64, usual: &PathCost) -> (f64, bool) {
        let size = Self::size(bytes);
        let seen = |size: usize| {
            let ns = self.0.get(size)?.load(Ordering::Relaxed);
            (ns > 0).then_some((size, ns as f64))
        };
        let nearest = (0..SIZES).find_map(|away| {
            let below = size.checked_sub(away).and_then(seen);
            below.or_else(|| seen(size + away))
        });
        let Some((near, ns)) = nearest else {
            return (usual.ns(bytes), false);
        };
        if near == size && bytes < LONG_BYTES_MIN {
            return (ns, true);
        }
        // They differ as they usually would.
        let expected = ns * usual.ns(bytes) / usual.ns(1 << near);
        (expected, near == size)
    }
}

#[cfg(test)]
mod tests {
    //! Averages, with times that the tests say.

    use super::*;

    const USUAL: PathCost = PathCost {
        latency: Duration::from_micros(10),
        bytes_per_s: 1_000_000_000,
    };

    fn expect(costs: &Costs, bytes: u64) -> (u64, bool) {
        let (ns, measured) = costs.expect(bytes, &USUAL);
        (ns as u64, measured)
    }

    #[test]
    fn what_was_never_seen_costs_what_it_usually_does() {
        let costs = Costs::default();
        assert_eq!(expect(&costs, 0), (10_000, false));
        assert_eq!(expect(&costs, 1_000_000), (1_010_000, false));
        assert!(!expect(&costs, u64::MAX).1);
    }

    #[test]
    fn what_was_seen_is_expected_again() {
        let costs = Costs::default();
        for _ in 0..100 {
            costs.saw(4096, Duration::from_micros(50));
            costs.saw(1 << 24, Duration::from_millis(4));
        }
        assert_eq!(expect(&costs, 4096), (50_000, true));
        assert_eq!(expect(&costs, 1 << 24), (4_000_000, true));
        costs.saw(7000, Duration::from_micros(50));
        assert_eq!(expect(&costs, 7000), (50_000, true));
        // Larger than what was seen, by as much as is usual.
        let (ns, measured) = expect(&costs, 1 << 30);
        assert!(!measured);
        assert!((250_000_000..270_000_000).contains(&ns), "{ns}");
    }

    #[test]
    fn the_average_follows_a_change() {
        let costs = Costs::default();
        (0..100).for_each(|_| costs.saw(1 << 20, Duration::from_millis(1)));
        (0..100).for_each(|_| costs.saw(1 << 20, Duration::from_millis(3)));
        let (ns, _) = expect(&costs, 1 << 20);
        assert!((2_900_000..=3_000_000).contains(&ns), "{ns}");
        costs.saw(1 << 20, Duration::from_millis(1));
        let (ns, _) = expect(&costs, 1 << 20);
        assert!((2_600_000..2_800_000).contains(&ns), "{ns}");
    }

    #[test]
    fn a_path_without_bandwidth_is_refused() {
        let cost = PathCost {
            bytes_per_s: 0,
            ..USUAL
        };
        assert!(cost.check().is_err());
    }
}
