//! Where lookups enter runs: from keys to a block of a run.
//!
//! Every run's first block has an entry, and every block that is not found by following the run that it is in. Readers
//! search while the writer writes: what they find they check against the run; that they found nothing holds as long as
//! no entry has moved meanwhile, which the version tells.

use kvcache_core::IndexKey;

use super::hash::KeyState;
use crate::sync::{AtomicU32, AtomicU64, DOORS_MIN as SLOTS_MIN, Ordering, fence};

/// A block of a run has less than so many bits.
const BLOCK_BITS: u32 = 13;

/// The filter has 8 bits a slot, so at least 12 an entry.
const SLOTS_PER_WORD: usize = 8;
/// The filter is made anew when one entry in so many slots has left its bits behind.
const STALE_PART: usize = 4;

/// A block of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Door {
    pub(super) run: u32,
    pub(super) block: u32,
}

impl Door {
    /// Never 0, which marks a free slot.
    fn to_raw(self) -> u64 {
        u64::from(self.run) << BLOCK_BITS | u64::from(self.block + 1)
    }

    fn from_raw(raw: u64) -> Option<Self> {
        let block = (raw & ((1 << BLOCK_BITS) - 1)).checked_sub(1)?;
        Some(Self {
            run: (raw >> BLOCK_BITS) as u32,
            block: block as u32,
        })
    }
}

/// A key, and where it leads.
#[derive(Default)]
struct Slot {
    key: AtomicU64,
    door: AtomicU64,
}

/// All entries; readers search them.
pub(super) struct Doors {
    hash: KeyState,
    slots: Box<[Slot]>,
    version: AtomicU32,
    /// How many were ever added: whoever found nothing several times checks it.
    added: AtomicU32,
}

impl Doors {
    pub(super) fn new() -> Self {
        Self {
            hash: KeyState::random(),
            slots: (0..SLOTS_MIN).map(|_| Slot::default()).collect(),
            version: AtomicU32::new(0),
            added: AtomicU32::new(0),
        }
    }

    /// What must be unchanged at the end of a search; none while an event is on in which entries go.
    #[inline]
    pub(super) fn version(&self) -> Option<u32> {
        let version = self.version.load(Ordering::Acquire);
        (version & 1 == 0).then_some(version)
    }

    #[inline]
    pub(super) fn is_still(&self, version: u32) -> bool {
        self.version.load(Ordering::Relaxed) == version
    }

    pub(super) fn added(&self) -> u32 {
        self.added.load(Ordering::Acquire)
    }

    fn home(&self, key: u64) -> usize {
        (self.hash.mix(key) >> 32) as usize & (self.slots.len() - 1)
    }

    #[inline]
    pub(super) fn find(&self, key: IndexKey) -> Option<Door> {
        let mut at = self.home(key.0);
        // Torn reads could make a full circle.
        for _ in 0..self.slots.len() {
            let slot = &self.slots[at];
            let door = Door::from_raw(slot.door.load(Ordering::Acquire))?;
            if slot.key.load(Ordering::Relaxed) == key.0 {
                return Some(door);
            }
            at = (at + 1) & (self.slots.len() - 1);
        }
        None
    }

    /// Reads where a search for a key begins, so that it need not wait for that later.
    #[inline]
    pub(super) fn look_ahead(&self, key: IndexKey) -> u64 {
        self.slots[self.home(key.0)].door.load(Ordering::Relaxed)
    }

    /// The same entries with room for so many.
    fn resized(&self, entries: usize) -> Self {
        let slots = slots_for(entries);
        let other = Self {
            hash: self.hash,
            slots: (0..slots).map(|_| Slot::default()).collect(),
            version: AtomicU32::new(self.version.load(Ordering::Relaxed).wrapping_add(2)),
            added: AtomicU32::new(self.added.load(Ordering::Relaxed)),
        };
        for slot in &self.slots {
            let door = slot.door.load(Ordering::Relaxed);
            if door != 0 {
                other.put(slot.key.load(Ordering::Relaxed), door);
            }
        }
        other
    }

    pub(super) fn bytes(&self) -> usize {
        self.slots.len() * size_of::<Slot>()
    }

    fn put(&self, key: u64, door: u64) {
        let mut at = self.home(key);
        while self.slots[at].door.load(Ordering::Relaxed) != 0 {
            at = (at + 1) & (self.slots.len() - 1);
        }
        self.slots[at].key.store(key, Ordering::Relaxed);
        self.slots[at].door.store(door, Ordering::Release);
    }
}

const fn slots_for(entries: usize) -> usize {
    let slots = (entries * 8 / 5 + 1).next_power_of_two();
    if slots < SLOTS_MIN { SLOTS_MIN } else { slots }
}

/// What only the writer knows of the entries: how many there are, and of most keys that they have none.
///
/// That is beside the table, which the writer shares with readers.
#[derive(Default)]
pub(super) struct DoorCount {
    used: usize,
    /// Three bits in one word for each key, as in a Bloom filter: almost every new block's key has no entry, and to see
    /// that in the table would be to wait for its memory.
    filter: Vec<u64>,
    /// Entries that are gone and have left their bits behind.
    stale: usize,
    /// An entry has gone in this event, so readers keep out until the event is through: that nothing is found would be the
    /// state after it, beside runs that the event has yet to change.
    is_closed: bool,
}

impl DoorCount {
    pub(super) fn has_room(&self, doors: &Doors, more: usize) -> bool {
        (self.used + more) * 8 <= doors.slots.len() * 5
    }

    pub(super) fn is_sparse(&self, doors: &Doors) -> bool {
        doors.slots.len() > SLOTS_MIN && self.used * 16 < doors.slots.len()
    }

    /// What such a table takes.
    pub(super) const fn bytes_with(&self, more: usize) -> usize {
        slots_for(self.used + more) * (size_of::<Slot>() + 1)
    }

    pub(super) fn bytes(&self) -> usize {
        self.filter.capacity() * size_of::<u64>()
    }

    /// Makes the filter anew, for a table that has taken the place of another one or has lost entries.
    pub(super) fn refit(&mut self, doors: &Doors) {
        self.stale = 0;
        self.filter.clear();
        let words = doors.slots.len().div_ceil(SLOTS_PER_WORD);
        self.filter.resize(words, 0);
        self.filter.shrink_to_fit();
        for slot in &doors.slots {
            if slot.door.load(Ordering::Relaxed) != 0 {
                self.mark(doors, slot.key.load(Ordering::Relaxed));
            }
        }
    }

    fn mark(&mut self, doors: &Doors, key: u64) {
        let (word, bits) = self.trace(doors, key);
        self.filter[word] |= bits;
    }

    /// The word of a key, and its bits there.
    #[inline]
    fn trace(&self, doors: &Doors, key: u64) -> (usize, u64) {
        let hash = doors.hash.mix(key);
        let bits = [hash, hash >> 6, hash >> 12];
        let bits = bits.iter().fold(0, |bits, hash| bits | 1 << (hash % 64));
        ((hash >> 32) as usize & (self.filter.len() - 1), bits)
    }

    /// As [`Doors::find`], for the writer.
    #[inline]
    pub(super) fn find(&self, doors: &Doors, key: IndexKey) -> Option<Door> {
        if self.filter.is_empty() {
            return None;
        }
        let (word, bits) = self.trace(doors, key.0);
        if self.filter[word] & bits != bits {
            return None;
        }
        doors.find(key)
    }

    /// A table for these entries and so many more.
    pub(super) fn resized(&self, doors: &Doors, more: usize) -> Doors {
        doors.resized(self.used + more)
    }

    /// Adds an entry; the key must have none, and there must be room.
    pub(super) fn insert(&mut self, doors: &Doors, key: IndexKey, door: Door) {
        assert!(self.has_room(doors, 1), "no room for an entry");
        self.used += 1;
        if self.filter.is_empty() {
            self.refit(doors);
        }
        self.mark(doors, key.0);
        doors.put(key.0, door.to_raw());
        doors.added.fetch_add(1, Ordering::Release);
    }

    /// Removes a key's entry if it leads to this door.
    pub(super) fn remove(&mut self, doors: &Doors, key: IndexKey, door: Door) {
        let slots = &doors.slots;
        let mask = slots.len() - 1;
        let raw = |at: usize| slots[at].door.load(Ordering::Relaxed);
        let mut hole = doors.home(key.0);
        loop {
            if raw(hole) == 0 {
                return;
            }
            if slots[hole].key.load(Ordering::Relaxed) == key.0 && raw(hole) == door.to_raw() {
                break;
            }
            hole = (hole + 1) & mask;
        }
        self.used -= 1;
        self.close(doors);
        let mut at = hole;
        loop {
            at = (at + 1) & mask;
            if raw(at) == 0 {
                break;
            }
            let moving = slots[at].key.load(Ordering::Relaxed);
            // It may move back if its home is not between the hole and itself.
            let home = doors.home(moving);
            if (at.wrapping_sub(home) & mask) >= (at.wrapping_sub(hole) & mask) {
                slots[hole].key.store(moving, Ordering::Relaxed);
                slots[hole].door.store(raw(at), Ordering::Relaxed);
                hole = at;
            }
        }
        slots[hole].door.store(0, Ordering::Relaxed);
        self.stale += 1;
        if self.stale > doors.slots.len() / STALE_PART {
            self.refit(doors);
        }
    }

    fn close(&mut self, doors: &Doors) {
        if !std::mem::replace(&mut self.is_closed, true) {
            let version = doors.version.load(Ordering::Relaxed);
            doors
                .version
                .store(version.wrapping_add(1), Ordering::Relaxed);
            fence(Ordering::Release);
        }
    }

    /// Lets readers in again.
    pub(super) fn finish(&mut self, doors: &Doors) {
        if std::mem::take(&mut self.is_closed) {
            let version = doors.version.load(Ordering::Relaxed);
            doors
                .version
                .store(version.wrapping_add(1), Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// Adds and removes at random, beside a map, growing and shrinking on the way.
    #[test]
    fn entries_are_found_until_removed() {
        let (mut doors, mut count) = (Doors::new(), DoorCount::default());
        let mut map: HashMap<u64, Door> = HashMap::new();
        let mut state = 1_u64;
        for step in 0..20_000_u32 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695);
            let key = state >> 52;
            let door = Door {
                run: step,
                block: step % 4096,
            };
            let grows = step / 4000 % 2 == 0;
            if let Some(known) = map.get(&key).copied() {
                if !grows {
                    count.remove(&doors, IndexKey(key), known);
                    map.remove(&key);
                }
            } else if grows {
                if !count.has_room(&doors, 1) {
                    doors = count.resized(&doors, 1);
                    count.refit(&doors);
                }
                count.insert(&doors, IndexKey(key), door);
                map.insert(key, door);
            }
            count.remove(
                &doors,
                IndexKey(key),
                Door {
                    run: u32::MAX,
                    block: 0,
                },
            );
            if step % 500 == 0 {
                if count.is_sparse(&doors) {
                    doors = count.resized(&doors, 0);
                    count.refit(&doors);
                }
                for key in 0..4096 {
                    assert_eq!(doors.find(IndexKey(key)), map.get(&key).copied());
                    assert_eq!(count.find(&doors, IndexKey(key)), map.get(&key).copied());
                }
            }
        }
        assert_eq!(count.used, map.len());
    }
}
