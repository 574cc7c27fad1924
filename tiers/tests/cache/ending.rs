//! The end of a node and its next start: what had only been in host memory is on disk, or in the object store.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use kvcache_core::event::NodeEvent;
use kvcache_core::ports::{EventSink, Located, Position};
use kvcache_core::{BlockInfo, Epoch, ErrorKind, Sequence, Tier};
use kvfabric_tiers::disk::file_name;
use kvfabric_tiers::{Cache, CacheConfig, Source, StoreBlock};
use kvfabric_transfer::{HostMemory, RegionOptions};

use crate::support::*;

fn with_disk(directory: &Path, host: u64, segments: u64) -> CacheConfig {
    let mut config = config("pod", host);
    config.disk = disk(directory, segments);
    config
}

async fn open(config: CacheConfig) -> Node {
    Node::open(config, agent("pod", Way::Memcpy, None)).await
}

/// The same as soon as the directory is free: a node that had no time to end well may still be writing.
async fn open_when_free(directory: &Path, host: u64, segments: u64) -> Node {
    let until = Instant::now() + PATIENCE;
    loop {
        let config = with_disk(directory, host, segments);
        match Node::try_open(config, agent("pod", Way::Memcpy, None)).await {
            Err(error) if error.kind() == ErrorKind::Busy && Instant::now() < until => {
                tokio::task::yield_now().await;
            }
            opened => return opened.unwrap(),
        }
    }
}

/// Each block by itself: the source it came from, its bytes compared.
async fn fetch_each(node: &Node, blocks: &[BlockInfo]) -> Vec<Source> {
    let mut sources = Vec::new();
    for info in blocks {
        sources.extend(node.fetch_own(std::slice::from_ref(info)).await);
    }
    sources
}

/// Twelve blocks that fit into host memory, two of them pinned: none is on disk before the shutdown, and all are announced
/// there before the node withdraws.
#[tokio::test]
async fn blocks_that_were_only_in_host_memory_are_hits_from_disk_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let node = open(with_disk(directory.path(), 16, 8)).await;
    let blocks = chain(1, 12);
    assert_eq!(node.store(&blocks).await.stored, 12);
    let keys: Vec<_> = blocks[..2].iter().map(|info| info.key).collect();
    assert_eq!(node.cache.pin(&keys, PATIENCE).await.unwrap().depth, 2);
    assert_eq!(node.stat("disk_blocks").await, 0);
    let sink = node.sink.clone();
    node.shutdown().await;
    let mut events = sink.events();
    assert_eq!(events.pop(), Some(NodeEvent::Cleared));
    for info in &blocks {
        assert!(stored(&events, info, Tier::Disk), "{info:?}");
    }

    let node = open(with_disk(directory.path(), 16, 8)).await;
    assert_eq!(node.stat("recovered").await, 12);
    assert_eq!(node.stat("scan_faults").await, 0);
    assert_eq!(node.fetch_own(&blocks).await, vec![Source::Disk; 12]);
}

/// A shutdown that has no time: nothing is written, nothing is torn, and the directory serves the next node.
#[tokio::test]
async fn a_shutdown_without_time_leaves_the_disk_as_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let node = open(with_disk(directory.path(), 16, 8)).await;
    let blocks = chain(1, 12);
    node.store(&blocks).await;
    node.cache.shutdown(Instant::now()).await.unwrap();
    drop(node);
    let node = open_when_free(directory.path(), 16, 8).await;
    assert_eq!(node.stat("recovered").await, 0);
    assert_eq!(node.stat("scan_faults").await, 0);
    assert_eq!(fetch_each(&node, &blocks).await, vec![Source::Miss; 12]);
    assert_eq!(node.store(&blocks).await.stored, 12);
    node.shutdown().await;
    let node = open(with_disk(directory.path(), 16, 8)).await;
    assert_eq!(node.fetch_own(&blocks).await, vec![Source::Disk; 12]);
}

/// Deadlines that end the writing anywhere: whatever is there afterwards is right, and the next node writes on.
#[tokio::test]
async fn a_shutdown_that_is_cut_short_leaves_a_consistent_disk() {
    let blocks = chain(1, 60);
    for micros in [1, 100, 300, 1000, 3000, 10_000] {
        let directory = tempfile::tempdir().unwrap();
        let node = open(with_disk(directory.path(), 80, 20)).await;
        assert_eq!(node.store(&blocks).await.stored, 60);
        let deadline = Instant::now() + Duration::from_micros(micros);
        // Late or not: the sync may be what there was no time for.
        let _ = node.cache.shutdown(deadline).await;
        drop(node);
        let node = open_when_free(directory.path(), 80, 20).await;
        let sources = fetch_each(&node, &blocks).await;
        let disk = count(&sources, &Source::Disk);
        let miss = count(&sources, &Source::Miss);
        assert_eq!(disk + miss, 60, "{sources:?}");
        let report = node.store(&blocks).await;
        assert_eq!(report.stored + report.already_held, 60);
        node.shutdown().await;
        let node = open(with_disk(directory.path(), 80, 20)).await;
        let sources = fetch_each(&node, &blocks).await;
        // A torn record may be found before the good one of the same block.
        assert!(count(&sources, &Source::Disk) >= disk, "{sources:?}");
    }
}

/// Only an object tier: that is where everything goes.
#[tokio::test]
async fn without_a_disk_the_blocks_go_to_the_object_store() {
    let objects = tempfile::tempdir().unwrap();
    let open = async || {
        let mut config = config("pod", 16);
        config.object = cold();
        Node::open(config, agent("pod", Way::Memcpy, Some(objects.path()))).await
    };
    let node = open().await;
    let blocks = chain(1, 12);
    node.store(&blocks).await;
    assert_eq!(node.stat("object_blocks").await, 0);
    node.shutdown().await;
    let node = open().await;
    let hints = Located {
        shared: std::iter::once(0..12).collect(),
        ..Located::default()
    };
    assert_eq!(node.fetch(&blocks, hints).await, vec![Source::Object; 12]);
}

/// The disk is full after a shutdown. The next node needs room: the segment that was written to longest ago goes, and not
/// before host memory is half full.
#[tokio::test]
async fn after_a_restart_the_segment_written_longest_ago_goes_first() {
    let directory = tempfile::tempdir().unwrap();
    let node = open(with_disk(directory.path(), 16, 3)).await;
    let blocks = chain(1, 12);
    node.store(&blocks).await;
    node.shutdown().await;
    // Four blocks a segment, the last stored four in the first.
    let groups = [&blocks[8..], &blocks[4..8], &blocks[..4]];
    for (segment, age) in [(0, 10), (1, 30), (2, 20)] {
        let path = directory.path().join(file_name(segment));
        let file = std::fs::File::options().write(true).open(path).unwrap();
        let written = SystemTime::now() - Duration::from_secs(age);
        file.set_modified(written).unwrap();
    }
    let node = open(with_disk(directory.path(), 16, 3)).await;
    assert_eq!(node.stat("recovered").await, 12);
    assert_eq!(node.stat("segments_dropped").await, 0);
    node.store(&chain(2, 7)).await;
    assert_eq!(node.stat("disk_blocks").await, 12);
    node.store(&chain(3, 1)).await;
    for (segment, group) in groups.iter().enumerate() {
        let expected = if segment == 1 {
            Source::Miss
        } else {
            Source::Disk
        };
        let sources = fetch_each(&node, group).await;
        assert_eq!(sources, vec![expected; 4], "segment {segment}");
    }
}

const TMPFS: &str = "KVFABRIC_TEST_SMALL_DISK";

/// A file system of 128 KiB, in a mount namespace of its own: the test runs itself again inside it.
#[test]
fn a_disk_that_fills_up_keeps_what_was_used_last() {
    if let Some(directory) = std::env::var_os(TMPFS) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(ends_on_a_small_disk(Path::new(&directory)));
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let probe = Command::new("unshare").args(["-rm", "true"]).output();
    if !probe.as_ref().is_ok_and(|output| output.status.success()) {
        println!("SKIPPED: no mount namespaces here ({probe:?}); a full disk is not tested");
        return;
    }
    let script = "mount -t tmpfs -o size=128k tmpfs \"$1\" && shift && exec \"$@\"";
    let name = "ending::a_disk_that_fills_up_keeps_what_was_used_last";
    let output = Command::new("unshare")
        .args(["-rm", "sh", "-c", script, "sh"])
        .arg(directory.path())
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(TMPFS, directory.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{errors}");
    assert!(text.contains("1 passed"), "{text}");
}

async fn ends_on_a_small_disk(directory: &Path) {
    // Ten times what there is room for.
    let node = open(with_disk(directory, 16, 20)).await;
    let blocks = chain(1, 12);
    node.store(&blocks).await;
    node.shutdown().await;
    let node = open(with_disk(directory, 16, 20)).await;
    // Two segments fit, and the four blocks of each store go together.
    assert_eq!(fetch_each(&node, &blocks[4..]).await, vec![Source::Disk; 8]);
    assert_eq!(fetch_each(&node, &blocks[..4]).await, vec![Source::Miss; 4]);
}

const DYING: &str = "KVFABRIC_TEST_DIES_IN";

/// Ends the process, without any clean-up, at the fifth block that is announced on disk.
struct Deadly {
    on_disk: AtomicUsize,
}

impl EventSink for Deadly {
    fn publish(&self, events: Vec<NodeEvent>) -> Position {
        for event in events {
            if let NodeEvent::Stored { key, tier, .. } = event
                && tier == Tier::Disk
            {
                println!("on disk: {}", key.0);
                if self.on_disk.fetch_add(1, Ordering::Relaxed) == 4 {
                    std::process::abort();
                }
            }
        }
        Position {
            epoch: Epoch(1),
            next: Sequence(0),
        }
    }
}

/// The test runs itself again: that process stores, shuts down, and dies in the middle of it.
#[tokio::test]
async fn what_was_announced_is_there_when_the_node_dies_in_its_shutdown() {
    if let Some(directory) = std::env::var_os(DYING) {
        return dies_in_its_shutdown(Path::new(&directory)).await;
    }
    let directory = tempfile::tempdir().unwrap();
    let name = "ending::what_was_announced_is_there_when_the_node_dies_in_its_shutdown";
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(DYING, directory.path())
        .output()
        .unwrap();
    assert!(!output.status.success(), "it dies");
    let text = String::from_utf8_lossy(&output.stdout);
    let announced: Vec<u64> = text
        .lines()
        .filter_map(|line| line.split_once("on disk: ")?.1.parse().ok())
        .collect();
    assert_eq!(announced.len(), 5, "{text}");

    let node = open(with_disk(directory.path(), 80, 20)).await;
    let blocks = chain(1, 60);
    for info in &blocks {
        let sources = node.fetch_own(std::slice::from_ref(info)).await;
        let is_announced = announced.contains(&info.index_key.0);
        assert!(!is_announced || sources == [Source::Disk], "{info:?}");
    }
    let report = node.store(&blocks).await;
    assert_eq!(report.stored + report.already_held, 60);
}

async fn dies_in_its_shutdown(directory: &Path) {
    let agent = agent("pod", Way::Memcpy, None);
    let memory = HostMemory::anonymous(BLOCK * 60).unwrap();
    let engine = agent.register(memory, RegionOptions::default()).unwrap();
    let sink = Arc::new(Deadly {
        on_disk: AtomicUsize::new(0),
    });
    let mut config = with_disk(directory, 80, 20);
    // Several commands, of which the first is done when the process dies.
    config.limits.batch_blocks_max = 4;
    let cache = Cache::open(config, agent, Arc::new(Guide::default()), sink);
    let cache = cache.await.unwrap();
    let blocks = chain(1, 60).into_iter().enumerate().map(|(at, info)| {
        let offset = at as u64 * BLOCK;
        engine.write_at(offset, &bytes_of(&info)).unwrap();
        StoreBlock {
            info,
            memory: engine.descriptor(offset, BLOCK).into(),
        }
    });
    let deadline = Instant::now() + PATIENCE;
    let report = cache.store(blocks.collect(), deadline).await.unwrap();
    assert_eq!(report.stored, 60);
    cache.shutdown(deadline).await.unwrap();
}
