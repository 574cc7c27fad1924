//! Where chains start: one root per adapter and salt.

use std::collections::HashMap;

use kvcache_core::prefix::{ChainRoot, IndexScheme, Namespace};
use kvcache_core::shape::TokensPerBlock;

use super::image::ImageNamespace;

/// How keys are made.
pub(super) struct Keys {
    pub(super) scheme: IndexScheme,
    pub(super) model: String,
    pub(super) block_size: TokensPerBlock,
}

/// The chains' starting points in use: one per adapter and salt, for as long as a run needs it.
#[derive(Default)]
pub(super) struct Roots {
    slots: Vec<RootSlot>,
    by_name: HashMap<ImageNamespace, u32>,
    free: Vec<u32>,
    /// The one asked for last: the next is likely the same.
    newest: Option<u32>,
    /// Of all names.
    text_bytes: usize,
}

struct RootSlot {
    root: ChainRoot,
    name: ImageNamespace,
    /// At 0 the slot waits for reuse.
    references: usize,
}

impl Roots {
    /// The root for an adapter and salt, with a reference to it.
    pub(super) fn acquire(
        &mut self,
        keys: &Keys,
        lora: Option<&str>,
        cache_salt: Option<&str>,
    ) -> u32 {
        let newest = self.newest.and_then(|slot| self.slots.get(slot as usize));
        if let (Some(newest), Some(slot)) = (newest, self.newest)
            && newest.references > 0
            && (
                newest.name.lora.as_deref(),
                newest.name.cache_salt.as_deref(),
            ) == (lora, cache_salt)
        {
            self.add(slot);
            return slot;
        }
        let name = ImageNamespace {
            lora: lora.map(str::to_owned),
            cache_salt: cache_salt.map(str::to_owned),
        };
        if let Some(&slot) = self.by_name.get(&name) {
            self.add(slot);
            self.newest = Some(slot);
            return slot;
        }
        let root = keys.scheme.root(&Namespace {
            model: keys.scheme.model_in_root(&keys.model),
            lora,
            cache_salt,
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
        self.text_bytes += name.text_bytes();
        self.by_name.insert(name, slot);
        self.newest = Some(slot);
        slot
    }

    pub(super) fn get(&self, slot: u32) -> &ChainRoot {
        &self.slots[slot as usize].root
    }

    pub(super) fn name(&self, slot: u32) -> &ImageNamespace {
        &self.slots[slot as usize].name
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
            self.text_bytes -= root.name.text_bytes();
            self.by_name.remove(&root.name);
            self.free.push(slot);
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.slots.capacity() * size_of::<RootSlot>()
            + self.by_name.capacity() * (size_of::<(ImageNamespace, u32)>() + 1) * 8 / 7
            + self.free.capacity() * size_of::<u32>()
            // Each name is there twice, as what is found and what finds it.
            + self.text_bytes * 2
    }
}
