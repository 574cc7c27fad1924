//! Peers, and the choice of the way to each.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::AgentCore;
use super::links::{Links, is_same, refusal};
use super::path::PathReport;
use crate::backend::{Backend, Channel, NOT_WANTED};
use crate::metadata::{Incarnation, PeerCard, RemoteRegion};
use crate::plan::Plan;
use crate::region::RegionId;
use crate::request::{Bucket, TRIES_MAX};
use crate::stats::{Counters, Stats};

/// How long connecting to a peer may take, for each way that is tried, unless
/// [`AgentBuilder::connect_within`](super::AgentBuilder::connect_within) says otherwise.
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

/// A piece of a request that failed at completion.
pub(crate) struct Failure<'a> {
    /// What moved it; none if nothing has, because there was no connection.
    pub(crate) backend: Option<&'a Arc<dyn Backend>>,
    pub(crate) at: Instant,
    /// How often the caller had ended the peer's connections when the request was posted.
    pub(crate) closings: u64,
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
    links: Links,
    /// Held while connecting, so that it is done once, and readers of `links` don't wait for it. When it was last tried in
    /// vain, and why.
    connecting: Mutex<Option<(Instant, String)>>,
    /// How often all connections were ended on purpose.
    closings: AtomicU64,
    /// Requests that wait for a connection: later ones go after them.
    queued: AtomicU64,
    rate: Arc<Bucket>,
    /// What requests of this agent have moved to and from the peer.
    stats: Stats,
}

impl PeerCore {
    pub(super) fn new(card: PeerCard) -> Self {
        Self {
            name: card.name.clone(),
            known: RwLock::new(Known::new(card)),
            links: Links::default(),
            connecting: Mutex::default(),
            closings: AtomicU64::new(0),
            queued: AtomicU64::new(0),
            rate: Arc::default(),
            stats: Stats::default(),
        }
    }

    /// What a backend has moved to and from the peer; counted for the agent, too.
    pub(crate) fn counters(&self, agent: &AgentCore, backend: &'static str) -> Arc<Counters> {
        agent.stats().part(&self.stats, backend)
    }

    /// Which way a plan would go now, and why not another; connects if there is no connection.
    pub(crate) fn report_for(
        self: &Arc<Self>,
        agent: &Arc<AgentCore>,
        plan: &Plan,
    ) -> Result<PathReport> {
        let channel = self.choose(agent, plan)?;
        Ok(self.links.explain(Ok(channel), plan))
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

    /// Which start of it its metadata were of.
    pub(crate) fn incarnation(&self) -> Incarnation {
        self.card().incarnation
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
        self.links.forgive();
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
        for channel in self.links.take() {
            channel.close();
        }
    }

    /// The best connection that reaches all of the plan's regions; connects if there is none.
    pub(crate) fn channel(
        self: &Arc<Self>,
        agent: &Arc<AgentCore>,
        plan: &Plan,
    ) -> Result<Arc<dyn Channel>> {
        if let Some(channel) = self.links.connected(plan, None) {
            self.try_better(agent, &channel);
            return Ok(channel);
        }
        let mut connecting = self.begin_connecting();
        if let Some(channel) = self.links.connected(plan, None) {
            return Ok(channel);
        }
        self.connect(agent, plan, None, &mut connecting)
    }

    /// The connection over which a request may be posted now; none if it has to wait for one, or for those before it.
    pub(crate) fn connected(
        self: &Arc<Self>,
        agent: &Arc<AgentCore>,
        plan: &Plan,
    ) -> Option<Arc<dyn Channel>> {
        if self.queued.load(Ordering::Acquire) > 0 {
            return None;
        }
        let channel = self.links.connected(plan, None)?;
        self.try_better(agent, &channel);
        Some(channel)
    }

    /// A request waits for a connection.
    pub(crate) fn enter_queue(&self) {
        self.queued.fetch_add(1, Ordering::AcqRel);
    }

    /// It does not any more.
    pub(crate) fn leave_queue(&self) {
        self.queued.fetch_sub(1, Ordering::AcqRel);
    }

    /// As [`PeerCore::channel`], made ready for the plan. A way that cannot be made ready is left for the next.
    pub(crate) fn ready_channel(
        self: &Arc<Self>,
        agent: &Arc<AgentCore>,
        plan: &Plan,
    ) -> Result<Arc<dyn Channel>> {
        let channel = self.channel(agent, plan)?;
        self.made_ready(agent, plan, channel)
    }

    /// A connection that is ready for the plan: this one, or the next that is.
    pub(crate) fn made_ready(
        self: &Arc<Self>,
        agent: &Arc<AgentCore>,
        plan: &Plan,
        mut channel: Arc<dyn Channel>,
    ) -> Result<Arc<dyn Channel>> {
        let mut tries = 1;
        loop {
            let Err(error) = channel.prepare(plan) else {
                return Ok(channel);
            };
            tries += 1;
            channel = self.after_refusal(agent, plan, (channel, tries), error)?;
        }
    }

    /// A connection would not take a request, and nothing was started: its way is avoided for a while.
    ///
    /// # Errors
    /// The one given, if it is not the way's, or has come too often.
    pub(crate) fn leave_refusing(
        &self,
        refusing: &Arc<dyn Backend>,
        tries: u32,
        error: Error,
    ) -> Result<()> {
        if !is_worth_another(tries, &error) {
            return Err(error);
        }
        self.leave(refusing, &error.to_string());
        Ok(())
    }

    /// Another way for what one would not take: nothing was started. The error if there is none, or it is not the way's.
    fn after_refusal(
        self: &Arc<Self>,
        agent: &Arc<AgentCore>,
        plan: &Plan,
        (refusing, tries): (Arc<dyn Channel>, u32),
        error: Error,
    ) -> Result<Arc<dyn Channel>> {
        if !is_worth_another(tries, &error) {
            return Err(error);
        }
        let refusing: Arc<dyn Backend> = refusing;
        let failure = Failure {
            backend: Some(&refusing),
            at: Instant::now(),
            closings: self.closings(),
        };
        self.leave(&refusing, &error.to_string());
        match self.channel_after(agent, plan, &failure) {
            Ok(other) => Ok(other),
            // What kept the others from being used is in the path report.
            Err(_) => Err(error),
        }
    }

    /// A connection failed or stands still: its way is avoided for a while.
    pub(crate) fn leave(&self, failed: &Arc<dyn Backend>, why: &str) {
        self.links.leave(failed, why);
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
        let but = failure.backend;
        if let Some(channel) = self.links.connected(plan, but) {
            return Ok(channel);
        }
        if let Some((at, text)) = &*connecting
            && *at > failure.at
        {
            return Err(Error::new(ErrorKind::PeerLost, text.clone()));
        }
        self.connect(agent, plan, but, &mut connecting)
    }

    /// Another connection for what stands still on one, whose way is avoided then. It may be the way itself again only after
    /// a while.
    pub(crate) fn channel_beside(
        self: &Arc<Self>,
        agent: &Arc<AgentCore>,
        plan: &Plan,
        slow: &Failure<'_>,
        why: &str,
    ) -> Result<Arc<dyn Channel>> {
        let other = self.channel_after(agent, plan, slow)?;
        if let Some(backend) = slow.backend {
            self.leave(backend, why);
        }
        Ok(other)
    }

    fn begin_connecting(&self) -> MutexGuard<'_, Option<(Instant, String)>> {
        self.connecting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Tries every way that is not connected, best first, until one serves the plan. Those that were left come last.
    fn connect(
        &self,
        agent: &Arc<AgentCore>,
        plan: &Plan,
        but: Option<&Arc<dyn Backend>>,
        in_vain: &mut Option<(Instant, String)>,
    ) -> Result<Arc<dyn Channel>> {
        let card = self.card();
        let fabrics = agent.exports().fabrics();
        self.links.know(fabrics.iter().map(|fabric| fabric.name()));
        let (left, others): (Vec<usize>, Vec<usize>) =
            (0..fabrics.len()).partition(|&position| self.links.is_left(position));
        let (mut refused, mut is_reached) = (Vec::new(), false);
        for &position in others.iter().chain(&left) {
            let fabric = &fabrics[position];
            let (name, usable) = (fabric.name(), self.links.usable(position));
            if !plan.wants(name) {
                refused.push(format!("{name}: {NOT_WANTED}"));
                continue;
            }
            let channel = match usable {
                Some(channel) if is_same(&channel, but) => {
                    refused.push(format!("{name}: it has failed just now"));
                    continue;
                }
                Some(channel) => Ok(channel),
                None => {
                    let made = fabric.connect(&card, agent.connect_within);
                    self.links.set(position, made.as_ref());
                    self.warn_of(name, made.as_ref().err());
                    made
                }
            };
            let reason = match channel {
                Ok(channel) => {
                    is_reached |= fabric.is_way_of_its_own();
                    let Some(reason) = refusal(&*channel, plan) else {
                        self.links.take_back(position);
                        return Ok(channel);
                    };
                    reason
                }
                Err(reason) => reason.to_string(),
            };
            refused.push(format!("{name}: {reason}"));
        }
        let reasons = match refused.is_empty() {
            true => "no way is enabled".into(),
            false => refused.join("; "),
        };
        if is_reached {
            let text = format!("no way to peer {:?} does this ({reasons})", self.name);
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        let text = format!("peer {:?} can't be reached ({reasons})", self.name);
        // Of those that this request wants nothing follows for others.
        if plan.ways.is_empty() {
            *in_vain = Some((Instant::now(), text.clone()));
        }
        Err(Error::new(ErrorKind::PeerLost, text))
    }

    /// A way that both sides have, and that did not come about.
    fn warn_of(&self, way: &'static str, refused: Option<&Error>) {
        match refused {
            None => {}
            Some(error) if error.kind() == ErrorKind::Unsupported => {
                tracing::debug!(peer = self.name, way, %error, "a way to a peer is not there");
            }
            Some(error) => {
                tracing::warn!(peer = self.name, way, %error, "a way to a peer was refused");
            }
        }
    }

    /// Has better ways that were left tried again, if it is time.
    fn try_better(self: &Arc<Self>, agent: &Arc<AgentCore>, used: &Arc<dyn Channel>) {
        let due = self.links.due(used);
        if !due.is_empty() {
            agent.later().reconnect(agent, self, due);
        }
    }

    /// Tries ways again that were left, without anybody waiting for it.
    pub(crate) fn reconnect(&self, agent: &AgentCore, positions: &[usize]) {
        let _connecting = self.begin_connecting();
        let card = self.card();
        let fabrics = agent.exports().fabrics();
        for &position in positions {
            if let Some(fabric) = fabrics.get(position)
                && self.links.usable(position).is_none()
            {
                let made = fabric.connect(&card, agent.connect_within);
                self.links.set(position, made.as_ref());
                if let Err(error) = made {
                    self.links.leave_longer(position, &error.to_string());
                }
            }
        }
    }

    /// The way to all regions that it exports, or if there is none, to the peer as such.
    pub(super) fn report(self: &Arc<Self>, agent: &Arc<AgentCore>) -> PathReport {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let all = Plan::touching(known.regions.values().cloned());
        drop(known);
        let chosen = self.choose(agent, &all);
        if chosen.is_err() && !all.remote.is_empty() {
            return self.links.explain(self.choose(agent, &Plan::empty()), &all);
        }
        self.links.explain(chosen, &all)
    }

    /// The way to one of its regions.
    pub(super) fn report_of(
        self: &Arc<Self>,
        agent: &Arc<AgentCore>,
        region: RegionId,
    ) -> Result<PathReport> {
        let plan = Plan::touching([self.find(region)?]);
        Ok(self.links.explain(self.choose(agent, &plan), &plan))
    }

    fn choose(self: &Arc<Self>, agent: &Arc<AgentCore>, plan: &Plan) -> Result<Arc<dyn Channel>> {
        agent.check().and_then(|()| self.channel(agent, plan))
    }
}

/// Whether another way may be tried for what one has refused so often.
fn is_worth_another(tries: u32, error: &Error) -> bool {
    tries <= TRIES_MAX && is_of_the_way(error.kind())
}

/// Whether an error is of the way that gave it, so that another one may do better.
fn is_of_the_way(kind: ErrorKind) -> bool {
    use ErrorKind::{Corrupt, Io, PeerLost, Timeout, Unsupported};
    matches!(kind, PeerLost | Io | Corrupt | Timeout | Unsupported)
}
