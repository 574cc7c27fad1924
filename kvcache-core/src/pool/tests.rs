use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::id::{Generation, SlotIndex, Time};

#[test]
fn a_reused_slot_has_another_generation() {
    let mut slots = Slots::new(1);
    let first = slots.allocate().expect("vacant");
    assert!(slots.allocate().is_none());
    let first_place = first.place();
    let sealed = slots.seal(first);
    slots.release(sealed);
    let second = slots.allocate().expect("vacant");
    assert_eq!(second.place().index, first_place.index);
    assert_ne!(second.place().generation, first_place.generation);
    slots.abandon(second);
    let third = slots.allocate().expect("vacant");
    assert_eq!(third.place().generation, Generation(3));
    slots.abandon(third);
}

#[test]
fn a_quarantined_slot_is_not_given_out_before_it_is_readmitted() {
    let mut slots = Slots::new(1);
    let slot = slots.allocate().expect("vacant");
    let slot = slots.quarantine(slot);
    assert_eq!(
        (slots.vacant(), slots.filling(), slots.quarantined()),
        (0, 0, 1)
    );
    assert!(slots.allocate().is_none());
    slots.readmit(slot);
    assert_eq!((slots.vacant(), slots.quarantined()), (1, 0));
}

#[test]
#[should_panic(expected = "released while pinned")]
fn a_pinned_slot_cannot_be_released() {
    let mut slots = Slots::new(1);
    let slot = slots.allocate().expect("vacant");
    let slot = slots.seal(slot);
    slots.pin(slot.place());
    slots.release(slot);
}

#[test]
#[should_panic(expected = "released more often than acquired")]
fn a_pin_is_taken_back_once() {
    let mut slots = Slots::new(1);
    let slot = slots.allocate().expect("vacant");
    let slot = slots.seal(slot);
    let place = slot.place();
    slots.pin(place);
    slots.unpin(place);
    slots.unpin(place);
}

/// The reference was made before the slot was given to another block.
#[test]
#[should_panic(expected = "out of date")]
fn an_old_reference_cannot_pin_a_reused_slot() {
    let mut slots = Slots::new(1);
    let slot = slots.allocate().expect("vacant");
    let old = slot.place();
    slots.abandon(slot);
    let slot = slots.allocate().expect("vacant");
    let _slot = slots.seal(slot);
    slots.pin(old);
}

#[test]
fn names_are_due_in_the_order_of_their_times() {
    let mut expiries = Expiries::default();
    expiries.set("late", Time(30));
    expiries.set("moved", Time(5));
    expiries.set("early", Time(10));
    expiries.set("moved", Time(20));
    expiries.set("cleared", Time(1));
    assert_eq!(expiries.clear("cleared"), Some(Time(1)));
    assert_eq!(expiries.next(), Some(Time(10)));
    let due: Vec<_> = std::iter::from_fn(|| expiries.pop_due(Time(20))).collect();
    assert_eq!(due, ["early", "moved"]);
    assert_eq!((expiries.len(), expiries.is_empty()), (1, false));
}

fn insert(cache: &mut BlockCache<u32>, chain: &[u32]) -> Vec<u32> {
    let count = chain.len() as u32;
    let allocation = cache.allocate(count).expect("enough room");
    let parents = std::iter::once(None).chain(chain.iter().copied().map(Some));
    for ((slot, key), parent) in allocation.slots.into_iter().zip(chain).zip(parents) {
        cache.insert(slot, *key, parent);
    }
    cache.touch(chain);
    allocation.evicted
}

#[test]
fn a_block_cache_evicts_the_tails_of_old_chains_in_order() {
    let mut cache = BlockCache::new(6);
    assert!(insert(&mut cache, &[1, 2, 3]).is_empty());
    assert!(insert(&mut cache, &[11, 12, 13]).is_empty());
    cache.touch(&[1, 2, 3]);
    assert_eq!(insert(&mut cache, &[21, 22, 23, 24]), [13, 12, 11, 3]);
    assert_eq!(cache.depth(&[1, 2, 3]), 2);
    assert_eq!((cache.len(), cache.available()), (6, 6));
}

#[test]
fn a_block_cache_refuses_what_pins_leave_no_room_for_and_evicts_nothing() {
    let mut cache = BlockCache::new(4);
    insert(&mut cache, &[1, 2, 3]);
    let place = cache.pin(&2);
    assert_eq!(place, cache.place(&2));
    assert_eq!(cache.pin(&2), place);
    assert_eq!(cache.pin(&9), None);
    assert!(cache.allocate(4).is_none());
    assert_eq!(cache.len(), 3);
    cache.unpin(&2);
    assert!(cache.allocate(4).is_none());
    cache.unpin(&2);
    let allocation = cache.allocate(4).expect("enough room");
    assert_eq!(allocation.evicted, [3, 2, 1]);
    for slot in allocation.slots {
        cache.abandon(slot);
    }
    assert!(cache.is_empty());
}

#[test]
fn a_block_inserted_twice_keeps_its_first_slot() {
    let mut cache = BlockCache::new(2);
    insert(&mut cache, &[1]);
    let place = cache.place(&1);
    insert(&mut cache, &[1]);
    assert_eq!(cache.place(&1), place);
    assert_eq!(
        (cache.len(), cache.capacity(), cache.available()),
        (1, 2, 2)
    );
    assert!(cache.remove(&1));
    assert!(!cache.remove(&1));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Random conversations that share beginnings: slots are unique, evicted blocks are gone, and while nothing is
    /// pinned what remains of every conversation is a prefix.
    #[test]
    fn a_block_cache_holds_prefixes_in_distinct_slots(
        requests in prop::collection::vec((0..4u32, 1..7u32), 1..60),
        capacity in 7..16u32,
    ) {
        let mut cache = BlockCache::new(capacity);
        for (conversation, blocks) in requests {
            let name = |position: u32| if position < 2 { position } else { conversation * 100 + position };
            let chain: Vec<u32> = (0..blocks).map(name).collect();
            let held = cache.depth(&chain);
            cache.touch(&chain);
            for key in &chain[..held] {
                prop_assert!(cache.pin(key).is_some());
            }
            let allocation = cache.allocate(blocks - held as u32).expect("capacity exceeds a chain");
            for key in &allocation.evicted {
                prop_assert_eq!(cache.place(key), None);
            }
            for (slot, position) in allocation.slots.into_iter().zip(held..) {
                let parent = position.checked_sub(1).map(|parent| chain[parent]);
                cache.insert(slot, chain[position], parent);
            }
            for key in &chain[..held] {
                cache.unpin(key);
            }
            cache.touch(&chain);
            prop_assert_eq!(cache.depth(&chain), chain.len());
            let mut used: BTreeMap<SlotIndex, u32> = BTreeMap::new();
            for conversation in 0..4 {
                let name = |position: u32| if position < 2 { position } else { conversation * 100 + position };
                let chain: Vec<u32> = (0..6).map(name).collect();
                let depth = cache.depth(&chain);
                for (position, key) in chain.iter().enumerate() {
                    prop_assert_eq!(cache.place(key).is_some(), position < depth);
                    if let Some(place) = cache.place(key) {
                        prop_assert_eq!(*used.entry(place.index).or_insert(*key), *key);
                    }
                }
            }
            prop_assert!(used.len() <= capacity as usize);
        }
    }
}
