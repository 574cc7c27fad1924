//! Our own transfers.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvcache_core::{Error, Result};
use kvfabric_transfer::{
    Agent, Descriptor, DeviceMemory, DirectMode, HostMemory, PeerHandle, Region, RegionId,
    RegionOptions, Request, RequestOptions, Side, TransferError,
};

use crate::report::OURS;

use super::contents::{self, POISON};
use super::devices::OnDevice;
use super::objects::Storage;
use super::plan::{BackendKind, Calls, Plan, Way};
use super::process::TargetAt;
use super::raw_tcp::in_parallel;
use super::remote::{Contents, Remote};
use super::subject::{Cpu, Subject};

mod sides;

use self::sides::check_path;
pub(super) use self::sides::path_to_another_process;

/// How long one request may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Requests of one block that are made beforehand; latency is measured over them in turns.
const SINGLES_MAX: u32 = 64;

/// The blocks of one post.
struct Batch {
    /// Pairs of (local, remote), for requests that are made each time.
    pairs: Vec<(Descriptor, Descriptor)>,
    /// The request that is posted again and again.
    request: Option<Request>,
}

/// Requests over one plan, made before they are timed unless their making is to be timed too.
pub(super) struct Fabric {
    work: Work,
    remote: Remote,
    /// The local side, if it is memory of a GPU.
    device: Option<OnDevice>,
    /// When the first request of the last move was done.
    first_done: Option<Duration>,
}

/// What the threads that post share.
struct Work {
    plan: Plan,
    local: Region,
    /// All blocks once.
    batches: Vec<Batch>,
    /// One block each.
    singles: Vec<Batch>,
    /// Kept, because requests over a dropped region are refused.
    places: Places,
    agent: Agent,
}

/// The remote side as descriptors name it.
enum Places {
    Own(Region),
    Peer(PeerHandle, RegionId),
    /// An object a request, and one for single blocks.
    Objects(Vec<Region>, Region),
}

impl Places {
    fn side(&self) -> Side<'_> {
        match self {
            Self::Peer(peer, _) => Side::Peer(peer),
            Self::Own(_) | Self::Objects(..) => Side::Local,
        }
    }
}

impl Fabric {
    /// Makes an agent, the other side and all requests.
    pub(super) fn open(
        plan: &Plan,
        at: &TargetAt,
        direct: DirectMode,
        storage: Storage<'_>,
    ) -> Result<Self> {
        let (agent, remote, places) = sides::open(plan, at, direct, storage)?;
        let backend = plan.shape.backend;
        if !backend.is_between_gpus() && backend != BackendKind::CudaWithin {
            return Self::over(plan, agent, remote, places);
        }
        let memory = DeviceMemory::allocate(storage.gpu, plan.shape.total_bytes)?;
        let source = OnDevice::new(&agent, memory)?;
        Self::within(plan, agent, source, remote, places)
    }

    /// Makes all requests from or to memory of a GPU.
    fn within(
        plan: &Plan,
        agent: Agent,
        device: OnDevice,
        remote: Remote,
        places: Places,
    ) -> Result<Self> {
        if plan.shape.way == Way::Write {
            device.write(plan, Contents::Source)?;
        }
        let mut own = Self::with_local(plan, agent, device.memory.clone(), remote, places)?;
        own.device = Some(device);
        Ok(own)
    }

    /// Makes all requests to memory that another process exposed, and that somebody else looks after.
    pub(super) fn towards(plan: &Plan, agent: Agent, region: u64, metadata: &[u8]) -> Result<Self> {
        let peer = agent.load_peer(metadata)?;
        let region = RegionId(region);
        check_path(&agent, (&peer, region), plan.shape.backend)?;
        let places = Places::Peer(peer, region);
        if plan.shape.backend.is_between_gpus() {
            let memory = DeviceMemory::allocate(0, plan.shape.total_bytes)?;
            let device = OnDevice::new(&agent, memory)?;
            return Self::within(plan, agent, device, Remote::Elsewhere, places);
        }
        Self::over(plan, agent, Remote::Elsewhere, places)
    }

    fn over(plan: &Plan, agent: Agent, remote: Remote, places: Places) -> Result<Self> {
        let shape = plan.shape;
        let memory = HostMemory::anonymous(shape.total_bytes)?;
        let local = agent.register(memory, RegionOptions::default())?;
        local.fill_at(0, local.bytes(), POISON)?;
        if shape.way == Way::Write {
            contents::write_source(plan, |offset, block| local.write_at(offset, block))?;
        }
        Self::with_local(plan, agent, local, remote, places)
    }

    /// Makes all requests from or to this memory, which is filled if it is the source.
    fn with_local(
        plan: &Plan,
        agent: Agent,
        local: Region,
        remote: Remote,
        places: Places,
    ) -> Result<Self> {
        let shape = plan.shape;
        remote.prepare(plan)?;
        let mut work = Work {
            plan: plan.clone(),
            local,
            batches: Vec::new(),
            singles: Vec::new(),
            places,
            agent,
        };
        let numbered = plan.requests.iter().enumerate();
        work.batches = numbered
            .map(|(number, positions)| work.batch(work.pairs(positions.clone(), number)))
            .collect::<Result<_>>()?;
        work.singles = (0..shape.blocks().min(SINGLES_MAX))
            .map(|position| work.batch(work.single(position)))
            .collect::<Result<_>>()?;
        Ok(Self {
            work,
            remote,
            device: None,
            first_done: None,
        })
    }
}

impl Work {
    /// The blocks at these positions of the plan, which are those of this request.
    fn pairs(&self, positions: Range<u32>, request: usize) -> Vec<(Descriptor, Descriptor)> {
        let len = self.plan.shape.block_bytes;
        let first = positions.start;
        let pair = |at: u32| {
            let own = self.plan.offset(self.plan.local[at as usize]);
            let offset = self.plan.offset(self.plan.remote[at as usize]);
            let other = match &self.places {
                Places::Own(region) => region.descriptor(offset, len),
                Places::Peer(_, region) => Descriptor {
                    region: *region,
                    offset,
                    len,
                },
                Places::Objects(objects, _) => {
                    objects[request].descriptor(offset - self.plan.offset(first), len)
                }
            };
            (self.local.descriptor(own, len), other)
        };
        positions.map(pair).collect()
    }

    fn single(&self, position: u32) -> Vec<(Descriptor, Descriptor)> {
        let request = self
            .plan
            .requests
            .iter()
            .position(|positions| positions.contains(&position));
        let len = self.plan.shape.block_bytes;
        match (&self.places, self.plan.shape.way) {
            // What is asked of one block must not cut the object that all others are in.
            (Places::Objects(_, single), Way::Write) => {
                let own = self.plan.offset(self.plan.local[position as usize]);
                vec![(self.local.descriptor(own, len), single.descriptor(0, len))]
            }
            (Places::Objects(objects, _), Way::Read) => {
                let request = request.unwrap_or_default();
                let own = self.plan.offset(self.plan.local[position as usize]);
                let first = self.plan.requests[request].start;
                let inner = self.plan.offset(position - first);
                let other = objects[request].descriptor(inner, len);
                vec![(self.local.descriptor(own, len), other)]
            }
            _ => self.pairs(position..position + 1, request.unwrap_or_default()),
        }
    }

    fn batch(&self, pairs: Vec<(Descriptor, Descriptor)>) -> Result<Batch> {
        if self.plan.shape.calls == Calls::OneShot {
            return Ok(Batch {
                pairs,
                request: None,
            });
        }
        let (own, other): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
        let own = self.agent.prepare(Side::Local, &own)?;
        let other = self.agent.prepare(self.places.side(), &other)?;
        let operation = self.plan.shape.way.operation();
        let request = self.agent.request(operation, &own, &other, options())?;
        Ok(Batch {
            pairs: Vec::new(),
            request: Some(request),
        })
    }

    fn post<'a>(&self, batch: &'a Batch) -> Result<Posted<'a>> {
        if let Some(request) = &batch.request {
            request.post()?;
            return Ok(Posted::Kept(request));
        }
        let operation = self.plan.shape.way.operation();
        let side = self.places.side();
        self.agent
            .transfer(operation, &batch.pairs, side, options())
            .map(Posted::Made)
    }

    /// Posts every n-th batch from `thread` on; the first thread says when its first one was done.
    fn move_share(&self, thread: usize, start: Instant) -> Result<(u64, Option<Duration>)> {
        let window = self.plan.shape.in_flight as usize;
        let mut in_flight: VecDeque<Posted<'_>> = VecDeque::with_capacity(window);
        let (mut moved, mut first_done) = (0, None);
        let mut settle = |posted: &Posted<'_>| -> Result<u64> {
            let bytes = posted.wait()?;
            if thread == 0 && first_done.is_none() {
                first_done = Some(start.elapsed());
            }
            Ok(bytes)
        };
        let threads = self.plan.shape.threads as usize;
        for batch in self.batches.iter().skip(thread).step_by(threads) {
            if in_flight.len() == window
                && let Some(oldest) = in_flight.pop_front()
            {
                moved += settle(&oldest)?;
            }
            in_flight.push_back(self.post(batch)?);
        }
        for posted in in_flight {
            moved += settle(&posted)?;
        }
        Ok((moved, first_done))
    }
}

/// A request in flight.
enum Posted<'a> {
    Kept(&'a Request),
    Made(Request),
}

impl Posted<'_> {
    fn wait(&self) -> Result<u64> {
        let request = match self {
            Self::Kept(request) => request,
            Self::Made(request) => request,
        };
        let failed = |error: TransferError| Error::new(error.kind(), error.to_string());
        Ok(request.wait(PATIENCE).map_err(failed)?.bytes)
    }
}

fn options() -> RequestOptions {
    RequestOptions {
        deadline: Some(PATIENCE),
        ..RequestOptions::default()
    }
}

impl Subject for Fabric {
    fn name(&self) -> &'static str {
        OURS
    }

    fn poison(&mut self) -> Result<()> {
        match self.work.plan.shape.way {
            Way::Read => match &self.device {
                Some(device) => device.write(&self.work.plan, Contents::Poison),
                None => {
                    let local = &self.work.local;
                    local.fill_at(0, local.bytes(), POISON)
                }
            },
            Way::Write => self.remote.poison(&self.work.plan),
        }
    }

    fn move_all(&mut self) -> Result<u64> {
        let first_done = Mutex::new(None);
        let start = Instant::now();
        let jobs = (0..self.work.plan.shape.threads as usize).map(|thread| {
            let (own, first_done) = (&self.work, &first_done);
            move || {
                let (moved, first) = own.move_share(thread, start)?;
                if first.is_some() {
                    *first_done.lock().unwrap_or_else(PoisonError::into_inner) = first;
                }
                Ok(moved)
            }
        });
        let moved = in_parallel(jobs.collect())?;
        self.first_done = first_done
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        Ok(moved)
    }

    fn move_block(&mut self, position: u32) -> Result<u64> {
        let singles = &self.work.singles;
        self.work
            .post(&singles[position as usize % singles.len()])?
            .wait()
    }

    fn verify(&mut self) -> Result<()> {
        match self.work.plan.shape.way {
            Way::Read => match &self.device {
                Some(device) => device.verify(&self.work.plan),
                None => contents::verify(&self.work.plan, |offset, block| {
                    self.work.local.read_at(offset, block)
                }),
            },
            Way::Write => self.remote.verify(&self.work.plan),
        }
    }

    fn cpu(&mut self) -> Result<Cpu> {
        Ok(match self.remote.cpu()? {
            Some(target) => Cpu::with(target),
            None => Cpu::own(),
        })
    }

    fn first_done(&self) -> Option<Duration> {
        self.first_done
    }
}

#[cfg(test)]
pub(super) use tests::{between_devices, over_device};

#[cfg(test)]
mod tests;
