//! A request as an engine and a node see it: tokens cut into blocks, each with its keys.

use kvcache_core::prefix::data::{DataChain, ModelIdentity, Shard};
use kvcache_core::prefix::{ChainRoot, IndexScheme, Namespace, describe};
use kvcache_core::shape::TokensPerBlock;
use kvcache_core::{BlockInfo, BlockKey, EngineHash, IndexKey, Result};

use crate::workload::Request;

/// Cuts token lists into blocks and names them, for one model on one rank.
#[derive(Clone, Debug)]
pub struct Sequencer {
    data: DataChain,
    index: ChainRoot,
    block_tokens: TokensPerBlock,
}

/// The full blocks of one token list; a partial last one has no key and is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    tokens: Vec<u32>,
    block_tokens: u32,
    blocks: Vec<BlockInfo>,
    prompt_blocks: usize,
    reusable_blocks: usize,
}

impl Sequencer {
    /// Names blocks of `block_tokens` under this identity, shard and index scheme.
    ///
    /// # Errors
    /// `Invalid` for a shard without layers or heads, or a block size out of range.
    pub fn new(
        identity: &ModelIdentity,
        shard: &Shard,
        scheme: &IndexScheme,
        namespace: &Namespace<'_>,
        block_tokens: u32,
    ) -> Result<Self> {
        Ok(Self {
            data: DataChain::new(identity, shard, None)?,
            index: scheme.root(namespace),
            block_tokens: TokensPerBlock::try_from(block_tokens)?,
        })
    }

    /// Tokens a block.
    #[must_use]
    pub fn block_tokens(&self) -> u32 {
        self.block_tokens.get()
    }

    /// The blocks of a request: those of its prompt, then those that its answer fills.
    #[must_use]
    pub fn request(&self, request: &Request) -> Sequence {
        let mut sequence = self.tokens(request.all_tokens());
        sequence.prompt_blocks = request.prompt_blocks(self.block_tokens());
        sequence.reusable_blocks = request.reusable_blocks(self.block_tokens());
        sequence
    }

    /// The blocks of a bare token list, which counts as a prompt.
    #[must_use]
    pub fn tokens(&self, tokens: Vec<u32>) -> Sequence {
        let block_tokens = self.block_tokens();
        let blocks: Vec<BlockInfo> =
            describe(self.data.clone(), &self.index, &tokens, self.block_tokens).collect();
        let reusable_blocks = tokens.len().saturating_sub(1) / block_tokens as usize;
        let prompt_blocks = blocks.len();
        Sequence {
            tokens,
            block_tokens,
            blocks,
            prompt_blocks,
            reusable_blocks,
        }
    }
}

impl Sequence {
    /// Every full block, the prompt's first.
    #[must_use]
    pub fn blocks(&self) -> &[BlockInfo] {
        &self.blocks
    }

    /// How many of them are the prompt's: the request's block accesses.
    #[must_use]
    pub fn prompt_blocks(&self) -> usize {
        self.prompt_blocks
    }

    /// How many of them, from the first, a cache can spare the engine.
    #[must_use]
    pub fn reusable_blocks(&self) -> usize {
        self.reusable_blocks
    }

    /// Tokens a block.
    #[must_use]
    pub fn block_tokens(&self) -> u32 {
        self.block_tokens
    }

    /// All tokens, those of a partial last block included.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The data keys of the blocks, the prompt's first.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = BlockKey> + '_ {
        self.blocks.iter().map(|block| block.key)
    }

    /// The index keys of the blocks, as a lookup takes them.
    pub fn index_keys(&self) -> impl ExactSizeIterator<Item = IndexKey> + '_ {
        self.blocks.iter().map(|block| block.index_key)
    }
}

/// The hash by which the simulated engine announces a block: the end of its data key, as vLLM shortens a digest.
#[must_use]
pub fn engine_hash(key: &BlockKey) -> EngineHash {
    EngineHash::from_digest(&key.0)
}
