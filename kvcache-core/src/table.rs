//! Maps from block keys, and what the manager knows of each block.

use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::BuildHasherDefault;

use crate::id::{LeaseId, OperationId};
use crate::key::{BlockInfo, BlockKey, Checksum};
use crate::place::{DiskSlot, HostSlot};
use crate::pool::{Sealed, Slot};

/// A hash map whose hasher has no random seed, so that equal histories give equal maps.
///
/// Its iteration order is still arbitrary: nothing that shows outside may depend on it.
pub type KeyMap<K, V> = HashMap<K, V, BuildHasherDefault<DefaultHasher>>;

/// One block and all the places of this node where it is.
#[derive(Debug)]
pub(crate) struct Block {
    pub(crate) info: BlockInfo,
    /// Of the bytes in DRAM and on disk, which are always the same; none while there are none.
    pub(crate) checksum: Option<Checksum>,
    pub(crate) host: HostCopy,
    pub(crate) disk: Option<DiskSlot>,
    /// When it became known to be in the object store, as a number that orders such moments.
    pub(crate) object: Option<u64>,
    /// The number of its last use.
    pub(crate) used: u64,
    /// Whether it waits for a slot, to be brought up from disk.
    pub(crate) staging: bool,
    /// Who wants to know when it is sealed in DRAM, or that it will not be.
    pub(crate) waiters: Vec<Waiter>,
}

/// What DRAM has of a block.
#[derive(Debug)]
pub(crate) enum HostCopy {
    /// Nothing.
    Absent,
    /// Bytes that are being written, by the job that owns the slot.
    Filling,
    /// Verified bytes.
    Sealed {
        slot: Slot<Sealed>,
        /// Whether it is on its way down: then a job pins it, and the evictor does not know it.
        leaving: bool,
    },
}

/// Who waits for a block to be sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waiter {
    Store {
        operation: OperationId,
        position: u32,
    },
    Fetch {
        operation: OperationId,
        position: u32,
    },
    Lease(LeaseId),
}

impl Block {
    fn new(info: BlockInfo) -> Self {
        Self {
            info,
            checksum: None,
            host: HostCopy::Absent,
            disk: None,
            object: None,
            used: 0,
            staging: false,
            waiters: Vec::new(),
        }
    }

    /// Where its bytes are in DRAM, if they may be read.
    pub(crate) fn host_place(&self) -> Option<HostSlot> {
        match &self.host {
            HostCopy::Sealed { slot, .. } => Some(slot.place()),
            HostCopy::Absent | HostCopy::Filling => None,
        }
    }

    pub(crate) fn is_filling(&self) -> bool {
        matches!(self.host, HostCopy::Filling)
    }

    pub(crate) fn is_leaving(&self) -> bool {
        matches!(self.host, HostCopy::Sealed { leaving: true, .. })
    }

    fn is_gone(&self) -> bool {
        matches!(self.host, HostCopy::Absent)
            && self.disk.is_none()
            && self.object.is_none()
            && self.waiters.is_empty()
            && !self.staging
    }
}

/// Every block that is somewhere in this node's tiers, or on its way there.
#[derive(Debug, Default)]
pub(crate) struct Table {
    blocks: KeyMap<BlockKey, Block>,
}

impl Table {
    pub(crate) fn get(&self, key: &BlockKey) -> Option<&Block> {
        self.blocks.get(key)
    }

    pub(crate) fn get_mut(&mut self, key: &BlockKey) -> Option<&mut Block> {
        self.blocks.get_mut(key)
    }

    /// The block, as known or with no place yet. What was said of it first stands.
    pub(crate) fn admit(&mut self, info: BlockInfo) -> &mut Block {
        self.blocks
            .entry(info.key)
            .or_insert_with(|| Block::new(info))
    }

    /// Forgets the block if it is nowhere, nobody waits for it and it waits for nothing.
    pub(crate) fn forget_if_gone(&mut self, key: &BlockKey) {
        if self.blocks.get(key).is_some_and(Block::is_gone) {
            self.blocks.remove(key);
        }
    }

    /// All blocks, in no particular order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Block> {
        self.blocks.values()
    }
}
