//! The ledger of a node.

use std::collections::HashMap;
use std::mem::size_of;

use kvcache_core::{IndexKey, Tier};

use crate::adapter::{RemovedBlocks, StoredBlocks};
use crate::index::Applied;
use crate::index::table::{Change, KeyState, shrink};

/// The ledger of a node: its hashes are index keys already, so only what it holds where must be known.
#[derive(Default)]
pub(in crate::index) struct NodeLedger {
    /// One bit per tier.
    held: HashMap<IndexKey, u8, KeyState>,
}

impl NodeLedger {
    pub(in crate::index) fn store(&mut self, blocks: &StoredBlocks, changes: &mut Vec<Change>) {
        for hash in &blocks.hashes {
            let key = IndexKey(hash.0);
            let tier = blocks.tier;
            if !tier.is_shared() {
                let held = self.held.entry(key).or_default();
                let bit = 1 << tier as u8;
                if *held & bit != 0 {
                    continue;
                }
                *held |= bit;
            }
            changes.push(Change {
                key,
                tier,
                is_stored: true,
            });
        }
    }

    pub(in crate::index) fn remove(
        &mut self,
        blocks: &RemovedBlocks,
        changes: &mut Vec<Change>,
    ) -> Applied {
        let mut applied = Applied::default();
        for hash in &blocks.hashes {
            let key = IndexKey(hash.0);
            let tier = blocks.tier;
            if !tier.is_shared() {
                let bit = 1 << tier as u8;
                match self.held.get_mut(&key) {
                    Some(held) if *held & bit != 0 => {
                        *held &= !bit;
                        if *held == 0 {
                            self.held.remove(&key);
                            shrink(&mut self.held);
                        }
                    }
                    _ => {
                        applied.unknown += 1;
                        continue;
                    }
                }
            }
            // In a shared tier whoever deletes says so, not only who stored.
            changes.push(Change {
                key,
                tier,
                is_stored: false,
            });
        }
        applied
    }

    /// Forgets everything; what the node held in its own tiers is appended to `changes`.
    pub(in crate::index) fn forget(&mut self, changes: &mut Vec<Change>) {
        for (&key, &held) in &self.held {
            for tier in Tier::ALL {
                if held & (1 << tier as u8) != 0 {
                    changes.push(Change {
                        key,
                        tier,
                        is_stored: false,
                    });
                }
            }
        }
        *self = Self::default();
    }

    pub(in crate::index) fn bytes(&self) -> usize {
        self.held.capacity() * (size_of::<(IndexKey, u8)>() + 1) * 8 / 7
    }
}
