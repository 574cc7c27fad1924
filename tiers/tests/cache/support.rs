//! Nodes to test with: a cache, its agent, an engine's memory, and everything it announced.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvcache_core::event::NodeEvent;
use kvcache_core::ports::{Directory, EventSink, Holder, LocateFuture, Located, Position};
use kvcache_core::{
    BlockInfo, BlockKey, Epoch, Error, ErrorKind, IndexKey, PodName, Sequence, Tier,
};
use kvfabric_tiers::{
    Cache, CacheConfig, DiskConfig, FetchBlock, FetchReport, ObjectConfig, Source, StoreBlock,
    StoreReport,
};
use kvfabric_transfer::{
    Agent, DirectMode, HostMemory, ObjectOptions, Region, RegionOptions, UcxOptions,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Bytes of a block in these tests: not a multiple of a page, which is the harder case.
pub(crate) const BLOCK: u64 = 5000;

/// Blocks of engine memory.
pub(crate) const ENGINE_SLOTS: usize = 64;

/// The model of these tests.
pub(crate) const IDENTITY: [u8; 32] = [0x5a; 32];

/// Long enough that only a hang runs into it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Block `number` of sequence `chain`.
pub(crate) fn block(chain: u8, number: u8) -> BlockInfo {
    let key = |number: u8| {
        let mut key = [chain; 32];
        key[0] = number;
        BlockKey(key)
    };
    let index = |number: u8| IndexKey(u64::from(chain) << 8 | u64::from(number));
    BlockInfo {
        key: key(number),
        parent: number.checked_sub(1).map(key),
        index_key: index(number),
        index_parent: number.checked_sub(1).map(index),
    }
}

/// The first `count` blocks of sequence `chain`.
pub(crate) fn chain(chain: u8, count: u8) -> Vec<BlockInfo> {
    (0..count).map(|number| block(chain, number)).collect()
}

/// The bytes that a block must always have.
pub(crate) fn bytes_of(info: &BlockInfo) -> Vec<u8> {
    let mut state = info.key.0.iter().fold(0x9e37_79b9_u32, |state, byte| {
        (state ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    });
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..BLOCK).map(|_| next()).collect()
}

/// Remembers everything published.
pub(crate) struct Recorder {
    events: watch::Sender<Vec<NodeEvent>>,
}

impl Recorder {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            events: watch::channel(Vec::new()).0,
        })
    }

    pub(crate) fn events(&self) -> Vec<NodeEvent> {
        self.events.borrow().clone()
    }

    /// Waits until what was published satisfies `enough`.
    pub(crate) async fn until(&self, enough: impl FnMut(&Vec<NodeEvent>) -> bool) {
        let mut events = self.events.subscribe();
        tokio::time::timeout(PATIENCE, events.wait_for(enough))
            .await
            .expect("the event is published")
            .expect("the recorder lives");
    }

    /// Waits until every one of `blocks` was announced in `tier`.
    pub(crate) async fn until_stored(&self, blocks: &[BlockInfo], tier: Tier) {
        self.until(|events| blocks.iter().all(|info| stored(events, info, tier)))
            .await;
    }
}

/// Whether the block is announced in the tier, after all of `events`.
pub(crate) fn stored(events: &[NodeEvent], info: &BlockInfo, tier: Tier) -> bool {
    events.iter().fold(false, |stored, event| match event {
        NodeEvent::Stored { key, tier: t, .. } if *key == info.index_key && *t == tier => true,
        NodeEvent::Removed { key, tier: t } if *key == info.index_key && *t == tier => false,
        NodeEvent::Cleared if !tier.is_shared() => false,
        _ => stored,
    })
}

impl EventSink for Recorder {
    fn publish(&self, events: Vec<NodeEvent>) -> Position {
        self.events.send_modify(|all| all.extend(events));
        Position {
            epoch: Epoch(1),
            next: Sequence(self.events.borrow().len() as u64),
        }
    }
}

/// Whether a [`Guide`] answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Mood {
    #[default]
    Helpful,
    /// Every question fails.
    Broken,
    /// No question is ever answered.
    Silent,
}

/// Answers what it was told, and counts the questions.
#[derive(Default)]
pub(crate) struct Guide {
    pub(crate) located: Mutex<Located>,
    pub(crate) questions: AtomicU64,
    /// How it answers.
    pub(crate) mood: Mutex<Mood>,
    /// Deregistered while the next question is answered.
    pub(crate) closes: Mutex<Option<Region>>,
}

impl Directory for Guide {
    fn locate(&self, _: Vec<IndexKey>) -> LocateFuture<'_> {
        self.questions.fetch_add(1, Ordering::Relaxed);
        if let Some(region) = self.closes.lock().unwrap().take() {
            drop(region.deregister());
        }
        let located = self.located.lock().unwrap().clone();
        let mood = *self.mood.lock().unwrap();
        Box::pin(async move {
            match mood {
                Mood::Helpful => Ok(located),
                Mood::Broken => Err(Error::new(ErrorKind::Io, "the directory is broken")),
                Mood::Silent => std::future::pending().await,
            }
        })
    }
}

/// How a peer's memory is reached.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Way {
    Memcpy,
    Shm,
    Tcp,
    Ucx,
}

/// An agent that has only this way to its peers, and an object store named "cold" in `objects`.
pub(crate) fn agent(name: &str, way: Way, objects: Option<&Path>) -> Agent {
    let mut builder = Agent::builder(name)
        .memcpy(way == Way::Memcpy)
        .shm(way == Way::Shm)
        .ucx((way == Way::Ucx).then(UcxOptions::default));
    if way == Way::Tcp {
        builder = builder.tcp(Some("127.0.0.1:0".parse().unwrap()));
    }
    if let Some(objects) = objects {
        let url = format!("file://{}", objects.display());
        builder = builder.object_store("cold", &url, ObjectOptions::default());
    }
    builder.build().unwrap()
}

/// A configuration with `host` slots of host memory, serving peers.
pub(crate) fn config(name: &str, host: u64) -> CacheConfig {
    let pod = PodName::new(name).unwrap();
    let mut config = CacheConfig::new(pod, IDENTITY, BLOCK, host * BLOCK);
    config.peer_listen = Some("127.0.0.1:0".parse().unwrap());
    config.device_sums = true;
    config
}

/// A disk tier of `segments` segments, four blocks each.
pub(crate) fn disk(path: &Path, segments: u64) -> Option<DiskConfig> {
    let segment_bytes = 4096 + 4 * (4096 + 8192);
    let bytes = segments * segment_bytes;
    Some(DiskConfig {
        path: path.to_owned(),
        bytes,
        segment_bytes,
        direct: DirectMode::Auto,
        engine: crate::ENGINE,
    })
}

/// The object tier that [`agent`] knows.
pub(crate) fn cold() -> Option<ObjectConfig> {
    Some(ObjectConfig {
        store_name: "cold".to_owned(),
        prefix: "kv".to_owned(),
    })
}

/// A relay in front of a service, which passes bytes on while it is open and holds them back while it is not.
pub(crate) struct Gate {
    pub(crate) address: SocketAddr,
    pub(crate) open: Arc<watch::Sender<bool>>,
    /// How many connections it accepted.
    pub(crate) connections: Arc<AtomicU64>,
}

impl Gate {
    pub(crate) async fn before(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let gate = Self {
            address: listener.local_addr().unwrap(),
            open: Arc::new(watch::channel(true).0),
            connections: Arc::default(),
        };
        let (open, connections) = (gate.open.clone(), gate.connections.clone());
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                connections.fetch_add(1, Ordering::Relaxed);
                let (near_in, near_out) = near.into_split();
                let (far_in, far_out) = TcpStream::connect(target).await.unwrap().into_split();
                tokio::spawn(pass(near_in, far_out, open.subscribe()));
                tokio::spawn(pass(far_in, near_out, open.subscribe()));
            }
        });
        gate
    }
}

async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut open: watch::Receiver<bool>,
) {
    let mut bytes = vec![0; 4096];
    while let Ok(count @ 1..) = from.read(&mut bytes).await {
        let opened = open.wait_for(|open| *open).await.is_ok();
        if !opened || to.write_all(&bytes[..count]).await.is_err() {
            return;
        }
    }
}

/// A cache and everything around it.
pub(crate) struct Node {
    pub(crate) cache: Cache,
    pub(crate) agent: Agent,
    pub(crate) engine: Region,
    pub(crate) sink: Arc<Recorder>,
    pub(crate) guide: Arc<Guide>,
    pub(crate) pod: PodName,
}

impl Node {
    pub(crate) async fn open(config: CacheConfig, agent: Agent) -> Self {
        Self::try_open(config, agent).await.unwrap()
    }

    pub(crate) async fn try_open(config: CacheConfig, agent: Agent) -> kvcache_core::Result<Self> {
        let memory = HostMemory::anonymous(BLOCK * ENGINE_SLOTS as u64).unwrap();
        let engine = agent.register(memory, RegionOptions::default()).unwrap();
        let (sink, guide) = (Recorder::new(), Arc::new(Guide::default()));
        let pod = config.pod.clone();
        let cache = Cache::open(config, agent.clone(), guide.clone(), sink.clone()).await?;
        Ok(Self {
            cache,
            agent,
            engine,
            sink,
            guide,
            pod,
        })
    }

    /// Stores blocks from engine memory, four at a time so that small arenas keep up.
    pub(crate) async fn store(&self, blocks: &[BlockInfo]) -> StoreReport {
        let mut sum = StoreReport::default();
        for batch in blocks.chunks(4) {
            let report = self.store_at(batch, 0).await;
            sum.stored += report.stored;
            sum.already_held += report.already_held;
            sum.refused += report.refused;
            sum.failed += report.failed;
        }
        sum
    }

    /// Stores blocks from the engine slots from `slot` on.
    pub(crate) async fn store_at(&self, blocks: &[BlockInfo], slot: usize) -> StoreReport {
        let placed = blocks.iter().enumerate().map(|(at, info)| {
            let offset = (slot + at) as u64 * BLOCK;
            self.engine.write_at(offset, &bytes_of(info)).unwrap();
            StoreBlock {
                info: *info,
                memory: self.engine.descriptor(offset, BLOCK).into(),
            }
        });
        let blocks = placed.collect();
        self.cache
            .store(blocks, Instant::now() + PATIENCE)
            .await
            .unwrap()
    }

    /// Fetches into wiped engine memory and checks every byte of what is said to be there.
    pub(crate) async fn fetch(&self, blocks: &[BlockInfo], hints: Located) -> Vec<Source> {
        self.fetch_at(blocks, hints, 0, PATIENCE).await
    }

    /// Fetches without telling who holds what.
    pub(crate) async fn fetch_own(&self, blocks: &[BlockInfo]) -> Vec<Source> {
        self.fetch(blocks, Located::default()).await
    }

    pub(crate) async fn fetch_at(
        &self,
        blocks: &[BlockInfo],
        hints: Located,
        slot: usize,
        patience: Duration,
    ) -> Vec<Source> {
        let start = slot as u64 * BLOCK;
        self.engine
            .fill_at(start, BLOCK * blocks.len() as u64, 0xee)
            .unwrap();
        let placed = blocks.iter().enumerate().map(|(at, info)| {
            let offset = start + at as u64 * BLOCK;
            FetchBlock {
                info: *info,
                memory: self.engine.descriptor(offset, BLOCK).into(),
            }
        });
        let placed = placed.collect();
        let fetch = self.cache.fetch(placed, hints, Instant::now() + patience);
        let answered = tokio::time::timeout(patience + PATIENCE, fetch).await;
        let mut report: FetchReport = answered.expect("a fetch ends").unwrap();
        self.verify(blocks, &report, start);
        assert!(report.drained().await);
        report.sources
    }

    fn verify(&self, blocks: &[BlockInfo], report: &FetchReport, start: u64) {
        assert_eq!(report.sources.len(), blocks.len());
        for (at, info) in blocks.iter().enumerate().take(report.depth()) {
            let mut found = vec![0; BLOCK as usize];
            self.engine
                .read_at(start + at as u64 * BLOCK, &mut found)
                .unwrap();
            assert!(
                found == bytes_of(info),
                "wrong bytes of {info:?} from {:?}",
                report.sources
            );
        }
    }

    /// Hints that name this node as the holder of `depth` blocks.
    pub(crate) fn hints(&self, depth: u32) -> Located {
        let address = self.cache.peer_address().unwrap().to_string();
        Located {
            holders: vec![Holder {
                pod: self.pod.clone(),
                depth,
                peer_address: Some(address),
            }],
            shared: Vec::new(),
        }
    }

    pub(crate) async fn stat(&self, name: &str) -> u64 {
        let entries = self.cache.stats().await.unwrap().entries();
        entries
            .iter()
            .find(|(known, _)| *known == name)
            .expect("a known statistic")
            .1
    }

    pub(crate) async fn shutdown(self) {
        self.cache
            .shutdown(Instant::now() + PATIENCE)
            .await
            .unwrap();
    }
}

/// How many of the sources are this one.
pub(crate) fn count(sources: &[Source], wanted: &Source) -> usize {
    sources.iter().filter(|source| *source == wanted).count()
}

/// Flips a byte of a file.
pub(crate) fn flip(path: &Path, offset: u64) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    byte[0] ^= 0x40;
    file.write_all_at(&byte, offset).unwrap();
}
