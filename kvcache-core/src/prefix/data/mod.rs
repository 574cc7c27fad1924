//! Data keys: the 256-bit names of stored bytes.
//!
//! A data key commits to everything that shapes a block's bytes: the model and its weights, the adapter, the tenant's
//! salt, which part of the model this rank holds, and the tokens from the start of the sequence. Nothing else does, so
//! equal keys mean interchangeable bytes, whoever computed them.
//!
//! # Encoding, version 1
//!
//! Every value is BLAKE3 (plain mode, 32-byte output) of a message that begins with a domain text ending in a zero
//! byte. `u32` and `u64` are little-endian; `str(x)` is the length of `x` in bytes as `u64`, then the bytes; `opt(x)`
//! is `00` when absent, else `01` then `str(x)`. So no two different inputs have the same message.
//!
//! ```text
//! weights   = 01 str(repository) str(commit)       loaded from one snapshot of a model hub
//!           | 02 digest[32]                        BLAKE3 over the weight files
//!           | 03 str(name)                         named by the operator
//! identity  = B3("kvfabric/model/v1\0" weights str(element) str(quantisation) str(layout)
//!                u32(attribute count) { str(name) str(value) } sorted by name)
//! adapted   = B3("kvfabric/adapter/v1\0" identity[32] str(adapter) weights)
//! shard     = u32(tensor rank) u32(tensor size) u32(first layer) u32(layer count)
//!             u32(first head) u32(head count) u32(cache group)
//! root      = B3("kvfabric/root/v1\0" identity[32] shard opt(salt))
//! key[i]    = B3("kvfabric/tokens/v1\0" key[i-1][32] u32(token count) tokens as u32
//!                u32(extra count) { str(identifier) i64(offset) })              key[-1] = root
//! bridged   = B3("kvfabric/engine/v1\0" root[32] str(engine) str(algorithm) opt(seed) str(engine hash))
//! ```
//!
//! Keys made from tokens and keys bridged from an engine's hashes never meet: their domains differ.

mod message;

use std::ops::Range;

use self::message::{Message, count};
use crate::error::{Error, ErrorKind};
use crate::key::BlockKey;
use crate::shape::Tensor;

const MODEL: &[u8] = b"kvfabric/model/v1\0";
const ADAPTER: &[u8] = b"kvfabric/adapter/v1\0";
const ROOT: &[u8] = b"kvfabric/root/v1\0";
const TOKENS: &[u8] = b"kvfabric/tokens/v1\0";
const ENGINE: &[u8] = b"kvfabric/engine/v1\0";

/// The length of a SHA-256 digest, the only engine hash that tiers outliving the process accept.
const SHA256_BYTES: usize = 32;

/// Which weights a model or an adapter has: its name alone does not tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights<'a> {
    /// Loaded from one snapshot of a model hub.
    Snapshot {
        /// The repository, like `meta-llama/Llama-3.1-8B`.
        repository: &'a str,
        /// The commit, as the hub writes it.
        commit: &'a str,
    },
    /// BLAKE3 over the weight files, in the order of their names.
    Digest([u8; 32]),
    /// The operator vouches that this name changes whenever the weights do.
    Named(&'a str),
}

/// Everything about a model that shapes the bytes of its cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelDescription<'a> {
    /// Which weights.
    pub weights: Weights<'a>,
    /// The cache's element type, like `bf16` or `fp8_ds_mla`.
    pub element: &'a str,
    /// How weights and activations are quantised; empty for not at all.
    pub quantisation: &'a str,
    /// The order of bytes within a block, with its version, like `vllm/LBHNC/1`.
    pub layout: &'a str,
    /// Whatever else changes the bytes (rotary scaling, attention backend), in any order, each name once.
    pub attributes: &'a [(&'a str, &'a str)],
}

/// The digest of a [`ModelDescription`]: caches of different identities share nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModelIdentity(pub [u8; 32]);

impl ModelIdentity {
    /// Digests a description.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when the weights are named by an empty text, or an attribute is given twice.
    pub fn new(description: &ModelDescription<'_>) -> Result<Self, Error> {
        let mut attributes = description.attributes.to_vec();
        attributes.sort_unstable();
        if let Some(twice) = attributes.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("model attribute {:?} is given twice", twice[0].0),
            ));
        }
        let mut message = Message::new(MODEL);
        message.weights(&description.weights)?;
        message.str(description.element.as_bytes());
        message.str(description.quantisation.as_bytes());
        message.str(description.layout.as_bytes());
        message.u32(count(attributes.len()));
        for (name, value) in attributes {
            message.str(name.as_bytes());
            message.str(value.as_bytes());
        }
        Ok(Self(message.digest()))
    }

    /// The identity of this model with an adapter (LoRA) applied.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when the adapter's weights are named by an empty text.
    pub fn with_adapter(&self, name: &str, weights: &Weights<'_>) -> Result<Self, Error> {
        let mut message = Message::new(ADAPTER);
        message.bytes(&self.0);
        message.str(name.as_bytes());
        message.weights(weights)?;
        Ok(Self(message.digest()))
    }
}

/// Which part of a block's bytes one rank holds; two ranks never overwrite each other.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Shard {
    /// The rank in its tensor-parallel group.
    pub tensor: Tensor,
    /// The layers it holds, by their numbers in the whole model.
    pub layers: Range<u32>,
    /// The KV heads it holds, by their numbers in the whole model; `0..1` for one latent shared by all.
    pub heads: Range<u32>,
    /// The engine's cache group.
    pub cache_group: u32,
}

impl Shard {
    /// One rank that holds the whole model in one cache group.
    #[must_use]
    pub const fn whole(layers: u32, heads: u32) -> Self {
        Self {
            tensor: Tensor::SINGLE,
            layers: 0..layers,
            heads: 0..heads,
            cache_group: 0,
        }
    }

    fn check(&self) -> Result<(), Error> {
        for (field, range) in [("layers", &self.layers), ("heads", &self.heads)] {
            if range.is_empty() {
                let context = format!("the shard's {field} are {range:?}, expected at least one");
                return Err(Error::new(ErrorKind::Invalid, context));
            }
        }
        Ok(())
    }
}

/// A multimodal input within a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extra<'a> {
    /// Names its content: the engine's hash of it.
    pub identifier: &'a str,
    /// Where it begins, in tokens from the block's first; negative when in an earlier block.
    pub offset: i64,
}

/// The data keys of one sequence on one shard, block by block.
#[derive(Clone, Debug)]
pub struct DataChain {
    root: [u8; 32],
    last: Option<BlockKey>,
    message: Message,
}

impl DataChain {
    /// A chain without blocks; `salt` keeps a tenant's blocks apart. An empty salt differs from none.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a shard that names no layers or no heads.
    pub fn new(identity: &ModelIdentity, shard: &Shard, salt: Option<&str>) -> Result<Self, Error> {
        let root = root(identity, shard, salt)?;
        Ok(Self {
            root,
            last: None,
            message: Message::default(),
        })
    }

    /// Goes on after a block whose key is known.
    ///
    /// # Errors
    /// As for [`Self::new`].
    pub fn after(
        identity: &ModelIdentity,
        shard: &Shard,
        salt: Option<&str>,
        parent: BlockKey,
    ) -> Result<Self, Error> {
        Ok(Self {
            last: Some(parent),
            ..Self::new(identity, shard, salt)?
        })
    }

    /// The key of the last block; none before the first.
    #[must_use]
    pub fn last(&self) -> Option<BlockKey> {
        self.last
    }

    /// Appends a block of tokens and returns its key.
    pub fn push(&mut self, tokens: &[u32]) -> BlockKey {
        self.push_with(tokens, &[])
    }

    /// Appends a block that also contains multimodal inputs, in order of their offsets.
    pub fn push_with(&mut self, tokens: &[u32], extras: &[Extra<'_>]) -> BlockKey {
        let message = &mut self.message;
        message.begin(TOKENS);
        message.bytes(&self.last.map_or(self.root, |key| key.0));
        message.u32(count(tokens.len()));
        for token in tokens {
            message.u32(*token);
        }
        message.u32(count(extras.len()));
        for extra in extras {
            message.str(extra.identifier.as_bytes());
            message.bytes(&extra.offset.to_le_bytes());
        }
        let key = BlockKey(message.digest());
        self.last = Some(key);
        key
    }
}

/// How an engine's hashes are seeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineSeed<'a> {
    /// By a text that every replica shares (vLLM: `PYTHONHASHSEED`, or its fixed default); empty when there is none.
    Fixed(&'a str),
    /// Anew at each start of the engine.
    Random,
}

/// A block as an engine names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineBlock<'a> {
    /// The engine, with whatever of its version changes the hashes, like `vllm/tagged`.
    pub engine: &'a str,
    /// The hash algorithm, as the engine calls it.
    pub algorithm: &'a str,
    /// How the hashes are seeded.
    pub seed: EngineSeed<'a>,
    /// The digest, in full: shortened to 64 bits it is too weak to name bytes for long.
    pub hash: &'a [u8],
}

/// How long the bytes under a key may live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// No longer than the engine process that named them.
    Process,
    /// On disk, in an object store, or in a cache that several engines share.
    Durable,
}

/// The data key of a block that is only known by its engine's hash.
///
/// The engine's hash must already depend on tokens, parents, adapter and salt; identity, shard and salt are added here.
///
/// # Errors
/// [`ErrorKind::Invalid`] for a bad shard or an empty hash. [`ErrorKind::Unsupported`] when the key is to be durable
/// and the hash is randomly seeded, not cryptographic, or shortened.
pub fn from_engine_hash(
    identity: &ModelIdentity,
    shard: &Shard,
    salt: Option<&str>,
    block: &EngineBlock<'_>,
    durability: Durability,
) -> Result<BlockKey, Error> {
    if block.hash.is_empty() {
        return Err(Error::new(ErrorKind::Invalid, "the engine's hash is empty"));
    }
    if durability == Durability::Durable {
        refuse_weak(block)?;
    }
    let mut message = Message::new(ENGINE);
    message.bytes(&root(identity, shard, salt)?);
    message.str(block.engine.as_bytes());
    message.str(block.algorithm.as_bytes());
    match block.seed {
        EngineSeed::Fixed(seed) => message.optional(Some(seed.as_bytes())),
        EngineSeed::Random => message.optional(None),
    }
    message.str(block.hash);
    Ok(BlockKey(message.digest()))
}

fn refuse_weak(block: &EngineBlock<'_>) -> Result<(), Error> {
    let why = if block.seed == EngineSeed::Random {
        "its seed is drawn anew at each start"
    } else if !matches!(block.algorithm, "sha256" | "sha256_cbor") {
        "only sha256 and sha256_cbor are known to be cryptographic"
    } else if block.hash.len() != SHA256_BYTES {
        "the digest is not its full 32 bytes"
    } else {
        return Ok(());
    };
    Err(Error::new(
        ErrorKind::Unsupported,
        format!(
            "{} hash {} of {} bytes cannot name blocks that outlive the process: {why}",
            block.engine,
            block.algorithm,
            block.hash.len()
        ),
    ))
}

fn root(identity: &ModelIdentity, shard: &Shard, salt: Option<&str>) -> Result<[u8; 32], Error> {
    shard.check()?;
    let mut message = Message::new(ROOT);
    message.bytes(&identity.0);
    message.u32(shard.tensor.rank());
    message.u32(shard.tensor.size());
    for range in [&shard.layers, &shard.heads] {
        message.u32(range.start);
        message.u32(range.end - range.start);
    }
    message.u32(shard.cache_group);
    message.optional(salt.map(str::as_bytes));
    Ok(message.digest())
}

#[cfg(test)]
mod tests;
