//! Pins, flushes and forgetting: what is asked of the manager, and what must hold of it.

use std::collections::BTreeSet;
use std::time::Duration;

use super::World;
use crate::error::Result;
use crate::id::{OperationId, PinId};
use crate::key::BlockKey;
use crate::manager::{Command, CommandId, Removed};
use crate::place::{Place, Tier};

impl World {
    /// Somebody pins blocks, under a number that was not used before.
    ///
    /// # Errors
    /// As [`Manager::handle_pin`](crate::manager::Manager::handle_pin).
    pub fn pin(&mut self, keys: &[BlockKey], ttl: Duration) -> Result<PinId> {
        let pin = PinId(self.next_pin);
        self.next_pin += 1;
        self.pin_as(pin, keys, ttl).map(|()| pin)
    }

    /// Somebody pins blocks under this number, as long as no pin in force has it.
    ///
    /// # Errors
    /// As [`Manager::handle_pin`](crate::manager::Manager::handle_pin).
    ///
    /// # Panics
    /// If a number in use was taken again.
    pub fn pin_as(&mut self, pin: PinId, keys: &[BlockKey], ttl: Duration) -> Result<()> {
        let is_used = self.unready_pins.contains_key(&pin) || self.pins.contains_key(&pin);
        let pinned = self.manager.handle_pin(self.now, pin, keys, ttl);
        if pinned.is_ok() {
            assert!(!is_used, "pin {pin} was taken twice");
            let ttl = ttl.min(self.limits.pin_ttl_max);
            let keys = self.pin_allowed(pin, keys);
            self.unready_pins.insert(pin, (keys, ttl));
        }
        self.after();
        pinned
    }

    /// What the pin may keep: nothing if it was let go of a short while ago, without being in force.
    fn pin_allowed(&mut self, pin: PinId, keys: &[BlockKey]) -> Vec<BlockKey> {
        let (now, wait) = (self.now, self.limits.early_unpin_wait);
        self.early_unpins.retain(|(_, at)| now < *at + wait);
        // Only the latest are remembered.
        let count = self.early_unpins.len();
        let forgotten = count.saturating_sub(self.limits.early_unpins_max as usize);
        self.early_unpins.drain(..forgotten);
        match self.early_unpins.iter().position(|(id, _)| *id == pin) {
            Some(at) => {
                self.early_unpins.remove(at);
                Vec::new()
            }
            None => keys.to_vec(),
        }
    }

    /// Whoever knows the number lets go of what it pins, or will pin.
    pub fn unpin(&mut self, pin: PinId) {
        let was_in_force = self.pins.remove(&pin).is_some() || self.unready_pins.contains_key(&pin);
        let is_known = self.early_unpins.iter().any(|(id, _)| *id == pin);
        if !was_in_force && !is_known {
            self.early_unpins.push((pin, self.now));
        }
        self.manager.handle_unpin(self.now, pin);
        self.after();
    }

    /// The pins in force.
    #[must_use]
    pub fn open_pins(&self) -> Vec<PinId> {
        self.pins.keys().copied().collect()
    }

    /// Somebody wants blocks to be forgotten.
    ///
    /// # Errors
    /// As [`Manager::handle_remove`](crate::manager::Manager::handle_remove).
    ///
    /// # Panics
    /// If not as many left as the answer says, or more stayed than it says.
    pub fn remove(&mut self, keys: &[BlockKey]) -> Result<Removed> {
        let wanted: BTreeSet<BlockKey> = keys.iter().copied().collect();
        let here = |world: &Self| world.own().intersection(&wanted).count();
        let before = here(self);
        let removed = self.manager.handle_remove(self.now, keys)?;
        let after = here(self);
        assert_eq!(before - after, removed.removed as usize, "blocks removed");
        assert!(
            after <= removed.kept as usize,
            "{after} stayed: {removed:?}"
        );
        self.after();
        Ok(removed)
    }

    /// Somebody wants everything to be forgotten.
    ///
    /// # Panics
    /// If more stayed than the answer says, or anything on disk.
    pub fn clear(&mut self) -> Removed {
        let removed = self.manager.handle_clear(self.now);
        let after = self.own().len();
        assert!(
            after <= removed.kept as usize,
            "{after} stayed: {removed:?}"
        );
        assert_eq!(self.manager.contents(Tier::Disk).count(), 0, "on disk");
        self.after();
        removed
    }

    /// Somebody waits for what is on its way down.
    ///
    /// # Errors
    /// As [`Manager::handle_flush`](crate::manager::Manager::handle_flush).
    pub fn flush(&mut self, within: Duration) -> Result<OperationId> {
        let operation = self.manager.handle_flush(self.now, self.now + within);
        if let Ok(operation) = &operation {
            self.flushes.insert(*operation, self.leaving().collect());
        }
        self.after();
        operation
    }

    /// The blocks of this node's own tiers.
    fn own(&self) -> BTreeSet<BlockKey> {
        let host = self.manager.contents(Tier::Host);
        let all = host.chain(self.manager.contents(Tier::Disk));
        all.map(|info| info.key).collect()
    }

    /// The copies to the disk and the object store that wait to be carried out.
    fn leaving(&self) -> impl Iterator<Item = CommandId> {
        self.commands.iter().filter_map(|command| match command {
            Command::Copy { id, moves, .. } => {
                let is_down = |place: &Place| matches!(place, Place::Disk(_) | Place::Object(_));
                moves.iter().any(|one| is_down(&one.to)).then_some(*id)
            }
            _ => None,
        })
    }

    pub(super) fn begin_pin(&mut self, pin: PinId, depth: u32) {
        let asked = self.unready_pins.remove(&pin);
        assert!(asked.is_some(), "pin {pin} held twice");
        let Some((mut keys, ttl)) = asked else { return };
        assert!(depth as usize <= keys.len(), "pin {pin} of more than asked");
        keys.truncate(depth as usize);
        if !keys.is_empty() {
            self.pins.insert(pin, (keys, self.now + ttl));
        }
    }

    pub(super) fn end_flush(&mut self, operation: OperationId, complete: bool) {
        let waited = self.flushes.remove(&operation);
        assert!(waited.is_some(), "flush {operation} ended twice");
        let waited = waited.unwrap_or_default();
        let is_open = self.leaving().any(|id| waited.contains(&id));
        assert!(
            !complete || !is_open,
            "flush {operation} did not wait for all"
        );
    }

    /// What is pinned is in DRAM, and no more is than may be.
    pub(super) fn check_pins(&self) {
        let host: BTreeSet<BlockKey> = self
            .manager
            .contents(Tier::Host)
            .map(|info| info.key)
            .collect();
        let pinned: BTreeSet<BlockKey> = self
            .pins
            .values()
            .flat_map(|(keys, _)| keys.iter().copied())
            .collect();
        for key in &pinned {
            let is_there = host.contains(key) || self.blamed.contains(key);
            assert!(is_there, "{key:?} is pinned and not in DRAM");
        }
        let (slots, share) = (self.limits.host_slots, self.limits.pinned_per_mille_max);
        assert!(
            pinned.len() as u64 * 1000 <= u64::from(slots) * u64::from(share),
            "{} of {slots} slots are pinned",
            pinned.len()
        );
    }
}
