//! Slots as values whose type is their state.

use std::marker::PhantomData;

use crate::id::{Generation, SlotIndex};
use crate::place::HostSlot;

/// The state of a slot that is being written: nobody may read it.
#[derive(Debug)]
pub enum Filling {}

/// The state of a slot whose bytes are complete and checked: nobody may write it.
#[derive(Debug)]
pub enum Sealed {}

/// The state of a slot that a failed transfer may still be writing to: nobody may use it at all.
#[derive(Debug)]
pub enum Quarantined {}

/// The only handle of one used slot, in the state that its type says; see [`Slots`].
///
/// It cannot be cloned. Dropping it loses the slot, so hand it back to the [`Slots`] that it came from.
#[must_use = "a dropped slot is lost: release it"]
#[derive(Debug)]
pub struct Slot<State> {
    place: HostSlot,
    state: PhantomData<State>,
}

impl<State> Slot<State> {
    /// The slot as a plain reference for others: its number and its generation.
    #[must_use]
    pub fn place(&self) -> HostSlot {
        self.place
    }

    fn with(place: HostSlot) -> Self {
        Self {
            place,
            state: PhantomData,
        }
    }
}

/// The vacant slots of an arena, and the pins and generations of all.
///
/// Allocation is lowest-numbered first among slots never used, then most recently freed: what was written last is
/// likeliest to be in the processor's caches and its pages present.
#[derive(Debug)]
pub struct Slots {
    generations: Vec<Generation>,
    pins: Vec<u32>,
    vacant: Vec<SlotIndex>,
    filling: u32,
    sealed: u32,
    quarantined: u32,
}

impl Slots {
    /// An arena of `count` vacant slots.
    #[must_use]
    pub fn new(count: u32) -> Self {
        Self {
            generations: vec![Generation(0); count as usize],
            pins: vec![0; count as usize],
            vacant: (0..count).rev().map(SlotIndex).collect(),
            filling: 0,
            sealed: 0,
            quarantined: 0,
        }
    }

    /// A slot to be filled, under a generation that it never had; none when none is vacant.
    pub fn allocate(&mut self) -> Option<Slot<Filling>> {
        let index = self.vacant.pop()?;
        let generation = &mut self.generations[index.0 as usize];
        *generation = Generation(generation.0.wrapping_add(1));
        self.filling += 1;
        Some(Slot::with(HostSlot {
            index,
            generation: *generation,
        }))
    }

    /// The bytes are complete: from now on they may be read, and not written.
    pub fn seal(&mut self, slot: Slot<Filling>) -> Slot<Sealed> {
        self.assert_current(slot.place);
        self.filling -= 1;
        self.sealed += 1;
        Slot::with(slot.place)
    }

    /// The filling came to nothing and has ended: the slot is vacant again.
    pub fn abandon(&mut self, slot: Slot<Filling>) {
        self.assert_current(slot.place);
        self.filling -= 1;
        self.vacant.push(slot.place.index);
    }

    /// The block leaves its slot.
    ///
    /// # Panics
    /// If the slot is pinned: whoever pinned it may still be reading.
    pub fn release(&mut self, slot: Slot<Sealed>) {
        self.assert_current(slot.place);
        assert!(
            self.pins[slot.place.index.0 as usize] == 0,
            "slot {} released while pinned",
            slot.place.index
        );
        self.sealed -= 1;
        self.vacant.push(slot.place.index);
    }

    /// A transfer that touches the slot failed and may still be at work there: the slot stays out of use until
    /// [`Slots::readmit`].
    pub fn quarantine(&mut self, slot: Slot<Filling>) -> Slot<Quarantined> {
        self.assert_current(slot.place);
        self.filling -= 1;
        self.quarantined += 1;
        Slot::with(slot.place)
    }

    /// Nothing is at work in a quarantined slot any more: it is vacant again.
    pub fn readmit(&mut self, slot: Slot<Quarantined>) {
        self.assert_current(slot.place);
        self.quarantined -= 1;
        self.vacant.push(slot.place.index);
    }

    /// Keeps a sealed slot from being released; pins count. Returns how many there are now.
    pub fn pin(&mut self, place: HostSlot) -> u32 {
        self.assert_current(place);
        let pins = &mut self.pins[place.index.0 as usize];
        *pins += 1;
        *pins
    }

    /// Takes one pin back. Returns how many are left.
    ///
    /// # Panics
    /// If there is none: a release too many would let a slot be reused under a reader.
    pub fn unpin(&mut self, place: HostSlot) -> u32 {
        self.assert_current(place);
        let pins = &mut self.pins[place.index.0 as usize];
        assert!(
            *pins > 0,
            "slot {} released more often than acquired",
            place.index
        );
        *pins -= 1;
        *pins
    }

    /// How many pins a slot has.
    #[must_use]
    pub fn pins(&self, place: HostSlot) -> u32 {
        self.pins_of(place.index)
    }

    /// How many pins a slot has, whatever its generation.
    pub(crate) fn pins_of(&self, index: SlotIndex) -> u32 {
        self.pins[index.0 as usize]
    }

    /// How many slots there are.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.generations.len() as u32
    }

    /// How many slots hold nothing and may be allocated.
    #[must_use]
    pub fn vacant(&self) -> u32 {
        self.vacant.len() as u32
    }

    /// How many slots are being filled.
    #[must_use]
    pub fn filling(&self) -> u32 {
        self.filling
    }

    /// How many slots hold a block.
    #[must_use]
    pub fn sealed(&self) -> u32 {
        self.sealed
    }

    /// How many slots wait for a failed transfer to drain.
    #[must_use]
    pub fn quarantined(&self) -> u32 {
        self.quarantined
    }

    fn assert_current(&self, place: HostSlot) {
        assert!(
            self.generations.get(place.index.0 as usize) == Some(&place.generation),
            "slot {} of generation {} is not of this arena or out of date",
            place.index,
            place.generation
        );
    }
}
