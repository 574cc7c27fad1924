//! Who holds the blocks of a run, and what goes when nobody does.

use super::super::arena::Words;
use super::super::blocks::SEGMENT_BLOCKS;
use super::super::doors::Door;
use super::super::runs::{Span, ordinal};
use super::super::sets::{Holder, SetId, Sets};
use super::{Shared, Stretch, Tree};

/// Memory is asked for so many names at once.
const NAMES_AT_ONCE: usize = 256;

impl Tree {
    /// Lets a holder hold blocks, the newest of the run included; how many it did not hold before. Those that it did
    /// are appended to `unchanged`.
    pub(in crate::index) fn insert(
        &mut self,
        shared: &Shared,
        blocks: Stretch,
        holder: Holder,
        unchanged: &mut Vec<(u32, u32)>,
    ) -> u32 {
        let header = shared.run(blocks.run);
        self.close(shared, blocks.run);
        self.use_run(shared, blocks.run);
        let count = header.spans();
        let last = count
            .checked_sub(1)
            .and_then(|last| header.span(&shared.words, last));
        let covered = last.map_or(0, |last| last.end);
        let mut changed = 0;
        if blocks.start < covered {
            let known = Stretch {
                end: blocks.end.min(covered),
                ..blocks
            };
            changed += self.change(shared, known, holder, true, unchanged);
        }
        if blocks.end > covered {
            assert!(
                blocks.start <= covered,
                "{blocks:?} leaves a gap after {covered}"
            );
            let set = SetId::single(holder);
            let count = header.spans();
            let last = count
                .checked_sub(1)
                .and_then(|last| header.span(&shared.words, last));
            let first = if last.is_some_and(|last| last.set == set) {
                count - 1
            } else {
                count
            };
            let span = Span {
                end: blocks.end,
                set,
            };
            header.replace_spans(&shared.words, &mut self.lists, (first, count), &[span]);
            changed += blocks.end - covered;
            if !holder.is_claim() {
                self.blocks += u64::from(blocks.end - covered);
            }
        }
        changed
    }

    /// Takes blocks from a holder; how many it held. Those that it did not are appended to `unchanged`.
    pub(in crate::index) fn remove(
        &mut self,
        shared: &Shared,
        blocks: Stretch,
        holder: Holder,
        unchanged: &mut Vec<(u32, u32)>,
    ) -> u32 {
        let changed = self.take_from(shared, blocks, holder, unchanged);
        for dead in 0..self.dead.len() {
            let (start, end) = self.dead[dead];
            self.forget_names(shared, blocks.run, start, end);
        }
        if !self.dead.is_empty() {
            self.cut_tail(shared, blocks.run);
        }
        changed
    }

    /// The same, without what comes of it: which blocks nobody holds any more is in `self.dead`.
    pub(super) fn take_from(
        &mut self,
        shared: &Shared,
        blocks: Stretch,
        holder: Holder,
        unchanged: &mut Vec<(u32, u32)>,
    ) -> u32 {
        self.close(shared, blocks.run);
        self.dead.clear();
        self.change(shared, blocks, holder, false, unchanged)
    }

    fn change(
        &mut self,
        shared: &Shared,
        blocks: Stretch,
        holder: Holder,
        is_insert: bool,
        unchanged: &mut Vec<(u32, u32)>,
    ) -> u32 {
        let (words, header) = (&shared.words, shared.run(blocks.run));
        let count = header.spans();
        let span_at = |span: u32| header.span(words, span);
        let mut spans = std::mem::take(&mut self.spans);
        spans.clear();
        let mut first = header.span_after(words, blocks.start);
        let start = first
            .checked_sub(1)
            .and_then(span_at)
            .map_or(0, |span| span.end);
        let mut last = first;
        let (mut at, mut changed) = (blocks.start, 0);
        if start < at
            && let Some(span) = span_at(first)
        {
            self.sets.acquire(words, span.set);
            spans.push(Span { end: at, ..span });
        }
        while at < blocks.end
            && let Some(span) = span_at(last)
        {
            let end = span.end.min(blocks.end);
            let set = if is_insert {
                self.sets.with(words, &mut self.lists, span.set, holder)
            } else {
                self.sets.without(words, &mut self.lists, span.set, holder)
            };
            if set == span.set {
                unchanged.push((at, end));
            } else {
                changed += end - at;
                self.count_blocks(words, span.set, set, end - at);
                if set.is_empty() {
                    self.dead.push((at, end));
                }
            }
            self.push_span(words, &mut spans, Span { end, set });
            if span.end > end {
                self.sets.acquire(words, span.set);
                self.push_span(words, &mut spans, span);
            }
            (at, last) = (end, last + 1);
        }
        if changed == 0 {
            for span in &spans {
                self.sets.release(words, &mut self.lists, span.set);
            }
            self.spans = spans;
            return 0;
        }
        if let (Some(before), Some(span)) = (first.checked_sub(1).and_then(span_at), spans.first())
            && before.set == span.set
        {
            first -= 1;
        }
        if last < count
            && let (Some(after), Some(span)) = (span_at(last), spans.last_mut())
            && after.set == span.set
        {
            span.end = after.end;
            last += 1;
        }
        for span in (first..last).filter_map(span_at) {
            self.sets.release(words, &mut self.lists, span.set);
        }
        header.replace_spans(words, &mut self.lists, (first, last), &spans);
        self.spans = spans;
        changed
    }

    fn push_span(&mut self, words: &Words, spans: &mut Vec<Span>, span: Span) {
        match spans.last_mut() {
            Some(last) if last.set == span.set => {
                last.end = span.end;
                self.sets.release(words, &mut self.lists, span.set);
            }
            _ => spans.push(span),
        }
    }

    fn count_blocks(&mut self, words: &Words, before: SetId, after: SetId, blocks: u32) {
        match (Sets::is_real(words, before), Sets::is_real(words, after)) {
            (false, true) => self.blocks += u64::from(blocks),
            (true, false) => self.blocks -= u64::from(blocks),
            _ => {}
        }
    }

    /// Forgets the names of blocks that nobody holds; their keys stay while blocks behind them are held.
    pub(super) fn forget_names(&mut self, shared: &Shared, run: u32, start: u32, end: u32) {
        let header = shared.run(run);
        let mut forgotten = std::mem::take(&mut self.forgotten);
        forgotten.clear();
        for ordinal in ordinal(start)..end.div_ceil(SEGMENT_BLOCKS) {
            if let Some(segment) = header.segment(&shared.words, ordinal) {
                let first = ordinal * SEGMENT_BLOCKS;
                let from = start.saturating_sub(first);
                let to = (end - first).min(SEGMENT_BLOCKS);
                self.segments
                    .take_names(segment, (from, to), &mut forgotten);
            }
        }
        for some in forgotten.chunks(NAMES_AT_ONCE) {
            let names = some.iter().map(|(name, _)| *name);
            self.names
                .touch_all([names].into_iter(), &mut self.other_starts);
            for &(name, position) in some {
                self.names.remove(name, position);
            }
        }
        self.forgotten = forgotten;
    }

    /// Ends a run where nobody holds what follows.
    pub(super) fn cut_tail(&mut self, shared: &Shared, run: u32) {
        if let Some((kept, end)) = Self::empty_tail(shared, run) {
            let header = shared.run(run);
            let count = header.spans();
            header.replace_spans(&shared.words, &mut self.lists, (count - 1, count), &[]);
            self.shorten(shared, run, kept, end);
        }
    }

    /// From where to where nobody holds the last blocks of a run, if that is so.
    pub(super) fn empty_tail(shared: &Shared, run: u32) -> Option<(u32, u32)> {
        let header = shared.run(run);
        let count = header.spans();
        let last = header.span(&shared.words, count.checked_sub(1)?)?;
        let before = count
            .checked_sub(2)
            .and_then(|span| header.span(&shared.words, span));
        let kept = before.map_or(0, |span| span.end);
        last.set.is_empty().then_some((kept, last.end))
    }

    /// Takes a run's blocks from `kept` on away, the spans of which are gone; without any it ends.
    pub(super) fn shorten(&mut self, shared: &Shared, run: u32, kept: u32, end: u32) {
        let header = shared.run(run);
        let first_key = self.key(shared, shared.position(run, 0));
        if self.by_key.is_some() || header.has_doors() || header.is_apart() {
            for block in kept..end {
                let position = shared.position(run, block);
                let key = self.key(shared, position);
                if let Some(by_key) = &mut self.by_key {
                    by_key.remove(key.0, position);
                }
                if header.is_apart() {
                    self.apart.remove(key.0, position);
                }
                if block > 0 && header.has_doors() {
                    self.doors.remove(&shared.doors, key, Door { run, block });
                }
            }
        }
        for ordinal in kept.div_ceil(SEGMENT_BLOCKS)..end.div_ceil(SEGMENT_BLOCKS) {
            if let Some(segment) = header.segment(&shared.words, ordinal) {
                self.segments.release(segment);
            }
        }
        header.set_blocks(kept);
        if let Some(leaves) = &mut self.leaves {
            leaves.cut(&shared.recency, run, kept == 0);
        }
        if kept > 0 {
            return;
        }
        self.doors
            .remove(&shared.doors, first_key, Door { run, block: 0 });
        header.release_lists(&mut self.lists);
        self.ended_roots.extend(header.root());
        header.reset();
        self.slots.release(run);
        self.runs -= 1;
    }
}
