//! Answers that someone waits for.

use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

use kvcache_core::{Error, ErrorKind, Result};

use super::message::Outcome;

/// What the peer answered, and the descriptor that came with it.
pub(super) type Answer = Result<(Outcome, Option<OwnedFd>)>;

/// A question that a thread waits for the answer to.
#[derive(Default)]
pub(super) struct Call {
    answer: Mutex<Option<Answer>>,
    answered: Condvar,
}

impl Call {
    pub(super) fn answer(&self, answer: Answer) {
        *self.answer.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
        self.answered.notify_all();
    }

    pub(super) fn wait(&self, until: Instant) -> Answer {
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
