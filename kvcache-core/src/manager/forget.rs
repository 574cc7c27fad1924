//! Forgetting blocks on demand: single ones, or everything.

use super::Manager;
use super::request::Removed;
use crate::error::{Error, Result};
use crate::id::Time;
use crate::key::BlockKey;
use crate::table::HostCopy;

/// What became of one block that should be forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Forgotten {
    /// It was in a tier of this node, and is in none any more.
    Gone,
    /// It stays: somebody relies on it.
    Kept,
    /// It was in none.
    Absent,
}

impl Manager {
    /// Takes these blocks out of this node's own tiers. What the shared object store has stays there.
    ///
    /// A block that is pinned, leased, being read from DRAM, or on its way into or out of DRAM is kept, and counted:
    /// ask again when that has ended. A disk record is forgotten, not erased: a restart finds it unless its segment
    /// was dropped meanwhile.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) for too many blocks.
    pub fn handle_remove(&mut self, now: Time, keys: &[BlockKey]) -> Result<Removed> {
        self.check_blocks(keys.len())?;
        let mut removed = Removed::default();
        for key in keys {
            removed.count(self.forget(key));
        }
        self.stats.removed += u64::from(removed.removed);
        self.settle(now);
        Ok(removed)
    }

    /// Takes everything out of this node's own tiers, and starts to drop every segment of the disk. What the shared
    /// object store has stays there; blocks in use are kept as by [`Manager::handle_remove`], in DRAM alone.
    ///
    /// What is on its way to the disk while this is called may be found there for a moment, until its segment is
    /// dropped.
    pub fn handle_clear(&mut self, now: Time) -> Removed {
        let mut keys: Vec<BlockKey> = self.table.iter().map(|block| block.info.key).collect();
        // The table's order is arbitrary, and events come in the order of forgetting.
        keys.sort_unstable();
        let mut removed = Removed::default();
        for key in &keys {
            removed.count(self.forget(key));
            self.lose_disk(key, None);
        }
        self.stats.removed += u64::from(removed.removed);
        self.segments.doom();
        self.settle(now);
        removed
    }

    pub(super) fn check_blocks(&self, count: usize) -> Result<()> {
        let max = self.limits.operation_blocks_max as usize;
        if count > max {
            return Err(Error::invalid("blocks in one operation", count, 0..=max));
        }
        Ok(())
    }

    fn forget(&mut self, key: &BlockKey) -> Forgotten {
        let Some(block) = self.table.get(key) else {
            return Forgotten::Absent;
        };
        let (is_sealed, is_used) = match &block.host {
            HostCopy::Absent => (false, block.staging),
            HostCopy::Filling => (false, true),
            HostCopy::Sealed { slot, leaving } => {
                (true, *leaving || self.slots.pins(slot.place()) > 0)
            }
        };
        let is_on_disk = block.disk.is_some();
        if is_used {
            return Forgotten::Kept;
        }
        if is_sealed {
            self.evict(key);
        }
        if is_on_disk {
            self.lose_disk(key, None);
        }
        if is_sealed || is_on_disk {
            Forgotten::Gone
        } else {
            Forgotten::Absent
        }
    }
}

impl Removed {
    fn count(&mut self, forgotten: Forgotten) {
        match forgotten {
            Forgotten::Gone => self.removed += 1,
            Forgotten::Kept => self.kept += 1,
            Forgotten::Absent => {}
        }
    }
}
