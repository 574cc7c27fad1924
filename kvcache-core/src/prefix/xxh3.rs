//! The XXH3-64 chain of Dynamo's router and Mooncake's conductor.
//!
//! ```text
//! local[i] = XXH3-64(tokens of block i, u32 little-endian each; local seed)
//! key[0]   = local[0]
//! key[i]   = XXH3-64(key[i-1] as u64 LE || local[i] as u64 LE; chain seed)
//! ```
//!
//! The chain seed is the scheme's seed `S` (Dynamo uses 1337). The local seed is `S` for the plain base model. A
//! namespace changes it, with wrapping 64-bit additions, each term only when its name is present and not empty:
//!
//! ```text
//! local seed = S + XXH3-64(adapter; 0) + XXH3-64(cache salt; 1) + XXH3-64(model; 2)
//! ```
//!
//! The adapter and salt terms are Dynamo's own. The model term is ours, for one index that serves several models;
//! leave the model empty where one is served, and the keys are Dynamo's and Mooncake's bit for bit.
//!
//! Identifiers of multimodal inputs are framed after the block's tokens: each its length in bytes as u64 LE, then
//! the bytes. That rule is ours too, and a block without any is untouched by it.

use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

use super::Namespace;
use crate::key::IndexKey;

/// The seed that Dynamo's router uses.
pub const SEED_DEFAULT: u64 = 1337;

/// What the chain of one namespace starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seeds {
    /// Hashes the tokens of a block; depends on the namespace.
    pub local: u64,
    /// Joins a block to its parent.
    pub chain: u64,
}

impl Seeds {
    /// The seeds of a namespace under the scheme's seed, by the rule above.
    #[must_use]
    pub fn new(seed: u64, namespace: &Namespace<'_>) -> Self {
        let terms = [
            (namespace.lora, 0),
            (namespace.cache_salt, 1),
            (Some(namespace.model), 2),
        ];
        let local = terms
            .iter()
            .fold(seed, |sum, (name, term_seed)| match name {
                Some(name) if !name.is_empty() => {
                    sum.wrapping_add(xxh3_64_with_seed(name.as_bytes(), *term_seed))
                }
                _ => sum,
            });
        Self { local, chain: seed }
    }

    /// The hash of one block's content alone; `tokens` is u32 little-endian.
    #[must_use]
    pub fn local(&self, tokens: &[u8], multimodal: &[&str]) -> u64 {
        if multimodal.is_empty() {
            return xxh3_64_with_seed(tokens, self.local);
        }
        let mut hasher = Xxh3::with_seed(self.local);
        hasher.update(tokens);
        for identifier in multimodal {
            hasher.update(&(identifier.len() as u64).to_le_bytes());
            hasher.update(identifier.as_bytes());
        }
        hasher.digest()
    }

    /// The key of a block from its content and its parent.
    #[must_use]
    pub fn join(&self, parent: Option<IndexKey>, local: u64) -> IndexKey {
        let Some(IndexKey(parent)) = parent else {
            return IndexKey(local);
        };
        let mut pair = [0; 16];
        pair[..8].copy_from_slice(&parent.to_le_bytes());
        pair[8..].copy_from_slice(&local.to_le_bytes());
        IndexKey(xxh3_64_with_seed(&pair, self.chain))
    }
}
