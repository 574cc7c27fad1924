//! What a node holds as of the batches that its history no longer has: where a replay that begins before those goes on.

use std::collections::HashMap;

use kvcache_core::event::NodeEvent;
use kvcache_core::{EngineHash, IndexKey, Tier};

use crate::adapter::{SourceEvent, SourceKind, decode_batch};

/// A block in at least one tier.
#[derive(Clone, Copy, Debug)]
struct Block {
    /// Counts up, so that blocks stay in the order in which they came, which is mostly that of sequences.
    order: u64,
    parent: Option<u64>,
    /// A bit a tier.
    tiers: u8,
}

/// The blocks that a row of batches leaves, by key. It has as many entries as the node holds blocks, and forgets a block
/// with its last tier.
#[derive(Debug, Default)]
pub(super) struct Held {
    blocks: HashMap<u64, Block>,
    came: u64,
}

const fn bit(tier: Tier) -> u8 {
    1 << tier as u8
}

impl Held {
    /// Takes in one more batch; false when it is not a node's, so that nothing is known any more.
    pub(super) fn fold(&mut self, payload: &[u8]) -> bool {
        let Ok(batch) = decode_batch(payload, SourceKind::Node) else {
            return false;
        };
        batch.events.into_iter().all(|event| match event {
            Ok(SourceEvent::Stored(stored)) => {
                let mut parent = stored.parent;
                for hash in stored.hashes {
                    self.store(hash, parent, stored.tier);
                    parent = Some(hash);
                }
                true
            }
            Ok(SourceEvent::Removed(removed)) => {
                for hash in removed.hashes {
                    self.keep(hash, !bit(removed.tier));
                }
                true
            }
            Ok(SourceEvent::Cleared) => {
                let shared = Tier::ALL.into_iter().filter(|tier| tier.is_shared());
                let shared = shared.fold(0, |bits, tier| bits | bit(tier));
                self.blocks.retain(|_, block| {
                    block.tiers &= shared;
                    block.tiers != 0
                });
                true
            }
            Err(_) => false,
        })
    }

    fn store(&mut self, hash: EngineHash, parent: Option<EngineHash>, tier: Tier) {
        let order = self.came;
        self.came += 1;
        let block = self.blocks.entry(hash.0).or_insert(Block {
            order,
            parent: parent.map(|hash| hash.0),
            tiers: 0,
        });
        block.tiers |= bit(tier);
    }

    fn keep(&mut self, hash: EngineHash, tiers: u8) {
        if let Some(block) = self.blocks.get_mut(&hash.0) {
            block.tiers &= tiers;
            if block.tiers == 0 {
                self.blocks.remove(&hash.0);
            }
        }
    }

    /// All of it as events; the same ones for the same row of batches.
    pub(super) fn events(&self) -> Vec<NodeEvent> {
        let mut blocks: Vec<_> = self.blocks.iter().collect();
        blocks.sort_unstable_by_key(|(_, block)| block.order);
        let mut events = Vec::with_capacity(blocks.len());
        for tier in Tier::ALL {
            let held = blocks
                .iter()
                .filter(|(_, block)| block.tiers & bit(tier) != 0);
            events.extend(held.map(|(key, block)| NodeEvent::Stored {
                key: IndexKey(**key),
                parent: block.parent.map(IndexKey),
                tier,
            }));
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::adapter::encode_node_batch;

    fn event() -> impl Strategy<Value = NodeEvent> {
        let tier = prop::sample::select(Tier::ALL.to_vec());
        let key = 0_u64..20;
        let parent = prop::option::of((0_u64..20).prop_map(IndexKey));
        prop_oneof![
            6 => (key.clone(), parent, tier.clone()).prop_map(|(key, parent, tier)| NodeEvent::Stored {
                key: IndexKey(key),
                parent,
                tier,
            }),
            3 => (key, tier).prop_map(|(key, tier)| NodeEvent::Removed { key: IndexKey(key), tier }),
            1 => Just(NodeEvent::Cleared),
        ]
    }

    proptest! {
        /// Any batches, against a set of (block, tier) changed event by event.
        #[test]
        fn what_is_held_is_what_the_events_leave(
            batches in prop::collection::vec(prop::collection::vec(event(), 0..10), 0..20),
        ) {
            let (mut held, mut literal) = (Held::default(), BTreeSet::new());
            for batch in &batches {
                prop_assert!(held.fold(&encode_node_batch(1.0, batch)));
                for event in batch {
                    match event {
                        NodeEvent::Stored { key, tier, .. } => {
                            literal.insert((key.0, *tier as usize));
                        }
                        NodeEvent::Removed { key, tier } => {
                            literal.remove(&(key.0, *tier as usize));
                        }
                        NodeEvent::Cleared => literal.retain(|(_, tier)| Tier::ALL[*tier].is_shared()),
                    }
                }
            }
            let told: Vec<_> = held.events();
            let pairs = told.iter().map(|event| match event {
                NodeEvent::Stored { key, tier, .. } => (key.0, *tier as usize),
                other => panic!("{other:?}"),
            });
            let pairs: Vec<_> = pairs.collect();
            prop_assert_eq!(pairs.len(), literal.len());
            prop_assert_eq!(pairs.into_iter().collect::<BTreeSet<_>>(), literal);
        }
    }

    /// What is no batch of a node's leaves nothing to build on.
    #[test]
    fn bytes_that_are_no_batch_are_not_folded() {
        assert!(!Held::default().fold(b"no batch"));
    }
}
