//! The checked ranges of a list: each by itself, or as runs of equal steps.

/// A checked range: its region by position in the list's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) target: u32,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// Ranges of one length, each a stride after the one before.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    /// The position of its first range in the list.
    pub(crate) start: u32,
    pub(crate) count: u32,
    pub(crate) first: Range,
    pub(crate) stride: u64,
}

impl Run {
    fn at(&self, position: u32) -> Option<Range> {
        let step = position
            .checked_sub(self.start)
            .filter(|&step| step < self.count)?;
        // The last range was checked to lie in the region, so no earlier one overflows.
        let offset = self.first.offset + u64::from(step) * self.stride;
        Some(Range {
            offset,
            ..self.first
        })
    }
}

/// The ranges of a list, by position.
pub(crate) enum Ranges {
    Listed(Vec<Range>),
    /// None of them empty, without gaps between their positions.
    Runs(Vec<Run>),
}

impl Ranges {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Listed(ranges) => ranges.len(),
            Self::Runs(runs) => runs
                .last()
                .map_or(0, |run| run.start as usize + run.count as usize),
        }
    }

    /// Looks positions up, best one after the other.
    pub(crate) fn cursor(&self) -> Cursor<'_> {
        Cursor {
            ranges: self,
            run: 0,
        }
    }
}

/// Looks positions up; remembers the run of the last one, because the next is mostly in it too.
pub(crate) struct Cursor<'a> {
    ranges: &'a Ranges,
    run: usize,
}

impl Cursor<'_> {
    pub(crate) fn at(&mut self, position: u32) -> Option<Range> {
        let runs = match self.ranges {
            Ranges::Listed(ranges) => return ranges.get(position as usize).copied(),
            Ranges::Runs(runs) => runs,
        };
        if let Some(found) = runs.get(self.run).and_then(|run| run.at(position)) {
            return Some(found);
        }
        let after = runs.partition_point(|run| run.start <= position);
        self.run = after.checked_sub(1)?;
        runs[self.run].at(position)
    }
}
