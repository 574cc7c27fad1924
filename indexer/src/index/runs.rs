//! Runs: blocks in the order of their chain, and who holds which of them.
//!
//! A run's header has a version, even while the run stands still. The writer makes it odd before the first change of an
//! event and even after the last one; a reader that has seen the same even version before and after knows that what it
//! read in between was there at one moment. Everything in here must therefore bear garbage.

use kvcache_core::IndexKey;

use super::arena::{Chunks, WordLists, Words, get, room, set};
use super::blocks::{SEGMENT_BITS, SEGMENT_BLOCKS};
use super::sets::SetId;
use crate::sync::{AtomicU32, CHUNK_BITS, CHUNKS_BITS, Ordering, fence};

/// The most blocks of a run; a longer chain goes on in another one.
pub(super) const RUN_BLOCKS_MAX: u32 = 4096;

const RUNS_PER_CHUNK: u32 = 1 << CHUNK_BITS;
const CHUNKS_MAX: u32 = 1 << CHUNKS_BITS;
/// The most runs.
pub(super) const RUNS_MAX: u32 = RUNS_PER_CHUNK * CHUNKS_MAX;

const SPANS_INLINE: u32 = 3;
const SEGMENTS_INLINE: u32 = 18;

// The words of a header.
const VERSION: usize = 0;
const BLOCKS: usize = 1;
const SPANS: usize = 2;
/// The list of all spans when they are more than fit inline.
const SPANS_AT: usize = 3;
const SPANS_ROOM: usize = 4;
/// The list of the segments that do not fit inline.
const SEGMENTS_AT: usize = 5;
const SEGMENTS_ROOM: usize = 6;
/// The number of the chain's root plus one, and flags.
const ROOT: usize = 7;
const SPANS_START: usize = 8;
const SEGMENTS_START: usize = SPANS_START + 2 * SPANS_INLINE as usize;
const HEADER_WORDS: usize = SEGMENTS_START + SEGMENTS_INLINE as usize;

const _: () = assert!(HEADER_WORDS == 32);

/// The order of the blocks was told, not hashed: equality of keys says nothing of those before.
const IS_TOLD: u32 = 1 << 31;
/// Blocks other than the first are found by their keys too.
const HAS_DOORS: u32 = 1 << 30;
/// The blocks are apart from those of main groups.
const IS_APART: u32 = 1 << 29;
const ROOT_MASK: u32 = IS_APART - 1;

/// What readers see of a run.
#[derive(Default)]
#[repr(align(128))]
pub(super) struct Header([AtomicU32; HEADER_WORDS]);

/// Blocks up to `end`, from the span before, that have the same holders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) end: u32,
    pub(super) set: SetId,
}

/// The bits of a word that are the segment; the others are its [`digest`].
const SEGMENT_MASK: u32 = (1 << SEGMENT_BITS) - 1;

/// What is kept of a segment's last key beside the segment.
#[inline]
pub(super) const fn digest(key: IndexKey) -> u32 {
    (key.0 >> 32) as u32 & !SEGMENT_MASK
}

impl Header {
    /// The version, when the run stands still.
    #[inline]
    pub(super) fn version(&self) -> Option<u32> {
        let version = self.0[VERSION].load(Ordering::Acquire);
        (version & 1 == 0).then_some(version)
    }

    /// Whether nothing has changed since; what was read before is looked at before.
    #[inline]
    pub(super) fn is_still(&self, version: u32) -> bool {
        self.0[VERSION].load(Ordering::Relaxed) == version
    }

    /// Turns readers away; false when they are already.
    pub(super) fn close(&self) -> bool {
        let version = get(&self.0[VERSION]);
        if version & 1 == 1 {
            return false;
        }
        set(&self.0[VERSION], version.wrapping_add(1));
        fence(Ordering::Release);
        true
    }

    /// Lets readers in again.
    pub(super) fn open(&self) {
        let version = get(&self.0[VERSION]);
        self.0[VERSION].store(version.wrapping_add(1), Ordering::Release);
    }

    #[inline]
    pub(super) fn blocks(&self) -> u32 {
        get(&self.0[BLOCKS]).min(RUN_BLOCKS_MAX)
    }

    pub(super) fn set_blocks(&self, blocks: u32) {
        set(&self.0[BLOCKS], blocks);
    }

    #[inline]
    pub(super) fn is_told(&self) -> bool {
        get(&self.0[ROOT]) & IS_TOLD != 0
    }

    pub(super) fn set_told(&self) {
        set(&self.0[ROOT], get(&self.0[ROOT]) | IS_TOLD);
    }

    pub(super) fn has_doors(&self) -> bool {
        get(&self.0[ROOT]) & HAS_DOORS != 0
    }

    pub(super) fn set_doors(&self) {
        set(&self.0[ROOT], get(&self.0[ROOT]) | HAS_DOORS);
    }

    pub(super) fn is_apart(&self) -> bool {
        get(&self.0[ROOT]) & IS_APART != 0
    }

    pub(super) fn set_apart(&self) {
        set(&self.0[ROOT], get(&self.0[ROOT]) | IS_APART);
    }

    /// The root of the chain, once somebody has said which.
    pub(super) fn root(&self) -> Option<u32> {
        (get(&self.0[ROOT]) & ROOT_MASK).checked_sub(1)
    }

    pub(super) fn set_root(&self, root: u32) {
        assert!(root + 1 < ROOT_MASK, "the index has 2^29 roots");
        set(&self.0[ROOT], get(&self.0[ROOT]) & !ROOT_MASK | (root + 1));
    }

    /// The segment of some blocks; none when torn.
    #[inline]
    pub(super) fn segment(&self, words: &Words, ordinal: u32) -> Option<u32> {
        Some(get(self.segment_word(words, ordinal)?) & SEGMENT_MASK)
    }

    /// How many full segments in a row, from one on, have last keys that seem to be those asked for; none when torn.
    #[inline]
    pub(super) fn alike(
        &self,
        words: &Words,
        first: u32,
        last_keys: impl ExactSizeIterator<Item = IndexKey>,
    ) -> Option<u32> {
        let end = first as usize + last_keys.len();
        let inline_end = end.min(SEGMENTS_INLINE as usize);
        let inline = SEGMENTS_START + (first as usize).min(inline_end)..SEGMENTS_START + inline_end;
        let listed = match end.checked_sub(SEGMENTS_INLINE as usize) {
            None | Some(0) => &[],
            Some(listed) => words
                .list(get(&self.0[SEGMENTS_AT]), listed)?
                .get((first as usize).saturating_sub(SEGMENTS_INLINE as usize)..)?,
        };
        let told = self.0.get(inline)?.iter().chain(listed);
        let is_alike =
            |(word, key): &(&AtomicU32, IndexKey)| get(word) & !SEGMENT_MASK == digest(*key);
        Some(told.zip(last_keys).take_while(is_alike).count() as u32)
    }

    #[inline]
    fn segment_word<'a>(&'a self, words: &'a Words, ordinal: u32) -> Option<&'a AtomicU32> {
        if ordinal < SEGMENTS_INLINE {
            return self.0.get(SEGMENTS_START + ordinal as usize);
        }
        let list = get(&self.0[SEGMENTS_AT]);
        let place = (ordinal - SEGMENTS_INLINE) as usize;
        words.list(list, place + 1)?.get(place)
    }

    /// Notes the last key of a segment that has become full, so that lookups skip it without reading it.
    pub(super) fn set_digest(&self, words: &Words, ordinal: u32, key: IndexKey) {
        if let Some(word) = self.segment_word(words, ordinal) {
            set(word, get(word) & SEGMENT_MASK | digest(key));
        }
    }

    #[inline]
    pub(super) fn spans(&self) -> u32 {
        get(&self.0[SPANS]).min(RUN_BLOCKS_MAX)
    }

    /// The spans' words, two each; none when torn.
    #[inline]
    pub(super) fn span_words<'a>(&'a self, words: &'a Words) -> Option<&'a [AtomicU32]> {
        let count = self.spans();
        if count <= SPANS_INLINE {
            return self.0.get(SPANS_START..SPANS_START + 2 * count as usize);
        }
        words.list(get(&self.0[SPANS_AT]), 2 * count as usize)
    }

    pub(super) fn span(&self, words: &Words, position: u32) -> Option<Span> {
        let pair = self.span_words(words)?.get(2 * position as usize..)?;
        (!pair.is_empty()).then(|| read_span(pair))
    }

    /// The first span that ends after a block.
    pub(super) fn span_after(&self, words: &Words, block: u32) -> u32 {
        let pairs = self.span_words(words).unwrap_or_default();
        partition(pairs.len() as u32 / 2, |span| {
            get(&pairs[2 * span as usize]) <= block
        })
    }
}

/// A span out of its two words.
#[inline]
pub(super) fn read_span(pair: &[AtomicU32]) -> Span {
    Span {
        end: get(&pair[0]).min(RUN_BLOCKS_MAX),
        set: SetId::from_raw(get(&pair[1])),
    }
}

/// The first of so many for which `is_before` does not hold.
pub(super) fn partition(count: u32, is_before: impl Fn(u32) -> bool) -> u32 {
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = low.midpoint(high);
        if is_before(middle) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low
}

/// All headers; readers see them.
pub(super) struct Runs(Chunks<Header>);

impl Runs {
    pub(super) fn new() -> Self {
        Self(Chunks::new(CHUNKS_MAX as usize))
    }

    #[inline]
    pub(super) fn get(&self, run: u32) -> Option<&Header> {
        let chunk = self.0.chunk((run / RUNS_PER_CHUNK) as usize)?;
        chunk.get((run % RUNS_PER_CHUNK) as usize)
    }

    pub(super) fn bytes(&self) -> usize {
        self.0.bytes()
    }
}

/// Which runs are free; only the writer has it.
#[derive(Default)]
pub(super) struct RunSlots {
    free: Vec<u32>,
    end: u32,
    used: Vec<u32>,
}

impl RunSlots {
    /// A run without blocks, closed.
    pub(super) fn allocate(&mut self, runs: &Runs) -> u32 {
        let run = self.free.pop().unwrap_or_else(|| {
            self.end += 1;
            self.end - 1
        });
        assert!(run < RUNS_MAX, "the index has 2^26 runs");
        let chunk = (run / RUNS_PER_CHUNK) as usize;
        if chunk >= self.used.len() {
            self.used.resize(chunk + 1, 0);
        }
        self.used[chunk] += 1;
        runs.0.ensure(chunk, RUNS_PER_CHUNK as usize);
        run
    }

    /// All runs are before this one.
    pub(super) fn end(&self) -> u32 {
        self.end
    }

    pub(super) fn release(&mut self, run: u32) {
        self.used[(run / RUNS_PER_CHUNK) as usize] -= 1;
        self.free.push(run);
    }

    /// Whether giving empty chunks back is worth it.
    pub(super) fn has_empty_chunks(&self, runs: &Runs) -> bool {
        let is_there = |chunk: usize| runs.0.chunk(chunk).is_some();
        let mut used = self.used.iter().enumerate();
        used.any(|(chunk, used)| *used == 0 && is_there(chunk))
    }

    /// Gives chunks back in which no run is used.
    pub(super) fn trim(&mut self, runs: &mut Runs) {
        for (chunk, used) in self.used.iter().enumerate() {
            if *used == 0 {
                runs.0.take(chunk);
            }
        }
        if self.used.iter().all(|used| *used == 0) {
            *self = Self::default();
            return;
        }
        // Those whose chunk is there are taken first, from the end.
        let is_there = |run: &u32| runs.0.chunk((*run / RUNS_PER_CHUNK) as usize).is_some();
        self.free.sort_unstable_by_key(is_there);
    }

    /// How many bytes more the headers take when so many more runs begin, at most, `used` being there.
    pub(super) fn growth(&self, runs: &Runs, used: u64, more: usize) -> usize {
        let there = runs.0.elements() as u64;
        let lacking = more.saturating_sub(there.saturating_sub(used) as usize);
        lacking.div_ceil(RUNS_PER_CHUNK as usize) * (RUNS_PER_CHUNK as usize * size_of::<Header>())
    }

    pub(super) fn bytes(&self) -> usize {
        (self.free.capacity() + self.used.capacity()) * size_of::<u32>()
    }
}

impl Header {
    /// Forgets everything but the version; lists must have been released.
    pub(super) fn reset(&self) {
        for word in &self.0[BLOCKS..] {
            set(word, 0);
        }
    }

    /// Appends a segment.
    pub(super) fn push_segment(
        &self,
        words: &Words,
        lists: &mut WordLists,
        ordinal: u32,
        segment: u32,
    ) {
        if ordinal < SEGMENTS_INLINE {
            set(&self.0[SEGMENTS_START + ordinal as usize], segment);
            return;
        }
        let place = ordinal - SEGMENTS_INLINE;
        self.reserve(words, lists, (SEGMENTS_AT, SEGMENTS_ROOM), place, place + 1);
        set(
            &words.known(get(&self.0[SEGMENTS_AT]), place as usize + 1)[place as usize],
            segment,
        );
    }

    /// Gives the lists back.
    pub(super) fn release_lists(&self, lists: &mut WordLists) {
        for (at, room) in [(SPANS_AT, SPANS_ROOM), (SEGMENTS_AT, SEGMENTS_ROOM)] {
            let words = get(&self.0[room]);
            if words > 0 {
                lists.release(get(&self.0[at]), words as usize);
                set(&self.0[room], 0);
                set(&self.0[at], 0);
            }
        }
    }

    /// Makes sure that one of the lists has room for `needed` words, keeping the first `kept`.
    fn reserve(
        &self,
        words: &Words,
        lists: &mut WordLists,
        (at, room_at): (usize, usize),
        kept: u32,
        needed: u32,
    ) {
        let has = get(&self.0[room_at]);
        if needed <= has {
            return;
        }
        let room = room(needed as usize);
        let address = lists.allocate(words, room);
        if has > 0 {
            let old = get(&self.0[at]);
            let from = words.known(old, kept as usize);
            let to = words.known(address, kept as usize);
            to.iter()
                .zip(from)
                .for_each(|(to, from)| set(to, get(from)));
            lists.release(old, has as usize);
        }
        set(&self.0[at], address);
        set(&self.0[room_at], room as u32);
    }

    /// Replaces the spans `first..last` by others.
    pub(super) fn replace_spans(
        &self,
        words: &Words,
        lists: &mut WordLists,
        (first, last): (u32, u32),
        by: &[Span],
    ) {
        let count = self.spans();
        let after = count - (last - first) + by.len() as u32;
        let was_inline = count <= SPANS_INLINE;
        let is_inline = after <= SPANS_INLINE;
        let inline = &self.0[SPANS_START..SEGMENTS_START];
        if was_inline && is_inline {
            splice(inline, count, (first, last), by);
        } else if is_inline {
            // All that is left fits, so it moves back.
            let list = words.known(get(&self.0[SPANS_AT]), 2 * count as usize);
            splice(list, count, (first, last), by);
            for (to, from) in inline.iter().zip(list).take(2 * after as usize) {
                set(to, get(from));
            }
        } else {
            let kept = if was_inline { 0 } else { 2 * count };
            self.reserve(
                words,
                lists,
                (SPANS_AT, SPANS_ROOM),
                kept,
                2 * count.max(after),
            );
            let list = words.known(get(&self.0[SPANS_AT]), 2 * count.max(after) as usize);
            if was_inline {
                for (to, from) in list.iter().zip(inline).take(2 * count as usize) {
                    set(to, get(from));
                }
            }
            splice(list, count, (first, last), by);
        }
        set(&self.0[SPANS], after);
    }
}

/// Replaces pairs of words in a list of `count` pairs that has room for what comes out.
fn splice(list: &[AtomicU32], count: u32, (first, last): (u32, u32), by: &[Span]) {
    let (first, last, count) = (first as usize, last as usize, count as usize);
    let behind = first + by.len();
    let move_pair = |pair: usize| {
        let to = pair - last + behind;
        set(&list[2 * to], get(&list[2 * pair]));
        set(&list[2 * to + 1], get(&list[2 * pair + 1]));
    };
    match behind.cmp(&last) {
        std::cmp::Ordering::Less => (last..count).for_each(move_pair),
        std::cmp::Ordering::Greater => (last..count).rev().for_each(move_pair),
        std::cmp::Ordering::Equal => {}
    }
    for (place, span) in by.iter().enumerate() {
        set(&list[2 * (first + place)], span.end);
        set(&list[2 * (first + place) + 1], span.set.raw());
    }
}

/// The last block's segment, counted from the first.
pub(super) const fn ordinal(block: u32) -> u32 {
    block / SEGMENT_BLOCKS
}
