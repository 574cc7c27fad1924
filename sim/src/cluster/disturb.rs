//! Pods die and come back, and are cut off from each other.

use std::collections::BTreeSet;
use std::time::Duration;

use kvcache_core::{BlockKey, PeerId, Tier};

use super::memory::Memory;
use super::pod::Phase;
use super::{Check, Cluster, Due};

/// The others notice a death within this time.
const NOTICE: Duration = Duration::from_millis(5);
/// A dead pod comes back within this time.
const RESTART: Duration = Duration::from_millis(60);
/// A partition lasts up to this long.
const PARTITION: Duration = Duration::from_millis(40);

impl Cluster {
    pub(super) fn schedule_disturbance(&mut self) {
        let Some(gap) = self.config.faults.disturbance_gap else {
            return;
        };
        let after = self.some_time(gap * 2);
        self.schedule(after, Due::Disturb);
    }

    /// Kills a pod or cuts two off, while there is still something to disturb.
    pub(super) fn disturb(&mut self) {
        if self.waiting.is_none() && self.active.is_empty() {
            return;
        }
        self.schedule_disturbance();
        let living: Vec<usize> = (0..self.pods.len())
            .filter(|at| self.pods[*at].alive)
            .collect();
        if living.len() < 2 {
            return;
        }
        let one = living[self.random.position(living.len())];
        if self.random.below(2) == 0 {
            self.kill(one);
            return;
        }
        let other = living[self.random.position(living.len())];
        if one != other {
            let (one, other) = (self.pods[one].node, self.pods[other].node);
            self.summary.partitions += 1;
            self.exchange.partition(one, other);
            let after = self.some_time(PARTITION);
            self.schedule(after, Due::Heal(one, other));
        }
    }

    /// Kills a pod in the middle of whatever it does.
    pub(super) fn kill(&mut self, position: usize) {
        self.summary.kills += 1;
        self.end(position);
    }

    /// Ends a pod; only its disk is left.
    pub(super) fn end(&mut self, position: usize) {
        self.add_counters(position);
        let pod = &mut self.pods[position];
        pod.alive = false;
        pod.left = pod
            .manager
            .contents(Tier::Disk)
            .map(|info| info.key)
            .collect();
        pod.tear_writes(&self.objects);
        let (peer, node) = (pod.peer, pod.node);
        self.exchange.kill(node);
        let (notice, restart) = (self.some_time(NOTICE), self.some_time(RESTART));
        self.schedule(notice, Due::Gone(peer));
        self.schedule(restart, Due::Restart(position));
        let interrupted: Vec<u64> = self
            .active
            .iter()
            .filter(|(_, active)| active.on == Some(peer))
            .map(|(request, _)| *request)
            .collect();
        for request in interrupted {
            if let Some(active) = self.active.get_mut(&request) {
                active.on = None;
                active.running = None;
                active.decode = None;
                active.phase = Phase::Prefill;
                active.stay += 1;
            }
            self.schedule(notice, Due::Start(request));
        }
    }

    /// The others and the index learn that a pod is gone.
    pub(super) fn noticed(&mut self, peer: PeerId) {
        self.directory.remove(peer);
        for pod in self.pods.iter_mut().filter(|pod| pod.alive) {
            pod.manager.handle_peer_lost(self.now, peer);
            pod.held.retain(|(holder, _), _| *holder != peer);
        }
    }

    pub(super) fn restart(&mut self, position: usize) -> Check {
        let empty = Memory::new(self.config.block_bytes, 0, 0);
        let memory = std::mem::replace(&mut self.pods[position].memory, empty);
        let left = std::mem::take(&mut self.pods[position].left);
        let pod = self
            .start_pod(position, Some(memory))
            .map_err(|error| format!("pod {position} does not start again: {error}"))?;
        let found: BTreeSet<BlockKey> = pod
            .manager
            .contents(Tier::Disk)
            .map(|info| info.key)
            .collect();
        self.summary.found_on_disk += found.len() as u64;
        if let Some(lost) = left.iter().find(|key| !found.contains(key)) {
            let name = &pod.name;
            return Err(format!("{name} had {lost:?} on disk, and finds it no more"));
        }
        self.pods[position] = pod;
        Ok(())
    }
}
