//! A lock that one thread takes again and again, and others now and then.

use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

/// A lock whose holder cannot have it again before those who already wait at its door. A plain one goes to whoever is awake,
/// which is most times the one that has just let go of it: others may wait for as long as that has something to do.
pub(super) struct Fair<T> {
    /// Held by whoever is next, until it is inside.
    door: Mutex<()>,
    inside: Mutex<T>,
}

type Tried<'a, T> = Result<MutexGuard<'a, T>, TryLockError<MutexGuard<'a, T>>>;

fn taken<T>(tried: Tried<'_, T>) -> Option<MutexGuard<'_, T>> {
    match tried {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

impl<T> Fair<T> {
    pub(super) fn new(value: T) -> Self {
        Self {
            door: Mutex::new(()),
            inside: Mutex::new(value),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, T> {
        let _next = self.door.lock().unwrap_or_else(PoisonError::into_inner);
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lock, if nobody has it and nobody waits for it.
    pub(super) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        let _next = taken(self.door.try_lock())?;
        taken(self.inside.try_lock())
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    /// Each time somebody waits, whoever lets go and comes back at once finds that the other one was inside before; and does
    /// not get in beside it.
    #[test]
    fn who_waits_goes_before_who_comes_back() {
        const ROUNDS: u32 = 200;
        let fair = Fair::new(0);
        std::thread::scope(|scope| {
            for round in 0..ROUNDS {
                let held = fair.lock();
                let waiting = scope.spawn(|| *fair.lock() += 1);
                let until = Instant::now() + Duration::from_secs(60);
                while fair.door.try_lock().is_ok() {
                    assert!(Instant::now() < until, "nobody waits at the door");
                    std::thread::yield_now();
                }
                assert!(fair.try_lock().is_none());
                drop(held);
                assert_eq!(*fair.lock(), round + 1);
                waiting.join().unwrap();
            }
        });
        assert_eq!(fair.try_lock().as_deref(), Some(&ROUNDS));
    }
}
