//! The batches applied last, kept as hashes: enough to tell a repeated batch from another publisher's.

use std::collections::VecDeque;

use super::config::BatchDigest;
use super::pending::Frame;

/// How many batches are remembered.
const BATCHES_KEPT: usize = 256;

/// What is known of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// It was applied.
    Same,
    /// Another one with this number was applied.
    Different,
    /// Its number is below those remembered.
    Older,
    /// Its number is above those remembered.
    Newer,
}

/// The numbers and hashes of the last batches, without a gap.
#[derive(Debug, Default)]
pub(super) struct History {
    /// The number of the last one, if there is one.
    last: u64,
    hashes: VecDeque<BatchDigest>,
}

impl History {
    pub(super) fn is_empty(&self) -> bool {
        self.hashes.is_empty()
    }

    /// The number of the last batch.
    pub(super) fn last(&self) -> Option<u64> {
        (!self.is_empty()).then_some(self.last)
    }

    pub(super) fn push(&mut self, sequence: u64, digest: BatchDigest) {
        assert!(
            self.is_empty() || self.last + 1 == sequence,
            "batch {sequence} does not follow {}",
            self.last
        );
        if self.hashes.len() == BATCHES_KEPT {
            self.hashes.pop_front();
        }
        self.hashes.push_back(digest);
        self.last = sequence;
    }

    pub(super) fn find(&self, frame: &Frame) -> Known {
        if self.is_empty() || frame.sequence > self.last {
            return Known::Newer;
        }
        let back = self.last - frame.sequence;
        if back >= self.hashes.len() as u64 {
            return Known::Older;
        }
        let hash = self.hashes[self.hashes.len() - 1 - back as usize];
        if hash == BatchDigest::of(&frame.payload) {
            Known::Same
        } else {
            Known::Different
        }
    }

    /// What a batch is beside the last one.
    pub(super) fn is_last(&self, sequence: u64, payload: &[u8]) -> Known {
        match self.last() {
            Some(last) if sequence < last => Known::Older,
            Some(last) if sequence == last => {
                let same = self.hashes.back() == Some(&BatchDigest::of(payload));
                if same { Known::Same } else { Known::Different }
            }
            _ => Known::Newer,
        }
    }
}
