//! What goes first when there is no room, and how it goes.

use super::super::runs::Span;
use super::super::sets::{Holder, Sets, members};
use super::{Place, Shared, Stretch, Tree};
use crate::index::arena::get;

/// Where a block is that is not there.
const UNKNOWN_RUN: u32 = u32::MAX;

impl Tree {
    /// Notes where a run begins, so that what it goes on from stays as long as it does.
    pub(super) fn begin_leaf(&mut self, shared: &Shared, run: u32, previous: Option<Place>) {
        shared.recency.ensure(run);
        let parent = previous.map(|previous| (self.key(shared, previous.position).0, previous.run));
        if let Some(leaves) = &mut self.leaves {
            leaves.begin(run, parent);
        }
    }

    /// A block follows one that is not there yet: once it is, it stays as long as this one does.
    pub(in crate::index) fn follow_absent(&mut self, place: Place, parent: u64) {
        if let Some(leaves) = &mut self.leaves
            && place.block == 0
        {
            leaves.adopt(place.run, (parent, UNKNOWN_RUN));
        }
    }

    /// Somebody stores in the run.
    #[inline]
    pub(super) fn use_run(&mut self, shared: &Shared, run: u32) {
        if let Some(leaves) = &mut self.leaves {
            shared.recency.touch(run);
            leaves.enqueue(&shared.recency, run);
        }
    }

    /// Lets time pass for what is used from now on.
    pub(in crate::index) fn tick(&mut self, shared: &Shared) {
        if !shared.recency.tick()
            && let Some(leaves) = &mut self.leaves
        {
            shared.recency.restart();
            leaves.restart();
        }
    }

    /// How many runs there are.
    pub(in crate::index) const fn runs(&self) -> u64 {
        self.runs
    }

    /// How many bytes more the blocks and runs take when so many blocks come, each a run of its own if need be.
    pub(in crate::index) fn growth(&self, shared: &Shared, blocks: usize) -> usize {
        self.segments.growth(blocks) + self.slots.growth(&shared.runs, self.runs, blocks)
    }

    /// The least recently used blocks that no block comes after: at most so many, of one run.
    pub(in crate::index) fn oldest_leaf(
        &mut self,
        shared: &Shared,
        blocks_max: u32,
    ) -> Option<Stretch> {
        while let Some(run) = self.leaves.as_mut()?.pop(&shared.recency) {
            let end = shared.run(run).blocks();
            let least = end.saturating_sub(blocks_max);
            let mut start = end;
            while start > least {
                let key = self.key(shared, shared.position(run, start - 1));
                if self.leaves.as_mut()?.has_children(key.0, run) {
                    break;
                }
                start -= 1;
            }
            // A run from whose last block others go on is queued again when they end.
            if start < end {
                return Some(Stretch { run, start, end });
            }
        }
        None
    }

    /// Who holds the blocks, appended to `held` with where they begin and end.
    pub(in crate::index) fn holders(
        &self,
        shared: &Shared,
        blocks: Stretch,
        held: &mut Vec<(Holder, Stretch)>,
    ) {
        for (start, span) in self.spans(shared, blocks.run) {
            if span.end <= blocks.start {
                continue;
            }
            let part = Stretch {
                run: blocks.run,
                start: start.max(blocks.start),
                end: span.end,
            };
            match span.set.as_single() {
                Some(only) => held.push((only, part)),
                None => {
                    let members = members(&shared.words, span.set).unwrap_or_default();
                    held.extend(members.iter().map(|raw| (Holder::from_raw(get(raw)), part)));
                }
            }
        }
    }

    /// Ends a run before its last blocks, whoever holds them.
    pub(in crate::index) fn drop_tail(&mut self, shared: &Shared, tail: Stretch) {
        self.close(shared, tail.run);
        let (words, header) = (&shared.words, shared.run(tail.run));
        self.forget_names(shared, tail.run, tail.start, tail.end);
        let count = header.spans();
        let span_at = |span: u32| header.span(words, span);
        let start_of = |span: u32| {
            let before = span.checked_sub(1).and_then(span_at);
            before.map_or(0, |before| before.end)
        };
        let mut first = header.span_after(words, tail.start);
        let mut kept = tail.start;
        let mut cut = span_at(first).filter(|_| start_of(first) < tail.start);
        for place in first..count {
            let Some(span) = span_at(place) else {
                break;
            };
            if Sets::is_real(words, span.set) {
                self.blocks -= u64::from(span.end - start_of(place).max(tail.start));
            }
            // What is left of the first one keeps its reference.
            if place > first || cut.is_none() {
                self.sets.release(words, &mut self.lists, span.set);
            }
        }
        // What nobody holds goes with what was after it.
        if cut.is_some_and(|cut| cut.set.is_empty()) {
            cut = None;
            kept = start_of(first);
        } else if cut.is_none()
            && let Some(before) = first.checked_sub(1)
            && span_at(before).is_some_and(|span| span.set.is_empty())
        {
            first = before;
            kept = start_of(first);
        }
        let left = cut.map(|cut| Span { end: kept, ..cut });
        header.replace_spans(words, &mut self.lists, (first, count), left.as_slice());
        // A run that is left is queued again there.
        self.shorten(shared, tail.run, kept, tail.end);
    }
}
