//! What goes into a cache and what comes back.

use kvcache_core::manager::{self, Stats};
use kvcache_core::ports::Located;
use kvcache_core::{BlockInfo, Checksum, PinId, PodName, Tier};
use tokio::sync::oneshot;

use crate::pages::BlockMemory;

/// A block to keep, and where the engine has it.
#[derive(Clone, Debug)]
pub struct StoreBlock {
    /// What the block is.
    pub info: BlockInfo,
    /// Its bytes, in memory registered with the cache's agent.
    pub memory: BlockMemory,
}

/// A block to bring, and where the engine wants it.
#[derive(Clone, Debug)]
pub struct FetchBlock {
    /// What the block is.
    pub info: BlockInfo,
    /// Where its bytes shall go, in memory registered with the cache's agent.
    pub memory: BlockMemory,
}

/// Where the bytes of a fetched block came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A slot of this node's HBM tier.
    Device,
    /// This node's host memory.
    Host,
    /// This node's disk.
    Disk,
    /// Another pod, which had it in this tier when it was asked.
    Peer {
        /// Who.
        pod: PodName,
        /// The holder's tier.
        tier: Tier,
    },
    /// The object store.
    Object,
    /// Nowhere in time: the engine computes it. Its memory may have been written to.
    Miss,
}

/// What became of a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreReport {
    /// Blocks copied and sealed.
    pub stored: u32,
    /// Blocks that were here already.
    pub already_held: u32,
    /// Blocks for which there was no room in time.
    pub refused: u32,
    /// Blocks whose copy failed.
    pub failed: u32,
}

/// What became of a store whose bytes were to match sums.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stored {
    pub(crate) report: StoreReport,
    /// The blocks, by position, whose bytes were something else; the report counts them as failed.
    pub(crate) corrupt: Vec<u32>,
}

/// What became of a fetch.
#[derive(Debug, Default)]
pub struct FetchReport {
    /// One entry per block asked for, in order. The first miss ends the useful prefix.
    pub sources: Vec<Source>,
    /// The blocks, by position, whose engine memory a failed transfer may still write to: wait for
    /// [`FetchReport::drained`] before using that memory. All of them are misses; mostly there are none.
    pub unsettled: Vec<u32>,
    pub(crate) drained: Option<oneshot::Receiver<()>>,
}

/// What became of a fetch, and what its bytes are.
#[derive(Debug, Default)]
pub(crate) struct Fetched {
    pub(crate) report: FetchReport,
    /// What the bytes of each block were found to be, of those that came.
    pub(crate) sums: Vec<Option<Checksum>>,
}

impl FetchReport {
    /// How many blocks, from the first, were brought without a hole.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.sources
            .iter()
            .take_while(|source| **source != Source::Miss)
            .count()
    }

    /// Resolves when no transfer can write to the memory of the `unsettled` blocks any more; at once
    /// if there are none. Whether that is certain: false when the cache ended before.
    ///
    /// # Cancel safety
    /// May be dropped and called again, until it has resolved.
    pub async fn drained(&mut self) -> bool {
        match &mut self.drained {
            None => self.unsettled.is_empty(),
            Some(drained) => {
                let certain = drained.await.is_ok();
                self.drained = None;
                if certain {
                    self.unsettled.clear();
                }
                certain
            }
        }
    }
}

/// What happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Counters and levels of the tiers.
    pub manager: Stats,
    /// Places in segment files that were skipped at the start: damaged, cut or foreign. A file that could not be
    /// read at all counts as one.
    pub scan_faults: u64,
    /// Blocks whose bytes on disk, in an object or from a peer were not what they should be.
    pub corrupt_blocks: u64,
    /// Reads from peers thrown away because the slot held another block afterwards.
    pub stale_reads: u64,
    /// Blocks that came straight into memory of a GPU, and were summed there.
    pub device_landed: u64,
    /// Blocks for memory of a GPU that were summed in host memory first.
    pub device_lifted: u64,
}

impl CacheStats {
    /// Every value by its name, in a fixed order.
    #[must_use]
    pub fn entries(&self) -> Vec<(&'static str, u64)> {
        let mut entries = self.manager.entries();
        entries.push(("scan_faults", self.scan_faults));
        entries.push(("corrupt_blocks", self.corrupt_blocks));
        entries.push(("stale_reads", self.stale_reads));
        entries.push(("device_landed", self.device_landed));
        entries.push(("device_lifted", self.device_lifted));
        entries
    }
}

/// How much of a chain this node has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeldDepth {
    /// Blocks, from the first, without a hole in host memory and disk together.
    pub depth: u32,
    /// How many of those are in host memory.
    pub host: u32,
    /// How many of those are only on disk.
    pub disk: u32,
    /// Blocks, from the first, that are here or that stores under way are bringing; never less than `depth`. Whoever
    /// waits for a store to end has reason to as long as this is more than `depth`.
    pub expected: u32,
}

/// How much of a chain can be had, and where.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// What the node has by itself.
    pub own: HeldDepth,
    /// Blocks, from the first, that the node, its peers and the shared objects have together.
    pub depth: u32,
    /// Who else has some: pods that can be asked, each with its address. Empty when the node has all by itself.
    pub located: Located,
}

/// Blocks that stay in host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pinned {
    /// What to let go of, as it was asked for.
    pub id: PinId,
    /// How many blocks, from the first, are kept; with none there is nothing to let go of.
    pub depth: u32,
}

/// What became of a request to forget blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Blocks that left host memory and disk.
    pub removed: u32,
    /// Blocks that stay: pinned, leased, being read or on their way somewhere.
    pub kept: u32,
}

impl From<manager::Removed> for Removed {
    fn from(removed: manager::Removed) -> Self {
        Self {
            removed: removed.removed,
            kept: removed.kept,
        }
    }
}
