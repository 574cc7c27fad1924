//! One pod: a manager, an engine, their bytes, and what the driver has to remember between calls.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use kvcache_core::manager::{CommandId, Limits, Manager, Move, RecoveredBlock};
use kvcache_core::place::{HostSlot, Place, SegmentId};
use kvcache_core::pool::{Filling, Slot};
use kvcache_core::{
    BlockInfo, BlockKey, ErrorKind, LeaseId, OperationId, PeerId, PinId, Result, SlotIndex, Time,
};
use kvfabric_transfer::backend::sim::SimNode;

use super::memory::{Memory, Record, Spot};
use crate::engine::EnginePool;

/// What a local copy will come to, decided when it begins.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fate {
    /// It is done, block by block.
    Done,
    /// It fails and nothing is at work any more.
    Fails(ErrorKind),
    /// It is given up, and comes to its end only later.
    Stalls,
}

/// A copy among places of this pod and the shared store.
#[derive(Debug)]
pub(super) struct LocalCopy {
    pub(super) moves: Vec<(Move, Spot, Spot)>,
    pub(super) fate: Fate,
}

/// A copy from a peer's arena, carried by the network.
#[derive(Debug)]
pub(super) struct RemoteCopy {
    pub(super) initiator: PeerId,
    pub(super) command: CommandId,
    pub(super) holder: PeerId,
    /// What to copy, from which slot of the holder, to where.
    pub(super) moves: Vec<(Move, HostSlot, Spot)>,
}

/// What a store or fetch is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Fetch(u64),
    Store(u64),
    /// A read of one block at the end of a run, whose bytes must be right.
    Audit,
}

/// A store or fetch under way.
#[derive(Debug)]
pub(super) struct Operation {
    pub(super) purpose: Purpose,
    pub(super) deadline: Time,
    pub(super) blocks: Vec<BlockInfo>,
    /// The engine slot of each block.
    pub(super) slots: Vec<SlotIndex>,
}

/// A pin that was asked for.
#[derive(Clone, Debug)]
pub(super) struct Pin {
    /// The blocks asked for, then those that it keeps.
    pub(super) keys: Vec<BlockKey>,
    pub(super) ttl: Duration,
    /// When it ends by itself; none before it holds.
    pub(super) until: Option<Time>,
}

/// One incarnation of a pod.
#[derive(Debug)]
pub(super) struct Pod {
    pub(super) name: String,
    pub(super) peer: PeerId,
    pub(super) node: SimNode,
    pub(super) alive: bool,
    pub(super) manager: Manager,
    pub(super) engine: EnginePool,
    pub(super) memory: Memory,
    pub(super) in_flight: u32,
    pub(super) operations: BTreeMap<OperationId, Operation>,
    /// Engine slots of ended fetches that transfers may still write to.
    pub(super) quarantined: BTreeMap<OperationId, Vec<Slot<Filling>>>,
    pub(super) copies: BTreeMap<CommandId, LocalCopy>,
    /// Leases asked for and not answered.
    pub(super) asked: BTreeMap<CommandId, PeerId>,
    /// The slots of leases that peers granted.
    pub(super) held: BTreeMap<(PeerId, LeaseId), Vec<HostSlot>>,
    /// Who waits for the answer to which lease of ours.
    pub(super) granting: BTreeMap<LeaseId, (PeerId, CommandId)>,
    /// The pins that hold, each with its blocks and its end; those that do not hold yet have none.
    pub(super) pins: BTreeMap<PinId, Pin>,
    /// Flushes under way, each with its deadline.
    pub(super) flushes: BTreeMap<OperationId, Time>,
    /// Whether it was told to end: no new request goes to it.
    pub(super) ending: bool,
    /// What was on its disk when it ended.
    pub(super) left: BTreeSet<BlockKey>,
    /// When the last announcement that is on its way will be there: they keep their order.
    pub(super) announced_until: Time,
}

impl Pod {
    /// A pod that has just been started; its memory may hold the disk of its predecessor.
    pub(super) fn start(
        name: &str,
        peer: PeerId,
        node: SimNode,
        limits: &Limits,
        memory: Memory,
        engine_slots: u32,
    ) -> Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            peer,
            node,
            alive: true,
            manager: Manager::new(limits.clone())?,
            engine: EnginePool::new(engine_slots),
            memory,
            in_flight: 0,
            operations: BTreeMap::new(),
            quarantined: BTreeMap::new(),
            copies: BTreeMap::new(),
            asked: BTreeMap::new(),
            held: BTreeMap::new(),
            granting: BTreeMap::new(),
            pins: BTreeMap::new(),
            flushes: BTreeMap::new(),
            ending: false,
            left: BTreeSet::new(),
            announced_until: Time(0),
        })
    }

    /// Tells the manager what is on the disk.
    pub(super) fn recover(&mut self, now: Time) {
        let blocks = self
            .memory
            .disk
            .iter()
            .map(|(slot, record)| RecoveredBlock {
                info: record.info,
                slot: *slot,
                checksum: record.checksum,
            });
        let blocks: Vec<RecoveredBlock> = blocks.collect();
        if !blocks.is_empty() {
            self.manager.handle_recovered(now, blocks);
        }
    }

    /// Leaves a half-written record of each write that was under way, as a crash does.
    pub(super) fn tear_writes(&mut self, objects: &super::memory::Objects) {
        for copy in std::mem::take(&mut self.copies).into_values() {
            for (plan, source, target) in copy.moves {
                let Spot::Disk(slot) = target else { continue };
                let Ok(Ok((mut bytes, _))) = self.memory.read(objects, source, &plan.info.key)
                else {
                    continue;
                };
                let checksum = super::memory::checksum(&bytes);
                let half = bytes.len() / 2;
                bytes[half..].fill(0);
                self.memory.disk.insert(
                    slot,
                    Record {
                        info: plan.info,
                        checksum,
                        bytes,
                    },
                );
            }
        }
    }

    /// Deletes the records of a segment.
    pub(super) fn drop_segment(&mut self, segment: SegmentId) {
        self.memory.disk.retain(|slot, _| slot.segment != segment);
    }

    /// Where the bytes of a place are, unless they are at a peer.
    pub(super) fn spot(&self, place: &Place) -> Result<Spot, String> {
        match place {
            Place::Engine {
                operation,
                position,
            } => self
                .operations
                .get(operation)
                .and_then(|operation| operation.slots.get(*position as usize))
                .map(|slot| Spot::Engine(*slot))
                .ok_or_else(|| format!("{place:?} is of no operation under way")),
            Place::Host(slot) => Ok(Spot::Host(*slot)),
            Place::Disk(slot) => Ok(Spot::Disk(*slot)),
            Place::Object(key) => Ok(Spot::Object(*key)),
            Place::Peer { .. } => Err(format!("{place:?} is copied with local ones")),
        }
    }

    /// The arena slot at a peer that this place means.
    pub(super) fn leased(&self, place: &Place) -> Result<(PeerId, HostSlot), String> {
        let Place::Peer {
            peer,
            lease,
            position,
        } = place
        else {
            return Err(format!("{place:?} is copied with remote ones"));
        };
        self.held
            .get(&(*peer, *lease))
            .and_then(|slots| slots.get(*position as usize))
            .map(|slot| (*peer, *slot))
            .ok_or_else(|| format!("{place:?} was never granted, or was given back"))
    }
}

/// A request on its way through the cluster.
#[derive(Debug)]
pub(super) struct Active {
    pub(super) sequence: Arc<crate::sequence::Sequence>,
    pub(super) request: Arc<crate::workload::Request>,
    pub(super) phase: Phase,
    /// The pod that works on it, and for what.
    pub(super) on: Option<PeerId>,
    /// Who will write the answer, if not the same pod.
    pub(super) decode: Option<PeerId>,
    pub(super) running: Option<crate::engine::Running>,
    /// Blocks, from the first, that need not be computed at this pod.
    pub(super) good: usize,
    /// Its accesses have been counted: that happens once, whatever happens to its pods.
    pub(super) counted: bool,
    /// Which stay at a pod this is, so that late news of an earlier one is not taken for it.
    pub(super) stay: u32,
}

/// What a request's pod does for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Prefill,
    Decode,
}
