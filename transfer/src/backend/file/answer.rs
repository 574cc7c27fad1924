//! One outcome on its way from a backend's thread to whoever asked.

use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

struct Progress<T> {
    outcome: Option<Result<T>>,
    waker: Option<Waker>,
}

struct Shared<T> {
    progress: Mutex<Progress<T>>,
    changed: Condvar,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, Progress<T>> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The sender's end; if it is lost the answer is an error.
pub(crate) struct Reply<T> {
    shared: Arc<Shared<T>>,
}

impl<T> Reply<T> {
    /// Answers; only the first time counts.
    pub(crate) fn send(&self, outcome: Result<T>) {
        let mut progress = self.shared.lock();
        progress.outcome.get_or_insert(outcome);
        let waker = progress.waker.take();
        drop(progress);
        self.shared.changed.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Drop for Reply<T> {
    fn drop(&mut self) {
        // After an answer was taken this reaches nobody.
        self.send(Err(Error::new(
            ErrorKind::Internal,
            "a backend ended without an answer",
        )));
    }
}

/// An outcome to come: a future, or waited for with a deadline. Given out once.
///
/// Dropping it does not stop what it waits for.
#[must_use = "nothing is known before it completes"]
pub struct Answer<T> {
    shared: Arc<Shared<T>>,
}

impl<T> Answer<T> {
    /// A pair of ends.
    pub(crate) fn channel() -> (Reply<T>, Self) {
        let progress = Mutex::new(Progress {
            outcome: None,
            waker: None,
        });
        let shared = Arc::new(Shared {
            progress,
            changed: Condvar::new(),
        });
        (
            Reply {
                shared: Arc::clone(&shared),
            },
            Self { shared },
        )
    }

    /// Waits at most `timeout`.
    ///
    /// # Errors
    /// What the operation failed with; `Timeout` when it is not over, after which waiting again is fine.
    pub fn wait(&mut self, timeout: Duration) -> Result<T> {
        let until = Instant::now() + timeout;
        let mut progress = self.shared.lock();
        loop {
            if let Some(outcome) = progress.outcome.take() {
                return outcome;
            }
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                let text = format!("no answer after {timeout:?}");
                return Err(Error::new(ErrorKind::Timeout, text));
            };
            progress = match self.shared.changed.wait_timeout(progress, left) {
                Ok((progress, _)) => progress,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }
}

impl<T> Future for Answer<T> {
    type Output = Result<T>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut progress = self.shared.lock();
        if let Some(outcome) = progress.outcome.take() {
            return Poll::Ready(outcome);
        }
        progress.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

impl<T> std::fmt::Debug for Answer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Answer")
            .field("there", &self.shared.lock().outcome.is_some())
            .finish()
    }
}
