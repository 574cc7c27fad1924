//! Random histories of a publisher, its sockets and those who follow it.

use super::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Losses, repeats, failed replays, reconnects, restarts, and replicas that take over from a snapshot: at every moment one incarnation's batches in a row
    /// are applied, and after a last reconnect all that the publisher can still tell.
    #[test]
    fn whatever_the_wire_does_the_applied_batches_are_one_publishers(
        steps in steps(),
        buffered_max in prop_oneof![Just(u64::MAX), 1..30_u64],
        pending_batches_max in prop_oneof![Just(1000_usize), 1..4_usize],
        tells_epoch in any::<bool>(),
    ) {
        let config = IngestConfig { pending_batches_max, ..IngestConfig::default() };
        let mut world = World { buffered_max, tells_epoch, ..World::new(config) };
        run(&mut world, &all_seen(steps));
        world.assert_exact();
    }

    /// The same when publishers are exchanged behind a connection that seems to hold; where the topic tells the epoch,
    /// even that fools nobody for a moment. Where it does not, nothing may be lost after the exchange: a batch whose
    /// number happens to follow on from the old publisher's last would pass for its next, and be verified as such later.
    #[test]
    fn a_restart_that_nobody_saw_is_found_at_the_next_connect(
        steps in steps(),
        tells_epoch in any::<bool>(),
    ) {
        let mut world =
            World { tells_epoch, is_strict: tells_epoch, ..World::new(IngestConfig::default()) };
        let steps = if tells_epoch { steps } else { nothing_lost_after_an_exchange(steps) };
        run(&mut world, &steps);
        world.assert_exact();
    }

    /// Without a replay socket nothing missed can be made up for, but nothing wrong is kept.
    #[test]
    fn without_replay_every_doubt_clears_the_source(steps in steps()) {
        let config = IngestConfig { has_replay: false, ..IngestConfig::default() };
        let mut world = World::new(config);
        run(&mut world, &all_seen(steps));
        prop_assert!(world.request.is_none());
        prop_assert!(world.applied.is_empty(), "the last connect proves nothing");
        world.publish(3);
        world.settle();
        prop_assert_eq!(world.applied.len(), 3);
    }
}
