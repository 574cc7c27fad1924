//! What the handles and requests of an agent share.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvcache_core::Result;

use super::ranges::Ranges;
use super::{Exports, PeerCore, Timer};
use crate::backend::copy::Copier;
use crate::backend::{Backend, memcpy};
use crate::look::Looks;
use crate::reactor::Reactor;
use crate::request::{Bucket, Later, Priority};
use crate::stats::Stats;
use crate::sys::fork::Process;

/// How long waits look before they sleep, each kind as its own waits have shown it to pay.
pub(super) struct AgentLooks {
    pub(super) requests: Looks,
    pub(super) notifications: Looks,
}

/// What the handles and requests of an agent share.
pub(crate) struct AgentCore {
    pub(super) process: Process,
    pub(super) started: Instant,
    pub(super) exports: Arc<Exports>,
    pub(super) stats: Stats,
    pub(super) timer: Arc<Timer>,
    pub(super) later: Arc<Later>,
    /// Of all that is of a priority, [`Priority::Normal`] first.
    pub(super) rates: [Arc<Bucket>; 2],
    pub(super) copier: Arc<Copier>,
    pub(super) reactor: Arc<Reactor>,
    pub(super) looks: AgentLooks,
    /// Copies between regions of this agent.
    pub(super) own: Arc<dyn Backend>,
    pub(super) extensions: Mutex<HashMap<TypeId, Arc<dyn Any + Send + Sync>>>,
    /// How long a path may stand still under a request.
    pub(super) slow_after: Option<Duration>,
    /// How long each way to a peer may take to connect.
    pub(super) connect_within: Duration,
    pub(super) ranges: Ranges,
    pub(super) peers: Mutex<HashMap<String, Arc<PeerCore>>>,
    pub(super) threads: Mutex<Vec<JoinHandle<()>>>,
}

impl AgentCore {
    /// # Errors
    /// [`ErrorKind::Forked`] in a forked child.
    pub(crate) fn check(&self) -> Result<()> {
        self.process.check()
    }

    /// When it was made.
    pub(crate) fn started(&self) -> Instant {
        self.started
    }

    /// A peer that is known by this name.
    pub(crate) fn peer(&self, name: &str) -> Option<Arc<PeerCore>> {
        let peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        peers.get(name).cloned()
    }

    pub(crate) fn exports(&self) -> &Arc<Exports> {
        &self.exports
    }

    pub(crate) fn stats(&self) -> &Stats {
        &self.stats
    }

    pub(crate) fn timer(&self) -> &Arc<Timer> {
        &self.timer
    }

    /// How long a path may stand still under a request before it goes another way; none: for ever.
    pub(crate) fn slow_after(&self) -> Option<Duration> {
        self.slow_after
    }

    /// What posts pieces later.
    pub(crate) fn later(&self) -> &Arc<Later> {
        &self.later
    }

    /// The threads that copy.
    pub(crate) fn copier(&self) -> &Arc<Copier> {
        &self.copier
    }

    /// Reads the agent's sockets.
    pub(crate) fn reactor(&self) -> &Arc<Reactor> {
        &self.reactor
    }

    /// How long those who wait for requests look before they sleep.
    pub(crate) fn looks(&self) -> &Looks {
        &self.looks.requests
    }

    pub(super) fn rate(&self, priority: Priority) -> &Arc<Bucket> {
        match priority {
            Priority::Normal => &self.rates[0],
            Priority::Background => &self.rates[1],
        }
    }

    /// What limits a request: the rate of its priority, and its peer's.
    pub(crate) fn rates(
        &self,
        priority: Priority,
        peer: Option<&Arc<PeerCore>>,
    ) -> Vec<Arc<Bucket>> {
        let mut rates = vec![self.rate(priority).clone()];
        rates.extend(peer.map(|peer| peer.rate().clone()));
        rates
    }

    /// The one value of this type that belongs to the agent, made at first use: an engine of a backend that is started
    /// only where it is needed.
    pub(crate) fn extension<T: Any + Send + Sync>(
        &self,
        make: impl FnOnce() -> Result<T>,
    ) -> Result<Arc<T>> {
        let mut extensions = self
            .extensions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let known = extensions.get(&TypeId::of::<T>()).cloned();
        if let Some(Ok(extension)) = known.map(Arc::downcast) {
            return Ok(extension);
        }
        let extension = Arc::new(make()?);
        extensions.insert(TypeId::of::<T>(), extension.clone());
        Ok(extension)
    }
}

impl Drop for AgentCore {
    fn drop(&mut self) {
        // A child has none of the threads, and must leave the parent's sockets alone.
        if self.process.check().is_err() {
            return;
        }
        memcpy::leave(&self.exports);
        self.exports.close();
        self.timer.close();
        let later = self.later.close();
        self.reactor.close();
        self.copier.close();
        let threads = std::mem::take(
            self.threads
                .get_mut()
                .unwrap_or_else(PoisonError::into_inner),
        );
        for thread in threads.into_iter().chain(later) {
            // The last handle may be dropped by a waker that one of these threads calls.
            if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
                tracing::error!(agent = %self.exports.name(), "a thread of the agent panicked");
            }
        }
    }
}
