//! The other side of our transfers, made by each kind of way.

use std::net::{IpAddr, Ipv4Addr};
use std::ops::Range;
use std::path::{Path, PathBuf};

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_transfer::{
    Agent, DeviceMemory, DirectMode, FileOptions, HostMemory, PeerHandle, RegionId, RegionOptions,
};

use super::super::contents::POISON;
use super::super::devices::OnDevice;
use super::super::objects::{Objects, STORE, Storage, StoreAt, run_name};
use super::super::plan::{BackendKind, Plan, Shape};
use super::super::process::{Target, TargetAt};
use super::super::remote::{Files, Remote};
use super::super::target::agent;
use super::Places;

/// An agent, and the other side as it is reached and as descriptors name it.
pub(super) fn open(
    plan: &Plan,
    at: &TargetAt,
    direct: DirectMode,
    storage: Storage<'_>,
) -> Result<(Agent, Remote, Places)> {
    let folder = storage.folder;
    let loopback = IpAddr::from(Ipv4Addr::LOCALHOST);
    let own = || agent("initiator", plan.shape.backend, loopback);
    let (agent, (remote, places)) = match plan.shape.backend {
        BackendKind::Memcpy => {
            let agent = own()?;
            let other = own_remote(plan, &agent)?;
            (agent, other)
        }
        BackendKind::Shm
        | BackendKind::Cma
        | BackendKind::Tcp
        | BackendKind::Ucx
        | BackendKind::Verbs
        | BackendKind::UcxCuda
        | BackendKind::VerbsCuda
        | BackendKind::CudaIpc => peer_remote(plan, at)?,
        BackendKind::File => {
            let agent = own()?;
            let other = file_remote(plan, &agent, direct, folder)?;
            (agent, other)
        }
        BackendKind::Cuda | BackendKind::CudaWithin => {
            let agent = own()?;
            let memory = DeviceMemory::allocate(storage.gpu, plan.shape.total_bytes)?;
            let other = device_remote(&agent, memory)?;
            (agent, other)
        }
        BackendKind::Object => {
            let url = format!("file://{}", folder.display());
            let own = StoreAt {
                url: &url,
                allow_http: false,
            };
            let agent = storage.store.unwrap_or(own).agent("initiator")?;
            let other = object_remote(plan, &agent, storage)?;
            (agent, other)
        }
    };
    Ok((agent, remote, places))
}

/// Starts another process, and reaches it only the way of this shape; what is told of the path.
pub(in super::super) fn path_to_another_process(shape: Shape) -> Result<String> {
    let mut target = Target::open(&TargetAt::Spawned)?;
    let agent = agent("doctor", shape.backend, target.addresses().0)?;
    let (region, metadata) = target.expose(shape)?;
    let peer = agent.load_peer(&metadata)?;
    check_path(&agent, (&peer, RegionId(region)), shape.backend)
}

/// What is told of the way to a region, which must be this one.
pub(super) fn check_path(
    agent: &Agent,
    (peer, region): (&PeerHandle, RegionId),
    backend: BackendKind,
) -> Result<String> {
    let wanted = backend.way_name();
    let path = agent.path_to_region(peer, region)?;
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

fn own_remote(plan: &Plan, agent: &Agent) -> Result<(Remote, Places)> {
    let memory = HostMemory::anonymous(plan.shape.total_bytes)?;
    let region = agent.register(memory, RegionOptions::default())?;
    region.fill_at(0, region.bytes(), POISON)?;
    Ok((Remote::Own(region.clone()), Places::Own(region)))
}

fn peer_remote(plan: &Plan, at: &TargetAt) -> Result<(Agent, (Remote, Places))> {
    let mut target = Target::open(at)?;
    let agent = agent("initiator", plan.shape.backend, target.addresses().0)?;
    let (region, metadata) = target.expose(plan.shape)?;
    let peer = agent.load_peer(&metadata)?;
    let region = RegionId(region);
    check_path(&agent, (&peer, region), plan.shape.backend)?;
    let places = Places::Peer(peer, region);
    Ok((agent, (Remote::Process(target), places)))
}

pub(super) fn device_remote(agent: &Agent, memory: DeviceMemory) -> Result<(Remote, Places)> {
    let device = OnDevice::new(agent, memory)?;
    let places = Places::Own(device.memory.clone());
    Ok((Remote::Device(device), places))
}

fn file_remote(
    plan: &Plan,
    agent: &Agent,
    direct: DirectMode,
    folder: &Path,
) -> Result<(Remote, Places)> {
    let files = Files::shared(plan, folder);
    let options = FileOptions {
        create: true,
        len_bytes: Some(plan.shape.total_bytes),
        preallocate: true,
        direct,
        read_only: false,
    };
    let region = agent.open_file(&files.paths[0], &options)?;
    Ok((Remote::Files(files), Places::Own(region)))
}

fn object_remote(plan: &Plan, agent: &Agent, storage: Storage<'_>) -> Result<(Remote, Places)> {
    let blocks_each = plan.requests.first().map_or(1, |first| first.end);
    let is_even = |positions: &Range<u32>| positions.start.is_multiple_of(blocks_each);
    if !plan.requests.iter().all(is_even) {
        let text = "objects take requests of one size: a model with a window has others";
        return Err(Error::new(ErrorKind::Invalid, text));
    }
    let base = match storage.store {
        Some(_) => format!("{}/{}", run_name()?, plan.case),
        None => plan.case.clone(),
    };
    let key = |name: String| format!("{base}/{name}");
    let keys: Vec<String> = (0..plan.requests.len())
        .map(|number| key(number.to_string()))
        .collect();
    let objects = keys
        .iter()
        .map(|key| agent.object(STORE, key))
        .collect::<Result<_>>()?;
    let single_key = key("single".to_owned());
    let single = agent.object(STORE, &single_key)?;
    let remote = match storage.store {
        Some(at) => Remote::Objects(Objects::new(plan, at, keys, single_key, blocks_each)?),
        None => {
            let paths: Vec<PathBuf> = keys.iter().map(|key| storage.folder.join(key)).collect();
            Remote::Files(Files { paths, blocks_each })
        }
    };
    Ok((remote, Places::Objects(objects, single)))
}
