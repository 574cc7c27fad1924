//! Transfers: made, posted, waited for, posted again.

use std::os::fd::AsRawFd;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use bytes::Bytes;
use kvfabric::transfer::{Operation, Request, RequestOptions, Status, TransferError};
use kvfabric::{Error, ErrorKind, Result};
use pyo3::prelude::*;

use crate::errors::to_python;
use crate::fabric::Fabric;
use crate::life::{enter, parse_timeout, patiently};
use crate::prepared::{Prepared, check_target};
use crate::region::Held;
use crate::reports;
use crate::stream::Lent;

/// Bytes on their way. Its regions are kept alive until it is finished, also when it is dropped before.
#[pyclass(frozen, module = "kvfabric")]
pub(crate) struct Transfer {
    fabric: Arc<Fabric>,
    /// The own regions whose memory it uses.
    _regions: Vec<Arc<Held>>,
    bytes: u64,
    /// Written to only while it is not in flight, when nobody waits in it for long.
    request: RwLock<Request>,
}

/// What a caller wants moved.
pub(crate) struct Wanted<'a> {
    pub(crate) operation: Operation,
    pub(crate) local: &'a Prepared,
    pub(crate) remote: &'a Prepared,
    pub(crate) options: RequestOptions,
}

impl Transfer {
    /// Makes it, without posting. Must not be called with the GIL held: this may connect.
    pub(crate) fn make(fabric: &Arc<Fabric>, wanted: Wanted<'_>) -> Result<Self> {
        let Wanted {
            operation,
            local,
            remote,
            options,
        } = wanted;
        local.check_of(fabric).map_err(|e| e.at("local"))?;
        remote.check_of(fabric).map_err(|e| e.at("remote"))?;
        check_target(operation, local, remote)?;
        let request = fabric
            .agent
            .request(operation, &local.list, &remote.list, options)?;
        let regions = local.regions.iter().chain(&remote.regions);
        Ok(Self {
            fabric: fabric.clone(),
            _regions: regions.cloned().collect(),
            bytes: request.bytes(),
            request: RwLock::new(request),
        })
    }

    fn request(&self) -> RwLockReadGuard<'_, Request> {
        self.request.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts it, after a stream if there is one. Must not be called with the GIL held.
    pub(crate) fn start(&self, notification: Option<Bytes>, after: Option<Lent>) -> Result<()> {
        let point = after.map(|stream| stream.open()?.point()).transpose()?;
        if let Some(notification) = notification {
            // While it is in flight others may wait in it, and then posting is refused anyway.
            if is_in_flight(&self.request()) {
                return Err(Error::new(ErrorKind::Busy, "the transfer is in flight"));
            }
            let mut request = self.request.write().unwrap_or_else(PoisonError::into_inner);
            request.set_notification(Some(notification))?;
        }
        match point {
            None => self.request().post(),
            Some(point) => self.request().post_after(&point),
        }
    }
}

/// How a request ended, if it did within `slice`.
fn ended(request: &Request, slice: Duration) -> Option<Result<(), TransferError>> {
    match request.wait(slice) {
        Err(failed) if failed.kind() == ErrorKind::Timeout && is_in_flight(request) => None,
        result => Some(result.map(drop)),
    }
}

/// Waits without the GIL for what `look` finds in slices of time; raises why it failed.
fn wait(
    py: Python<'_>,
    timeout: Duration,
    look: impl Fn(Duration) -> Option<Result<(), TransferError>> + Sync,
) -> PyResult<()> {
    match patiently(py, timeout, look)? {
        Some(result) => result.map_err(to_python),
        None => {
            let text = format!("transfer not finished after {timeout:?}");
            Err(to_python(Error::new(ErrorKind::Timeout, text)))
        }
    }
}

/// Waits for a request that nobody else waits for.
pub(crate) fn wait_alone(py: Python<'_>, request: &Request, timeout: Duration) -> PyResult<()> {
    wait(py, timeout, |slice| ended(request, slice))
}

fn is_in_flight(request: &Request) -> bool {
    matches!(request.poll(), Status::InFlight)
}

#[pymethods]
impl Transfer {
    /// Starts it; small copies within this host are finished when this returns. `notification` replaces the one that was
    /// given before. With `after`, a stream of an engine, nothing of it moves before the GPU has done all that the stream was given.
    #[pyo3(signature = (notification = None, *, after = None, device = None))]
    fn post(
        &self,
        py: Python<'_>,
        notification: Option<&[u8]>,
        after: Option<&Bound<'_, PyAny>>,
        device: Option<u32>,
    ) -> PyResult<()> {
        let _call = enter(&self.fabric.life)?;
        let notification = notification.map(Bytes::copy_from_slice);
        let after = after
            .map(|stream| Lent::of_object(stream, device))
            .transpose()?;
        py.detach(|| self.start(notification, after))
            .map_err(to_python)
    }

    /// Has an engine's stream wait for a part, counted from 0, or for all: what it is given after this call is done after the copies.
    #[pyo3(signature = (stream, part = None, timeout = 30.0, *, device = None))]
    fn order_stream(
        &self,
        py: Python<'_>,
        stream: &Bound<'_, PyAny>,
        part: Option<usize>,
        timeout: f64,
        device: Option<u32>,
    ) -> PyResult<()> {
        let _call = enter(&self.fabric.life)?;
        let lent = Lent::of_object(stream, device)?;
        let timeout = parse_timeout(timeout)?;
        let stream = py.detach(|| lent.open()).map_err(to_python)?;
        wait(py, timeout, |slice| {
            let request = self.request();
            match request.order_stream(&stream, part, slice) {
                Err(failed) if failed.kind() == ErrorKind::Timeout && is_in_flight(&request) => {
                    None
                }
                result => Some(result),
            }
        })
    }

    /// Where the last post stands: "idle" before the first, "in_flight", "done" or "failed".
    #[getter]
    fn state(&self) -> PyResult<&'static str> {
        let _call = enter(&self.fabric.life)?;
        Ok(match self.request().poll() {
            Status::Idle => "idle",
            Status::InFlight => "in_flight",
            Status::Done(_) => "done",
            Status::Failed(_) => "failed",
        })
    }

    /// Why the last post failed, as an exception.
    #[getter]
    fn error<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let _call = enter(&self.fabric.life)?;
        let failed = match self.request().poll() {
            Status::Failed(failed) => to_python(failed),
            _ => return Ok(None),
        };
        Ok(Some(failed.into_value(py).into_bound(py).into_any()))
    }

    /// How the last finished post went; none before.
    #[getter]
    fn telemetry<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let _call = enter(&self.fabric.life)?;
        let telemetry = self.request().telemetry();
        telemetry.map(|t| reports::telemetry(py, &t)).transpose()
    }

    /// What a post would take now, and which way it would go; connects if there is no connection.
    fn estimate<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let _call = enter(&self.fabric.life)?;
        let estimate = py.detach(|| self.request().estimate()).map_err(to_python)?;
        reports::estimate(py, &estimate)
    }

    /// Bytes that it moves.
    #[getter]
    fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Waits until it is finished, at most `timeout` seconds, and raises why it failed. `DeadlineError` also when
    /// `timeout` ran out, which does not end the transfer: `done()` tells the two apart.
    #[pyo3(signature = (timeout = 30.0))]
    fn wait(&self, py: Python<'_>, timeout: f64) -> PyResult<()> {
        let _call = enter(&self.fabric.life)?;
        // The lock is taken anew for each slice, so that who posts again need not wait longer than that.
        wait(py, parse_timeout(timeout)?, |slice| {
            ended(&self.request(), slice)
        })
    }

    /// How many parts it has, at least one.
    #[getter]
    fn parts(&self) -> usize {
        self.request().parts()
    }

    /// Waits until all bytes of a part, counted from 0, are in place, at most `timeout` seconds, and raises why the transfer
    /// failed before. `DeadlineError` also when `timeout` ran out, which does not end the transfer.
    #[pyo3(signature = (part, timeout = 30.0))]
    fn wait_part(&self, py: Python<'_>, part: usize, timeout: f64) -> PyResult<()> {
        let _call = enter(&self.fabric.life)?;
        wait(py, parse_timeout(timeout)?, |slice| {
            let request = self.request();
            match request.wait_part(part, slice) {
                Err(failed) if failed.kind() == ErrorKind::Timeout && is_in_flight(&request) => {
                    None
                }
                result => Some(result),
            }
        })
    }

    /// Whether it is finished, successfully or not.
    fn done(&self) -> PyResult<bool> {
        let _call = enter(&self.fabric.life)?;
        Ok(!is_in_flight(&self.request()))
    }

    /// Asks it to end: it fails with `CancelledError` now, unless it is finished.
    fn cancel(&self, py: Python<'_>) -> PyResult<()> {
        let _call = enter(&self.fabric.life)?;
        py.detach(|| self.request().cancel());
        Ok(())
    }

    /// Whether its memory may be used again: not while work may still land, even after it has failed. Waits for that at
    /// most `timeout` seconds.
    #[pyo3(signature = (timeout = 0.0))]
    fn settled(&self, py: Python<'_>, timeout: f64) -> PyResult<bool> {
        let _call = enter(&self.fabric.life)?;
        let drained = patiently(py, parse_timeout(timeout)?, |slice| {
            self.request().wait_drained(slice).then_some(())
        })?;
        Ok(drained.is_some())
    }

    /// A descriptor that is readable while the last post is finished; not to be read from or closed.
    fn fileno(&self) -> PyResult<i32> {
        let _call = enter(&self.fabric.life)?;
        let request = self.request();
        let descriptor = request.event_fd().map_err(to_python)?;
        Ok(descriptor.as_raw_fd())
    }

    fn __await__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let _call = enter(&slf.get().fabric.life)?;
        reports::finished(slf.as_any())
    }

    fn __repr__(&self) -> String {
        format!("<kvfabric.Transfer of {} bytes>", self.bytes)
    }
}
