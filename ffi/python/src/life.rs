//! The beginning of every call, and waits that release the GIL.

use std::time::{Duration, Instant};

use kvfabric::Error;
use kvfabric::life::{Call, Life};
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
