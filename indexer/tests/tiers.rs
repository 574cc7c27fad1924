//! Media that engines name and the index does not know: refused, ignored or taken for a tier, as configured; over a real
//! server and real sockets.
#![cfg(test)]

mod rig;

use kvcache_core::Tier;
use kvfabric_indexer::client::{
    IndexClient, LookupOptions, PodDepth, Prompt, Ranking, SourcePosition,
};
use kvfabric_indexer::config::MediumConfig;
use kvfabric_indexer::publisher::Publisher;
use rig::*;
use rmpv::Value;

fn event(tag: &str, hash: u64, medium: &str) -> Value {
    let fields = [
        ("type", tag.into()),
        ("block_hashes", Value::Array(vec![hash.into()])),
        (
            "parent_block_hash",
            if hash == 1 {
                Value::Nil
            } else {
                (hash - 1).into()
            },
        ),
        (
            "token_ids",
            Value::Array(
                TOKENS[4 * (hash as usize - 1)..4 * hash as usize]
                    .iter()
                    .map(|token| (*token).into())
                    .collect(),
            ),
        ),
        ("block_size", BLOCK.into()),
        ("medium", medium.into()),
        ("extra_keys", Value::Nil),
    ];
    let fields = fields.into_iter().map(|(name, value)| (name.into(), value));
    Value::Map(fields.collect())
}

fn payload(events: Vec<Value>) -> Vec<u8> {
    let batch = Value::Array(vec![1.0.into(), Value::Array(events), 0.into()]);
    let mut bytes = Vec::new();
    rmpv::encode::write_value(&mut bytes, &batch).unwrap();
    bytes
}

async fn answer(client: &IndexClient, engine: &Publisher) -> Vec<PodDepth> {
    let mut asked = question(Prompt::Tokens(TOKENS.to_vec()));
    asked.min_position = vec![SourcePosition::new(&pod("p"), "engine", engine.position())];
    client.lookup(asked).await.unwrap().pods
}

/// One engine, whose first block is in its accelerator and the second in a medium that only some configurations know.
#[tokio::test]
async fn a_medium_counts_as_configured_and_an_unknown_one_as_all_unknown_ones_do() {
    let known = &[("Cxl_Pool", "nvme")][..];
    let cases = [
        (&[][..], "refuse", [1, 0, 0], true, 1),
        (&[][..], "ignore", [1, 0, 0], true, 0),
        (&[][..], "dram", [1, 1, 0], true, 0),
        (known, "refuse", [1, 0, 1], false, 0),
        (&[("CXL_POOL", "refuse")][..], "dram", [1, 0, 0], false, 1),
        // What is known by name may be told otherwise.
        (
            &[("gpu", "dram"), ("CXL_POOL", "nvme")][..],
            "refuse",
            [0, 1, 1],
            false,
            0,
        ),
    ];
    for (media, unknown, held, is_counted, rejected) in cases {
        let mut config = config();
        config.metrics_listen = Some("127.0.0.1:0".parse().unwrap());
        config.tier_weights.nvme = 0.25;
        config.unknown_media = unknown.to_owned();
        let media = media
            .iter()
            .map(|(name, told)| ((*name).to_owned(), (*told).into()));
        config.media = media.collect();
        let case = format!("{:?}, others {unknown}", config.media);
        let server = start(config).await;
        let client = client(&server);
        let engine = engine("p");
        let registered = join_engine(&client, "p", &engine).await;
        engine.publish_payload(payload(vec![
            event("BlockStored", 1, "GPU"),
            event("BlockStored", 2, "CXL_POOL"),
        ]));
        let pods = answer(&client, &engine).await;
        let by_tier =
            [Tier::Device, Tier::Host, Tier::Disk].map(|tier| pods[0].by_tier[tier as usize]);
        assert_eq!(by_tier, held, "{case}");
        let score: f64 = held
            .iter()
            .zip([1.0, 0.8, 0.25])
            .map(|(blocks, weight)| f64::from(*blocks) * weight)
            .sum();
        assert!(
            (pods[0].score - score).abs() < 1e-9,
            "{case}: {}",
            pods[0].score
        );
        let page = metrics_page(&server).await;
        let series = "kvfabric_indexer_unknown_medium_events_total{medium=\"CXL_POOL\"} 1\n";
        assert_eq!(page.contains(series), is_counted, "{case}: {page}");
        let line = format!("kvfabric_indexer_events_rejected_total {rejected}\n");
        assert!(page.contains(&line), "{case}: {page}");
        // A removal is understood as the storing was.
        engine.publish_payload(payload(vec![event("BlockRemoved", 2, "CXL_POOL")]));
        assert_eq!(answer(&client, &engine).await[0].depth, 1, "{case}");
        drop(registered);
        server.shutdown(PATIENCE).await.unwrap();
    }
}

/// A medium that is taken for `tier`, where a block is worth so much.
fn worth(tier: Option<&str>, weight: f64) -> MediumConfig {
    MediumConfig {
        tier: tier.map(str::to_owned),
        weight: Some(weight),
    }
}

/// The terms of a pod's score: tier, blocks, weight and the medium whose weight it is.
async fn terms(
    client: &IndexClient,
    engine: &Publisher,
    name: &str,
) -> (f64, Vec<(Tier, u32, f64, String)>) {
    let mut asked = question(Prompt::Tokens(TOKENS.to_vec()));
    asked.min_position = vec![SourcePosition::new(&pod(name), "engine", engine.position())];
    let options = LookupOptions {
        ranking: Ranking::Score,
        explain: true,
    };
    let answer = client.lookup_with(asked, options).await.unwrap();
    let found = answer.pods.into_iter().find(|found| found.pod == pod(name));
    let found = found.unwrap();
    let terms = found.terms.into_iter();
    let terms = terms.map(|term| {
        (
            term.tier,
            term.blocks,
            term.weight,
            term.medium.unwrap_or_default(),
        )
    });
    (found.score, terms.collect())
}

/// Pods with blocks of one tier in media of different weights, asked for natively and as llm-d asks; then the source of one
/// begins anew.
#[tokio::test]
async fn a_medium_weighs_in_every_score_what_is_configured() {
    let file = tokenizer_file();
    let mut config = config();
    config.tokenizers.push(tokenizer(&file));
    config.media = [
        ("CXL_Pool".to_owned(), worth(Some("nvme"), 0.25)),
        ("CPU".to_owned(), worth(None, 0.7)),
    ]
    .into();
    let server = start(config).await;
    let client = client(&server);
    let (far, near) = (engine("far"), engine("near"));
    let mut kept = Vec::new();
    for (name, engine) in [("far", &far), ("near", &near)] {
        let registered = join_engine(&client, name, engine).await;
        kept.push(registered);
    }
    far.publish_payload(payload(vec![
        event("BlockStored", 1, "GPU"),
        event("BlockStored", 2, "cxl_pool"),
    ]));
    near.publish_payload(payload(vec![
        event("BlockStored", 1, "CPU"),
        event("BlockStored", 2, "DISK"),
    ]));
    let of_far = (Tier::Device, 1, 1.0, String::new());
    let (score, found) = terms(&client, &far, "far").await;
    assert_eq!(
        found,
        [of_far.clone(), (Tier::Disk, 1, 0.25, "CXL_POOL".to_owned())]
    );
    assert!((score - 1.25).abs() < 1e-9, "{score}");
    let (score, found) = terms(&client, &near, "near").await;
    let wanted = [
        (Tier::Host, 1, 0.7, "CPU".to_owned()),
        (Tier::Disk, 1, 0.5, String::new()),
    ];
    assert_eq!(found, wanted);
    assert!((score - 1.2).abs() < 1e-9, "{score}");
    let mut scores = scores_of(server.grpc_address(), prompt_text())
        .await
        .unwrap();
    scores.sort_by(|one, other| one.0.cmp(&other.0));
    let rounded: Vec<_> = scores
        .iter()
        .map(|(pod, score)| (pod.as_str(), (score * 1e6).round() / 1e6))
        .collect();
    assert_eq!(rounded, [("far", 1.25), ("near", 1.2)]);
    // A faster medium of the same tier: which one a block is in is not kept, so the least still counts.
    far.publish_payload(payload(vec![event("BlockStored", 2, "STORAGE")]));
    let (score, _) = terms(&client, &far, "far").await;
    assert!((score - 1.25).abs() < 1e-9, "{score}");
    // Of a pod that begins anew nothing is remembered.
    kept.clear();
    wait_until(&client, |status| status.pods.is_empty()).await;
    let far = engine("far");
    let _registered = join_engine(&client, "far", &far).await;
    far.publish_payload(payload(vec![
        event("BlockStored", 1, "GPU"),
        event("BlockStored", 2, "STORAGE"),
    ]));
    let (score, found) = terms(&client, &far, "far").await;
    assert_eq!(found, [of_far, (Tier::Disk, 1, 0.5, String::new())]);
    assert!((score - 1.5).abs() < 1e-9, "{score}");
}

/// A replica that begins from its peer's snapshot, whose engine says nothing more.
#[tokio::test]
async fn what_a_medium_weighs_goes_on_from_a_snapshot() {
    let mut config = config();
    config.media = [("CXL_POOL".to_owned(), worth(Some("dram"), 0.3))].into();
    let server = start(config.clone()).await;
    let asked = client(&server);
    let engine = engine("p");
    let _registered = join_engine(&asked, "p", &engine).await;
    engine.publish_payload(payload(vec![
        event("BlockStored", 1, "CXL_POOL"),
        event("BlockStored", 2, "CXL_POOL"),
    ]));
    let (score, _) = terms(&asked, &engine, "p").await;
    assert!((score - 0.6).abs() < 1e-9, "{score}");
    config.bootstrap_peers = vec![server.grpc_address().to_string()];
    let replica = start(config).await;
    let asked = client(&replica);
    wait_until(&asked, |status| status.serving).await;
    let (score, found) = terms(&asked, &engine, "p").await;
    assert_eq!(found, [(Tier::Host, 2, 0.3, "CXL_POOL".to_owned())]);
    assert!((score - 0.6).abs() < 1e-9, "{score}");
    let status = asked.status().await.unwrap();
    assert_eq!(
        status.pods[0].sources[0].replays, 1,
        "only the tail was asked for"
    );
}
