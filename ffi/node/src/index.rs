//! The node's connection to the global index: questions, events, and the stream by which the pod lives in it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvcache_core::{Epoch, PodName, Result};
use kvfabric_indexer::client::{
    ClientConfig, IndexClient, Registered, Registration, SourceKind, SourceSpec,
};
use kvfabric_indexer::publisher::{Publisher, PublisherConfig, Stream};

use crate::config::{IndexSection, NodeConfig};

/// The names of a pod's two sources of events, as they are registered.
pub(crate) const ENGINE_SOURCE: &str = "engine";
pub(crate) const NODE_SOURCE: &str = "node";

/// How long the index may take to subscribe to a new node before opening fails.
const REGISTER_DEADLINE: Duration = Duration::from_secs(20);

/// How long connecting to the index may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

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
        let bind = |stream| {
            let any_port = format!("tcp://{}:0", index.publish_host);
            Publisher::bind(PublisherConfig {
                endpoint: any_port.clone(),
                replay_endpoint: any_port,
                ..PublisherConfig::new(pod.clone(), config.model.clone(), stream)
            })
            .map(Arc::new)
        };
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
        });
        registered
            .ready(REGISTER_DEADLINE)
            .await
            .map_err(|e| e.at("register with the index"))?;
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
