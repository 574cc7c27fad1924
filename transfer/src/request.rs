//! A transfer that can be posted, waited for, given up, and posted again.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvcache_core::{Error, ErrorKind, Result};

use crate::agent::{AgentCore, PeerCore, Timer, TimerKey};
use crate::backend::{Backend, Job};
use crate::outcome::{Completion, MemoryFate, Status, TransferError};
use crate::plan::Plan;
use crate::stats::Counters;

/// What applies to a request that names no deadline.
pub const DEADLINE_DEFAULT: Duration = Duration::from_secs(30);

/// The longest notification, in bytes.
pub const NOTIFICATION_BYTES_MAX: usize = 64 << 10;

/// How a request differs from moving all descriptors of both lists, in order, silently.
#[derive(Clone, Debug, Default)]
pub struct RequestOptions {
    /// Move only these positions of the local and the remote list, paired in order.
    pub positions: Option<(Vec<u32>, Vec<u32>)>,
    /// Delivered to the peer once all bytes are in place; at most [`NOTIFICATION_BYTES_MAX`].
    pub notification: Option<Bytes>,
    /// Counted from the post; [`DEADLINE_DEFAULT`] if none.
    pub deadline: Option<Duration>,
}

/// Who moves the bytes.
pub(crate) enum Route {
    /// An engine of this agent: a copy between own regions, a file, an object.
    Own(Arc<dyn Backend>),
    /// Whatever connection there is to the peer when the request is posted.
    Peer(Arc<PeerCore>),
}

/// A transfer. Its regions stay alive until it is settled, even if the request is dropped before.
pub struct Request {
    core: Arc<RequestCore>,
    agent: Arc<AgentCore>,
    route: Route,
    notification: Option<Bytes>,
    deadline: Duration,
}

impl Request {
    pub(crate) fn new(
        agent: Arc<AgentCore>,
        route: Route,
        plan: Plan,
        notification: Option<Bytes>,
        deadline: Option<Duration>,
    ) -> Result<Self> {
        check_notification(notification.as_ref())?;
        let core = RequestCore {
            plan: Arc::new(plan),
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
            abandoned: AtomicBool::new(false),
            timer: agent.timer().clone(),
        };
        let deadline = deadline.unwrap_or(DEADLINE_DEFAULT);
        Ok(Self {
            core: Arc::new(core),
            agent,
            route,
            notification,
            deadline,
        })
    }

    /// Bytes that it moves.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.core.plan.bytes
    }

    /// Delivered with the next post, instead of the last notification.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] above [`NOTIFICATION_BYTES_MAX`].
    pub fn set_notification(&mut self, notification: Option<Bytes>) -> Result<()> {
        check_notification(notification.as_ref())?;
        self.notification = notification;
        Ok(())
    }

    /// Starts it. Small copies within this host are finished when this returns; nothing large is waited for. The first
    /// post to a peer, and the first after losing it, connects.
    ///
    /// # Errors
    /// Nothing is started then. [`ErrorKind::Busy`] when it is in flight, its memory unsettled or a queue full;
    /// [`ErrorKind::PeerLost`] when the peer can't be reached; [`ErrorKind::NotFound`] when a region was
    /// deregistered; [`ErrorKind::Forked`] in a forked child.
    pub fn post(&self) -> Result<()> {
        self.agent.check()?;
        let backend = match &self.route {
            Route::Own(backend) => backend.clone(),
            Route::Peer(peer) => peer.channel(&self.agent, &self.core.plan)?,
        };
        self.core.plan.enter()?;
        let counters = self.agent.stats().counters(backend.name());
        if let Err(error) = self.core.start(&backend, counters, self.deadline) {
            self.core.plan.leave();
            return Err(error);
        }
        let ticket = Ticket {
            core: self.core.clone(),
            open: true,
        };
        let job = Job::new(ticket, self.notification.clone());
        match backend.post(job) {
            Ok(()) => {
                self.core.watch();
                Ok(())
            }
            Err(refusal) => Err(refusal.into_error()),
        }
    }

    /// Where it stands.
    #[must_use]
    pub fn poll(&self) -> Status {
        self.core.lock().status.clone()
    }

    /// Waits until it is done or has failed, at most `timeout`. Running out of `timeout` fails the wait, not the
    /// request.
    ///
    /// # Errors
    /// Why the transfer failed; [`ErrorKind::Timeout`] with memory in flight when `timeout` ran out first;
    /// [`ErrorKind::Invalid`] when it was never posted.
    pub fn wait(&self, timeout: Duration) -> Result<Completion, TransferError> {
        let until = Instant::now() + timeout;
        let backend = match self.core.take_result() {
            Taken::Result(result) => return result,
            Taken::Pending(backend) => backend,
        };
        if let Some(backend) = backend {
            backend.assist(until, &|| self.core.is_decided());
        }
        self.core
            .wait(until, |state| !matches!(state.status, Status::InFlight));
        match self.core.take_result() {
            Taken::Result(result) => result,
            Taken::Pending(_) => {
                let text = format!("transfer not finished after {timeout:?}");
                Err(TransferError::new(
                    Error::new(ErrorKind::Timeout, text),
                    MemoryFate::InFlight,
                ))
            }
        }
    }

    /// Resolves when it is done or has failed.
    ///
    /// # Cancel safety
    /// Dropping the future changes nothing; ask for another one at any time.
    pub fn completion(&self) -> Completed {
        Completed {
            core: self.core.clone(),
        }
    }

    /// Resolves when no byte of its memory is in use any more: at once, unless its fate is
    /// [`MemoryFate::InFlight`] or it is running.
    pub fn drained(&self) -> Drained {
        Drained {
            core: self.core.clone(),
        }
    }

    /// As [`Request::drained`], for callers without an executor. Whether it is drained within `timeout`.
    #[must_use]
    pub fn wait_drained(&self, timeout: Duration) -> bool {
        self.core
            .wait(Instant::now() + timeout, |state| state.is_drained())
    }

    /// Asks for it to end. If it is in flight it fails with [`ErrorKind::Cancelled`] now; its memory is settled when
    /// [`Request::drained`] says so.
    pub fn cancel(&self) {
        self.core
            .give_up(Error::new(ErrorKind::Cancelled, "cancelled by the caller"));
    }
}

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Request")
            .field("bytes", &self.bytes())
            .field("status", &self.poll())
            .finish()
    }
}

fn check_notification(notification: Option<&Bytes>) -> Result<()> {
    match notification {
        Some(bytes) if bytes.len() > NOTIFICATION_BYTES_MAX => Err(Error::invalid(
            "notification bytes",
            bytes.len(),
            0..=NOTIFICATION_BYTES_MAX,
        )),
        _ => Ok(()),
    }
}

/// The part of a request that its jobs share.
pub(crate) struct RequestCore {
    plan: Arc<Plan>,
    state: Mutex<State>,
    changed: Condvar,
    abandoned: AtomicBool,
    timer: Arc<Timer>,
}

struct State {
    status: Status,
    /// A job exists that was not settled.
    posted: bool,
    started: Instant,
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
            posted: false,
            started: now,
            due: now,
            backend: None,
            counters: None,
            timer: None,
            wakers: Vec::new(),
        }
    }
}

impl State {
    fn is_drained(&self) -> bool {
        !self.posted
    }
}

enum Taken {
    Result(Result<Completion, TransferError>),
    Pending(Option<Arc<dyn Backend>>),
}

impl RequestCore {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(
        &self,
        backend: &Arc<dyn Backend>,
        counters: Arc<Counters>,
        deadline: Duration,
    ) -> Result<()> {
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
        state.due = now + deadline;
        state.backend = Some(backend.clone());
        state.counters = Some(counters);
        self.abandoned.store(false, Ordering::Release);
        Ok(())
    }

    /// Has the timer watch over the deadline, if the job is not finished yet.
    fn watch(self: &Arc<Self>) {
        let mut state = self.lock();
        if state.posted && matches!(state.status, Status::InFlight) {
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

    fn give_up(&self, error: Error) {
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
        let wakers = std::mem::take(&mut state.wakers);
        drop(state);
        self.changed.notify_all();
        wakers.into_iter().for_each(Waker::wake);
    }

    fn is_decided(&self) -> bool {
        !matches!(self.lock().status, Status::InFlight)
    }

    fn take_result(&self) -> Taken {
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
    fn wait(&self, until: Instant, done: impl Fn(&State) -> bool) -> bool {
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

    fn register(state: &mut State, context: &Context<'_>) {
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

/// Resolves to how a request ended.
pub struct Completed {
    core: Arc<RequestCore>,
}

impl Future for Completed {
    type Output = Result<Completion, TransferError>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Taken::Result(result) = self.core.take_result() {
            return Poll::Ready(result);
        }
        let mut state = self.core.lock();
        if matches!(state.status, Status::InFlight) {
            RequestCore::register(&mut state, context);
            return Poll::Pending;
        }
        drop(state);
        match self.core.take_result() {
            Taken::Result(result) => Poll::Ready(result),
            // Posted again in between: look again.
            Taken::Pending(_) => {
                context.waker().wake_by_ref();
                Poll::Pending
            }
        }
    }
}

/// Resolves when a request's memory is no longer in use.
pub struct Drained {
    core: Arc<RequestCore>,
}

impl Future for Drained {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let mut state = self.core.lock();
        if state.is_drained() {
            return Poll::Ready(());
        }
        RequestCore::register(&mut state, context);
        Poll::Pending
    }
}
