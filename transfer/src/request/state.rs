//! Where a request stands, and those who wait for that to change.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, PoisonError};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvcache_core::{Error, ErrorKind, Result};

use super::core::RequestCore;
use super::piece;
use super::rate::{Bucket, Priority};
use crate::agent::{AgentCore, PeerCore, TimerKey};
use crate::backend::{Backend, Point};
use crate::outcome::{Completion, MemoryFate, Status, TransferError};
use crate::plan::Plan;
use crate::reactor::Reactor;
use crate::signal::Signal;
use crate::stats::Counters;
use crate::sync::{AtomicBool, Condvar, Mutex, Ordering};

/// Which of a request's posts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PostNumber(u64);

/// What is remembered of the last post that was done.
#[derive(Clone, Copy)]
pub(super) struct Finished {
    pub(super) number: PostNumber,
    pub(super) started: Instant,
    pub(super) post: Duration,
    pub(super) done: Completion,
    pub(super) left: Option<(&'static str, ErrorKind)>,
}

pub(super) struct State {
    pub(super) status: Status,
    pub(super) number: PostNumber,
    pub(super) finished: Option<Finished>,
    /// Something of it was not settled.
    pub(super) posted: bool,
    pub(super) started: Instant,
    /// How long the call that posted took; none while it runs.
    pub(super) post: Option<Duration>,
    pub(super) due: Instant,
    /// Those that have or had pieces of this post, the latest last.
    pub(super) backends: Vec<Arc<dyn Backend>>,
    pub(super) counters: Option<Arc<Counters>>,
    pub(super) timer: Option<TimerKey>,
    pub(super) wakers: Vec<Waker>,
    /// Threads that sleep until something changes.
    pub(super) sleepers: u32,
    /// Kicked when something has changed: somebody who waits may lead it.
    pub(super) led: Option<Arc<Reactor>>,
    /// The first piece that is not posted.
    pub(super) next: u32,
    /// Pieces that are not settled, posted or not.
    pub(super) open: u32,
    /// Pieces that are not in place, by part.
    pub(super) left: Vec<u32>,
    /// Why it will fail.
    pub(super) failure: Option<TransferError>,
    /// To be delivered when all is in place.
    pub(super) notice: Option<Bytes>,
    pub(super) failovers: u32,
    /// How often the peer's connections had been ended by the caller at the post.
    pub(super) closings: u64,
    /// Connections that stand still: what was posted to them goes another way.
    pub(super) leaving: Vec<Arc<dyn Backend>>,
    /// The progress of the last backend when it was looked at.
    pub(super) seen: Option<u64>,
    /// When something of the request was posted or settled.
    pub(super) moved_at: Instant,
    /// The last way that was left, and why.
    pub(super) came_from: Option<(&'static str, ErrorKind)>,
    /// Where a device's stream has to be before anything of it begins.
    pub(super) after: Option<Point>,
    /// Pieces that a device has been given all of: when it will have done them, none once it has.
    pub(super) queued: BTreeMap<u32, Option<Point>>,
}

impl State {
    fn new(parts: usize) -> Self {
        let now = Instant::now();
        Self {
            status: Status::Idle,
            number: PostNumber(0),
            finished: None,
            posted: false,
            started: now,
            post: None,
            due: now,
            backends: Vec::new(),
            counters: None,
            timer: None,
            wakers: Vec::new(),
            sleepers: 0,
            led: None,
            next: 0,
            open: 0,
            left: vec![0; parts],
            failure: None,
            notice: None,
            failovers: 0,
            closings: 0,
            leaving: Vec::new(),
            seen: None,
            moved_at: now,
            came_from: None,
            after: None,
            queued: BTreeMap::new(),
        }
    }

    pub(super) fn is_drained(&self) -> bool {
        !self.posted
    }

    /// A piece is in place.
    pub(super) fn put_in_place(&mut self, piece: u32, part: u32) {
        self.left[part as usize] -= 1;
        if let Some(point) = self.queued.get_mut(&piece) {
            *point = None;
        }
    }

    /// Whether a part is in place, as of the last post; none while that is open.
    pub(super) fn part(&self, part: usize) -> Option<Result<(), TransferError>> {
        let Some(left) = self.left.get(part) else {
            let error = Error::invalid("part", part, 0..self.left.len());
            return Some(Err(TransferError::new(error, MemoryFate::Settled)));
        };
        match &self.status {
            Status::Idle => {
                let error = Error::new(ErrorKind::Invalid, "the request was not posted");
                Some(Err(TransferError::new(error, MemoryFate::Settled)))
            }
            _ if *left == 0 => Some(Ok(())),
            Status::Failed(failed) => Some(Err(failed.clone())),
            Status::InFlight | Status::Done(_) => None,
        }
    }
}

pub(super) enum Taken {
    Result(Result<Completion, TransferError>),
    Pending(Option<Arc<dyn Backend>>),
}

/// What a post begins with.
pub(super) struct Start<'a> {
    /// Who moves it, and what counts that; none as long as there is no connection.
    pub(super) way: Option<(&'a Arc<dyn Backend>, Arc<Counters>)>,
    pub(super) deadline: Duration,
    pub(super) notice: Option<Bytes>,
    pub(super) closings: u64,
    pub(super) after: Option<Point>,
}

impl RequestCore {
    /// `ends` is where the caller's parts end, in extents of the plan.
    pub(super) fn new(
        plan: Plan,
        ends: &[usize],
        priority: Priority,
        agent: &Arc<AgentCore>,
        peer: Option<&Arc<PeerCore>>,
    ) -> Self {
        let plan = Arc::new(plan);
        let pace: Vec<Arc<Bucket>> = agent.rates(priority, peer);
        let paced = pace.iter().any(|bucket| bucket.is_limited());
        Self {
            pieces: piece::cut(&plan, ends, paced),
            plan,
            priority,
            pace,
            retry: peer.map(|peer| (Arc::downgrade(agent), Arc::downgrade(peer))),
            slow_after: peer.and(agent.slow_after()),
            later: agent.later().clone(),
            timer: agent.timer().clone(),
            state: Mutex::new(State::new(ends.len().max(1))),
            changed: Condvar::new(),
            abandoned: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
            told: AtomicBool::new(false),
            awaits_peer: AtomicBool::new(false),
            decided: Signal::default(),
        }
    }

    /// Not held back by any rate: whatever it is a part of is.
    pub(super) fn unpaced(mut self) -> Self {
        self.pace.clear();
        self
    }

    pub(super) fn start(&self, start: Start<'_>) -> Result<PostNumber> {
        let mut state = self.lock();
        if state.posted {
            return Err(Error::new(
                ErrorKind::Busy,
                "the request is still in flight",
            ));
        }
        let now = Instant::now();
        state.status = Status::InFlight;
        state.posted = true;
        state.started = now;
        state.post = None;
        state.due = now + start.deadline;
        let (backend, counters) = start.way.unzip();
        state.backends.extend(backend.cloned());
        state.counters = counters;
        state.number = PostNumber(state.number.0 + 1);
        (state.next, state.open) = (0, self.pieces.len() as u32);
        state.left.fill(0);
        for piece in &self.pieces {
            state.left[piece.part as usize] += 1;
        }
        state.failure = None;
        state.notice = start.notice;
        state.failovers = 0;
        state.closings = start.closings;
        state.after = start.after;
        state.queued.clear();
        (state.seen, state.moved_at, state.came_from) = (None, now, None);
        self.abandoned.store(false, Ordering::Release);
        self.told.store(false, Ordering::Release);
        self.awaits_peer.store(false, Ordering::Release);
        self.leaving.store(false, Ordering::Release);
        self.decided.clear();
        Ok(state.number)
    }

    /// Whether nothing of a post has been handed to a backend, and somebody waits for that.
    pub(super) fn is_unposted(&self, number: PostNumber) -> bool {
        let state = self.lock();
        let waits = state.number == number && matches!(state.status, Status::InFlight);
        waits && state.next == 0
    }

    /// There is a connection now for a post that was begun without one. Whether somebody waits for it.
    pub(super) fn take_way(
        &self,
        number: PostNumber,
        backend: &Arc<dyn Backend>,
        counters: Arc<Counters>,
    ) -> bool {
        let mut state = self.lock();
        let waits = state.number == number && matches!(state.status, Status::InFlight);
        if waits {
            state.backends.push(backend.clone());
            state.counters = Some(counters);
            state.moved_at = Instant::now();
        }
        waits
    }

    /// The call that posted returns: has the timer watch over the deadline and the path, if the request is not finished yet.
    pub(super) fn watch(self: &Arc<Self>, number: PostNumber, backend: Option<&Arc<dyn Backend>>) {
        let seen = self.slow_after.and(backend);
        let seen = seen.and_then(|backend| backend.progress());
        let mut state = self.lock();
        // Another thread may have posted again meanwhile.
        if let Some(finished) = &mut state.finished
            && finished.number == number
        {
            finished.post = finished.started.elapsed();
        }
        if state.number == number && state.posted && matches!(state.status, Status::InFlight) {
            let post = state.started.elapsed();
            (state.post, state.seen) = (Some(post), seen);
            let now = state.started + post;
            self.set_timer(&mut state, now);
        }
    }

    /// Has the timer look again, at the latest at the deadline.
    pub(super) fn set_timer(self: &Arc<Self>, state: &mut State, now: Instant) {
        let look = self.slow_after.map(|after| now + after);
        let at = look.map_or(state.due, |look| look.min(state.due));
        state.timer = Some(self.timer.add(at, Arc::downgrade(self)));
    }

    /// A descriptor that is readable while the last post is decided.
    pub(super) fn event_fd(&self) -> Result<BorrowedFd<'_>> {
        let state = self.lock();
        if self.decided.open()? && matches!(state.status, Status::Done(_) | Status::Failed(_)) {
            self.decided.raise();
        }
        self.decided
            .fd()
            .ok_or_else(|| Error::new(ErrorKind::Internal, "an eventfd was made and is not there"))
    }

    /// Who is to be kicked when something changes, from now on.
    pub(super) fn lead_by(&self, reactor: &Arc<Reactor>) {
        self.lock().led.get_or_insert_with(|| reactor.clone());
    }

    pub(super) fn take_result(&self) -> Taken {
        let state = self.lock();
        match &state.status {
            Status::Done(done) => Taken::Result(Ok(*done)),
            Status::Failed(failed) => Taken::Result(Err(failed.clone())),
            Status::InFlight => Taken::Pending(state.backends.last().cloned()),
            Status::Idle => {
                let error = Error::new(ErrorKind::Invalid, "the request was not posted");
                Taken::Result(Err(TransferError::new(error, MemoryFate::Settled)))
            }
        }
    }

    /// All of a piece is queued on a device.
    pub(super) fn queued(&self, piece: u32, point: Point) {
        let mut state = self.lock();
        state.queued.insert(piece, Some(point));
        // It is nothing that a completion's waiters look for.
        let sleepers = state.sleepers;
        drop(state);
        if sleepers > 0 {
            self.changed.notify_all();
        }
    }

    /// When the device will have copied a part, or all; none until that can be told.
    pub(super) fn points(
        &self,
        state: &State,
        part: Option<usize>,
    ) -> Option<Result<Vec<Point>, TransferError>> {
        let parts = match part {
            None => 0..state.left.len(),
            Some(part) => part..part + 1,
        };
        // What is in place, is not posted, is not there or has failed.
        let mut open = Vec::new();
        for part in parts {
            match state.part(part) {
                Some(Ok(())) => {}
                Some(Err(failed)) => return Some(Err(failed)),
                None => open.push(part as u32),
            }
        }
        if matches!(state.status, Status::InFlight)
            && let Some(failure) = &state.failure
            && !open.is_empty()
        {
            return Some(Err(failure.clone()));
        }
        let pieces = self.pieces.iter().zip(0_u32..);
        let mut points = Vec::with_capacity(open.len());
        for (piece, number) in pieces {
            if open.binary_search(&piece.part).is_ok() {
                points.extend(state.queued.get(&number)?.clone());
            }
        }
        Some(Ok(points))
    }

    pub(super) fn parts(&self) -> usize {
        self.lock().left.len()
    }

    /// Whether `done` became true before `until`.
    pub(super) fn wait(&self, until: Instant, done: impl Fn(&State) -> bool) -> bool {
        let mut state = self.lock();
        loop {
            if done(&state) {
                return true;
            }
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                return false;
            };
            state.sleepers += 1;
            state = match self.changed.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => PoisonError::into_inner(poisoned).0,
            };
            state.sleepers -= 1;
        }
    }

    pub(super) fn register(state: &mut State, context: &Context<'_>) {
        let waker = context.waker();
        if !state.wakers.iter().any(|known| known.will_wake(waker)) {
            state.wakers.push(waker.clone());
        }
    }
}
