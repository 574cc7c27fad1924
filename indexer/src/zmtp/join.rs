//! Connections of those who read events.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use kvcache_core::Result;
use tokio::time::timeout;

use super::connection::{Connection, Step, unanswered};
use super::endpoint::{Endpoint, Halves};
use super::{Role, decode};

impl Connection {
    /// Subscribes at a publisher to what begins with `topic`.
    ///
    /// # Errors
    /// As [`Connection::accept`]; `PeerLost` when nobody is there.
    pub(crate) async fn subscribe(
        endpoint: &Endpoint,
        topic: &str,
        message_bytes_max: usize,
        deadline: Duration,
    ) -> Result<Self> {
        Self::open(endpoint, Role::Subscriber, message_bytes_max, deadline)
            .await
            .map(|connection| connection.subscribed(topic))
    }

    /// Connects to a replay socket.
    ///
    /// # Errors
    /// As [`Connection::subscribe`].
    pub(crate) async fn dealer(
        endpoint: &Endpoint,
        message_bytes_max: usize,
        deadline: Duration,
    ) -> Result<Self> {
        Self::open(endpoint, Role::Dealer, message_bytes_max, deadline).await
    }

    async fn open(
        endpoint: &Endpoint,
        role: Role,
        message_bytes_max: usize,
        deadline: Duration,
    ) -> Result<Self> {
        let opened = timeout(deadline, async {
            let io = endpoint.open().await?;
            Self::greet(io, endpoint.to_string(), role, message_bytes_max).await
        });
        let opened = opened.await.unwrap_or_else(|_| Err(unanswered(deadline)));
        opened.map_err(|error| error.at(endpoint))
    }

    /// Subscribes at a publisher that connected by itself.
    ///
    /// # Errors
    /// As [`Connection::accept`].
    pub(crate) async fn accepted(
        accepted: (Halves, String),
        topic: &str,
        message_bytes_max: usize,
        deadline: Duration,
    ) -> Result<Self> {
        Self::accept(accepted, Role::Subscriber, message_bytes_max, deadline)
            .await
            .map(|connection| connection.subscribed(topic))
    }

    fn subscribed(mut self, topic: &str) -> Self {
        // The message of ZMTP 3.0, which peers of 3.1 take as well.
        let mut body = BytesMut::with_capacity(1 + topic.len());
        body.put_u8(decode::SUBSCRIBE);
        body.put_slice(topic.as_bytes());
        self.push_small(0, &body);
        self
    }

    /// Queues a message of small frames; [`Connection::recv`] sends it.
    pub(crate) fn send(&mut self, frames: &[&[u8]]) {
        for (position, frame) in frames.iter().enumerate() {
            self.push_small(u8::from(position + 1 < frames.len()), frame);
        }
    }

    /// The next message.
    ///
    /// # Errors
    /// As [`Connection::step`].
    ///
    /// # Cancel safety
    /// As [`Connection::step`].
    pub(crate) async fn recv(&mut self) -> Result<Vec<Bytes>> {
        loop {
            if let Step::Message(frames) = self.step().await? {
                return Ok(frames);
            }
        }
    }
}
