//! A long list of numbers in small pieces.
//!
//! A vector of millions is one allocation. When that is freed, glibc takes it that as much will be wanted again soon, and from
//! then on keeps up to twice as many bytes at the end of its heap: with a free list of 4 MiB, 9 MB of a process that had let
//! go of everything. Pieces also grow without a copy.

/// Numbers of a piece: 64 KiB, less than glibc maps by itself.
const PIECE: usize = 16 << 10;

/// Numbers, of which the last one comes first.
#[derive(Default)]
pub(super) struct Stack {
    /// All but the last one are full, and none is empty.
    pieces: Vec<Vec<u32>>,
}

impl Stack {
    pub(super) fn push(&mut self, number: u32) {
        match self.pieces.last_mut() {
            Some(last) if last.len() < PIECE => last.push(number),
            // Few numbers take as much as they need.
            None => self.pieces.push(vec![number]),
            Some(_) => {
                let mut piece = Vec::with_capacity(PIECE);
                piece.push(number);
                self.pieces.push(piece);
            }
        }
    }

    pub(super) fn pop(&mut self) -> Option<u32> {
        let last = self.pieces.last_mut()?;
        let number = last.pop();
        if last.is_empty() {
            self.pieces.pop();
        }
        number
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// In the order in which they came.
    pub(super) fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.pieces.iter().flatten().copied()
    }

    pub(super) fn bytes(&self) -> usize {
        let pieces: usize = self.pieces.iter().map(Vec::capacity).sum();
        pieces * size_of::<u32>() + self.pieces.capacity() * size_of::<Vec<u32>>()
    }
}

/// In the order in which they came; pieces go as they are read.
impl IntoIterator for Stack {
    type Item = u32;
    type IntoIter = std::iter::Flatten<std::vec::IntoIter<Vec<u32>>>;

    fn into_iter(self) -> Self::IntoIter {
        self.pieces.into_iter().flatten()
    }
}

impl Extend<u32> for Stack {
    fn extend<T: IntoIterator<Item = u32>>(&mut self, numbers: T) {
        numbers.into_iter().for_each(|number| self.push(number));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{PIECE, Stack};

    proptest! {
        /// Whatever is pushed and popped, it is a vector; no piece is larger than it should be.
        #[test]
        fn it_is_a_vector(steps in prop::collection::vec((any::<bool>(), 1..3 * PIECE), 1..20)) {
            let (mut stack, mut model) = (Stack::default(), Vec::new());
            for (number, (is_push, count)) in steps.into_iter().enumerate() {
                for at in 0..count as u32 {
                    if is_push {
                        stack.push(at ^ (number as u32) << 20);
                        model.push(at ^ (number as u32) << 20);
                    } else {
                        prop_assert_eq!(stack.pop(), model.pop());
                    }
                }
                prop_assert_eq!(stack.is_empty(), model.is_empty());
                prop_assert!(stack.iter().eq(model.iter().copied()));
                prop_assert!(stack.pieces.iter().all(|piece| piece.capacity() <= PIECE));
            }
            prop_assert!(stack.into_iter().eq(model));
        }
    }
}
