//! Messages one at a time, from an agent that hands out all that wait at once.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvfabric::transfer::{Agent, Notification};
use kvfabric::{Error, ErrorKind, Result};

/// Messages taken from the agent and not yet from here. Never more than the agent's own inbox holds, because that is asked
/// only when this is empty.
#[derive(Default)]
pub(crate) struct Inbox {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Notification>,
    /// Some thread waits at the agent; the others wait for what it brings, or to take its place.
    is_polled: bool,
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows the oldest message to `deliver`, and removes it if that says so.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] when none has come; the message stays when `deliver` fails.
    pub(crate) fn receive(
        &self,
        agent: &Agent,
        timeout: Duration,
        deliver: impl FnOnce(&Notification) -> Result<bool>,
    ) -> Result<()> {
        let until = Instant::now() + timeout;
        let mut state = self.lock();
        loop {
            if let Some(oldest) = state.waiting.front() {
                if deliver(oldest)? {
                    state.waiting.pop_front();
                }
                return Ok(());
            }
            let left = until.saturating_duration_since(Instant::now());
            if !state.is_polled {
                state.is_polled = true;
                drop(state);
                let arrived = agent.wait_notifications(left);
                state = self.lock();
                state.is_polled = false;
                state.waiting.extend(arrived);
                self.changed.notify_all();
                if !state.waiting.is_empty() {
                    continue;
                }
            } else if !left.is_zero() {
                state = match self.changed.wait_timeout(state, left) {
                    Ok((state, _)) => state,
                    Err(poisoned) => poisoned.into_inner().0,
                };
                continue;
            }
            if Instant::now() >= until {
                let text = format!("no message within {timeout:?}");
                return Err(Error::new(ErrorKind::Timeout, text));
            }
        }
    }
}
