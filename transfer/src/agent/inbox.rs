//! Notifications that wait to be taken.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvcache_core::{Error, ErrorKind, Result};

use crate::look::Looks;
use crate::reactor::Reactor;
use crate::signal::Signal;

/// Notifications that an agent keeps until they are taken; above it, senders are told `Busy`.
pub const INBOX_NOTIFICATIONS_MAX: usize = 16_384;

/// Bytes of notifications that an agent keeps; above it, senders are told `Busy`.
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
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Notification>,
    bytes: usize,
    refused: u64,
    wakers: Vec<Waker>,
    /// Threads that sleep until one arrives.
    sleepers: u32,
    /// Kicked when there is a notification: somebody who waits for one may lead it.
    led: Option<Arc<Reactor>>,
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn deliver(&self, peer: &Arc<str>, bytes: Bytes) -> Result<()> {
        let mut state = self.lock();
        let (count, held) = (state.waiting.len(), state.bytes);
        if count >= INBOX_NOTIFICATIONS_MAX || held + bytes.len() > INBOX_BYTES_MAX {
            state.refused += 1;
            let text = format!("inbox holds {count} notifications of {held} bytes");
            return Err(Error::new(ErrorKind::Busy, text));
        }
        state.bytes += bytes.len();
        state.waiting.push_back(Notification {
            peer: peer.clone(),
            bytes,
        });
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
        Ok(())
    }

    pub(crate) fn take(&self) -> Vec<Notification> {
        let mut state = self.lock();
        state.bytes = 0;
        self.waits.clear();
        std::mem::take(&mut state.waiting).into()
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
