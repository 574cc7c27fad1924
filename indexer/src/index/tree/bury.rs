//! Many blocks that go at once: their names go later, all together.

use super::super::blocks::SEGMENT_BLOCKS;
use super::super::sets::Holder;
use super::{Shared, Stretch, Tree};

/// Names are swept out when one in so many leads nowhere.
const BURIED_PART: u64 = 4;

impl Tree {
    /// As [`Tree::remove`], but the names of segments that nobody uses any more stay until they are swept out.
    pub(in crate::index) fn bury(
        &mut self,
        shared: &Shared,
        blocks: Stretch,
        holder: Holder,
        unchanged: &mut Vec<(u32, u32)>,
    ) -> u32 {
        let run = blocks.run;
        let changed = self.take_from(shared, blocks, holder, unchanged);
        // What stays needs its positions for other names.
        let staying = Self::empty_tail(shared, run)
            .map_or(u32::MAX, |(kept, _)| kept.next_multiple_of(SEGMENT_BLOCKS));
        for dead in 0..self.dead.len() {
            let (start, end) = self.dead[dead];
            if start < staying {
                self.forget_names(shared, run, start, end.min(staying));
            }
        }
        if !self.dead.is_empty() {
            self.cut_tail(shared, run);
        }
        changed
    }

    /// How many names there are, of blocks and of what is buried.
    #[cfg(test)]
    pub(in crate::index) fn named(&self) -> u64 {
        self.names.len()
    }

    /// Whether there are names that lead nowhere.
    pub(in crate::index) const fn has_buried(&self) -> bool {
        !self.segments.buried().is_empty()
    }

    /// Whether they are being swept out, or are so many that they should be.
    pub(in crate::index) fn is_sweep_due(&self) -> bool {
        let buried = self.segments.buried();
        let waiting = buried.names();
        buried.is_swept() || waiting > 0 && waiting * BURIED_PART >= self.names.len()
    }

    /// Whether most names lead nowhere.
    pub(in crate::index) fn are_most_buried(&self) -> bool {
        self.segments.buried().names() * 2 >= self.names.len()
    }

    /// Whether they are being swept out.
    pub(in crate::index) const fn is_swept(&self) -> bool {
        self.segments.buried().is_swept()
    }

    /// Sweeps names out of so many tables that lead to what is buried; false when none of them is left that was there when
    /// the sweep began.
    pub(in crate::index) fn sweep_some(&mut self, tables: usize) -> bool {
        if !self.is_swept() {
            if !self.has_buried() {
                return false;
            }
            self.segments.begin_sweep();
        }
        let Self {
            segments, names, ..
        } = self;
        let buried = segments.buried();
        let is_more = names.sweep_some(tables, |position| {
            buried.contains(position / SEGMENT_BLOCKS)
        });
        if !is_more {
            segments.end_sweep();
        }
        is_more
    }
}
