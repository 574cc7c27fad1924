//! The state machine against a publisher whose true log is known, over a wire that loses and repeats.

use std::time::Duration;

use proptest::prelude::*;

use super::*;

/// Which batch this is, of which incarnation: the payload says it, so that nothing can be mixed up unseen.
fn batch(incarnation: u64, sequence: u64) -> Bytes {
    Bytes::from(format!("{incarnation}/{sequence}"))
}

fn parse(payload: &Bytes) -> (u64, u64) {
    let text = std::str::from_utf8(payload).unwrap();
    let (incarnation, sequence) = text.split_once('/').unwrap();
    (incarnation.parse().unwrap(), sequence.parse().unwrap())
}

/// A publisher, the wire and the state machine at its end.
struct World {
    ingest: Ingest,
    now: Time,
    incarnation: u64,
    published: u64,
    buffered_max: u64,
    tells_epoch: bool,
    is_connected: bool,
    live: VecDeque<(u64, u64)>,
    request: Option<u64>,
    /// Answers on their way; none when no request was answered yet.
    replies: Option<VecDeque<(u64, u64)>>,
    /// What is applied since the last clear.
    applied: Vec<(u64, u64)>,
    clears: Vec<ClearReason>,
    /// The images that replaced what was applied.
    images: Vec<Vec<Bytes>>,
    /// What was applied when a snapshot was taken, and where it says to go on.
    snapshot: Option<(Vec<(u64, u64)>, Resume)>,
    /// Whether frames of one connection are of one incarnation, so that mixing them up is the machine's fault.
    is_strict: bool,
}

impl World {
    fn new(config: IngestConfig) -> Self {
        Self {
            ingest: Ingest::new(config),
            now: Time(0),
            incarnation: 1,
            published: 0,
            buffered_max: u64::MAX,
            tells_epoch: false,
            is_connected: false,
            live: VecDeque::new(),
            request: None,
            replies: None,
            applied: Vec::new(),
            clears: Vec::new(),
            images: Vec::new(),
            snapshot: None,
            is_strict: true,
        }
    }

    fn epoch(&self, incarnation: u64) -> Option<Epoch> {
        self.tells_epoch.then_some(Epoch(incarnation))
    }

    fn publish(&mut self, batches: u64) {
        for _ in 0..batches {
            if self.is_connected {
                self.live.push_back((self.incarnation, self.published));
            }
            self.published += 1;
        }
    }

    fn connect(&mut self) {
        if !self.is_connected {
            self.is_connected = true;
            self.ingest.handle_connected(self.now);
            self.act();
        }
    }

    fn disconnect(&mut self) {
        self.is_connected = false;
        self.live.clear();
        (self.request, self.replies) = (None, None);
        self.ingest.handle_disconnected();
        self.act();
    }

    /// Another incarnation takes the publisher's place.
    fn restart(&mut self) {
        self.incarnation += 1;
        self.published = 0;
    }

    /// Keeps what is applied, if that is all the publisher could tell up to there.
    fn take_snapshot(&mut self) {
        let Some(&(incarnation, last)) = self.applied.last() else {
            return;
        };
        if !self.ingest.is_partial() {
            let resume = Resume {
                epoch: self.epoch(incarnation),
                last: Sequence(last),
                digest: BatchDigest::of(&batch(incarnation, last)),
            };
            self.snapshot = Some((self.applied.clone(), resume));
        }
    }

    /// Another follower takes over with what the snapshot has.
    fn fail_over(&mut self) {
        if let Some((applied, resume)) = self.snapshot.clone() {
            self.disconnect();
            self.ingest = Ingest::resume(self.ingest.config.clone(), resume);
            self.applied = applied;
        }
    }

    fn deliver_live(&mut self) {
        if let Some((incarnation, sequence)) = self.live.pop_front() {
            self.hand_in(incarnation, sequence);
        }
    }

    fn hand_in(&mut self, incarnation: u64, sequence: u64) {
        let epoch = self.epoch(incarnation);
        let payload = batch(incarnation, sequence);
        self.ingest
            .handle_frame(self.now, epoch, Sequence(sequence), payload);
        self.act();
    }

    fn serve_replay(&mut self) {
        if let Some(from) = self.request.take() {
            let first = from.max(self.published.saturating_sub(self.buffered_max));
            let incarnation = self.incarnation;
            self.replies = Some(
                (first..self.published)
                    .map(|sequence| (incarnation, sequence))
                    .collect(),
            );
        }
    }

    fn deliver_reply(&mut self) {
        match self.replies.as_mut().map(VecDeque::pop_front) {
            None => return,
            Some(Some((incarnation, sequence))) => {
                let epoch = self.epoch(incarnation);
                let payload = batch(incarnation, sequence);
                self.ingest
                    .handle_replayed(self.now, epoch, Sequence(sequence), payload);
            }
            Some(None) => {
                self.replies = None;
                self.ingest.handle_replay_end(self.now);
            }
        }
        self.act();
    }

    fn fail_replay(&mut self) {
        if self.request.take().is_some() || self.replies.take().is_some() {
            self.ingest.handle_replay_failed(self.now);
            self.act();
        }
    }

    fn pass_time(&mut self, duration: Duration) {
        self.now = self.now + duration;
        if self
            .ingest
            .poll_timeout()
            .is_some_and(|deadline| deadline <= self.now)
        {
            (self.request, self.replies) = (None, None);
            self.ingest.handle_timeout(self.now);
            self.act();
        }
    }

    fn act(&mut self) {
        while let Some(action) = self.ingest.poll_action() {
            match action {
                Action::Apply {
                    sequence,
                    payload,
                    position,
                    digest,
                } => {
                    let told = parse(&payload);
                    assert_eq!(digest, BatchDigest::of(&payload));
                    assert_eq!(told.1, sequence.0);
                    assert_eq!(position.next.0, sequence.0 + 1);
                    if let Some(last) = self.applied.last().filter(|_| self.is_strict) {
                        assert_eq!(told, (last.0, last.1 + 1), "applied after {last:?}");
                    }
                    self.applied.push(told);
                }
                Action::Clear { reason } => {
                    self.applied.clear();
                    self.clears.push(reason);
                }
                Action::Replace { pieces } => {
                    self.applied.clear();
                    self.images.push(pieces);
                }
                Action::RequestReplay { from } => {
                    assert_eq!((self.request, &self.replies), (None, &None), "two replays");
                    self.request = Some(from.0);
                }
            }
        }
    }

    /// Lets everything on its way arrive.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            if !self.live.is_empty() {
                self.deliver_live();
            } else if self.request.is_some() {
                self.serve_replay();
            } else if self.replies.is_some() {
                self.deliver_reply();
            } else {
                return;
            }
        }
        panic!("the exchange never comes to rest");
    }

    /// What is applied is what this publisher sent, up to its last batch and as far back as it can tell.
    fn assert_exact(&self) {
        assert!(self.ingest.is_current());
        let first = match self.applied.first() {
            Some((_, first)) => *first,
            None => self.published,
        };
        assert!(
            first <= self.published.saturating_sub(self.buffered_max),
            "starts at {first}"
        );
        let log: Vec<_> = (first..self.published)
            .map(|sequence| (self.incarnation, sequence))
            .collect();
        assert_eq!(self.applied, log);
        assert_eq!(self.ingest.position().next.0, self.published);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Publish(u64),
    DropLive,
    RepeatLive,
    DeliverLive,
    ServeReplay,
    DeliverReply,
    FailReplay,
    Disconnect,
    Connect,
    /// The publisher dies, another comes up in its place; how much that one has sent before we are back.
    Restart(u64),
    /// The same without any sign of it on the connection.
    SilentRestart,
    Wait,
    TakeSnapshot,
    FailOver,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        10 => (1..4_u64).prop_map(Step::Publish),
        3 => Just(Step::DropLive),
        2 => Just(Step::RepeatLive),
        12 => Just(Step::DeliverLive),
        6 => Just(Step::ServeReplay),
        12 => Just(Step::DeliverReply),
        1 => Just(Step::FailReplay),
        1 => Just(Step::Disconnect),
        4 => Just(Step::Connect),
        1 => (0..20_u64).prop_map(Step::Restart),
        1 => Just(Step::SilentRestart),
        1 => Just(Step::Wait),
        2 => Just(Step::TakeSnapshot),
        1 => Just(Step::FailOver),
    ]
}

fn run(world: &mut World, steps: &[Step]) {
    for step in steps {
        match step {
            Step::Publish(batches) => world.publish(*batches),
            Step::DropLive => drop(world.live.pop_front()),
            Step::RepeatLive => {
                if let Some(next) = world.live.front().copied() {
                    world.live.push_front(next);
                }
            }
            Step::DeliverLive => world.deliver_live(),
            Step::ServeReplay => world.serve_replay(),
            Step::DeliverReply => world.deliver_reply(),
            Step::FailReplay => world.fail_replay(),
            Step::Disconnect => world.disconnect(),
            Step::Connect => world.connect(),
            Step::Restart(batches) => {
                world.disconnect();
                world.restart();
                world.publish(*batches);
            }
            Step::SilentRestart => world.restart(),
            Step::Wait => world.pass_time(Duration::from_secs(7)),
            Step::TakeSnapshot => world.take_snapshot(),
            Step::FailOver => world.fail_over(),
        }
    }
    world.settle();
    world.disconnect();
    world.connect();
    world.settle();
}

/// The same steps, but no publisher is exchanged unseen.
fn all_seen(steps: Vec<Step>) -> Vec<Step> {
    let seen = |step| {
        if let Step::SilentRestart = step {
            Step::Restart(0)
        } else {
            step
        }
    };
    steps.into_iter().map(seen).collect()
}

/// The same steps, but after an unseen exchange of the publisher each of its batches arrives.
fn nothing_lost_after_an_exchange(steps: Vec<Step>) -> Vec<Step> {
    let mut is_exchanged = false;
    let kept = steps.into_iter().filter(|step| {
        is_exchanged |= matches!(step, Step::SilentRestart);
        !(is_exchanged && matches!(step, Step::DropLive | Step::FailOver))
    });
    kept.collect()
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    proptest::collection::vec(step(), 1..300)
}

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

fn connected(published: u64) -> World {
    let mut world = World::new(IngestConfig::default());
    world.publish(published);
    world.connect();
    world.settle();
    world.assert_exact();
    world
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

fn piece(cut: u64, number: u32, count: u32) -> ImagePiece {
    ImagePiece {
        cut: Sequence(cut),
        number,
        count,
        payload: Bytes::from(format!("{number} of {count} before {cut}")),
    }
}

/// A follower of batches 0 to 4 comes back when the publisher has 10 batches and keeps the last two of them.
fn come_back_too_late() -> World {
    let mut world = connected(5);
    world.disconnect();
    world.publish(5);
    world.buffered_max = 2;
    world.connect();
    world.serve_replay();
    world
}

impl World {
    fn deliver_image(&mut self, pieces: &[ImagePiece]) {
        for piece in pieces {
            let epoch = self.epoch(self.incarnation);
            self.ingest.handle_image(self.now, epoch, piece.clone());
            self.act();
        }
    }
}

/// The image comes before the oldest batch: nothing is cleared, and it is taken up together with that batch.
#[test]
fn an_image_takes_the_place_of_batches_that_are_gone() {
    let mut world = come_back_too_late();
    let image = [piece(8, 0, 2), piece(8, 1, 2)];
    world.deliver_image(&image);
    assert_eq!(
        world.images,
        [] as [Vec<Bytes>; 0],
        "not before its batch has come"
    );
    world.settle();
    assert_eq!(world.images, [image.map(|piece| piece.payload).to_vec()]);
    assert_eq!((world.clears.len(), world.ingest.stats().images), (0, 1));
    world.assert_exact();
}

/// A follower that begins when the publisher keeps a part only gets the rest as an image.
#[test]
fn a_newcomer_begins_with_the_image() {
    let mut world = World::new(IngestConfig::default());
    world.publish(10);
    world.buffered_max = 2;
    world.connect();
    world.serve_replay();
    world.deliver_image(&[piece(8, 0, 1)]);
    world.settle();
    assert_eq!((world.images.len(), world.clears.len()), (1, 0));
    world.assert_exact();
}

/// Each image lacks something, or does not fit what follows: the source is cleared instead.
#[test]
fn an_image_that_is_not_whole_is_not_taken_up() {
    let wrong: [&[ImagePiece]; 8] = [
        &[],
        &[piece(8, 0, 2)],
        &[piece(8, 1, 2)],
        &[piece(8, 0, 3), piece(8, 2, 3)],
        &[piece(8, 0, 2), piece(7, 1, 2)],
        &[piece(7, 0, 1)],
        &[piece(8, 0, 0)],
        &[piece(8, 0, 2), piece(8, 1, 2), piece(8, 2, 2)],
    ];
    for image in wrong {
        let mut world = come_back_too_late();
        world.deliver_image(image);
        world.settle();
        assert_eq!(world.images, [] as [Vec<Bytes>; 0], "{image:?}");
        assert_eq!(world.clears, [ClearReason::HistoryLost], "{image:?}");
        world.assert_exact();
    }
}

/// More bytes than are taken.
#[test]
fn an_image_that_is_too_large_is_not_taken_up() {
    let mut world = come_back_too_late();
    world.ingest.config.image_bytes_max = 20;
    world.deliver_image(&[piece(8, 0, 2), piece(8, 1, 2)]);
    world.settle();
    assert_eq!(world.clears, [ClearReason::HistoryLost]);
}

/// Another source has taken the room that both share: the image is not taken up, and what was kept of it is given back.
#[test]
fn an_image_that_finds_no_room_beside_others_is_not_taken_up() {
    let room = Room::new(40);
    let fresh = || {
        let mut world = World::new(IngestConfig::default());
        world.ingest = Ingest::new(IngestConfig::default()).sharing(&room);
        world.publish(10);
        world.buffered_max = 2;
        world.connect();
        world.serve_replay();
        world
    };
    let (mut first, mut second) = (fresh(), fresh());
    first.deliver_image(&[piece(8, 0, 2), piece(8, 1, 2)]);
    let of_first = room.used();
    assert!(of_first > 20);
    second.deliver_image(&[piece(8, 0, 2), piece(8, 1, 2)]);
    assert_eq!(room.used(), of_first, "half an image is kept");
    second.settle();
    assert_eq!(second.images, [] as [Vec<Bytes>; 0]);
    second.assert_exact();
    first.settle();
    assert_eq!((first.images.len(), room.used()), (1, 0));
    let mut third = fresh();
    third.deliver_image(&[piece(8, 0, 2), piece(8, 1, 2)]);
    third.settle();
    assert_eq!((third.images.len(), room.used()), (1, 0));
}

/// Live batches of two sources behind replays, with room for a few: what finds none is replayed, and all room is given back.
#[test]
fn batches_that_find_no_room_beside_others_are_asked_for_again() {
    let room = Room::new(6);
    let mut worlds = [1, 2].map(|_| {
        let mut world = World::new(IngestConfig::default());
        world.ingest = Ingest::new(IngestConfig::default()).sharing(&room);
        world.connect();
        world.publish(5);
        world
    });
    for world in &mut worlds {
        while !world.live.is_empty() {
            world.deliver_live();
        }
    }
    assert_eq!(room.used(), 6);
    assert!(worlds.iter().any(|world| world.ingest.stats().dropped > 0));
    for world in &mut worlds {
        world.settle();
        world.assert_exact();
        assert_eq!(world.applied.len(), 5);
    }
    assert_eq!(room.used(), 0);
}

/// The connection ends between the image and its batch: what was applied stays as it was, and the next connection asks
/// again from there.
#[test]
fn an_image_whose_batch_never_came_changes_nothing() {
    let mut world = come_back_too_late();
    world.deliver_image(&[piece(8, 0, 1)]);
    world.disconnect();
    assert_eq!(
        (world.images.len(), world.clears.len(), world.applied.len()),
        (0, 0, 5)
    );
    world.connect();
    assert_eq!(world.request, Some(4));
    world.serve_replay();
    world.settle();
    assert_eq!(
        world.clears,
        [ClearReason::HistoryLost],
        "the old image is not kept"
    );
}

/// A node that began anew tells what it holds now, under its new epoch.
#[test]
fn an_image_of_another_incarnation_clears_first() {
    let mut world = World::new(IngestConfig::default());
    world.tells_epoch = true;
    world.publish(5);
    world.connect();
    world.settle();
    world.disconnect();
    world.restart();
    world.publish(10);
    world.buffered_max = 2;
    world.connect();
    world.serve_replay();
    world.deliver_image(&[piece(8, 0, 1)]);
    assert_eq!(world.clears, [ClearReason::NewEpoch]);
    assert_eq!(world.applied, []);
    while world.replies.is_some() {
        world.deliver_reply();
    }
    assert_eq!(world.request, Some(0), "asked again from the start");
    world.serve_replay();
    world.deliver_image(&[piece(8, 0, 1)]);
    world.settle();
    assert_eq!((world.images.len(), world.clears.len()), (1, 1));
    world.assert_exact();
}
