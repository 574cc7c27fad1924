//! Live batches that wait for a replay to end.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;

use super::IngestConfig;
use super::room::{Room, Share};

/// A live batch.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) sequence: u64,
    pub(super) payload: Bytes,
}

/// The batches that wait, by rising numbers.
#[derive(Debug)]
pub(super) struct Pending {
    frames: VecDeque<Frame>,
    share: Share,
}

impl Pending {
    pub(super) const fn new(room: Arc<Room>) -> Self {
        Self {
            frames: VecDeque::new(),
            share: Share::new(room),
        }
    }

    /// Takes a batch whose number is above all others'; false when there is no room.
    pub(super) fn push(&mut self, frame: Frame, config: &IngestConfig) -> bool {
        let bytes = frame.payload.len();
        let fits = self.frames.len() < config.pending_batches_max
            && self.share.bytes() + bytes <= config.pending_bytes_max
            && self.share.grow(bytes);
        if fits {
            self.frames.push_back(frame);
        }
        fits
    }

    /// The batch with the lowest number.
    pub(super) fn pop(&mut self) -> Option<Frame> {
        let frame = self.frames.pop_front()?;
        self.share.shrink(frame.payload.len());
        Some(frame)
    }

    /// Puts back what was popped last; false when others have taken its room since.
    pub(super) fn unpop(&mut self, frame: Frame) -> bool {
        let fits = self.share.grow(frame.payload.len());
        if fits {
            self.frames.push_front(frame);
        }
        fits
    }

    /// Drops everything; how many batches that were.
    pub(super) fn clear(&mut self) -> u64 {
        let dropped = self.frames.len() as u64;
        self.frames.clear();
        self.share.shrink(self.share.bytes());
        dropped
    }

    /// The highest number that waits.
    pub(super) fn last(&self) -> Option<u64> {
        self.frames.back().map(|frame| frame.sequence)
    }

    pub(super) fn contains(&self, frame: &Frame) -> bool {
        let place = self
            .frames
            .binary_search_by_key(&frame.sequence, |waiting| waiting.sequence);
        place.is_ok_and(|place| self.frames[place] == *frame)
    }
}
