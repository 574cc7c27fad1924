//! The beginning of every call, and waits that release the GIL.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use kvfabric::life::{Call, Life};
use kvfabric::transfer::Answer;
use kvfabric::{Error, ErrorKind};
use pyo3::prelude::*;

use crate::errors::to_python;

/// Begins a call. A panic before the result is dropped poisons all objects that share the life.
///
/// # Errors
/// `InternalError` after a panic, `ForkedError` in a forked child.
pub(crate) fn enter(life: &Life) -> PyResult<Call<'_>> {
    life.enter().map_err(to_python)
}

/// How long a wait goes on before it looks for signals.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(100);

/// The longest timeout, in seconds: more than four months, and far from any overflow.
const TIMEOUT_SECONDS_MAX: f64 = 1e7;

/// A caller's seconds.
pub(crate) fn parse_timeout(seconds: f64) -> PyResult<Duration> {
    if (0.0..=TIMEOUT_SECONDS_MAX).contains(&seconds) {
        return Ok(Duration::from_secs_f64(seconds));
    }
    Err(to_python(Error::invalid(
        "timeout",
        seconds,
        0.0..=TIMEOUT_SECONDS_MAX,
    )))
}

/// Waits without the GIL for an answer, in slices, so that Ctrl-C is noticed.
///
/// # Errors
/// What was answered; `DeadlineError` when nothing was within `timeout`.
pub(crate) fn answered<T: Send>(
    py: Python<'_>,
    timeout: Duration,
    answer: Answer<T>,
) -> PyResult<T> {
    let answer = Mutex::new(answer);
    let wait = |slice: Duration| {
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        let until = Instant::now() + slice;
        let mut answer = answer.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Poll::Ready(outcome) =
                Pin::new(&mut *answer).poll(&mut Context::from_waker(&waker))
            {
                return Some(outcome);
            }
            let left = until.checked_duration_since(Instant::now())?;
            std::thread::park_timeout(left);
        }
    };
    match patiently(py, timeout, wait)? {
        Some(outcome) => outcome.map_err(to_python),
        None => {
            let text = format!("no answer after {timeout:?}");
            Err(to_python(Error::new(ErrorKind::Timeout, text)))
        }
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Waits without the GIL until `wait` has something, in slices, so that Ctrl-C is noticed; none when time ran out.
pub(crate) fn patiently<T: Send>(
    py: Python<'_>,
    timeout: Duration,
    wait: impl Fn(Duration) -> Option<T> + Sync,
) -> PyResult<Option<T>> {
    let until = Instant::now() + timeout;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let found = py.detach(|| wait(left.min(SIGNAL_INTERVAL)));
        if found.is_some() || left <= SIGNAL_INTERVAL {
            return Ok(found);
        }
        py.check_signals()?;
    }
}
