//! Memory of CUDA devices: copies between it and host memory, and within a device.
//!
//! A device has one thread of ours and six streams, in its primary context, which engines use, too: one for each direction, and
//! one more for what begins after an engine's stream. Bytes are copied by the device itself: from and to host memory that is pinned, or
//! through buffers that are. A job is settled when an event recorded behind its last copy is over, whatever became of it before.

mod compute;
mod fragments;
mod lane;
mod options;
mod pins;
mod staging;
mod task;
#[cfg(test)]
mod tests;
mod worker;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use kvcache_core::{Error, ErrorKind, Result};

use super::{Backend, Capabilities, Job, Keeper, NOT_WANTED, Refusal};
use crate::agent::{Agent, AgentCore};
use crate::descriptor::Target;
use crate::plan::{Extent, Plan};
use crate::region::{External, MemoryKind, Region, RegionCore, RegionOptions};
use crate::sys::cuda::{DeviceMemory, Gpu, Place};

pub use compute::{CudaKernels, NumberGroups, RegionAt};
use lane::Lane;
pub use options::{CudaOptions, Fragments};
use pins::Pins;
use task::{Moves, Where};

/// The name in reports and statistics.
const NAME: &str = "cuda";

/// All devices that an agent uses.
pub(crate) struct CudaBackend {
    options: CudaOptions,
    capabilities: Capabilities,
    lanes: Mutex<HashMap<u32, Arc<Lane>>>,
    pins: Arc<CudaPins>,
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
    fn start(options: CudaOptions) -> Result<Self> {
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
        })
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

    /// Where a plan's regions are, and whose thread copies.
    fn moves(&self, plan: &Plan) -> Result<(Arc<Lane>, Moves)> {
        let targets = || plan.local.iter().chain(plan.remote.iter());
        let Some(first) = targets().find_map(device_memory) else {
            return Err(Error::new(
                ErrorKind::Internal,
                "a plan without device memory",
            ));
        };
        let lane = self.lane(first.gpu())?;
        let mut places = Vec::with_capacity(plan.local.len() + plan.remote.len() + 1);
        let mut wheres = Vec::with_capacity(places.capacity());
        for target in targets() {
            let region = own(target)?;
            let place = match device_memory(target) {
                Some(memory) => {
                    check_one_device(first, memory)?;
                    Some(Place::Device(memory.clone()))
                }
                None => {
                    region.mapping()?;
                    self.pins.0.find(region.id()).map(Place::Host)
                }
            };
            wheres.push(place.map_or(Where::Staged, |place| {
                places.push(place);
                Where::Place(places.len() - 1)
            }));
        }
        let staging = match wheres.iter().any(|place| matches!(place, Where::Staged)) {
            false => None,
            true => {
                let memory = lane.staging()?;
                places.push(Place::Host(memory.clone()));
                Some((places.len() - 1, memory))
            }
        };
        let remote = wheres.split_off(plan.local.len());
        let moves = Moves {
            places: places.into(),
            local: wheres,
            remote,
            staging,
        };
        Ok((lane, moves))
    }
}

/// A region of this agent.
fn own(target: &Target) -> Result<&Arc<RegionCore>> {
    match target {
        Target::Local(region) => Ok(region),
        Target::Remote(region) => Err(Error::new(
            ErrorKind::Unsupported,
            format!("cuda reaches no peers: region {} is one's", region.id),
        )),
    }
}

/// The device memory that a target is; none if it is something else.
fn device_memory(target: &Target) -> Option<&Arc<DeviceMemory>> {
    let Target::Local(region) = target else {
        return None;
    };
    memory_of(region)
}

/// The device memory that a region is; none if it is something else.
pub(super) fn memory_of(region: &RegionCore) -> Option<&Arc<DeviceMemory>> {
    region.device()
}

fn check_one_device(first: &DeviceMemory, other: &DeviceMemory) -> Result<()> {
    if first.ordinal() == other.ordinal() {
        return Ok(());
    }
    let (first, other) = (first.ordinal(), other.ordinal());
    let text = format!("cuda copies within one device, not between {first} and {other}");
    Err(Error::new(ErrorKind::Unsupported, text))
}

/// What no device copies, or not in a way that can be told.
fn check_extent(plan: &Plan, extent: &Extent) -> Result<()> {
    let (local, remote) = (
        &plan.local[extent.local as usize],
        &plan.remote[extent.remote as usize],
    );
    match (device_memory(local), device_memory(remote)) {
        (None, None) => {
            let text = "a request to a device that also copies between host memories: ask for those by another one";
            Err(Error::new(ErrorKind::Unsupported, text))
        }
        (Some(one), Some(other)) => {
            let start = |memory: &DeviceMemory, offset: u64| memory.address() + offset;
            let (a, b) = (
                start(one, extent.local_offset),
                start(other, extent.remote_offset),
            );
            match a < b + extent.len && b < a + extent.len {
                false => Ok(()),
                true => {
                    let len = extent.len;
                    let text = format!(
                        "{len} bytes are copied over themselves, {} bytes on",
                        a.abs_diff(b)
                    );
                    Err(Error::new(ErrorKind::Invalid, text))
                }
            }
        }
        _ => Ok(()),
    }
}

impl Backend for CudaBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn refusal(&self, plan: &Plan) -> Option<String> {
        if !plan.wants(NAME) {
            return Some(NOT_WANTED.to_owned());
        }
        let checked = plan.is_checked() || plan.sums;
        checked.then(|| "computes no checksums of device memory".to_owned())
    }

    fn prepare(&self, plan: &Plan) -> Result<()> {
        let place = |number: usize| format!("extent {number}");
        for (number, extent) in plan.extents.iter().enumerate() {
            check_extent(plan, extent).map_err(|error| error.at(place(number)))?;
        }
        let mut gpu = None;
        for memory in plan
            .local
            .iter()
            .chain(plan.remote.iter())
            .filter_map(device_memory)
        {
            memory.check_there()?;
            gpu = Some(memory.gpu());
        }
        if let Some(gpu) = gpu.filter(|_| self.options.pin) {
            for target in plan.local.iter().chain(plan.remote.iter()) {
                let region = own(target)?;
                if region.host().is_some() {
                    self.pins.0.pin(gpu, region);
                }
            }
        }
        // What is missing is told now, and made.
        self.moves(plan).map(drop)
    }

    fn post(&self, job: Job) -> Result<(), Refusal> {
        match self.moves(job.plan()) {
            Ok((lane, moves)) => lane.post(job, moves),
            Err(error) => Err(job.refuse(error)),
        }
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

    fn backend(&self) -> Arc<dyn Backend> {
        self.backend.clone()
    }

    fn device(&self) -> Option<&Arc<DeviceMemory>> {
        Some(&self.memory)
    }
}

impl Agent {
    /// Has this agent use CUDA, of which there is some.
    pub(crate) fn start_cuda(&self, options: CudaOptions) -> Result<()> {
        let started = self.core().extension(|| {
            let backend = Arc::new(CudaBackend::start(options)?);
            let pins: Arc<dyn Keeper> = backend.pins.clone();
            self.core().exports().add_keeper(&pins);
            // The last of all ways, and there with the first of them that moves memory of devices.
            let staged = super::staged::fabric(self.core());
            self.core().exports().add_fabric(staged);
            Ok(Started(backend))
        });
        started.map(drop)
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
        let target = DeviceTarget {
            memory: Arc::new(memory),
            backend,
        };
        self.register_external_with(Arc::new(target), options)
    }
}

/// What an agent with CUDA has.
struct Started(Arc<CudaBackend>);

impl Drop for Started {
    fn drop(&mut self) {
        // Regions of devices may outlive the agent, and the backend with them.
        self.0.pins.0.clear();
    }
}
