//! What changed in a pod's caches, as told to the global index.

use crate::key::{EngineHash, IndexKey};
use crate::place::Tier;

/// A change in one of a *node's* tiers (DRAM, NVMe, object store), named by index keys.
///
/// Reports are complete and idempotent: a block is announced when it appears in a tier and withdrawn when it leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeEvent {
    /// The block can now be had from this tier.
    Stored {
        /// Its place in the index.
        key: IndexKey,
        /// The block before it; none for the first of a sequence.
        parent: Option<IndexKey>,
        /// Where.
        tier: Tier,
    },
    /// The block can no longer be had from this tier.
    Removed {
        /// Its place in the index.
        key: IndexKey,
        /// Where it was.
        tier: Tier,
    },
    /// Everything in this node's own tiers is gone (not what it put in shared ones).
    Cleared,
}

/// A change in an *engine's* cache, named by the engine's own hashes, with the tokens that place it in the index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineEvent {
    /// Blocks, in sequence order, the first one's predecessor being `parent`.
    Stored {
        /// The engine's hashes, one a block.
        hashes: Vec<EngineHash>,
        /// The block before the first; none at the start of a sequence.
        parent: Option<EngineHash>,
        /// The tokens of all of them, `block_size` each.
        tokens: Vec<u32>,
        /// Tokens a block.
        block_size: u32,
        /// Where.
        tier: Tier,
    },
    /// One copy of each of these blocks left this tier.
    Removed {
        /// The engine's hashes.
        hashes: Vec<EngineHash>,
        /// Where they were.
        tier: Tier,
    },
    /// The engine's accelerator cache was cleared.
    Cleared,
}
