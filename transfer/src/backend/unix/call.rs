//! Answers that someone waits for.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kvcache_core::{Error, ErrorKind, Result};

use super::message::Outcome;
use crate::agent::{UNHEARD_BYTES_MAX, UNHEARD_MAX};
use crate::backend::Job;

/// Messages that may wait for their answers: notifications, and calls, which are made one after the other.
pub(in crate::backend) const UNANSWERED_MAX: usize = UNHEARD_MAX + 16;

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
    /// A notification of so many bytes whose caller has given up. The peer may have it all the same, so it counts until it is
    /// answered.
    GivenUp(usize),
}

impl Waiting {
    /// The bytes of a notification.
    fn notification_bytes(&self) -> Option<usize> {
        match self {
            Self::Call(_) => None,
            Self::Notification(job) => Some(job.notification_bytes()),
            Self::GivenUp(bytes) => Some(*bytes),
        }
    }
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
    waiting: Mutex<Option<Open>>,
    next: AtomicU64,
}

#[derive(Default)]
struct Open {
    by_number: HashMap<u64, Waiting>,
    /// Notifications among them, and their bytes.
    notifications: usize,
    bytes: usize,
}

impl Default for Unanswered {
    fn default() -> Self {
        Self {
            waiting: Mutex::new(Some(Open::default())),
            // 0 is the greeting.
            next: AtomicU64::new(1),
        }
    }
}

impl Unanswered {
    fn lock(&self) -> MutexGuard<'_, Option<Open>> {
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
        if open.by_number.len() >= UNANSWERED_MAX {
            return Err((who, Refused::Full));
        }
        if let Some(bytes) = who.notification_bytes() {
            open.notifications += 1;
            open.bytes += bytes;
        }
        open.by_number.insert(id, who);
        Ok(())
    }

    /// Whether one more notification may wait for its answer; also when all is over.
    pub(in crate::backend) fn has_room(&self) -> bool {
        let waiting = self.lock();
        let few = |open: &Open| open.notifications < UNHEARD_MAX && open.bytes < UNHEARD_BYTES_MAX;
        waiting.as_ref().is_none_or(few)
    }

    /// Whether a notification waits for its answer.
    pub(in crate::backend) fn is_notifying(&self) -> bool {
        let waits = |who: &Waiting| matches!(who, Waiting::Notification(_));
        self.lock()
            .as_ref()
            .is_some_and(|open| open.by_number.values().any(waits))
    }

    pub(in crate::backend) fn take(&self, id: u64) -> Option<Waiting> {
        let mut waiting = self.lock();
        let open = waiting.as_mut()?;
        let who = open.by_number.remove(&id)?;
        if let Some(bytes) = who.notification_bytes() {
            open.notifications -= 1;
            open.bytes -= bytes;
        }
        Some(who)
    }

    /// Jobs that were given up by their callers. What was sent of them still counts.
    pub(in crate::backend) fn take_abandoned(&self) -> Vec<Job> {
        let mut waiting = self.lock();
        let Some(open) = &mut *waiting else {
            return Vec::new();
        };
        let mut taken = Vec::new();
        for who in open.by_number.values_mut() {
            let Waiting::Notification(job) = who else {
                continue;
            };
            if !job.is_abandoned() {
                continue;
            }
            let bytes = job.notification_bytes();
            if let Waiting::Notification(job) = std::mem::replace(who, Waiting::GivenUp(bytes)) {
                taken.push(job);
            }
        }
        taken
    }

    /// Nobody will be answered any more: everyone who waits.
    pub(in crate::backend) fn close(&self) -> impl Iterator<Item = Waiting> + use<> {
        let open = self.lock().take().unwrap_or_default();
        open.by_number.into_values()
    }
}
