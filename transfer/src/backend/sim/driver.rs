//! The simulated network as agents of one process share it.
//!
//! Time is virtual: nothing waits for a latency, the network jumps to whatever is due next. A thread drives it; while
//! it is paused only [`SimNetwork::advance`] does, so that a test decides what is in flight when.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result, Time};

use super::exchange::Exchange;
use super::link::LinkProfile;
use super::network::SimNode;
use super::running::Running;
use super::transfer::{Effect, ExchangeConfig, SimTransferId};
use crate::agent::Exports;

/// A simulated network that agents of this process join. Clones are handles to the same one.
#[derive(Clone)]
pub struct SimNetwork(pub(super) Arc<Handle>);

pub(super) struct Handle {
    pub(super) shared: Arc<Shared>,
    driver: Option<JoinHandle<()>>,
}

pub(super) struct Shared {
    /// Tells this network from others in metadata.
    pub(super) id: u64,
    state: Mutex<State>,
    /// How often something was due and done.
    pub(super) steps: AtomicU64,
    pub(super) changed: Condvar,
}

pub(super) struct State {
    pub(super) exchange: Exchange,
    pub(super) now: Time,
    paused: bool,
    closed: bool,
    pub(super) members: BTreeMap<String, Member>,
    pub(super) running: BTreeMap<SimTransferId, Running>,
    pub(super) channels: u64,
}

pub(super) struct Member {
    pub(super) node: SimNode,
    pub(super) exports: Weak<Exports>,
}

/// What is told to jobs, and dropped, once the lock is free: it can call anybody's waker, and end agents.
pub(super) type Settled = Vec<Running>;

impl SimNetwork {
    /// A network without members: the same seed and the same posts, made while it is paused, give the same trace.
    ///
    /// # Errors
    /// `Invalid` for a zero among the settings, `Io` when the system gives no thread or randomness.
    pub fn new(seed: u64, config: ExchangeConfig) -> Result<Self> {
        let mut id = [0; 8];
        getrandom::fill(&mut id)
            .map_err(|error| Error::new(ErrorKind::Io, format!("draw a network id: {error}")))?;
        let state = State {
            exchange: Exchange::new(seed, config)?,
            now: Time(0),
            paused: false,
            closed: false,
            members: BTreeMap::new(),
            running: BTreeMap::new(),
            channels: 0,
        };
        let shared = Arc::new(Shared {
            id: u64::from_le_bytes(id),
            state: Mutex::new(state),
            steps: AtomicU64::new(0),
            changed: Condvar::new(),
        });
        let driven = Arc::clone(&shared);
        let driver = std::thread::Builder::new()
            .name("kvf-sim".to_owned())
            .spawn(move || driven.drive())
            .map_err(|error| Error::io("start the simulated network's thread", error))?;
        Ok(Self(Arc::new(Handle {
            shared,
            driver: Some(driver),
        })))
    }

    /// Stops time: posts only queue up.
    pub fn pause(&self) {
        self.lock().paused = true;
    }

    /// Lets time run again.
    pub fn resume(&self) {
        self.lock().paused = false;
        self.0.shared.changed.notify_all();
    }

    /// Lets this much virtual time pass, on the calling thread.
    pub fn advance(&self, time: Duration) {
        let mut state = self.lock();
        let until = state.now + time;
        while let Some(due) = state.exchange.poll_timeout().filter(|due| *due <= until) {
            let settled = state.step(due);
            drop(state);
            settle(settled);
            state = self.lock();
        }
        state.now = state.now.max(until);
    }

    /// Waits until nothing is under way, at most `timeout` of real time; whether that came true.
    #[must_use]
    pub fn wait_idle(&self, timeout: Duration) -> bool {
        let until = Instant::now() + timeout;
        let mut state = self.lock();
        while state.exchange.poll_timeout().is_some() || !state.running.is_empty() {
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                return false;
            };
            state = match self.0.shared.changed.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        true
    }

    /// Cuts both directions between two members.
    ///
    /// # Errors
    /// `NotFound` for a name that is no member's.
    pub fn partition(&self, one: &str, other: &str) -> Result<()> {
        let mut state = self.lock();
        let (one, other) = (state.node(one)?, state.node(other)?);
        state.exchange.partition(one, other);
        Ok(())
    }

    /// Mends [`SimNetwork::partition`].
    ///
    /// # Errors
    /// `NotFound` for a name that is no member's.
    pub fn heal(&self, one: &str, other: &str) -> Result<()> {
        let mut state = self.lock();
        let (one, other) = (state.node(one)?, state.node(other)?);
        state.exchange.heal(one, other);
        Ok(())
    }

    /// Gives the direction `from` → `to` its own behaviour.
    ///
    /// # Errors
    /// `NotFound` for a name that is no member's, `Invalid` for a link without bandwidth.
    pub fn set_link(&self, from: &str, to: &str, profile: LinkProfile) -> Result<()> {
        let mut state = self.lock();
        let (from, to) = (state.node(from)?, state.node(to)?);
        state.exchange.set_link(from, to, profile)
    }

    /// A hash over every step of the network so far: equal runs have equal digests.
    #[must_use]
    pub fn trace_digest(&self) -> u64 {
        self.lock().exchange.trace_digest()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.0.shared.lock()
    }
}

impl std::fmt::Debug for SimNetwork {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimNetwork")
            .field("now", &self.lock().now)
            .finish_non_exhaustive()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
        if let Some(driver) = self.driver.take() {
            // The last handle can go with a job that the driver settles.
            if driver.thread().id() != std::thread::current().id() && driver.join().is_err() {
                tracing::error!("the simulated network's thread panicked");
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drive(&self) {
        let mut state = self.lock();
        loop {
            if state.closed {
                let settled = state.close();
                drop(state);
                settle(settled);
                return;
            }
            let due = if state.paused {
                None
            } else {
                state.exchange.poll_timeout()
            };
            let Some(due) = due else {
                self.changed.notify_all();
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let settled = state.step(due);
            drop(state);
            self.steps.fetch_add(1, Ordering::Relaxed);
            settle(settled);
            state = self.lock();
        }
    }
}

pub(super) fn settle(settled: Settled) {
    for Running {
        job,
        remote,
        failure,
        peer,
        from,
        door,
        is_unheard,
        ..
    } in settled
    {
        drop(remote);
        match failure {
            None if is_unheard => peer.deliver_for(door, &from, job),
            failure => job.settle(failure.map_or(Ok(()), Err)),
        }
    }
}

impl State {
    pub(super) fn node(&self, name: &str) -> Result<SimNode> {
        self.members
            .get(name)
            .map(|member| member.node)
            .ok_or_else(|| {
                let text = format!("no agent {name:?} is on the simulated network");
                Error::new(ErrorKind::NotFound, text)
            })
    }

    /// Moves time to `due` and does what is due then.
    fn step(&mut self, due: Time) -> Settled {
        self.now = self.now.max(due);
        self.exchange.handle_timeout(self.now);
        self.take_effects()
    }

    fn take_effects(&mut self) -> Settled {
        let mut settled = Settled::new();
        while let Some(effect) = self.exchange.poll_effect() {
            match effect {
                Effect::Landed {
                    transfer,
                    offset,
                    len,
                    corruption,
                } => {
                    if let Some(running) = self.running.get_mut(&transfer)
                        && let Err(error) = running.land(offset, len, corruption)
                    {
                        running.failure.get_or_insert(error);
                    }
                }
                Effect::Notified { transfer } => {
                    if let Some(running) = self.running.get_mut(&transfer) {
                        running.notify();
                    }
                }
                Effect::Finished {
                    transfer,
                    failure,
                    settled: free,
                    ..
                } => {
                    if let Some(running) = self.running.get_mut(&transfer) {
                        running.finish(failure, free);
                        if free {
                            self.end(transfer, &mut settled);
                        }
                    }
                }
                Effect::Drained { transfer } => self.end(transfer, &mut settled),
                Effect::Message { .. } => {}
            }
        }
        settled
    }

    fn end(&mut self, transfer: SimTransferId, settled: &mut Settled) {
        if let Some(running) = self.running.remove(&transfer) {
            settled.push(running);
        }
    }

    /// Withdraws the jobs that `wanted` names.
    pub(super) fn cancel(&mut self, wanted: impl Fn(&Running) -> Option<Error>) -> Settled {
        let ids: Vec<SimTransferId> = self.running.keys().copied().collect();
        for id in ids {
            let Some(running) = self.running.get_mut(&id) else {
                continue;
            };
            if running.cancelled {
                continue;
            }
            if let Some(error) = wanted(running) {
                running.cancelled = true;
                running.failure.get_or_insert(error);
                self.exchange.handle_cancel(self.now, id);
            }
        }
        self.take_effects()
    }

    /// Nobody drives any more, so nothing lands any more either.
    fn close(&mut self) -> Settled {
        let mut settled: Settled = std::mem::take(&mut self.running).into_values().collect();
        for running in &mut settled {
            let error = Error::new(ErrorKind::Cancelled, "the simulated network was closed");
            running.failure.get_or_insert(error);
        }
        settled
    }
}
