use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::key::IndexKey;
use crate::model::{Fault, World, genuine};
use crate::place::Place;

mod ending;
mod keeping;

use keeping::{Keep, keeps};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

/// Block `position` of conversation `chain`: conversations of one family of four share their first three blocks.
fn block(chain: u64, position: u64) -> BlockInfo {
    let id = |position: u64| {
        let owner = if position < 3 { chain / 4 * 4 } else { chain };
        owner * 1000 + position + 1
    };
    let key = |position| {
        let mut key = [7; 32];
        key[..8].copy_from_slice(&id(position).to_le_bytes());
        BlockKey(key)
    };
    let parent = position.checked_sub(1);
    BlockInfo {
        key: key(position),
        parent: parent.map(key),
        index_key: IndexKey(id(position)),
        index_parent: parent.map(|parent| IndexKey(id(parent))),
    }
}

fn chain(chain: u64, blocks: u64) -> Vec<BlockInfo> {
    (0..blocks).map(|position| block(chain, position)).collect()
}

fn keys(blocks: &[BlockInfo]) -> Vec<BlockKey> {
    blocks.iter().map(|block| block.key).collect()
}

fn small() -> Limits {
    Limits {
        host_slots: 8,
        batch_blocks_max: 3,
        commands_in_flight_max: 4,
        background_in_flight_max: 2,
        ..Limits::default()
    }
}

fn peers(held: &[(u32, &[BlockInfo])]) -> BTreeMap<PeerId, BTreeSet<BlockKey>> {
    held.iter()
        .map(|(peer, blocks)| (PeerId(*peer), keys(blocks).into_iter().collect()))
        .collect()
}

fn world(limits: Limits) -> World {
    World::new(limits, BTreeMap::new()).expect("limits are valid")
}

fn request(blocks: &[BlockInfo]) -> FetchRequest {
    FetchRequest {
        blocks: blocks.to_vec(),
        ..FetchRequest::default()
    }
}

/// Carries out whatever waits, without faults, but lets no time pass.
fn run(world: &mut World) {
    while world.commands() > 0 {
        world.execute(0, &[]);
    }
}

fn store(world: &mut World, blocks: &[BlockInfo]) {
    world.store(blocks, SECOND).expect("admitted");
    run(world);
}

fn fetch(world: &mut World, request: FetchRequest) -> Vec<BlockSource> {
    let operation = world.fetch(request, SECOND).expect("admitted");
    run(world);
    sources(world, operation)
}

fn sources(world: &World, wanted: OperationId) -> Vec<BlockSource> {
    let found = world.outcomes.iter().find_map(|outcome| match outcome {
        Outcome::Fetched {
            operation, sources, ..
        } if *operation == wanted => Some(sources.clone()),
        _ => None,
    });
    found.expect("the fetch has ended")
}

fn host(world: &World) -> BTreeSet<IndexKey> {
    world
        .manager
        .contents(Tier::Host)
        .map(|info| info.index_key)
        .collect()
}

// One block after the other, with the simplest outcome.

#[test]
fn a_stored_block_is_fetched_from_dram() {
    let mut world = world(small());
    store(&mut world, &chain(0, 4));
    assert_eq!(fetch(&mut world, request(&chain(0, 5))), {
        let mut sources = vec![BlockSource::Host; 4];
        sources.push(BlockSource::Miss);
        sources
    });
    world.finish();
}

/// The second store arrives while the first one's copies are under way.
#[test]
fn a_block_offered_twice_is_copied_once() {
    let mut world = world(small());
    world.store(&chain(0, 3), SECOND).expect("admitted");
    world.store(&chain(0, 3), SECOND).expect("admitted");
    run(&mut world);
    assert_eq!(world.manager.stats().stored, 3);
    assert_eq!(world.manager.stats().already_held, 3);
    world.finish();
}

/// The first store's copy fails: the second one copies the block itself.
#[test]
fn a_waiting_store_copies_the_block_when_the_first_fails() {
    let mut world = world(small());
    world.store(&chain(0, 1), SECOND).expect("admitted");
    world.store(&chain(0, 1), SECOND).expect("admitted");
    world.execute(0, &[Fault::Fails(ErrorKind::Io)]);
    run(&mut world);
    assert_eq!(world.manager.stats().store_failed, 1);
    assert_eq!(world.manager.stats().stored, 1);
    world.finish();
}

/// The fetch arrives before the store's copies have ended.
#[test]
fn a_fetch_waits_for_blocks_that_are_being_stored() {
    let mut world = world(small());
    world.store(&chain(0, 3), SECOND).expect("admitted");
    let operation = world
        .fetch(request(&chain(0, 3)), SECOND)
        .expect("admitted");
    run(&mut world);
    assert_eq!(sources(&world, operation), vec![BlockSource::Host; 3]);
    world.finish();
}

// Where blocks come from.

#[test]
fn a_fetch_mixes_own_tiers_two_peers_and_the_object_store() {
    let all = chain(0, 8);
    let limits = Limits {
        object: true,
        ..small()
    };
    let held = peers(&[(1, &all[..4]), (2, &all[..6])]);
    let mut world = World::new(limits, held).expect("limits are valid");
    store(&mut world, &all[..2]);
    for block in &all {
        world.put_object(block.key);
    }
    let hint = |peer, depth| PeerHint {
        peer: PeerId(peer),
        depth,
    };
    // Peer 1 claims more than it has, so its lease is short and peer 2 is asked for the rest.
    let sources = fetch(
        &mut world,
        FetchRequest {
            blocks: all,
            holders: vec![hint(1, 7), hint(2, 6)],
            shared: std::iter::once(0..7).collect(),
        },
    );
    let peer = |peer| BlockSource::Peer {
        peer: PeerId(peer),
        tier: Tier::Host,
    };
    let expected = [
        BlockSource::Host,
        BlockSource::Host,
        peer(1),
        peer(1),
        peer(2),
        peer(2),
        BlockSource::Object,
        BlockSource::Miss,
    ];
    assert_eq!(sources, expected);
    world.finish();
}

#[test]
fn a_corrupt_copy_is_forgotten_and_the_next_source_is_used() {
    let all = chain(0, 2);
    let limits = Limits {
        disk_segments: 2,
        disk_segment_slots: 8,
        ..small()
    };
    let held = peers(&[(1, &all)]);
    let mut world = World::new(limits, held).expect("limits are valid");
    store(&mut world, &all);
    let holders = vec![PeerHint {
        peer: PeerId(1),
        depth: 2,
    }];
    let wanted = FetchRequest {
        blocks: all,
        holders,
        shared: Vec::new(),
    };
    let operation = world.fetch(wanted, SECOND).expect("admitted");
    world.execute(0, &[Fault::None, Fault::Rot]);
    run(&mut world);
    let peer = BlockSource::Peer {
        peer: PeerId(1),
        tier: Tier::Host,
    };
    assert_eq!(sources(&world, operation), [BlockSource::Host, peer]);
    assert_eq!(world.manager.stats().host_blocks, 1);
    world.finish();
}

/// The peer answers so late that its lease has no margin left; then it takes so long to read that it runs out.
#[test]
fn bytes_read_after_the_lease_ran_out_are_not_used() {
    let all = chain(0, 1);
    let ask = |world: &mut World| {
        let holders = vec![PeerHint {
            peer: PeerId(1),
            depth: 1,
        }];
        let wanted = FetchRequest {
            blocks: all.clone(),
            holders,
            shared: Vec::new(),
        };
        world.fetch(wanted, 60 * SECOND).expect("admitted")
    };
    let limits = Limits {
        lease_wait: 60 * SECOND,
        ..small()
    };
    let mut world = World::new(limits.clone(), peers(&[(1, &all)])).expect("limits are valid");
    let operation = ask(&mut world);
    world.advance(limits.lease_ttl);
    run(&mut world);
    assert_eq!(sources(&world, operation), [BlockSource::Miss]);

    let operation = ask(&mut world);
    world.execute(0, &[]);
    world.advance(limits.lease_ttl - limits.lease_margin + MS);
    run(&mut world);
    assert_eq!(sources(&world, operation), [BlockSource::Miss]);
    world.finish();
}

#[test]
fn a_peer_that_does_not_answer_is_given_up_and_its_late_lease_released() {
    let all = chain(0, 1);
    let held = peers(&[(1, &all), (2, &all)]);
    let mut world = World::new(small(), held).expect("limits are valid");
    let holders = [1, 2]
        .map(|peer| PeerHint {
            peer: PeerId(peer),
            depth: 1,
        })
        .to_vec();
    let wanted = FetchRequest {
        blocks: all,
        holders,
        shared: Vec::new(),
    };
    let operation = world.fetch(wanted, 60 * SECOND).expect("admitted");
    world.advance(small().lease_wait);
    // The second peer's answer overtakes the first's.
    world.execute(1, &[]);
    while world.commands() > 1 {
        world.execute(1, &[]);
    }
    let peer = BlockSource::Peer {
        peer: PeerId(2),
        tier: Tier::Host,
    };
    assert_eq!(sources(&world, operation), [peer]);
    run(&mut world);
    let releases = world
        .log
        .iter()
        .filter(|line| line.starts_with("Release"))
        .count();
    assert_eq!(releases, 2);
    assert_eq!(world.manager.stats().stray_answers, 0);
    world.finish();
}

// Time, and memory that transfers are at work on.

/// The engine reuses its slots when the store has ended, while a copy is still reading them.
#[test]
fn bytes_copied_after_a_store_has_ended_are_never_sealed() {
    let mut world = world(small());
    let operation = world.store(&chain(0, 2), SECOND).expect("admitted");
    world.cancel(operation);
    run(&mut world);
    assert_eq!(host(&world), BTreeSet::new());
    assert_eq!(world.manager.stats().store_failed, 2);
    world.finish();
}

#[test]
fn a_fetch_that_ends_early_names_the_slots_in_use_and_later_frees_them() {
    let mut world = world(small());
    store(&mut world, &chain(0, 2));
    let wanted = world
        .fetch(request(&chain(0, 2)), SECOND)
        .expect("admitted");
    world.advance(SECOND);
    let unsettled = world.outcomes.iter().find_map(|outcome| match outcome {
        Outcome::Fetched {
            operation,
            unsettled,
            ..
        } if *operation == wanted => Some(unsettled),
        _ => None,
    });
    assert_eq!(unsettled, Some(&vec![0, 1]));
    assert!(
        !world
            .outcomes
            .contains(&Outcome::Drained { operation: wanted })
    );
    run(&mut world);
    assert!(
        world
            .outcomes
            .contains(&Outcome::Drained { operation: wanted })
    );
    world.finish();
}

#[test]
fn a_slot_with_an_unsettled_write_is_not_reused_before_it_drains() {
    let mut world = world(Limits {
        host_slots: 1,
        ..small()
    });
    world.store(&chain(0, 1), SECOND).expect("admitted");
    world.execute(0, &[Fault::Unsettled(ErrorKind::Timeout)]);
    assert_eq!(world.manager.stats().host_quarantined, 1);
    store(&mut world, &chain(4, 1));
    assert_eq!(world.manager.stats().refused, 1);
    world.drain(0);
    store(&mut world, &chain(4, 1));
    assert_eq!(world.manager.stats().stored, 1);
    world.finish();
}

// Room.

#[test]
fn without_a_lower_tier_the_coldest_tails_are_dropped() {
    let mut world = world(small());
    store(&mut world, &chain(0, 5));
    store(&mut world, &chain(4, 5));
    let expected = chain(0, 3).into_iter().chain(chain(4, 5));
    assert_eq!(host(&world), expected.map(|info| info.index_key).collect());
    world.finish();
}

#[test]
fn a_store_larger_than_dram_keeps_its_first_blocks() {
    let mut world = world(small());
    store(&mut world, &chain(0, 12));
    assert_eq!(
        host(&world),
        chain(0, 8).iter().map(|info| info.index_key).collect()
    );
    assert_eq!(world.manager.stats().refused, 4);
    world.finish();
}

#[test]
fn a_store_larger_than_dram_goes_through_to_disk_whole() {
    let mut world = world(Limits {
        disk_segments: 4,
        disk_segment_slots: 16,
        ..small()
    });
    store(&mut world, &chain(0, 40));
    assert_eq!(world.manager.stats().stored, 40);
    assert_eq!(world.manager.lookup(&keys(&chain(0, 40))).depth, 40);
    let sources = fetch(&mut world, request(&chain(0, 40)));
    assert!(!sources.contains(&BlockSource::Miss));
    assert!(sources.contains(&BlockSource::Disk));
    world.finish();
}

#[test]
fn a_dropped_segment_is_saved_to_the_object_store_first() {
    let limits = Limits {
        disk_segments: 2,
        disk_segment_slots: 4,
        object: true,
        ..small()
    };
    let mut world = world(limits);
    for conversation in 0..10 {
        store(&mut world, &chain(conversation * 4, 4));
    }
    let stats = world.manager.stats();
    assert!(stats.segments_dropped > 0 && stats.rescued > 0, "{stats:?}");
    assert_eq!(stats.disk_lost + stats.evicted_lost, 0, "{stats:?}");
    let left = stats.demoted_disk - stats.disk_blocks;
    assert!(left >= stats.rescued, "{stats:?}");
    assert_eq!(stats.disk_evicted, left, "{stats:?}");
    for conversation in 0..10 {
        let sources = fetch(&mut world, request(&chain(conversation * 4, 4)));
        assert!(
            !sources.contains(&BlockSource::Miss),
            "{conversation}: {sources:?}"
        );
    }
    world.finish();
}

#[test]
fn a_full_disk_stops_offload_and_serving_goes_on() {
    let mut world = world(Limits {
        disk_segments: 2,
        disk_segment_slots: 64,
        ..small()
    });
    store(&mut world, &chain(0, 8));
    // The next block needs a slot, so the coldest one is written to disk.
    world.store(&chain(4, 1), SECOND).expect("admitted");
    assert!(
        world
            .log
            .last()
            .is_some_and(|line| line.contains("to: Disk"))
    );
    world.execute(0, &[Fault::Fails(ErrorKind::NoSpace); 3]);
    run(&mut world);
    store(&mut world, &chain(4, 4));
    let stats = world.manager.stats();
    assert_eq!((stats.disk_stopped, stats.disk_blocks), (1, 0));
    assert_eq!(
        fetch(&mut world, request(&chain(4, 4))),
        vec![BlockSource::Host; 4]
    );
    world.advance(small().retry_after);
    run(&mut world);
    assert_eq!(world.manager.stats().disk_stopped, 0);
    store(&mut world, &chain(8, 8));
    assert!(world.manager.stats().disk_blocks > 0);
    world.finish();
}

#[test]
fn blocks_recovered_from_disk_are_announced_and_served() {
    let limits = Limits {
        disk_segments: 2,
        disk_segment_slots: 4,
        ..small()
    };
    let mut manager = Manager::new(limits).expect("limits are valid");
    let found = |info: BlockInfo, segment, position| RecoveredBlock {
        info,
        slot: crate::place::DiskSlot {
            segment: crate::place::SegmentId(segment),
            position,
        },
        checksum: Checksum::crc32c(genuine(&info.key)),
    };
    let taken = manager.handle_recovered(
        Time(0),
        vec![
            found(block(0, 0), 0, 0),
            found(block(0, 1), 0, 3),
            found(block(0, 1), 1, 0),
            found(block(0, 2), 0, 3),
            found(block(0, 3), 2, 0),
            found(block(0, 4), 1, 4),
        ],
    );
    assert_eq!(taken, 2);
    manager.check_invariants();
    let announced: Vec<NodeEvent> = std::iter::from_fn(|| manager.poll_event()).collect();
    assert_eq!(announced.len(), 2);
    assert_eq!(
        manager.lookup(&keys(&chain(0, 3))),
        Held {
            depth: 2,
            disk: 2,
            expected: 2,
            ..Held::default()
        }
    );
}

/// Six blocks are being copied; then others wait for slots behind them. A copy that failed brings nothing.
#[test]
fn what_stores_are_bringing_is_expected() {
    let limits = Limits {
        disk_segments: 3,
        disk_segment_slots: 8,
        ..small()
    };
    let mut world = world(limits);
    let (first, second) = (chain(0, 6), chain(4, 7));
    let depths = |world: &World, blocks: &[BlockInfo]| {
        let held = world.manager.lookup(&keys(blocks));
        (held.depth, held.expected)
    };
    world.store(&first, SECOND).expect("admitted");
    assert_eq!(depths(&world, &chain(0, 7)), (0, 6));
    world.store(&second, SECOND).expect("admitted");
    assert_eq!(depths(&world, &second), (0, 7), "some wait for slots");
    assert_eq!(depths(&world, &second[..2]), (0, 2));
    run(&mut world);
    assert_eq!(depths(&world, &second), (7, 7));
    world.finish();

    let mut world = self::world(small());
    world.store(&first[..2], SECOND).expect("admitted");
    world.execute(0, &[Fault::None, Fault::Fails(ErrorKind::Io)]);
    assert_eq!(depths(&world, &first[..2]), (1, 1));
    world.finish();
}

/// A block is found corrupt while it is being written to disk, and stored anew with other bytes before that ends.
#[test]
fn a_record_of_bytes_that_were_replaced_meanwhile_is_not_used() {
    let limits = Limits {
        host_slots: 4,
        disk_segments: 2,
        ..Limits::default()
    };
    let policy = WriteBehind {
        vacant_per_mille: 500,
    };
    let mut manager = Manager::with_policies(limits, Box::new(LeafLru::new()), Box::new(policy))
        .expect("limits are valid");
    let (old, new) = (Checksum::crc32c(1), Checksum::crc32c(2));
    let later = Time(0) + SECOND;
    let copy = |manager: &mut Manager| match manager.poll_command(Time(0)) {
        Some(Command::Copy { id, moves, .. }) => (id, moves),
        other => panic!("a copy was expected, not {other:?}"),
    };
    for conversation in [0, 4, 8] {
        let stored = manager.handle_store(Time(0), chain(conversation, 1), later);
        stored.expect("admitted");
        let (id, _) = copy(&mut manager);
        manager.handle_copied(Time(0), id, vec![Ok(old)]);
    }
    let (demotion, moves) = copy(&mut manager);
    assert!(matches!(moves[0].to, Place::Disk(_)) && moves[0].info == block(0, 0));
    manager
        .handle_fetch(Time(0), request(&chain(0, 1)), later)
        .expect("admitted");
    let (id, _) = copy(&mut manager);
    manager.handle_copied(
        Time(0),
        id,
        vec![Err(MoveFailure::settled(ErrorKind::Corrupt))],
    );
    manager
        .handle_store(Time(0), chain(0, 1), later)
        .expect("admitted");
    let (id, _) = copy(&mut manager);
    manager.handle_copied(Time(0), id, vec![Ok(new)]);
    manager.handle_copied(Time(0), demotion, vec![Ok(old); moves.len()]);
    manager.check_invariants();
    let disk: Vec<BlockKey> = manager.contents(Tier::Disk).map(|info| info.key).collect();
    assert!(
        !disk.contains(&block(0, 0).key),
        "the old bytes are on disk under the new checksum"
    );
    assert_eq!(manager.lookup(&keys(&chain(0, 1))).host, 1);
}

// Serving peers.

#[test]
fn a_lease_brings_blocks_up_from_disk_and_pins_them_until_its_end() {
    let limits = Limits {
        disk_segments: 4,
        disk_segment_slots: 16,
        ..small()
    };
    let mut world = world(limits.clone());
    store(&mut world, &chain(0, 20));
    let wanted = keys(&chain(0, 6));
    let on_disk = world.manager.lookup(&wanted).disk;
    assert!(on_disk > 0);
    world.lease(PeerId(1), &wanted, SECOND).expect("admitted");
    run(&mut world);
    let granted = world.outcomes.iter().find_map(|outcome| match outcome {
        Outcome::LeaseReady { blocks, .. } => Some(blocks.clone()),
        _ => None,
    });
    let granted = granted.expect("the lease is ready");
    assert_eq!(
        granted.iter().map(|block| block.key).collect::<Vec<_>>(),
        wanted
    );
    let from_disk = granted
        .iter()
        .filter(|block| block.tier == Tier::Disk)
        .count();
    assert_eq!(from_disk, on_disk as usize);
    // The world notices if a leased slot is written.
    store(&mut world, &chain(4, 20));
    assert_eq!(world.manager.lookup(&wanted).host, 6);
    world.advance(SECOND);
    assert_eq!(world.manager.stats().leases_expired, 1);
    world.finish();
}

#[test]
fn a_lease_covers_the_blocks_before_the_first_missing_one() {
    let mut world = world(small());
    store(&mut world, &[block(0, 0), block(0, 1), block(0, 3)]);
    world
        .lease(PeerId(1), &keys(&chain(0, 4)), SECOND)
        .expect("admitted");
    world
        .lease(PeerId(1), &keys(&chain(8, 4)), SECOND)
        .expect("admitted");
    let granted: Vec<usize> = world
        .outcomes
        .iter()
        .filter_map(|outcome| match outcome {
            Outcome::LeaseReady { blocks, .. } => Some(blocks.len()),
            _ => None,
        })
        .collect();
    assert_eq!(granted, [2, 0]);
    assert_eq!(world.manager.stats().leases, 1);
    world.finish();
}

#[test]
fn refusals_name_the_limit() {
    let mut world = world(Limits {
        operations_max: 1,
        leases_max: 1,
        ..small()
    });
    world.store(&chain(0, 1), SECOND).expect("admitted");
    let busy = world
        .fetch(request(&chain(0, 1)), SECOND)
        .expect_err("one too many");
    assert_eq!(busy.kind(), ErrorKind::Busy);
    run(&mut world);
    world
        .lease(PeerId(1), &keys(&chain(0, 1)), SECOND)
        .expect("admitted");
    let busy = world
        .lease(PeerId(1), &keys(&chain(0, 1)), SECOND)
        .expect_err("one too many");
    assert_eq!(busy.kind(), ErrorKind::Busy);
    let own_parent = BlockInfo {
        parent: Some(block(0, 0).key),
        ..block(0, 0)
    };
    let invalid = world
        .store(&[own_parent], SECOND)
        .expect_err("its own parent");
    assert_eq!(invalid.kind(), ErrorKind::Invalid);
    let limits = Limits {
        disk_segments: 1,
        ..small()
    };
    let invalid = Manager::new(limits).expect_err("one segment");
    assert!(
        invalid.to_string().contains("disk_segments is 1"),
        "{invalid}"
    );
    world.finish();
}

/// Both segments are full and being read, so that neither takes a block nor can be dropped: a store does not wait for its
/// deadline, it costs the coldest block.
#[test]
fn a_store_does_not_wait_for_a_disk_that_can_take_nothing() {
    let mut world = world(Limits {
        host_slots: 4,
        disk_segments: 2,
        disk_segment_slots: 2,
        ..small()
    });
    store(&mut world, &chain(0, 4));
    store(&mut world, &chain(4, 3));
    assert_eq!(world.manager.stats().disk_blocks, 3);
    world
        .fetch(request(&chain(0, 4)), SECOND)
        .expect("admitted");
    let reads = world.commands();
    for (c, lost) in [(8, 0), (12, 1)] {
        world.store(&chain(c, 1), SECOND).expect("admitted");
        while world.commands() > reads {
            world.execute(reads, &[]);
        }
        let stats = world.manager.stats();
        assert_eq!((stats.disk_blocks, stats.evicted_lost), (4, lost));
        assert!(host(&world).contains(&block(c, 0).index_key));
    }
    world.finish();
}

/// The object store is behind the full disk: it takes what the disk cannot.
#[test]
fn the_object_store_takes_what_a_full_disk_cannot() {
    let mut world = world(Limits {
        host_slots: 4,
        disk_segments: 2,
        disk_segment_slots: 2,
        object: true,
        ..small()
    });
    store(&mut world, &chain(0, 4));
    store(&mut world, &chain(4, 3));
    world
        .fetch(request(&chain(0, 4)), SECOND)
        .expect("admitted");
    let reads = world.commands();
    for c in [8, 12] {
        world.store(&chain(c, 1), SECOND).expect("admitted");
        while world.commands() > reads {
            world.execute(reads, &[]);
        }
    }
    let stats = world.manager.stats();
    assert_eq!((stats.demoted_object, stats.evicted_lost), (1, 0));
    world.finish();
}

// Everything at once.

#[derive(Clone, Debug)]
enum Action {
    Store {
        chain: u64,
        blocks: u64,
        within: u16,
    },
    Fetch {
        chain: u64,
        blocks: u64,
        depths: [u32; 3],
        shared: (u32, u32),
        within: u16,
    },
    Lease {
        peer: u32,
        chain: u64,
        blocks: u64,
        ttl: u16,
    },
    Release(usize),
    Cancel(usize),
    PutObject {
        chain: u64,
        position: u64,
    },
    LosePeer(u32),
    Keep(Keep),
    Retire(u16),
    Restart,
    Execute {
        pick: usize,
        faults: Vec<Fault>,
    },
    Drain(usize),
    Advance(u16),
}

const CHAINS: u64 = 8;
const DEPTH_MAX: u64 = 7;

fn faults() -> impl Strategy<Value = Vec<Fault>> {
    let kinds = prop_oneof![
        Just(ErrorKind::Timeout),
        Just(ErrorKind::Io),
        Just(ErrorKind::NoSpace),
        Just(ErrorKind::PeerLost),
        Just(ErrorKind::Corrupt),
        Just(ErrorKind::NotFound),
    ];
    let fault = prop_oneof![
        30 => Just(Fault::None),
        1 => Just(Fault::Rot),
        2 => kinds.clone().prop_map(Fault::Fails),
        2 => kinds.prop_map(Fault::Unsettled),
    ];
    prop::collection::vec(fault, 0..4)
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let action = prop_oneof![
        8 => (0..CHAINS, 0..=DEPTH_MAX, 1..2000u16)
            .prop_map(|(chain, blocks, within)| Action::Store { chain, blocks, within }),
        8 => (0..CHAINS, 0..=DEPTH_MAX, prop::array::uniform3(0..8u32), (0..8u32, 0..8u32), 1..2000u16)
            .prop_map(|(chain, blocks, depths, shared, within)| {
                Action::Fetch { chain, blocks, depths, shared, within }
            }),
        4 => (0..3u32, 0..CHAINS, 0..=DEPTH_MAX, 1..2000u16)
            .prop_map(|(peer, chain, blocks, ttl)| Action::Lease { peer, chain, blocks, ttl }),
        2 => any::<prop::sample::Index>().prop_map(|i| Action::Release(i.index(64))),
        1 => any::<prop::sample::Index>().prop_map(|i| Action::Cancel(i.index(64))),
        1 => (0..CHAINS, 0..DEPTH_MAX)
            .prop_map(|(chain, position)| Action::PutObject { chain, position }),
        1 => (0..60u32).prop_map(Action::LosePeer),
        7 => keeps().prop_map(Action::Keep),
        1 => (0..2000u16).prop_map(Action::Retire),
        1 => Just(Action::Restart),
        30 => (any::<prop::sample::Index>(), faults())
            .prop_map(|(i, faults)| Action::Execute { pick: i.index(64), faults }),
        3 => any::<prop::sample::Index>().prop_map(|i| Action::Drain(i.index(64))),
        4 => (0..400u16).prop_map(Action::Advance),
    ];
    prop::collection::vec(action, 1..300)
}

fn limits() -> impl Strategy<Value = Limits> {
    let disk = prop_oneof![Just((0, 1)), (2..4u32, 1..6u32)];
    (1..12u32, disk, any::<bool>(), 1..5u32, 1..3u32, 1..20u32).prop_map(
        |(host_slots, disk, object, batch_blocks_max, background, operations_max)| Limits {
            host_slots,
            disk_segments: disk.0,
            disk_segment_slots: disk.1,
            object,
            batch_blocks_max,
            background_in_flight_max: background,
            commands_in_flight_max: background + 2,
            operations_max,
            leases_max: 4,
            lease_blocks_max: 5,
            pins_max: 3,
            lease_ttl: SECOND,
            rescue_blocks_max: 3,
            ..Limits::default()
        },
    )
}

/// Index is how a history picks from what there is.
fn nth<T: Copy>(all: &[T], pick: usize) -> Option<T> {
    all.get(pick % all.len().max(1)).copied()
}

fn play(limits: &Limits, actions: &[Action]) -> World {
    let held: Vec<Vec<BlockInfo>> = (0..3).map(|peer| chain(peer * 3, 4 + peer)).collect();
    let held = peers(&[(0, &held[0]), (1, &held[1]), (2, &held[2])]);
    let mut world = World::new(limits.clone(), held).expect("limits are valid");
    for action in actions {
        match action.clone() {
            // Refusals are part of the history.
            Action::Store {
                chain: c,
                blocks,
                within,
            } => {
                let _ = world.store(&chain(c, blocks), MS * u32::from(within));
            }
            Action::Fetch {
                chain: c,
                blocks,
                depths,
                shared: (start, length),
                within,
            } => {
                let holders = (0..3).map(PeerId).zip(depths);
                let holders = holders
                    .map(|(peer, depth)| PeerHint { peer, depth })
                    .collect();
                let request = FetchRequest {
                    blocks: chain(c, blocks),
                    holders,
                    shared: std::iter::once(start..start + length)
                        .filter(|r| !r.is_empty())
                        .collect(),
                };
                let _ = world.fetch(request, MS * u32::from(within));
            }
            Action::Lease {
                peer,
                chain: c,
                blocks,
                ttl,
            } => {
                let wanted = keys(&chain(c, blocks));
                let _ = world.lease(PeerId(peer), &wanted, MS * u32::from(ttl));
            }
            Action::Release(pick) => {
                if let Some(lease) = nth(&world.open_leases(), pick) {
                    world.release(lease);
                }
            }
            Action::Cancel(pick) => {
                if let Some(operation) = nth(&world.open_operations(), pick) {
                    world.cancel(operation);
                }
            }
            Action::PutObject { chain, position } => world.put_object(block(chain, position).key),
            Action::LosePeer(peer) => world.lose_peer(PeerId(peer)),
            Action::Keep(keep) => keep.play(&mut world),
            Action::Retire(within) => world.retire(MS * u32::from(within)),
            Action::Restart => world.restart(),
            Action::Execute { pick, faults } => world.execute(pick, &faults),
            Action::Drain(pick) => world.drain(pick),
            Action::Advance(ms) => world.advance(MS * u32::from(ms)),
        }
    }
    world.finish();
    world
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Random requests from engines and peers, completions in random order, failures, rot, unsettled transfers, lost
    /// peers and time; the world checks every step, and that nothing is left at the end.
    #[test]
    fn no_history_breaks_a_promise(limits in limits(), actions in actions()) {
        play(&limits, &actions);
    }

    /// Two managers with the same history say the same, to the letter.
    #[test]
    fn equal_histories_give_equal_words(limits in limits(), actions in actions()) {
        prop_assert_eq!(play(&limits, &actions).log, play(&limits, &actions).log);
    }
}

/// A fixed sample of the same histories, so that the checks above are known to see every kind of event.
#[test]
fn random_histories_reach_every_counter() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    let mut runner = TestRunner::deterministic();
    let mut sums: BTreeMap<&'static str, u64> = BTreeMap::new();
    for _ in 0..300 {
        let history = (limits(), actions()).new_tree(&mut runner);
        let (limits, actions) = history.expect("every history is allowed").current();
        for (name, value) in play(&limits, &actions).manager.stats().entries() {
            *sums.entry(name).or_default() += value;
        }
    }
    // Levels that end at zero, what only recovery counts, and answers that this world never gives.
    let quiet = [
        "host_quarantined",
        "operations",
        "leases",
        "pins",
        "pinned_blocks",
        "commands_in_flight",
        "recovered",
        "stray_answers",
    ];
    let unseen = sums
        .iter()
        .filter(|(name, sum)| **sum == 0 && !quiet.contains(name));
    assert_eq!(unseen.collect::<Vec<_>>(), []);
}
