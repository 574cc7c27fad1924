//! What engines and peers ask of the manager, and the outcomes.

use std::ops::Range;
use std::time::Duration;

use crate::id::{LeaseId, OperationId, PeerId, PinId};
use crate::key::{BlockInfo, BlockKey, Checksum};
use crate::place::{DiskSlot, HostSlot, Tier};

/// A peer said to hold the first blocks of a chain. It may be wrong: then its lease is short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerHint {
    /// Who; never this node itself.
    pub peer: PeerId,
    /// How many blocks, from the first of the fetch.
    pub depth: u32,
}

/// Blocks that an engine wants in its memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FetchRequest {
    /// In the order of their sequence; block i goes to `Place::Engine { position: i, .. }`.
    pub blocks: Vec<BlockInfo>,
    /// Peers to try; among equally deep ones the first is asked first.
    pub holders: Vec<PeerHint>,
    /// Which of the blocks, by position, the shared object store is said to hold.
    pub shared: Vec<Range<u32>>,
}

/// Where a fetched block came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockSource {
    /// This node's DRAM.
    Host,
    /// This node's disk.
    Disk,
    /// Another node.
    Peer {
        /// Which.
        peer: PeerId,
        /// The tier it was in there.
        tier: Tier,
    },
    /// The shared object store.
    Object,
    /// Nowhere in time, or of no use because a block before it is missing: the engine's slot holds nothing valid.
    Miss,
}

/// A block of a lease that this node granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeasedBlock {
    /// Which.
    pub key: BlockKey,
    /// Where the peer may read it until the lease ends.
    pub slot: HostSlot,
    /// What the bytes match.
    pub checksum: Checksum,
    /// The tier it was in when the lease was asked for.
    pub tier: Tier,
}

/// The end of something that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A store ended; the four counts add up to its blocks. Nothing of ours reads the engine's slots any more, except
    /// those of failed blocks whose transfers did not settle: they can only read what is thrown away.
    Stored {
        /// Which.
        operation: OperationId,
        /// Blocks copied from the engine and sealed.
        stored: u32,
        /// Blocks that this node had already, or got at the same time from another store.
        already_held: u32,
        /// Blocks for which there was no room in time.
        refused: u32,
        /// Blocks whose copy failed, or was not done by the deadline or when the store was cancelled.
        failed: u32,
    },
    /// A fetch ended.
    Fetched {
        /// Which.
        operation: OperationId,
        /// One a block: verified bytes up to the first [`BlockSource::Miss`], misses from there on.
        sources: Vec<BlockSource>,
        /// The blocks, by position, whose engine slots a transfer may still write to: the engine must not use these
        /// slots before [`Outcome::Drained`]. All of them are misses.
        unsettled: Vec<u32>,
    },
    /// The last transfer that was at work on the `unsettled` slots of a fetch has ended.
    Drained {
        /// Which fetch.
        operation: OperationId,
    },
    /// A lease that a peer asked of us is ready, and runs from now on.
    LeaseReady {
        /// Our number for it.
        lease: LeaseId,
        /// Who asked.
        peer: PeerId,
        /// The first blocks of those asked for, as many as there are; when there are none the lease has ended already.
        blocks: Vec<LeasedBlock>,
        /// How long it lasts.
        ttl: Duration,
    },
    /// A pin holds from now on.
    Pinned {
        /// Which.
        pin: PinId,
        /// How many blocks, from the first, it keeps in DRAM; with none it has ended already.
        depth: u32,
    },
    /// The end that was asked for is reached: nothing more goes down.
    Retired {
        /// Blocks written from DRAM to the disk or the object store on the way.
        written: u64,
        /// Blocks that are in DRAM alone, for which there was no room or no time.
        left: u32,
    },
    /// A flush ended.
    Flushed {
        /// Which.
        operation: OperationId,
        /// Whether every copy that it waited for has ended; else its deadline came first, or it was cancelled.
        complete: bool,
    },
}

/// What became of a request to forget blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Blocks that left all of this node's own tiers.
    pub removed: u32,
    /// Blocks that stay because somebody relies on them: pinned, leased, being read or on their way somewhere.
    pub kept: u32,
}

/// A record found on disk at the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecoveredBlock {
    /// What its header says.
    pub info: BlockInfo,
    /// Where it is.
    pub slot: DiskSlot,
    /// What its bytes must match.
    pub checksum: Checksum,
}

/// How much of a chain this node has by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// How many blocks, from the first, without a hole.
    pub depth: u32,
    /// For how many of them DRAM is the fastest tier.
    pub host: u32,
    /// For how many of them disk is the fastest tier.
    pub disk: u32,
    /// How many blocks, from the first, are here or on their way into DRAM: being copied, or waiting for a slot. Never
    /// less than `depth`.
    pub expected: u32,
    /// How many further blocks, or so many of these, this node knows to be in the object store, from the first.
    pub shared_depth: u32,
}
