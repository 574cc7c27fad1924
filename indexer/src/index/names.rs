//! From hashes to positions in as few bytes as that takes; only the writer uses it.
//!
//! An entry is 20 bits of the hash and the 28 of its position; whether it is the right one, the caller says by looking
//! at the position. Ten entries share a cache line. Buckets are chosen by the upper bits of what an entry keeps, so that
//! a table grows by a fifth without looking at a single position, and its pages are all alike, so that growing leaves no
//! holes in memory.

use super::hash::KeyState;

const BUCKET_ENTRIES: usize = 10;
const PAGE_BUCKETS: u32 = 32;
const CHUNK_PAGES: u32 = 512;
const TABLE_BITS: u32 = 8;
const TAG_BITS: u32 = 20;
const POSITION_BITS: u32 = 28;
const POSITION_MASK: u32 = (1 << POSITION_BITS) - 1;
const LOW_TAG_BITS: u32 = 32 - POSITION_BITS;

/// Entries of full, growing and shrinking tables, in tenths of what fits.
const FULL_TENTHS: u32 = 9;
const SPARSE_TENTHS: u32 = 4;

#[derive(Clone)]
#[repr(align(64))]
struct Bucket {
    /// The upper 16 bits of the tags.
    tags: [u16; BUCKET_ENTRIES],
    /// The lower 4 bits of the tags, then the positions.
    rest: [u32; BUCKET_ENTRIES],
    used: u16,
    /// How many entries went past this bucket because it was full.
    passed: u16,
}

const _: () = assert!(size_of::<Bucket>() == 64);

impl Bucket {
    const EMPTY: Self = Self {
        tags: [0; BUCKET_ENTRIES],
        rest: [0; BUCKET_ENTRIES],
        used: 0,
        passed: 0,
    };

    /// The entries with these upper tag bits, one bit each.
    #[inline]
    fn alike(&self, high: u16) -> u16 {
        // Without branches, so that it is a few vector instructions.
        let mut alike = 0;
        for (entry, tag) in self.tags.iter().enumerate() {
            alike |= u16::from(*tag == high) << entry;
        }
        alike & ((1 << self.used) - 1)
    }
}

/// What a table keeps of a hash.
#[derive(Clone, Copy)]
struct Tag {
    table: usize,
    bits: u32,
}

impl Tag {
    #[inline]
    const fn of(hash: u64) -> Self {
        Self {
            table: (hash >> (64 - TABLE_BITS)) as usize,
            bits: (hash >> (64 - TABLE_BITS - TAG_BITS)) as u32 & ((1 << TAG_BITS) - 1),
        }
    }

    const fn high(self) -> u16 {
        (self.bits >> LOW_TAG_BITS) as u16
    }

    const fn rest(self, position: u32) -> u32 {
        self.bits << POSITION_BITS | position
    }
}

/// One of the tables that share the hashes.
#[derive(Clone, Default)]
struct Table {
    pages: Vec<u32>,
    entries: u32,
}

impl Table {
    fn buckets(&self) -> u32 {
        self.pages.len() as u32 * PAGE_BUCKETS
    }

    fn home(&self, tag: Tag) -> u32 {
        ((u64::from(tag.bits) * u64::from(self.buckets())) >> TAG_BITS) as u32
    }

    fn after(&self, bucket: u32) -> u32 {
        if bucket + 1 == self.buckets() {
            0
        } else {
            bucket + 1
        }
    }
}

/// Positions by hashes.
pub(super) struct Names {
    hash: KeyState,
    tables: Vec<Table>,
    pages: Pages,
    /// Entries of a table that is being rebuilt.
    scratch: Vec<(u32, u32)>,
    /// What everything takes, as of the last change of that.
    bytes: usize,
}

/// All pages of all tables.
#[derive(Default)]
struct Pages {
    chunks: Vec<Option<Box<[Bucket]>>>,
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
            let buckets = (CHUNK_PAGES * PAGE_BUCKETS) as usize;
            self.chunks[chunk] = Some(vec![Bucket::EMPTY; buckets].into());
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

    #[inline]
    fn place(page: u32, bucket: u32) -> (usize, usize) {
        let at = (page % CHUNK_PAGES) * PAGE_BUCKETS + bucket % PAGE_BUCKETS;
        ((page / CHUNK_PAGES) as usize, at as usize)
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

    #[inline]
    fn bucket(&self, table: &Table, bucket: u32) -> &Bucket {
        let (chunk, at) = Pages::place(table.pages[(bucket / PAGE_BUCKETS) as usize], bucket);
        match &self.pages.chunks[chunk] {
            Some(buckets) => &buckets[at],
            None => &Bucket::EMPTY,
        }
    }

    fn bucket_mut<'a>(pages: &'a mut Pages, table: &Table, bucket: u32) -> Option<&'a mut Bucket> {
        let (chunk, at) = Pages::place(table.pages[(bucket / PAGE_BUCKETS) as usize], bucket);
        pages.chunks[chunk].as_mut()?.get_mut(at)
    }

    /// Reads where a hash would be, so that a later search finds it in the cache; several in a row overlap.
    #[inline]
    pub(super) fn touch(&self, hash: u64) -> u16 {
        let tag = Tag::of(self.hash.mix(hash));
        let table = &self.tables[tag.table];
        if table.pages.is_empty() {
            return 0;
        }
        self.bucket(table, table.home(tag)).used
    }

    /// The position with this hash for which `is_it` holds.
    #[inline]
    pub(super) fn find(&self, hash: u64, is_it: impl Fn(u32) -> bool) -> Option<u32> {
        let tag = Tag::of(self.hash.mix(hash));
        let table = &self.tables[tag.table];
        if table.entries == 0 {
            return None;
        }
        let (high, low) = (tag.high(), tag.rest(0));
        let mut at = table.home(tag);
        loop {
            let bucket = self.bucket(table, at);
            let mut alike = bucket.alike(high);
            while alike != 0 {
                let rest = bucket.rest[alike.trailing_zeros() as usize % BUCKET_ENTRIES];
                if rest & !POSITION_MASK == low && is_it(rest & POSITION_MASK) {
                    return Some(rest & POSITION_MASK);
                }
                alike &= alike - 1;
            }
            if bucket.passed == 0 {
                return None;
            }
            at = table.after(at);
        }
    }

    /// Adds a position; it must not be there with this hash.
    pub(super) fn insert(&mut self, hash: u64, position: u32) {
        assert!(position <= POSITION_MASK, "position {position}");
        let tag = Tag::of(self.hash.mix(hash));
        let table = &self.tables[tag.table];
        if table.entries >= table.buckets() * FULL_TENTHS * BUCKET_ENTRIES as u32 / 10 {
            let pages = table.pages.len();
            self.rebuild(tag.table, pages + (pages / 5).max(1));
        }
        let table = &mut self.tables[tag.table];
        table.entries += 1;
        put(&mut self.pages, table, tag, position);
    }

    /// Removes a position that was added with this hash; without effect when it was not.
    pub(super) fn remove(&mut self, hash: u64, position: u32) {
        let tag = Tag::of(self.hash.mix(hash));
        let table = &self.tables[tag.table];
        if table.entries == 0 {
            return;
        }
        let home = table.home(tag);
        let mut at = home;
        let entry = loop {
            let bucket = self.bucket(table, at);
            let used = usize::from(bucket.used).min(BUCKET_ENTRIES);
            let rest = tag.rest(position);
            let found = (0..used)
                .find(|entry| bucket.rest[*entry] == rest && bucket.tags[*entry] == tag.high());
            match found {
                Some(entry) => break entry,
                None if bucket.passed == 0 => return,
                None => at = table.after(at),
            }
        };
        if let Some(bucket) = Self::bucket_mut(&mut self.pages, table, at) {
            bucket.used -= 1;
            let last = usize::from(bucket.used);
            (bucket.tags[entry], bucket.rest[entry]) = (bucket.tags[last], bucket.rest[last]);
        }
        let mut passed = home;
        while passed != at {
            if let Some(bucket) = Self::bucket_mut(&mut self.pages, table, passed) {
                bucket.passed -= 1;
            }
            passed = table.after(passed);
        }
        let table = &mut self.tables[tag.table];
        table.entries -= 1;
        let sparse = table.buckets() * SPARSE_TENTHS * BUCKET_ENTRIES as u32 / 10;
        if table.entries == 0 || table.entries < sparse && table.pages.len() > 1 {
            let full = PAGE_BUCKETS * FULL_TENTHS * BUCKET_ENTRIES as u32 / 10;
            let pages = (table.entries * 5 / 4).div_ceil(full) as usize;
            self.rebuild(tag.table, pages);
        }
    }

    fn rebuild(&mut self, number: usize, pages: usize) {
        let table = &mut self.tables[number];
        let scratch = &mut self.scratch;
        scratch.clear();
        for &page in &table.pages {
            let (chunk, first) = Pages::place(page, 0);
            let Some(buckets) = &mut self.pages.chunks[chunk] else {
                continue;
            };
            for bucket in &mut buckets[first..first + PAGE_BUCKETS as usize] {
                for entry in 0..usize::from(bucket.used).min(BUCKET_ENTRIES) {
                    let (high, rest) = (bucket.tags[entry], bucket.rest[entry]);
                    let bits = u32::from(high) << LOW_TAG_BITS | rest >> POSITION_BITS;
                    scratch.push((bits, rest & POSITION_MASK));
                }
                (bucket.used, bucket.passed) = (0, 0);
            }
        }
        while table.pages.len() > pages {
            if let Some(page) = table.pages.pop() {
                self.pages.release(page);
            }
        }
        table.pages.reserve_exact(pages - table.pages.len());
        while table.pages.len() < pages {
            table.pages.push(self.pages.allocate());
        }
        for &(bits, position) in scratch.iter() {
            put(
                &mut self.pages,
                table,
                Tag {
                    table: number,
                    bits,
                },
                position,
            );
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
        chunks * (CHUNK_PAGES * PAGE_BUCKETS) as usize * size_of::<Bucket>()
            + (pages + self.pages.free.capacity()) * size_of::<u32>()
            + self.tables.capacity() * size_of::<Table>()
            + self.scratch.capacity() * size_of::<(u32, u32)>()
    }
}

/// Puts an entry into the first bucket from its home on that has room.
#[inline]
fn put(pages: &mut Pages, table: &Table, tag: Tag, position: u32) {
    let mut at = table.home(tag);
    while let Some(bucket) = Names::bucket_mut(pages, table, at) {
        let used = usize::from(bucket.used);
        if used < BUCKET_ENTRIES {
            bucket.tags[used] = tag.high();
            bucket.rest[used] = tag.rest(position);
            bucket.used += 1;
            return;
        }
        assert!(
            bucket.passed < u16::MAX,
            "a table of names is out of balance"
        );
        bucket.passed += 1;
        at = table.after(at);
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

    /// A million entries take less than eight bytes each where they are many.
    #[test]
    fn entries_take_about_eight_bytes() {
        let mut names = Names::new();
        for number in 0..1_000_000 {
            names.insert(u64::from(number) << 20, number);
        }
        let bytes = names.bytes() - names.scratch.capacity() * 8;
        assert!(bytes < 8_400_000, "{bytes}");
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
