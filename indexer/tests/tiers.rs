//! Media that engines name and the index does not know: refused, ignored or taken for a tier, as configured; over a real
//! server and real sockets.
#![cfg(test)]

mod rig;

use kvcache_core::Tier;
use kvfabric_indexer::client::{IndexClient, PodDepth, Prompt, SourceKind, SourcePosition};
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
            .map(|(name, told)| ((*name).to_owned(), (*told).to_owned()));
        config.media = media.collect();
        let case = format!("{:?}, others {unknown}", config.media);
        let server = start(config).await;
        let client = client(&server);
        let engine = engine("p");
        let registered = client.register(registration(
            "p",
            [engine.source("engine", SourceKind::Vllm)],
        ));
        registered.ready(PATIENCE).await.unwrap();
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
