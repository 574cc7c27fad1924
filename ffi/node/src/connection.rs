//! Connections with threads of their own, for callers that are not asynchronous and have no node.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kvcache_core::{Error, PinId, Result};
use kvfabric_indexer::client::{ClientConfig, IndexClient, LookupAnswer, LookupRequest};
use kvfabric_tiers::{PeerService, Reach};

use crate::life::Life;
use crate::operation::Operation;
use crate::runtime::Runtime;

/// A connection is I/O only, and callers wait in their own threads.
const CONNECTION_THREADS: usize = 1;

/// A connection to an index, with a thread of its own.
#[derive(Debug)]
pub struct IndexConnection {
    client: IndexClient,
    runtime: Runtime,
}

impl IndexConnection {
    /// Connects to the index at `address`, `host:port`. `deadline` bounds this call, and each lookup that names none. A
    /// connection that is lost later is made again by the next lookup.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Invalid`] for a malformed address or no deadline;
    /// [`kvcache_core::ErrorKind::PeerLost`] or [`kvcache_core::ErrorKind::Timeout`] when no index answers there.
    pub fn connect(address: &str, deadline: Duration) -> Result<Self> {
        if deadline.is_zero() {
            return Err(Error::invalid("deadline", "0", "more than nothing"));
        }
        let client = IndexClient::new(ClientConfig {
            deadline,
            connect_timeout: deadline,
            ..ClientConfig::new(address)
        })?;
        let runtime = Runtime::start("kvf-index", CONNECTION_THREADS)?;
        runtime.block_on(client.status())?;
        Ok(Self { client, runtime })
    }

    /// Whether it may still be used; shared with all handles on it.
    #[must_use]
    pub fn life(&self) -> &Arc<Life> {
        self.runtime.life()
    }

    /// Asks who holds a prompt's blocks.
    ///
    /// # Errors
    /// As [`IndexClient::lookup`], by the operation.
    #[must_use]
    pub fn lookup(&self, request: LookupRequest) -> Operation<LookupAnswer> {
        let client = self.client.clone();
        self.runtime
            .spawn(async move { client.lookup(request).await })
    }

    /// As [`IndexConnection::lookup`], and blocks until the answer is there: cheaper for a thread that would wait anyway.
    ///
    /// # Errors
    /// As [`IndexClient::lookup`].
    pub fn ask(&self, request: LookupRequest) -> Result<LookupAnswer> {
        self.runtime.block_on(self.client.lookup(request))
    }
}

/// The way to one node's peer service, with a thread of its own: what an engine's scheduler asks its workers by.
#[derive(Debug)]
pub struct PeerConnection {
    service: PeerService,
    runtime: Runtime,
}

impl PeerConnection {
    /// The way to the service at `address`, a `host:port`. Nothing is connected before the first question, and a connection
    /// that is lost is made again by the next one.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Invalid`] for a malformed address.
    pub fn connect(address: &str) -> Result<Self> {
        let runtime = Runtime::start("kvf-peer", CONNECTION_THREADS)?;
        let service = runtime.block_on(async { PeerService::connect(address) })?;
        Ok(Self { service, runtime })
    }

    /// Whether it may still be used; shared with all handles on it.
    #[must_use]
    pub fn life(&self) -> &Arc<Life> {
        self.runtime.life()
    }

    /// How much of these blocks, in packed form ([`crate::names`]), the node could bring, and from where.
    ///
    /// # Errors
    /// As [`PeerService::locate`], by the operation.
    #[must_use]
    pub fn locate(&self, names: &[u8], deadline: Duration) -> Operation<Reach> {
        let (service, names) = (self.service.clone(), Bytes::copy_from_slice(names));
        self.runtime
            .spawn(async move { service.locate(names, deadline).await })
    }

    /// Lets go of what the node pinned. `model_identity` is the node's.
    ///
    /// # Errors
    /// As [`PeerService::unpin`], by the operation.
    #[must_use]
    pub fn unpin(&self, pin: PinId, model_identity: [u8; 32], deadline: Duration) -> Operation<()> {
        let service = self.service.clone();
        self.runtime
            .spawn(async move { service.unpin(pin, &model_identity, deadline).await })
    }
}
