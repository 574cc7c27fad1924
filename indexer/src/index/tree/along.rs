//! Many blocks of a chain at once: along what is there, and behind the end of a run.

use kvcache_core::{EngineHash, IndexKey};

use super::super::blocks::SEGMENT_BLOCKS;
use super::super::doors::Door;
use super::super::names::Vacancy;
use super::super::runs::{RUN_BLOCKS_MAX, ordinal};
use super::{Place, Shared, Stretch, Tree};

impl Tree {
    /// Follows blocks that are where their chain says, under these names; returns how many are.
    ///
    /// That is to compare neighbours in memory, where a search for each would be a miss of its own.
    pub(in crate::index) fn follow(
        &self,
        shared: &Shared,
        last: &mut Option<Place>,
        (names, keys): (&[EngineHash], &[IndexKey]),
        stretches: &mut Vec<Stretch>,
    ) -> usize {
        let mut done = 0;
        while done < keys.len() {
            let beside = last.and_then(|last| {
                let next = self.beside(shared, last, true)?;
                (shared.keys.get(next.position) == Some(keys[done].0)).then_some(next)
            });
            let entry = beside.or_else(|| {
                let Door { run, block } = self.doors.find(&shared.doors, keys[done])?;
                Some(self.block(shared, run, block))
            });
            let Some(entry) = entry else {
                break;
            };
            let equal = self.equal(shared, entry, (&names[done..], &keys[done..]));
            let Some(before_end) = equal.checked_sub(1) else {
                break;
            };
            let stretch = Stretch {
                run: entry.run,
                start: entry.block,
                end: entry.block + equal,
            };
            match stretches.last_mut() {
                Some(before) if before.run == stretch.run && before.end == stretch.start => {
                    before.end = stretch.end;
                }
                _ => stretches.push(stretch),
            }
            *last = Some(self.block(shared, entry.run, entry.block + before_end));
            done += equal as usize;
        }
        done
    }

    /// How many blocks of a run from one on have these names and keys.
    fn equal(
        &self,
        shared: &Shared,
        from: Place,
        (names, keys): (&[EngineHash], &[IndexKey]),
    ) -> u32 {
        let header = shared.run(from.run);
        let most = (header.blocks() - from.block).min(keys.len() as u32);
        let mut equal = 0;
        while equal < most {
            let block = from.block + equal;
            let Some(segment) = header.segment(&shared.words, ordinal(block)) else {
                return equal;
            };
            let (known, named) = self.segments.names(segment);
            let in_segment = block % SEGMENT_BLOCKS;
            let part = (SEGMENT_BLOCKS - in_segment).min(most - equal);
            for at in 0..part {
                let (place, asked) = ((in_segment + at) as usize, (equal + at) as usize);
                let position = segment * SEGMENT_BLOCKS + in_segment + at;
                if named & 1 << place == 0
                    || known[place] != names[asked].0
                    || shared.keys.get(position) != Some(keys[asked].0)
                {
                    return equal + at;
                }
            }
            equal += part;
        }
        equal
    }

    /// Appends blocks that nobody has told of yet behind the last one, or in runs of their own; returns how many there
    /// are before the first of which the key or the name is known.
    pub(in crate::index) fn grow(
        &mut self,
        shared: &Shared,
        last: &mut Option<Place>,
        (names, keys): (&[EngineHash], &[IndexKey]),
        stretches: &mut Vec<Stretch>,
    ) -> usize {
        // Only the search by name and key knows of blocks that nodes have told of.
        if self.by_key.is_some() || self.is_next(shared, *last, keys[0]) {
            return 0;
        }
        let mut done = 0;
        while done < keys.len()
            && let Some(vacancy) = self.vacancy(shared, names[done], keys[done])
        {
            let run = match *last {
                Some(last) if self.can_append(shared, last, false) => last.run,
                _ => self.begin_run(shared, *last, keys[done], false),
            };
            let start = shared.run(run).blocks();
            let more = self.append_new(shared, run, vacancy, (&names[done..], &keys[done..]));
            done += more as usize;
            let end = start + more;
            match stretches.last_mut() {
                Some(before) if before.run == run && before.end == start => before.end = end,
                _ => stretches.push(Stretch { run, start, end }),
            }
            *last = Some(self.block(shared, run, end - 1));
        }
        done
    }

    fn is_next(&self, shared: &Shared, last: Option<Place>, key: IndexKey) -> bool {
        last.and_then(|last| self.beside(shared, last, true))
            .is_some_and(|next| shared.keys.get(next.position) == Some(key.0))
    }

    /// Where the name of a block goes, if neither that nor the key is known.
    #[inline]
    fn vacancy(&self, shared: &Shared, name: EngineHash, key: IndexKey) -> Option<Vacancy> {
        if self.doors.find(&shared.doors, key).is_some() {
            return None;
        }
        let is_it = |position| self.segments.raw_name(position) == name.0;
        self.names.vacancy(name.0, is_it).ok()
    }

    /// Appends blocks to one run until it is full or a block is known; the first one is not.
    fn append_new(
        &mut self,
        shared: &Shared,
        run: u32,
        first: Vacancy,
        (names, keys): (&[EngineHash], &[IndexKey]),
    ) -> u32 {
        self.close(shared, run);
        let header = shared.run(run);
        let start = header.blocks();
        let most = (RUN_BLOCKS_MAX - start).min(keys.len() as u32);
        let (mut vacancy, mut more, mut segment) = (Some(first), 0, None);
        while more < most
            && let Some(free) = vacancy
        {
            let block = start + more;
            if block.is_multiple_of(SEGMENT_BLOCKS) {
                let ordinal = ordinal(block);
                let made = self.segments.allocate(&shared.keys, run, ordinal);
                header.push_segment(&shared.words, &mut self.lists, ordinal, made);
                segment = Some(made);
            }
            let of = segment
                .or_else(|| header.segment(&shared.words, ordinal(block)))
                .unwrap_or_default();
            segment = Some(of);
            let position = of * SEGMENT_BLOCKS + block % SEGMENT_BLOCKS;
            shared.keys.set(position, keys[more as usize]);
            if (block + 1).is_multiple_of(SEGMENT_BLOCKS) {
                header.set_digest(&shared.words, ordinal(block), keys[more as usize]);
            }
            self.segments.set_name(position, Some(names[more as usize]));
            self.names.fill(free, position);
            more += 1;
            vacancy = match keys.get(more as usize) {
                Some(key) if more < most => self.vacancy(shared, names[more as usize], *key),
                _ => None,
            };
        }
        header.set_blocks(start + more);
        more
    }
}
