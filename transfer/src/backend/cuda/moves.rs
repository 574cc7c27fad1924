//! From a plan to a device's thread: where each side is, what is done before, and whose thread copies.

use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::lane::Lane;
use super::task::{Ending, Moves, Where};
use super::{CudaBackend, memory_of};
use crate::backend::{Job, Operation, Refusal};
use crate::descriptor::Target;
use crate::plan::{Extent, Plan};
use crate::region::RegionCore;
use crate::sys::cuda::{DeviceMemory, Keep, Place};

/// Memory of a peer that this process may use, and what it is kept by.
#[derive(Clone)]
pub(super) struct Far {
    pub(super) memory: Arc<DeviceMemory>,
    pub(super) keep: Keep,
}

/// One target of a plan.
#[derive(Clone, Copy)]
enum Spot<'a> {
    Device(&'a Arc<DeviceMemory>, Option<&'a Keep>),
    Host(&'a Arc<RegionCore>),
}

impl<'a> Spot<'a> {
    fn memory(self) -> Option<&'a Arc<DeviceMemory>> {
        match self {
            Self::Device(memory, _) => Some(memory),
            Self::Host(_) => None,
        }
    }
}

/// Both sides of a plan, in its order.
struct Spots<'a> {
    local: Vec<Spot<'a>>,
    remote: Vec<Spot<'a>>,
}

impl<'a> Spots<'a> {
    /// `far` is what the plan's remote side is, if that is a peer's.
    fn of(plan: &'a Plan, far: &'a [Far]) -> Result<Self> {
        let side = |targets: &'a [Target]| {
            let spot = |(position, target): (usize, &'a Target)| match target {
                Target::Local(region) => match memory_of(region) {
                    Some(memory) => Ok(Spot::Device(memory, None)),
                    None => region.mapping().map(|_| Spot::Host(region)),
                },
                Target::Remote(region) => match far.get(position) {
                    Some(far) => Ok(Spot::Device(&far.memory, Some(&far.keep))),
                    None => Err(Error::new(
                        ErrorKind::Internal,
                        format!("region {} of a peer is not open", region.id),
                    )),
                },
            };
            targets
                .iter()
                .enumerate()
                .map(spot)
                .collect::<Result<Vec<_>>>()
        };
        Ok(Self {
            local: side(&plan.local)?,
            remote: side(&plan.remote)?,
        })
    }

    fn all(&self) -> impl Iterator<Item = Spot<'a>> + '_ {
        self.local.iter().chain(&self.remote).copied()
    }

    /// The memory whose device copies: that which is read, if any of that is a device's. Writes to another device take less time than
    /// reads of it, because nothing has to come back.
    fn lead(&self, operation: Operation) -> Result<&'a Arc<DeviceMemory>> {
        let (from, to) = match operation {
            Operation::Read => (&self.remote, &self.local),
            Operation::Write => (&self.local, &self.remote),
        };
        let mut sides = from.iter().chain(to);
        sides
            .find_map(|spot| spot.memory())
            .ok_or_else(|| Error::new(ErrorKind::Internal, "a plan without device memory"))
    }

    /// What no device copies, or not in a way that can be told.
    fn check(&self, extent: &Extent) -> Result<()> {
        let one = self.local[extent.local as usize].memory();
        let other = self.remote[extent.remote as usize].memory();
        match (one, other) {
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
}

impl CudaBackend {
    /// Says what is wrong with a plan, and makes what is missing.
    pub(super) fn make_ready(&self, plan: &Plan, far: &[Far]) -> Result<()> {
        let spots = Spots::of(plan, far)?;
        let place = |number: usize| format!("extent {number}");
        for (number, extent) in plan.extents.iter().enumerate() {
            spots
                .check(extent)
                .map_err(|error| error.at(place(number)))?;
        }
        for memory in spots.all().filter_map(Spot::memory) {
            memory.check_there()?;
        }
        let lead = spots.lead(plan.operation)?;
        if self.options.pin {
            for spot in spots.all() {
                if let Spot::Host(region) = spot {
                    self.pins.0.pin(lead.gpu(), region);
                }
            }
        }
        self.moves(plan, far).map(drop)
    }

    /// Hands a job to the device's thread. `ending` is told what came of it, in place of the job's caller.
    pub(super) fn start_job(
        &self,
        job: Job,
        far: &[Far],
        ending: Option<Box<dyn Ending>>,
    ) -> Result<(), Refusal> {
        match self.moves(job.plan(), far) {
            Ok((lane, moves)) => lane.post(job, moves, ending),
            Err(error) => Err(job.refuse(error)),
        }
    }

    /// Where a plan's regions are, and whose thread copies.
    fn moves(&self, plan: &Plan, far: &[Far]) -> Result<(Arc<Lane>, Moves)> {
        let spots = Spots::of(plan, far)?;
        let lane = self.lane(spots.lead(plan.operation)?.gpu())?;
        let mut places = Vec::with_capacity(plan.local.len() + plan.remote.len() + 1);
        let mut wheres = Vec::with_capacity(places.capacity());
        for spot in spots.all() {
            let place = match spot {
                Spot::Device(memory, keep) => {
                    // From now on the device reaches the other's memory, if it can.
                    lane.gpu().reaches(memory.gpu());
                    Some(match keep {
                        Some(keep) => Place::Held(memory.clone(), keep.clone()),
                        None => Place::Device(memory.clone()),
                    })
                }
                Spot::Host(region) => self.pins.0.find(region.id()).map(Place::Host),
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
