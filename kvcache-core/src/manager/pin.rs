//! Pins: blocks that stay in DRAM until they are let go of, or until their time is over.

use std::time::Duration;

use super::Manager;
use super::request::Outcome;
use super::serve::{Holder, LeaseStep};
use crate::error::{Error, ErrorKind, Result};
use crate::id::{PinId, Time};
use crate::key::BlockKey;

impl Manager {
    /// Starts to keep these blocks in DRAM under the caller's number, those on disk being brought up first; ends in
    /// [`Outcome::Pinned`], at the latest after `stage_wait`. The pin then lasts `ttl`, or `pin_ttl_max` when that is
    /// less.
    ///
    /// It is cut at the first block that this node does not have, or for which `pinned_per_mille_max` leaves no room;
    /// a block that is pinned already needs none. A pin that was let go of before it was asked for ends at once,
    /// without blocks; see [`Manager::handle_unpin`].
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for too many blocks, or for a number that a pin in force has; [`ErrorKind::Busy`] when
    /// `pins_max` are in force.
    pub fn handle_pin(
        &mut self,
        now: Time,
        pin: PinId,
        keys: &[BlockKey],
        ttl: Duration,
    ) -> Result<()> {
        self.check_not_retired()?;
        self.check_blocks(keys.len())?;
        if self.pins.contains_key(&pin) {
            let context = format!("a pin with the number {pin} is in force already");
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        if self.take_early_unpin(now, pin) {
            self.stats.pins_unpinned_early += 1;
            self.outcomes.push_back(Outcome::Pinned { pin, depth: 0 });
            return Ok(());
        }
        let pins = self.pins.len();
        if pins >= self.limits.pins_max as usize {
            self.stats.busy += 1;
            let context = format!("{pins} pins in force, the most allowed");
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
        self.begin_lease(now, Holder::Pin(pin), keys, ttl);
        self.settle(now);
        Ok(())
    }

    /// Lets go of what was pinned. A pin that does not hold yet ends at once, without blocks.
    ///
    /// One that is not in force has ended, or was not asked for yet: it is remembered for `early_unpin_wait`, among the
    /// last `early_unpins_max` such, and ends at once if it is asked for meanwhile.
    pub fn handle_unpin(&mut self, now: Time, pin: PinId) {
        match self.pins.get(&pin).copied() {
            Some(lease) => self.return_lease(now, lease, Holder::Pin(pin)),
            None => self.remember_early_unpin(now, pin),
        }
        self.settle(now);
    }

    fn remember_early_unpin(&mut self, now: Time, pin: PinId) {
        self.forget_early_unpins(now);
        let max = self.limits.early_unpins_max as usize;
        if max == 0 || self.early_unpins.iter().any(|(_, other)| *other == pin) {
            return;
        }
        if self.early_unpins.len() == max {
            self.early_unpins.pop_front();
        }
        let until = now + self.limits.early_unpin_wait;
        self.early_unpins.push_back((until, pin));
    }

    /// Whether this pin was let go of before it was asked for; then it is not remembered any more.
    fn take_early_unpin(&mut self, now: Time, pin: PinId) -> bool {
        self.forget_early_unpins(now);
        let mut early = self.early_unpins.iter();
        match early.position(|(_, other)| *other == pin) {
            Some(at) => self.early_unpins.remove(at).is_some(),
            None => false,
        }
    }

    fn forget_early_unpins(&mut self, now: Time) {
        while let Some((until, _)) = self.early_unpins.front()
            && *until <= now
        {
            self.early_unpins.pop_front();
        }
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
