//! Requests whose path stands still go another way, if there is one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind};

use super::core::RequestCore;
use super::later::Due;
use super::state::{PostNumber, State};
use crate::agent::{Failure, TimerKey};
use crate::backend::Backend;
use crate::outcome::Status;
use crate::sync::Ordering;

/// A request under which its path stands still.
pub(super) struct Slow {
    pub(super) core: Arc<RequestCore>,
    pub(super) number: PostNumber,
    pub(super) backend: Arc<dyn Backend>,
    pub(super) seen_at: Instant,
}

fn is_same(one: &Arc<dyn Backend>, other: &Arc<dyn Backend>) -> bool {
    std::ptr::addr_eq(Arc::as_ptr(one), Arc::as_ptr(other))
}

impl State {
    /// Whether the path has moved nothing since it was last looked at, and should have. Remembers what is seen now.
    fn stands_still(
        &mut self,
        now: Instant,
        progress: Option<u64>,
        (pieces, after): (u32, Duration),
    ) -> bool {
        let before = std::mem::replace(&mut self.seen, progress);
        // What is held back by a rate is nobody's fault.
        let asked = self.open > pieces - self.next;
        progress.is_some() && before == progress && asked && now >= self.moved_at + after
    }
}

impl RequestCore {
    /// The timer has come to this request: its deadline has passed, or it is time to look at its path.
    pub(crate) fn ring(self: &Arc<Self>, key: TimerKey) {
        let state = self.lock();
        // Another one may have been set, for another post.
        if state.timer != Some(key) || !matches!(state.status, Status::InFlight) {
            return;
        }
        let now = Instant::now();
        let (backend, is_due) = (state.backends.last().cloned(), now >= state.due);
        drop(state);
        let (Some(after), false) = (self.slow_after, is_due) else {
            return self.expire();
        };
        let relieved = backend
            .as_ref()
            .is_some_and(|backend| backend.relieve(now, after));
        let progress = backend.as_ref().and_then(|backend| backend.progress());
        let mut state = self.lock();
        if state.timer != Some(key) || !matches!(state.status, Status::InFlight) {
            return;
        }
        // Without a connection nothing stands still; there may be one the next time.
        let Some(backend) = backend else {
            return self.set_timer(&mut state, now);
        };
        let current = state
            .backends
            .last()
            .is_some_and(|last| is_same(last, &backend));
        let still = current && state.stands_still(now, progress, (self.pieces.len() as u32, after));
        let still = still && !relieved;
        self.set_timer(&mut state, now);
        let number = state.number;
        let left = state.leaving.iter().any(|left| is_same(left, &backend));
        drop(state);
        if still
            && !left
            && !self.told.load(Ordering::Acquire)
            && !self.awaits_peer.load(Ordering::Acquire)
            && backend.fences(self.plan.operation)
        {
            let slow = Slow {
                core: self.clone(),
                number,
                backend,
                seen_at: now,
            };
            // Without room it is looked at again.
            let _ = self.later.add(now, Due::Slow(slow));
        }
    }

    /// Whether what was posted to this backend is to go another way.
    pub(super) fn is_left(&self, backend: &Arc<dyn Backend>) -> bool {
        self.leaving.load(Ordering::Acquire)
            && !self.told.load(Ordering::Acquire)
            && self
                .lock()
                .leaving
                .iter()
                .any(|left| is_same(left, backend))
    }

    /// The error of a job, or why it was given up although its caller waits.
    pub(super) fn why_left(&self, backend: &Arc<dyn Backend>, error: Error) -> Error {
        match self.slow_after {
            Some(after) if error.kind() == ErrorKind::Cancelled && self.is_left(backend) => {
                Error::new(ErrorKind::Timeout, no_progress(after))
            }
            _ => error,
        }
    }
}

fn no_progress(after: Duration) -> String {
    format!("no progress for {after:?}")
}

impl Slow {
    /// Leaves the path if there is another one. Connects, so it may take a while.
    pub(super) fn leave(self) {
        let core = &self.core;
        let Some((agent, peer)) = &core.retry else {
            return;
        };
        let (Some(agent), Some(peer)) = (agent.upgrade(), peer.upgrade()) else {
            return;
        };
        let slow = Failure {
            backend: Some(&self.backend),
            at: self.seen_at,
            closings: core.lock().closings,
        };
        let why = no_progress(core.slow_after.unwrap_or_default());
        let way = self.backend.name();
        match peer.channel_beside(&agent, &core.plan, &slow, &why) {
            Ok(other) => {
                let now = other.name();
                tracing::warn!(peer = peer.name(), way, why, now, "a transfer stands still");
            }
            Err(error) => {
                tracing::warn!(peer = peer.name(), way, why, %error, "a transfer stands still, and there is no other way");
                return;
            }
        }
        let mut state = core.lock();
        if state.number != self.number || !matches!(state.status, Status::InFlight) {
            return;
        }
        state.leaving.push(self.backend.clone());
        core.leaving.store(true, Ordering::Release);
        drop(state);
        self.backend.give_way();
    }
}
