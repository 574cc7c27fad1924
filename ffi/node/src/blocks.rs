//! From tokens to the descriptions of blocks that a node takes.

use kvcache_core::prefix::data::{DataChain, ModelIdentity, Shard, Weights};
use kvcache_core::prefix::{self, IndexScheme};
use kvcache_core::shape::TokensPerBlock;
use kvcache_core::{BlockInfo, Error, Result};

/// Whose blocks: sequences of different namespaces never share a block, in no tier and not in the index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Namespace<'a> {
    /// The adapter that the request uses; empty for the base model.
    pub lora: &'a str,
    /// The tenant's secret salt; empty for none.
    pub cache_salt: &'a str,
}

/// Describes the full blocks of token sequences of one model.
#[derive(Clone, Debug)]
pub(crate) struct Describer {
    model: String,
    identity: ModelIdentity,
    shard: Shard,
    scheme: IndexScheme,
    block_tokens: TokensPerBlock,
}

impl Describer {
    pub(crate) fn new(
        model: String,
        identity: [u8; 32],
        shard: Shard,
        scheme: IndexScheme,
        block_tokens: TokensPerBlock,
    ) -> Self {
        let identity = ModelIdentity(identity);
        Self {
            model,
            identity,
            shard,
            scheme,
            block_tokens,
        }
    }

    /// One description for each full block of `tokens`, in order.
    pub(crate) fn describe(
        &self,
        namespace: &Namespace<'_>,
        tokens: &[u32],
    ) -> Result<Vec<BlockInfo>> {
        let optional = |text| Some(text).filter(|text: &&str| !text.is_empty());
        let identity = match optional(namespace.lora) {
            None => self.identity,
            // The adapter's name stands for its weights here; an engine that loads another adapter under the same
            // name must change the model's identity.
            Some(lora) => self
                .identity
                .with_adapter(lora, &Weights::Named(lora))
                .map_err(|error: Error| error.at("lora"))?,
        };
        let data = DataChain::new(&identity, &self.shard, optional(namespace.cache_salt))?;
        let root = self.scheme.root(&prefix::Namespace {
            model: self.scheme.model_in_root(&self.model),
            lora: optional(namespace.lora),
            cache_salt: optional(namespace.cache_salt),
        });
        Ok(prefix::describe(data, &root, tokens, self.block_tokens).collect())
    }
}
