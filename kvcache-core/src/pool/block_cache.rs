//! A prefix cache of one tier: the pool, the table and the evictor in one, for an engine's accelerator memory.

use std::fmt::Debug;
use std::hash::Hash;

use super::slot::{Filling, Sealed, Slot, Slots};
use crate::evict::{EvictionPolicy, LeafLru};
use crate::place::HostSlot;
use crate::table::KeyMap;

/// A prefix cache over a fixed arena: blocks are found by key, pinned while used, and evicted leaf first.
///
/// Deterministic; every call is O(log n) per block. Blocks are named by any key the caller likes.
#[derive(Debug)]
pub struct BlockCache<K> {
    slots: Slots,
    blocks: KeyMap<K, Slot<Sealed>>,
    evictor: LeafLru<K>,
}

/// Slots to be filled, and what had to leave for them.
#[derive(Debug)]
pub struct Allocation<K> {
    /// As many as were asked for.
    pub slots: Vec<Slot<Filling>>,
    /// The blocks that were evicted, in that order.
    pub evicted: Vec<K>,
}

impl<K: Copy + Eq + Hash + Debug + Send> BlockCache<K> {
    /// An empty cache of `slots` blocks.
    #[must_use]
    pub fn new(slots: u32) -> Self {
        Self {
            slots: Slots::new(slots),
            blocks: KeyMap::default(),
            evictor: LeafLru::new(),
        }
    }

    /// `count` slots to fill, evicting unpinned blocks, leaf first and least recently used, until there are enough.
    ///
    /// None, and nothing evicted, when pinned and filling slots leave too few.
    ///
    /// # Panics
    /// Never, unless the counts of this cache are wrong.
    pub fn allocate(&mut self, count: u32) -> Option<Allocation<K>> {
        let available = self.slots.vacant() as usize + self.evictor.evictable();
        if (count as usize) > available {
            return None;
        }
        let mut allocation = Allocation {
            slots: Vec::with_capacity(count as usize),
            evicted: Vec::new(),
        };
        while allocation.slots.len() < count as usize {
            if let Some(slot) = self.slots.allocate() {
                allocation.slots.push(slot);
            } else {
                let victim = self.evictor.victim();
                assert!(victim.is_some(), "fewer evictable blocks than counted");
                if let Some(victim) = victim {
                    self.remove(&victim);
                    allocation.evicted.push(victim);
                }
            }
        }
        Some(allocation)
    }

    /// The slot's bytes are those of `key`, which follows `parent`: it can be looked up from now on, and is unpinned.
    ///
    /// If the key is there already the new slot becomes vacant and the old one stays; the answer is where the block is.
    pub fn insert(&mut self, slot: Slot<Filling>, key: K, parent: Option<K>) -> HostSlot {
        if let Some(held) = self.blocks.get(&key) {
            let place = held.place();
            self.slots.abandon(slot);
            return place;
        }
        let sealed = self.slots.seal(slot);
        let place = sealed.place();
        self.blocks.insert(key, sealed);
        self.evictor.insert(key, parent);
        place
    }

    /// Gives a slot back unused.
    pub fn abandon(&mut self, slot: Slot<Filling>) {
        self.slots.abandon(slot);
    }

    /// Where the block is, without counting as a use.
    #[must_use]
    pub fn place(&self, key: &K) -> Option<HostSlot> {
        self.blocks.get(key).map(Slot::place)
    }

    /// How many blocks of the chain are here, from the first, without a hole; without counting as a use.
    #[must_use]
    pub fn depth(&self, chain: &[K]) -> usize {
        chain
            .iter()
            .take_while(|key| self.blocks.contains_key(key))
            .count()
    }

    /// These blocks were used, in this order: the last goes first among them. Absent ones are skipped.
    pub fn touch(&mut self, chain: &[K]) {
        self.evictor.touch(chain);
    }

    /// Keeps a block from being evicted until [`BlockCache::unpin`]; pins count. Where it is, or none if it is not here.
    pub fn pin(&mut self, key: &K) -> Option<HostSlot> {
        let place = self.blocks.get(key)?.place();
        if self.slots.pin(place) == 1 {
            self.evictor.pin(key);
        }
        Some(place)
    }

    /// Takes one pin back.
    ///
    /// # Panics
    /// If the block is not here or not pinned.
    pub fn unpin(&mut self, key: &K) {
        let place = self.place(key);
        assert!(place.is_some(), "{key:?} unpinned but not here");
        if let Some(place) = place
            && self.slots.unpin(place) == 0
        {
            self.evictor.unpin(key);
        }
    }

    /// Forgets an unpinned block. Whether it was here.
    ///
    /// # Panics
    /// If the block is pinned.
    pub fn remove(&mut self, key: &K) -> bool {
        let Some(slot) = self.blocks.remove(key) else {
            return false;
        };
        self.evictor.remove(key);
        self.slots.release(slot);
        true
    }

    /// How many blocks can be looked up.
    #[must_use]
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether nothing can be looked up.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// How many slots there are, in whatever state.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.slots.capacity()
    }

    /// How many slots could be had now: vacant ones and those of blocks that may be evicted.
    #[must_use]
    pub fn available(&self) -> usize {
        self.slots.vacant() as usize + self.evictor.evictable()
    }
}
