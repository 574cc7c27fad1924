//! Requests on their way: routed, their blocks fetched, the rest computed, everything stored, the answer written.

use std::sync::Arc;
use std::time::Duration;

use kvcache_core::manager::{BlockSource, FetchRequest, Outcome, PeerHint};
use kvcache_core::{BlockInfo, ErrorKind, OperationId, PeerId, SlotIndex};

use super::pod::{Active, Operation, Phase, Purpose};
use super::{Check, Cluster, Due, Sabotage};
use crate::report::Source;
use crate::router::PodView;

/// A request for which there is no room tries again within this time.
const RETRY: Duration = Duration::from_millis(1);

impl Cluster {
    /// Takes in requests as long as fewer than `concurrency` are under way and the next one waits for no other.
    pub(super) fn issue(&mut self) -> Check {
        while self.active.len() < self.config.concurrency {
            let Some(next) = &self.waiting else {
                return Ok(());
            };
            if next
                .after
                .is_some_and(|before| !self.ended.contains(&before))
            {
                return Ok(());
            }
            let Some(request) = self.waiting.take() else {
                return Ok(());
            };
            self.waiting = self.requests.next();
            let (id, at) = (request.id, Duration::from_millis(request.at_ms));
            let active = Active {
                sequence: Arc::new(self.sequencer.request(&request)),
                request: Arc::new(request),
                phase: Phase::Prefill,
                on: None,
                decode: None,
                running: None,
                good: 0,
                counted: false,
                stay: 0,
            };
            self.active.insert(id, active);
            let at = (kvcache_core::Time(0) + at).max(self.now);
            self.schedule_at(at, Due::Start(id));
        }
        Ok(())
    }

    /// Finds a pod for a request, and begins its stay there.
    pub(super) fn start(&mut self, id: u64) -> Check {
        let Some(active) = self.active.get(&id) else {
            return Ok(());
        };
        if active.on.is_some() {
            return Ok(());
        }
        let sequence = active.sequence.clone();
        let chosen = match (
            active.phase,
            active.decode.and_then(|peer| self.living(peer)),
        ) {
            (Phase::Decode, Some(position)) => Some((position, active.decode)),
            _ => self.route(&sequence),
        };
        let Some((position, decode)) = chosen else {
            self.retry(id);
            return Ok(());
        };
        let phase = match decode {
            Some(peer) if self.pods[position].peer == peer => Phase::Decode,
            _ => Phase::Prefill,
        };
        let reusable = match phase {
            Phase::Prefill => sequence.reusable_blocks(),
            Phase::Decode => sequence.prompt_blocks(),
        };
        let pod = &mut self.pods[position];
        let running = match pod.engine.admit(sequence.clone(), reusable) {
            Ok(running) => running,
            Err(error) if error.kind() == ErrorKind::Busy => {
                self.retry(id);
                return Ok(());
            }
            Err(error) => return Err(format!("request {id} at {}: {error}", pod.name)),
        };
        pod.in_flight += 1;
        let peer = pod.peer;
        let (hits, slots) = (running.hits(), running.slots().to_vec());
        if let Some(active) = self.active.get_mut(&id) {
            (active.on, active.decode, active.phase) = (Some(peer), decode, phase);
            active.running = Some(running);
            active.stay += 1;
        }
        for (block, slot) in sequence.blocks()[..hits].iter().zip(&slots) {
            self.verify(position, block, *slot, "in the engine's pool")?;
        }
        self.fetch(
            id,
            position,
            &sequence.blocks()[hits..reusable],
            &slots[hits..reusable],
        )
    }

    fn retry(&mut self, id: u64) {
        let after = self.some_time(RETRY);
        self.schedule(after, Due::Start(id));
    }

    /// A pod for the prompt, and one for the answer if there is another.
    fn route(&mut self, sequence: &crate::sequence::Sequence) -> Option<(usize, Option<PeerId>)> {
        let prompt = &sequence.blocks()[..sequence.prompt_blocks()];
        let view = |pod: &super::pod::Pod| PodView {
            depth: self.directory.depth(pod.peer, prompt) as u32,
            in_flight: pod.in_flight,
            alive: pod.alive,
        };
        let views: Vec<PodView> = self.pods.iter().map(view).collect();
        let (prefill, decode) = views.split_at(self.config.prefill_pods);
        let route = self.router.route(prefill, decode).ok()?;
        let decode = route.decode.map(|at| self.pods[prefill.len() + at].peer);
        Some((route.prefill, decode))
    }

    fn fetch(
        &mut self,
        id: u64,
        position: usize,
        blocks: &[BlockInfo],
        slots: &[SlotIndex],
    ) -> Check {
        if blocks.is_empty() {
            return self.fetched(id, position, None, &[], &[]);
        }
        let peer = self.pods[position].peer;
        let holders = self.directory.holders(peer, blocks).into_iter();
        let hint = |(peer, depth): (PeerId, usize)| PeerHint {
            peer,
            depth: depth as u32,
        };
        let request = FetchRequest {
            blocks: blocks.to_vec(),
            holders: holders
                .filter(|(peer, _)| self.living(*peer).is_some())
                .map(hint)
                .collect(),
            shared_depth: self.directory.shared_depth(blocks) as u32,
        };
        let deadline = self.now + self.config.operation_wait;
        let pod = &mut self.pods[position];
        match pod.manager.handle_fetch(self.now, request, deadline) {
            Ok(operation) => {
                let purpose = Purpose::Fetch(id);
                let (blocks, slots) = (blocks.to_vec(), slots.to_vec());
                let entry = Operation {
                    purpose,
                    deadline,
                    blocks,
                    slots,
                };
                pod.operations.insert(operation, entry);
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::Busy => {
                let misses = vec![BlockSource::Miss; blocks.len()];
                self.fetched(id, position, None, &misses, &[])
            }
            Err(error) => Err(format!(
                "fetch of {} blocks is refused: {error}",
                blocks.len()
            )),
        }
    }

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
    fn verify(&mut self, position: usize, block: &BlockInfo, slot: SlotIndex, how: &str) -> Check {
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

    /// The blocks that could be had are in place: counts them, and computes the others.
    fn fetched(
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
            Err(error) if error.kind() == ErrorKind::Busy => self.stored(id, position),
            Err(error) => Err(format!(
                "store of {} blocks is refused: {error}",
                blocks.len()
            )),
        }
    }

    /// The engine needs the blocks no longer: the request goes on to its decode pod, or ends.
    fn stored(&mut self, id: u64, position: usize) -> Check {
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
