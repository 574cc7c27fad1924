//! Publishers that restart, lose batches, come late or never come back.
#![cfg(test)]

mod rig;

use bytes::Bytes;
use kvcache_core::Tier;
use kvcache_core::event::NodeEvent;
use kvcache_core::ports::EventSink;
use kvfabric_indexer::adapter::{encode_engine_batch, encode_node_batch};
use kvfabric_indexer::client::{IndexClient, Prompt, SourceKind, SourcePosition};
use kvfabric_indexer::config::StaticSource;
use kvfabric_indexer::publisher::{Publisher, PublisherConfig, Stream};
use rig::*;
use zeromq::{PubSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqMessage};

/// The same bytes every time, so that a publisher can be brought back as it was.
fn batch(hash: u64, parent: Option<u64>, tokens: &[u32]) -> Vec<u8> {
    encode_engine_batch(1.5, &[stored(&[hash], parent, tokens, Tier::Device)])
}

/// A publisher in the place of another.
fn reborn(old: Publisher) -> Publisher {
    let mut config = PublisherConfig::new(pod("pod-0"), "m", Stream::Engine);
    config.endpoint = old.endpoint().to_owned();
    config.replay_endpoint = old.replay_endpoint().to_owned();
    drop(old);
    Publisher::bind(config).unwrap()
}

async fn depth(client: &IndexClient, positions: Vec<SourcePosition>) -> u32 {
    let mut question = question(Prompt::Tokens(TOKENS.to_vec()));
    question.min_position = positions;
    client
        .lookup(question)
        .await
        .unwrap()
        .pods
        .first()
        .map_or(0, |pod| pod.depth)
}

fn at(engine: &Publisher) -> Vec<SourcePosition> {
    vec![SourcePosition::new(
        &pod("pod-0"),
        "engine",
        engine.position(),
    )]
}

/// Connection lost, publisher the same (its batches are byte for byte those of before): nothing is forgotten.
#[tokio::test]
async fn a_publisher_that_comes_back_with_the_same_batches_keeps_its_entries() {
    let server = start(config()).await;
    let client = client(&server);
    let engine = engine("pod-0");
    engine.publish_payload(batch(1, None, &TOKENS[..4]));
    let _registered = join_engine(&client, "pod-0", &engine).await;

    let engine = reborn(engine);
    engine.publish_payload(batch(1, None, &TOKENS[..4]));
    engine.publish_payload(batch(2, Some(1), &TOKENS[4..]));
    assert_eq!(depth(&client, at(&engine)).await, 2);
    let status = client.status().await.unwrap();
    assert_eq!(status.pods[0].sources[0].resyncs, 0);
}

/// The new publisher's sequence is already past the old one's when the index sees it: only the bytes tell.
#[tokio::test]
async fn a_publisher_that_comes_back_with_other_batches_is_begun_anew() {
    let server = start(config()).await;
    let client = client(&server);
    let engine = engine("pod-0");
    engine.publish_payload(batch(1, None, &TOKENS[..4]));
    engine.publish_payload(batch(2, Some(1), &TOKENS[4..]));
    let _registered = join_engine(&client, "pod-0", &engine).await;
    assert_eq!(depth(&client, Vec::new()).await, 2);

    let engine = reborn(engine);
    for filler in 100..103 {
        engine.publish_payload(batch(filler, None, &[7, 7, 7, filler as u32]));
    }
    engine.publish_payload(batch(9, None, &TOKENS[..4]));
    assert_eq!(depth(&client, at(&engine)).await, 1);
    let status = client.status().await.unwrap();
    assert_eq!(status.pods[0].sources[0].resyncs, 1);
    assert_eq!(status.entries, 4);
}

/// A node says itself that it began anew.
#[tokio::test]
async fn a_node_with_a_new_epoch_is_begun_anew() {
    let server = start(config()).await;
    let client = client(&server);
    let keys = keys_of(&TOKENS);
    let old = node("pod-0", 1);
    let held = |key| NodeEvent::Stored {
        key,
        parent: None,
        tier: Tier::Host,
    };
    old.publish(vec![held(keys[0]), held(keys[1])]);
    let _registered = join(&client, "pod-0", [old.source("node", SourceKind::Node)]).await;
    assert_eq!(depth(&client, Vec::new()).await, 2);

    let stream = Stream::Node {
        epoch: kvcache_core::Epoch(2),
    };
    let mut config = PublisherConfig::new(pod("pod-0"), "m", stream);
    config.endpoint = old.endpoint().to_owned();
    config.replay_endpoint = old.replay_endpoint().to_owned();
    drop(old);
    let new = Publisher::bind(config).unwrap();
    let position = new.publish(vec![held(keys[0])]);
    let position = SourcePosition::new(&pod("pod-0"), "node", position);
    assert_eq!(depth(&client, vec![position]).await, 1);
}

/// The same publisher, but it keeps one batch only: those between are lost, removals perhaps among them.
#[tokio::test]
async fn a_replay_that_is_too_old_clears_the_source() {
    let server = start(config()).await;
    let client = client(&server);
    let engine = engine("pod-0");
    engine.publish_payload(batch(1, None, &TOKENS[..4]));
    let _registered = join_engine(&client, "pod-0", &engine).await;
    assert_eq!(depth(&client, at(&engine)).await, 1);

    let mut config = PublisherConfig::new(pod("pod-0"), "m", Stream::Engine);
    config.endpoint = engine.endpoint().to_owned();
    config.replay_endpoint = engine.replay_endpoint().to_owned();
    config.replay_bytes_max = 1;
    drop(engine);
    let engine = Publisher::bind(config).unwrap();
    engine.publish_payload(batch(1, None, &TOKENS[..4]));
    engine.publish_engine(vec![removed(&[1], Tier::Device)]);
    engine.publish_payload(batch(9, None, &[9, 9, 9, 9]));
    assert_eq!(depth(&client, at(&engine)).await, 0, "the removal was lost");
    let status = client.status().await.unwrap();
    assert_eq!((status.entries, status.pods[0].sources[0].resyncs), (1, 1));
}

/// A node's publisher in the place of another, with the same epoch: the same incarnation as far as anybody can tell.
fn node_again(old: Option<Publisher>, replay_bytes_max: usize) -> Publisher {
    let epoch = kvcache_core::Epoch(7);
    let mut config = PublisherConfig::new(pod("pod-0"), "m", Stream::Node { epoch });
    config.replay_bytes_max = replay_bytes_max;
    if let Some(old) = &old {
        config.endpoint = old.endpoint().to_owned();
        config.replay_endpoint = old.replay_endpoint().to_owned();
    }
    drop(old);
    Publisher::bind(config).unwrap()
}

fn node_batch(events: &[NodeEvent]) -> Vec<u8> {
    encode_node_batch(1.5, events)
}

/// While the index was away the node published more than it keeps, removals among it: its own image tells what it holds,
/// and what it held all along is answered throughout.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_replay_is_too_old_tells_what_it_holds() {
    let server = start(config()).await;
    let client = client(&server);
    let keys = keys_of(&TOKENS);
    let held = |key, tier| NodeEvent::Stored {
        key,
        parent: None,
        tier,
    };
    let first = node_batch(&[held(keys[0], Tier::Host), held(keys[1], Tier::Host)]);
    let node = node_again(None, 1 << 20);
    node.publish_payload(first.clone());
    let _registered = join(&client, "pod-0", [node.source("node", SourceKind::Node)]).await;
    assert_eq!(depth(&client, Vec::new()).await, 2);

    let (stop, mut stopped) = tokio::sync::oneshot::channel::<()>();
    let watching = {
        let client = rig::client(&server);
        tokio::spawn(async move {
            let mut looked = 0_u64;
            while stopped.try_recv().is_err() {
                assert!(
                    depth(&client, Vec::new()).await >= 1,
                    "a half state was seen"
                );
                looked += 1;
            }
            looked
        })
    };
    let node = node_again(Some(node), 1);
    node.publish_payload(first);
    let gone = NodeEvent::Removed {
        key: keys[1],
        tier: Tier::Host,
    };
    node.publish_payload(node_batch(&[gone]));
    node.publish_payload(node_batch(&[held(kvcache_core::IndexKey(5), Tier::Disk)]));
    let position = node.publish(vec![held(kvcache_core::IndexKey(6), Tier::Disk)]);
    let position = SourcePosition::new(&pod("pod-0"), "node", position);
    assert_eq!(depth(&client, vec![position]).await, 1);
    stop.send(()).unwrap();
    assert!(watching.await.unwrap() > 0);
    let status = client.status().await.unwrap();
    assert_eq!((status.entries, status.pods[0].sources[0].resyncs), (3, 0));
}

/// The index comes when the node keeps its last batch only.
#[tokio::test]
async fn a_newcomer_learns_all_that_a_node_holds() {
    let keys = keys_of(&TOKENS);
    let node = node_again(None, 1);
    for key in &keys {
        node.publish(vec![NodeEvent::Stored {
            key: *key,
            parent: None,
            tier: Tier::Host,
        }]);
    }
    let server = start(config()).await;
    let client = client(&server);
    let _registered = join(&client, "pod-0", [node.source("node", SourceKind::Node)]).await;
    assert_eq!(depth(&client, Vec::new()).await, 2);
}

/// A publisher made by hand that leaves a batch out, as a full queue does, and answers as engines before 0.26 do.
#[tokio::test]
async fn a_gap_is_filled_from_the_replay_socket() {
    let mut events = PubSocket::new();
    let endpoint = events.bind("tcp://127.0.0.1:0").await.unwrap().to_string();
    let mut replay = RouterSocket::new();
    let replay_endpoint = replay.bind("tcp://127.0.0.1:0").await.unwrap().to_string();
    let batches = [
        batch(1, None, &TOKENS[..4]),
        batch(2, Some(1), &TOKENS[4..]),
        batch(3, None, &[9; 4]),
    ];

    let server = start(config()).await;
    let client = client(&server);
    let source = by_hand(endpoint, replay_endpoint);
    let registered = client.register(registration("pod-0", [source]));

    // What was published so far: nothing at first, everything from the first live batch on.
    let published = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let answering = {
        let (published, batches) = (published.clone(), batches.clone());
        tokio::spawn(async move {
            loop {
                let request = replay.recv().await.unwrap().into_vec();
                let from = u64::from_be_bytes(request[2].as_ref().try_into().unwrap()) as usize;
                let end = published.load(std::sync::atomic::Ordering::SeqCst);
                for (sequence, payload) in batches.iter().enumerate().take(end).skip(from) {
                    let sequence = Bytes::copy_from_slice(&(sequence as u64).to_be_bytes());
                    let payload = Bytes::from(payload.clone());
                    reply(&mut replay, &request[0], sequence, payload).await;
                }
                reply(
                    &mut replay,
                    &request[0],
                    Bytes::from_static(&[0xff; 8]),
                    Bytes::new(),
                )
                .await;
            }
        })
    };
    registered.ready(PATIENCE).await.unwrap();
    published.store(3, std::sync::atomic::Ordering::SeqCst);
    // Batches 0 and 1 are never sent live.
    let mut live = ZmqMessage::from("kv@pod-0@m");
    live.push_back(Bytes::copy_from_slice(&2_u64.to_be_bytes()));
    live.push_back(Bytes::from(batches[2].clone()));
    events.send(live).await.unwrap();
    let position = kvcache_core::ports::Position {
        epoch: kvcache_core::Epoch(0),
        next: kvcache_core::Sequence(3),
    };
    let position = SourcePosition::new(&pod("pod-0"), "engine", position);
    assert_eq!(depth(&client, vec![position]).await, 2);
    assert_eq!(client.status().await.unwrap().events_applied, 3);
    answering.abort();
}

/// The last batch never comes live, the probe after the connect is over when it is published, and the source is not silent:
/// it is asked for because a lookup waits for it.
#[tokio::test]
async fn a_lookup_at_a_position_gets_a_tail_that_never_came() {
    let mut events = PubSocket::new();
    let endpoint = events.bind("tcp://127.0.0.1:0").await.unwrap().to_string();
    let mut replay = RouterSocket::new();
    let replay_endpoint = replay.bind("tcp://127.0.0.1:0").await.unwrap().to_string();
    let batches = [
        batch(1, None, &TOKENS[..4]),
        batch(2, Some(1), &TOKENS[4..]),
    ];
    let mut live = ZmqMessage::from("kv@pod-0@m");
    live.push_back(Bytes::copy_from_slice(&0_u64.to_be_bytes()));
    live.push_back(Bytes::from(batches[0].clone()));
    let answering = tokio::spawn(async move {
        for asked in 0_u64.. {
            let request = replay.recv().await.unwrap().into_vec();
            let from = u64::from_be_bytes(request[2].as_ref().try_into().unwrap());
            let end = if asked < 2 { 1 } else { 2 };
            for number in from..end {
                let payload = Bytes::from(batches[number as usize].clone());
                let number = Bytes::copy_from_slice(&number.to_be_bytes());
                reply(&mut replay, &request[0], number, payload).await;
            }
            let end = Bytes::from_static(&[0xff; 8]);
            reply(&mut replay, &request[0], end, Bytes::new()).await;
        }
    });

    let server = start(config()).await;
    let client = client(&server);
    let source = by_hand(endpoint, replay_endpoint);
    let _registered = join(&client, "pod-0", [source]).await;
    wait_until(&client, |status| status.pods[0].sources[0].replays >= 2).await;
    let saying = async {
        loop {
            events.send(live.clone()).await.unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    let position = kvcache_core::ports::Position {
        epoch: kvcache_core::Epoch(0),
        next: kvcache_core::Sequence(2),
    };
    let position = SourcePosition::new(&pod("pod-0"), "engine", position);
    tokio::select! {
        () = saying => {}
        depth = depth(&client, vec![position]) => assert_eq!(depth, 2),
    }
    answering.abort();
}

async fn reply(replay: &mut RouterSocket, peer: &Bytes, sequence: Bytes, payload: Bytes) {
    let mut message = ZmqMessage::from(peer.clone());
    for frame in [Bytes::new(), sequence, payload] {
        message.push_back(frame);
    }
    replay.send(message).await.unwrap();
}

/// The registration stream stays open, but the publisher is gone for good.
#[tokio::test]
async fn a_source_that_does_not_come_back_is_forgotten_after_its_ttl() {
    let mut config = config();
    config.source_ttl_ms = 200;
    let server = start(config).await;
    let client = client(&server);
    let engine = engine("pod-0");
    engine.publish_payload(batch(1, None, &TOKENS[..4]));
    let _registered = join_engine(&client, "pod-0", &engine).await;
    assert_eq!(client.status().await.unwrap().entries, 1);
    let endpoints = (
        engine.endpoint().to_owned(),
        engine.replay_endpoint().to_owned(),
    );
    drop(engine);
    wait_until(&client, |status| status.entries == 0).await;
    assert_eq!(client.status().await.unwrap().pods.len(), 1);

    // And when it does come back, it is followed again.
    let mut config = PublisherConfig::new(pod("pod-0"), "m", Stream::Engine);
    (config.endpoint, config.replay_endpoint) = endpoints;
    let engine = Publisher::bind(config).unwrap();
    engine.publish_payload(batch(1, None, &TOKENS[..4]));
    engine.publish_payload(batch(2, Some(1), &TOKENS[4..]));
    assert_eq!(depth(&client, at(&engine)).await, 2);
}

/// Configured from the start, connected when it appears; a registration may not take its name.
#[tokio::test]
async fn a_configured_source_is_followed_without_registration() {
    let engine = engine("pod-0");
    let mut config = config();
    config.sources.push(StaticSource {
        pod: "pod-0".to_owned(),
        name: "engine".to_owned(),
        kind: "vllm".to_owned(),
        endpoint: engine.endpoint().to_owned(),
        replay_endpoint: Some(engine.replay_endpoint().to_owned()),
        model: "m".to_owned(),
        peer_address: None,
        data_parallel_rank: None,
        data_parallel_size: None,
        pool_for: Vec::new(),
        engine_block_size: None,
        groups: Vec::new(),
    });
    let server = start(config).await;
    let client = client(&server);
    engine.publish_payload(batch(1, None, &TOKENS[..4]));
    assert_eq!(depth(&client, at(&engine)).await, 1);

    let source = engine.source("engine", SourceKind::Vllm);
    let error = client
        .register(registration("pod-0", [source]))
        .ready(PATIENCE)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("configuration"), "{error}");
}
