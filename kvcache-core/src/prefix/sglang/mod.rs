//! SGLang's page hashes.
//!
//! ```text
//! hash[i] = SHA-256(hash[i-1] || content of page i)
//! ```
//!
//! The first page of a chain without a namespace has nothing before it. Tokens are u32 little-endian; a page with a
//! token that does not fit is a byte `ff` and then all its tokens as u64 little-endian. A bigram page (EAGLE drafts) has
//! each pair of neighbours, so its sequence is one token longer than it has positions.
//!
//! Two rules put tenants apart, and both give the chain a predecessor. *Event* chains with a salt start at
//! `SHA-256("sglang-cache-salt-v1\0" || salt)`. *Storage* chains start at
//! `SHA-256("sglang-cache-namespace-v1" || part(extra key) || part(salt))`, where a part is `00` when absent, else
//! `01`, its length as u64 little-endian and its bytes; with neither, they start with nothing.

use sha2::{Digest, Sha256};

use crate::error::Error;
use crate::key::EngineHash;

/// One page's hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageHash(pub [u8; 32]);

impl PageHash {
    /// The hash as events carry it: the first eight bytes, big-endian, signed.
    #[must_use]
    pub fn event_hash(&self) -> i64 {
        self.0[..8]
            .iter()
            .fold(0, |value, byte| (value << 8) | i64::from(*byte))
    }

    /// The same bits as an opaque engine hash.
    #[must_use]
    pub fn engine_hash(&self) -> EngineHash {
        EngineHash(self.event_hash() as u64)
    }
}

/// The hashes of one sequence, page by page.
#[derive(Clone, Copy, Debug, Default)]
pub struct Chain {
    last: Option<PageHash>,
}

impl Chain {
    /// A chain in no namespace.
    #[must_use]
    pub const fn new() -> Self {
        Self { last: None }
    }

    /// The chain whose hashes the events of requests with a cache salt carry.
    #[must_use]
    pub fn salted(cache_salt: &str) -> Self {
        let seed = Sha256::new()
            .chain_update(b"sglang-cache-salt-v1\0")
            .chain_update(cache_salt);
        Self::after(PageHash(seed.finalize().into()))
    }

    /// The chain whose hashes name pages in storage.
    #[must_use]
    pub fn storage(extra_key: Option<&str>, cache_salt: Option<&str>) -> Self {
        if extra_key.is_none() && cache_salt.is_none() {
            return Self::new();
        }
        let mut seed = Sha256::new().chain_update(b"sglang-cache-namespace-v1");
        for part in [extra_key, cache_salt] {
            match part {
                None => seed.update([0]),
                Some(part) => {
                    seed.update([1]);
                    seed.update((part.len() as u64).to_le_bytes());
                    seed.update(part);
                }
            }
        }
        Self::after(PageHash(seed.finalize().into()))
    }

    /// Goes on after a page, or from a namespace's seed.
    #[must_use]
    pub const fn after(last: PageHash) -> Self {
        Self { last: Some(last) }
    }

    /// The last page's hash, or the seed; none at the start of a chain without one.
    #[must_use]
    pub const fn last(&self) -> Option<PageHash> {
        self.last
    }

    /// Appends a page of ordinary tokens.
    pub fn push(&mut self, tokens: &[u32]) -> PageHash {
        let hash = tokens.iter().fold(self.begin(), |hash, token| {
            hash.chain_update(token.to_le_bytes())
        });
        self.end(hash)
    }

    /// Appends a page whose tokens may not fit 32 bits.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) for a token that does not fit 63 bits: SGLang's are signed.
    pub fn push_wide(&mut self, tokens: &[u64]) -> Result<PageHash, Error> {
        const TOKEN_MAX: u64 = i64::MAX as u64;
        if let Some(token) = tokens.iter().find(|token| **token > TOKEN_MAX) {
            return Err(Error::invalid("token", token, 0..=TOKEN_MAX));
        }
        if tokens.iter().all(|token| u32::try_from(*token).is_ok()) {
            let hash = tokens.iter().fold(self.begin(), |hash, token| {
                hash.chain_update((*token as u32).to_le_bytes())
            });
            return Ok(self.end(hash));
        }
        // The odd length keeps wide pages apart from narrow ones.
        let hash = tokens
            .iter()
            .fold(self.begin().chain_update([0xff]), |hash, token| {
                hash.chain_update(token.to_le_bytes())
            });
        Ok(self.end(hash))
    }

    /// Appends a page of bigrams: `tokens` are the page's own and the first of the next page.
    pub fn push_bigrams(&mut self, tokens: &[u32]) -> PageHash {
        let hash = tokens
            .windows(2)
            .flatten()
            .fold(self.begin(), |hash, token| {
                hash.chain_update(token.to_le_bytes())
            });
        self.end(hash)
    }

    fn begin(&self) -> Sha256 {
        match self.last {
            Some(PageHash(last)) => Sha256::new().chain_update(last),
            None => Sha256::new(),
        }
    }

    fn end(&mut self, hash: Sha256) -> PageHash {
        let hash = PageHash(hash.finalize().into());
        self.last = Some(hash);
        hash
    }
}

#[cfg(test)]
mod tests;
