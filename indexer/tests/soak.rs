//! Pods come, flood, restart and go, over and over: nothing that they leave behind may add up.
//!
//! A few rounds by default; `KVFABRIC_SOAK_SECONDS=3600` makes it an hour. `KVFABRIC_SOAK_REST_MS` rests so long after
//! each round, and `KVFABRIC_SOAK_RECORD` names a file that gets a line a round: what was held then.
#![cfg(test)]

mod rig;

use std::fs::File;
use std::io::Write;
use std::time::{Duration, Instant};

use kvcache_core::Tier;
use kvfabric_indexer::client::{Prompt, SourcePosition};
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

fn from_environment(name: &str, unit: Duration) -> Option<Duration> {
    let text = std::env::var(name).ok()?;
    Some(unit * text.parse::<u32>().unwrap())
}

/// Lines of seconds, round, resident bytes, what the index says it takes, open files, and CPU seconds so far.
struct Record(Option<File>);

impl Record {
    fn begin() -> Self {
        let path = std::env::var_os("KVFABRIC_SOAK_RECORD");
        let file = path.map(|path| {
            let mut file = File::create(path).unwrap();
            writeln!(file, "seconds\tround\tresident\tindex\tfiles\tcpu_seconds").unwrap();
            file
        });
        Self(file)
    }

    fn line(&mut self, seconds: u64, round: u64, index: u64) {
        let Some(file) = &mut self.0 else { return };
        let (resident, files) = (resident_bytes(), open_files());
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
        let behind_name = stat.rsplit(") ").next().unwrap();
        let ticks = behind_name.split(' ').skip(11).take(2);
        let ticks: u64 = ticks.map(|text| text.parse::<u64>().unwrap()).sum();
        let cpu = ticks as f64 / 100.0;
        writeln!(
            file,
            "{seconds}\t{round}\t{resident}\t{index}\t{files}\t{cpu}"
        )
        .unwrap();
    }
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
    let seconds = from_environment("KVFABRIC_SOAK_SECONDS", Duration::from_secs(1));
    let rest = from_environment("KVFABRIC_SOAK_REST_MS", Duration::from_millis(1));
    let mut record = Record::begin();
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
            let registered = join_engine(&client, &name, &first).await;
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
        // Engines do not tell their incarnation: one that began anew may be as far as that while the index still has the
        // position of the one before.
        let all = PODS * BATCHES * BLOCKS * 3 / 4;
        wait_until(&client, |status| status.entries == all).await;
        let mut stream = client.snapshot().await.unwrap();
        while stream.message().await.unwrap().is_some() {}
        drop(kept);
        wait_until(&client, |status| {
            status.pods.is_empty() && status.entries == 0
        })
        .await;
        let index = client.status().await.unwrap().bytes;
        record.line(begun.elapsed().as_secs(), round, index);
        // An hour at a low rate shows what a pile of rounds does not: what comes with time.
        tokio::time::sleep(rest.unwrap_or_default()).await;
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
