//! What waits to be done by a thread of its own, or sooner by others who lend theirs.

use std::collections::VecDeque;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use crate::request::Priority;
use crate::sync::{Condvar, Mutex, MutexGuard};

/// How long the thread leaves what it may leave to others after one of them was here.
pub(super) const LENT_FOR: Duration = Duration::from_micros(250);

/// Whether something may be done by a thread that is lent, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hands {
    /// Only by the thread, which keeps the order.
    Own,
    /// By whoever is there first.
    Any,
}

/// What the thread is about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Thread {
    Awake,
    /// Sleeps for a moment, and then looks whether others still lend theirs.
    Dozes,
    /// Sleeps until it is told that something came.
    Sleeps,
}

struct State<T> {
    normal: VecDeque<(T, Hands)>,
    background: VecDeque<T>,
    is_closed: bool,
    thread: Thread,
    /// When somebody last lent a thread.
    lent_at: Option<Instant>,
}

impl<T> State<T> {
    /// What the thread is to do now. What others may do is left to them while they are `lent`.
    fn next(&mut self, lent: bool) -> Option<(T, Priority)> {
        let normal = |(task, _)| (task, Priority::Normal);
        match self.normal.front() {
            Some((_, Hands::Any)) if lent => None,
            Some(_) => self.normal.pop_front().map(normal),
            None => {
                let task = self.background.pop_front()?;
                Some((task, Priority::Background))
            }
        }
    }
}

/// Tasks of two priorities: as many as callers hold requests, of which none is refused.
pub(super) struct Queue<T> {
    state: Mutex<State<T>>,
    arrived: Condvar,
    /// Whether others were here a moment ago, given when.
    is_recent: fn(Instant) -> bool,
}

impl<T> Queue<T> {
    pub(super) fn new() -> Self {
        Self::with_clock(|at| at.elapsed() < LENT_FOR)
    }

    pub(super) fn with_clock(is_recent: fn(Instant) -> bool) -> Self {
        let state = State {
            normal: VecDeque::new(),
            background: VecDeque::new(),
            is_closed: false,
            thread: Thread::Awake,
            lent_at: None,
        };
        Self {
            state: Mutex::new(state),
            arrived: Condvar::new(),
            is_recent,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the thread if it would not come by itself: it looks after those who lend theirs now and then.
    fn tell(&self, mut state: MutexGuard<'_, State<T>>) {
        let is_told = match state.thread {
            Thread::Awake => false,
            Thread::Dozes => !matches!(state.normal.front(), Some((_, Hands::Any))),
            Thread::Sleeps => true,
        };
        if is_told {
            state.thread = Thread::Awake;
            drop(state);
            self.arrived.notify_one();
        }
    }

    /// Hands the task back once the queue is closed.
    pub(super) fn push(&self, task: T, priority: Priority, hands: Hands) -> Result<(), T> {
        let mut state = self.lock();
        if state.is_closed {
            return Err(task);
        }
        match priority {
            Priority::Normal => state.normal.push_back((task, hands)),
            Priority::Background => state.background.push_back(task),
        }
        self.tell(state);
        Ok(())
    }

    /// The next task that is not in the background, for the thread while it is busy with one that is.
    pub(super) fn first(&self) -> Option<T> {
        self.lock().normal.pop_front().map(|(task, _)| task)
    }

    /// The next task for someone who lends a thread.
    pub(super) fn lend(&self) -> Option<T> {
        let mut state = self.lock();
        state.lent_at = Some(Instant::now());
        match state.normal.front() {
            Some((_, Hands::Any)) => {}
            _ => return None,
        }
        let (task, _) = state.normal.pop_front()?;
        if state.normal.front().is_some() {
            self.tell(state);
        }
        Some(task)
    }

    /// A task that was lent, and is to be gone on with; handed back once the queue is closed, as the thread may have ended.
    pub(super) fn put_back(&self, task: T) -> Result<(), T> {
        let mut state = self.lock();
        if state.is_closed {
            return Err(task);
        }
        state.lent_at = Some(Instant::now());
        state.normal.push_front((task, Hands::Any));
        self.tell(state);
        Ok(())
    }

    /// The next task for the thread, which waits for it; none once all is done after [`Queue::close`].
    pub(super) fn next(&self) -> Option<(T, Priority)> {
        let mut state = self.lock();
        loop {
            let lent = !state.is_closed && state.lent_at.is_some_and(self.is_recent);
            if let Some(task) = state.next(lent) {
                return Some(task);
            }
            if state.is_closed {
                return None;
            }
            if lent {
                state.thread = Thread::Dozes;
                let waited = self.arrived.wait_timeout(state, LENT_FOR);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            } else {
                state.thread = Thread::Sleeps;
                let waited = self.arrived.wait(state);
                state = waited.unwrap_or_else(PoisonError::into_inner);
            }
            state.thread = Thread::Awake;
        }
    }

    /// Nothing is taken any more; the thread ends when all that waits is done.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.is_closed = true;
        drop(state);
        self.arrived.notify_all();
    }
}
