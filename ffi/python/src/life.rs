//! Whether objects may still be used: not after a panic, and not in a forked child.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvfabric::{Error, ErrorKind};
use pyo3::prelude::*;

use crate::errors::to_python;

/// Shared by all objects of one agent, or of one index connection.
#[derive(Debug)]
pub(crate) struct Life {
    /// The process in which the objects were made. Asking for it is a system call, which is small beside any
    /// call that uses it, and unlike a fork handler it also sees a bare `clone`.
    process: u32,
    poisoned: AtomicBool,
}

impl Life {
    pub(crate) fn begin() -> Arc<Self> {
        Arc::new(Self {
            process: std::process::id(),
            poisoned: AtomicBool::new(false),
        })
    }

    /// Begins a call. A panic before the result is dropped poisons them all.
    ///
    /// # Errors
    /// `InternalError` after a panic, `ForkedError` in a forked child.
    pub(crate) fn enter(&self) -> PyResult<Call<'_>> {
        if self.process != std::process::id() {
            let text = "the object was made before this process was forked";
            return Err(to_python(Error::new(ErrorKind::Forked, text)));
        }
        if self.poisoned.load(Ordering::Acquire) {
            let text = "an earlier panic left this object unusable";
            return Err(to_python(Error::new(ErrorKind::Internal, text)));
        }
        Ok(Call {
            life: self,
            unwinding: std::thread::panicking(),
        })
    }
}

/// A call in progress.
#[derive(Debug)]
pub(crate) struct Call<'a> {
    life: &'a Life,
    /// Whether the thread was unwinding when it began, which then says nothing about this call.
    unwinding: bool,
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() && !self.unwinding {
            self.life.poisoned.store(true, Ordering::Release);
        }
    }
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
