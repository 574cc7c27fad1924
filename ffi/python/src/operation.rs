//! What a node does meanwhile.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use kvfabric::life::Life;
use kvfabric::{Error, ErrorKind, Result};
use pyo3::prelude::*;
use pyo3::types::PyType;

use crate::errors::to_python;
use crate::life::{enter, parse_timeout, patiently};
use crate::region::Held;
use crate::reports;

/// Something that a node does. It goes on, and is not lost, when this object is dropped.
#[pyclass(frozen, module = "kvfabric")]
pub(crate) struct Operation {
    life: Arc<Life>,
    work: Box<dyn Work>,
    memory: Memory,
}

/// Work in progress whose outcome is turned into a Python object.
trait Work: Send + Sync {
    fn is_done(&self) -> bool;
    fn event_fd(&self) -> Result<i32>;
    /// Whether it was done within so long.
    fn wait(&self, slice: Duration) -> bool;
    /// Its outcome, if it has one.
    fn outcome<'py>(&self, py: Python<'py>) -> Option<PyResult<Bound<'py, PyAny>>>;
}

/// The regions that something unfinished may use. Dropped before that is finished they are kept for ever, or until they are
/// deregistered: memory is never freed under work in flight.
pub(crate) struct Memory(Vec<Arc<Held>>);

impl Memory {
    pub(crate) fn of(regions: &[Arc<Held>]) -> Self {
        Self(regions.to_vec())
    }

    #[expect(
        clippy::mem_forget,
        reason = "work in flight may still use the memory, so it is kept"
    )]
    pub(crate) fn keep(&mut self) {
        std::mem::forget(std::mem::take(&mut self.0));
    }
}

struct Told<T, F> {
    operation: kvfabric::Operation<T>,
    tell: F,
}

impl<T, F> Work for Told<T, F>
where
    T: Send + Sync,
    F: for<'py> Fn(Python<'py>, &T) -> PyResult<Bound<'py, PyAny>> + Send + Sync,
{
    fn is_done(&self) -> bool {
        self.operation.is_done()
    }

    fn event_fd(&self) -> Result<i32> {
        Ok(self.operation.event_fd()?.as_raw_fd())
    }

    fn wait(&self, slice: Duration) -> bool {
        self.operation.wait(slice).is_some()
    }

    fn outcome<'py>(&self, py: Python<'py>) -> Option<PyResult<Bound<'py, PyAny>>> {
        let outcome = self.operation.poll()?;
        Some(match outcome {
            Ok(value) => (self.tell)(py, value),
            Err(error) => Err(to_python(error)),
        })
    }
}

impl Operation {
    /// An operation over `memory` whose outcome `tell` makes a Python object of.
    pub(crate) fn new<T, F>(
        life: &Arc<Life>,
        operation: kvfabric::Operation<T>,
        memory: Memory,
        tell: F,
    ) -> Self
    where
        T: Send + Sync + 'static,
        F: for<'py> Fn(Python<'py>, &T) -> PyResult<Bound<'py, PyAny>> + Send + Sync + 'static,
    {
        Self {
            life: life.clone(),
            work: Box::new(Told { operation, tell }),
            memory,
        }
    }

    /// As [`Operation::new`], without memory of an engine.
    pub(crate) fn plain<T, F>(life: &Arc<Life>, operation: kvfabric::Operation<T>, tell: F) -> Self
    where
        T: Send + Sync + 'static,
        F: for<'py> Fn(Python<'py>, &T) -> PyResult<Bound<'py, PyAny>> + Send + Sync + 'static,
    {
        Self::new(life, operation, Memory(Vec::new()), tell)
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        if !self.work.is_done() {
            self.memory.keep();
        }
    }
}

#[pymethods]
impl Operation {
    /// Whether it is finished, successfully or not.
    fn done(&self) -> PyResult<bool> {
        let _call = enter(&self.life)?;
        Ok(self.work.is_done())
    }

    /// Its result, for which this waits at most `timeout` seconds; raises why it failed. `DeadlineError` also when `timeout`
    /// ran out, which does not end it: `done()` tells the two apart.
    #[pyo3(signature = (timeout = 30.0))]
    fn wait<'py>(&self, py: Python<'py>, timeout: f64) -> PyResult<Bound<'py, PyAny>> {
        let _call = enter(&self.life)?;
        let timeout = parse_timeout(timeout)?;
        if !self.work.is_done() {
            patiently(py, timeout, |slice| self.work.wait(slice).then_some(()))?;
        }
        self.work.outcome(py).unwrap_or_else(|| {
            let text = format!("operation not finished after {timeout:?}");
            Err(to_python(Error::new(ErrorKind::Timeout, text)))
        })
    }

    /// A descriptor that is readable once it is done; not to be read from or closed.
    fn fileno(&self) -> PyResult<i32> {
        let _call = enter(&self.life)?;
        self.work.event_fd().map_err(to_python)
    }

    fn __await__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let _call = enter(&slf.get().life)?;
        reports::finished(slf.as_any())
    }

    /// So that annotations such as `Operation[Reach]` may be evaluated.
    #[classmethod]
    fn __class_getitem__<'py>(
        class: &Bound<'py, PyType>,
        _result: &Bound<'py, PyAny>,
    ) -> Bound<'py, PyType> {
        class.clone()
    }

    fn __repr__(&self) -> String {
        let state = if self.work.is_done() {
            "done"
        } else {
            "in progress"
        };
        format!("<kvfabric.Operation, {state}>")
    }
}
