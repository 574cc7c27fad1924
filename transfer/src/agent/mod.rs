//! The agent: registers places, knows peers, makes requests.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use kvcache_core::{Error, ErrorKind, Result};

mod builder;
mod core;
mod exports;
mod inbox;
mod links;
mod own;
mod path;
mod peer;
mod ranges;
mod timer;

pub(crate) use self::core::AgentCore;
pub use builder::{AgentBuilder, CONNECT_WITHIN_DEFAULT, SLOW_AFTER_DEFAULT};
pub(crate) use exports::Exports;
pub(crate) use inbox::{Door, Sender, UNHEARD_BYTES_MAX, UNHEARD_MAX};
pub use inbox::{INBOX_BYTES_MAX, INBOX_NOTIFICATIONS_MAX, Notification, Notified};
pub use path::{ConnectionReport, PathReport};
pub use peer::PeerHandle;
pub(crate) use peer::{CONNECT_TIMEOUT, Failure, PeerCore};
pub use ranges::RegisteredRange;
pub(crate) use timer::{Timer, TimerKey};

pub(crate) use crate::metadata::{PeerCard, RemoteRegion};

use self::own::{check_backend, check_local};

use crate::backend::Operation;
use crate::descriptor::{Descriptor, PreparedList, Side, Strided, Target};
use crate::estimate::PathCost;
use crate::plan::{PairOptions, Plan};
use crate::region::{Body, MemoryKind, Region, RegionCore, RegionId, RegionOptions, RegionUse};
use crate::request::{Priority, Request, RequestOptions, Route};
use crate::stats::AgentStats;
use crate::sys::memory::HostMemory;

/// The most peers that one agent keeps.
pub const PEERS_MAX: usize = 16_384;

/// Moves bytes between registered places of this process and its peers. Cheap to clone; safe to use from any thread.
///
/// An agent has a few threads of its own, all asleep when there is nothing to do. They end when the last handle and
/// the last request of it are dropped.
#[derive(Clone)]
pub struct Agent(Arc<AgentCore>);

impl Agent {
    /// Describes an agent; `name` is how peers know it.
    #[must_use]
    pub fn builder(name: &str) -> AgentBuilder {
        AgentBuilder::new(name)
    }

    pub(crate) fn core(&self) -> &Arc<AgentCore> {
        &self.0
    }

    /// How peers know it.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0.exports.name()
    }

    /// The TCP address that it listens on, with the port that it was given; none without TCP.
    #[must_use]
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        self.0
            .exports()
            .fabrics()
            .iter()
            .find_map(|fabric| fabric.listening())
    }

    /// Registers host memory, which is never touched before or after by anyone but its users.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when too many regions are registered, [`ErrorKind::Forked`] in a forked child.
    pub fn register(&self, memory: HostMemory, options: RegionOptions) -> Result<Region> {
        self.insert(Body::Host(memory), options)
    }

    /// Registers a place that a backend of its own serves; never exported to peers.
    pub(crate) fn register_external(
        &self,
        external: Arc<dyn crate::region::External>,
    ) -> Result<Region> {
        self.register_external_with(external, RegionOptions::default())
    }

    /// As [`Agent::register_external`], exported as the options say: for memory alone.
    pub(crate) fn register_external_with(
        &self,
        external: Arc<dyn crate::region::External>,
        options: RegionOptions,
    ) -> Result<Region> {
        self.insert(Body::External(external), options)
    }

    fn insert(&self, body: Body, options: RegionOptions) -> Result<Region> {
        self.0.check()?;
        let core = Arc::new(RegionCore::new(body, options)?);
        self.0.exports.insert(core.clone())?;
        Ok(Region::new(core, &self.0.exports))
    }

    /// What peers need to reach this agent and the regions that it exports now: pass it to [`Agent::load_peer`] there.
    /// It contains the regions' keys: whoever has it may do what the regions' options allow.
    #[must_use]
    pub fn metadata(&self) -> Bytes {
        self.0.exports.card(None).encode().into()
    }

    /// As [`Agent::metadata`], with these regions alone. A peer that has loaded metadata of this agent before keeps the
    /// regions that it knows, and the connections: so regions can be added, or shown to some peers only.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for a region that is not registered with this agent, or not exported.
    pub fn metadata_of(&self, regions: &[RegionId]) -> Result<Bytes> {
        self.0.check()?;
        let wanted: BTreeSet<RegionId> = regions.iter().copied().collect();
        let card = self.0.exports.card(Some(&wanted));
        let told: BTreeSet<RegionId> = card.regions.iter().map(|region| region.id).collect();
        if let Some(id) = wanted.difference(&told).next() {
            let text = format!("agent {:?} exports no region {id}", self.name());
            return Err(Error::new(ErrorKind::NotFound, text));
        }
        Ok(card.encode().into())
    }

    /// Learns of a peer, or what is new about one: its exports are replaced, or added to by those of
    /// [`Agent::metadata_of`], and a restarted peer is reached anew.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for damaged metadata, [`ErrorKind::Version`] for another version's (both are
    /// named), [`ErrorKind::Busy`] above [`PEERS_MAX`].
    pub fn load_peer(&self, metadata: &[u8]) -> Result<PeerHandle> {
        self.0.check()?;
        self.load_card(PeerCard::decode(metadata)?)
    }

    fn load_card(&self, card: PeerCard) -> Result<PeerHandle> {
        let mut peers = self.0.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(peer) = peers.get(&card.name) {
            peer.update(card);
            return Ok(PeerHandle::new(peer.clone()));
        }
        if peers.len() >= PEERS_MAX {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("{PEERS_MAX} peers are known"),
            ));
        }
        let name = card.name.clone();
        let peer = Arc::new(PeerCore::new(card));
        peers.insert(name, peer.clone());
        Ok(PeerHandle::new(peer))
    }

    /// Ends the connections to a peer; requests in flight fail with [`ErrorKind::PeerLost`].
    pub fn forget_peer(&self, peer: &PeerHandle) {
        let mut peers = self.0.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if peers
            .get(peer.name())
            .is_some_and(|known| Arc::ptr_eq(known, peer.core()))
        {
            peers.remove(peer.name());
        }
        drop(peers);
        peer.core().close();
    }

    /// Checks descriptors once, for any number of requests.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] with the descriptor's position, if one has no bytes or lies outside its region;
    /// [`ErrorKind::NotFound`] if its region is unknown on that side.
    pub fn prepare(&self, side: Side<'_>, descriptors: &[Descriptor]) -> Result<PreparedList> {
        self.prepare_all(side, descriptors.iter().copied())
    }

    fn prepare_all(
        &self,
        side: Side<'_>,
        descriptors: impl ExactSizeIterator<Item = Descriptor>,
    ) -> Result<PreparedList> {
        self.0.check()?;
        match side {
            Side::Local => PreparedList::build(None, descriptors, |id| {
                Ok(Target::Local(self.0.exports.find(id)?))
            }),
            Side::Peer(peer) => {
                let peer = peer.core();
                PreparedList::build(Some(peer.clone()), descriptors, |id| {
                    Ok(Target::Remote(peer.find(id)?))
                })
            }
        }
    }

    /// As [`Agent::prepare`] with the `count` descriptors that each entry stands for, in order, without writing them out.
    ///
    /// # Errors
    /// As [`Agent::prepare`], with the entry's position; [`ErrorKind::Invalid`] also for an entry without ranges, and
    /// above [`crate::DESCRIPTORS_MAX`] ranges in all.
    pub fn prepare_strided(&self, side: Side<'_>, strided: &[Strided]) -> Result<PreparedList> {
        self.0.check()?;
        match side {
            Side::Local => PreparedList::build_strided(None, strided, |id| {
                Ok(Target::Local(self.0.exports.find(id)?))
            }),
            Side::Peer(peer) => {
                let peer = peer.core();
                PreparedList::build_strided(Some(peer.clone()), strided, |id| {
                    Ok(Target::Remote(peer.find(id)?))
                })
            }
        }
    }

    /// Makes a request that moves the descriptors of both lists, paired in order. The remote list is a peer's, or, for
    /// files, objects and copies within the agent, one of its own.
    ///
    /// Connects to the peer if there is no connection, and makes its regions ready.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when the lists don't pair, [`ErrorKind::Denied`] when the peer doesn't export a
    /// region for this, [`ErrorKind::PeerLost`] when it can't be reached, [`ErrorKind::Unsupported`]
    /// when nothing moves bytes between these kinds of places.
    pub fn request(
        &self,
        operation: Operation,
        local: &PreparedList,
        remote: &PreparedList,
        options: RequestOptions,
    ) -> Result<Request> {
        self.0.check()?;
        if let Some(peer) = &local.0.peer {
            let text = format!("the local list names regions of peer {:?}", peer.name());
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        check_local(&local.0.targets)?;
        let pairing = PairOptions {
            positions: options.positions.as_ref(),
            parts: &options.parts,
            checked: options.checksum,
        };
        let (mut plan, ends) = Plan::pair(operation, local, remote, pairing)?;
        plan.ways = self.wanted(&options.backends)?;
        let route = match &remote.0.peer {
            Some(peer) => self.route_to(peer, &plan)?,
            None => {
                let backend = self.own_backend(&plan)?;
                check_backend(&*backend, &plan)?;
                if options.notification.is_some() && !backend.capabilities().notifications {
                    let text = "a notification needs a peer to deliver it to";
                    return Err(Error::new(ErrorKind::Invalid, text));
                }
                backend.prepare(&plan)?;
                Route::Own(backend)
            }
        };
        Request::new(self.0.clone(), route, (plan, &ends), options)
    }

    fn route_to(&self, peer: &Arc<PeerCore>, plan: &Plan) -> Result<Route> {
        self.check_moved_to_peers(plan)?;
        for target in &*plan.remote {
            if let Target::Remote(region) = target {
                region.check(plan.operation)?;
                if plan.is_checked() {
                    region.check(Operation::Read)?;
                }
            }
        }
        peer.ready_channel(&self.0, plan)?;
        Ok(Route::Peer(peer.clone()))
    }

    /// Prepares, makes and posts a request for pairs of (local, remote) descriptors.
    ///
    /// # Errors
    /// As [`Agent::prepare`], [`Agent::request`] and [`Request::post`].
    pub fn transfer(
        &self,
        operation: Operation,
        pairs: &[(Descriptor, Descriptor)],
        remote: Side<'_>,
        options: RequestOptions,
    ) -> Result<Request> {
        let local = self.prepare_all(Side::Local, pairs.iter().map(|pair| pair.0))?;
        let remote = self.prepare_all(remote, pairs.iter().map(|pair| pair.1))?;
        let request = self.request(operation, &local, &remote, options)?;
        request.post()?;
        Ok(request)
    }

    /// Sends a notification alone. The request is done when the peer's inbox has taken it: it waits until there is room, at
    /// most until its deadline.
    ///
    /// # Errors
    /// As [`Request::post`]; [`ErrorKind::Invalid`] above [`crate::NOTIFICATION_BYTES_MAX`].
    pub fn notify(&self, peer: &PeerHandle, bytes: Bytes) -> Result<Request> {
        self.0.check()?;
        let route = Route::Peer(peer.core().clone());
        let options = RequestOptions {
            notification: Some(bytes),
            ..RequestOptions::default()
        };
        let request = Request::new(self.0.clone(), route, (Plan::empty(), &[]), options)?;
        request.post()?;
        Ok(request)
    }

    /// Takes all notifications that wait, oldest first. Those of one peer keep the order in which it saw them done.
    #[must_use]
    pub fn notifications(&self) -> Vec<Notification> {
        self.0.exports.inbox().take()
    }

    /// Resolves when a notification waits.
    pub fn notified(&self) -> Notified {
        Notified {
            exports: self.0.exports.clone(),
        }
    }

    /// A descriptor that polls as readable while a notification waits to be taken; [`Agent::notifications`] makes it
    /// unreadable, so nobody has to read from it. Made at the first call; the same one, to be closed by nobody else, for
    /// as long as the agent lives.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the process has no descriptors left, [`ErrorKind::Forked`] in a forked child.
    pub fn notification_fd(&self) -> Result<BorrowedFd<'_>> {
        self.0.check()?;
        self.0.exports.inbox().event_fd()
    }

    /// Waits at most `timeout` for a notification, then takes all that wait; none if time ran out.
    #[must_use]
    pub fn wait_notifications(&self, timeout: Duration) -> Vec<Notification> {
        let (inbox, looks) = (self.0.exports.inbox(), &self.0.looks.notifications);
        inbox.wait(timeout, &self.0.reactor, looks);
        self.notifications()
    }

    /// Of which kind the memory of an own region is.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for a region that there is not, or not any more.
    pub fn memory_kind(&self, region: RegionId) -> Result<MemoryKind> {
        Ok(self.0.exports.find(region)?.kind())
    }

    /// The CRC-32C of host memory of this agent.
    ///
    /// # Errors
    /// As [`Region::checksum`]; [`ErrorKind::NotFound`] for an unknown region.
    pub fn checksum(&self, memory: Descriptor) -> Result<u32> {
        let region = RegionUse::begin(self.0.exports.find(memory.region)?)?;
        region.region().mapping()?.crc32c(memory.offset, memory.len)
    }

    /// Which way a request over all regions that a peer exports would take, and why; connects if there is no connection.
    /// Where no one way reaches all of them, or there are none: which way notifications take.
    #[must_use]
    pub fn path_to(&self, peer: &PeerHandle) -> PathReport {
        peer.core().report(&self.0)
    }

    /// Which way bytes go to one region of a peer, and why; connects if there is no connection.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when the peer exports no such region.
    pub fn path_to_region(&self, peer: &PeerHandle, region: RegionId) -> Result<PathReport> {
        peer.core().report_of(&self.0, region)
    }

    /// As [`crate::AgentBuilder::assume_cost`], from now on.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a backend that the agent does not have, and without bandwidth.
    pub fn assume_cost(&self, backend: &str, cost: PathCost) -> Result<()> {
        self.wanted(&[backend.to_owned()])?;
        self.0.stats.assume(backend, cost)
    }

    /// Limits how fast requests of a priority move, all of them together, in bytes a second; none: not at all. Holds in the
    /// mean, for what is posted from now on; a request that was made before goes as a whole.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a rate of 0.
    pub fn set_rate(&self, priority: Priority, bytes_per_s: Option<u64>) -> Result<()> {
        self.0.rate(priority).set(check_rate(bytes_per_s)?);
        Ok(())
    }

    /// As [`Agent::set_rate`], for all that moves to and from a peer at this agent's request.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a rate of 0.
    pub fn set_peer_rate(&self, peer: &PeerHandle, bytes_per_s: Option<u64>) -> Result<()> {
        peer.core().rate().set(check_rate(bytes_per_s)?);
        Ok(())
    }

    /// What each backend has moved.
    #[must_use]
    pub fn stats(&self) -> AgentStats {
        AgentStats {
            backends: self.0.stats.snapshot(),
            notifications_held_back: self.0.exports.inbox().held_back(),
            notifications_refused: self.0.exports.inbox().refused(),
            failovers: self.0.stats.failovers(),
            ports: self
                .0
                .exports
                .fabrics()
                .iter()
                .flat_map(|fabric| fabric.ports())
                .collect(),
        }
    }
}

fn check_rate(bytes_per_s: Option<u64>) -> Result<Option<u64>> {
    match bytes_per_s {
        Some(0) => Err(Error::invalid("bytes a second", 0, 1..=u64::MAX)),
        rate => Ok(rate),
    }
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").field("name", &self.name()).finish()
    }
}

#[cfg(test)]
mod tests;
