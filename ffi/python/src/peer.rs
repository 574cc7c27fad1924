//! Other agents.

use std::collections::BTreeMap;
use std::sync::Arc;

use kvfabric::transfer;
use kvfabric::{Error, ErrorKind, Result};
use pyo3::prelude::*;

use crate::fabric::Fabric;
use crate::life::enter;

/// Another agent, as its metadata describes it.
#[pyclass(frozen, module = "kvfabric")]
pub(crate) struct Peer {
    pub(crate) fabric: Arc<Fabric>,
    pub(crate) peer: transfer::PeerHandle,
}

impl Peer {
    /// # Errors
    /// [`ErrorKind::Invalid`] when another agent loaded it.
    pub(crate) fn of(&self, fabric: &Arc<Fabric>) -> Result<&transfer::PeerHandle> {
        if Arc::ptr_eq(&self.fabric, fabric) {
            return Ok(&self.peer);
        }
        let text = format!("peer {:?} was loaded by another agent", self.peer.name());
        Err(Error::new(ErrorKind::Invalid, text))
    }
}

#[pymethods]
impl Peer {
    /// Its agent's name.
    #[getter]
    fn name(&self) -> &str {
        self.peer.name()
    }

    /// The regions that it exported: their sizes in bytes, by number.
    #[getter]
    fn regions(&self) -> PyResult<BTreeMap<u64, u64>> {
        let _call = enter(&self.fabric.life)?;
        let regions = self.peer.regions().into_iter();
        Ok(regions.map(|(id, bytes)| (id.0, bytes)).collect())
    }

    /// The backend that bytes to it go through, such as "shm"; None if it cannot be reached. Connects if need be.
    #[getter]
    fn path(&self, py: Python<'_>) -> PyResult<Option<&'static str>> {
        let _call = enter(&self.fabric.life)?;
        Ok(py.detach(|| self.fabric.agent.path_to(&self.peer)).backend)
    }

    /// Why that path was taken, and what kept better ones from being used, as a sentence.
    fn explain_path(&self, py: Python<'_>) -> PyResult<String> {
        let _call = enter(&self.fabric.life)?;
        let report = py.detach(|| self.fabric.agent.path_to(&self.peer));
        let mut text = match report.backend {
            Some(backend) => format!("{backend}: {}", report.why),
            None => "none".to_owned(),
        };
        for (backend, reason) in &report.refused {
            text.push_str(&format!("; not {backend}: {reason}"));
        }
        Ok(text)
    }

    /// Ends the connections to it and forgets it; transfers in flight fail with `PeerLostError`.
    fn forget(&self, py: Python<'_>) -> PyResult<()> {
        let _call = enter(&self.fabric.life)?;
        py.detach(|| self.fabric.agent.forget_peer(&self.peer));
        Ok(())
    }

    fn __repr__(&self) -> String {
        format!("<kvfabric.Peer {:?}>", self.peer.name())
    }
}
