//! The part of a request that its jobs share: what is posted, what is open, and how it ends.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use bytes::Bytes;
use kvcache_core::{Error, ErrorKind, Result};

use super::later::{Again, Due, Later};
use super::piece::Piece;
use super::rate::{Bucket, Priority};
use super::state::{Finished, PostNumber, State};
use super::ticket::{Share, Ticket};
use crate::agent::{AgentCore, PeerCore, Timer};
use crate::backend::{Backend, Job};
use crate::outcome::{Completion, MemoryFate, Status, TransferError};
use crate::plan::Plan;
use crate::signal::Signal;

/// How often a piece is tried in all.
const TRIES_MAX: u32 = 3;

/// The part of a request that its jobs share.
pub(crate) struct RequestCore {
    pub(super) plan: Arc<Plan>,
    /// At least one.
    pub(super) pieces: Vec<Piece>,
    pub(super) priority: Priority,
    /// What holds pieces back.
    pub(super) pace: Vec<Arc<Bucket>>,
    /// Where a piece that fails may be tried again; none: nowhere.
    pub(super) retry: Option<(Weak<AgentCore>, Weak<PeerCore>)>,
    pub(super) later: Arc<Later>,
    pub(super) timer: Arc<Timer>,
    pub(super) state: Mutex<State>,
    pub(super) changed: Condvar,
    pub(super) abandoned: AtomicBool,
    /// The notification may have been sent.
    pub(super) told: AtomicBool,
    /// Raised while the last post is decided.
    pub(super) decided: Signal,
}

/// What comes next of a request's pieces.
enum Claim {
    Piece(u32),
    /// Not before this.
    Wait(Instant),
    /// All are posted, or the request has ended.
    Nothing,
}

impl RequestCore {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    pub(super) fn tell(&self) {
        self.told.store(true, Ordering::Release);
    }

    pub(super) fn plan_of(&self, piece: u32) -> &Arc<Plan> {
        &self.pieces[piece as usize].plan
    }

    fn claim(&self, number: PostNumber) -> Claim {
        let mut state = self.lock();
        let goes_on = state.number == number && matches!(state.status, Status::InFlight);
        if !goes_on || state.next as usize == self.pieces.len() {
            return Claim::Nothing;
        }
        let bytes = self.plan_of(state.next).bytes;
        if bytes > 0 {
            let now = Instant::now();
            let waits = self.pace.iter().map(|bucket| bucket.wait(now));
            if let Some(wait) = waits.max().filter(|wait| !wait.is_zero()) {
                return Claim::Wait(now + wait);
            }
            self.pace.iter().for_each(|bucket| bucket.take(bytes));
        }
        state.next += 1;
        Claim::Piece(state.next - 1)
    }

    /// Posts the pieces that are not posted yet, as far as their rate allows; the rest is posted later.
    ///
    /// # Errors
    /// When the very first is refused: nothing was started.
    pub(super) fn post_pieces(
        self: &Arc<Self>,
        number: PostNumber,
        backend: &Arc<dyn Backend>,
    ) -> Result<()> {
        loop {
            let piece = match self.claim(number) {
                Claim::Nothing => return Ok(()),
                Claim::Piece(piece) => piece,
                Claim::Wait(at) => {
                    let due = Due::Paced {
                        core: self.clone(),
                        number,
                        backend: backend.clone(),
                    };
                    if self.later.add(at, due).is_err() {
                        let text = "too many requests wait for their rate";
                        self.fail_unposted(number, Error::new(ErrorKind::Busy, text));
                    }
                    return Ok(());
                }
            };
            let share = Share::Piece {
                number: piece,
                tries: 1,
            };
            let plan = self.plan_of(piece).clone();
            let ticket = Ticket::new(self.clone(), plan, share, backend.clone());
            let refused = backend.post(Job::new(ticket, self.notification_of_one()));
            match refused.map_err(|refusal| refusal.into_error()) {
                Ok(()) => {}
                Err(error) if piece == 0 => return Err(error),
                Err(error) => self.settle_piece(piece, Err(error)),
            }
        }
    }

    /// What goes along with the only piece.
    pub(super) fn notification_of_one(&self) -> Option<Bytes> {
        if self.pieces.len() > 1 {
            return None;
        }
        self.lock().notice.clone()
    }

    /// A piece that failed goes another way: what the new job holds.
    pub(super) fn again(
        self: &Arc<Self>,
        piece: u32,
        tries: u32,
        backend: &Arc<dyn Backend>,
        agent: &AgentCore,
    ) -> Ticket {
        let mut state = self.lock();
        state.failovers += 1;
        state.counters = Some(agent.stats().counters(backend.name()));
        state.backends.push(backend.clone());
        drop(state);
        agent.stats().count_failover();
        let share = Share::Piece {
            number: piece,
            tries: tries + 1,
        };
        let plan = self.plan_of(piece).clone();
        Ticket::new(self.clone(), plan, share, backend.clone())
    }

    /// A job is over: nothing touches its memory any more.
    pub(super) fn settle(self: &Arc<Self>, ticket: &Ticket, outcome: Result<()>) {
        match (ticket.share, outcome) {
            (Share::Notice, outcome) => {
                let failure = outcome.err();
                let failure = failure.map(|e| TransferError::new(e, MemoryFate::Settled));
                self.finish(failure);
            }
            (Share::Piece { number, .. }, Ok(())) => self.settle_piece(number, Ok(())),
            (Share::Piece { number, tries }, Err(error)) => {
                if let Err(error) = self.try_again(ticket, number, tries, error) {
                    self.settle_piece(number, Err(error));
                }
            }
        }
    }

    /// Has a piece that failed posted again, if that is safe and of use; the error otherwise.
    fn try_again(
        self: &Arc<Self>,
        ticket: &Ticket,
        piece: u32,
        tries: u32,
        error: Error,
    ) -> Result<()> {
        use ErrorKind::{Corrupt, Io, PeerLost};
        let Some((agent, peer)) = &self.retry else {
            return Err(error);
        };
        let state = self.lock();
        let hopeless = !matches!(state.status, Status::InFlight)
            || state.failure.is_some()
            || Instant::now() >= state.due;
        let closings = state.closings;
        drop(state);
        if hopeless
            || tries >= TRIES_MAX
            || !matches!(error.kind(), PeerLost | Io | Corrupt)
            || !ticket.backend.fences(self.plan.operation)
            || self.told.load(Ordering::Acquire)
        {
            return Err(error);
        }
        let now = Instant::now();
        let again = Again {
            core: self.clone(),
            piece,
            tries,
            agent: agent.clone(),
            peer: peer.clone(),
            closings,
            failed: ticket.backend.clone(),
            failed_at: now,
            error,
        };
        match self.later.add(now, Due::Again(again)) {
            Err(Due::Again(again)) => Err(again.error),
            _ => Ok(()),
        }
    }

    /// A piece is over for good.
    pub(super) fn settle_piece(self: &Arc<Self>, piece: u32, outcome: Result<()>) {
        let mut state = self.lock();
        state.open -= 1;
        match outcome {
            Ok(()) => state.left[self.pieces[piece as usize].part as usize] -= 1,
            Err(error) => {
                let failed = TransferError::new(error, MemoryFate::InFlight);
                state.failure.get_or_insert(failed);
            }
        }
        self.go_on(state);
    }

    /// Pieces that were to be posted later are not.
    pub(super) fn fail_unposted(self: &Arc<Self>, number: PostNumber, error: Error) {
        let mut state = self.lock();
        if state.number == number && (state.next as usize) < self.pieces.len() {
            let failed = TransferError::new(error, MemoryFate::InFlight);
            state.failure.get_or_insert(failed);
            self.go_on(state);
        }
    }

    /// What follows from a change of what is open.
    fn go_on(self: &Arc<Self>, mut state: MutexGuard<'_, State>) {
        let failure = state.failure.clone();
        if failure.is_some() || !matches!(state.status, Status::InFlight) {
            let unposted = self.pieces.len() as u32 - state.next;
            state.next += unposted;
            state.open -= unposted;
        }
        if state.open == 0 {
            let backend = state.backends.last().cloned();
            let decided = failure.is_some() || !matches!(state.status, Status::InFlight);
            if !decided
                && self.pieces.len() > 1
                && let (Some(notice), Some(backend)) = (state.notice.take(), backend)
            {
                state.open = 1;
                drop(state);
                return self.send_notice(notice, backend);
            }
            drop(state);
            return self.finish(failure);
        }
        match failure {
            Some(failed) if matches!(state.status, Status::InFlight) => {
                drop(state);
                self.give_up_as(failed);
            }
            _ if self.pieces.len() > 1 => self.tell_waiters(state),
            _ => {}
        }
    }

    /// All pieces are in place: the notification goes, alone.
    fn send_notice(self: &Arc<Self>, notice: Bytes, backend: Arc<dyn Backend>) {
        let plan = Arc::new(Plan::empty());
        let ticket = Ticket::new(self.clone(), plan, Share::Notice, backend.clone());
        if let Err(refusal) = backend.post(Job::new(ticket, Some(notice))) {
            let failed = TransferError::new(refusal.into_error(), MemoryFate::Settled);
            self.finish(Some(failed));
        }
    }

    /// The deadline has passed.
    pub(crate) fn expire(self: &Arc<Self>) {
        self.give_up(Error::new(
            ErrorKind::Timeout,
            "the deadline of the transfer has passed",
        ));
    }

    pub(super) fn give_up(self: &Arc<Self>, error: Error) {
        self.give_up_as(TransferError::new(error, MemoryFate::InFlight));
    }

    fn give_up_as(self: &Arc<Self>, failed: TransferError) {
        if !self.decide(failed) {
            return;
        }
        let state = self.lock();
        let backends = state.backends.clone();
        let all_posted = state.next as usize == self.pieces.len();
        match all_posted {
            true => drop(state),
            // What was not posted is over.
            false => self.go_on(state),
        }
        backends.iter().for_each(|backend| backend.reap());
    }

    /// Fails the request while its jobs go on.
    pub(super) fn abandon(&self, error: Error) {
        self.decide(TransferError::new(error, MemoryFate::InFlight));
    }

    /// Whether it was in flight.
    fn decide(&self, failed: TransferError) -> bool {
        let mut state = self.lock();
        if !matches!(state.status, Status::InFlight) {
            return false;
        }
        self.abandoned.store(true, Ordering::Release);
        state.status = Status::Failed(failed);
        if let Some(counters) = &state.counters {
            counters.fail();
        }
        self.wake(state);
        true
    }

    /// Nothing of it is open any more.
    fn finish(&self, failure: Option<TransferError>) {
        self.plan.leave();
        let mut state = self.lock();
        state.posted = false;
        if let Some(key) = state.timer.take() {
            self.timer.remove(key);
        }
        // Dropped without the lock: the last user of a connection ends it.
        let backends = std::mem::take(&mut state.backends);
        match (&state.status, failure) {
            (Status::InFlight, None) => {
                let elapsed = state.started.elapsed();
                if let Some(counters) = &state.counters {
                    counters.complete(self.plan.operation, self.plan.bytes, elapsed);
                }
                let done = Completion {
                    bytes: self.plan.bytes,
                    backend: backends.last().map_or("none", |backend| backend.name()),
                    elapsed,
                    failovers: state.failovers,
                };
                state.finished = Some(Finished {
                    number: state.number,
                    started: state.started,
                    // While the call still runs, it has taken as long as the transfer.
                    post: state.post.unwrap_or(elapsed),
                    done,
                });
                state.status = Status::Done(done);
            }
            (Status::InFlight, Some(failed)) => {
                if let Some(counters) = &state.counters {
                    counters.fail();
                }
                state.status = Status::Failed(failed.with_fate(MemoryFate::Settled));
            }
            // The caller was told before; what is new is that the memory is free.
            (Status::Failed(failed), _) => {
                state.status = Status::Failed(failed.with_fate(MemoryFate::Settled));
            }
            (Status::Idle | Status::Done(_), _) => {}
        }
        self.wake(state);
        drop(backends);
    }

    /// The post is refused: nothing was started.
    pub(super) fn withdraw(&self) {
        self.plan.leave();
        let mut state = self.lock();
        state.posted = false;
        let backends = std::mem::take(&mut state.backends);
        state.status = Status::Idle;
        drop(state);
        drop(backends);
    }

    fn wake(&self, state: MutexGuard<'_, State>) {
        self.decided.raise();
        self.tell_waiters(state);
    }

    fn tell_waiters(&self, mut state: MutexGuard<'_, State>) {
        let wakers = std::mem::take(&mut state.wakers);
        let led = state.led.clone();
        let sleepers = state.sleepers;
        drop(state);
        if sleepers > 0 {
            self.changed.notify_all();
        }
        if let Some(reactor) = led {
            reactor.kick();
        }
        wakers.into_iter().for_each(std::task::Waker::wake);
    }
}
