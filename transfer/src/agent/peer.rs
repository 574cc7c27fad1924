//! Peers, and the choice of the way to each.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::AgentCore;
use crate::backend::{Backend, Channel};
use crate::descriptor::Target;
use crate::metadata::{PeerCard, RemoteRegion};
use crate::plan::Plan;
use crate::region::RegionId;
use crate::request::Bucket;

/// How long connecting to a peer may take, for each way that is tried.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// A peer that was loaded from metadata. Cheap to clone.
#[derive(Clone)]
pub struct PeerHandle(Arc<PeerCore>);

impl PeerHandle {
    pub(super) fn new(core: Arc<PeerCore>) -> Self {
        Self(core)
    }

    pub(crate) fn core(&self) -> &Arc<PeerCore> {
        &self.0
    }

    /// Its agent's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The regions that it exported, with their sizes in bytes, in no particular order.
    #[must_use]
    pub fn regions(&self) -> Vec<(RegionId, u64)> {
        let known = self.0.known.read().unwrap_or_else(PoisonError::into_inner);
        known
            .regions
            .values()
            .map(|region| (region.id, region.bytes))
            .collect()
    }
}

impl std::fmt::Debug for PeerHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PeerHandle")
            .field("name", &self.name())
            .finish()
    }
}

/// Which way bytes go to a peer, and why not another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathReport {
    /// The backend in use; none when the peer can't be reached.
    pub backend: Option<&'static str>,
    /// What is worth knowing about the connection; empty without one.
    pub why: String,
    /// Backends that would have been preferred, with what kept them from being used.
    pub refused: Vec<(&'static str, String)>,
}

/// A piece of a request that failed at completion.
pub(crate) struct Failure<'a> {
    /// What moved it.
    pub(crate) backend: &'a Arc<dyn Backend>,
    pub(crate) at: Instant,
    /// How often the caller had ended the peer's connections when the request was posted.
    pub(crate) closings: u64,
}

/// One way to the peer, in order of preference.
struct Link {
    name: &'static str,
    state: LinkState,
}

enum LinkState {
    Untried,
    Connected(Arc<dyn Channel>),
    Refused(String),
}

struct Known {
    card: Arc<PeerCard>,
    regions: HashMap<RegionId, Arc<RemoteRegion>>,
}

impl Known {
    fn new(card: PeerCard) -> Self {
        let regions = card
            .regions
            .iter()
            .map(|region| (region.id, region.clone()))
            .collect();
        Self {
            card: Arc::new(card),
            regions,
        }
    }
}

/// What the handles, lists and requests of a peer share.
pub(crate) struct PeerCore {
    name: String,
    known: RwLock<Known>,
    links: RwLock<Vec<Link>>,
    /// Held while connecting, so that it is done once, and readers of `links` don't wait for it. When it was last tried in
    /// vain, and why.
    connecting: Mutex<Option<(Instant, String)>>,
    /// How often all connections were ended on purpose.
    closings: AtomicU64,
    rate: Arc<Bucket>,
}

impl PeerCore {
    pub(super) fn new(card: PeerCard) -> Self {
        Self {
            name: card.name.clone(),
            known: RwLock::new(Known::new(card)),
            links: RwLock::default(),
            connecting: Mutex::default(),
            closings: AtomicU64::new(0),
            rate: Arc::default(),
        }
    }

    /// What limits all that moves to and from the peer.
    pub(crate) fn rate(&self) -> &Arc<Bucket> {
        &self.rate
    }

    /// How often all connections were ended on purpose: what failed by that is not tried again.
    pub(crate) fn closings(&self) -> u64 {
        self.closings.load(Ordering::Acquire)
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    fn card(&self) -> Arc<PeerCard> {
        self.known
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .card
            .clone()
    }

    /// Newer metadata of the same name, or a part of it. Ways that were refused are tried again.
    pub(super) fn update(&self, card: PeerCard) {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        let restarted = known.card.incarnation != card.incarnation;
        let partial = card.partial;
        let before = std::mem::replace(&mut *known, Known::new(card));
        if partial && !restarted {
            for (id, region) in before.regions {
                known.regions.entry(id).or_insert(region);
            }
        }
        drop(known);
        if restarted {
            self.close();
            return;
        }
        let mut links = self.links.write().unwrap_or_else(PoisonError::into_inner);
        for link in links.iter_mut() {
            if matches!(link.state, LinkState::Refused(_)) {
                link.state = LinkState::Untried;
            }
        }
    }

    pub(super) fn find(&self, id: RegionId) -> Result<Arc<RemoteRegion>> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.regions.get(&id).cloned().ok_or_else(|| {
            let text = format!("peer {:?} exports no region {id}", self.name);
            Error::new(ErrorKind::NotFound, text)
        })
    }

    /// Ends all connections; the next use makes new ones.
    pub(super) fn close(&self) {
        self.closings.fetch_add(1, Ordering::AcqRel);
        let links =
            std::mem::take(&mut *self.links.write().unwrap_or_else(PoisonError::into_inner));
        for link in links {
            if let LinkState::Connected(channel) = link.state {
                channel.close();
            }
        }
    }

    /// The best connection that reaches all of the plan's regions; connects if there is none.
    pub(crate) fn channel(
        self: &Arc<Self>,
        agent: &Arc<AgentCore>,
        plan: &Plan,
    ) -> Result<Arc<dyn Channel>> {
        if let Some(channel) = self.connected(plan, None) {
            return Ok(channel);
        }
        let mut connecting = self.begin_connecting();
        if let Some(channel) = self.connected(plan, None) {
            return Ok(channel);
        }
        self.connect(agent, plan, None, &mut connecting)
    }

    /// As [`PeerCore::channel`] for what has failed: not over the same connection, and not if connecting was tried in vain
    /// since.
    pub(crate) fn channel_after(
        self: &Arc<Self>,
        agent: &Arc<AgentCore>,
        plan: &Plan,
        failure: &Failure<'_>,
    ) -> Result<Arc<dyn Channel>> {
        let mut connecting = self.begin_connecting();
        if self.closings() != failure.closings {
            let text = format!("the connections to peer {:?} were ended", self.name);
            return Err(Error::new(ErrorKind::PeerLost, text));
        }
        if let Some(channel) = self.connected(plan, Some(failure.backend)) {
            return Ok(channel);
        }
        if let Some((at, text)) = &*connecting
            && *at > failure.at
        {
            return Err(Error::new(ErrorKind::PeerLost, text.clone()));
        }
        self.connect(agent, plan, Some(failure.backend), &mut connecting)
    }

    fn begin_connecting(&self) -> MutexGuard<'_, Option<(Instant, String)>> {
        self.connecting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The best connection that serves the plan, other than `but`.
    fn connected(&self, plan: &Plan, but: Option<&Arc<dyn Backend>>) -> Option<Arc<dyn Channel>> {
        let links = self.links.read().unwrap_or_else(PoisonError::into_inner);
        links.iter().find_map(|link| match &link.state {
            LinkState::Connected(channel)
                if channel.check().is_ok()
                    && refusal(&**channel, plan).is_none()
                    && !is_same(channel, but) =>
            {
                Some(channel.clone())
            }
            _ => None,
        })
    }

    /// Tries every way that is not connected, best first, until one serves the plan.
    fn connect(
        &self,
        agent: &Arc<AgentCore>,
        plan: &Plan,
        but: Option<&Arc<dyn Backend>>,
        in_vain: &mut Option<(Instant, String)>,
    ) -> Result<Arc<dyn Channel>> {
        let card = self.card();
        let mut refused = Vec::new();
        for (position, fabric) in agent.exports().fabrics().iter().enumerate() {
            let channel = match self.usable(position) {
                Some(channel) if is_same(&channel, but) => {
                    refused.push(format!("{}: it has failed just now", fabric.name()));
                    continue;
                }
                Some(channel) => Ok(channel),
                None => fabric.connect(&card, CONNECT_TIMEOUT),
            };
            let state = match &channel {
                Ok(channel) => LinkState::Connected(channel.clone()),
                Err(reason) => LinkState::Refused(reason.to_string()),
            };
            self.set_link(
                position,
                Link {
                    name: fabric.name(),
                    state,
                },
            );
            match channel {
                Ok(channel) => match refusal(&*channel, plan) {
                    None => return Ok(channel),
                    Some(reason) => refused.push(format!("{}: {reason}", fabric.name())),
                },
                Err(reason) => refused.push(format!("{}: {reason}", fabric.name())),
            }
        }
        let reasons = if refused.is_empty() {
            "no way is enabled".into()
        } else {
            refused.join("; ")
        };
        let text = format!("peer {:?} can't be reached ({reasons})", self.name);
        *in_vain = Some((Instant::now(), text.clone()));
        Err(Error::new(ErrorKind::PeerLost, text))
    }

    fn usable(&self, position: usize) -> Option<Arc<dyn Channel>> {
        let links = self.links.read().unwrap_or_else(PoisonError::into_inner);
        match &links.get(position)?.state {
            LinkState::Connected(channel) if channel.check().is_ok() => Some(channel.clone()),
            _ => None,
        }
    }

    fn set_link(&self, position: usize, link: Link) {
        let mut links = self.links.write().unwrap_or_else(PoisonError::into_inner);
        while links.len() <= position {
            links.push(Link {
                name: link.name,
                state: LinkState::Untried,
            });
        }
        links[position] = link;
    }

    /// The way to all regions that it exports, or if there is none, to the peer as such.
    pub(super) fn report(self: &Arc<Self>, agent: &Arc<AgentCore>) -> PathReport {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let all = Plan::touching(known.regions.values().cloned());
        drop(known);
        let chosen = self.choose(agent, &all);
        if chosen.is_err() && !all.remote.is_empty() {
            return self.explain(self.choose(agent, &Plan::empty()), &all);
        }
        self.explain(chosen, &all)
    }

    /// The way to one of its regions.
    pub(super) fn report_of(
        self: &Arc<Self>,
        agent: &Arc<AgentCore>,
        region: RegionId,
    ) -> Result<PathReport> {
        let plan = Plan::touching([self.find(region)?]);
        Ok(self.explain(self.choose(agent, &plan), &plan))
    }

    fn choose(self: &Arc<Self>, agent: &Arc<AgentCore>, plan: &Plan) -> Result<Arc<dyn Channel>> {
        agent.check().and_then(|()| self.channel(agent, plan))
    }

    /// What was chosen for a plan, and what kept better ways from being chosen.
    fn explain(&self, chosen: Result<Arc<dyn Channel>>, plan: &Plan) -> PathReport {
        let links = self.links.read().unwrap_or_else(PoisonError::into_inner);
        let mut refused = Vec::new();
        for link in links.iter() {
            match &link.state {
                LinkState::Untried => refused.push((link.name, "not tried".to_owned())),
                LinkState::Refused(reason) => refused.push((link.name, reason.clone())),
                LinkState::Connected(channel) => {
                    if let Ok(chosen) = &chosen
                        && Arc::ptr_eq(chosen, channel)
                    {
                        break;
                    }
                    let reason = channel.check().err().map(|error| error.to_string());
                    let reason = reason.or_else(|| refusal(&**channel, plan));
                    refused.extend(reason.map(|reason| (link.name, reason)));
                }
            }
        }
        PathReport {
            backend: chosen.as_ref().ok().map(|channel| channel.name()),
            why: chosen.map_or_else(|_| String::new(), |channel| channel.detail()),
            refused,
        }
    }
}

fn is_same(channel: &Arc<dyn Channel>, other: Option<&Arc<dyn Backend>>) -> bool {
    other.is_some_and(|other| std::ptr::addr_eq(Arc::as_ptr(channel), Arc::as_ptr(other)))
}

/// Why a channel cannot carry this plan; none if it can.
fn refusal(channel: &dyn Channel, plan: &Plan) -> Option<String> {
    plan.remote.iter().find_map(|target| match target {
        Target::Local(_) => None,
        Target::Remote(region) => channel.reaches(region).err(),
    })
}
