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

    /// Appends blocks that nobody has told of yet behind the last one, or in runs of their own, from one of an event's on;
    /// returns which is the first of which the key or the name is known.
    ///
    /// All of the event's names must have been touched.
    pub(in crate::index) fn grow(
        &mut self,
        shared: &Shared,
        last: &mut Option<Place>,
        told: (&[EngineHash], &[IndexKey]),
        begun: usize,
        stretches: &mut Vec<Stretch>,
    ) -> usize {
        // Only the search by name and key knows of blocks that nodes have told of.
        if self.by_key.is_some() || self.is_next(shared, *last, told.1[begun]) {
            return begun;
        }
        let mut done = begun;
        while done < told.1.len()
            && let Some(vacancy) = self.vacancy(shared, told, done)
        {
            let run = match *last {
                Some(last) if self.can_append(shared, last, false) => last.run,
                _ => self.begin_run(shared, *last, told.1[done], false),
            };
            let start = shared.run(run).blocks();
            let more = self.append_new(shared, run, vacancy, told, done);
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

    /// Where the name of an event's block goes, if neither that nor the key is known.
    #[inline]
    fn vacancy(
        &self,
        shared: &Shared,
        (names, keys): (&[EngineHash], &[IndexKey]),
        place: usize,
    ) -> Option<Vacancy> {
        let (name, key) = (names.get(place)?, keys.get(place)?);
        if self.doors.find(&shared.doors, *key).is_some() {
            return None;
        }
        let is_it = |position| self.segments.is_named(position, name.0);
        let noted = (&self.starts, self.first_start + place);
        self.names.vacancy(name.0, noted, is_it)
    }

    /// Appends an event's blocks to one run, from one of them on, until it is full or a block is known; the first one is
    /// not. How many they are.
    fn append_new(
        &mut self,
        shared: &Shared,
        run: u32,
        first: Vacancy,
        told: (&[EngineHash], &[IndexKey]),
        begun: usize,
    ) -> u32 {
        self.close(shared, run);
        let header = shared.run(run);
        let start = header.blocks();
        let most = (RUN_BLOCKS_MAX - start).min((told.1.len() - begun) as u32);
        let end = begun + most as usize;
        let told = (&told.0[..end], &told.1[..end]);
        let (mut vacancy, mut more) = (Some(first), 0);
        while let Some(free) = vacancy.take() {
            let block = start + more;
            let ordinal = ordinal(block);
            let segment = if block.is_multiple_of(SEGMENT_BLOCKS) {
                let made = self.segments.allocate(&shared.keys, run, ordinal);
                header.push_segment(&shared.words, &mut self.lists, ordinal, made);
                made
            } else {
                header.segment(&shared.words, ordinal).unwrap_or_default()
            };
            let from = block % SEGMENT_BLOCKS;
            let next = begun + more as usize;
            let added = self.fill_segment(shared, (segment, from), free, told, next);
            more += added;
            if from + added < SEGMENT_BLOCKS {
                break;
            }
            let next = begun + more as usize;
            header.set_digest(&shared.words, ordinal, told.1[next - 1]);
            vacancy = self.vacancy(shared, told, next);
        }
        header.set_blocks(start + more);
        more
    }

    /// Puts an event's blocks into a segment, from one of its positions on, until it is full or a block is known; the
    /// first one is not. How many they are.
    fn fill_segment(
        &mut self,
        shared: &Shared,
        (segment, from): (u32, u32),
        first: Vacancy,
        (names, keys): (&[EngineHash], &[IndexKey]),
        begun: usize,
    ) -> u32 {
        let (names, keys) = (&names[begun..], &keys[begun..]);
        let most = keys.len().min((SEGMENT_BLOCKS - from) as usize);
        let (names, keys) = (&names[..most], &keys[..most]);
        let position = segment * SEGMENT_BLOCKS + from;
        // All of them first: a name may come twice.
        self.segments.write_names(position, names);
        self.names.fill(first, position);
        let Self {
            names: table,
            segments,
            starts,
            doors,
            ..
        } = self;
        let noted = self.first_start + begun;
        let mut added = 1;
        for (name, key) in names.iter().zip(keys).skip(1) {
            let is_it = |position| segments.is_named(position, name.0);
            if doors.find(&shared.doors, *key).is_some()
                || !table.add(
                    name.0,
                    (starts, noted + added),
                    position + added as u32,
                    is_it,
                )
            {
                break;
            }
            added += 1;
        }
        shared.keys.set_row(position, &keys[..added]);
        self.segments.give_names(position, added as u32);
        added as u32
    }
}
