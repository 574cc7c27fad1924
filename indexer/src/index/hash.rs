//! Hashing of numbers that are hashes already.

use std::hash::{BuildHasher, Hasher};

use crate::sync::RandomState;

/// Hashes 64-bit keys with one multiplication.
///
/// The keys are hashes already, but some schemes can be computed by anyone who chooses tokens, so the multiplier is
/// secret: nobody can aim keys at one place.
#[derive(Clone, Copy)]
pub(super) struct KeyState {
    mask: u64,
    multiplier: u64,
}

impl KeyState {
    pub(super) fn random() -> Self {
        let random = RandomState::new();
        Self {
            mask: random.hash_one(0_u64),
            multiplier: random.hash_one(1_u64) | 1,
        }
    }

    /// The hash of one key.
    #[inline]
    pub(super) fn mix(&self, key: u64) -> u64 {
        let product = u128::from(key ^ self.mask) * u128::from(self.multiplier);
        (product as u64) ^ ((product >> 64) as u64)
    }

    /// The hash of a list.
    pub(super) fn hash_words(&self, words: impl Iterator<Item = u32>) -> u64 {
        words.fold(0, |hash, word| self.mix(hash ^ u64::from(word)))
    }
}

impl Default for KeyState {
    fn default() -> Self {
        Self::random()
    }
}

impl BuildHasher for KeyState {
    type Hasher = KeyHasher;

    fn build_hasher(&self) -> KeyHasher {
        KeyHasher {
            state: *self,
            hash: 0,
        }
    }
}

pub(super) struct KeyHasher {
    state: KeyState,
    hash: u64,
}

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.hash
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.hash = self.state.mix(self.hash ^ word);
    }

    fn write_u32(&mut self, word: u32) {
        self.write_u64(word.into());
    }

    fn write_u8(&mut self, byte: u8) {
        self.write_u64(byte.into());
    }
}
