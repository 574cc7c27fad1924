//! Reads over the simulated fabric: standing still, cut, lossy, corrupting, and losing its holder.

use std::time::{Duration, Instant};

use kvcache_core::Tier;
use kvfabric_tiers::{FetchBlock, Source};
use kvfabric_transfer::Agent;
use kvfabric_transfer::backend::sim::{Chance, ExchangeConfig, LinkProfile, SimNetwork};

use crate::support::*;

const BLOCKS: u8 = 6;

async fn pair(network: &SimNetwork) -> (Node, Node) {
    let on_network = |name: &str| {
        let builder = Agent::builder(name).memcpy(false).shm(false);
        builder.simulated(network).build().unwrap()
    };
    let holder = Node::open(config("holder", 16), on_network("holder")).await;
    let mut reader = config("reader", 16);
    reader.peers.backoff = Duration::from_millis(1);
    let reader = Node::open(reader, on_network("reader")).await;
    holder.store(&chain(1, BLOCKS)).await;
    (holder, reader)
}

fn network(link: LinkProfile) -> SimNetwork {
    SimNetwork::new(7, ExchangeConfig::over(link)).unwrap()
}

fn all_from(holder: &Node) -> Vec<Source> {
    vec![
        Source::Peer {
            pod: holder.pod.clone(),
            tier: Tier::Host
        };
        BLOCKS.into()
    ]
}

/// Fetches again and again until everything comes from the holder.
async fn until_served(reader: &Node, holder: &Node) {
    let (blocks, expected) = (chain(1, BLOCKS), all_from(holder));
    let served = async {
        while reader.fetch(&blocks, holder.hints(BLOCKS.into())).await != expected {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, served)
        .await
        .expect("the holder is read from again");
}

/// Time stands still on the network, so a posted read neither ends nor fails: the fetch keeps its deadline, says which
/// memory is still lent out, and tells when it is free.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_that_does_not_end_leaves_its_memory_unsettled_until_it_has_drained() {
    let network = network(LinkProfile::perfect());
    let (holder, reader) = pair(&network).await;
    network.pause();
    let blocks: Vec<_> = (0..)
        .zip(chain(1, BLOCKS))
        .map(|(at, info)| FetchBlock {
            info,
            memory: reader.engine.descriptor(at * BLOCK, BLOCK).into(),
        })
        .collect();
    let deadline = Instant::now() + Duration::from_millis(500);
    let fetch = reader
        .cache
        .fetch(blocks, holder.hints(BLOCKS.into()), deadline);
    let mut report = tokio::time::timeout(PATIENCE, fetch)
        .await
        .expect("a fetch ends")
        .unwrap();
    assert_eq!(report.sources, vec![Source::Miss; BLOCKS.into()]);
    assert_eq!(report.unsettled, (0..BLOCKS.into()).collect::<Vec<u32>>());
    // The report keeps the fetch's deadline; the read that it gave up is counted when that has been told.
    let counted = async {
        while reader.stat("unsettled").await == 0 {
            tokio::task::yield_now().await;
        }
    };
    let counted = tokio::time::timeout(PATIENCE, counted).await;
    counted.expect("what is unsettled is counted");

    network.resume();
    let drained = tokio::time::timeout(PATIENCE, report.drained()).await;
    assert!(drained.expect("the read drains"));
    assert!(report.unsettled.is_empty());
    until_served(&reader, &holder).await;
}

/// The lease is granted over gRPC, but the fabric between the two is cut.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_fabric_costs_misses_until_it_is_mended() {
    let network = network(LinkProfile::perfect());
    let (holder, reader) = pair(&network).await;
    network.partition("holder", "reader").unwrap();
    let (blocks, hints) = (chain(1, BLOCKS), holder.hints(BLOCKS.into()));
    let sources = reader
        .fetch_at(&blocks, hints, 0, Duration::from_millis(500))
        .await;
    assert_eq!(sources, vec![Source::Miss; BLOCKS.into()]);
    network.heal("holder", "reader").unwrap();
    until_served(&reader, &holder).await;
}

/// Datagrams vanish, come twice and overtake each other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lossy_fabric_delivers_whole_blocks() {
    let network = network(LinkProfile::lossy());
    let (holder, reader) = pair(&network).await;
    for _ in 0..5 {
        until_served(&reader, &holder).await;
    }
}

/// A third of the datagrams arrives with a wrong bit: no fetch brings a wrong byte, which is checked in each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_corrupting_fabric_costs_misses_and_never_a_wrong_byte() {
    let corruption = Chance::from_millionths(300_000).unwrap();
    let network = network(LinkProfile {
        corruption,
        ..LinkProfile::perfect()
    });
    let (holder, reader) = pair(&network).await;
    for _ in 0..20 {
        let (blocks, hints) = (chain(1, BLOCKS), holder.hints(BLOCKS.into()));
        reader
            .fetch_at(&blocks, hints, 0, Duration::from_millis(500))
            .await;
    }
    for direction in [("holder", "reader"), ("reader", "holder")] {
        network
            .set_link(direction.0, direction.1, LinkProfile::perfect())
            .unwrap();
    }
    until_served(&reader, &holder).await;
}

/// The holder has granted the lease and dies before a byte is read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_that_dies_after_its_lease_costs_misses() {
    let network = network(LinkProfile::perfect());
    let (holder, reader) = pair(&network).await;
    network.pause();
    let (blocks, hints) = (chain(1, BLOCKS), holder.hints(BLOCKS.into()));
    let fetch = reader.fetch_at(&blocks, hints, 0, Duration::from_secs(2));
    let killed = async {
        while holder.stat("leases_granted").await == 0 {
            tokio::task::yield_now().await;
        }
        tokio::task::spawn_blocking(move || drop(holder))
            .await
            .unwrap();
        network.resume();
    };
    let (sources, ()) = tokio::join!(fetch, killed);
    assert_eq!(sources, vec![Source::Miss; BLOCKS.into()]);
}
