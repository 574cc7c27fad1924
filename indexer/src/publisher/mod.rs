//! Tells the index what changed: vLLM's wire format over ZMQ, with a replay socket, bounded in bytes.

use std::time::Duration;

use kvcache_core::event::{EngineEvent, NodeEvent};
use kvcache_core::ports::{EventSink, Position};
use kvcache_core::{Epoch, PodName, Result};

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
    /// Where subscribers connect: `tcp://127.0.0.1:0` (0: any free port) or `ipc://PATH`.
    pub endpoint: String,
    /// Where replays are asked for; same forms.
    pub replay_endpoint: String,
    /// Bytes of past batches kept for replay; the oldest go first.
    pub replay_bytes_max: usize,
    /// Bytes waiting in send queues; more means a subscriber has stopped reading, and all are disconnected.
    pub queue_bytes_max: usize,
}

/// A publisher of KV events, on a thread of its own.
pub struct Publisher {
    endpoint: String,
    replay_endpoint: String,
}

impl Publisher {
    /// Binds both sockets and starts the thread.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Invalid`] for a malformed endpoint or topic part, `Io` naming the address when it is in use.
    pub fn bind(config: PublisherConfig) -> Result<Self> {
        Ok(Self {
            endpoint: config.endpoint,
            replay_endpoint: config.replay_endpoint,
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

    /// Publishes one batch of an engine's events; never blocks. Returns the position after it.
    pub fn publish_engine(&self, events: Vec<EngineEvent>) -> Position {
        let _ = events;
        self.position()
    }

    /// The position after the last batch.
    #[must_use]
    pub fn position(&self) -> Position {
        Position {
            epoch: Epoch(0),
            next: kvcache_core::Sequence(0),
        }
    }

    /// Waits until every queue has drained into the sockets, at most for `patience`; true if so.
    pub fn flush(&self, patience: Duration) -> bool {
        let _ = patience;
        true
    }
}

impl EventSink for Publisher {
    fn publish(&self, events: Vec<NodeEvent>) -> Position {
        let _ = events;
        self.position()
    }
}
