//! Pins: blocks that stay in DRAM until they are let go of, or until their time is over.

use std::time::Duration;

use super::Manager;
use super::serve::{Holder, LeaseStep};
use crate::error::{Error, ErrorKind, Result};
use crate::id::{LeaseId, PinId, Time};
use crate::key::BlockKey;

impl Manager {
    /// Starts to keep these blocks in DRAM, those on disk being brought up first; ends in [`Outcome::Pinned`], at the
    /// latest after `stage_wait`. The pin then lasts `ttl`, or `pin_ttl_max` when that is less.
    ///
    /// It is cut at the first block that this node does not have, or for which `pinned_per_mille_max` leaves no room;
    /// a block that is pinned already needs none.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when `pins_max` are in force, [`ErrorKind::Invalid`] for too many blocks.
    ///
    /// [`Outcome::Pinned`]: super::Outcome::Pinned
    pub fn handle_pin(&mut self, now: Time, keys: &[BlockKey], ttl: Duration) -> Result<PinId> {
        self.check_blocks(keys.len())?;
        if self.pins >= self.limits.pins_max {
            self.stats.busy += 1;
            let context = format!("{} pins in force, the most allowed", self.pins);
            return Err(Error::new(ErrorKind::Busy, context));
        }
        let mut room = self.pinned_max().saturating_sub(self.pinned.len());
        let fits = |key: &&BlockKey| {
            if self.pinned.contains_key(key) {
                return true;
            }
            let fits = room > 0;
            room = room.saturating_sub(1);
            fits
        };
        let keys = &keys[..keys.iter().take_while(fits).count()];
        let ttl = ttl.min(self.limits.pin_ttl_max);
        self.pins += 1;
        let lease = self.begin_lease(now, Holder::Pin, keys, ttl);
        self.settle(now);
        Ok(PinId(lease.0))
    }

    /// Lets go of what was pinned. A pin that has ended is ignored; one that does not hold yet ends at once, without
    /// blocks.
    pub fn handle_unpin(&mut self, now: Time, pin: PinId) {
        self.return_lease(now, LeaseId(pin.0), Holder::Pin);
        self.settle(now);
    }

    /// How many blocks may be pinned at once.
    fn pinned_max(&self) -> usize {
        let slots = u64::from(self.limits.host_slots);
        (slots * u64::from(self.limits.pinned_per_mille_max) / 1000) as usize
    }

    /// A pin keeps, or waits for, these blocks.
    pub(super) fn count_pinned(&mut self, steps: &[LeaseStep]) {
        for step in steps {
            *self.pinned.entry(*step.key()).or_default() += 1;
        }
    }

    /// A pin does so no more.
    pub(super) fn uncount_pinned(&mut self, steps: &[LeaseStep]) {
        for step in steps {
            let count = self.pinned.get_mut(step.key());
            assert!(count.is_some(), "{:?} was not pinned", step.key());
            if let Some(count) = count {
                *count -= 1;
                if *count == 0 {
                    self.pinned.remove(step.key());
                }
            }
        }
    }
}
