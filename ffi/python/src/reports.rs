//! What the Python side of the package does: named tuples for reports, and waiting in an event loop.

use kvfabric::transfer::Telemetry;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

static TELEMETRY: PyOnceLock<Py<PyType>> = PyOnceLock::new();
static FINISHED: PyOnceLock<Py<PyAny>> = PyOnceLock::new();

/// `kvfabric.Telemetry`.
pub(crate) fn telemetry<'py>(
    py: Python<'py>,
    telemetry: &Telemetry,
) -> PyResult<Bound<'py, PyAny>> {
    TELEMETRY
        .import(py, "kvfabric._reports", "Telemetry")?
        .call1((
            telemetry.posted.as_secs_f64(),
            telemetry.post.as_secs_f64(),
            telemetry.transfer.as_secs_f64(),
            telemetry.bytes,
            telemetry.descriptors,
            telemetry.path,
        ))
}

/// What `__await__` of an object with `done`, `fileno` and `wait` answers.
pub(crate) fn finished<'py>(object: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let py = object.py();
    let finished = FINISHED.get_or_try_init(py, || {
        let module = py.import("kvfabric._waiting")?;
        Ok::<_, PyErr>(module.getattr("finished")?.unbind())
    })?;
    finished
        .bind(py)
        .call1((object,))?
        .call_method0("__await__")
}
