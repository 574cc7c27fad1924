//! Interned sets of holders: the blocks of a shared prefix have the same holders, so they share one set.
//!
//! A block stores four bytes. Most blocks have one holder, which needs no set at all; the rest refer to an immutable
//! sorted list that lives as long as a block refers to it.

use std::collections::HashMap;
use std::sync::Arc;

use kvcache_core::Tier;

/// A source's cache in one tier; or, as [`Holder::SHARED`], what every pod reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Holder(u32);

impl Holder {
    /// The shared tiers, which belong to no source.
    pub(super) const SHARED: Self = Self(Tier::Object as u32);

    /// The holder for a tier of the source in `slot`; slot 0 stands for no source.
    pub(super) fn new(slot: u32, tier: Tier) -> Self {
        if tier.is_shared() {
            return Self::SHARED;
        }
        assert!(slot > 0 && slot < SINGLE >> 2, "source slot {slot}");
        Self(slot << 2 | tier as u32)
    }

    pub(super) const fn slot(self) -> usize {
        (self.0 >> 2) as usize
    }

    /// The tier's place in [`Tier::ALL`].
    pub(super) const fn tier(self) -> usize {
        (self.0 & 3) as usize
    }
}

/// Marks a set of one holder, whose number is in the other bits.
const SINGLE: u32 = 1 << 31;

/// A set of holders that is not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SetId(u32);

impl SetId {
    pub(super) const fn single(holder: Holder) -> Self {
        Self(SINGLE | holder.0)
    }

    const fn as_single(self) -> Option<Holder> {
        if self.0 & SINGLE == 0 {
            None
        } else {
            Some(Holder(self.0 & !SINGLE))
        }
    }
}

/// The members of a set.
pub(super) enum Members<'a> {
    One([Holder; 1]),
    Many(&'a [Holder]),
}

impl Members<'_> {
    pub(super) fn as_slice(&self) -> &[Holder] {
        match self {
            Self::One(one) => one,
            Self::Many(many) => many,
        }
    }
}

struct Slot {
    /// Sorted; none while the slot is free.
    members: Option<Arc<[Holder]>>,
    references: u32,
    /// Grows when the slot is reused, so that a remembered change of another life is not taken for one of this.
    generation: u32,
}

/// One remembered change: what a set becomes with or without a holder.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Change {
    from: SetId,
    from_generation: u32,
    holder: Holder,
    is_insert: bool,
}

/// Remembered changes: an event changes many blocks of one set in the same way, one after the other.
const MEMO_SLOTS: usize = 1024;

/// All sets of more than one holder.
pub(super) struct HolderSets {
    slots: Vec<Slot>,
    free: Vec<u32>,
    by_members: HashMap<Arc<[Holder]>, u32>,
    memo: Vec<Option<(Change, SetId, u32)>>,
    scratch: Vec<Holder>,
    /// Over all sets, for [`HolderSets::bytes`].
    members: usize,
}

impl Default for HolderSets {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            by_members: HashMap::new(),
            memo: vec![None; MEMO_SLOTS],
            scratch: Vec::new(),
            members: 0,
        }
    }
}

impl HolderSets {
    /// The members of a set, in order.
    pub(super) fn members(&self, set: SetId) -> Members<'_> {
        match set.as_single() {
            Some(holder) => Members::One([holder]),
            None => Members::Many(self.slice(set)),
        }
    }

    fn slice(&self, set: SetId) -> &[Holder] {
        self.slots[set.0 as usize]
            .members
            .as_deref()
            .unwrap_or_default()
    }

    /// The set with `holder` too; `None` when it is in already. The reference to `from` becomes one to the result.
    pub(super) fn insert(&mut self, from: SetId, holder: Holder) -> Option<SetId> {
        match from.as_single() {
            Some(only) if only == holder => return None,
            None if self.slice(from).binary_search(&holder).is_ok() => return None,
            _ => {}
        }
        Some(self.change(from, holder, true))
    }

    /// The set without `holder`; `Err(())` when it is not in, `Ok(None)` when nobody is left. The reference to `from`
    /// becomes one to the result.
    pub(super) fn remove(&mut self, from: SetId, holder: Holder) -> Result<Option<SetId>, ()> {
        match from.as_single() {
            Some(only) if only == holder => return Ok(None),
            Some(_) => return Err(()),
            None if self.slice(from).binary_search(&holder).is_err() => return Err(()),
            None => {}
        }
        Ok(Some(self.change(from, holder, false)))
    }

    fn change(&mut self, from: SetId, holder: Holder, is_insert: bool) -> SetId {
        let change = Change {
            from,
            from_generation: self.generation(from),
            holder,
            is_insert,
        };
        let place = (from.0 ^ holder.0.rotate_left(16) ^ u32::from(is_insert))
            .wrapping_mul(0x9e37_79b1) as usize
            >> 22;
        let to = match self.memo[place] {
            Some((known, to, generation))
                if known == change && generation == self.generation(to) =>
            {
                self.acquire(to);
                to
            }
            _ => {
                let to = self.changed(from, holder, is_insert);
                self.memo[place] = Some((change, to, self.generation(to)));
                to
            }
        };
        self.release(from);
        to
    }

    /// Builds or finds the changed set and takes a reference to it.
    fn changed(&mut self, from: SetId, holder: Holder, is_insert: bool) -> SetId {
        let mut members = std::mem::take(&mut self.scratch);
        members.clear();
        members.extend_from_slice(self.members(from).as_slice());
        match members.binary_search(&holder) {
            Err(place) if is_insert => members.insert(place, holder),
            Ok(place) if !is_insert => {
                members.remove(place);
            }
            _ => {}
        }
        let to = match members.as_slice() {
            [only] => SetId::single(*only),
            many => self.intern(many),
        };
        self.scratch = members;
        to
    }

    fn intern(&mut self, members: &[Holder]) -> SetId {
        if let Some(&slot) = self.by_members.get(members) {
            self.slots[slot as usize].references += 1;
            return SetId(slot);
        }
        let shared: Arc<[Holder]> = members.into();
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                let slot = self.slots.len() as u32;
                assert!(slot < SINGLE, "more than 2^31 sets of holders");
                self.slots.push(Slot {
                    members: None,
                    references: 0,
                    generation: 0,
                });
                slot
            }
        };
        let entry = &mut self.slots[slot as usize];
        entry.members = Some(Arc::clone(&shared));
        entry.references = 1;
        entry.generation = entry.generation.wrapping_add(1);
        self.members += members.len();
        self.by_members.insert(shared, slot);
        SetId(slot)
    }

    fn generation(&self, set: SetId) -> u32 {
        if set.as_single().is_some() {
            0
        } else {
            self.slots[set.0 as usize].generation
        }
    }

    fn acquire(&mut self, set: SetId) {
        if set.as_single().is_none() {
            self.slots[set.0 as usize].references += 1;
        }
    }

    fn release(&mut self, set: SetId) {
        if set.as_single().is_some() {
            return;
        }
        let slot = &mut self.slots[set.0 as usize];
        assert!(
            slot.references > 0,
            "{set:?} released more often than acquired"
        );
        slot.references -= 1;
        if slot.references == 0
            && let Some(members) = slot.members.take()
        {
            // A remembered change that leads here must not be followed any more.
            slot.generation = slot.generation.wrapping_add(1);
            self.members -= members.len();
            self.by_members.remove(&members);
            self.free.push(set.0);
        }
    }

    /// How many sets of more than one holder exist.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// About how much memory the sets take.
    pub(super) fn bytes(&self) -> usize {
        // An `Arc<[T]>` has two counters in front; the table keeps a fat pointer, a slot number and a control byte.
        self.members * size_of::<Holder>()
            + self.len() * 16
            + self.by_members.capacity() * 25
            + self.slots.capacity() * size_of::<Slot>()
            + self.free.capacity() * size_of::<u32>()
            + self.memo.capacity() * size_of::<Option<(Change, SetId, u32)>>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(slot: u32) -> Holder {
        Holder::new(slot, Tier::Device)
    }

    /// Grows a set member by member in two orders and takes it apart again.
    #[test]
    fn equal_sets_are_one_and_vanish_with_their_last_reference() {
        let mut sets = HolderSets::default();
        let mut ids = Vec::new();
        for order in [[1, 2, 3], [3, 1, 2]] {
            let mut set = SetId::single(holder(order[0]));
            for slot in &order[1..] {
                set = sets.insert(set, holder(*slot)).unwrap();
            }
            ids.push(set);
        }
        assert_eq!(ids[0], ids[1]);
        assert_eq!(
            sets.members(ids[0]).as_slice(),
            [holder(1), holder(2), holder(3)]
        );
        assert_eq!(sets.insert(ids[0], holder(2)), None);
        assert_eq!(sets.remove(ids[0], holder(9)), Err(()));
        for set in ids {
            let set = sets.remove(set, holder(1)).unwrap().unwrap();
            let set = sets.remove(set, holder(3)).unwrap().unwrap();
            assert_eq!(set, SetId::single(holder(2)));
            assert_eq!(sets.remove(set, holder(2)), Ok(None));
        }
        assert_eq!(sets.len(), 0);
        assert_eq!(sets.members, 0);
    }

    /// Frees a set that the memo leads to, lets another take its slot, and repeats the remembered change.
    #[test]
    fn a_reused_slot_is_not_mistaken_for_the_set_it_held() {
        let mut sets = HolderSets::default();
        let pair = sets.insert(SetId::single(holder(1)), holder(2)).unwrap();
        assert_eq!(
            sets.remove(pair, holder(2)),
            Ok(Some(SetId::single(holder(1))))
        );
        let other = sets.insert(SetId::single(holder(5)), holder(6)).unwrap();
        assert_eq!(other, pair, "the slot is reused");
        let again = sets.insert(SetId::single(holder(1)), holder(2)).unwrap();
        assert_eq!(sets.members(again).as_slice(), [holder(1), holder(2)]);
    }
}
