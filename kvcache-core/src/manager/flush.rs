//! Flushes: waiting for what is on its way to the disk and the object store.

use std::collections::BTreeSet;

use super::command::CommandId;
use super::request::Outcome;
use super::{Manager, Timer};
use crate::error::Result;
use crate::id::{OperationId, Time};

impl Manager {
    /// Waits for every copy that is on its way to the disk or the object store now; ends in [`Outcome::Flushed`]. What
    /// starts to leave afterwards is not waited for, and nothing is made to leave: blocks in DRAM stay there.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`](crate::ErrorKind::Busy) when `operations_max` are under way.
    pub fn handle_flush(&mut self, now: Time, deadline: Time) -> Result<OperationId> {
        self.check_admission([].iter())?;
        let operation = self.admit_operation(deadline);
        let pending = self.pending.iter();
        let leaving = pending.filter(|(_, pending)| pending.work.is_background());
        let leaving: BTreeSet<CommandId> = leaving.map(|(id, _)| *id).collect();
        let is_done = leaving.is_empty();
        self.flushes.insert(operation, leaving);
        if is_done {
            self.end_flush(operation, true);
        }
        self.settle(now);
        Ok(operation)
    }

    /// A copy that flushes may have waited for has ended, well or not.
    pub(super) fn advance_flushes(&mut self, id: CommandId) {
        let mut done = Vec::new();
        for (operation, leaving) in &mut self.flushes {
            leaving.remove(&id);
            if leaving.is_empty() {
                done.push(*operation);
            }
        }
        for operation in done {
            self.end_flush(operation, true);
        }
    }

    pub(super) fn end_flush(&mut self, operation: OperationId, complete: bool) {
        if self.flushes.remove(&operation).is_some() {
            self.timers.clear(Timer::Operation(operation));
            self.outcomes.push_back(Outcome::Flushed {
                operation,
                complete,
            });
        }
    }
}
