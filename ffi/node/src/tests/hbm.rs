//! A node's HBM tier, in memory of a stand-in for the driver: there is no device.

use kvfabric_transfer::{CudaOptions, CudaStandIn, Region};

use super::*;

const BLOCK: u64 = 4096;

/// What an engine with a GPU has.
struct Engine {
    driver: CudaStandIn,
    memory: Region,
    address: u64,
}

impl Engine {
    fn beside(node: &Node) -> Self {
        let driver = CudaStandIn::new(1);
        driver.serve(node.agent(), CudaOptions::default()).unwrap();
        let memory = driver.allocate(0, 4 * BLOCK).unwrap();
        let address = memory.address();
        let memory = node.agent().register_device(memory).unwrap();
        Self {
            driver,
            memory,
            address,
        }
    }

    /// The block with this number in its memory.
    fn block(&self, number: u64) -> BlockMemory {
        self.memory.descriptor(number * BLOCK, BLOCK).into()
    }
}

/// The tier is opened twice, used, and closed; counters and metrics tell of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_lends_memory_for_a_tier_and_gets_it_back() {
    let settings = with("metrics_listen", "127.0.0.1:0");
    let mut config = NodeConfig::load(None, &settings).unwrap();
    config.fabric.cuda_sums = true;
    let node = Node::open(config).await.unwrap();
    let engine = Engine::beside(&node);
    let infos = node.describe(&Namespace::default(), &[1, 2, 3, 4]).unwrap();
    let error = node.promote(infos.clone(), SECONDS).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    let lent = engine.driver.lend(0, 2 * BLOCK).unwrap();
    let at = lent.address();
    node.open_hbm(lent).unwrap();
    let error = node.open_hbm(engine.driver.lend(0, BLOCK).unwrap());
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Busy);

    engine.driver.write(engine.address, &[7; BLOCK as usize]);
    let block = StoreBlock {
        info: infos[0],
        memory: engine.block(0),
    };
    let stored = node.store_hbm(vec![block], SECONDS).await.unwrap();
    assert_eq!(stored.stored, 1);
    let fetch = || {
        let block = FetchBlock {
            info: infos[0],
            memory: engine.block(1),
        };
        node.fetch(vec![block], Located::default(), SECONDS)
    };
    assert_eq!(fetch().await.unwrap().sources, [Source::Device]);
    let found = engine.driver.read(engine.address + BLOCK, BLOCK);
    assert!(found == [7; BLOCK as usize]);
    let keys: Vec<_> = infos.iter().map(|info| info.key).collect();
    let down = node.offload(keys, SECONDS).await.unwrap();
    assert_eq!((down.stored, node.hbm_stats().blocks), (1, 0));
    assert_eq!(fetch().await.unwrap().sources, [Source::Host]);
    assert_eq!(
        node.promote(infos.clone(), SECONDS).await.unwrap().promoted,
        1
    );
    let stats = node.tier_stats().await.unwrap();
    let stat = |name: &str| stats.iter().find(|(known, _)| *known == name).unwrap().1;
    assert_eq!(
        (stat("hbm_slots"), stat("hbm_bytes"), stat("hbm_hits")),
        (2, BLOCK, 1)
    );
    let metrics = scrape(node.metrics_address().unwrap());
    assert!(
        metrics.contains("kvfabric_node_hbm_promoted 1"),
        "{metrics}"
    );
    assert!(
        metrics.contains("kvfabric_node_device_landed 2"),
        "{metrics}"
    );

    node.close_hbm(SECONDS).await.unwrap();
    engine.driver.free(at);
    assert_eq!(fetch().await.unwrap().sources, [Source::Host]);
    let error = node.close_hbm(SECONDS).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    engine.driver.check();
    node.shutdown(SECONDS).await.unwrap();
}

/// What the engine tells of a block in its own cache on the GPU.
fn tell_of_engine(node: &Node, tokens: &[u32], is_stored: bool) {
    let hashes = vec![kvcache_core::EngineHash(77)];
    let event = match is_stored {
        true => EngineEvent::Stored {
            hashes,
            parent: None,
            tokens: tokens.to_vec(),
            block_size: 4,
            tier: Tier::Device,
        },
        false => EngineEvent::Removed {
            hashes,
            tier: Tier::Device,
        },
    };
    node.publish_engine(vec![event]).unwrap();
}

/// The engine's own cache and the node's tier, both on the GPU, have the same block: each is withdrawn by itself, and routers see the
/// pod's HBM as long as one of them has it.
#[tokio::test]
async fn an_engines_own_cache_and_the_tier_are_told_apart() {
    let index = kvfabric_indexer::server::serve(kvfabric_indexer::config::ServerConfig {
        grpc_listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        block_size: 4,
        ..Default::default()
    })
    .await
    .unwrap();
    let settings = with("index.address", &format!("http://{}", index.grpc_address()));
    let node = Node::open(NodeConfig::load(None, &settings).unwrap());
    let node = node.await.unwrap();
    let engine = Engine::beside(&node);
    node.open_hbm(engine.driver.lend(0, 2 * BLOCK).unwrap())
        .unwrap();
    let tokens = [1, 2, 3, 4];
    let infos = node.describe(&Namespace::default(), &tokens).unwrap();
    let in_hbm = async || {
        let lookup = Lookup {
            tokens: &tokens,
            min_position: node.positions(),
            ..Default::default()
        };
        let answer = node.lookup(lookup).await.unwrap();
        answer
            .pods
            .first()
            .map_or(0, |pod| pod.by_tier[Tier::Device as usize])
    };
    let of_engine = |is_stored| tell_of_engine(&node, &tokens, is_stored);
    let up = async || {
        let block = StoreBlock {
            info: infos[0],
            memory: engine.block(0),
        };
        let stored = node.store_hbm(vec![block], SECONDS).await.unwrap();
        assert_eq!(stored.stored, 1);
    };
    let down = async || {
        let keys = vec![infos[0].key];
        node.offload(keys, SECONDS).await.unwrap();
        assert_eq!(node.hbm_stats().blocks, 0);
    };
    assert_eq!(in_hbm().await, 0);
    of_engine(true);
    up().await;
    assert_eq!(in_hbm().await, 1);
    of_engine(false);
    assert_eq!(in_hbm().await, 1, "the tier has it still");
    of_engine(true);
    down().await;
    assert_eq!(in_hbm().await, 1, "the engine has it still");
    of_engine(false);
    assert_eq!(in_hbm().await, 0);
    up().await;
    node.publish_engine(vec![EngineEvent::Cleared]).unwrap();
    assert_eq!(in_hbm().await, 1, "the engine's clearing is not the tier's");
    node.close_hbm(SECONDS).await.unwrap();
    assert_eq!(in_hbm().await, 0);
    node.shutdown(SECONDS).await.unwrap();
    index.shutdown(SECONDS).await.unwrap();
}
