//! Pins, removal, clearing and flushes, one by one. The histories beside this mix them with everything else.

use super::*;
use crate::id::PinId;

/// What a random history has of this.
#[derive(Clone, Debug)]
pub(super) enum Keep {
    Pin {
        chain: u64,
        blocks: u64,
        ttl: u16,
    },
    /// Under one of a few numbers, which come again and may be let go of first.
    PinAs {
        number: u64,
        chain: u64,
        blocks: u64,
        ttl: u16,
    },
    UnpinNumber(u64),
    Unpin(usize),
    Remove {
        chain: u64,
        blocks: u64,
    },
    Clear,
    Flush(u16),
}

/// Numbers that histories choose for pins.
const NUMBERS: u64 = 6;

pub(super) fn keeps() -> impl Strategy<Value = Keep> {
    let wanted = (0..CHAINS, 0..=DEPTH_MAX);
    prop_oneof![
        24 => (wanted.clone(), 1..2000u16)
            .prop_map(|((chain, blocks), ttl)| Keep::Pin { chain, blocks, ttl }),
        12 => (0..NUMBERS, wanted.clone(), 1..2000u16).prop_map(
            |(number, (chain, blocks), ttl)| Keep::PinAs { number, chain, blocks, ttl }
        ),
        8 => (0..NUMBERS).prop_map(Keep::UnpinNumber),
        8 => any::<prop::sample::Index>().prop_map(|i| Keep::Unpin(i.index(64))),
        16 => wanted.prop_map(|(chain, blocks)| Keep::Remove { chain, blocks }),
        1 => Just(Keep::Clear),
        7 => (1..800u16).prop_map(Keep::Flush),
    ]
}

impl Keep {
    pub(super) fn play(self, world: &mut World) {
        match self {
            // Refusals are part of the history.
            Self::Pin {
                chain: c,
                blocks,
                ttl,
            } => {
                let _ = world.pin(&keys(&chain(c, blocks)), MS * u32::from(ttl));
            }
            Self::PinAs {
                number,
                chain: c,
                blocks,
                ttl,
            } => {
                let wanted = keys(&chain(c, blocks));
                let _ = world.pin_as(PinId(number), &wanted, MS * u32::from(ttl));
            }
            Self::UnpinNumber(number) => world.unpin(PinId(number)),
            Self::Unpin(pick) => {
                if let Some(pin) = nth(&world.open_pins(), pick) {
                    world.unpin(pin);
                }
            }
            Self::Remove { chain: c, blocks } => {
                let wanted = keys(&chain(c, blocks));
                world.remove(&wanted).expect("few enough blocks");
            }
            Self::Clear => {
                world.clear();
            }
            Self::Flush(within) => {
                let _ = world.flush(MS * u32::from(within));
            }
        }
    }
}

fn with_disk() -> Limits {
    Limits {
        disk_segments: 3,
        disk_segment_slots: 4,
        ..small()
    }
}

fn disk(world: &World) -> BTreeSet<IndexKey> {
    let contents = world.manager.contents(Tier::Disk);
    contents.map(|info| info.index_key).collect()
}

fn index_keys(blocks: &[BlockInfo]) -> BTreeSet<IndexKey> {
    blocks.iter().map(|block| block.index_key).collect()
}

/// How deep the pin is that became ready last.
fn pinned(world: &World) -> u32 {
    let depths = world
        .outcomes
        .iter()
        .rev()
        .filter_map(|outcome| match outcome {
            Outcome::Pinned { depth, .. } => Some(*depth),
            _ => None,
        });
    depths.into_iter().next().expect("a pin is ready")
}

/// Whether each flush that ended was complete.
fn flushed(world: &World) -> Vec<bool> {
    let ends = world.outcomes.iter().filter_map(|outcome| match outcome {
        Outcome::Flushed { complete, .. } => Some(*complete),
        _ => None,
    });
    ends.collect()
}

/// Eight slots, four pinned, then twice as many new blocks as there are slots.
#[test]
fn a_pinned_block_outlives_any_pressure_until_it_is_let_go() {
    let mut world = world(small());
    store(&mut world, &chain(0, 4));
    let pin = world.pin(&keys(&chain(0, 4)), SECOND * 10).expect("room");
    assert_eq!(pinned(&world), 4);
    for other in [4, 8, 12, 16] {
        store(&mut world, &chain(other, 4));
    }
    assert_eq!(
        fetch(&mut world, request(&chain(0, 4))),
        [BlockSource::Host; 4]
    );
    world.unpin(pin);
    for other in [4, 8, 12, 16] {
        store(&mut world, &chain(other, 4));
    }
    assert_eq!(
        fetch(&mut world, request(&chain(0, 1))),
        [BlockSource::Miss]
    );
    world.finish();
}

/// Asked for longer than pins may last, and never let go of.
#[test]
fn a_pin_ends_by_its_time() {
    let mut world = world(Limits {
        pin_ttl_max: SECOND * 5,
        ..small()
    });
    store(&mut world, &chain(0, 4));
    world.pin(&keys(&chain(0, 4)), SECOND * 500).expect("room");
    world.advance(SECOND * 4);
    assert_eq!(world.manager.stats().pinned_blocks, 4);
    world.advance(SECOND);
    let stats = world.manager.stats();
    assert_eq!(
        (stats.pinned_blocks, stats.pins, stats.pins_expired),
        (0, 0, 1)
    );
    world.finish();
}

/// Half of eight slots may be pinned: five blocks are cut to four; the same four again need no room, others get none.
#[test]
fn pins_keep_no_more_than_their_share() {
    let mut world = world(small());
    store(&mut world, &chain(0, 5));
    store(&mut world, &chain(4, 3));
    world.pin(&keys(&chain(0, 5)), SECOND).expect("room");
    assert_eq!(pinned(&world), 4);
    world
        .pin(&keys(&chain(0, 4)), SECOND)
        .expect("no room needed");
    assert_eq!(pinned(&world), 4);
    world.pin(&keys(&chain(4, 1)), SECOND).expect("admitted");
    assert_eq!(pinned(&world), 0);
    assert_eq!(world.manager.stats().pinned_blocks, 4);
    world.finish();
}

/// One pin more than may be in force; a peer's leases do not count among them, nor pins among leases.
#[test]
fn too_many_pins_are_refused_as_busy() {
    let mut world = world(Limits {
        pins_max: 2,
        leases_max: 1,
        ..small()
    });
    store(&mut world, &chain(0, 2));
    let wanted = keys(&chain(0, 2));
    world.lease(PeerId(1), &wanted, SECOND).expect("room");
    let first = world.pin(&wanted, SECOND).expect("room");
    world.pin(&wanted, SECOND).expect("room");
    let busy = world.pin(&wanted, SECOND).expect_err("one too many");
    assert_eq!(busy.kind(), ErrorKind::Busy);
    world.unpin(first);
    world.pin(&wanted, SECOND).expect("room again");
    let busy = world
        .lease(PeerId(2), &wanted, SECOND)
        .expect_err("one too many");
    assert_eq!(busy.kind(), ErrorKind::Busy);
    world.finish();
}

/// Blocks that have gone to disk, and one that is nowhere.
#[test]
fn a_pin_brings_blocks_up_and_ends_where_they_do() {
    let mut world = world(with_disk());
    store(&mut world, &chain(0, 4));
    store(&mut world, &chain(4, 6));
    run(&mut world);
    let below: Vec<BlockInfo> = chain(0, 4)
        .into_iter()
        .filter(|block| !host(&world).contains(&block.index_key))
        .collect();
    assert!(!below.is_empty(), "something went to disk");
    world.pin(&keys(&chain(0, 6)), SECOND).expect("room");
    run(&mut world);
    assert_eq!(pinned(&world), 4);
    assert!(host(&world).is_superset(&index_keys(&chain(0, 4))));
    assert_eq!(world.manager.stats().staged, below.len() as u64);
    world.finish();
}

/// Let go before it holds, with its block still on the way up; and twice, and one that never was.
#[test]
fn a_pin_that_is_let_go_early_ends_without_blocks() {
    let mut world = world(with_disk());
    store(&mut world, &chain(0, 4));
    store(&mut world, &chain(4, 6));
    run(&mut world);
    world.remove(&keys(&chain(4, 6))).expect("few enough");
    let pin = world.pin(&keys(&chain(0, 4)), SECOND).expect("room");
    assert!(world.commands() > 0, "a block has to come up");
    world.unpin(pin);
    assert_eq!(pinned(&world), 0);
    world.unpin(pin);
    world.unpin(PinId(77));
    run(&mut world);
    assert_eq!(world.manager.stats().pins, 0);
    world.finish();
}

/// In DRAM, on disk, in both, and unknown; the world compares the events with what is left.
#[test]
fn removed_blocks_are_nowhere_in_this_node() {
    let mut world = world(with_disk());
    store(&mut world, &chain(0, 4));
    store(&mut world, &chain(4, 6));
    run(&mut world);
    let removed = world.remove(&keys(&chain(0, 7))).expect("few enough");
    assert_eq!((removed.removed, removed.kept), (4, 0));
    let left = fetch(&mut world, request(&chain(0, 4)));
    assert_eq!(left, [BlockSource::Miss; 4]);
    assert_eq!(fetch(&mut world, request(&chain(4, 3))).len(), 3);
    assert_eq!(world.manager.stats().removed, 4);
    let too_many = vec![BlockKey([0; 32]); (1 << 16) + 1];
    let refused = world.remove(&too_many).expect_err("too many");
    assert_eq!(refused.kind(), ErrorKind::Invalid);
    world.finish();
}

/// One block pinned, one leased, one being fetched, one being stored, one free.
#[test]
fn blocks_in_use_are_kept_and_counted() {
    let mut world = world(small());
    for c in [0, 4, 8, 12] {
        store(&mut world, &chain(c, 1));
    }
    world.pin(&keys(&chain(0, 1)), SECOND).expect("room");
    world
        .lease(PeerId(1), &keys(&chain(4, 1)), SECOND)
        .expect("room");
    world
        .fetch(request(&chain(8, 1)), SECOND)
        .expect("admitted");
    world.store(&chain(16, 1), SECOND).expect("admitted");
    let all: Vec<BlockKey> = [0, 4, 8, 12, 16]
        .into_iter()
        .flat_map(|c| keys(&chain(c, 1)))
        .collect();
    let removed = world.remove(&all).expect("few enough");
    assert_eq!((removed.removed, removed.kept), (1, 4));
    world.finish();
    let removed = world.remove(&all).expect("few enough");
    assert_eq!((removed.removed, removed.kept), (4, 0));
}

/// Blocks in every tier, one pinned, two segments written to: afterwards only the pinned one and the objects are left, and
/// the disk takes blocks again.
#[test]
fn clearing_leaves_pins_and_shared_objects() {
    let limits = Limits {
        object: true,
        ..with_disk()
    };
    let mut world = world(limits);
    for c in [0, 4, 8] {
        store(&mut world, &chain(c, 6));
        run(&mut world);
    }
    assert!(disk(&world).len() > 4, "more than one segment is used");
    world.put_object(block(20, 5).key);
    let last = [block(8, 5)];
    store(&mut world, &last);
    world.pin(&keys(&last), SECOND).expect("room");
    run(&mut world);
    let objects = world.manager.contents(Tier::Object).count();
    let cleared = world.clear();
    assert_eq!(cleared.kept, 1, "{cleared:?}");
    assert_eq!(host(&world), index_keys(&last));
    run(&mut world);
    assert_eq!(disk(&world), BTreeSet::new());
    assert_eq!(world.manager.contents(Tier::Object).count(), objects);
    assert!(world.manager.stats().segments_dropped > 1);
    for c in [12, 16] {
        store(&mut world, &chain(c, 6));
        run(&mut world);
    }
    assert!(!disk(&world).is_empty(), "the disk takes blocks again");
    world.finish();
}

/// A copy to disk is handed out, then everything is cleared: what it brings is dropped with its segment.
#[test]
fn what_was_on_its_way_to_disk_goes_with_its_segment() {
    let mut world = world_with_a_block_leaving();
    let cleared = world.clear();
    assert_eq!((cleared.removed, cleared.kept), (7, 1));
    run(&mut world);
    assert_eq!(world.manager.stats().demoted_disk, 1);
    assert_eq!(host(&world), index_keys(&chain(4, 1)));
    assert_eq!(disk(&world), BTreeSet::new());
    assert_eq!(world.manager.stats().segments_dropped, 1);
    world.finish();
}

/// Eight blocks fill DRAM, a ninth waits for a slot, and the copy of another to disk is with the driver.
fn world_with_a_block_leaving() -> World {
    let mut world = world(with_disk());
    store(&mut world, &chain(0, 8));
    world.store(&chain(4, 1), SECOND).expect("admitted");
    assert_eq!(world.commands(), 1, "one is leaving");
    world
}

/// In force, being readied, and ended: the number can be taken when no pin has it.
#[test]
fn a_number_names_one_pin_at_a_time() {
    let mut world = world(small());
    let blocks = chain(0, 4);
    store(&mut world, &blocks);
    let wanted = keys(&blocks);
    let pin = PinId(7);
    world.pin_as(pin, &wanted, SECOND).expect("a free number");
    assert_eq!(pinned(&world), 4);
    let refused = world.pin_as(pin, &wanted, SECOND);
    let refused = refused.expect_err("a number in use");
    assert_eq!(refused.kind(), ErrorKind::Invalid);
    assert!(refused.context().contains("number 7"), "{refused}");
    world.unpin(pin);
    world.pin_as(pin, &wanted[..2], SECOND).expect("free again");
    assert_eq!(pinned(&world), 2);
    world.advance(SECOND);
    world.pin_as(pin, &wanted[..1], SECOND).expect("free again");
    assert_eq!(pinned(&world), 1);
    world.unpin(pin);
    world.finish();
}

/// Let go of first, twice; asked for then, and once more: the first keeps nothing, the second does.
#[test]
fn a_pin_that_was_let_go_of_before_it_came_ends_at_once() {
    let mut world = world(small());
    let blocks = chain(0, 4);
    store(&mut world, &blocks);
    let pin = PinId(7);
    world.unpin(pin);
    world.unpin(pin);
    world.pin_as(pin, &keys(&blocks), SECOND).expect("taken");
    assert_eq!(pinned(&world), 0);
    let stats = world.manager.stats();
    assert_eq!((stats.pins, stats.pinned_blocks), (0, 0));
    assert_eq!(stats.pins_unpinned_early, 1);
    world.pin_as(pin, &keys(&blocks), SECOND).expect("taken");
    assert_eq!(pinned(&world), 4);
    world.unpin(pin);
    world.finish();
}

/// Three numbers let go of where two are remembered; then one of them, too long ago.
#[test]
fn early_ends_are_remembered_in_a_bounded_number_for_a_bounded_time() {
    let limits = Limits {
        early_unpins_max: 2,
        early_unpin_wait: SECOND,
        ..small()
    };
    let mut world = world(limits);
    let blocks = chain(0, 1);
    store(&mut world, &blocks);
    for number in 1..=3 {
        world.unpin(PinId(number));
    }
    let depth = |world: &mut World, number| {
        let pin = PinId(number);
        world.pin_as(pin, &keys(&blocks), SECOND).expect("taken");
        pinned(world)
    };
    assert_eq!(depth(&mut world, 1), 1, "the oldest is forgotten");
    assert_eq!(depth(&mut world, 2), 0);
    world.advance(SECOND);
    assert_eq!(depth(&mut world, 3), 1, "it was too long ago");
    world.advance(SECOND);
    world.finish();
}

/// Nothing on its way; then something, which arrives; then something, which fails.
#[test]
fn a_flush_ends_with_the_last_copy_on_its_way_down() {
    let mut idle = world(with_disk());
    idle.flush(SECOND).expect("admitted");
    assert_eq!(flushed(&idle), [true]);
    for fault in [Fault::None, Fault::Fails(ErrorKind::Io)] {
        let mut world = world_with_a_block_leaving();
        world.flush(SECOND).expect("admitted");
        assert!(flushed(&world).is_empty(), "it waits");
        let faults = [fault; 3];
        while flushed(&world).is_empty() {
            assert!(world.commands() > 0, "it waits for a command");
            world.execute(0, &faults);
        }
        assert_eq!(flushed(&world), [true]);
        world.finish();
    }
}

/// The copies are never carried out: the deadline ends the flush, and a cancelled one ends at once.
#[test]
fn a_flush_that_is_not_done_in_time_says_so() {
    let mut world = world_with_a_block_leaving();
    world.flush(MS * 100).expect("admitted");
    let cancelled = world.flush(SECOND).expect("admitted");
    world.cancel(cancelled);
    assert_eq!(flushed(&world), [false]);
    world.advance(MS * 100);
    assert_eq!(flushed(&world), [false, false]);
    world.finish();
}
