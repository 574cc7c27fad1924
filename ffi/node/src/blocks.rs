//! From tokens, or from an engine's names, to the descriptions of blocks that a node takes.

use kvcache_core::prefix::data::{
    DataChain, Durability, EngineBlock, EngineSeed, ModelIdentity, Shard, Weights, from_engine_hash,
};
use kvcache_core::prefix::{self, IndexChain, IndexScheme};
use kvcache_core::shape::TokensPerBlock;
use kvcache_core::{BlockInfo, BlockKey, Error, ErrorKind, IndexKey, Result};

use crate::names::{Name, Names};

/// Whose blocks: sequences of different namespaces never share a block, in no tier and not in the index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Namespace<'a> {
    /// The adapter that the request uses; empty for the base model.
    pub lora: &'a str,
    /// The tenant's secret salt; empty for none.
    pub cache_salt: &'a str,
}

/// A sequence's full blocks from its first, or a run of them: what a node stores and fetches.
#[derive(Clone, Debug)]
pub struct Prefix {
    infos: Vec<BlockInfo>,
    /// None for a run of names, which nobody can continue without the engine.
    growth: Option<Growth>,
}

#[derive(Clone, Debug)]
struct Growth {
    data: DataChain,
    index: IndexChain,
    block_tokens: TokensPerBlock,
    /// Tokens after the last full block.
    rest: Vec<u32>,
}

impl Prefix {
    /// Appends tokens, and describes the blocks that became full. Returns how many blocks there are now; a tail that fills
    /// none waits for the next tokens.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for a prefix made of names.
    pub fn extend(&mut self, tokens: &[u32]) -> Result<usize> {
        let Some(growth) = &mut self.growth else {
            let text = "a prefix made of an engine's names cannot be extended by tokens";
            return Err(Error::new(ErrorKind::Unsupported, text));
        };
        let block = growth.block_tokens.get() as usize;
        let mut tokens = tokens;
        if !growth.rest.is_empty() {
            let (fill, after) = tokens.split_at(tokens.len().min(block - growth.rest.len()));
            growth.rest.extend_from_slice(fill);
            tokens = after;
            if growth.rest.len() == block {
                let full = std::mem::take(&mut growth.rest);
                self.infos.push(growth.push(&full));
            }
        }
        let full = tokens.chunks_exact(block);
        let rest = full.remainder();
        self.infos.extend(full.map(|tokens| growth.push(tokens)));
        growth.rest.extend_from_slice(rest);
        Ok(self.infos.len())
    }

    /// How many blocks.
    #[must_use]
    pub fn len(&self) -> usize {
        self.infos.len()
    }

    /// Whether no block is full yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.infos.is_empty()
    }

    /// The blocks, in order.
    #[must_use]
    pub fn infos(&self) -> &[BlockInfo] {
        &self.infos
    }

    /// The block at a position.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a position outside the prefix.
    pub fn info(&self, position: usize) -> Result<&BlockInfo> {
        let info = self.infos.get(position);
        info.ok_or_else(|| Error::invalid("position", position, 0..self.len()))
    }

    /// The names of the blocks' bytes, in order.
    #[must_use]
    pub fn keys(&self) -> Vec<BlockKey> {
        self.infos.iter().map(|info| info.key).collect()
    }

    /// The blocks from position `first` on, `count` of them.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when the prefix ends before.
    pub fn run(&self, first: usize, count: usize) -> Result<&[BlockInfo]> {
        let end = first.checked_add(count);
        let run = end.and_then(|end| self.infos.get(first..end));
        run.ok_or_else(|| {
            let run = format!("{count} from position {first}");
            Error::invalid(
                "blocks",
                run,
                format_args!("within a prefix of {}", self.len()),
            )
        })
    }
}

impl Growth {
    fn push(&mut self, tokens: &[u32]) -> BlockInfo {
        BlockInfo {
            parent: self.data.last(),
            index_parent: self.index.last(),
            key: self.data.push(tokens),
            index_key: self.index.push(tokens),
        }
    }
}

/// How an engine hashes blocks: equal hashes of different engines, algorithms or seeds name different blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EngineScheme {
    pub(crate) name: String,
    pub(crate) hash: String,
    pub(crate) seed: String,
}

impl EngineScheme {
    fn block<'a>(&'a self, hash: &'a [u8]) -> EngineBlock<'a> {
        EngineBlock {
            engine: &self.name,
            algorithm: &self.hash,
            seed: EngineSeed::Fixed(&self.seed),
            hash,
        }
    }

    /// Whether its hashes may name bytes that outlive the engine, tried with one of a full length.
    pub(crate) fn check(&self) -> Result<()> {
        const DIGEST: [u8; 32] = [0; 32];
        let shard = Shard::whole(1, 1);
        let block = self.block(&DIGEST);
        from_engine_hash(
            &ModelIdentity(DIGEST),
            &shard,
            None,
            &block,
            Durability::Durable,
        )?;
        Ok(())
    }
}

/// Describes the blocks of one model as this pod holds them.
#[derive(Clone, Debug)]
pub(crate) struct Describer {
    pub(crate) model: String,
    pub(crate) identity: ModelIdentity,
    pub(crate) shard: Shard,
    pub(crate) scheme: IndexScheme,
    pub(crate) block_tokens: TokensPerBlock,
    pub(crate) engine: Option<EngineScheme>,
}

impl Describer {
    /// A prefix without tokens.
    pub(crate) fn prefix(&self, namespace: &Namespace<'_>) -> Result<Prefix> {
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
        let root = self.scheme.root(&prefix::Namespace {
            model: self.scheme.model_in_root(&self.model),
            lora: optional(namespace.lora),
            cache_salt: optional(namespace.cache_salt),
        });
        Ok(Prefix {
            infos: Vec::new(),
            growth: Some(Growth {
                data: DataChain::new(&identity, &self.shard, optional(namespace.cache_salt))?,
                index: IndexChain::new(&root),
                block_tokens: self.block_tokens,
                rest: Vec::new(),
            }),
        })
    }

    /// The blocks that an engine named.
    pub(crate) fn prefix_of(&self, names: &Names, adapter: Option<[u8; 32]>) -> Result<Prefix> {
        let Some(engine) = &self.engine else {
            let text =
                "this node has no [engine] configured, so an engine's hashes mean nothing to it";
            return Err(Error::new(ErrorKind::Unsupported, text));
        };
        if let (Some(told), Some(named)) = (adapter, names.adapter())
            && told != named
        {
            let text = "the names carry another adapter's identity than the one given";
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        let identity = match adapter.or(names.adapter()) {
            None => self.identity,
            // The engine's hashes already depend on the adapter's name.
            Some(adapter) => self.identity.with_adapter("", &Weights::Digest(adapter))?,
        };
        // Tenants' salts and adapters' names are in the engine's hash, so nothing is added here.
        let key = |name: &Name<'_>| {
            let block = engine.block(name.hash);
            from_engine_hash(&identity, &self.shard, None, &block, Durability::Durable)
        };
        let mut before: Option<(BlockKey, IndexKey)> = match names.parent() {
            None => None,
            Some(parent) => Some((key(&parent)?, parent.index_key)),
        };
        let mut infos = Vec::with_capacity(names.len());
        for name in names.iter() {
            let info = BlockInfo {
                key: key(&name)?,
                parent: before.map(|(key, _)| key),
                index_key: name.index_key,
                index_parent: before.map(|(_, index_key)| index_key),
            };
            before = Some((info.key, info.index_key));
            infos.push(info);
        }
        Ok(Prefix {
            infos,
            growth: None,
        })
    }
}
