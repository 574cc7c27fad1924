//! Plain copies: between regions of one agent, and between agents of one process.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::copy::{Copier, Place, Progress, Turn, Work};
use super::shared_copy::{copy_plan, is_shared};
use super::{Backend, Capabilities, Channel, Fabric, Job, Refusal};
use crate::agent::{Door, Exports, PeerCard, RemoteRegion};
use crate::descriptor::Target;
use crate::look::Look;
use crate::plan::Plan;
use crate::region::{MemoryKind, RegionUse};

const NAME: &str = "memcpy";

/// The agents of this process, by incarnation.
static AGENTS: LazyLock<Mutex<HashMap<u64, Weak<Exports>>>> = LazyLock::new(Mutex::default);

/// Copies between regions of one agent.
pub(crate) fn own(copier: Arc<Copier>) -> Arc<dyn Backend> {
    const CAPABILITIES: Capabilities = Capabilities {
        local: Capabilities::HOST,
        remote: &[MemoryKind::Host],
        notifications: false,
        checksums: true,
    };
    Arc::new(Own {
        copier,
        capabilities: CAPABILITIES,
    })
}

/// Makes the agent known in this process, and others reachable.
pub(crate) fn fabric(exports: &Arc<Exports>, copier: Arc<Copier>) -> Arc<dyn Fabric> {
    let mut agents = AGENTS.lock().unwrap_or_else(PoisonError::into_inner);
    agents.insert(exports.incarnation().0, Arc::downgrade(exports));
    Arc::new(Process {
        own_name: exports.name().clone(),
        copier,
    })
}

/// The agent is going: others don't find it any more.
pub(crate) fn leave(exports: &Exports) {
    let mut agents = AGENTS.lock().unwrap_or_else(PoisonError::into_inner);
    agents.remove(&exports.incarnation().0);
}

struct Own {
    copier: Arc<Copier>,
    capabilities: Capabilities,
}

impl Backend for Own {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn post(&self, job: Job) -> Result<(), Refusal> {
        let work = Within {
            threads: self.copier.threads(),
            place: Place::default(),
        };
        self.copier.post(job, work)
    }

    fn assist(&self, until: Instant, _look: &Look<'_>, done: &dyn Fn() -> bool) {
        self.copier.assist(until, done);
    }
}

/// A copy between regions of one agent.
struct Within {
    threads: usize,
    place: Place,
}

impl Work for Within {
    fn go_on(&mut self, job: &Job, turn: &Turn<'_>) -> Result<Progress> {
        let (plan, go_on) = (job.plan(), || turn.go_on(job));
        copy_plan(
            plan,
            self.threads,
            &mut self.place,
            &go_on,
            |remote| match &plan.remote[remote as usize] {
                Target::Local(region) => region.mapping(),
                Target::Remote(region) => Err(not_ours(region)),
            },
        )
    }

    fn may_pause(&self, plan: &Plan) -> bool {
        !is_shared(plan, self.threads)
    }

    fn end(&mut self, job: Job, outcome: Result<()>) {
        job.settle(outcome);
    }
}

fn not_ours(region: &RemoteRegion) -> Error {
    Error::new(
        ErrorKind::Internal,
        format!("region {} belongs to a peer", region.id),
    )
}

struct Process {
    own_name: Arc<str>,
    copier: Arc<Copier>,
}

impl Fabric for Process {
    fn name(&self) -> &'static str {
        NAME
    }

    fn address(&self) -> Option<Vec<u8>> {
        // The incarnation, which every metadata has, is all that it takes.
        None
    }

    fn connect(&self, peer: &PeerCard, _timeout: Duration) -> Result<Arc<dyn Channel>> {
        let agents = AGENTS.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(exports) = agents.get(&peer.incarnation.0).and_then(Weak::upgrade) else {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "not an agent of this process",
            ));
        };
        drop(agents);
        exports.check_allowed(&self.own_name)?;
        Ok(Arc::new(Neighbour {
            door: exports.inbox().door(),
            own_name: self.own_name.clone(),
            peer: Arc::downgrade(&exports),
            copier: self.copier.clone(),
            closed: AtomicBool::new(false),
            capabilities: Capabilities {
                local: Capabilities::HOST,
                remote: &[MemoryKind::Host],
                notifications: true,
                checksums: true,
            },
        }))
    }

    fn close(&self) {}
}

/// Another agent of this process, or the agent itself.
struct Neighbour {
    door: Door,
    own_name: Arc<str>,
    peer: Weak<Exports>,
    copier: Arc<Copier>,
    closed: AtomicBool,
    capabilities: Capabilities,
}

impl Neighbour {
    fn peer(&self) -> Result<Arc<Exports>> {
        let closed = self.closed.load(Ordering::Acquire);
        self.peer
            .upgrade()
            .filter(|_| !closed)
            .ok_or_else(|| Error::new(ErrorKind::PeerLost, "the agent of this process is gone"))
    }

    /// Counts the transfer as a user of each remote region.
    fn admit(&self, peer: &Exports, plan: &Plan) -> Result<Vec<RegionUse>> {
        let mut uses = Vec::with_capacity(plan.remote.len());
        for target in &*plan.remote {
            match target {
                Target::Remote(region) => {
                    uses.push(peer.admit(region.id, &region.key, plan.operation)?);
                }
                Target::Local(region) => uses.push(RegionUse::begin(region.clone())?),
            }
        }
        Ok(uses)
    }
}

impl Backend for Neighbour {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn post(&self, job: Job) -> Result<(), Refusal> {
        let peer = match self.peer() {
            Ok(peer) => peer,
            Err(error) => return Err(job.refuse(error)),
        };
        let uses = match self.admit(&peer, job.plan()) {
            Ok(uses) => uses,
            Err(error) => return Err(job.refuse(error)),
        };
        let work = Between {
            door: self.door,
            own_name: self.own_name.clone(),
            peer,
            uses,
            threads: self.copier.threads(),
            place: Place::default(),
        };
        self.copier.post(job, work)
    }

    /// Copies look for themselves; a notification that waits for room does not.
    fn reap(&self) {
        if let Some(peer) = self.peer.upgrade() {
            peer.inbox().reap();
        }
    }

    fn assist(&self, until: Instant, _look: &Look<'_>, done: &dyn Fn() -> bool) {
        self.copier.assist(until, done);
    }
}

/// A copy between agents of one process.
struct Between {
    door: Door,
    own_name: Arc<str>,
    peer: Arc<Exports>,
    uses: Vec<RegionUse>,
    threads: usize,
    place: Place,
}

impl Work for Between {
    fn go_on(&mut self, job: &Job, turn: &Turn<'_>) -> Result<Progress> {
        let (plan, go_on) = (job.plan(), || turn.go_on(job));
        copy_plan(plan, self.threads, &mut self.place, &go_on, |remote| {
            self.uses[remote as usize].region().mapping()
        })
    }

    fn may_pause(&self, plan: &Plan) -> bool {
        !is_shared(plan, self.threads)
    }

    fn end(&mut self, job: Job, outcome: Result<()>) {
        self.uses.clear();
        match outcome {
            Ok(()) => self.peer.deliver_for(self.door, &self.own_name, job),
            Err(error) => job.settle(Err(error)),
        }
    }
}

impl Channel for Neighbour {
    fn check(&self) -> Result<()> {
        self.peer().map(drop)
    }

    fn reaches(&self, _region: &RemoteRegion) -> Result<(), String> {
        Ok(())
    }

    fn detail(&self) -> String {
        "an agent of the same process".into()
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Release);
        if let Some(peer) = self.peer.upgrade() {
            peer.inbox().shut(self.door, "the peer was forgotten");
        }
    }
}
