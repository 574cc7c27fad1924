//! Answers one peer's requests for past batches.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use kvcache_core::event::NodeEvent;
use kvcache_core::{Error, Result};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep_until};

use super::serve::{Queued, STALL_MAX, stalled};
use super::{IMAGE_EVENTS_PER_PIECE_MAX, SEND_AHEAD_BYTES, Shared};
use crate::adapter;
use crate::zmtp::{Connection, Step};

/// Requests of one peer that wait for the answer to an earlier one.
const REQUESTS_WAITING_MAX: usize = 16;
/// The sequence number that ends a replay.
const REPLAY_END: [u8; 8] = [0xff; 8];

/// Serves a peer; returns why that ended, `Busy` if it stopped reading.
pub(super) async fn serve(shared: &Shared, peer: Connection, turns: &Semaphore) -> Error {
    let mut replay = Replay {
        shared,
        peer,
        queued: Queued::new(shared),
        waiting: VecDeque::new(),
        answering_since: Instant::now(),
    };
    loop {
        let ended = match replay.waiting.pop_front() {
            None => replay.listen().await,
            Some(start) => {
                shared.counters.replays.fetch_add(1, Ordering::Relaxed);
                // It is never closed; who waits here is not read from.
                let _turn = turns.acquire().await;
                replay.answering_since = Instant::now();
                replay.answer(start).await
            }
        };
        if let Err(error) = ended {
            return error;
        }
    }
}

/// `[empty, start]` → the first sequence number that is asked for.
fn parse_request(frames: &[Bytes]) -> Option<u64> {
    match frames {
        [empty, start] if empty.is_empty() => {
            let start: [u8; 8] = start.as_ref().try_into().ok()?;
            Some(u64::from_be_bytes(start))
        }
        _ => None,
    }
}

struct Replay<'a> {
    shared: &'a Shared,
    peer: Connection,
    queued: Queued<'a>,
    /// Where requests begin that are not answered yet.
    waiting: VecDeque<u64>,
    /// Until then it was not its fault that nothing was taken.
    answering_since: Instant,
}

impl Replay<'_> {
    /// Waits for what the peer does next.
    async fn listen(&mut self) -> Result<()> {
        let step = self.peer.step().await?;
        self.take(step)
    }

    /// # Errors
    /// `Invalid` when the peer asks more than it lets be answered.
    fn take(&mut self, step: Step) -> Result<()> {
        let Step::Message(frames) = step else {
            return Ok(());
        };
        let Some(start) = parse_request(&frames) else {
            tracing::debug!(frames = frames.len(), "malformed replay request");
            return Ok(());
        };
        if self.waiting.len() >= REQUESTS_WAITING_MAX {
            let found = self.waiting.len() + 1;
            let accepted = 0..=REQUESTS_WAITING_MAX;
            return Err(Error::invalid("requests at once", found, accepted));
        }
        self.waiting.push_back(start);
        Ok(())
    }

    /// Sends every batch from `start` to the newest at the time of asking, then the end marker; in the place of batches
    /// that are gone, what they left, if that is known.
    async fn answer(&mut self, start: u64) -> Result<()> {
        let end = self.shared.history().next();
        let mut next = start;
        while next < end {
            let image = self.shared.history().image_for(next);
            if let Some((cut, events)) = image {
                self.shared.counters.images.fetch_add(1, Ordering::Relaxed);
                self.send_image(cut, &events).await?;
                next = cut;
            }
            let Some((sequence, payload)) = self.shared.history().at_or_after(next) else {
                break;
            };
            if sequence > next && self.shared.history().image_for(next).is_some() {
                // It went while the image was sent: what it left is in the next image.
                continue;
            }
            let number = Bytes::copy_from_slice(&sequence.to_be_bytes());
            let topic = self.shared.topic.clone();
            self.send(&[Bytes::new(), topic, number, payload]).await?;
            next = sequence + 1;
        }
        let number = Bytes::from_static(&REPLAY_END);
        self.peer
            .queue(&[Bytes::new(), Bytes::new(), number, Bytes::new()]);
        self.drain().await
    }

    async fn send_image(&mut self, cut: u64, events: &[NodeEvent]) -> Result<()> {
        // An empty image has one piece too, which says so.
        let count = events.len().div_ceil(IMAGE_EVENTS_PER_PIECE_MAX).max(1);
        for piece in 0..count {
            let start = piece * IMAGE_EVENTS_PER_PIECE_MAX;
            let end = events.len().min(start + IMAGE_EVENTS_PER_PIECE_MAX);
            // The cut in the place of a time: pieces of different images are never the same bytes.
            let payload = adapter::encode_node_batch(cut as f64, &events[start..end]);
            let mut place = Vec::with_capacity(8);
            for number in [piece, count] {
                place.extend((number as u32).to_be_bytes());
            }
            let frames = [
                Bytes::new(),
                self.shared.topic.clone(),
                Bytes::copy_from_slice(&cut.to_be_bytes()),
                Bytes::from(payload),
                Bytes::from(place),
            ];
            self.send(&frames).await?;
        }
        Ok(())
    }

    /// Queues a reply; waits when that is much.
    async fn send(&mut self, frames: &[Bytes]) -> Result<()> {
        self.peer.queue(frames);
        if self.peer.unsent() < SEND_AHEAD_BYTES {
            return Ok(());
        }
        self.drain().await
    }

    /// Waits until the peer has taken all replies.
    ///
    /// # Errors
    /// `Busy` when it takes nothing any more; what [`Connection::step`] says.
    async fn drain(&mut self) -> Result<()> {
        while let Some(since) = self.peer.waiting_since() {
            let since = since.max(self.answering_since);
            self.queued.set(self.peer.unsent());
            let step = tokio::select! {
                step = self.peer.step() => step?,
                () = sleep_until(since + STALL_MAX) => {
                    // It may have taken some since.
                    if self.peer.waiting_since().is_some_and(|taken| taken <= since) {
                        return Err(stalled(self.peer.unsent() as u64));
                    }
                    continue;
                }
            };
            self.take(step)?;
        }
        self.queued.set(0);
        Ok(())
    }
}
