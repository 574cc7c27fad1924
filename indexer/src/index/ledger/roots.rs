//! Where a source's chains start: one root per adapter and salt.

use std::collections::HashMap;

use kvcache_core::prefix::{ChainRoot, IndexScheme, Namespace};
use kvcache_core::shape::TokensPerBlock;

use crate::adapter::StoredBlocks;

/// How a ledger makes keys.
pub(in crate::index) struct Keys {
    pub(in crate::index) scheme: IndexScheme,
    pub(in crate::index) model: String,
    pub(in crate::index) block_size: TokensPerBlock,
}

/// The chains' starting points that a source uses: one per adapter and salt, for as long as a block needs it.
#[derive(Default)]
pub(super) struct Roots {
    slots: Vec<RootSlot>,
    by_name: HashMap<RootName, u32>,
    free: Vec<u32>,
}

type RootName = (Option<String>, Option<String>);

struct RootSlot {
    root: ChainRoot,
    name: RootName,
    /// At 0 the slot waits for reuse.
    references: usize,
}

impl Roots {
    /// The root for the adapter and salt of an event, with a reference to it.
    pub(super) fn acquire(&mut self, keys: &Keys, blocks: &StoredBlocks) -> u32 {
        let name = (blocks.lora.clone(), blocks.cache_salt.clone());
        if let Some(&slot) = self.by_name.get(&name) {
            self.add(slot);
            return slot;
        }
        let root = keys.scheme.root(&Namespace {
            model: keys.scheme.model_in_root(&keys.model),
            lora: name.0.as_deref(),
            cache_salt: name.1.as_deref(),
        });
        let used = RootSlot {
            root,
            name: name.clone(),
            references: 1,
        };
        let slot = match self.free.pop() {
            Some(slot) => {
                self.slots[slot as usize] = used;
                slot
            }
            None => {
                self.slots.push(used);
                self.slots.len() as u32 - 1
            }
        };
        self.by_name.insert(name, slot);
        slot
    }

    pub(super) fn get(&self, slot: u32) -> &ChainRoot {
        &self.slots[slot as usize].root
    }

    pub(super) fn add(&mut self, slot: u32) {
        self.slots[slot as usize].references += 1;
    }

    pub(super) fn release(&mut self, slot: u32) {
        let root = &mut self.slots[slot as usize];
        assert!(
            root.references > 0,
            "root {slot} released more often than acquired"
        );
        root.references -= 1;
        if root.references == 0 {
            self.by_name.remove(&root.name);
            self.free.push(slot);
        }
    }
}
