//! Answers that someone waits for.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kvcache_core::{Error, ErrorKind, Result};

use super::message::Outcome;
use crate::backend::Job;

/// Messages that may wait for their answers.
pub(in crate::backend) const UNANSWERED_MAX: usize = 4096;

/// How many of them are kept for calls, which are made one after the other.
const CALLS_MAX: usize = 16;

/// What the peer answered, and the descriptor that came with it.
pub(in crate::backend) type Answer = Result<(Outcome, Option<OwnedFd>)>;

/// A question that a thread waits for the answer to.
#[derive(Default)]
pub(in crate::backend) struct Call {
    answer: Mutex<Option<Answer>>,
    answered: Condvar,
}

impl Call {
    pub(in crate::backend) fn answer(&self, answer: Answer) {
        *self.answer.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
        self.answered.notify_all();
    }

    pub(in crate::backend) fn wait(&self, until: Instant) -> Answer {
        let mut answer = self.answer.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(answer) = answer.take() {
                return answer;
            }
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                return Err(Error::new(ErrorKind::Timeout, "the peer does not answer"));
            };
            answer = match self.answered.wait_timeout(answer, left) {
                Ok((answer, _)) => answer,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }
}

/// Who waits for an answer.
pub(in crate::backend) enum Waiting {
    Call(Arc<Call>),
    Notification(Job),
}

/// Why nothing can be asked.
pub(in crate::backend) enum Refused {
    /// The path is lost.
    Closed,
    /// [`UNANSWERED_MAX`] wait.
    Full,
}

/// All who wait for an answer, by the number of their message.
pub(in crate::backend) struct Unanswered {
    /// None once the path is lost.
    waiting: Mutex<Option<HashMap<u64, Waiting>>>,
    next: AtomicU64,
}

impl Default for Unanswered {
    fn default() -> Self {
        Self {
            waiting: Mutex::new(Some(HashMap::new())),
            // 0 is the greeting.
            next: AtomicU64::new(1),
        }
    }
}

impl Unanswered {
    fn lock(&self) -> MutexGuard<'_, Option<HashMap<u64, Waiting>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A number that no message had.
    pub(in crate::backend) fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    pub(in crate::backend) fn enter(
        &self,
        id: u64,
        who: Waiting,
    ) -> Result<(), (Waiting, Refused)> {
        let mut waiting = self.lock();
        let Some(open) = &mut *waiting else {
            return Err((who, Refused::Closed));
        };
        if open.len() >= UNANSWERED_MAX {
            return Err((who, Refused::Full));
        }
        open.insert(id, who);
        Ok(())
    }

    /// Whether one more notification may wait for its answer, with room left for calls; also when all is over.
    pub(in crate::backend) fn has_room(&self) -> bool {
        let waiting = self.lock();
        let open = waiting.as_ref().map_or(0, HashMap::len);
        open < UNANSWERED_MAX - CALLS_MAX
    }

    /// Whether a notification waits for its answer.
    pub(in crate::backend) fn is_notifying(&self) -> bool {
        let waits = |who: &Waiting| matches!(who, Waiting::Notification(_));
        self.lock()
            .as_ref()
            .is_some_and(|open| open.values().any(waits))
    }

    pub(in crate::backend) fn take(&self, id: u64) -> Option<Waiting> {
        self.lock().as_mut()?.remove(&id)
    }

    /// Jobs that were given up by their callers.
    pub(in crate::backend) fn take_abandoned(&self) -> Vec<Job> {
        let mut waiting = self.lock();
        let Some(open) = &mut *waiting else {
            return Vec::new();
        };
        let given_up =
            |who: &Waiting| matches!(who, Waiting::Notification(job) if job.is_abandoned());
        let taken = open.extract_if(|_, who| given_up(who));
        taken
            .filter_map(|(_, who)| match who {
                Waiting::Notification(job) => Some(job),
                Waiting::Call(_) => None,
            })
            .collect()
    }

    /// Nobody will be answered any more: everyone who waits.
    pub(in crate::backend) fn close(&self) -> impl Iterator<Item = Waiting> + use<> {
        self.lock().take().unwrap_or_default().into_values()
    }
}
