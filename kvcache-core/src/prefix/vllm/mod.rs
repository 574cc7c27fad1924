//! vLLM's block hashes, checked against vLLM 0.32.
//!
//! ```text
//! NONE_HASH = H(S(seed text))
//! hash[i]   = H(S((hash[i-1], (token, ...), extra keys or None)))        hash[-1] = NONE_HASH
//! ```
//!
//! `H` is SHA-256, or XXH3-128 as 16 big-endian bytes; `S` is canonical CBOR or Python's pickle, protocol 5. The seed
//! text is `$PYTHONHASHSEED`; without it, vLLM 0.30 and later use `vllm-none-hash` for SHA-256 and a random one for
//! XXH3. Extra keys are, in this order: adapter, multimodal inputs, cache salt (first block only), prompt embeddings;
//! tagged tuples from 0.31 on, bare values before. Events carry the bare values and never the adapter's path, so from
//! 0.31 the hashes of adapter blocks cannot be recomputed from events alone.
//!
//! Outside the engine a hash is usually shortened to its last eight bytes, big-endian ([`BlockHash::engine_hash`]).

mod extra;

use std::fmt;

pub use extra::{ExtraKey, ExtraKeyStyle, MultimodalSpan, RequestKeys};
use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::xxh3_128;

use self::extra::Item;
use super::cbor;
use super::pickle::Pickle;
use crate::error::{Error, ErrorKind};
use crate::key::EngineHash;

/// The seed of vLLM 0.30 and later for SHA-256 when `PYTHONHASHSEED` is not set.
pub const SEED_DEFAULT: &str = "vllm-none-hash";

const HASH_BYTES_MAX: usize = 32;

/// vLLM's `--prefix-caching-hash-algo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// SHA-256 over pickle: vLLM's default.
    Sha256,
    /// SHA-256 over CBOR: the one to choose across languages.
    Sha256Cbor,
    /// XXH3-128 over pickle.
    Xxhash,
    /// XXH3-128 over CBOR.
    XxhashCbor,
}

impl Algorithm {
    /// Every algorithm.
    pub const ALL: [Self; 4] = [
        Self::Sha256,
        Self::Sha256Cbor,
        Self::Xxhash,
        Self::XxhashCbor,
    ];

    /// vLLM's name for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha256Cbor => "sha256_cbor",
            Self::Xxhash => "xxhash",
            Self::XxhashCbor => "xxhash_cbor",
        }
    }

    /// The algorithm that vLLM calls so.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] with the text and the names.
    pub fn parse(text: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|algorithm| algorithm.name() == text).ok_or_else(|| {
            Error::new(
                ErrorKind::Invalid,
                format!(
                    "vLLM hash algorithm is {text:?}, expected sha256, sha256_cbor, xxhash or xxhash_cbor"
                ),
            )
        })
    }

    /// Whether collisions cannot be made on purpose.
    #[must_use]
    pub const fn is_cryptographic(self) -> bool {
        matches!(self, Self::Sha256 | Self::Sha256Cbor)
    }

    fn digest(self, serialised: &[u8]) -> BlockHash {
        let mut bytes = [0; HASH_BYTES_MAX];
        let len = if self.is_cryptographic() {
            bytes.copy_from_slice(&Sha256::digest(serialised));
            HASH_BYTES_MAX
        } else {
            bytes[..16].copy_from_slice(&xxh3_128(serialised).to_be_bytes());
            16
        };
        BlockHash {
            bytes,
            len: len as u8,
        }
    }
}

/// A digest as the engine holds it: 32 bytes of SHA-256 or 16 of XXH3-128.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockHash {
    bytes: [u8; HASH_BYTES_MAX],
    len: u8,
}

impl BlockHash {
    /// Takes a digest from an event or a connector.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when it has neither 16 nor 32 bytes.
    pub fn from_bytes(digest: &[u8]) -> Result<Self, Error> {
        if digest.len() != 16 && digest.len() != HASH_BYTES_MAX {
            return Err(Error::invalid(
                "vLLM block hash length",
                digest.len(),
                [16, 32],
            ));
        }
        let mut bytes = [0; HASH_BYTES_MAX];
        bytes[..digest.len()].copy_from_slice(digest);
        Ok(Self {
            bytes,
            len: digest.len() as u8,
        })
    }

    /// The digest.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// The hash as events carry it by default.
    #[must_use]
    pub fn engine_hash(&self) -> EngineHash {
        EngineHash::from_digest(self.as_bytes())
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_bytes()
            .iter()
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Computes an engine's block hashes.
#[derive(Clone, Copy, Debug)]
pub struct Hasher {
    algorithm: Algorithm,
    style: ExtraKeyStyle,
    none_hash: BlockHash,
}

impl Hasher {
    /// For an engine with this algorithm, style and `PYTHONHASHSEED`.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for a seed text too long to reproduce its pickle.
    pub fn new(algorithm: Algorithm, style: ExtraKeyStyle, seed: &str) -> Result<Self, Error> {
        let serialised = match algorithm {
            Algorithm::Sha256Cbor | Algorithm::XxhashCbor => {
                let mut buffer = Vec::new();
                cbor::text(&mut buffer, seed);
                buffer
            }
            Algorithm::Sha256 | Algorithm::Xxhash => {
                let mut pickle = Pickle::new();
                pickle.text(seed)?;
                pickle.finish()?
            }
        };
        Ok(Self {
            algorithm,
            style,
            none_hash: algorithm.digest(&serialised),
        })
    }

    /// For an engine started without `PYTHONHASHSEED`, vLLM 0.30 or later.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for the XXH3 algorithms, which vLLM then seeds at random.
    pub fn unseeded(algorithm: Algorithm, style: ExtraKeyStyle) -> Result<Self, Error> {
        if !algorithm.is_cryptographic() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "vLLM draws the seed of {} at random unless PYTHONHASHSEED is set",
                    algorithm.name()
                ),
            ));
        }
        Self::new(algorithm, style, SEED_DEFAULT)
    }

    /// What the first block has for a parent.
    #[must_use]
    pub fn none_hash(&self) -> BlockHash {
        self.none_hash
    }

    /// The hash of a block after `parent`, or of a first block.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] when a pickle depends on which objects Python holds once: some text occurs twice in
    /// the block's extra keys. [`ErrorKind::Unsupported`] also for pickles over 64 KiB.
    pub fn block(
        &self,
        parent: Option<&BlockHash>,
        tokens: &[u32],
        extra_keys: &[ExtraKey<'_>],
    ) -> Result<BlockHash, Error> {
        let parent = parent.unwrap_or(&self.none_hash).as_bytes();
        let serialised = match self.algorithm {
            Algorithm::Sha256Cbor | Algorithm::XxhashCbor => {
                self.block_cbor(parent, tokens, extra_keys)
            }
            Algorithm::Sha256 | Algorithm::Xxhash => {
                self.block_pickle(parent, tokens, extra_keys)?
            }
        };
        Ok(self.algorithm.digest(&serialised))
    }

    fn block_cbor(&self, parent: &[u8], tokens: &[u32], extra_keys: &[ExtraKey<'_>]) -> Vec<u8> {
        // A token takes at most five bytes; the rest is heads and the parent.
        let mut buffer = Vec::with_capacity(parent.len() + tokens.len() * 5 + 16);
        cbor::array(&mut buffer, 3);
        cbor::bytes(&mut buffer, parent);
        cbor::array(&mut buffer, tokens.len());
        for token in tokens {
            cbor::unsigned(&mut buffer, u64::from(*token));
        }
        if extra_keys.is_empty() {
            cbor::null(&mut buffer);
            return buffer;
        }
        cbor::array(&mut buffer, extra_keys.len());
        for key in extra_keys {
            let (items, is_tuple) = key.items(self.style);
            if is_tuple {
                cbor::array(&mut buffer, items.len());
            }
            for item in items {
                match item {
                    Item::Text(text) => cbor::text(&mut buffer, text),
                    Item::Bytes(bytes) => cbor::bytes(&mut buffer, bytes),
                    Item::Int(int) => cbor::signed(&mut buffer, int),
                }
            }
        }
        buffer
    }

    fn block_pickle(
        &self,
        parent: &[u8],
        tokens: &[u32],
        extra_keys: &[ExtraKey<'_>],
    ) -> Result<Vec<u8>, Error> {
        let mut pickle = Pickle::new();
        pickle.open(3);
        pickle.bytes(parent)?;
        pickle.open(tokens.len());
        for token in tokens {
            pickle.int(i64::from(*token));
        }
        pickle.close(tokens.len());
        if extra_keys.is_empty() {
            pickle.none();
        } else {
            pickle.open(extra_keys.len());
            for key in extra_keys {
                let (items, is_tuple) = key.items(self.style);
                let len = items.len();
                if is_tuple {
                    pickle.open(len);
                }
                for item in items {
                    match item {
                        Item::Text(text) => pickle.text(text)?,
                        Item::Bytes(bytes) => pickle.bytes(bytes)?,
                        Item::Int(int) => pickle.int(int),
                    }
                }
                if is_tuple {
                    pickle.close(len);
                }
            }
            pickle.close(extra_keys.len());
        }
        pickle.close(3);
        pickle.finish()
    }
}

#[cfg(test)]
mod tests;
