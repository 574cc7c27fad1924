//! A real server, real publishers and real sockets on loopback, all in one process.
#![cfg(test)]

mod rig;

use std::time::Duration;

use kvcache_core::event::NodeEvent;
use kvcache_core::ports::{Directory, EventSink};
use kvcache_core::{Epoch, ErrorKind, IndexKey, Tier};
use kvfabric_indexer::client::{Prompt, SourceKind, SourcePosition};
use kvfabric_indexer::publisher::{Publisher, PublisherConfig, Stream};
use kvfabric_proto::v1;
use rig::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

/// An engine stores two blocks; the lookup waits for exactly that position.
#[tokio::test]
async fn a_lookup_at_a_position_sees_everything_published_before_it() {
    let server = start(config()).await;
    let client = client(&server);
    let engine = engine("pod-0");
    let _registered = join_engine(&client, "pod-0", &engine).await;

    let position = engine.publish_engine(vec![stored(&[1, 2], None, &TOKENS, Tier::Device)]);
    let mut question = question(Prompt::Tokens(TOKENS.to_vec()));
    question.min_position = vec![SourcePosition::new(&pod("pod-0"), "engine", position)];
    let answer = client.lookup(question.clone()).await.unwrap();
    assert_eq!(answer.blocks, 2);
    assert_eq!(answer.block_size, BLOCK);
    assert_eq!(answer.pods.len(), 1);
    assert_eq!(answer.pods[0].pod, pod("pod-0"));
    assert_eq!(answer.pods[0].depth, 2);
    assert_eq!(answer.pods[0].by_tier, [2, 0, 0, 0]);
    assert_eq!(answer.pods[0].score, 2.0);
    assert_eq!(answer.pods[0].peer_address.as_deref(), Some("127.0.0.1:9"));
    assert_eq!(answer.positions, question.min_position);

    // By keys, the answer is the same; and the directory says it in its own words.
    let keys = keys_of(&TOKENS);
    question.prompt = Prompt::Keys(keys.clone());
    assert_eq!(
        client.lookup(question.clone()).await.unwrap().pods,
        answer.pods
    );
    let located = client.locate(keys).await.unwrap();
    assert_eq!(located.holders[0].depth, 2);

    // The last block goes.
    let position = engine.publish_engine(vec![removed(&[2], Tier::Device)]);
    question.min_position = vec![SourcePosition::new(&pod("pod-0"), "engine", position)];
    assert_eq!(client.lookup(question).await.unwrap().pods[0].depth, 1);
    server.shutdown(PATIENCE).await.unwrap();
}

/// The engine's HBM and the node's DRAM, NVMe and object tiers, by one pod with two sources.
#[tokio::test]
async fn engine_and_node_tiers_of_a_pod_add_up_and_shared_tiers_stand_alone() {
    let server = start(config()).await;
    let client = client(&server);
    let engine = engine("pod-0");
    let node = node("pod-0", 5);
    let sources = [
        engine.source("engine", SourceKind::Vllm),
        node.source("node", SourceKind::Node),
    ];
    let registered = join(&client, "pod-0", sources).await;

    let keys = keys_of(&TOKENS);
    let on_device = engine.publish_engine(vec![stored(&[1], None, &TOKENS[..4], Tier::Device)]);
    let at_node = node.publish(vec![
        NodeEvent::Stored {
            key: keys[1],
            parent: Some(keys[0]),
            tier: Tier::Host,
        },
        NodeEvent::Stored {
            key: keys[0],
            parent: None,
            tier: Tier::Object,
        },
    ]);
    assert_eq!(at_node.epoch, Epoch(5));
    let mut question = question(Prompt::Keys(keys.clone()));
    question.min_position = vec![
        SourcePosition::new(&pod("pod-0"), "engine", on_device),
        SourcePosition::new(&pod("pod-0"), "node", at_node),
    ];
    let answer = client.lookup(question).await.unwrap();
    assert_eq!(answer.pods[0].by_tier, [1, 1, 0, 0]);
    assert_eq!(answer.shared_depth, 1);

    // The pod leaves: its own tiers with it, the shared one stays.
    drop(registered);
    wait_until(&client, |status| status.pods.is_empty()).await;
    let answer = client
        .lookup(rig::question(Prompt::Keys(keys)))
        .await
        .unwrap();
    assert_eq!(answer.pods, []);
    assert_eq!(answer.shared_depth, 1);
}

/// Nobody waits longer than asked, with the source named in the refusal.
#[tokio::test]
async fn a_position_that_never_comes_is_a_timeout_that_names_the_source() {
    let server = start(config()).await;
    let client = client(&server);
    let engine = engine("pod-0");
    let _registered = join_engine(&client, "pod-0", &engine).await;
    let mut beyond = engine.position();
    beyond.next.0 += 1;
    for (source, said) in [
        ("pod-0/engine", "connected, at sequence 0"),
        ("x/y", "not registered"),
    ] {
        let mut question = question(Prompt::Keys(Vec::new()));
        question.deadline = Some(Duration::from_millis(300));
        question.min_position = vec![SourcePosition {
            source: source.to_owned(),
            position: beyond,
        }];
        let error = client.lookup(question).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout);
        assert!(error.to_string().contains(source), "{error}");
        assert!(error.to_string().contains(said), "{error}");
    }
}

/// The server's own deadline, when a client of another make sends none.
#[tokio::test]
async fn a_client_without_a_deadline_gets_the_default_one() {
    let mut config = config();
    config.lookup_deadline_ms = 100;
    let server = start(config).await;
    let mut raw = raw(&server).await;
    let request = v1::LookupRequest {
        prompt: Some(v1::lookup_request::Prompt::Tokens(Vec::new().into())),
        min_position: vec![v1::SourcePosition {
            source: "nobody/engine".to_owned(),
            epoch: 0,
            next_sequence: 1,
        }],
        ..Default::default()
    };
    let status = raw.lookup(request).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::DeadlineExceeded, "{status}");
}

/// Published before anybody listened; nothing comes after it that could show a gap.
#[tokio::test]
async fn a_late_registration_replays_what_was_published_before() {
    let server = start(config()).await;
    let client = client(&server);
    let engine = engine("pod-0");
    engine.publish_engine(vec![stored(&[1], None, &TOKENS[..4], Tier::Device)]);
    engine.publish_engine(vec![stored(&[2], Some(1), &TOKENS[4..8], Tier::Device)]);
    let _registered = join_engine(&client, "pod-0", &engine).await;
    let answer = client
        .lookup(question(Prompt::Tokens(TOKENS.to_vec())))
        .await
        .unwrap();
    assert_eq!(answer.pods[0].depth, 2);
}

/// The pod's process ends: its stream closes, nothing else is said.
#[tokio::test]
async fn a_dropped_registration_removes_the_pod_and_its_entries() {
    let server = start(config()).await;
    let client = client(&server);
    let (first, second) = (engine("pod-0"), engine("pod-1"));
    let mut registrations = Vec::new();
    for (name, engine) in [("pod-0", &first), ("pod-1", &second)] {
        engine.publish_engine(vec![stored(&[1, 2], None, &TOKENS, Tier::Device)]);
        let registered = join_engine(&client, name, engine).await;
        registrations.push(registered);
    }
    let prompt = || question(Prompt::Tokens(TOKENS.to_vec()));
    assert_eq!(client.lookup(prompt()).await.unwrap().pods.len(), 2);
    drop(registrations.remove(0));
    wait_until(&client, |status| status.pods.len() == 1).await;
    let answer = client.lookup(prompt()).await.unwrap();
    assert_eq!(answer.pods.len(), 1);
    assert_eq!(answer.pods[0].pod, pod("pod-1"));
    assert_eq!(client.status().await.unwrap().entries, 2);
}

/// The pod has left, but its engine goes on: what it says is nobody's any more.
#[tokio::test]
async fn events_of_a_pod_that_left_are_not_applied() {
    let server = start(config()).await;
    let client = client(&server);
    let (gone, other) = (engine("pod-0"), engine("pod-1"));
    let registered = join_engine(&client, "pod-0", &gone).await;
    for hash in 0..500 {
        gone.publish_engine(vec![stored(&[hash], None, &[hash as u32; 4], Tier::Device)]);
    }
    drop(registered);
    wait_until(&client, |status| status.pods.is_empty()).await;
    let applied = client.status().await.unwrap().events_applied;
    for hash in 500..1000 {
        gone.publish_engine(vec![stored(&[hash], None, &[hash as u32; 4], Tier::Device)]);
    }
    // Another pod is followed from beginning to end meanwhile.
    other.publish_engine(vec![stored(&[1], None, &TOKENS[..4], Tier::Device)]);
    let _registered = join_engine(&client, "pod-1", &other).await;
    let status = client.status().await.unwrap();
    assert_eq!((status.entries, status.events_applied), (1, applied + 1));
}

/// The pod has left: its engine is not connected to any more.
#[tokio::test]
async fn a_pod_that_left_is_not_followed_any_more() {
    let server = start(config()).await;
    let client = client(&server);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut source = by_hand(
        format!("tcp://{}", listener.local_addr().unwrap()),
        String::new(),
    );
    source.replay_endpoint = None;
    let registered = client.register(registration("pod-0", [source]));
    let (mut followed, _) = listener.accept().await.unwrap();
    let mut handshake = vec![0; 64];
    (handshake[0], handshake[9], handshake[10]) = (0xff, 0x7f, 3);
    handshake[12..16].copy_from_slice(b"NULL");
    handshake.extend(b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03PUB");
    followed.write_all(&handshake).await.unwrap();
    registered.ready(PATIENCE).await.unwrap();
    drop(registered);
    let ended = async {
        let mut sink = [0; 4096];
        while followed.read(&mut sink).await.is_ok_and(|read| read > 0) {}
    };
    tokio::time::timeout(PATIENCE, ended)
        .await
        .expect("it is still followed");
}

/// The second registration of a name is the one that counts; the first learns of it.
#[tokio::test]
async fn a_pod_that_registers_anew_replaces_its_old_self() {
    let server = start(config()).await;
    let client = client(&server);
    let (old, new) = (engine("pod-0"), engine("pod-0"));
    old.publish_engine(vec![stored(&[1, 2], None, &TOKENS, Tier::Device)]);
    new.publish_engine(vec![stored(&[1], None, &TOKENS[..4], Tier::Device)]);
    let mut raw = raw(&server).await;
    let request = wire_registration("pod-0", &old);
    let (_keep, mut stream) = register_raw(&mut raw, request).await.unwrap();
    while !stream.message().await.unwrap().unwrap().ready {}

    let _registered = join_engine(&client, "pod-0", &new).await;
    let status = stream.message().await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Aborted);
    let answer = client
        .lookup(question(Prompt::Tokens(TOKENS.to_vec())))
        .await
        .unwrap();
    assert_eq!(answer.pods[0].depth, 1);
}

/// Everything a registration can get wrong, each refused with the words that matter.
#[tokio::test]
async fn a_registration_that_does_not_fit_is_refused_with_the_reason() {
    let server = start(config()).await;
    let engine = engine("pod-0");
    type Break = fn(&mut v1::RegisterRequest);
    let wrongs: [(Break, &str, tonic::Code); 9] = [
        (
            |r| r.protocol_version = 77,
            "version 77",
            tonic::Code::FailedPrecondition,
        ),
        (
            |r| r.pod = "a b".to_owned(),
            "a b",
            tonic::Code::InvalidArgument,
        ),
        (|r| r.block_size = 999, "999", tonic::Code::InvalidArgument),
        (
            |r| r.key_scheme = "xxh3:9".to_owned(),
            "xxh3:9",
            tonic::Code::InvalidArgument,
        ),
        (
            |r| r.sources.clear(),
            "0 sources",
            tonic::Code::InvalidArgument,
        ),
        (
            |r| r.sources.push(r.sources[0].clone()),
            "twice",
            tonic::Code::InvalidArgument,
        ),
        (
            |r| r.sources[0].kind = 99,
            "99",
            tonic::Code::InvalidArgument,
        ),
        (
            |r| r.sources[0].name = "a/b".to_owned(),
            "a/b",
            tonic::Code::InvalidArgument,
        ),
        (
            |r| r.sources[0].endpoint = "udp://x".to_owned(),
            "udp://x",
            tonic::Code::InvalidArgument,
        ),
    ];
    for (make_wrong, said, code) in wrongs {
        let mut request = wire_registration("pod-0", &engine);
        make_wrong(&mut request);
        let status = register_raw(&mut raw(&server).await, request)
            .await
            .unwrap_err();
        assert_eq!(status.code(), code, "{status}");
        assert!(
            status.message().contains(said),
            "{said:?} is not in {status}"
        );
    }
    // The client turns it into its own error at once, however long it was ready to wait.
    let mut registration = registration("pod-0", [engine.source("engine", SourceKind::Vllm)]);
    registration.block_size = 999;
    let error = client(&server)
        .register(registration)
        .ready(PATIENCE)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

/// The index restarts on the same port; the pod comes back by itself.
#[tokio::test]
async fn a_restarted_index_gets_its_pods_back() {
    let first = start(config()).await;
    let mut again = config();
    again.grpc_listen = first.grpc_address();
    let client = client(&first);
    let engine = engine("pod-0");
    engine.publish_engine(vec![stored(&[1], None, &TOKENS[..4], Tier::Device)]);
    let _registered = join_engine(&client, "pod-0", &engine).await;
    first.shutdown(PATIENCE).await.unwrap();
    let error = client
        .lookup(question(Prompt::Tokens(TOKENS.to_vec())))
        .await
        .unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::PeerLost | ErrorKind::Io),
        "{error:?}"
    );

    let _second = start(again).await;
    let mut asked = question(Prompt::Tokens(TOKENS.to_vec()));
    asked.min_position = vec![SourcePosition::new(
        &pod("pod-0"),
        "engine",
        engine.position(),
    )];
    asked.deadline = Some(PATIENCE);
    // The first attempts may still meet the closed port.
    let answer = tokio::time::timeout(PATIENCE, async {
        loop {
            if let Ok(answer) = client.lookup(asked.clone()).await {
                return answer;
            }
            tokio::task::yield_now().await;
        }
    });
    assert_eq!(answer.await.unwrap().pods[0].depth, 1);
}

/// Two models on one server do not see each other's blocks, and none of them is meant by no name.
#[tokio::test]
async fn models_are_kept_apart() {
    let server = start(config()).await;
    let client = client(&server);
    let mut kept = Vec::new();
    for (name, model) in [("pod-0", "m"), ("pod-1", "other")] {
        let mut config = PublisherConfig::new(pod(name), model, Stream::Engine);
        config.replay_bytes_max = 1 << 20;
        let engine = Publisher::bind(config).unwrap();
        engine.publish_engine(vec![stored(&[1], None, &TOKENS[..4], Tier::Device)]);
        let mut registration = registration(name, [engine.source("engine", SourceKind::Vllm)]);
        registration.model = model.to_owned();
        let registered = client.register(registration);
        registered.ready(PATIENCE).await.unwrap();
        kept.push((engine, registered));
    }
    let prompt = || Prompt::Tokens(TOKENS.to_vec());
    let mut asked = question(prompt());
    asked.model = "other".to_owned();
    let answer = client.lookup(asked.clone()).await.unwrap();
    assert_eq!(answer.pods.len(), 1);
    assert_eq!(answer.pods[0].pod, pod("pod-1"));
    asked.model = "unheard-of".to_owned();
    assert_eq!(client.lookup(asked.clone()).await.unwrap().pods, []);
    asked.model = String::new();
    let error = client.lookup(asked).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("2 models"), "{error}");
}

/// Pod filter, limit, and prompts that are none.
#[tokio::test]
async fn questions_are_narrowed_and_malformed_ones_refused() {
    let server = start(config()).await;
    let client = client(&server);
    let mut kept = Vec::new();
    for (name, depth) in [("pod-0", 1), ("pod-1", 2)] {
        let engine = engine(name);
        let hashes = &[1, 2][..depth];
        engine.publish_engine(vec![stored(
            hashes,
            None,
            &TOKENS[..4 * depth],
            Tier::Device,
        )]);
        let registered = join_engine(&client, name, &engine).await;
        kept.push((engine, registered));
    }
    let mut asked = question(Prompt::Tokens(TOKENS.to_vec()));
    asked.pods_max = 1;
    assert_eq!(
        client.lookup(asked.clone()).await.unwrap().pods[0].pod,
        pod("pod-1")
    );
    asked.pods = vec![pod("pod-0"), pod("stranger")];
    let answer = client.lookup(asked).await.unwrap();
    assert_eq!(answer.pods[0].pod, pod("pod-0"));
    assert_eq!(answer.positions.len(), 1);

    let tokens = v1::lookup_request::Prompt::Tokens(vec![1, 2, 3].into());
    for (prompt, said) in [(Some(tokens), "3 bytes"), (None, "prompt")] {
        let request = v1::LookupRequest {
            prompt,
            ..Default::default()
        };
        let status = raw(&server).await.lookup(request).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
        assert!(status.message().contains(said), "{status}");
    }
    let chain = vec![IndexKey(1); 3];
    let unknown = client.lookup(question(Prompt::Keys(chain))).await.unwrap();
    assert_eq!((unknown.blocks, unknown.pods.len()), (3, 0));
}
