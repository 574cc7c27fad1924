//! Ranges: memory that is registered piece by piece, such as a pool and the tensors in it.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvfabric::Result;
use kvfabric::life::Life;
use kvfabric::transfer::{Agent, Deregistration, HostMemory, RegionId, RegisteredRange};

use crate::agent::kvf_agent;
use crate::boundary::{Handle, Out, boundary, enter, into_raw, milliseconds, take};
use crate::region::parse_access;
use crate::status::kvf_status;

/// A range of memory that transfers may name, in a region that it may share with others.
pub struct kvf_range {
    life: Arc<Life>,
    /// A range keeps its agent alive.
    _agent: Agent,
    region: RegionId,
    offset: u64,
    held: Mutex<Held>,
}

enum Held {
    Registered(RegisteredRange),
    /// Given back, and perhaps still in use.
    Leaving(Deregistration),
    /// While it is being given back, under the lock.
    Nothing,
}

impl Handle for kvf_range {
    const NAME: &'static str = "range";

    fn life(&self) -> &Arc<Life> {
        &self.life
    }
}

impl kvf_range {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn deregister(&self, timeout: Duration) -> Result<()> {
        let mut held = self.held();
        *held = match std::mem::replace(&mut *held, Held::Nothing) {
            Held::Registered(range) => Held::Leaving(range.deregister()),
            left => left,
        };
        match &*held {
            Held::Leaving(leaving) => leaving.wait(timeout),
            Held::Registered(_) | Held::Nothing => Ok(()),
        }
    }
}

/// Registers memory of the caller's by its range: one that lies in a range that was registered in this way, and still is, with
/// the same `access`, gets that one's region. So a pool and its thousand tensors are one region, in metadata and for peers.
/// Ranges that merely touch or overlap get regions of their own. `access` as in kvf_region_register.
///
/// The memory must stay valid until kvf_range_deregister or kvf_range_free has answered KVF_OK for the range.
///
/// # Safety
/// Each pointer is null or valid: `agent` live, `base` for reads and writes of `len` bytes as said above, `range_out` for a
/// write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_range_register(
    agent: *const kvf_agent,
    base: *mut c_void,
    len: u64,
    access: u32,
    range_out: *mut *mut kvf_range,
) -> kvf_status {
    boundary(|| {
        let agent = enter(agent, "agent")?;
        let options = parse_access(access)?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(range_out, "range_out") }?;
        // SAFETY: null (which is refused) or valid until the range is given back and its region drained, by contract; this
        // library makes no references into it.
        let memory = unsafe { HostMemory::from_raw(base.cast(), len) }?;
        let range = agent.agent.register_range(memory, options)?;
        out.write(into_raw(kvf_range {
            life: agent.life.clone(),
            _agent: agent.agent.clone(),
            region: range.region().id(),
            offset: range.offset(),
            held: Mutex::new(Held::Registered(range)),
        }));
        Ok(())
    })
}

/// How descriptors name the range, here and at peers: the number of the region that it lies in, and where it begins there.
///
/// # Safety
/// Each pointer is null or valid: `range` live, `region_out` and `offset_out` for a write each.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_range_place(
    range: *const kvf_range,
    region_out: *mut u64,
    offset_out: *mut u64,
) -> kvf_status {
    boundary(|| {
        let range = enter(range, "range")?;
        // SAFETY: null or writable, by contract.
        let region = unsafe { Out::new(region_out, "region_out") }?;
        // SAFETY: null or writable, by contract.
        let offset = unsafe { Out::new(offset_out, "offset_out") }?;
        region.write(range.region.0);
        offset.write(range.offset);
        Ok(())
    })
}

/// Gives the range back, and waits at most `timeout_ms` until its memory is free. KVF_BUSY if it is not then, because transfers
/// over the region are in flight, or because other ranges of it are registered: peers reach all of its memory until the last
/// of them is given back. Keep the memory, and call again.
///
/// # Safety
/// `range` is null or live.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_range_deregister(
    range: *const kvf_range,
    timeout_ms: u32,
) -> kvf_status {
    boundary(|| {
        let range = enter(range, "range")?;
        range.deregister(milliseconds(timeout_ms))
    })
}

/// Gives the range back and the handle. KVF_BUSY as in kvf_range_deregister: the handle stays valid, the memory must be kept,
/// call again.
///
/// # Safety
/// `range` is null or live, and not used again after KVF_OK.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_range_free(range: *mut kvf_range) -> kvf_status {
    boundary(|| {
        let ready = |range: &kvf_range| range.deregister(Duration::ZERO);
        take(range, "range", ready)
    })
}
