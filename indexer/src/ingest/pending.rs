//! Live batches that wait for a replay to end.

use std::collections::VecDeque;

use bytes::Bytes;

use super::IngestConfig;

/// A live batch.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) sequence: u64,
    pub(super) payload: Bytes,
}

/// The batches that wait, by rising numbers.
#[derive(Debug, Default)]
pub(super) struct Pending {
    frames: VecDeque<Frame>,
    bytes: usize,
}

impl Pending {
    /// Takes a batch whose number is above all others'; false when there is no room.
    pub(super) fn push(&mut self, frame: Frame, config: &IngestConfig) -> bool {
        let bytes = self.bytes + frame.payload.len();
        if self.frames.len() >= config.pending_batches_max || bytes > config.pending_bytes_max {
            return false;
        }
        self.bytes = bytes;
        self.frames.push_back(frame);
        true
    }

    pub(super) fn pop(&mut self) -> Option<Frame> {
        let frame = self.frames.pop_front()?;
        self.bytes -= frame.payload.len();
        Some(frame)
    }

    /// Puts back what was popped last.
    pub(super) fn unpop(&mut self, frame: Frame) {
        self.bytes += frame.payload.len();
        self.frames.push_front(frame);
    }

    /// Drops everything; how many batches that were.
    pub(super) fn clear(&mut self) -> u64 {
        let dropped = self.frames.len() as u64;
        self.frames.clear();
        self.bytes = 0;
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
