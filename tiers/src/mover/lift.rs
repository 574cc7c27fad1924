//! Blocks whose engine wants them in memory of a device, and that cannot land there: they come into buffers of the host first, where
//! their bytes are verified like all others, and go up from there. A block that is not what it should be never gets to the device.

use std::sync::{Arc, OnceLock};

use kvcache_core::manager::MoveFailure;
use kvcache_core::place::Place;
use kvcache_core::{ErrorKind, Result};
use kvfabric_transfer::{Agent, MemoryKind, Operation};

use super::transport::{Part, Unsettled, transfer_each};
use super::{Job, Moved, Mover};
use crate::pages::{self, BlockMemory};
use crate::scratch::Scratch;

/// Blocks on their way up at a time; those of other commands wait for their buffers.
const LIFTED_MAX: usize = 16;

/// The buffers, made when a block is first wanted on a device.
#[derive(Debug, Default)]
pub(crate) struct Lift(OnceLock<Arc<Scratch>>);

impl Lift {
    fn buffers(&self, agent: &Agent, block_bytes: u64) -> Result<Arc<Scratch>> {
        if let Some(made) = self.0.get() {
            return Ok(made.clone());
        }
        let made = Scratch::new(agent, LIFTED_MAX as u32, block_bytes)?;
        // Another command may have been first.
        Ok(self.0.get_or_init(|| made).clone())
    }
}

impl Mover {
    /// Whether the engine wants some of a command's blocks in memory of a device.
    pub(super) fn goes_up(&self, job: &Job) -> bool {
        // A block's first range speaks for all: no request takes both kinds.
        let is_up = |memory: &BlockMemory| {
            let first = memory.ranges().next();
            let kind = first.map(|range| self.agent.memory_kind(range.region));
            matches!(kind, Some(Ok(MemoryKind::Device { .. })))
        };
        let targets = job.moves.iter().zip(&job.engine);
        let mut targets = targets.filter(|(one, _)| matches!(one.to, Place::Engine { .. }));
        targets.any(|(_, memory)| memory.as_ref().is_some_and(is_up))
    }

    /// Carries out a command that ends in the engine's memory, by way of buffers.
    pub(super) async fn lift(&self, job: &Job, unsettled: &mut Unsettled) -> Result<Vec<Moved>> {
        let block_bytes = self.expected.block_bytes;
        let scratch = self.lift.buffers(&self.agent, block_bytes)?;
        let mut results = Vec::with_capacity(job.moves.len());
        for (moves, engine) in (job.moves.chunks(LIFTED_MAX)).zip(job.engine.chunks(LIFTED_MAX)) {
            let buffers = match scratch.take(moves.len(), job.deadline).await {
                Ok(buffers) => buffers,
                // Nothing of these was begun.
                Err(error) => {
                    tracing::debug!(%error, blocks = moves.len(), "no way up");
                    let failure = MoveFailure::settled(ErrorKind::Cancelled);
                    results.extend(moves.iter().map(|_| Err(failure)));
                    continue;
                }
            };
            let places: Vec<BlockMemory> = (0..moves.len())
                .map(|at| buffers.descriptor(at, block_bytes).into())
                .collect();
            let below = Job {
                moves: moves.to_vec(),
                engine: places.iter().cloned().map(Some).collect(),
                deadline: job.deadline,
                landing: None,
            };
            let mut open = Unsettled::default();
            let mut came = match self.dispatch(&below, &mut open).await {
                Ok(came) => came,
                Err(error) => {
                    tracing::debug!(%error, blocks = moves.len(), "copy not started");
                    vec![Err(MoveFailure::settled(error.kind())); moves.len()]
                }
            };
            self.go_up(&places, engine, &mut came, job, &mut open).await;
            open.hold(buffers);
            unsettled.merge(open);
            results.extend(came);
        }
        Ok(results)
    }

    /// Copies those that came from their buffers to where the engine wants them.
    async fn go_up(
        &self,
        places: &[BlockMemory],
        engine: &[Option<BlockMemory>],
        came: &mut [Moved],
        job: &Job,
        unsettled: &mut Unsettled,
    ) {
        let good: Vec<usize> = (0..came.len()).filter(|&at| came[at].is_ok()).collect();
        if good.is_empty() {
            return;
        }
        let parts = good.iter().map(|&at| {
            let mut part: Part = Vec::new();
            if let Some(target) = &engine[at] {
                pages::pair(&places[at], target, &mut part);
            }
            part
        });
        let parts: Vec<Part> = parts.collect();
        let copied = transfer_each(
            &self.agent,
            Operation::Write,
            parts,
            job.deadline,
            unsettled,
        )
        .await;
        for (at, copied) in good.into_iter().zip(copied) {
            if let Err((mut failure, error)) = copied {
                if let Some(error) = error {
                    tracing::debug!(%error, "a block did not go up");
                }
                // Its source is as good as it was.
                failure.kind = ErrorKind::Cancelled;
                came[at] = Err(failure);
            }
        }
    }
}
