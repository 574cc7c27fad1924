//! A request at its pod: what could not be had is computed, everything is stored, and the request goes on.

use std::time::Duration;

use kvcache_core::manager::BlockSource;
use kvcache_core::{ErrorKind, OperationId};

use super::pod::{Operation, Phase, Purpose};
use super::serve::may_refuse;
use super::{Check, Cluster, Due, Sabotage};
use crate::report::Source;

impl Cluster {
    /// The blocks that could be had are in place: counts them, and computes the others.
    pub(super) fn fetched(
        &mut self,
        id: u64,
        position: usize,
        operation: Option<OperationId>,
        sources: &[BlockSource],
        unsettled: &[u32],
    ) -> Check {
        let Some(active) = self.active.get_mut(&id) else {
            return Ok(());
        };
        let Some(mut running) = active.running.take() else {
            return Ok(());
        };
        let pod = &mut self.pods[position];
        if let Some(operation) = operation.filter(|_| !unsettled.is_empty())
            && self.config.sabotage != Sabotage::ReuseUnsettledSlots
        {
            let mut waiting: Vec<usize> = unsettled
                .iter()
                .map(|at| running.hits() + *at as usize)
                .collect();
            let kept = pod.quarantined.entry(operation).or_default();
            while let Some(at) = waiting.last() {
                let Ok(slot) = pod.engine.quarantine(&mut running, *at) else {
                    break;
                };
                kept.push(slot);
                waiting.pop();
            }
            if !waiting.is_empty() {
                kept.extend(pod.engine.abort(running, &waiting));
                pod.in_flight -= 1;
                active.on = None;
                self.retry(id);
                return Ok(());
            }
        }
        let found = sources
            .iter()
            .filter(|source| **source != BlockSource::Miss)
            .count();
        active.good = running.hits() + found;
        let known = active.good * self.config.block_tokens as usize;
        let missing = active.request.prompt_tokens().len().saturating_sub(known);
        let stay = active.stay;
        let hits = running.hits();
        active.running = Some(running);
        self.count(id, hits, sources)?;
        let time = self.config.compute.time(missing as u64);
        self.schedule(time, Due::Computed { request: id, stay });
        Ok(())
    }

    /// Counts a request's accesses, once.
    fn count(&mut self, id: u64, hits: usize, sources: &[BlockSource]) -> Check {
        let Some(active) = self.active.get_mut(&id).filter(|active| !active.counted) else {
            return Ok(());
        };
        active.counted = true;
        let tally = &mut self.summary.tally;
        (0..hits).for_each(|_| tally.record(Source::Hbm));
        for source in sources {
            tally.record(match source {
                BlockSource::Host => Source::Dram,
                BlockSource::Disk => Source::Nvme,
                BlockSource::Peer { .. } => Source::Peer,
                BlockSource::Object => Source::Object,
                BlockSource::Miss => Source::Miss,
            });
        }
        let rest = active.sequence.prompt_blocks() - hits - sources.len();
        (0..rest).for_each(|_| tally.record(Source::Miss));
        let expected = self.infinite.observe(&active.request).hits;
        let found = active.good as u64;
        if found > expected {
            return Err(format!(
                "request {id} hits {found} blocks, but only {expected} were ever computed"
            ));
        }
        if self.config.exact && found < expected {
            return Err(format!(
                "request {id} hits {found} blocks, a cache without limits hits {expected}"
            ));
        }
        Ok(())
    }

    /// The missing blocks have been computed: they are filled, and all are stored.
    pub(super) fn computed(&mut self, id: u64, stay: u32) -> Check {
        let Some(active) = self
            .active
            .get_mut(&id)
            .filter(|active| active.stay == stay)
        else {
            return Ok(());
        };
        let (Some(peer), Some(mut running)) = (active.on, active.running.take()) else {
            return Ok(());
        };
        let (good, writes_answer) = (
            active.good,
            active.decode.is_none_or(|decode| decode == peer),
        );
        let sequence = active.sequence.clone();
        let Some(position) = self.living(peer) else {
            return Ok(());
        };
        let pod = &mut self.pods[position];
        if writes_answer && let Err(error) = pod.engine.extend(&mut running) {
            // Without room for its blocks the answer is written and forgotten.
            if error.kind() != ErrorKind::Busy {
                return Err(format!(
                    "the answer of request {id} at {}: {error}",
                    pod.name
                ));
            }
        }
        for at in good..running.slots().len() {
            let slot = running.slots()[at];
            self.content
                .fill(&sequence.blocks()[at].key, pod.memory.engine_mut(slot));
        }
        let unsealed = running.slots().len() - running.sealed();
        pod.engine.seal(&mut running, unsealed);
        let blocks = sequence.blocks()[..running.sealed()].to_vec();
        let slots = running.slots().to_vec();
        if let Some(active) = self.active.get_mut(&id) {
            active.running = Some(running);
        }
        if blocks.is_empty() {
            return self.stored(id, position);
        }
        let deadline = self.now + self.config.operation_wait;
        match pod.manager.handle_store(self.now, blocks.clone(), deadline) {
            Ok(operation) => {
                let entry = Operation {
                    purpose: Purpose::Store(id),
                    deadline,
                    blocks,
                    slots,
                };
                pod.operations.insert(operation, entry);
                Ok(())
            }
            Err(error) if may_refuse(pod, &error) => self.stored(id, position),
            Err(error) => Err(format!(
                "store of {} blocks is refused: {error}",
                blocks.len()
            )),
        }
    }

    /// The engine needs the blocks no longer: the request goes on to its decode pod, or ends.
    pub(super) fn stored(&mut self, id: u64, position: usize) -> Check {
        let Some(active) = self.active.get_mut(&id) else {
            return Ok(());
        };
        let pod = &mut self.pods[position];
        if let Some(running) = active.running.take() {
            pod.engine.finish(running);
        }
        pod.in_flight -= 1;
        let next = active.decode.filter(|decode| *decode != pod.peer);
        if next.is_some() {
            active.phase = Phase::Decode;
            active.on = None;
            // Not at once: what was stored is announced first.
            self.schedule(Duration::ZERO, Due::Start(id));
            return Ok(());
        }
        self.active.remove(&id);
        self.ended.insert(id);
        self.summary.requests += 1;
        self.issue()
    }
}
