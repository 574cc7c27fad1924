//! The memory of the tables: pages that are all alike, in pieces of a huge page each.

use super::super::huge::{HUGE_BYTES, Huge};
use super::TABLES;
use super::bucket::{Bucket, EMPTY};

pub(super) const PAGE_BUCKETS: u32 = 32;
const CHUNK_PAGES: u32 = HUGE_BYTES as u32 / (PAGE_BUCKETS * size_of::<Bucket>() as u32);
pub(super) const CHUNK_LINES: u32 = CHUNK_PAGES * PAGE_BUCKETS;

/// The lines of a piece.
pub(super) type Chunk = [Bucket; CHUNK_LINES as usize];

/// Chunks are emptied when one page in so many is free.
const FREE_PART: u32 = 16;

/// The pages of all tables.
#[derive(Default)]
pub(super) struct Pages {
    chunks: Vec<Option<Huge>>,
    free: Vec<u32>,
    /// How many pages of a chunk are used.
    used: Vec<u32>,
    /// Which pages a table has: of each table as many places as the largest has pages.
    of_tables: Vec<u32>,
    places: usize,
}

impl Pages {
    pub(super) const fn is_empty(&self) -> bool {
        self.of_tables.is_empty()
    }

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

    /// Gives a table that has `before` pages so many.
    pub(super) fn resize(&mut self, table: usize, before: u32, pages: u32) {
        if pages as usize > self.places {
            self.spread((pages as usize).next_multiple_of(4));
        }
        let first = table * self.places;
        for place in pages..before {
            let page = self.of_tables[first + place as usize];
            self.used[(page / CHUNK_PAGES) as usize] -= 1;
            self.free.push(page);
        }
        for place in before..pages {
            self.of_tables[first + place as usize] = self.allocate();
        }
    }

    /// Makes so many places for the pages of each table.
    fn spread(&mut self, places: usize) {
        let mut of_tables = vec![0; TABLES * places];
        if self.places > 0 && places > 0 {
            let kept = self.places.min(places);
            let rows = self.of_tables.chunks_exact(self.places);
            for (to, from) in of_tables.chunks_exact_mut(places).zip(rows) {
                to[..kept].copy_from_slice(&from[..kept]);
            }
        }
        (self.of_tables, self.places) = (of_tables, places);
    }

    /// Where a bucket of a table is, as a line of all chunks; of a table without pages some line, or none.
    #[inline]
    pub(super) fn line(&self, table: usize, bucket: u32) -> u32 {
        let place = table * self.places + (bucket / PAGE_BUCKETS) as usize;
        let page = self.of_tables.get(place).copied().unwrap_or_default();
        page * PAGE_BUCKETS + bucket % PAGE_BUCKETS
    }

    /// The buckets of a page of a table.
    pub(super) fn page(&self, table: usize, place: usize) -> &[Bucket] {
        let page = self.of_tables[table * self.places + place];
        let chunk = self.chunks[(page / CHUNK_PAGES) as usize].as_ref();
        let first = (page % CHUNK_PAGES * PAGE_BUCKETS) as usize;
        chunk.map_or(&[], |chunk| {
            &chunk.elements()[first..first + PAGE_BUCKETS as usize]
        })
    }

    pub(super) fn page_mut(&mut self, table: usize, place: usize) -> &mut [Bucket] {
        let page = self.of_tables[table * self.places + place];
        let chunk = self.chunks[(page / CHUNK_PAGES) as usize].as_mut();
        let first = (page % CHUNK_PAGES * PAGE_BUCKETS) as usize;
        chunk.map_or(&mut [], |chunk| {
            &mut chunk.elements_mut()[first..first + PAGE_BUCKETS as usize]
        })
    }

    /// All chunks at once, for whoever reads many lines in no order; none when there are none.
    pub(super) fn chunks(&self) -> Option<Vec<&Chunk>> {
        let any: &Chunk = self
            .chunks
            .iter()
            .flatten()
            .next()?
            .elements()
            .try_into()
            .ok()?;
        let chunks = self.chunks.iter().map(|chunk| {
            let elements = chunk.as_ref().map(Huge::elements);
            elements.map_or(any, |elements| elements.try_into().unwrap_or(any))
        });
        Some(chunks.collect())
    }

    #[inline]
    pub(super) fn bucket(&self, line: u32) -> &Bucket {
        match &self.chunks[(line / CHUNK_LINES) as usize] {
            Some(chunk) => chunk.element((line % CHUNK_LINES) as usize),
            None => &EMPTY,
        }
    }

    #[inline]
    pub(super) fn bucket_mut(&mut self, line: u32) -> Option<&mut Bucket> {
        let chunk = self.chunks[(line / CHUNK_LINES) as usize].as_mut()?;
        Some(chunk.element_mut((line % CHUNK_LINES) as usize))
    }

    /// Gives memory back, of tables that have so many pages each: chunks that can be done without, their pages' contents
    /// going to others.
    pub(super) fn trim(&mut self, pages: impl ExactSizeIterator<Item = u32> + Clone) {
        let there = self.chunks.iter().flatten().count() as u32;
        let used: u32 = self.used.iter().sum();
        let needed = used.div_ceil(CHUNK_PAGES);
        if needed < there && (there * CHUNK_PAGES - used) * FREE_PART >= used {
            self.empty_chunks(needed as usize, pages.clone());
        }
        for (chunk, used) in self.chunks.iter_mut().zip(&self.used) {
            if *used == 0 {
                *chunk = None;
            }
        }
        let chunks = &self.chunks;
        self.free
            .retain(|page| chunks[(page / CHUNK_PAGES) as usize].is_some());
        self.free.shrink_to_fit();
        let most = pages.max().unwrap_or_default() as usize;
        if most * 2 <= self.places {
            self.spread(most);
        }
    }

    /// Moves what is in chunks into so many of them, the fullest.
    fn empty_chunks(&mut self, kept: usize, pages: impl Iterator<Item = u32>) {
        let mut order: Vec<usize> = (0..self.chunks.len()).collect();
        order.sort_by_key(|chunk| std::cmp::Reverse(self.used[*chunk]));
        let mut is_kept = vec![false; self.chunks.len()];
        order[..kept]
            .iter()
            .for_each(|chunk| is_kept[*chunk] = true);
        let stays = |page: u32| is_kept[(page / CHUNK_PAGES) as usize];
        self.free.retain(|page| stays(*page));
        let mut content = Vec::new();
        for (table, pages) in pages.enumerate() {
            for place in 0..pages as usize {
                let from = self.of_tables[table * self.places + place];
                if stays(from) {
                    continue;
                }
                // There is room: as many chunks are kept as the pages need.
                let to = self.allocate();
                content.clear();
                content.extend_from_slice(self.page(table, place));
                self.used[(from / CHUNK_PAGES) as usize] -= 1;
                self.of_tables[table * self.places + place] = to;
                self.page_mut(table, place).copy_from_slice(&content);
            }
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.chunks.iter().flatten().count() * HUGE_BYTES
            + (self.of_tables.capacity() + self.free.capacity()) * size_of::<u32>()
    }
}
