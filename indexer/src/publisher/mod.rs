//! Tells the index what changed: vLLM's wire format over ZMQ, with a replay socket, bounded in bytes.
//!
//! Events go out as three frames (topic, sequence number as u64 big-endian, msgpack batch). The replay socket takes
//! `[empty, first sequence]` and answers `[empty, topic, sequence, batch]` for each batch it still has, then
//! `[empty, empty, ff×8, empty]`: both as vLLM's own publisher does, so that its subscribers work unchanged.
//!
//! A node's replay that begins before the oldest batch kept starts with an image: pieces
//! `[empty, topic, sequence, batch, place]`, whose batches store all that the node held just before the batch with that
//! sequence number, which follows. The place is the piece's number from 0 and their count, u32 big-endian each. Readers
//! that know nothing of images pass over messages of five frames.
//!
//! Publishing encodes the batch and puts it into the history; the thread sends to each subscriber from there, at the pace
//! at which that one reads. One that has stopped reading is disconnected, and costs the others nothing.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use kvcache_core::event::{EngineEvent, NodeEvent};
use kvcache_core::ports::{EventSink, Position};
use kvcache_core::{Epoch, Error, PodName, Result, Sequence};
use tokio::sync::watch;

use crate::adapter::{self, BatchOwner, Topic};
use crate::wire::{SourceKind, SourceSpec};

mod held;
mod history;
#[cfg(test)]
mod hostile;
mod listen;
mod readers;
mod replay;
mod serve;
mod subscriber;
#[cfg(test)]
mod tests;

use history::History;
use listen::Listening;
use readers::Readers;

/// Default of [`PublisherConfig::replay_bytes_max`].
pub const REPLAY_BYTES_MAX_DEFAULT: usize = 64 << 20;
/// Default of [`PublisherConfig::queue_bytes_max`].
pub const QUEUE_BYTES_MAX_DEFAULT: usize = 16 << 20;
/// So many bytes are given to one peer's socket at a time; a single batch may be longer.
const SEND_AHEAD_BYTES: usize = 256 << 10;
/// Node events in one batch; longer publications are split, so that one batch never dominates the history.
const NODE_EVENTS_PER_BATCH_MAX: usize = 4096;
/// Events in one piece of an image.
const IMAGE_EVENTS_PER_PIECE_MAX: usize = 16_384;

/// Whose events these are; it decides the topic and what the hashes mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// An engine's: hashes are the engine's own, tokens travel along. Topic `kv@<pod>@<model>`.
    Engine,
    /// A kvfabric node's: hashes are index keys. Topic `kv@<pod>@<model>@<epoch>`.
    Node {
        /// Differs from every earlier incarnation of this node.
        epoch: Epoch,
    },
}

/// How a [`Publisher`] is opened.
#[derive(Clone, Debug)]
pub struct PublisherConfig {
    /// Whose events.
    pub pod: PodName,
    /// The model they belong to.
    pub model: String,
    /// Engine or node.
    pub stream: Stream,
    /// Where subscribers connect: `tcp://HOST:PORT` (port 0: any free one; host `*`: every interface) or `ipc://PATH`.
    pub endpoint: String,
    /// Where replays are asked for; same forms.
    pub replay_endpoint: String,
    /// Bytes of past batches kept for replay; the oldest go first, the newest always stays. A node's publisher keeps
    /// some 40 bytes a block beside them, for images.
    pub replay_bytes_max: usize,
    /// Bytes of batches that may wait for a subscriber that has stopped reading; with more, or when batches that it has
    /// not got leave the history, it is disconnected.
    pub queue_bytes_max: usize,
}

impl PublisherConfig {
    /// Free ports on loopback and the default bounds.
    #[must_use]
    pub fn new(pod: PodName, model: impl Into<String>, stream: Stream) -> Self {
        Self {
            pod,
            model: model.into(),
            stream,
            endpoint: "tcp://127.0.0.1:0".to_owned(),
            replay_endpoint: "tcp://127.0.0.1:0".to_owned(),
            replay_bytes_max: REPLAY_BYTES_MAX_DEFAULT,
            queue_bytes_max: QUEUE_BYTES_MAX_DEFAULT,
        }
    }

    fn topic(&self) -> Topic {
        match self.stream {
            Stream::Engine => Topic::engine(&self.pod, &self.model),
            Stream::Node { epoch } => Topic::node(&self.pod, &self.model, epoch),
        }
    }
}

/// What a publisher has done and holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PublisherStats {
    /// Batches published.
    pub batches: u64,
    /// Bytes of batches kept for replay.
    pub replay_bytes: usize,
    /// Bytes that peers' sockets were given and have not taken, of live events and of replays.
    pub queue_bytes: usize,
    /// Replays that were asked for.
    pub replays: u64,
    /// Replays that had to begin with an image of what the node held.
    pub images: u64,
    /// Batches that left the history before they could be sent to a subscriber, which sees a gap.
    pub skipped: u64,
    /// Subscribers and requesters that stopped reading and were disconnected.
    pub disconnects: u64,
}

#[derive(Default)]
struct Counters {
    replays: AtomicU64,
    images: AtomicU64,
    skipped: AtomicU64,
    queued: AtomicUsize,
}

/// What the publishing side and the thread share.
struct Shared {
    topic: Bytes,
    history: Mutex<History>,
    queue_bytes_max: usize,
    /// The sequence number after the last batch in the history.
    published: watch::Sender<u64>,
    readers: Readers,
    stop: watch::Sender<bool>,
    /// Peers that stopped reading and were disconnected.
    disconnected: watch::Sender<u64>,
    counters: Counters,
}

impl Shared {
    fn history(&self) -> MutexGuard<'_, History> {
        // Nothing in there panics half-way through a change, so a poisoned history is still whole.
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn topic_text(&self) -> std::borrow::Cow<'_, str> {
        String::from_utf8_lossy(&self.topic)
    }
}

/// A publisher of KV events, on a thread of its own; dropping it closes the sockets.
pub struct Publisher {
    shared: Arc<Shared>,
    epoch: Epoch,
    endpoint: String,
    replay_endpoint: String,
    thread: Option<JoinHandle<()>>,
}

impl Publisher {
    /// Binds both sockets and starts the thread.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Invalid`] for a malformed endpoint, `Io` naming the endpoint when it cannot be bound.
    pub fn bind(config: PublisherConfig) -> Result<Self> {
        let topic = Bytes::from(config.topic().to_string());
        let events = Listening::bind(&config.endpoint)?;
        let replay = Listening::bind(&config.replay_endpoint)?;
        let (endpoint, replay_endpoint) = (events.endpoint()?, replay.endpoint()?);
        let (epoch, history) = match config.stream {
            Stream::Engine => (Epoch(0), History::new(config.replay_bytes_max)),
            Stream::Node { epoch } => (epoch, History::of_node(config.replay_bytes_max)),
        };
        let shared = Arc::new(Shared {
            topic,
            history: Mutex::new(history),
            queue_bytes_max: config.queue_bytes_max,
            published: watch::Sender::new(0),
            readers: Readers::default(),
            stop: watch::Sender::new(false),
            disconnected: watch::Sender::new(0),
            counters: Counters::default(),
        });
        let endpoints = serve::Endpoints { events, replay };
        let thread = std::thread::Builder::new()
            .name("kv-publisher".to_owned())
            .spawn({
                let shared = shared.clone();
                move || serve::run(&shared, &endpoints)
            })
            .map_err(|error| Error::io("start the publisher's thread", error))?;
        Ok(Self {
            shared,
            epoch,
            endpoint,
            replay_endpoint,
            thread: Some(thread),
        })
    }

    /// The publisher's endpoint, with the port that was really bound.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The replay socket's endpoint, with the port that was really bound.
    #[must_use]
    pub fn replay_endpoint(&self) -> &str {
        &self.replay_endpoint
    }

    /// This publisher as a source to register, under `name`.
    #[must_use]
    pub fn source(&self, name: impl Into<String>, kind: SourceKind) -> SourceSpec {
        SourceSpec {
            name: name.into(),
            kind,
            endpoint: self.endpoint.clone(),
            replay_endpoint: Some(self.replay_endpoint.clone()),
            data_parallel_rank: None,
            groups: Vec::new(),
        }
    }

    /// Publishes one batch of an engine's events; never blocks. Returns the position after it.
    pub fn publish_engine(&self, events: Vec<EngineEvent>) -> Position {
        if events.is_empty() {
            return self.position();
        }
        self.publish_payload(adapter::encode_engine_batch(timestamp(), &events))
    }

    /// As [`Publisher::publish_engine`], for blocks of one adapter and tenant.
    pub fn publish_engine_of(&self, owner: &BatchOwner<'_>, events: &[EngineEvent]) -> Position {
        if events.is_empty() {
            return self.position();
        }
        self.publish_payload(adapter::encode_engine_batch_of(timestamp(), owner, events))
    }

    /// Publishes one batch that is encoded already, as it is; never blocks. Returns the position after it.
    pub fn publish_payload(&self, payload: Vec<u8>) -> Position {
        let next = {
            let mut history = self.shared.history();
            let next = history.push(Bytes::from(payload));
            // Inside the lock, so that the number never goes back.
            self.shared.published.send_replace(next);
            next
        };
        Position {
            epoch: self.epoch,
            next: Sequence(next),
        }
    }

    /// The position after the last batch.
    #[must_use]
    pub fn position(&self) -> Position {
        Position {
            epoch: self.epoch,
            next: Sequence(self.shared.history().next()),
        }
    }

    /// What it has done and holds.
    #[must_use]
    pub fn stats(&self) -> PublisherStats {
        let (batches, replay_bytes) = {
            let history = self.shared.history();
            (history.next(), history.bytes())
        };
        let counters = &self.shared.counters;
        PublisherStats {
            batches,
            replay_bytes,
            queue_bytes: counters.queued.load(Ordering::Relaxed),
            replays: counters.replays.load(Ordering::Relaxed),
            images: counters.images.load(Ordering::Relaxed),
            skipped: counters.skipped.load(Ordering::Relaxed),
            disconnects: *self.shared.disconnected.borrow(),
        }
    }

    /// Waits until everything published so far was handed to the operating system for each subscriber, at most for
    /// `patience`; false if that was not enough.
    pub async fn flush(&self, patience: Duration) -> bool {
        let next = self.position().next.0;
        let reached = self.shared.readers.reached(next);
        tokio::time::timeout(patience, reached).await.is_ok()
    }
}

impl EventSink for Publisher {
    fn publish(&self, events: Vec<NodeEvent>) -> Position {
        for batch in events.chunks(NODE_EVENTS_PER_BATCH_MAX) {
            self.publish_payload(adapter::encode_node_batch(timestamp(), batch));
        }
        self.position()
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.shared.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            // A panic over there has been printed; there is nothing left to close.
            let _ = thread.join();
        }
    }
}

/// Seconds since 1970, as batches carry them.
fn timestamp() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}
