//! The publisher's thread: sends new batches to subscribers and old ones to whoever asks.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use kvcache_core::event::NodeEvent;
use tokio::time::timeout;
use zeromq::{
    PubSocket, RouterRecvHalf, RouterSendHalf, RouterSocket, Socket, SocketRecv, SocketSend,
    ZmqMessage,
};

use super::budget::Budget;
use super::listen::Listening;
use super::{IMAGE_EVENTS_PER_PIECE_MAX, Shared};
use crate::adapter;

/// A full send queue that gives nothing back for so long belongs to a subscriber that has stopped.
const STALL_MAX: Duration = Duration::from_secs(1);
/// After the sockets could not be set up, so long until the next attempt.
const RETRY_AFTER: Duration = Duration::from_millis(200);
/// The sequence number that ends a replay.
const REPLAY_END: [u8; 8] = [0xff; 8];

/// The two bound endpoints of a publisher.
pub(super) struct Endpoints {
    pub(super) events: Listening,
    pub(super) replay: Listening,
}

/// Why a session ended.
enum End {
    /// The publisher is being closed.
    Stopped,
    /// A subscriber has stopped reading while its queue was full.
    Stalled,
}

/// Runs sessions until the publisher is closed.
///
/// The ZMQ library cannot disconnect one subscriber, and a queue behind a stopped one is only freed with its task. So a
/// stall ends the session with its whole runtime: every queue is freed, the healthy subscribers connect again and replay
/// what they missed.
pub(super) fn run(shared: &Arc<Shared>, endpoints: &Endpoints) {
    let mut cursor = 0;
    loop {
        let runtime = match tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
        {
            Ok(runtime) => runtime,
            Err(error) => {
                tracing::error!(%error, topic = %shared.topic_text(), "start event publisher");
                return;
            }
        };
        match runtime.block_on(session(shared, endpoints, &mut cursor)) {
            Ok(End::Stopped) => return,
            Ok(End::Stalled) => {
                shared.disconnected.send_modify(|count| *count += 1);
                tracing::warn!(
                    topic = %shared.topic_text(),
                    "a subscriber of KV events stopped reading; all are disconnected and will replay"
                );
            }
            Err(error) => {
                tracing::error!(%error, topic = %shared.topic_text(), "open event sockets");
                let mut stop = shared.stop.subscribe();
                let stopped = async {
                    timeout(RETRY_AFTER, stop.wait_for(|stop| *stop))
                        .await
                        .is_ok()
                };
                if runtime.block_on(stopped) {
                    return;
                }
            }
        }
    }
}

async fn session(
    shared: &Arc<Shared>,
    endpoints: &Endpoints,
    cursor: &mut u64,
) -> zeromq::ZmqResult<End> {
    let mut events = PubSocket::new();
    events.bind_listener(endpoints.events.share()?).await?;
    let mut router = RouterSocket::new();
    router.bind_listener(endpoints.replay.share()?).await?;
    let (replies, requests) = router.split();
    let mut stop = shared.stop.subscribe();
    let end = tokio::select! {
        end = pump(shared, events, cursor) => end,
        end = serve_replays(shared, requests, replies) => end,
        _ = stop.wait_for(|stop| *stop) => End::Stopped,
    };
    Ok(end)
}

/// Sends what was published, in order, as the queue has room.
async fn pump(shared: &Arc<Shared>, mut events: PubSocket, cursor: &mut u64) -> End {
    let mut published = shared.published.subscribe();
    loop {
        published.mark_unchanged();
        let batch = shared.history().at_or_after(*cursor);
        let Some((sequence, payload)) = batch else {
            shared.sent.send_replace(*cursor);
            if published.changed().await.is_err() {
                return End::Stopped;
            }
            continue;
        };
        let skipped = sequence - *cursor;
        shared
            .counters
            .skipped
            .fetch_add(skipped, Ordering::Relaxed);
        *cursor = sequence;
        let Some(payload) = room_for(shared, &payload, sequence).await else {
            return End::Stalled;
        };
        let frames = [
            shared.topic.clone(),
            Bytes::copy_from_slice(&sequence.to_be_bytes()),
            payload,
        ];
        if let Err(error) = events.send(message(frames)).await {
            tracing::debug!(%error, "send KV events");
        }
        *cursor = sequence + 1;
    }
}

/// Counts the payload against the send queue, waiting for room; none when a subscriber has stopped.
///
/// Stopped means: nothing was given back for [`STALL_MAX`], or half of the history waits behind the full queue, so that
/// waiting on would cost the other subscribers their replay.
async fn room_for(shared: &Arc<Shared>, payload: &Bytes, sequence: u64) -> Option<Bytes> {
    let mut room = shared.queue.watch();
    let mut published = shared.published.subscribe();
    loop {
        room.mark_unchanged();
        published.mark_unchanged();
        if let Some(counted) = shared.queue.take(payload) {
            return Some(counted);
        }
        // Let the writers run before judging the backlog: this thread is theirs too.
        tokio::task::yield_now().await;
        if room.has_changed().unwrap_or(true) {
            continue;
        }
        if shared.history().bytes_from(sequence) * 2 > shared.replay_bytes_max as u64 {
            return None;
        }
        let waited = timeout(STALL_MAX, async {
            tokio::select! {
                _ = room.changed() => {}
                _ = published.changed() => {}
            }
        });
        if waited.await.is_err() {
            return None;
        }
    }
}

/// Answers replay requests, one after the other.
async fn serve_replays(
    shared: &Arc<Shared>,
    mut requests: RouterRecvHalf,
    mut replies: RouterSendHalf,
) -> End {
    loop {
        let Ok(request) = requests.recv().await else {
            // The library reports an empty peer set this way; yield so that peers can connect.
            tokio::task::yield_now().await;
            continue;
        };
        let frames = request.into_vec();
        let Some((peer, start)) = parse_replay_request(&frames) else {
            tracing::debug!(frames = frames.len(), "malformed replay request");
            continue;
        };
        shared.counters.replays.fetch_add(1, Ordering::Relaxed);
        let replay = Replay {
            shared,
            budget: &shared.replay_queue,
            peer,
        };
        if let Err(Stalled) = replay.answer(start, &mut replies).await {
            return End::Stalled;
        }
    }
}

/// `[peer, empty, start]` → the peer and the first sequence number it asks for.
fn parse_replay_request(frames: &[Bytes]) -> Option<(&Bytes, u64)> {
    match frames {
        [peer, empty, start] if empty.is_empty() => {
            let start: [u8; 8] = start.as_ref().try_into().ok()?;
            Some((peer, u64::from_be_bytes(start)))
        }
        _ => None,
    }
}

struct Stalled;

struct Replay<'a> {
    shared: &'a Arc<Shared>,
    budget: &'a Budget,
    peer: &'a Bytes,
}

impl Replay<'_> {
    /// Sends every batch from `start` to the newest at the time of asking, then the end marker; in the place of batches
    /// that are gone, what they left, if that is known.
    async fn answer(&self, start: u64, replies: &mut RouterSendHalf) -> Result<(), Stalled> {
        let end = self.shared.history().next();
        let mut next = start;
        while next < end {
            let image = self.shared.history().image_for(next);
            if let Some((cut, events)) = image {
                self.shared.counters.images.fetch_add(1, Ordering::Relaxed);
                if self.send_image(cut, &events, replies).await?.is_err() {
                    return Ok(());
                }
                next = cut;
            }
            let Some((sequence, payload)) = self.shared.history().at_or_after(next) else {
                break;
            };
            if sequence > next && self.shared.history().image_for(next).is_some() {
                // It went while the image was sent: what it left is in the next image.
                continue;
            }
            let payload = self.room_for(&payload).await?;
            let number = Bytes::copy_from_slice(&sequence.to_be_bytes());
            let batch = [self.shared.topic.clone(), number, payload];
            if self.send(replies, message(batch)).await.is_err() {
                return Ok(());
            }
            next = sequence + 1;
        }
        // A peer that left does not need its end marker.
        let end = [Bytes::new(), Bytes::from_static(&REPLAY_END), Bytes::new()];
        let _ = self.send(replies, message(end)).await;
        Ok(())
    }

    /// The inner result is that of the last piece: an error when the peer has left.
    async fn send_image(
        &self,
        cut: u64,
        events: &[NodeEvent],
        replies: &mut RouterSendHalf,
    ) -> Result<zeromq::ZmqResult<()>, Stalled> {
        // An empty image has one piece too, which says so.
        let count = events.len().div_ceil(IMAGE_EVENTS_PER_PIECE_MAX).max(1);
        for piece in 0..count {
            let start = piece * IMAGE_EVENTS_PER_PIECE_MAX;
            let end = events.len().min(start + IMAGE_EVENTS_PER_PIECE_MAX);
            // The cut in the place of a time: pieces of different images are never the same bytes.
            let payload = adapter::encode_node_batch(cut as f64, &events[start..end]);
            let payload = self.room_for(&Bytes::from(payload)).await?;
            let number = Bytes::copy_from_slice(&cut.to_be_bytes());
            let mut reply = message([self.shared.topic.clone(), number, payload]);
            let mut place = Vec::with_capacity(8);
            for number in [piece, count] {
                place.extend((number as u32).to_be_bytes());
            }
            reply.push_back(Bytes::from(place));
            let sent = self.send(replies, reply).await;
            if sent.is_err() {
                return Ok(sent);
            }
        }
        Ok(Ok(()))
    }

    async fn room_for(&self, payload: &Bytes) -> Result<Bytes, Stalled> {
        let mut room = self.budget.watch();
        loop {
            room.mark_unchanged();
            if let Some(counted) = self.budget.take(payload) {
                return Ok(counted);
            }
            if timeout(STALL_MAX, room.changed()).await.is_err() {
                return Err(Stalled);
            }
        }
    }

    async fn send(
        &self,
        replies: &mut RouterSendHalf,
        mut reply: ZmqMessage,
    ) -> zeromq::ZmqResult<()> {
        reply.push_front(Bytes::new());
        reply.push_front(self.peer.clone());
        replies.send(reply).await
    }
}

fn message(frames: [Bytes; 3]) -> ZmqMessage {
    let [first, second, third] = frames;
    let mut message = ZmqMessage::from(first);
    message.push_back(second);
    message.push_back(third);
    message
}
