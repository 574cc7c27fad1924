//! Puts a source's batches in order, and finds out when what it said before is worth nothing any more.
//!
//! [`Ingest`] is a state machine without I/O or clock. The driver tells it what arrives and asks for [`Action`]s after
//! each input until there is none. It promises that whatever was applied since the last [`Action::Clear`] or
//! [`Action::Replace`] is a contiguous part of what one incarnation of the publisher sent, in order and without repetition.
//!
//! Engines' messages carry a sequence number but no incarnation, and an idle publisher shows no gap. So on every
//! connect the last applied batch is asked for again: only if those bytes are the ones that were applied is this still
//! the same publisher, and what was missed follows right behind. Otherwise the source is cleared and replayed from its
//! start.
//!
//! A publisher that no longer has what was missed may tell instead what it held then: its image replaces what was
//! applied. Without one the source is cleared.

mod config;
mod history;
mod image;
mod order;
mod pending;
mod room;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use kvcache_core::ports::Position;
use kvcache_core::{Epoch, Sequence, Time};

use self::history::{History, Known};
use self::image::Image;
use self::pending::{Frame, Pending};

pub use config::{Action, BatchDigest, ClearReason, IngestConfig, IngestStats, Resume};
pub use image::ImagePiece;
pub use room::Room;

/// What the replay that is under way is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Replay {
    /// None is under way.
    Idle,
    /// The last applied batch comes first, then what was missed.
    Verify,
    /// What was missed, the publisher being the known one or nothing being applied yet.
    Follow,
    /// The rest is of no use; another replay is asked for when it has ended.
    Discard,
}

/// The order of one source's batches. See the [module](self).
#[derive(Debug)]
pub struct Ingest {
    config: IngestConfig,
    is_connected: bool,
    /// The publisher's incarnation as far as it tells.
    epoch: Option<Epoch>,
    /// The batch to apply next; none when any will do, as nothing is applied.
    next: Option<u64>,
    /// The batches applied last, by their hashes.
    history: History,
    /// Whether a replay failed that would have told more of what was before.
    is_partial: bool,
    replay: Replay,
    /// Whether the replay told anything new.
    has_progressed: bool,
    /// Whether something was known to be missing when the replay was asked for.
    is_gap_known: bool,
    fruitless: u32,
    /// What the publisher held before the next batch of the replay, as far as it has come.
    image: Option<Image>,
    pending: Pending,
    room: Arc<Room>,
    /// One past the highest live batch seen: the publisher has come that far.
    live_end: u64,
    deadline: Option<Time>,
    actions: VecDeque<Action>,
    stats: IngestStats,
}

impl Ingest {
    /// A source that is not connected and has said nothing yet.
    #[must_use]
    pub fn new(config: IngestConfig) -> Self {
        let room = Room::new(usize::MAX);
        Self {
            config,
            is_connected: false,
            epoch: None,
            next: None,
            history: History::default(),
            is_partial: false,
            replay: Replay::Idle,
            has_progressed: false,
            is_gap_known: false,
            fruitless: 0,
            image: None,
            pending: Pending::new(room.clone()),
            room,
            live_end: 0,
            deadline: None,
            actions: VecDeque::new(),
            stats: IngestStats::default(),
        }
    }

    /// A source that is not connected, and of which an earlier follower applied everything up to `resume`.
    ///
    /// Whether the publisher is still the one of then is asked on the first connect, as on any other.
    ///
    /// # Panics
    /// When `resume.last` is the number that marks the end of a replay.
    #[must_use]
    pub fn resume(config: IngestConfig, resume: Resume) -> Self {
        assert!(resume.last.0 < u64::MAX, "no batch has this number");
        let mut ingest = Self::new(config);
        ingest.epoch = resume.epoch;
        ingest.history.push(resume.last.0, resume.digest);
        ingest.next = Some(resume.last.0 + 1);
        ingest
    }

    /// Keeps what waits in a room that others keep theirs in, too: what finds none there is dropped as beyond the source's
    /// own bounds. To be called before any input.
    #[must_use]
    pub fn sharing(mut self, room: &Arc<Room>) -> Self {
        self.pending = Pending::new(room.clone());
        self.room = room.clone();
        self
    }

    /// What to do next; `None` until the next input.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`Self::handle_timeout`] wants to be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        self.deadline
    }

    /// How far the batches handed out reach. Engines do not tell their incarnation: their epoch is 0.
    #[must_use]
    pub fn position(&self) -> Position {
        Position {
            epoch: self.epoch.unwrap_or_default(),
            next: Sequence(self.next.unwrap_or_default()),
        }
    }

    /// Whether all that is known to have been published is handed out: connected, and no replay under way.
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.is_connected && self.replay == Replay::Idle
    }

    /// Whether a replay failed that would have told more of what the publisher holds; it is tried again.
    #[must_use]
    pub fn is_partial(&self) -> bool {
        self.is_partial
    }

    /// What happened so far.
    #[must_use]
    pub fn stats(&self) -> IngestStats {
        self.stats
    }

    /// The connection to the publisher is there, for the first time or again; live batches may follow.
    ///
    /// Batches of an earlier connection must not be handed in any more: they may be another publisher's.
    pub fn handle_connected(&mut self, now: Time) {
        self.drop_pending();
        self.is_connected = true;
        self.fruitless = 0;
        if self.config.has_replay {
            if self.is_partial {
                self.reset(ClearReason::ReplayFailed);
            }
            // After the reset: how far an earlier publisher had come says nothing about this one.
            self.live_end = self.next.unwrap_or_default();
            self.start_replay(now);
        } else {
            // Nothing tells whether this is the publisher of before.
            self.reset(ClearReason::Unverifiable);
            self.live_end = 0;
        }
    }

    /// The connection is gone. What was applied stays until the driver gives the source up.
    pub fn handle_disconnected(&mut self) {
        self.is_connected = false;
        self.replay = Replay::Idle;
        self.image = None;
        self.deadline = None;
        self.drop_pending();
    }

    /// A live batch; `epoch` is what its topic tells of the publisher's incarnation.
    pub fn handle_frame(
        &mut self,
        now: Time,
        epoch: Option<Epoch>,
        sequence: Sequence,
        payload: Bytes,
    ) {
        let Some(end) = sequence.0.checked_add(1) else {
            // The number that marks the end of a replay; no publisher gets there by counting.
            self.stats.dropped += 1;
            return;
        };
        if !self.is_connected {
            self.handle_connected(now);
        }
        let frame = Frame {
            sequence: sequence.0,
            payload,
        };
        if self.is_other_epoch(epoch) {
            self.epoch = epoch;
            self.restart(now, frame, ClearReason::NewEpoch);
            return;
        }
        self.epoch = epoch.or(self.epoch);
        if self.replay == Replay::Idle {
            self.live_end = self.live_end.max(end);
            self.take_live(now, frame);
        } else if self.pending.last().is_none_or(|last| last < frame.sequence) {
            self.live_end = self.live_end.max(end);
            self.push_pending(frame);
        } else if self.pending.contains(&frame) || self.history.find(&frame) == Known::Same {
            self.stats.duplicates += 1;
        } else {
            // A publisher never counts back: a new one took over while the replay was under way.
            self.restart(now, frame, ClearReason::Restarted);
        }
    }

    /// One batch of the replay asked for; `epoch` as in [`Self::handle_frame`], `None` where the reply has no topic.
    pub fn handle_replayed(
        &mut self,
        now: Time,
        epoch: Option<Epoch>,
        sequence: Sequence,
        payload: Bytes,
    ) {
        if matches!(self.replay, Replay::Idle | Replay::Discard) {
            self.touch(now);
            return;
        }
        self.touch(now);
        if self.is_replay_of_another(epoch) {
            return;
        }
        if sequence.0 == u64::MAX {
            self.stats.dropped += 1;
            return;
        }
        if self.replay == Replay::Verify {
            match self.history.is_last(sequence.0, &payload) {
                Known::Same => self.replay = Replay::Follow,
                Known::Different => self.abandon(ClearReason::Restarted),
                Known::Older => self.stats.duplicates += 1,
                Known::Newer => {
                    // The publisher no longer has the batch, so it begins with the oldest that it has.
                    self.begin_at(sequence.0);
                    self.replay = Replay::Follow;
                    self.take_replayed(sequence.0, payload);
                }
            }
            return;
        }
        self.take_replayed(sequence.0, payload);
    }

    /// The replay has told all it has.
    pub fn handle_replay_end(&mut self, now: Time) {
        self.image = None;
        match self.replay {
            Replay::Idle => {}
            Replay::Discard => self.start_replay(now),
            Replay::Verify => {
                // The last applied batch does not exist there: the publisher began anew and is not that far yet.
                self.reset(ClearReason::Restarted);
                self.start_replay(now);
            }
            Replay::Follow => {
                self.replay = Replay::Idle;
                self.deadline = self.is_partial.then(|| now + self.config.replay_retry);
                if self.has_progressed {
                    self.fruitless = 0;
                } else if self.is_gap_known {
                    self.fruitless += 1;
                }
                if self.next.is_none() {
                    // Asked from the start and nothing there: the first batch is still to come.
                    self.next = Some(0);
                }
                self.drain(now);
            }
        }
    }

    /// The replay could not be had or broke off. What live batches tell is followed meanwhile, and some time later the
    /// publisher's start is asked for again.
    pub fn handle_replay_failed(&mut self, now: Time) {
        let replay = std::mem::replace(&mut self.replay, Replay::Idle);
        self.image = None;
        if replay == Replay::Idle {
            return;
        }
        self.stats.replay_failures += 1;
        if replay == Replay::Verify || self.next.is_none() {
            self.reset(ClearReason::ReplayFailed);
            self.is_partial = true;
        }
        self.drain_unverified();
        self.deadline = self.is_partial.then(|| now + self.config.replay_retry);
    }

    /// Lets time pass: a replay that tells nothing for too long has failed, and what failed is tried again.
    pub fn handle_timeout(&mut self, now: Time) {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        self.deadline = None;
        if self.replay != Replay::Idle {
            self.handle_replay_failed(now);
        } else if self.is_connected && self.is_partial {
            self.reset(ClearReason::ReplayFailed);
            self.start_replay(now);
        }
    }

    fn is_other_epoch(&self, epoch: Option<Epoch>) -> bool {
        matches!((epoch, self.epoch), (Some(told), Some(known)) if told != known)
    }

    /// Whether another incarnation answers the replay, which then ends with everything known; its epoch is kept.
    fn is_replay_of_another(&mut self, epoch: Option<Epoch>) -> bool {
        let is_other = self.is_other_epoch(epoch);
        self.epoch = epoch.or(self.epoch);
        if is_other {
            self.drop_pending();
            self.abandon(ClearReason::NewEpoch);
        }
        is_other
    }

    /// Another publisher sent this batch.
    fn restart(&mut self, now: Time, frame: Frame, reason: ClearReason) {
        self.drop_pending();
        self.reset(reason);
        self.live_end = frame.sequence.saturating_add(1);
        if self.replay != Replay::Idle {
            self.replay = Replay::Discard;
            self.push_pending(frame);
        } else if frame.sequence == 0 || !self.config.has_replay {
            self.apply(frame.sequence, frame.payload);
        } else {
            self.push_pending(frame);
            self.start_replay(now);
        }
    }

    /// The replay shows that the publisher is another one: its start is asked for once this replay has ended.
    fn abandon(&mut self, reason: ClearReason) {
        self.reset(reason);
        self.replay = Replay::Discard;
    }

    /// Forgets everything about the publisher but what waits.
    fn reset(&mut self, reason: ClearReason) {
        if !self.history.is_empty() {
            self.stats.resyncs += 1;
            self.actions.push_back(Action::Clear { reason });
        }
        self.reset_silently();
    }

    fn reset_silently(&mut self) {
        self.history = History::default();
        self.image = None;
        self.next = None;
        self.is_partial = false;
    }

    fn apply(&mut self, sequence: u64, payload: Bytes) {
        if sequence == 0 {
            self.is_partial = false;
        }
        let digest = BatchDigest::of(&payload);
        self.history.push(sequence, digest);
        self.next = Some(sequence + 1);
        self.live_end = self.live_end.max(sequence + 1);
        self.stats.applied += 1;
        let position = self.position();
        self.actions.push_back(Action::Apply {
            sequence: Sequence(sequence),
            payload,
            position,
            digest,
        });
    }

    fn start_replay(&mut self, now: Time) {
        let last = self.history.last();
        self.image = None;
        self.replay = if last.is_some() {
            Replay::Verify
        } else {
            Replay::Follow
        };
        self.has_progressed = false;
        // A replay asked for before anything was known to be missing may have been answered before it was published.
        self.is_gap_known =
            self.pending.last().is_some() || self.live_end > self.next.unwrap_or_default();
        self.stats.replays += 1;
        self.touch(now);
        self.actions.push_back(Action::RequestReplay {
            from: Sequence(last.unwrap_or_default()),
        });
    }

    fn touch(&mut self, now: Time) {
        if self.replay != Replay::Idle {
            self.deadline = Some(now + self.config.replay_timeout);
        }
    }

    /// Keeps a batch for the end of the replay. One for which there is no room can still be replayed later, as
    /// `live_end` remembers that it exists.
    fn push_pending(&mut self, frame: Frame) {
        if !self.pending.push(frame, &self.config) {
            self.stats.dropped += 1;
        }
    }

    fn drop_pending(&mut self) {
        self.stats.dropped += self.pending.clear();
    }
}
