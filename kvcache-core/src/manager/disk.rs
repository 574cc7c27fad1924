//! The disk tier: what is on it, dropping segments for room, saving what would be lost, recovery.

use super::command::CommandId;
use super::job::{Job, PendingWork, Task};
use super::request::RecoveredBlock;
use super::segment::SegmentState;
use super::{Manager, Timer};
use crate::error::ErrorKind;
use crate::id::Time;
use crate::key::{BlockInfo, BlockKey, Checksum};
use crate::place::{DiskSlot, SegmentId, Tier};

/// A segment is dropped when less than this part of one is left to fill, so that a new one is ready in time.
const ROOM_LOW_DIVISOR: u32 = 4;

impl Manager {
    pub(super) fn disk_usable(&self) -> bool {
        !self.segments.is_empty() && !self.disk_stopped
    }

    /// It was full or failed: it takes no blocks for a while.
    pub(super) fn stop_disk(&mut self, now: Time) {
        self.disk_stopped = true;
        self.timers.set(Timer::Disk, now + self.limits.retry_after);
    }

    /// The record was written: the block can be had from disk.
    pub(super) fn place_on_disk(&mut self, info: &BlockInfo, slot: DiskSlot, checksum: Checksum) {
        let block = self.table.admit(*info);
        let is_elsewhere = block.host_place().is_some() || block.disk.is_some();
        if is_elsewhere && block.checksum != Some(checksum) {
            // It was lost and stored anew meanwhile, with other bytes: this record is of the old ones.
            return;
        }
        let previous = block.disk.replace(slot);
        block.checksum = Some(checksum);
        let info = block.info;
        self.segments.occupy(slot, info.key);
        match previous {
            Some(previous) => self.segments.vacate(previous),
            None => self.announce_stored(&info, Tier::Disk),
        }
    }

    /// The block can no longer be had from disk; if `slot` is given, only if it is there.
    pub(super) fn lose_disk(&mut self, key: &BlockKey, slot: Option<DiskSlot>) {
        let Some(block) = self.table.get_mut(key) else {
            return;
        };
        let Some(held) = block.disk else { return };
        if slot.is_some_and(|slot| slot != held) {
            return;
        }
        block.disk = None;
        let info = block.info;
        self.segments.vacate(held);
        self.announce_removed(&info, Tier::Disk);
        self.table.forget_if_gone(key);
    }

    /// A record was read and is wrong.
    pub(super) fn lose_corrupt_disk(&mut self, key: &BlockKey, slot: DiskSlot) {
        self.stats.corrupt += 1;
        self.lose_disk(key, Some(slot));
    }

    /// Keeps room ahead of need: saves and drops the least recently used segment while the last ones fill. There is no
    /// such need at the end.
    pub(super) fn maintain_segments(&mut self, now: Time) {
        if self.segments.is_empty() {
            return;
        }
        if self.segments.leaving.is_none()
            && let Some(doomed) = self.segments.doomed()
        {
            self.segments.leaving = Some(doomed);
            self.forget_segment(doomed);
        }
        let low = u64::from((self.limits.disk_segment_slots / ROOM_LOW_DIVISOR).max(1));
        // While DRAM has much room, as after a start, a segment that goes is lost for nothing.
        let is_near = self.slots.vacant() <= self.slots.capacity() / 2;
        if is_near
            && self.retirement.is_none()
            && self.segments.leaving.is_none()
            && self.segments.room() < low
            && let Some(victim) = self.segments.victim()
        {
            self.start_rescue(now, victim);
        }
        let Some(leaving) = self.segments.leaving else {
            return;
        };
        if self.segments.get(leaving).state == SegmentState::Rescuing(0) {
            self.forget_segment(leaving);
        }
        let segment = self.segments.get(leaving);
        let is_idle = segment.state == SegmentState::Draining && segment.pins() == 0;
        if is_idle && !self.disk_stopped {
            let id = self.enqueue(PendingWork::Drop(leaving));
            self.segments.set_state(leaving, SegmentState::Dropping(id));
        }
    }

    /// Copies blocks that are nowhere else to the object store; a bounded number, the rest is lost.
    pub(super) fn start_rescue(&mut self, now: Time, id: SegmentId) {
        self.segments.leaving = Some(id);
        let mut jobs = Vec::new();
        if self.object_usable() {
            for (slot, key) in self.segments.blocks(id) {
                if jobs.len() == self.limits.rescue_blocks_max as usize {
                    break;
                }
                let Some(block) = self.table.get(&key) else {
                    continue;
                };
                if block.host_place().is_none() && block.object.is_none() {
                    let (info, expected) = (block.info, block.checksum);
                    jobs.push(Job {
                        info,
                        expected,
                        task: Task::Rescue { from: slot },
                    });
                }
            }
        }
        let used = self.tick();
        for _ in &jobs {
            self.segments.pin(id, used);
        }
        self.segments
            .set_state(id, SegmentState::Rescuing(jobs.len() as u32));
        let deadline = self.background_deadline(now);
        self.submit(None, jobs, deadline);
    }

    pub(super) fn rescue_ended(&mut self, id: SegmentId) {
        if let SegmentState::Rescuing(open) = self.segments.get(id).state {
            assert!(open > 0, "segment {id} rescued more blocks than it had");
            self.segments
                .set_state(id, SegmentState::Rescuing(open - 1));
        }
    }

    /// No new copy starts in the segment from now on.
    fn forget_segment(&mut self, id: SegmentId) {
        for (_, key) in self.segments.blocks(id) {
            let is_elsewhere = self
                .table
                .get(&key)
                .is_some_and(|block| block.host_place().is_some() || block.object.is_some());
            if !is_elsewhere {
                self.stats.disk_lost += 1;
            }
            self.stats.disk_evicted += 1;
            self.lose_disk(&key, None);
        }
        self.segments.set_state(id, SegmentState::Draining);
    }

    pub(super) fn finish_drop(&mut self, now: Time, id: CommandId, result: Result<(), ErrorKind>) {
        let is_drop = |work: &PendingWork| matches!(work, PendingWork::Drop(_));
        let Some(PendingWork::Drop(segment)) = self.take_answered(id, is_drop) else {
            return;
        };
        if result.is_ok() {
            self.segments.reset(segment);
            self.segments.leaving = None;
            self.stats.segments_dropped += 1;
        } else {
            self.segments.set_state(segment, SegmentState::Draining);
            self.stop_disk(now);
        }
    }

    pub(super) fn recover(&mut self, blocks: Vec<RecoveredBlock>) -> u32 {
        let mut taken = 0;
        for RecoveredBlock {
            info,
            slot,
            checksum,
        } in blocks
        {
            // A second record of a block is left where it is until its segment goes.
            if !self.segments.recover(slot) || self.table.get(&info.key).is_some() {
                continue;
            }
            let used = self.tick();
            self.segments.occupy_found(slot, info.key, used);
            let block = self.table.admit(info);
            block.disk = Some(slot);
            block.checksum = Some(checksum);
            self.announce_stored(&info, Tier::Disk);
            taken += 1;
        }
        self.stats.recovered += u64::from(taken);
        taken
    }
}
