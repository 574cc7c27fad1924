//! Stores: from the engine's slots into DRAM.

use std::collections::{BTreeMap, BTreeSet};

use super::command::CommandId;
use super::job::{Job, PendingWork, Task};
use super::request::Outcome;
use super::space::SlotRequest;
use super::{Manager, Timer};
use crate::id::{OperationId, Time};
use crate::key::{BlockInfo, BlockKey, Checksum};
use crate::place::Tier;
use crate::pool::{Filling, Slot};
use crate::table::{HostCopy, Waiter};

/// A store under way.
#[derive(Debug)]
pub(super) struct StoreOperation {
    pub(super) blocks: Vec<BlockInfo>,
    pub(super) steps: Vec<StoreStep>,
    /// How many steps are not final.
    pub(super) open: u32,
    /// The commands with its copies.
    pub(super) copies: BTreeSet<CommandId>,
    copy_deadline: Time,
}

/// How far one block of a store is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StoreStep {
    WaitsForSlot,
    WaitsForSeal,
    Copying,
    Stored,
    AlreadyHeld,
    Refused,
    Failed,
}

impl StoreStep {
    pub(super) fn is_final(self) -> bool {
        !matches!(
            self,
            Self::WaitsForSlot | Self::WaitsForSeal | Self::Copying
        )
    }
}

impl Manager {
    pub(super) fn start_store(
        &mut self,
        operation: OperationId,
        blocks: Vec<BlockInfo>,
        copy_deadline: Time,
    ) {
        let keys: Vec<BlockKey> = blocks.iter().map(|block| block.key).collect();
        self.touch(&keys);
        let count = blocks.len() as u32;
        let store = StoreOperation {
            steps: vec![StoreStep::WaitsForSeal; blocks.len()],
            blocks,
            open: count,
            copies: BTreeSet::new(),
            copy_deadline,
        };
        self.stores.insert(operation, store);
        for position in 0..count {
            self.place_store(operation, position);
        }
        if count == 0 {
            self.end_store(operation);
        }
    }

    /// Decides how a block that is neither waiting for a slot nor being copied goes on.
    pub(super) fn place_store(&mut self, operation: OperationId, position: u32) {
        let Some(store) = self.stores.get_mut(&operation) else {
            return;
        };
        let step = &mut store.steps[position as usize];
        if *step != StoreStep::WaitsForSeal {
            return;
        }
        let key = store.blocks[position as usize].key;
        let block = self.table.get_mut(&key);
        match block {
            Some(block) if block.host_place().is_some() || block.disk.is_some() => {
                self.finish_store_step(operation, position, StoreStep::AlreadyHeld);
            }
            Some(block) if block.is_filling() => {
                block.waiters.push(Waiter::Store {
                    operation,
                    position,
                });
            }
            _ => {
                *step = StoreStep::WaitsForSlot;
                self.wanted.push_back(SlotRequest::Store {
                    operation,
                    position,
                });
            }
        }
    }

    /// Whether this block still needs the slot that it waited for; if another copy has come first, it goes on without.
    pub(super) fn needs_slot(&mut self, operation: OperationId, position: u32) -> bool {
        let Some(store) = self.stores.get_mut(&operation) else {
            return false;
        };
        let step = &mut store.steps[position as usize];
        if *step != StoreStep::WaitsForSlot {
            return false;
        }
        let key = store.blocks[position as usize].key;
        let Some(block) = self.table.get(&key) else {
            return true;
        };
        if block.is_filling() || block.host_place().is_some() || block.disk.is_some() {
            *step = StoreStep::WaitsForSeal;
            self.place_store(operation, position);
            return false;
        }
        true
    }

    /// The copy that fills the slot with this block.
    pub(super) fn store_job(
        &mut self,
        operation: OperationId,
        position: u32,
        slot: Slot<Filling>,
    ) -> Option<Job> {
        let Some(store) = self.stores.get_mut(&operation) else {
            self.slots.abandon(slot);
            return None;
        };
        store.steps[position as usize] = StoreStep::Copying;
        let info = store.blocks[position as usize];
        self.table.admit(info).host = HostCopy::Filling;
        Some(Job {
            info,
            expected: None,
            task: Task::Store {
                operation,
                position,
                slot,
            },
        })
    }

    /// Queues the copies of one round, each store's together.
    pub(super) fn submit_stores(&mut self, jobs: BTreeMap<OperationId, Vec<Job>>) {
        for (operation, jobs) in jobs {
            let deadline = self.stores.get(&operation).map(|store| store.copy_deadline);
            if let Some(deadline) = deadline {
                self.submit(Some(operation), jobs, deadline);
            }
        }
    }

    pub(super) fn store_copied(
        &mut self,
        operation: OperationId,
        position: u32,
        info: &BlockInfo,
        slot: Slot<Filling>,
        checksum: Checksum,
    ) {
        if self.stores.contains_key(&operation) {
            self.seal(info, slot, checksum);
            self.finish_store_step(operation, position, StoreStep::Stored);
        } else {
            // The store has ended, so the engine may have reused its slot while it was copied, and the checksum would
            // bless the wrong bytes.
            self.slots.abandon(slot);
            self.fill_failed(&info.key);
        }
    }

    pub(super) fn store_failed(&mut self, operation: OperationId, position: u32) {
        self.finish_store_step(operation, position, StoreStep::Failed);
    }

    /// No slot will become free for this store: the blocks that wait for one are refused.
    pub(super) fn refuse_store(&mut self, operation: OperationId) {
        let Some(store) = self.stores.get(&operation) else {
            return;
        };
        let waiting: Vec<u32> = (0..store.steps.len() as u32)
            .filter(|&position| store.steps[position as usize] == StoreStep::WaitsForSlot)
            .collect();
        for position in waiting {
            self.finish_store_step(operation, position, StoreStep::Refused);
        }
        self.want_no_more(operation);
    }

    /// Takes back the store's requests for slots.
    fn want_no_more(&mut self, operation: OperationId) {
        self.wanted.retain(|request| {
            !matches!(request, SlotRequest::Store { operation: other, .. } if *other == operation)
        });
    }

    fn finish_store_step(&mut self, operation: OperationId, position: u32, step: StoreStep) {
        let Some(store) = self.stores.get_mut(&operation) else {
            return;
        };
        store.steps[position as usize] = step;
        store.open -= 1;
        if matches!(step, StoreStep::Stored | StoreStep::AlreadyHeld) {
            *self
                .protected
                .entry(store.blocks[position as usize].key)
                .or_default() += 1;
        }
        if store.open == 0 {
            self.end_store(operation);
        }
    }

    /// Ends the store: blocks that wait are refused, copies that the driver has are of no use any more.
    pub(super) fn end_store(&mut self, operation: OperationId) {
        let Some(mut store) = self.stores.remove(&operation) else {
            return;
        };
        self.timers.clear(Timer::Operation(operation));
        for id in &store.copies {
            self.withdraw_store_copies(*id);
        }
        let keys: Vec<BlockKey> = store.blocks.iter().map(|block| block.key).collect();
        // Only now, with all of them there, can the tail be made the first to go.
        self.touch(&keys);
        for (step, key) in store.steps.iter_mut().zip(&keys) {
            match step {
                StoreStep::Stored | StoreStep::AlreadyHeld => self.unprotect(key),
                StoreStep::WaitsForSlot => *step = StoreStep::Refused,
                StoreStep::WaitsForSeal | StoreStep::Copying => *step = StoreStep::Failed,
                StoreStep::Refused | StoreStep::Failed => {}
            }
        }
        assert!(
            store.steps.iter().all(|step| step.is_final()),
            "{operation} ended half-way"
        );
        let count = |step| store.steps.iter().filter(|s| **s == step).count() as u32;
        let (stored, already_held) = (count(StoreStep::Stored), count(StoreStep::AlreadyHeld));
        let (refused, failed) = (count(StoreStep::Refused), count(StoreStep::Failed));
        self.stats.stored += u64::from(stored);
        self.stats.already_held += u64::from(already_held);
        self.stats.refused += u64::from(refused);
        self.stats.store_failed += u64::from(failed);
        self.outcomes.push_back(Outcome::Stored {
            operation,
            stored,
            already_held,
            refused,
            failed,
        });
        self.want_no_more(operation);
    }

    /// Takes back a command that the driver has not got yet.
    fn withdraw_store_copies(&mut self, id: CommandId) {
        if self.pending.get(&id).is_none_or(|pending| pending.issued) {
            return;
        }
        let Some(pending) = self.pending.remove(&id) else {
            return;
        };
        let PendingWork::Copy { jobs, .. } = pending.work else {
            return;
        };
        for job in jobs {
            if let Task::Store { slot, .. } = job.task {
                self.slots.abandon(slot);
                self.fill_failed(&job.info.key);
            }
        }
    }

    fn unprotect(&mut self, key: &BlockKey) {
        if let Some(count) = self.protected.get_mut(key) {
            *count -= 1;
            if *count == 0 {
                self.protected.remove(key);
            }
        }
    }

    /// The slot's bytes are complete: the block can be had from DRAM.
    pub(super) fn seal(&mut self, info: &BlockInfo, slot: Slot<Filling>, checksum: Checksum) {
        let slot = self.slots.seal(slot);
        let used = self.tick();
        let block = self.table.admit(*info);
        assert!(
            block.is_filling(),
            "{:?} sealed without being filled",
            info.key
        );
        block.host = HostCopy::Sealed {
            slot,
            leaving: false,
        };
        block.checksum = Some(checksum);
        block.used = used;
        let info = block.info;
        self.stop_staging(&info.key);
        self.evictor.insert(info.key, info.parent);
        self.announce_stored(&info, Tier::Host);
        self.retire_again(&info.key);
        self.wake(&info.key);
    }

    /// The filling came to nothing: who waited for it looks again.
    pub(super) fn fill_failed(&mut self, key: &BlockKey) {
        if let Some(block) = self.table.get_mut(key) {
            block.host = HostCopy::Absent;
        }
        self.stop_staging(key);
        self.wake(key);
        self.table.forget_if_gone(key);
    }

    /// The block does not wait for a slot any more, to be brought up from disk.
    fn stop_staging(&mut self, key: &BlockKey) {
        if let Some(block) = self.table.get_mut(key)
            && std::mem::take(&mut block.staging)
        {
            self.wanted
                .retain(|request| *request != SlotRequest::Stage(*key));
        }
    }

    /// Lets all who wait for this block look again.
    pub(super) fn wake(&mut self, key: &BlockKey) {
        if let Some(block) = self.table.get_mut(key) {
            self.work.extend(block.waiters.drain(..));
        }
    }
}
