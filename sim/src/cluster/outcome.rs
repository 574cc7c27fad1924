//! What managers answer, and whether it may be so.

use kvcache_core::manager::{BlockSource, Outcome};
use kvcache_core::{BlockInfo, OperationId, SlotIndex};

use super::pod::{Operation, Purpose};
use super::{Check, Cluster};

impl Cluster {
    pub(super) fn take_outcome(&mut self, position: usize, outcome: Outcome) -> Check {
        match outcome {
            Outcome::Stored {
                operation,
                stored,
                already_held,
                refused,
                failed,
            } => {
                let ended = self.end_operation(position, operation)?;
                let told = stored + already_held + refused + failed;
                if told as usize != ended.blocks.len() {
                    return Err(format!(
                        "a store of {} blocks accounts for {told}",
                        ended.blocks.len()
                    ));
                }
                match ended.purpose {
                    Purpose::Store(id) => self.stored(id, position),
                    other => Err(format!("a store ended that was a {other:?}")),
                }
            }
            Outcome::Fetched {
                operation,
                sources,
                unsettled,
            } => self.take_fetched(position, operation, &sources, &unsettled),
            Outcome::Drained { operation } => {
                let pod = &mut self.pods[position];
                for slot in pod.quarantined.remove(&operation).unwrap_or_default() {
                    pod.engine.readmit(slot);
                }
                Ok(())
            }
            Outcome::LeaseReady {
                lease, blocks, ttl, ..
            } => {
                self.lease_ready(position, lease, blocks, ttl);
                Ok(())
            }
            Outcome::Pinned { pin, depth } => self.take_pinned(position, pin, depth),
            Outcome::Flushed {
                operation,
                complete,
            } => self.take_flushed(position, operation, complete),
            Outcome::Retired { written, left } => self.take_retired(position, written, left),
        }
    }

    fn end_operation(&mut self, position: usize, operation: OperationId) -> Check<Operation> {
        let ended = self.pods[position].operations.remove(&operation);
        let ended = ended.ok_or_else(|| format!("operation {operation} ended twice"))?;
        if self.now > ended.deadline {
            let late = self.now.since(ended.deadline);
            return Err(format!(
                "operation {operation} ended {late:?} after its deadline"
            ));
        }
        Ok(ended)
    }

    fn take_fetched(
        &mut self,
        position: usize,
        operation: OperationId,
        sources: &[BlockSource],
        unsettled: &[u32],
    ) -> Check {
        let ended = self.end_operation(position, operation)?;
        let good = sources
            .iter()
            .take_while(|source| **source != BlockSource::Miss)
            .count();
        if sources.len() != ended.blocks.len() {
            return Err(format!(
                "a fetch of {} blocks answers {}",
                ended.blocks.len(),
                sources.len()
            ));
        }
        if sources[good..]
            .iter()
            .any(|source| *source != BlockSource::Miss)
        {
            return Err(format!("a fetch claims blocks behind a miss: {sources:?}"));
        }
        if unsettled.iter().any(|at| (*at as usize) < good) {
            return Err(format!(
                "a fetch claims blocks that are still written to: {unsettled:?}"
            ));
        }
        self.summary.fetched_blocks += sources.len() as u64;
        self.summary.unsettled += u64::from(!unsettled.is_empty());
        for (at, (block, slot)) in ended.blocks.iter().zip(&ended.slots).take(good).enumerate() {
            self.verify(
                position,
                block,
                *slot,
                &format!("fetched from {:?}", sources[at]),
            )?;
        }
        match ended.purpose {
            Purpose::Fetch(id) => self.fetched(id, position, Some(operation), sources, unsettled),
            Purpose::Audit => {
                self.audited = Some(good == 1);
                Ok(())
            }
            Purpose::Store(_) => Err("a fetch ended that was a store".to_owned()),
        }
    }

    /// Compares a block in engine memory with what it must be.
    pub(super) fn verify(
        &mut self,
        position: usize,
        block: &BlockInfo,
        slot: SlotIndex,
        how: &str,
    ) -> Check {
        self.summary.verified_blocks += 1;
        let pod = &self.pods[position];
        self.content
            .verify(&block.key, pod.memory.engine(slot))
            .map_err(|mismatch| {
                format!(
                    "wrong byte accepted at {}: {:?} {how}: {mismatch}",
                    pod.name, block.key
                )
            })
    }
}
