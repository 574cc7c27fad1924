//! The simulated network as a fabric between agents.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use kvcache_core::{Error, ErrorKind, Result, Time};

use super::driver::{Member, SimNetwork, settle};
use super::network::SimNode;
use super::running::Running;
use super::transfer::{Direction, SimTransfer};
use crate::agent::{AgentBuilder, Door, Exports, PeerCard, RemoteRegion};
use crate::backend::{Backend, Capabilities, Channel, Fabric, Job, Operation, Refusal, abandoned};
use crate::descriptor::Target;
use crate::region::{MemoryKind, RegionUse};

/// The name in reports, statistics and metadata.
const NAME: &str = "sim";

impl SimNetwork {
    fn join(&self, exports: &Arc<Exports>) -> Result<Arc<dyn Fabric>> {
        let name = exports.name().to_string();
        let mut state = self.lock();
        if let Some(old) = state.members.get(&name) {
            if old.exports.strong_count() > 0 {
                let text = format!("an agent {name:?} is already on the simulated network");
                return Err(Error::new(ErrorKind::Invalid, text));
            }
            let node = old.node;
            state.exchange.kill(node);
        }
        let node = state.exchange.add_node(&name)?;
        state.members.insert(
            name,
            Member {
                node,
                exports: Arc::downgrade(exports),
            },
        );
        drop(state);
        Ok(Arc::new(SimFabric {
            network: self.clone(),
            node,
            own_name: exports.name().clone(),
        }))
    }
}

struct SimFabric {
    network: SimNetwork,
    node: SimNode,
    own_name: Arc<str>,
}

impl Fabric for SimFabric {
    fn name(&self) -> &'static str {
        NAME
    }

    fn address(&self) -> Option<Vec<u8>> {
        Some(self.network.0.shared.id.to_le_bytes().to_vec())
    }

    fn connect(&self, peer: &PeerCard, _timeout: Duration) -> Result<Arc<dyn Channel>> {
        let own = self.network.0.shared.id.to_le_bytes();
        if peer.address(NAME) != Some(own.as_slice()) {
            let text = "not on this simulated network";
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        let mut state = self.network.lock();
        let node = state.node(&peer.name)?;
        let exports = state
            .members
            .get(&peer.name)
            .and_then(|member| member.exports.upgrade());
        let Some(exports) = exports.filter(|found| found.incarnation() == peer.incarnation) else {
            let text = format!("agent {:?} has left the simulated network", peer.name);
            return Err(Error::new(ErrorKind::PeerLost, text));
        };
        exports.check_allowed(&self.own_name)?;
        state.channels += 1;
        Ok(Arc::new(SimChannel {
            network: self.network.clone(),
            number: state.channels,
            door: exports.inbox().door(),
            nodes: (self.node, node),
            own_name: self.own_name.clone(),
            peer: Arc::downgrade(&exports),
            capabilities: Capabilities {
                local: Capabilities::HOST,
                remote: &[MemoryKind::Host],
                notifications: true,
                checksums: true,
            },
        }))
    }

    fn close(&self) {
        let mut state = self.network.lock();
        state.exchange.kill(self.node);
        state.members.remove(&*self.own_name);
    }
}

struct SimChannel {
    network: SimNetwork,
    number: u64,
    /// By which its notifications reach the peer's inbox.
    door: Door,
    nodes: (SimNode, SimNode),
    own_name: Arc<str>,
    peer: Weak<Exports>,
    capabilities: Capabilities,
}

impl SimChannel {
    fn peer(&self) -> Result<Arc<Exports>> {
        self.peer.upgrade().ok_or_else(|| {
            Error::new(
                ErrorKind::PeerLost,
                "the agent has left the simulated network",
            )
        })
    }

    fn admit(&self, job: &Job) -> Result<(Arc<Exports>, Vec<RegionUse>)> {
        let peer = self.peer()?;
        let plan = job.plan();
        let remote = plan.remote.iter().map(|target| match target {
            Target::Remote(region) => peer.admit(region.id, &region.key, plan.operation),
            Target::Local(region) => RegionUse::begin(Arc::clone(region)),
        });
        let remote = remote.collect::<Result<Vec<_>>>()?;
        Ok((peer, remote))
    }
}

impl Backend for SimChannel {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn post(&self, job: Job) -> Result<(), Refusal> {
        let (peer, remote) = match self.admit(&job) {
            Ok(admitted) => admitted,
            Err(error) => return Err(job.refuse(error)),
        };
        let plan = Arc::clone(job.plan());
        let starts = plan.extents.iter().scan(0, |end, extent| {
            let start = *end;
            *end += extent.len;
            Some(start)
        });
        let transfer = SimTransfer {
            initiator: self.nodes.0,
            peer: self.nodes.1,
            direction: match plan.operation {
                Operation::Read => Direction::Read,
                Operation::Write => Direction::Write,
            },
            bytes: plan.bytes,
            notify: job.notifies(),
            // The agent watches over the deadline, in real time.
            deadline: Time::MAX,
        };
        let mut state = self.network.lock();
        let now = state.now;
        let id = match state.exchange.handle_transfer(now, transfer) {
            Ok(id) => id,
            Err(error) => return Err(job.refuse(error)),
        };
        let running = Running {
            job,
            remote,
            starts: starts.collect(),
            channel: self.number,
            from: self.own_name.clone(),
            peer,
            failure: None,
            is_unheard: false,
            door: self.door,
            cancelled: false,
        };
        state.running.insert(id, running);
        drop(state);
        self.network.0.shared.changed.notify_all();
        Ok(())
    }

    /// Drained before it is settled.
    fn fences(&self, _operation: Operation) -> bool {
        true
    }

    fn progress(&self) -> Option<u64> {
        Some(self.network.0.shared.steps.load(Ordering::Relaxed))
    }

    fn reap(&self) {
        let settled = self
            .network
            .lock()
            .cancel(|running| running.job.is_abandoned().then(abandoned));
        settle(settled);
        self.network.0.shared.changed.notify_all();
        if let Some(peer) = self.peer.upgrade() {
            peer.inbox().reap();
        }
    }
}

impl Channel for SimChannel {
    fn check(&self) -> Result<()> {
        self.peer().map(drop)
    }

    fn reaches(&self, _region: &RemoteRegion) -> Result<(), String> {
        Ok(())
    }

    fn detail(&self) -> String {
        "simulated, in virtual time".to_owned()
    }

    fn close(&self) {
        let lost = |running: &Running| {
            let ours = running.channel == self.number;
            ours.then(|| Error::new(ErrorKind::PeerLost, "the connection was closed"))
        };
        let settled = self.network.lock().cancel(lost);
        settle(settled);
        if let Some(peer) = self.peer.upgrade() {
            peer.inbox().shut(self.door, "the connection was closed");
        }
        self.network.0.shared.changed.notify_all();
    }
}

impl AgentBuilder {
    /// Joins a simulated network: other members are reached over it before any other way.
    #[must_use]
    pub fn simulated(self, network: &SimNetwork) -> Self {
        let network = network.clone();
        self.with_fabric(move |exports| network.join(exports))
    }
}
