//! How requests reach the driver: one bounded queue, each request with the way its answer takes back.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvcache_core::manager::{LeasedBlock, PeerHint, Stats};
use kvcache_core::{BlockKey, Checksum, Error, ErrorKind, LeaseId, PeerId, PinId, Result};
use tokio::sync::{mpsc, oneshot};

use super::types::{FetchBlock, Fetched, HeldDepth, Pinned, Removed, StoreBlock, Stored};

/// Requests that may wait for the driver; more are refused as busy.
pub(super) const REQUESTS_MAX: usize = 1024;

/// A lease that is ready to be read under.
#[derive(Clone, Debug)]
pub(crate) struct ReadyLease {
    pub(crate) lease: LeaseId,
    pub(crate) ttl: Duration,
    pub(crate) blocks: Vec<LeasedBlock>,
}

/// The answer to a request, once it is there.
pub(super) type Reply<T> = oneshot::Sender<Result<T>>;

/// Something asked of the driver.
#[derive(Debug)]
pub(super) enum Request {
    Store {
        store: Storing,
        reply: Reply<Stored>,
    },
    Fetch {
        fetch: Fetch,
        reply: Reply<Fetched>,
    },
    Lookup {
        keys: Vec<BlockKey>,
        reply: Reply<HeldDepth>,
    },
    Stats {
        reply: Reply<Stats>,
    },
    Lease {
        peer: PeerId,
        keys: Vec<BlockKey>,
        ttl: Duration,
        reply: Reply<ReadyLease>,
    },
    Release {
        peer: PeerId,
        lease: LeaseId,
    },
    PeerLost {
        peer: PeerId,
    },
    Pin {
        pin: PinId,
        keys: Vec<BlockKey>,
        ttl: Duration,
        reply: Reply<Pinned>,
    },
    Unpin {
        pin: PinId,
    },
    Remove {
        keys: Vec<BlockKey>,
        reply: Reply<Removed>,
    },
    Clear {
        reply: Reply<Removed>,
    },
    Flush {
        deadline: Instant,
        reply: Reply<()>,
    },
    Shutdown {
        deadline: Instant,
        reply: Reply<()>,
    },
}

/// A store.
#[derive(Debug)]
pub(super) struct Storing {
    pub(super) blocks: Vec<StoreBlock>,
    /// What the bytes of each must match, if that is known.
    pub(super) sums: Vec<Option<Checksum>>,
    pub(super) deadline: Instant,
}

/// A fetch, with its holders as the manager knows them.
#[derive(Debug)]
pub(super) struct Fetch {
    pub(super) blocks: Vec<FetchBlock>,
    pub(super) holders: Vec<PeerHint>,
    pub(super) shared: Vec<Range<u32>>,
    pub(super) deadline: Instant,
}

/// Whether the driver ended as it should: it has not while it runs, nor after a panic.
#[derive(Debug, Default)]
pub(super) struct Health {
    ended_in_order: AtomicBool,
}

impl Health {
    /// Nothing is left to do but to let go: the end was asked for.
    pub(super) fn ends_in_order(&self) {
        self.ended_in_order.store(true, Ordering::Release);
    }
}

/// A handle on the driver's queue.
#[derive(Clone, Debug)]
pub(crate) struct Desk {
    requests: mpsc::Sender<Request>,
    health: Arc<Health>,
}

impl Desk {
    pub(super) fn new() -> (Self, mpsc::Receiver<Request>) {
        let (requests, queue) = mpsc::channel(REQUESTS_MAX);
        (
            Self {
                requests,
                health: Arc::default(),
            },
            queue,
        )
    }

    /// For the driver, to tell how it ended.
    pub(super) fn health(&self) -> Arc<Health> {
        self.health.clone()
    }

    fn ended(&self) -> Error {
        if self.health.ended_in_order.load(Ordering::Acquire) {
            return closed();
        }
        let context = "the cache ended by a fault of its own, and can only be opened anew";
        Error::new(ErrorKind::Internal, context)
    }

    /// Readies blocks for a peer to read.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] above the limits of leases.
    pub(crate) async fn lease(
        &self,
        peer: PeerId,
        keys: Vec<BlockKey>,
        ttl: Duration,
    ) -> Result<ReadyLease> {
        self.ask(|reply| Request::Lease {
            peer,
            keys,
            ttl,
            reply,
        })
        .await
    }

    /// Ends a lease of a peer.
    pub(crate) fn release(&self, peer: PeerId, lease: LeaseId) -> Result<()> {
        self.tell(Request::Release { peer, lease })
    }

    /// Ends a pin.
    pub(crate) fn unpin(&self, pin: PinId) -> Result<()> {
        self.tell(Request::Unpin { pin })
    }

    /// Puts a request into the queue and waits for its answer, which the manager's own deadlines bound.
    pub(super) async fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        self.tell(request(reply))?;
        answer.await.unwrap_or_else(|_| Err(self.ended()))
    }

    pub(super) fn tell(&self, request: Request) -> Result<()> {
        self.requests
            .try_send(request)
            .map_err(|error| match error {
                mpsc::error::TrySendError::Full(_) => {
                    let context = format!("{REQUESTS_MAX} requests wait for the cache already");
                    Error::new(ErrorKind::Busy, context)
                }
                mpsc::error::TrySendError::Closed(_) => self.ended(),
            })
    }
}

/// What callers hear once the cache is shut down.
pub(super) fn closed() -> Error {
    Error::new(ErrorKind::Cancelled, "the cache is shut down")
}
