//! Damage, and a full disk: the block is a miss, it is counted, the rest is served.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use kvcache_core::Tier;
use kvcache_core::ports::Located;
use kvfabric_tiers::Source;
use kvfabric_tiers::disk::{SegmentLayout, file_name};
use kvfabric_tiers::object::ObjectNames;

use crate::support::*;

/// A node with twelve blocks, of which the first eight are on disk, and the slots where they are.
async fn with_blocks_on_disk(directory: &Path) -> Node {
    let mut config = config("pod", 4);
    config.disk = disk(directory, 8);
    let node = Node::open(config, agent("pod", Way::Memcpy, None)).await;
    let blocks = chain(1, 12);
    assert_eq!(node.store(&blocks).await.stored, 12);
    node.sink.until_stored(&blocks[..8], Tier::Disk).await;
    node
}

fn layout() -> SegmentLayout {
    SegmentLayout::new(4096 + 4 * (4096 + 8192), BLOCK).unwrap()
}

/// Which segment file and which position a block of [`with_blocks_on_disk`] is in: found by its bytes.
fn find(directory: &Path, number: u8) -> (PathBuf, u32) {
    let wanted = bytes_of(&block(1, number));
    for segment in 0..8 {
        let path = directory.join(file_name(segment));
        let Ok(bytes) = std::fs::read(&path) else {
            continue;
        };
        for position in 0..layout().slots() {
            let at = layout().payload_offset(position) as usize;
            if bytes.get(at..at + wanted.len()) == Some(&wanted[..]) {
                return (path, position);
            }
        }
    }
    panic!("block {number} is not on disk");
}

/// One byte of one block's payload, while the node runs.
#[tokio::test]
async fn a_flipped_byte_on_disk_is_a_miss_of_that_block_alone() {
    let directory = tempfile::tempdir().unwrap();
    let node = with_blocks_on_disk(directory.path()).await;
    let (file, position) = find(directory.path(), 3);
    flip(&file, layout().payload_offset(position) + 1234);
    let blocks = chain(1, 12);
    let sources = node.fetch_own(&blocks).await;
    assert_eq!(count(&sources[..3], &Source::Miss), 0, "{sources:?}");
    assert_eq!(sources[3..], vec![Source::Miss; 9]);
    assert_eq!(node.stat("corrupt_blocks").await, 1);
    assert!(
        !stored(&node.sink.events(), &blocks[3], Tier::Disk),
        "its removal is announced"
    );
    // The rest is served, and the damage is not met again.
    let sources = node.fetch_own(&blocks[4..]).await;
    assert_eq!(count(&sources, &Source::Miss), 0, "{sources:?}");
    assert_eq!(node.stat("corrupt_blocks").await, 1);
    // The engine computes the block again and stores it: everything is back.
    assert_eq!(node.store(&blocks[3..4]).await.stored, 1);
    let sources = node.fetch_own(&blocks).await;
    assert_eq!(count(&sources, &Source::Miss), 0, "{sources:?}");
}

/// The file becomes shorter while the node runs, in the middle of a block.
#[tokio::test]
async fn a_file_cut_under_a_running_node_costs_only_what_was_cut() {
    let directory = tempfile::tempdir().unwrap();
    let node = with_blocks_on_disk(directory.path()).await;
    let (path, position) = find(directory.path(), 2);
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(layout().payload_offset(position) + 100)
        .unwrap();
    let blocks = chain(1, 8);
    let sources = node.fetch_own(&blocks).await;
    assert_eq!(sources[2], Source::Miss);
    for (number, info) in (0..).zip(&blocks) {
        let path_of = std::panic::catch_unwind(|| find(directory.path(), number));
        if path_of.is_ok() {
            let sources = node.fetch_own(std::slice::from_ref(info)).await;
            assert_ne!(sources, [Source::Miss], "block {number}");
        }
    }
    assert!(node.stat("corrupt_blocks").await >= 1);
}

/// A segment that the disk cannot read is saved to the object store as far as it goes; the segments after it, too.
#[tokio::test]
async fn a_segment_that_cannot_be_read_does_not_stop_the_object_tier() {
    let (directory, store) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut config = config("pod", 4);
    config.disk = disk(directory.path(), 3);
    config.object = cold();
    // Whatever is stopped stays stopped for the whole test.
    config.limits.retry_after = std::time::Duration::from_secs(600);
    let node = Node::open(config, agent("pod", Way::Memcpy, Some(store.path()))).await;
    let blocks = chain(1, 12);
    assert_eq!(node.store(&blocks).await.stored, 12);
    node.sink.until_stored(&blocks[..8], Tier::Disk).await;
    let (path, position) = find(directory.path(), 0);
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(layout().payload_offset(position) + 100)
        .unwrap();
    let others = chain(2, 32);
    assert_eq!(node.store(&others).await.stored, 32);
    node.sink.until_stored(&others[..8], Tier::Object).await;
    assert!(node.stat("corrupt_blocks").await >= 1);
    assert_eq!(node.stat("disk_lost").await, 0);
}

/// A name that leads nowhere, among good segments.
#[tokio::test]
async fn a_segment_file_that_cannot_be_opened_at_the_start_is_counted() {
    let directory = tempfile::tempdir().unwrap();
    let node = with_blocks_on_disk(directory.path()).await;
    node.shutdown().await;
    let nowhere = directory.path().join("nowhere");
    std::os::unix::fs::symlink(nowhere, directory.path().join(file_name(7))).unwrap();
    let mut config = config("pod", 8);
    config.disk = disk(directory.path(), 8);
    let node = Node::open(config, agent("pod", Way::Memcpy, None)).await;
    assert_eq!(node.stat("scan_faults").await, 1);
    assert!(node.stat("recovered").await >= 8);
}

/// A header, a payload, the end of a file and a foreign version, all damaged while the node is down.
#[tokio::test]
async fn damage_found_at_the_start_is_counted_and_the_rest_is_served() {
    let directory = tempfile::tempdir().unwrap();
    let node = with_blocks_on_disk(directory.path()).await;
    node.shutdown().await;
    let (file, position) = find(directory.path(), 1);
    flip(&file, layout().record_offset(position) + 60);
    let (file, position) = find(directory.path(), 2);
    flip(&file, layout().record_offset(position) + 8);
    let (file, position) = find(directory.path(), 5);
    flip(&file, layout().payload_offset(position));

    let mut config = config("pod", 8);
    config.disk = disk(directory.path(), 8);
    let node = Node::open(config, agent("pod", Way::Memcpy, None)).await;
    assert_eq!(node.stat("scan_faults").await, 2);
    for number in [1, 2, 5] {
        let sources = node.fetch_own(&[block(1, number)]).await;
        assert_eq!(sources, [Source::Miss], "block {number}");
    }
    assert_eq!(node.stat("corrupt_blocks").await, 1);
    for number in [0, 3, 4, 6, 7] {
        let sources = node.fetch_own(&[block(1, number)]).await;
        assert_eq!(sources, [Source::Disk], "block {number}");
    }
}

/// A file cut while the node is down.
#[tokio::test]
async fn a_cut_file_is_served_up_to_the_cut_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let node = with_blocks_on_disk(directory.path()).await;
    node.shutdown().await;
    let (path, position) = find(directory.path(), 2);
    let cut = layout().payload_offset(position) + 10;
    std::fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(cut)
        .unwrap();
    let survivors: Vec<u8> = (0..8)
        .filter(|number| std::panic::catch_unwind(|| find(directory.path(), *number)).is_ok())
        .collect();
    assert!(
        !survivors.contains(&2) && survivors.len() >= 4,
        "{survivors:?}"
    );
    let mut config = config("pod", 8);
    config.disk = disk(directory.path(), 8);
    let node = Node::open(config, agent("pod", Way::Memcpy, None)).await;
    assert!(node.stat("scan_faults").await >= 1);
    for number in 0..8 {
        let sources = node.fetch_own(&[block(1, number)]).await;
        let expected = if survivors.contains(&number) {
            Source::Disk
        } else {
            Source::Miss
        };
        assert_eq!(sources, [expected], "block {number}");
    }
}

/// The same directory, another model: nothing is served, everything is counted, and writing goes on.
#[tokio::test]
async fn another_models_segments_are_skipped_and_their_numbers_reused() {
    let directory = tempfile::tempdir().unwrap();
    let node = with_blocks_on_disk(directory.path()).await;
    node.shutdown().await;
    let mut other = config("pod", 4);
    other.disk = disk(directory.path(), 8);
    other.model_identity = [1; 32];
    let node = Node::open(other, agent("pod", Way::Memcpy, None)).await;
    assert!(node.stat("scan_faults").await >= 2);
    assert_eq!(node.stat("recovered").await, 0);
    let blocks = chain(1, 12);
    assert_eq!(node.fetch_own(&blocks[..1]).await, [Source::Miss]);
    assert_eq!(node.store(&blocks).await.stored, 12);
    let sources = node.fetch_own(&blocks).await;
    assert_eq!(count(&sources, &Source::Miss), 0, "{sources:?}");
}

/// Objects with a flipped byte in payload and header, cut, gone, and holding another block.
#[tokio::test]
async fn a_damaged_object_is_a_miss_of_that_block_alone() {
    let store = tempfile::tempdir().unwrap();
    let mut with_objects = config("pod", 4);
    with_objects.object = cold();
    let node = Node::open(
        with_objects.clone(),
        agent("pod", Way::Memcpy, Some(store.path())),
    )
    .await;
    let blocks = chain(1, 16);
    assert_eq!(node.store(&blocks).await.stored, 16);
    node.sink.until_stored(&blocks[..8], Tier::Object).await;
    node.shutdown().await;

    let names = ObjectNames::new("kv", &IDENTITY).unwrap();
    let path = |number: usize| store.path().join(names.name(&blocks[number].key));
    flip(&path(1), 256 + 77);
    flip(&path(2), 100);
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(path(3))
        .unwrap();
    file.set_len(3000).unwrap();
    std::fs::remove_file(path(4)).unwrap();
    std::fs::copy(path(6), path(5)).unwrap();
    std::fs::write(path(0), b"").unwrap();

    let node = Node::open(with_objects, agent("pod", Way::Memcpy, Some(store.path()))).await;
    for (number, info) in blocks[..8].iter().enumerate() {
        let hints = Located {
            shared: std::iter::once(0..1).collect(),
            ..Located::default()
        };
        let sources = node.fetch(std::slice::from_ref(info), hints).await;
        let expected = if number < 6 {
            Source::Miss
        } else {
            Source::Object
        };
        assert_eq!(sources, [expected], "block {number}");
    }
    // All but the one that is gone, which is nothing wrong.
    assert_eq!(node.stat("corrupt_blocks").await, 5);
}

/// Two nodes with the same blocks and one store. The inode tells whether a file was written again.
#[tokio::test]
async fn an_object_that_is_there_is_written_again_only_when_it_is_damaged() {
    let store = tempfile::tempdir().unwrap();
    let open = async |name: &str| {
        let mut config = config(name, 4);
        config.object = cold();
        Node::open(config, agent(name, Way::Memcpy, Some(store.path()))).await
    };
    let blocks = chain(1, 12);
    let one = open("one").await;
    assert_eq!(one.store(&blocks).await.stored, 12);
    one.sink.until_stored(&blocks[..8], Tier::Object).await;
    let names = ObjectNames::new("kv", &IDENTITY).unwrap();
    let path = |number: usize| store.path().join(names.name(&blocks[number].key));
    let files = || -> Vec<u64> {
        let file = |number| std::fs::metadata(path(number)).unwrap().ino();
        (0..8).map(file).collect()
    };
    let first = files();
    let two = open("two").await;
    assert_eq!(two.store(&blocks).await.stored, 12);
    two.sink.until_stored(&blocks[..8], Tier::Object).await;
    assert_eq!(files(), first, "what is there stays");

    let good = std::fs::read(path(1)).unwrap();
    flip(&path(1), 256 + 77);
    assert_eq!(two.fetch_own(&blocks[1..2]).await, [Source::Miss]);
    assert_eq!(two.store(&blocks).await.stored, 12);
    let until = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while std::fs::read(path(1)).unwrap() != good {
        assert!(std::time::Instant::now() < until, "the damage stays");
        tokio::task::yield_now().await;
    }
    assert_eq!(files()[2..], first[2..]);
}

const TMPFS: &str = "KVFABRIC_TEST_SMALL_DISK";

/// A file system of 128 KiB, in a mount namespace of its own: the test runs itself again inside it.
#[test]
fn a_full_disk_stops_offload_and_serving_goes_on() {
    if let Some(directory) = std::env::var_os(TMPFS) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(on_a_full_disk(Path::new(&directory)));
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let probe = Command::new("unshare").args(["-rm", "true"]).output();
    if !probe.as_ref().is_ok_and(|output| output.status.success()) {
        println!("SKIPPED: no mount namespaces here ({probe:?}); a full disk is not tested");
        return;
    }
    let script = "mount -t tmpfs -o size=128k tmpfs \"$1\" && shift && exec \"$@\"";
    let output = Command::new("unshare")
        .args(["-rm", "sh", "-c", script, "sh"])
        .arg(directory.path())
        .arg(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "faults::a_full_disk_stops_offload_and_serving_goes_on",
            "--nocapture",
        ])
        .env(TMPFS, directory.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(text.contains("1 passed"), "{text}");
}

async fn on_a_full_disk(directory: &Path) {
    let mut config = config("pod", 4);
    // Twenty times what there is room for.
    config.disk = disk(directory, 40);
    let node = Node::open(config, agent("pod", Way::Memcpy, None)).await;
    let blocks = chain(1, 40);
    for info in &blocks {
        let report = node.store(std::slice::from_ref(info)).await;
        assert_eq!(report.failed, 0);
    }
    assert_eq!(node.stat("disk_stopped").await, 1);
    assert!(
        node.stat("demoted_disk").await > 0,
        "some were written before it was full"
    );
    assert!(
        node.stat("evicted_lost").await > 0,
        "then blocks were dropped instead"
    );
    // The newest blocks are in memory, the oldest on disk, and both are served.
    for info in [&blocks[39], &blocks[0]] {
        let sources = node.fetch_own(std::slice::from_ref(info)).await;
        assert_ne!(sources, [Source::Miss]);
    }
    assert_eq!(node.stat("corrupt_blocks").await, 0);
    assert_eq!(node.store(&chain(2, 2)).await.stored, 2);
}
