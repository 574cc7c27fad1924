//! The part of a request that its jobs share, and how it ends.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use crate::agent::{Timer, TimerKey};
use crate::backend::Backend;
use crate::outcome::{Completion, MemoryFate, Status, TransferError};
use crate::plan::Plan;
use crate::signal::Signal;
use crate::stats::Counters;

/// The part of a request that its jobs share.
pub(crate) struct RequestCore {
    pub(super) plan: Arc<Plan>,
    state: Mutex<State>,
    changed: Condvar,
    abandoned: AtomicBool,
    timer: Arc<Timer>,
    /// Raised while the last post is decided.
    decided: Signal,
}

/// Which of a request's posts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PostNumber(u64);

/// What is remembered of the last post that was done.
#[derive(Clone, Copy)]
pub(super) struct Finished {
    number: PostNumber,
    pub(super) started: Instant,
    pub(super) post: Duration,
    pub(super) done: Completion,
}

pub(super) struct State {
    pub(super) status: Status,
    number: PostNumber,
    pub(super) finished: Option<Finished>,
    /// A job exists that was not settled.
    posted: bool,
    started: Instant,
    /// How long the call that posted took; none while it runs.
    post: Option<Duration>,
    due: Instant,
    backend: Option<Arc<dyn Backend>>,
    counters: Option<Arc<Counters>>,
    timer: Option<TimerKey>,
    wakers: Vec<Waker>,
}

impl Default for State {
    fn default() -> Self {
        let now = Instant::now();
        Self {
            status: Status::Idle,
            number: PostNumber(0),
            finished: None,
            posted: false,
            started: now,
            post: None,
            due: now,
            backend: None,
            counters: None,
            timer: None,
            wakers: Vec::new(),
        }
    }
}

impl State {
    pub(super) fn is_drained(&self) -> bool {
        !self.posted
    }
}

pub(super) enum Taken {
    Result(Result<Completion, TransferError>),
    Pending(Option<Arc<dyn Backend>>),
}

impl RequestCore {
    pub(super) fn new(plan: Plan, timer: Arc<Timer>) -> Self {
        Self {
            plan: Arc::new(plan),
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
            abandoned: AtomicBool::new(false),
            timer,
            decided: Signal::default(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn start(
        &self,
        backend: &Arc<dyn Backend>,
        counters: Arc<Counters>,
        deadline: Duration,
    ) -> Result<PostNumber> {
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
        state.due = now + deadline;
        state.backend = Some(backend.clone());
        state.counters = Some(counters);
        state.number = PostNumber(state.number.0 + 1);
        self.abandoned.store(false, Ordering::Release);
        self.decided.clear();
        Ok(state.number)
    }

    /// The call that posted returns: has the timer watch over the deadline, if the job is not finished yet.
    pub(super) fn watch(self: &Arc<Self>, number: PostNumber) {
        let mut state = self.lock();
        // Another thread may have posted again meanwhile.
        if let Some(finished) = &mut state.finished
            && finished.number == number
        {
            finished.post = finished.started.elapsed();
        }
        if state.number == number && state.posted && matches!(state.status, Status::InFlight) {
            state.post = Some(state.started.elapsed());
            state.timer = Some(self.timer.add(state.due, Arc::downgrade(self)));
        }
    }

    /// The deadline has passed.
    pub(crate) fn expire(&self) {
        self.give_up(Error::new(
            ErrorKind::Timeout,
            "the deadline of the transfer has passed",
        ));
    }

    pub(super) fn give_up(&self, error: Error) {
        if self.decide(TransferError::new(error, MemoryFate::InFlight)) {
            let backend = self.lock().backend.clone();
            if let Some(backend) = backend {
                backend.reap();
            }
        }
    }

    /// Fails the request while its job goes on. Whether it was in flight.
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

    /// The job is over: nothing touches its memory any more.
    fn settle(&self, outcome: Result<()>) {
        self.plan.leave();
        let mut state = self.lock();
        state.posted = false;
        if let Some(key) = state.timer.take() {
            self.timer.remove(key);
        }
        let backend = state.backend.take();
        match (&state.status, outcome) {
            (Status::InFlight, Ok(())) => {
                let elapsed = state.started.elapsed();
                if let Some(counters) = &state.counters {
                    counters.complete(self.plan.operation, self.plan.bytes, elapsed);
                }
                let name = backend.as_ref().map_or("none", |backend| backend.name());
                let done = Completion {
                    bytes: self.plan.bytes,
                    backend: name,
                    elapsed,
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
            (Status::InFlight, Err(error)) => {
                if let Some(counters) = &state.counters {
                    counters.fail();
                }
                state.status = Status::Failed(TransferError::new(error, MemoryFate::Settled));
            }
            // The caller was told before; what is new is that the memory is free.
            (Status::Failed(failed), _) => {
                state.status = Status::Failed(failed.with_fate(MemoryFate::Settled));
            }
            (Status::Idle | Status::Done(_), _) => {}
        }
        self.wake(state);
    }

    fn withdraw(&self) {
        self.plan.leave();
        let mut state = self.lock();
        state.posted = false;
        state.backend = None;
        state.status = Status::Idle;
    }

    fn wake(&self, mut state: MutexGuard<'_, State>) {
        self.decided.raise();
        let wakers = std::mem::take(&mut state.wakers);
        drop(state);
        self.changed.notify_all();
        wakers.into_iter().for_each(Waker::wake);
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

    pub(super) fn is_decided(&self) -> bool {
        !matches!(self.lock().status, Status::InFlight)
    }

    pub(super) fn take_result(&self) -> Taken {
        let state = self.lock();
        match &state.status {
            Status::Done(done) => Taken::Result(Ok(*done)),
            Status::Failed(failed) => Taken::Result(Err(failed.clone())),
            Status::InFlight => Taken::Pending(state.backend.clone()),
            Status::Idle => {
                let error = Error::new(ErrorKind::Invalid, "the request was not posted");
                Taken::Result(Err(TransferError::new(error, MemoryFate::Settled)))
            }
        }
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
            state = match self.changed.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    pub(super) fn register(state: &mut State, context: &Context<'_>) {
        let waker = context.waker();
        if !state.wakers.iter().any(|known| known.will_wake(waker)) {
            state.wakers.push(waker.clone());
        }
    }
}

/// A job's hold on its request. If a backend loses it, the request fails and its memory is kept for ever.
pub(crate) struct Ticket {
    core: Arc<RequestCore>,
    open: bool,
}

impl Ticket {
    pub(super) fn new(core: Arc<RequestCore>) -> Self {
        Self { core, open: true }
    }

    pub(crate) fn plan(&self) -> &Arc<Plan> {
        &self.core.plan
    }

    pub(crate) fn is_abandoned(&self) -> bool {
        self.core.abandoned.load(Ordering::Acquire)
    }

    pub(crate) fn abandon(&self, error: Error) {
        self.core
            .decide(TransferError::new(error, MemoryFate::InFlight));
    }

    pub(crate) fn settle(mut self, outcome: Result<()>) {
        self.open = false;
        self.core.settle(outcome);
    }

    pub(crate) fn withdraw(mut self) {
        self.open = false;
        self.core.withdraw();
    }
}

impl Drop for Ticket {
    #[expect(
        clippy::mem_forget,
        reason = "memory that may be in use is leaked, never freed"
    )]
    fn drop(&mut self) {
        if self.open {
            self.abandon(Error::new(
                ErrorKind::Internal,
                "a backend lost track of a transfer",
            ));
            std::mem::forget(self.core.plan.clone());
        }
    }
}
