//! Memory of devices of peers on this machine. A process opens the other's memory once, and its own device copies.
//!
//! How a region is asked for, granted and taken back is `backend/unix`: a deregistered one counts as used until whoever has it open has
//! closed it, or is dead. The driver opens what one call has allocated by a name, and what was mapped in pieces by descriptors. A
//! process cannot open its own memory: its agents use it as it is.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use kvcache_core::{Error, ErrorKind, Result};

use super::moves::Far;
use super::task::Ending;
use super::{CudaBackend, NAME, memory_of};
use crate::agent::{AgentCore, RemoteRegion};
use crate::backend::copy::{Copier, Go, Place, Progress, Work};
use crate::backend::unix::{self, Access, Copying, Held, Link, Outcome, corrupt};
use crate::backend::{Fabric, Job, Operation, Refusal};
use crate::plan::Plan;
use crate::region::{MemoryKind, RegionCore, RegionId};
use crate::sys::cuda::DeviceMemory;

/// What agents of this process have granted to each other.
static NEIGHBOURS: Mutex<Option<HashMap<RegionId, Weak<DeviceMemory>>>> = Mutex::new(None);

/// The way through memory that several processes have open.
pub(super) struct CudaPeers {
    backend: Arc<CudaBackend>,
}

/// A region of a peer.
pub(super) struct PeerMemory {
    memory: Arc<DeviceMemory>,
    writable: bool,
}

/// Starts to hand out memory of devices, and to use that of others.
pub(super) fn fabric(agent: &AgentCore, backend: &Arc<CudaBackend>) -> Result<Arc<dyn Fabric>> {
    let peers = CudaPeers {
        backend: backend.clone(),
    };
    let copier = agent.copier().clone();
    unix::fabric(peers, agent.exports(), agent.reactor(), copier)
}

impl CudaPeers {
    /// Whether the process of this number is this one.
    fn is_here(&self, process: i32) -> bool {
        u32::try_from(process) == Ok(std::process::id()) && !self.backend.is_apart()
    }
}

/// The memory of a plan's remote side.
fn far(plan: &Plan, held: &[Arc<Held<CudaPeers>>]) -> Result<Vec<Far>> {
    let one = |held: &Arc<Held<CudaPeers>>| {
        let region = held.memory()?;
        if plan.operation == Operation::Write && !region.writable {
            let text = "the peer does not grant memory of its device for writing";
            return Err(Error::new(ErrorKind::Denied, text));
        }
        Ok(Far {
            memory: region.memory.clone(),
            keep: held.clone(),
        })
    };
    held.iter().map(one).collect()
}

impl Access for CudaPeers {
    const NAME: &'static str = NAME;

    const IN_PLACE: bool = true;

    const LOCAL: &'static [MemoryKind] = &[MemoryKind::Host, MemoryKind::ANY_DEVICE];

    const REMOTE: &'static [MemoryKind] = &[MemoryKind::ANY_DEVICE];

    const UNCHECKED: Option<&'static str> = Some("computes no checksums of device memory");

    type Peer = ();

    type Memory = PeerMemory;

    fn welcome(&self) -> Outcome {
        Outcome::Done
    }

    fn grant(&self, region: &RegionCore, process: i32) -> Result<(Outcome, Option<OwnedFd>)> {
        let Some(memory) = memory_of(region) else {
            let text = format!("region {} is no memory of a device", region.id());
            return Err(Error::new(ErrorKind::Unsupported, text));
        };
        let offer = match self.is_here(process) {
            true => {
                memory.check_there()?;
                let mut known = NEIGHBOURS.lock().unwrap_or_else(PoisonError::into_inner);
                let known = known.get_or_insert_default();
                known.retain(|_, memory| memory.strong_count() > 0);
                known.insert(region.id(), Arc::downgrade(memory));
                None
            }
            false => Some(memory.offer()?.clone()),
        };
        let granted = Outcome::Device {
            bytes: region.bytes(),
            writable: region.options().remote_write,
            offer,
        };
        Ok((granted, None))
    }

    fn grant_piece(&self, region: &RegionCore, number: u32) -> Result<(Outcome, Option<OwnedFd>)> {
        let Some(memory) = memory_of(region) else {
            let text = format!("region {} is no memory of a device", region.id());
            return Err(Error::new(ErrorKind::Unsupported, text));
        };
        let (file, bytes) = memory.piece(number)?;
        let writable = region.options().remote_write;
        Ok((Outcome::Granted { bytes, writable }, Some(file)))
    }

    fn meet(_link: &Link, welcome: Outcome) -> Result<()> {
        match welcome {
            Outcome::Done => Ok(()),
            _ => Err(corrupt("a greeting is answered by something else")),
        }
    }

    fn accept(
        &self,
        remote: &RemoteRegion,
        (outcome, _file): (Outcome, Option<OwnedFd>),
        piece: &mut dyn FnMut(u32) -> Result<(Outcome, Option<OwnedFd>)>,
    ) -> Result<PeerMemory> {
        let Outcome::Device {
            bytes,
            writable,
            offer,
        } = outcome
        else {
            return Err(corrupt("a map is answered without memory of a device"));
        };
        let place = || format!("memory of a device, region {}", remote.id);
        if bytes != remote.bytes {
            let text = format!("{bytes} bytes granted, {} exported", remote.bytes);
            return Err(Error::new(ErrorKind::Corrupt, text).at(place()));
        }
        let memory = match &offer {
            None => {
                let known = NEIGHBOURS.lock().unwrap_or_else(PoisonError::into_inner);
                let found = known.as_ref().and_then(|known| known.get(&remote.id));
                found
                    .and_then(Weak::upgrade)
                    .filter(|memory| memory.bytes() == bytes)
                    .ok_or_else(|| corrupt("memory of this process that it does not have"))
            }
            Some(offer) => {
                let mut next = |number| match piece(number)? {
                    (Outcome::Granted { bytes, .. }, Some(file)) => Ok((file, bytes)),
                    _ => Err(corrupt("a piece is answered without a descriptor")),
                };
                DeviceMemory::open(&self.backend.cuda, offer, bytes, &mut next).map(Arc::new)
            }
        };
        Ok(PeerMemory {
            memory: memory.map_err(|error| error.at(place()))?,
            writable,
        })
    }

    fn reaches(region: &RemoteRegion) -> Result<(), String> {
        if region.shareable {
            return Ok(());
        }
        Err(format!(
            "region {} cannot be opened by other processes (a pool of cudaMallocAsync, or pieces without descriptors)",
            region.id
        ))
    }

    fn copy(
        _peer: &(),
        plan: &Plan,
        _memory: &[Arc<Held<Self>>],
        _place: &mut Place,
        _go_on: &dyn Fn() -> Result<Go>,
    ) -> Result<Progress> {
        match plan.extents.is_empty() {
            true => Ok(Progress::Done),
            false => Err(Error::new(
                ErrorKind::Internal,
                "memory of a device goes to a thread that copies",
            )),
        }
    }

    fn make_ready(&self, plan: &Plan, memory: &[Arc<Held<Self>>]) -> Result<()> {
        match plan.extents.is_empty() {
            true => Ok(()),
            false => self.backend.make_ready(plan, &far(plan, memory)?),
        }
    }

    fn post(&self, copier: &Copier, job: Job, copying: Copying<Self>) -> Result<(), Refusal> {
        // A notification alone.
        if job.plan().extents.is_empty() {
            return copier.post(job, copying);
        }
        match far(job.plan(), copying.held()) {
            Ok(far) => self.backend.start_job(job, &far, Some(Box::new(copying))),
            Err(error) => Err(job.refuse(error)),
        }
    }

    fn let_go(&self, held: Arc<Held<Self>>) {
        // The driver may wait for the device before it closes memory.
        let lane = held
            .memory()
            .and_then(|region| self.backend.lane(region.memory.gpu()));
        match lane {
            Ok(lane) => lane.let_go(held),
            Err(_) => drop(held),
        }
    }

    fn detail(link: &Link) -> String {
        format!(
            "memory of devices opened from process {} of this host",
            link.pid()
        )
    }
}

impl Ending for Copying<CudaPeers> {
    fn check(&self) -> Result<()> {
        Copying::check(self)
    }

    fn end(mut self: Box<Self>, job: Job, outcome: Result<()>) {
        let outcome = outcome.and_then(|()| Copying::check(&self));
        Work::end(&mut *self, job, outcome);
    }
}
