//! Which stores and fetches are taken on, and their ends.

use super::{Limits, Manager, Timer};
use crate::error::{Error, ErrorKind, Result};
use crate::id::{OperationId, Time};
use crate::key::BlockInfo;

impl Manager {
    /// Whether there is room for one more store or fetch of these blocks.
    pub(super) fn check_admission<'a>(
        &mut self,
        blocks: impl ExactSizeIterator<Item = &'a BlockInfo>,
    ) -> Result<()> {
        self.check_not_retired()?;
        self.check_blocks(blocks.len())?;
        for (position, block) in blocks.enumerate() {
            if block.parent == Some(block.key) {
                let context = format!("block {position} ({:?}) is its own parent", block.key);
                return Err(Error::new(ErrorKind::Invalid, context));
            }
        }
        // What has ended but not drained counts too: a fabric that never drains must not pile up.
        let ended = self.drains.len() + self.draining.len();
        let open = self.stores.len() + self.fetches.len() + self.flushes.len() + ended;
        if open >= self.limits.operations_max as usize {
            self.stats.busy += 1;
            let context = format!("{open} operations under way or draining, the most allowed");
            return Err(Error::new(ErrorKind::Busy, context));
        }
        Ok(())
    }

    pub(super) fn admit_operation(&mut self, deadline: Time) -> OperationId {
        let operation = OperationId(self.next_operation);
        self.next_operation += 1;
        self.timers.set(Timer::Operation(operation), deadline);
        operation
    }

    /// Ends a store, fetch or flush now, whatever is still under way for it.
    pub(super) fn end_operation(&mut self, now: Time, operation: OperationId) {
        if self.stores.contains_key(&operation) {
            self.end_store(operation);
        } else if self.fetches.contains_key(&operation) {
            self.end_fetch(now, operation);
        } else {
            self.end_flush(operation, false);
        }
    }
}

/// When the copies of an operation must be done for their answers to be here by its deadline.
pub(super) fn copy_deadline(limits: &Limits, now: Time, deadline: Time) -> Time {
    let margin = limits.answer_margin.min((deadline - now) / 8);
    Time(
        deadline
            .0
            .saturating_sub(u64::try_from(margin.as_nanos()).unwrap_or(u64::MAX)),
    )
}
