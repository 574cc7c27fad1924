//! Sources that go on from where another follower was.

use super::*;

/// A replica takes over while the publisher goes on, which keeps no more than what the replica misses and one batch.
#[test]
fn a_replica_goes_on_from_the_snapshot_with_what_the_publisher_still_keeps() {
    let mut world = connected(10);
    world.take_snapshot();
    world.disconnect();
    world.buffered_max = 6;
    world.publish(5);
    world.fail_over();
    world.connect();
    assert_eq!(
        world.request,
        Some(9),
        "the snapshot's last batch is asked for"
    );
    world.settle();
    assert_eq!(world.clears, [], "nothing had to be forgotten");
    assert_eq!(
        world.applied.len(),
        15,
        "ten from the snapshot, five replayed"
    );
}

/// The publisher keeps one batch too few: what is between the snapshot and its oldest batch is unknown.
#[test]
fn a_snapshot_from_before_what_the_publisher_keeps_is_cleared() {
    let mut world = connected(10);
    world.take_snapshot();
    world.disconnect();
    world.buffered_max = 5;
    world.publish(5);
    world.fail_over();
    world.connect();
    world.settle();
    world.assert_exact();
    assert_eq!(world.clears, [ClearReason::HistoryLost]);
}

/// The publisher was exchanged while nobody followed it, and the new one is past the snapshot's position.
#[test]
fn a_snapshot_of_another_publisher_is_cleared() {
    for tells_epoch in [false, true] {
        let mut world = connected(10);
        world.tells_epoch = tells_epoch;
        world.take_snapshot();
        world.disconnect();
        world.restart();
        world.publish(20);
        world.fail_over();
        world.connect();
        world.settle();
        world.assert_exact();
        let reason = if tells_epoch {
            ClearReason::NewEpoch
        } else {
            ClearReason::Restarted
        };
        assert_eq!(world.clears, [reason]);
    }
}

/// Frames and replies of a connection that is gone arrive after all.
#[test]
fn late_events_of_a_lost_connection_change_nothing_before_the_publisher_is_verified() {
    let mut world = connected(3);
    world.disconnect();
    world.restart();
    let before = world.applied.clone();
    world
        .ingest
        .handle_replayed(world.now, None, Sequence(3), batch(1, 3));
    world.ingest.handle_replay_end(world.now);
    world.act();
    assert_eq!(world.applied, before);
    // A live frame is a sign of life: the publisher is asked who it is before the frame counts.
    world.is_connected = true;
    world.hand_in(1, 3);
    assert_eq!(world.applied, before);
    assert_eq!(world.request, Some(2));
    world.settle();
    assert_eq!(world.clears.first(), Some(&ClearReason::Restarted));
    assert!(!world.applied.contains(&(1, 2)), "the old entries are gone");
}
