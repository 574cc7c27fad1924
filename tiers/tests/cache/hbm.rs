//! Blocks in slots of a GPU's memory. The driver is a stand-in: there is no device.

use std::time::Instant;

use kvcache_core::ports::Located;
use kvcache_core::{BlockInfo, BlockKey, ErrorKind};
use kvfabric_tiers::{FetchBlock, HbmTier, PromoteReport, Source, StoreBlock};
use kvfabric_transfer::{CudaOptions, CudaStandIn, Region};

use crate::support::*;

/// A node whose engine has its blocks on a GPU, and a tier of some slots there.
pub(crate) struct OnDevice {
    pub(crate) driver: CudaStandIn,
    pub(crate) node: Node,
    pub(crate) tier: HbmTier,
    /// Where the first slot is.
    slots: u64,
    /// The engine's memory, and its address.
    engine: Region,
    address: u64,
}

impl OnDevice {
    pub(crate) async fn open(host: u64, slots: u64) -> Self {
        Self::with(config("pod", host), slots).await
    }

    async fn with(config: kvfabric_tiers::CacheConfig, slots: u64) -> Self {
        let driver = CudaStandIn::new(1);
        let agent = agent("pod", Way::Memcpy, None);
        driver.serve(&agent, CudaOptions::default()).unwrap();
        let node = Node::open(config, agent).await;
        // The last bytes make no whole block.
        let memory = driver.lend(0, slots * BLOCK + BLOCK - 1).unwrap();
        let first = memory.address();
        let tier = HbmTier::new(&node.cache, memory).unwrap();
        let memory = driver.allocate(0, ENGINE_SLOTS as u64 * BLOCK).unwrap();
        let address = memory.address();
        let engine = node.agent.register_device(memory).unwrap();
        Self {
            driver,
            node,
            tier,
            slots: first,
            engine,
            address,
        }
    }

    pub(crate) async fn promote(&self, blocks: &[BlockInfo]) -> PromoteReport {
        let promoted = self.tier.promote(blocks.to_vec(), later());
        promoted.await.unwrap()
    }

    /// Fetches into wiped memory of the engine and checks every byte of what is said to be there.
    pub(crate) async fn fetch(&self, blocks: &[BlockInfo]) -> usize {
        let wiped = vec![0xee; blocks.len() * BLOCK as usize];
        self.driver.write(self.address, &wiped);
        let wanted = blocks.iter().zip((0..).step_by(BLOCK as usize));
        let wanted = wanted.map(|(info, offset)| FetchBlock {
            info: *info,
            memory: self.engine.descriptor(offset, BLOCK).into(),
        });
        let mut fetched = self.tier.fetch(wanted.collect(), later()).await.unwrap();
        assert!(fetched.drained().await);
        for (at, info) in blocks.iter().enumerate().take(fetched.depth) {
            let found = self.driver.read(self.address + at as u64 * BLOCK, BLOCK);
            assert!(found == bytes_of(info), "wrong bytes of {info:?}");
        }
        fetched.depth
    }
}

pub(crate) fn later() -> Instant {
    Instant::now() + PATIENCE
}

pub(crate) fn keys(blocks: &[BlockInfo]) -> Vec<BlockKey> {
    blocks.iter().map(|block| block.key).collect()
}

/// From the engine's memory on the GPU into host memory, up into slots, and from there into the engine's memory again.
#[tokio::test]
async fn blocks_go_down_up_and_across_a_device() {
    let on = OnDevice::open(8, 8).await;
    let blocks = chain(1, 5);
    let stored = blocks.iter().enumerate().map(|(at, info)| {
        let offset = (10 + at as u64) * BLOCK;
        on.driver.write(on.address + offset, &bytes_of(info));
        StoreBlock {
            info: *info,
            memory: on.engine.descriptor(offset, BLOCK).into(),
        }
    });
    let report = on
        .node
        .cache
        .store(stored.collect(), later())
        .await
        .unwrap();
    assert_eq!((report.stored, report.failed), (5, 0));
    assert_eq!(on.node.fetch_own(&blocks).await, vec![Source::Host; 5]);
    assert_eq!(on.fetch(&blocks).await, 0);
    let report = on.promote(&blocks).await;
    assert_eq!((report.promoted, report.failed, report.missed), (5, 0, 0));
    assert_eq!(on.promote(&blocks).await.already_held, 5);
    assert_eq!(on.fetch(&blocks).await, 5);
    assert_eq!((on.tier.held(), on.tier.lookup(&keys(&blocks))), (5, 5));
    // Neither the cache nor its checksums have a part in it.
    on.node.cache.clear().await.unwrap();
    assert_eq!(on.fetch(&blocks).await, 5);
    on.driver.check();
}

/// The cache has two of four.
#[tokio::test]
async fn what_the_cache_does_not_have_does_not_come_up() {
    let on = OnDevice::open(8, 8).await;
    let blocks = chain(1, 4);
    on.node.store(&blocks[..2]).await;
    let report = on.promote(&blocks).await;
    assert_eq!((report.promoted, report.missed), (2, 2));
    assert_eq!(on.fetch(&blocks).await, 2);
    assert_eq!(on.tier.held(), 2);
    on.node.store(&blocks[2..]).await;
    let report = on.promote(&blocks).await;
    assert_eq!((report.promoted, report.already_held), (2, 2));
    assert_eq!(on.fetch(&blocks).await, 4);
}

/// A byte of the segment file is wrong: the block does not come up, and what is before it does.
#[tokio::test]
async fn a_block_that_is_damaged_below_does_not_come_up() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = config("pod", 4);
    config.disk = disk(directory.path(), 8);
    let on = OnDevice::with(config, 8).await;
    let blocks = chain(1, 12);
    assert_eq!(on.node.store(&blocks).await.stored, 12);
    on.node.cache.flush(later()).await.unwrap();
    let files = std::fs::read_dir(directory.path()).unwrap();
    for file in files.map(|file| file.unwrap().path()) {
        let bytes = std::fs::read(&file).unwrap();
        let wanted = bytes_of(&blocks[1]);
        let found = bytes.windows(wanted.len()).position(|one| one == wanted);
        if let Some(at) = found {
            flip(&file, at as u64 + 100);
        }
    }
    let report = on.promote(&blocks).await;
    assert_eq!((report.promoted, report.missed), (1, 11), "{report:?}");
    assert_eq!(on.fetch(&blocks).await, 1);
    assert_eq!(on.node.stat("corrupt_blocks").await, 1);
}

/// Three slots, then other blocks: those that nobody has wanted for the longest time go, down if nobody below has them.
#[tokio::test]
async fn what_leaves_a_full_device_goes_down() {
    let on = OnDevice::open(4, 3).await;
    let (first, second) = (chain(1, 3), chain(2, 2));
    on.node.store(&first).await;
    assert_eq!(on.promote(&first).await.promoted, 3);
    on.node.cache.clear().await.unwrap();
    on.node.store(&second).await;
    // The first of the three is wanted again.
    assert_eq!(on.fetch(&first[..1]).await, 1);
    assert_eq!(on.promote(&second).await.promoted, 2);
    assert_eq!(on.fetch(&second).await, 2);
    assert_eq!(on.fetch(&first).await, 1);
    let held = |block: &BlockInfo| {
        let key = [block.key];
        let cache = on.node.cache.clone();
        async move { cache.lookup(&key).await.unwrap().depth }
    };
    assert_eq!(
        (
            held(&first[0]).await,
            held(&first[1]).await,
            held(&first[2]).await
        ),
        (0, 1, 1)
    );
    // The bytes are right, too.
    assert_eq!(on.node.fetch_own(&first[1..2]).await, [Source::Host]);
}

/// A chain of more blocks than slots keeps its beginning.
#[tokio::test]
async fn a_promotion_does_not_push_its_own_blocks_out() {
    let on = OnDevice::open(8, 2).await;
    let blocks = chain(1, 4);
    on.node.store(&blocks).await;
    let report = on.promote(&blocks).await;
    assert_eq!((report.promoted, report.refused), (2, 2));
    assert_eq!(on.fetch(&blocks).await, 2);
}

/// Down by hand; a byte in HBM is wrong in one of them. Whether the device sums, or the cache does below.
#[tokio::test]
async fn a_block_that_changed_on_the_device_does_not_come_down() {
    for device_sums in [true, false] {
        let mut config = config("pod", 8);
        config.device_sums = device_sums;
        changed_on_the_device(OnDevice::with(config, 4).await, device_sums).await;
    }
}

async fn changed_on_the_device(on: OnDevice, device_sums: bool) {
    let blocks = chain(1, 4);
    on.node.store(&blocks).await;
    assert_eq!(on.promote(&blocks).await.promoted, 4);
    on.node.cache.clear().await.unwrap();
    let place = (0..4).map(|slot| on.slots + slot * BLOCK);
    let place = place
        .into_iter()
        .find(|place| on.driver.read(*place, BLOCK) == bytes_of(&blocks[2]))
        .unwrap();
    let byte = on.driver.read(place + 4999, 1)[0] ^ 0x40;
    on.driver.write(place + 4999, &[byte]);
    let report = on.tier.offload(keys(&blocks), later()).await.unwrap();
    assert_eq!((report.stored, report.failed), (3, 1), "{report:?}");
    let stats = on.tier.stats();
    assert_eq!((stats.blocks, stats.corrupt, stats.offloaded), (0, 1, 3));
    assert_eq!(on.driver.launches() > 0, device_sums);
    let sources = on.node.fetch_own(&blocks).await;
    assert_eq!(
        sources,
        [Source::Host, Source::Host, Source::Miss, Source::Miss]
    );
    // Every slot and every buffer is there for others again.
    on.node.store(&blocks).await;
    assert_eq!(on.promote(&blocks).await.promoted, 4);
    on.driver.check();
}

/// A copy that the driver refuses, up and across; then the device stands still until after the deadline.
#[tokio::test]
async fn a_copy_that_fails_serves_nothing() {
    let on = OnDevice::open(8, 4).await;
    let blocks = chain(1, 2);
    on.node.store(&blocks).await;
    // The kernels are there.
    on.promote(&chain(2, 1)).await;
    on.driver.fail_next_copy();
    on.driver.set_running(false);
    let soon = Instant::now() + std::time::Duration::from_millis(200);
    let report = on.tier.promote(blocks.clone(), soon).await.unwrap();
    assert_eq!((report.promoted, report.failed), (0, 2), "{report:?}");
    assert_eq!((on.fetch_none(&blocks).await, on.tier.held()), (0, 0));
    // What failed may still write to its slots: nobody gets them.
    let again = on.tier.promote(blocks.clone(), later()).await.unwrap();
    assert_eq!(again.refused, 2, "{again:?}");
    on.driver.set_running(true);
    let until = later();
    while on.promote(&blocks).await.promoted < 2 {
        assert!(Instant::now() < until, "slots come back");
        tokio::task::yield_now().await;
    }
    assert_eq!(on.fetch(&blocks).await, 2);
    on.driver.check();
}

impl OnDevice {
    /// As [`OnDevice::fetch`] of what is not up: nothing is copied.
    async fn fetch_none(&self, blocks: &[BlockInfo]) -> usize {
        self.fetch(blocks).await
    }
}

/// Memory that cannot be a tier, and a tier that was closed.
#[tokio::test]
async fn memory_that_cannot_be_a_tier_is_refused() {
    let on = OnDevice::open(8, 4).await;
    let tier = |bytes: u64| {
        let memory = on.driver.allocate(0, bytes).unwrap();
        HbmTier::new(&on.node.cache, memory).map(drop)
    };
    let error = tier(BLOCK - 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    tier(BLOCK).unwrap();
    let bare = Node::open(config("bare", 8), agent("bare", Way::Memcpy, None)).await;
    let memory = on.driver.allocate(0, BLOCK).unwrap();
    let error = HbmTier::new(&bare.cache, memory).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");

    let blocks = chain(1, 1);
    on.node.store(&blocks).await;
    on.promote(&blocks).await;
    on.tier.close().wait(PATIENCE).unwrap();
    assert_eq!(on.fetch(&blocks).await, 0);
    let report = on.promote(&chain(1, 1)).await;
    assert_eq!(report.promoted, 0);
}

impl OnDevice {
    /// These blocks in the engine's memory on the GPU, from its tenth block on.
    fn in_engine(&self, blocks: &[BlockInfo]) -> Vec<StoreBlock> {
        let placed = blocks.iter().enumerate().map(|(at, info)| {
            let offset = (10 + at as u64) * BLOCK;
            self.driver.write(self.address + offset, &bytes_of(info));
            StoreBlock {
                info: *info,
                memory: self.engine.descriptor(offset, BLOCK).into(),
            }
        });
        placed.collect()
    }
}

/// Straight into their slots, and down from there; the cache knows nothing of them before.
#[tokio::test]
async fn blocks_of_the_engine_go_into_slots_within_the_device() {
    let on = OnDevice::open(8, 4).await;
    let blocks = chain(1, 6);
    let stored = on.tier.store(on.in_engine(&blocks), later()).await.unwrap();
    assert_eq!((stored.stored, stored.refused), (4, 2), "{stored:?}");
    let again = on.tier.store(on.in_engine(&blocks[..2]), later()).await;
    assert_eq!(again.unwrap().already_held, 2);
    assert_eq!(on.node.cache.lookup(&keys(&blocks)).await.unwrap().depth, 0);
    assert_eq!(on.fetch(&blocks).await, 4);
    let report = on.tier.offload(keys(&blocks), later()).await.unwrap();
    assert_eq!(report.stored, 4);
    assert_eq!(on.node.fetch_own(&blocks[..4]).await, vec![Source::Host; 4]);
    // A byte changes between the engine's memory and a slot.
    on.driver.spoil_before_sum(1);
    let stored = on
        .tier
        .store(on.in_engine(&blocks[..3]), later())
        .await
        .unwrap();
    assert_eq!((stored.stored, stored.failed), (2, 1), "{stored:?}");
    assert_eq!(on.tier.lookup(&keys(&blocks)), 1);
    on.driver.check();
}

/// As above, where the device does not sum: by way of the cache, which then has them, too.
#[tokio::test]
async fn blocks_of_the_engine_go_by_the_cache_where_the_device_does_not_sum() {
    let mut config = config("pod", 8);
    config.device_sums = false;
    let on = OnDevice::with(config, 4).await;
    let blocks = chain(1, 3);
    let stored = on.tier.store(on.in_engine(&blocks), later()).await.unwrap();
    assert_eq!((stored.stored, stored.failed), (3, 0), "{stored:?}");
    assert_eq!(on.node.cache.lookup(&keys(&blocks)).await.unwrap().depth, 3);
    assert_eq!(on.fetch(&blocks).await, 3);
    let stats = on.tier.stats();
    assert_eq!((stats.promoted, stats.hits, stats.unsummed), (3, 3, 3));
    assert_eq!(on.driver.launches(), 0);
}

/// A byte changes while a block is copied out of its slot: it is no hit, nobody gets it again, and those before it are there.
#[tokio::test]
async fn a_copy_that_is_not_what_came_up_is_no_hit() {
    let on = OnDevice::open(8, 4).await;
    let blocks = chain(1, 3);
    on.node.store(&blocks).await;
    assert_eq!(on.promote(&blocks).await.promoted, 3);
    on.driver.spoil_before_sum(1);
    assert_eq!(on.fetch(&blocks).await, 1);
    let stats = on.tier.stats();
    assert_eq!((stats.hits, stats.corrupt, stats.blocks), (1, 1, 2));
    assert_eq!(on.tier.lookup(&keys(&blocks)), 1);
    // The cache has it still.
    assert_eq!(on.promote(&blocks).await.promoted, 1);
    assert_eq!(on.fetch(&blocks).await, 3);
    assert_eq!(on.tier.stats().unsummed, 0);
    on.driver.check();
}

/// Two blocks are up, the cache has two more, and nobody the last one.
#[tokio::test]
async fn what_is_not_up_comes_from_below() {
    let on = OnDevice::open(8, 4).await;
    let blocks = chain(1, 5);
    on.node.store(&blocks[..4]).await;
    assert_eq!(on.promote(&blocks[..2]).await.promoted, 2);
    on.node.cache.remove(&keys(&blocks[..2])).await.unwrap();
    let wanted = || {
        let wanted = blocks.iter().zip((0..).step_by(BLOCK as usize));
        let wanted = wanted.map(|(info, offset)| FetchBlock {
            info: *info,
            memory: on.engine.descriptor(offset, BLOCK).into(),
        });
        wanted.collect()
    };
    let through = on.tier.fetch_through(wanted(), Located::default(), later());
    let report = through.await.unwrap();
    let expected = [Source::Device, Source::Device, Source::Host, Source::Host];
    assert_eq!(report.sources[..4], expected);
    assert_eq!(report.sources[4], Source::Miss);
    for (at, info) in blocks[..4].iter().enumerate() {
        let found = on.driver.read(on.address + at as u64 * BLOCK, BLOCK);
        assert!(found == bytes_of(info), "{at}");
    }
    // The device stands still: nothing below writes where the tier's own copies may still.
    on.driver.set_running(false);
    let soon = Instant::now() + std::time::Duration::from_millis(200);
    let through = on.tier.fetch_through(wanted(), Located::default(), soon);
    let mut report = through.await.unwrap();
    assert_eq!((report.depth(), report.unsettled.len()), (0, 2));
    on.driver.set_running(true);
    assert!(report.drained().await && report.unsettled.is_empty());
    on.driver.check();
}

/// A byte changes after a block has come up: it is not here, and those before it are.
#[tokio::test]
async fn a_block_that_changes_on_its_way_up_is_not_there() {
    let on = OnDevice::open(8, 4).await;
    let blocks = chain(1, 3);
    on.node.store(&blocks).await;
    on.promote(&blocks[..1]).await;
    on.tier.offload(keys(&blocks), later()).await.unwrap();
    on.driver.spoil_before_sum(1);
    let report = on.promote(&blocks).await;
    assert_eq!((report.promoted, report.missed), (1, 2), "{report:?}");
    assert_eq!((on.tier.held(), on.fetch(&blocks).await), (1, 1));
    assert_eq!(on.node.stat("corrupt_blocks").await, 1);
    // Slots that were to be filled are free.
    let others = chain(2, 3);
    on.node.store(&others).await;
    assert_eq!(on.promote(&others).await.promoted, 3);
}

/// The engine frees what it has lent when the tier says that it may: not while a copy is under way.
#[tokio::test]
async fn lent_memory_is_given_back() {
    let on = OnDevice::open(8, 4).await;
    let blocks = chain(1, 2);
    on.node.store(&blocks).await;
    on.promote(&blocks).await;
    on.driver.set_running(false);
    let soon = Instant::now() + std::time::Duration::from_millis(200);
    let wanted = blocks.iter().zip((0..).step_by(BLOCK as usize));
    let wanted = wanted.map(|(info, offset)| FetchBlock {
        info: *info,
        memory: on.engine.descriptor(offset, BLOCK).into(),
    });
    let mut fetched = on.tier.fetch(wanted.collect(), soon).await.unwrap();
    assert!(fetched.depth == 0 && fetched.is_unsettled());
    let closed = on.tier.close();
    let early = closed.wait(std::time::Duration::from_millis(50));
    assert_eq!(early.unwrap_err().kind(), ErrorKind::Busy);
    on.driver.set_running(true);
    assert!(fetched.drained().await);
    on.tier.close().wait(PATIENCE).unwrap();
    on.driver.free(on.slots);
    let report = on.promote(&blocks).await;
    assert_eq!((report.promoted, on.tier.held()), (0, 0));
    on.driver.check();
}
