//! The state machine against a publisher whose true log is known, over a wire that loses and repeats.

mod histories;
mod images;
mod replays;
mod snapshots;

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

fn connected(published: u64) -> World {
    let mut world = World::new(IngestConfig::default());
    world.publish(published);
    world.connect();
    world.settle();
    world.assert_exact();
    world
}
