//! Watches over requests in flight: their deadlines, and whether their paths stand still.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Instant;

use kvcache_core::{Error, Result};

use crate::request::RequestCore;

/// An entry of the timer, by which it is taken out again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TimerKey(Instant, u64);

/// When to look at which request, in order, and the thread that waits for the first one.
///
/// The thread is woken only for a deadline before the one it waits for; those of finished requests are taken out
/// without waking it. An idle agent's thread sleeps for good.
#[derive(Default)]
pub(crate) struct Timer {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    entries: BTreeMap<TimerKey, Weak<RequestCore>>,
    next: u64,
    /// When the thread will look by itself.
    looks_at: Option<Instant>,
    closed: bool,
}

impl Timer {
    /// Starts the thread; it ends after [`Timer::close`].
    pub(crate) fn start() -> Result<(Arc<Self>, JoinHandle<()>)> {
        let timer = Arc::new(Self::default());
        let shared = timer.clone();
        let thread = std::thread::Builder::new()
            .name("kvf-timer".into())
            .spawn(move || shared.run())
            .map_err(|e| Error::io("start the deadline thread", e))?;
        Ok((timer, thread))
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn add(&self, due: Instant, request: Weak<RequestCore>) -> TimerKey {
        let mut queue = self.lock();
        let key = TimerKey(due, queue.next);
        queue.next += 1;
        queue.entries.insert(key, request);
        if queue.looks_at.is_none_or(|at| due < at) {
            self.changed.notify_one();
        }
        key
    }

    pub(crate) fn remove(&self, key: TimerKey) {
        self.lock().entries.remove(&key);
    }

    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_one();
    }

    fn run(&self) {
        let mut queue = self.lock();
        while !queue.closed {
            let now = Instant::now();
            if let Some(entry) = queue.entries.first_entry()
                && entry.key().0 <= now
            {
                let (key, request) = entry.remove_entry();
                // Not under the lock: the request takes its own first when it adds itself.
                drop(queue);
                if let Some(request) = request.upgrade() {
                    request.ring(key);
                }
                queue = self.lock();
                continue;
            }
            queue.looks_at = queue.entries.first_key_value().map(|(key, _)| key.0);
            queue = match queue.looks_at {
                None => self
                    .changed
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(at) => match self
                    .changed
                    .wait_timeout(queue, at.saturating_duration_since(now))
                {
                    Ok((queue, _)) => queue,
                    Err(poisoned) => poisoned.into_inner().0,
                },
            };
        }
    }
}
