//! Memory of GPUs and files, by cuFile (GPUDirect Storage): the drive moves bytes from and to a GPU, and no copy of them is in host
//! memory, where cuFile says so.
//!
//! cuFile moves bytes by calls that block, each on one of a bounded number of threads. A call that has returned is over, so a request is
//! settled when its last call has; nothing is asked to end sooner, because nothing cuFile has for that says when it has ended.

mod calls;
mod pool;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use kvcache_core::{Error, ErrorKind, Result};

use super::cuda::{self, Storage};
use super::file::{FileTarget, target_of};
use super::{Backend, Capabilities, Job, Keeper, Operation, Refusal, direct};
use crate::agent::{Agent, AgentCore};
use crate::descriptor::Target;
use crate::plan::Plan;
use crate::region::{MemoryKind, RegionCore, RegionId};
use crate::sys::cufile::{Cufile, CufileFile, CufileMemory, StorageBounce};

use calls::{Places, Seat};
use pool::Pool;

/// The name in reports and statistics.
pub(crate) const NAME: &str = "gds";

/// What offsets, lengths and addresses are multiples of, at least: what is not would go through a buffer, and a write would read and
/// write again the bytes around it, which others may be writing.
const ALIGNMENT: u64 = 4096;

/// A file as cuFile knows it.
pub(crate) struct Stored {
    file: Arc<CufileFile>,
    /// What offsets and lengths are multiples of, in bytes.
    alignment: u64,
    /// Why it is not used any more: cuFile itself failed, and not the file system.
    failed: OnceLock<String>,
}

impl Stored {
    /// # Errors
    /// What cuFile says.
    pub(crate) fn new(cufile: &Arc<Cufile>, fd: OwnedFd, alignment: u64) -> Result<Self, String> {
        let file = CufileFile::new(cufile, fd).map_err(|code| code.words())?;
        Ok(Self {
            file: Arc::new(file),
            alignment: alignment.max(ALIGNMENT),
            failed: OnceLock::new(),
        })
    }

    /// It is not used any more.
    pub(crate) fn give_up(&self, reason: &str) {
        self.failed.get_or_init(|| reason.to_owned());
    }
}

/// Moves bytes by cuFile; ends with its last handle.
pub(crate) struct GdsBackend {
    capabilities: Capabilities,
    storage: Storage,
    /// cuFile, opened when a request could use it.
    cufile: OnceLock<Result<Arc<Cufile>, String>>,
    pool: Pool,
    memory: Arc<Memory>,
}

/// Memory of regions as cuFile knows it, until they are deregistered.
#[derive(Default)]
struct Memory(Mutex<HashMap<RegionId, Arc<CufileMemory>>>);

impl Memory {
    fn lock(&self) -> MutexGuard<'_, HashMap<RegionId, Arc<CufileMemory>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// # Errors
    /// [`ErrorKind::Unsupported`] for what is no memory of a GPU, [`ErrorKind::NotFound`] for a region that is being deregistered;
    /// otherwise what the driver says.
    fn get(&self, cufile: &Arc<Cufile>, region: &RegionCore) -> Result<Arc<CufileMemory>> {
        let Some(device) = region.device() else {
            let text = format!("does not move {} (region {})", region.kind(), region.id());
            return Err(Error::new(ErrorKind::Unsupported, text));
        };
        let mut known = self.lock();
        let place = match known.entry(region.id()) {
            Entry::Occupied(known) => return Ok(known.get().clone()),
            Entry::Vacant(place) => place,
        };
        // Whoever deregisters a region closes it first, and then asks here.
        if region.is_closed() {
            let text = format!("region {} is deregistered", region.id());
            return Err(Error::new(ErrorKind::NotFound, text));
        }
        device.check_there()?;
        // What a drive reads must be there when its request is posted.
        device.open_to_cards();
        let memory = Arc::new(CufileMemory::new(cufile, device)?);
        Ok(place.insert(memory).clone())
    }
}

impl Keeper for Memory {
    fn withdraw(&self, region: &Arc<RegionCore>) {
        let gone = self.lock().remove(&region.id());
        // Here, unless a request still has it.
        drop(gone);
    }
}

impl GdsBackend {
    fn start(storage: Storage, threads: NonZeroU32) -> Self {
        Self {
            capabilities: Capabilities {
                local: &[MemoryKind::ANY_DEVICE],
                remote: &[MemoryKind::File],
                notifications: false,
                checksums: false,
            },
            storage,
            cufile: OnceLock::new(),
            pool: Pool::new(threads),
            memory: Arc::default(),
        }
    }

    /// The one of an agent that was built with it.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for others.
    pub(crate) fn of(agent: &AgentCore) -> Result<Arc<Self>> {
        let started = agent.extension::<Started>(|| {
            let text = "gds: the agent was built without it: CudaOptions::storage";
            Err(Error::new(ErrorKind::Unsupported, text))
        })?;
        Ok(started.0.clone())
    }

    fn cufile(&self) -> Result<&Arc<Cufile>, String> {
        let open = || Cufile::get().map_err(|error| error.context().to_owned());
        let known = self.cufile.get_or_init(open);
        known.as_ref().map_err(Clone::clone)
    }

    /// cuFile, if it may be used as it is.
    fn usable(&self) -> Result<&Arc<Cufile>, String> {
        let cufile = self.cufile()?;
        let report = cufile.report();
        match (self.storage, report.bounce) {
            (Storage::Cufile, _) | (_, StorageBounce::Never) => Ok(cufile),
            (_, StorageBounce::Allowed) => Err(format!(
                "{report}: its compatibility mode is allowed, so that it may take bytes through host memory and not tell: set \
                 CUFILE_ALLOW_COMPAT_MODE=false, or allow_compat_mode in cufile.json"
            )),
            (_, StorageBounce::Always) => Err(format!(
                "{report}: it takes all bytes through host memory (compatibility mode)"
            )),
        }
    }

    /// Why it does not move a plan; none if it does. Opens cuFile, and makes files and memory known to it.
    pub(crate) fn declines(&self, plan: &Plan) -> Option<String> {
        self.places(plan)
            .err()
            .map(|error| error.context().to_owned())
    }

    /// Files and memory of a plan as cuFile knows them.
    ///
    /// # Errors
    /// Why it does not move the plan.
    fn places(&self, plan: &Plan) -> Result<Places> {
        let unsupported = |reason: String| Error::new(ErrorKind::Unsupported, reason);
        if let Some(reason) = self.refusal(plan) {
            return Err(unsupported(reason));
        }
        let files = plan.remote.iter().map(file);
        let files = files.collect::<Result<Vec<_>>>()?;
        let locals = plan.local.iter().map(local);
        let locals = locals.collect::<Result<Vec<_>>>()?;
        let cufile = self.usable().map_err(unsupported)?;
        let seats = files.iter().map(|file| seat(file, cufile));
        let seats = seats.collect::<Result<Vec<_>>>()?;
        calls::check(plan, &locals, &seats)?;
        let memory = locals.iter().map(|region| self.memory.get(cufile, region));
        Ok(Places {
            memory: memory.collect::<Result<Vec<_>>>()?,
            files: seats,
            call_bytes_max: cufile.call_bytes_max(),
        })
    }
}

fn file(target: &Target) -> Result<&FileTarget> {
    let found = match target {
        Target::Local(region) => target_of(region),
        Target::Remote(_) => None,
    };
    found.ok_or_else(|| Error::new(ErrorKind::Unsupported, "only reaches files of the agent"))
}

fn local(target: &Target) -> Result<&Arc<RegionCore>> {
    let reason = match target {
        Target::Local(region) if region.device().is_some() => return Ok(region),
        Target::Local(region) => {
            format!("does not move {} (region {})", region.kind(), region.id())
        }
        Target::Remote(region) => format!("region {} is a peer's", region.id),
    };
    Err(Error::new(ErrorKind::Unsupported, reason))
}

fn seat(file: &FileTarget, cufile: &Arc<Cufile>) -> Result<Seat> {
    let path = file.path().display();
    let refused = |reason: &str| Error::new(ErrorKind::Unsupported, format!("{path}: {reason}"));
    let stored = file.stored(cufile).map_err(|reason| refused(&reason))?;
    match stored.failed.get() {
        Some(reason) => Err(refused(reason)),
        None => Ok(Seat {
            file: stored.file.clone(),
            alignment: stored.alignment,
        }),
    }
}

impl Backend for GdsBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn refusal(&self, plan: &Plan) -> Option<String> {
        cuda::refusal(plan, NAME)
    }

    fn prepare(&self, plan: &Plan) -> Result<()> {
        if plan.operation == Operation::Write {
            for file in plan.remote.iter().map(file) {
                let file = file?;
                if file.is_read_only() {
                    let text = format!("{} is open for reading only", file.path().display());
                    return Err(Error::new(ErrorKind::Denied, text));
                }
            }
        }
        direct::check_there(plan)?;
        self.places(plan).map(drop)
    }

    fn how(&self, plan: &Plan) -> String {
        let places = match self.places(plan) {
            Ok(places) => places,
            Err(error) => return error.context().to_owned(),
        };
        let Ok(cufile) = self.cufile() else {
            return String::new();
        };
        let report = cufile.report();
        let way = match report.bounce {
            StorageBounce::Never => "direct",
            StorageBounce::Allowed => "direct, or through host memory without telling",
            StorageBounce::Always => "through host memory",
        };
        let once_more = places.memory.iter().find_map(|memory| memory.refused());
        match once_more {
            None => format!("{way}: {report}"),
            Some(code) => format!(
                "{way}, copied once more within the GPU ({}): {report}",
                code.words()
            ),
        }
    }

    fn post(&self, job: Job) -> Result<(), Refusal> {
        match self.places(job.plan()) {
            Ok(places) => self.pool.post(job, &places),
            Err(error) => Err(job.refuse(error.at(NAME))),
        }
    }

    fn reap(&self) {
        self.pool.reap();
    }
}

/// What an agent with it has.
struct Started(Arc<GdsBackend>);

impl Drop for Started {
    fn drop(&mut self) {
        // Regions may outlive the agent, and the backend with them.
        drop(std::mem::take(&mut *self.0.memory.lock()));
    }
}

impl Agent {
    /// Has files reached by cuFile, which is opened when a request could use it; `cufile` is used in place of the system's.
    pub(crate) fn start_gds(
        &self,
        storage: Storage,
        threads: NonZeroU32,
        cufile: Option<Arc<Cufile>>,
    ) -> Result<()> {
        let started = self.core().extension(|| {
            let backend = Arc::new(GdsBackend::start(storage, threads));
            if let Some(cufile) = cufile {
                let _ = backend.cufile.set(Ok(cufile));
            }
            let memory: Arc<dyn Keeper> = backend.memory.clone();
            self.core().exports().add_keeper(&memory);
            Ok(Started(backend))
        });
        started.map(drop)
    }
}
