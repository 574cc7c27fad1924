//! Gaps, restarts, silence and what a replay tells of them.

use super::*;

/// A publisher that got further than its successor; then replays of the successor that were answered before it had sent
/// anything must not make its first batch look lost. Found by the property below.
#[test]
fn a_replay_from_before_a_gap_does_not_hide_what_fell_into_it() {
    use Step::*;
    let steps = [
        Connect,
        FailReplay,
        Publish(2),
        DropLive,
        DeliverLive,
        Restart(0),
        Connect,
        ServeReplay,
        DeliverReply,
        ServeReplay,
        Publish(1),
        Publish(1),
        DropLive,
    ];
    let mut world = World::new(IngestConfig::default());
    run(&mut world, &steps);
    world.assert_exact();
}

/// Cut off, restarted, and the new publisher is past the old one's number when the wire is back.
#[test]
fn a_restart_while_partitioned_is_found_even_when_the_new_sequence_is_past_the_old() {
    let mut world = connected(10);
    world.disconnect();
    world.restart();
    world.publish(25);
    world.connect();
    assert_eq!(
        world.request,
        Some(9),
        "the last applied batch is asked for"
    );
    world.settle();
    world.assert_exact();
    assert_eq!(world.clears, [ClearReason::Restarted]);
}

/// A connection that comes and goes with nothing published: no gap could show anything.
#[test]
fn an_idle_publisher_is_recognised_and_nothing_is_applied_twice() {
    let mut world = connected(10);
    world.disconnect();
    world.connect();
    world.settle();
    world.assert_exact();
    assert_eq!((world.clears.len(), world.ingest.stats().applied), (0, 10));
}

/// More was missed than the publisher keeps.
#[test]
fn a_replay_that_begins_too_late_clears_the_source_first() {
    let mut world = connected(10);
    world.disconnect();
    world.buffered_max = 5;
    world.publish(20);
    world.connect();
    world.settle();
    world.assert_exact();
    assert_eq!(world.clears, [ClearReason::HistoryLost]);
    assert_eq!(world.applied.first(), Some(&(1, 25)));
}

/// One live batch is lost; those behind it wait for the replay.
#[test]
fn a_gap_is_replayed_and_nothing_is_cleared() {
    let mut world = connected(3);
    world.publish(1);
    world.live.clear();
    world.publish(2);
    world.deliver_live();
    assert!(!world.ingest.is_current(), "a gap is open");
    assert_eq!(world.ingest.position().next, Sequence(3));
    world.settle();
    world.assert_exact();
    assert_eq!((world.clears.len(), world.ingest.stats().gaps), (0, 1));
}

/// The publisher of before does not answer: what it said cannot be vouched for, and later it is asked again.
#[test]
fn a_replay_that_never_comes_clears_the_source_and_is_tried_again() {
    let mut world = connected(5);
    world.disconnect();
    world.publish(2);
    world.connect();
    world.publish(1);
    world.deliver_live();
    world.pass_time(Duration::from_secs(5));
    assert_eq!(world.clears, [ClearReason::ReplayFailed]);
    assert_eq!(
        world.applied,
        [(1, 7)],
        "what comes live is followed meanwhile"
    );
    assert!(world.request.is_none());
    world.pass_time(Duration::from_secs(30));
    world.settle();
    world.assert_exact();
}

/// Three batches come during a replay and there is room for one; then the publisher falls silent.
#[test]
fn batches_for_which_there_was_no_room_are_asked_for_again() {
    let config = IngestConfig {
        pending_batches_max: 1,
        ..IngestConfig::default()
    };
    let mut world = World::new(config);
    world.publish(2);
    world.connect();
    world.serve_replay();
    world.publish(3);
    for _ in 0..3 {
        world.deliver_live();
    }
    assert_eq!(world.ingest.stats().dropped, 2);
    world.settle();
    world.assert_exact();
    assert_eq!((world.clears.len(), world.applied.len()), (0, 5));
}

/// A node's topic names another epoch in the middle of the stream.
#[test]
fn a_new_epoch_in_the_topic_clears_the_source_at_once() {
    let mut world = World {
        tells_epoch: true,
        ..World::new(IngestConfig::default())
    };
    world.publish(4);
    world.connect();
    world.settle();
    world.restart();
    world.publish(1);
    world.deliver_live();
    assert_eq!(world.clears, [ClearReason::NewEpoch]);
    assert_eq!(world.applied, [(2, 0)]);
    assert_eq!(
        world.ingest.position(),
        Position {
            epoch: Epoch(2),
            next: Sequence(1)
        }
    );
}

/// A live batch that was replayed already, and one with the same number from somebody else.
#[test]
fn a_late_batch_is_told_from_a_foreign_one_by_its_bytes() {
    let mut world = connected(4);
    world.hand_in(1, 2);
    assert_eq!(
        (world.clears.len(), world.ingest.stats().duplicates),
        (0, 1)
    );
    world.restart();
    world.publish(1);
    world.deliver_live();
    assert_eq!(world.clears, [ClearReason::Restarted]);
    assert_eq!(world.applied, [(2, 0)]);
}

/// A publisher whose replay socket answers, but with nothing.
#[test]
fn a_publisher_that_replays_nothing_is_followed_live() {
    let mut world = World {
        buffered_max: 0,
        ..World::new(IngestConfig::default())
    };
    world.publish(6);
    world.connect();
    world.settle();
    world.publish(3);
    world.settle();
    assert_eq!(world.applied, [(1, 6), (1, 7), (1, 8)]);
    assert!(world.ingest.is_current());
}

/// The number that ends replays cannot be a batch's.
#[test]
fn the_number_of_the_end_marker_is_refused_in_live_batches() {
    let mut world = connected(1);
    world.hand_in(1, u64::MAX);
    assert_eq!((world.applied.len(), world.ingest.stats().dropped), (1, 1));
}
