//! Segments that nobody uses any more, but of which the table of names still speaks.
//!
//! To take a name out of that table is a wait for memory. Where a whole pod goes, its segments are only marked, and names
//! that lead to a marked one are passed over. When enough of them are there, one walk through the table takes all of them
//! out, which reads it in its order; then the segments are free.

use super::stack::Stack;

/// Segments with names that are still to be swept out.
#[derive(Default)]
pub(super) struct Buried {
    /// A bit a segment; none when nothing is buried.
    bits: Vec<u64>,
    /// Those that the sweep under way is for.
    swept: Stack,
    /// Those that came since it began, or wait for the next one.
    waiting: Stack,
    /// How many names those have.
    names: u64,
}

impl Buried {
    pub(super) fn add(&mut self, segment: u32, names: u32) {
        let word = (segment / u64::BITS) as usize;
        if word >= self.bits.len() {
            self.bits.resize(word + 1, 0);
        }
        self.bits[word] |= 1 << (segment % u64::BITS);
        self.waiting.push(segment);
        self.names += u64::from(names);
    }

    #[inline]
    pub(super) fn contains(&self, segment: u32) -> bool {
        let word = self.bits.get((segment / u64::BITS) as usize);
        word.copied().unwrap_or_default() >> (segment % u64::BITS) & 1 == 1
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.swept.is_empty() && self.waiting.is_empty()
    }

    /// Whether a sweep is under way.
    pub(super) const fn is_swept(&self) -> bool {
        !self.swept.is_empty()
    }

    /// How many names wait for the next sweep.
    pub(super) const fn names(&self) -> u64 {
        self.names
    }

    /// A sweep begins, of all that is there now.
    pub(super) fn begin(&mut self) {
        assert!(!self.is_swept(), "a sweep is under way");
        std::mem::swap(&mut self.swept, &mut self.waiting);
        self.names = 0;
    }

    /// The sweep has come to its end; the segments that it was for.
    pub(super) fn end(&mut self) -> Stack {
        let free = std::mem::take(&mut self.swept);
        for segment in free.iter() {
            self.bits[(segment / u64::BITS) as usize] &= !(1 << (segment % u64::BITS));
        }
        if self.waiting.is_empty() {
            *self = Self::default();
        }
        free
    }

    pub(super) fn bytes(&self) -> usize {
        self.bits.capacity() * size_of::<u64>() + self.swept.bytes() + self.waiting.bytes()
    }
}
