//! What each backend has moved.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use kvcache_core::Result;

use crate::backend::Operation;
use crate::estimate::{Costs, PathCost};

/// The counters of one backend.
#[derive(Default)]
pub(crate) struct Counters {
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    requests: AtomicU64,
    failures: AtomicU64,
    busy_ns: AtomicU64,
    /// Reads, then writes.
    costs: [Costs; 2],
    /// Counted along: of the agent, for those of a peer.
    whole: Option<Arc<Counters>>,
}

impl Counters {
    pub(crate) fn complete(&self, operation: Operation, bytes: u64, elapsed: Duration) {
        let moved = match operation {
            Operation::Read => &self.bytes_read,
            Operation::Write => &self.bytes_written,
        };
        if let Some(whole) = &self.whole {
            whole.complete(operation, bytes, elapsed);
        }
        moved.fetch_add(bytes, Ordering::Relaxed);
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.busy_ns
            .fetch_add(elapsed.as_nanos() as u64, Ordering::Relaxed);
    }

    /// An undisturbed transfer took this long.
    pub(crate) fn saw(&self, operation: Operation, bytes: u64, elapsed: Duration) {
        self.costs(operation).saw(bytes, elapsed);
        if let Some(whole) = &self.whole {
            whole.saw(operation, bytes, elapsed);
        }
    }

    /// What its transfers took.
    pub(crate) fn costs(&self, operation: Operation) -> &Costs {
        match operation {
            Operation::Read => &self.costs[0],
            Operation::Write => &self.costs[1],
        }
    }

    pub(crate) fn fail(&self) {
        if let Some(whole) = &self.whole {
            whole.fail();
        }
        self.failures.fetch_add(1, Ordering::Relaxed);
    }

    fn snapshot(&self) -> BackendStats {
        BackendStats {
            bytes_read: self.bytes_read.load(Ordering::Relaxed),
            bytes_written: self.bytes_written.load(Ordering::Relaxed),
            requests: self.requests.load(Ordering::Relaxed),
            failures: self.failures.load(Ordering::Relaxed),
            busy_ns: self.busy_ns.load(Ordering::Relaxed),
        }
    }
}

/// What one backend has done since the agent was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackendStats {
    /// Bytes of successful reads.
    pub bytes_read: u64,
    /// Bytes of successful writes.
    pub bytes_written: u64,
    /// Requests that succeeded.
    pub requests: u64,
    /// Requests that failed after they were accepted.
    pub failures: u64,
    /// Nanoseconds from post to completion, of all successful requests together.
    pub busy_ns: u64,
}

/// What an agent has done since it was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AgentStats {
    /// By the backend's name.
    pub backends: BTreeMap<&'static str, BackendStats>,
    /// Notifications that found the inbox full and waited for room: their senders waited with them.
    pub notifications_held_back: u64,
    /// Notifications of peers that do not wait for the answers to earlier ones: those were told `Busy`.
    pub notifications_refused: u64,
    /// How often a request, or a piece of one, was tried again another way after it had failed. Each is in the log too.
    pub failovers: u64,
    /// The ports of network cards that are used by name, those of `verbs`, in the order of their nearness.
    pub ports: Vec<PortStats>,
}

/// What a port of a network card has done since the agent was made: what this agent asked for, not what peers did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortStats {
    /// The device's name and the port's number, such as `mlx5_0:1`.
    pub name: String,
    /// Whether the device says so.
    pub is_up: bool,
    /// Bytes read by it, as far as they have arrived.
    pub bytes_read: u64,
    /// Bytes written by it, likewise.
    pub bytes_written: u64,
    /// How often a rail to some peer was lost while others of the same path went on.
    pub rails_lost: u64,
    /// Pieces of requests that were done again by another port.
    pub pieces_repeated: u64,
}

/// The counters of all backends of an agent.
#[derive(Default)]
pub(crate) struct Stats {
    failovers: AtomicU64,
    assumed: RwLock<BTreeMap<String, PathCost>>,
    backends: RwLock<BTreeMap<&'static str, Arc<Counters>>>,
}

impl Stats {
    /// What a backend is taken to cost.
    pub(crate) fn assume(&self, backend: &str, cost: PathCost) -> Result<()> {
        cost.check()?;
        let mut assumed = self.assumed.write().unwrap_or_else(PoisonError::into_inner);
        assumed.insert(backend.to_owned(), cost);
        Ok(())
    }

    pub(crate) fn assumed(&self, backend: &str) -> PathCost {
        let assumed = self.assumed.read().unwrap_or_else(PoisonError::into_inner);
        let told = assumed.get(backend).copied();
        told.unwrap_or_else(|| PathCost::usual(backend))
    }

    /// Of a peer's own, which count into these.
    pub(crate) fn part(&self, of: &Self, backend: &'static str) -> Arc<Counters> {
        let known = of.backends.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(counters) = known.get(backend) {
            return counters.clone();
        }
        drop(known);
        let whole = self.counters(backend);
        let mut known = of.backends.write().unwrap_or_else(PoisonError::into_inner);
        let part = Counters {
            whole: Some(whole),
            ..Counters::default()
        };
        known
            .entry(backend)
            .or_insert_with(|| Arc::new(part))
            .clone()
    }

    pub(crate) fn counters(&self, backend: &'static str) -> Arc<Counters> {
        let known = self.backends.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(counters) = known.get(backend) {
            return counters.clone();
        }
        drop(known);
        let mut known = self
            .backends
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        known.entry(backend).or_default().clone()
    }

    pub(crate) fn count_failover(&self) {
        self.failovers.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn failovers(&self) -> u64 {
        self.failovers.load(Ordering::Relaxed)
    }

    pub(crate) fn snapshot(&self) -> BTreeMap<&'static str, BackendStats> {
        let known = self.backends.read().unwrap_or_else(PoisonError::into_inner);
        known
            .iter()
            .map(|(name, counters)| (*name, counters.snapshot()))
            .collect()
    }
}
