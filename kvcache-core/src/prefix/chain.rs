//! Index keys by scheme: one name in configurations and on the wire, one chain in code.

use std::fmt;
use std::sync::Arc;

use super::{llmd, xxh3};
use crate::error::{Error, ErrorKind};
use crate::key::IndexKey;
use crate::shape::TokensPerBlock;

/// What keeps equal tokens apart: they mean other bytes under another model, adapter or tenant.
///
/// An empty name is an absent one, as in the engines and routers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Namespace<'a> {
    /// The model's name; empty where the index serves only one.
    pub model: &'a str,
    /// The adapter's name.
    pub lora: Option<&'a str>,
    /// The tenant's cache salt.
    pub cache_salt: Option<&'a str>,
}

/// How a deployment makes its index keys; all who share an index must name the same one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum IndexScheme {
    /// Dynamo's and Mooncake's chain: see [`xxh3`].
    Xxh3 {
        /// Seeds every hash of the chain.
        seed: u64,
    },
    /// llm-d's default request keys: see [`llmd`].
    LlmdCborFnv {
        /// llm-d's `hashSeed`.
        seed: String,
    },
    /// llm-d's request keys with `hashAlgorithm` `xxh64`: see [`llmd`].
    LlmdXxh64 {
        /// llm-d's `hashSeed`.
        seed: String,
    },
}

impl Default for IndexScheme {
    fn default() -> Self {
        Self::Xxh3 {
            seed: xxh3::SEED_DEFAULT,
        }
    }
}

impl IndexScheme {
    /// Reads a scheme's name: `xxh3:NUMBER`, `cbor-fnv:SEED` or `xxh64:SEED`.
    ///
    /// The part after the colon is the seed; it may be left out together with the colon, then it is 1337 for `xxh3`
    /// and empty for the others.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] with the text and what would be accepted.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let (name, seed) = match text.split_once(':') {
            Some((name, seed)) => (name, Some(seed)),
            None => (text, None),
        };
        match name {
            "xxh3" => match seed {
                None => Ok(Self::default()),
                Some(digits) => match digits.parse() {
                    Ok(seed) => Ok(Self::Xxh3 { seed }),
                    Err(error) => Err(Error::new(
                        ErrorKind::Invalid,
                        format!("the seed of key scheme {text:?} is not a number below 2^64"),
                    )
                    .with_source(error)),
                },
            },
            "cbor-fnv" => Ok(Self::LlmdCborFnv {
                seed: seed.unwrap_or_default().to_owned(),
            }),
            "xxh64" => Ok(Self::LlmdXxh64 {
                seed: seed.unwrap_or_default().to_owned(),
            }),
            _ => Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "key scheme is {text:?}, expected xxh3:NUMBER, cbor-fnv:SEED or xxh64:SEED"
                ),
            )),
        }
    }

    /// The name that [`Self::parse`] reads back as this scheme.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Xxh3 { seed } => format!("xxh3:{seed}"),
            Self::LlmdCborFnv { seed } => format!("cbor-fnv:{seed}"),
            Self::LlmdXxh64 { seed } => format!("xxh64:{seed}"),
        }
    }

    /// The model's name as roots have it in an index that serves only that model: llm-d's keys contain it, those of Dynamo
    /// and Mooncake do not.
    #[must_use]
    pub const fn model_in_root<'a>(&self, model: &'a str) -> &'a str {
        match self {
            Self::Xxh3 { .. } => "",
            Self::LlmdCborFnv { .. } | Self::LlmdXxh64 { .. } => model,
        }
    }

    /// What the chains of one namespace start from; make it once and keep it.
    #[must_use]
    pub fn root(&self, namespace: &Namespace<'_>) -> ChainRoot {
        ChainRoot(match self {
            Self::Xxh3 { seed } => Root::Xxh3(xxh3::Seeds::new(*seed, namespace)),
            Self::LlmdCborFnv { seed } => Root::Llmd {
                algorithm: llmd::Algorithm::CborFnv,
                start: llmd::Algorithm::CborFnv.root(seed, llmd_model(namespace)),
                cache_salt: llmd_salt(namespace),
            },
            Self::LlmdXxh64 { seed } => Root::Llmd {
                algorithm: llmd::Algorithm::Xxh64,
                start: llmd::Algorithm::Xxh64.root(seed, llmd_model(namespace)),
                cache_salt: llmd_salt(namespace),
            },
        })
    }
}

impl fmt::Display for IndexScheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

/// llm-d puts the adapter's name in the model's place.
fn llmd_model<'a>(namespace: &Namespace<'a>) -> &'a str {
    match namespace.lora {
        Some(lora) if !lora.is_empty() => lora,
        _ => namespace.model,
    }
}

fn llmd_salt(namespace: &Namespace<'_>) -> Option<Arc<str>> {
    namespace
        .cache_salt
        .filter(|salt| !salt.is_empty())
        .map(Arc::from)
}

/// Where the chains of one scheme and namespace start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainRoot(Root);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Root {
    Xxh3(xxh3::Seeds),
    Llmd {
        algorithm: llmd::Algorithm,
        start: u64,
        cache_salt: Option<Arc<str>>,
    },
}

impl ChainRoot {
    /// The keys of all full blocks of `tokens`, from the first.
    pub fn chain<'a>(
        &self,
        tokens: &'a [u32],
        block_size: TokensPerBlock,
    ) -> impl Iterator<Item = IndexKey> + use<'a> {
        let mut chain = IndexChain::new(self);
        tokens
            .chunks_exact(block_size.get() as usize)
            .map(move |block| chain.push(block))
    }
}

/// Grows a chain block by block; one buffer serves all blocks, so nothing is allocated per block.
#[derive(Clone, Debug)]
pub struct IndexChain {
    root: ChainRoot,
    last: Option<IndexKey>,
    bytes: Vec<u8>,
}

impl IndexChain {
    /// A chain without blocks yet.
    #[must_use]
    pub fn new(root: &ChainRoot) -> Self {
        Self {
            root: root.clone(),
            last: None,
            bytes: Vec::new(),
        }
    }

    /// Goes on after a block whose key is known.
    #[must_use]
    pub fn after(root: &ChainRoot, parent: IndexKey) -> Self {
        Self {
            root: root.clone(),
            last: Some(parent),
            bytes: Vec::new(),
        }
    }

    /// The key of the last block; none before the first.
    #[must_use]
    pub fn last(&self) -> Option<IndexKey> {
        self.last
    }

    /// Appends one full block and returns its key.
    pub fn push(&mut self, tokens: &[u32]) -> IndexKey {
        self.push_with(tokens, &[])
    }

    /// Appends a block that also contains multimodal inputs, named by their identifiers in order.
    pub fn push_with(&mut self, tokens: &[u32], multimodal: &[&str]) -> IndexKey {
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.resize(tokens.len() * 4, 0);
        for (place, token) in bytes.as_chunks_mut().0.iter_mut().zip(tokens) {
            *place = token.to_le_bytes();
        }
        let key = self.push_le(&bytes, multimodal);
        self.bytes = bytes;
        key
    }

    /// Appends all full blocks of tokens as they travel, u32 little-endian each, and their keys to `keys`. Bytes past the
    /// last full block are ignored.
    pub fn extend_le(
        &mut self,
        tokens: &[u8],
        block_size: TokensPerBlock,
        keys: &mut Vec<IndexKey>,
    ) {
        let blocks = tokens.chunks_exact(block_size.get() as usize * 4);
        let Root::Xxh3(seeds) = self.root.0 else {
            keys.extend(blocks.map(|block| self.push_le(block, &[])));
            return;
        };
        let mut last = self.last;
        keys.extend(blocks.map(|block| {
            let key = seeds.join(last, seeds.local(block, &[]));
            last = Some(key);
            key
        }));
        self.last = last;
    }

    /// Appends a block whose tokens are u32 little-endian; a rest of up to three bytes is ignored.
    pub fn push_le(&mut self, tokens: &[u8], multimodal: &[&str]) -> IndexKey {
        let tokens = &tokens[..tokens.len() / 4 * 4];
        let key = match &self.root.0 {
            Root::Xxh3(seeds) => seeds.join(self.last, seeds.local(tokens, multimodal)),
            Root::Llmd {
                algorithm,
                start,
                cache_salt,
            } => {
                let parent = self.last.map_or(*start, |key| key.0);
                // llm-d adds the salt to the first block only; the chain carries it on.
                let salt = cache_salt.as_deref().filter(|_| self.last.is_none());
                IndexKey(algorithm.block(parent, tokens, multimodal, salt))
            }
        };
        self.last = Some(key);
        key
    }
}
