//! Blocks that land in memory of a GPU, and are summed there. The driver is a stand-in, and so are its kernels: there is no device.

use std::time::{Duration, Instant};

use kvcache_core::ports::Located;
use kvcache_core::{BlockInfo, Tier};
use kvfabric_tiers::{CacheConfig, FetchBlock, Pages, Segment, Source};
use kvfabric_transfer::{CudaOptions, CudaStandIn};

use crate::device::OnDevice;
use crate::support::*;

fn later() -> Instant {
    Instant::now() + PATIENCE
}

impl OnDevice {
    /// Blocks that were summed on the device, and those that were summed in host memory before they went up.
    async fn ways(&self) -> (u64, u64) {
        let landed = self.node.stat("device_landed").await;
        (landed, self.node.stat("device_lifted").await)
    }
}

async fn in_host_memory(config: CacheConfig, blocks: &[BlockInfo]) -> OnDevice {
    let on = OnDevice::open(config, Way::Memcpy, None).await;
    on.node.store(blocks).await;
    on
}

/// From host memory, whole blocks and blocks in pieces.
#[tokio::test]
async fn blocks_of_host_memory_land() {
    let blocks = chain(1, 3);
    let on = in_host_memory(config("pod", 8), &blocks).await;
    let sources = on.fetch(&blocks, Located::default()).await;
    assert_eq!((sources, on.ways().await), (vec![Source::Host; 3], (3, 0)));
    let segment = |layer: u64| Segment {
        region: on.engine.id(),
        offset: layer * 10_000,
        stride: 1000,
        len: 1000,
    };
    let pages = Pages::new(&on.node.agent, (0..5).map(segment).collect(), 3).unwrap();
    let wanted = blocks.iter().zip(0..).map(|(info, number)| FetchBlock {
        info: *info,
        memory: pages.block(number).unwrap(),
    });
    let fetched = on
        .node
        .cache
        .fetch(wanted.collect(), Located::default(), later());
    assert_eq!(fetched.await.unwrap().depth(), 3);
    assert_eq!(on.ways().await, (6, 0));
    on.driver.check();
}

/// One byte of the third of four blocks, after it has landed.
#[tokio::test]
async fn a_byte_that_changes_after_landing_makes_its_block_a_miss() {
    let blocks = chain(1, 4);
    let on = in_host_memory(config("pod", 8), &blocks).await;
    // Kernels prove themselves when they are loaded, with sums of their own.
    on.fetch(&blocks, Located::default()).await;
    on.driver.spoil_before_sum(2);
    let report = on.report(&blocks, Located::default(), later()).await;
    let expected = [Source::Host, Source::Host, Source::Miss, Source::Miss];
    assert_eq!(report.sources, expected);
    assert_eq!(on.node.stat("corrupt_blocks").await, 1);
    let first = on.driver.read(on.address, 2 * BLOCK);
    assert!(first == [bytes_of(&blocks[0]), bytes_of(&blocks[1])].concat());
    // Any doubt is a miss: where it came from is doubted, too.
    let sources = on.fetch(&blocks, Located::default()).await;
    assert_eq!(sources[2], Source::Miss);
    assert_eq!(on.fetch(&blocks[..2], Located::default()).await.len(), 2);
}

/// A driver that does not take the kernels, kernels that sum wrongly, and a cache that is not to use them.
#[tokio::test]
async fn where_the_device_does_not_sum_blocks_are_lifted() {
    let blocks = chain(1, 3);
    for case in 0..3 {
        let mut config = config("pod", 8);
        config.device_sums = case != 2;
        let on = in_host_memory(config, &blocks).await;
        match case {
            0 => on.driver.fail_next_kernels(),
            1 => on.driver.spoil_sums(),
            _ => {}
        }
        for round in 1..3 {
            let sources = on.fetch(&blocks, Located::default()).await;
            assert_eq!(sources, vec![Source::Host; 3], "{case}");
            assert_eq!(on.ways().await, (0, round * 3), "{case}");
        }
        assert_eq!(on.node.stat("corrupt_blocks").await, 0, "{case}");
    }
}

/// A kernel is refused after blocks have landed: they are brought again, by way of the host, as all others after them.
#[tokio::test]
async fn a_device_that_ceases_to_sum_costs_no_block() {
    let blocks = chain(1, 3);
    let on = in_host_memory(config("pod", 8), &blocks).await;
    on.fetch(&blocks, Located::default()).await;
    on.driver.fail_next_launch();
    for round in 1..3 {
        let sources = on.fetch(&blocks, Located::default()).await;
        assert_eq!(sources, vec![Source::Host; 3]);
        assert_eq!(on.ways().await, (3, round * 3));
    }
    assert_eq!(on.node.stat("corrupt_blocks").await, 0);
}

/// What a file has, and what peers have that no card reads, goes through host memory, and is summed there.
#[tokio::test]
async fn what_comes_through_host_memory_is_lifted() {
    let holder = Node::open(config("holder", 32), agent("holder", Way::Tcp, None)).await;
    let blocks = chain(1, 4);
    holder.store(&blocks).await;
    let on = OnDevice::open(config("pod", 32), Way::Tcp, None).await;
    let sources = on.fetch(&blocks, holder.hints(4)).await;
    assert!(!sources.contains(&Source::Miss), "{sources:?}");
    assert_eq!((on.ways().await, on.driver.launches()), ((0, 4), 0));
}

/// A node whose GPU's memory is read and written by what stands for a network card: UCX, over TCP.
async fn beside_a_card(blocks: &[BlockInfo]) -> (Node, OnDevice) {
    let holder = Node::open(config("holder", 32), agent("holder", Way::Ucx, None)).await;
    holder.store(blocks).await;
    let driver = CudaStandIn::new(1);
    driver.open_memory();
    let agent = agent("pod", Way::Ucx, None);
    let options = CudaOptions {
        peers: false,
        ..CudaOptions::default()
    };
    driver.serve(&agent, options).unwrap();
    let on = OnDevice::over(driver, config("pod", 32), agent).await;
    (holder, on)
}

/// Straight from a peer's host memory; then a byte changes after it was written.
#[tokio::test]
async fn blocks_of_a_peer_land_by_a_card() {
    let blocks = chain(1, 20);
    let (holder, on) = beside_a_card(&blocks).await;
    let sources = on.fetch(&blocks, holder.hints(20)).await;
    let from = Source::Peer {
        pod: holder.pod.clone(),
        tier: Tier::Host,
    };
    assert_eq!(
        (sources, on.ways().await),
        (vec![from.clone(); 20], (20, 0))
    );
    on.driver.spoil_before_sum(1);
    let report = on.report(&blocks[..3], holder.hints(3), later()).await;
    assert_eq!(report.sources, [from, Source::Miss, Source::Miss]);
    assert_eq!(on.node.stat("corrupt_blocks").await, 1);
}

/// Blocks have landed, and the device stands still: nobody has summed them by the deadline, so they are misses. It goes on later.
#[tokio::test]
async fn blocks_that_are_not_summed_in_time_are_misses() {
    let blocks = chain(1, 2);
    let (holder, on) = beside_a_card(&blocks).await;
    on.fetch(&blocks, holder.hints(2)).await;
    on.driver.set_running(false);
    let soon = Instant::now() + Duration::from_millis(300);
    let mut report = on.report(&blocks, holder.hints(2), soon).await;
    assert_eq!(report.sources, [Source::Miss, Source::Miss]);
    on.driver.set_running(true);
    assert!(report.drained().await);
    assert_eq!(on.node.stat("corrupt_blocks").await, 0);
    let sources = on.fetch(&blocks, holder.hints(2)).await;
    assert!(!sources.contains(&Source::Miss), "{sources:?}");
    assert_eq!(on.ways().await.1, 0);
}
