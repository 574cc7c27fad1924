//! Tells the index of an engine's cache, for a process that has no node.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use kvcache_core::event::EngineEvent;
use kvcache_core::prefix::IndexScheme;
use kvcache_core::shape::TokensPerBlock;
use kvcache_core::{Error, PodName, Result};
use kvfabric_indexer::client::{
    ClientConfig, IndexClient, Registered, Registration, SourceKind, SourcePosition,
};
use kvfabric_indexer::publisher::{Publisher, Stream};

use crate::blocks::Namespace;
use crate::index::{self, CONNECT_TIMEOUT, ENGINE_SOURCE};
use crate::life::Life;
use crate::runtime::Runtime;

/// The connection only keeps the registration alive; the publisher has a thread of its own.
const PUBLISHER_THREADS: usize = 1;

/// How an [`EnginePublisher`] is opened.
#[derive(Clone, Debug)]
pub struct EnginePublisherConfig {
    /// Where the index listens, `http://host:port`.
    pub index: String,
    /// The name by which routers know the engine.
    pub pod: String,
    /// The model's name, as routers ask for it.
    pub model: String,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// How index keys are made; the index must use the same.
    pub key_scheme: String,
    /// The host of this process as the index reaches it; the ports are the system's choice.
    pub publish_host: String,
    /// Where the pod's peer service listens, if it has one: routers are told.
    pub peer_address: Option<SocketAddr>,
    /// How long each call to the index may take.
    pub deadline: Duration,
}

/// Publishes an engine's events and keeps its pod registered, with threads of its own, until it is dropped.
pub struct EnginePublisher {
    pod: PodName,
    block_tokens: TokensPerBlock,
    publisher: Arc<Publisher>,
    /// Ends the registration when it is dropped: before the runtime that it lives on.
    _registered: Registered,
    runtime: Runtime,
}

impl EnginePublisher {
    /// Starts to publish, registers with the index, and blocks until that follows.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Invalid`] for a wrong setting, with its name;
    /// [`kvcache_core::ErrorKind::PeerLost`] or [`kvcache_core::ErrorKind::Timeout`] when no index answers; what the index
    /// says when it refuses the pod.
    pub fn open(config: EnginePublisherConfig) -> Result<Self> {
        let pod = PodName::new(&config.pod)?;
        let block_tokens = TokensPerBlock::try_from(config.block_tokens)?;
        IndexScheme::parse(&config.key_scheme).map_err(|error| error.at("key_scheme"))?;
        if config.deadline.is_zero() {
            return Err(Error::invalid("deadline", "0", "more than nothing"));
        }
        let runtime = Runtime::start("kvf-publisher", PUBLISHER_THREADS)?;
        let client = IndexClient::new(ClientConfig {
            model: config.model.clone(),
            deadline: config.deadline,
            connect_timeout: CONNECT_TIMEOUT,
            ..ClientConfig::new(&config.index)
        })?;
        let publisher = index::bind(&pod, &config.model, &config.publish_host, Stream::Engine)?;
        let registered = runtime.block_on(async {
            // Registering tries for ever; an address at which there is no index should be told at once.
            client.status().await?;
            let registered = client.register(Registration {
                pod: pod.clone(),
                model: config.model,
                block_size: config.block_tokens,
                key_scheme: config.key_scheme,
                sources: vec![publisher.source(ENGINE_SOURCE, SourceKind::Vllm)],
                peer_address: config.peer_address.map(|address| address.to_string()),
                pool_for: Vec::new(),
            });
            index::ready(&registered).await?;
            Ok::<_, Error>(registered)
        })?;
        Ok(Self {
            pod,
            block_tokens,
            publisher,
            _registered: registered,
            runtime,
        })
    }

    /// Whether it may still be used; shared with all handles on it.
    #[must_use]
    pub fn life(&self) -> &Arc<Life> {
        self.runtime.life()
    }

    /// Tokens of a block.
    #[must_use]
    pub fn block_tokens(&self) -> TokensPerBlock {
        self.block_tokens
    }

    /// As [`crate::Node::publish_engine_of`]; never blocks. Returns the position after it, for lookups that must see it.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Invalid`] for a namespace whose names are too long for the index.
    pub fn publish(
        &self,
        namespace: &Namespace<'_>,
        events: &[EngineEvent],
    ) -> Result<SourcePosition> {
        let owner = index::batch_owner(namespace)?;
        let position = self.publisher.publish_engine_of(&owner, events);
        Ok(SourcePosition::new(&self.pod, ENGINE_SOURCE, position))
    }
}

impl std::fmt::Debug for EnginePublisher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EnginePublisher")
            .field("pod", &self.pod)
            .finish_non_exhaustive()
    }
}
