//! The part of a request that its jobs share: what is posted, what is open, and how it ends.

use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvcache_core::{Error, ErrorKind, Result};

use super::check::Compare;
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
use crate::sync::{AtomicBool, Condvar, Mutex, MutexGuard, Ordering};

/// How often a piece is tried in all: enough for every way between two hosts.
pub(crate) const TRIES_MAX: u32 = 4;

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
    /// Some backend is being left.
    pub(super) leaving: AtomicBool,
    /// How long the path may stand still.
    pub(super) slow_after: Option<Duration>,
    /// The notification may have been sent.
    pub(super) told: AtomicBool,
    /// The notification waits until the peer has taken others.
    pub(super) awaits_peer: AtomicBool,
    /// Raised while the last post is decided.
    pub(super) decided: Signal,
}

/// A piece that its backend did not move.
pub(super) struct Failed<'a> {
    pub(super) backend: &'a Arc<dyn Backend>,
    pub(super) piece: u32,
    /// How often it was tried.
    pub(super) tries: u32,
    pub(super) error: Error,
    /// Something of it may have been moved.
    pub(super) began: bool,
}

/// Whether another way, or another connection, may do better.
fn is_of_the_way(kind: ErrorKind) -> bool {
    use ErrorKind::{Corrupt, Io, PeerLost};
    matches!(kind, PeerLost | Io | Corrupt)
}

/// What comes next of a request's pieces.
enum Claim {
    /// Goes to this backend: the one of the post, or what took its place.
    Piece(u32, Arc<dyn Backend>),
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
        let backend = state.backends.last().cloned();
        let Some(backend) = backend.filter(|_| goes_on && state.next < self.pieces.len() as u32)
        else {
            return Claim::Nothing;
        };
        let bytes = self.plan_of(state.next).bytes;
        if bytes > 0 {
            let now = Instant::now();
            let waits = self.pace.iter().map(|bucket| bucket.wait(now));
            if let Some(wait) = waits.max().filter(|wait| !wait.is_zero()) {
                return Claim::Wait(now + wait);
            }
            self.pace.iter().for_each(|bucket| bucket.take(bytes));
        }
        if state.next > 0 {
            state.moved_at = Instant::now();
        }
        state.next += 1;
        Claim::Piece(state.next - 1, backend)
    }

    /// Posts the pieces that are not posted yet, as far as their rate allows; the rest is posted later.
    ///
    /// # Errors
    /// When the very first is refused: nothing was started.
    pub(super) fn post_pieces(self: &Arc<Self>, number: PostNumber) -> Result<()> {
        loop {
            let (piece, backend) = match self.claim(number) {
                Claim::Nothing => return Ok(()),
                Claim::Piece(piece, backend) => (piece, backend),
                Claim::Wait(at) => {
                    let due = Due::Paced {
                        core: self.clone(),
                        number,
                    };
                    if self.later.add(at, due).is_err() {
                        let text =
                            "nothing posts what has a rate: the agent is closed, or has no thread";
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
                Err(error) => self.piece_failed(Failed {
                    backend: &backend,
                    piece,
                    tries: 1,
                    error,
                    began: false,
                }),
            }
        }
    }

    fn is_paced(&self) -> bool {
        self.pace.iter().any(|rate| rate.is_limited())
    }

    /// Whether the notification goes after all else, by itself.
    fn ends_alone(&self) -> bool {
        self.pieces.len() > 1 || self.plan.is_checked()
    }

    /// What goes along with the only piece.
    pub(super) fn notification_of_one(&self) -> Option<Bytes> {
        if self.ends_alone() {
            return None;
        }
        self.lock().notice.clone()
    }

    /// A piece that failed goes another way: what the new job holds.
    pub(super) fn again(
        self: &Arc<Self>,
        failed: &Again,
        backend: &Arc<dyn Backend>,
        agent: &AgentCore,
    ) -> Ticket {
        let (piece, tries) = (failed.piece, failed.tries);
        let mut state = self.lock();
        state.failovers += 1;
        state.came_from = Some((failed.failed.name(), failed.error.kind()));
        (state.seen, state.moved_at) = (None, Instant::now());
        self.awaits_peer.store(false, Ordering::Release);
        let peer = self.retry.as_ref().and_then(|(_, peer)| peer.upgrade());
        state.counters = peer.map(|peer| peer.counters(agent, backend.name()));
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
            (Share::Piece { number, tries }, Ok(())) if self.plan.is_checked() => {
                self.check(&ticket.backend, number, tries);
            }
            (Share::Piece { number, .. }, Ok(())) => self.settle_piece(number, Ok(())),
            (Share::Check { number, tries }, outcome) => {
                let sums = ticket.plan().clone();
                self.sums_came(
                    Compare {
                        core: self.clone(),
                        backend: ticket.backend.clone(),
                        piece: number,
                        tries,
                        sums,
                    },
                    outcome,
                );
            }
            (Share::Piece { number, tries }, Err(error)) => self.piece_failed(Failed {
                backend: &ticket.backend,
                piece: number,
                tries,
                error: self.why_left(&ticket.backend, error),
                began: true,
            }),
        }
    }

    pub(super) fn piece_failed(self: &Arc<Self>, failed: Failed<'_>) {
        let piece = failed.piece;
        if let Err(error) = self.try_again(failed) {
            self.settle_piece(piece, Err(error));
        }
    }

    /// Whether a job's failure need not be its request's.
    pub(super) fn may_try_again(&self, ticket: &Ticket, kind: ErrorKind) -> bool {
        match ticket.share {
            Share::Notice => false,
            Share::Piece { tries, .. } | Share::Check { tries, .. } => {
                let fenced = ticket.backend.fences(self.plan.operation);
                fenced && is_of_the_way(kind) && self.has_hope(tries)
            }
        }
    }

    /// Whether a piece that was tried so often may be tried once more.
    fn has_hope(&self, tries: u32) -> bool {
        let state = self.lock();
        let open = matches!(state.status, Status::InFlight) && state.failure.is_none();
        open && Instant::now() < state.due
            && tries < TRIES_MAX
            && self.retry.is_some()
            && !self.told.load(Ordering::Acquire)
    }

    /// Has a piece that failed posted again, if that is safe and of use; the error otherwise.
    fn try_again(self: &Arc<Self>, failed: Failed<'_>) -> Result<()> {
        let left = self.is_left(failed.backend);
        let fenced = !failed.began || failed.backend.fences(self.plan.operation);
        let Some((agent, peer)) = &self.retry else {
            return Err(failed.error);
        };
        let of_the_way = left || is_of_the_way(failed.error.kind());
        if !fenced || !of_the_way || !self.has_hope(failed.tries) {
            return Err(failed.error);
        }
        let now = Instant::now();
        let again = Again {
            core: self.clone(),
            piece: failed.piece,
            tries: failed.tries,
            agent: agent.clone(),
            peer: peer.clone(),
            closings: self.lock().closings,
            failed: failed.backend.clone(),
            failed_at: now,
            error: failed.error,
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
        if self.pieces.len() > 1 {
            state.moved_at = Instant::now();
        }
        match outcome {
            Ok(()) => state.put_in_place(piece, self.pieces[piece as usize].part),
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
                && self.ends_alone()
                && let (Some(notice), Some(backend)) = (state.notice.take(), backend)
            {
                state.open = 1;
                // Whoever waits for the last part need not wait for the notification.
                self.tell_waiters(state);
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
    pub(super) fn expire(self: &Arc<Self>) {
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
        let left = std::mem::take(&mut state.leaving);
        let points = (state.after.take(), std::mem::take(&mut state.queued));
        match (&state.status, failure) {
            (Status::InFlight, None) => {
                let elapsed = state.started.elapsed();
                if let Some(counters) = &state.counters {
                    let (operation, bytes) = (self.plan.operation, self.plan.bytes);
                    counters.complete(operation, bytes, elapsed);
                    // What was held back, moved twice or checked says nothing of the path.
                    if state.failovers == 0 && !self.is_paced() && !self.plan.is_checked() {
                        counters.saw(operation, bytes, elapsed);
                    }
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
                    left: state.came_from,
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
        drop((backends, left, points));
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
