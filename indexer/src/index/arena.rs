//! Memory that readers and the writer share: chunks of atomics that appear without a lock and go only when nobody reads.
//!
//! A chunk, once there, stays where it is for as long as anybody can hold a reference to the arena; [`Chunks::take`]
//! needs the arena for itself.

use std::sync::OnceLock;
use std::sync::atomic::AtomicUsize;

use crate::sync::{AtomicU32, CHUNK_BITS, CHUNKS_BITS, Ordering};

/// A growing row of elements in chunks that never move.
pub(super) struct Chunks<T> {
    chunks: Box<[OnceLock<Box<[T]>>]>,
    /// What the chunks that are there take: only the writer adds, so that it need not count them.
    bytes: AtomicUsize,
}

impl<T: Default> Chunks<T> {
    /// Room for so many chunks; none is there yet.
    pub(super) fn new(chunks_max: usize) -> Self {
        Self {
            chunks: (0..chunks_max).map(|_| OnceLock::new()).collect(),
            bytes: AtomicUsize::new(0),
        }
    }

    pub(super) fn chunks_max(&self) -> usize {
        self.chunks.len()
    }

    pub(super) fn chunk(&self, chunk: usize) -> Option<&[T]> {
        self.chunks.get(chunk)?.get().map(|elements| &elements[..])
    }

    /// Makes sure that a chunk is there; returns how many elements it has.
    pub(super) fn ensure(&self, chunk: usize, elements: usize) -> usize {
        let made = self.chunks[chunk].get_or_init(|| {
            let bytes = elements * size_of::<T>();
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
            (0..elements).map(|_| T::default()).collect()
        });
        made.len()
    }

    /// Takes a chunk away; what refers to it must be gone.
    pub(super) fn take(&mut self, chunk: usize) {
        if let Some(taken) = self.chunks[chunk].take() {
            *self.bytes.get_mut() -= taken.len() * size_of::<T>();
        }
    }

    /// How many elements there are.
    pub(super) fn elements(&self) -> usize {
        self.bytes.load(Ordering::Relaxed) / size_of::<T>()
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed) + self.chunks.len() * size_of::<OnceLock<Box<[T]>>>()
    }
}

/// Words in a chunk of [`Words`], unless one list alone is longer.
const CHUNK_WORDS: usize = 1 << OFFSET_BITS;
const OFFSET_BITS: u32 = CHUNK_BITS + 5;
/// An address has 31 bits, so that sets can mark what is none.
const CHUNKS_MAX: usize = 1 << CHUNKS_BITS;
/// Longer lists have a chunk of their own.
const SHARED_WORDS_MAX: usize = CHUNK_WORDS / 2;

/// Lists of words of any length, addressed by 31 bits; address 0 is none.
pub(super) struct Words(Chunks<AtomicU32>);

impl Words {
    pub(super) fn new() -> Self {
        Self(Chunks::new(CHUNKS_MAX))
    }

    /// So many words from an address on; none when the address was never given out, as torn readers may ask.
    #[inline]
    pub(super) fn list(&self, address: u32, words: usize) -> Option<&[AtomicU32]> {
        let offset = address as usize & (CHUNK_WORDS - 1);
        self.0
            .chunk((address >> OFFSET_BITS) as usize)?
            .get(offset..offset.checked_add(words)?)
    }

    /// A list that is there.
    pub(super) fn known(&self, address: u32, words: usize) -> &[AtomicU32] {
        self.list(address, words).unwrap_or_default()
    }

    pub(super) fn bytes(&self) -> usize {
        self.0.bytes()
    }
}

/// The length that a list of so many words really has: a power of two or one and a half times one.
pub(super) fn room(words: usize) -> usize {
    let words = words.max(4);
    let above = words.next_power_of_two();
    if words <= above / 4 * 3 {
        above / 4 * 3
    } else {
        above
    }
}

/// The place of a room among the free lists: 4, 6, 8, 12, 16, …
fn class(room: usize) -> usize {
    let power = room.ilog2() as usize;
    (power - 2) * 2 + usize::from(!room.is_power_of_two())
}

/// Gives lists of words out and takes them back; only the writer has it.
pub(super) struct WordLists {
    free: Vec<Vec<u32>>,
    /// Words in use by chunk; a chunk that is not there has none.
    used: Vec<u32>,
    /// Where the rest of the newest shared chunk begins.
    rest: (usize, usize),
    empty_chunks: Vec<u32>,
}

impl WordLists {
    pub(super) fn new() -> Self {
        Self {
            free: vec![Vec::new(); class(SHARED_WORDS_MAX) + 1],
            // Address 0 stands for none, so the first chunk is never made.
            used: vec![1],
            rest: (0, CHUNK_WORDS),
            empty_chunks: Vec::new(),
        }
    }

    /// A list of at least so many words; what is in it is unknown. It has [`room`] for them.
    pub(super) fn allocate(&mut self, words: &Words, count: usize) -> u32 {
        let room = room(count);
        if room > SHARED_WORDS_MAX {
            let chunk = self.new_chunk(words, room);
            self.used[chunk] = room as u32;
            return (chunk << OFFSET_BITS) as u32;
        }
        let address = match self.free[class(room)].pop() {
            Some(address) => address,
            None => {
                if self.rest.1 + room > CHUNK_WORDS {
                    self.rest = (self.new_chunk(words, CHUNK_WORDS), 0);
                }
                let address = (self.rest.0 << OFFSET_BITS | self.rest.1) as u32;
                self.rest.1 += room;
                address
            }
        };
        self.used[(address >> OFFSET_BITS) as usize] += room as u32;
        address
    }

    fn new_chunk(&mut self, words: &Words, elements: usize) -> usize {
        let chunk = self
            .empty_chunks
            .pop()
            .map_or(self.used.len(), |chunk| chunk as usize);
        assert!(
            chunk < words.0.chunks_max(),
            "the lists of the index take 8 GiB"
        );
        if chunk == self.used.len() {
            self.used.push(0);
        }
        words.0.ensure(chunk, elements);
        chunk
    }

    /// Takes a list back that was given out for so many words.
    pub(super) fn release(&mut self, address: u32, count: usize) {
        let room = room(count);
        let used = &mut self.used[(address >> OFFSET_BITS) as usize];
        *used = used.checked_sub(room as u32).unwrap_or_default();
        if room <= SHARED_WORDS_MAX {
            self.free[class(room)].push(address);
        }
    }

    /// Whether giving empty chunks back is worth it.
    pub(super) fn has_empty_chunks(&self) -> bool {
        let unused = self.used.iter().filter(|used| **used == 0).count();
        unused > self.empty_chunks.len()
    }

    /// Gives chunks back in which nothing is used.
    pub(super) fn trim(&mut self, words: &mut Words) {
        let is_empty = |used: &[u32], address: u32| used[(address >> OFFSET_BITS) as usize] == 0;
        for free in &mut self.free {
            free.retain(|address| !is_empty(&self.used, *address));
            free.shrink_to_fit();
        }
        self.empty_chunks = (0..self.used.len() as u32)
            .filter(|chunk| self.used[*chunk as usize] == 0)
            .collect();
        for &chunk in &self.empty_chunks {
            words.0.take(chunk as usize);
        }
        if self.used.get(self.rest.0).is_none_or(|used| *used == 0) {
            self.rest = (0, CHUNK_WORDS);
        }
    }

    pub(super) fn bytes(&self) -> usize {
        let free: usize = self.free.iter().map(Vec::capacity).sum();
        (free + self.used.capacity() + self.empty_chunks.capacity()) * size_of::<u32>()
    }
}

/// Reads a word that a version guards.
#[inline]
pub(super) fn get(word: &AtomicU32) -> u32 {
    word.load(Ordering::Relaxed)
}

/// Writes a word that a version guards.
#[inline]
pub(super) fn set(word: &AtomicU32, value: u32) {
    word.store(value, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every size up to a few thousand words, then sizes around the largest.
    #[test]
    fn rooms_hold_what_they_are_for_and_waste_little() {
        for words in (1..5000).chain(SHARED_WORDS_MAX - 2..SHARED_WORDS_MAX + 2) {
            let room = room(words);
            assert!(
                room >= words && (room < 8 || room * 2 <= words * 3),
                "{words}: {room}"
            );
            assert_eq!(room, super::room(room));
        }
        let classes: Vec<usize> = [4, 6, 8, 12, 16, 24].into_iter().map(class).collect();
        assert_eq!(classes, [0, 1, 2, 3, 4, 5]);
    }

    /// Lists of all sizes given out, written, taken back and given out again, one longer than a chunk among them.
    #[test]
    fn lists_do_not_overlap_and_empty_chunks_go() {
        let (mut words, mut lists) = (Words::new(), WordLists::new());
        for round in 0..2 {
            let sizes: Vec<usize> = (1..600).chain([CHUNK_WORDS * 2]).collect();
            let given: Vec<u32> = sizes
                .iter()
                .map(|size| lists.allocate(&words, *size))
                .collect();
            for (mark, (&address, &size)) in given.iter().zip(&sizes).enumerate() {
                assert_ne!(address, 0);
                words
                    .known(address, size)
                    .iter()
                    .for_each(|word| set(word, mark as u32));
            }
            for (mark, (&address, &size)) in given.iter().zip(&sizes).enumerate() {
                let list = words.list(address, size).unwrap();
                assert!(
                    list.iter().all(|word| get(word) == mark as u32),
                    "round {round}"
                );
                lists.release(address, size);
            }
            assert!(words.bytes() > CHUNK_WORDS * 4);
            assert!(lists.has_empty_chunks());
            lists.trim(&mut words);
            assert_eq!(words.list(given[0], 1).map(<[_]>::len), None);
        }
    }
}
