//! The thread that lets UCX work, and how others take its place for a moment.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvcache_core::{Error, Result};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::frame::Session;
use super::state::State;
use crate::backend::Job;

/// Jobs of up to so many bytes and pieces are begun by the caller of `post`.
const INLINE_BYTES_MAX: u64 = 64 << 10;
const INLINE_EXTENTS_MAX: usize = 64;

/// Turns in a row before another thread may get in.
const TURNS_MAX: usize = 16;

/// How long a waiting caller takes the thread's place at a time.
const ASSIST_MAX: Duration = Duration::from_micros(50);

/// How often something that has a time limit is looked at, or that UCX may forget to tell of.
const LOOK: Duration = Duration::from_millis(20);

/// How long an agent that goes waits for its peers, in all.
const PARTING_MAX: Duration = Duration::from_secs(1);

pub(super) struct Driver {
    state: Mutex<State>,
    posted: Mutex<VecDeque<(Session, Job)>>,
    /// Readable when the thread has something to do that UCX does not tell of.
    wake: Arc<OwnedFd>,
    /// Readable when UCX has something to do.
    event: OwnedFd,
    given_up: AtomicBool,
    closing: AtomicBool,
    thread: Mutex<Option<JoinHandle<()>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Driver {
    pub(super) fn start(state: State) -> Result<Arc<Self>> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| Error::io("create an eventfd", e.into()))?;
        let wake = Arc::new(wake);
        state.late.wake_by(&wake);
        let event = state.worker.event_fd().try_clone_to_owned();
        let event = event.map_err(|e| Error::io("keep the event descriptor of ucx", e))?;
        let driver = Arc::new(Self {
            state: Mutex::new(state),
            event,
            posted: Mutex::default(),
            wake,
            given_up: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            thread: Mutex::default(),
        });
        let own = driver.clone();
        let thread = std::thread::Builder::new()
            .name("kvf-ucx".into())
            .spawn(move || own.run())
            .map_err(|e| Error::io("start the ucx thread", e))?;
        *lock(&driver.thread) = Some(thread);
        Ok(driver)
    }

    /// Does something with the state, and lets the thread look at what follows from it.
    pub(super) fn with<T>(&self, what: impl FnOnce(&mut State) -> T) -> T {
        let mut state = lock(&self.state);
        let result = what(&mut state);
        Self::settle(state);
        self.wake();
        result
    }

    /// Settles what is over, without the lock: that calls back.
    fn settle(mut state: MutexGuard<'_, State>) {
        let settled = std::mem::take(&mut state.settled);
        drop(state);
        for (job, outcome) in settled {
            job.settle(outcome);
        }
    }

    fn wake(&self) {
        // It is full when it was written often enough.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Takes a job in: it waits for its turn however many do.
    pub(super) fn post(&self, session: Session, job: Job) {
        let plan = job.plan();
        let small = plan.bytes <= INLINE_BYTES_MAX && plan.extents.len() <= INLINE_EXTENTS_MAX;
        lock(&self.posted).push_back((session, job));
        if small && let Ok(mut state) = self.state.try_lock() {
            self.take_posted(&mut state);
            state.pump();
            let is_quiet = state.is_quiet();
            Self::settle(state);
            if is_quiet {
                return;
            }
        }
        self.wake();
    }

    fn take_posted(&self, state: &mut State) {
        let posted = std::mem::take(&mut *lock(&self.posted));
        for (session, job) in posted {
            state.post(session, job);
        }
    }

    /// Some caller gave up.
    pub(super) fn reap(&self) {
        self.given_up.store(true, Ordering::Release);
        self.wake();
    }

    fn turn(&self, state: &mut State) -> bool {
        self.take_posted(state);
        if self.given_up.swap(false, Ordering::AcqRel) {
            state.sweep();
        }
        state.turn()
    }

    /// Takes the thread's place until `done`, for a moment.
    pub(super) fn assist(&self, until: Instant, done: &dyn Fn() -> bool) {
        let until = until.min(Instant::now() + ASSIST_MAX);
        while !done() && Instant::now() < until {
            let Ok(mut state) = self.state.try_lock() else {
                std::hint::spin_loop();
                continue;
            };
            self.turn(&mut state);
            Self::settle(state);
        }
        // The descriptor of UCX may have been disarmed.
        self.wake();
    }

    fn run(&self) {
        let mut parting: Option<Instant> = None;
        loop {
            if self.closing.load(Ordering::Acquire) && parting.is_none() {
                lock(&self.state).close();
                parting = Some(Instant::now() + PARTING_MAX);
            }
            let mut state = lock(&self.state);
            let busy = (0..TURNS_MAX).all(|_| self.turn(&mut state));
            state.look_for_deaths();
            let is_idle = !busy && self.is_idle(&mut state);
            let deaths = state.deaths();
            let is_timed = parting.is_some() || state.has_limits() || state.is_owed();
            let over = state.is_over();
            Self::settle(state);
            if let Some(until) = parting
                && (over || Instant::now() >= until)
            {
                return self.end();
            }
            if is_idle {
                self.sleep(&deaths, is_timed.then_some(LOOK));
            }
        }
    }

    /// Whether the thread may sleep until UCX or someone else has something to do.
    ///
    /// UCX arms completion queues of verbs after it has looked at them, and not every device (soft-RoCE for one) tells of
    /// what came in between: so there is one more look, after arming.
    fn is_idle(&self, state: &mut State) -> bool {
        match state.worker.arm() {
            Ok(armed) => armed && !self.turn(state) && lock(&self.posted).is_empty(),
            Err(error) => {
                tracing::warn!(%error, "ucx");
                // Without events it has to be looked at.
                std::thread::sleep(Duration::from_millis(1));
                false
            }
        }
    }

    fn sleep(&self, deaths: &[OwnedFd], limit: Option<Duration>) {
        let watched = [&self.event, &*self.wake].into_iter().chain(deaths);
        let mut polled: Vec<_> = watched
            .map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN))
            .collect();
        let limit = limit.map(|limit| Timespec {
            tv_sec: 0,
            tv_nsec: limit.subsec_nanos().into(),
        });
        let _ = poll(&mut polled, limit.as_ref());
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.wake, &mut count);
    }

    /// Nobody is waited for any more.
    fn end(&self) {
        let mut state = lock(&self.state);
        self.take_posted(&mut state);
        state.end();
        Self::settle(state);
    }

    /// Ends everything, and waits for that unless it is called by the thread itself.
    pub(super) fn close(&self) {
        self.closing.store(true, Ordering::Release);
        self.wake();
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("the ucx thread panicked");
        }
    }
}
