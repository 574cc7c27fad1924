//! The past batches of a stream, for replay and for the publisher's own thread; bounded in bytes.
//!
//! Of a node's stream what the dropped batches left is kept too, so that a replay that begins before the oldest batch
//! still tells everything.

use std::collections::VecDeque;

use bytes::Bytes;

use kvcache_core::event::NodeEvent;

use super::held::Held;

/// What one batch costs beside its payload: headers and its place in the history.
const BATCH_OVERHEAD_BYTES: usize = 256;

/// Batches in sequence; the oldest leave when the bytes exceed their bound. The newest always stays.
pub(super) struct History {
    batches: VecDeque<Entry>,
    /// The sequence number of the front batch, or of the next one when empty.
    first: u64,
    bytes: usize,
    /// Bytes ever pushed.
    pushed: u64,
    bytes_max: usize,
    /// What the batches before the first one left; none when that is not known.
    held: Option<Held>,
}

struct Entry {
    payload: Bytes,
    /// Bytes ever pushed before this one.
    before: u64,
}

impl History {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self {
            batches: VecDeque::new(),
            first: 0,
            bytes: 0,
            pushed: 0,
            bytes_max,
            held: None,
        }
    }

    /// As [`History::new`], of a stream whose events say by themselves what is held after them.
    pub(super) fn of_node(bytes_max: usize) -> Self {
        Self {
            held: Some(Held::default()),
            ..Self::new(bytes_max)
        }
    }

    /// The sequence number after the newest batch.
    pub(super) fn next(&self) -> u64 {
        self.first + self.batches.len() as u64
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether a batch from `sequence` on has left already.
    pub(super) const fn has_dropped(&self, sequence: u64) -> bool {
        sequence < self.first
    }

    /// Bytes of the batches from `sequence` on.
    pub(super) fn bytes_from(&self, sequence: u64) -> u64 {
        self.index(sequence)
            .and_then(|index| self.batches.get(index))
            .map_or(0, |entry| self.pushed - entry.before)
    }

    /// Appends a batch and returns the sequence number after it.
    pub(super) fn push(&mut self, payload: Bytes) -> u64 {
        let cost = cost(&payload);
        self.batches.push_back(Entry {
            payload,
            before: self.pushed,
        });
        self.bytes += cost;
        self.pushed += cost as u64;
        while self.bytes > self.bytes_max && self.batches.len() > 1 {
            if let Some(oldest) = self.batches.pop_front() {
                self.bytes -= self::cost(&oldest.payload);
                self.first += 1;
                // What cannot be read leaves nothing to build on: whoever asks is told less, never something wrong.
                self.held = self
                    .held
                    .take()
                    .and_then(|mut held| held.fold(&oldest.payload).then_some(held));
            }
        }
        self.next()
    }

    /// What the batches before the oldest one left, and that one's number; none when nothing from `sequence` on is
    /// missing, or it is not known.
    pub(super) fn image_for(&self, sequence: u64) -> Option<(u64, Vec<NodeEvent>)> {
        let held = self.held.as_ref().filter(|_| sequence < self.first)?;
        Some((self.first, held.events()))
    }

    /// The first batch at or after `sequence` that is still here.
    pub(super) fn at_or_after(&self, sequence: u64) -> Option<(u64, Bytes)> {
        let entry = self.batches.get(self.index(sequence)?)?;
        Some((sequence.max(self.first), entry.payload.clone()))
    }

    /// Where the first batch at or after `sequence` would be.
    fn index(&self, sequence: u64) -> Option<usize> {
        usize::try_from(sequence.saturating_sub(self.first)).ok()
    }
}

fn cost(payload: &Bytes) -> usize {
    payload.len() + BATCH_OVERHEAD_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pushes more than fits and compares with what arithmetic says must be left.
    #[test]
    fn the_oldest_batches_leave_and_the_newest_stays() {
        let one = 1000 + BATCH_OVERHEAD_BYTES;
        let mut history = History::new(3 * one);
        for round in 1..=10 {
            assert_eq!(
                history.push(Bytes::from(vec![round; 1000])),
                u64::from(round)
            );
        }
        assert_eq!(history.bytes(), 3 * one);
        assert_eq!(
            history.at_or_after(0).map(|(sequence, _)| sequence),
            Some(7)
        );
        assert_eq!(
            history.at_or_after(9).map(|(_, payload)| payload[0]),
            Some(10)
        );
        assert!(history.at_or_after(10).is_none());
        assert_eq!(history.bytes_from(8), 2 * one as u64);
        assert_eq!(history.bytes_from(10), 0);

        history.push(Bytes::from(vec![0; 100_000]));
        assert_eq!(
            history.at_or_after(0).map(|(sequence, _)| sequence),
            Some(10)
        );
    }
}
