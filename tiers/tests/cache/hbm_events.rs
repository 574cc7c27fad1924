//! What the world is told of blocks in slots of a GPU's memory. The driver is a stand-in: there is no device.

use kvcache_core::event::NodeEvent;
use kvcache_core::{BlockInfo, Tier};
use kvfabric_tiers::HbmTier;

use crate::hbm::{OnDevice, keys, later};
use crate::support::*;

/// Of a block that came to the device.
fn came(info: &BlockInfo) -> NodeEvent {
    NodeEvent::Stored {
        key: info.index_key,
        parent: info.index_parent,
        tier: Tier::Device,
    }
}

/// Of a block that left the device.
fn went(info: &BlockInfo) -> NodeEvent {
    NodeEvent::Removed {
        key: info.index_key,
        tier: Tier::Device,
    }
}

impl OnDevice {
    /// What was told of the device, and of everything at once, from the event with this number on.
    fn told(&self, from: usize) -> Vec<NodeEvent> {
        let events = self.node.sink.events();
        let of_device = events.into_iter().filter(|event| match event {
            NodeEvent::Stored { tier, .. } | NodeEvent::Removed { tier, .. } => {
                *tier == Tier::Device
            }
            NodeEvent::Cleared => true,
        });
        // The first one is the cache's, when it was opened.
        of_device.skip(1 + from).collect()
    }
}

/// Up into two slots, one out for a third block, one down by hand.
#[tokio::test]
async fn comings_and_goings_are_told_in_their_order() {
    let on = OnDevice::open(8, 2).await;
    let blocks = chain(1, 2);
    let other = block(2, 0);
    on.node.store(&blocks).await;
    on.node.store(&[other]).await;
    assert_eq!(on.promote(&blocks).await.promoted, 2);
    let position = on.node.cache.position();
    assert_eq!(on.told(0), [came(&blocks[0]), came(&blocks[1])]);
    // Those that are up already are not told of again, and one that the cache does not have is not at all.
    on.promote(&blocks).await;
    on.promote(&[block(3, 0)]).await;
    // The second one is wanted, so the first one goes: out before its slot is another block's.
    assert_eq!(on.fetch(&blocks[1..]).await, 1);
    assert_eq!(on.promote(&[other]).await.promoted, 1);
    assert_eq!(on.told(2)[..1], [went(&blocks[0])]);
    assert_eq!(on.told(2).last(), Some(&came(&other)));
    let before = on.told(0).len();
    on.tier.offload(keys(&[other]), later()).await.unwrap();
    assert_eq!(on.told(before), [went(&other)]);
    assert!(on.node.cache.position().next > position.next);
    assert_eq!(on.tier.position(), on.node.cache.position());
}

/// A block whose bytes have changed in its slot.
#[tokio::test]
async fn a_block_that_is_dropped_is_withdrawn() {
    let on = OnDevice::open(8, 4).await;
    let blocks = chain(1, 2);
    on.node.store(&blocks).await;
    on.promote(&blocks).await;
    on.driver.spoil_before_sum(1);
    assert_eq!(on.fetch(&blocks).await, 1);
    assert_eq!(on.told(2), [went(&blocks[1])]);
}

/// The same block in two tiers of one cache.
#[tokio::test]
async fn a_block_on_two_devices_is_withdrawn_with_the_last() {
    let on = OnDevice::open(8, 2).await;
    let memory = on.driver.allocate(0, 2 * BLOCK).unwrap();
    let second = HbmTier::new(&on.node.cache, memory).unwrap();
    let blocks = chain(1, 1);
    on.node.store(&blocks).await;
    on.promote(&blocks).await;
    second.promote(blocks.clone(), later()).await.unwrap();
    assert_eq!(on.told(0), [came(&blocks[0])]);
    on.tier.offload(keys(&blocks), later()).await.unwrap();
    assert_eq!((on.tier.held(), second.held()), (0, 1));
    assert_eq!(on.told(0), [came(&blocks[0])]);
    second.offload(keys(&blocks), later()).await.unwrap();
    assert_eq!(on.told(0), [came(&blocks[0]), went(&blocks[0])]);
}

/// Closed; and dropped without that.
#[tokio::test]
async fn a_tier_that_ends_withdraws_its_blocks() {
    for is_closed in [true, false] {
        let on = OnDevice::open(8, 2).await;
        let blocks = chain(1, 1);
        on.node.store(&blocks).await;
        on.promote(&blocks).await;
        let OnDevice { tier, node, .. } = on;
        if is_closed {
            tier.close().wait(PATIENCE).unwrap();
        } else {
            drop(tier);
        }
        let events = node.sink.events();
        assert_eq!(events.last(), Some(&went(&blocks[0])));
    }
}

/// The cache withdraws all that it has announced; what happens on the device afterwards is told to nobody.
#[tokio::test]
async fn nothing_is_told_after_the_shutdown() {
    let on = OnDevice::open(8, 2).await;
    let blocks = chain(1, 1);
    on.node.store(&blocks).await;
    on.promote(&blocks).await;
    on.node.cache.shutdown(later()).await.unwrap();
    assert_eq!(on.told(0), [came(&blocks[0]), NodeEvent::Cleared]);
    on.tier.close().wait(PATIENCE).unwrap();
    assert_eq!(on.told(2), []);
}
