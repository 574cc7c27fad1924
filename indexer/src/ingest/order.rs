//! What becomes of a batch: applied, kept, asked for again, or dropped.

use bytes::Bytes;
use kvcache_core::Time;

use super::history::Known;
use super::pending::Frame;
use super::{ClearReason, Ingest};

/// How often in a row a replay may end without telling anything new while live batches wait for something older. Then
/// those batches are not this publisher's and are dropped.
const FRUITLESS_REPLAYS_MAX: u32 = 2;
/// After so many the publisher evidently never replays what it sends: the source begins anew with what comes live.
const FRUITLESS_REPLAYS_TO_RESET: u32 = 4;

impl Ingest {
    /// A live batch while no replay is under way.
    pub(super) fn take_live(&mut self, now: Time, frame: Frame) {
        match self.next {
            Some(next) if frame.sequence > next => {
                self.stats.gaps += 1;
                if self.config.has_replay {
                    self.push_pending(frame);
                    self.start_replay(now);
                } else {
                    self.reset(ClearReason::Unverifiable);
                    self.apply(frame.sequence, frame.payload);
                }
            }
            Some(next) if frame.sequence < next => match self.history.find(&frame) {
                Known::Same => self.stats.duplicates += 1,
                Known::Older if self.config.has_replay => {
                    // Too long ago to tell a late batch from a new publisher's.
                    self.push_pending(frame);
                    self.start_replay(now);
                }
                _ => self.restart(now, frame, ClearReason::Restarted),
            },
            _ => {
                self.fruitless = 0;
                self.apply(frame.sequence, frame.payload);
            }
        }
    }

    /// A batch of a replay whose publisher is known to be the right one.
    pub(super) fn take_replayed(&mut self, sequence: u64, payload: Bytes) {
        match self.next {
            Some(next) if sequence < next => {
                match self.history.find(&Frame { sequence, payload }) {
                    Known::Different => self.abandon(ClearReason::Restarted),
                    _ => self.stats.duplicates += 1,
                }
                return;
            }
            Some(next) if sequence == next => {}
            _ => self.begin_at(sequence),
        }
        self.has_progressed = true;
        self.apply(sequence, payload);
    }

    /// Applies what waited for the replay, as far as it follows on.
    pub(super) fn drain(&mut self, now: Time) {
        while let Some(frame) = self.pending.pop() {
            match self.next {
                Some(next) if frame.sequence > next => {
                    if self.fruitless < FRUITLESS_REPLAYS_MAX {
                        self.stats.gaps += 1;
                        if !self.pending.unpop(frame) {
                            self.stats.dropped += 1;
                        }
                        self.start_replay(now);
                        return;
                    }
                    if self.history.is_empty() || self.fruitless >= FRUITLESS_REPLAYS_TO_RESET {
                        self.reset(ClearReason::HistoryLost);
                        self.fruitless = 0;
                        self.apply(frame.sequence, frame.payload);
                    } else {
                        self.stats.dropped += 1;
                    }
                }
                Some(next) if frame.sequence < next => match self.history.find(&frame) {
                    Known::Different => {
                        // Either this is an old publisher's last word, or a new one took over after the replay: ask.
                        self.stats.dropped += 1;
                        self.start_replay(now);
                        return;
                    }
                    _ => self.stats.duplicates += 1,
                },
                _ => self.apply(frame.sequence, frame.payload),
            }
        }
        let next = self.next.unwrap_or_default();
        if self.live_end > next {
            if self.fruitless < FRUITLESS_REPLAYS_MAX {
                self.start_replay(now);
            } else {
                self.live_end = next;
            }
        }
    }

    /// Goes on with what waited although the replay failed: behind a gap the source begins anew.
    pub(super) fn drain_unverified(&mut self) {
        while let Some(frame) = self.pending.pop() {
            match self.next {
                Some(next) if frame.sequence < next => match self.history.find(&frame) {
                    Known::Different => {
                        self.reset(ClearReason::Restarted);
                        self.is_partial = true;
                        self.apply(frame.sequence, frame.payload);
                    }
                    _ => self.stats.duplicates += 1,
                },
                Some(next) if frame.sequence > next => {
                    self.stats.gaps += 1;
                    self.reset(ClearReason::ReplayFailed);
                    self.is_partial = true;
                    self.apply(frame.sequence, frame.payload);
                }
                _ => self.apply(frame.sequence, frame.payload),
            }
        }
        if self.live_end > self.next.unwrap_or_default() {
            self.reset(ClearReason::ReplayFailed);
            self.is_partial = true;
            self.live_end = 0;
        }
    }
}
