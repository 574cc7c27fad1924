//! The publisher's thread: takes in subscribers and those who ask for replays, each of which has a task.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kvcache_core::{Error, ErrorKind};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::listen::Listening;
use super::{Shared, replay, subscriber};
use crate::zmtp::{Connection, Halves, Listener, Role};

/// Peers of one socket at once; more are turned away.
const PEERS_MAX: usize = 1024;
/// Replays under way at once: each has an image of what the node holds, if it needs one.
const REPLAYS_AT_ONCE: usize = 4;
/// The longest message that is taken: subscriptions and requests are short.
const REQUEST_BYTES_MAX: usize = 4096;
/// How long a peer may take for its handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// When the system cannot accept or listen now, so long until the next attempt.
const RETRY_AFTER: Duration = Duration::from_millis(200);
/// A peer that takes nothing of what it is sent for so long has stopped.
pub(super) const STALL_MAX: Duration = Duration::from_secs(1);

/// The two bound endpoints of a publisher.
pub(super) struct Endpoints {
    pub(super) events: Listening,
    pub(super) replay: Listening,
}

/// Runs until the publisher is closed.
pub(super) fn run(shared: &Arc<Shared>, endpoints: &Endpoints) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, topic = %shared.topic_text(), "start event publisher");
            return;
        }
    };
    runtime.block_on(async {
        let mut stop = shared.stop.subscribe();
        tokio::select! {
            () = listen(shared, &endpoints.events, Role::Publisher) => {}
            () = listen(shared, &endpoints.replay, Role::Router) => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
    });
}

/// Takes in peers and serves each of them, for ever.
async fn listen(shared: &Arc<Shared>, bound: &Listening, role: Role) {
    let listener = open(shared, bound).await;
    let turns = Arc::new(Semaphore::new(REPLAYS_AT_ONCE));
    let mut peers = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = peers.join_next() => continue,
        };
        match accepted {
            Ok((_, from)) if peers.len() >= PEERS_MAX => {
                let topic = shared.topic_text();
                tracing::warn!(from, %topic, most = PEERS_MAX, "a peer is turned away");
            }
            Ok(accepted) => {
                peers.spawn(attend(shared.clone(), accepted, role, turns.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, topic = %shared.topic_text(), "peers cannot connect now");
                sleep(RETRY_AFTER).await;
            }
        }
    }
}

async fn open(shared: &Arc<Shared>, bound: &Listening) -> Listener {
    loop {
        match bound.share() {
            Ok(listener) => return listener,
            Err(error) => {
                tracing::error!(%error, topic = %shared.topic_text(), "open event sockets");
                sleep(RETRY_AFTER).await;
            }
        }
    }
}

/// Serves one peer until it goes, breaks a rule, or stops reading.
async fn attend(
    shared: Arc<Shared>,
    accepted: (Halves, String),
    role: Role,
    turns: Arc<Semaphore>,
) {
    let from = accepted.1.clone();
    let greeted = Connection::accept(accepted, role, REQUEST_BYTES_MAX, HANDSHAKE_TIMEOUT);
    let ended = match greeted.await {
        Err(error) => error,
        Ok(peer) if role == Role::Router => replay::serve(&shared, peer, &turns).await,
        Ok(peer) => subscriber::serve(&shared, peer).await,
    };
    let topic = shared.topic_text();
    if ended.kind() == ErrorKind::Busy {
        shared.disconnected.send_modify(|count| *count += 1);
        tracing::warn!(from, %topic, error = %ended, "a reader of KV events is disconnected");
    } else {
        tracing::debug!(from, %topic, error = %ended, "a reader of KV events is gone");
    }
}

/// Of a peer that has taken nothing for [`STALL_MAX`].
pub(super) fn stalled(waiting: u64) -> Error {
    let milliseconds = STALL_MAX.as_millis();
    let context = format!("it took nothing for {milliseconds} ms while {waiting} bytes wait");
    Error::new(ErrorKind::Busy, context)
}

/// Bytes that one peer's socket was given, among all that [`super::PublisherStats::queue_bytes`] counts.
pub(super) struct Queued<'a> {
    shared: &'a Shared,
    bytes: usize,
}

impl<'a> Queued<'a> {
    pub(super) const fn new(shared: &'a Shared) -> Self {
        Self { shared, bytes: 0 }
    }

    /// So many now.
    pub(super) fn set(&mut self, bytes: usize) {
        let all = &self.shared.counters.queued;
        // One after the other: the sum is never below what is queued, so it never goes below zero.
        all.fetch_add(bytes, Ordering::Relaxed);
        all.fetch_sub(self.bytes, Ordering::Relaxed);
        self.bytes = bytes;
    }
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        self.set(0);
    }
}
