//! The cache of one node: an asynchronous face over the manager and the mover.

mod announce;
mod answer;
mod close;
mod control;
mod desk;
mod driver;
mod execute;
mod grants;
mod hold;
mod locate;
mod open;
mod types;

use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use kvcache_core::ports::{Directory, EventSink, Located, Position};
use kvcache_core::{BlockKey, Checksum, PodName, Result};
use kvfabric_transfer::Agent;
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub(crate) use announce::Announcer;
pub(crate) use desk::{Desk, ReadyLease};
pub(crate) use locate::Locator;
pub use types::{
    CacheStats, FetchBlock, FetchReport, HeldDepth, Pinned, Reach, Removed, Source, StoreBlock,
    StoreReport,
};

use crate::config::CacheConfig;
use crate::mover::{DeviceSums, Mover};
use crate::pages::{self, BlockMemory};
use crate::peer::PeerServer;
use desk::{Fetch, Request, Storing};
pub(crate) use types::{Fetched, Stored};

/// The blocks of one node, in its host memory, on its disk and in a shared object store, and the
/// way to its peers' blocks.
///
/// A clone is another handle on the same cache. It ends with [`Cache::shutdown`]; when the last
/// handle is dropped without that, it ends too, but nobody is told what it held.
#[derive(Clone)]
pub struct Cache {
    inner: Arc<Inner>,
}

struct Inner {
    desk: Desk,
    mover: Arc<Mover>,
    locator: Arc<Locator>,
    announcer: Arc<Announcer>,
    position: watch::Receiver<Position>,
    pod: PodName,
    /// Pieces that a block's memory may be in, so that a command's fit into one request.
    pieces_max: usize,
    scan_faults: u64,
    peer_address: Option<SocketAddr>,
    server: Mutex<Option<PeerServer>>,
    driver: JoinHandle<()>,
}

impl Cache {
    /// Opens the tiers, recovers what is on disk, announces it to `sink` as a snapshot that begins
    /// with `Cleared`, and starts to serve peers if the configuration says where.
    ///
    /// Must be called within a tokio runtime, which then drives the cache.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Invalid`] for a value in `config`; [`kvcache_core::ErrorKind::Busy`]
    /// when another process uses the disk tier's directory; otherwise what the system says, with the
    /// path or the address.
    pub async fn open(
        config: CacheConfig,
        agent: Agent,
        directory: Arc<dyn Directory>,
        sink: Arc<dyn EventSink>,
    ) -> Result<Self> {
        open::open(config, agent, directory, sink).await
    }

    /// Keeps these blocks; resolves when nothing of the cache reads the engine's memory any more.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Busy`] when too much is under way,
    /// [`kvcache_core::ErrorKind::Invalid`] for a block that cannot be one and for memory that is not of
    /// a block's size or not registered with the cache's agent,
    /// [`kvcache_core::ErrorKind::Cancelled`] after the shutdown,
    /// [`kvcache_core::ErrorKind::Internal`] after a fault of the cache's own, then as of every other
    /// call. Blocks that were not kept for want of room or time are no error: the report counts them.
    ///
    /// # Cancel safety
    /// Dropping the future stops nothing: the engine's memory must stay as it is until `deadline`.
    pub async fn store(&self, blocks: Vec<StoreBlock>, deadline: Instant) -> Result<StoreReport> {
        let sums = vec![None; blocks.len()];
        Ok(self.store_known(blocks, sums, deadline).await?.report)
    }

    /// As [`Cache::store`], where what the bytes of blocks must match may be known: others are not kept.
    pub(crate) async fn store_known(
        &self,
        blocks: Vec<StoreBlock>,
        sums: Vec<Option<Checksum>>,
        deadline: Instant,
    ) -> Result<Stored> {
        if blocks.is_empty() {
            return Ok(Stored::default());
        }
        self.inner
            .check_memory(blocks.iter().map(|block| &block.memory))?;
        let store = Storing {
            blocks,
            sums,
            deadline,
        };
        self.inner
            .desk
            .ask(|reply| Request::Store { store, reply })
            .await
    }

    /// Brings as many of these blocks, in order from the first, as can be had anywhere in time.
    ///
    /// `hints` say where the caller knows blocks to be; with empty ones the directory is asked.
    ///
    /// The engine's memory holds verified bytes for every block up to the first miss. Memory of later
    /// blocks may have been written to; that of the report's `unsettled` blocks may still be.
    ///
    /// # Errors
    /// As [`Cache::store`]. Blocks that cannot be had are no error but misses.
    ///
    /// # Cancel safety
    /// Dropping the future stops nothing: the engine's memory may be written to after `deadline`, if
    /// transfers do not settle. Do not drop it.
    pub async fn fetch(
        &self,
        blocks: Vec<FetchBlock>,
        hints: Located,
        deadline: Instant,
    ) -> Result<FetchReport> {
        Ok(self.fetch_summed(blocks, hints, deadline).await?.report)
    }

    /// As [`Cache::fetch`], with what the bytes of the blocks are.
    pub(crate) async fn fetch_summed(
        &self,
        blocks: Vec<FetchBlock>,
        hints: Located,
        deadline: Instant,
    ) -> Result<Fetched> {
        if blocks.is_empty() {
            return Ok(Fetched::default());
        }
        let inner = &self.inner;
        inner.check_memory(blocks.iter().map(|block| &block.memory))?;
        let located = if hints.is_empty() {
            let infos = blocks.iter().map(|block| &block.info);
            inner.locator.ask(infos, deadline).await?.1
        } else {
            hints
        };
        let holders = inner.locator.hints(&located);
        let fetch = Fetch {
            blocks,
            holders,
            shared: located.shared,
            deadline,
        };
        inner
            .desk
            .ask(|reply| Request::Fetch { fetch, reply })
            .await
    }

    /// How much of a chain this node could supply by itself; does not count as a use.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Busy`] or [`kvcache_core::ErrorKind::Cancelled`], as [`Cache::store`].
    pub async fn lookup(&self, keys: &[BlockKey]) -> Result<HeldDepth> {
        let keys = keys.to_vec();
        self.inner
            .desk
            .ask(|reply| Request::Lookup { keys, reply })
            .await
    }

    /// The counters and levels.
    ///
    /// # Errors
    /// As [`Cache::lookup`].
    pub async fn stats(&self) -> Result<CacheStats> {
        let manager = self
            .inner
            .desk
            .ask(|reply| Request::Stats { reply })
            .await?;
        let faults = &self.inner.mover.faults;
        Ok(CacheStats {
            manager,
            scan_faults: self.inner.scan_faults,
            corrupt_blocks: faults.corrupt.load(Ordering::Relaxed),
            stale_reads: faults.generation.load(Ordering::Relaxed),
            device_landed: faults.landed.load(Ordering::Relaxed),
            device_lifted: faults.lifted.load(Ordering::Relaxed),
        })
    }

    /// Up to where the changes of this cache have been given to the event sink. A store's own
    /// changes are among them when it resolves.
    #[must_use]
    pub fn position(&self) -> Position {
        *self.inner.position.borrow()
    }

    /// Bytes of every block.
    pub(crate) fn block_bytes(&self) -> u64 {
        self.inner.mover.expected.block_bytes
    }

    /// The agent that moves its bytes.
    pub(crate) fn agent(&self) -> &Agent {
        &self.inner.mover.agent
    }

    /// Devices that sum what is on them.
    pub(crate) fn sums(&self) -> &DeviceSums {
        &self.inner.mover.sums
    }

    /// Who tells the world.
    pub(crate) fn announcer(&self) -> &Arc<Announcer> {
        &self.inner.announcer
    }

    /// Whether every block's memory can be one's.
    pub(crate) fn check_memory<'a>(
        &self,
        memory: impl Iterator<Item = &'a BlockMemory>,
    ) -> Result<()> {
        self.inner.check_memory(memory)
    }

    /// Where the peer service listens, if there is one.
    #[must_use]
    pub fn peer_address(&self) -> Option<SocketAddr> {
        self.inner.peer_address
    }

    /// A pod has left for certain: what it leased from here is free again, and what was asked of it
    /// fails now.
    ///
    /// # Errors
    /// As [`Cache::lookup`].
    pub async fn forget_peer(&self, pod: &PodName) -> Result<()> {
        let peer = self.inner.mover.peers.roster.id(pod)?;
        self.inner.mover.peers.forget(peer).await;
        self.inner.desk.tell(Request::PeerLost { peer })
    }

    /// Ends the cache in order, by `deadline` at the latest: no more leases, stores or fetches;
    /// operations in progress end; blocks that are in host memory alone are written to the disk tier,
    /// or to the object tier if the disk takes none; `Cleared` is published; what was written to disk
    /// is synced.
    ///
    /// The blocks used last are written first. A segment on disk gives way only to blocks that were used
    /// after everything in it. What finds no room, or no time, is lost as when a cache is dropped: that
    /// is no error, and a log line counts it. A quarter of the time, two seconds at most, is kept for
    /// the sync.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Cancelled`] when it is shut down already; what the disk said to the
    /// sync.
    pub async fn shutdown(&self, deadline: Instant) -> Result<()> {
        let server = self
            .inner
            .server
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let ended = self
            .inner
            .desk
            .ask(|reply| Request::Shutdown { deadline, reply })
            .await;
        if let Some(server) = server {
            server.shutdown(deadline).await;
        }
        ended
    }
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache")
            .field("pod", &self.inner.pod)
            .finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.mover.arena.close();
        self.driver.abort();
    }
}

impl Inner {
    /// Whether every block's memory can be one's.
    fn check_memory<'a>(&self, memory: impl Iterator<Item = &'a BlockMemory>) -> Result<()> {
        let block_bytes = self.mover.expected.block_bytes;
        pages::check(&self.mover.agent, memory, block_bytes, self.pieces_max)
    }
}
