//! A pod's connection to the global index: questions, events, and the stream by which the pod lives in it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvcache_core::{Epoch, Error, PodName, Result};
use kvfabric_indexer::adapter::{BatchOwner, OWNER_BYTES_MAX};
use kvfabric_indexer::client::{
    ClientConfig, IndexClient, Registered, Registration, SourceKind, SourceSpec,
};
use kvfabric_indexer::publisher::{Publisher, PublisherConfig, Stream};

use crate::blocks::Namespace;
use crate::config::{IndexSection, NodeConfig};

/// The names of a pod's two sources of events, as they are registered.
pub(crate) const ENGINE_SOURCE: &str = "engine";
pub(crate) const NODE_SOURCE: &str = "node";

/// How long the index may take to subscribe to a new node before opening fails.
const REGISTER_DEADLINE: Duration = Duration::from_secs(20);

/// How long connecting to the index may take.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The connection to the global index: questions, events, and the stream by which the pod lives in it.
pub(crate) struct Index {
    pub(crate) client: IndexClient,
    /// None when the engine publishes by itself.
    pub(crate) engine: Option<Arc<Publisher>>,
    pub(crate) node: Arc<Publisher>,
    /// Ends the registration when it is dropped.
    _registered: Registered,
}

/// What is there before the cache: it needs a sink for events and somebody to ask.
pub(crate) struct Publishers {
    pub(crate) client: IndexClient,
    engine: Option<Arc<Publisher>>,
    pub(crate) node: Arc<Publisher>,
}

impl Publishers {
    pub(crate) fn bind(config: &NodeConfig, index: &IndexSection) -> Result<Self> {
        let pod = PodName::new(&config.pod)?;
        let client = IndexClient::new(ClientConfig {
            address: index.address.clone(),
            model: config.model.clone(),
            deadline: config.lookup_deadline(),
            connect_timeout: CONNECT_TIMEOUT,
        })?;
        let bind = |stream| bind(&pod, &config.model, &index.publish_host, stream);
        let engine = match engine_events(config)? {
            Some(_) => None,
            None => Some(bind(Stream::Engine)?),
        };
        let node = bind(Stream::Node { epoch: new_epoch() })?;
        Ok(Self {
            client,
            engine,
            node,
        })
    }

    pub(crate) async fn register(
        self,
        config: &NodeConfig,
        peers: Option<SocketAddr>,
    ) -> Result<Index> {
        let own = |engine: &Arc<Publisher>| engine.source(ENGINE_SOURCE, SourceKind::Vllm);
        let engine = match &self.engine {
            Some(engine) => Some(own(engine)),
            None => engine_events(config)?,
        };
        let node = self.node.source(NODE_SOURCE, SourceKind::Node);
        let sources = engine.into_iter().chain([node]).collect();
        let registered = self.client.register(Registration {
            pod: PodName::new(&config.pod)?,
            model: config.model.clone(),
            block_size: config.block_tokens,
            key_scheme: config.key_scheme.clone(),
            sources,
            peer_address: peers.map(|address| address.to_string()),
            pool_for: Vec::new(),
        });
        ready(&registered).await?;
        let Self {
            client,
            engine,
            node,
        } = self;
        Ok(Index {
            client,
            engine,
            node,
            _registered: registered,
        })
    }
}

/// Publishes on any port of `host`.
pub(crate) fn bind(
    pod: &PodName,
    model: &str,
    host: &str,
    stream: Stream,
) -> Result<Arc<Publisher>> {
    let any_port = format!("tcp://{host}:0");
    let publisher = Publisher::bind(PublisherConfig {
        endpoint: any_port.clone(),
        replay_endpoint: any_port,
        ..PublisherConfig::new(pod.clone(), model, stream)
    })?;
    Ok(Arc::new(publisher))
}

/// Waits until the index follows the sources that were registered.
pub(crate) async fn ready(registered: &Registered) -> Result<()> {
    let ready = registered.ready(REGISTER_DEADLINE).await;
    ready.map_err(|error| error.at("register with the index"))
}

/// Whose the blocks of a batch of events are, as the index reads it.
pub(crate) fn batch_owner<'a>(namespace: &Namespace<'a>) -> Result<BatchOwner<'a>> {
    for (name, text) in [
        ("lora", namespace.lora),
        ("cache_salt", namespace.cache_salt),
    ] {
        if text.len() > OWNER_BYTES_MAX {
            let found = format!("{} bytes", text.len());
            return Err(Error::invalid(name, found, 0..=OWNER_BYTES_MAX));
        }
    }
    Ok(BatchOwner {
        lora: Some(namespace.lora).filter(|lora| !lora.is_empty()),
        cache_salt: Some(namespace.cache_salt).filter(|salt| !salt.is_empty()),
    })
}

/// The engine's own publisher, if the configuration names one.
fn engine_events(config: &NodeConfig) -> Result<Option<SourceSpec>> {
    let engine = config.engine.as_ref();
    let events = engine.map(|engine| engine.events_source(ENGINE_SOURCE));
    Ok(events.transpose()?.flatten())
}

/// Later than the epoch of every earlier run on this machine, as long as its clock is not set back; another value in any case.
fn new_epoch() -> Epoch {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Epoch(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}
