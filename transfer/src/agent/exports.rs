//! What an agent offers to others: its name, its regions by key, its inbox.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, PoisonError, RwLock, Weak};

use kvcache_core::{Error, ErrorKind, Result};

use super::inbox::{Door, Inbox};
use crate::backend::{Fabric, Job, Keeper, Operation};
use crate::metadata::{
    EXPORTED_REGIONS_MAX, HostId, Incarnation, PeerCard, RemoteKind, RemoteRegion,
};
use crate::region::{RegionCore, RegionId, RegionKey, RegionUse};

/// Shared by an agent with the serving ends of its fabrics. Knows no peer and starts nothing.
pub(crate) struct Exports {
    name: Arc<str>,
    incarnation: Incarnation,
    host: HostId,
    /// Names of the agents that may connect; none: every one that knows a key.
    allowed: Option<BTreeSet<String>>,
    regions: RwLock<HashMap<RegionId, Arc<RegionCore>>>,
    inbox: Inbox,
    /// The ways to other agents, best first; they know this in turn until [`Exports::close`].
    fabrics: RwLock<Vec<Arc<dyn Fabric>>>,
    keepers: RwLock<Vec<Weak<dyn Keeper>>>,
}

impl Exports {
    pub(crate) fn new(name: &str, allowed: Option<BTreeSet<String>>) -> Result<Self> {
        let mut random = [0; 8];
        getrandom::fill(&mut random)
            .map_err(|e| Error::new(ErrorKind::Io, format!("draw an incarnation: {e}")))?;
        Ok(Self {
            name: name.into(),
            incarnation: Incarnation(u64::from_le_bytes(random)),
            host: host_id()?,
            allowed,
            regions: RwLock::default(),
            inbox: Inbox::default(),
            fabrics: RwLock::default(),
            keepers: RwLock::default(),
        })
    }

    pub(crate) fn name(&self) -> &Arc<str> {
        &self.name
    }

    pub(crate) fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    pub(crate) fn host(&self) -> HostId {
        self.host
    }

    pub(crate) fn inbox(&self) -> &Inbox {
        &self.inbox
    }

    pub(crate) fn add_fabric(&self, fabric: Arc<dyn Fabric>) {
        self.fabrics
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .push(fabric);
    }

    /// Adds a way before these; for an agent that knows no peers yet.
    pub(crate) fn add_fabric_before(&self, fabric: Arc<dyn Fabric>, others: &[&str]) {
        let mut fabrics = self.fabrics.write().unwrap_or_else(PoisonError::into_inner);
        let place = fabrics
            .iter()
            .position(|other| others.contains(&other.name()));
        let place = place.unwrap_or(fabrics.len());
        fabrics.insert(place, fabric);
    }

    /// It is told of regions that are deregistered, for as long as it is there.
    pub(crate) fn add_keeper(&self, keeper: &Arc<dyn Keeper>) {
        self.keepers
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Arc::downgrade(keeper));
    }

    /// The ways to other agents, best first.
    pub(crate) fn fabrics(&self) -> Vec<Arc<dyn Fabric>> {
        self.fabrics
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Puts these ways first.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a name that is no way's.
    pub(crate) fn order(&self, first: &[String]) -> Result<()> {
        let mut fabrics = self.fabrics.write().unwrap_or_else(PoisonError::into_inner);
        let names: Vec<&str> = fabrics.iter().map(|fabric| fabric.name()).collect();
        if let Some(name) = first.iter().find(|name| !names.contains(&name.as_str())) {
            let found = format!("{name:?}");
            return Err(Error::invalid("preferred backend", found, names.join(", ")));
        }
        let rank = |fabric: &Arc<dyn Fabric>| {
            let place = first.iter().position(|name| name == fabric.name());
            place.unwrap_or(first.len())
        };
        fabrics.sort_by_key(rank);
        Ok(())
    }

    /// Ends all connections, and the listening.
    pub(crate) fn close(&self) {
        // They are there until they are closed, so that a region that is deregistered meanwhile is revoked.
        self.fabrics().iter().for_each(|fabric| fabric.close());
        let mut fabrics = self.fabrics.write().unwrap_or_else(PoisonError::into_inner);
        let closed = std::mem::take(&mut *fabrics);
        drop(fabrics);
        drop(closed);
        self.inbox.close();
    }

    /// # Errors
    /// [`ErrorKind::Denied`] for an agent that is not on the allow list.
    pub(crate) fn check_allowed(&self, name: &str) -> Result<()> {
        match &self.allowed {
            Some(allowed) if !allowed.contains(name) => {
                let text = format!("agent {name:?} is not on the allow list of {:?}", self.name);
                Err(Error::new(ErrorKind::Denied, text))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn insert(&self, region: Arc<RegionCore>) -> Result<()> {
        let mut regions = self.regions.write().unwrap_or_else(PoisonError::into_inner);
        if regions.len() >= EXPORTED_REGIONS_MAX {
            let text = format!("{EXPORTED_REGIONS_MAX} regions are registered");
            return Err(Error::new(ErrorKind::Busy, text));
        }
        regions.insert(region.id(), region);
        Ok(())
    }

    /// The region is being deregistered: nobody finds it any more, and peers are told.
    pub(crate) fn withdraw(&self, region: &Arc<RegionCore>) {
        // Before nobody finds the region: a fabric that is closed later revokes those that it finds by itself.
        let fabrics = self.fabrics();
        let mut regions = self.regions.write().unwrap_or_else(PoisonError::into_inner);
        regions.remove(&region.id());
        drop(regions);
        fabrics.iter().for_each(|fabric| fabric.withdraw(region));
        let known = self.keepers.read().unwrap_or_else(PoisonError::into_inner);
        let keepers: Vec<_> = known.iter().filter_map(Weak::upgrade).collect();
        drop(known);
        keepers.iter().for_each(|keeper| keeper.withdraw(region));
    }

    /// One of this agent's own regions.
    pub(crate) fn find(&self, id: RegionId) -> Result<Arc<RegionCore>> {
        let regions = self.regions.read().unwrap_or_else(PoisonError::into_inner);
        regions.get(&id).cloned().ok_or_else(|| {
            let text = format!("region {id} is not registered with agent {:?}", self.name);
            Error::new(ErrorKind::NotFound, text)
        })
    }

    /// Lets a peer use a region. A wrong key and an unknown region look the same to it.
    pub(crate) fn admit(
        &self,
        id: RegionId,
        key: &RegionKey,
        operation: Operation,
    ) -> Result<RegionUse> {
        let region = self
            .find(id)
            .ok()
            .filter(|region| region.key().matches(key));
        let Some(region) = region else {
            let text = format!("region {id} is unknown, or its key is wrong");
            return Err(Error::new(ErrorKind::Denied, text));
        };
        if !region.allows(operation) {
            let text = format!("region {id} is not exported for this ({operation:?})");
            return Err(Error::new(ErrorKind::Denied, text));
        }
        RegionUse::begin(region)
    }

    /// Delivers the notification of a job of this process, if it has one, and settles the job then: as soon as there is room.
    pub(crate) fn deliver_for(&self, door: Door, from: &Arc<str>, job: Job) {
        let Some(bytes) = job.notification().cloned() else {
            return job.settle(Ok(()));
        };
        if let Some((job, outcome)) = self.inbox.deliver(door, from, bytes, job) {
            job.settle(outcome);
        }
    }

    /// What peers are told: of all regions, or of these.
    pub(crate) fn card(&self, only: Option<&BTreeSet<RegionId>>) -> PeerCard {
        let regions = self.regions.read().unwrap_or_else(PoisonError::into_inner);
        let mut exported: Vec<_> = regions
            .values()
            .filter(|region| only.is_none_or(|only| only.contains(&region.id())))
            .filter(|region| region.options().remote_read || region.options().remote_write)
            .filter_map(|region| {
                Some(Arc::new(RemoteRegion {
                    secret: region.secret(),
                    id: region.id(),
                    key: region.key(),
                    bytes: region.bytes(),
                    kind: RemoteKind::of(region.kind())?,
                    readable: region.options().remote_read,
                    writable: region.options().remote_write,
                    shareable: match region.external() {
                        Some(external) => external.is_shareable(),
                        None => region.host().is_some_and(|memory| memory.is_shareable()),
                    },
                }))
            })
            .collect();
        drop(regions);
        exported.sort_by_key(|region| region.order());
        let fabrics = self.fabrics();
        let addresses = fabrics.iter().filter_map(|fabric| {
            fabric
                .address()
                .map(|address| (fabric.name().to_owned(), address))
        });
        PeerCard {
            name: self.name.to_string(),
            incarnation: self.incarnation,
            host: self.host,
            addresses: addresses.collect(),
            regions: exported,
            partial: only.is_some(),
        }
    }
}

/// Tells running kernels apart: the boot id, which containers of one host share.
fn host_id() -> Result<HostId> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(PATH).map_err(|e| Error::io(PATH, e))?;
    let digits = text
        .chars()
        .filter(char::is_ascii_hexdigit)
        .collect::<String>();
    let value = u128::from_str_radix(&digits, 16)
        .map_err(|e| Error::new(ErrorKind::Io, format!("{PATH} is {text:?}")).with_source(e))?;
    Ok(HostId(value.to_le_bytes()))
}
