//! One task per source of a pod that connects by itself: it is fed by whatever connection the pod has.
//!
//! Such a publisher cannot be asked for anything, so a new connection or a gap begins the source anew.

use futures_util::future::pending;
use kvcache_core::Error;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::{Bytes, Follower};

/// Messages that wait for a source's task; then its connection is not read, and its publisher drops what it cannot keep.
pub(crate) const FED_QUEUED_MAX: usize = 8;

/// What the connections of a source tell its task.
#[derive(Debug)]
pub(crate) enum Fed {
    /// A message.
    Message {
        /// The connection's number; later ones have higher numbers.
        connection: u64,
        frames: Vec<Bytes>,
    },
    /// The connection is gone.
    Closed {
        connection: u64,
        /// Why.
        error: Error,
    },
}

impl Follower {
    /// Ingests what comes until nobody can send any more.
    pub(crate) async fn run_fed(mut self, mut inputs: mpsc::Receiver<Fed>) {
        let mut lost_at = Some(Instant::now());
        let mut current = None;
        loop {
            let gone_at = lost_at.map(|at| at + self.limits.ttl);
            let gone = async {
                match gone_at {
                    Some(at) => sleep_until(at).await,
                    None => pending().await,
                }
            };
            let input = tokio::select! {
                input = inputs.recv() => input,
                () = gone => {
                    self.give_up().await;
                    lost_at = None;
                    continue;
                }
            };
            match input {
                None => return,
                Some(Fed::Message { connection, frames }) => {
                    if current.is_some_and(|current| connection < current) {
                        // Another connection has taken over: what this one still says is late.
                        self.metrics.events_rejected(1);
                        continue;
                    }
                    if current != Some(connection) {
                        self.begin(current.is_some()).await;
                        (current, lost_at) = (Some(connection), None);
                    }
                    self.take_live(&frames);
                    self.act(true).await;
                }
                Some(Fed::Closed { connection, error }) => {
                    if current == Some(connection) {
                        tracing::debug!(source = %self.name, %error, "publisher not connected");
                        self.end().await;
                        (current, lost_at) = (None, Some(Instant::now()));
                    }
                }
            }
            tokio::task::consume_budget().await;
        }
    }

    async fn begin(&mut self, is_connected: bool) {
        if is_connected {
            self.end().await;
        }
        self.set_connected(true);
        let now = self.now();
        self.ingest.handle_connected(now);
        self.act(false).await;
    }

    async fn end(&mut self) {
        self.ingest.handle_disconnected();
        self.set_connected(false);
        self.act(false).await;
    }
}
