//! Two nodes: one reads the other's blocks under leases granted over gRPC.

use std::sync::atomic::Ordering;
use std::time::Duration;

use kvcache_core::ports::{Holder, Located};
use kvcache_core::{PodName, Tier};
use kvfabric_proto::v1;
use kvfabric_proto::v1::peer_client::PeerClient;
use kvfabric_tiers::Source;
use tonic::Code;

use crate::support::*;

const WAYS: [Way; 3] = [Way::Memcpy, Way::Shm, Way::Tcp];

async fn pair(way: Way) -> (Node, Node) {
    let holder = Node::open(config("holder", 16), agent("holder", way, None)).await;
    let reader = Node::open(config("reader", 16), agent("reader", way, None)).await;
    (holder, reader)
}

fn from(holder: &Node, tier: Tier) -> Source {
    Source::Peer {
        pod: holder.pod.clone(),
        tier,
    }
}

/// Every way there is; the bytes are checked by `fetch`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_in_a_peers_memory_are_read_over_every_way() {
    for way in WAYS {
        let (holder, reader) = pair(way).await;
        let blocks = chain(1, 10);
        assert_eq!(holder.store(&blocks).await.stored, 10);
        let sources = reader.fetch(&blocks, holder.hints(10)).await;
        assert_eq!(sources, vec![from(&holder, Tier::Host); 10], "{way:?}");
        assert_eq!(reader.stat("fetched_peer").await, 10);
        let name = format!("{way:?}").to_lowercase();
        let moved = reader.agent.stats().backends[name.as_str()].bytes_read;
        assert!(moved >= 10 * BLOCK, "{moved} bytes over {way:?}");
    }
}

/// Own blocks, the peer's, and the object store's, in one fetch.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_fetch_mixes_sources() {
    let store = tempfile::tempdir().unwrap();
    let mut cold_config = config("cold", 4);
    cold_config.object = cold();
    let cold_node = Node::open(cold_config, agent("cold", Way::Shm, Some(store.path()))).await;
    let blocks = chain(1, 8);
    cold_node.store(&blocks).await;
    cold_node
        .sink
        .until_stored(&blocks[..4], Tier::Object)
        .await;
    cold_node.store(&chain(2, 8)).await;
    cold_node.sink.until_stored(&blocks, Tier::Object).await;

    let holder = Node::open(config("holder", 16), agent("holder", Way::Shm, None)).await;
    holder.store(&blocks[..5]).await;
    let mut reader = config("reader", 16);
    reader.object = cold();
    let reader = Node::open(reader, agent("reader", Way::Shm, Some(store.path()))).await;
    reader.store(&blocks[..2]).await;
    let hints = Located {
        shared: std::iter::once(0..8).collect(),
        ..holder.hints(5)
    };
    let sources = reader.fetch(&blocks, hints).await;
    assert_eq!(count(&sources, &Source::Miss), 0, "{sources:?}");
    assert_eq!(sources[..2], [Source::Host, Source::Host]);
    assert_eq!(sources[2..5], vec![from(&holder, Tier::Host); 3]);
    assert_eq!(sources[5..], vec![Source::Object; 3]);
}

/// The holder has the blocks on disk only: it stages them, and says where they were.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_on_a_peers_disk_are_staged_and_read() {
    let directory = tempfile::tempdir().unwrap();
    let mut with_disk = config("holder", 4);
    with_disk.disk = disk(directory.path(), 8);
    let holder = Node::open(with_disk, agent("holder", Way::Shm, None)).await;
    let blocks = chain(1, 12);
    assert_eq!(holder.store(&blocks).await.stored, 12);
    holder.sink.until_stored(&blocks[..8], Tier::Disk).await;
    let reader = Node::open(config("reader", 16), agent("reader", Way::Shm, None)).await;
    let sources = reader.fetch(&blocks[..2], holder.hints(2)).await;
    assert_eq!(sources, vec![from(&holder, Tier::Disk); 2]);
}

/// No hints: the directory is asked, and its pod found by an address that was told before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_directory_is_asked_when_there_are_no_hints() {
    let (holder, reader) = pair(Way::Shm).await;
    let blocks = chain(1, 3);
    holder.store(&blocks).await;
    let itself = Holder {
        pod: reader.pod.clone(),
        depth: 3,
        peer_address: None,
    };
    let unknown = Holder {
        pod: PodName::new("unknown").unwrap(),
        depth: 3,
        peer_address: None,
    };
    let known = holder.hints(3).holders.remove(0);
    *reader.guide.located.lock().unwrap() = Located {
        holders: vec![itself, unknown, known],
        shared: Vec::new(),
    };
    let sources = reader.fetch_own(&blocks).await;
    assert_eq!(sources, vec![from(&holder, Tier::Host); 3]);
    assert_eq!(reader.guide.questions.load(Ordering::Relaxed), 1);
}

/// The hint names more than the holder has: the rest is a miss.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hint_that_promises_too_much_costs_only_the_rest() {
    let (holder, reader) = pair(Way::Shm).await;
    let blocks = chain(1, 6);
    holder.store(&blocks[..4]).await;
    let sources = reader.fetch(&blocks, holder.hints(6)).await;
    assert_eq!(sources[..4], vec![from(&holder, Tier::Host); 4]);
    assert_eq!(sources[4..], [Source::Miss, Source::Miss]);
}

/// Nobody listens at the holder's address; another holder has the blocks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_holder_is_passed_over_for_a_living_one() {
    let (holder, reader) = pair(Way::Tcp).await;
    let blocks = chain(1, 4);
    holder.store(&blocks).await;
    let dead = Node::open(config("dead", 4), agent("dead", Way::Tcp, None)).await;
    let mut hints = dead.hints(4);
    dead.shutdown().await;
    let living = holder.hints(4);
    hints.holders.extend(living.holders);
    let sources = reader.fetch(&blocks, hints).await;
    assert_eq!(sources, vec![from(&holder, Tier::Host); 4]);
}

/// The holder is killed at any moment while fetches run, its agent with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_killed_during_fetches_costs_misses_and_never_a_wrong_byte() {
    for way in WAYS {
        for kill_after in 0..4 {
            let (holder, reader) = pair(way).await;
            let blocks = chain(1, 8);
            holder.store(&blocks).await;
            let hints = holder.hints(8);
            let mut holder = Some(holder);
            let mut last = Vec::new();
            for round in 0..6 {
                let fetch = reader.fetch_at(&blocks, hints.clone(), 0, Duration::from_secs(3));
                if round == kill_after {
                    let dying = holder.take();
                    let kill = tokio::task::spawn_blocking(move || drop(dying));
                    last = fetch.await;
                    kill.await.unwrap();
                } else {
                    last = fetch.await;
                }
            }
            assert_eq!(last, vec![Source::Miss; 8], "{way:?}");
        }
    }
}

/// A holder that shut down is opened again at the same address, and nobody tells the reader.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_peer_is_found_out_and_greeted_anew() {
    let mut reader = config("reader", 16);
    reader.peers.backoff = Duration::from_millis(1);
    let reader = Node::open(reader, agent("reader", Way::Tcp, None)).await;
    let blocks = chain(1, 4);
    let holder = Node::open(config("holder", 16), agent("holder", Way::Tcp, None)).await;
    holder.store(&blocks).await;
    let (hints, address) = (holder.hints(4), holder.cache.peer_address());
    let expected = vec![from(&holder, Tier::Host); 4];
    assert_eq!(reader.fetch(&blocks, hints.clone()).await, expected);
    holder.shutdown().await;

    let mut again = config("holder", 16);
    again.peer_listen = address;
    let holder = Node::open(again, agent("holder", Way::Tcp, None)).await;
    holder.store(&blocks).await;
    let found = async {
        // The first attempts may find the old connection dead: that is a miss each.
        while reader.fetch(&blocks, hints.clone()).await != expected {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, found)
        .await
        .expect("the new run is found");
}

/// A holder whose service stands still for a while, as when its host halts it. It is fetched from again at once, though
/// peers that fail are left alone for long; one that stands still also when it is tried anew is left alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_stood_still_serves_again_as_soon_as_it_goes_on() {
    let holder = Node::open(config("holder", 16), agent("holder", Way::Shm, None)).await;
    let mut reader = config("reader", 16);
    reader.peers.backoff = PATIENCE * 100;
    reader.peers.backoff_max = PATIENCE * 100;
    // Long enough for a connection on a machine with much else to do.
    reader.limits.lease_wait = Duration::from_secs(3);
    let reader = Node::open(reader, agent("reader", Way::Shm, None)).await;
    let gate = Gate::before(holder.cache.peer_address().unwrap()).await;
    let blocks = chain(1, 4);
    holder.store(&blocks).await;
    let mut hints = holder.hints(4);
    hints.holders[0].peer_address = Some(gate.address.to_string());
    let expected = vec![from(&holder, Tier::Host); 4];
    let missed = vec![Source::Miss; 4];
    for _ in 0..2 {
        assert_eq!(reader.fetch(&blocks, hints.clone()).await, expected);
        gate.open.send_replace(false);
        assert_eq!(reader.fetch(&blocks, hints.clone()).await, missed);
        gate.open.send_replace(true);
    }
    assert_eq!(reader.fetch(&blocks, hints.clone()).await, expected);
    gate.open.send_replace(false);
    let served = gate.connections.load(Ordering::Relaxed);
    // The connection that served is given up, and a new one comes to nothing.
    while gate.connections.load(Ordering::Relaxed) == served {
        assert_eq!(reader.fetch(&blocks, hints.clone()).await, missed);
    }
    let connections = gate.connections.load(Ordering::Relaxed);
    gate.open.send_replace(true);
    assert_eq!(reader.fetch(&blocks, hints.clone()).await, missed);
    assert_eq!(gate.connections.load(Ordering::Relaxed), connections);
}

/// What a pod leased, and the connection to it, end when it is known to have left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forgotten_peer_is_reached_again_when_it_comes_back() {
    let (holder, reader) = pair(Way::Tcp).await;
    let blocks = chain(1, 4);
    holder.store(&blocks).await;
    let expected = vec![from(&holder, Tier::Host); 4];
    assert_eq!(reader.fetch(&blocks, holder.hints(4)).await, expected);
    reader.cache.forget_peer(&holder.pod).await.unwrap();
    holder.cache.forget_peer(&reader.pod).await.unwrap();
    assert_eq!(holder.stat("leases").await, 0);
    assert_eq!(reader.fetch(&blocks, holder.hints(4)).await, expected);
}

async fn raw_client(node: &Node) -> PeerClient<tonic::transport::Channel> {
    let address = node.cache.peer_address().unwrap();
    PeerClient::connect(format!("http://{address}"))
        .await
        .unwrap()
}

fn greeting() -> v1::HelloRequest {
    v1::HelloRequest {
        protocol_version: kvfabric_proto::PROTOCOL_VERSION,
        version: "test".to_owned(),
        pod: "stranger".to_owned(),
        model_identity: IDENTITY.to_vec().into(),
    }
}

/// A greeting of a version to come.
#[tokio::test]
async fn a_peer_of_another_version_is_refused_with_both_named() {
    let node = Node::open(config("pod", 4), agent("pod", Way::Shm, None)).await;
    let request = v1::HelloRequest {
        protocol_version: 99,
        ..greeting()
    };
    let status = raw_client(&node).await.hello(request).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    let ours = format!("version {}", kvfabric_proto::PROTOCOL_VERSION);
    assert!(status.message().contains("version 99"), "{status}");
    assert!(status.message().contains(&ours), "{status}");
}

/// A greeting of another model.
#[tokio::test]
async fn a_peer_of_another_model_is_denied() {
    let node = Node::open(config("pod", 4), agent("pod", Way::Shm, None)).await;
    let request = v1::HelloRequest {
        model_identity: vec![1; 32].into(),
        ..greeting()
    };
    let status = raw_client(&node).await.hello(request).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
}

/// Leases until the bound, then one given back.
#[tokio::test]
async fn leases_are_bounded_for_each_peer_and_come_back_on_release() {
    let mut config = config("pod", 4);
    config.peers.leases_per_peer_max = 2;
    let node = Node::open(config, agent("pod", Way::Shm, None)).await;
    node.store(&chain(1, 2)).await;
    let mut client = raw_client(&node).await;
    let incarnation = client
        .hello(greeting())
        .await
        .unwrap()
        .into_inner()
        .incarnation;
    let request = |incarnation: u64, block_bytes: u64| v1::LeaseRequest {
        pod: "stranger".to_owned(),
        incarnation,
        keys: block(1, 0).key.0.to_vec().into(),
        block_bytes,
        ttl_ms: 60_000,
    };
    let one = client
        .lease(request(incarnation, BLOCK))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(one.blocks.len(), 1);
    client.lease(request(incarnation, BLOCK)).await.unwrap();
    let refused = client.lease(request(incarnation, BLOCK)).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    let release = v1::ReleaseRequest {
        pod: "stranger".to_owned(),
        lease: one.lease,
    };
    client.release(release).await.unwrap();
    client.lease(request(incarnation, BLOCK)).await.unwrap();

    let wrong = client
        .lease(request(incarnation, BLOCK + 1))
        .await
        .unwrap_err();
    assert_eq!(wrong.code(), Code::InvalidArgument);
    let stale = client
        .lease(request(incarnation + 1, BLOCK))
        .await
        .unwrap_err();
    assert_eq!(stale.code(), Code::Aborted);
}

/// A lease of one run is given back in the next, where a lease of the same peer is the first again.
#[tokio::test]
async fn a_lease_given_back_after_a_restart_ends_no_new_one() {
    let mut numbers = Vec::new();
    for _ in 0..2 {
        let mut config = config("pod", 4);
        config.peers.leases_per_peer_max = 1;
        let node = Node::open(config, agent("pod", Way::Shm, None)).await;
        node.store(&chain(1, 1)).await;
        let mut client = raw_client(&node).await;
        let greeted = client.hello(greeting()).await.unwrap().into_inner();
        let request = v1::LeaseRequest {
            pod: "stranger".to_owned(),
            incarnation: greeted.incarnation,
            keys: block(1, 0).key.0.to_vec().into(),
            block_bytes: BLOCK,
            ttl_ms: 60_000,
        };
        let lease = client.lease(request.clone()).await.unwrap().into_inner();
        assert_eq!(lease.blocks.len(), 1);
        for stale in &numbers {
            let release = v1::ReleaseRequest {
                pod: "stranger".to_owned(),
                lease: *stale,
            };
            client.release(release).await.unwrap();
            let refused = client.lease(request.clone()).await.unwrap_err();
            assert_eq!(
                refused.code(),
                Code::ResourceExhausted,
                "the lease was ended"
            );
        }
        numbers.push(lease.lease);
        node.shutdown().await;
    }
    assert_ne!(numbers[0], numbers[1]);
}

/// Two caches, the same address.
#[tokio::test]
async fn a_port_in_use_is_said_with_the_address() {
    let node = Node::open(config("pod", 4), agent("pod", Way::Shm, None)).await;
    let mut second = config("second", 4);
    second.peer_listen = node.cache.peer_address();
    let refused = Node::try_open(second, agent("second", Way::Shm, None)).await;
    let error = refused.err().expect("the port is in use");
    let address = node.cache.peer_address().unwrap().to_string();
    assert!(error.context().contains(&address), "{error}");
}

/// Both nodes store and read each other's chains at once, under eviction.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_stores_and_fetches_of_two_nodes_never_mix_up_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let mut one = config("one", 12);
    one.disk = disk(directory.path(), 6);
    let one = Node::open(one, agent("one", Way::Shm, None)).await;
    let two = Node::open(config("two", 12), agent("two", Way::Shm, None)).await;
    let work = |node: &'static str, lane: u8| {
        let (me, other) = if node == "one" {
            (&one, &two)
        } else {
            (&two, &one)
        };
        async move {
            let slot = usize::from(lane % 4) * 16;
            for round in 0..12_u8 {
                let blocks = chain(lane.wrapping_mul(3).wrapping_add(round % 5), 8);
                me.store_at(&blocks[..4], slot).await;
                me.fetch_at(&blocks, other.hints(8), slot, PATIENCE).await;
            }
        }
    };
    tokio::join!(
        work("one", 0),
        work("one", 1),
        work("one", 2),
        work("two", 0),
        work("two", 1),
        work("two", 3),
    );
    assert_eq!(
        one.stat("corrupt_blocks").await + two.stat("corrupt_blocks").await,
        0
    );
}
