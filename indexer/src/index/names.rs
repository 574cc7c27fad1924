//! From hashes to positions in as few bytes as that takes; only the writer uses it.
//!
//! An entry is 20 bits of the hash and the 28 of its position; whether it is the right one, the caller says by looking
//! at the position. Ten entries share a cache line. Buckets are chosen by the upper bits of what an entry keeps, so that
//! a table grows without looking at a single position, and its pages are all alike, so that growing leaves no holes in
//! memory. There are so many tables that making one anew stays within the nearest cache.
//!
//! Almost all of the time that a search takes is one wait for memory. So whoever searches for many names reads all their
//! lines first, together: see [`Names::touch_all`].
//!
//! Full tables take long to add to and have to be made anew often. So they are kept loose while names come, and made
//! tight once hardly any more come ([`Names::tighten_some`]); where bytes are bounded, always tight.

mod bucket;
mod pages;
mod starts;
mod sweep;
#[cfg(test)]
mod tests;

use std::hint::black_box;

use self::bucket::{
    BUCKET_ENTRIES, Bucket, COUNTS, EMPTY, LOW_TAG_BITS, POSITION_BITS, POSITION_MASK, REST,
    TABLE_BITS, TAG_BITS, Tag, alike, entry_of, is_unknown, tags, take, try_push, used, was_passed,
};
use self::pages::{PAGE_BUCKETS, Pages};
use self::starts::Start;
pub(super) use self::starts::Starts;
use super::hash::KeyState;

const TABLES: usize = 1 << TABLE_BITS;
const PAGE_ENTRIES: u32 = PAGE_BUCKETS * BUCKET_ENTRIES as u32;

/// Of a hundred entries so many are in use where a table shrinks.
const SPARSE_PERCENT: u32 = 40;
/// A table is made anew when one in so many entries has left bits behind.
const STALE_PART: u32 = 4;
/// One page in so many that a table could do without makes it loose.
const LOOSE_PART: u32 = 16;
/// Entries come to a table when one in so many has come since it was looked at.
const BUSY_PART: u32 = 64;
/// So many tables are looked at in a row.
const TABLES_A_TURN: usize = 32;

/// When tables grow, and by how much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fit {
    /// Late and by little, for the least memory.
    Tight,
    /// Early and by much, for the least time.
    Loose,
}

impl Fit {
    /// How many of a hundred entries are in use where a table grows.
    const fn full_percent(self) -> u32 {
        match self {
            Self::Tight => 92,
            Self::Loose => 75,
        }
    }

    /// A full table grows by about one page in so many: not all tables by the same, so that they are not full at once.
    const fn growth_part(self) -> u32 {
        match self {
            Self::Tight => 8,
            Self::Loose => 1,
        }
    }

    /// With so many entries so many pages are full.
    const fn entries_max(self, pages: u32) -> u32 {
        pages * PAGE_ENTRIES * self.full_percent() / 100
    }

    /// So many entries need so many pages, with room for a quarter more until they are full.
    const fn pages_for(self, entries: u32) -> u32 {
        (entries * 5 / 4).div_ceil(self.entries_max(1))
    }
}

/// Where a hash goes that is not there yet; good until anything changes.
pub(super) struct Vacancy {
    tag: Tag,
    /// The bucket where the search for it ended, and where that is.
    bucket: u32,
    line: u32,
}

/// One of the tables that share the hashes.
#[derive(Clone, Copy, Default)]
struct Table {
    pages: u32,
    entries: u32,
    /// With so many entries it is full.
    entries_max: u32,
    /// Entries that went past a bucket and are gone.
    stale: u32,
    /// How many entries it had when it was last looked at.
    looked: u32,
}

impl Table {
    const fn buckets(self) -> u32 {
        self.pages * PAGE_BUCKETS
    }

    /// How many pages it needs, when it has many more.
    fn tight(self) -> Option<u32> {
        let pages = (self.entries + 1).div_ceil(Fit::Tight.entries_max(1));
        let is_loose = self.entries > 0 && pages + pages.div_ceil(LOOSE_PART) <= self.pages;
        is_loose.then_some(pages)
    }
}

/// The first bucket, of so many, that an entry may be in.
#[inline]
fn home(tag: Tag, buckets: u32) -> u32 {
    ((u64::from(tag.bits()) * u64::from(buckets)) >> TAG_BITS) as u32
}

/// The one after it.
#[inline]
const fn after(bucket: u32, buckets: u32) -> u32 {
    if bucket + 1 == buckets { 0 } else { bucket + 1 }
}

/// Positions by hashes.
pub(super) struct Names {
    hash: KeyState,
    fit: Fit,
    tables: Box<[Table; TABLES]>,
    pages: Pages,
    /// A table that is being made anew.
    scratch: Vec<Bucket>,
    /// What everything takes, as of the last change of that.
    bytes: usize,
    /// Whether a table may be loose.
    is_loose: bool,
    /// The next one to be looked at.
    next: usize,
    /// The next one to be swept.
    swept: usize,
    /// Changes whenever an entry may have got another line to begin at.
    moves: u32,
}

/// The entry with this tag for whose position `is_it` holds, among those that seem to be alike.
fn exact(
    bucket: &Bucket,
    tag: Tag,
    alike: [u64; 3],
    is_it: &impl Fn(u32) -> bool,
) -> Option<usize> {
    for (word, mut alike) in alike.into_iter().enumerate() {
        while alike != 0 {
            let entry = entry_of(word, alike);
            let position = bucket[REST + entry] & POSITION_MASK;
            let is_tag = tags(bucket)[entry] == tag.low();
            if is_tag
                && entry < used(bucket)
                && bucket[REST + entry] == tag.rest(position)
                && is_it(position)
            {
                return Some(entry);
            }
            alike &= alike - 1;
        }
    }
    None
}

/// Where an entry is.
struct Place {
    tag: Tag,
    /// Whether it is in the first bucket where it may be.
    is_home: bool,
    line: u32,
    entry: usize,
    position: u32,
}

/// How a search ended.
enum Found {
    At(Place),
    Nowhere(Vacancy),
}

impl Names {
    pub(super) fn new(fit: Fit) -> Self {
        let mut names = Self {
            hash: KeyState::random(),
            fit,
            tables: Box::new([Table::default(); TABLES]),
            pages: Pages::default(),
            scratch: Vec::new(),
            bytes: 0,
            is_loose: false,
            next: 0,
            swept: 0,
            moves: 0,
        };
        names.bytes = names.count_bytes();
        names
    }

    /// Searches for a position with this tag for which `is_it` holds.
    #[inline]
    fn search(&self, start: Start, is_it: impl Fn(u32) -> bool) -> Found {
        let Start { tag, mut line } = start;
        let buckets = self.tables[tag.table()].buckets();
        let mut bucket = home(tag, buckets);
        // Of a small table every bucket may have been passed by entries of which some are gone since.
        for _ in 0..buckets {
            let content = self.pages.bucket(line);
            let alike = alike(content, tag.low());
            if alike != [0; 3]
                && let Some(entry) = exact(content, tag, alike, &is_it)
            {
                return Found::At(Place {
                    tag,
                    is_home: line == start.line,
                    line,
                    entry,
                    position: content[REST + entry] & POSITION_MASK,
                });
            }
            if !was_passed(content, tag) {
                break;
            }
            bucket = after(bucket, buckets);
            line = self.pages.line(tag.table(), bucket);
        }
        Found::Nowhere(Vacancy { tag, bucket, line })
    }

    /// The position with this hash for which `is_it` holds.
    #[inline]
    pub(super) fn find(&self, hash: u64, is_it: impl Fn(u32) -> bool) -> Option<u32> {
        match self.search(self.start(hash), is_it) {
            Found::At(place) => Some(place.position),
            Found::Nowhere(_) => None,
        }
    }

    /// Where a hash goes that has no position for which `is_it` holds; where its search begins may be noted in a place.
    #[inline]
    pub(super) fn vacancy(
        &self,
        hash: u64,
        noted: (&Starts, usize),
        is_it: impl Fn(u32) -> bool,
    ) -> Option<Vacancy> {
        let start = self.noted(hash, noted.0, noted.1);
        match self.search(start, is_it) {
            Found::At(_) => None,
            Found::Nowhere(vacancy) => Some(vacancy),
        }
    }

    /// Adds a position under a hash that has none for which `is_it` holds; false when it has one. As
    /// [`Self::vacancy`] and [`Self::fill`], but mostly with one look at one bucket.
    #[inline]
    pub(super) fn add(
        &mut self,
        hash: u64,
        noted: (&Starts, usize),
        position: u32,
        is_it: impl Fn(u32) -> bool,
    ) -> bool {
        let start = self.noted(hash, noted.0, noted.1);
        let tag = start.tag;
        let table = &mut self.tables[tag.table()];
        if table.entries + 1 < table.entries_max
            && let Some(bucket) = self.pages.bucket_mut(start.line)
            && is_unknown(bucket, tag)
            && try_push(bucket, tag, position)
        {
            table.entries += 1;
            return true;
        }
        self.add_elsewhere(start, position, is_it)
    }

    #[inline(never)]
    fn add_elsewhere(&mut self, start: Start, position: u32, is_it: impl Fn(u32) -> bool) -> bool {
        match self.search(start, is_it) {
            Found::At(_) => false,
            Found::Nowhere(vacancy) => {
                self.fill(vacancy, position);
                true
            }
        }
    }

    /// Adds a position where its hash goes.
    #[inline]
    pub(super) fn fill(&mut self, mut vacancy: Vacancy, position: u32) {
        assert!(position <= POSITION_MASK, "position {position}");
        let tag = vacancy.tag;
        if self.tables[tag.table()].pages == 0 {
            self.rebuild(tag.table(), 1, self.fit);
            vacancy.bucket = home(tag, PAGE_BUCKETS);
            vacancy.line = self.pages.line(tag.table(), vacancy.bucket);
        }
        let table = &mut self.tables[tag.table()];
        while let Some(bucket) = self.pages.bucket_mut(vacancy.line)
            && !try_push(bucket, tag, position)
        {
            vacancy.bucket = after(vacancy.bucket, table.buckets());
            vacancy.line = self.pages.line(tag.table(), vacancy.bucket);
        }
        table.entries += 1;
        if table.entries >= table.entries_max {
            let part = self.fit.growth_part();
            let more = (table.pages + tag.table() as u32 % part) / part;
            let pages = table.pages + more.max(1);
            self.rebuild(tag.table(), pages, self.fit);
        }
    }

    /// Adds a position; it must not be there with this hash.
    pub(super) fn insert(&mut self, hash: u64, position: u32) {
        if let Found::Nowhere(vacancy) = self.search(self.start(hash), |_| false) {
            self.fill(vacancy, position);
        }
    }

    /// Removes a position that was added with this hash; without effect when it was not.
    pub(super) fn remove(&mut self, hash: u64, position: u32) {
        let Found::At(place) = self.search(self.start(hash), |other| other == position) else {
            return;
        };
        let tag = place.tag;
        if let Some(bucket) = self.pages.bucket_mut(place.line) {
            take(bucket, place.entry);
        }
        let table = &mut self.tables[tag.table()];
        // Its bits where it went past stay; when too many do, the table is made anew.
        table.stale += u32::from(!place.is_home);
        table.entries -= 1;
        self.refit(tag.table());
    }

    /// Makes a table anew that has lost many entries.
    fn refit(&mut self, number: usize) {
        let table = self.tables[number];
        let sparse = table.pages * PAGE_ENTRIES * SPARSE_PERCENT / 100;
        if table.entries == 0 || table.entries < sparse && table.pages > 1 {
            self.rebuild(number, self.fit.pages_for(table.entries), self.fit);
        } else if table.stale > table.entries / STALE_PART {
            self.rebuild(number, table.pages, self.fit);
        }
    }

    /// Reads all of a table at once, where whoever goes through it would wait for most lines.
    fn read_ahead(&self, number: usize) {
        let pages = 0..self.tables[number].pages as usize;
        let buckets = pages.flat_map(|place| self.pages.page(number, place));
        black_box(buckets.fold(0, |seen, bucket| seen ^ bucket[COUNTS]));
    }

    /// Gives a table so many pages. It is made anew in one piece, which is written from its start to its end, as entries
    /// keep their order.
    fn rebuild(&mut self, number: usize, pages: u32, fit: Fit) {
        self.read_ahead(number);
        let Self {
            tables,
            pages: memory,
            scratch,
            is_loose,
            moves,
            ..
        } = self;
        let table = &mut tables[number];
        *is_loose |= fit == Fit::Loose;
        scratch.clear();
        scratch.resize((pages * PAGE_BUCKETS) as usize, EMPTY);
        let buckets = scratch.len() as u32;
        let had = (0..table.pages as usize).flat_map(|place| memory.page(number, place));
        for bucket in had {
            let entries = tags(bucket).iter().zip(&bucket[REST..COUNTS]);
            for (low, rest) in entries.take(used(bucket)) {
                let bits = rest >> POSITION_BITS << LOW_TAG_BITS | u32::from(*low);
                let tag = Tag::new(number, bits);
                let mut at = home(tag, buckets);
                while !try_push(&mut scratch[at as usize], tag, rest & POSITION_MASK) {
                    at = after(at, buckets);
                }
            }
        }
        if pages != table.pages {
            memory.resize(number, table.pages, pages);
            *moves = moves.wrapping_add(1);
        }
        table.pages = pages;
        table.entries_max = fit.entries_max(pages);
        table.stale = 0;
        for (place, made) in scratch.chunks_exact(PAGE_BUCKETS as usize).enumerate() {
            memory.page_mut(number, place).copy_from_slice(made);
        }
        self.bytes = self.count_bytes();
    }

    /// Makes all tables tight, and gives back memory in which nothing is kept.
    pub(super) fn tighten(&mut self) {
        (0..TABLES).for_each(|number| self.tighten_table(number));
        self.is_loose = false;
        self.trim();
    }

    /// The same of some tables, one after the other, but for those to which names have come since they were looked at
    /// last; false when all have been looked at, or nothing is loose.
    pub(super) fn tighten_some(&mut self) -> bool {
        if !self.is_loose {
            return false;
        }
        for number in self.next..(self.next + TABLES_A_TURN).min(TABLES) {
            let table = &mut self.tables[number];
            let looked = std::mem::replace(&mut table.looked, table.entries);
            if looked.abs_diff(table.entries) <= looked / BUSY_PART {
                self.tighten_table(number);
            }
        }
        self.next = (self.next + TABLES_A_TURN) % TABLES;
        if self.next == 0 {
            self.is_loose = self.tables.iter().any(|table| table.tight().is_some());
            self.trim();
        }
        self.next > 0
    }

    fn tighten_table(&mut self, number: usize) {
        if let Some(pages) = self.tables[number].tight() {
            self.rebuild(number, pages, Fit::Tight);
        }
    }

    /// Gives back memory in which nothing is kept.
    pub(super) fn trim(&mut self) {
        self.scratch = Vec::new();
        self.moves = self.moves.wrapping_add(1);
        self.pages.trim(self.tables.iter().map(|table| table.pages));
        self.bytes = self.count_bytes();
    }

    pub(super) const fn fit(&self) -> Fit {
        self.fit
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    fn count_bytes(&self) -> usize {
        self.pages.bytes()
            + size_of_val(&*self.tables)
            + self.scratch.capacity() * size_of::<Bucket>()
    }
}
