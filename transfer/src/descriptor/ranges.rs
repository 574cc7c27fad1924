//! The checked ranges of a list: of one length in one region, each by itself, or as runs of equal steps.

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

/// Ranges of one length in one region, as engines have them: a third of the memory that [`Range`]s take.
#[derive(Debug)]
pub(crate) struct Uniform {
    target: u32,
    len: u64,
    offsets: Vec<u64>,
}

impl Uniform {
    fn range(&self, offset: u64) -> Range {
        Range {
            target: self.target,
            offset,
            len: self.len,
        }
    }

    fn listed(&self, capacity: usize) -> Vec<Range> {
        let mut ranges = Vec::with_capacity(capacity);
        ranges.extend(self.offsets.iter().map(|&offset| self.range(offset)));
        ranges
    }
}

/// The ranges of a list, by position.
pub(crate) enum Ranges {
    Uniform(Uniform),
    Listed(Vec<Range>),
    /// None of them empty, without gaps between their positions.
    Runs(Vec<Run>),
}

impl Ranges {
    /// None yet, with room for `count`.
    pub(crate) fn with_capacity(count: usize) -> Self {
        Self::Uniform(Uniform {
            target: 0,
            len: 0,
            offsets: Vec::with_capacity(count),
        })
    }

    /// Appends a range to those that are listed; `count` is how many there will be.
    #[inline]
    pub(crate) fn push(&mut self, range: Range, count: usize) {
        if let Self::Uniform(uniform) = self {
            if uniform.offsets.is_empty() {
                (uniform.target, uniform.len) = (range.target, range.len);
            }
            if (uniform.target, uniform.len) == (range.target, range.len) {
                uniform.offsets.push(range.offset);
                return;
            }
        }
        self.push_other(range, count);
    }

    #[cold]
    fn become_listed(&mut self, count: usize) {
        if let Self::Uniform(uniform) = self {
            *self = Self::Listed(uniform.listed(count));
        }
    }

    fn push_other(&mut self, range: Range, count: usize) {
        self.become_listed(count);
        if let Self::Listed(ranges) = self {
            ranges.push(range);
        }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Uniform(uniform) => uniform.offsets.len(),
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

/// What finds ranges by position.
pub(crate) trait Lookup {
    fn at(&mut self, position: u32) -> Option<Range>;
}

impl Lookup for &Uniform {
    #[inline]
    fn at(&mut self, position: u32) -> Option<Range> {
        let offset = *self.offsets.get(position as usize)?;
        Some(self.range(offset))
    }
}

/// Looks positions up; remembers the run of the last one, because the next is mostly in it too.
pub(crate) struct Cursor<'a> {
    ranges: &'a Ranges,
    run: usize,
}

impl Lookup for Cursor<'_> {
    fn at(&mut self, position: u32) -> Option<Range> {
        let runs = match self.ranges {
            Ranges::Uniform(uniform) => {
                let mut uniform = uniform;
                return uniform.at(position);
            }
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
