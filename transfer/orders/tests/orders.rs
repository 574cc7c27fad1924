//! Every order, by loom's search; the scenarios say what may be seen.
#![cfg(test)]

use kvfabric_transfer_orders::{copies, region, request::scenarios};

/// Two transfers and an owner that wants its memory back.
#[test]
fn nobody_is_inside_a_region_when_the_wait_is_over() {
    region::nobody_is_inside_when_the_wait_is_over();
}

/// A fabric that has something to end first.
#[test]
fn who_holds_a_region_is_waited_for() {
    region::who_holds_it_is_waited_for();
}

/// A backend that settles, and a caller who gives up.
#[test]
fn a_request_is_done_or_cancelled_and_not_both() {
    scenarios::a_request_is_done_or_cancelled_and_not_both();
}

/// Two parts on two threads.
#[test]
fn the_notification_goes_once_after_all_parts() {
    scenarios::the_notification_goes_once_after_all_parts();
}

/// One part denied, one done.
#[test]
fn a_part_that_fails_ends_the_request_when_the_others_have_settled() {
    scenarios::a_part_that_fails_ends_the_request_when_the_others_have_settled();
}

/// A loss, the thread that posts later, and a caller who gives up.
#[test]
fn a_lost_way_is_followed_by_the_next_or_the_cancel() {
    scenarios::a_lost_way_is_followed_by_the_next_or_the_cancel();
}

/// A loss, and the thread that posts later.
#[test]
fn a_lost_way_is_followed_by_the_next() {
    scenarios::a_lost_way_is_followed_by_the_next();
}

/// Bytes that arrive while their path is left.
#[test]
fn a_path_that_is_left_may_still_be_in_time() {
    scenarios::a_path_that_is_left_may_still_be_in_time();
}

/// A late word to a post that is over.
#[test]
fn a_request_is_posted_again_when_it_is_over() {
    scenarios::a_request_is_posted_again_when_it_is_over();
}

/// Bytes of two parts, then their checksums, on two threads each.
#[test]
fn parts_are_done_when_their_checksums_were_compared() {
    scenarios::parts_are_done_when_their_checksums_were_compared();
}

/// Checksums that differ, and a caller who gives up.
#[test]
fn what_differs_fails_or_was_cancelled() {
    scenarios::what_differs_fails_or_was_cancelled();
}

/// The copying thread, one who waits, and the end of the agent.
#[test]
fn a_copy_that_is_lent_and_left_is_made_once() {
    copies::a_task_that_is_lent_and_left_is_done_once();
}

/// The copying thread falls asleep while someone puts a copy back.
#[test]
fn who_leaves_a_copy_tells_the_thread() {
    copies::who_leaves_a_task_tells_the_thread();
}

/// A post that waits for a connection, and a caller who gives up.
#[test]
fn a_post_without_a_connection_is_done_or_given_up() {
    scenarios::a_post_without_a_connection_is_done_or_given_up();
}

/// A post that waits for a connection which does not come, and an agent that is closed.
#[test]
fn a_post_to_nobody_fails() {
    scenarios::a_post_to_nobody_fails();
}
