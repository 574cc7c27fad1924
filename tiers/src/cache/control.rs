//! What a cache is told beyond storing and fetching: where is it, keep it, forget it, write it.

use std::time::{Duration, Instant};

use kvcache_core::{BlockInfo, BlockKey, Error, ErrorKind, PinId, Result};

use super::Cache;
use super::desk::Request;
use super::types::{Pinned, Reach, Removed};

impl Cache {
    /// How much of a chain could be had now from this node's tiers, its peers and the shared objects together; does not
    /// count as a use.
    ///
    /// Peers and objects are as the directory tells, which is asked if this node lacks any of the chain: what it says
    /// may have changed by the time of a fetch. When it fails or is late, only this node's own blocks count.
    ///
    /// # Errors
    /// As [`Cache::lookup`]; [`kvcache_core::ErrorKind::Timeout`] when not even this node answered by `deadline`.
    pub async fn locate(&self, infos: &[BlockInfo], deadline: Instant) -> Result<Reach> {
        if infos.is_empty() {
            return Ok(Reach::default());
        }
        self.inner.locator.reach(infos, deadline).await
    }

    /// Keeps these blocks in host memory until [`Cache::release`], or for `ttl` (at most the limits' `pin_ttl_max`)
    /// when that is shorter. Blocks that are only on disk are brought up first.
    ///
    /// The pin is cut at the first block that this node does not have, cannot bring up within the limits' `stage_wait`,
    /// or for which the limits' `pinned_per_mille_max` leaves no room: see [`Pinned::depth`].
    ///
    /// Its number is random. See [`Cache::pin_as`] for one that others know beforehand.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Busy`] when too many pins are in force or too much is under way,
    /// [`kvcache_core::ErrorKind::Invalid`] for more keys than the limits' `operation_blocks_max`,
    /// [`kvcache_core::ErrorKind::Cancelled`] after the shutdown.
    ///
    /// # Cancel safety
    /// A dropped future leaves no pin behind.
    pub async fn pin(&self, keys: &[BlockKey], ttl: Duration) -> Result<Pinned> {
        let random = getrandom::u64()
            .map_err(|e| Error::new(ErrorKind::Io, format!("draw a pin's number: {e}")))?;
        self.pin_as(PinId(random), keys, ttl).await
    }

    /// As [`Cache::pin`], under a number of the caller's choice, so that somebody else can be told it before the blocks
    /// are here. Whoever knows the number can let go of the pin, through the peer service too: draw it at random, and
    /// use it once.
    ///
    /// When the pin is let go of before it is asked for, it ends at once, with a depth of 0; this node remembers the
    /// last of such early ends for a while, as the limits' `early_unpins_max` and `early_unpin_wait` say.
    ///
    /// # Errors
    /// As [`Cache::pin`]; [`kvcache_core::ErrorKind::Invalid`], naming it, for a number that a pin in force has.
    ///
    /// # Cancel safety
    /// A dropped future leaves no pin behind.
    pub async fn pin_as(&self, id: PinId, keys: &[BlockKey], ttl: Duration) -> Result<Pinned> {
        let keys = keys.to_vec();
        self.inner
            .desk
            .ask(|reply| Request::Pin {
                pin: id,
                keys,
                ttl,
                reply,
            })
            .await
    }

    /// Ends a pin before its time. One that is not in force has ended, or comes yet: then it ends at once; see
    /// [`Cache::pin_as`].
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Busy`] when too much is under way: the pin then ends by its time;
    /// [`kvcache_core::ErrorKind::Cancelled`] after the shutdown.
    pub async fn release(&self, pin: PinId) -> Result<()> {
        self.inner.desk.tell(Request::Unpin { pin })
    }

    /// Takes these blocks out of host memory and the disk tier, and announces it. Shared objects stay.
    ///
    /// A block that is pinned, leased to a peer, being read from host memory, or on its way into or out of it is kept
    /// and counted in [`Removed::kept`]. Disk records are forgotten, not erased: a restart finds them again unless their
    /// segment was dropped meanwhile.
    ///
    /// # Errors
    /// As [`Cache::lookup`]; [`kvcache_core::ErrorKind::Invalid`] for more keys than the limits'
    /// `operation_blocks_max`.
    pub async fn remove(&self, keys: &[BlockKey]) -> Result<Removed> {
        let keys = keys.to_vec();
        self.inner
            .desk
            .ask(|reply| Request::Remove { keys, reply })
            .await
    }

    /// Takes everything out of host memory and the disk tier, announces it, and starts to delete all segment files.
    /// Shared objects stay; blocks in use are kept as by [`Cache::remove`], but in host memory only.
    ///
    /// Stores under way go on: what they copy afterwards is there.
    ///
    /// # Errors
    /// As [`Cache::lookup`].
    pub async fn clear(&self) -> Result<Removed> {
        self.inner.desk.ask(|reply| Request::Clear { reply }).await
    }

    /// Waits until every block that is on its way to the disk or the object store now is there or has failed, and the
    /// disk is synced. Nothing is made to leave host memory by this.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Timeout`] at `deadline`; what the disk said to the sync; else as [`Cache::lookup`].
    pub async fn flush(&self, deadline: Instant) -> Result<()> {
        self.inner
            .desk
            .ask(|reply| Request::Flush { deadline, reply })
            .await
    }
}

/// The flush was not done in time.
pub(super) fn not_flushed() -> Error {
    let context = "blocks were still on their way to the disk or the object store";
    Error::new(ErrorKind::Timeout, context)
}
