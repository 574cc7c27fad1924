//! What all objects of one agent share: the agent, whether they may be used, and the registered regions.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use kvfabric::life::Life;
use kvfabric::transfer::{self, RegionId};
use kvfabric::{Error, ErrorKind, Result};

use crate::region::Held;

/// An agent and its regions, shared by all Python objects made from it.
pub(crate) struct Fabric {
    pub(crate) life: Arc<Life>,
    pub(crate) agent: transfer::Agent,
    /// So that descriptors can name a region by its number and still keep its memory: all that share it.
    regions: Mutex<HashMap<RegionId, Vec<Weak<Held>>>>,
}

impl Fabric {
    pub(crate) fn new(life: Arc<Life>, agent: transfer::Agent) -> Arc<Self> {
        Arc::new(Self {
            life,
            agent,
            regions: Mutex::default(),
        })
    }

    fn regions(&self) -> MutexGuard<'_, HashMap<RegionId, Vec<Weak<Held>>>> {
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn remember(&self, held: &Arc<Held>) {
        let mut regions = self.regions();
        let known = regions.entry(held.region.id()).or_default();
        known.push(Arc::downgrade(held));
    }

    /// One of those that share a region is gone.
    pub(crate) fn forget(&self, id: RegionId) {
        let mut regions = self.regions();
        if let Some(known) = regions.get_mut(&id) {
            known.retain(|held| held.strong_count() > 0);
            if known.is_empty() {
                regions.remove(&id);
            }
        }
    }

    /// # Errors
    /// [`ErrorKind::NotFound`] for a number that names no region of this agent.
    pub(crate) fn find(&self, id: RegionId) -> Result<Arc<Held>> {
        let regions = self.regions();
        let known = regions.get(&id).into_iter().flatten();
        let found = known.filter_map(Weak::upgrade).next();
        drop(regions);
        found.ok_or_else(|| {
            let text = format!("region {id} is none of agent {:?}", self.agent.name());
            Error::new(ErrorKind::NotFound, text)
        })
    }
}
