//! Who of a tensor-parallel group holds which heads.

use std::ops::Range;

use super::TENSOR_RANKS_MAX;
use crate::error::{Error, ErrorKind};

/// One rank of a tensor-parallel group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tensor {
    rank: u32,
    size: u32,
}

impl Tensor {
    /// The only rank of an engine without tensor parallelism.
    pub const SINGLE: Self = Self { rank: 0, size: 1 };

    /// Rank `rank` of `size`.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] with the number and its range.
    pub fn new(rank: u32, size: u32) -> Result<Self, Error> {
        if !(1..=TENSOR_RANKS_MAX).contains(&size) {
            return Err(Error::invalid("tensor_size", size, 1..=TENSOR_RANKS_MAX));
        }
        if rank >= size {
            return Err(Error::invalid("tensor_rank", rank, 0..size));
        }
        Ok(Self { rank, size })
    }

    /// The rank's number.
    #[must_use]
    pub const fn rank(self) -> u32 {
        self.rank
    }

    /// Ranks in the group.
    #[must_use]
    pub const fn size(self) -> u32 {
        self.size
    }

    /// Which of `heads` KV heads this rank holds, as vLLM and SGLang divide them.
    ///
    /// Equal runs in rank order; with more ranks than heads, neighbours hold the same head. A latent is one head, so
    /// every rank holds it whole.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when neither number divides the other.
    pub fn heads(self, heads: u32) -> Result<Range<u32>, Error> {
        if heads > 0 && heads.is_multiple_of(self.size) {
            let each = heads / self.size;
            return Ok(self.rank * each..(self.rank + 1) * each);
        }
        if heads > 0 && self.size.is_multiple_of(heads) {
            let head = self.rank / (self.size / heads);
            return Ok(head..head + 1);
        }
        Err(Error::new(
            ErrorKind::Invalid,
            format!(
                "{heads} KV heads cannot be divided among {} ranks",
                self.size
            ),
        ))
    }
}
