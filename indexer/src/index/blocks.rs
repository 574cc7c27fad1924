//! Where keys and names of blocks are: segments of sixteen positions, which never move.

use kvcache_core::{EngineHash, IndexKey};

use super::arena::Chunks;
use super::buried::Buried;
use super::huge::Huge;
use super::stack::Stack;
use crate::sync::{AtomicU64, CHUNK_BITS, CHUNKS_BITS, Ordering};

/// Positions in a segment.
pub(super) const SEGMENT_BLOCKS: u32 = 16;
/// As many as have names for a huge page.
const SEGMENTS_PER_CHUNK: u32 = 1 << (CHUNK_BITS + 1);
const CHUNKS_MAX: u32 = 1 << (CHUNKS_BITS - 3);
/// A segment's number has so many bits.
pub(super) const SEGMENT_BITS: u32 = 24;
/// The most segments; positions have 28 bits.
const SEGMENTS_MAX: u32 = SEGMENTS_PER_CHUNK * CHUNKS_MAX;
const CHUNK_BLOCKS: u32 = SEGMENTS_PER_CHUNK * SEGMENT_BLOCKS;

const _: () = assert!(SEGMENTS_MAX <= 1 << SEGMENT_BITS);

/// The keys of all blocks, by position; readers see them.
pub(super) struct KeyColumn(Chunks<AtomicU64>);

impl KeyColumn {
    pub(super) fn new() -> Self {
        Self(Chunks::new(CHUNKS_MAX as usize))
    }

    /// The keys of a segment; none for a segment that torn readers make up.
    #[inline]
    pub(super) fn segment(&self, segment: u32) -> Option<&[AtomicU64]> {
        let start = ((segment % SEGMENTS_PER_CHUNK) * SEGMENT_BLOCKS) as usize;
        self.0
            .chunk((segment / SEGMENTS_PER_CHUNK) as usize)?
            .get(start..start + SEGMENT_BLOCKS as usize)
    }

    #[inline]
    pub(super) fn get(&self, position: u32) -> Option<u64> {
        let chunk = self.0.chunk((position / CHUNK_BLOCKS) as usize)?;
        Some(
            chunk
                .get((position % CHUNK_BLOCKS) as usize)?
                .load(Ordering::Relaxed),
        )
    }

    pub(super) fn set(&self, position: u32, key: IndexKey) {
        if let Some(chunk) = self.0.chunk((position / CHUNK_BLOCKS) as usize) {
            chunk[(position % CHUNK_BLOCKS) as usize].store(key.0, Ordering::Relaxed);
        }
    }

    /// Sets the keys of positions of one segment, from one on.
    pub(super) fn set_row(&self, position: u32, keys: &[IndexKey]) {
        let of_segment = self.segment(position / SEGMENT_BLOCKS).unwrap_or_default();
        let places = &of_segment[(position % SEGMENT_BLOCKS) as usize..];
        for (place, key) in places.iter().zip(keys) {
            place.store(key.0, Ordering::Relaxed);
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.0.bytes()
    }
}

/// The run of a segment that is nobody's.
const NO_RUN: u32 = u32::MAX;

/// Whose a segment is.
#[derive(Clone, Copy, Default)]
struct Owner {
    run: u32,
    /// Which of the run's segments it is.
    ordinal: u16,
    /// One bit per position that has a name.
    named: u16,
}

struct WriterChunk {
    names: Huge,
    owners: Box<[Owner]>,
    /// Segments in use.
    used: u32,
}

/// What only the writer knows of blocks: their names in engines, whose they are, and which segments are free.
#[derive(Default)]
pub(super) struct Segments {
    chunks: Vec<Option<WriterChunk>>,
    free: Stack,
    /// Those that are not free yet, as there are names that lead to them.
    buried: Buried,
    /// Segments that were ever given out.
    end: u32,
    used: u32,
    /// Chunks that are there.
    there: u32,
    /// Whether segments are free whose chunk is gone.
    has_gone: bool,
}

/// What the columns take a chunk.
const CHUNK_BYTES: usize =
    CHUNK_BLOCKS as usize * size_of::<u64>() * 2 + SEGMENTS_PER_CHUNK as usize * size_of::<Owner>();

impl Segments {
    /// Whether so many more segments can be had.
    pub(super) fn has_room(&self, segments: usize) -> bool {
        (SEGMENTS_MAX - self.used) as usize >= segments
    }

    pub(super) fn allocate(&mut self, keys: &KeyColumn, run: u32, ordinal: u32) -> u32 {
        let segment = self.free.pop().unwrap_or_else(|| {
            self.end += 1;
            self.end - 1
        });
        assert!(segment < SEGMENTS_MAX, "the index has 2^28 positions");
        let number = (segment / SEGMENTS_PER_CHUNK) as usize;
        if number >= self.chunks.len() {
            self.chunks.resize_with(number + 1, || None);
        }
        keys.0.ensure(number, CHUNK_BLOCKS as usize);
        self.there += u32::from(self.chunks[number].is_none());
        let chunk = self.chunks[number].get_or_insert_with(|| WriterChunk {
            names: Huge::new(),
            owners: vec![Owner::default(); SEGMENTS_PER_CHUNK as usize].into(),
            used: 0,
        });
        chunk.used += 1;
        self.used += 1;
        chunk.owners[(segment % SEGMENTS_PER_CHUNK) as usize] = Owner {
            run,
            ordinal: ordinal as u16,
            named: 0,
        };
        segment
    }

    /// Gives a segment back; one that has names left is buried.
    pub(super) fn release(&mut self, segment: u32) {
        if let Some(Some(chunk)) = self.chunks.get_mut((segment / SEGMENTS_PER_CHUNK) as usize) {
            let owner = &mut chunk.owners[(segment % SEGMENTS_PER_CHUNK) as usize];
            owner.run = NO_RUN;
            let named = std::mem::take(&mut owner.named);
            if named == 0 {
                self.free(segment);
            } else {
                self.buried.add(segment, named.count_ones());
            }
        }
    }

    fn free(&mut self, segment: u32) {
        if let Some(Some(chunk)) = self.chunks.get_mut((segment / SEGMENTS_PER_CHUNK) as usize) {
            chunk.used -= 1;
            self.used -= 1;
            self.free.push(segment);
        }
    }

    pub(super) const fn buried(&self) -> &Buried {
        &self.buried
    }

    /// A sweep begins, of what is buried now.
    pub(super) fn begin_sweep(&mut self) {
        self.buried.begin();
    }

    /// Frees what was buried when the sweep began: no name leads there any more.
    pub(super) fn end_sweep(&mut self) {
        for segment in self.buried.end() {
            self.free(segment);
        }
    }

    fn owner(&self, segment: u32) -> Owner {
        let chunk = self.chunks.get((segment / SEGMENTS_PER_CHUNK) as usize);
        chunk
            .and_then(Option::as_ref)
            .map_or_else(Owner::default, |chunk| {
                chunk.owners[(segment % SEGMENTS_PER_CHUNK) as usize]
            })
    }

    /// The run of a position, and which of its blocks it is.
    pub(super) fn place(&self, position: u32) -> (u32, u32) {
        let owner = self.owner(position / SEGMENT_BLOCKS);
        let offset = u32::from(owner.ordinal) * SEGMENT_BLOCKS + position % SEGMENT_BLOCKS;
        (owner.run, offset)
    }

    /// Whether a position is some run's.
    pub(super) fn is_owned(&self, position: u32) -> bool {
        let segment = position / SEGMENT_BLOCKS;
        let chunk = self.chunks.get((segment / SEGMENTS_PER_CHUNK) as usize);
        chunk.is_some_and(Option::is_some) && self.owner(segment).run != NO_RUN
    }

    /// Whether a position has this name, of those that names lead to.
    #[inline]
    pub(super) fn is_named(&self, position: u32, name: u64) -> bool {
        self.raw_name(position) == name && !self.buried.contains(position / SEGMENT_BLOCKS)
    }

    /// The names of a segment's positions, and which of them have one, a bit each.
    #[inline]
    pub(super) fn names(&self, segment: u32) -> (&[u64], u16) {
        let Some(Some(chunk)) = self.chunks.get((segment / SEGMENTS_PER_CHUNK) as usize) else {
            return (&[], 0);
        };
        let of_chunk = (segment % SEGMENTS_PER_CHUNK) as usize;
        let start = of_chunk * SEGMENT_BLOCKS as usize;
        (
            &chunk.names.elements()[start..start + SEGMENT_BLOCKS as usize],
            chunk.owners[of_chunk].named,
        )
    }

    /// Writes names of positions of a segment, from one of them on, that are still to be given with [`Self::give_names`].
    pub(super) fn write_names(&mut self, position: u32, names: &[EngineHash]) {
        let chunk = self.chunks.get_mut((position / CHUNK_BLOCKS) as usize);
        if let Some(chunk) = chunk.and_then(Option::as_mut) {
            let start = (position % CHUNK_BLOCKS) as usize;
            let places = &mut chunk.names.elements_mut()[start..start + names.len()];
            for (place, name) in places.iter_mut().zip(names) {
                *place = name.0;
            }
        }
    }

    /// Gives so many positions of a segment the names that were written.
    pub(super) fn give_names(&mut self, position: u32, count: u32) {
        let chunk = self.chunks.get_mut((position / CHUNK_BLOCKS) as usize);
        if let Some(chunk) = chunk.and_then(Option::as_mut) {
            let segment = (position / SEGMENT_BLOCKS % SEGMENTS_PER_CHUNK) as usize;
            let given = ((1_u32 << count) - 1) << (position % SEGMENT_BLOCKS);
            chunk.owners[segment].named |= given as u16;
        }
    }

    /// A position's name; what it is when the position has none is unknown.
    #[inline]
    pub(super) fn raw_name(&self, position: u32) -> u64 {
        let chunk = self.chunks.get((position / CHUNK_BLOCKS) as usize);
        chunk.and_then(Option::as_ref).map_or(0, |chunk| {
            *chunk.names.element((position % CHUNK_BLOCKS) as usize)
        })
    }

    #[inline]
    pub(super) fn name(&self, position: u32) -> Option<EngineHash> {
        let named = self.owner(position / SEGMENT_BLOCKS).named;
        (named & bit(position) != 0).then(|| EngineHash(self.raw_name(position)))
    }

    pub(super) fn set_name(&mut self, position: u32, name: Option<EngineHash>) {
        let chunk = self.chunks.get_mut((position / CHUNK_BLOCKS) as usize);
        let Some(chunk) = chunk.and_then(Option::as_mut) else {
            return;
        };
        let segment = (position / SEGMENT_BLOCKS % SEGMENTS_PER_CHUNK) as usize;
        let named = &mut chunk.owners[segment].named;
        match name {
            Some(name) => {
                *named |= bit(position);
                *chunk.names.element_mut((position % CHUNK_BLOCKS) as usize) = name.0;
            }
            None => *named &= !bit(position),
        }
    }

    /// Takes the names of some of a segment's positions away; they are appended to `taken`, with the positions.
    pub(super) fn take_names(
        &mut self,
        segment: u32,
        (from, to): (u32, u32),
        taken: &mut Vec<(u64, u32)>,
    ) {
        let chunk = self.chunks.get_mut((segment / SEGMENTS_PER_CHUNK) as usize);
        let Some(chunk) = chunk.and_then(Option::as_mut) else {
            return;
        };
        let of_chunk = (segment % SEGMENTS_PER_CHUNK) as usize;
        let names = &chunk.names.elements()[of_chunk * SEGMENT_BLOCKS as usize..];
        let named = &mut chunk.owners[of_chunk].named;
        for (place, name) in (from..to).zip(&names[from as usize..to as usize]) {
            if *named & bit(place) != 0 {
                taken.push((*name, segment * SEGMENT_BLOCKS + place));
            }
            *named &= !bit(place);
        }
    }

    /// Whether giving empty chunks back is worth it.
    pub(super) fn has_empty_chunks(&self) -> bool {
        let in_use = self
            .chunks
            .iter()
            .flatten()
            .filter(|chunk| chunk.used > 0)
            .count();
        in_use < self.there as usize
    }

    /// Gives chunks back in which no segment is used.
    pub(super) fn trim(&mut self, keys: &mut KeyColumn) {
        let mut is_gone = vec![false; self.chunks.len()];
        for (number, chunk) in self.chunks.iter_mut().enumerate() {
            if chunk.as_ref().is_some_and(|chunk| chunk.used == 0) {
                *chunk = None;
                self.there -= 1;
                keys.0.take(number);
                is_gone[number] = true;
            }
        }
        // The segments of what is gone stay on the free list: whoever takes one makes its chunk anew.
        if self.used == 0 {
            self.free = Stack::default();
            self.end = 0;
            self.has_gone = false;
        } else {
            let (kept, gone): (Stack, Stack) = std::mem::take(&mut self.free)
                .into_iter()
                .partition(|segment| !is_gone[(segment / SEGMENTS_PER_CHUNK) as usize]);
            // Those that are there are taken first.
            self.has_gone = !gone.is_empty();
            self.free = gone;
            self.free.extend(kept);
        }
    }

    /// How many bytes more both columns take when so many more segments are given out, at most.
    pub(super) fn growth(&self, segments: usize) -> usize {
        let mut left = self.there * SEGMENTS_PER_CHUNK - self.used;
        if self.has_gone {
            // Those whose chunk is gone come before those that were never given out.
            left -= (SEGMENTS_PER_CHUNK - self.end % SEGMENTS_PER_CHUNK).min(left);
        }
        let lacking = segments.saturating_sub(left as usize);
        lacking.div_ceil(SEGMENTS_PER_CHUNK as usize) * CHUNK_BYTES
    }

    pub(super) fn bytes(&self) -> usize {
        let of_chunk = CHUNK_BLOCKS as usize * size_of::<u64>()
            + SEGMENTS_PER_CHUNK as usize * size_of::<Owner>();
        self.there as usize * of_chunk + self.free.bytes() + self.buried.bytes()
    }
}

fn bit(position: u32) -> u16 {
    1 << (position % SEGMENT_BLOCKS)
}
