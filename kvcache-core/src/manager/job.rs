//! Copies under way: what each is for, and what it keeps from being reused.

use super::command::{CommandId, Move};
use crate::id::{LeaseId, OperationId, PeerId, Time};
use crate::key::{BlockInfo, BlockKey, Checksum};
use crate::place::{DiskSlot, HostSlot, Place, SegmentId, Tier};
use crate::pool::{Filling, Quarantined, Slot};

/// One move of a copy command.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) info: BlockInfo,
    /// What the bytes must match, if it is known.
    pub(super) expected: Option<Checksum>,
    pub(super) task: Task,
}

#[derive(Debug)]
pub(super) enum Task {
    /// Engine to DRAM, for a store.
    Store {
        operation: OperationId,
        position: u32,
        slot: Slot<Filling>,
    },
    /// Disk to DRAM, for leases. The source is pinned.
    Stage { from: DiskSlot, slot: Slot<Filling> },
    /// Anywhere to the engine, for a fetch. Sources of our own are pinned.
    Fetch {
        operation: OperationId,
        position: u32,
        source: Source,
    },
    /// DRAM to disk. Both are pinned.
    DemoteDisk { from: HostSlot, to: DiskSlot },
    /// DRAM to the object store. The source is pinned.
    DemoteObject { from: HostSlot },
    /// Disk to the object store. The source is pinned.
    Rescue { from: DiskSlot },
}

/// Where a fetch takes a block from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Host(HostSlot),
    Disk(DiskSlot),
    Peer {
        grant: CommandId,
        peer: PeerId,
        lease: LeaseId,
        position: u32,
        tier: Tier,
    },
    Object,
}

/// A lease that a peer granted, while copies from it are under way; named by the command that asked for it.
#[derive(Debug)]
pub(super) struct Grant {
    pub(super) peer: PeerId,
    pub(super) lease: LeaseId,
    /// Copies that end later are doubtful.
    pub(super) usable_until: Time,
    pub(super) open: u32,
}

/// What stays out of use until a failed copy has drained.
#[derive(Debug)]
pub(super) enum Holding {
    Quarantine(Slot<Quarantined>),
    HostPin(BlockKey, HostSlot),
    SegmentPin(SegmentId),
    Engine {
        operation: OperationId,
        position: u32,
    },
}

/// A command that was not answered yet.
#[derive(Debug)]
pub(super) struct Pending {
    /// Whether the driver has it.
    pub(super) issued: bool,
    pub(super) work: PendingWork,
}

#[derive(Debug)]
pub(super) enum PendingWork {
    Copy {
        /// The store or fetch that it is for, if it is for one.
        operation: Option<OperationId>,
        jobs: Vec<Job>,
        deadline: Time,
    },
    Ask(Ask),
    Drop(SegmentId),
}

/// A lease that we asked a peer for.
#[derive(Debug)]
pub(super) struct Ask {
    /// The fetch that it is for; none when that has given up.
    pub(super) operation: Option<OperationId>,
    pub(super) peer: PeerId,
    /// Which of its blocks.
    pub(super) positions: Vec<u32>,
    pub(super) keys: Vec<BlockKey>,
    pub(super) sent: Time,
    pub(super) deadline: Time,
}

impl PendingWork {
    /// Whether nobody waits for it.
    pub(super) fn is_background(&self) -> bool {
        match self {
            Self::Copy { jobs, .. } => jobs.first().is_some_and(|job| match job.task {
                Task::DemoteDisk { .. } | Task::DemoteObject { .. } | Task::Rescue { .. } => true,
                Task::Store { .. } | Task::Stage { .. } | Task::Fetch { .. } => false,
            }),
            Self::Ask(_) | Self::Drop(_) => false,
        }
    }
}

impl Job {
    pub(super) fn as_move(&self) -> Move {
        let (from, to) = match &self.task {
            Task::Store {
                operation,
                position,
                slot,
            } => (engine(*operation, *position), Place::Host(slot.place())),
            Task::Stage { from, slot } => (Place::Disk(*from), Place::Host(slot.place())),
            Task::Fetch {
                operation,
                position,
                source,
            } => {
                let from = match *source {
                    Source::Host(slot) => Place::Host(slot),
                    Source::Disk(slot) => Place::Disk(slot),
                    Source::Peer {
                        peer,
                        lease,
                        position,
                        ..
                    } => Place::Peer {
                        peer,
                        lease,
                        position,
                    },
                    Source::Object => Place::Object(self.info.key),
                };
                (from, engine(*operation, *position))
            }
            Task::DemoteDisk { from, to } => (Place::Host(*from), Place::Disk(*to)),
            Task::DemoteObject { from } => (Place::Host(*from), Place::Object(self.info.key)),
            Task::Rescue { from } => (Place::Disk(*from), Place::Object(self.info.key)),
        };
        Move {
            info: self.info,
            from,
            to,
            checksum: self.expected,
        }
    }
}

fn engine(operation: OperationId, position: u32) -> Place {
    Place::Engine {
        operation,
        position,
    }
}
