//! One job: where its bytes are, and what of it is queued.

use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::staging::{Chunk, Chunks};
use crate::backend::{Job, Operation, abandoned};
use crate::descriptor::Target;
use crate::plan::{Extent, Plan};
use crate::sys::cuda::{Batch, CudaPoint, Pinned, Place};
use crate::sys::memory::Mapping;

/// The most copies that are queued together.
pub(super) const COPIES_MAX: usize = 4096;

/// How a device reaches a region.
#[derive(Clone, Copy)]
pub(super) enum Where {
    /// By itself: the position in the task's places.
    Place(usize),
    /// Through a buffer.
    Staged,
}

/// Where the regions of a plan are.
pub(super) struct Moves {
    pub(super) places: Arc<[Place]>,
    /// Of each target of the plan.
    pub(super) local: Vec<Where>,
    pub(super) remote: Vec<Where>,
    /// The buffers, and their position in the places; none if nothing goes through them.
    pub(super) staging: Option<(usize, Arc<Pinned>)>,
}

/// Who is told what came of a job, in place of its caller.
pub(super) trait Ending: Send {
    /// Why nothing more of the job is to be queued.
    fn check(&self) -> Result<()>;

    /// Nothing of the job is in flight any more; settles it.
    fn end(self: Box<Self>, job: Job, outcome: Result<()>);
}

/// Which way most of a job's bytes go. Each has a stream of its own, because devices copy both ways at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    ToDevice,
    FromDevice,
    Within,
}

impl Way {
    pub(super) const ALL: [Self; 3] = [Self::ToDevice, Self::FromDevice, Self::Within];

    pub(super) fn of(plan: &Plan) -> Self {
        let is_device = |targets: &[Target]| {
            targets
                .iter()
                .any(|target| !matches!(target, Target::Local(r) if r.host().is_some()))
        };
        match (
            is_device(&plan.local),
            is_device(&plan.remote),
            plan.operation,
        ) {
            (true, true, _) => Self::Within,
            (false, _, Operation::Write) | (true, _, Operation::Read) => Self::ToDevice,
            (false, _, Operation::Read) | (true, _, Operation::Write) => Self::FromDevice,
        }
    }
}

/// Bytes that are in a buffer, and go to host memory when the device has put them there.
pub(super) struct Landing {
    buffer_at: u64,
    /// As in the plan: whether it is on the local side, and its position there.
    target: (bool, u32),
    offset: u64,
    len: u64,
}

/// Which way bytes go through a buffer.
enum Staging {
    /// The processor puts them there, the device takes them.
    In,
    /// The other way round.
    Out,
}

/// The two ends of bytes that go through a buffer, each with its offset.
struct Sides {
    /// A position in the places.
    device: (usize, u64),
    /// As in the plan: whether it is on the local side, and its position there.
    host: ((bool, u32), u64),
}

/// A batch of a task.
pub(super) struct Built {
    pub(super) batch: Batch,
    pub(super) chunk: Option<Chunk>,
    pub(super) landings: Vec<Landing>,
}

/// A job under way.
pub(super) struct Task {
    pub(super) job: Job,
    moves: Moves,
    ending: Option<Box<dyn Ending>>,
    /// The extent that comes next, and how much of it is queued.
    next: usize,
    done: u64,
    /// Batches in flight.
    pub(super) open: u32,
    pub(super) failure: Option<Error>,
    /// What it begins after, until its stream was told to wait for that.
    after: Option<CudaPoint>,
}

/// Whether a task may be queued.
pub(super) enum Readiness {
    Ready,
    /// When its stream waits for this.
    After(CudaPoint),
    /// Not before somebody has asked again: its buffers are filled by the processor.
    Held,
}

impl Task {
    pub(super) fn new(job: Job, moves: Moves, ending: Option<Box<dyn Ending>>) -> Self {
        Self {
            after: job.after(),
            job,
            moves,
            ending,
            next: 0,
            done: 0,
            open: 0,
            failure: None,
        }
    }

    /// Whether an engine's stream comes before it.
    pub(super) fn is_ordered(&self) -> bool {
        self.after.is_some()
    }

    /// Whether what it begins after is over, or its stream can wait for that.
    ///
    /// # Errors
    /// What the driver says.
    pub(super) fn readiness(&mut self) -> Result<Readiness> {
        let Some(point) = &self.after else {
            return Ok(Readiness::Ready);
        };
        if self.moves.staging.is_some() && !point.is_over()? {
            return Ok(Readiness::Held);
        }
        Ok(self.after.take().map_or(Readiness::Ready, Readiness::After))
    }

    /// Whether all of it is queued, and nothing went wrong so far.
    pub(super) fn is_queued(&self) -> bool {
        self.failure.is_none() && self.next == self.job.plan().extents.len()
    }

    /// Notes that its caller has given it up. Whether nothing of it is to be queued any more.
    pub(super) fn is_sent(&mut self) -> bool {
        if self.failure.is_none() && self.job.is_abandoned() {
            self.failure = Some(abandoned());
        }
        if self.failure.is_none()
            && let Some(ending) = &self.ending
        {
            self.failure = ending.check().err();
        }
        self.failure.is_some() || self.next == self.job.plan().extents.len()
    }

    /// What came of it, once nothing of it is in flight.
    pub(super) fn end(self) {
        let Self {
            job,
            moves,
            ending,
            failure,
            ..
        } = self;
        // What is pinned for this job alone is let go of before its regions are free.
        drop(moves);
        let outcome = failure.map_or(Ok(()), Err);
        match ending {
            Some(ending) => ending.end(job, outcome),
            None => job.settle(outcome),
        }
    }

    /// As [`Task::end`], of what nothing is in flight of, and nothing will be.
    pub(super) fn fail(mut self, error: Error) {
        self.failure = Some(error);
        self.end();
    }

    /// The next batch, of about so many bytes; none while all buffers that it needs are in use.
    pub(super) fn build(&mut self, bytes_max: u64, chunks: &mut Chunks) -> Result<Option<Built>> {
        let plan = self.job.plan().clone();
        let mut built = Built {
            batch: Batch::new(&self.moves.places),
            chunk: None,
            landings: Vec::new(),
        };
        while let Some(extent) = plan.extents.get(self.next) {
            let room = bytes_max.saturating_sub(built.batch.bytes());
            if room == 0 || built.batch.len() >= COPIES_MAX {
                break;
            }
            let wanted = (extent.len - self.done).min(room);
            let added = match self.add(&plan, extent, wanted, &mut built, chunks) {
                Ok(added) => added,
                Err(error) => {
                    built
                        .chunk
                        .take()
                        .into_iter()
                        .for_each(|chunk| chunks.give_back(chunk));
                    return Err(error);
                }
            };
            if added == 0 {
                break;
            }
            self.done += added;
            if self.done == extent.len {
                (self.next, self.done) = (self.next + 1, 0);
            }
        }
        Ok((built.batch.len() > 0).then_some(built))
    }

    /// Adds up to `wanted` bytes of an extent; how many.
    fn add(
        &self,
        plan: &Plan,
        extent: &Extent,
        wanted: u64,
        built: &mut Built,
        chunks: &mut Chunks,
    ) -> Result<u64> {
        let local = (
            self.moves.local[extent.local as usize],
            extent.local_offset + self.done,
        );
        let remote = (
            self.moves.remote[extent.remote as usize],
            extent.remote_offset + self.done,
        );
        let (to, from) = match plan.operation {
            Operation::Read => (local, remote),
            Operation::Write => (remote, local),
        };
        let local_is_host = matches!(local.0, Where::Staged);
        let position = if local_is_host {
            extent.local
        } else {
            extent.remote
        };
        let host = (local_is_host, position);
        match (to.0, from.0) {
            (Where::Place(target), Where::Place(source)) => {
                built.batch.copy((target, to.1), (source, from.1), wanted)?;
                Ok(wanted)
            }
            (Where::Staged, Where::Staged) => Err(Error::new(
                ErrorKind::Internal,
                "host memory on both sides of a device's copy",
            )),
            (Where::Place(target), Where::Staged) => {
                let sides = Sides {
                    device: (target, to.1),
                    host: (host, from.1),
                };
                self.add_staged(Staging::In, &sides, wanted, built, chunks)
            }
            (Where::Staged, Where::Place(source)) => {
                let sides = Sides {
                    device: (source, from.1),
                    host: (host, to.1),
                };
                self.add_staged(Staging::Out, &sides, wanted, built, chunks)
            }
        }
    }

    /// As [`Task::add`], through a buffer.
    fn add_staged(
        &self,
        direction: Staging,
        sides: &Sides,
        wanted: u64,
        built: &mut Built,
        chunks: &mut Chunks,
    ) -> Result<u64> {
        let Some((staging, memory)) = &self.moves.staging else {
            return Err(Error::new(
                ErrorKind::Internal,
                "no buffers for what needs them",
            ));
        };
        if built.chunk.is_none() {
            built.chunk = chunks.take();
        }
        let Some(chunk) = &mut built.chunk else {
            return Ok(0);
        };
        let count = wanted.min(chunk.room());
        if count == 0 {
            return Ok(0);
        }
        let (buffer_at, (target, offset)) = (chunk.put(count), sides.host);
        let buffer = (*staging, buffer_at);
        match direction {
            Staging::In => {
                let source = host(self.job.plan(), target)?;
                Mapping::copy(source, offset, memory.mapping()?, buffer_at, count)?;
                built.batch.copy(sides.device, buffer, count)?;
            }
            Staging::Out => {
                built.batch.copy(buffer, sides.device, count)?;
                built.landings.push(Landing {
                    buffer_at,
                    target,
                    offset,
                    len: count,
                });
            }
        }
        Ok(count)
    }

    /// Copies what a device has put into a buffer to where it belongs.
    pub(super) fn land(&self, landings: &[Landing]) -> Result<()> {
        let Some((_, memory)) = &self.moves.staging else {
            return Ok(());
        };
        for landing in landings {
            let target = host(self.job.plan(), landing.target)?;
            let (at, len) = (landing.buffer_at, landing.len);
            Mapping::copy(memory.mapping()?, at, target, landing.offset, len)?;
        }
        Ok(())
    }
}

/// The host memory of a plan's target.
fn host(plan: &Plan, (is_local, position): (bool, u32)) -> Result<&Mapping> {
    let targets = if is_local { &plan.local } else { &plan.remote };
    match &targets[position as usize] {
        Target::Local(region) => region.mapping(),
        Target::Remote(_) => Err(Error::new(
            ErrorKind::Internal,
            "a device's copy names a peer's region",
        )),
    }
}
