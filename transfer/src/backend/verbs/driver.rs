//! The thread that looks after queue pairs, and how others take its place for a moment.

use std::collections::VecDeque;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvcache_core::{Error, Result};
use rustix::buffer::spare_capacity;
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};

use super::aside::Aside;
use super::card::Cards;
use super::fair::Fair;
use super::state::{COMPLETIONS, CONNECTIONS, LINES, LISTENERS, Line, NOTICES, State, WAKE};
use crate::agent::Exports;
use crate::backend::Job;

/// Jobs of up to so many bytes and pieces are begun by the caller of `post`.
const INLINE_BYTES_MAX: u64 = 64 << 10;
const INLINE_EXTENTS_MAX: usize = 64;

/// Turns in a row before another thread may get in.
const TURNS_MAX: usize = 16;

/// How long a waiting caller takes the thread's place at a time.
const ASSIST_MAX: Duration = Duration::from_micros(50);

/// How often something that has a time limit is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// How long an agent that goes waits for its peers, in all.
const PARTING_MAX: Duration = Duration::from_secs(3);

/// Things that have happened, taken at a time.
const EVENTS: usize = 64;

pub(super) struct Driver {
    /// Of the thread, which takes it again and again, and of callers, whom it would keep out otherwise.
    state: Fair<State>,
    posted: Mutex<VecDeque<(Line, Job)>>,
    /// Readable when the thread has something to do that no device and no peer tells of.
    wake: Arc<OwnedFd>,
    cards: Arc<Cards>,
    aside: Arc<Aside>,
    epoll: Arc<OwnedFd>,
    polling: Duration,
    given_up: AtomicBool,
    closing: AtomicBool,
    thread: Mutex<Option<JoinHandle<()>>>,
}

fn wake_by(wake: &OwnedFd) {
    // It is full when it was written often enough.
    let _ = rustix::io::write(wake, &1_u64.to_ne_bytes());
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Driver {
    pub(super) fn start(
        cards: Cards,
        exports: Arc<Exports>,
        listeners: Vec<TcpListener>,
    ) -> Result<Arc<Self>> {
        let failed = |e: rustix::io::Errno| Error::io("watch an RDMA device", e.into());
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(failed)?;
        let (wake, cards) = (Arc::new(wake), Arc::new(cards));
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed)?);
        let mut watched = vec![(WAKE, wake.as_fd())];
        for (number, device) in (0..).zip(&cards.devices) {
            watched.push((COMPLETIONS + number, device.channel.as_fd()));
            watched.push((NOTICES + number, device.context.notice_fd()));
        }
        if let Some(reception) = &cards.reception {
            watched.push((CONNECTIONS, reception.events.as_fd()));
        }
        let listening = (LISTENERS..).zip(&listeners);
        watched.extend(listening.map(|(number, listener)| (number, listener.as_fd())));
        for (number, fd) in watched {
            let data = epoll::EventData::new_u64(number);
            epoll::add(&epoll, fd, data, epoll::EventFlags::IN).map_err(failed)?;
        }
        let polling = cards.options.polling;
        let woken = wake.clone();
        let aside = Arc::new(Aside::new(move || wake_by(&woken)));
        let state = State::new(
            cards.clone(),
            aside.clone(),
            exports,
            listeners,
            epoll.clone(),
        );
        state.late.wake_by(&wake);
        let driver = Arc::new(Self {
            state: Fair::new(state),
            posted: Mutex::default(),
            wake,
            cards,
            aside,
            epoll,
            polling,
            given_up: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            thread: Mutex::default(),
        });
        let own = driver.clone();
        let thread = std::thread::Builder::new()
            .name("kvf-verbs".into())
            .spawn(move || own.run())
            .map_err(|e| Error::io("start the verbs thread", e))?;
        *lock(&driver.thread) = Some(thread);
        Ok(driver)
    }

    /// Does something with the state, and lets the thread look at what follows from it.
    pub(super) fn with<T>(&self, what: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state.lock();
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
        wake_by(&self.wake);
    }

    /// The ports of the agent.
    pub(super) fn cards(&self) -> &Cards {
        &self.cards
    }

    /// Takes a job in: it waits for its turn however many do.
    pub(super) fn post(&self, line: Line, job: Job) {
        let plan = job.plan();
        let small = plan.bytes <= INLINE_BYTES_MAX && plan.extents.len() <= INLINE_EXTENTS_MAX;
        lock(&self.posted).push_back((line, job));
        if small && let Some(mut state) = self.state.try_lock() {
            self.take_posted(&mut state);
            state.pump();
            let is_quiet = state.is_quiet();
            Self::settle(state);
            if is_quiet {
                // Its completion wakes the thread, if nobody takes it before.
                return;
            }
        }
        self.wake();
    }

    fn take_posted(&self, state: &mut State) {
        let posted = std::mem::take(&mut *lock(&self.posted));
        for (line, job) in posted {
            state.post(line, job);
        }
    }

    /// Some caller gave up.
    pub(super) fn reap(&self) {
        self.given_up.store(true, Ordering::Release);
        self.wake();
    }

    fn turn(&self, state: &mut State) -> bool {
        for then in self.aside.take() {
            then(state);
        }
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
            let Some(mut state) = self.state.try_lock() else {
                std::hint::spin_loop();
                continue;
            };
            self.turn(&mut state);
            let is_quiet = state.is_quiet();
            Self::settle(state);
            if !is_quiet {
                self.wake();
            }
        }
    }

    fn run(&self) {
        let mut parting: Option<Instant> = None;
        let mut events = Vec::with_capacity(EVENTS);
        let mut busy_at = Instant::now();
        loop {
            let mut state = self.state.lock();
            for event in events.drain(..) {
                self.happened(&mut state, event);
            }
            if self.closing.load(Ordering::Acquire) && parting.is_none() {
                state.close();
                parting = Some(Instant::now() + PARTING_MAX);
            }
            let busy = (0..TURNS_MAX).all(|_| self.turn(&mut state));
            let now = Instant::now();
            if busy {
                busy_at = now;
            }
            let polls = !busy && state.is_working() && now < busy_at + self.polling;
            let sleeps = !busy && !polls && self.may_sleep(&mut state);
            let (is_timed, is_over, due) = (state.is_timed, state.is_over(), state.due);
            Self::settle(state);
            if let Some(until) = parting
                && (is_over || now >= until)
            {
                return self.end();
            }
            if sleeps {
                let is_timed = is_timed || parting.is_some();
                let due = due.map(|due| due.saturating_duration_since(now));
                self.sleep(&mut events, is_timed.then_some(LOOK).or(due));
                busy_at = Instant::now();
            } else if polls {
                std::thread::yield_now();
            }
        }
    }

    /// Whether the thread may sleep until something happens.
    fn may_sleep(&self, state: &mut State) -> bool {
        state.arm() && state.ready.is_empty() && lock(&self.posted).is_empty()
    }

    fn sleep(&self, events: &mut Vec<epoll::Event>, limit: Option<Duration>) {
        let limit = limit.map(|limit| Timespec {
            tv_sec: limit.as_secs().cast_signed(),
            tv_nsec: limit.subsec_nanos().into(),
        });
        // A signal only makes it look once more than it had to.
        let _ = epoll::wait(&self.epoll, spare_capacity(events), limit.as_ref());
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.wake, &mut count);
    }

    fn happened(&self, state: &mut State, event: epoll::Event) {
        match event.data.u64() {
            WAKE => {}
            number @ LISTENERS..LINES => state.accept((number - LISTENERS) as usize),
            CONNECTIONS => state.connections(),
            number @ NOTICES..CONNECTIONS => state.notices((number - NOTICES) as usize),
            number @ COMPLETIONS..NOTICES => state.completions((number - COMPLETIONS) as usize),
            line => {
                let line = Line(line);
                state.stranger_spoke(line);
                state.user_spoke(line);
                state.peer_spoke(line);
            }
        }
    }

    /// Nobody is waited for any more.
    fn end(&self) {
        let mut state = self.state.lock();
        for then in self.aside.take() {
            then(&mut state);
        }
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
            tracing::error!("the verbs thread panicked");
        }
    }
}
