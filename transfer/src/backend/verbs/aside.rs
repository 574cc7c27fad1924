//! What takes long is done by threads of its own, and not under the lock: connecting queue pairs, for which the system may
//! have to find out first where the peer is; and taking them away.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use kvcache_core::Result;

use super::card::Cards;
use super::greeting::Offer;
use super::state::State;
use super::wire::Wire;

/// What is to be done with the state when something is over.
pub(super) type Then = Box<dyn FnOnce(&mut State) + Send>;

/// What is over.
pub(super) struct Aside {
    over: Mutex<Vec<Then>>,
    /// Has the thread look.
    wake: Box<dyn Fn() + Send + Sync>,
}

impl Aside {
    pub(super) fn new(wake: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            over: Mutex::default(),
            wake: Box::new(wake),
        }
    }

    pub(super) fn take(&self) -> Vec<Then> {
        std::mem::take(&mut *self.over.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn put(&self, then: Then) {
        let mut over = self.over.lock().unwrap_or_else(PoisonError::into_inner);
        over.push(then);
        drop(over);
        (self.wake)();
    }
}

impl State {
    /// Does something by a thread of its own, and then something with what came of it. Never, if there can be no thread.
    pub(super) fn aside<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Cards) -> T + Send + 'static,
        then: impl FnOnce(&mut Self, T) + Send + 'static,
    ) {
        let (cards, aside): (Arc<Cards>, Arc<Aside>) = (self.cards.clone(), self.aside.clone());
        let work = move || {
            let result = work(&cards);
            aside.put(Box::new(move |state: &mut Self| {
                if !state.is_closed {
                    then(state, result);
                }
            }));
        };
        let started = std::thread::Builder::new()
            .name("kvf-verbs-aside".into())
            .spawn(work);
        if let Err(error) = started {
            tracing::warn!(%error, "no thread to connect queue pairs");
        }
    }
}

/// An end of ours, and the one of the peer's that it is to be connected to.
pub(super) struct Meeting {
    /// The port of ours.
    pub(super) card: usize,
    pub(super) wire: Wire,
    pub(super) own: Offer,
    pub(super) peer: Offer,
}

impl Meeting {
    fn connect(self, cards: &Cards, until: Instant) -> (usize, Result<Wire>) {
        let ends = (&self.own, &self.peer);
        let connected = cards.connect(self.card, self.wire, ends, until);
        (self.card, connected)
    }
}

/// Connects all, at the same time, until then; the port of each, in order.
pub(super) fn meet(
    cards: &Cards,
    meetings: Vec<Meeting>,
    until: Instant,
) -> Vec<(usize, Result<Wire>)> {
    if meetings.len() < 2 {
        let meetings = meetings.into_iter();
        return meetings
            .map(|meeting| meeting.connect(cards, until))
            .collect();
    }
    std::thread::scope(|scope| {
        let threads: Vec<_> = meetings
            .into_iter()
            .map(|meeting| scope.spawn(move || meeting.connect(cards, until)))
            .collect();
        let ends = threads.into_iter().map(|thread| match thread.join() {
            Ok(end) => end,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        ends.collect()
    })
}
