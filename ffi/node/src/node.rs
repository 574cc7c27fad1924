//! The node itself: what is opened, in which order, and how it ends.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvcache_core::ports::{Directory, EventSink, Located};
use kvcache_core::shape::TokensPerBlock;
use kvcache_core::{BlockInfo, BlockKey, Error, PinId, PodName, Result};
use kvfabric_tiers::{
    Cache, FetchBlock, FetchReport, HeldDepth, Pages, PeerService, Pinned, Reach, Removed, Segment,
    StoreBlock, StoreReport,
};
use kvfabric_transfer::{Agent, DeviceMemory};

use crate::blocks::{Describer, Namespace, Prefix};
use crate::config::NodeConfig;
use crate::index::{Index, Publishers};
use crate::metrics::MetricsServer;
use crate::names::Names;
use crate::parts;
use crate::ports::Alone;

mod hbm;
mod index;

pub(crate) use hbm::Hbm;
pub use index::Lookup;

/// One pod's tiers, fabric and connection to the index. A clone is another handle on the same node.
#[derive(Clone)]
pub struct Node {
    inner: Arc<Inner>,
}

struct Inner {
    pod: PodName,
    model: String,
    block_bytes: u64,
    describer: Describer,
    lookup_deadline: Duration,
    agent: Agent,
    /// Before the cache, whose blocks it withdraws when it ends.
    hbm: Arc<Hbm>,
    cache: Cache,
    index: Option<Index>,
    metrics: Option<MetricsServer>,
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
        let agent = parts::agent(&config)?;
        let publishers = config
            .index
            .as_ref()
            .map(|index| Publishers::bind(&config, index));
        let publishers = publishers.transpose()?;
        let (directory, sink): (Arc<dyn Directory>, Arc<dyn EventSink>) = match &publishers {
            Some(publishers) => (Arc::new(publishers.client.clone()), publishers.node.clone()),
            None => (Arc::new(Alone), Arc::new(Alone)),
        };
        let describer = parts::describer(&config)?;
        let mut cache = config.cache_config()?;
        cache.names = describer
            .engine
            .is_some()
            .then(|| parts::name_reader(&describer));
        let cache = Cache::open(cache, agent.clone(), directory, sink).await?;
        let hbm = Arc::new(Hbm::default());
        if let Some(section) = &config.hbm {
            let memory = DeviceMemory::allocate(section.device, section.bytes);
            let opened = memory.and_then(|memory| hbm.open(&cache, memory));
            opened.map_err(|error| error.at("hbm"))?;
        }
        let index = match publishers {
            Some(publishers) => Some(publishers.register(&config, cache.peer_address()).await?),
            None => None,
        };
        let metrics = match config.metrics_listen {
            Some(address) => {
                let served = MetricsServer::start(address, &agent, &cache, &hbm);
                Some(served.await?)
            }
            None => None,
        };
        let lookup_deadline = config.lookup_deadline();
        let block_bytes = config.block_bytes;
        let model = config.model;
        let inner = Inner {
            pod,
            model,
            block_bytes,
            describer,
            lookup_deadline,
            agent,
            hbm,
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

    /// Tokens of a block.
    #[must_use]
    pub fn block_tokens(&self) -> TokensPerBlock {
        self.inner.describer.block_tokens
    }

    /// Describes each full block of `tokens`, in order: what [`Node::store`] and [`Node::fetch`] take.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Invalid`] for a namespace that cannot be told apart.
    pub fn describe(&self, namespace: &Namespace<'_>, tokens: &[u32]) -> Result<Vec<BlockInfo>> {
        let mut prefix = self.prefix(namespace)?;
        prefix.extend(tokens)?;
        Ok(prefix.infos().to_vec())
    }

    /// A prefix without tokens, to be extended by a sequence's.
    ///
    /// # Errors
    /// As [`Node::describe`].
    pub fn prefix(&self, namespace: &Namespace<'_>) -> Result<Prefix> {
        self.inner.describer.prefix(namespace)
    }

    /// The blocks that an engine has named by its own hashes, as this pod holds them. `adapter` is the identity of the
    /// adapter's weights, if the names do not carry it.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Unsupported`] without `[engine]` in the configuration, and for hashes too weak to name
    /// bytes that outlive the engine; [`kvcache_core::ErrorKind::Invalid`] for another adapter than that of the names.
    pub fn prefix_of(&self, names: &Names, adapter: Option<[u8; 32]>) -> Result<Prefix> {
        self.inner.describer.prefix_of(names, adapter)
    }

    /// How the engine's memory holds its blocks: `blocks` of them, each made of these segments in order.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Invalid`] for segments outside their regions, or that do not add up to the configured
    /// block.
    pub fn pages(&self, segments: Vec<Segment>, blocks: u32) -> Result<Pages> {
        let pages = Pages::new(&self.inner.agent, segments, blocks)?;
        let expected = self.inner.block_bytes;
        if pages.block_bytes() != expected {
            let bytes = pages.block_bytes();
            return Err(Error::invalid(
                "bytes of a block in the pages",
                bytes,
                [expected],
            ));
        }
        Ok(pages)
    }

    /// Copies blocks out of the engine's memory into the tiers. When it returns, that memory may be reused.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Busy`] when too many operations are in progress,
    /// [`kvcache_core::ErrorKind::Invalid`] for memory that is not registered with [`Node::agent`]. Blocks that found no
    /// room are counted in the report.
    pub async fn store(&self, blocks: Vec<StoreBlock>, deadline: Duration) -> Result<StoreReport> {
        self.inner.cache.store(blocks, after(deadline)).await
    }

    /// Brings blocks into the engine's memory, from wherever they are, the HBM tier first if there is one; without hints, the index is
    /// asked.
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
        let deadline = after(deadline);
        match self.inner.hbm.tier() {
            Some(tier) => tier.fetch_through(blocks, hints, deadline).await,
            None => self.inner.cache.fetch(blocks, hints, deadline).await,
        }
    }

    /// How many blocks of a chain this node's own tiers hold.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Cancelled`] after the node was shut down.
    pub async fn held(&self, keys: Vec<BlockKey>) -> Result<HeldDepth> {
        self.inner.cache.lookup(&keys).await
    }

    /// How much of a chain could be had from here: from the own tiers, from peers and from shared objects together. The index
    /// is asked if the own tiers do not have all of it; without its answer only they count.
    ///
    /// # Errors
    /// As [`Node::held`].
    pub async fn locate(&self, blocks: &[BlockInfo], deadline: Duration) -> Result<Reach> {
        self.inner.cache.locate(blocks, after(deadline)).await
    }

    /// Keeps blocks in host memory until [`Node::release`], or for `ttl`: as many as are there, from the first. It bounds
    /// what is pinned; the depth tells how many are.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Busy`] when too much is pinned or in progress.
    pub async fn pin(&self, keys: &[BlockKey], ttl: Duration) -> Result<Pinned> {
        self.inner.cache.pin(keys, ttl.min(DEADLINE_MAX)).await
    }

    /// As [`Node::pin`], under a number that the caller has drawn at random, for this once: whoever was told it beforehand
    /// may let go of the blocks, even before they are pinned, and the depth is 0 then.
    ///
    /// # Errors
    /// As [`Node::pin`]; [`kvcache_core::ErrorKind::Invalid`] for the number of a pin that is in force.
    pub async fn pin_as(&self, id: PinId, keys: &[BlockKey], ttl: Duration) -> Result<Pinned> {
        let ttl = ttl.min(DEADLINE_MAX);
        self.inner.cache.pin_as(id, keys, ttl).await
    }

    /// Lets go of what was pinned; one that has ended is no error.
    ///
    /// # Errors
    /// As [`Node::held`].
    pub async fn release(&self, pin: PinId) -> Result<()> {
        self.inner.cache.release(pin).await
    }

    /// Lets go of what another node has pinned for this one.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Timeout`] after `deadline`,
    /// [`kvcache_core::ErrorKind::PeerLost`] when the peer cannot be reached,
    /// [`kvcache_core::ErrorKind::Denied`] when it serves another model: the pin then ends by its time.
    pub async fn unpin(&self, peer_address: &str, pin: PinId, deadline: Duration) -> Result<()> {
        let service = PeerService::connect(peer_address)?;
        let identity = self.inner.describer.identity.0;
        service
            .unpin(pin, &identity, deadline.min(DEADLINE_MAX))
            .await
    }

    /// Drops blocks from the own tiers; those that are pinned, lent or on their way somewhere stay, and are counted.
    ///
    /// # Errors
    /// As [`Node::held`].
    pub async fn remove(&self, keys: &[BlockKey]) -> Result<Removed> {
        self.inner.cache.remove(keys).await
    }

    /// Drops everything from the own tiers, as [`Node::remove`] does; shared objects stay.
    ///
    /// # Errors
    /// As [`Node::held`].
    pub async fn clear(&self) -> Result<Removed> {
        self.inner.cache.clear().await
    }

    /// Waits until all blocks that were on their way to the disk or to the shared store are there.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Timeout`] when that takes longer.
    pub async fn flush(&self, deadline: Duration) -> Result<()> {
        self.inner.cache.flush(after(deadline)).await
    }

    /// The tiers' counters and levels, by name, in a fixed order; `docs/metrics.md` explains each.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Cancelled`] after the shutdown.
    pub async fn tier_stats(&self) -> Result<Vec<(&'static str, u64)>> {
        let mut entries = self.inner.cache.stats().await?.entries();
        entries.extend(self.inner.hbm.stats().entries());
        Ok(entries)
    }

    /// Stops leasing, withdraws what was announced, and writes down to the disk what only host memory has, the most recently
    /// used first, as far as there is room: what a restart finds again. A longer deadline saves more. What only the HBM tier has is
    /// lost: [`Node::offload`] before that.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Timeout`] when that takes longer than the deadline; what was not written is lost, nothing is wrong.
    pub async fn shutdown(&self, deadline: Duration) -> Result<()> {
        let result = self.inner.cache.shutdown(after(deadline)).await;
        if let Some(index) = &self.inner.index {
            // The index forgets this pod anyway once the registration ends; flushing only makes it sooner.
            let flushed = index.node.flush(FLUSH_PATIENCE).await;
            tracing::debug!(flushed, "events flushed");
        }
        result
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
