//! Atomics that loom watches, and sizes with which a few words fill a chunk.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};

pub use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// Two runs, or 64 words.
pub const CHUNK_BITS: u32 = 1;
/// As few chunks as the scenarios take.
pub const CHUNKS_BITS: u32 = 3;
/// So few entries that searches pass others' on their way.
pub const DOORS_MIN: usize = 4;

/// Always the same: a model is run again and again, and must run alike.
#[derive(Default)]
pub struct RandomState(BuildHasherDefault<DefaultHasher>);

impl RandomState {
    /// The only one there is.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

impl BuildHasher for RandomState {
    type Hasher = DefaultHasher;

    fn build_hasher(&self) -> DefaultHasher {
        self.0.build_hasher()
    }
}
