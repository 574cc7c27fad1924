//! Pins, removal, clearing and flushes of a cache with real tiers.

use std::path::Path;
use std::time::{Duration, Instant};

use kvcache_core::{BlockInfo, BlockKey, ErrorKind, Tier};
use kvfabric_tiers::{CacheConfig, Source};

use crate::support::*;

fn keys(blocks: &[BlockInfo]) -> Vec<BlockKey> {
    blocks.iter().map(|info| info.key).collect()
}

fn with_disk(directory: &Path) -> CacheConfig {
    let mut config = config("pod", 8);
    config.disk = disk(directory, 8);
    config
}

async fn open(config: CacheConfig) -> Node {
    Node::open(config, agent("pod", Way::Memcpy, None)).await
}

fn segment_files(directory: &Path) -> usize {
    let files = std::fs::read_dir(directory).unwrap();
    let is_segment = |name: std::ffi::OsString| name.to_string_lossy().starts_with("segment-");
    files
        .filter(|file| is_segment(file.as_ref().unwrap().file_name()))
        .count()
}

/// Four of eight slots pinned, then sixteen other blocks: the four stay, and go once they are let go of.
#[tokio::test]
async fn pinned_blocks_stay_in_host_memory_until_they_are_released() {
    let node = open(config("pod", 8)).await;
    let (kept, others) = (chain(1, 4), chain(2, 16));
    node.store(&kept).await;
    let pinned = node.cache.pin(&keys(&kept), PATIENCE).await.unwrap();
    assert_eq!(pinned.depth, 4);
    node.store(&others).await;
    assert_eq!(node.fetch_own(&kept).await, vec![Source::Host; 4]);
    node.cache.release(pinned.id).await.unwrap();
    node.store(&chain(3, 16)).await;
    assert_eq!(node.fetch_own(&kept).await, vec![Source::Miss; 4]);
}

/// Sixteen blocks through eight slots: the first are only on disk when they are pinned. The fifth has no room.
#[tokio::test]
async fn a_pin_brings_blocks_up_from_disk() {
    let directory = tempfile::tempdir().unwrap();
    let node = open(with_disk(directory.path())).await;
    let blocks = chain(1, 16);
    assert_eq!(node.store(&blocks).await.stored, 16);
    node.sink.until_stored(&blocks[..5], Tier::Disk).await;
    let held = node.cache.lookup(&keys(&blocks[..4])).await.unwrap();
    assert_eq!((held.depth, held.disk), (4, 4));
    let pinned = node.cache.pin(&keys(&blocks[..5]), PATIENCE).await.unwrap();
    assert_eq!(pinned.depth, 4);
    let held = node.cache.lookup(&keys(&blocks[..4])).await.unwrap();
    assert_eq!((held.depth, held.host), (4, 4));
    assert_eq!(node.fetch_own(&blocks[..4]).await, vec![Source::Host; 4]);
}

/// The shortest time there is; and nothing to pin.
#[tokio::test]
async fn a_pin_ends_by_itself() {
    let node = open(config("pod", 8)).await;
    let blocks = chain(1, 2);
    node.store(&blocks).await;
    node.cache
        .pin(&keys(&blocks), Duration::from_millis(1))
        .await
        .unwrap();
    let ended = async {
        while node.stat("pins_expired").await == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, ended)
        .await
        .expect("the pin ends");
    assert_eq!(node.stat("pinned_blocks").await, 0);
    let pinned = node.cache.pin(&keys(&chain(9, 2)), PATIENCE).await.unwrap();
    assert_eq!(pinned.depth, 0);
    assert_eq!(node.stat("pins").await, 0);
}

/// The first pin of each of two runs has the same number inside; outside, the old one lets go of nothing.
#[tokio::test]
async fn a_pin_of_an_earlier_run_lets_go_of_nothing() {
    let blocks = chain(1, 2);
    let run = async || {
        let node = open(config("pod", 8)).await;
        node.store(&blocks).await;
        let pinned = node.cache.pin(&keys(&blocks), PATIENCE).await.unwrap();
        (node, pinned.id)
    };
    let (first, old) = run().await;
    first.shutdown().await;
    let (second, new) = run().await;
    second.cache.release(old).await.unwrap();
    assert_eq!(second.stat("pinned_blocks").await, 2);
    second.cache.release(new).await.unwrap();
    assert_eq!(second.stat("pinned_blocks").await, 0);
}

/// Blocks in host memory and on disk, one of them pinned: the rest is gone and announced as gone.
#[tokio::test]
async fn removed_blocks_are_gone_and_announced() {
    let directory = tempfile::tempdir().unwrap();
    let node = open(with_disk(directory.path())).await;
    let blocks = chain(1, 16);
    assert_eq!(node.store(&blocks).await.stored, 16);
    node.sink.until_stored(&blocks[..5], Tier::Disk).await;
    node.cache.flush(Instant::now() + PATIENCE).await.unwrap();
    let pinned = node.cache.pin(&keys(&blocks[..1]), PATIENCE).await.unwrap();
    assert_eq!(pinned.depth, 1);
    let removed = node.cache.remove(&keys(&blocks)).await.unwrap();
    assert_eq!((removed.removed, removed.kept), (15, 1));
    let events = node.sink.events();
    for tier in [Tier::Host, Tier::Disk] {
        let left = blocks[1..]
            .iter()
            .filter(|info| stored(&events, info, tier));
        assert_eq!(left.count(), 0, "announced in {tier}");
    }
    assert_eq!(node.fetch_own(&blocks[1..]).await, vec![Source::Miss; 15]);
    assert_eq!(node.fetch_own(&blocks[..1]).await, [Source::Host]);
    assert_eq!(node.store(&blocks).await.stored, 15);
}

/// Everything goes, the segment files too: a restart finds nothing. The object that another node may want stays.
#[tokio::test]
async fn a_cleared_node_finds_nothing_at_its_next_start() {
    let (directory, objects) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut config = config("pod", 4);
    config.disk = disk(directory.path(), 2);
    config.object = cold();
    let agent = || agent("pod", Way::Memcpy, Some(objects.path()));
    let node = Node::open(config.clone(), agent()).await;
    let blocks = chain(1, 24);
    for batch in blocks.chunks(4) {
        assert_eq!(node.store(batch).await.stored, 4);
    }
    let rescued = |events: &[_]| stored(events, &blocks[0], Tier::Object);
    node.sink.until(|events| rescued(events)).await;
    node.cache.flush(Instant::now() + PATIENCE).await.unwrap();
    let cleared = node.cache.clear().await.unwrap();
    assert!(cleared.removed >= 4, "{cleared:?}");
    let emptied = async {
        while segment_files(directory.path()) > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, emptied)
        .await
        .expect("the segments are deleted");
    let events = node.sink.events();
    let is_here = |info| stored(&events, info, Tier::Host) || stored(&events, info, Tier::Disk);
    assert_eq!(blocks.iter().filter(|info| is_here(info)).count(), 0);
    assert!(rescued(&events), "the object is still announced");
    assert_eq!(node.fetch_own(&blocks[..1]).await, [Source::Object]);
    node.shutdown().await;
    let node = Node::open(config, agent()).await;
    assert_eq!(node.stat("recovered").await, 0);
    assert_eq!(node.store(&blocks[..4]).await.stored, 4);
}

/// What was leaving is on disk when the flush ends: as many blocks as were demoted are found by the next start, which comes
/// without an orderly end.
#[tokio::test]
async fn flushed_blocks_are_on_disk() {
    let directory = tempfile::tempdir().unwrap();
    let node = open(with_disk(directory.path())).await;
    assert_eq!(node.store(&chain(1, 24)).await.stored, 24);
    node.cache.flush(Instant::now() + PATIENCE).await.unwrap();
    let demoted = node.stat("demoted_disk").await;
    assert!(demoted >= 16, "{demoted}");
    assert_eq!(node.stat("commands_in_flight").await, 0);
    drop(node);
    let reopened = async {
        loop {
            let agent = agent("pod", Way::Memcpy, None);
            match Node::try_open(with_disk(directory.path()), agent).await {
                Ok(node) => return node,
                Err(error) => assert_eq!(error.kind(), ErrorKind::Busy, "{error}"),
            }
            tokio::task::yield_now().await;
        }
    };
    let node = tokio::time::timeout(PATIENCE, reopened)
        .await
        .expect("it opens");
    assert_eq!(node.stat("recovered").await, demoted);
    node.cache.flush(Instant::now() + PATIENCE).await.unwrap();
}

/// Each call after the shutdown.
#[tokio::test]
async fn a_cache_that_is_shut_down_keeps_and_forgets_nothing() {
    let node = open(config("pod", 8)).await;
    let keys = keys(&chain(1, 1));
    node.cache
        .shutdown(Instant::now() + PATIENCE)
        .await
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    let errors = [
        node.cache.pin(&keys, PATIENCE).await.map(drop),
        node.cache.remove(&keys).await.map(drop),
        node.cache.clear().await.map(drop),
        node.cache.flush(deadline).await,
        node.cache.locate(&chain(1, 1), deadline).await.map(drop),
    ];
    for error in errors {
        assert_eq!(error.unwrap_err().kind(), ErrorKind::Cancelled);
    }
}
