//! Which block is in which slot, who reads it, and which one goes when there is no room.

use std::collections::{BTreeMap, HashMap, HashSet};

use kvcache_core::{BlockInfo, BlockKey, Checksum};

/// A slot's state. Bytes are in use, by a copy that may still write or read them, in all but `Free` and `Held` without readers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    /// A copy into it is under way, or one that failed may still be writing.
    Filling(BlockKey),
    Held(Held),
    /// Taken out of the index, and kept until its last reader is done.
    Leaving {
        readers: u32,
    },
}

/// A block that is in its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) info: BlockInfo,
    /// Of the bytes that went up.
    pub(super) checksum: Checksum,
    /// Copies out of it that are under way.
    readers: u32,
    /// When it was last wanted, by the count of wishes.
    used: u64,
}

/// What there is of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Nothing,
    /// On its way up.
    Coming,
    Here,
}

/// All slots.
#[derive(Debug)]
pub(super) struct Slots {
    states: Vec<State>,
    free: Vec<u32>,
    places: HashMap<BlockKey, u32>,
    /// Blocks that nobody reads, by when they were last wanted.
    idle: BTreeMap<u64, BlockKey>,
    held: u32,
    wishes: u64,
    is_closed: bool,
}

impl Slots {
    pub(super) fn new(count: u32) -> Self {
        Self {
            states: vec![State::Free; count as usize],
            free: (0..count).rev().collect(),
            places: HashMap::new(),
            idle: BTreeMap::new(),
            held: 0,
            wishes: 0,
            is_closed: false,
        }
    }

    /// Takes everything out, and lets nothing in any more.
    pub(super) fn close(&mut self) -> Vec<BlockInfo> {
        self.is_closed = true;
        let keys: Vec<BlockKey> = self.places.keys().copied().collect();
        keys.iter().filter_map(|key| self.remove(key)).collect()
    }

    pub(super) fn is_closed(&self) -> bool {
        self.is_closed
    }

    /// How many there are.
    pub(super) fn count(&self) -> u32 {
        self.states.len() as u32
    }

    /// Blocks that are here.
    pub(super) fn held(&self) -> u32 {
        self.held
    }

    pub(super) fn find(&self, key: &BlockKey) -> Found {
        match self.places.get(key).map(|slot| self.states[*slot as usize]) {
            Some(State::Held(_)) => Found::Here,
            Some(_) => Found::Coming,
            None => Found::Nothing,
        }
    }

    /// A free slot for a block that is neither here nor coming.
    pub(super) fn reserve(&mut self, key: BlockKey) -> Option<u32> {
        assert!(self.find(&key) == Found::Nothing, "a block has one slot");
        let slot = (!self.is_closed).then(|| self.free.pop())??;
        self.states[slot as usize] = State::Filling(key);
        self.places.insert(key, slot);
        Some(slot)
    }

    /// All bytes of a reserved slot have arrived. Whether the block is here: nothing is in slots that are closed.
    pub(super) fn fill(&mut self, slot: u32, info: BlockInfo, checksum: Checksum) -> bool {
        let state = &mut self.states[slot as usize];
        assert!(
            *state == State::Filling(info.key),
            "slot {slot} was not reserved"
        );
        if self.is_closed {
            self.give_up(slot);
            return false;
        }
        self.wishes += 1;
        self.held += 1;
        self.idle.insert(self.wishes, info.key);
        *state = State::Held(Held {
            info,
            checksum,
            readers: 0,
            used: self.wishes,
        });
        true
    }

    /// Nothing writes to a reserved slot any more, and no block came.
    pub(super) fn give_up(&mut self, slot: u32) {
        let state = &mut self.states[slot as usize];
        if let State::Filling(key) = *state {
            *state = State::Free;
            self.places.remove(&key);
            self.free.push(slot);
        }
    }

    /// Begins a copy out of the block's slot, which stays as it is until [`Slots::leave`].
    pub(super) fn read(&mut self, key: &BlockKey) -> Option<(u32, Held)> {
        let slot = *self.places.get(key)?;
        let State::Held(held) = &mut self.states[slot as usize] else {
            return None;
        };
        self.wishes += 1;
        self.idle.remove(&held.used);
        held.readers += 1;
        held.used = self.wishes;
        Some((slot, *held))
    }

    /// A copy out of a slot is over.
    pub(super) fn leave(&mut self, slot: u32) {
        let state = &mut self.states[slot as usize];
        let mut none = 0;
        let readers = match state {
            State::Held(held) => &mut held.readers,
            State::Leaving { readers } => readers,
            State::Free | State::Filling(_) => &mut none,
        };
        assert!(*readers > 0, "slot {slot} is left more often than read");
        *readers -= 1;
        if *readers > 0 {
            return;
        }
        match *state {
            State::Held(held) => {
                self.idle.insert(held.used, held.info.key);
            }
            _ => {
                *state = State::Free;
                self.free.push(slot);
            }
        }
    }

    /// The block is here no more, if it was; its slot is free when nobody reads it.
    pub(super) fn remove(&mut self, key: &BlockKey) -> Option<BlockInfo> {
        let slot = *self.places.get(key)?;
        let state = &mut self.states[slot as usize];
        let State::Held(held) = *state else {
            return None;
        };
        self.places.remove(key);
        self.held -= 1;
        match held.readers {
            0 => {
                self.idle.remove(&held.used);
                *state = State::Free;
                self.free.push(slot);
            }
            readers => *state = State::Leaving { readers },
        }
        Some(held.info)
    }

    /// The block that nobody has wanted for the longest time, of those that nobody reads and that shall not stay.
    pub(super) fn coldest(&self, stay: &HashSet<BlockKey>) -> Option<BlockKey> {
        self.idle.values().find(|key| !stay.contains(key)).copied()
    }

    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use kvcache_core::IndexKey;

    use super::*;

    fn info(number: u8) -> BlockInfo {
        BlockInfo {
            key: BlockKey([number; 32]),
            parent: None,
            index_key: IndexKey(number.into()),
            index_parent: None,
        }
    }

    fn put(slots: &mut Slots, number: u8) -> u32 {
        let slot = slots.reserve(info(number).key).unwrap();
        assert!(slots.fill(slot, info(number), Checksum::crc32c(number.into())));
        slot
    }

    /// Three blocks in three slots, of which the first is wanted again.
    #[test]
    fn the_block_that_was_wanted_last_stays_longest() {
        let mut slots = Slots::new(3);
        for number in 1..=3 {
            put(&mut slots, number);
        }
        assert!(!slots.has_room() && slots.reserve(info(4).key).is_none());
        let (slot, held) = slots.read(&info(1).key).unwrap();
        assert_eq!(held.checksum, Checksum::crc32c(1));
        slots.leave(slot);
        assert_eq!(slots.coldest(&HashSet::new()), Some(info(2).key));
        let stay = HashSet::from([info(2).key]);
        assert_eq!(slots.coldest(&stay), Some(info(3).key));
        assert_eq!(slots.remove(&info(2).key), Some(info(2)));
        assert_eq!(
            (slots.held(), slots.find(&info(2).key)),
            (2, Found::Nothing)
        );
        assert!(slots.has_room());
    }

    /// A block that is read by two is neither the coldest nor, once removed, overwritten before both are done.
    #[test]
    fn a_slot_that_is_read_is_not_given_to_another_block() {
        let mut slots = Slots::new(1);
        put(&mut slots, 1);
        let (slot, _) = slots.read(&info(1).key).unwrap();
        slots.read(&info(1).key).unwrap();
        assert_eq!(slots.coldest(&HashSet::new()), None);
        assert_eq!(slots.remove(&info(1).key), Some(info(1)));
        assert!(slots.read(&info(1).key).is_none());
        assert!(slots.reserve(info(2).key).is_none());
        slots.leave(slot);
        assert!(slots.reserve(info(2).key).is_none());
        slots.leave(slot);
        assert_eq!(slots.reserve(info(2).key), Some(slot));
    }

    /// Closed while one block is read, and another one on its way.
    #[test]
    fn nothing_is_in_slots_that_are_closed() {
        let mut slots = Slots::new(3);
        put(&mut slots, 1);
        let coming = slots.reserve(info(2).key).unwrap();
        let (read, _) = slots.read(&info(1).key).unwrap();
        assert_eq!(slots.close(), [info(1)]);
        assert_eq!((slots.held(), slots.reserve(info(3).key)), (0, None));
        assert!(!slots.fill(coming, info(2), Checksum::crc32c(2)));
        slots.leave(read);
        assert_eq!(slots.find(&info(2).key), Found::Nothing);
        assert_eq!(slots.close(), []);
    }

    /// A slot that is being filled serves nobody, and is free again only when it is given up.
    #[test]
    fn a_slot_that_is_filled_serves_nobody() {
        let mut slots = Slots::new(1);
        let slot = slots.reserve(info(1).key).unwrap();
        assert_eq!(slots.find(&info(1).key), Found::Coming);
        assert!(slots.read(&info(1).key).is_none());
        assert_eq!(slots.coldest(&HashSet::new()), None);
        assert_eq!(slots.remove(&info(1).key), None);
        assert!(!slots.has_room());
        slots.give_up(slot);
        assert!(slots.has_room());
        assert_eq!(slots.find(&info(1).key), Found::Nothing);
    }
}
