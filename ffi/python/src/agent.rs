//! Agents.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kvfabric::life::Life;
use kvfabric::transfer::{self, FileOptions, Operation, RegionId, RequestOptions};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::agent_options::{AgentOptions, Tls, Verbs};
use crate::asked::{begin, once, options, parse_operation, positions, priority};
use crate::device::{Cuda, Lent};
use crate::errors::to_python;
use crate::fabric::Fabric;
use crate::life::{answered, enter, parse_timeout, patiently};
use crate::peer::Peer;
use crate::place::{self, ObjectStore};
use crate::prepared::{Prepared, Ranges};
use crate::region::{Promise, Region};
use crate::transfer::{Transfer, Wanted, wait_alone};

/// Moves bytes between registered memory of this process and its peers. Safe to use from any thread.
#[pyclass(frozen, module = "kvfabric")]
pub(crate) struct Agent {
    fabric: Arc<Fabric>,
}

impl Agent {
    /// The agent of something else, with which it shares its fate.
    pub(crate) fn of(fabric: Arc<Fabric>) -> Self {
        Self { fabric }
    }
}

#[pymethods]
impl Agent {
    /// Starts an agent that peers know by `name`. `tcp` is the "ip:port" to listen on, port 0 for any; `ucx` are settings of
    /// UCX, which is used if they are given.
    #[new]
    #[pyo3(signature = (name, *, shm = true, tcp = None, cma = None, ucx = None, tcp_advertise = None, allow_peers = None, tcp_congestion = None, prefer = None, copy_threads = None, memcpy = true, tcp_rails = None, tcp_connections = 1, tls = None, verbs = None, look = None, slow_after = Some(2.0), connect_within = 2.0, object_stores = None, cuda = None))]
    #[expect(clippy::too_many_arguments, reason = "named ones, in Python")]
    fn new(
        py: Python<'_>,
        name: &str,
        shm: bool,
        tcp: Option<&str>,
        cma: Option<bool>,
        ucx: Option<BTreeMap<String, String>>,
        tcp_advertise: Option<&str>,
        allow_peers: Option<Vec<String>>,
        tcp_congestion: Option<&str>,
        prefer: Option<Vec<String>>,
        copy_threads: Option<usize>,
        memcpy: bool,
        tcp_rails: Option<Vec<String>>,
        tcp_connections: usize,
        tls: Option<Tls>,
        verbs: Option<Verbs>,
        look: Option<f64>,
        slow_after: Option<f64>,
        connect_within: f64,
        object_stores: Option<BTreeMap<String, ObjectStore>>,
        cuda: Option<Cuda>,
    ) -> PyResult<Self> {
        let options = AgentOptions {
            shm,
            cma,
            memcpy,
            copy_threads,
            tcp,
            tcp_advertise,
            tcp_rails: tcp_rails.unwrap_or_default(),
            tcp_connections,
            tcp_congestion,
            tls,
            ucx,
            verbs,
            allow_peers,
            prefer: prefer.unwrap_or_default(),
            look,
            slow_after,
            connect_within,
            object_stores: object_stores.unwrap_or_default(),
            cuda,
        };
        let agent = options.start(py, name)?;
        Ok(Self::of(Fabric::new(Life::begin(), agent)))
    }

    /// How peers know it.
    #[getter]
    fn name(&self) -> &str {
        self.fabric.agent.name()
    }

    /// The "ip:port" that it listens on; None without TCP.
    #[getter]
    fn tcp_address(&self) -> PyResult<Option<String>> {
        let _call = enter(&self.fabric.life)?;
        let address = self.fabric.agent.tcp_address();
        Ok(address.map(|address| address.to_string()))
    }

    /// Registers the memory of an object with a contiguous buffer, or of a tensor on the CPU, which is kept alive until the
    /// region is deregistered. `readable` and `writable` say what peers may do.
    #[pyo3(signature = (memory, *, readable = true, writable = false))]
    fn register(
        &self,
        memory: &Bound<'_, PyAny>,
        readable: bool,
        writable: bool,
    ) -> PyResult<Region> {
        let _call = enter(&self.fabric.life)?;
        Region::of_object(&self.fabric, memory, options(readable, writable))
    }

    /// Registers `len` bytes at `address` of this process, which the caller promises to keep mapped, readable and writable
    /// until the region is deregistered; `keep` is kept alive until then.
    #[pyo3(signature = (address, len, *, readable = true, writable = false, keep = None))]
    fn register_address(
        &self,
        py: Python<'_>,
        address: usize,
        len: u64,
        readable: bool,
        writable: bool,
        keep: Option<Py<PyAny>>,
    ) -> PyResult<Region> {
        let _call = enter(&self.fabric.life)?;
        let promise = Promise::new(py, address, len, keep);
        let region = Region::promised(&self.fabric, promise, options(readable, writable));
        region.map_err(to_python)
    }

    /// As `register_address`, for memory that is registered piece by piece: what lies in a range that was registered in this
    /// way, with the same permissions, shares its region.
    #[pyo3(signature = (address, len, *, readable = true, writable = false, keep = None))]
    fn register_range(
        &self,
        py: Python<'_>,
        address: usize,
        len: u64,
        readable: bool,
        writable: bool,
        keep: Option<Py<PyAny>>,
    ) -> PyResult<Region> {
        let _call = enter(&self.fabric.life)?;
        let promise = Promise::new(py, address, len, keep);
        let region = Region::range(&self.fabric, promise, options(readable, writable));
        region.map_err(to_python)
    }

    /// As `register`, of memory of a GPU: its number is `device` for objects that do not tell it (`__cuda_array_interface__`).
    #[pyo3(signature = (memory, *, device = None, readable = true, writable = false))]
    fn register_device(
        &self,
        memory: &Bound<'_, PyAny>,
        device: Option<u32>,
        readable: bool,
        writable: bool,
    ) -> PyResult<Region> {
        let _call = enter(&self.fabric.life)?;
        let lent = Lent::of_object(memory, device)?;
        lent.register(&self.fabric, options(readable, writable))
    }

    /// As `register_address`, of the GPU with this number.
    #[pyo3(signature = (device, address, len, *, readable = true, writable = false, keep = None))]
    #[expect(clippy::too_many_arguments, reason = "named ones, in Python")]
    fn register_device_address(
        &self,
        py: Python<'_>,
        device: u32,
        address: u64,
        len: u64,
        readable: bool,
        writable: bool,
        keep: Option<Py<PyAny>>,
    ) -> PyResult<Region> {
        let _call = enter(&self.fabric.life)?;
        let lent = Lent::new(device, address, len, keep.unwrap_or_else(|| py.None()));
        lent.register(&self.fabric, options(readable, writable))
    }

    /// What a way is taken to cost in estimates until transfers have shown it.
    #[pyo3(signature = (backend, *, latency, bytes_per_second))]
    fn assume_cost(&self, backend: &str, latency: f64, bytes_per_second: u64) -> PyResult<()> {
        let _call = enter(&self.fabric.life)?;
        let cost = transfer::PathCost {
            latency: parse_timeout(latency)?,
            bytes_per_s: bytes_per_second,
        };
        let assumed = self.fabric.agent.assume_cost(backend, cost);
        assumed.map_err(to_python)
    }

    /// Allocates zeroed memory that peers on this host can map, and registers it.
    #[pyo3(signature = (len, *, readable = true, writable = false))]
    fn shared_memory(
        &self,
        py: Python<'_>,
        len: u64,
        readable: bool,
        writable: bool,
    ) -> PyResult<Region> {
        let _call = enter(&self.fabric.life)?;
        let options = options(readable, writable);
        py.detach(|| Region::shared(&self.fabric, len, options))
            .map_err(to_python)
    }

    /// Registers shared memory that someone else made: all of a memfd whose size is sealed. It is mapped anew; the descriptor
    /// may be closed afterwards.
    #[pyo3(signature = (fd, *, readable = true, writable = false))]
    fn register_file(
        &self,
        py: Python<'_>,
        fd: RawFd,
        readable: bool,
        writable: bool,
    ) -> PyResult<Region> {
        let _call = enter(&self.fabric.life)?;
        let options = options(readable, writable);
        py.detach(|| Region::of_file(&self.fabric, fd, options))
            .map_err(to_python)
    }

    /// Opens a file as a region, for the remote side of transfers without a peer. `len` is its length as a region, to which a
    /// shorter one is extended; its length now otherwise.
    #[pyo3(signature = (path, *, len = None, create = false, read_only = false, preallocate = false, direct = None))]
    #[expect(
        clippy::too_many_arguments,
        reason = "Python passes the optional ones by name"
    )]
    fn open_file(
        &self,
        py: Python<'_>,
        path: PathBuf,
        len: Option<u64>,
        create: bool,
        read_only: bool,
        preallocate: bool,
        direct: Option<bool>,
    ) -> PyResult<Region> {
        let _call = enter(&self.fabric.life)?;
        let options = FileOptions {
            create,
            len_bytes: len,
            preallocate,
            direct: place::direct(direct),
            read_only,
        };
        let opened = py.detach(|| self.fabric.agent.open_file(&path, &options));
        Ok(Region::place(&self.fabric, opened.map_err(to_python)?))
    }

    /// Starts what reads and writes files ("auto", "io_uring" or "threads"), unless a file was opened before; says how it talks
    /// to the system, and why.
    #[pyo3(signature = (engine = "auto"))]
    fn start_files(&self, py: Python<'_>, engine: &str) -> PyResult<String> {
        let _call = enter(&self.fabric.life)?;
        let mode = place::engine(engine)?;
        py.detach(|| self.fabric.agent.start_file_engine(mode))
            .map_err(to_python)
    }

    /// An object of one of the agent's stores as a region, for the remote side of transfers without a peer.
    #[pyo3(signature = (store, key, *, when_there = "replace"))]
    fn open_object(&self, store: &str, key: &str, when_there: &str) -> PyResult<Region> {
        let _call = enter(&self.fabric.life)?;
        let write = place::when_there(when_there)?;
        let object = self.fabric.agent.object_for(store, key, write);
        Ok(Region::place(&self.fabric, object.map_err(to_python)?))
    }

    /// Removes an object; that there is none is fine.
    #[pyo3(signature = (store, key, timeout = 30.0))]
    fn remove_object(&self, py: Python<'_>, store: &str, key: &str, timeout: f64) -> PyResult<()> {
        let _call = enter(&self.fabric.life)?;
        let timeout = parse_timeout(timeout)?;
        let removed = self.fabric.agent.object_delete(store, key);
        answered(py, timeout, removed.map_err(to_python)?)
    }

    /// What peers need to reach this agent and the regions that it exports now, keys included.
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let _call = enter(&self.fabric.life)?;
        Ok(PyBytes::new(py, &self.fabric.agent.metadata()))
    }

    /// The same of these regions alone, for a peer that is to learn of them; it keeps those that it knows.
    fn metadata_of<'py>(
        &self,
        py: Python<'py>,
        regions: Vec<Bound<'py, Region>>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let _call = enter(&self.fabric.life)?;
        let ids: Vec<RegionId> = regions
            .iter()
            .map(|region| region.get().held.region.id())
            .collect();
        let metadata = self.fabric.agent.metadata_of(&ids).map_err(to_python)?;
        Ok(PyBytes::new(py, &metadata))
    }

    /// Learns of a peer from its metadata, or what is new about one.
    fn load_peer(&self, metadata: &[u8]) -> PyResult<Peer> {
        let _call = enter(&self.fabric.life)?;
        let peer = self.fabric.agent.load_peer(metadata).map_err(to_python)?;
        Ok(Peer {
            fabric: self.fabric.clone(),
            peer,
        })
    }

    /// Checks ranges once, for any number of requests: of own regions, or of the peer's if one is given. A sequence of
    /// (region, offset, length), or rows of 64-bit integers: N×3, or N×5 with stride and count.
    #[pyo3(signature = (descriptors, peer = None))]
    fn prepare(
        &self,
        py: Python<'_>,
        descriptors: &Bound<'_, PyAny>,
        peer: Option<&Bound<'_, Peer>>,
    ) -> PyResult<Prepared> {
        let _call = enter(&self.fabric.life)?;
        let peer = peer.map(|peer| peer.get().of(&self.fabric)).transpose();
        let peer = peer.map_err(to_python)?;
        let ranges = Ranges::read(&self.fabric, peer, descriptors)?;
        py.detach(|| Prepared::of(&self.fabric, peer, &ranges))
            .map_err(to_python)
    }

    /// Makes a transfer of the ranges of both lists, or of those at the given positions, paired in order, without posting
    /// it: "read" moves bytes from `remote` to `local`, "write" the other way. `parts` says how many ranges each part has,
    /// which can be waited for by itself; what is in the `background` gives way to other transfers. With `checksum` what
    /// has arrived is compared with what was sent; `backends` are the ways that may be used.
    #[pyo3(signature = (operation, local, remote, *, local_positions = None, remote_positions = None, notification = None, deadline = 30.0, parts = None, background = false, checksum = false, backends = None))]
    #[expect(
        clippy::too_many_arguments,
        reason = "Python passes the optional ones by name"
    )]
    fn request(
        &self,
        py: Python<'_>,
        operation: &str,
        local: &Bound<'_, Prepared>,
        remote: &Bound<'_, Prepared>,
        local_positions: Option<&Bound<'_, PyAny>>,
        remote_positions: Option<&Bound<'_, PyAny>>,
        notification: Option<&[u8]>,
        deadline: f64,
        parts: Option<Vec<u32>>,
        background: bool,
        checksum: bool,
        backends: Option<Vec<String>>,
    ) -> PyResult<Transfer> {
        let _call = enter(&self.fabric.life)?;
        let (local, remote) = (local.get(), remote.get());
        let options = RequestOptions {
            positions: positions((local, local_positions), (remote, remote_positions))?,
            parts: parts.unwrap_or_default(),
            priority: priority(background),
            checksum,
            backends: backends.unwrap_or_default(),
            ..once(notification, deadline)?
        };
        let wanted = Wanted {
            operation: parse_operation(operation)?,
            local,
            remote,
            options,
        };
        py.detach(|| Transfer::make(&self.fabric, wanted))
            .map_err(to_python)
    }

    /// Limits how fast transfers move, in bytes a second, or no longer: those with a peer, if one is given, else those in the
    /// `background`, or all others.
    #[pyo3(signature = (bytes_per_second, *, background = false, peer = None))]
    fn set_rate(
        &self,
        bytes_per_second: Option<u64>,
        background: bool,
        peer: Option<&Bound<'_, Peer>>,
    ) -> PyResult<()> {
        let _call = enter(&self.fabric.life)?;
        let agent = &self.fabric.agent;
        let set = match peer {
            Some(peer) => agent.set_peer_rate(
                peer.get().of(&self.fabric).map_err(to_python)?,
                bytes_per_second,
            ),
            None => agent.set_rate(priority(background), bytes_per_second),
        };
        set.map_err(to_python)
    }

    /// Starts to move bytes from `remote` ranges into `local` ones, which pair in order.
    #[pyo3(signature = (local, peer, remote, *, notification = None, deadline = 30.0))]
    fn read(
        &self,
        py: Python<'_>,
        local: &Bound<'_, PyAny>,
        peer: Option<&Bound<'_, Peer>>,
        remote: &Bound<'_, PyAny>,
        notification: Option<&[u8]>,
        deadline: f64,
    ) -> PyResult<Transfer> {
        let _call = enter(&self.fabric.life)?;
        let options = once(notification, deadline)?;
        begin(
            py,
            &self.fabric,
            Operation::Read,
            local,
            peer,
            remote,
            options,
        )
    }

    /// Starts to move bytes from `local` ranges into `remote` ones, which pair in order.
    #[pyo3(signature = (local, peer, remote, *, notification = None, deadline = 30.0))]
    fn write(
        &self,
        py: Python<'_>,
        local: &Bound<'_, PyAny>,
        peer: Option<&Bound<'_, Peer>>,
        remote: &Bound<'_, PyAny>,
        notification: Option<&[u8]>,
        deadline: f64,
    ) -> PyResult<Transfer> {
        let _call = enter(&self.fabric.life)?;
        let options = once(notification, deadline)?;
        begin(
            py,
            &self.fabric,
            Operation::Write,
            local,
            peer,
            remote,
            options,
        )
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
        let _call = enter(&self.fabric.life)?;
        let peer = peer.get().of(&self.fabric).map_err(to_python)?;
        let timeout = parse_timeout(timeout)?;
        let message = Bytes::copy_from_slice(message);
        let request = py
            .detach(|| self.fabric.agent.notify(peer, message))
            .map_err(to_python)?;
        wait_alone(py, &request, timeout)
    }

    /// Takes the messages that wait, oldest first, as (peer name, bytes); waits for one at most `timeout` seconds.
    #[pyo3(signature = (timeout = 0.0))]
    fn notifications<'py>(
        &self,
        py: Python<'py>,
        timeout: f64,
    ) -> PyResult<Vec<(String, Bound<'py, PyBytes>)>> {
        let _call = enter(&self.fabric.life)?;
        let agent = &self.fabric.agent;
        let look = |slice: Duration| {
            let taken = agent.wait_notifications(slice);
            (!taken.is_empty()).then_some(taken)
        };
        let taken = patiently(py, parse_timeout(timeout)?, look)?;
        let notifications = taken.unwrap_or_default().into_iter();
        Ok(notifications
            .map(|n| (n.peer.to_string(), PyBytes::new(py, &n.bytes)))
            .collect())
    }

    /// A descriptor that is readable while a message waits; not to be read from or closed.
    fn notification_fileno(&self) -> PyResult<i32> {
        let _call = enter(&self.fabric.life)?;
        let descriptor = self.fabric.agent.notification_fd().map_err(to_python)?;
        Ok(descriptor.as_raw_fd())
    }

    fn __repr__(&self) -> String {
        format!("<kvfabric.Agent {:?}>", self.fabric.agent.name())
    }
}
