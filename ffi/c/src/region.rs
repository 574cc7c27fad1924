//! Regions: registered memory.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::time::Duration;

use kvfabric::transfer::{Agent, HostMemory, Region, RegionOptions};
use kvfabric::{Error, Result};

use crate::agent::kvf_agent;
use crate::boundary::{Handle, Out, boundary, enter, into_raw, milliseconds, take};
use crate::status::kvf_status;
use kvfabric::life::Life;

/// Peers that have the metadata may read a region.
pub const KVF_ACCESS_REMOTE_READ: u32 = 1;
/// Peers that have the metadata may write to a region.
pub const KVF_ACCESS_REMOTE_WRITE: u32 = 2;

/// Memory that transfers may name.
pub struct kvf_region {
    life: Arc<Life>,
    /// A region keeps its agent alive.
    _agent: Agent,
    region: Region,
    /// Never changes; atomic only because plain pointers are not shared between threads.
    base: AtomicPtr<u8>,
}

impl kvf_region {
    /// A place that is no memory of this process.
    pub(crate) fn new(life: Arc<Life>, agent: Agent, region: Region) -> Self {
        Self {
            life,
            _agent: agent,
            region,
            base: AtomicPtr::default(),
        }
    }

    pub(crate) fn region(&self) -> &Region {
        &self.region
    }
}

impl Handle for kvf_region {
    const NAME: &'static str = "region";

    fn life(&self) -> &Arc<Life> {
        &self.life
    }
}

pub(crate) fn parse_access(access: u32) -> Result<RegionOptions> {
    const ALL: u32 = KVF_ACCESS_REMOTE_READ | KVF_ACCESS_REMOTE_WRITE;
    if access & !ALL != 0 {
        return Err(Error::invalid(
            "access",
            format!("{access:#x}"),
            "bits of KVF_ACCESS_...",
        ));
    }
    Ok(RegionOptions {
        remote_read: access & KVF_ACCESS_REMOTE_READ != 0,
        remote_write: access & KVF_ACCESS_REMOTE_WRITE != 0,
    })
}

fn register(
    agent: &kvf_agent,
    memory: HostMemory,
    base: *mut u8,
    options: RegionOptions,
) -> Result<*mut kvf_region> {
    let region = agent.agent.register(memory, options)?;
    let (life, agent) = (agent.life.clone(), agent.agent.clone());
    Ok(into_raw(kvf_region {
        life,
        _agent: agent,
        region,
        base: AtomicPtr::new(base),
    }))
}

/// Registers memory of the caller's. `access` is 0 or a sum of KVF_ACCESS_ values: what peers may do with it.
///
/// The memory must stay valid until kvf_region_deregister or kvf_region_free has answered KVF_OK for the region.
///
/// # Safety
/// Each pointer is null or valid: `agent` live, `base` for reads and writes of `len` bytes as said above, `region_out`
/// for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_region_register(
    agent: *const kvf_agent,
    base: *mut c_void,
    len: u64,
    access: u32,
    region_out: *mut *mut kvf_region,
) -> kvf_status {
    boundary(|| {
        let agent = enter(agent, "agent")?;
        let options = parse_access(access)?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(region_out, "region_out") }?;
        let base = base.cast::<u8>();
        // SAFETY: null (which is refused) or valid until the region is deregistered and drained, by contract; this
        // library makes no references into it.
        let memory = unsafe { HostMemory::from_raw(base, len) }?;
        out.write(register(&agent, memory, base, options)?);
        Ok(())
    })
}

/// Allocates zeroed memory that peers on this host can map, and registers it. `access` as in kvf_region_register.
///
/// KVF_INVALID for no bytes, KVF_IO when the system has none left.
///
/// # Safety
/// Each pointer is null or valid: `agent` live, `region_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_region_allocate(
    agent: *const kvf_agent,
    len: u64,
    access: u32,
    region_out: *mut *mut kvf_region,
) -> kvf_status {
    boundary(|| {
        let agent = enter(agent, "agent")?;
        let options = parse_access(access)?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(region_out, "region_out") }?;
        let memory = HostMemory::shared(len)?;
        let base = memory.base().as_ptr();
        out.write(register(&agent, memory, base, options)?);
        Ok(())
    })
}

/// The number that names the region in descriptors, here and at peers.
///
/// # Safety
/// Each pointer is null or valid: `region` live, `id_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_region_id(region: *const kvf_region, id_out: *mut u64) -> kvf_status {
    boundary(|| {
        let region = enter(region, "region")?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(id_out, "id_out") }?;
        out.write(region.region.id().0);
        Ok(())
    })
}

/// Where the region begins in this process; NULL for files, objects and memory of devices. Memory of kvf_region_allocate stays there until the region is freed.
///
/// # Safety
/// Each pointer is null or valid: `region` live, `base_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_region_base(
    region: *const kvf_region,
    base_out: *mut *mut c_void,
) -> kvf_status {
    boundary(|| {
        let region = enter(region, "region")?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(base_out, "base_out") }?;
        out.write(region.base.load(Ordering::Relaxed).cast());
        Ok(())
    })
}

/// How many bytes the region has.
///
/// # Safety
/// Each pointer is null or valid: `region` live, `len_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_region_len(
    region: *const kvf_region,
    len_out: *mut u64,
) -> kvf_status {
    boundary(|| {
        let region = enter(region, "region")?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(len_out, "len_out") }?;
        out.write(region.region.bytes());
        Ok(())
    })
}

/// Refuses new transfers over the region at once, and waits at most `timeout_ms` for those in flight. KVF_BUSY if some are
/// still in flight then: keep the memory and call again.
///
/// # Safety
/// `region` is null or live.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_region_deregister(
    region: *const kvf_region,
    timeout_ms: u32,
) -> kvf_status {
    boundary(|| {
        let region = enter(region, "region")?;
        region.region.deregister().wait(milliseconds(timeout_ms))
    })
}

/// Deregisters the region and gives the handle back. KVF_BUSY while transfers over it are in flight: the handle stays valid,
/// the memory must be kept, call again.
///
/// # Safety
/// `region` is null or live, and not used again after KVF_OK.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_region_free(region: *mut kvf_region) -> kvf_status {
    boundary(|| {
        let ready = |region: &kvf_region| region.region.deregister().wait(Duration::ZERO);
        take(region, "region", ready)
    })
}
