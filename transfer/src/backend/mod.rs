//! What moves bytes: one trait, and the job it is handed.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvcache_core::Result;

use crate::agent::{ConnectionReport, PeerCard, RemoteRegion};
use crate::look::Look;
use crate::plan::Plan;
use crate::region::MemoryKind;
use crate::stats::PortStats;

pub(crate) mod cma;
pub mod conformance;
pub(crate) mod copy;
pub mod cuda;
pub(crate) mod direct;
mod far_sums;
pub mod file;
pub(crate) mod gds;
mod giving_way;
pub(crate) mod job;
mod late;
pub(crate) mod leg;
pub(crate) mod memcpy;
pub mod object;
mod shared_copy;
pub(crate) mod shm;
pub mod sim;
pub(crate) mod spare;
pub(crate) mod staged;
pub(crate) mod tcp;
#[cfg(test)]
mod trials;
pub mod ucx;
pub(crate) mod unix;
pub mod verbs;

/// Where a device's stream was at some time, or will be.
pub(crate) use crate::sys::cuda::CudaPoint as Point;
pub(crate) use job::{Job, Refusal, abandoned};

/// Which way bytes go, seen from the one who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// From the remote side into local memory.
    Read,
    /// From local memory to the remote side.
    Write,
}

/// What a backend can do; read once, when a path is chosen.
#[derive(Clone, Debug)]
pub(crate) struct Capabilities {
    /// Kinds of the local side that it moves.
    pub(crate) local: &'static [MemoryKind],
    /// Kinds of the remote side that it reaches.
    pub(crate) remote: &'static [MemoryKind],
    /// Whether it carries notifications.
    pub(crate) notifications: bool,
    /// Whether it takes plans of checksums ([`Plan::sums`]).
    pub(crate) checksums: bool,
}

/// Kinds of memory that the channels of a way may move, each if the peer and its machine allow: [`Capabilities`] says what
/// one does.
pub(crate) struct Kinds {
    /// On the local side.
    pub(crate) local: &'static [MemoryKind],
    /// On the peer's side.
    pub(crate) remote: &'static [MemoryKind],
}

impl Capabilities {
    /// Either side of most backends.
    pub(crate) const HOST: &'static [MemoryKind] = &[MemoryKind::Host];
}

/// Why a backend that a request does not name is not used.
pub(crate) const NOT_WANTED: &str = "the request wants other backends";

/// Why a backend without anybody at its other end does not compare checksums.
const NOT_COMPARED: &str = "compares no checksums, because nobody at its other end computes them: keep that of the memory \
    that was written, and compare it with that of the memory that is read";

/// Something that moves bytes: the connection to one peer, or the engine behind files or objects.
///
/// Every accepted [`Job`] is settled exactly once, whatever happens. Nothing here blocks for long: work that does
/// goes to a thread of the backend. A job's failure after acceptance goes to the job, never to `post`'s result.
pub(crate) trait Backend: Send + Sync {
    /// The name in reports, statistics and completions.
    fn name(&self) -> &'static str;

    /// What it can do.
    fn capabilities(&self) -> &Capabilities;

    /// Why it does not do what a plan asks for beside moving bytes; none if it does.
    fn refusal(&self, plan: &Plan) -> Option<String> {
        let checked = plan.is_checked() || plan.sums;
        if !plan.wants(self.name()) {
            return Some(NOT_WANTED.to_owned());
        }
        (checked && !self.capabilities().checksums).then(|| NOT_COMPARED.to_owned())
    }

    /// Makes ready for requests with this plan (resolves keys, maps memory). May block, up to a deadline of its own;
    /// called when a request is made, not when it is posted.
    fn prepare(&self, plan: &Plan) -> Result<()> {
        let _ = plan;
        Ok(())
    }

    /// Whether a job of this kind that has failed and is settled can have no effect any more, on either side, so that the
    /// same bytes may be moved another way. See `docs/backends.md`.
    fn fences(&self, operation: Operation) -> bool {
        let _ = operation;
        false
    }

    /// How it moves a plan, in words, where that is more than its name says.
    fn how(&self, plan: &Plan) -> String {
        let _ = plan;
        String::new()
    }

    /// Backends that would go before this one for a plan, each with what kept it from being chosen.
    fn passed_over(&self, plan: &Plan) -> Vec<(&'static str, String)> {
        let _ = plan;
        Vec::new()
    }

    /// Starts the job, or refuses it with `job.refuse(error)`: then nothing has been started.
    fn post(&self, job: Job) -> Result<(), Refusal>;

    /// Some job of this backend was given up by its caller (deadline or cancel): look for jobs with
    /// [`Job::is_abandoned`] and settle them as soon as their memory is no longer in use. Never blocks.
    fn reap(&self) {}

    /// A number that grows whenever something of the connection arrives; none where that cannot be said, and a request is
    /// then never called slow. Takes no lock.
    fn progress(&self) -> Option<u64> {
        None
    }

    /// Looks for connections that have stood still for as long as `after` while others of the same backend did not: what can
    /// be repeated goes over those. Whether there was one. Called from time to time while something is asked of it.
    fn relieve(&self, now: Instant, after: Duration) -> bool {
        let _ = (now, after);
        false
    }

    /// The connection stands still, and jobs of it were given up to go another way: as [`Backend::reap`]; ends the
    /// connection where they cannot be settled otherwise.
    fn give_way(&self) {
        self.reap();
    }

    /// Whether devices move its bytes, whose streams can wait for those of an engine, and the other way round.
    fn has_streams(&self) -> bool {
        false
    }

    /// Lends the calling thread to the backend until `done` or `until`, if it can be used to make progress sooner
    /// than a thread of the backend would; it looks before it sleeps. The default does nothing, and the caller sleeps.
    fn assist(&self, until: Instant, look: &Look<'_>, done: &dyn Fn() -> bool) {
        let _ = (until, look, done);
    }
}

/// A connection to one peer.
pub(crate) trait Channel: Backend {
    /// Whether requests can still be posted; the reason otherwise.
    fn check(&self) -> Result<()>;

    /// Whether this region can be reached; the reason otherwise.
    fn reaches(&self, region: &RemoteRegion) -> Result<(), String>;

    /// What is worth telling about it, such as the congestion control in force.
    fn detail(&self) -> String;

    /// The network connections that it has, in the order in which they are used.
    fn connections(&self) -> Vec<ConnectionReport> {
        Vec::new()
    }

    /// Ends it: jobs in flight fail with `PeerLost`.
    fn close(&self);
}

/// Holds on to memory of regions beyond single requests, and is no fabric.
pub(crate) trait Keeper: Send + Sync {
    /// As [`Fabric::withdraw`].
    fn withdraw(&self, region: &Arc<crate::region::RegionCore>);
}

/// A way to reach other agents; one per agent and kind.
pub(crate) trait Fabric: Send + Sync {
    /// The name of its channels, and of its address in metadata.
    fn name(&self) -> &'static str;

    /// How peers can reach this agent this way, in a form only the same fabric reads; none if they cannot.
    fn address(&self) -> Option<Vec<u8>>;

    /// What its channels may move.
    fn kinds(&self) -> Kinds {
        Kinds {
            local: Capabilities::HOST,
            remote: Capabilities::HOST,
        }
    }

    /// Whether a channel of it is proof that the peer is reached; otherwise it makes use of the agent's other ways.
    fn is_way_of_its_own(&self) -> bool {
        true
    }

    /// Why none of its channels compares checksums; none if they do.
    fn unchecked(&self) -> Option<&'static str> {
        None
    }

    /// The network address that it listens on, if any.
    fn listening(&self) -> Option<SocketAddr> {
        None
    }

    /// The ports of network cards that it uses by name.
    fn ports(&self) -> Vec<PortStats> {
        Vec::new()
    }

    /// Connects, within `timeout`. The error is the reason that path reports give.
    fn connect(&self, peer: &PeerCard, timeout: Duration) -> Result<Arc<dyn Channel>>;

    /// A region of this agent is being deregistered: peers must stop using it. Whatever still has to end counts as
    /// a user of the region: `RegionCore::hold` now, `leave` when it has ended.
    fn withdraw(&self, region: &Arc<crate::region::RegionCore>) {
        let _ = region;
    }

    /// Ends all connections and stops accepting.
    fn close(&self);
}
