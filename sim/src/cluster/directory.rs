//! The global index in its most literal form: what each pod announced, entry by entry.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use kvcache_core::event::{EngineEvent, NodeEvent};
use kvcache_core::{BlockInfo, EngineHash, IndexKey, PeerId, Tier};

use crate::sequence::engine_hash;

/// An announcement of one of a pod's two sources.
#[derive(Clone, Debug)]
pub(super) enum Announcement {
    Node(NodeEvent),
    Engine(EngineEvent),
}

/// Who holds what, as far as announced.
#[derive(Debug, Default)]
pub(super) struct Directory {
    pods: BTreeMap<PeerId, Entries>,
    /// The shared tier, which belongs to no pod.
    shared: BTreeSet<IndexKey>,
}

/// What one incarnation of a pod has announced.
#[derive(Debug, Default)]
pub(super) struct Entries {
    pub(super) node: BTreeSet<(Tier, IndexKey)>,
    pub(super) engine: BTreeSet<EngineHash>,
}

impl Directory {
    pub(super) fn join(&mut self, peer: PeerId) {
        self.pods.insert(peer, Entries::default());
    }

    /// The pod is gone, and what it alone had.
    pub(super) fn remove(&mut self, peer: PeerId) {
        self.pods.remove(&peer);
    }

    pub(super) fn entries(&self, peer: PeerId) -> Option<&Entries> {
        self.pods.get(&peer)
    }

    /// Takes one announcement in; those of a pod that is gone come too late.
    pub(super) fn apply(&mut self, peer: PeerId, announcement: Announcement) {
        let Some(entries) = self.pods.get_mut(&peer) else {
            return;
        };
        match announcement {
            Announcement::Node(NodeEvent::Stored {
                key,
                tier: Tier::Object,
                ..
            }) => {
                self.shared.insert(key);
            }
            Announcement::Node(NodeEvent::Removed {
                key,
                tier: Tier::Object,
            }) => {
                self.shared.remove(&key);
            }
            Announcement::Node(NodeEvent::Stored { key, tier, .. }) => {
                entries.node.insert((tier, key));
            }
            Announcement::Node(NodeEvent::Removed { key, tier }) => {
                entries.node.remove(&(tier, key));
            }
            Announcement::Node(NodeEvent::Cleared) => entries.node.clear(),
            Announcement::Engine(EngineEvent::Stored { hashes, .. }) => {
                entries.engine.extend(hashes)
            }
            Announcement::Engine(EngineEvent::Removed { hashes, .. }) => {
                hashes.iter().for_each(|hash| {
                    entries.engine.remove(hash);
                });
            }
            Announcement::Engine(EngineEvent::Cleared) => entries.engine.clear(),
        }
    }

    /// How many blocks, from the first, the pod has in any tier that it reaches by itself.
    pub(super) fn depth(&self, peer: PeerId, chain: &[BlockInfo]) -> usize {
        self.pods.get(&peer).map_or(0, |entries| {
            let held = |block: &&BlockInfo| {
                entries.engine.contains(&engine_hash(&block.key)) || entries.serves(block)
            };
            chain.iter().take_while(held).count()
        })
    }

    /// Other pods that can serve blocks of the chain from their DRAM or disk, deepest first.
    pub(super) fn holders(&self, but: PeerId, chain: &[BlockInfo]) -> Vec<(PeerId, usize)> {
        let mut holders: Vec<(PeerId, usize)> = self
            .pods
            .iter()
            .filter(|(peer, _)| **peer != but)
            .map(|(peer, entries)| {
                (
                    *peer,
                    chain
                        .iter()
                        .take_while(|block| entries.serves(block))
                        .count(),
                )
            })
            .filter(|(_, depth)| *depth > 0)
            .collect();
        holders.sort_by_key(|(peer, depth)| (std::cmp::Reverse(*depth), *peer));
        holders
    }

    /// Which blocks, by position, are in the shared tier.
    pub(super) fn shared(&self, chain: &[BlockInfo]) -> Vec<Range<u32>> {
        let is_shared = |block: &BlockInfo| self.shared.contains(&block.index_key);
        let mut ranges: Vec<Range<u32>> = Vec::new();
        for (position, _) in (0..).zip(chain).filter(|(_, block)| is_shared(block)) {
            match ranges.last_mut() {
                Some(last) if last.end == position => last.end += 1,
                _ => ranges.push(position..position + 1),
            }
        }
        ranges
    }
}

impl Entries {
    fn serves(&self, block: &BlockInfo) -> bool {
        [Tier::Host, Tier::Disk]
            .iter()
            .any(|tier| self.node.contains(&(*tier, block.index_key)))
    }
}

/// Whether the event says that a block left DRAM.
pub(super) fn leaves_host(event: &NodeEvent) -> bool {
    matches!(
        event,
        NodeEvent::Removed {
            tier: Tier::Host,
            ..
        }
    )
}
