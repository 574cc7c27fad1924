//! What the manager knows, for those who ask; nothing here changes it.

use std::collections::BTreeSet;

use super::space::SlotRequest;
use super::{Held, Limits, Manager, Stats};
use crate::key::{BlockInfo, BlockKey};
use crate::place::Tier;
use crate::table::Block;

impl Manager {
    /// How much of a chain this node could supply now; does not count as a use.
    #[must_use]
    pub fn lookup(&self, keys: &[BlockKey]) -> Held {
        let mut held = Held::default();
        for block in keys.iter().map_while(|key| self.table.get(key)) {
            if block.host_place().is_some() {
                held.host += 1;
            } else if block.disk.is_some() {
                held.disk += 1;
            } else {
                break;
            }
            held.depth += 1;
        }
        held.expected = held.depth + self.coming(&keys[held.depth as usize..]);
        let known = |key: &&BlockKey| self.table.get(key).is_some_and(|b| b.object.is_some());
        held.shared_depth = keys.iter().take_while(known).count() as u32;
        held
    }

    /// How many of these blocks, from the first, are here or on their way into DRAM.
    fn coming(&self, keys: &[BlockKey]) -> u32 {
        let store_of = |request: &SlotRequest| match request {
            SlotRequest::Store {
                operation,
                position,
            } => {
                let store = self.stores.get(operation)?;
                Some(store.blocks.get(*position as usize)?.key)
            }
            SlotRequest::Stage(_) => None,
        };
        let waiting: BTreeSet<BlockKey> = match keys {
            [] => BTreeSet::new(),
            _ => self.wanted.iter().filter_map(store_of).collect(),
        };
        let is_coming = |key: &&BlockKey| {
            let block = self.table.get(key);
            let is_here = |b: &Block| b.host_place().is_some() || b.disk.is_some();
            block.is_some_and(|b| is_here(b) || b.is_filling()) || waiting.contains(key)
        };
        keys.iter().take_while(is_coming).count() as u32
    }

    /// The blocks that can be had from a tier of this node now, in no particular order.
    pub fn contents(&self, tier: Tier) -> impl Iterator<Item = BlockInfo> {
        let is_there = move |block: &&Block| match tier {
            Tier::Device => false,
            Tier::Host => block.host_place().is_some(),
            Tier::Disk => block.disk.is_some(),
            Tier::Object => block.object.is_some(),
        };
        self.table.iter().filter(is_there).map(|block| block.info)
    }

    /// The counters and levels.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats {
            host_blocks: u64::from(self.slots.sealed()),
            host_vacant: u64::from(self.slots.vacant()),
            host_quarantined: u64::from(self.slots.quarantined()),
            disk_blocks: self.segments.live(),
            object_blocks: self.objects.len() as u64,
            operations: (self.stores.len() + self.fetches.len() + self.flushes.len()) as u64,
            leases: (self.leases.len() - self.pins.len()) as u64,
            pins: self.pins.len() as u64,
            pinned_blocks: self.pinned.len() as u64,
            commands_in_flight: u64::from(self.in_flight),
            disk_stopped: u64::from(self.disk_stopped),
            ..self.stats
        }
    }

    /// The sizes and bounds this manager was made with.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }
}
