//! Where a block's bytes can be.

use std::fmt;

use crate::id::{Generation, LeaseId, OperationId, PeerId, SlotIndex};
use crate::key::BlockKey;

/// A level of the memory hierarchy, fastest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Tier {
    /// The engine's accelerator memory (HBM).
    Device = 0,
    /// Host DRAM.
    Host = 1,
    /// Local NVMe.
    Disk = 2,
    /// The shared object store.
    Object = 3,
}

impl Tier {
    /// Every tier, fastest first.
    pub const ALL: [Self; 4] = [Self::Device, Self::Host, Self::Disk, Self::Object];

    /// The name in metrics, JSON and gRPC answers.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Device => "hbm",
            Self::Host => "dram",
            Self::Disk => "nvme",
            Self::Object => "object",
        }
    }

    /// The `medium` that names this tier in vLLM's KV events; `OBJ` is llm-d's name for object stores.
    #[must_use]
    pub const fn medium(self) -> &'static str {
        match self {
            Self::Device => "GPU",
            Self::Host => "CPU",
            Self::Disk => "STORAGE",
            Self::Object => "OBJ",
        }
    }

    /// Whether every pod can reach what is stored there, so that it belongs to no single one.
    #[must_use]
    pub const fn is_shared(self) -> bool {
        matches!(self, Self::Object)
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One of the fixed number of files that the disk tier fills and drops whole, counted from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentId(pub u32);

impl fmt::Display for SegmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A slot of the host arena, as it was when this reference was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostSlot {
    /// Which slot; its bytes start at `index * block_bytes`.
    pub index: SlotIndex,
    /// Which use of the slot: another number means that the bytes are another block's.
    pub generation: Generation,
}

/// A record of the disk tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskSlot {
    /// Which segment.
    pub segment: SegmentId,
    /// Which record of it, counted from 0.
    pub position: u32,
}

/// Where the bytes of one block are, or are to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// The engine memory handed over with block `position` of a store or a fetch.
    Engine {
        /// The store or fetch.
        operation: OperationId,
        /// Which of its blocks, counted from 0.
        position: u32,
    },
    /// A slot of this node's DRAM arena.
    Host(HostSlot),
    /// A record of this node's disk tier.
    Disk(DiskSlot),
    /// The object of this block in the shared store.
    Object(BlockKey),
    /// A block of a lease that a peer granted.
    Peer {
        /// Who granted it.
        peer: PeerId,
        /// Its number for the lease.
        lease: LeaseId,
        /// Which of the *granted* blocks, counted from 0.
        position: u32,
    },
}
