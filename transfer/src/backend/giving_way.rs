//! What jobs that give way may have open on a path where the operations of all jobs stand in one line, and which of them wait
//! for that: so a job that somebody waits for finds little before it.

use std::collections::VecDeque;

/// Operations of jobs that give way that may be open on a path, of up to 1 MiB each.
pub(super) const OPEN_MAX: usize = 4;

/// The same while they are small.
const SMALL_OPEN_MAX: usize = 64;

/// Bytes from which an operation is not small.
pub(super) const LARGE_BYTES: u64 = 64 << 10;

/// The jobs of a path that give way to its others, by number.
pub(super) struct GivingWay<N> {
    open: usize,
    waiting: VecDeque<N>,
}

impl<N> Default for GivingWay<N> {
    fn default() -> Self {
        Self {
            open: 0,
            waiting: VecDeque::new(),
        }
    }
}

impl<N> GivingWay<N> {
    /// Whether an operation of so many bytes may be begun.
    pub(super) fn may_begin(&self, bytes: u64) -> bool {
        self.open < OPEN_MAX || (bytes < LARGE_BYTES && self.open < SMALL_OPEN_MAX)
    }

    /// An operation is open.
    pub(super) fn begin(&mut self) {
        self.open += 1;
    }

    /// An operation is over.
    pub(super) fn end(&mut self) {
        self.open -= 1;
    }

    /// A job waits, before those that have not begun.
    pub(super) fn wait(&mut self, job: N, has_begun: bool) {
        match has_begun {
            true => self.waiting.push_front(job),
            false => self.waiting.push_back(job),
        }
    }

    /// The job whose turn it is.
    pub(super) fn next(&mut self) -> Option<N> {
        self.waiting.pop_front()
    }
}
