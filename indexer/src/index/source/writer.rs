//! What only the writer has, and all sources share.

use kvcache_core::{IndexKey, Tier};

use super::super::config::Applied;
use super::super::roots::{Keys, Roots};
use super::super::sets::Holder;
use super::super::tree::{Shared, Stretch, Tree};
use crate::score::TIERS;

/// Everything that only the writer has and all sources share.
pub(in crate::index) struct Writer {
    pub(in crate::index) tree: Tree,
    pub(in crate::index) roots: Roots,
    pub(in crate::index) keys: Keys,
    /// Entries of all sources by tier, and those in shared tiers.
    pub(in crate::index) entries: [u64; TIERS],
    /// Blocks in shared tiers.
    pub(in crate::index) shared_blocks: u64,
    /// Kept between events, so that they do not allocate.
    pub(super) block_keys: Vec<IndexKey>,
    pub(super) stretches: Vec<Stretch>,
    pub(super) unchanged: Vec<(u32, u32)>,
    /// Where somebody awaits them: the keys of blocks as they are stored.
    pub(in crate::index) noted: Option<Vec<IndexKey>>,
}

impl Writer {
    pub(in crate::index) fn new(keys: Keys, is_bounded: bool) -> Self {
        Self {
            tree: Tree::new(is_bounded),
            roots: Roots::default(),
            keys,
            entries: [0; TIERS],
            shared_blocks: 0,
            block_keys: Vec::new(),
            stretches: Vec::new(),
            unchanged: Vec::new(),
            noted: None,
        }
    }

    /// Ends an event: readers see it.
    pub(in crate::index) fn finish(&mut self, shared: &Shared) {
        while let Some(root) = self.tree.ended_roots.pop() {
            self.roots.release(root);
        }
        self.tree.finish(shared);
    }

    pub(in crate::index) fn bytes(&self) -> usize {
        self.tree.bytes()
            + self.roots.bytes()
            + self.block_keys.capacity() * size_of::<IndexKey>()
            + self.stretches.capacity() * size_of::<Stretch>()
            + self.unchanged.capacity() * size_of::<(u32, u32)>()
    }

    /// Takes blocks of shared tiers in, wherever they belong.
    pub(in crate::index) fn share_keys(
        &mut self,
        shared: &Shared,
        keys: impl Iterator<Item = IndexKey>,
    ) -> Applied {
        let mut applied = Applied::default();
        for key in keys {
            let place = self.tree.place(shared, None, key, true);
            self.share(shared, Stretch::of(place), true, &mut applied);
        }
        applied
    }

    pub(super) fn share(
        &mut self,
        shared: &Shared,
        blocks: Stretch,
        is_stored: bool,
        applied: &mut Applied,
    ) {
        self.unchanged.clear();
        if is_stored {
            let stored = self
                .tree
                .insert(shared, blocks, Holder::SHARED, &mut self.unchanged);
            applied.stored += stored;
            self.shared_blocks += u64::from(stored);
            self.entries[Tier::Object as usize] += u64::from(stored);
        } else {
            let removed = self
                .tree
                .remove(shared, blocks, Holder::SHARED, &mut self.unchanged);
            applied.removed += removed;
            self.shared_blocks -= u64::from(removed);
            self.entries[Tier::Object as usize] -= u64::from(removed);
        }
    }
}
