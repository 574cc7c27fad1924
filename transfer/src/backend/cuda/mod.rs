//! Memory of CUDA devices: copies between it and host memory, within devices and between them, and to and from those of peers on
//! this machine.
//!
//! A device has one thread of ours and six streams, in its primary context, which engines use, too: one for each direction, and
//! one more for what begins after an engine's stream. Bytes are copied by the device itself: from and to host memory that is pinned, or
//! through buffers that are. A job is settled when an event recorded behind its last copy is over, whatever became of it before.

mod compute;
mod fragments;
mod lane;
mod moves;
mod options;
mod peers;
mod pins;
mod staging;
mod task;
#[cfg(test)]
mod tests;
mod worker;

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};

use kvcache_core::{Error, ErrorKind, Result};

use super::{Backend, Capabilities, Job, Keeper, NOT_WANTED, Refusal};
use crate::agent::{Agent, AgentCore};
use crate::plan::Plan;
use crate::region::{External, MemoryKind, Region, RegionCore, RegionOptions};
use crate::sys::cuda::{Cuda, DeviceMemory, Gpu};
use crate::sys::cufile::Cufile;

pub use compute::{CudaKernels, NumberGroups, RegionAt};
use lane::Lane;
pub use options::{CudaOptions, Fragments, Storage};
use pins::Pins;

/// The name in reports and statistics.
const NAME: &str = "cuda";

/// Ways that also lead to other hosts, and go after this one.
const OTHER_HOSTS: [&str; 4] = ["staged", "verbs", "ucx", "tcp"];

/// How a device copies from or to another one's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DevicePath {
    /// The device that copies: the one whose memory is read.
    pub by: u32,
    /// The other one.
    pub other: u32,
    /// Whether it reaches the other one's memory by itself, over NVLink or PCI; otherwise the driver takes the bytes through host
    /// memory.
    pub is_peer_access: bool,
}

/// All devices that an agent uses.
pub(crate) struct CudaBackend {
    options: CudaOptions,
    capabilities: Capabilities,
    lanes: Mutex<HashMap<u32, Arc<Lane>>>,
    pins: Arc<CudaPins>,
    /// By which memory of peers is opened.
    cuda: Cuda,
    /// Agents of this process are treated as those of others.
    #[cfg(test)]
    apart: std::sync::atomic::AtomicBool,
}

/// The part that regions are withdrawn from.
#[derive(Default)]
struct CudaPins(Pins);

impl Keeper for CudaPins {
    fn withdraw(&self, region: &Arc<RegionCore>) {
        self.0.withdraw(region.id());
    }
}

impl CudaBackend {
    fn start(options: CudaOptions, cuda: &Cuda) -> Result<Self> {
        options.check()?;
        Ok(Self {
            options,
            capabilities: Capabilities {
                local: &[MemoryKind::Host, MemoryKind::ANY_DEVICE],
                remote: &[MemoryKind::Host, MemoryKind::ANY_DEVICE],
                notifications: false,
                checksums: false,
            },
            lanes: Mutex::default(),
            pins: Arc::default(),
            cuda: cuda.clone(),
            #[cfg(test)]
            apart: Default::default(),
        })
    }

    /// Whether memory of this process is opened as if it were another's, which no driver does.
    #[allow(clippy::unused_self, reason = "tests ask it")]
    fn is_apart(&self) -> bool {
        #[cfg(test)]
        return self.apart.load(std::sync::atomic::Ordering::Relaxed);
        #[cfg(not(test))]
        false
    }

    /// A device's thread, started when memory of the device is first registered.
    fn lane(&self, gpu: &Arc<Gpu>) -> Result<Arc<Lane>> {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lane) = lanes.get(&gpu.ordinal()) {
            return Ok(lane.clone());
        }
        let lane = Arc::new(Lane::start(gpu, &self.options)?);
        tracing::info!(
            device = gpu.ordinal(),
            batched_copies = lane.has_batch(),
            "a CUDA device is used"
        );
        lanes.insert(gpu.ordinal(), lane.clone());
        Ok(lane)
    }

    /// The one of an agent that was built with CUDA.
    pub(super) fn of(agent: &AgentCore) -> Result<Arc<Self>> {
        let started = agent.extension::<Started>(|| {
            let text = "the agent was built without CUDA: AgentBuilder::cuda";
            Err(Error::new(ErrorKind::Unsupported, text))
        })?;
        Ok(started.0.clone())
    }

    pub(super) fn options(&self) -> &CudaOptions {
        &self.options
    }

    /// Pins memory of ours for as long as it is not unpinned. Whether it is; it is copied once more otherwise.
    pub(super) fn pin(&self, gpu: &Arc<Gpu>, region: &Arc<RegionCore>) -> bool {
        self.pins.0.pin(gpu, region);
        self.pins.0.find(region.id()).is_some()
    }

    pub(super) fn unpin(&self, region: &RegionCore) {
        self.pins.0.withdraw(region.id());
    }
}

/// The device memory that a region is; none if it is something else.
pub(super) fn memory_of(region: &RegionCore) -> Option<&Arc<DeviceMemory>> {
    region.device()
}

/// Why a way that moves memory of devices does not take a plan; none if it does.
pub(super) fn refusal(plan: &Plan, name: &str) -> Option<String> {
    if !plan.wants(name) {
        return Some(NOT_WANTED.to_owned());
    }
    let checked = plan.is_checked() || plan.sums;
    checked.then(|| "computes no checksums of device memory".to_owned())
}

impl Backend for CudaBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn refusal(&self, plan: &Plan) -> Option<String> {
        refusal(plan, NAME)
    }

    fn prepare(&self, plan: &Plan) -> Result<()> {
        self.make_ready(plan, &[])
    }

    fn post(&self, job: Job) -> Result<(), Refusal> {
        self.start_job(job, &[], None)
    }

    fn has_streams(&self) -> bool {
        true
    }

    fn reap(&self) {
        let lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        lanes.values().for_each(|lane| lane.reap());
    }
}

/// Device memory as a region.
struct DeviceTarget {
    memory: Arc<DeviceMemory>,
    backend: Arc<CudaBackend>,
    /// Other processes can open it.
    is_shareable: bool,
}

impl External for DeviceTarget {
    fn kind(&self) -> MemoryKind {
        MemoryKind::Device {
            ordinal: self.memory.ordinal(),
        }
    }

    fn bytes(&self) -> u64 {
        self.memory.bytes()
    }

    fn is_shareable(&self) -> bool {
        self.is_shareable
    }

    fn backend(&self) -> Arc<dyn Backend> {
        self.backend.clone()
    }

    fn device(&self) -> Option<&Arc<DeviceMemory>> {
        Some(&self.memory)
    }
}

impl Agent {
    /// Has this agent use CUDA, by this driver, before it knows peers.
    pub(crate) fn start_cuda(&self, options: CudaOptions, cuda: &Cuda) -> Result<()> {
        options.check()?;
        if let (true, Some(threads)) = (
            options.storage != Storage::Staged,
            NonZeroU32::new(options.storage_threads),
        ) {
            // Opened when a request could use it.
            Cufile::library()?;
            self.start_gds(options.storage, threads, None)?;
        }
        let started = self.core().extension(|| {
            let peers = options.peers;
            let backend = Arc::new(CudaBackend::start(options, cuda)?);
            let exports = self.core().exports();
            let pins: Arc<dyn Keeper> = backend.pins.clone();
            exports.add_keeper(&pins);
            if peers {
                exports.add_fabric_before(peers::fabric(self.core(), &backend)?, &OTHER_HOSTS);
            }
            // The last of all ways, and there with the first of them that moves memory of devices.
            exports.add_fabric(super::staged::fabric(self.core()));
            Ok(Started(backend))
        });
        started.map(drop)
    }

    /// Between which devices requests of this agent have copied, and how: by the devices themselves, or through host memory because
    /// they do not reach each other's. Only pairs that were asked for; empty without CUDA.
    pub fn device_paths(&self) -> Vec<DevicePath> {
        let started = self
            .core()
            .extension::<Started>(|| Err(Error::new(ErrorKind::Unsupported, "no CUDA")));
        let Ok(started) = started else {
            return Vec::new();
        };
        let backend = &started.0;
        let lanes = backend.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut paths: Vec<DevicePath> = lanes
            .values()
            .flat_map(|lane| {
                let by = lane.gpu().ordinal();
                let known = lane.gpu().known_reach().into_iter();
                known.map(move |(other, is_peer_access)| DevicePath {
                    by,
                    other,
                    is_peer_access,
                })
            })
            .collect();
        paths.sort_unstable_by_key(|path| (path.by, path.other));
        paths
    }

    /// As [`Agent::register_device_with`], without telling peers of it.
    ///
    /// # Errors
    /// As [`Agent::register_device_with`].
    pub fn register_device(&self, memory: DeviceMemory) -> Result<Region> {
        self.register_device_with(memory, RegionOptions::default())
    }

    /// Registers memory of a device, for either side of requests. The agent must have been built with
    /// [`AgentBuilder::cuda`](crate::AgentBuilder::cuda). The options say what peers may do with it, as for host memory; which
    /// ways reach it is in [`Agent::path_to_region`] of the peer.
    ///
    /// A request copies between it and host memory of the agent, or within the device. It begins at once, unless it is
    /// posted after a point of a stream ([`Request::post_after`](crate::Request::post_after)): what computes the bytes must be done
    /// before, and nothing may use what it writes before it is done. Ranges of one request are copied in no order, and what lands where
    /// they overlap is unspecified.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for an agent without CUDA, [`ErrorKind::Busy`] when too many regions are registered,
    /// [`ErrorKind::Forked`] in a forked child; otherwise what the driver says.
    pub fn register_device_with(
        &self,
        memory: DeviceMemory,
        options: RegionOptions,
    ) -> Result<Region> {
        self.core().check()?;
        let backend = CudaBackend::of(self.core())?;
        backend.lane(memory.gpu())?;
        let is_exported = options.remote_read || options.remote_write;
        let target = DeviceTarget {
            is_shareable: is_exported && is_shareable(&memory),
            memory: Arc::new(memory),
            backend,
        };
        self.register_external_with(Arc::new(target), options)
    }
}

/// Whether other processes of this machine can open it; the reason is logged.
fn is_shareable(memory: &DeviceMemory) -> bool {
    let offered = memory.offer();
    if let Err(error) = &offered {
        let (device, bytes) = (memory.ordinal(), memory.bytes());
        tracing::info!(%error, device, bytes, "memory of a device is not for other processes");
    }
    offered.is_ok()
}

/// What an agent with CUDA has.
struct Started(Arc<CudaBackend>);

impl Drop for Started {
    fn drop(&mut self) {
        // Regions of devices may outlive the agent, and the backend with them.
        self.0.pins.0.clear();
    }
}
