//! What a node stores and fetches: the blocks of a prefix, and where an engine has them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvfabric::Error;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::buffer::integers;
use crate::core::Core;
use crate::errors::to_python;
use crate::life::enter;
use crate::region::Held;

/// An engine's pool of blocks. It keeps its regions.
#[pyclass(frozen, module = "kvfabric")]
pub(crate) struct Pages {
    pub(crate) core: Arc<Core>,
    pub(crate) pages: kvfabric::Pages,
    pub(crate) regions: Vec<Arc<Held>>,
}

/// The blocks of a token sequence from its first on, as a node names them.
#[pyclass(frozen, module = "kvfabric")]
pub(crate) struct Prefix {
    pub(crate) core: Arc<Core>,
    /// Never held while waiting for the GIL.
    pub(crate) prefix: Mutex<kvfabric::Prefix>,
}

impl Prefix {
    pub(crate) fn lock(&self) -> MutexGuard<'_, kvfabric::Prefix> {
        self.prefix.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl Pages {
    fn __len__(&self) -> usize {
        self.pages.blocks() as usize
    }

    /// Bytes of a block, all segments together.
    #[getter]
    fn block_bytes(&self) -> u64 {
        self.pages.block_bytes()
    }

    fn __repr__(&self) -> String {
        format!(
            "<kvfabric.Pages, {} blocks of {} bytes>",
            self.pages.blocks(),
            self.pages.block_bytes()
        )
    }
}

#[pymethods]
impl Prefix {
    /// Goes on with more tokens and returns how many full blocks there are; what does not fill a block waits for more.
    fn extend(&self, py: Python<'_>, tokens: &Bound<'_, PyAny>) -> PyResult<usize> {
        let _call = enter(self.core.life())?;
        let tokens = integers(tokens, "tokens")?;
        py.detach(|| self.lock().extend(&tokens)).map_err(to_python)
    }

    fn __len__(&self) -> PyResult<usize> {
        let _call = enter(self.core.life())?;
        Ok(self.lock().len())
    }

    /// The data key of the block at `position`: 32 bytes that name its content and where it belongs.
    fn key<'py>(&self, py: Python<'py>, position: usize) -> PyResult<Bound<'py, PyBytes>> {
        let _call = enter(self.core.life())?;
        let info = self.lock().infos().get(position).copied();
        let info = info.ok_or_else(|| {
            let count = self.lock().len();
            to_python(Error::invalid("position", position, 0..count))
        })?;
        Ok(PyBytes::new(py, &info.key.0))
    }
}
