//! Where searches for many hashes begin, worked out for all of them before the first one.

use std::hint::black_box;

use super::bucket::{BUCKET_ENTRIES, COUNTS, Tag, used};
use super::pages::{CHUNK_LINES, PAGE_BUCKETS};
use super::{Names, home};

/// Of so many starts it pays to find out first where the pieces of memory are.
const MANY_STARTS: usize = 64;

/// Where a search begins: what is kept of the hash, and the line of its first bucket.
#[derive(Clone, Copy)]
pub(super) struct Start {
    pub(super) tag: Tag,
    pub(super) line: u32,
}

/// Where searches for some hashes begin, in their order.
#[derive(Default)]
pub(in crate::index) struct Starts {
    starts: Vec<Start>,
    /// The state of the tables that this is true of.
    moves: u32,
    /// Lines after those that are full.
    after: Vec<u32>,
}

impl Starts {
    pub(in crate::index) fn bytes(&self) -> usize {
        self.starts.capacity() * size_of::<Start>() + self.after.capacity() * size_of::<u32>()
    }
}

impl Names {
    #[inline]
    pub(super) fn start(&self, hash: u64) -> Start {
        let tag = Tag::of(self.hash.mix(hash));
        let buckets = self.tables[tag.table()].buckets();
        // Of a table without pages this is a line of another one, or of none.
        let line = self.pages.line(tag.table(), home(tag, buckets));
        Start { tag, line }
    }

    /// Where a search for a hash begins, which was noted in this place.
    #[inline]
    pub(super) fn noted(&self, hash: u64, starts: &Starts, place: usize) -> Start {
        match starts.starts.get(place) {
            Some(start) if starts.moves == self.moves => {
                debug_assert_eq!(start.tag, Tag::of(self.hash.mix(hash)), "hash {place}");
                *start
            }
            _ => self.start(hash),
        }
    }

    /// Reads where hashes would be, so that later searches find that in the cache; each item is some of them.
    ///
    /// Where they are is worked out first: the loop that then reads is so short that the processor has dozens of these
    /// reads under way, each of which would be a wait of its own.
    pub(in crate::index) fn touch_all<Some: Iterator<Item = u64>>(
        &self,
        hashes: impl Iterator<Item = Some>,
        starts: &mut Starts,
    ) {
        let Starts {
            starts,
            moves,
            after,
        } = starts;
        starts.clear();
        *moves = self.moves;
        if self.pages.is_empty() {
            return;
        }
        for some in hashes {
            starts.extend(some.map(|hash| self.start(hash)));
        }
        self.read_all(starts);
        // Then the next one for those that are full, as far as it is beside them.
        after.clear();
        after.resize(starts.len(), 0);
        let mut full = 0;
        for Start { line, .. } in starts {
            after[full] = *line + 1;
            let is_full = used(self.pages.bucket(*line)) == BUCKET_ENTRIES;
            full += usize::from(is_full && !(*line + 1).is_multiple_of(PAGE_BUCKETS));
        }
        let lines = after[..full].iter().map(|line| self.pages.bucket(*line));
        black_box(lines.fold(0, |seen, bucket| seen ^ bucket[COUNTS]));
    }

    /// Reads the lines of many starts. The shorter this loop is, the more of its reads are under way at once: so where the
    /// pieces of memory are is found out before it.
    fn read_all(&self, starts: &[Start]) {
        if starts.len() < MANY_STARTS {
            return;
        }
        if let Some(chunks) = self.pages.chunks() {
            let lines = starts.iter().map(|start| {
                let chunk = chunks[(start.line / CHUNK_LINES) as usize];
                chunk[(start.line % CHUNK_LINES) as usize][COUNTS]
            });
            black_box(lines.fold(0, |seen, counts| seen ^ counts));
        }
    }
}
