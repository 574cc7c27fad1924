//! A publisher whose last batches never come over the events socket, and nothing after them that would show it.

use kvcache_core::event::EngineEvent;
use kvcache_core::{EngineHash, Sequence, Tier};
use tokio::task::JoinHandle;
use zeromq::{PubSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqMessage};

use super::tests::follower_of;
use super::*;
use crate::adapter::encode_engine_batch;

/// Only bounds a failing test; no test measures time.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longer than any test has patience.
const NEVER: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_millis(20);

/// Answers replays, and counts them; it never says anything by itself.
struct Mute {
    spec: SourceSpec,
    events: PubSocket,
    asked: watch::Receiver<u64>,
    answering: JoinHandle<()>,
}

impl Mute {
    /// Publishes two batches as soon as it has answered so many replays.
    async fn publishing_after(replays: u64) -> Self {
        let mut events = PubSocket::new();
        let endpoint = events.bind("tcp://127.0.0.1:0").await.unwrap().to_string();
        let mut replay = RouterSocket::new();
        let replay_endpoint = replay.bind("tcp://127.0.0.1:0").await.unwrap().to_string();
        let count = watch::Sender::new(0);
        let asked = count.subscribe();
        let answering = tokio::spawn(async move {
            loop {
                let request = replay.recv().await.unwrap().into_vec();
                let from = u64::from_be_bytes(request[2].as_ref().try_into().unwrap());
                let end = if *count.borrow() < replays { 0 } else { 2 };
                for number in (from..end).chain([u64::MAX]) {
                    let mut reply = ZmqMessage::from(request[0].clone());
                    reply.push_back(Bytes::new());
                    reply.push_back(Bytes::copy_from_slice(&number.to_be_bytes()));
                    reply.push_back(if number == u64::MAX {
                        Bytes::new()
                    } else {
                        batch(number).into()
                    });
                    replay.send(reply).await.unwrap();
                }
                count.send_modify(|count| *count += 1);
            }
        });
        let spec = SourceSpec {
            name: "engine".to_owned(),
            kind: SourceKind::Vllm,
            endpoint,
            replay_endpoint: Some(replay_endpoint),
            data_parallel_rank: None,
            groups: Vec::new(),
        };
        Self {
            spec,
            events,
            asked,
            answering,
        }
    }

    /// Says the first batch, and never the second.
    async fn say_the_first(&mut self) {
        let mut live = ZmqMessage::from("kv@pod-0@m");
        live.push_back(Bytes::copy_from_slice(&0_u64.to_be_bytes()));
        live.push_back(batch(0).into());
        self.events.send(live).await.unwrap();
    }

    async fn was_asked(&mut self, times: u64) {
        let asked = self.asked.wait_for(|asked| *asked >= times);
        let asked = tokio::time::timeout(PATIENCE, asked).await;
        asked.expect("nobody asked").unwrap();
    }
}

impl Drop for Mute {
    fn drop(&mut self) {
        self.answering.abort();
    }
}

fn batch(number: u64) -> Vec<u8> {
    let event = EngineEvent::Stored {
        hashes: vec![EngineHash(number + 1)],
        parent: None,
        tokens: vec![number as u32; 16],
        block_size: 16,
        tier: Tier::Device,
    };
    encode_engine_batch(1.5, &[event])
}

/// Follows a publisher with these probes.
fn follow(publisher: &Mute, probes: Probes) -> (Arc<SourceState>, JoinHandle<()>) {
    let mut follower = follower_of(publisher.spec.clone());
    follower.limits.probes = probes;
    let state = follower.state.clone();
    (state, tokio::spawn(follower.run()))
}

async fn both_are_known(state: &SourceState) {
    let mut progress = state.subscribe();
    let known = progress.wait_for(|progress| progress.position.next == Sequence(2));
    let known = tokio::time::timeout(PATIENCE, known).await;
    known.expect("the tail was never asked for").unwrap();
}

/// The second batch's end.
const END: Position = Position {
    epoch: Epoch(0),
    next: Sequence(2),
};

/// What was published between the first replay and the subscription: it is asked for a moment after the connect.
#[tokio::test]
async fn the_tail_is_asked_for_after_a_connect() {
    let publisher = Mute::publishing_after(1).await;
    let probes = Probes {
        after_connect: SOON,
        when_silent: NEVER,
        when_waited_for: NEVER,
    };
    let (state, following) = follow(&publisher, probes);
    both_are_known(&state).await;
    following.abort();
}

/// The probe after the connect is over when the publisher goes on, and nobody waits: silence is enough.
#[tokio::test]
async fn the_tail_is_asked_for_after_silence() {
    let publisher = Mute::publishing_after(2).await;
    let probes = Probes {
        after_connect: Duration::from_millis(1),
        when_silent: SOON,
        when_waited_for: NEVER,
    };
    let (state, following) = follow(&publisher, probes);
    both_are_known(&state).await;
    following.abort();
}

/// Nothing is asked for by itself; somebody waits for what has not come.
#[tokio::test]
async fn the_tail_is_asked_for_when_somebody_waits() {
    let mut publisher = Mute::publishing_after(1).await;
    let probes = Probes {
        after_connect: NEVER,
        when_silent: NEVER,
        when_waited_for: SOON,
    };
    let (state, following) = follow(&publisher, probes);
    publisher.was_asked(1).await;
    state.want(END);
    both_are_known(&state).await;
    following.abort();
}

/// The same, while the batch before it comes over and over: that somebody waits is not forgotten over it.
#[tokio::test]
async fn the_tail_is_asked_for_whatever_comes_while_somebody_waits() {
    let mut publisher = Mute::publishing_after(1).await;
    let probes = Probes {
        after_connect: NEVER,
        when_silent: NEVER,
        when_waited_for: Duration::from_millis(200),
    };
    let (state, following) = follow(&publisher, probes);
    publisher.was_asked(1).await;
    let first_is_known = async {
        while state.progress().position.next == Sequence(0) {
            publisher.say_the_first().await;
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, first_is_known)
        .await
        .unwrap();
    state.want(END);
    let saying = async {
        loop {
            publisher.say_the_first().await;
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        () = saying => {}
        () = both_are_known(&state) => {}
    }
    following.abort();
}
