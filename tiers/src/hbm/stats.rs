//! What an HBM tier has done.

use std::sync::atomic::{AtomicU64, Ordering};

/// What has happened so far.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) hits: AtomicU64,
    pub(super) promoted: AtomicU64,
    pub(super) stored: AtomicU64,
    pub(super) evicted: AtomicU64,
    pub(super) offloaded: AtomicU64,
    pub(super) corrupt: AtomicU64,
    pub(super) unsummed: AtomicU64,
}

/// What an HBM tier has done, and what is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HbmStats {
    /// Blocks that there is room for.
    pub slots: u64,
    /// Blocks that are up.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Blocks that fetches brought from here.
    pub hits: u64,
    /// Blocks that came up from the cache.
    pub promoted: u64,
    /// Blocks that came from the engine's memory, within the GPU.
    pub stored: u64,
    /// Blocks that made room for others.
    pub evicted: u64,
    /// Blocks that went down into the cache, or that it had when they were to.
    pub offloaded: u64,
    /// Blocks that were dropped because their bytes were not those that came up.
    pub corrupt: u64,
    /// Blocks that fetches brought within the GPU and nobody summed, because the GPU does not.
    pub unsummed: u64,
}

impl Counts {
    pub(super) fn read(&self, slots: u32, held: u32, block_bytes: u64) -> HbmStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        HbmStats {
            slots: slots.into(),
            blocks: held.into(),
            bytes: u64::from(held) * block_bytes,
            hits: read(&self.hits),
            promoted: read(&self.promoted),
            stored: read(&self.stored),
            evicted: read(&self.evicted),
            offloaded: read(&self.offloaded),
            corrupt: read(&self.corrupt),
            unsummed: read(&self.unsummed),
        }
    }
}

impl HbmStats {
    /// Every value by its name, in a fixed order.
    #[must_use]
    pub fn entries(&self) -> [(&'static str, u64); 10] {
        [
            ("hbm_slots", self.slots),
            ("hbm_blocks", self.blocks),
            ("hbm_bytes", self.bytes),
            ("hbm_hits", self.hits),
            ("hbm_promoted", self.promoted),
            ("hbm_stored", self.stored),
            ("hbm_evicted", self.evicted),
            ("hbm_offloaded", self.offloaded),
            ("hbm_corrupt", self.corrupt),
            ("hbm_unsummed", self.unsummed),
        ]
    }
}
