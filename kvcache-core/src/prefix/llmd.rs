//! llm-d's request keys, in both variants of its indexer.
//!
//! **`cbor-fnv`** (the default there). `FNV` is FNV-1a with 64 bits, `CBOR` is canonical:
//!
//! ```text
//! seed64 = FNV(seed)
//! root   = FNV(CBOR([seed64, null, model]))
//! key[i] = FNV(CBOR([key[i-1], [token, ...], extra]))       key[-1] = root
//! extra  = null, or [{"Hash": identifier}, ...]
//! ```
//!
//! **`xxh64`**:
//!
//! ```text
//! seed64 = XXH64(seed; 0)
//! digest(parent, tokens, extra) = XXH64(parent u64 LE || tokens u32 LE || each extra: length u64 LE || bytes; 0)
//! root   = digest(seed64, [], [model])
//! key[i] = digest(key[i-1], tokens, extra)                  key[-1] = root
//! ```
//!
//! A request with an adapter uses the adapter's name as the model. A cache salt is one more extra, the last, of the
//! first block only.

use xxhash_rust::xxh64::Xxh64;

use super::cbor::{self, Sink};

/// Which of llm-d's two hash algorithms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// FNV-1a over canonical CBOR.
    CborFnv,
    /// XXH64 over framed bytes.
    Xxh64,
}

impl Algorithm {
    /// What the first block of a model's chains takes for its parent.
    #[must_use]
    pub fn root(self, seed: &str, model: &str) -> u64 {
        match self {
            Self::CborFnv => {
                let mut seed_hash = Fnv::new();
                seed_hash.write(seed.as_bytes());
                let mut hash = Fnv::new();
                cbor::array(&mut hash, 3);
                cbor::unsigned(&mut hash, seed_hash.0);
                cbor::null(&mut hash);
                cbor::text(&mut hash, model);
                hash.0
            }
            Self::Xxh64 => {
                let mut seed_hash = Xxh64::new(0);
                seed_hash.update(seed.as_bytes());
                self.block(seed_hash.digest(), &[], &[model], None)
            }
        }
    }

    /// The key of one block; `tokens` is u32 little-endian, `cache_salt` is given for the first block only.
    #[must_use]
    pub fn block(
        self,
        parent: u64,
        tokens: &[u8],
        multimodal: &[&str],
        cache_salt: Option<&str>,
    ) -> u64 {
        let extras = multimodal.iter().copied().chain(cache_salt);
        let extra_count = multimodal.len() + usize::from(cache_salt.is_some());
        match self {
            Self::CborFnv => {
                let mut hash = Fnv::new();
                cbor::array(&mut hash, 3);
                cbor::unsigned(&mut hash, parent);
                cbor::array(&mut hash, tokens.len() / 4);
                for token in tokens.as_chunks().0 {
                    cbor::unsigned(&mut hash, u64::from(u32::from_le_bytes(*token)));
                }
                if extra_count == 0 {
                    cbor::null(&mut hash);
                } else {
                    cbor::array(&mut hash, extra_count);
                }
                for extra in extras {
                    cbor::map(&mut hash, 1);
                    cbor::text(&mut hash, "Hash");
                    cbor::text(&mut hash, extra);
                }
                hash.0
            }
            Self::Xxh64 => {
                let mut hash = Xxh64::new(0);
                hash.update(&parent.to_le_bytes());
                hash.update(tokens);
                for extra in extras {
                    hash.update(&(extra.len() as u64).to_le_bytes());
                    hash.update(extra.as_bytes());
                }
                hash.digest()
            }
        }
    }
}

/// FNV-1a with 64 bits, fed as the encoder writes, so that a block needs no buffer.
struct Fnv(u64);

impl Fnv {
    const fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Sink for Fnv {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}
