//! The HBM tier: blocks in slots of a GPU's memory, before a [`Cache`].
//!
//! Bytes go up from a buffer of the host in which the cache has just verified them, and come down into such a buffer, where they are
//! summed: a sum other than the one with which they went up is no block. Copies within the GPU are not summed by anybody; there the
//! memory's own error correction stands for them.

mod moves;
mod slots;

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kvcache_core::{BlockInfo, BlockKey, Error, ErrorKind, Result};
use kvfabric_transfer::{Agent, Deregistration, Descriptor, DeviceMemory, Region};
use tokio::sync::oneshot;

use crate::cache::{Cache, FetchBlock, StoreReport};
use crate::scratch::Scratch;
use slots::{Found, Slots};

/// Blocks on their way up or down at a time, unless it is said otherwise.
pub const HBM_BUFFERS_DEFAULT: u32 = 16;

/// The most of them.
pub const HBM_BUFFERS_MAX: u32 = 1024;

/// Blocks in memory of a GPU, each a verified copy of what the cache had.
///
/// What is here is in nobody's index: a node's events tell of host memory, disk and objects. A clone is another handle on the same tier.
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
    buffers: Arc<Scratch>,
    buffers_max: usize,
    block_bytes: u64,
    slots: Mutex<Slots>,
    corrupt: AtomicU64,
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
    /// undefined from now on, and the last ones that make no whole block are not used. `buffers` blocks of host memory, for those on their
    /// way, are pinned when they are first used.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for memory of less than a block and no or too many buffers, [`ErrorKind::Unsupported`] when the cache's agent
    /// was built without CUDA; otherwise what registering says.
    pub fn new(cache: &Cache, memory: DeviceMemory, buffers: u32) -> Result<Self> {
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
        if !(1..=HBM_BUFFERS_MAX).contains(&buffers) {
            return Err(Error::invalid("buffers", buffers, 1..=HBM_BUFFERS_MAX));
        }
        let agent = cache.agent().clone();
        let memory = agent.register_device(memory)?;
        Ok(Self {
            inner: Arc::new(Inner {
                cache: cache.clone(),
                buffers: Scratch::new(&agent, buffers, block_bytes)?,
                buffers_max: buffers as usize,
                agent,
                memory,
                block_bytes,
                slots: Mutex::new(Slots::new(slots)),
                corrupt: AtomicU64::new(0),
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
    /// GPU or of the host. Memory of blocks after the first that is not up is not written to, unless a copy fails.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for memory that is not of a block's size or not registered; [`ErrorKind::Internal`] when the runtime ends.
    pub async fn fetch(&self, blocks: Vec<FetchBlock>, deadline: Instant) -> Result<HbmFetch> {
        let memory = blocks.iter().map(|block| &block.memory);
        self.inner.cache.check_memory(memory)?;
        let inner = self.inner.clone();
        apart(async move { Ok(inner.fetch(&blocks, deadline).await) }).await
    }

    /// Takes blocks down into the cache, and out of this tier once they are there. Blocks that are not up are passed over; those that
    /// the cache has no room for, or whose copy fails, stay up. A block whose bytes are not those that went up is dropped, counted by
    /// [`HbmTier::corrupt_blocks`] and as failed.
    ///
    /// # Errors
    /// As [`Cache::store`]; [`ErrorKind::Timeout`] when no buffer is free in time; [`ErrorKind::Internal`] when the runtime ends.
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

    /// Blocks that came down with other bytes than they went up with.
    #[must_use]
    pub fn corrupt_blocks(&self) -> u64 {
        self.inner.corrupt.load(Ordering::Relaxed)
    }

    /// Ends the tier: every later call fails. Memory that was lent may be freed when what this returns has completed.
    pub fn close(&self) -> Deregistration {
        self.inner.memory.deregister()
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

    fn slot(&self, slot: u32) -> Descriptor {
        let offset = u64::from(slot) * self.block_bytes;
        self.memory.descriptor(offset, self.block_bytes)
    }
}
