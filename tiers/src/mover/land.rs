//! Blocks that land in memory of a device: what brings them there writes them where the engine wants them, and the device sums them
//! before anybody is told that they are there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvcache_core::place::Place;
use kvcache_core::{Checksum, ErrorKind, Result};
use kvfabric_transfer::{Descriptor, Operation, PeerHandle};

use super::peer::remote;
use super::sums::Summer;
use super::transport::{Unsettled, way};
use super::{Job, Moved, Mover};
use crate::pages::BlockMemory;

/// The agent's way between a device and what it does not reach: through host memory, where the processor may as well sum.
const BY_HOST: &str = "staged";

/// Where a command's blocks land.
#[derive(Debug)]
pub(crate) struct Landing {
    summer: Arc<Summer>,
    /// Blocks are there that the device did not sum.
    is_unsummed: AtomicBool,
}

impl Mover {
    /// Carries out a command that ends in memory of a device: straight there where there is a way that does not lead through host memory
    /// and the device sums what has come; by way of buffers of the host otherwise.
    pub(super) async fn bring(
        &self,
        mut job: Job,
        unsettled: &mut Unsettled,
    ) -> Result<Vec<Moved>> {
        if let Some(landing) = self.landing(&job).await {
            job.landing = Some(landing);
            let landed = self.dispatch(&job, unsettled).await;
            let landing = job.landing.take();
            let is_unsummed =
                landing.is_some_and(|landing| landing.is_unsummed.load(Ordering::Relaxed));
            // What was not summed is brought again, unless something may still write to the memory.
            if !is_unsummed || !unsettled.is_empty() {
                if let Ok(landed) = &landed {
                    count(&self.faults.landed, landed);
                }
                return landed;
            }
        }
        let lifted = self.lift(&job, unsettled).await?;
        count(&self.faults.lifted, &lifted);
        Ok(lifted)
    }

    /// Where a command's blocks can land; none if they have to be lifted.
    async fn landing(&self, job: &Job) -> Option<Landing> {
        let targets = job.engine.iter().map(Option::as_ref);
        let targets: Vec<&BlockMemory> = targets.collect::<Option<_>>()?;
        let (operation, pair, peer) = self.first_pair(job, targets.first()?)?;
        let asked = way(&self.agent, operation, pair, peer.as_ref());
        let deadline = tokio::time::Instant::from_std(job.deadline);
        let taken = tokio::time::timeout_at(deadline, asked).await.ok()?;
        let taken = taken.ok().filter(|backend| *backend != BY_HOST)?;
        let summer = self.sums.of_all(targets.into_iter(), job.deadline).await?;
        tracing::trace!(way = taken, blocks = job.moves.len(), "blocks land");
        Some(Landing {
            summer,
            is_unsummed: AtomicBool::new(false),
        })
    }

    /// The first bytes of a command's first block, and whom they come from.
    fn first_pair(
        &self,
        job: &Job,
        target: &BlockMemory,
    ) -> Option<(Operation, (Descriptor, Descriptor), Option<PeerHandle>)> {
        let target = target.ranges().next()?;
        let cut = |from: Descriptor| Descriptor {
            len: target.len,
            ..from
        };
        Some(match job.moves.first()?.from {
            Place::Host(slot) => (
                Operation::Write,
                (cut(self.arena.block(slot)), target),
                None,
            ),
            Place::Disk(slot) => {
                let payload = self.disk().ok()?.payload(slot).ok()?;
                (Operation::Read, (target, cut(payload)), None)
            }
            Place::Peer { .. } => {
                let (lease, blocks) = self.leased(job).ok()?;
                let from = blocks.first()?;
                let from = remote(from.region, from.offset, target.len);
                (
                    Operation::Read,
                    (target, from),
                    Some(lease.link.handle.clone()),
                )
            }
            // Objects come over the network into host memory.
            Place::Object(_) | Place::Engine { .. } => return None,
        })
    }

    /// The sums of blocks that have landed, in order, of those that are wanted.
    pub(super) async fn sum_landed(
        &self,
        job: &Job,
        landing: &Landing,
        blocks: &[&BlockMemory],
    ) -> Result<Vec<Checksum>> {
        let summed = self.sums.sum(&landing.summer, blocks, job.deadline).await;
        summed.inspect_err(|error| {
            // Out of time there is none for another way either.
            if error.kind() != ErrorKind::Timeout || landing.summer.is_lost() {
                tracing::debug!(%error, "blocks that landed were not summed");
                landing.is_unsummed.store(true, Ordering::Relaxed);
            }
        })
    }
}

fn count(counter: &std::sync::atomic::AtomicU64, moved: &[Moved]) {
    let came = moved.iter().filter(|one| one.is_ok()).count();
    counter.fetch_add(came as u64, Ordering::Relaxed);
}
