//! Answers to notifications that waited for room in the inbox, on their way to the thread that may send them.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use kvcache_core::Result;

use super::unix::{Message, Outcome};
use crate::agent::Sender;

/// Answers for peers, each of them known by a `P`. As many at most as notifications may wait.
pub(super) struct Late<P> {
    answers: Mutex<Vec<(P, Message)>>,
    /// Wakes the thread.
    wake: OnceLock<Arc<OwnedFd>>,
}

impl<P> Default for Late<P> {
    fn default() -> Self {
        Self {
            answers: Mutex::default(),
            wake: OnceLock::new(),
        }
    }
}

impl<P> Late<P> {
    /// The eventfd that the thread sleeps at.
    pub(super) fn wake_by(&self, wake: &Arc<OwnedFd>) {
        // There is one thread, and it starts once.
        let _ = self.wake.set(wake.clone());
    }

    /// What is to be sent now.
    pub(super) fn take(&self) -> Vec<(P, Message)> {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *answers)
    }

    fn add(&self, peer: P, answer: Message) {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.push((peer, answer));
        drop(answers);
        if let Some(wake) = self.wake.get() {
            // It is full when it was written often enough.
            let _ = rustix::io::write(wake, &1_u64.to_ne_bytes());
        }
    }
}

/// Whoever has sent a notification, by its number.
pub(super) struct Notifier<P> {
    pub(super) late: Arc<Late<P>>,
    pub(super) peer: P,
    pub(super) id: u64,
}

impl<P: Copy + Send + 'static> Sender for Notifier<P> {
    const IS_REMOTE: bool = true;

    fn answer(self, outcome: Result<()>) {
        let outcome = Outcome::of(outcome);
        let answer = Message::Done {
            id: self.id,
            outcome,
        };
        self.late.add(self.peer, answer);
    }
}
