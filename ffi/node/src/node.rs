//! The node itself: what is opened, in which order, and how it ends.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kvcache_core::event::EngineEvent;
use kvcache_core::ports::{Directory, EventSink, Located};
use kvcache_core::shape::TokensPerBlock;
use kvcache_core::{BlockInfo, BlockKey, Epoch, Error, ErrorKind, PodName, Result};
use kvfabric_indexer::client::{
    ClientConfig, IndexClient, LookupAnswer, LookupRequest, Prompt, Registered, Registration,
    SourceKind, SourcePosition,
};
use kvfabric_indexer::publisher::{Publisher, PublisherConfig, Stream};
use kvfabric_tiers::{Cache, FetchBlock, FetchReport, HeldDepth, StoreBlock, StoreReport};
use kvfabric_transfer::Agent;
use kvfabric_transfer::backend::object::ObjectOptions;

use crate::blocks::{Describer, Namespace};
use crate::config::{IndexSection, NodeConfig, OBJECT_STORE};
use crate::metrics::MetricsServer;
use crate::ports::Alone;

/// The names of a pod's two sources of events, as they are registered.
const ENGINE_SOURCE: &str = "engine";
const NODE_SOURCE: &str = "node";

/// How long the index may take to subscribe to a new node before opening fails.
const REGISTER_DEADLINE: Duration = Duration::from_secs(20);

/// How long connecting to the index may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// One pod's tiers, fabric and connection to the index. A clone is another handle on the same node.
#[derive(Clone)]
pub struct Node {
    inner: Arc<Inner>,
}

struct Inner {
    pod: PodName,
    model: String,
    describer: Describer,
    lookup_deadline: Duration,
    agent: Agent,
    cache: Cache,
    index: Option<Index>,
    metrics: Option<MetricsServer>,
}

/// The connection to the global index: questions, events, and the stream by which the pod lives in it.
struct Index {
    client: IndexClient,
    engine: Arc<Publisher>,
    node: Arc<Publisher>,
    /// Ends the registration when it is dropped.
    _registered: Registered,
}

/// What a lookup asks: a prompt, whose it is, and how fresh the answer must be.
#[derive(Clone, Debug, Default)]
pub struct Lookup<'a> {
    /// The prompt.
    pub tokens: &'a [u32],
    /// Whose blocks count.
    pub namespace: Namespace<'a>,
    /// At most so many pods, deepest first; 0 for all.
    pub pods_max: u32,
    /// Wait until these are applied.
    pub min_position: Vec<SourcePosition>,
}

impl Node {
    /// Opens everything: the agent, the tiers (with what the disk still holds), the peer service, the publishers, and the
    /// registration with the index, which then knows what is here.
    ///
    /// # Errors
    /// A bad configuration, an address in use, a folder or store that cannot be opened, an index that does not answer or
    /// that keys blocks by another scheme: each named.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn open(config: NodeConfig) -> Result<Self> {
        config.check()?;
        let pod = PodName::new(&config.pod)?;
        let agent = build_agent(&config)?;
        let publishers = config
            .index
            .as_ref()
            .map(|index| Publishers::bind(&config, index));
        let publishers = publishers.transpose()?;
        let (directory, sink): (Arc<dyn Directory>, Arc<dyn EventSink>) = match &publishers {
            Some(publishers) => (Arc::new(publishers.client.clone()), publishers.node.clone()),
            None => (Arc::new(Alone), Arc::new(Alone)),
        };
        let cache = Cache::open(config.cache_config()?, agent.clone(), directory, sink).await?;
        let index = match publishers {
            Some(publishers) => Some(publishers.register(&config, cache.peer_address()).await?),
            None => None,
        };
        let metrics = match config.metrics_listen {
            Some(address) => {
                Some(MetricsServer::start(address, agent.clone(), cache.clone()).await?)
            }
            None => None,
        };
        let describer = Describer::new(
            config.model.clone(),
            config.identity()?,
            config.shard()?,
            config.scheme()?,
            TokensPerBlock::try_from(config.block_tokens)?,
        );
        let lookup_deadline = config.lookup_deadline();
        let model = config.model;
        let inner = Inner {
            pod,
            model,
            describer,
            lookup_deadline,
            agent,
            cache,
            index,
            metrics,
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// The name by which routers and peers know this pod.
    #[must_use]
    pub fn pod(&self) -> &PodName {
        &self.inner.pod
    }

    /// The fabric: where an engine registers its memory.
    #[must_use]
    pub fn agent(&self) -> &Agent {
        &self.inner.agent
    }

    /// Where peers ask for leases.
    #[must_use]
    pub fn peer_address(&self) -> Option<SocketAddr> {
        self.inner.cache.peer_address()
    }

    /// Where Prometheus scrapes.
    #[must_use]
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.inner.metrics.as_ref().map(MetricsServer::address)
    }

    /// Describes each full block of `tokens`, in order: what [`Node::store`] and [`Node::fetch`] take.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a namespace that cannot be told apart.
    pub fn describe(&self, namespace: &Namespace<'_>, tokens: &[u32]) -> Result<Vec<BlockInfo>> {
        self.inner.describer.describe(namespace, tokens)
    }

    /// Copies blocks out of the engine's memory into the tiers. When it returns, that memory may be reused.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when too many operations are in progress, [`ErrorKind::Invalid`] for memory that is not
    /// registered with [`Node::agent`]. Blocks that found no room are counted in the report.
    pub async fn store(&self, blocks: Vec<StoreBlock>, deadline: Duration) -> Result<StoreReport> {
        self.inner.cache.store(blocks, after(deadline)).await
    }

    /// Brings blocks into the engine's memory, from wherever they are; without hints, the index is asked.
    ///
    /// The report has a source or a miss for each block. The memory of a missed block may have been written to.
    ///
    /// # Errors
    /// As [`Node::store`].
    pub async fn fetch(
        &self,
        blocks: Vec<FetchBlock>,
        hints: Located,
        deadline: Duration,
    ) -> Result<FetchReport> {
        self.inner.cache.fetch(blocks, hints, after(deadline)).await
    }

    /// How many blocks of a chain this node's own tiers hold.
    ///
    /// # Errors
    /// [`ErrorKind::Cancelled`] after the node was shut down.
    pub async fn held(&self, keys: Vec<BlockKey>) -> Result<HeldDepth> {
        self.inner.cache.lookup(&keys).await
    }

    /// Asks the global index who holds a prompt's blocks.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] without an index, [`ErrorKind::Timeout`] when it does not answer in time.
    pub async fn lookup(&self, lookup: Lookup<'_>) -> Result<LookupAnswer> {
        let index = self.index()?;
        let request = LookupRequest {
            model: self.inner.model.clone(),
            lora: lookup.namespace.lora.to_owned(),
            cache_salt: lookup.namespace.cache_salt.to_owned(),
            prompt: Prompt::Tokens(lookup.tokens.to_vec()),
            pods_max: lookup.pods_max,
            pods: Vec::new(),
            min_position: lookup.min_position,
            deadline: Some(self.inner.lookup_deadline),
        };
        index.client.lookup(request).await
    }

    /// Publishes changes of the engine's own cache, for engines that do not publish by themselves: blocks of the base
    /// model without a salt only, since these events name neither adapter nor salt.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] without an index.
    pub fn publish_engine(&self, events: Vec<EngineEvent>) -> Result<()> {
        let index = self.index()?;
        if !events.is_empty() {
            index.engine.publish_engine(events);
        }
        Ok(())
    }

    /// Up to where this pod's sources have published: what a lookup must wait for to see everything that is here.
    #[must_use]
    pub fn positions(&self) -> Vec<SourcePosition> {
        let Some(index) = &self.inner.index else {
            return Vec::new();
        };
        [(ENGINE_SOURCE, &index.engine), (NODE_SOURCE, &index.node)]
            .map(|(name, publisher)| {
                SourcePosition::new(&self.inner.pod, name, publisher.position())
            })
            .into()
    }

    /// The tiers' counters and levels, by name, in a fixed order; `docs/metrics.md` explains each.
    ///
    /// # Errors
    /// [`ErrorKind::Cancelled`] after the shutdown.
    pub async fn tier_stats(&self) -> Result<Vec<(&'static str, u64)>> {
        Ok(self.inner.cache.stats().await?.entries())
    }

    /// Stops leasing, withdraws what was announced, writes out what is on its way to the disk.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] when that takes longer than the deadline; what was not written is lost, nothing is wrong.
    pub async fn shutdown(&self, deadline: Duration) -> Result<()> {
        let result = self.inner.cache.shutdown(after(deadline)).await;
        if let Some(index) = &self.inner.index {
            // The index forgets this pod anyway once the registration ends; flushing only makes it sooner.
            let flushed = index.node.flush(FLUSH_PATIENCE).await;
            tracing::debug!(flushed, "events flushed");
        }
        result
    }

    fn index(&self) -> Result<&Index> {
        let none = || {
            Error::new(
                ErrorKind::Unsupported,
                "this node has no [index] configured",
            )
        };
        self.inner.index.as_ref().ok_or_else(none)
    }
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node")
            .field("pod", &self.inner.pod)
            .finish_non_exhaustive()
    }
}

/// The longest that a caller's deadline may lie ahead; later ones count as this.
const DEADLINE_MAX: Duration = Duration::from_secs(24 * 3600);

/// The instant so far from now. Durations come from callers in other languages, and a clock cannot hold any of them.
fn after(deadline: Duration) -> Instant {
    Instant::now() + deadline.min(DEADLINE_MAX)
}

/// How long the last events may take to leave.
const FLUSH_PATIENCE: Duration = Duration::from_millis(500);

fn build_agent(config: &NodeConfig) -> Result<Agent> {
    let mut builder = Agent::builder(&config.pod)
        .shm(config.fabric.shm)
        .tcp(config.fabric.tcp_listen);
    if let Some(object) = &config.object {
        let options = ObjectOptions {
            allow_http: object.allow_http,
            ..ObjectOptions::default()
        };
        builder = builder.object_store(OBJECT_STORE, &object.url, options);
    }
    builder.build()
}

/// What is there before the cache: it needs a sink for events and somebody to ask.
struct Publishers {
    client: IndexClient,
    engine: Arc<Publisher>,
    node: Arc<Publisher>,
}

impl Publishers {
    fn bind(config: &NodeConfig, index: &IndexSection) -> Result<Self> {
        let pod = PodName::new(&config.pod)?;
        let client = IndexClient::new(ClientConfig {
            address: index.address.clone(),
            model: config.model.clone(),
            deadline: config.lookup_deadline(),
            connect_timeout: CONNECT_TIMEOUT,
        })?;
        let bind = |stream| {
            let any_port = format!("tcp://{}:0", index.publish_host);
            Publisher::bind(PublisherConfig {
                endpoint: any_port.clone(),
                replay_endpoint: any_port,
                ..PublisherConfig::new(pod.clone(), config.model.clone(), stream)
            })
            .map(Arc::new)
        };
        let engine = bind(Stream::Engine)?;
        let node = bind(Stream::Node { epoch: new_epoch() })?;
        Ok(Self {
            client,
            engine,
            node,
        })
    }

    async fn register(self, config: &NodeConfig, peers: Option<SocketAddr>) -> Result<Index> {
        let sources = vec![
            self.engine.source(ENGINE_SOURCE, SourceKind::Vllm),
            self.node.source(NODE_SOURCE, SourceKind::Node),
        ];
        let registered = self.client.register(Registration {
            pod: PodName::new(&config.pod)?,
            model: config.model.clone(),
            block_size: config.block_tokens,
            key_scheme: config.key_scheme.clone(),
            sources,
            peer_address: peers.map(|address| address.to_string()),
        });
        registered
            .ready(REGISTER_DEADLINE)
            .await
            .map_err(|e| e.at("register with the index"))?;
        let Self {
            client,
            engine,
            node,
        } = self;
        Ok(Index {
            client,
            engine,
            node,
            _registered: registered,
        })
    }
}

/// Later than the epoch of every earlier run on this machine, as long as its clock is not set back; another value in any case.
fn new_epoch() -> Epoch {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Epoch(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}
