//! Transfers in flight.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kvfabric::transfer::{
    self, Descriptor, Operation, PeerHandle, RegionId, Request, RequestOptions, Side, Status,
};
use kvfabric::{Error, ErrorKind, Result};
use pyo3::prelude::*;

use crate::errors::to_python;
use crate::life::{Life, parse_timeout, patiently};
use crate::region::Region;

/// A range of an own region: (region, offset, len).
pub(crate) type Local<'py> = (Bound<'py, Region>, u64, u64);

/// A range of the other side: (region or its number, offset, len).
pub(crate) type Remote<'py> = (Place<'py>, u64, u64);

/// A region of the other side.
#[derive(FromPyObject)]
pub(crate) enum Place<'py> {
    /// One of the same agent, when there is no peer.
    Own(Bound<'py, Region>),
    /// A peer's, by number.
    Peer(u64),
}

/// What a caller wants moved.
pub(crate) struct Wanted<'py> {
    pub(crate) operation: Operation,
    pub(crate) local: Vec<Local<'py>>,
    pub(crate) remote: Vec<Remote<'py>>,
    pub(crate) notification: Option<&'py [u8]>,
    pub(crate) deadline: f64,
}

/// Bytes on their way. Its regions are kept alive until it is finished, also when it is dropped before.
#[pyclass(frozen, module = "kvfabric")]
pub(crate) struct Transfer {
    life: Arc<Life>,
    /// A transfer keeps its agent alive, and the Python objects whose memory it uses.
    _agent: transfer::Agent,
    _regions: Vec<Py<Region>>,
    request: Request,
}

impl Transfer {
    /// Makes and posts it.
    pub(crate) fn start(
        py: Python<'_>,
        life: &Arc<Life>,
        agent: &transfer::Agent,
        peer: Option<&PeerHandle>,
        wanted: Wanted<'_>,
    ) -> PyResult<Self> {
        let deadline = Some(parse_timeout(wanted.deadline)?);
        let mut used = Used {
            life,
            regions: Vec::new(),
        };
        let operation = wanted.operation;
        let local = wanted.local.iter().map(|(region, offset, len)| {
            used.descriptor(region, operation == Operation::Read, *offset, *len)
        });
        let local: Vec<Descriptor> = local.collect::<Result<_>>().map_err(to_python)?;
        let remote = wanted
            .remote
            .iter()
            .map(|(place, offset, len)| match (place, peer) {
                (Place::Own(region), None) => {
                    used.descriptor(region, operation == Operation::Write, *offset, *len)
                }
                (Place::Peer(id), Some(_)) => Ok(Descriptor {
                    region: RegionId(*id),
                    offset: *offset,
                    len: *len,
                }),
                (Place::Own(_), Some(_)) => {
                    let text =
                        "a peer's region is named by its number, not by a Region of this agent";
                    Err(Error::new(ErrorKind::Invalid, text))
                }
                (Place::Peer(_), None) => {
                    let text = "without a peer the remote ranges name Regions of this agent";
                    Err(Error::new(ErrorKind::Invalid, text))
                }
            });
        let remote: Vec<Descriptor> = remote.collect::<Result<_>>().map_err(to_python)?;
        let notification = wanted.notification.map(Bytes::copy_from_slice);
        let options = RequestOptions {
            positions: None,
            notification,
            deadline,
        };
        let side = peer.map_or(Side::Local, Side::Peer);
        let post = || -> Result<Request> {
            let local = agent
                .prepare(Side::Local, &local)
                .map_err(|e| e.at("local"))?;
            let remote = agent.prepare(side, &remote).map_err(|e| e.at("remote"))?;
            let request = agent.request(operation, &local, &remote, options)?;
            request.post()?;
            Ok(request)
        };
        let request = py.detach(post).map_err(to_python)?;
        let regions = used.regions;
        Ok(Self {
            life: life.clone(),
            _agent: agent.clone(),
            _regions: regions,
            request,
        })
    }
}

/// The regions that a transfer uses, each once.
struct Used<'a> {
    life: &'a Arc<Life>,
    regions: Vec<Py<Region>>,
}

impl Used<'_> {
    fn descriptor(
        &mut self,
        region: &Bound<'_, Region>,
        is_target: bool,
        offset: u64,
        len: u64,
    ) -> Result<Descriptor> {
        let place = region.get();
        if !place.belongs_to(self.life) {
            let text = format!("region {} belongs to another agent", place.region.id());
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        if is_target {
            place.check_writable()?;
        }
        // Lists mostly stay in one region, so comparing with the last one keeps this short.
        if self.regions.last().is_none_or(|last| !last.is(region)) {
            self.regions.push(region.clone().unbind());
        }
        Ok(place.region.descriptor(offset, len))
    }
}

/// Waits for a request without the GIL; raises why it failed.
pub(crate) fn wait(py: Python<'_>, request: &Request, timeout: Duration) -> PyResult<()> {
    let finished = patiently(py, timeout, |slice| match request.wait(slice) {
        Err(failed) if failed.kind() == ErrorKind::Timeout && is_in_flight(request) => None,
        result => Some(result),
    })?;
    match finished {
        Some(result) => result.map(drop).map_err(to_python),
        None => {
            let text = format!("transfer not finished after {timeout:?}");
            Err(to_python(Error::new(ErrorKind::Timeout, text)))
        }
    }
}

fn is_in_flight(request: &Request) -> bool {
    matches!(request.poll(), Status::InFlight)
}

#[pymethods]
impl Transfer {
    /// Waits until it is finished, at most `timeout` seconds, and raises why it failed. `DeadlineError` also when
    /// `timeout` ran out, which does not end the transfer: `done()` tells the two apart.
    #[pyo3(signature = (timeout = 30.0))]
    fn wait(&self, py: Python<'_>, timeout: f64) -> PyResult<()> {
        let _call = self.life.enter()?;
        wait(py, &self.request, parse_timeout(timeout)?)
    }

    /// Whether it is finished, successfully or not.
    fn done(&self) -> PyResult<bool> {
        let _call = self.life.enter()?;
        Ok(!is_in_flight(&self.request))
    }

    /// Asks it to end: it fails with `CancelledError` now, unless it is finished.
    fn cancel(&self) -> PyResult<()> {
        let _call = self.life.enter()?;
        self.request.cancel();
        Ok(())
    }

    /// Whether its memory may be used again: not while work may still land, even after it has failed. Waits for that at
    /// most `timeout` seconds.
    #[pyo3(signature = (timeout = 0.0))]
    fn settled(&self, py: Python<'_>, timeout: f64) -> PyResult<bool> {
        let _call = self.life.enter()?;
        let drained = patiently(py, parse_timeout(timeout)?, |slice| {
            self.request.wait_drained(slice).then_some(())
        })?;
        Ok(drained.is_some())
    }

    fn __repr__(&self) -> String {
        format!("<kvfabric.Transfer of {} bytes>", self.request.bytes())
    }
}
