//! The writer's side of the runs: where a block goes.

mod along;
mod apart;
mod bury;
mod evict;
mod holders;
mod keys;
mod memory;
mod touch;

use kvcache_core::{EngineHash, IndexKey};

use super::arena::{WordLists, Words};
use super::blocks::{KeyColumn, SEGMENT_BLOCKS, Segments};
use super::doors::{Door, DoorCount, Doors};
use super::leaves::Leaves;
use super::names::{Fit, Names, Starts};
use super::recency::Recency;
use super::runs::{Header, RUN_BLOCKS_MAX, RunSlots, Runs, Span, ordinal};
use super::sets::{Holder, SetId, Sets, SourceNumber};

/// What readers see of the tree.
pub(super) struct Shared {
    pub(super) keys: KeyColumn,
    pub(super) words: Words,
    pub(super) runs: Runs,
    pub(super) doors: Doors,
    /// When runs were used last; of an index without a budget nothing.
    pub(super) recency: Recency,
}

impl Shared {
    pub(super) fn new(is_bounded: bool) -> Self {
        Self {
            keys: KeyColumn::new(),
            words: Words::new(),
            runs: Runs::new(),
            doors: Doors::new(),
            recency: Recency::new(is_bounded),
        }
    }

    /// The header of a run that is there.
    fn run(&self, run: u32) -> &Header {
        match self.runs.get(run) {
            Some(header) => header,
            None => unreachable_run(run),
        }
    }

    fn position(&self, run: u32, block: u32) -> u32 {
        let segment = self.run(run).segment(&self.words, ordinal(block));
        segment.unwrap_or_default() * SEGMENT_BLOCKS + block % SEGMENT_BLOCKS
    }

    pub(super) fn bytes(&self) -> usize {
        self.keys.bytes()
            + self.words.bytes()
            + self.runs.bytes()
            + self.doors.bytes()
            + self.recency.bytes()
    }
}

#[cold]
#[expect(clippy::panic, reason = "the writer knows which runs there are")]
fn unreachable_run(run: u32) -> ! {
    panic!("run {run} is not there")
}

/// Where a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) run: u32,
    pub(super) block: u32,
    pub(super) position: u32,
}

/// Blocks of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stretch {
    pub(super) run: u32,
    pub(super) start: u32,
    pub(super) end: u32,
}

impl Stretch {
    pub(super) const fn of(place: Place) -> Self {
        Self {
            run: place.run,
            start: place.block,
            end: place.block + 1,
        }
    }

    /// Takes the block in when it is next to the stretch, at either end.
    pub(super) const fn extend(&mut self, place: Place) -> bool {
        if place.run != self.run {
            return false;
        }
        if place.block == self.end {
            self.end += 1;
        } else if place.block + 1 == self.start {
            self.start -= 1;
        } else {
            return false;
        }
        true
    }

    pub(super) const fn len(self) -> u32 {
        self.end - self.start
    }
}

/// What only the writer knows of the tree.
pub(super) struct Tree {
    pub(super) segments: Segments,
    pub(super) slots: RunSlots,
    pub(super) lists: WordLists,
    pub(super) sets: Sets,
    doors: DoorCount,
    /// From engines' hashes to positions.
    names: Names,
    /// From keys to positions, all of them, while some source speaks keys without telling where they belong.
    by_key: Option<Names>,
    /// From keys to positions of blocks that are apart.
    apart: Names,
    /// What may be evicted; none without a budget.
    leaves: Option<Box<Leaves>>,
    /// The runs that readers must keep out of until the event is through.
    closed: Vec<u32>,
    /// The roots of runs that have ended.
    pub(super) ended_roots: Vec<u32>,
    spans: Vec<Span>,
    /// Where searches for the names of the events at hand begin.
    starts: Starts,
    /// Which of them is the first of the event that is on.
    first_start: usize,
    /// Whether that was done for all events at hand.
    is_touched: bool,
    /// The same of other searches.
    other_starts: Starts,
    /// Names that go, with their positions.
    forgotten: Vec<(u64, u32)>,
    dead: Vec<(u32, u32)>,
    /// Distinct blocks that somebody holds.
    pub(super) blocks: u64,
    runs: u64,
}

impl Tree {
    pub(super) fn new(is_bounded: bool) -> Self {
        let fit = if is_bounded { Fit::Tight } else { Fit::Loose };
        Self {
            segments: Segments::default(),
            slots: RunSlots::default(),
            lists: WordLists::new(),
            sets: Sets::new(),
            doors: DoorCount::default(),
            names: Names::new(fit),
            by_key: None,
            apart: Names::new(fit),
            leaves: is_bounded.then(Box::default),
            closed: Vec::new(),
            ended_roots: Vec::new(),
            spans: Vec::new(),
            starts: Starts::default(),
            first_start: 0,
            is_touched: false,
            other_starts: Starts::default(),
            forgotten: Vec::new(),
            dead: Vec::new(),
            blocks: 0,
            runs: 0,
        }
    }

    /// How many sets of more than one holder there are.
    #[cfg(test)]
    pub(super) fn sets(&self) -> usize {
        self.sets.len()
    }

    /// Whether so many blocks, each a run of its own if need be, can be taken in with the entries there are.
    pub(super) fn has_doors(&self, shared: &Shared, blocks: usize) -> bool {
        self.doors.has_room(&shared.doors, blocks)
    }

    /// Entries with room for so many more.
    pub(super) fn more_doors(&self, shared: &Shared, blocks: usize) -> Doors {
        self.doors.resized(&shared.doors, blocks)
    }

    /// The table of entries is another one.
    pub(super) fn refit_doors(&mut self, shared: &Shared) {
        self.doors.refit(&shared.doors);
    }

    /// What a table of entries with room for so many more takes.
    pub(super) fn doors_bytes(&self, more: usize) -> usize {
        self.doors.bytes_with(more)
    }

    /// Whether any key is found, wherever it is.
    pub(super) const fn has_keys(&self) -> bool {
        self.by_key.is_some()
    }

    /// Whether so many blocks, each a run of its own if need be, can be taken in at all.
    pub(super) fn has_room(&self, blocks: usize) -> bool {
        self.segments.has_room(blocks)
    }

    fn close(&mut self, shared: &Shared, run: u32) {
        if shared.run(run).close() {
            self.closed.push(run);
        }
    }

    /// Shows readers what an event has changed.
    pub(super) fn finish(&mut self, shared: &Shared) {
        for run in self.closed.drain(..) {
            shared.run(run).open();
        }
        self.doors.finish(&shared.doors);
    }

    pub(super) fn key(&self, shared: &Shared, position: u32) -> IndexKey {
        IndexKey(shared.keys.get(position).unwrap_or_default())
    }

    pub(super) fn name(&self, position: u32) -> Option<EngineHash> {
        self.segments.name(position)
    }

    /// The position that a hash names.
    #[inline]
    pub(super) fn find_name(&self, name: EngineHash) -> Option<u32> {
        let is_it = |position| self.segments.is_named(position, name.0);
        self.names.find(name.0, is_it)
    }

    /// Gives a position that has no name one that nothing has.
    pub(super) fn set_name(&mut self, position: u32, name: EngineHash) {
        self.segments.set_name(position, Some(name));
        self.names.insert(name.0, position);
    }

    /// Where a position is.
    #[inline]
    pub(super) fn place_of(&self, position: u32) -> Place {
        let (run, block) = self.segments.place(position);
        Place {
            run,
            block,
            position,
        }
    }

    /// The same, if it is still some block's.
    pub(super) fn place_if_there(&self, position: u32) -> Option<Place> {
        let is_there = self.segments.is_owned(position);
        is_there.then(|| self.place_of(position))
    }

    /// The block before or after another one of its run.
    pub(super) fn beside(&self, shared: &Shared, place: Place, is_after: bool) -> Option<Place> {
        let block = if is_after {
            place.block + 1
        } else {
            place.block.checked_sub(1)?
        };
        (block < shared.run(place.run).blocks()).then(|| Place {
            run: place.run,
            block,
            position: shared.position(place.run, block),
        })
    }

    pub(super) fn block(&self, shared: &Shared, run: u32, block: u32) -> Place {
        Place {
            run,
            block,
            position: shared.position(run, block),
        }
    }

    /// Whether a source holds a block in some tier, or claims to have stored it.
    pub(super) fn holds(&self, shared: &Shared, place: Place, source: SourceNumber) -> bool {
        let set = self.set(shared, place);
        Sets::contains_source(&shared.words, set, source)
    }

    pub(super) fn holds_in(&self, shared: &Shared, place: Place, holder: Holder) -> bool {
        Sets::contains(&shared.words, self.set(shared, place), holder)
    }

    fn set(&self, shared: &Shared, place: Place) -> SetId {
        let header = shared.run(place.run);
        let span = header.span_after(&shared.words, place.block);
        header
            .span(&shared.words, span)
            .map_or(SetId::EMPTY, |span| span.set)
    }

    /// The spans of a run.
    pub(super) fn spans<'a>(
        &self,
        shared: &'a Shared,
        run: u32,
    ) -> impl Iterator<Item = (u32, Span)> + use<'a> {
        let header = shared.run(run);
        let mut start = 0;
        (0..header.spans()).map_while(move |span| {
            let span = header.span(&shared.words, span)?;
            Some((std::mem::replace(&mut start, span.end), span))
        })
    }

    /// The blocks of a run from the first to the last that a holder has.
    pub(super) fn held_stretch(
        &self,
        shared: &Shared,
        run: u32,
        holder: Holder,
    ) -> Option<Stretch> {
        let mut held = self
            .spans(shared, run)
            .filter(|(_, span)| self.has(shared, *span, holder));
        let (start, first) = held.next()?;
        let end = held.last().map_or(first.end, |(_, span)| span.end);
        Some(Stretch { run, start, end })
    }

    /// The keys of all blocks that a holder has.
    pub(super) fn keys_held(&self, shared: &Shared, holder: Holder) -> Vec<IndexKey> {
        let mut keys = Vec::new();
        for run in (0..self.slots.end()).filter(|run| shared.runs.get(*run).is_some()) {
            for (start, span) in self.spans(shared, run) {
                if self.has(shared, span, holder) {
                    let blocks = start..span.end;
                    keys.extend(blocks.map(|block| self.key(shared, shared.position(run, block))));
                }
            }
        }
        keys
    }

    /// Whether the set of a span has a holder.
    pub(super) fn has(&self, shared: &Shared, span: Span, holder: Holder) -> bool {
        Sets::contains(&shared.words, span.set, holder)
    }

    pub(super) fn root(&self, shared: &Shared, run: u32) -> Option<u32> {
        shared.run(run).root()
    }

    pub(super) fn set_root(&mut self, shared: &Shared, run: u32, root: u32) {
        shared.run(run).set_root(root);
    }

    /// The block with this key after another one, or at the start of a chain; it is made where it is not there yet.
    ///
    /// `is_told` when nobody has hashed that one follows the other: then lookups check every key of the run.
    pub(super) fn place(
        &mut self,
        shared: &Shared,
        previous: Option<Place>,
        key: IndexKey,
        is_told: bool,
    ) -> Place {
        if let Some(previous) = previous
            && let Some(next) = self.beside(shared, previous, true)
            && shared.keys.get(next.position) == Some(key.0)
        {
            return next;
        }
        if let Some(Door { run, block }) = self.doors.find(&shared.doors, key) {
            if let (Some(leaves), Some(previous), 0) = (&mut self.leaves, previous, block) {
                let parent = shared.keys.get(previous.position).unwrap_or_default();
                leaves.adopt(run, (parent, previous.run));
            }
            return self.block(shared, run, block);
        }
        if let Some(found) = self.find_key(shared, key) {
            // It follows something else in its run, so lookups that come from here need a way in.
            self.close(shared, found.run);
            shared.run(found.run).set_doors();
            let door = Door {
                run: found.run,
                block: found.block,
            };
            self.doors.insert(&shared.doors, key, door);
            return found;
        }
        match previous {
            Some(previous) if self.can_append(shared, previous, is_told) => {
                let place = self.append(shared, previous.run, key);
                if is_told {
                    // Nobody said that whoever asks for it asks for those before it, as hashes of whole prefixes show.
                    shared.run(place.run).set_doors();
                    let door = Door {
                        run: place.run,
                        block: place.block,
                    };
                    self.doors.insert(&shared.doors, key, door);
                }
                place
            }
            _ => self.begin(shared, previous, key, is_told),
        }
    }

    fn can_append(&self, shared: &Shared, last: Place, is_told: bool) -> bool {
        let header = shared.run(last.run);
        last.block + 1 == header.blocks()
            && last.block + 1 < RUN_BLOCKS_MAX
            && (header.is_told() || !is_told)
    }

    fn append(&mut self, shared: &Shared, run: u32, key: IndexKey) -> Place {
        self.close(shared, run);
        let header = shared.run(run);
        let block = header.blocks();
        if block.is_multiple_of(SEGMENT_BLOCKS) {
            let ordinal = ordinal(block);
            let segment = self.segments.allocate(&shared.keys, run, ordinal);
            header.push_segment(&shared.words, &mut self.lists, ordinal, segment);
        }
        header.set_blocks(block + 1);
        let position = shared.position(run, block);
        shared.keys.set(position, key);
        if (block + 1).is_multiple_of(SEGMENT_BLOCKS) {
            header.set_digest(&shared.words, ordinal(block), key);
        }
        if let Some(by_key) = &mut self.by_key {
            by_key.insert(key.0, position);
        }
        Place {
            run,
            block,
            position,
        }
    }

    fn begin(
        &mut self,
        shared: &Shared,
        previous: Option<Place>,
        key: IndexKey,
        is_told: bool,
    ) -> Place {
        let run = self.begin_run(shared, previous, key, is_told);
        self.append(shared, run, key)
    }

    /// A run without blocks yet, with a way in to its first.
    fn begin_run(
        &mut self,
        shared: &Shared,
        previous: Option<Place>,
        key: IndexKey,
        is_told: bool,
    ) -> u32 {
        let run = self.slots.allocate(&shared.runs);
        self.runs += 1;
        if self.leaves.is_some() {
            self.begin_leaf(shared, run, previous);
        }
        self.close(shared, run);
        if is_told {
            shared.run(run).set_told();
        }
        self.doors
            .insert(&shared.doors, key, Door { run, block: 0 });
        run
    }
}
