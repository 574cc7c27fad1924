//! Requests on their way to a pod: taken in, routed, admitted, and their blocks fetched.

use std::sync::Arc;
use std::time::Duration;

use kvcache_core::manager::{BlockSource, FetchRequest, PeerHint};
use kvcache_core::{BlockInfo, Error, ErrorKind, PeerId, SlotIndex};

use super::pod::{Active, Operation, Phase, Pod, Purpose};
use super::{Check, Cluster, Due};
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

    pub(super) fn retry(&mut self, id: u64) {
        let after = self.some_time(RETRY);
        self.schedule(after, Due::Start(id));
    }

    /// A pod for the prompt, and one for the answer if there is another.
    fn route(&mut self, sequence: &crate::sequence::Sequence) -> Option<(usize, Option<PeerId>)> {
        let prompt = &sequence.blocks()[..sequence.prompt_blocks()];
        let view = |pod: &super::pod::Pod| PodView {
            depth: self.directory.depth(pod.peer, prompt) as u32,
            in_flight: pod.in_flight,
            alive: pod.alive && !pod.ending,
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
            shared: self.directory.shared(blocks),
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
            Err(error) if may_refuse(pod, &error) => {
                let misses = vec![BlockSource::Miss; blocks.len()];
                self.fetched(id, position, None, &misses, &[])
            }
            Err(error) => Err(format!(
                "fetch of {} blocks is refused: {error}",
                blocks.len()
            )),
        }
    }
}

/// Whether a pod may answer so: it has too much to do, or is on its way to its end.
pub(super) fn may_refuse(pod: &Pod, error: &Error) -> bool {
    error.kind() == ErrorKind::Busy || pod.ending && error.kind() == ErrorKind::Cancelled
}
