//! The end of a node: what is only in DRAM goes down before it, the blocks used last first.

use std::collections::BTreeSet;

use super::job::Task;
use super::request::Outcome;
use super::{Manager, Timer};
use crate::error::{Error, ErrorKind, Result};
use crate::id::Time;
use crate::key::BlockKey;
use crate::place::SegmentId;

/// The end that was asked for.
#[derive(Debug)]
pub(super) struct Retirement {
    deadline: Time,
    /// Blocks that may be in DRAM alone, each with its last use. Looked at again when its turn comes.
    pub(super) queue: BTreeSet<(u64, BlockKey)>,
    /// Blocks that had been written down before, by this run.
    written_before: u64,
    pub(super) is_over: bool,
}

impl Manager {
    /// Begins the end: nothing new is taken on, and every sealed block that is in DRAM alone is written to the disk or, if
    /// that takes none, to the object store, until `deadline`. Ends in [`Outcome::Retired`]. Stores that are under way go
    /// on, and what they bring goes down as well. Asked again, it changes nothing.
    ///
    /// The blocks used last go first: they are what a restart wants. No segment is dropped ahead of need any more, and one
    /// is dropped for a block only if everything in it was used before that block was. A block that cannot be written, and
    /// those used before it that find no room, stay in DRAM and are lost with it.
    pub fn handle_retire(&mut self, now: Time, deadline: Time) {
        if self.retirement.is_some() {
            return;
        }
        let sealed = self.table.iter().filter(|b| b.host_place().is_some());
        let queue = sealed.map(|block| (block.used, block.info.key)).collect();
        self.retirement = Some(Retirement {
            deadline,
            queue,
            written_before: self.written_down(),
            is_over: false,
        });
        if deadline <= now {
            self.end_retirement();
        } else {
            self.timers.set(Timer::Retirement, deadline);
        }
        self.settle(now);
    }

    /// Whether anything new may be asked for.
    pub(super) fn check_not_retired(&self) -> Result<()> {
        if self.retirement.is_some() {
            let context = "the node is on its way to its end";
            return Err(Error::new(ErrorKind::Cancelled, context));
        }
        Ok(())
    }

    /// When copies that nobody waits for must be done.
    pub(super) fn background_deadline(&self, now: Time) -> Time {
        let deadline = now + self.limits.background_wait;
        let retirement = self.retirement.as_ref();
        retirement.map_or(deadline, |retirement| deadline.min(retirement.deadline))
    }

    /// Starts as many blocks on their way down as may be, and ends the retirement when none is left.
    pub(super) fn retire(&mut self, now: Time) {
        // Whether room is coming depends on it.
        self.maintain_segments(now);
        let batch = self.limits.batch_blocks_max as usize;
        let commands = self.limits.background_in_flight_max;
        let free = commands.saturating_sub(self.background_open()) as usize;
        let mut jobs = Vec::new();
        while jobs.len() < free.saturating_mul(batch) {
            let Some((used, key)) = self.next_to_retire() else {
                break;
            };
            if self.drop_colder(now, used) {
                continue;
            }
            if let Some(job) = self.start_leaving(&key) {
                jobs.push(job);
            } else if self.disk_takes() {
                // A segment is on its way out.
                break;
            } else {
                // What was used earlier has no better claim to room.
                self.clear_queue();
            }
        }
        let deadline = self.background_deadline(now);
        let (to_disk, to_object) = jobs
            .into_iter()
            .partition(|job| matches!(job.task, Task::DemoteDisk { .. }));
        self.submit(None, to_disk, deadline);
        self.submit(None, to_object, deadline);
        let is_done =
            self.leaving == 0 && self.stores.is_empty() && self.next_to_retire().is_none();
        if is_done {
            self.end_retirement();
        }
    }

    /// The block to write down next, and its last use; entries that need no writing any more are thrown away.
    fn next_to_retire(&mut self) -> Option<(u64, BlockKey)> {
        loop {
            let retirement = self.retirement.as_ref()?;
            let next = *retirement.queue.last()?;
            let block = self.table.get(&next.1);
            let is_sealed = block.is_some_and(|b| b.host_place().is_some() && !b.is_leaving());
            if is_sealed && !self.is_held_below(&next.1) {
                return Some(next);
            }
            if let Some(retirement) = &mut self.retirement {
                retirement.queue.pop_last();
            }
        }
    }

    /// Makes room for a block that was used then, if only a segment of blocks used before it is in the way. Whether one
    /// started on its way out.
    fn drop_colder(&mut self, now: Time, used: u64) -> bool {
        let is_full = self.segments.room() == 0 && self.segments.leaving.is_none();
        if !is_full || !self.disk_usable() {
            return false;
        }
        let victim = self.segments.victim();
        let Some(victim) = victim.filter(|id| self.segments.get(*id).used() < used) else {
            return false;
        };
        self.start_rescue(now, victim);
        self.retire_from(victim);
        self.maintain_segments(now);
        true
    }

    /// Blocks in DRAM that are also in this segment are in DRAM alone when it has gone.
    fn retire_from(&mut self, segment: SegmentId) {
        for (_, key) in self.segments.blocks(segment) {
            self.retire_again(&key);
        }
    }

    /// The block is in DRAM, and may be nowhere else.
    pub(super) fn retire_again(&mut self, key: &BlockKey) {
        if let Some(retirement) = &mut self.retirement
            && !retirement.is_over
            && let Some(block) = self.table.get(key)
            && block.host_place().is_some()
        {
            retirement.queue.insert((block.used, *key));
        }
    }

    fn clear_queue(&mut self) {
        if let Some(retirement) = &mut self.retirement {
            retirement.queue.clear();
        }
    }

    /// Nothing more goes down, for whatever reason.
    pub(super) fn end_retirement(&mut self) {
        let written = self.written_down();
        let blocks = self.table.iter();
        let sealed = blocks.filter(|block| block.host_place().is_some());
        let alone = sealed.filter(|block| !self.is_held_below(&block.info.key));
        let left = alone.count() as u32;
        self.timers.clear(Timer::Retirement);
        let Some(retirement) = &mut self.retirement else {
            return;
        };
        if std::mem::replace(&mut retirement.is_over, true) {
            return;
        }
        retirement.queue.clear();
        self.outcomes.push_back(Outcome::Retired {
            written: written - retirement.written_before,
            left,
        });
    }

    /// Blocks written from DRAM to a lower tier so far.
    fn written_down(&self) -> u64 {
        self.stats.demoted_disk + self.stats.demoted_object
    }
}
