//! What every byte of every block must be: a function of model identity, block key and layer.
//!
//! The simulated engine "computes" a block by filling it so; whoever gets a block, over whatever way, can check it byte
//! for byte. A block's layers lie one after the other, all of the same length.

#[cfg(test)]
mod tests;

use std::fmt;

use kvcache_core::{BlockKey, Error, Result};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// The step between the states of neighbouring words.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
/// An odd factor with many set bits, so that each state bit reaches the high half of the product.
const FACTOR: u64 = 0xd6e8_feb8_6659_fd93;

/// The contents of all blocks of one model.
#[derive(Clone, Debug)]
pub struct Content {
    /// Of the model identity: reduced once, for it is part of every layer's seed.
    model: u64,
    block_bytes: usize,
    layers: u32,
}

/// The first byte that is not what it must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// The layer it is in.
    pub layer: u32,
    /// Its offset in the bytes that were checked.
    pub offset: usize,
    /// What it must be.
    pub expected: u8,
    /// What it is.
    pub found: u8,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            layer,
            offset,
            expected,
            found,
        } = self;
        write!(
            f,
            "byte {offset} (layer {layer}) is {found:#04x}, expected {expected:#04x}"
        )
    }
}

impl std::error::Error for Mismatch {}

impl Content {
    /// The contents for a model whose blocks have `block_bytes` in `layers` equal parts.
    ///
    /// # Errors
    /// `Invalid` if `layers` is 0 or does not divide `block_bytes`.
    pub fn new(model_identity: &[u8; 32], block_bytes: usize, layers: u32) -> Result<Self> {
        if layers == 0 || block_bytes == 0 || !block_bytes.is_multiple_of(layers as usize) {
            let accepted = "at least 1 byte a layer, the same for each";
            return Err(Error::invalid(
                &format!("block_bytes with {layers} layers"),
                block_bytes,
                accepted,
            ));
        }
        Ok(Self {
            model: xxh3_64_with_seed(model_identity, 0),
            block_bytes,
            layers,
        })
    }

    /// The length of a block, in bytes.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// How many layers a block has.
    #[must_use]
    pub fn layers(&self) -> u32 {
        self.layers
    }

    /// Writes a whole block.
    ///
    /// # Panics
    /// If `bytes` is not [`block_bytes`](Self::block_bytes) long.
    pub fn fill(&self, key: &BlockKey, bytes: &mut [u8]) {
        assert_eq!(bytes.len(), self.block_bytes, "a block has a fixed length");
        for (layer, part) in (0..).zip(bytes.chunks_exact_mut(self.layer_bytes())) {
            self.fill_layer(key, layer, part);
        }
    }

    /// Checks a whole block.
    ///
    /// # Errors
    /// The first wrong byte.
    ///
    /// # Panics
    /// If `bytes` is not [`block_bytes`](Self::block_bytes) long.
    pub fn verify(&self, key: &BlockKey, bytes: &[u8]) -> Result<(), Mismatch> {
        assert_eq!(bytes.len(), self.block_bytes, "a block has a fixed length");
        let layer_bytes = self.layer_bytes();
        for (layer, part) in (0..).zip(bytes.chunks_exact(layer_bytes)) {
            self.verify_layer(key, layer, part)
                .map_err(|mismatch| Mismatch {
                    offset: layer as usize * layer_bytes + mismatch.offset,
                    ..mismatch
                })?;
        }
        Ok(())
    }

    /// Writes the beginning of one layer, as much of it as there is room for.
    pub fn fill_layer(&self, key: &BlockKey, layer: u32, bytes: &mut [u8]) {
        let mut state = self.layer_state(key, layer);
        let (words, tail) = bytes.as_chunks_mut::<8>();
        for word in words {
            *word = next_word(&mut state).to_le_bytes();
        }
        let last = next_word(&mut state).to_le_bytes();
        tail.copy_from_slice(&last[..tail.len()]);
    }

    /// Checks the beginning of one layer, as much of it as is given.
    ///
    /// # Errors
    /// The first wrong byte; its offset counts from the layer's beginning.
    pub fn verify_layer(&self, key: &BlockKey, layer: u32, bytes: &[u8]) -> Result<(), Mismatch> {
        let mut state = self.layer_state(key, layer);
        let (words, tail) = bytes.as_chunks::<8>();
        for (position, word) in words.iter().enumerate() {
            let expected = next_word(&mut state).to_le_bytes();
            if *word != expected {
                return Err(first_difference(layer, position * 8, &expected, word));
            }
        }
        let expected = next_word(&mut state).to_le_bytes();
        if *tail != expected[..tail.len()] {
            return Err(first_difference(layer, words.len() * 8, &expected, tail));
        }
        Ok(())
    }

    fn layer_bytes(&self) -> usize {
        self.block_bytes / self.layers as usize
    }

    fn layer_state(&self, key: &BlockKey, layer: u32) -> u64 {
        xxh3_64_with_seed(
            &key.0,
            self.model.wrapping_add(u64::from(layer).wrapping_mul(STEP)),
        )
    }
}

/// One multiplication a word: several gigabytes a second, and any two states give unrelated words.
fn next_word(state: &mut u64) -> u64 {
    *state = state.wrapping_add(STEP);
    let product = (*state ^ (*state >> 32)).wrapping_mul(FACTOR);
    product ^ (product >> 32)
}

fn first_difference(layer: u32, start: usize, expected: &[u8; 8], found: &[u8]) -> Mismatch {
    let at = expected
        .iter()
        .zip(found)
        .take_while(|(expected, found)| expected == found)
        .count();
    assert!(at < found.len(), "called for equal words");
    Mismatch {
        layer,
        offset: start + at,
        expected: expected[at],
        found: found[at],
    }
}
