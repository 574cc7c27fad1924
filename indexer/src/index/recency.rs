//! When runs were used last, for the eviction of what was not.
//!
//! Time is counted in events of the writer and coarse, so that a lookup writes only when the clock has moved since the
//! last one that came by; it takes no lock and never waits.

use super::arena::Chunks;
use super::runs::RUNS_MAX;
use crate::sync::{AtomicU32, CHUNK_BITS, Ordering};

const RUNS_PER_CHUNK: u32 = 1 << CHUNK_BITS;

/// A stamp a run; without a budget there are none.
pub(super) struct Recency {
    clock: AtomicU32,
    stamps: Chunks<AtomicU32>,
}

impl Recency {
    pub(super) fn new(is_bounded: bool) -> Self {
        let chunks = if is_bounded {
            RUNS_MAX.div_ceil(RUNS_PER_CHUNK)
        } else {
            0
        };
        Self {
            clock: AtomicU32::new(1),
            stamps: Chunks::new(chunks as usize),
        }
    }

    fn stamp(&self, run: u32) -> Option<&AtomicU32> {
        let chunk = self.stamps.chunk((run / RUNS_PER_CHUNK) as usize)?;
        chunk.get((run % RUNS_PER_CHUNK) as usize)
    }

    /// The run is being used.
    #[inline]
    pub(super) fn touch(&self, run: u32) {
        if let Some(stamp) = self.stamp(run) {
            let now = self.clock.load(Ordering::Relaxed);
            // Many readers pass by the same runs: they share the line for as long as nobody writes.
            if stamp.load(Ordering::Relaxed) != now {
                stamp.store(now, Ordering::Relaxed);
            }
        }
    }

    /// When the run was used last.
    pub(super) fn last_use(&self, run: u32) -> u32 {
        self.stamp(run)
            .map_or(0, |stamp| stamp.load(Ordering::Relaxed))
    }

    /// Makes sure that a run has a stamp.
    pub(super) fn ensure(&self, run: u32) {
        let chunk = (run / RUNS_PER_CHUNK) as usize;
        self.stamps.ensure(chunk, RUNS_PER_CHUNK as usize);
    }

    /// Moves the clock on; false when it has come to its end.
    pub(super) fn tick(&self) -> bool {
        let now = self.clock.load(Ordering::Relaxed);
        if now == u32::MAX {
            return false;
        }
        self.clock.store(now + 1, Ordering::Relaxed);
        true
    }

    /// Begins anew: every run was used long ago.
    pub(super) fn restart(&self) {
        let chunks = (0..self.stamps.chunks_max()).filter_map(|chunk| self.stamps.chunk(chunk));
        for stamp in chunks.flatten() {
            stamp.store(0, Ordering::Relaxed);
        }
        self.clock.store(1, Ordering::Relaxed);
    }

    /// Gives memory back; all runs are before `end`.
    pub(super) fn trim(&mut self, end: u32) {
        let first = end.div_ceil(RUNS_PER_CHUNK) as usize;
        for chunk in first..self.stamps.chunks_max() {
            self.stamps.take(chunk);
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.stamps.bytes()
    }
}
