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
    /// So that descriptors can name a region by its number and still keep its memory.
    regions: Mutex<HashMap<RegionId, Weak<Held>>>,
}

impl Fabric {
    pub(crate) fn new(life: Arc<Life>, agent: transfer::Agent) -> Arc<Self> {
        Arc::new(Self {
            life,
            agent,
            regions: Mutex::default(),
        })
    }

    fn regions(&self) -> MutexGuard<'_, HashMap<RegionId, Weak<Held>>> {
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn remember(&self, held: &Arc<Held>) {
        self.regions()
            .insert(held.region.id(), Arc::downgrade(held));
    }

    pub(crate) fn forget(&self, id: RegionId) {
        self.regions().remove(&id);
    }

    /// # Errors
    /// [`ErrorKind::NotFound`] for a number that names no region of this agent.
    pub(crate) fn find(&self, id: RegionId) -> Result<Arc<Held>> {
        let found = self.regions().get(&id).and_then(Weak::upgrade);
        found.ok_or_else(|| {
            let text = format!("region {id} is none of agent {:?}", self.agent.name());
            Error::new(ErrorKind::NotFound, text)
        })
    }
}
