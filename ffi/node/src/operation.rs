//! What was begun on a node's runtime and is waited for from outside of it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};
use rustix::event::{EventfdFlags, eventfd};

use crate::life::Life;

/// Work in progress on a node, and its outcome once it has one.
///
/// Dropping it stops nothing: what was begun goes on to its end, and holds on to what it needs until then. A clone is
/// another handle on the same work.
#[derive(Debug)]
pub struct Operation<T> {
    shared: Arc<Shared<T>>,
}

#[derive(Debug)]
struct Shared<T> {
    outcome: OnceLock<Result<T>>,
    /// Made when it is first asked for, readable from the outcome on.
    signal: OnceLock<OwnedFd>,
    /// Held while the outcome is told, and by whoever looks whether it was: so nobody waits for what was told already.
    gate: Mutex<()>,
    decided: Condvar,
}

impl<T> Shared<T> {
    fn gate(&self) -> MutexGuard<'_, ()> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first outcome counts.
    fn decide(&self, outcome: Result<T>) {
        if self.outcome.set(outcome).is_err() {
            return;
        }
        let _gate = self.gate();
        if let Some(signal) = self.signal.get()
            && let Err(error) = rustix::io::write(signal, &1_u64.to_ne_bytes())
        {
            tracing::error!(%error, "signal the end of an operation");
        }
        self.decided.notify_all();
    }
}

impl<T> Clone for Operation<T> {
    fn clone(&self) -> Self {
        Self {
            shared: self.shared.clone(),
        }
    }
}

impl<T> Operation<T> {
    /// An operation without an outcome, and the one who must give it one.
    pub(crate) fn begin(life: Arc<Life>) -> (Self, Decider<T>) {
        let shared = Arc::new(Shared {
            outcome: OnceLock::new(),
            signal: OnceLock::new(),
            gate: Mutex::new(()),
            decided: Condvar::new(),
        });
        let decider = Decider {
            shared: shared.clone(),
            life,
        };
        (Self { shared }, decider)
    }

    /// The outcome, if there is one; asking does not take it away. An error is told anew each time, as text of the same
    /// kind.
    #[must_use]
    pub fn poll(&self) -> Option<Result<&T>> {
        self.shared.outcome.get().map(|outcome| {
            let again = |error: &Error| Error::new(error.kind(), error.to_string());
            outcome.as_ref().map_err(again)
        })
    }

    /// Whether there is an outcome, good or bad.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.shared.outcome.get().is_some()
    }

    /// Waits for the outcome, at most so long; none when it has not come. Blocks the thread: not for asynchronous code.
    #[must_use]
    pub fn wait(&self, timeout: Duration) -> Option<Result<&T>> {
        if let Some(outcome) = self.poll() {
            return Some(outcome);
        }
        // What a clock cannot hold is as good as for ever.
        let until = Instant::now().checked_add(timeout);
        let mut gate = self.shared.gate();
        while !self.is_done() {
            let left = match until {
                Some(until) => until.saturating_duration_since(Instant::now()),
                None => timeout,
            };
            if left.is_zero() {
                break;
            }
            gate = match self.shared.decided.wait_timeout(gate, left) {
                Ok((gate, _)) => gate,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        drop(gate);
        self.poll()
    }

    /// A descriptor that is readable once there is an outcome, and stays so: for `poll`, `epoll` and event loops. It
    /// belongs to the operation and lives as long as its handles; do not read from it.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the process has no descriptors left.
    pub fn event_fd(&self) -> Result<BorrowedFd<'_>> {
        let _gate = self.shared.gate();
        let signal = match self.shared.signal.get() {
            Some(signal) => signal,
            None => {
                let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
                let signal = eventfd(u32::from(self.is_done()), flags)
                    .map_err(|error| Error::io("make an eventfd", error.into()))?;
                self.shared.signal.get_or_init(|| signal)
            }
        };
        Ok(signal.as_fd())
    }
}

/// Owes an operation its outcome. Dropped without giving one, it tells why there is none: a panic, which also poisons all
/// handles, or the end of the runtime.
pub(crate) struct Decider<T> {
    shared: Arc<Shared<T>>,
    life: Arc<Life>,
}

impl<T> Decider<T> {
    pub(crate) fn decide(self, outcome: Result<T>) {
        self.shared.decide(outcome);
    }
}

impl<T> Drop for Decider<T> {
    fn drop(&mut self) {
        if self.shared.outcome.get().is_some() {
            return;
        }
        let error = if std::thread::panicking() {
            self.life.poison();
            Error::new(ErrorKind::Internal, "the operation panicked")
        } else {
            Error::new(ErrorKind::Cancelled, "the node ended before the operation")
        };
        self.shared.decide(Err(error));
    }
}

#[cfg(test)]
mod tests;
