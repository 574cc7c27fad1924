//! From what the state machine wants to what the index holds.

use std::collections::HashMap;

use bytes::Bytes;
use kvcache_core::{EngineHash, ErrorKind, Result, Tier};

use super::{Cursor, Follower, age};
use crate::adapter::{Batch, RemovedBlocks, SourceEvent, decode_batch_with};
use crate::index::SourceId;
use crate::ingest::Action;
use crate::snapshot::Mark;

/// After so many blocks others have their turn: one long batch holds up neither lookups nor other sources.
const BLOCKS_PER_TURN: usize = 4096;
/// The most events that the index is given at once.
const EVENTS_PER_CALL: usize = 64;

/// How much of a turn is used up.
#[derive(Default)]
struct Turn {
    blocks: usize,
}

impl Turn {
    async fn used(&mut self, event: &SourceEvent) {
        self.blocks += match event {
            SourceEvent::Stored(stored) => stored.hashes.len(),
            SourceEvent::Removed(removed) => removed.hashes.len(),
            SourceEvent::Cleared => 0,
        };
        // So that empty events count too.
        self.blocks += 1;
        if self.blocks >= BLOCKS_PER_TURN {
            self.blocks = 0;
            tokio::task::yield_now().await;
        }
    }
}

impl Follower {
    /// Does what the state machine wants; returns where to replay from, if it wants that.
    pub(super) async fn act(&mut self, is_live: bool) -> Option<u64> {
        let mut replay_from = None;
        let state = self.state.clone();
        let is_whole = !self.ingest.is_partial();
        while let Some(action) = self.ingest.poll_action() {
            match action {
                Action::Apply {
                    payload,
                    position,
                    digest,
                    ..
                } => {
                    let mut cursor = state.cursor.lock().await;
                    self.apply(&payload, is_live).await;
                    let mark = Some(Mark { position, digest });
                    *cursor = Cursor { mark, is_whole };
                }
                Action::Replace { pieces } => {
                    let mut cursor = state.cursor.lock().await;
                    self.replace(&pieces).await;
                    *cursor = Cursor::default();
                }
                Action::Clear { reason } => {
                    tracing::info!(source = %self.name, reason = reason.name(), "source begins anew");
                    self.metrics.cleared(reason);
                    self.clear().await;
                }
                Action::RequestReplay { from } => replay_from = Some(from.0),
            }
        }
        if self.ingest.is_current() {
            self.unverified_until = None;
        }
        self.report();
        replay_from
    }

    pub(super) async fn clear(&mut self) {
        let mut cursor = self.state.cursor.lock().await;
        self.index.clear_source(self.id);
        self.rank = None;
        *cursor = Cursor::default();
        // Nothing is left that nobody vouches for.
        self.unverified_until = None;
    }

    async fn apply(&mut self, payload: &[u8], is_live: bool) {
        let batch = match decode_batch_with(payload, self.spec.kind, &self.limits.media) {
            Ok(batch) => batch,
            Err(error) => {
                tracing::debug!(source = %self.name, %error, "undecodable batch");
                self.metrics.events_rejected(1);
                return;
            }
        };
        for (medium, events) in &batch.unknown_media {
            if self.metrics.unknown_medium(medium, *events) {
                let taken_for = self.limits.media.of(medium).0.name();
                tracing::warn!(source = %self.name, medium, taken_for, "a medium that is not known");
            }
        }
        self.weigh(&batch);
        if let Err(error) = self.learn_rank(batch.rank) {
            tracing::warn!(source = %self.name, %error, "batch not applied");
            self.metrics.events_rejected(batch.events.len() as u64);
            return;
        }
        let mut events = Vec::with_capacity(batch.events.len());
        for event in &batch.events {
            match event {
                Ok(event) => events.push((self.id, event)),
                Err(error) => {
                    tracing::debug!(source = %self.name, %error, "undecodable event");
                    self.metrics.events_rejected(1);
                }
            }
        }
        let mut turn = Turn::default();
        for events in events.chunks(EVENTS_PER_CALL) {
            self.apply_events(events);
            for (_, event) in events {
                turn.used(event).await;
            }
        }
        self.metrics.batch_applied();
        if is_live {
            self.lag = age(batch.timestamp);
            self.metrics.lag.record(self.lag);
        }
    }

    /// Takes in what the media are worth that a batch stores in.
    fn weigh(&self, batch: &Batch) {
        for medium in &batch.weighed_media {
            if let Some(named) = self.limits.media.weight_of(medium)
                && let Err(error) = self.index.weigh_medium(self.id, &named)
            {
                tracing::warn!(source = %self.name, medium, %error, "a medium weighs what its tier does");
            }
        }
    }

    fn apply_event(&self, event: &SourceEvent) {
        self.apply_events(&[(self.id, event)]);
    }

    fn apply_events(&self, events: &[(SourceId, &SourceEvent)]) {
        self.index.apply_all(events, |applied| match applied {
            Ok(applied) => self.metrics.event_applied(&applied),
            Err(error) => {
                tracing::debug!(source = %self.name, %error, "event not applied");
                self.metrics.events_rejected(1);
            }
        });
    }

    /// Makes what the index has of the source what an image says: first what is gone is taken out, then what is new put
    /// in. What both have is never missing in between, and what is gone is never put in again.
    ///
    /// An image that cannot be read leaves nothing: less is known then, but nothing wrong.
    async fn replace(&mut self, pieces: &[Bytes]) {
        let replaced = self.try_replace(pieces).await;
        match replaced {
            Ok(blocks) => {
                tracing::info!(source = %self.name, blocks, "source goes on from its publisher's image");
                self.metrics.replaced();
            }
            Err(error) => {
                tracing::warn!(source = %self.name, %error, "the publisher's image is of no use");
                self.metrics.events_rejected(1);
                self.index.clear_source(self.id);
            }
        }
        // What a snapshot said is replaced, too.
        self.unverified_until = None;
    }

    /// # Errors
    /// What [`decode_batch_with`] refuses; `Corrupt` for an event that stores nothing.
    async fn try_replace(&self, pieces: &[Bytes]) -> Result<usize> {
        let (mut stored, mut media) = (Vec::new(), Vec::new());
        let mut wanted: HashMap<u64, [bool; Tier::ALL.len()]> = HashMap::new();
        for piece in pieces {
            let mut batch = decode_batch_with(piece, self.spec.kind, &self.limits.media)?;
            for event in std::mem::take(&mut batch.events) {
                let event = event?;
                let SourceEvent::Stored(blocks) = &event else {
                    let what = "an image with an event that stores nothing";
                    return Err(kvcache_core::Error::new(ErrorKind::Corrupt, what));
                };
                for hash in &blocks.hashes {
                    wanted.entry(hash.0).or_default()[blocks.tier as usize] = true;
                }
                stored.push(event);
            }
            media.push(batch);
            tokio::task::yield_now().await;
        }
        let (index, id) = (self.index.clone(), self.id);
        let image = tokio::task::spawn_blocking(move || index.export(id)).await;
        let image = image.map_err(|error| {
            kvcache_core::Error::new(ErrorKind::Internal, "export a source").with_source(error)
        })??;
        let mut turn = Turn::default();
        if !self.index.is_plain(&image.spec.pod) {
            // The names in its image are not the publisher's.
            self.index.clear_source(self.id);
        }
        // Whether another pod's announcement keeps a block in a shared tier is not this source's to say.
        for tier in Tier::ALL.into_iter().filter(|tier| !tier.is_shared()) {
            for piece in &image.pieces {
                let blocks = piece.blocks.iter();
                let gone = blocks.filter(|block| {
                    let is_wanted = wanted
                        .get(&block.hash.0)
                        .is_some_and(|tiers| tiers[tier as usize]);
                    block.copies[tier as usize] > 0 && !is_wanted
                });
                let hashes: Vec<EngineHash> = gone.map(|block| block.hash).collect();
                if !hashes.is_empty() {
                    let event = SourceEvent::Removed(RemovedBlocks {
                        hashes,
                        tier,
                        group: None,
                    });
                    self.apply_event(&event);
                    turn.used(&event).await;
                }
            }
        }
        media.iter().for_each(|batch| self.weigh(batch));
        for event in &stored {
            self.apply_event(event);
            turn.used(event).await;
        }
        Ok(wanted.len())
    }
}
