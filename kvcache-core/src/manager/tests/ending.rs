//! The end of a node: what goes down, in which order, and what a restart finds. The histories beside this mix it with
//! everything else.

use super::*;

/// Room for 16 blocks on disk, and for 8 in DRAM.
fn with_disk() -> Limits {
    Limits {
        disk_segments: 4,
        disk_segment_slots: 4,
        ..small()
    }
}

/// What the end reported: blocks written, blocks left.
fn retired(world: &World) -> Option<(u64, u32)> {
    world.outcomes.iter().find_map(|outcome| match outcome {
        Outcome::Retired { written, left } => Some((*written, *left)),
        _ => None,
    })
}

fn on_disk(world: &World) -> BTreeSet<BlockKey> {
    let contents = world.manager.contents(Tier::Disk);
    contents.map(|info| info.key).collect()
}

fn key_set(blocks: &[BlockInfo]) -> BTreeSet<BlockKey> {
    keys(blocks).into_iter().collect()
}

/// A restart finds these, and only these, each with its bytes.
fn check_found(world: &mut World, found: &[BlockInfo], lost: &[BlockInfo]) {
    world.restart();
    for block in found {
        let sources = fetch(world, request(std::slice::from_ref(block)));
        assert_eq!(sources, [BlockSource::Disk], "{:?}", block.key);
    }
    for block in lost {
        let sources = fetch(world, request(std::slice::from_ref(block)));
        assert_eq!(sources, [BlockSource::Miss], "{:?}", block.key);
    }
    world.finish();
}

/// Seven blocks that never left DRAM, one of them pinned, one leased, one being read.
#[test]
fn what_is_in_dram_alone_is_found_on_disk_after_a_restart() {
    let mut world = world(with_disk());
    let blocks = chain(0, 7);
    store(&mut world, &blocks);
    assert_eq!(on_disk(&world), BTreeSet::new());
    world.pin(&keys(&blocks[..1]), SECOND).expect("room");
    let leased = keys(&blocks[1..2]);
    world.lease(PeerId(1), &leased, SECOND).expect("room");
    world
        .fetch(request(&blocks[2..3]), SECOND)
        .expect("admitted");
    world.retire(SECOND);
    run(&mut world);
    assert_eq!(retired(&world), Some((7, 0)));
    assert_eq!(on_disk(&world), key_set(&blocks));
    world.finish();
    check_found(&mut world, &blocks, &[]);
}

/// Two segments of records are free, and eight blocks in DRAM: those used last have them, whatever was stored first.
#[test]
fn the_blocks_used_last_go_first() {
    let limits = Limits {
        disk_segments: 2,
        disk_segment_slots: 2,
        ..small()
    };
    let mut world = world(limits);
    let (old, new) = (chain(0, 4), chain(4, 3));
    store(&mut world, &new);
    store(&mut world, &old);
    fetch(&mut world, request(&new));
    world.retire(SECOND);
    run(&mut world);
    assert_eq!(retired(&world), Some((4, 3)));
    // The last record goes to the first block of the other sequence: its tail is of no use without it.
    let kept = [new.as_slice(), &old[..1]].concat();
    assert_eq!(on_disk(&world), key_set(&kept));
    world.finish();
    check_found(&mut world, &kept, &old[1..]);
}

/// The disk is full of one sequence, and eight other blocks are in DRAM: a segment gives way to blocks that were used
/// after everything in it, and only to those.
#[test]
fn a_segment_gives_way_to_what_was_used_after_everything_in_it() {
    let limits = Limits {
        disk_segments: 2,
        disk_segment_slots: 4,
        ..small()
    };
    for is_hot in [false, true] {
        let mut world = world(limits.clone());
        let below: Vec<BlockInfo> = [chain(0, 6), vec![block(4, 0), block(4, 1)]].concat();
        store_and_retire(&mut world, &below);
        world.restart();
        assert_eq!(on_disk(&world), key_set(&below), "the disk is full");
        let above = chain(8, 3);
        store(&mut world, &above);
        if is_hot {
            // All that is below is read once more.
            for one in &below {
                fetch(&mut world, request(std::slice::from_ref(one)));
            }
        }
        let dropped = world.manager.stats().segments_dropped;
        world.retire(SECOND);
        run(&mut world);
        let dropped = world.manager.stats().segments_dropped - dropped;
        if is_hot {
            assert_eq!((retired(&world), dropped), (Some((0, 3)), 0));
            assert_eq!(on_disk(&world), key_set(&below));
        } else {
            assert_eq!((retired(&world), dropped), (Some((3, 0)), 1));
            assert!(on_disk(&world).is_superset(&key_set(&above)));
            assert_eq!(on_disk(&world).len(), 7);
        }
        world.finish();
    }
}

fn store_and_retire(world: &mut World, blocks: &[BlockInfo]) {
    store(world, blocks);
    world.retire(SECOND);
    run(world);
    assert_eq!(retired(world).map(|(_, left)| left), Some(0));
}

/// No time at all; and none after the first copies were handed out: what is done is there, and nothing else begins.
#[test]
fn the_deadline_ends_the_end() {
    let mut world_without_time = world(with_disk());
    let blocks = chain(0, 7);
    store(&mut world_without_time, &blocks);
    world_without_time.retire(Duration::ZERO);
    assert_eq!(world_without_time.commands(), 0);
    assert_eq!(retired(&world_without_time), Some((0, 7)));
    check_found(&mut world_without_time, &[], &blocks);

    let mut world = world(with_disk());
    store(&mut world, &blocks);
    world.retire(MS * 100);
    assert_eq!(world.commands(), 2, "as many as may be in the background");
    world.execute(0, &[]);
    world.advance(MS * 100);
    assert_eq!(retired(&world), Some((3, 4)));
    let there = on_disk(&world);
    assert_eq!(there, key_set(&blocks[..3]));
    // Copies under way are cut off.
    world.restart();
    for one in &blocks {
        let sources = fetch(&mut world, request(std::slice::from_ref(one)));
        let is_there = there.contains(&one.key);
        assert_eq!(sources == [BlockSource::Disk], is_there, "{sources:?}");
    }
    world.finish();
}

/// A disk that refuses: everything goes to the object store if there is one, and else stays behind without waiting.
#[test]
fn what_the_disk_refuses_goes_to_the_object_store_or_nowhere() {
    for object in [false, true] {
        let limits = Limits {
            object,
            ..with_disk()
        };
        let mut world = world(limits);
        store(&mut world, &chain(0, 7));
        world.retire(SECOND);
        let full = [Fault::Fails(ErrorKind::NoSpace); 3];
        world.execute(0, &full);
        world.execute(0, &full);
        run(&mut world);
        let expected = if object { (7, 0) } else { (0, 7) };
        assert_eq!(retired(&world), Some(expected));
        assert_eq!(on_disk(&world), BTreeSet::new());
        world.finish();
    }
}

/// A store is under way when the end begins: what it brings goes down too, and nothing else is taken on.
#[test]
fn a_store_under_way_is_waited_for_and_nothing_new_is_taken_on() {
    let mut world = world(with_disk());
    let blocks = chain(0, 4);
    world.store(&blocks, SECOND).expect("admitted");
    world.retire(SECOND * 2);
    assert_eq!(retired(&world), None);
    let refusals = [
        world.store(&chain(4, 1), SECOND).map(drop),
        world.fetch(request(&blocks), SECOND).map(drop),
        world.lease(PeerId(1), &keys(&blocks), SECOND).map(drop),
        world.pin(&keys(&blocks), SECOND).map(drop),
        world.flush(SECOND).map(drop),
    ];
    for refused in refusals {
        let kind = refused.expect_err("the node ends").kind();
        assert_eq!(kind, ErrorKind::Cancelled);
    }
    run(&mut world);
    assert_eq!(retired(&world), Some((4, 0)));
    world.finish();
    check_found(&mut world, &blocks, &[]);
}

/// A store of more blocks than DRAM has slots goes on while the node ends: the slots come from blocks that go down.
#[test]
fn a_store_larger_than_dram_goes_through_while_the_node_ends() {
    let mut world = world(with_disk());
    let blocks: Vec<BlockInfo> = (0..4).flat_map(|c| chain(c * 4, 3)).collect();
    world.store(&blocks, SECOND).expect("admitted");
    world.retire(SECOND * 2);
    run(&mut world);
    assert_eq!(retired(&world), Some((12, 0)));
    world.finish();
    check_found(&mut world, &blocks, &[]);
}

/// No lower tier: there is nowhere to go, and nothing to wait for.
#[test]
fn without_a_lower_tier_the_end_comes_at_once() {
    let mut world = world(small());
    store(&mut world, &chain(0, 5));
    world.retire(SECOND);
    assert_eq!(retired(&world), Some((0, 5)));
    world.retire(SECOND);
    world.finish();
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// After any history the node ends without a fault: if it says that nothing stayed behind, a restart has every block
    /// that was in DRAM, from its disk or the object store, except those that were damaged on the way.
    #[test]
    fn nothing_that_was_said_to_be_kept_is_missing_after_a_restart(
        limits in limits(),
        actions in actions(),
    ) {
        let mut world = play(&limits, &actions);
        if world.is_ending() {
            world.restart();
            store(&mut world, &chain(0, 3));
            world.finish();
        }
        let host = world.manager.contents(Tier::Host);
        let before: Vec<BlockInfo> = host.collect();
        world.retire(SECOND * 3600);
        world.finish();
        if retired(&world).is_some_and(|(_, left)| left == 0) {
            world.restart();
            let doubtful = world.doubtful();
            for info in before.iter().filter(|info| !doubtful.contains(&info.key)) {
                let wanted = FetchRequest {
                    shared: std::iter::once(0..1).collect(),
                    ..request(std::slice::from_ref(info))
                };
                let sources = fetch(&mut world, wanted);
                prop_assert_ne!(sources, [BlockSource::Miss], "{:?}", info.key);
            }
        }
    }
}
