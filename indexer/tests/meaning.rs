//! What answers say of ranks, cache groups, larger blocks, routing decisions and engines that publish nothing: a real
//! server and real sockets, payloads as vLLM makes them.
#![cfg(test)]

mod rig;

use std::time::Duration;

use kvcache_core::ports::{Directory, Position};
use kvcache_core::{ErrorKind, Tier};
use kvfabric_indexer::client::{
    CacheGroup, GroupRule, IndexClient, LookupAnswer, LookupOptions, Prompt, SourceKind,
    SourcePosition, SourceSpec,
};
use kvfabric_indexer::config::StaticSource;
use kvfabric_indexer::publisher::{Publisher, PublisherConfig, Stream};
use kvfabric_indexer::server::Running;
use kvfabric_proto::v1;
use rig::*;
use rmpv::Value;

/// One event of a batch.
enum Told<'a> {
    /// Hashes, how many tokens of [`TOKENS`] they and what was left out have, tokens a block, and the group with its kind
    /// and window.
    Stored(&'a [u64], usize, u32, Option<(u32, &'a str, Option<u32>)>),
    Removed(&'a [u64], Option<u32>),
}

fn payload(rank: u32, events: &[Told<'_>]) -> Vec<u8> {
    let hashes = |hashes: &[u64]| Value::Array(hashes.iter().map(|hash| (*hash).into()).collect());
    let map = |fields: Vec<(&str, Value)>| {
        Value::Map(
            fields
                .into_iter()
                .map(|(name, value)| (name.into(), value))
                .collect(),
        )
    };
    let number = |number: Option<u32>| number.map_or(Value::Nil, Value::from);
    let events = events.iter().map(|event| match event {
        Told::Stored(blocks, tokens, block_size, group) => map(vec![
            ("type", "BlockStored".into()),
            ("block_hashes", hashes(blocks)),
            ("parent_block_hash", Value::Nil),
            (
                "token_ids",
                Value::Array(
                    TOKENS[..*tokens]
                        .iter()
                        .map(|token| (*token).into())
                        .collect(),
                ),
            ),
            ("block_size", (*block_size).into()),
            ("lora_id", Value::Nil),
            ("medium", "GPU".into()),
            ("lora_name", Value::Nil),
            ("group_idx", number(group.map(|(group, ..)| group))),
            (
                "kv_cache_spec_kind",
                group.map_or(Value::Nil, |(_, kind, _)| kind.into()),
            ),
            (
                "kv_cache_spec_sliding_window",
                number(group.and_then(|(.., window)| window)),
            ),
        ]),
        Told::Removed(blocks, group) => map(vec![
            ("type", "BlockRemoved".into()),
            ("block_hashes", hashes(blocks)),
            ("medium", "GPU".into()),
            ("group_idx", number(*group)),
        ]),
    });
    let batch = Value::Array(vec![
        1.0.into(),
        Value::Array(events.collect()),
        rank.into(),
    ]);
    let mut bytes = Vec::new();
    rmpv::encode::write_value(&mut bytes, &batch).unwrap();
    bytes
}

async fn ask(client: &IndexClient, at: &[(&str, Position)]) -> LookupAnswer {
    let mut question = question(Prompt::Tokens(TOKENS.to_vec()));
    let position = |(source, position): &(&str, Position)| {
        let (pod_name, source) = source.split_once('/').unwrap();
        SourcePosition::new(&pod(pod_name), source, *position)
    };
    question.min_position = at.iter().map(position).collect();
    let options = LookupOptions {
        explain: true,
        ..LookupOptions::default()
    };
    client.lookup_with(question, options).await.unwrap()
}

/// Rank 0 has the first block, rank 1 the second: no request finds both.
#[tokio::test]
async fn a_pod_is_as_deep_as_its_deepest_rank_and_the_answer_names_the_ranks() {
    let server = start(config()).await;
    let client = client(&server);
    let (first, second) = (engine("pod-0"), engine("pod-0"));
    let sources = [
        first.source("dp0", SourceKind::Vllm),
        SourceSpec {
            data_parallel_rank: Some(1),
            ..second.source("dp1", SourceKind::Vllm)
        },
    ];
    let _registered = join(&client, "pod-0", sources).await;
    let at_first = first.publish_payload(payload(0, &[Told::Stored(&[1], 4, 4, None)]));
    let both = Told::Stored(&[1, 2], 8, 4, None);
    let at_second = second.publish_payload(payload(1, &[both, Told::Removed(&[1], None)]));
    let at = [("pod-0/dp0", at_first), ("pod-0/dp1", at_second)];
    let answer = ask(&client, &at).await;
    assert_eq!((answer.pods.len(), answer.pods[0].depth), (1, 1));
    let parts: Vec<_> = answer.pods[0]
        .parts
        .iter()
        .map(|part| (part.rank, part.depth))
        .collect();
    assert_eq!(parts, [(Some(0), 1)]);

    let whole = second.publish_payload(payload(1, &[Told::Stored(&[1, 2], 8, 4, None)]));
    let answer = ask(&client, &[("pod-0/dp1", whole)]).await;
    let parts: Vec<_> = answer.pods[0]
        .parts
        .iter()
        .map(|part| (part.rank, part.depth))
        .collect();
    assert_eq!(
        (answer.pods[0].depth, parts),
        (2, vec![(Some(0), 1), (Some(1), 2)])
    );

    // Another rank's events on this rank's socket.
    let rejected = client.status().await.unwrap().events_rejected;
    let stray = second.publish_payload(payload(0, &[Told::Removed(&[1, 2], None)]));
    assert_eq!(ask(&client, &[("pod-0/dp1", stray)]).await.pods[0].depth, 2);
    assert_eq!(client.status().await.unwrap().events_rejected, rejected + 1);
    server.shutdown(PATIENCE).await.unwrap();
}

/// A window of five tokens needs one block of four; vLLM sends all tokens, but hashes only of the blocks it keeps.
#[tokio::test]
async fn a_hybrid_models_prefix_counts_as_far_as_each_group_allows() {
    let server = start(config()).await;
    let client = client(&server);
    let engine = engine("pod-0");
    let window = |hashes| Told::Stored(hashes, 8, 4, Some((0, "sliding_window", Some(5))));
    let full = |hashes| Told::Stored(hashes, 8, 4, Some((1, "full_attention", None)));
    let state = CacheGroup {
        number: 2,
        rule: GroupRule::State,
        block_size: 4,
    };
    let source = SourceSpec {
        groups: vec![state],
        ..engine.source("engine", SourceKind::Vllm)
    };
    let _registered = join(&client, "pod-0", [source]).await;

    // The window's event comes before the group is known by whose blocks its own are placed.
    let at = engine.publish_payload(payload(0, &[window(&[2]), full(&[1, 2])]));
    let answer = ask(&client, &[("pod-0/engine", at)]).await;
    assert_eq!(answer.pods, [], "no state was told yet");
    let state = |hashes| Told::Stored(hashes, 8, 4, Some((2, "mamba", None)));
    let at = engine.publish_payload(payload(0, &[state(&[2])]));
    let answer = ask(&client, &[("pod-0/engine", at)]).await;
    assert_eq!(
        (answer.pods[0].depth, answer.pods[0].by_tier),
        (2, [2, 0, 0, 0])
    );
    let groups = &answer.pods[0].parts[0].groups;
    let groups: Vec<_> = groups
        .iter()
        .map(|(group, depth)| (group.number, group.rule, *depth))
        .collect();
    let rules = [
        GroupRule::Window { tokens: 5 },
        GroupRule::Full,
        GroupRule::State,
    ];
    assert_eq!(
        groups,
        [(0, rules[0], 2), (1, rules[1], 2), (2, rules[2], 2)]
    );

    // The same hash leaves one group, and stays in the others.
    let at = engine.publish_payload(payload(0, &[Told::Removed(&[2], Some(0)), state(&[1])]));
    assert_eq!(ask(&client, &[("pod-0/engine", at)]).await.pods, []);
    let at = engine.publish_payload(payload(0, &[window(&[1])]));
    assert_eq!(ask(&client, &[("pod-0/engine", at)]).await.pods[0].depth, 1);
    server.shutdown(PATIENCE).await.unwrap();
}

/// Blocks of 4, of 8 and of 2 tokens in one answer; and of 6, which fit no whole number of times.
#[tokio::test]
async fn engines_with_other_block_sizes_are_answered_in_whole_blocks() {
    let server = start(config()).await;
    let client = client(&server);
    let (small, large) = (engine("small"), engine("large"));
    let one = client.register(registration(
        "small",
        [small.source("engine", SourceKind::Vllm)],
    ));
    let mut registration_large = registration("large", [large.source("engine", SourceKind::Vllm)]);
    registration_large.block_size = 8;
    let other = client.register(registration_large.clone());
    one.ready(PATIENCE).await.unwrap();
    other.ready(PATIENCE).await.unwrap();
    let at_small = small.publish_payload(payload(0, &[Told::Stored(&[1, 2], 8, 4, None)]));
    let at_large = large.publish_payload(payload(0, &[Told::Stored(&[7], 8, 8, None)]));
    let at = [("small/engine", at_small), ("large/engine", at_large)];
    let answer = ask(&client, &at).await;
    let depths = |answer: &LookupAnswer| -> Vec<(String, u32)> {
        let pods = answer.pods.iter();
        pods.map(|pod| (pod.pod.to_string(), pod.depth)).collect()
    };
    assert_eq!(
        depths(&answer),
        [("large".to_owned(), 2), ("small".to_owned(), 2)]
    );
    // Of half a block nothing can be had.
    let half = client
        .lookup(question(Prompt::Tokens(TOKENS[..4].to_vec())))
        .await
        .unwrap();
    assert_eq!(depths(&half), [("small".to_owned(), 1)]);
    let at = large.publish_payload(payload(0, &[Told::Removed(&[7], None)]));
    assert_eq!(
        depths(&ask(&client, &[("large/engine", at)]).await),
        [("small".to_owned(), 2)]
    );

    // Of 2 tokens: a block of the index is there when both its parts are.
    let tiny = engine("tiny");
    let mut registration_tiny = registration("tiny", [tiny.source("engine", SourceKind::Vllm)]);
    registration_tiny.block_size = 2;
    let registered = client.register(registration_tiny);
    registered.ready(PATIENCE).await.unwrap();
    for (told, depth) in [
        (Told::Stored(&[21, 22, 23], 6, 2, None), 1),
        (Told::Stored(&[21, 22, 23, 24], 8, 2, None), 2),
        (Told::Removed(&[23], None), 2),
        (Told::Removed(&[24], None), 1),
        (Told::Removed(&[21, 21], None), 0),
    ] {
        let at = tiny.publish_payload(payload(0, &[told]));
        let answer = ask(&client, &[("tiny/engine", at)]).await;
        let found = answer.pods.iter().find(|pod| pod.pod.as_str() == "tiny");
        assert_eq!(found.map_or(0, |pod| pod.depth), depth);
    }

    let mut raw = raw(&server).await;
    let mut odd = wire_registration("odd", &small);
    odd.block_size = 6;
    let refusal = register_raw(&mut raw, odd).await.unwrap_err();
    assert!(
        refusal.message().contains('6') && refusal.message().contains("odd"),
        "{refusal}"
    );
    server.shutdown(PATIENCE).await.unwrap();
}

/// Recorded, seen beside the confirmed depth, confirmed, over, and gone with the pod.
#[tokio::test]
async fn what_a_router_decided_is_expected_until_it_is_confirmed_or_over() {
    let server = start(config()).await;
    let client = client(&server);
    let engine = engine("pod-0");
    let spec = engine.source("engine", SourceKind::Vllm);
    let registered = join(&client, "pod-0", [spec]).await;
    let prompt = || question(Prompt::Tokens(TOKENS.to_vec()));
    let long = Some(PATIENCE);
    let refusal = client
        .record_routing(&pod("nobody"), prompt(), long)
        .await
        .unwrap_err();
    assert_eq!(refusal.kind(), ErrorKind::NotFound);

    let recorded = client
        .record_routing(&pod("pod-0"), prompt(), long)
        .await
        .unwrap();
    assert_eq!(
        (recorded.blocks, recorded.depth, recorded.expected),
        (2, 0, 2)
    );
    let answer = ask(&client, &[]).await;
    let found = &answer.pods[0];
    assert_eq!(
        (found.depth, found.expected_depth, found.score),
        (0, 2, 0.0)
    );
    assert!(
        client
            .locate(keys_of(&TOKENS))
            .await
            .unwrap()
            .holders
            .is_empty()
    );

    let at = engine.publish_engine(vec![stored(&[1], None, &TOKENS[..4], Tier::Device)]);
    let answer = ask(&client, &[("pod-0/engine", at)]).await;
    assert_eq!(
        (answer.pods[0].depth, answer.pods[0].expected_depth),
        (1, 2)
    );
    // What was confirmed is not expected any more, however soon it is gone.
    let at = engine.publish_engine(vec![removed(&[1], Tier::Device)]);
    assert_eq!(ask(&client, &[("pod-0/engine", at)]).await.pods, []);

    let short = Some(Duration::from_millis(1));
    client
        .record_routing(&pod("pod-0"), prompt(), short)
        .await
        .unwrap();
    let over = async { while !ask(&client, &[]).await.pods.is_empty() {} };
    tokio::time::timeout(PATIENCE, over)
        .await
        .expect("expected for ever");

    client
        .record_routing(&pod("pod-0"), prompt(), long)
        .await
        .unwrap();
    assert_eq!(ask(&client, &[]).await.pods[0].expected_depth, 2);
    drop(registered);
    wait_until(&client, |status| status.pods.is_empty()).await;
    assert_eq!(ask(&client, &[]).await.pods, []);
    server.shutdown(PATIENCE).await.unwrap();
}

/// Room for two blocks: the least recently routed prompt gives way, its tail first.
#[tokio::test]
async fn a_pod_that_publishes_nothing_is_answered_by_where_prompts_went() {
    let mut config = config();
    config.approximate_blocks_max = 2;
    let server = start(config).await;
    let client = client(&server);
    let source = SourceSpec {
        name: "engine".to_owned(),
        kind: SourceKind::Approximate,
        endpoint: String::new(),
        replay_endpoint: None,
        data_parallel_rank: None,
        groups: Vec::new(),
    };
    let _registered = join(&client, "pod-0", [source]).await;
    let pod_0 = pod("pod-0");
    let prompt = |tokens: &[u32]| question(Prompt::Tokens(tokens.to_vec()));
    client
        .record_routing(&pod_0, prompt(&TOKENS), None)
        .await
        .unwrap();
    let answer = ask(&client, &[]).await;
    let found = &answer.pods[0];
    assert!(found.is_approximate);
    assert_eq!(
        (found.depth, found.expected_depth, found.score),
        (2, 0, 2.0)
    );
    assert!(
        client
            .locate(keys_of(&TOKENS))
            .await
            .unwrap()
            .holders
            .is_empty()
    );

    client
        .record_routing(&pod_0, prompt(&[9; 4]), None)
        .await
        .unwrap();
    assert_eq!(ask(&client, &[]).await.pods[0].depth, 1);
    let other = client.lookup(prompt(&[9; 4])).await.unwrap();
    assert_eq!(other.pods[0].depth, 1);
    server.shutdown(PATIENCE).await.unwrap();
}

/// Two publishers whose both ports follow each other.
fn ranks_beside_each_other() -> [Publisher; 2] {
    let bind = |endpoint: String, replay_endpoint: String| {
        let mut config = PublisherConfig::new(pod("pod-0"), "m", Stream::Engine);
        (config.endpoint, config.replay_endpoint) = (endpoint, replay_endpoint);
        Publisher::bind(config)
    };
    let next = |endpoint: &str| {
        let (host, port) = endpoint.rsplit_once(':').unwrap();
        let port: u32 = port.parse().unwrap();
        format!("{host}:{}", port + 1)
    };
    // The ports that follow may be somebody's.
    for _ in 0..100 {
        let first = engine("pod-0");
        if let Ok(second) = bind(next(first.endpoint()), next(first.replay_endpoint())) {
            return [first, second];
        }
    }
    panic!("no ports beside each other are free");
}

/// An engine of two ranks that is configured once.
#[tokio::test]
async fn the_ranks_of_a_configured_engine_are_found_at_the_ports_that_follow() {
    let [first, second] = ranks_beside_each_other();
    let mut config = config();
    config.sources.push(StaticSource {
        pod: "pod-0".to_owned(),
        name: "engine".to_owned(),
        kind: "vllm".to_owned(),
        endpoint: first.endpoint().to_owned(),
        replay_endpoint: Some(first.replay_endpoint().to_owned()),
        model: "m".to_owned(),
        peer_address: None,
        data_parallel_rank: None,
        data_parallel_size: Some(2),
        pool_for: Vec::new(),
        engine_block_size: None,
        groups: Vec::new(),
    });
    let server = start(config).await;
    let client = client(&server);
    let at_first = first.publish_payload(payload(0, &[Told::Stored(&[1], 4, 4, None)]));
    let at_second = second.publish_payload(payload(1, &[Told::Stored(&[1, 2], 8, 4, None)]));
    let at = [("pod-0/engine-0", at_first), ("pod-0/engine-1", at_second)];
    let answer = ask(&client, &at).await;
    let parts = answer.pods[0].parts.iter();
    let parts: Vec<_> = parts.map(|part| (part.rank, part.depth)).collect();
    assert_eq!(parts, [(Some(0), 1), (Some(1), 2)]);
    server.shutdown(PATIENCE).await.unwrap();
}

/// The sources that a reader which knows formats up to one could go on with: older ones cannot say what some are.
async fn continued(server: &Running, format: u32) -> Vec<String> {
    let request = v1::SnapshotRequest {
        protocol_version: kvfabric_proto::PROTOCOL_VERSION,
        format,
    };
    let mut pieces = raw(server)
        .await
        .snapshot(request)
        .await
        .unwrap()
        .into_inner();
    let mut continued = Vec::new();
    while let Some(piece) = pieces.message().await.unwrap() {
        use v1::snapshot_piece::Piece;
        match piece.piece.unwrap() {
            Piece::Start(start) => assert_eq!(start.format, format.max(1)),
            Piece::Source(source) if !source.last_batch.is_empty() => continued.push(source.name),
            _ => {}
        }
    }
    continued
}

/// A server that has begun from another one's snapshot, and goes on with so many of its sources.
async fn replica_of(server: &Running, sources: u32) -> Running {
    let mut config = config();
    config.bootstrap_peers = vec![server.grpc_address().to_string()];
    config.metrics_listen = Some("127.0.0.1:0".parse().unwrap());
    let replica = start(config).await;
    wait_until(&client(&replica), |status| status.serving).await;
    let page = metrics_page(&replica).await;
    let resumed = format!("kvfabric_indexer_sources_resumed_total {sources}\n");
    assert!(page.contains(&resumed), "{page}");
    replica
}

/// What each engine says first, and where it is then.
fn told_first([zero, one, hybrid, large, tiny]: [&Publisher; 5]) -> [(&'static str, Position); 5] {
    let full = (0, "full_attention", None);
    let window = (1, "sliding_window", Some(5));
    [
        (
            "ranks/dp0",
            zero.publish_payload(payload(0, &[Told::Stored(&[1], 4, 4, None)])),
        ),
        (
            "ranks/dp1",
            one.publish_payload(payload(1, &[Told::Stored(&[1, 2], 8, 4, None)])),
        ),
        (
            "hybrid/engine",
            hybrid.publish_payload(payload(
                0,
                &[
                    Told::Stored(&[1, 2], 8, 4, Some(full)),
                    Told::Stored(&[2], 8, 4, Some(window)),
                ],
            )),
        ),
        (
            "large/engine",
            large.publish_payload(payload(0, &[Told::Stored(&[7], 8, 8, None)])),
        ),
        (
            "tiny/parts",
            tiny.publish_payload(payload(0, &[Told::Stored(&[21, 22, 23, 24], 8, 2, None)])),
        ),
    ]
}

/// Ranks, groups, larger and smaller blocks, of which events have told; to a replica, and to readers of older formats.
#[tokio::test]
async fn a_snapshot_has_what_events_told_of_ranks_groups_and_sizes() {
    let server = start(config()).await;
    let first_client = client(&server);
    let (zero, one) = (engine("ranks"), engine("ranks"));
    let (hybrid, large, tiny) = (engine("hybrid"), engine("large"), engine("tiny"));
    let source = |name: &str, publisher: &Publisher| publisher.source(name, SourceKind::Vllm);
    let ranks = [source("dp0", &zero), source("dp1", &one)];
    let registered = [
        first_client.register(registration("ranks", ranks)),
        first_client.register(registration("hybrid", [source("engine", &hybrid)])),
        first_client.register(registration("large", [source("engine", &large)])),
        first_client.register(registration("tiny", [source("parts", &tiny)])),
    ];
    for registered in &registered {
        registered.ready(PATIENCE).await.unwrap();
    }
    let at = told_first([&zero, &one, &hybrid, &large, &tiny]);
    let before = ask(&first_client, &at).await;
    assert_eq!(before.pods.len(), 4);
    assert!(before.pods.iter().all(|pod| pod.depth == 2), "{before:?}");

    let second = replica_of(&server, 5).await;
    let replica = client(&second);
    assert_eq!(ask(&replica, &at).await.pods, before.pods);
    // What comes later means the same to both.
    let end = |hash: u64, group: Option<u32>| payload(0, &[Told::Removed(&[hash], group)]);
    let at = [
        ("hybrid/engine", hybrid.publish_payload(end(2, Some(1)))),
        ("large/engine", large.publish_payload(end(7, None))),
        ("tiny/parts", tiny.publish_payload(end(23, None))),
        (
            "ranks/dp1",
            one.publish_payload(payload(1, &[Told::Removed(&[2], None)])),
        ),
    ];
    let after = ask(&first_client, &at).await;
    let depths: Vec<_> = after
        .pods
        .iter()
        .map(|pod| (pod.pod.as_str(), pod.depth))
        .collect();
    assert_eq!(depths, [("ranks", 1), ("tiny", 1)]);
    assert_eq!(ask(&replica, &at).await.pods, after.pods);

    assert_eq!(continued(&server, 0).await, Vec::<String>::new());
    let but_parts = ["engine", "engine", "dp0", "dp1"];
    assert_eq!(continued(&server, 2).await, but_parts);
    assert_eq!(continued(&server, 3).await.len(), 5);
    second.shutdown(PATIENCE).await.unwrap();
    server.shutdown(PATIENCE).await.unwrap();
}
