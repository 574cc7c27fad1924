//! Gives back the memory of pods that are gone, also when no events come that would do it in passing, and ends the models
//! that nobody has any more.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{spawn_blocking, yield_now};
use tokio::time::{Instant, timeout};

use super::hub::Hub;
use super::models::EmptySince;
use crate::index::KvIndex;

/// How long what is gone may wait for an event.
const TIDY_EVERY: Duration = Duration::from_secs(1);

/// Looks after every index until the server stops.
pub(super) async fn keep_tidy(hub: Arc<Hub>, mut stopping: watch::Receiver<bool>) {
    let mut wait_for_stop = async || {
        let stopped = stopping.wait_for(|stopping| *stopping);
        timeout(TIDY_EVERY, stopped).await.is_ok()
    };
    let mut empty_since = EmptySince::new();
    while !wait_for_stop().await {
        let indexes: Vec<_> = hub
            .models()
            .iter()
            .flat_map(|models| models.values())
            .cloned()
            .collect();
        for index in indexes {
            while tidy_some(&index).await {
                yield_now().await;
            }
        }
        hub.end_models(&mut empty_since, Instant::now());
    }
}

async fn tidy_some(index: &Arc<KvIndex>) -> bool {
    let index = index.clone();
    // A panic has been printed; the next round tries again.
    spawn_blocking(move || index.tidy_some())
        .await
        .unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use kvcache_core::event::NodeEvent;
    use kvcache_core::{IndexKey, PodName, Tier};

    use super::*;
    use crate::adapter::{SourceKind, decode_batch, encode_node_batch};
    use crate::config::ServerConfig;
    use crate::index::SourceSpec;

    /// Only bounds a failing test; no test measures time.
    const PATIENCE: Duration = Duration::from_secs(60);
    const BLOCKS: u64 = 50_000;

    /// A source with many blocks leaves an index without a byte budget, and nothing is said or asked after that; how many
    /// bytes there are is seen without taking anything out.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_memory_of_what_left_comes_back_without_any_event() {
        let config = ServerConfig {
            max_bytes: Some("unlimited".to_owned()),
            ..ServerConfig::default()
        };
        let hub = Arc::new(Hub::new(config).unwrap());
        let index = hub.index_of(0, "m").unwrap();
        let empty = index.bytes();
        let id = index.add_source(SourceSpec {
            pod: PodName::new("pod-0").unwrap(),
            name: "node".to_owned(),
            kind: SourceKind::Node,
            block_size: 16,
        });
        let id = id.unwrap();
        let events: Vec<_> = (0..BLOCKS)
            .map(|key| NodeEvent::Stored {
                key: IndexKey(key),
                parent: None,
                tier: Tier::Host,
            })
            .collect();
        let batch = encode_node_batch(1.0, &events);
        for event in decode_batch(&batch, SourceKind::Node).unwrap().events {
            index.apply(id, &event.unwrap()).unwrap();
        }
        let full = index.bytes();
        assert!(full > empty + BLOCKS * 10, "{empty} bytes, then {full}");
        index.remove_source(id);

        let stopping = watch::Sender::new(false);
        let tidying = tokio::spawn(keep_tidy(hub.clone(), stopping.subscribe()));
        let waiting = async {
            // A quarter of it: some tables keep room for what may come.
            while index.bytes() > empty + (full - empty) / 4 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, waiting)
            .await
            .expect("memory was not given back");
        stopping.send_replace(true);
        tidying.await.unwrap();
    }
}
