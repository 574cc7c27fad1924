//! Peer services of nodes, for whoever has no node.

use std::time::Duration;

use kvfabric::config::parse_identity;
use kvfabric::{PeerConnection, PinId};
use pyo3::prelude::*;

use crate::errors::to_python;
use crate::life::{enter, parse_timeout};
use crate::operation::Operation;
use crate::reports;

/// A connection to a node's peer service, for who has no node: a scheduler that asks what a worker's node could get.
#[pyclass(frozen, module = "kvfabric")]
pub(crate) struct PeerService {
    address: String,
    connection: PeerConnection,
    deadline: Duration,
}

impl PeerService {
    fn deadline(&self, deadline: Option<f64>) -> PyResult<Duration> {
        deadline.map_or(Ok(self.deadline), parse_timeout)
    }
}

#[pymethods]
impl PeerService {
    /// Connects on first use to the node at "ip:port". `deadline` seconds bound each call that names none.
    #[new]
    #[pyo3(signature = (address, *, deadline = 2.0))]
    fn new(py: Python<'_>, address: &str, deadline: f64) -> PyResult<Self> {
        let deadline = parse_timeout(deadline)?;
        let connection = py.detach(|| PeerConnection::connect(address));
        Ok(Self {
            address: address.to_owned(),
            connection: connection.map_err(to_python)?,
            deadline,
        })
    }

    /// As `Node.locate` there, for blocks that `NameChain.pack` named.
    #[pyo3(signature = (names, *, deadline = None))]
    fn locate(&self, names: &[u8], deadline: Option<f64>) -> PyResult<Operation> {
        let life = self.connection.life();
        let _call = enter(life)?;
        let operation = self.connection.locate(names, self.deadline(deadline)?);
        Ok(Operation::plain(life, operation, reports::reach))
    }

    /// As `Node.unpin` there; `model_identity` is that node's.
    #[pyo3(signature = (pin, model_identity, *, deadline = None))]
    fn unpin(&self, pin: u64, model_identity: &str, deadline: Option<f64>) -> PyResult<Operation> {
        let life = self.connection.life();
        let _call = enter(life)?;
        let identity = parse_identity(model_identity).map_err(to_python)?;
        let deadline = self.deadline(deadline)?;
        let operation = self.connection.unpin(PinId(pin), identity, deadline);
        Ok(Operation::plain(life, operation, reports::nothing))
    }

    fn __repr__(&self) -> String {
        format!("<kvfabric.PeerService at {}>", self.address)
    }
}
