//! Some words that one task writes and all others read at one moment, without a lock: who asks about many sources waits for
//! the memory of several at once.

use crate::sync::{AtomicU64, Ordering, fence};

/// The words, and how often they were changed: odd while they are. In a cache line of their own.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct Shown<const WORDS: usize> {
    version: AtomicU64,
    words: [AtomicU64; WORDS],
}

impl<const WORDS: usize> Shown<WORDS> {
    /// Nothing but zeros.
    pub(crate) fn new() -> Self {
        Self {
            version: AtomicU64::new(0),
            words: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    /// Changes them; nobody else may do so at the same time.
    pub(crate) fn set(&self, words: [u64; WORDS]) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version + 1, Ordering::Relaxed);
        // Whoever sees one of the new words sees that they are being changed.
        fence(Ordering::Release);
        for (place, word) in self.words.iter().zip(words) {
            place.store(word, Ordering::Relaxed);
        }
        self.version.store(version + 2, Ordering::Release);
    }

    /// The words of one moment; none when they were being changed.
    pub(crate) fn get(&self) -> Option<[u64; WORDS]> {
        let version = self.version.load(Ordering::Acquire);
        let words = std::array::from_fn(|at| self.words[at].load(Ordering::Relaxed));
        fence(Ordering::Acquire);
        let is_still = self.version.load(Ordering::Relaxed) == version;
        (version.is_multiple_of(2) && is_still).then_some(words)
    }
}
