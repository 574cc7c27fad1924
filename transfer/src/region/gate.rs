//! Who uses a region, and whether it is closed.

use std::sync::PoisonError;
use std::task::Waker;
use std::time::{Duration, Instant};

use crate::sync::{AtomicU64, Condvar, Mutex, MutexGuard, Ordering};

const CLOSED: u64 = 1 << 63;

/// Counts users, and tells when the last has left after closing.
#[derive(Default)]
pub(super) struct Gate {
    users: AtomicU64,
    waiting: Mutex<Vec<Waker>>,
    emptied: Condvar,
}

impl Gate {
    pub(super) fn enter(&self) -> bool {
        if self.users.fetch_add(1, Ordering::AcqRel) & CLOSED == 0 {
            return true;
        }
        self.leave();
        false
    }

    /// Counts a user even when closed: for one who must end something first.
    pub(super) fn hold(&self) {
        self.users.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn leave(&self) {
        let before = self.users.fetch_sub(1, Ordering::AcqRel);
        assert!(
            before & !CLOSED > 0,
            "a region was left more often than entered"
        );
        if before == CLOSED | 1 {
            self.wake();
        }
    }

    fn wake(&self) {
        let wakers = std::mem::take(&mut *self.wakers());
        self.emptied.notify_all();
        wakers.into_iter().for_each(Waker::wake);
    }

    fn wakers(&self) -> MutexGuard<'_, Vec<Waker>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses everyone from now on. Whether this call closed it.
    pub(super) fn close(&self) -> bool {
        self.users.fetch_or(CLOSED, Ordering::AcqRel) & CLOSED == 0
    }

    pub(super) fn is_closed(&self) -> bool {
        self.users.load(Ordering::Acquire) & CLOSED != 0
    }

    fn is_drained(&self) -> bool {
        self.users.load(Ordering::Acquire) == CLOSED
    }

    pub(super) fn wait(&self, timeout: Duration) -> bool {
        let until = Instant::now() + timeout;
        let mut guard = self.wakers();
        while !self.is_drained() {
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                return false;
            };
            guard = match self.emptied.wait_timeout(guard, left) {
                Ok((guard, _)) => guard,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        true
    }

    pub(super) fn poll(&self, waker: &Waker) -> bool {
        let mut wakers = self.wakers();
        if self.is_drained() {
            return true;
        }
        if !wakers.iter().any(|known| known.will_wake(waker)) {
            wakers.push(waker.clone());
        }
        false
    }
}
