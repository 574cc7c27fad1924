//! What a node asks the global index, and what it tells it of its engine.

use kvcache_core::event::EngineEvent;
use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_indexer::client::{LookupAnswer, LookupRequest, Prompt, SourcePosition};

use super::Node;
use crate::blocks::Namespace;
use crate::index::{ENGINE_SOURCE, Index, NODE_SOURCE, batch_owner};

/// What a lookup asks: a prompt, whose it is, and how fresh the answer must be.
#[derive(Clone, Debug, Default)]
pub struct Lookup<'a> {
    /// The prompt.
    pub tokens: &'a [u32],
    /// Whose blocks count.
    pub namespace: Namespace<'a>,
    /// At most so many pods, deepest first; 0 for all.
    pub pods_max: u32,
    /// Wait until these are applied.
    pub min_position: Vec<SourcePosition>,
}

impl Node {
    /// Asks the global index who holds a prompt's blocks.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] without an index, [`ErrorKind::Timeout`] when it does not answer in time.
    pub async fn lookup(&self, lookup: Lookup<'_>) -> Result<LookupAnswer> {
        self.ask_index(LookupRequest {
            tenant: String::new(),
            model: self.inner.model.clone(),
            lora: lookup.namespace.lora.to_owned(),
            cache_salt: lookup.namespace.cache_salt.to_owned(),
            prompt: Prompt::Tokens(lookup.tokens.to_vec()),
            pods_max: lookup.pods_max,
            pods: Vec::new(),
            min_position: lookup.min_position,
            deadline: None,
        })
        .await
    }

    /// As [`Node::lookup`], with everything that the index can be asked. An empty model is this node's; without a
    /// deadline the configured one holds.
    ///
    /// # Errors
    /// As [`Node::lookup`].
    pub async fn ask_index(&self, mut request: LookupRequest) -> Result<LookupAnswer> {
        let index = self.index()?;
        if request.model.is_empty() {
            request.model.clone_from(&self.inner.model);
        }
        request.deadline = request.deadline.or(Some(self.inner.lookup_deadline));
        index.client.lookup(request).await
    }

    /// Publishes changes of the engine's own cache, for engines that do not publish by themselves: blocks of the base model
    /// without a salt. Removals may be of any blocks.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] without an index, and when the engine's own publisher is configured.
    pub fn publish_engine(&self, events: Vec<EngineEvent>) -> Result<()> {
        self.publish_engine_of(&Namespace::default(), &events)
    }

    /// As [`Node::publish_engine`], for blocks of an adapter or a tenant.
    ///
    /// # Errors
    /// As [`Node::publish_engine`]; [`ErrorKind::Invalid`] for names that are too long for the index.
    pub fn publish_engine_of(
        &self,
        namespace: &Namespace<'_>,
        events: &[EngineEvent],
    ) -> Result<()> {
        let owner = batch_owner(namespace)?;
        let Some(engine) = &self.index()?.engine else {
            let text = "the engine's own events are configured ([engine] events)";
            return Err(Error::new(ErrorKind::Unsupported, text));
        };
        engine.publish_engine_of(&owner, events);
        Ok(())
    }

    /// Up to where this node's sources have published: what a lookup must wait for to see everything that is here.
    #[must_use]
    pub fn positions(&self) -> Vec<SourcePosition> {
        let Some(index) = &self.inner.index else {
            return Vec::new();
        };
        let engine = index.engine.iter().map(|engine| (ENGINE_SOURCE, engine));
        engine
            .chain([(NODE_SOURCE, &index.node)])
            .map(|(name, publisher)| {
                SourcePosition::new(&self.inner.pod, name, publisher.position())
            })
            .collect()
    }

    fn index(&self) -> Result<&Index> {
        let none = || {
            Error::new(
                ErrorKind::Unsupported,
                "this node has no [index] configured",
            )
        };
        self.inner.index.as_ref().ok_or_else(none)
    }
}
