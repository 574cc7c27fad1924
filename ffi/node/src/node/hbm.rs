//! The node's HBM tier: slots in memory of a GPU, before the other tiers.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvcache_core::{BlockInfo, BlockKey, Error, ErrorKind, Result};
use kvfabric_tiers::{Cache, HbmStats, HbmTier, PromoteReport, StoreBlock, StoreReport};
use kvfabric_transfer::DeviceMemory;

use super::{DEADLINE_MAX, Node, after};

/// The tier, if there is one now.
#[derive(Default)]
pub(crate) struct Hbm(Mutex<Option<HbmTier>>);

impl Hbm {
    fn slot(&self) -> MutexGuard<'_, Option<HbmTier>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn open(&self, cache: &Cache, memory: DeviceMemory) -> Result<()> {
        let mut slot = self.slot();
        if slot.is_some() {
            let text = "this node has an HBM tier already";
            return Err(Error::new(ErrorKind::Busy, text));
        }
        *slot = Some(HbmTier::new(cache, memory)?);
        Ok(())
    }

    pub(super) fn tier(&self) -> Option<HbmTier> {
        self.slot().clone()
    }

    /// All zero without a tier.
    pub(crate) fn stats(&self) -> HbmStats {
        self.tier().map(|tier| tier.stats()).unwrap_or_default()
    }
}

impl Node {
    /// Opens the HBM tier in memory of a GPU that the engine lends, or that was allocated for it: [`Node::fetch`] looks there first, and
    /// the index is told of what is there. The memory is the node's until [`Node::close_hbm`] has succeeded.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when there is one, [`ErrorKind::Invalid`] for memory of less than a block, [`ErrorKind::Unsupported`] without
    /// `fabric.cuda`; otherwise what the driver says.
    pub fn open_hbm(&self, memory: DeviceMemory) -> Result<()> {
        self.inner.hbm.open(&self.inner.cache, memory)
    }

    /// Brings blocks up into the HBM tier, as [`HbmTier::promote`].
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] without one; as [`Node::fetch`].
    pub async fn promote(
        &self,
        blocks: Vec<BlockInfo>,
        deadline: Duration,
    ) -> Result<PromoteReport> {
        self.hbm()?.promote(blocks, after(deadline)).await
    }

    /// Copies blocks of the engine into the HBM tier, within the GPU, as [`HbmTier::store`].
    ///
    /// # Errors
    /// As [`Node::promote`] and [`Node::store`].
    pub async fn store_hbm(
        &self,
        blocks: Vec<StoreBlock>,
        deadline: Duration,
    ) -> Result<StoreReport> {
        self.hbm()?.store(blocks, after(deadline)).await
    }

    /// Takes blocks out of the HBM tier, down into the others, as [`HbmTier::offload`].
    ///
    /// # Errors
    /// As [`Node::promote`] and [`Node::store`].
    pub async fn offload(&self, keys: Vec<BlockKey>, deadline: Duration) -> Result<StoreReport> {
        self.hbm()?.offload(keys, after(deadline)).await
    }

    /// Ends the HBM tier: what is only there is lost, and the index is told. Memory that was lent may be freed when this succeeds.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] without one; [`ErrorKind::Timeout`] when something still uses the memory after `deadline`: the tier is
    /// empty then, and may be closed again to wait on.
    pub async fn close_hbm(&self, deadline: Duration) -> Result<()> {
        let closed = self.hbm()?.close();
        let deadline = deadline.min(DEADLINE_MAX);
        if tokio::time::timeout(deadline, closed).await.is_err() {
            let text = format!("memory of the HBM tier is still in use after {deadline:?}");
            return Err(Error::new(ErrorKind::Timeout, text));
        }
        self.inner.hbm.slot().take();
        Ok(())
    }

    /// What the HBM tier has done and holds; all zero without one.
    #[must_use]
    pub fn hbm_stats(&self) -> HbmStats {
        self.inner.hbm.stats()
    }

    fn hbm(&self) -> Result<HbmTier> {
        self.inner
            .hbm
            .tier()
            .ok_or_else(|| Error::new(ErrorKind::Unsupported, "this node has no HBM tier"))
    }
}
