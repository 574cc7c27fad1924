//! A peer's memory on the other side: its half goes by an ordinary request, whichever way is best for host memory.

use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use kvcache_core::{Error, ErrorKind, Result};

use super::super::leg::{Answer, Control};
use super::super::{Backend, Capabilities, Channel, Fabric, Job, Kinds, Refusal, cuda};
use super::{NAME, Other, StagedBackend};
use crate::agent::{AgentCore, PeerCard, PeerCore, RemoteRegion};
use crate::descriptor::Target;
use crate::plan::Plan;
use crate::region::MemoryKind;
use crate::request::{Priority, Request};

/// The deadline of a half: whoever posted the whole gives it up long before.
const HALF_DEADLINE: Duration = Duration::from_secs(24 * 3600);

const LOCAL: &[MemoryKind] = &[MemoryKind::ANY_DEVICE];
const REMOTE: &[MemoryKind] = &[MemoryKind::Host, MemoryKind::ANY_DEVICE];

/// The last way to peers for memory of devices: over all the others.
struct StagedFabric {
    agent: Weak<AgentCore>,
}

/// Of an agent that has CUDA.
pub(crate) fn fabric(agent: &Arc<AgentCore>) -> Arc<dyn Fabric> {
    Arc::new(StagedFabric {
        agent: Arc::downgrade(agent),
    })
}

fn closed() -> Error {
    Error::new(ErrorKind::PeerLost, "the agent is closed")
}

impl Fabric for StagedFabric {
    fn name(&self) -> &'static str {
        NAME
    }

    fn address(&self) -> Option<Vec<u8>> {
        // The other ways have addresses.
        None
    }

    fn kinds(&self) -> Kinds {
        Kinds {
            local: LOCAL,
            remote: REMOTE,
        }
    }

    fn is_way_of_its_own(&self) -> bool {
        false
    }

    fn connect(&self, peer: &PeerCard, _timeout: Duration) -> Result<Arc<dyn Channel>> {
        let agent = self.agent.upgrade().ok_or_else(closed)?;
        let known = agent.peer(&peer.name);
        let known = known.filter(|known| known.incarnation() == peer.incarnation);
        let known = known.ok_or_else(|| {
            let text = format!("peer {:?} is not known any more", peer.name);
            Error::new(ErrorKind::PeerLost, text)
        })?;
        Ok(Arc::new(StagedChannel {
            backend: StagedBackend::of(&agent)?,
            agent: self.agent.clone(),
            peer: Arc::downgrade(&known),
            is_closed: Arc::default(),
            capabilities: Capabilities {
                local: LOCAL,
                remote: REMOTE,
                notifications: true,
                checksums: false,
            },
        }))
    }

    fn close(&self) {}
}

/// The way to one incarnation of a peer.
struct StagedChannel {
    backend: Arc<StagedBackend>,
    agent: Weak<AgentCore>,
    peer: Weak<PeerCore>,
    is_closed: Arc<AtomicBool>,
    capabilities: Capabilities,
}

/// What the halves of one job go to.
pub(super) struct Far {
    agent: Arc<AgentCore>,
    peer: Arc<PeerCore>,
    is_closed: Arc<AtomicBool>,
    /// Every way but this one.
    ways: Arc<[String]>,
}

impl StagedChannel {
    fn far(&self, plan: &Plan) -> Result<Far> {
        self.check()?;
        let agent = self.agent.upgrade().ok_or_else(closed)?;
        let peer = self.peer.upgrade().ok_or_else(closed)?;
        let others = |names: &[&str]| -> Vec<String> {
            let others = names.iter().filter(|name| **name != NAME);
            others.map(|name| (*name).to_owned()).collect()
        };
        let wanted: Vec<&str> = plan.ways.iter().map(String::as_str).collect();
        let mut ways = others(&wanted);
        if ways.is_empty() {
            let fabrics = agent.exports().fabrics();
            let names: Vec<&str> = fabrics.iter().map(|fabric| fabric.name()).collect();
            ways = others(&names);
        }
        Ok(Far {
            agent,
            peer,
            is_closed: self.is_closed.clone(),
            ways: ways.into(),
        })
    }
}

impl Backend for StagedChannel {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn refusal(&self, plan: &Plan) -> Option<String> {
        if plan.wants(NAME) && plan.local.is_empty() {
            return Some("is for memory of devices of this agent".to_owned());
        }
        cuda::refusal(plan, NAME)
    }

    fn prepare(&self, plan: &Plan) -> Result<()> {
        self.backend.stage().prepare(plan)?;
        let far = self.far(plan)?;
        let touched = plan.remote.iter().filter_map(|target| match target {
            Target::Remote(region) => Some(region.clone()),
            Target::Local(_) => None,
        });
        let half = Plan {
            operation: plan.operation,
            ways: far.ways.clone(),
            ..Plan::touching(touched)
        };
        far.peer.ready_channel(&far.agent, &half).map(drop)
    }

    fn post(&self, job: Job) -> Result<(), Refusal> {
        match self.far(job.plan()) {
            Ok(far) => self.backend.begin(job, Other::Peer(far)),
            Err(error) => Err(job.refuse(error)),
        }
    }

    fn reap(&self) {
        self.backend.reap();
    }
}

impl Channel for StagedChannel {
    fn check(&self) -> Result<()> {
        match self.is_closed.load(Ordering::Acquire) {
            true => Err(Error::new(ErrorKind::PeerLost, "the peer was forgotten")),
            false => Ok(()),
        }
    }

    fn reaches(&self, _region: &RemoteRegion) -> Result<(), String> {
        Ok(())
    }

    fn detail(&self) -> String {
        let mib = self.backend.stage().window_bytes() >> 20;
        format!("staged over {mib} MiB of pinned memory for each device, and a way for host memory")
    }

    fn close(&self) {
        self.is_closed.store(true, Ordering::Release);
    }
}

impl Far {
    /// Has a plan between a window and the peer's memory carried out; `keep` is kept until it is over.
    pub(super) fn post(
        &self,
        (mut plan, priority): (Plan, Priority),
        control: &Control,
        keep: impl Any + Send,
    ) -> Result<Answer> {
        plan.ways = self.ways.clone();
        self.begin((plan, priority), None, control, keep)
    }

    /// Tells the peer that all is in place.
    pub(super) fn notify(&self, notice: Bytes, control: &Control) -> Result<Answer> {
        let plan = Plan {
            ways: self.ways.clone(),
            ..Plan::empty()
        };
        self.begin((plan, Priority::Normal), Some(notice), control, ())
    }

    fn begin(
        &self,
        half: (Plan, Priority),
        notice: Option<Bytes>,
        control: &Control,
        keep: impl Any + Send,
    ) -> Result<Answer> {
        if self.is_closed.load(Ordering::Acquire) {
            return Err(Error::new(ErrorKind::PeerLost, "the peer was forgotten"));
        }
        let holding = control.begin(keep)?;
        let request = Request::half(&self.agent, &self.peer, half, (notice, HALF_DEADLINE))?;
        request.post()?;
        let control = control.clone();
        let ended = async move {
            let done = tokio::select! {
                done = request.completion() => done,
                () = control.stopped() => {
                    request.cancel();
                    request.completion().await
                }
            };
            // Only then is the chunk nobody's.
            request.drained().await;
            done.map(drop).map_err(Error::from)
        };
        Ok(holding.watch(ended))
    }
}
