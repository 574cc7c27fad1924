use std::time::Duration;

use kvcache_core::event::NodeEvent;
use kvcache_core::{EngineHash, ErrorKind, IndexKey, Tier};
use tokio::time::timeout;
use zeromq::{DealerSocket, Socket, SocketRecv, SocketSend, SubSocket, ZmqMessage};

use super::*;
use crate::adapter::{SourceEvent, decode_batch};

/// Only bounds a failing test; no test measures time.
const PATIENCE: Duration = Duration::from_secs(60);

fn config(stream: Stream) -> PublisherConfig {
    PublisherConfig::new(PodName::new("pod-0").unwrap(), "m", stream)
}

fn engine() -> Publisher {
    Publisher::bind(config(Stream::Engine)).unwrap()
}

fn payload(byte: u8, len: usize) -> Vec<u8> {
    vec![byte; len]
}

async fn replay(endpoint: &str, start: u64) -> Vec<(u64, Vec<u8>)> {
    let mut dealer = DealerSocket::new();
    dealer.connect(endpoint).await.unwrap();
    let mut request = ZmqMessage::from(Bytes::new());
    request.push_back(Bytes::copy_from_slice(&start.to_be_bytes()));
    dealer.send(request).await.unwrap();
    let mut batches = Vec::new();
    loop {
        let reply = timeout(PATIENCE, dealer.recv())
            .await
            .unwrap()
            .unwrap()
            .into_vec();
        let [empty, topic, sequence, payload] = reply.as_slice() else {
            panic!("{} frames in a reply", reply.len());
        };
        assert!(empty.is_empty());
        let sequence = u64::from_be_bytes(sequence.as_ref().try_into().unwrap());
        if topic.is_empty() {
            assert_eq!(sequence, u64::MAX);
            assert!(payload.is_empty());
            return batches;
        }
        assert_eq!(topic, "kv@pod-0@m");
        batches.push((sequence, payload.to_vec()));
    }
}

/// A subscriber whose subscription has been seen to work: the publisher sends until something arrives.
async fn subscribed(publisher: &Publisher) -> (SubSocket, u64) {
    let mut subscriber = SubSocket::new();
    subscriber.subscribe("kv@").await.unwrap();
    subscriber.connect(publisher.endpoint()).await.unwrap();
    let probing = async {
        loop {
            publisher.publish_payload(payload(0, 1));
            if let Ok(message) = timeout(Duration::from_millis(20), subscriber.recv()).await {
                return sequence(&message.unwrap().into_vec());
            }
        }
    };
    let seen = timeout(PATIENCE, probing).await.unwrap();
    (subscriber, seen)
}

fn sequence(frames: &[Bytes]) -> u64 {
    assert_eq!(frames.len(), 3);
    u64::from_be_bytes(frames[1].as_ref().try_into().unwrap())
}

/// Asks for everything, a part, and what is not there yet.
#[tokio::test]
async fn a_replay_is_what_was_published_from_the_asked_sequence_on() {
    let publisher = engine();
    for byte in 0..5 {
        let position = publisher.publish_payload(payload(byte, 10));
        assert_eq!(position.next, Sequence(u64::from(byte) + 1));
    }
    let all = replay(publisher.replay_endpoint(), 0).await;
    assert_eq!(
        all,
        (0..5)
            .map(|b| (u64::from(b), payload(b, 10)))
            .collect::<Vec<_>>()
    );
    assert_eq!(replay(publisher.replay_endpoint(), 3).await, all[3..]);
    assert_eq!(replay(publisher.replay_endpoint(), 5).await, []);
    assert_eq!(publisher.stats().replays, 3);
}

/// Live batches carry topic, consecutive numbers and the payload as it was.
#[tokio::test]
async fn live_batches_arrive_in_order_with_topic_and_sequence() {
    let publisher = engine();
    let (mut subscriber, seen) = subscribed(&publisher).await;
    let first = publisher.position().next.0;
    for byte in 0..100 {
        publisher.publish_payload(payload(byte, 1000));
    }
    let mut expected = seen + 1;
    while expected < first + 100 {
        let message = timeout(PATIENCE, subscriber.recv())
            .await
            .unwrap()
            .unwrap()
            .into_vec();
        assert_eq!(message[0], "kv@pod-0@m");
        assert_eq!(sequence(&message), expected);
        if expected >= first {
            assert_eq!(message[2][0], (expected - first) as u8);
        }
        expected += 1;
    }
    assert!(publisher.flush(PATIENCE).await);
    assert_eq!(publisher.stats().queue_bytes, 0);
}

/// A subscriber that never reads, events until it is given up, and the bytes counted after each.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_stopped_subscriber_costs_no_more_than_the_bounds_and_is_disconnected() {
    const BOUND: usize = 1 << 20;
    const BATCH: usize = 64 << 10;
    let mut config = config(Stream::Engine);
    (config.replay_bytes_max, config.queue_bytes_max) = (BOUND, BOUND);
    let publisher = Publisher::bind(config).unwrap();
    let (stopped, _) = subscribed(&publisher).await;
    let disconnects = publisher.shared.disconnected.subscribe();
    let publishing = async {
        while *disconnects.borrow() == 0 {
            publisher.publish_payload(payload(1, BATCH));
            let stats = publisher.stats();
            assert!(stats.replay_bytes <= BOUND, "{stats:?}");
            assert!(stats.queue_bytes <= BOUND, "{stats:?}");
            // The publisher's thread must get its turn for there to be a queue at all.
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, publishing).await.unwrap();
    // More than the bounds and the kernel's buffers together went out before the queue was given up.
    assert!(publisher.stats().batches as usize * BATCH > 4 * BOUND);
    drop(stopped);
    // And it serves on: a newcomer gets live events and a replay.
    let (_subscriber, _) = subscribed(&publisher).await;
    assert!(!replay(publisher.replay_endpoint(), 0).await.is_empty());
}

/// A requester of a long replay that never reads the answer.
#[tokio::test]
async fn a_stopped_replay_is_abandoned_and_the_next_one_served() {
    let mut config = config(Stream::Engine);
    config.replay_bytes_max = 64 << 20;
    let publisher = Publisher::bind(config).unwrap();
    for _ in 0..600 {
        publisher.publish_payload(payload(7, 100 << 10));
    }
    let mut stopped = DealerSocket::new();
    stopped.connect(publisher.replay_endpoint()).await.unwrap();
    let mut request = ZmqMessage::from(Bytes::new());
    request.push_back(Bytes::copy_from_slice(&0u64.to_be_bytes()));
    stopped.send(request).await.unwrap();
    let mut disconnects = publisher.shared.disconnected.subscribe();
    timeout(PATIENCE, disconnects.wait_for(|count| *count > 0))
        .await
        .unwrap()
        .unwrap();
    assert!(publisher.stats().queue_bytes <= SEND_AHEAD_BYTES + (101 << 10));
    assert_eq!(replay(publisher.replay_endpoint(), 599).await.len(), 1);
}

/// What a node publishes decodes to the same events, under a topic with its epoch.
#[tokio::test]
async fn node_events_come_back_as_index_keys() {
    let publisher = Publisher::bind(config(Stream::Node { epoch: Epoch(77) })).unwrap();
    let position = publisher.publish(vec![
        NodeEvent::Stored {
            key: IndexKey(u64::MAX),
            parent: None,
            tier: Tier::Host,
        },
        NodeEvent::Removed {
            key: IndexKey(2),
            tier: Tier::Disk,
        },
    ]);
    assert_eq!(
        position,
        Position {
            epoch: Epoch(77),
            next: Sequence(1)
        }
    );
    assert_eq!(publisher.shared.topic, "kv@pod-0@m@77");
    let (_, payload) = publisher.shared.history().at_or_after(0).unwrap();
    let batch = decode_batch(&payload, SourceKind::Node).unwrap();
    let events: Vec<_> = batch
        .events
        .into_iter()
        .map(|event| event.unwrap())
        .collect();
    assert!(
        matches!(&events[0], SourceEvent::Stored(stored)
            if stored.hashes == [EngineHash(u64::MAX)] && stored.tier == Tier::Host),
        "{events:?}"
    );
    assert!(
        matches!(&events[1], SourceEvent::Removed(removed)
            if removed.hashes == [EngineHash(2)] && removed.tier == Tier::Disk),
        "{events:?}"
    );
}

/// More events than one batch holds.
#[tokio::test]
async fn a_long_publication_is_split_and_nothing_is_lost() {
    let publisher = Publisher::bind(config(Stream::Node { epoch: Epoch(1) })).unwrap();
    let events = (0..NODE_EVENTS_PER_BATCH_MAX as u64 + 1)
        .map(|key| NodeEvent::Removed {
            key: IndexKey(key),
            tier: Tier::Host,
        })
        .collect();
    assert_eq!(publisher.publish(events).next, Sequence(2));
    assert_eq!(publisher.publish(Vec::new()).next, Sequence(2));
}

/// Binds the same port twice, and things that are no endpoints.
#[test]
fn an_endpoint_that_cannot_be_bound_is_named() {
    let first = engine();
    let mut second = config(Stream::Engine);
    second.endpoint = first.endpoint().to_owned();
    let error = Publisher::bind(second).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains(first.endpoint()), "{error}");
    assert!(error.to_string().contains("in use"), "{error}");

    for bad in [
        "",
        "udp://127.0.0.1:1",
        "tcp://127.0.0.1",
        "tcp://:5",
        "tcp://h:x",
        "ipc://",
    ] {
        let mut config = config(Stream::Engine);
        config.replay_endpoint = bad.to_owned();
        let error = Publisher::bind(config).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{bad}: {error}");
    }
}

/// A unix socket is usable, unlinked at the end, and replaced when its owner died.
#[tokio::test]
async fn unix_sockets_are_cleaned_up_and_stale_ones_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("replay");
    // A dead process leaves the file behind: binding and dropping the listener does the same.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let mut config = config(Stream::Engine);
    config.replay_endpoint = format!("ipc://{}", path.display());
    let publisher = Publisher::bind(config.clone()).unwrap();
    publisher.publish_payload(payload(1, 1));
    assert_eq!(replay(publisher.replay_endpoint(), 0).await.len(), 1);
    assert!(
        Publisher::bind(config).is_err(),
        "a live socket was taken over"
    );
    drop(publisher);
    assert!(!path.exists());
}

/// The port is free again as soon as the publisher is gone.
#[test]
fn dropping_a_publisher_frees_its_ports() {
    let first = engine();
    let mut config = config(Stream::Engine);
    config.endpoint = first.endpoint().to_owned();
    config.replay_endpoint = first.replay_endpoint().to_owned();
    drop(first);
    let second = Publisher::bind(config).unwrap();
    assert_eq!(
        second.position(),
        Position {
            epoch: Epoch(0),
            next: Sequence(0)
        }
    );
}

/// Every message of a replay as it comes, without the empty first frame.
async fn replay_frames(endpoint: &str, start: u64) -> Vec<Vec<Bytes>> {
    let mut dealer = DealerSocket::new();
    dealer.connect(endpoint).await.unwrap();
    let mut request = ZmqMessage::from(Bytes::new());
    request.push_back(Bytes::copy_from_slice(&start.to_be_bytes()));
    dealer.send(request).await.unwrap();
    let mut replies = Vec::new();
    loop {
        let reply = timeout(PATIENCE, dealer.recv()).await.unwrap().unwrap();
        let frames = reply.into_vec()[1..].to_vec();
        if frames[0].is_empty() {
            return replies;
        }
        replies.push(frames);
    }
}

fn held(key: u64, tier: Tier) -> NodeEvent {
    NodeEvent::Stored {
        key: IndexKey(key),
        parent: None,
        tier,
    }
}

/// A node's publisher that keeps one batch, and more blocks than one piece of an image has.
#[tokio::test]
async fn a_replay_that_begins_too_early_starts_with_an_image() {
    let mut config = config(Stream::Node { epoch: Epoch(7) });
    config.replay_bytes_max = 1;
    let publisher = Publisher::bind(config).unwrap();
    let blocks = IMAGE_EVENTS_PER_PIECE_MAX as u64 + 10;
    publisher.publish((0..blocks).map(|key| held(key, Tier::Host)).collect());
    publisher.publish(vec![NodeEvent::Removed {
        key: IndexKey(3),
        tier: Tier::Host,
    }]);
    let cut = publisher.publish(vec![held(1, Tier::Disk)]).next.0 - 1;

    let replies = replay_frames(publisher.replay_endpoint(), 0).await;
    let [first, second, last] = replies.as_slice() else {
        panic!("{} messages", replies.len());
    };
    let mut keys = Vec::new();
    for (number, piece) in [first, second].into_iter().enumerate() {
        assert_eq!(piece[0], "kv@pod-0@m@7");
        assert_eq!(*piece[1], cut.to_be_bytes());
        assert_eq!(piece[3], [0, 0, 0, number as u8, 0, 0, 0, 2].as_slice());
        for event in decode_batch(&piece[2], SourceKind::Node).unwrap().events {
            let SourceEvent::Stored(stored) = event.unwrap() else {
                panic!("an image stores");
            };
            assert_eq!(stored.tier, Tier::Host);
            keys.extend(stored.hashes.iter().map(|hash| hash.0));
        }
    }
    assert_eq!(
        keys,
        (0..blocks).filter(|key| *key != 3).collect::<Vec<_>>()
    );
    assert_eq!((last.len(), *last[1] == cut.to_be_bytes()), (3, true));
    // From the oldest batch on nothing is missing.
    assert_eq!(
        replay_frames(publisher.replay_endpoint(), cut).await.len(),
        1
    );
    assert_eq!(publisher.stats().images, 1);
}

/// Nobody but the engine knows what it holds.
#[tokio::test]
async fn an_engines_replay_has_no_image() {
    let mut config = config(Stream::Engine);
    config.replay_bytes_max = 1;
    let publisher = Publisher::bind(config).unwrap();
    for byte in 0..3 {
        publisher.publish_payload(payload(byte, 10));
    }
    assert_eq!(replay(publisher.replay_endpoint(), 0).await.len(), 1);
    assert_eq!(publisher.stats().images, 0);
}
