//! Entries that go together: those of positions that nobody uses any more.

use super::bucket::{Bucket, COUNTS, POSITION_MASK, REST, tag_of, take, used};
use super::pages::PAGE_BUCKETS;
use super::{Names, TABLES, home};

/// A bit for each entry of a bucket that is dead: without a branch, as nobody can foretell which are.
#[inline]
fn dead_entries(bucket: &Bucket, is_dead: &impl Fn(u32) -> bool) -> u32 {
    let rests = bucket[REST..COUNTS].iter().rev();
    let dead = rests.fold(0, |dead, rest| {
        dead << 1 | u32::from(is_dead(rest & POSITION_MASK))
    });
    dead & ((1 << used(bucket)) - 1)
}

impl Names {
    /// How many entries there are.
    pub(in crate::index) fn len(&self) -> u64 {
        let entries = self.tables.iter().map(|table| u64::from(table.entries));
        entries.sum()
    }

    /// Takes entries out whose positions are dead, of so many tables, one after the other; false when all have been
    /// looked at since the last time that it was.
    pub(in crate::index) fn sweep_some(
        &mut self,
        tables: usize,
        is_dead: impl Fn(u32) -> bool,
    ) -> bool {
        let end = self.swept.saturating_add(tables).min(TABLES);
        (self.swept..end).for_each(|number| self.sweep_table(number, &is_dead));
        self.swept = end % TABLES;
        self.swept > 0
    }

    fn sweep_table(&mut self, number: usize, is_dead: &impl Fn(u32) -> bool) {
        self.read_ahead(number);
        let table = &mut self.tables[number];
        let buckets = table.buckets();
        let (mut gone, mut stale) = (0, 0);
        for place in 0..table.pages {
            let page = self.pages.page_mut(number, place as usize);
            for (at, bucket) in (place * PAGE_BUCKETS..).zip(page) {
                let mut dead = dead_entries(bucket, is_dead);
                // From the last one on, as that comes in place of one that goes.
                while let Some(entry) = dead.checked_ilog2() {
                    dead ^= 1 << entry;
                    let tag = tag_of(number, bucket, entry as usize);
                    stale += u32::from(at != home(tag, buckets));
                    take(bucket, entry as usize);
                    gone += 1;
                }
            }
        }
        if gone > 0 {
            table.entries -= gone;
            table.stale += stale;
            self.refit(number);
        }
    }
}
