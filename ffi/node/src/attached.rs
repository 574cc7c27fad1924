//! Nodes with threads of their own, for callers that are not asynchronous.

use std::sync::Arc;
use std::time::Duration;

use kvcache_core::ports::Located;
use kvcache_core::{BlockInfo, BlockKey, PinId, Result};
use kvfabric_indexer::client::{LookupAnswer, LookupRequest};
use kvfabric_tiers::{
    BlockMemory, FetchBlock, HeldDepth, Pages, Pinned, PromoteReport, Reach, Removed, Source,
    StoreBlock, StoreReport, seen_from,
};
use kvfabric_transfer::DeviceMemory;

use crate::blocks::Prefix;
use crate::config::NodeConfig;
use crate::life::Life;
use crate::node::Node;
use crate::operation::Operation;
use crate::runtime::Runtime;

/// Threads of an attached node: bytes are moved by the agent's own threads, so these only decide and talk.
const NODE_THREADS: usize = 2;

/// What became of a fetch.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// One entry per block asked for, in order. The first miss ends the useful prefix.
    pub sources: Vec<Source>,
    /// The blocks, by position in the fetch, whose memory a failed transfer may still write to. All are misses; mostly
    /// there are none.
    pub unsettled: Vec<u32>,
    /// Done when the memory of the unsettled blocks can be used again; false when that is not certain, because the node
    /// ended before.
    pub drained: Operation<bool>,
}

impl Fetched {
    /// How many blocks, from the first, were brought without a hole.
    #[must_use]
    pub fn depth(&self) -> usize {
        let found = self
            .sources
            .iter()
            .take_while(|source| **source != Source::Miss);
        found.count()
    }
}

/// A node with threads of its own. Its calls block, or begin an [`Operation`].
///
/// Who hands out handles on it begins each of their calls with [`Life::enter`]. Dropping it ends the node as dropping the
/// last [`Node`] does; [`Node::shutdown`] is the orderly end.
#[derive(Debug)]
pub struct AttachedNode {
    node: Node,
    runtime: Runtime,
}

impl AttachedNode {
    /// As [`Node::open`], and blocks until it is open.
    ///
    /// # Errors
    /// As [`Node::open`]; [`kvcache_core::ErrorKind::Io`] when there are no threads.
    pub fn open(config: NodeConfig) -> Result<Self> {
        let runtime = Runtime::start("kvf-node", NODE_THREADS)?;
        let node = runtime.block_on(Node::open(config))?;
        Ok(Self { node, runtime })
    }

    /// Whether it may still be used; shared with all handles on it.
    #[must_use]
    pub fn life(&self) -> &Arc<Life> {
        self.runtime.life()
    }

    /// The node itself, for what needs no waiting.
    #[must_use]
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Stores the blocks of `prefix` from position `first` on; the engine has them in `pages` under the numbers `blocks`.
    /// That memory must stay as it is until the operation is done.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Invalid`] for blocks outside the prefix or the pages; the rest as [`Node::store`], by
    /// the operation.
    pub fn store(
        &self,
        prefix: &Prefix,
        first: usize,
        pages: &Pages,
        blocks: &[u32],
        deadline: Duration,
    ) -> Result<Operation<StoreReport>> {
        let stores = stores(prefix, first, pages, blocks)?;
        let node = self.node.clone();
        Ok(self
            .runtime
            .spawn(async move { node.store(stores, deadline).await }))
    }

    /// Fetches the blocks of `prefix` from position `first` on, into `pages` under the numbers `blocks`. That memory is the
    /// node's until the operation is done, and that of [`Fetched::unsettled`] blocks longer.
    ///
    /// `hints` say where blocks are, counted from the first of the prefix; with empty ones the index is asked.
    ///
    /// # Errors
    /// As [`AttachedNode::store`] and [`Node::fetch`].
    pub fn fetch(
        &self,
        prefix: &Prefix,
        first: usize,
        pages: &Pages,
        blocks: &[u32],
        hints: Located,
        deadline: Duration,
    ) -> Result<Operation<Fetched>> {
        let fetches = paired(prefix, first, pages, blocks, |info, memory| FetchBlock {
            info,
            memory,
        })?;
        let hints = seen_from(hints, first);
        let (node, life) = (self.node.clone(), self.life().clone());
        Ok(self.runtime.spawn(async move {
            let mut report = node.fetch(fetches, hints, deadline).await?;
            let (drained, decider) = Operation::begin(life);
            let sources = std::mem::take(&mut report.sources);
            let unsettled = report.unsettled.clone();
            if unsettled.is_empty() {
                decider.decide(Ok(true));
            } else {
                tokio::spawn(async move { decider.decide(Ok(report.drained().await)) });
            }
            Ok(Fetched {
                sources,
                unsettled,
                drained,
            })
        }))
    }

    /// As [`Node::open_hbm`].
    ///
    /// # Errors
    /// As there.
    pub fn open_hbm(&self, memory: DeviceMemory) -> Result<()> {
        self.node.open_hbm(memory)
    }

    /// As [`Node::promote`], for `count` blocks of a prefix from position `first` on.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Invalid`] for blocks outside the prefix; the rest by the operation.
    pub fn promote(
        &self,
        prefix: &Prefix,
        first: usize,
        count: usize,
        deadline: Duration,
    ) -> Result<Operation<PromoteReport>> {
        let blocks = prefix.run(first, count)?.to_vec();
        let node = self.node.clone();
        Ok(self
            .runtime
            .spawn(async move { node.promote(blocks, deadline).await }))
    }

    /// As [`AttachedNode::store`], into the HBM tier.
    ///
    /// # Errors
    /// As [`AttachedNode::store`] and [`Node::store_hbm`].
    pub fn store_hbm(
        &self,
        prefix: &Prefix,
        first: usize,
        pages: &Pages,
        blocks: &[u32],
        deadline: Duration,
    ) -> Result<Operation<StoreReport>> {
        let stores = stores(prefix, first, pages, blocks)?;
        let node = self.node.clone();
        Ok(self
            .runtime
            .spawn(async move { node.store_hbm(stores, deadline).await }))
    }

    /// As [`Node::offload`], for `count` blocks of a prefix from position `first` on.
    ///
    /// # Errors
    /// As [`AttachedNode::promote`].
    pub fn offload(
        &self,
        prefix: &Prefix,
        first: usize,
        count: usize,
        deadline: Duration,
    ) -> Result<Operation<StoreReport>> {
        let run = prefix.run(first, count)?;
        let keys = run.iter().map(|info| info.key).collect();
        let node = self.node.clone();
        Ok(self
            .runtime
            .spawn(async move { node.offload(keys, deadline).await }))
    }

    /// As [`Node::close_hbm`].
    #[must_use]
    pub fn close_hbm(&self, deadline: Duration) -> Operation<()> {
        let node = self.node.clone();
        self.runtime
            .spawn(async move { node.close_hbm(deadline).await })
    }

    /// How many blocks of a prefix this node's own tiers hold.
    #[must_use]
    pub fn held(&self, prefix: &Prefix) -> Operation<HeldDepth> {
        let (node, keys) = (self.node.clone(), prefix.keys());
        self.runtime.spawn(async move { node.held(keys).await })
    }

    /// As [`Node::locate`], for a prefix.
    #[must_use]
    pub fn locate(&self, prefix: &Prefix, deadline: Duration) -> Operation<Reach> {
        let (node, blocks) = (self.node.clone(), prefix.infos().to_vec());
        self.runtime
            .spawn(async move { node.locate(&blocks, deadline).await })
    }

    /// As [`Node::pin`], for the blocks of a prefix from position `first` on; with an `id`, as [`Node::pin_as`].
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Invalid`] for a position outside the prefix; the rest by the operation.
    pub fn pin(
        &self,
        prefix: &Prefix,
        first: usize,
        ttl: Duration,
        id: Option<PinId>,
    ) -> Result<Operation<Pinned>> {
        let run = prefix.run(first, prefix.len().saturating_sub(first))?;
        let keys: Vec<BlockKey> = run.iter().map(|info| info.key).collect();
        let node = self.node.clone();
        Ok(self.runtime.spawn(async move {
            match id {
                Some(id) => node.pin_as(id, &keys, ttl).await,
                None => node.pin(&keys, ttl).await,
            }
        }))
    }

    /// As [`Node::release`].
    #[must_use]
    pub fn release(&self, pin: PinId) -> Operation<()> {
        let node = self.node.clone();
        self.runtime.spawn(async move { node.release(pin).await })
    }

    /// As [`Node::unpin`].
    #[must_use]
    pub fn unpin(&self, peer_address: &str, pin: PinId, deadline: Duration) -> Operation<()> {
        let (node, address) = (self.node.clone(), peer_address.to_owned());
        self.runtime
            .spawn(async move { node.unpin(&address, pin, deadline).await })
    }

    /// As [`Node::remove`], for a prefix.
    #[must_use]
    pub fn remove(&self, prefix: &Prefix) -> Operation<Removed> {
        let (node, keys) = (self.node.clone(), prefix.keys());
        self.runtime.spawn(async move { node.remove(&keys).await })
    }

    /// As [`Node::clear`].
    #[must_use]
    pub fn clear(&self) -> Operation<Removed> {
        let node = self.node.clone();
        self.runtime.spawn(async move { node.clear().await })
    }

    /// As [`Node::flush`].
    #[must_use]
    pub fn flush(&self, deadline: Duration) -> Operation<()> {
        let node = self.node.clone();
        self.runtime
            .spawn(async move { node.flush(deadline).await })
    }

    /// Asks the global index; see [`LookupRequest`].
    ///
    /// # Errors
    /// As [`Node::lookup`], by the operation.
    #[must_use]
    pub fn lookup(&self, request: LookupRequest) -> Operation<LookupAnswer> {
        let node = self.node.clone();
        self.runtime
            .spawn(async move { node.ask_index(request).await })
    }

    /// As [`Node::tier_stats`].
    #[must_use]
    pub fn stats(&self) -> Operation<Vec<(&'static str, u64)>> {
        let node = self.node.clone();
        self.runtime.spawn(async move { node.tier_stats().await })
    }

    /// As [`Node::shutdown`].
    #[must_use]
    pub fn shutdown(&self, deadline: Duration) -> Operation<()> {
        let node = self.node.clone();
        self.runtime
            .spawn(async move { node.shutdown(deadline).await })
    }
}

/// Each block of the run with its place, `joined`. Takes memory once, however many they are.
fn paired<T>(
    prefix: &Prefix,
    first: usize,
    pages: &Pages,
    blocks: &[u32],
    joined: impl Fn(BlockInfo, BlockMemory) -> T,
) -> Result<Vec<T>> {
    let run = prefix.run(first, blocks.len())?;
    let mut pairs = Vec::with_capacity(blocks.len());
    for (info, number) in run.iter().zip(blocks) {
        pairs.push(joined(*info, pages.block(*number)?));
    }
    Ok(pairs)
}

/// What is to be stored of a run.
fn stores(prefix: &Prefix, first: usize, pages: &Pages, blocks: &[u32]) -> Result<Vec<StoreBlock>> {
    let joined = |info, memory| StoreBlock { info, memory };
    paired(prefix, first, pages, blocks, joined)
}
