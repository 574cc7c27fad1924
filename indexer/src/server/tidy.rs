//! Gives back the memory of pods that are gone, also when no events come that would do it in passing.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{spawn_blocking, yield_now};
use tokio::time::timeout;

use super::hub::Hub;
use crate::index::KvIndex;

/// How long what is gone may wait for an event.
const TIDY_EVERY: Duration = Duration::from_secs(1);

/// Looks after every index until the server stops.
pub(super) async fn keep_tidy(hub: Arc<Hub>, mut stopping: watch::Receiver<bool>) {
    let mut wait_for_stop = async || {
        let stopped = stopping.wait_for(|stopping| *stopping);
        timeout(TIDY_EVERY, stopped).await.is_ok()
    };
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
    }
}

async fn tidy_some(index: &Arc<KvIndex>) -> bool {
    let index = index.clone();
    // A panic has been printed; the next round tries again.
    spawn_blocking(move || index.tidy_some())
        .await
        .unwrap_or(false)
}
