//! From hashes to positions in as few bytes as that takes; only the writer uses it.
//!
//! An entry is 20 bits of the hash and the 28 of its position; whether it is the right one, the caller says by looking
//! at the position. Ten entries share a cache line. Buckets are chosen by the upper bits of what an entry keeps, so that
//! a table grows by an eighth without looking at a single position, and its pages are all alike, so that growing leaves
//! no holes in memory. There are so many tables that making one anew stays within the nearest cache.
//!
//! Almost all of the time that a search takes is one wait for memory. So whoever searches for many names reads all their
//! lines first, together: see [`Names::touch_all`].

mod bucket;

use self::bucket::{
    BUCKET_ENTRIES, Bucket, COUNTS, EMPTY, LOW_TAG_BITS, POSITION_BITS, POSITION_MASK, REST,
    TABLE_BITS, TAG_BITS, Tag, alike, tags, tags_mut, try_push, used, was_passed,
};
use super::hash::KeyState;
use super::huge::{HUGE_BYTES, Huge};

const PAGE_BUCKETS: u32 = 32;
const CHUNK_PAGES: u32 = HUGE_BYTES as u32 / (PAGE_BUCKETS * size_of::<Bucket>() as u32);
const CHUNK_LINES: u32 = CHUNK_PAGES * PAGE_BUCKETS;

/// How many of a hundred entries are in use where a table grows, and where it shrinks.
const FULL_PERCENT: u32 = 92;
const SPARSE_PERCENT: u32 = 40;
/// A full table grows by about one page in so many: not all tables by the same, so that they are not full at once.
const GROWTH_PART: usize = 8;
/// A table is made anew when one in so many entries has left bits behind.
const STALE_PART: u32 = 4;

/// Where a hash goes that is not there yet.
pub(super) struct Vacancy(Tag);

/// One of the tables that share the hashes.
#[derive(Clone, Default)]
struct Table {
    pages: Vec<u32>,
    entries: u32,
    /// Entries that went past a bucket and are gone.
    stale: u32,
}

/// The first bucket, of so many, that an entry may be in.
#[inline]
fn home(tag: Tag, buckets: u32) -> u32 {
    ((u64::from(tag.bits) * u64::from(buckets)) >> TAG_BITS) as u32
}

/// The one after it.
#[inline]
fn after(bucket: u32, buckets: u32) -> u32 {
    if bucket + 1 == buckets { 0 } else { bucket + 1 }
}

/// With more entries than this so many pages are full.
fn entries_max(pages: usize) -> u32 {
    pages as u32 * PAGE_BUCKETS * BUCKET_ENTRIES as u32 * FULL_PERCENT / 100
}

impl Table {
    #[inline]
    fn buckets(&self) -> u32 {
        self.pages.len() as u32 * PAGE_BUCKETS
    }

    #[inline]
    fn home(&self, tag: Tag) -> u32 {
        home(tag, self.buckets())
    }

    #[inline]
    fn after(&self, bucket: u32) -> u32 {
        after(bucket, self.buckets())
    }

    fn resize(&mut self, pages: &mut Pages, count: usize) {
        while self.pages.len() > count
            && let Some(page) = self.pages.pop()
        {
            pages.release(page);
        }
        self.pages.reserve_exact(count - self.pages.len());
        while self.pages.len() < count {
            self.pages.push(pages.allocate());
        }
    }
}

/// Positions by hashes.
pub(super) struct Names {
    hash: KeyState,
    tables: Vec<Table>,
    pages: Pages,
    /// A table that is being rebuilt.
    scratch: Vec<Bucket>,
    /// What everything takes, as of the last change of that.
    bytes: usize,
}

/// All pages of all tables.
#[derive(Default)]
struct Pages {
    chunks: Vec<Option<Huge>>,
    free: Vec<u32>,
    used: Vec<u32>,
}

impl Pages {
    fn allocate(&mut self) -> u32 {
        if self.free.is_empty() {
            let chunk = self
                .chunks
                .iter()
                .position(Option::is_none)
                .unwrap_or(self.chunks.len());
            if chunk == self.chunks.len() {
                self.chunks.push(None);
                self.used.push(0);
            }
            self.chunks[chunk] = Some(Huge::new());
            let first = chunk as u32 * CHUNK_PAGES;
            self.free.extend((first..first + CHUNK_PAGES).rev());
        }
        let page = self.free.pop().unwrap_or_default();
        self.used[(page / CHUNK_PAGES) as usize] += 1;
        page
    }

    fn release(&mut self, page: u32) {
        self.used[(page / CHUNK_PAGES) as usize] -= 1;
        self.free.push(page);
    }

    fn page(&self, page: u32) -> &[Bucket] {
        let (chunk, first) = Self::place(page, 0);
        let chunk = self.chunks[chunk].as_ref().map(Huge::elements);
        chunk.map_or(&[], |buckets| {
            &buckets[first..first + PAGE_BUCKETS as usize]
        })
    }

    fn page_mut(&mut self, page: u32) -> &mut [Bucket] {
        let (chunk, first) = Self::place(page, 0);
        let chunk = self.chunks[chunk].as_mut().map(Huge::elements_mut);
        chunk.map_or(&mut [], |buckets| {
            &mut buckets[first..first + PAGE_BUCKETS as usize]
        })
    }

    #[inline]
    fn place(page: u32, bucket: u32) -> (usize, usize) {
        let at = (page % CHUNK_PAGES) * PAGE_BUCKETS + bucket % PAGE_BUCKETS;
        ((page / CHUNK_PAGES) as usize, at as usize)
    }

    /// A bucket by its page and its place in that.
    #[inline]
    fn line(&self, line: u32) -> &Bucket {
        match &self.chunks[(line / CHUNK_LINES) as usize] {
            Some(chunk) => chunk.element((line % CHUNK_LINES) as usize),
            None => &EMPTY,
        }
    }

    #[inline]
    fn bucket(&self, table: &Table, bucket: u32) -> &Bucket {
        let (chunk, at) = Self::place(table.pages[(bucket / PAGE_BUCKETS) as usize], bucket);
        match &self.chunks[chunk] {
            Some(chunk) => chunk.element(at),
            None => &EMPTY,
        }
    }

    #[inline]
    fn bucket_mut(&mut self, table: &Table, bucket: u32) -> Option<&mut Bucket> {
        let (chunk, at) = Self::place(table.pages[(bucket / PAGE_BUCKETS) as usize], bucket);
        Some(self.chunks[chunk].as_mut()?.element_mut(at))
    }

    /// The position with this tag for which `is_it` holds, and the bucket it is in.
    #[inline]
    fn find(&self, table: &Table, tag: Tag, is_it: impl Fn(u32) -> bool) -> Option<(u32, u32)> {
        let high = tag.rest(0);
        let mut at = table.home(tag);
        // Of a small table every bucket may have been passed by entries of which some are gone since.
        for _ in 0..table.buckets() {
            let bucket = self.bucket(table, at);
            let mut alike = alike(bucket, tag.low());
            while alike != 0 {
                let rest = bucket[REST + alike.trailing_zeros() as usize % BUCKET_ENTRIES];
                if rest & !POSITION_MASK == high && is_it(rest & POSITION_MASK) {
                    return Some((rest & POSITION_MASK, at));
                }
                alike &= alike - 1;
            }
            if !was_passed(bucket, tag) {
                return None;
            }
            at = table.after(at);
        }
        None
    }

    /// Puts an entry into the first bucket from its home on that has room.
    #[inline]
    fn put(&mut self, table: &Table, tag: Tag, position: u32) {
        let mut at = table.home(tag);
        while let Some(bucket) = self.bucket_mut(table, at) {
            if try_push(bucket, tag, position) {
                return;
            }
            at = table.after(at);
        }
    }
}

impl Names {
    pub(super) fn new() -> Self {
        let mut names = Self {
            hash: KeyState::random(),
            tables: vec![Table::default(); 1 << TABLE_BITS],
            pages: Pages::default(),
            scratch: Vec::new(),
            bytes: 0,
        };
        names.bytes = names.count_bytes();
        names
    }

    /// Where a hash would be, as a line of all pages; none where nothing can be.
    #[inline]
    fn line(&self, hash: u64) -> Option<u32> {
        let tag = Tag::of(self.hash.mix(hash));
        let table = &self.tables[tag.table];
        if table.pages.is_empty() {
            return None;
        }
        let bucket = table.home(tag);
        let page = table.pages[(bucket / PAGE_BUCKETS) as usize];
        Some(page * PAGE_BUCKETS + bucket % PAGE_BUCKETS)
    }

    /// Reads where hashes would be, so that later searches find that in the cache.
    ///
    /// Where they are is worked out first, into `lines`: the loop that then reads is so short that the processor has
    /// dozens of these reads under way, each of which would be a wait of its own.
    pub(super) fn touch_all(&self, hashes: impl Iterator<Item = u64>, lines: &mut Vec<u32>) {
        lines.clear();
        lines.extend(hashes.filter_map(|hash| self.line(hash)));
        // Then the next one for those that are full, as far as it is beside them, and so on.
        while !lines.is_empty() {
            let mut full = 0;
            for place in 0..lines.len() {
                let line = lines[place];
                lines[full] = line + 1;
                let is_full = used(self.pages.line(line)) == BUCKET_ENTRIES;
                full += usize::from(is_full && !(line + 1).is_multiple_of(PAGE_BUCKETS));
            }
            lines.truncate(full);
        }
    }

    /// The position with this hash for which `is_it` holds.
    #[inline]
    pub(super) fn find(&self, hash: u64, is_it: impl Fn(u32) -> bool) -> Option<u32> {
        let tag = Tag::of(self.hash.mix(hash));
        let table = &self.tables[tag.table];
        if table.entries == 0 {
            return None;
        }
        let found = self.pages.find(table, tag, is_it)?;
        Some(found.0)
    }

    /// Where a hash goes that has no position for which `is_it` holds; that position where there is one.
    ///
    /// # Errors
    /// The position.
    #[inline]
    pub(super) fn vacancy(&self, hash: u64, is_it: impl Fn(u32) -> bool) -> Result<Vacancy, u32> {
        let tag = Tag::of(self.hash.mix(hash));
        let table = &self.tables[tag.table];
        if table.entries > 0
            && let Some((position, _)) = self.pages.find(table, tag, is_it)
        {
            return Err(position);
        }
        Ok(Vacancy(tag))
    }

    /// Adds a position where its hash goes.
    #[inline]
    pub(super) fn fill(&mut self, Vacancy(tag): Vacancy, position: u32) {
        assert!(position <= POSITION_MASK, "position {position}");
        let table = &self.tables[tag.table];
        if table.entries >= entries_max(table.pages.len()) {
            let pages = table.pages.len();
            let more = (pages + tag.table % GROWTH_PART) / GROWTH_PART;
            self.rebuild(tag.table, pages + more.max(1));
        }
        let table = &mut self.tables[tag.table];
        table.entries += 1;
        self.pages.put(table, tag, position);
    }

    /// Adds a position; it must not be there with this hash.
    pub(super) fn insert(&mut self, hash: u64, position: u32) {
        self.fill(Vacancy(Tag::of(self.hash.mix(hash))), position);
    }

    /// Removes a position that was added with this hash; without effect when it was not.
    pub(super) fn remove(&mut self, hash: u64, position: u32) {
        let tag = Tag::of(self.hash.mix(hash));
        let table = &mut self.tables[tag.table];
        if table.entries == 0 {
            return;
        }
        let Some((_, at)) = self.pages.find(table, tag, |other| other == position) else {
            return;
        };
        if let Some(bucket) = self.pages.bucket_mut(table, at) {
            let rest = tag.rest(position);
            let last = used(bucket) - 1;
            let is_it =
                |entry: &usize| bucket[REST + entry] == rest && tags(bucket)[*entry] == tag.low();
            let entry = (0..last).find(is_it).unwrap_or(last);
            bucket[REST + entry] = bucket[REST + last];
            let tags = tags_mut(bucket);
            tags[entry] = tags[last];
            bucket[COUNTS] -= 1;
        }
        // Its bits where it went past stay; when too many do, the table is made anew.
        table.stale += u32::from(at != table.home(tag));
        table.entries -= 1;
        let sparse = entries_max(table.pages.len()) / FULL_PERCENT * SPARSE_PERCENT;
        if table.entries == 0 || table.entries < sparse && table.pages.len() > 1 {
            let full = PAGE_BUCKETS * BUCKET_ENTRIES as u32 * FULL_PERCENT / 100;
            let pages = (table.entries * 5 / 4).div_ceil(full) as usize;
            self.rebuild(tag.table, pages);
        } else if table.stale > table.entries / STALE_PART {
            let pages = table.pages.len();
            self.rebuild(tag.table, pages);
        }
    }

    /// Gives a table so many pages. It is made anew in one piece, which is written from its start to its end, as entries
    /// keep their order.
    fn rebuild(&mut self, number: usize, pages: usize) {
        let Self {
            tables,
            pages: memory,
            scratch,
            ..
        } = self;
        let table = &mut tables[number];
        scratch.clear();
        scratch.resize(pages * PAGE_BUCKETS as usize, EMPTY);
        let buckets = scratch.len() as u32;
        // All at once, where the loop below would wait for most of them.
        let lines = table.pages.iter().flat_map(|page| memory.page(*page));
        std::hint::black_box(lines.fold(0, |seen, bucket| seen ^ bucket[COUNTS]));
        for &page in &table.pages {
            for bucket in memory.page(page) {
                let entries = tags(bucket).iter().zip(&bucket[REST..COUNTS]);
                for (low, rest) in entries.take(used(bucket)) {
                    let tag = Tag {
                        table: number,
                        bits: rest >> POSITION_BITS << LOW_TAG_BITS | u32::from(*low),
                    };
                    let mut at = home(tag, buckets);
                    while !try_push(&mut scratch[at as usize], tag, rest & POSITION_MASK) {
                        at = after(at, buckets);
                    }
                }
            }
        }
        table.resize(memory, pages);
        table.stale = 0;
        let made = scratch.chunks_exact(PAGE_BUCKETS as usize);
        for (&page, made) in table.pages.iter().zip(made) {
            memory.page_mut(page).copy_from_slice(made);
        }
        self.bytes = self.count_bytes();
    }

    /// Gives memory back in which nothing is kept.
    pub(super) fn trim(&mut self) {
        let pages = &mut self.pages;
        let used = &pages.used;
        pages
            .free
            .retain(|page| used[(page / CHUNK_PAGES) as usize] > 0);
        pages.free.shrink_to_fit();
        for (chunk, used) in pages.chunks.iter_mut().zip(&pages.used) {
            if *used == 0 {
                *chunk = None;
            }
        }
        self.scratch = Vec::new();
        for table in &mut self.tables {
            table.pages.shrink_to_fit();
        }
        self.bytes = self.count_bytes();
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    fn count_bytes(&self) -> usize {
        let chunks = self.pages.chunks.iter().flatten().count();
        let pages: usize = self.tables.iter().map(|table| table.pages.capacity()).sum();
        chunks * HUGE_BYTES
            + (pages + self.pages.free.capacity()) * size_of::<u32>()
            + self.tables.capacity() * size_of::<Table>()
            + self.scratch.capacity() * size_of::<Bucket>()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// Adds and removes tens of thousands in waves, beside a map; hashes repeat, as engines' may.
    #[test]
    fn what_was_added_is_found_until_it_is_removed() {
        let mut names = Names::new();
        let mut map: HashMap<u64, u32> = HashMap::new();
        let hash_of = |number: u32| u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for wave in 0..6_u32 {
            for number in 0..40_000 {
                let (position, hash) = (wave * 40_000 + number, hash_of(number * (wave + 1)));
                map.entry(hash).or_insert_with(|| {
                    names.insert(hash, position);
                    position
                });
            }
            for number in 0..200_000 {
                let hash = hash_of(number);
                let wanted = map.get(&hash).copied();
                let found = names.find(hash, |position| wanted == Some(position));
                assert_eq!(found, wanted);
            }
            let gone: Vec<u64> = map
                .keys()
                .copied()
                .filter(|hash| hash % 3 != 0 || wave == 5)
                .collect();
            for hash in gone {
                names.remove(hash, map.remove(&hash).unwrap());
            }
        }
        assert!(
            names
                .tables
                .iter()
                .all(|table| table.entries == 0 && table.pages.is_empty())
        );
        names.trim();
        assert!(names.bytes() < 40_000, "{}", names.bytes());
    }

    /// At a million entries the last pages are not full; at ten million an entry takes about seven and a half bytes.
    #[test]
    fn a_million_entries_take_less_than_nine_bytes_each() {
        let mut names = Names::new();
        for number in 0..1_000_000 {
            names.insert(u64::from(number) << 20, number);
        }
        let bytes = names.bytes() - names.scratch.capacity() * size_of::<Bucket>();
        assert!(bytes < 8_500_000, "{bytes}");
    }

    /// One table, always nearly full of entries that come and go, so that every bucket is passed; what was never there is
    /// asked for after each.
    #[test]
    fn a_search_ends_in_a_table_whose_buckets_were_all_passed() {
        let mut names = Names::new();
        let is_of_table = |hash: &u64| Tag::of(names.hash.mix(*hash)).table == 7;
        let hashes: Vec<u64> = (0..2_000_000).filter(is_of_table).collect();
        let (absent, hashes) = hashes.split_at(hashes.len() / 2);
        let kept = entries_max(1) as usize;
        for (position, hash) in (0..).zip(hashes) {
            names.insert(*hash, position);
            if let Some(before) = (position as usize).checked_sub(kept) {
                names.remove(hashes[before], before as u32);
            }
            for absent in absent
                .iter()
                .skip(position as usize % 16)
                .step_by(16)
                .take(32)
            {
                assert_eq!(names.find(*absent, |_| false), None);
            }
        }
    }

    /// Two positions under one hash, as a collision of keys would make them.
    #[test]
    fn equal_hashes_are_told_apart_by_the_caller() {
        let mut names = Names::new();
        names.insert(7, 1);
        names.insert(7, 2);
        assert_eq!(names.find(7, |position| position == 2), Some(2));
        names.remove(7, 1);
        assert_eq!(names.find(7, |_| true), Some(2));
    }
}
