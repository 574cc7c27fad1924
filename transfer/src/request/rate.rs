//! Who goes first, and how fast.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use crate::sync::{Mutex, MutexGuard};

/// How much is saved up while nothing moves: as many bytes as the rate gives in this time.
const SAVED: Duration = Duration::from_millis(50);

/// Who goes first where requests wait for each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Priority {
    /// Someone waits for it, such as a decode that fetches blocks.
    #[default]
    Normal,
    /// Gives way to the others, such as an offload. It is not starved on purpose, and gets what they leave.
    Background,
}

/// A token bucket that may be overdrawn by one piece, so that pieces of any size pass and the rate holds in the mean.
#[derive(Default)]
pub(crate) struct Bucket(Mutex<Option<Level>>);

struct Level {
    bytes_per_s: u64,
    /// Bytes that may move at once; negative while what moved is paid for.
    bytes: f64,
    at: Instant,
}

impl Level {
    fn fill(&mut self, now: Instant) {
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        let rate = self.bytes_per_s as f64;
        self.bytes = (self.bytes + since * rate).min(SAVED.as_secs_f64() * rate);
        self.at = now;
    }
}

impl Bucket {
    fn lock(&self) -> MutexGuard<'_, Option<Level>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the rate in bytes a second; none: no limit.
    pub(crate) fn set(&self, bytes_per_s: Option<u64>) {
        *self.lock() = bytes_per_s.map(|bytes_per_s| Level {
            bytes_per_s,
            bytes: 0.0,
            at: Instant::now(),
        });
    }

    pub(super) fn bytes_per_s(&self) -> Option<u64> {
        self.lock().as_ref().map(|level| level.bytes_per_s)
    }

    pub(crate) fn is_limited(&self) -> bool {
        self.lock().is_some()
    }

    /// How long until something may move.
    pub(super) fn wait(&self, now: Instant) -> Duration {
        let mut level = self.lock();
        let Some(level) = &mut *level else {
            return Duration::ZERO;
        };
        level.fill(now);
        // Less than a byte is what rounding leaves.
        if level.bytes > -1.0 {
            return Duration::ZERO;
        }
        let seconds = -level.bytes / level.bytes_per_s as f64;
        Duration::from_secs_f64(seconds.min(3600.0)) + Duration::from_nanos(1)
    }

    pub(super) fn take(&self, bytes: u64) {
        if let Some(level) = &mut *self.lock() {
            level.bytes -= bytes as f64;
        }
    }
}

#[cfg(test)]
mod tests {
    //! The clock is an argument, so nothing is waited for.

    use super::*;

    /// A thousand pieces of many sizes, each as soon as it may move: what moved is what the rate gives, and one piece.
    #[test]
    fn the_mean_rate_is_the_one_that_was_set() {
        let bucket = Bucket::default();
        bucket.set(Some(1_000_000));
        let start = Instant::now();
        let (mut now, mut moved, mut last) = (start, 0_u64, 0);
        for n in 0..1000 {
            now += bucket.wait(now);
            assert_eq!(bucket.wait(now), Duration::ZERO);
            last = 1 + n * 7919 % 20_000;
            bucket.take(last);
            moved += last;
        }
        let given = now.duration_since(start).as_secs_f64() * 1e6;
        assert!((moved - last) as f64 <= given + 50_001.0, "{moved} {given}");
        assert!(moved as f64 >= given * 0.99, "{moved} {given}");
    }

    /// After a long silence no more than the savings go at once.
    #[test]
    fn silence_saves_little() {
        let bucket = Bucket::default();
        bucket.set(Some(1_000_000));
        let now = Instant::now() + Duration::from_secs(3600);
        let mut moved = 0;
        while bucket.wait(now).is_zero() {
            bucket.take(1000);
            moved += 1000;
        }
        assert_eq!(moved, 51_000);
        bucket.set(None);
        assert!(bucket.wait(now).is_zero());
    }
}
