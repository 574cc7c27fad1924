//! Which regions' memory is pinned.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::region::{RegionCore, RegionId};
use crate::sys::cuda::{Gpu, Pinned};

/// What came of pinning a region.
#[derive(Default)]
enum Outcome {
    #[default]
    Untried,
    Pinned(Arc<Pinned>),
    /// It goes through buffers.
    Refused,
}

/// Locked while the region is pinned, so that it is done once, and others do not wait.
type Slot = Arc<Mutex<Outcome>>;

/// By region, until that is deregistered.
#[derive(Default)]
pub(super) struct Pins(Mutex<HashMap<RegionId, Slot>>);

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pins {
    /// Pins a region of host memory unless that was tried before, or it is being deregistered.
    pub(super) fn pin(&self, gpu: &Arc<Gpu>, region: &Arc<RegionCore>) {
        let mut slots = locked(&self.0);
        // Closed first, and then withdrawn: the slot of one that is open here is met by its withdrawal.
        if region.is_closed() {
            return;
        }
        let slot = slots.entry(region.id()).or_default().clone();
        drop(slots);
        // Only this region's users wait for it.
        let mut outcome = locked(&slot);
        // Withdrawn since: what is taken from the slot is not put there again.
        if !matches!(*outcome, Outcome::Untried) || region.is_closed() {
            return;
        }
        *outcome = match Pinned::region(gpu, region) {
            Ok(pinned) => Outcome::Pinned(Arc::new(pinned)),
            Err(error) => {
                let (region, bytes) = (region.id(), region.bytes());
                tracing::warn!(%error, %region, bytes, "host memory is not pinned: it goes through buffers");
                Outcome::Refused
            }
        };
    }

    /// What a region's memory is pinned by; none if it is not.
    pub(super) fn find(&self, region: RegionId) -> Option<Arc<Pinned>> {
        let slot = locked(&self.0).get(&region)?.clone();
        match &*locked(&slot) {
            Outcome::Pinned(pinned) => Some(pinned.clone()),
            Outcome::Untried | Outcome::Refused => None,
        }
    }

    /// Nobody tells of regions any more: what no job uses is let go of now, the rest with its last job.
    pub(super) fn clear(&self) {
        let slots = std::mem::take(&mut *locked(&self.0));
        drop(slots);
    }

    /// A region is being deregistered: it is used until its memory is pinned no more.
    pub(super) fn withdraw(&self, region: RegionId) {
        let slot = locked(&self.0).remove(&region);
        let outcome = slot.map(|slot| std::mem::take(&mut *locked(&slot)));
        if let Some(Outcome::Pinned(pinned)) = outcome {
            pinned.await_end();
        }
    }
}
