//! What a source loses when there is no room.

use std::sync::Arc;

use kvcache_core::{EngineHash, Tier};

use super::super::tree::{Shared, Stretch};
use super::{Source, Writer};
use crate::sync::{AtomicU64, Ordering};

/// How many entries of a source were given up for lack of room; read without a lock, and good as long as somebody has it.
#[derive(Clone, Debug, Default)]
pub struct Evicted(Arc<AtomicU64>);

impl Evicted {
    /// Entries that the source has not withdrawn since, as far as is known: while there are any, it may hold more than
    /// lookups find.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Only the writer calls this.
    pub(super) fn set(&self, entries: u64) {
        self.0.store(entries, Ordering::Relaxed);
    }
}

impl Source {
    /// Gives up blocks that the source holds in a tier, all copies of each; the tree still has them.
    pub(in crate::index) fn lose(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        blocks: Stretch,
        tier: Tier,
    ) {
        if !self.more.is_empty() || !self.roots.is_empty() {
            for block in blocks.start..blocks.end {
                let position = writer.tree.block(shared, blocks.run, block).position;
                self.more.remove(&(position, tier as u8));
                if let Some(root) = self.roots.remove(&position) {
                    writer.roots.release(root);
                }
            }
        }
        self.lose_fine(writer, shared, blocks, tier);
        self.count_out(blocks.run, blocks.len());
        if !tier.is_shared() {
            let lost = u64::from(blocks.len());
            self.entries -= lost;
            writer.entries[tier as usize] -= lost;
            self.evicted.set(self.evicted.entries() + lost);
        }
        if !self.names.is_empty() {
            self.stale_names += blocks.len() as usize;
        }
    }

    /// Forgets names of blocks that are gone, once they may be many.
    pub(in crate::index) fn forget_stale_names(&mut self, writer: &Writer, shared: &Shared) {
        if self.stale_names * 2 <= self.names.len() {
            return;
        }
        self.stale_names = 0;
        let hashes: Vec<EngineHash> = self.names.keys().copied().collect();
        self.forget_names(writer, shared, &hashes);
    }

    /// Forgets what waits, parts of blocks too, where the tree has nothing left: nothing of it is answered.
    pub(in crate::index) fn drop_waiting(&mut self, writer: &mut Writer) -> usize {
        let dropped = self.orphans.len();
        self.forget_fine(writer);
        self.orphans = super::super::orphans::Orphans::new(self.orphans.blocks_max());
        dropped
    }

    /// How many removals of so many unknown blocks may be of blocks that the budget had taken.
    pub(in crate::index) fn withdraw_evicted(&mut self, unknown: u32) -> u32 {
        if unknown == 0 {
            return 0;
        }
        let evicted = self.evicted.entries();
        let late = evicted.min(unknown.into());
        self.evicted.set(evicted - late);
        late as u32
    }
}
