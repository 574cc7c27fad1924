//! Nodes: their tiers, their prefixes and pages.

use std::mem::ManuallyDrop;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvfabric::names::Names;
use kvfabric::transfer::DeviceMemory;
use kvfabric::{AttachedNode, Error, ErrorKind, Namespace, PinId, Segment};
use pyo3::prelude::*;
use pyo3::types::PyMapping;

use crate::agent::Agent;
use crate::blocks::{Pages, Prefix};
use crate::buffer::integers;
use crate::core::Core;
use crate::device::Lent;
use crate::errors::to_python;
use crate::hints::located;
use crate::life::{enter, parse_timeout, patiently};
use crate::names::adapter;
use crate::operation::{Memory, Operation};
use crate::region::{Held, Region};
use crate::{reports, settings};

/// Added to the deadline of a shutdown, for its answer to arrive.
const SHUTDOWN_MARGIN: Duration = Duration::from_secs(5);

/// How long one round of waiting for an answer is that has no deadline of its caller's; there is another one after it.
const ROUND: Duration = Duration::from_secs(1);

/// One pod's tiers, fabric and connection to the index. Safe to use from any thread.
#[pyclass(frozen, module = "kvfabric")]
pub(crate) struct Node {
    core: Arc<Core>,
}

/// A store or fetch, checked.
struct Run<'a> {
    prefix: &'a Prefix,
    pages: &'a Pages,
    blocks: Vec<u32>,
    deadline: Duration,
}

impl Node {
    fn run<'a>(
        &self,
        prefix: &'a Bound<'_, Prefix>,
        pages: &'a Bound<'_, Pages>,
        blocks: &Bound<'_, PyAny>,
        deadline: f64,
    ) -> PyResult<Run<'a>> {
        let (prefix, pages) = (self.own(prefix)?, pages.get());
        self.core.check("pages", &pages.core).map_err(to_python)?;
        Ok(Run {
            prefix,
            pages,
            blocks: integers(blocks, "blocks")?,
            deadline: parse_timeout(deadline)?,
        })
    }

    /// Begins to copy blocks out of the engine's memory, into the HBM tier or into the others.
    fn begin_store(
        &self,
        py: Python<'_>,
        run: &Run<'_>,
        first: usize,
        is_hbm: bool,
    ) -> PyResult<Operation> {
        let operation = py.detach(|| {
            let prefix = run.prefix.lock();
            let (node, pages) = (&self.core.node, &run.pages.pages);
            match is_hbm {
                true => node.store_hbm(&prefix, first, pages, &run.blocks, run.deadline),
                false => node.store(&prefix, first, pages, &run.blocks, run.deadline),
            }
        });
        Ok(Operation::new(
            self.core.life(),
            operation.map_err(to_python)?,
            Memory::of(&run.pages.regions),
            reports::store,
        ))
    }

    /// A prefix that is this node's own.
    fn own<'a>(&self, prefix: &'a Bound<'_, Prefix>) -> PyResult<&'a Prefix> {
        let prefix = prefix.get();
        self.core
            .check("blocks of the prefix", &prefix.core)
            .map_err(to_python)?;
        Ok(prefix)
    }
}

#[pymethods]
impl Node {
    /// Opens everything: the agent, the tiers (with what the disk still holds), the peer service and the registration with
    /// the index. `config` is a nested mapping, or the path of a TOML file; `overrides` go over it, by dotted key.
    #[new]
    #[pyo3(signature = (config, *, overrides = None))]
    fn new(
        py: Python<'_>,
        config: &Bound<'_, PyAny>,
        overrides: Option<&Bound<'_, PyMapping>>,
    ) -> PyResult<Self> {
        let config = settings::read(config, overrides)?;
        let node = py
            .detach(|| AttachedNode::open(config))
            .map_err(to_python)?;
        Ok(Self {
            core: Core::of(node),
        })
    }

    /// The name by which routers and peers know this pod.
    #[getter]
    fn pod(&self) -> &str {
        self.core.node.node().pod().as_str()
    }

    /// The fabric: where an engine registers its memory.
    #[getter]
    fn agent(&self) -> Agent {
        Agent::of(self.core.fabric.clone())
    }

    /// The "ip:port" at which peers ask; None without a peer service.
    #[getter]
    fn peer_address(&self) -> Option<String> {
        let address = self.core.node.node().peer_address()?;
        Some(address.to_string())
    }

    /// The "ip:port" at which Prometheus scrapes; None without.
    #[getter]
    fn metrics_address(&self) -> Option<String> {
        let address = self.core.node.node().metrics_address()?;
        Some(address.to_string())
    }

    /// Describes an engine's pool of `blocks` blocks: its segments, each (region, offset, stride, length) for the bytes
    /// [offset + b * stride, + length) of block number b.
    fn pages(
        &self,
        segments: Vec<(Bound<'_, Region>, u64, u64, u64)>,
        blocks: u32,
    ) -> PyResult<Pages> {
        let _call = enter(self.core.life())?;
        let mut regions: Vec<Arc<Held>> = Vec::new();
        let mut listed = Vec::with_capacity(segments.len());
        for (position, (region, offset, stride, len)) in segments.iter().enumerate() {
            let held = &region.get().held;
            if !held.is_of(&self.core.fabric) {
                let text = format!("segment {position}: the region is of another agent");
                return Err(to_python(Error::new(ErrorKind::Invalid, text)));
            }
            // A fetch writes to all of them.
            held.check_writable().map_err(to_python)?;
            let id = held.region.id();
            if regions.iter().all(|known| known.region.id() != id) {
                regions.push(held.clone());
            }
            listed.push(Segment {
                region: id,
                offset: *offset,
                stride: *stride,
                len: *len,
            });
        }
        let pages = self.core.node.node().pages(listed, blocks);
        Ok(Pages {
            core: self.core.clone(),
            pages: pages.map_err(to_python)?,
            regions,
        })
    }

    /// An empty sequence of blocks, to be extended by tokens.
    #[pyo3(signature = (*, lora = "", cache_salt = ""))]
    fn prefix(&self, lora: &str, cache_salt: &str) -> PyResult<Prefix> {
        let _call = enter(self.core.life())?;
        let namespace = Namespace { lora, cache_salt };
        let prefix = self.core.node.node().prefix(&namespace);
        Ok(Prefix {
            core: self.core.clone(),
            prefix: Mutex::new(prefix.map_err(to_python)?),
        })
    }

    /// The blocks that an engine names by its own hashes: what `NameChain.pack` made.
    #[pyo3(signature = (names, *, adapter_identity = None))]
    fn prefix_of(&self, names: &[u8], adapter_identity: Option<&[u8]>) -> PyResult<Prefix> {
        let _call = enter(self.core.life())?;
        let adapter = adapter(adapter_identity)?;
        let names = Names::parse(names).map_err(to_python)?;
        let prefix = self.core.node.node().prefix_of(&names, adapter);
        Ok(Prefix {
            core: self.core.clone(),
            prefix: Mutex::new(prefix.map_err(to_python)?),
        })
    }

    /// Copies blocks out of the engine's memory into the tiers: `blocks` are numbers in `pages`, for the positions of `prefix`
    /// from `first` on. Their memory must stay as it is until the operation is done.
    #[pyo3(signature = (prefix, pages, blocks, *, first = 0, deadline = 30.0))]
    fn store(
        &self,
        py: Python<'_>,
        prefix: &Bound<'_, Prefix>,
        pages: &Bound<'_, Pages>,
        blocks: &Bound<'_, PyAny>,
        first: usize,
        deadline: f64,
    ) -> PyResult<Operation> {
        let _call = enter(self.core.life())?;
        let run = self.run(prefix, pages, blocks, deadline)?;
        self.begin_store(py, &run, first, false)
    }

    /// Brings blocks into the engine's memory, from wherever they are: `blocks` are numbers in `pages`, for the positions of
    /// `prefix` from `first` on. `holders` and `shared` are hints, counted from the first block of `prefix`; without any,
    /// the index is asked. The memory must not be used until the operation is done.
    #[pyo3(
        signature = (prefix, pages, blocks, *, first = 0, holders = Vec::new(), shared = Vec::new(), deadline = 5.0),
        text_signature = "($self, prefix, pages, blocks, *, first=0, holders=(), shared=(), deadline=5.0)",
    )]
    #[expect(
        clippy::too_many_arguments,
        reason = "Python passes the optional ones by name"
    )]
    fn fetch(
        &self,
        py: Python<'_>,
        prefix: &Bound<'_, Prefix>,
        pages: &Bound<'_, Pages>,
        blocks: &Bound<'_, PyAny>,
        first: usize,
        holders: Vec<(String, u32, Option<String>)>,
        shared: Vec<(u32, u32)>,
        deadline: f64,
    ) -> PyResult<Operation> {
        let _call = enter(self.core.life())?;
        let run = self.run(prefix, pages, blocks, deadline)?;
        let hints = located(holders, shared).map_err(to_python)?;
        let operation = py.detach(|| {
            let prefix = run.prefix.lock();
            let pages = &run.pages.pages;
            self.core
                .node
                .fetch(&prefix, first, pages, &run.blocks, hints, run.deadline)
        });
        let life = self.core.life().clone();
        let regions = run.pages.regions.clone();
        Ok(Operation::new(
            self.core.life(),
            operation.map_err(to_python)?,
            Memory::of(&run.pages.regions),
            move |py, fetched| reports::fetch(py, &life, fetched, Memory::of(&regions)),
        ))
    }

    /// Opens the HBM tier in memory of a GPU: an array there, or a number of bytes, which are allocated on `device`.
    #[pyo3(signature = (memory, *, device = None))]
    fn hbm_open(
        &self,
        py: Python<'_>,
        memory: &Bound<'_, PyAny>,
        device: Option<u32>,
    ) -> PyResult<()> {
        let _call = enter(self.core.life())?;
        let (memory, keep) = match memory.extract::<u64>() {
            Ok(bytes) => {
                let allocated = DeviceMemory::allocate(device.unwrap_or(0), bytes);
                (allocated.map_err(to_python)?, None)
            }
            Err(_) => {
                let lent = Lent::of_object(memory, device)?;
                let (memory, keep) = lent.into_memory().map_err(to_python)?;
                (memory, Some(ManuallyDrop::new(keep)))
            }
        };
        py.detach(|| self.core.node.open_hbm(memory))
            .map_err(to_python)?;
        *self.core.kept() = keep;
        Ok(())
    }

    /// Brings blocks of `prefix`, from position `first` on, up into the HBM tier, from wherever they are; `count` of them, or all.
    #[pyo3(signature = (prefix, *, first = 0, count = None, deadline = 5.0))]
    fn hbm_promote(
        &self,
        py: Python<'_>,
        prefix: &Bound<'_, Prefix>,
        first: usize,
        count: Option<usize>,
        deadline: f64,
    ) -> PyResult<Operation> {
        let _call = enter(self.core.life())?;
        let (prefix, deadline) = (self.own(prefix)?, parse_timeout(deadline)?);
        let operation = py.detach(|| {
            let prefix = prefix.lock();
            let count = count.unwrap_or(prefix.len().saturating_sub(first));
            self.core.node.promote(&prefix, first, count, deadline)
        });
        let operation = operation.map_err(to_python)?;
        let life = self.core.life();
        Ok(Operation::plain(life, operation, reports::promote))
    }

    /// As `store`, into the HBM tier, within the GPU.
    #[pyo3(signature = (prefix, pages, blocks, *, first = 0, deadline = 30.0))]
    fn hbm_store(
        &self,
        py: Python<'_>,
        prefix: &Bound<'_, Prefix>,
        pages: &Bound<'_, Pages>,
        blocks: &Bound<'_, PyAny>,
        first: usize,
        deadline: f64,
    ) -> PyResult<Operation> {
        let _call = enter(self.core.life())?;
        let run = self.run(prefix, pages, blocks, deadline)?;
        self.begin_store(py, &run, first, true)
    }

    /// Takes blocks of `prefix`, from position `first` on, out of the HBM tier, down into the others; `count` of them, or all.
    #[pyo3(signature = (prefix, *, first = 0, count = None, deadline = 30.0))]
    fn hbm_offload(
        &self,
        py: Python<'_>,
        prefix: &Bound<'_, Prefix>,
        first: usize,
        count: Option<usize>,
        deadline: f64,
    ) -> PyResult<Operation> {
        let _call = enter(self.core.life())?;
        let (prefix, deadline) = (self.own(prefix)?, parse_timeout(deadline)?);
        let operation = py.detach(|| {
            let prefix = prefix.lock();
            let count = count.unwrap_or(prefix.len().saturating_sub(first));
            self.core.node.offload(&prefix, first, count, deadline)
        });
        let operation = operation.map_err(to_python)?;
        Ok(Operation::plain(
            self.core.life(),
            operation,
            reports::store,
        ))
    }

    /// Ends the HBM tier: what is only there is lost, and the index is told. Memory that was lent is free then.
    #[pyo3(signature = (timeout = 30.0))]
    fn hbm_close(&self, py: Python<'_>, timeout: f64) -> PyResult<()> {
        let _call = enter(self.core.life())?;
        let timeout = parse_timeout(timeout)?;
        let operation = self.core.node.close_hbm(timeout);
        let ended = patiently(py, timeout + SHUTDOWN_MARGIN, |slice| {
            operation.wait(slice).map(|ended| ended.copied())
        })?;
        match ended {
            Some(ended) => ended.map_err(to_python)?,
            None => {
                let text = format!("the HBM tier did not end within {timeout:?}");
                return Err(to_python(Error::new(ErrorKind::Timeout, text)));
            }
        }
        let kept = self.core.kept().take();
        drop(kept.map(ManuallyDrop::into_inner));
        Ok(())
    }

    /// How many blocks from the first this node's own tiers hold.
    fn held(&self, py: Python<'_>, prefix: &Bound<'_, Prefix>) -> PyResult<Operation> {
        let _call = enter(self.core.life())?;
        let prefix = self.own(prefix)?;
        let operation = py.detach(|| self.core.node.held(&prefix.lock()));
        Ok(Operation::plain(self.core.life(), operation, reports::held))
    }

    /// How many blocks from the first could be had, and where: own tiers, shared objects and peers.
    #[pyo3(signature = (prefix, *, deadline = 0.5))]
    fn locate(
        &self,
        py: Python<'_>,
        prefix: &Bound<'_, Prefix>,
        deadline: f64,
    ) -> PyResult<Operation> {
        let _call = enter(self.core.life())?;
        let (prefix, deadline) = (self.own(prefix)?, parse_timeout(deadline)?);
        let operation = py.detach(|| self.core.node.locate(&prefix.lock(), deadline));
        let life = self.core.life();
        Ok(Operation::plain(life, operation, reports::reach))
    }

    /// Keeps blocks of this node, from position `first` of `prefix` on, in host memory until `unpin`, at most `ttl` seconds. `id`
    /// is the pin's number, below 2^64, for whoever must know it beforehand; else the node draws one.
    #[pyo3(signature = (prefix, *, first = 0, ttl = 30.0, id = None))]
    fn pin(
        &self,
        py: Python<'_>,
        prefix: &Bound<'_, Prefix>,
        first: usize,
        ttl: f64,
        id: Option<u64>,
    ) -> PyResult<Operation> {
        let _call = enter(self.core.life())?;
        let (prefix, ttl) = (self.own(prefix)?, parse_timeout(ttl)?);
        let operation = py.detach(|| {
            self.core
                .node
                .pin(&prefix.lock(), first, ttl, id.map(PinId))
        });
        let operation = operation.map_err(to_python)?;
        Ok(Operation::plain(self.core.life(), operation, reports::pin))
    }

    /// Lets go of what this node pinned, or the one whose peer service is `at`; nothing happens for a pin that is over.
    #[pyo3(signature = (pin, *, at = None, deadline = 2.0))]
    fn unpin(&self, pin: u64, at: Option<&str>, deadline: f64) -> PyResult<Operation> {
        let _call = enter(self.core.life())?;
        let deadline = parse_timeout(deadline)?;
        let operation = match at {
            Some(address) => self.core.node.unpin(address, PinId(pin), deadline),
            None => self.core.node.release(PinId(pin)),
        };
        let life = self.core.life();
        Ok(Operation::plain(life, operation, reports::nothing))
    }

    /// Removes the blocks of `prefix` from this node's own tiers, and tells the index. Shared objects stay, and so do blocks
    /// that somebody uses.
    fn remove(&self, py: Python<'_>, prefix: &Bound<'_, Prefix>) -> PyResult<Operation> {
        let _call = enter(self.core.life())?;
        let prefix = self.own(prefix)?;
        let operation = py.detach(|| self.core.node.remove(&prefix.lock()));
        let life = self.core.life();
        Ok(Operation::plain(life, operation, reports::removed))
    }

    /// Removes all blocks from this node's own tiers, as `remove` does.
    fn clear(&self) -> PyResult<Operation> {
        let _call = enter(self.core.life())?;
        let operation = self.core.node.clear();
        let life = self.core.life();
        Ok(Operation::plain(life, operation, reports::removed))
    }

    /// Waits until what is on its way to the disk and to the shared store is there.
    #[pyo3(signature = (deadline = 30.0))]
    fn flush(&self, deadline: f64) -> PyResult<Operation> {
        let _call = enter(self.core.life())?;
        let operation = self.core.node.flush(parse_timeout(deadline)?);
        let life = self.core.life();
        Ok(Operation::plain(life, operation, reports::nothing))
    }

    /// The tiers' counters and levels, by name; docs/metrics.md explains each.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let _call = enter(self.core.life())?;
        let operation = self.core.node.stats();
        loop {
            // The node answers, or its end does.
            let stats = patiently(py, ROUND, |slice| {
                operation.wait(slice).map(|stats| stats.cloned())
            })?;
            if let Some(stats) = stats {
                return reports::counters(py, &stats.map_err(to_python)?);
            }
        }
    }

    /// Stops leasing, withdraws what was announced, and writes down to the disk what only host memory has, as far as there is
    /// room and time. Everything asked afterwards fails with `CancelledError`; doing it twice is fine.
    #[pyo3(signature = (deadline = 10.0))]
    fn shutdown(&self, py: Python<'_>, deadline: f64) -> PyResult<()> {
        let _call = enter(self.core.life())?;
        let deadline = parse_timeout(deadline)?;
        let operation = self.core.node.shutdown(deadline);
        let ended = patiently(py, deadline + SHUTDOWN_MARGIN, |slice| {
            operation.wait(slice).map(|ended| ended.copied())
        })?;
        match ended {
            Some(Err(error)) if error.kind() == ErrorKind::Cancelled => Ok(()),
            Some(ended) => ended.map_err(to_python),
            None => {
                let text = format!("the node did not end within {deadline:?}");
                Err(to_python(Error::new(ErrorKind::Timeout, text)))
            }
        }
    }

    fn __repr__(&self) -> String {
        format!("<kvfabric.Node {:?}>", self.pod())
    }
}
