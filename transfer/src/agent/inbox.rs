//! Notifications that wait to be taken.

mod room;

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvcache_core::{Error, ErrorKind, Result};

use crate::look::Looks;
use crate::reactor::Reactor;
use crate::signal::Signal;

use self::room::{Answers, Queue};
pub(crate) use self::room::{Door, Sender, UNHEARD_BYTES_MAX, UNHEARD_MAX};

/// Notifications that an agent keeps until they are taken; above it, senders wait for room.
pub const INBOX_NOTIFICATIONS_MAX: usize = 16_384;

/// Bytes of notifications that an agent keeps; above it, senders wait for room.
pub const INBOX_BYTES_MAX: usize = 8 << 20;

/// A message that came with, or after, a transfer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notification {
    /// The name of the agent that sent it.
    pub peer: Arc<str>,
    /// What it sent.
    pub bytes: Bytes,
}

#[derive(Default)]
pub(crate) struct Inbox {
    state: Mutex<State>,
    arrived: Condvar,
    /// Raised while a notification waits.
    waits: Signal,
    doors: AtomicU64,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Notification>,
    bytes: usize,
    late: Queue,
    held_back: u64,
    refused: u64,
    /// The agent is gone: nobody takes anything any more.
    closed: bool,
    wakers: Vec<Waker>,
    /// Threads that sleep until one arrives.
    sleepers: u32,
    /// Kicked when there is a notification: somebody who waits for one may lead it.
    led: Option<Arc<Reactor>>,
}

impl State {
    /// Whether there is room for so many bytes now, and nobody waits for it already.
    fn has_room(&self, bytes: usize) -> bool {
        self.late.is_empty() && self.fits(bytes)
    }

    fn fits(&self, bytes: usize) -> bool {
        self.waiting.len() < INBOX_NOTIFICATIONS_MAX && self.bytes + bytes <= INBOX_BYTES_MAX
    }

    fn add(&mut self, peer: Arc<str>, bytes: Bytes) {
        self.bytes += bytes.len();
        self.waiting.push_back(Notification { peer, bytes });
    }

    /// Takes what waits for room, as far as there is some.
    fn fill(&mut self) -> Answers {
        let mut answers = Answers::new();
        while self.late.next_bytes().is_some_and(|bytes| self.fits(bytes))
            && let Some((Notification { peer, bytes }, sender)) = self.late.pop()
        {
            self.add(peer, bytes);
            answers.push((sender, Ok(())));
        }
        answers
    }
}

/// Without any lock: this calls back.
fn answer(answers: Answers) {
    for (sender, outcome) in answers {
        sender.answer(outcome);
    }
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For a connection over which notifications come.
    pub(crate) fn door(&self) -> Door {
        Door(self.doors.fetch_add(1, Ordering::Relaxed))
    }

    /// Takes a notification now, or tells that there is no room.
    pub(crate) fn try_deliver(&self, peer: &Arc<str>, bytes: Bytes) -> Result<()> {
        let mut state = self.lock();
        if !state.has_room(bytes.len()) {
            let (count, held) = (state.waiting.len(), state.bytes);
            let text = format!("inbox holds {count} notifications of {held} bytes");
            return Err(Error::new(ErrorKind::Busy, text));
        }
        state.add(peer.clone(), bytes);
        self.tell(state);
        Ok(())
    }

    /// Takes a notification as soon as there is room, after those that came before it. What its sender is to be told, if that
    /// is known now; [`Sender::answer`] tells it later otherwise.
    pub(crate) fn deliver<S: Sender + 'static>(
        &self,
        door: Door,
        peer: &Arc<str>,
        bytes: Bytes,
        sender: S,
    ) -> Option<(S, Result<()>)> {
        let mut state = self.lock();
        if state.closed {
            let text = "the agent is closed";
            return Some((sender, Err(Error::new(ErrorKind::PeerLost, text))));
        }
        if state.has_room(bytes.len()) {
            state.add(peer.clone(), bytes);
            self.tell(state);
            return Some((sender, Ok(())));
        }
        match state.late.push(door, peer, bytes, sender) {
            Ok(()) => {
                state.held_back += 1;
                None
            }
            Err((sender, error)) => {
                state.refused += u64::from(error.kind() == ErrorKind::Busy);
                Some((sender, Err(error)))
            }
        }
    }

    /// A notification is there: wakes whoever waits for one.
    fn tell(&self, mut state: MutexGuard<'_, State>) {
        self.waits.raise();
        let wakers = std::mem::take(&mut state.wakers);
        let led = state.led.clone();
        let sleepers = state.sleepers;
        drop(state);
        if sleepers > 0 {
            self.arrived.notify_all();
        }
        if let Some(reactor) = led {
            reactor.kick();
        }
        wakers.into_iter().for_each(Waker::wake);
    }

    pub(crate) fn take(&self) -> Vec<Notification> {
        let mut state = self.lock();
        state.bytes = 0;
        self.waits.clear();
        let taken = std::mem::take(&mut state.waiting);
        let answers = state.fill();
        if answers.is_empty() {
            drop(state);
        } else {
            self.tell(state);
            answer(answers);
        }
        taken.into()
    }

    /// Some senders of this process have given up: those that wait for room no longer do.
    pub(crate) fn reap(&self) {
        let mut state = self.lock();
        let mut answers = state.late.given_up();
        self.refill(state, &mut answers);
        answer(answers);
    }

    /// A connection is over: what came over it and was not taken is not.
    pub(crate) fn shut(&self, door: Door, reason: &str) {
        let mut state = self.lock();
        let mut answers = state.late.end(Some(door), reason);
        self.refill(state, &mut answers);
        answer(answers);
    }

    /// What is behind something long that went may have room now.
    fn refill(&self, mut state: MutexGuard<'_, State>, answers: &mut Answers) {
        let filled = state.fill();
        if filled.is_empty() {
            return;
        }
        answers.extend(filled);
        self.tell(state);
    }

    /// The agent goes: nothing is taken any more.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        let answers = state.late.end(None, "the agent was closed");
        drop(state);
        answer(answers);
    }

    /// Notifications that found the inbox full and waited for room.
    pub(crate) fn held_back(&self) -> u64 {
        self.lock().held_back
    }

    pub(crate) fn refused(&self) -> u64 {
        self.lock().refused
    }

    /// Whether there is one before time runs out. Who waits reads the sockets meanwhile, if nobody else does.
    pub(crate) fn wait(&self, timeout: Duration, reactor: &Arc<Reactor>, looks: &Looks) -> bool {
        let mut state = self.lock();
        if !state.waiting.is_empty() {
            return true;
        }
        state.led.get_or_insert_with(|| reactor.clone());
        drop(state);
        let until = Instant::now() + timeout;
        let look = looks.begin(until);
        reactor.lead(until, &look, &|| !self.lock().waiting.is_empty());
        let came = self.sleep(until);
        look.end(came);
        came
    }

    /// Whether there is one before `until`, for which whoever brings it wakes the calling thread.
    fn sleep(&self, until: Instant) -> bool {
        let mut state = self.lock();
        while state.waiting.is_empty() {
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                return false;
            };
            state.sleepers += 1;
            state = match self.arrived.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
            state.sleepers -= 1;
        }
        true
    }

    /// A descriptor that is readable while a notification waits.
    pub(crate) fn event_fd(&self) -> Result<BorrowedFd<'_>> {
        let state = self.lock();
        if self.waits.open()? && !state.waiting.is_empty() {
            self.waits.raise();
        }
        self.waits
            .fd()
            .ok_or_else(|| Error::new(ErrorKind::Internal, "an eventfd was made and is not there"))
    }

    fn poll(&self, waker: &Waker) -> bool {
        let mut state = self.lock();
        if !state.waiting.is_empty() {
            return true;
        }
        if !state.wakers.iter().any(|known| known.will_wake(waker)) {
            state.wakers.push(waker.clone());
        }
        false
    }
}

/// Resolves when a notification waits to be taken.
pub struct Notified {
    pub(crate) exports: Arc<super::Exports>,
}

impl Future for Notified {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.exports.inbox().poll(context.waker()) {
            return Poll::Ready(());
        }
        Poll::Pending
    }
}
