//! What is posted later than its request: when its turn comes, when there is a connection, or again after a failure.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, Weak};
use std::time::Instant;

use kvcache_core::{Error, ErrorKind, Result};

use super::check::Compare;
use super::connecting::{Connecting, Unconnected};
use super::core::{RequestCore, TRIES_MAX};
use super::slow::Slow;
use super::state::PostNumber;
use crate::agent::{AgentCore, Failure, PeerCore};
use crate::backend::{Backend, Job};
use crate::sync::thread::{Builder, JoinHandle};
use crate::sync::{Condvar, Mutex, MutexGuard};

/// What may wait here beside requests that have a rate or no connection; what comes above it is not repeated. Those that have
/// one, or none, wait each for its own turn, as many as callers hold.
pub(super) const WAITING_MAX: usize = 16_384;

/// What is to be posted.
pub(super) enum Due {
    /// The next pieces of a request that has a rate.
    Paced {
        core: Arc<RequestCore>,
        number: PostNumber,
    },
    /// A piece that was moved and is to be checked.
    Compare(Compare),
    /// A request without a connection.
    Unconnected(Unconnected),
    /// A piece that failed, over whatever way there is now.
    Again(Again),
    /// A request whose path stands still.
    Slow(Slow),
    /// Ways to a peer that were left are tried again.
    Reconnect {
        agent: Weak<AgentCore>,
        peer: Weak<PeerCore>,
        ways: Vec<usize>,
    },
}

/// A piece that failed.
pub(super) struct Again {
    pub(super) core: Arc<RequestCore>,
    pub(super) piece: u32,
    /// How often it was tried.
    pub(super) tries: u32,
    pub(super) agent: Weak<AgentCore>,
    pub(super) peer: Weak<PeerCore>,
    /// How often the peer's connections had been ended when the request was posted.
    pub(super) closings: u64,
    pub(super) failed: Arc<dyn Backend>,
    pub(super) failed_at: Instant,
    pub(super) error: Error,
}

/// What waits for its time, with the thread that posts it, which starts with the first that comes; and beside it what may
/// have to connect.
#[derive(Default)]
pub(crate) struct Later {
    queue: Mutex<Queue>,
    changed: Condvar,
    connecting: Arc<Connecting>,
}

#[derive(Default)]
struct Queue {
    waiting: BTreeMap<(Instant, u64), Due>,
    /// Those of them that have a rate.
    paced: usize,
    next: u64,
    thread: Option<JoinHandle<()>>,
    closed: bool,
}

impl Later {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Posts it at `at`, or as soon as its peer's turn comes if it may have to connect; hands it back when there is no
    /// room.
    pub(super) fn add(self: &Arc<Self>, at: Instant, due: Due) -> Result<(), Due> {
        if let Some(peer) = due.connects_to() {
            return self.connecting.add(&peer, due);
        }
        let mut queue = self.lock();
        let paced = matches!(due, Due::Paced { .. });
        if queue.closed || (!paced && queue.waiting.len() - queue.paced >= WAITING_MAX) {
            return Err(due);
        }
        if queue.thread.is_none() {
            let own = self.clone();
            let thread = Builder::new().name("kvf-later".into());
            match thread.spawn(move || own.run()) {
                Ok(thread) => queue.thread = Some(thread),
                Err(error) => {
                    tracing::warn!(%error, "start the thread that posts later");
                    return Err(due);
                }
            }
        }
        let key = (at, queue.next);
        queue.next += 1;
        queue.waiting.insert(key, due);
        queue.paced += usize::from(paced);
        drop(queue);
        self.changed.notify_one();
        Ok(())
    }

    /// Has ways to a peer that were left tried again.
    pub(crate) fn reconnect(
        self: &Arc<Self>,
        agent: &Arc<AgentCore>,
        peer: &Arc<PeerCore>,
        ways: Vec<usize>,
    ) {
        let due = Due::Reconnect {
            agent: Arc::downgrade(agent),
            peer: Arc::downgrade(peer),
            ways,
        };
        if self.add(Instant::now(), due).is_err() {
            tracing::debug!(peer = peer.name(), "no room to try a way again");
        }
    }

    /// Whatever waits fails, and the threads end.
    pub(crate) fn close(&self) -> Vec<JoinHandle<()>> {
        let mut queue = self.lock();
        queue.closed = true;
        let thread = queue.thread.take();
        drop(queue);
        self.changed.notify_one();
        let mut threads = self.connecting.close();
        threads.extend(thread);
        threads
    }

    fn run(self: Arc<Self>) {
        let mut queue = self.lock();
        while !queue.closed {
            let now = Instant::now();
            let first = queue.waiting.first_key_value().map(|(key, _)| key.0);
            queue = match first {
                Some(at) if at <= now => {
                    let due = queue.waiting.pop_first().map(|(_, due)| due);
                    queue.paced -= usize::from(matches!(due, Some(Due::Paced { .. })));
                    drop(queue);
                    if let Some(due) = due {
                        due.post();
                    }
                    self.lock()
                }
                Some(at) => {
                    let left = at.saturating_duration_since(now);
                    match self.changed.wait_timeout(queue, left) {
                        Ok((queue, _)) => queue,
                        Err(poisoned) => poisoned.into_inner().0,
                    }
                }
                None => self
                    .changed
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner),
            };
        }
        let left = std::mem::take(&mut queue.waiting);
        drop(queue);
        left.into_values().for_each(Due::fail);
    }
}

impl Due {
    /// The peer to which it may have to connect, which may take a while.
    fn connects_to(&self) -> Option<Weak<PeerCore>> {
        match self {
            Self::Paced { .. } | Self::Compare(_) => None,
            Self::Unconnected(unconnected) => Some(unconnected.peer.clone()),
            Self::Again(again) => Some(again.peer.clone()),
            Self::Slow(slow) => slow.core.retry.as_ref().map(|(_, peer)| peer.clone()),
            Self::Reconnect { peer, .. } => Some(peer.clone()),
        }
    }

    pub(super) fn post(self) {
        match self {
            Self::Paced { core, number } => {
                if let Err(error) = core.post_pieces(number) {
                    core.settle_piece(0, Err(error));
                }
            }
            Self::Compare(compare) => compare.run(),
            Self::Unconnected(unconnected) => unconnected.post(),
            Self::Again(again) => again.post(),
            Self::Slow(slow) => slow.leave(),
            Self::Reconnect { agent, peer, ways } => {
                if let (Some(agent), Some(peer)) = (agent.upgrade(), peer.upgrade()) {
                    peer.reconnect(&agent, &ways);
                }
            }
        }
    }

    /// The agent is closed: it is not posted.
    pub(super) fn fail(self) {
        let closed = || Error::new(ErrorKind::Cancelled, "the agent is closed");
        match self {
            Self::Paced { core, number } => core.fail_unposted(number, closed()),
            Self::Compare(compare) => compare.run(),
            Self::Unconnected(it) => it.core.fail_unposted(it.number, closed()),
            Self::Again(again) => again.core.settle_piece(again.piece, Err(again.error)),
            Self::Slow(_) | Self::Reconnect { .. } => {}
        }
    }
}

/// Why a piece was not posted, and the backend that would not take it, if it came to that.
type NotPosted = (Error, Option<Arc<dyn Backend>>);

impl Again {
    fn post(mut self) {
        while let Err((error, refused)) = self.try_post() {
            let (name, kind) = (self.failed.name(), self.error.kind());
            let text = format!("over {name}: {}; then: {error}", self.error);
            self.error = Error::new(kind, text);
            match refused {
                // Nothing was started there.
                Some(backend) if self.tries + 1 < TRIES_MAX && error.kind() != ErrorKind::Busy => {
                    self.tries += 1;
                    (self.failed, self.failed_at) = (backend, Instant::now());
                }
                _ => return self.core.settle_piece(self.piece, Err(self.error)),
            }
        }
    }

    fn try_post(&self) -> Result<(), NotPosted> {
        let gone = || {
            let text = "the agent is closed or the peer forgotten";
            (Error::new(ErrorKind::PeerLost, text), None)
        };
        let agent = self.agent.upgrade().ok_or_else(gone)?;
        let peer = self.peer.upgrade().ok_or_else(gone)?;
        let plan = self.core.plan_of(self.piece);
        let failure = Failure {
            backend: Some(&self.failed),
            at: self.failed_at,
            closings: self.closings,
        };
        peer.leave(&self.failed, &self.error.to_string());
        let channel = peer.channel_after(&agent, plan, &failure);
        let channel = channel.map_err(|error| (error, None))?;
        let backend: Arc<dyn Backend> = channel.clone();
        let refused = |error| (error, Some(backend.clone()));
        channel.prepare(plan).map_err(refused)?;
        let (failed, now) = (self.failed.name(), backend.name());
        tracing::warn!(peer = peer.name(), failed, error = %self.error, now, "a transfer is tried again");
        let ticket = self.core.again(self, &backend, &agent);
        let job = Job::new(ticket, self.core.notification_of_one());
        let posted = backend.post(job);
        posted.map_err(|refusal| refused(refusal.into_error()))
    }
}
