//! Our own transfers.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_transfer::{
    Agent, Descriptor, DirectMode, FileOptions, HostMemory, ObjectOptions, PeerHandle, Region,
    RegionId, RegionOptions, Request, RequestOptions, Side, TransferError,
};

use crate::clock::process_cpu;
use crate::report::OURS;

use super::contents::{self, POISON};
use super::plan::{BackendKind, Plan, Shape, Way};
use super::process::TargetProcess;
use super::remote::{Files, Remote};
use super::subject::Subject;
use super::target::agent;

/// How long one request may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Requests of one block that are made beforehand; latency is measured over them in turns.
const SINGLES_MAX: u32 = 64;
/// How the object store is called.
const STORE: &str = "bench";

/// Requests over one plan, made before they are timed.
pub(super) struct Fabric {
    plan: Plan,
    local: Region,
    /// All blocks once.
    requests: Vec<Request>,
    /// One block each.
    singles: Vec<Request>,
    in_flight_max: usize,
    remote: Remote,
    /// Kept, because requests over a dropped region are refused.
    _places: Places,
    _agent: Agent,
}

/// The remote side as descriptors name it.
enum Places {
    Own(Region),
    Peer(PeerHandle, RegionId),
    /// An object a request, and one for single blocks.
    Objects(Vec<Region>, Region),
}

impl Fabric {
    /// Makes an agent, the other side and all requests.
    pub(super) fn open(
        plan: &Plan,
        in_flight_max: usize,
        direct: DirectMode,
        folder: &Path,
    ) -> Result<Self> {
        let shape = plan.shape;
        let agent = if shape.backend == BackendKind::Object {
            let url = format!("file://{}", folder.display());
            Agent::builder("initiator")
                .object_store(STORE, &url, ObjectOptions::default())
                .build()?
        } else {
            agent("initiator", shape.backend)?
        };
        let memory = HostMemory::anonymous(shape.total_bytes)?;
        let local = agent.register(memory, RegionOptions::default())?;
        local.fill_at(0, local.bytes(), POISON)?;
        if shape.way == Way::Write {
            contents::write_source(plan, |offset, block| local.write_at(offset, block))?;
        }
        let (remote, places) = open_remote(plan, &agent, direct, folder)?;
        remote.prepare(plan)?;
        let blocks = shape.blocks();
        let request_blocks = shape.request_blocks.min(blocks);
        let requests = (0..blocks)
            .step_by(request_blocks as usize)
            .map(|first| {
                let last = blocks.min(first + request_blocks);
                request(plan, &agent, &local, &places, first..last)
            })
            .collect::<Result<_>>()?;
        let singles = (0..blocks.min(SINGLES_MAX))
            .map(|position| match &places {
                // What is asked of one block must not cut the object that all others are in.
                Places::Objects(_, single) if shape.way == Way::Write => {
                    let to = [single.descriptor(0, shape.block_bytes)];
                    let from = [local.descriptor(
                        plan.offset(plan.local[position as usize]),
                        shape.block_bytes,
                    )];
                    make(plan, &agent, Side::Local, &from, &to)
                }
                _ => request(plan, &agent, &local, &places, position..position + 1),
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            plan: plan.clone(),
            local,
            requests,
            singles,
            in_flight_max,
            remote,
            _places: places,
            _agent: agent,
        })
    }
}

/// Starts another process, and reaches it only the way of this shape; what is told of the path.
pub(super) fn path_to_another_process(shape: Shape) -> Result<String> {
    let agent = agent("doctor", shape.backend)?;
    let mut process = TargetProcess::start()?;
    let (_, metadata) = process.expose(shape)?;
    let peer = agent.load_peer(&metadata)?;
    check_path(&agent, &peer, shape.backend)
}

fn check_path(agent: &Agent, peer: &PeerHandle, backend: BackendKind) -> Result<String> {
    let wanted = backend.name();
    let path = agent.path_to(peer);
    if path.backend == Some(wanted) {
        return Ok(path.why);
    }
    let reasons = path
        .refused
        .iter()
        .map(|(way, why)| format!("{way}: {why}"));
    let reasons: Vec<_> = reasons.collect();
    let context = format!("{wanted} cannot be used here: {}", reasons.join("; "));
    Err(Error::new(ErrorKind::Unsupported, context))
}

fn open_remote(
    plan: &Plan,
    agent: &Agent,
    direct: DirectMode,
    folder: &Path,
) -> Result<(Remote, Places)> {
    let shape = plan.shape;
    Ok(match shape.backend {
        BackendKind::Memcpy => {
            let memory = HostMemory::anonymous(shape.total_bytes)?;
            let region = agent.register(memory, RegionOptions::default())?;
            region.fill_at(0, region.bytes(), POISON)?;
            (Remote::Own(region.clone()), Places::Own(region))
        }
        BackendKind::Shm | BackendKind::Tcp | BackendKind::Ucx => {
            let mut process = TargetProcess::start()?;
            let (region, metadata) = process.expose(shape)?;
            let peer = agent.load_peer(&metadata)?;
            check_path(agent, &peer, shape.backend)?;
            (
                Remote::Process(process),
                Places::Peer(peer, RegionId(region)),
            )
        }
        BackendKind::File => {
            let path = folder.join(format!("ours-{}", shape.name()));
            let options = FileOptions {
                create: true,
                len_bytes: Some(shape.total_bytes),
                preallocate: true,
                direct,
                read_only: false,
            };
            let region = agent.open_file(&path, &options)?;
            let files = Files {
                paths: vec![path],
                blocks_each: shape.blocks(),
            };
            (Remote::Files(files), Places::Own(region))
        }
        BackendKind::Object => {
            let count = shape.blocks().div_ceil(shape.request_blocks);
            let key = |name: String| format!("{}/{name}", shape.name());
            let keys: Vec<String> = (0..count).map(|number| key(number.to_string())).collect();
            let objects = keys
                .iter()
                .map(|key| agent.object(STORE, key))
                .collect::<Result<_>>()?;
            let single = agent.object(STORE, &key("single".to_owned()))?;
            let paths: Vec<PathBuf> = keys.iter().map(|key| folder.join(key)).collect();
            let files = Files {
                paths,
                blocks_each: shape.request_blocks,
            };
            (Remote::Files(files), Places::Objects(objects, single))
        }
    })
}

/// A request for the blocks at these positions of the plan.
fn request(
    plan: &Plan,
    agent: &Agent,
    local: &Region,
    places: &Places,
    positions: std::ops::Range<u32>,
) -> Result<Request> {
    let len = plan.shape.block_bytes;
    let own: Vec<Descriptor> = positions
        .clone()
        .map(|at| local.descriptor(plan.offset(plan.local[at as usize]), len))
        .collect();
    let other = positions.map(|at| {
        let offset = plan.offset(plan.remote[at as usize]);
        match places {
            Places::Own(region) => region.descriptor(offset, len),
            Places::Peer(_, region) => Descriptor {
                region: *region,
                offset,
                len,
            },
            Places::Objects(objects, _) => {
                let object = at / plan.shape.request_blocks;
                let start = plan.offset(object * plan.shape.request_blocks);
                objects[object as usize].descriptor(offset - start, len)
            }
        }
    });
    let side = match places {
        Places::Peer(peer, _) => Side::Peer(peer),
        Places::Own(_) | Places::Objects(..) => Side::Local,
    };
    make(plan, agent, side, &own, &other.collect::<Vec<_>>())
}

fn make(
    plan: &Plan,
    agent: &Agent,
    side: Side<'_>,
    own: &[Descriptor],
    other: &[Descriptor],
) -> Result<Request> {
    let own = agent.prepare(Side::Local, own)?;
    let other = agent.prepare(side, other)?;
    let options = RequestOptions {
        deadline: Some(PATIENCE),
        ..RequestOptions::default()
    };
    agent.request(plan.shape.way.operation(), &own, &other, options)
}

fn wait(request: &Request) -> Result<u64> {
    let failed = |error: TransferError| Error::new(error.kind(), error.to_string());
    Ok(request.wait(PATIENCE).map_err(failed)?.bytes)
}

impl Subject for Fabric {
    fn name(&self) -> &'static str {
        OURS
    }

    fn poison(&mut self) -> Result<()> {
        match self.plan.shape.way {
            Way::Read => self.local.fill_at(0, self.local.bytes(), POISON),
            Way::Write => self.remote.poison(&self.plan),
        }
    }

    fn move_all(&mut self) -> Result<u64> {
        let mut in_flight: VecDeque<&Request> = VecDeque::with_capacity(self.in_flight_max);
        let mut moved = 0;
        for request in &self.requests {
            if in_flight.len() == self.in_flight_max
                && let Some(oldest) = in_flight.pop_front()
            {
                moved += wait(oldest)?;
            }
            request.post()?;
            in_flight.push_back(request);
        }
        for request in in_flight {
            moved += wait(request)?;
        }
        Ok(moved)
    }

    fn move_block(&mut self, position: u32) -> Result<u64> {
        let request = &self.singles[position as usize % self.singles.len()];
        request.post()?;
        wait(request)
    }

    fn verify(&mut self) -> Result<()> {
        match self.plan.shape.way {
            Way::Read => contents::verify(&self.plan, |offset, block| {
                self.local.read_at(offset, block)
            }),
            Way::Write => self.remote.verify(&self.plan),
        }
    }

    fn cpu(&mut self) -> Result<Duration> {
        Ok(process_cpu() + self.remote.cpu()?)
    }
}

#[cfg(test)]
mod tests {
    use super::super::plan::shape;
    use super::*;

    fn fabric(backend: BackendKind, way: Way, folder: &Path) -> Fabric {
        let plan = Plan::new(shape(backend, way)).unwrap();
        Fabric::open(&plan, 2, DirectMode::Auto, folder).unwrap()
    }

    /// Every backend of one process in both directions: not verified before, verified after.
    #[test]
    fn what_was_moved_is_verified_and_what_was_not_is_refused() {
        for backend in [BackendKind::Memcpy, BackendKind::File, BackendKind::Object] {
            for way in [Way::Read, Way::Write] {
                let folder = tempfile::tempdir().unwrap();
                let mut fabric = fabric(backend, way, folder.path());
                fabric.poison().unwrap();
                let error = fabric.verify().unwrap_err();
                assert_eq!(
                    error.kind(),
                    ErrorKind::Corrupt,
                    "{backend:?} {way:?}: {error}"
                );
                assert_eq!(fabric.move_all().unwrap(), 64 << 10);
                fabric.verify().unwrap();
                assert_eq!(fabric.move_block(70).unwrap(), 4096);
                fabric.verify().unwrap();
            }
        }
    }

    /// Changes one byte of each kind of target after it was written rightly.
    #[test]
    fn a_corrupted_target_is_found() {
        let folder = tempfile::tempdir().unwrap();
        for backend in [BackendKind::Memcpy, BackendKind::File, BackendKind::Object] {
            let mut fabric = fabric(backend, Way::Write, folder.path());
            fabric.move_all().unwrap();
            fabric.verify().unwrap();
            match &fabric.remote {
                Remote::Own(region) => region.write_at(5000, b"wrong").unwrap(),
                Remote::Files(files) => {
                    super::super::remote::write_file(&files.paths[0], 5000, b"wrong").unwrap();
                }
                Remote::Process(_) => panic!("{backend:?} needs no other process"),
            }
            let error = fabric.verify().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            assert!(
                error
                    .to_string()
                    .contains("1 of 16 blocks are wrong, first block 1"),
                "{error}"
            );
        }
    }
}
