//! Blocks that an engine wants in memory of a GPU. The driver is a stand-in: there is no device.

use std::time::Instant;

use kvcache_core::ports::Located;
use kvcache_core::{BlockInfo, Tier};
use kvfabric_tiers::{CacheConfig, FetchBlock, FetchReport, Pages, Segment, Source, StoreBlock};
use kvfabric_transfer::{Agent, CudaOptions, CudaStandIn, Region};

use crate::support::*;

/// More than there are buffers for blocks on their way up.
const MANY: u8 = 40;

/// A node whose engine has its blocks on a GPU.
pub(crate) struct OnDevice {
    pub(crate) driver: CudaStandIn,
    pub(crate) node: Node,
    pub(crate) engine: Region,
    pub(crate) address: u64,
}

impl OnDevice {
    pub(crate) async fn open(
        config: CacheConfig,
        way: Way,
        objects: Option<&std::path::Path>,
    ) -> Self {
        let driver = CudaStandIn::new(1);
        let agent = agent(config.pod.as_str(), way, objects);
        driver.serve(&agent, CudaOptions::default()).unwrap();
        Self::over(driver, config, agent).await
    }

    /// With an agent that the driver serves.
    pub(crate) async fn over(driver: CudaStandIn, config: CacheConfig, agent: Agent) -> Self {
        let node = Node::open(config, agent).await;
        let memory = driver.allocate(0, ENGINE_SLOTS as u64 * BLOCK).unwrap();
        let address = memory.address();
        let engine = node.agent.register_device(memory).unwrap();
        Self {
            driver,
            node,
            engine,
            address,
        }
    }

    pub(crate) async fn report(
        &self,
        blocks: &[BlockInfo],
        hints: Located,
        deadline: Instant,
    ) -> FetchReport {
        let wiped = vec![0xee; ENGINE_SLOTS * BLOCK as usize];
        self.driver.write(self.address, &wiped);
        let wanted = blocks.iter().zip((0..).step_by(BLOCK as usize));
        let wanted = wanted.map(|(info, offset)| FetchBlock {
            info: *info,
            memory: self.engine.descriptor(offset, BLOCK).into(),
        });
        let cache = &self.node.cache;
        cache
            .fetch(wanted.collect(), hints, deadline)
            .await
            .unwrap()
    }

    /// Fetches into wiped memory of the device, and checks every byte of what is said to be there; what is not was not touched.
    pub(crate) async fn fetch(&self, blocks: &[BlockInfo], hints: Located) -> Vec<Source> {
        let mut report = self.report(blocks, hints, Instant::now() + PATIENCE).await;
        assert!(report.drained().await);
        let depth = report.depth();
        for (at, info) in blocks.iter().enumerate() {
            let found = self.driver.read(self.address + at as u64 * BLOCK, BLOCK);
            let is_right = found == bytes_of(info);
            assert!(is_right || at >= depth, "wrong bytes of {info:?}");
            assert!(
                is_right || found == [0xee; BLOCK as usize],
                "half of {info:?}"
            );
        }
        self.driver.check();
        report.sources
    }
}

/// From host memory, more than go up at a time; and stored from the device before.
#[tokio::test]
async fn blocks_are_stored_from_a_device_and_fetched_into_it() {
    let on = OnDevice::open(config("pod", 64), Way::Memcpy, None).await;
    let blocks = chain(1, MANY);
    let stored = blocks.iter().enumerate().map(|(at, info)| {
        let offset = at as u64 * BLOCK;
        on.driver.write(on.address + offset, &bytes_of(info));
        StoreBlock {
            info: *info,
            memory: on.engine.descriptor(offset, BLOCK).into(),
        }
    });
    let deadline = Instant::now() + PATIENCE;
    let report = on.node.cache.store(stored.collect(), deadline).await;
    assert_eq!(report.unwrap().stored, u32::from(MANY));
    let sources = on.fetch(&blocks, Located::default()).await;
    assert_eq!(sources, vec![Source::Host; MANY as usize]);
}

/// A block in the layers of an engine's pages, each elsewhere.
#[tokio::test]
async fn a_block_in_pieces_goes_up_into_all_of_them() {
    let on = OnDevice::open(config("pod", 8), Way::Memcpy, None).await;
    let blocks = chain(1, 2);
    on.node.store(&blocks).await;
    let segment = |layer: u64| Segment {
        region: on.engine.id(),
        offset: layer * 10_000,
        stride: 1000,
        len: 1000,
    };
    let pages = Pages::new(&on.node.agent, (0..5).map(segment).collect(), 2).unwrap();
    let wanted = blocks.iter().zip(0..).map(|(info, number)| FetchBlock {
        info: *info,
        memory: pages.block(number).unwrap(),
    });
    let deadline = Instant::now() + PATIENCE;
    let fetched = on
        .node
        .cache
        .fetch(wanted.collect(), Located::default(), deadline);
    assert_eq!(fetched.await.unwrap().depth(), 2);
    for (info, number) in blocks.iter().zip(0_u64..) {
        let layers = (0..5).map(|layer| on.address + layer * 10_000 + number * 1000);
        let found: Vec<u8> = layers.flat_map(|at| on.driver.read(at, 1000)).collect();
        assert!(found == bytes_of(info), "{number}");
    }
}

/// From disk, where a byte is wrong in one record: it is a miss, its bytes never get to the device, and what is before it is served.
#[tokio::test]
async fn a_block_that_is_damaged_on_disk_never_gets_to_the_device() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = config("pod", 4);
    config.disk = disk(directory.path(), 8);
    let on = OnDevice::open(config, Way::Memcpy, None).await;
    let blocks = chain(1, 12);
    assert_eq!(on.node.store(&blocks).await.stored, 12);
    let later = Instant::now() + PATIENCE;
    on.node.cache.flush(later).await.unwrap();
    let sources = on.fetch(&blocks, Located::default()).await;
    assert!(
        sources.iter().all(|source| *source != Source::Miss),
        "{sources:?}"
    );
    assert!(sources.contains(&Source::Disk), "{sources:?}");
    on.node.store(&chain(2, 8)).await;
    on.node.cache.flush(later).await.unwrap();
    let files = std::fs::read_dir(directory.path()).unwrap();
    for file in files.map(|file| file.unwrap().path()) {
        let bytes = std::fs::read(&file).unwrap();
        let wanted = bytes_of(&blocks[2]);
        let found = bytes.windows(wanted.len()).position(|one| one == wanted);
        if let Some(at) = found {
            flip(&file, at as u64 + 100);
        }
    }
    let sources = on.fetch(&blocks, Located::default()).await;
    assert_eq!(sources[1..3], [Source::Disk, Source::Miss], "{sources:?}");
    let at = on.address + 2 * BLOCK;
    assert!(on.driver.read(at, BLOCK) == [0xee; BLOCK as usize]);
    assert_eq!(on.node.stat("corrupt_blocks").await, 1);
}

/// From a peer's memory, over shared memory and over TCP.
#[tokio::test]
async fn blocks_of_a_peer_come_up() {
    for way in [Way::Shm, Way::Tcp] {
        let holder = Node::open(config("holder", 32), agent("holder", way, None)).await;
        let blocks = chain(1, 20);
        holder.store(&blocks).await;
        let on = OnDevice::open(config("pod", 32), way, None).await;
        let sources = on.fetch(&blocks, holder.hints(20)).await;
        let from = Source::Peer {
            pod: holder.pod.clone(),
            tier: Tier::Host,
        };
        assert_eq!(sources, vec![from; 20], "{way:?}");
    }
}

#[tokio::test]
async fn blocks_of_objects_come_up() {
    let objects = tempfile::tempdir().unwrap();
    let mut config = config("pod", 2);
    config.object = cold();
    let on = OnDevice::open(config, Way::Memcpy, Some(objects.path())).await;
    let blocks = chain(1, 4);
    on.node.store(&blocks).await;
    let later = Instant::now() + PATIENCE;
    on.node.cache.flush(later).await.unwrap();
    on.node.store(&chain(2, 2)).await;
    on.node.cache.flush(later).await.unwrap();
    let hints = Located {
        shared: vec![0..4],
        ..Located::default()
    };
    let sources = on.fetch(&blocks, hints).await;
    assert!(sources.contains(&Source::Object), "{sources:?}");
    assert!(!sources.contains(&Source::Miss), "{sources:?}");
}

/// The device stands still, and a copy that the driver refuses: misses, and the blocks stay where they are. The memory is told to be in
/// use until the device has gone on.
#[tokio::test]
async fn a_copy_up_that_fails_is_a_miss() {
    let on = OnDevice::open(config("pod", 8), Way::Memcpy, None).await;
    let blocks = chain(1, 2);
    on.node.store(&blocks).await;
    on.driver.fail_next_copy();
    on.driver.set_running(false);
    let soon = Instant::now() + std::time::Duration::from_millis(300);
    let mut report = on.report(&blocks, Located::default(), soon).await;
    assert_eq!(report.sources, vec![Source::Miss; 2]);
    assert!(!report.unsettled.is_empty());
    on.driver.set_running(true);
    assert!(report.drained().await);
    let sources = on.fetch(&blocks, Located::default()).await;
    assert_eq!(sources, vec![Source::Host; 2]);
}
