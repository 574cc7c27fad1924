use std::sync::atomic::{AtomicU64, Ordering};

use kvcache_core::event::NodeEvent;
use kvcache_core::prefix::IndexScheme;
use kvcache_core::{IndexKey, PodName, Tier};
use proptest::prelude::*;

use super::*;
use crate::adapter::encode_node_batch;
use crate::index::{IndexConfig, ORPHAN_BLOCKS_MAX};
use crate::score::TierWeights;

fn follower() -> Follower {
    follower_of(SourceSpec {
        name: "node".to_owned(),
        kind: SourceKind::Node,
        endpoint: "tcp://127.0.0.1:1".to_owned(),
        replay_endpoint: Some("tcp://127.0.0.1:1".to_owned()),
        data_parallel_rank: None,
        groups: Vec::new(),
    })
}

/// Of an index that knows nothing else.
pub(super) fn follower_of(spec: SourceSpec) -> Follower {
    let index = Arc::new(KvIndex::new(IndexConfig {
        scheme: IndexScheme::default(),
        model: "m".to_owned(),
        block_size: 16.try_into().unwrap(),
        weights: TierWeights::default(),
        orphan_blocks_max: ORPHAN_BLOCKS_MAX,
    }));
    let id = index
        .add_source(crate::index::SourceSpec {
            pod: PodName::new("pod-0").unwrap(),
            name: spec.name.clone(),
            kind: spec.kind,
            block_size: 16,
        })
        .unwrap();
    let limits = Limits {
        ttl: Duration::from_secs(30),
        message_bytes_max: 1 << 20,
        media: Arc::default(),
        room: Room::new(usize::MAX),
        steps: Arc::default(),
        probes: Probes::default(),
    };
    let (state, metrics) = (
        Arc::new(SourceState::new(None)),
        Arc::new(Metrics::new(&[])),
    );
    let name = format!("pod-0/{}", spec.name);
    Follower::new(spec, name, (index, id), state, metrics, limits)
}

fn stored(keys: std::ops::Range<u64>, tier: Tier) -> Vec<NodeEvent> {
    keys.map(|key| NodeEvent::Stored {
        key: IndexKey(key),
        parent: None,
        tier,
    })
    .collect()
}

impl Follower {
    async fn take(&mut self, sequence: u64, events: &[NodeEvent]) {
        let payload = encode_node_batch(1.0, events);
        let now = self.now();
        self.ingest
            .handle_frame(now, Some(Epoch(1)), Sequence(sequence), payload.into());
        self.act(true).await;
    }

    async fn reply(&mut self, sequence: u64, events: &[NodeEvent]) {
        let payload = encode_node_batch(1.0, events);
        let now = self.now();
        self.ingest
            .handle_replayed(now, Some(Epoch(1)), Sequence(sequence), payload.into());
        self.act(false).await;
    }
}

/// Counts how often another task of the same single thread has its turn meanwhile.
async fn turns_of_others(work: impl Future<Output = ()>) -> u64 {
    let turns = Arc::new(AtomicU64::new(0));
    let counting = tokio::spawn({
        let turns = turns.clone();
        async move {
            loop {
                turns.fetch_add(1, Ordering::Relaxed);
                tokio::task::yield_now().await;
            }
        }
    });
    work.await;
    counting.abort();
    turns.load(Ordering::Relaxed)
}

/// One batch of as many events as are read, on a runtime of one thread.
#[tokio::test]
async fn a_long_batch_gives_others_their_turn() {
    let mut follower = follower();
    follower.ingest.handle_connected(Time(0));
    follower.ingest.handle_replay_end(Time(0));
    let events = stored(0..60_000, Tier::Host);
    let turns = turns_of_others(follower.take(0, &events)).await;
    assert_eq!(follower.index.entries(), 60_000);
    assert!(
        turns >= 10,
        "{turns} turns while 60,000 events were applied"
    );
}

/// The source has 0 to 20,000 and its image 10,000 to 30,000 in DRAM: whoever looks in between finds what both have, and
/// never less or more than the two together.
#[tokio::test]
async fn an_image_replaces_what_was_there_without_a_half_state() {
    const BOTH: std::ops::Range<u64> = 10_000..20_000;
    let mut follower = follower();
    follower.ingest.handle_connected(Time(0));
    follower.act(false).await;
    follower.reply(0, &stored(0..20_000, Tier::Host)).await;
    follower.reply(1, &stored(5..6, Tier::Object)).await;
    assert_eq!(follower.index.entries(), 20_001);
    follower.ingest.handle_disconnected();
    follower.ingest.handle_connected(Time(0));
    follower.act(false).await;
    let image = stored(10_000..30_000, Tier::Host);
    for (number, events) in image.chunks(10_000).enumerate() {
        let piece = crate::ingest::ImagePiece {
            cut: Sequence(50),
            number: number as u32,
            count: 2,
            payload: encode_node_batch(50.0, events).into(),
        };
        follower.ingest.handle_image(Time(0), Some(Epoch(1)), piece);
    }
    let index = follower.index.clone();
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let looking = tokio::spawn({
        let (index, seen) = (index.clone(), seen.clone());
        async move {
            loop {
                seen.lock().unwrap().push(index.entries());
                tokio::task::yield_now().await;
            }
        }
    });
    follower
        .reply(50, &stored(30_000..30_001, Tier::Host))
        .await;
    looking.abort();
    let seen = seen.lock().unwrap().clone();
    assert!(seen.len() > 5, "looked {} times", seen.len());
    let fewest = seen.iter().min().unwrap();
    assert!(
        *fewest >= BOTH.end - BOTH.start,
        "{fewest} entries at some moment"
    );
    assert_eq!(index.entries(), 20_002);
    assert_eq!(follower.ingest.stats().resyncs, 0);
    // What is in a shared tier is not this source's to take away.
    assert_eq!(index.export_shared().iter().map(Vec::len).sum::<usize>(), 1);
}

/// One piece is not a batch, one removes: nothing stays that nobody vouches for.
#[tokio::test]
async fn an_image_that_cannot_be_read_empties_the_source() {
    let removes = encode_node_batch(
        1.0,
        &[NodeEvent::Removed {
            key: IndexKey(1),
            tier: Tier::Host,
        }],
    );
    for payload in [b"no batch".to_vec(), removes] {
        let mut follower = follower();
        follower.ingest.handle_connected(Time(0));
        follower.act(false).await;
        follower.reply(0, &stored(0..10, Tier::Host)).await;
        follower.ingest.handle_connected(Time(0));
        follower.act(false).await;
        let piece = crate::ingest::ImagePiece {
            cut: Sequence(50),
            number: 0,
            count: 1,
            payload: payload.into(),
        };
        follower.ingest.handle_image(Time(0), Some(Epoch(1)), piece);
        follower.reply(50, &stored(7..8, Tier::Host)).await;
        assert_eq!(follower.index.entries(), 1);
    }
}

/// The index has removed the source, and another one has come: what the task still has to say is nobody's.
#[tokio::test]
async fn events_of_a_source_that_was_removed_are_not_applied() {
    let mut follower = follower();
    follower.ingest.handle_connected(Time(0));
    follower.ingest.handle_replay_end(Time(0));
    follower.take(0, &stored(0..10, Tier::Host)).await;
    assert_eq!(follower.index.entries(), 10);
    follower.index.remove_source(follower.id);
    let next = crate::index::SourceSpec {
        pod: PodName::new("pod-1").unwrap(),
        name: "node".to_owned(),
        kind: SourceKind::Node,
        block_size: 16,
    };
    follower.index.add_source(next).unwrap();
    follower.take(1, &stored(10..20, Tier::Host)).await;
    assert_eq!(follower.index.entries(), 0);
    assert_eq!(follower.metrics.events(), (10, 10));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Messages of any frames on both sockets, most of them a node's with some bytes changed: the index has what decoded
    /// batches say, and nothing panics.
    #[test]
    fn whatever_comes_in_frames_is_applied_or_refused(
        messages in prop::collection::vec(
            (
                prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..7),
                prop::option::weighted(0.8, (0_u64..6, 0_u64..4, any::<bool>())),
                prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u8>()), 0..3),
                any::<bool>(),
            ),
            0..30,
        ),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let mut follower = follower();
            follower.ingest.handle_connected(Time(0));
            follower.act(false).await;
            for (noise, real, changes, is_reply) in messages {
                let mut frames = noise;
                if let Some((sequence, key, is_image)) = real {
                    let payload = encode_node_batch(1.0, &stored(key..key + 3, Tier::Host));
                    frames = vec![b"kv@pod-0@m@1".to_vec(), sequence.to_be_bytes().to_vec(), payload];
                    if is_reply {
                        frames.insert(0, Vec::new());
                    }
                    if is_reply && is_image {
                        frames.push((1_u64 << 32 | 1).to_be_bytes().to_vec());
                    }
                }
                for (which, place, value) in changes {
                    if frames.is_empty() {
                        continue;
                    }
                    let which = which.index(frames.len());
                    if !frames[which].is_empty() {
                        let place = place.index(frames[which].len());
                        frames[which][place] = value;
                    }
                }
                let frames: Vec<_> = frames.into_iter().map(Bytes::from).collect();
                if is_reply {
                    follower.take_reply(&frames);
                } else {
                    follower.take_live(&frames);
                }
                follower.act(false).await;
            }
            // Every entry came with an event, and an event has a byte at least.
            assert!(follower.index.entries() <= 30 * 200);
            follower.give_up().await;
            assert_eq!(follower.index.entries(), 0);
        });
    }
}
