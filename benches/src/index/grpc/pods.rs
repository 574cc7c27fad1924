//! Every worker of the workload as a pod: a publisher over ZMQ, registered for as long as it lives.

use std::time::Duration;

use kvcache_core::event::EngineEvent;
use kvcache_core::{EngineHash, Result, Tier};
use kvfabric_indexer::client::{
    IndexClient, LookupRequest, Prompt, Registered, Registration, SourceKind, SourcePosition,
};
use kvfabric_indexer::publisher::{Publisher, PublisherConfig, Stream};
use kvfabric_indexer::server::ServerConfig;

use super::super::fill::{BLOCK_TOKENS, append_tokens, pod_name};
use super::super::workload::{Stored, WORKERS};
use super::MODEL;

const SOURCE: &str = "engine";
/// How long the index may take to follow.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);
/// Events that are published before the index must have followed: the publishers' buffers hold them.
const EVENTS_AHEAD: usize = 4096;

/// All publishers and their registrations.
pub(super) struct Pods(Vec<(Publisher, Registered)>);

impl Pods {
    /// Registers all workers.
    ///
    /// # Errors
    /// `Io` when a publisher cannot listen, `Timeout` when the index does not connect.
    pub(super) async fn start(client: &IndexClient) -> Result<Self> {
        let mut pods = Vec::new();
        for worker in 0..WORKERS {
            let name = pod_name(worker)?;
            let config = PublisherConfig::new(name.clone(), MODEL, Stream::Engine);
            let publisher = Publisher::bind(config)?;
            let registered = client.register(Registration {
                pod: name,
                model: MODEL.to_owned(),
                block_size: BLOCK_TOKENS,
                key_scheme: ServerConfig::default().key_scheme,
                sources: vec![publisher.source(SOURCE, SourceKind::Vllm)],
                peer_address: None,
                pool_for: Vec::new(),
            });
            registered.ready(PATIENCE).await?;
            pods.push((publisher, registered));
        }
        Ok(Self(pods))
    }

    /// Publishes events, some at a time, and waits until all are applied; how many blocks that were. Ends early when
    /// `goes_on` says so.
    ///
    /// # Errors
    /// `Timeout` when the index does not follow.
    pub(super) async fn publish(
        &self,
        client: &IndexClient,
        mut events: impl Iterator<Item = Stored>,
        goes_on: impl Fn() -> bool,
    ) -> Result<u64> {
        let mut blocks = 0;
        while goes_on() {
            let mut published = 0;
            for stored in events.by_ref().take(EVENTS_AHEAD) {
                blocks += stored.blocks.len() as u64;
                published += 1;
                if let Some((publisher, _)) = self.0.get(stored.worker as usize) {
                    publisher.publish_engine(vec![event(&stored)]);
                }
            }
            self.wait_until_applied(client).await?;
            if published < EVENTS_AHEAD {
                break;
            }
        }
        Ok(blocks)
    }

    async fn wait_until_applied(&self, client: &IndexClient) -> Result<()> {
        let mut request = LookupRequest::new(MODEL, Prompt::Keys(Vec::new()));
        for (worker, (publisher, _)) in (0..).zip(&self.0) {
            let position = publisher.position();
            request
                .min_position
                .push(SourcePosition::new(&pod_name(worker)?, SOURCE, position));
        }
        client.lookup(request).await?;
        Ok(())
    }
}

fn event(stored: &Stored) -> EngineEvent {
    let mut tokens = Vec::new();
    stored
        .blocks
        .iter()
        .for_each(|block| append_tokens(block.content, &mut tokens));
    EngineEvent::Stored {
        hashes: stored
            .blocks
            .iter()
            .map(|block| EngineHash(block.key))
            .collect(),
        parent: stored.parent.map(EngineHash),
        tokens,
        block_size: BLOCK_TOKENS,
        tier: Tier::Device,
    }
}
