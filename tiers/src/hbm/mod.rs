//! The HBM tier: blocks in slots of a GPU's memory, before a [`Cache`].
//!
//! The cache brings blocks up and verifies them: those that land in their slots are summed there by the GPU, all others in host memory
//! before. What goes down is summed in host memory, and before by the GPU: a sum other than the one with which a block came up is no
//! block. Copies within the GPU are summed by it, too. Where it does not sum, its memory's own error correction stands for those; they
//! are counted.

mod moves;
mod slots;
mod stats;
mod stores;
mod through;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kvcache_core::ports::Position;
use kvcache_core::{BlockInfo, BlockKey, Error, ErrorKind, Result};
use kvfabric_transfer::{Agent, Deregistration, Descriptor, DeviceMemory, Region};
use tokio::sync::oneshot;

use crate::cache::{Cache, FetchBlock, StoreBlock, StoreReport};
use slots::{Found, Slots};
use stats::Counts;
pub use stats::HbmStats;
pub use through::seen_from;

/// Blocks in memory of a GPU, each a verified copy of what the cache had.
///
/// The cache's events tell of what is here, as of blocks in [`kvcache_core::Tier::Device`]: stored when a block can be fetched from a
/// slot, removed before the slot is another block's. A clone is another handle on the same tier; with the last one, or when it is closed,
/// all that is here is withdrawn.
///
/// All calls end by their deadline, and go on by themselves when their caller leaves. They must be made within a tokio runtime.
#[derive(Clone)]
pub struct HbmTier {
    inner: Arc<Inner>,
}

struct Inner {
    cache: Cache,
    agent: Agent,
    memory: Region,
    block_bytes: u64,
    slots: Mutex<Slots>,
    counts: Counts,
}

/// What became of a promotion.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PromoteReport {
    /// Blocks that came up.
    pub promoted: u32,
    /// Blocks that were up already.
    pub already_held: u32,
    /// Blocks that the cache did not have in time, or that came after one that it did not have.
    pub missed: u32,
    /// Blocks for which there was no slot: all others are read, or the block is on its way already.
    pub refused: u32,
    /// Blocks whose copy failed.
    pub failed: u32,
}

/// What became of a fetch from the tier.
#[derive(Debug, Default)]
pub struct HbmFetch {
    /// How many blocks, from the first, were brought without a hole.
    pub depth: usize,
    /// How many it was begun for.
    tried: usize,
    drained: Option<oneshot::Receiver<()>>,
}

impl HbmFetch {
    /// Whether a failed copy may still write to the memory of blocks after `depth`: then wait for [`HbmFetch::drained`] before using it.
    #[must_use]
    pub fn is_unsettled(&self) -> bool {
        self.drained.is_some()
    }

    /// Resolves when no copy can write to the engine's memory any more. Whether that is certain: false when the runtime ended before.
    ///
    /// # Cancel safety
    /// May be dropped and called again, until it has resolved.
    pub async fn drained(&mut self) -> bool {
        let Some(drained) = &mut self.drained else {
            return true;
        };
        let is_certain = drained.await.is_ok();
        self.drained = None;
        is_certain
    }
}

impl HbmTier {
    /// Slots of the cache's block size in all of `memory`, which the engine lends or which was allocated for this; its bytes are
    /// undefined from now on, and the last ones that make no whole block are not used.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for memory of less than a block, [`ErrorKind::Unsupported`] when the cache's agent was built without CUDA;
    /// otherwise what registering says.
    pub fn new(cache: &Cache, memory: DeviceMemory) -> Result<Self> {
        let block_bytes = cache.block_bytes();
        let count = memory.bytes() / block_bytes;
        let slots = match u32::try_from(count) {
            Ok(slots) if slots > 0 => slots,
            _ => {
                return Err(Error::invalid(
                    "bytes of memory",
                    memory.bytes(),
                    block_bytes..,
                ));
            }
        };
        let agent = cache.agent().clone();
        let memory = agent.register_device(memory)?;
        Ok(Self {
            inner: Arc::new(Inner {
                cache: cache.clone(),
                agent,
                memory,
                block_bytes,
                slots: Mutex::new(Slots::new(slots)),
                counts: Counts::default(),
            }),
        })
    }

    /// Brings blocks up, in the order of their sequence, from wherever the cache has them. Where there is no room, those that nobody has
    /// wanted for the longest time go: down into the cache, if it does not have them any more.
    ///
    /// # Errors
    /// As [`Cache::fetch`]; [`ErrorKind::Internal`] when the runtime ends.
    pub async fn promote(
        &self,
        blocks: Vec<BlockInfo>,
        deadline: Instant,
    ) -> Result<PromoteReport> {
        let inner = self.inner.clone();
        apart(async move { inner.promote(&blocks, deadline).await }).await
    }

    /// Brings as many of these blocks, in order from the first, as are up. Their memory is registered with the cache's agent, of this
    /// GPU or of the host. A block whose copy is not what came up is not brought, and dropped, counted as corrupt. Memory of blocks after
    /// the first that is not up is not written to, unless a copy fails.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for memory that is not of a block's size or not registered; [`ErrorKind::Internal`] when the runtime ends.
    pub async fn fetch(&self, blocks: Vec<FetchBlock>, deadline: Instant) -> Result<HbmFetch> {
        let memory = blocks.iter().map(|block| &block.memory);
        self.inner.cache.check_memory(memory)?;
        let inner = self.inner.clone();
        apart(async move { Ok(inner.fetch(&blocks, deadline).await) }).await
    }

    /// Copies blocks of the engine, in memory of this GPU that is registered with the cache's agent, into slots; as [`HbmTier::promote`]
    /// makes room. The cache has no part in it, and gets a block when it leaves its slot. Where the GPU does not sum, and for other memory,
    /// blocks are stored in the cache and promoted instead. When it returns nothing reads the engine's memory any more, unless a copy
    /// failed.
    ///
    /// # Errors
    /// As [`HbmTier::fetch`] and [`Cache::store`].
    pub async fn store(&self, blocks: Vec<StoreBlock>, deadline: Instant) -> Result<StoreReport> {
        let memory = blocks.iter().map(|block| &block.memory);
        self.inner.cache.check_memory(memory)?;
        let inner = self.inner.clone();
        apart(async move { inner.store(blocks, deadline).await }).await
    }

    /// Takes blocks down into the cache, and out of this tier once they are there. Blocks that are not up are passed over; those that
    /// the cache has no room for, or whose copy fails, stay up. A block whose bytes are not those that came up is dropped, counted as
    /// corrupt and as failed.
    ///
    /// # Errors
    /// As [`Cache::store`]; [`ErrorKind::Internal`] when the runtime ends.
    pub async fn offload(&self, keys: Vec<BlockKey>, deadline: Instant) -> Result<StoreReport> {
        let inner = self.inner.clone();
        apart(async move { inner.offload(&keys, deadline).await }).await
    }

    /// Blocks that are up.
    #[must_use]
    pub fn held(&self) -> u32 {
        self.inner.slots().held()
    }

    /// How many of these blocks, from the first, are up without a hole; does not count as a use.
    #[must_use]
    pub fn lookup(&self, keys: &[BlockKey]) -> usize {
        let slots = self.inner.slots();
        let is_here = |key: &&BlockKey| slots.find(key) == Found::Here;
        keys.iter().take_while(is_here).count()
    }

    /// What has happened, and what is here.
    #[must_use]
    pub fn stats(&self) -> HbmStats {
        let (slots, held) = {
            let slots = self.inner.slots();
            (slots.count(), slots.held())
        };
        self.inner.counts.read(slots, held, self.inner.block_bytes)
    }

    /// Up to where changes have been given to the cache's event sink, those of this tier among them.
    #[must_use]
    pub fn position(&self) -> Position {
        self.inner.cache.position()
    }

    /// Ends the tier: all that is here is withdrawn, and every later call fails or finds nothing. Memory that was lent may be freed when
    /// what this returns has completed.
    pub fn close(&self) -> Deregistration {
        self.inner.empty();
        self.inner.memory.deregister()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.empty();
    }
}

impl fmt::Debug for HbmTier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HbmTier")
            .field("block_bytes", &self.inner.block_bytes)
            .finish_non_exhaustive()
    }
}

/// Runs it to its end, whether or not the caller stays: buffers and slots are in use until then.
async fn apart<T: Send + 'static>(
    body: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    let ended = tokio::spawn(body).await;
    ended
        .map_err(|error| Error::new(ErrorKind::Internal, "a task of the tier").with_source(error))?
}

impl Inner {
    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes everything out, for good.
    fn empty(&self) {
        let mut slots = self.slots();
        let gone = slots.close();
        // Under the lock, so that the world hears of a block's comings and goings in their order.
        self.cache.announcer().left(&gone);
    }

    fn slot(&self, slot: u32) -> Descriptor {
        let offset = u64::from(slot) * self.block_bytes;
        self.memory.descriptor(offset, self.block_bytes)
    }
}
