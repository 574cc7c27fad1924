//! Blocks come back byte for byte from each tier, and after a restart.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kvcache_core::event::NodeEvent;
use kvcache_core::ports::Located;
use kvcache_core::{ErrorKind, Tier};
use kvfabric_tiers::{CacheConfig, FetchBlock, Source, StoreBlock};
use kvfabric_transfer::{HostMemory, RegionOptions};

use crate::support::*;

/// Three blocks, all of them in host memory.
#[tokio::test]
async fn a_stored_block_comes_back_from_host_memory() {
    let node = Node::open(config("pod", 8), agent("pod", Way::Memcpy, None)).await;
    let blocks = chain(1, 3);
    let report = node.store(&blocks).await;
    assert_eq!((report.stored, report.failed, report.refused), (3, 0, 0));
    assert_eq!(node.fetch_own(&blocks).await, vec![Source::Host; 3]);
    assert_eq!(node.guide.questions.load(Ordering::Relaxed), 0);
    assert_eq!(node.store(&blocks).await.already_held, 3);
    let held = node
        .cache
        .lookup(&[blocks[0].key, blocks[1].key, block(9, 0).key])
        .await
        .unwrap();
    assert_eq!((held.depth, held.host, held.disk), (2, 2, 0));
}

/// A block that nobody has, behind one that is here: the prefix ends there.
#[tokio::test]
async fn an_unknown_block_is_a_miss_and_ends_the_prefix() {
    let node = Node::open(config("pod", 8), agent("pod", Way::Memcpy, None)).await;
    let blocks = chain(1, 3);
    node.store(&blocks[..1]).await;
    let sources = node.fetch_own(&blocks).await;
    assert_eq!(sources, [Source::Host, Source::Miss, Source::Miss]);
    assert_eq!(node.guide.questions.load(Ordering::Relaxed), 1);
}

/// Sixteen blocks through four slots of host memory: what does not fit is read back from disk.
#[tokio::test]
async fn what_host_memory_cannot_hold_comes_back_from_disk() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = config("pod", 4);
    config.disk = disk(directory.path(), 8);
    let node = Node::open(config, agent("pod", Way::Memcpy, None)).await;
    let blocks = chain(1, 16);
    let report = node.store(&blocks).await;
    assert_eq!(report.stored, 16, "{report:?}");
    let sources = node.fetch_own(&blocks).await;
    assert_eq!(count(&sources, &Source::Miss), 0);
    assert!(count(&sources, &Source::Disk) >= 12, "{sources:?}");
}

/// No disk: the object store takes what leaves host memory. A second node under the same prefix reads it.
#[tokio::test]
async fn what_host_memory_cannot_hold_comes_back_from_the_object_store() {
    let store = tempfile::tempdir().unwrap();
    let mut one = config("one", 4);
    one.object = cold();
    let one = Node::open(one, agent("one", Way::Memcpy, Some(store.path()))).await;
    let blocks = chain(1, 12);
    assert_eq!(one.store(&blocks).await.stored, 12);
    one.sink.until_stored(&blocks[..8], Tier::Object).await;
    let sources = one.fetch_own(&blocks).await;
    assert_eq!(count(&sources, &Source::Miss), 0);
    assert!(count(&sources, &Source::Object) >= 8, "{sources:?}");

    let mut two = config("two", 4);
    two.object = cold();
    let two = Node::open(two, agent("two", Way::Memcpy, Some(store.path()))).await;
    let hints = Located {
        shared: std::iter::once(0..8).collect(),
        ..Located::default()
    };
    assert_eq!(
        two.fetch(&blocks[..8], hints).await,
        vec![Source::Object; 8]
    );
}

/// Two segments of four blocks on disk, and an object store behind: segments are saved before they go.
#[tokio::test]
async fn blocks_of_a_dropped_segment_come_back_from_the_object_store() {
    let (directory, store) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut config = config("pod", 4);
    config.disk = disk(directory.path(), 2);
    config.object = cold();
    let node = Node::open(config, agent("pod", Way::Memcpy, Some(store.path()))).await;
    let blocks = chain(1, 24);
    for blocks in blocks.chunks(4) {
        assert_eq!(node.store(blocks).await.stored, 4);
    }
    node.sink
        .until(|events| {
            let rescued = blocks
                .iter()
                .filter(|info| stored(events, info, Tier::Object));
            rescued.count() >= 8
        })
        .await;
    let sources = node.fetch_own(&blocks).await;
    assert!(count(&sources, &Source::Object) > 0, "{sources:?}");
    assert!(node.stat("segments_dropped").await > 0);
    let files = std::fs::read_dir(directory.path()).unwrap();
    let segments = files
        .filter(|file| {
            file.as_ref()
                .unwrap()
                .file_name()
                .to_string_lossy()
                .starts_with("segment-")
        })
        .count();
    assert!(segments <= 2, "{segments} segment files");
}

/// Stops a node whose blocks are on disk, with or without an orderly end, and starts it again.
#[tokio::test]
async fn blocks_on_disk_survive_a_restart_and_are_announced_as_a_snapshot() {
    for orderly in [true, false] {
        let directory = tempfile::tempdir().unwrap();
        let blocks = chain(1, 12);
        {
            let node = restarted(directory.path(), "first").await;
            assert_eq!(node.store(&blocks).await.stored, 12);
            node.sink.until_stored(&blocks[..8], Tier::Disk).await;
            if orderly {
                let sink = node.sink.clone();
                node.shutdown().await;
                assert_eq!(sink.events().last(), Some(&NodeEvent::Cleared));
            } else {
                // The driver's task ends with the last handle; the directory is free when it has.
                drop(node);
            }
        }
        let node = eventually_restarted(directory.path()).await;
        let snapshot = node.sink.events();
        assert_eq!(snapshot.first(), Some(&NodeEvent::Cleared));
        assert!(
            blocks[..8]
                .iter()
                .all(|info| stored(&snapshot, info, Tier::Disk))
        );
        assert_eq!(node.stat("scan_faults").await, 0);
        assert_eq!(node.fetch_own(&blocks[..8]).await, vec![Source::Disk; 8]);
        assert_eq!(node.store(&chain(2, 8)).await.stored, 8);
    }
}

async fn restarted(directory: &Path, name: &str) -> Node {
    let mut config = config(name, 4);
    config.disk = disk(directory, 8);
    Node::open(config, agent(name, Way::Memcpy, None)).await
}

/// Opens as soon as the earlier node's tasks have let go of the directory.
async fn eventually_restarted(directory: &Path) -> Node {
    let opened = async {
        loop {
            let mut config = config("second", 4);
            config.disk = disk(directory, 8);
            match Node::try_open(config, agent("second", Way::Memcpy, None)).await {
                Ok(node) => return node,
                Err(error) => assert_eq!(error.kind(), ErrorKind::Busy, "{error}"),
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, opened)
        .await
        .expect("the directory becomes free")
}

/// The same directory twice.
#[tokio::test]
async fn a_directory_in_use_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let _first = restarted(directory.path(), "first").await;
    let mut config = config("second", 4);
    config.disk = disk(directory.path(), 8);
    let refused = Node::try_open(config, agent("second", Way::Memcpy, None)).await;
    let error = refused.err().expect("the directory is held");
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(
        error
            .context()
            .contains(&directory.path().display().to_string()),
        "{error}"
    );
}

/// A budget that became smaller between two starts.
#[tokio::test]
async fn segments_beyond_a_smaller_budget_are_deleted_at_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let blocks = chain(1, 20);
    let node = restarted(directory.path(), "first").await;
    assert_eq!(node.store(&blocks).await.stored, 20);
    node.sink.until_stored(&blocks[..16], Tier::Disk).await;
    node.shutdown().await;
    let mut config = config("second", 4);
    config.disk = disk(directory.path(), 2);
    let node = Node::open(config, agent("second", Way::Memcpy, None)).await;
    assert!(
        !directory
            .path()
            .join(kvfabric_tiers::disk::file_name(2))
            .exists()
    );
    let snapshot = node.sink.events();
    let kept = blocks
        .iter()
        .filter(|info| stored(&snapshot, info, Tier::Disk))
        .count();
    // The manager may clear one of the two full segments at once, to have somewhere to write.
    assert!((4..=8).contains(&kept), "{kept} blocks");
}

type Spoil = fn(&mut CacheConfig);

/// Each field of the configuration that can be wrong.
#[tokio::test]
async fn a_wrong_configuration_is_refused_by_field() {
    let directory = tempfile::tempdir().unwrap();
    let spoil: [(&str, Spoil); 5] = [
        ("block_bytes", |config| config.block_bytes = 0),
        ("host_bytes", |config| config.host_bytes = BLOCK),
        ("disk: segment_bytes", |config| {
            config.disk.as_mut().unwrap().segment_bytes = 1
        }),
        ("disk.bytes", |config| {
            config.disk.as_mut().unwrap().bytes = 1
        }),
        ("locate_timeout", |config| {
            config.locate_timeout = Duration::ZERO
        }),
    ];
    for (field, spoil) in spoil {
        let mut config = config("pod", 4);
        config.disk = disk(directory.path(), 2);
        spoil(&mut config);
        let refused = Node::try_open(config, agent("pod", Way::Memcpy, None)).await;
        let error = refused.err().expect("a wrong field");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.context().starts_with(field), "{error}");
    }
}

/// Calls after the end; and a second end.
#[tokio::test]
async fn after_the_shutdown_every_call_is_refused_and_the_last_event_is_cleared() {
    let node = Node::open(config("pod", 4), agent("pod", Way::Memcpy, None)).await;
    node.store(&chain(1, 2)).await;
    let deadline = Instant::now() + PATIENCE;
    node.cache.shutdown(deadline).await.unwrap();
    assert_eq!(node.sink.events().last(), Some(&NodeEvent::Cleared));
    assert_eq!(
        node.cache.position().next.0,
        node.sink.events().len() as u64
    );
    let refused = node.cache.shutdown(deadline).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Cancelled);
    assert_eq!(
        node.cache.lookup(&[]).await.unwrap_err().kind(),
        ErrorKind::Cancelled
    );
    assert_eq!(
        node.cache.stats().await.unwrap_err().kind(),
        ErrorKind::Cancelled
    );
}

/// Engine memory of another size than a block.
#[tokio::test]
async fn memory_of_the_wrong_size_is_refused_with_its_position() {
    let node = Node::open(config("pod", 4), agent("pod", Way::Memcpy, None)).await;
    let memory = node.engine.descriptor(0, BLOCK - 1).into();
    let wrong = vec![StoreBlock {
        info: block(1, 0),
        memory,
    }];
    let error = node
        .cache
        .store(wrong, Instant::now() + PATIENCE)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.context().starts_with("block 0: "), "{error}");
}

/// Fetches into memory that was never registered, and into memory that was deregistered, then into sound memory.
#[tokio::test]
async fn unusable_engine_memory_is_refused_and_costs_no_copy() {
    let node = Node::open(config("pod", 4), agent("pod", Way::Memcpy, None)).await;
    let blocks = chain(1, 2);
    assert_eq!(node.store(&blocks).await.stored, 2);
    let memory = HostMemory::anonymous(2 * BLOCK).unwrap();
    let gone = node
        .agent
        .register(memory, RegionOptions::default())
        .unwrap();
    let memory = gone.descriptor(0, BLOCK);
    gone.deregister().await;
    let into = |memory| {
        let info = blocks[0];
        let fetch = vec![FetchBlock { info, memory }];
        let deadline = Instant::now() + PATIENCE;
        node.cache.fetch(fetch, Located::default(), deadline)
    };
    let past_the_end = node.engine.descriptor(node.engine.bytes(), BLOCK);
    for memory in [memory, past_the_end] {
        let error = into(memory.into()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.context().contains("descriptor 0"), "{error}");
    }
    assert_eq!(node.stat("corrupt").await, 0);
    assert_eq!(node.fetch_own(&blocks).await, vec![Source::Host; 2]);
}

/// The engine takes its memory back between the call and the copies, from host memory, disk and objects.
#[tokio::test]
async fn memory_deregistered_during_a_fetch_costs_no_copy() {
    let (directory, store) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut config = config("pod", 4);
    config.disk = disk(directory.path(), 2);
    config.object = cold();
    let node = Node::open(config, agent("pod", Way::Memcpy, Some(store.path()))).await;
    let blocks = chain(1, 12);
    assert_eq!(node.store(&blocks).await.stored, 12);
    let in_objects = |events: &Vec<_>| {
        let of = blocks.iter();
        of.filter(|info| stored(events, info, Tier::Object)).count() >= 4
    };
    node.sink.until(in_objects).await;
    let before = node.fetch_own(&blocks).await;
    for source in [Source::Host, Source::Disk, Source::Object] {
        assert!(count(&before, &source) > 0, "{before:?}");
    }

    for info in &blocks {
        let memory = HostMemory::anonymous(2 * BLOCK).unwrap();
        let engine = node.agent.register(memory, RegionOptions::default());
        let engine = engine.unwrap();
        // The second is nowhere, so that the directory is asked.
        let wanted = [*info, block(9, 0)].into_iter().zip(0..);
        let wanted = wanted.map(|(info, at)| FetchBlock {
            info,
            memory: engine.descriptor(at * BLOCK, BLOCK).into(),
        });
        *node.guide.closes.lock().unwrap() = Some(engine.clone());
        let deadline = Instant::now() + PATIENCE;
        let fetch = node
            .cache
            .fetch(wanted.collect(), Located::default(), deadline);
        assert_eq!(fetch.await.unwrap().sources, vec![Source::Miss; 2]);
    }
    assert_eq!(node.stat("corrupt").await, 0);
    assert_eq!(node.stat("corrupt_blocks").await, 0);
    let after = node.fetch_own(&blocks).await;
    assert_eq!(count(&after, &Source::Miss), 0, "{after:?}");
}

/// A deadline in the past, of blocks that are in host memory.
#[tokio::test]
async fn a_fetch_whose_deadline_has_passed_misses() {
    let node = Node::open(config("pod", 4), agent("pod", Way::Memcpy, None)).await;
    let blocks = chain(1, 2);
    node.store(&blocks).await;
    let sources = node
        .fetch_at(&blocks, Located::default(), 0, Duration::ZERO)
        .await;
    assert_eq!(sources, vec![Source::Miss; 2]);
    assert_eq!(node.fetch_own(&blocks).await, vec![Source::Host; 2]);
}
