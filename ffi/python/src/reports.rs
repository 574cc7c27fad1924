//! What the Python side of the package does: named tuples for reports, and waiting in an event loop.

use std::sync::Arc;

use kvfabric::life::Life;
use kvfabric::transfer::{Estimate, Telemetry};
use kvfabric::{Fetched, HeldDepth, Pinned, Reach, Removed, Source};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyType};

use crate::life::{enter, parse_timeout, patiently};
use crate::operation::Memory;

/// The module of the named tuples.
const REPORTS: &str = "kvfabric._reports";

static TELEMETRY: PyOnceLock<Py<PyType>> = PyOnceLock::new();
static ESTIMATE: PyOnceLock<Py<PyType>> = PyOnceLock::new();
static STORE: PyOnceLock<Py<PyType>> = PyOnceLock::new();
static PROMOTE: PyOnceLock<Py<PyType>> = PyOnceLock::new();
static HELD: PyOnceLock<Py<PyType>> = PyOnceLock::new();
static PIN: PyOnceLock<Py<PyType>> = PyOnceLock::new();
static REMOVED: PyOnceLock<Py<PyType>> = PyOnceLock::new();
static REACH: PyOnceLock<Py<PyType>> = PyOnceLock::new();
static FINISHED: PyOnceLock<Py<PyAny>> = PyOnceLock::new();

/// `kvfabric.Telemetry`.
pub(crate) fn telemetry<'py>(
    py: Python<'py>,
    telemetry: &Telemetry,
) -> PyResult<Bound<'py, PyAny>> {
    TELEMETRY.import(py, REPORTS, "Telemetry")?.call1((
        telemetry.posted.as_secs_f64(),
        telemetry.post.as_secs_f64(),
        telemetry.transfer.as_secs_f64(),
        telemetry.bytes,
        telemetry.descriptors,
        telemetry.path,
        telemetry.failovers,
    ))
}

/// `kvfabric.Estimate`.
pub(crate) fn estimate<'py>(py: Python<'py>, estimate: &Estimate) -> PyResult<Bound<'py, PyAny>> {
    let fields = (
        estimate.backend,
        estimate.expected.as_secs_f64(),
        estimate.measured,
        estimate.refused.clone(),
    );
    ESTIMATE.import(py, REPORTS, "Estimate")?.call1(fields)
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

/// `kvfabric.StoreReport`.
pub(crate) fn store<'py>(
    py: Python<'py>,
    report: &kvfabric::StoreReport,
) -> PyResult<Bound<'py, PyAny>> {
    STORE.import(py, REPORTS, "StoreReport")?.call1((
        report.stored,
        report.already_held,
        report.refused,
        report.failed,
    ))
}

/// `kvfabric.PromoteReport`.
pub(crate) fn promote<'py>(
    py: Python<'py>,
    report: &kvfabric::PromoteReport,
) -> PyResult<Bound<'py, PyAny>> {
    PROMOTE.import(py, REPORTS, "PromoteReport")?.call1((
        report.promoted,
        report.already_held,
        report.missed,
        report.refused,
        report.failed,
    ))
}

/// `kvfabric.Held`.
pub(crate) fn held<'py>(py: Python<'py>, held: &HeldDepth) -> PyResult<Bound<'py, PyAny>> {
    let fields = (held.depth, held.host, held.disk, held.expected);
    HELD.import(py, REPORTS, "Held")?.call1(fields)
}

/// `kvfabric.Pin`.
pub(crate) fn pin<'py>(py: Python<'py>, pinned: &Pinned) -> PyResult<Bound<'py, PyAny>> {
    let fields = (pinned.id.0, pinned.depth);
    PIN.import(py, REPORTS, "Pin")?.call1(fields)
}

/// `kvfabric.Removed`.
pub(crate) fn removed<'py>(py: Python<'py>, removed: &Removed) -> PyResult<Bound<'py, PyAny>> {
    let fields = (removed.removed, removed.kept);
    REMOVED.import(py, REPORTS, "Removed")?.call1(fields)
}

/// `kvfabric.Reach`.
pub(crate) fn reach<'py>(py: Python<'py>, reach: &Reach) -> PyResult<Bound<'py, PyAny>> {
    let holders = reach.located.holders.iter();
    let holders: Vec<(&str, u32, Option<&str>)> = holders
        .map(|holder| {
            (
                holder.pod.as_str(),
                holder.depth,
                holder.peer_address.as_deref(),
            )
        })
        .collect();
    let shared = reach.located.shared.iter();
    let shared: Vec<(u32, u32)> = shared.map(|range| (range.start, range.end)).collect();
    let own = &reach.own;
    let fields = (
        reach.depth,
        own.depth,
        own.host,
        own.disk,
        holders,
        shared,
        own.expected,
    );
    REACH.import(py, REPORTS, "Reach")?.call1(fields)
}

/// None, for what has no result.
#[expect(
    clippy::unnecessary_wraps,
    clippy::trivially_copy_pass_by_ref,
    reason = "as all that tell outcomes"
)]
pub(crate) fn nothing<'py>(py: Python<'py>, _done: &()) -> PyResult<Bound<'py, PyAny>> {
    Ok(py.None().into_bound(py))
}

/// Counters by name.
pub(crate) fn counters<'py>(
    py: Python<'py>,
    entries: &[(&'static str, u64)],
) -> PyResult<Bound<'py, PyAny>> {
    let counters = PyDict::new(py);
    for (name, value) in entries {
        counters.set_item(name, value)?;
    }
    Ok(counters.into_any())
}

/// `kvfabric.FetchReport`, of a fetch into this memory.
pub(crate) fn fetch<'py>(
    py: Python<'py>,
    life: &Arc<Life>,
    fetched: &Fetched,
    memory: Memory,
) -> PyResult<Bound<'py, PyAny>> {
    let report = FetchReport {
        life: life.clone(),
        depth: fetched.depth(),
        sources: fetched.sources.iter().map(name).collect(),
        unsettled: fetched.unsettled.clone(),
        drained: fetched.drained.clone(),
        memory,
    };
    Ok(Bound::new(py, report)?.into_any())
}

fn name(source: &Source) -> &'static str {
    match source {
        Source::Device => "hbm",
        Source::Host => "dram",
        Source::Disk => "nvme",
        Source::Peer { .. } => "peer",
        Source::Object => "object",
        Source::Miss => "miss",
    }
}

/// What became of the blocks of a fetch.
#[pyclass(frozen, module = "kvfabric")]
pub(crate) struct FetchReport {
    life: Arc<Life>,
    depth: usize,
    sources: Vec<&'static str>,
    unsettled: Vec<u32>,
    drained: kvfabric::Operation<bool>,
    memory: Memory,
}

impl FetchReport {
    /// Whether it is certain that nothing writes to the memory of unsettled blocks.
    fn is_drained(&self) -> bool {
        matches!(self.drained.poll(), Some(Ok(true)))
    }
}

impl Drop for FetchReport {
    fn drop(&mut self) {
        if !self.is_drained() {
            self.memory.keep();
        }
    }
}

#[pymethods]
impl FetchReport {
    /// How many blocks from the first are there, verified.
    #[getter]
    fn depth(&self) -> usize {
        self.depth
    }

    /// Where each block came from: "hbm", "dram", "nvme", "peer", "object" or "miss".
    #[getter]
    fn sources(&self) -> Vec<&'static str> {
        self.sources.clone()
    }

    /// Positions, in the `blocks` of the fetch, whose memory may still be written to.
    #[getter]
    fn unsettled(&self) -> Vec<u32> {
        self.unsettled.clone()
    }

    /// Whether nothing writes to the memory of `unsettled` blocks any more. Waits for that at most `timeout` seconds.
    #[pyo3(signature = (timeout = 0.0))]
    fn drained(&self, py: Python<'_>, timeout: f64) -> PyResult<bool> {
        let _call = enter(&self.life)?;
        let timeout = parse_timeout(timeout)?;
        if !self.drained.is_done() {
            patiently(py, timeout, |slice| self.drained.wait(slice).map(drop))?;
        }
        Ok(self.is_drained())
    }

    fn __repr__(&self) -> String {
        let (depth, count) = (self.depth, self.sources.len());
        format!("<kvfabric.FetchReport, {depth} of {count} blocks>")
    }
}
