//! Pods come, flood, restart and go, over and over: nothing that they leave behind may add up.
//!
//! A few rounds by default; `KVFABRIC_SOAK_SECONDS=3600` makes it an hour.
#![cfg(test)]

mod rig;

use std::time::{Duration, Instant};

use kvcache_core::Tier;
use kvfabric_indexer::client::{Prompt, SourceKind, SourcePosition};
use kvfabric_indexer::publisher::{Publisher, PublisherConfig, Stream};
use rig::*;

/// Pods at once.
const PODS: u64 = 4;
/// Batches of each pod in a round, and blocks a batch.
const BATCHES: u64 = 150;
const BLOCKS: u64 = 16;
/// Rounds of a short run, and those before memory is measured first: until then caches and pools fill.
const ROUNDS: u64 = 24;
const ROUNDS_TO_WARM_UP: u64 = 6;
/// What may come together over all later rounds, in bytes. The blocks of one round alone take more than a tenth of it, so
/// what a few rounds leave behind shows.
const GROWTH_MAX: u64 = 24 << 20;

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn flood(engine: &Publisher, round: u64, pod: u64) {
    for batch in 0..BATCHES {
        let first = ((round * PODS + pod) * BATCHES + batch) * BLOCKS;
        let hashes: Vec<u64> = (first..first + BLOCKS).collect();
        let tokens: Vec<u32> = (0..BLOCKS as u32 * BLOCK)
            .map(|token| token + first as u32)
            .collect();
        let mut events = vec![stored(&hashes, None, &tokens, Tier::Device)];
        if batch % 2 == 1 {
            events.push(removed(&hashes[8..], Tier::Device));
        }
        // A child of nobody: it waits for a parent that never comes.
        events.push(stored(
            &[u64::MAX - first],
            Some(u64::MAX),
            &tokens[..4],
            Tier::Device,
        ));
        engine.publish_engine(events);
    }
}

/// The same load each round; what is held after the warm-up is what is held at the end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_stays_flat_while_pods_come_flood_restart_and_go() {
    let seconds = std::env::var("KVFABRIC_SOAK_SECONDS").ok();
    let seconds = seconds.map(|text| Duration::from_secs(text.parse().unwrap()));
    let server = start(config()).await;
    let client = client(&server);
    let begun = Instant::now();
    let mut settled = None;
    for round in 0.. {
        if seconds.map_or(round == ROUNDS, |long| {
            begun.elapsed() >= long && round > ROUNDS
        }) {
            break;
        }
        let mut kept = Vec::new();
        for number in 0..PODS {
            let name = format!("pod-{number}");
            let first = engine(&name);
            let source = first.source("engine", SourceKind::Vllm);
            let registered = client.register(registration(&name, [source]));
            registered.ready(PATIENCE).await.unwrap();
            flood(&first, round, number);
            // Every other pod's engine begins anew in the middle of it.
            let last = if number % 2 == 0 {
                first
            } else {
                let mut config = PublisherConfig::new(pod(&name), "m", Stream::Engine);
                config.endpoint = first.endpoint().to_owned();
                config.replay_endpoint = first.replay_endpoint().to_owned();
                drop(first);
                let reborn = Publisher::bind(config).unwrap();
                flood(&reborn, round, number);
                reborn
            };
            kept.push((name, last, registered));
        }
        for (name, engine, _) in &kept {
            let mut asked = question(Prompt::Tokens(TOKENS.to_vec()));
            let position = engine.position();
            asked.min_position = vec![SourcePosition::new(&pod(name), "engine", position)];
            asked.deadline = Some(PATIENCE);
            client.lookup(asked).await.unwrap();
        }
        let status = client.status().await.unwrap();
        assert_eq!(status.entries, PODS * BATCHES * BLOCKS * 3 / 4);
        let mut stream = client.snapshot().await.unwrap();
        while stream.message().await.unwrap().is_some() {}
        drop(kept);
        wait_until(&client, |status| {
            status.pods.is_empty() && status.entries == 0
        })
        .await;
        let now = (resident_bytes(), open_files());
        let Some((bytes, files)) = settled else {
            if round == ROUNDS_TO_WARM_UP {
                settled = Some(now);
            }
            continue;
        };
        let grown = now.0.saturating_sub(bytes);
        assert!(
            grown <= GROWTH_MAX,
            "{grown} bytes more after round {round}"
        );
        assert!(now.1 <= files + 64, "{} files open after {files}", now.1);
    }
}
