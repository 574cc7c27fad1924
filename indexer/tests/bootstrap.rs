//! A replica that begins where another one is, or where it was itself.
#![cfg(test)]

mod rig;

use bytes::Bytes;
use kvcache_core::event::NodeEvent;
use kvcache_core::ports::EventSink;
use kvcache_core::{ErrorKind, IndexKey, Tier};
use kvfabric_indexer::adapter::encode_engine_batch;
use kvfabric_indexer::client::{IndexClient, Prompt, SourceKind};
use kvfabric_indexer::publisher::{Publisher, PublisherConfig, Stream};
use kvfabric_indexer::server::Running;
use kvfabric_proto::v1;
use rig::*;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use zeromq::{PubSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqMessage};

/// The publisher keeps two batches only, so what the replica knows of the first block it has from its peer. The pod never
/// registered with the replica; when it does, nothing is forgotten; when that stream ends, everything is.
#[tokio::test]
async fn a_new_replica_goes_on_where_its_peer_is() {
    let first = start(config()).await;
    let engine = forgetful("pod-0");
    let client = client(&first);
    let registration = registration("pod-0", [engine.source("engine", SourceKind::Vllm)]);
    let registered = client.register(registration.clone());
    registered.ready(PATIENCE).await.unwrap();
    for block in 1..=2 {
        publish_block(&engine, block);
        until_depth_of_long(&client, block as u32).await;
    }
    publish_again(&client, &engine).await;

    let second = start(with_peer(&first)).await;
    let replica = rig::client(&second);
    wait_until_serving(&replica).await;
    assert_eq!(depth_of_long(&replica, Vec::new()).await, 2);
    publish_block(&engine, 3);
    assert_eq!(depth_of_long(&replica, at(&engine)).await, 3);
    assert_eq!(depth_of_long(&client, at(&engine)).await, 3);
    let status = replica.status().await.unwrap();
    assert_eq!(status.pods[0].sources[0].resyncs, 0, "nothing was cleared");

    let here = replica.register(registration);
    here.ready(PATIENCE).await.unwrap();
    assert_eq!(depth_of_long(&replica, Vec::new()).await, 3);
    drop(here);
    wait_until(&replica, |status| {
        status.pods.is_empty() && status.entries == 0
    })
    .await;
    assert_eq!(
        depth_of_long(&client, Vec::new()).await,
        3,
        "the peer has its own stream"
    );
}

/// The second block once more, so that the publisher forgets the batch before the last; waits until it is applied.
async fn publish_again(client: &IndexClient, engine: &Publisher) {
    publish_block(engine, 2);
    depth_of_long(client, at(engine)).await;
}

/// Engine and node sources, a shared tier whose pod is gone, and a block that waits for its parent.
#[tokio::test]
async fn everything_that_was_told_is_in_the_snapshot() {
    let first = start(config()).await;
    let client = client(&first);
    let (engine, node, gone) = (forgetful("pod-0"), node("pod-0", 7), rig::node("pod-1", 1));
    let keys = keys_of(&LONG);
    let of_node = |tier, keys: &[IndexKey]| -> Vec<NodeEvent> {
        keys.iter()
            .map(|&key| NodeEvent::Stored {
                key,
                parent: None,
                tier,
            })
            .collect()
    };
    gone.publish(of_node(Tier::Object, &keys));
    node.publish(of_node(Tier::Host, &keys[..2]));
    let leaving = join(&client, "pod-1", [gone.source("node", SourceKind::Node)]).await;
    drop(leaving);
    wait_until(&client, |status| status.pods.is_empty()).await;
    let sources = [
        engine.source("engine", SourceKind::Vllm),
        node.source("node", SourceKind::Node),
    ];
    let _registered = join(&client, "pod-0", sources).await;
    // The child before its parent, in a batch that the publisher forgets.
    publish_block(&engine, 2);
    wait_until(&client, |status| {
        let sources = status.pods.iter().flat_map(|pod| &pod.sources);
        sources.map(|source| source.orphans).sum::<u64>() == 1
    })
    .await;
    publish_again(&client, &engine).await;
    publish_again(&client, &engine).await;
    let answered = |answer: kvfabric_indexer::client::LookupAnswer| {
        let pods = answer.pods.into_iter().map(|pod| (pod.depth, pod.by_tier));
        (pods.collect::<Vec<_>>(), answer.shared_depth)
    };
    let mut asked = question(Prompt::Tokens(LONG.to_vec()));
    let before = answered(client.lookup(asked.clone()).await.unwrap());
    assert_eq!(before, (vec![(2, [0, 2, 0, 0])], 3));

    let second = start(with_peer(&first)).await;
    let replica = rig::client(&second);
    wait_until_serving(&replica).await;
    assert_eq!(
        answered(replica.lookup(asked.clone()).await.unwrap()),
        before
    );
    let orphans = |status: &v1::StatusResponse| status.pods[0].sources[0].orphans;
    assert_eq!(orphans(&replica.status().await.unwrap()), 1);
    // The parent comes, and the orphan of the snapshot finds its place.
    publish_block(&engine, 1);
    asked.min_position = at(&engine);
    let after = answered(replica.lookup(asked).await.unwrap());
    assert_eq!(after, (vec![(2, [2, 0, 0, 0])], 3));
}

/// Replicas begin while the engine goes on without a pause. Copies are counted, so a batch that was applied twice or not at
/// all leaves another number of entries behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_is_of_one_moment_however_fast_the_events_come() {
    const BATCHES: u64 = 30_000;
    const KEPT: u64 = 40;
    let first = start(config()).await;
    let engine = std::sync::Arc::new(engine("pod-0"));
    let client = client(&first);
    let _registered = join_engine(&client, "pod-0", &engine).await;
    let publishing = std::thread::spawn({
        let engine = engine.clone();
        move || {
            for hash in 0..BATCHES {
                let tokens = [hash as u32; 4];
                let mut events = vec![stored(&[hash], None, &tokens, Tier::Device)];
                if hash >= KEPT {
                    events.push(removed(&[hash - KEPT], Tier::Device));
                }
                engine.publish_engine(events);
            }
        }
    });
    let mut replicas = Vec::new();
    for _ in 0..4 {
        let replica = start(with_peer(&first)).await;
        wait_until_serving(&rig::client(&replica)).await;
        replicas.push(replica);
    }
    publishing.join().unwrap();
    replicas.push(first);
    for replica in &replicas {
        let client = rig::client(replica);
        depth_of_long(&client, at(&engine)).await;
        assert_eq!(client.status().await.unwrap().entries, KEPT);
    }
}

/// The indexer ends and starts again; the publisher keeps two batches only.
#[tokio::test]
async fn a_restarted_index_goes_on_from_its_own_disk() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("index.snapshot");
    let engine = forgetful("pod-0");
    let first = start(with_file(&path)).await;
    let client = client(&first);
    wait_until_serving(&client).await;
    let registered = join_engine(&client, "pod-0", &engine).await;
    for block in 1..=2 {
        publish_block(&engine, block);
        until_depth_of_long(&client, block as u32).await;
    }
    publish_again(&client, &engine).await;
    first.shutdown(PATIENCE).await.unwrap();
    drop(registered);

    let second = start(with_file(&path)).await;
    let replica = rig::client(&second);
    wait_until_serving(&replica).await;
    publish_block(&engine, 3);
    assert_eq!(depth_of_long(&replica, at(&engine)).await, 3);
}

/// Between the two lives of the index the engine began anew, and is past the snapshot's position already.
#[tokio::test]
async fn what_a_snapshot_says_of_another_publisher_is_never_answered() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("index.snapshot");
    let engine = engine("pod-0");
    let source = engine.source("engine", SourceKind::Vllm);
    let first = start(with_file(&path)).await;
    let client = client(&first);
    wait_until_serving(&client).await;
    let _registered = join(&client, "pod-0", [source]).await;
    publish_block(&engine, 1);
    publish_block(&engine, 2);
    publish_block(&engine, 3);
    assert_eq!(depth_of_long(&client, at(&engine)).await, 3);
    first.shutdown(PATIENCE).await.unwrap();

    let mut config = PublisherConfig::new(pod("pod-0"), "m", Stream::Engine);
    config.endpoint = engine.endpoint().to_owned();
    config.replay_endpoint = engine.replay_endpoint().to_owned();
    drop(engine);
    let reborn = Publisher::bind(config).unwrap();
    publish_block(&reborn, 1);
    for other in 0..5 {
        reborn.publish_engine(vec![stored(
            &[100 + other],
            None,
            &[7, 7, 7, 7],
            Tier::Device,
        )]);
    }
    let second = start(with_file(&path)).await;
    let replica = rig::client(&second);
    wait_until_serving(&replica).await;
    assert_eq!(depth_of_long(&replica, at(&reborn)).await, 1);
    let status = replica.status().await.unwrap();
    assert_eq!(status.pods[0].sources[0].resyncs, 1);
}

/// What probes and clients are told before and after.
async fn health(server: &Running) -> ServingStatus {
    let address = format!("http://{}", server.grpc_address());
    let channel = tonic::transport::Endpoint::from_shared(address).unwrap();
    let mut health = HealthClient::new(channel.connect().await.unwrap());
    let mut told = Vec::new();
    for service in ["", "kvfabric.v1.Index", "indexer.v1.IndexerService"] {
        let service = service.to_owned();
        let request = HealthCheckRequest { service };
        told.push(health.check(request).await.unwrap().into_inner().status());
    }
    assert!(told.iter().all(|status| *status == told[0]), "{told:?}");
    told[0]
}

async fn reply(replay: &mut RouterSocket, peer: &Bytes, number: Bytes, payload: Bytes) {
    let mut message = ZmqMessage::from(peer.clone());
    for frame in [Bytes::new(), number, payload] {
        message.push_back(frame);
    }
    replay.send(message).await.unwrap();
}

/// A publisher made by hand, whose replay socket keeps the restarted index waiting.
#[tokio::test]
async fn a_replica_that_is_not_verified_says_so_and_answers_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("index.snapshot");
    let payload = Bytes::from(encode_engine_batch(
        1.0,
        &[stored(&[1], None, &LONG[..4], Tier::Device)],
    ));
    let mut events = PubSocket::new();
    let endpoint = events.bind("tcp://127.0.0.1:0").await.unwrap().to_string();
    let mut replay = RouterSocket::new();
    let replay_endpoint = replay.bind("tcp://127.0.0.1:0").await.unwrap().to_string();
    let source = by_hand(endpoint, replay_endpoint);
    let end = || Bytes::from_static(&[0xff; 8]);
    let number = || Bytes::copy_from_slice(&0_u64.to_be_bytes());

    let first = start(with_file(&path)).await;
    let client = client(&first);
    wait_until_serving(&client).await;
    let registered = client.register(registration("pod-0", [source]));
    let peer = replay.recv().await.unwrap().into_vec()[0].clone();
    reply(&mut replay, &peer, number(), payload.clone()).await;
    reply(&mut replay, &peer, end(), Bytes::new()).await;
    registered.ready(PATIENCE).await.unwrap();
    assert_eq!(health(&first).await, ServingStatus::Serving);
    first.shutdown(PATIENCE).await.unwrap();
    drop(registered);

    let second = start(with_file(&path)).await;
    let replica = rig::client(&second);
    // The restarted index asks for the batch that it applied last; the one before it may have asked again.
    let peer = loop {
        let request = replay.recv().await.unwrap().into_vec();
        if request[0] != peer {
            assert_eq!(request[2], number());
            break request[0].clone();
        }
    };
    assert_eq!(health(&second).await, ServingStatus::NotServing);
    // The source's task may ask before the snapshot is read to its end.
    wait_until(&replica, |status| {
        status.not_serving_reason.contains("0 of 1 sources")
    })
    .await;
    let status = replica.status().await.unwrap();
    assert!(!status.serving);
    assert_eq!(
        status.entries, 1,
        "what the snapshot says is there, but not answered"
    );
    let error = replica
        .lookup(question(Prompt::Tokens(LONG.to_vec())))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PeerLost);
    assert!(error.to_string().contains("0 of 1 sources"), "{error}");
    let snapshot = v1::SnapshotRequest {
        protocol_version: kvfabric_proto::PROTOCOL_VERSION,
        format: 2,
    };
    let refused = raw(&second).await.snapshot(snapshot).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unavailable);

    reply(&mut replay, &peer, number(), payload).await;
    reply(&mut replay, &peer, end(), Bytes::new()).await;
    wait_until_serving(&replica).await;
    let probes = async {
        while health(&second).await != ServingStatus::Serving {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, probes).await.unwrap();
    assert_eq!(depth_of_long(&replica, Vec::new()).await, 1);
}
