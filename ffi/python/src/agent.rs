//! Agents and peers.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use kvfabric::transfer::{self, Operation, RegionOptions};
use kvfabric::{Error, ErrorKind};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::errors::to_python;
use crate::life::{Life, parse_timeout, patiently};
use crate::region::Region;
use crate::transfer::{Local, Remote, Transfer, Wanted};

/// Moves bytes between registered memory of this process and its peers. Safe to use from any thread.
#[pyclass(frozen, module = "kvfabric")]
pub(crate) struct Agent {
    life: Arc<Life>,
    agent: transfer::Agent,
}

/// Another agent, as its metadata describes it.
#[pyclass(frozen, module = "kvfabric")]
pub(crate) struct Peer {
    pub(crate) life: Arc<Life>,
    agent: transfer::Agent,
    pub(crate) peer: transfer::PeerHandle,
}

#[pymethods]
impl Agent {
    /// Starts an agent that peers know by `name`. `tcp` is the "ip:port" to listen on, port 0 for any.
    #[new]
    #[pyo3(signature = (name, *, shm = true, tcp = None))]
    fn new(py: Python<'_>, name: &str, shm: bool, tcp: Option<&str>) -> PyResult<Self> {
        let parse = |text: &str| {
            text.parse::<SocketAddr>()
                .map_err(|_| Error::invalid("tcp", format!("{text:?}"), "ip:port"))
        };
        let tcp = tcp.map(parse).transpose().map_err(to_python)?;
        let builder = transfer::Agent::builder(name).shm(shm).tcp(tcp);
        let agent = py.detach(|| builder.build()).map_err(to_python)?;
        Ok(Self {
            life: Life::begin(),
            agent,
        })
    }

    /// How peers know it.
    #[getter]
    fn name(&self) -> &str {
        self.agent.name()
    }

    /// Registers the memory of an object with a contiguous buffer, which is kept alive until the region is deregistered.
    /// `readable` and `writable` say what peers may do.
    #[pyo3(signature = (memory, *, readable = true, writable = false))]
    fn register(
        &self,
        memory: &Bound<'_, PyAny>,
        readable: bool,
        writable: bool,
    ) -> PyResult<Region> {
        let _call = self.life.enter()?;
        let options = RegionOptions {
            remote_read: readable,
            remote_write: writable,
        };
        Region::of_object(self.life.clone(), &self.agent, memory, options)
    }

    /// Allocates zeroed memory that peers on this host can map, and registers it.
    #[pyo3(signature = (len, *, readable = true, writable = false))]
    fn shared_memory(&self, len: u64, readable: bool, writable: bool) -> PyResult<Region> {
        let _call = self.life.enter()?;
        let options = RegionOptions {
            remote_read: readable,
            remote_write: writable,
        };
        Region::shared(self.life.clone(), &self.agent, len, options).map_err(to_python)
    }

    /// What peers need to reach this agent and the regions that it exports now, keys included.
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let _call = self.life.enter()?;
        Ok(PyBytes::new(py, &self.agent.metadata()))
    }

    /// Learns of a peer from its metadata, or what is new about one.
    fn load_peer(&self, metadata: &[u8]) -> PyResult<Peer> {
        let _call = self.life.enter()?;
        let peer = self.agent.load_peer(metadata).map_err(to_python)?;
        Ok(Peer {
            life: self.life.clone(),
            agent: self.agent.clone(),
            peer,
        })
    }

    /// Starts to move bytes from `remote` ranges into `local` ones, which pair in order.
    #[pyo3(signature = (local, peer, remote, *, notification = None, deadline = 30.0))]
    fn read(
        &self,
        py: Python<'_>,
        local: Vec<Local<'_>>,
        peer: Option<&Bound<'_, Peer>>,
        remote: Vec<Remote<'_>>,
        notification: Option<&[u8]>,
        deadline: f64,
    ) -> PyResult<Transfer> {
        let wanted = Wanted {
            operation: Operation::Read,
            local,
            remote,
            notification,
            deadline,
        };
        self.start(py, peer, wanted)
    }

    /// Starts to move bytes from `local` ranges into `remote` ones, which pair in order.
    #[pyo3(signature = (local, peer, remote, *, notification = None, deadline = 30.0))]
    fn write(
        &self,
        py: Python<'_>,
        local: Vec<Local<'_>>,
        peer: Option<&Bound<'_, Peer>>,
        remote: Vec<Remote<'_>>,
        notification: Option<&[u8]>,
        deadline: f64,
    ) -> PyResult<Transfer> {
        let wanted = Wanted {
            operation: Operation::Write,
            local,
            remote,
            notification,
            deadline,
        };
        self.start(py, peer, wanted)
    }

    /// Sends a message and waits, at most `timeout` seconds, until the peer's agent has taken it.
    #[pyo3(signature = (peer, message, timeout = 30.0))]
    fn notify(
        &self,
        py: Python<'_>,
        peer: &Bound<'_, Peer>,
        message: &[u8],
        timeout: f64,
    ) -> PyResult<()> {
        let _call = self.life.enter()?;
        let peer = self.own(peer)?;
        let timeout = parse_timeout(timeout)?;
        let message = Bytes::copy_from_slice(message);
        let request = py
            .detach(|| self.agent.notify(peer, message))
            .map_err(to_python)?;
        crate::transfer::wait(py, &request, timeout)
    }

    /// Takes the messages that wait, oldest first, as (peer name, bytes); waits for one at most `timeout` seconds.
    #[pyo3(signature = (timeout = 0.0))]
    fn notifications<'py>(
        &self,
        py: Python<'py>,
        timeout: f64,
    ) -> PyResult<Vec<(String, Bound<'py, PyBytes>)>> {
        let _call = self.life.enter()?;
        let taken = patiently(py, parse_timeout(timeout)?, |slice| {
            let taken = self.agent.wait_notifications(slice);
            (!taken.is_empty()).then_some(taken)
        })?;
        let notifications = taken.unwrap_or_default().into_iter();
        Ok(notifications
            .map(|n| (n.peer.to_string(), PyBytes::new(py, &n.bytes)))
            .collect())
    }

    fn __repr__(&self) -> String {
        format!("<kvfabric.Agent {:?}>", self.agent.name())
    }
}

impl Agent {
    fn own<'a>(&self, peer: &'a Bound<'_, Peer>) -> PyResult<&'a transfer::PeerHandle> {
        let peer = peer.get();
        if Arc::ptr_eq(&self.life, &peer.life) {
            return Ok(&peer.peer);
        }
        let text = format!("peer {:?} was loaded by another agent", peer.peer.name());
        Err(to_python(Error::new(ErrorKind::Invalid, text)))
    }

    fn start(
        &self,
        py: Python<'_>,
        peer: Option<&Bound<'_, Peer>>,
        wanted: Wanted<'_>,
    ) -> PyResult<Transfer> {
        let _call = self.life.enter()?;
        let peer = peer.map(|peer| self.own(peer)).transpose()?;
        Transfer::start(py, &self.life, &self.agent, peer, wanted)
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
    fn regions(&self) -> std::collections::BTreeMap<u64, u64> {
        self.peer
            .regions()
            .into_iter()
            .map(|(id, bytes)| (id.0, bytes))
            .collect()
    }

    /// The backend that bytes to it go through, such as "shm"; None if it cannot be reached. Connects if need be.
    #[getter]
    fn path(&self, py: Python<'_>) -> PyResult<Option<&'static str>> {
        let _call = self.life.enter()?;
        Ok(py.detach(|| self.agent.path_to(&self.peer)).backend)
    }

    /// Why that path was taken, and what kept better ones from being used, as a sentence.
    fn explain_path(&self, py: Python<'_>) -> PyResult<String> {
        let _call = self.life.enter()?;
        let report = py.detach(|| self.agent.path_to(&self.peer));
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
        let _call = self.life.enter()?;
        py.detach(|| self.agent.forget_peer(&self.peer));
        Ok(())
    }

    fn __repr__(&self) -> String {
        format!("<kvfabric.Peer {:?}>", self.peer.name())
    }
}
