//! Carries out the manager's copies through the transfer agent, and vouches for every byte.
//!
//! What a copy wrote into memory is summed there, afterwards: the sum must be the one that the block
//! is known by, or the block counts as corrupt. What has landed in memory of a device is summed by the device.
//! Bytes for disk and objects leave with the sum in their header. Commands stay batches: one request to the agent where one can carry them.

mod land;
mod lift;
mod local;
mod object;
mod peer;
mod sums;
mod transport;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use kvcache_core::manager::{Move, MoveFailure};
use kvcache_core::place::{DiskSlot, HostSlot, Place};
use kvcache_core::{BlockKey, Checksum, Error, ErrorKind, Result};
use kvfabric_transfer::{Agent, Descriptor, Side};

use crate::arena::Arena;
use crate::disk::SegmentFiles;
use crate::object::ObjectNames;
use crate::pages::{self, BlockMemory};
use crate::peer::Peers;
use crate::record::Expected;
use crate::scratch::Scratch;
use land::Landing;
pub(crate) use lift::Lift;
pub(crate) use sums::DeviceSums;
pub(crate) use transport::{Part, Unsettled, transfer_each};

/// How one move of a command ended.
type Moved = Result<Checksum, MoveFailure>;

/// A copy command with engine positions made into places in memory.
#[derive(Debug)]
pub(crate) struct Job {
    /// What to move; all between the same two kinds of place.
    pub(crate) moves: Vec<Move>,
    /// For each move the engine's memory, where the move begins or ends there.
    pub(crate) engine: Vec<Option<BlockMemory>>,
    /// When it must be done.
    pub(crate) deadline: Instant,
    /// Where its blocks land, if they do.
    pub(crate) landing: Option<Landing>,
}

/// What became of a [`Job`].
#[derive(Debug)]
pub(crate) struct Answer {
    /// One a move, in order.
    pub(crate) results: Vec<Moved>,
    /// What is left at work; wait for it, then tell the manager.
    pub(crate) unsettled: Unsettled,
}

/// What went wrong with stored bytes, and which way others took, counted since the start.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    /// Blocks whose bytes on disk, in objects or at peers were not what they should be.
    pub(crate) corrupt: AtomicU64,
    /// Reads from peers thrown away because the slot had been given to another block.
    pub(crate) generation: AtomicU64,
    /// Blocks that came straight into memory of a device, and were summed there.
    pub(crate) landed: AtomicU64,
    /// Blocks that were summed in host memory before they went up into a device's.
    pub(crate) lifted: AtomicU64,
}

/// The sum of a copied block, or why there is none.
type Summed = Result<Checksum, MoveFailure>;

/// The shared objects of this cache.
#[derive(Debug)]
pub(crate) struct Objects {
    pub(crate) store_name: String,
    pub(crate) names: ObjectNames,
    /// Blocks whose objects were found damaged, and are to be replaced when there are good bytes again.
    pub(crate) doubted: Mutex<BTreeSet<BlockKey>>,
}

/// Everything a copy may touch.
#[derive(Debug)]
pub(crate) struct Mover {
    pub(crate) agent: Agent,
    pub(crate) arena: Arena,
    pub(crate) disk: Option<SegmentFiles>,
    pub(crate) objects: Option<Objects>,
    pub(crate) peers: Arc<Peers>,
    /// Pages for headers and generation words.
    pub(crate) pages: Arc<Scratch>,
    /// Room for blocks on their way from disk to the object store; only with both tiers.
    pub(crate) staging: Option<Arc<Scratch>>,
    /// The way up to devices.
    pub(crate) lift: Lift,
    /// Devices that sum what is on them.
    pub(crate) sums: DeviceSums,
    pub(crate) expected: Expected,
    pub(crate) faults: Faults,
}

/// Where in memory a move begins or ends.
#[derive(Clone, Debug)]
pub(super) enum Memory {
    Engine(BlockMemory),
    Host(HostSlot),
}

/// Where a move begins or ends.
#[derive(Clone, Debug)]
enum End {
    Memory(Memory),
    Disk(DiskSlot),
    Object,
    Peer,
}

impl Mover {
    /// Carries out one copy command.
    pub(crate) async fn copy(&self, job: Job) -> Answer {
        let mut unsettled = Unsettled::default();
        let blocks = job.moves.len();
        let done = match self.goes_up(&job) {
            true => Box::pin(self.bring(job, &mut unsettled)).await,
            false => self.dispatch(&job, &mut unsettled).await,
        };
        let results = match done {
            Ok(results) => results,
            Err(error) => {
                tracing::debug!(%error, blocks, "copy not started");
                vec![Err(MoveFailure::settled(error.kind())); blocks]
            }
        };
        assert!(results.len() == blocks, "every move is answered");
        Answer { results, unsettled }
    }

    async fn dispatch(&self, job: &Job, unsettled: &mut Unsettled) -> Result<Vec<Moved>> {
        let ends = |place: fn(&Move) -> &Place| -> Result<Vec<End>> {
            job.moves
                .iter()
                .zip(&job.engine)
                .map(|(one, engine)| end(place(one), engine.as_ref()))
                .collect()
        };
        let from = ends(|one| &one.from)?;
        let to = ends(|one| &one.to)?;
        let (Some(first_from), Some(first_to)) = (from.first(), to.first()) else {
            return Ok(Vec::new());
        };
        match (first_from, first_to) {
            (End::Memory(_), End::Memory(_)) => {
                let (from, to) = (memories(&from)?, memories(&to)?);
                self.memory_to_memory(job, &from, &to, unsettled).await
            }
            (End::Disk(_), End::Memory(_)) => {
                let (from, to) = (disk_slots(&from)?, memories(&to)?);
                self.disk_to_memory(job, &from, &to, unsettled).await
            }
            (End::Memory(_), End::Disk(_)) => {
                let (from, to) = (memories(&from)?, disk_slots(&to)?);
                self.memory_to_disk(job, &from, &to, unsettled).await
            }
            (End::Memory(_), End::Object) => {
                let from = memories(&from)?;
                self.memory_to_objects(job, &from, unsettled).await
            }
            (End::Object, End::Memory(_)) => {
                let to = memories(&to)?;
                self.objects_to_memory(job, &to, unsettled).await
            }
            (End::Disk(_), End::Object) => {
                let from = disk_slots(&from)?;
                self.disk_to_objects(job, &from, unsettled).await
            }
            (End::Peer, End::Memory(_)) => {
                let to = memories(&to)?;
                self.peer_to_memory(job, &to, unsettled).await
            }
            (from, to) => {
                let context = format!("no way from {from:?} to {to:?}");
                Err(Error::new(ErrorKind::Unsupported, context))
            }
        }
    }

    /// Where the bytes are: a slot's in one piece, an engine's as it has them.
    fn block(&self, memory: &Memory) -> BlockMemory {
        match memory {
            Memory::Engine(memory) => memory.clone(),
            Memory::Host(slot) => self.arena.block(*slot).into(),
        }
    }

    /// Pairs the bytes of a block in memory with those of the same block elsewhere, in one piece there.
    fn pair(&self, memory: &Memory, elsewhere: Descriptor, pairs: &mut Part) {
        pages::pair(&self.block(memory), &elsewhere.into(), pairs);
    }

    /// What a failed copy into or out of `memory` says of its other end: nothing when the memory itself
    /// cannot be used, because its owner deregistered it meanwhile. Else a good copy would be forgotten.
    fn blame(&self, memory: &Memory, mut failure: MoveFailure) -> MoveFailure {
        let list: Vec<Descriptor> = self.block(memory).ranges().collect();
        if self.agent.prepare(Side::Local, &list).is_err() {
            failure.kind = ErrorKind::Cancelled;
        }
        failure
    }

    /// Tells peers that the bytes of these host slots are about to change.
    fn begin_fill(&self, targets: &[Memory]) -> Result<()> {
        targets.iter().try_for_each(|target| match target {
            Memory::Engine(_) => Ok(()),
            Memory::Host(slot) => self.arena.begin_fill(*slot),
        })
    }

    /// Sums bytes in memory.
    fn sum(&self, memory: &Memory) -> Result<Checksum> {
        match memory {
            Memory::Host(slot) => self.arena.checksum(*slot),
            Memory::Engine(memory) => memory.crc32c(&self.agent).map(Checksum::crc32c),
        }
    }

    /// Sums what was copied into memory, as far as it came.
    async fn sum_each(&self, job: &Job, memory: &[Memory], came: &[bool]) -> Vec<Summed> {
        // Not the source's fault, whatever the kind.
        let unknown = MoveFailure::settled(ErrorKind::Cancelled);
        let mut sums = vec![Err(unknown); memory.len()];
        let wanted = (0..memory.len()).filter(|&at| came[at]);
        if let Some(landing) = &job.landing {
            let wanted: Vec<usize> = wanted.collect();
            let blocks = wanted.iter().map(|&at| self.block(&memory[at]));
            let blocks: Vec<BlockMemory> = blocks.collect();
            let blocks: Vec<&BlockMemory> = blocks.iter().collect();
            if let Ok(summed) = self.sum_landed(job, landing, &blocks).await {
                for (at, sum) in wanted.into_iter().zip(summed) {
                    sums[at] = Ok(sum);
                }
            }
            return sums;
        }
        for at in wanted {
            // Summing a large block takes a while: others may run in between.
            tokio::task::yield_now().await;
            sums[at] = self.sum(&memory[at]).map_err(|error| {
                tracing::warn!(%error, "copied bytes cannot be summed");
                unknown
            });
        }
        sums
    }

    /// Compares the sum of what was copied with what is known of the block.
    ///
    /// A wrong sum speaks of the source, named by `place`: it is counted, and logged here, once,
    /// because the manager forgets the place on hearing of it.
    fn verify(&self, one: &Move, summed: Summed, place: impl FnOnce() -> String) -> Moved {
        let sum = summed?;
        match one.checksum {
            Some(known) if known != sum => {
                let what = format!("checksum {:08x}, expected {:08x}", sum.value, known.value);
                Err(self.corrupt(one, &place(), what))
            }
            _ => Ok(sum),
        }
    }

    /// Counts and logs bytes that are not what they should be.
    fn corrupt(&self, one: &Move, place: &str, what: impl std::fmt::Display) -> MoveFailure {
        self.faults.corrupt.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(key = ?one.info.key, "{place}: {what}");
        MoveFailure::settled(ErrorKind::Corrupt)
    }
}

fn end(place: &Place, engine: Option<&BlockMemory>) -> Result<End> {
    Ok(match place {
        Place::Engine {
            operation,
            position,
        } => {
            let memory = engine.ok_or_else(|| {
                let context = format!("operation {operation} has no block {position}");
                Error::new(ErrorKind::Internal, context)
            })?;
            End::Memory(Memory::Engine(memory.clone()))
        }
        Place::Host(slot) => End::Memory(Memory::Host(*slot)),
        Place::Disk(slot) => End::Disk(*slot),
        Place::Object(_) => End::Object,
        Place::Peer { .. } => End::Peer,
    })
}

fn memories(ends: &[End]) -> Result<Vec<Memory>> {
    let memory = |end: &End| match end {
        End::Memory(memory) => Ok(memory.clone()),
        other => Err(mixed(other)),
    };
    ends.iter().map(memory).collect()
}

fn disk_slots(ends: &[End]) -> Result<Vec<DiskSlot>> {
    let slot = |end: &End| match end {
        End::Disk(slot) => Ok(*slot),
        other => Err(mixed(other)),
    };
    ends.iter().map(slot).collect()
}

fn mixed(end: &End) -> Error {
    Error::new(
        ErrorKind::Internal,
        format!("a command with more than one kind of place: {end:?}"),
    )
}
