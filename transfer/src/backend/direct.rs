//! Memory of GPUs that network cards read and write themselves: what is the same for every way over such cards.

use std::sync::{Arc, Weak};

use kvcache_core::Result;

use super::Operation;
use crate::descriptor::Target;
use crate::metadata::RemoteKind;
use crate::plan::Plan;
use crate::region::{MemoryKind, RegionCore};
use crate::sys::cuda::{DeviceMemory, Gpu};

/// Either side of such a way.
pub(crate) const HOST_AND_DEVICES: &[MemoryKind] = &[MemoryKind::Host, MemoryKind::ANY_DEVICE];

/// The memory of GPUs on the local side of a plan.
pub(crate) fn local_devices(plan: &Plan) -> impl Iterator<Item = &Arc<DeviceMemory>> {
    plan.local.iter().filter_map(|target| match target {
        Target::Local(region) => region.device(),
        Target::Remote(_) => None,
    })
}

/// Why a plan's checksums are not computed; none if they can be, or if it wants none.
pub(crate) fn sums_refusal(plan: &Plan) -> Option<String> {
    if !plan.is_checked() && !plan.sums {
        return None;
    }
    let local = plan.local.iter().chain(plan.remote.iter());
    let mut found = local.filter_map(|target| match target {
        Target::Local(region) => region
            .device()
            .map(|_| (region.id(), region.kind().to_string())),
        Target::Remote(region) if region.kind == RemoteKind::Device => {
            Some((region.id, region.kind.to_string()))
        }
        Target::Remote(_) => None,
    });
    let (id, kind) = found.next()?;
    Some(format!(
        "computes no checksums of {kind} (region {id}): the processor does not reach it; compare what the engine computes there"
    ))
}

/// Asks whether memory of GPUs on the local side is still there.
///
/// # Errors
/// [`kvcache_core::ErrorKind::Invalid`] when some was freed while it was registered.
pub(crate) fn check_there(plan: &Plan) -> Result<()> {
    local_devices(plan).try_for_each(|memory| memory.check_there())
}

/// Where a region begins that is handed out to a peer, if it is still there.
///
/// # Errors
/// As [`check_there`]; [`kvcache_core::ErrorKind::Unsupported`] for what is no memory.
pub(crate) fn lend(region: &RegionCore) -> Result<u64> {
    if let Some(memory) = region.device() {
        memory.check_there()?;
    }
    region.address()
}

/// All that a plan has read into memory of GPUs has come in by a card, as its completions say: waits until kernels see it.
///
/// # Errors
/// What the driver says; running kernels may not see it then.
pub(crate) fn land(plan: &Plan) -> Result<()> {
    if plan.operation != Operation::Read || plan.sums {
        return Ok(());
    }
    let mut done: Vec<u32> = Vec::new();
    for memory in local_devices(plan) {
        if !done.contains(&memory.ordinal()) {
            memory.gpu().land_remote_writes()?;
            done.push(memory.ordinal());
        }
    }
    Ok(())
}

/// The GPUs into whose memory a peer may write.
#[derive(Default)]
pub(crate) struct Landing(Vec<Weak<Gpu>>);

impl Landing {
    /// A region is handed out to the peer.
    pub(crate) fn lend(&mut self, region: &RegionCore) {
        let Some(memory) = region.device().filter(|_| region.options().remote_write) else {
            return;
        };
        self.0.retain(|known| known.strong_count() > 0);
        let gpu = Arc::downgrade(memory.gpu());
        if !self.0.iter().any(|known| known.ptr_eq(&gpu)) {
            self.0.push(gpu);
        }
    }

    /// The peer says that it has written: waits until kernels of those GPUs see it, so that nobody is told before.
    ///
    /// # Errors
    /// What the driver says: whoever is told may start something that does not see it.
    pub(crate) fn land(&self) -> Result<()> {
        let mut gpus = self.0.iter().filter_map(Weak::upgrade);
        gpus.try_for_each(|gpu| gpu.land_remote_writes())
    }
}
