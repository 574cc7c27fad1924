//! The host tier: one registered, shared region of equal slots, and the generation word of each.
//!
//! Peers read both one-sided. A slot's word is set before its first byte changes, so a reader that
//! copies the bytes first and finds the leased generation afterwards knows that no other block was
//! being written there when it began; the checksum covers the rest.

mod ahead;

use kvcache_core::place::HostSlot;
use kvcache_core::{Checksum, Error, Result};
use kvfabric_transfer::{Agent, Descriptor, HostMemory, Region, RegionOptions};

use self::ahead::Ahead;

/// Bytes of a generation word.
pub(crate) const GENERATION_BYTES: u64 = 8;

/// The slots of the host tier.
#[derive(Debug)]
pub(crate) struct Arena {
    blocks: Region,
    pages: Ahead,
    generations: Region,
    block_bytes: u64,
    slots: u32,
}

impl Arena {
    /// Memory for `slots` blocks, registered for peers to read when `shared`.
    pub(crate) fn new(agent: &Agent, slots: u32, block_bytes: u64, shared: bool) -> Result<Self> {
        let options = RegionOptions {
            remote_read: shared,
            remote_write: false,
        };
        let bytes = u64::from(slots).checked_mul(block_bytes).ok_or_else(|| {
            Error::invalid("block_bytes", block_bytes, ..=u64::MAX / u64::from(slots))
        })?;
        let region = |bytes| agent.register(HostMemory::shared(bytes)?, options);
        let blocks = region(bytes).map_err(|error| error.at("host tier"))?;
        Ok(Self {
            pages: Ahead::start(&blocks),
            blocks,
            generations: region(u64::from(slots) * GENERATION_BYTES)
                .map_err(|error| error.at("generation words of the host tier"))?,
            block_bytes,
            slots,
        })
    }

    /// Where the slot's bytes are.
    pub(crate) fn block(&self, slot: HostSlot) -> Descriptor {
        self.blocks
            .descriptor(self.index(slot) * self.block_bytes, self.block_bytes)
    }

    /// Where the slot's generation word is.
    pub(crate) fn generation(&self, slot: HostSlot) -> Descriptor {
        self.generations
            .descriptor(self.index(slot) * GENERATION_BYTES, GENERATION_BYTES)
    }

    /// Tells readers of the slot's earlier blocks that their bytes end here; before the first write.
    pub(crate) fn begin_fill(&self, slot: HostSlot) -> Result<()> {
        let generation = u64::from(slot.generation.0);
        self.pages
            .reached((self.index(slot) + 1) * self.block_bytes);
        self.generations
            .store_u64(self.index(slot) * GENERATION_BYTES, generation)
    }

    /// The checksum of the slot's bytes as they are now.
    pub(crate) fn checksum(&self, slot: HostSlot) -> Result<Checksum> {
        let offset = self.index(slot) * self.block_bytes;
        self.blocks
            .checksum(offset, self.block_bytes)
            .map(Checksum::crc32c)
    }

    /// Refuses every new reader and copy.
    pub(crate) fn close(&self) {
        self.pages.stop();
        // Nobody waits for readers in flight: the regions keep their memory until the last is done.
        drop(self.blocks.deregister());
        drop(self.generations.deregister());
    }

    fn index(&self, slot: HostSlot) -> u64 {
        assert!(
            slot.index.0 < self.slots,
            "slot {} of {}",
            slot.index,
            self.slots
        );
        u64::from(slot.index.0)
    }
}
