//! Slots for blocks that need one: vacant ones, evicted ones, and demotion ahead of need.

use std::collections::BTreeMap;

use super::Manager;
use super::command::MoveFailure;
use super::copies::is_source_bad;
use super::job::{Holding, Job, Task};
use super::policy::{HostUsage, Pressure};
use crate::id::{OperationId, Time};
use crate::key::BlockKey;
use crate::place::{HostSlot, Tier};
use crate::table::{Block, HostCopy};

/// A block that waits for a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SlotRequest {
    Store {
        operation: OperationId,
        position: u32,
    },
    Stage(BlockKey),
}

/// What came of making room for one block.
enum Room {
    /// There is a vacant slot.
    Made,
    /// There may be one after an answer.
    Later,
    /// There will be none before somebody lets go of a pin.
    Never,
}

impl Manager {
    /// Gives slots to those who wait, first come, first served.
    pub(super) fn serve_slots(&mut self, now: Time) {
        let mut stores: BTreeMap<OperationId, Vec<Job>> = BTreeMap::new();
        let mut stages = Vec::new();
        while let Some(request) = self.wanted.front().copied() {
            let is_current = match request {
                SlotRequest::Store {
                    operation,
                    position,
                } => self.needs_slot(operation, position),
                SlotRequest::Stage(key) => self.needs_stage(&key),
            };
            let mut is_served = false;
            if is_current {
                match self.make_room() {
                    Room::Made => is_served = true,
                    Room::Later => break,
                    Room::Never => match request {
                        SlotRequest::Store { operation, .. } => self.refuse_store(operation),
                        SlotRequest::Stage(key) => self.fill_failed(&key),
                    },
                }
            }
            // A store that was refused has taken its requests out of the queue by itself.
            if self.wanted.front() == Some(&request) {
                self.wanted.pop_front();
            }
            if is_served {
                self.fill(request, &mut stores, &mut stages);
            }
        }
        self.submit_stores(stores);
        let deadline = now + self.limits.stage_wait;
        self.submit(None, stages, deadline);
    }

    fn fill(
        &mut self,
        request: SlotRequest,
        stores: &mut BTreeMap<OperationId, Vec<Job>>,
        stages: &mut Vec<Job>,
    ) {
        let Some(slot) = self.slots.allocate() else {
            return;
        };
        match request {
            SlotRequest::Store {
                operation,
                position,
            } => {
                let job = self.store_job(operation, position, slot);
                stores.entry(operation).or_default().extend(job);
            }
            SlotRequest::Stage(key) => stages.extend(self.stage_job(&key, slot)),
        }
    }

    fn make_room(&mut self) -> Room {
        if self.slots.vacant() > 0 {
            return Room::Made;
        }
        let is_filling = self.slots.filling() > 0;
        let Some(victim) = self.evictor.victim() else {
            return if self.leaving > 0 || is_filling {
                Room::Later
            } else {
                Room::Never
            };
        };
        if self.is_held_below(&victim) {
            self.stats.evicted_clean += 1;
            self.evict(&victim);
            return Room::Made;
        }
        match self.policy.under_pressure(&self.usage()) {
            Pressure::Wait => Room::Later,
            Pressure::Drop if self.protected.contains_key(&victim) => {
                // Everything colder is gone: a store that is larger than DRAM keeps its first blocks.
                if is_filling { Room::Later } else { Room::Never }
            }
            Pressure::Drop => {
                self.stats.evicted_lost += 1;
                self.evict(&victim);
                Room::Made
            }
        }
    }

    pub(super) fn usage(&self) -> HostUsage {
        HostUsage {
            slots: self.slots.capacity(),
            vacant: self.slots.vacant(),
            filling: self.slots.filling(),
            leaving: self.leaving,
            wanted: self.wanted.len() as u32,
            lower_tier: self.can_leave(),
        }
    }

    /// Whether a block could start on its way down now, or when a segment that is on its way out has gone.
    fn can_leave(&self) -> bool {
        self.disk_takes() || self.object_usable()
    }

    pub(super) fn disk_takes(&self) -> bool {
        self.disk_usable() && (self.segments.room() > 0 || self.segments.is_room_coming())
    }

    /// Whether the block stays in this node's reach when it leaves DRAM.
    pub(super) fn is_held_below(&self, key: &BlockKey) -> bool {
        self.table.get(key).is_some_and(|block| {
            block.object.is_some()
                || block
                    .disk
                    .is_some_and(|slot| self.segments.is_lasting(slot))
        })
    }

    /// Takes an unpinned block out of DRAM.
    pub(super) fn evict(&mut self, key: &BlockKey) {
        self.evictor.remove(key);
        self.vacate_host(key);
    }

    /// The block's slot becomes vacant; nothing pins it and the evictor does not know it.
    fn vacate_host(&mut self, key: &BlockKey) {
        let Some(block) = self.table.get_mut(key) else {
            return;
        };
        let info = block.info;
        if let HostCopy::Sealed { slot, .. } = std::mem::replace(&mut block.host, HostCopy::Absent)
        {
            self.slots.release(slot);
            self.announce_removed(&info, Tier::Host);
        }
        self.table.forget_if_gone(key);
    }

    /// Starts as many blocks on their way down as the policy wants, the coldest first.
    pub(super) fn demote(&mut self, now: Time) {
        let batch = self.limits.batch_blocks_max;
        let room = self
            .limits
            .background_in_flight_max
            .saturating_sub(self.background_open());
        let count = self
            .policy
            .demote(&self.usage())
            .min(room.saturating_mul(batch));
        let mut jobs = Vec::new();
        for _ in 0..count {
            let Some(victim) = self.evictor.victim() else {
                break;
            };
            if self.is_held_below(&victim) {
                self.stats.evicted_clean += 1;
                self.evict(&victim);
            } else if let Some(job) = self.start_leaving(&victim) {
                jobs.push(job);
            } else {
                break;
            }
        }
        // One command goes to one kind of place.
        let (to_disk, to_object) = jobs
            .into_iter()
            .partition(|job| matches!(job.task, Task::DemoteDisk { .. }));
        let deadline = self.background_deadline(now);
        self.submit(None, to_disk, deadline);
        self.submit(None, to_object, deadline);
    }

    /// The copy that takes the block down; none when no lower tier takes it now.
    pub(super) fn start_leaving(&mut self, key: &BlockKey) -> Option<Job> {
        let from = self.table.get(key).and_then(Block::host_place)?;
        let used = self.tick();
        let record = self
            .disk_usable()
            .then(|| self.segments.reserve(used))
            .flatten();
        let task = match record {
            Some(to) => Task::DemoteDisk { from, to },
            // What the disk will take soon is not worth an object.
            None if self.object_usable() && !self.disk_takes() => Task::DemoteObject { from },
            None => return None,
        };
        let block = self.table.get_mut(key)?;
        if let HostCopy::Sealed { leaving, .. } = &mut block.host {
            *leaving = true;
        }
        let job = Job {
            info: block.info,
            expected: block.checksum,
            task,
        };
        self.leaving += 1;
        // Out of the order of victims, so that its parent can follow in the same batch.
        self.evictor.remove(key);
        self.slots.pin(from);
        Some(job)
    }

    /// The block has arrived below: its slot becomes vacant, unless somebody reads it.
    pub(super) fn left_host(&mut self, key: &BlockKey, from: HostSlot) {
        if self.stop_leaving(key, from) && self.slots.pins(from) == 1 {
            self.evictor.remove(key);
            self.slots.unpin(from);
            self.vacate_host(key);
        } else {
            self.unpin_host(key, from);
        }
    }

    pub(super) fn demotion_failed(
        &mut self,
        key: &BlockKey,
        from: HostSlot,
        failure: MoveFailure,
        holdings: &mut Vec<Holding>,
    ) {
        self.stats.demotions_failed += 1;
        let is_there = self.stop_leaving(key, from);
        if is_there && is_source_bad(failure.kind) {
            self.lose_host(key, from);
        } else if is_there {
            // At the end there may be another place for it.
            self.retire_again(key);
        }
        self.let_go_host(key, from, failure.settled, holdings);
    }

    /// The evictor knows the block again, pinned by the copy that has just ended. Whether it is still in that slot.
    fn stop_leaving(&mut self, key: &BlockKey, from: HostSlot) -> bool {
        let Some(block) = self.table.get_mut(key) else {
            return false;
        };
        let info = block.info;
        match &mut block.host {
            HostCopy::Sealed { slot, leaving } if slot.place() == from => {
                assert!(*leaving, "{key:?} ended a way down that it had not started");
                *leaving = false;
            }
            HostCopy::Sealed { .. } | HostCopy::Filling | HostCopy::Absent => return false,
        }
        self.leaving -= 1;
        self.evictor.insert(info.key, info.parent);
        self.evictor.pin(key);
        true
    }

    /// Keeps the block in its slot; pins count.
    pub(super) fn pin_host(&mut self, key: &BlockKey, place: HostSlot) {
        let is_leaving = self.table.get(key).is_some_and(Block::is_leaving);
        if self.slots.pin(place) == 1 && !is_leaving {
            self.evictor.pin(key);
        }
    }

    pub(super) fn unpin_host(&mut self, key: &BlockKey, place: HostSlot) {
        if self.slots.unpin(place) > 0 {
            return;
        }
        if let Some(slot) = self.condemned.remove(&place.index) {
            self.slots.release(slot);
        } else {
            self.evictor.unpin(key);
        }
    }

    /// The bytes in this slot are wrong: the block is not in DRAM any more. Readers keep the slot until they are done.
    pub(super) fn lose_host(&mut self, key: &BlockKey, place: HostSlot) {
        let Some(block) = self.table.get_mut(key) else {
            return;
        };
        if block.host_place() != Some(place) {
            return;
        }
        let info = block.info;
        if let HostCopy::Sealed { slot, leaving } =
            std::mem::replace(&mut block.host, HostCopy::Absent)
        {
            if leaving {
                self.leaving -= 1;
            } else {
                self.evictor.remove(key);
            }
            if self.slots.pins(place) == 0 {
                self.slots.release(slot);
            } else {
                self.condemned.insert(place.index, slot);
            }
            self.stats.corrupt += 1;
            self.announce_removed(&info, Tier::Host);
        }
        self.table.forget_if_gone(key);
    }
}
