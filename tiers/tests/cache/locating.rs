//! Where blocks are, asked of a cache and of a peer service.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvcache_core::ports::{Holder, Located};
use kvcache_core::{BlockInfo, BlockKey, Error, ErrorKind, PinId, PodName, Result};
use kvfabric_tiers::{CacheConfig, HeldDepth, NameReader, PeerService, Reach};
use tokio::net::TcpListener;

use crate::support::*;

/// The names of these tests: two bytes a block, its chain and its number.
fn read_names(names: &[u8]) -> Result<Vec<BlockInfo>> {
    let (pairs, rest) = names.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(Error::invalid(
            "bytes of names",
            names.len(),
            "a multiple of 2",
        ));
    }
    Ok(pairs.iter().map(|[c, number]| block(*c, *number)).collect())
}

/// The names of the first `count` blocks of a chain.
fn names(chain: u8, count: u8) -> Bytes {
    (0..count).flat_map(|number| [chain, number]).collect()
}

fn named(name: &str) -> CacheConfig {
    let mut config = config(name, 8);
    config.names = Some(NameReader::new(read_names));
    config
}

async fn node() -> Node {
    Node::open(named("pod"), agent("pod", Way::Memcpy, None)).await
}

fn service(node: &Node) -> PeerService {
    let address = node.cache.peer_address().unwrap();
    PeerService::connect(&address.to_string()).unwrap()
}

fn holder(name: &str, depth: u32, address: Option<&str>) -> Holder {
    Holder {
        pod: PodName::new(name).unwrap(),
        depth,
        peer_address: address.map(str::to_owned),
    }
}

fn in_memory(depth: u32) -> HeldDepth {
    HeldDepth {
        depth,
        host: depth,
        disk: 0,
        expected: depth,
    }
}

async fn locate(node: &Node, blocks: &[BlockInfo]) -> Reach {
    let deadline = Instant::now() + PATIENCE;
    node.cache.locate(blocks, deadline).await.unwrap()
}

/// All of it, and none of nothing.
#[tokio::test]
async fn a_chain_that_is_here_is_located_without_the_directory() {
    let node = node().await;
    let blocks = chain(1, 3);
    node.store(&blocks).await;
    let reach = locate(&node, &blocks).await;
    assert_eq!((reach.own, reach.depth), (in_memory(3), 3));
    assert!(reach.located.is_empty());
    assert_eq!(locate(&node, &[]).await, Reach::default());
    assert_eq!(node.guide.questions.load(Ordering::Relaxed), 0);
}

/// Two own blocks, a peer with five, objects up to the eighth, a hole, and more objects; the node itself and a pod that
/// cannot be reached do not count. Then through the peer service.
#[tokio::test]
async fn own_blocks_peers_and_objects_reach_together_as_far_as_there_is_no_hole() {
    let objects = tempfile::tempdir().unwrap();
    let mut config = named("pod");
    config.object = cold();
    let node = Node::open(config, agent("pod", Way::Memcpy, Some(objects.path()))).await;
    let blocks = chain(1, 12);
    node.store(&blocks[..2]).await;
    *node.guide.located.lock().unwrap() = Located {
        holders: vec![
            holder("pod", 12, None),
            holder("unreachable", 11, None),
            holder("peer", 5, Some("127.0.0.1:9")),
        ],
        shared: vec![4..8, 9..12],
    };
    let expected = Reach {
        own: in_memory(2),
        depth: 8,
        located: Located {
            holders: vec![holder("peer", 5, Some("127.0.0.1:9"))],
            shared: vec![4..8, 9..12],
        },
    };
    assert_eq!(locate(&node, &blocks).await, expected);
    let answer = service(&node).locate(names(1, 12), PATIENCE).await;
    assert_eq!(answer.unwrap(), expected);
    // Holders and objects may know more of the sequence than was asked about.
    assert_eq!(locate(&node, &blocks[..4]).await.depth, 4);
}

/// The index knows of shared objects, and the node of no object store: it cannot bring them, whoever asks it.
#[tokio::test]
async fn shared_objects_do_not_count_on_a_node_without_an_object_store() {
    let node = node().await;
    let blocks = chain(1, 8);
    node.store(&blocks[..2]).await;
    *node.guide.located.lock().unwrap() = Located {
        holders: vec![holder("peer", 3, Some("127.0.0.1:9"))],
        shared: vec![0..8],
    };
    let reach = locate(&node, &blocks).await;
    assert_eq!((reach.own, reach.depth), (in_memory(2), 3));
    assert_eq!(reach.located.shared, []);
    let answer = service(&node).locate(names(1, 8), PATIENCE).await.unwrap();
    assert_eq!(answer, reach);
}

/// Asked in the same moment in which three of five blocks are given to the node.
#[tokio::test]
async fn blocks_that_a_store_is_bringing_are_expected() {
    let node = node().await;
    let blocks = chain(1, 5);
    let deadline = Instant::now() + PATIENCE;
    let located = node.cache.locate(&blocks, deadline);
    let (report, reach) = tokio::join!(node.store_at(&blocks[..3], 0), located);
    assert_eq!(report.stored, 3);
    let own = reach.unwrap().own;
    assert_eq!((own.depth, own.expected), (0, 3));
    let reach = service(&node).locate(names(1, 5), PATIENCE).await.unwrap();
    assert_eq!(reach.own, in_memory(3));
}

/// A directory that fails, and one that never answers: what this node has is told, in time.
#[tokio::test]
async fn without_the_directory_only_own_blocks_are_located() {
    let node = node().await;
    let blocks = chain(1, 4);
    node.store(&blocks[..3]).await;
    for mood in [Mood::Broken, Mood::Silent] {
        *node.guide.mood.lock().unwrap() = mood;
        let deadline = Instant::now() + Duration::from_millis(50);
        let reach = node.cache.locate(&blocks, deadline).await.unwrap();
        assert_eq!((reach.own, reach.depth), (in_memory(3), 3), "{mood:?}");
        assert!(reach.located.is_empty());
        let answer = service(&node)
            .locate(names(1, 4), Duration::from_secs(2))
            .await;
        assert_eq!(answer.unwrap().depth, 3, "{mood:?}");
    }
}

/// Names that the reader refuses, none at all, too many bytes of them, and a node without a reader.
#[tokio::test]
async fn names_that_cannot_be_read_are_refused_with_the_reason() {
    let node = node().await;
    let service_here = service(&node);
    let ask = async |names: Bytes| {
        let answer = service_here.locate(names, PATIENCE).await;
        let error = answer.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        error.to_string()
    };
    assert!(
        ask(Bytes::from_static(b"odd"))
            .await
            .contains("multiple of 2")
    );
    assert!(ask(Bytes::new()).await.contains("bytes of names is 0"));
    let too_many = vec![0; (4 << 20) + 1];
    assert!(
        ask(too_many.into())
            .await
            .contains("bytes of names is 4194305")
    );

    let plain = Node::open(config("plain", 8), agent("plain", Way::Memcpy, None)).await;
    let answer = service(&plain).locate(names(1, 1), PATIENCE).await;
    assert_eq!(answer.unwrap_err().kind(), ErrorKind::Unsupported);
}

/// Not an address; nobody listening; somebody who accepts and never speaks. Then the node comes up where nobody was.
#[tokio::test]
async fn a_service_that_does_not_answer_fails_in_time_and_is_found_again() {
    for address in ["", "host:1/path", "a b:1"] {
        let error = PeerService::connect(address).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.context().contains(&format!("{address:?}")), "{error}");
    }
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = PeerService::connect(&address.to_string()).unwrap();
    let short = Duration::from_millis(50);
    let error = service.locate(names(1, 1), short).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(error.context().contains(&address.to_string()), "{error}");
    drop(listener);
    let error = service.locate(names(1, 1), PATIENCE).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");

    let mut config = named("pod");
    config.peer_listen = Some(address);
    let node = Node::open(config, agent("pod", Way::Memcpy, None)).await;
    node.store(&chain(1, 1)).await;
    let found = async {
        loop {
            if let Ok(reach) = service.locate(names(1, 1), PATIENCE).await {
                return reach.depth;
            }
            tokio::task::yield_now().await;
        }
    };
    let found = tokio::time::timeout(PATIENCE, found).await;
    assert_eq!(found.expect("the service is found again"), 1);
}

/// Let go with the wrong model first, then rightly, then once more; and one that never was.
#[tokio::test]
async fn a_pin_is_let_go_of_over_the_service() {
    let node = node().await;
    let blocks = chain(1, 2);
    node.store(&blocks).await;
    let keys: Vec<BlockKey> = blocks.iter().map(|info| info.key).collect();
    let pinned = node.cache.pin(&keys, PATIENCE).await.unwrap();
    assert_eq!(pinned.depth, 2);
    let service = service(&node);
    let refused = service.unpin(pinned.id, &[1; 32], PATIENCE).await;
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Denied);
    assert_eq!(node.stat("pinned_blocks").await, 2);
    let unknown = PinId(pinned.id.0 ^ 1);
    for pin in [unknown, pinned.id, pinned.id] {
        service.unpin(pin, &IDENTITY, PATIENCE).await.unwrap();
        let left = if pin == unknown { 2 } else { 0 };
        assert_eq!(node.stat("pinned_blocks").await, left);
    }
}

/// The number is told first: let go of over the service before the pin, which then keeps nothing, and after it.
#[tokio::test]
async fn a_pin_whose_number_was_told_beforehand_is_let_go_of_before_and_after_it_is_asked_for() {
    let node = node().await;
    let blocks = chain(1, 2);
    node.store(&blocks).await;
    let keys: Vec<BlockKey> = blocks.iter().map(|info| info.key).collect();
    let service = service(&node);
    let (early, late) = (PinId(u64::MAX), PinId(0x1234_5678_9abc_def0));
    service.unpin(early, &IDENTITY, PATIENCE).await.unwrap();
    let ended = node.cache.pin_as(early, &keys, PATIENCE).await.unwrap();
    assert_eq!((ended.id, ended.depth), (early, 0));
    assert_eq!(node.stat("pinned_blocks").await, 0);
    assert_eq!(node.stat("pins_unpinned_early").await, 1);

    let held = node.cache.pin_as(late, &keys, PATIENCE).await.unwrap();
    assert_eq!((held.id, held.depth), (late, 2));
    let again = node.cache.pin_as(late, &keys, PATIENCE).await.unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Invalid);
    assert!(again.context().contains(&late.to_string()), "{again}");
    assert_eq!(node.stat("pinned_blocks").await, 2);
    service.unpin(late, &IDENTITY, PATIENCE).await.unwrap();
    assert_eq!(node.stat("pinned_blocks").await, 0);
}
