//! The shared object store, as far as this node knows it.

use super::{Manager, Timer};
use crate::id::Time;
use crate::key::BlockInfo;
use crate::place::Tier;

impl Manager {
    pub(super) fn object_usable(&self) -> bool {
        self.limits.object && !self.object_stopped
    }

    /// The block is known to be in the object store.
    pub(super) fn know_object(&mut self, info: &BlockInfo) {
        let block = self.table.admit(*info);
        if block.object.is_some() {
            return;
        }
        self.objects_counter += 1;
        block.object = Some(self.objects_counter);
        self.objects.insert(self.objects_counter, info.key);
        self.announce_stored(info, Tier::Object);
        if self.objects.len() > self.limits.object_known_max as usize
            && let Some((_, oldest)) = self.objects.pop_first()
            && let Some(block) = self.table.get_mut(&oldest)
        {
            block.object = None;
            self.table.forget_if_gone(&oldest);
        }
    }

    /// The block is not in the object store, or what is there is of no use.
    pub(super) fn lose_object(&mut self, info: &BlockInfo) {
        if let Some(block) = self.table.get_mut(&info.key)
            && let Some(since) = block.object.take()
        {
            self.objects.remove(&since);
            self.table.forget_if_gone(&info.key);
        }
        // Others may have announced it: a read that failed is how the world learns that it is gone.
        self.announce_removed(info, Tier::Object);
    }

    /// An action failed there: it is left alone for a while.
    pub(super) fn stop_object(&mut self, now: Time) {
        self.object_stopped = true;
        self.timers
            .set(Timer::Object, now + self.limits.retry_after);
    }
}
