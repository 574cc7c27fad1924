//! Both identities of each block of a token list, made in one pass.

use super::data::DataChain;
use super::{ChainRoot, IndexChain};
use crate::key::BlockInfo;
use crate::shape::TokensPerBlock;

/// Describes the full blocks of `tokens`, in order; a partial last one has no key and is left out.
///
/// `data` is the chain of the model, shard and salt; `index` the root of the index's scheme and namespace.
pub fn describe<'a>(
    mut data: DataChain,
    index: &ChainRoot,
    tokens: &'a [u32],
    block_tokens: TokensPerBlock,
) -> impl Iterator<Item = BlockInfo> + 'a {
    let mut index = IndexChain::new(index);
    tokens
        .chunks_exact(block_tokens.get() as usize)
        .map(move |block| BlockInfo {
            parent: data.last(),
            index_parent: index.last(),
            key: data.push(block),
            index_key: index.push(block),
        })
}
