//! The connections to one peer, and how requests are spread over them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::NAME;
use super::active::Active;
use super::connection::{self, Connection, INLINE_BYTES_MAX, Role};
use super::frame::CHUNK_BYTES_MAX;
use super::lane::Lane;
use crate::agent::{ConnectionReport, RemoteRegion};
use crate::backend::{Backend, Capabilities, Channel, Job, NOT_WANTED, Operation, Refusal};
use crate::descriptor::Target;
use crate::look::Look;
use crate::metadata::RemoteKind;
use crate::plan::Plan;
use crate::region::MemoryKind;

/// What is reached: a peer copies from and to its devices by itself.
pub(super) const REMOTE: &[MemoryKind] = &[MemoryKind::Host, MemoryKind::ANY_DEVICE];

/// All connections to one incarnation of a peer, in the order in which small requests use them.
pub(super) struct Lanes {
    all: Vec<Lane>,
    /// Which of them the next request of middle size goes to.
    turn: AtomicUsize,
}

impl Lanes {
    pub(super) fn new(all: Vec<Lane>) -> Arc<Self> {
        let lanes = Arc::new(Self {
            all,
            turn: AtomicUsize::new(0),
        });
        for lane in &lanes.all {
            if let Role::Initiator(initiator) = &lane.connection.role {
                // Each connection is in one group, and put there once.
                let _ = initiator.lanes.set(Arc::downgrade(&lanes));
            }
        }
        lanes
    }

    fn alive(&self) -> impl Iterator<Item = &Lane> {
        let is_alive = |lane: &&Lane| lane.connection.check().is_ok();
        self.all.iter().filter(is_alive)
    }

    pub(super) fn is_alive(&self) -> bool {
        self.alive().next().is_some()
    }

    /// Puts what is left of a request at the end of every connection's queue. Whether there is one that takes it.
    pub(super) fn queue(&self, active: &Arc<Active>) -> bool {
        self.queue_but(active, None)
    }

    /// As [`Lanes::queue`] without one of them, and without those that stand still unless there is no other.
    pub(super) fn queue_but(&self, active: &Arc<Active>, but: Option<&Connection>) -> bool {
        let is_other = |lane: &&Lane| !but.is_some_and(|but| std::ptr::eq(but, &*lane.connection));
        let (still, moving): (Vec<&Lane>, Vec<&Lane>) = self
            .alive()
            .filter(is_other)
            .partition(|lane| lane.is_avoided());
        let queue = |lanes: &[&Lane]| lanes.iter().filter(|lane| lane.queue(active)).count();
        queue(&moving) > 0 || queue(&still) > 0
    }

    /// Who is asked first: always the same one for small requests, which then go out in one call, others in turn.
    fn first(&self, small: bool) -> usize {
        if small || self.all.len() == 1 {
            return 0;
        }
        self.turn.fetch_add(1, Ordering::Relaxed) % self.all.len()
    }

    fn post(&self, job: Job) -> Result<(), Refusal> {
        let small = job.whole().bytes <= INLINE_BYTES_MAX;
        let striped = job.plan().bytes > CHUNK_BYTES_MAX && self.all.len() > 1;
        let first = self.first(small);
        let count = self.all.len();
        let in_turn = || (0..count).map(|position| &self.all[(first + position) % count]);
        let moving = in_turn().filter(|lane| !lane.is_avoided());
        for lane in moving.chain(in_turn()) {
            let Role::Initiator(initiator) = &lane.connection.role else {
                continue;
            };
            let mut outbox = lane.connection.outbox();
            if outbox.ended || lane.connection.check().is_err() {
                continue;
            }
            let connections = if striped { count } else { 1 };
            let active = Arc::new(Active::new(job, connections));
            let more = initiator.start(&active, &mut outbox);
            connection::settle(outbox);
            if small {
                lane.connection.pump(INLINE_BYTES_MAX);
            } else {
                lane.connection.pump_later();
                if more && striped {
                    self.queue_but(&active, Some(&lane.connection));
                }
            }
            return Ok(());
        }
        let error = self.check().err();
        let ended = || Error::new(ErrorKind::PeerLost, "the connection has ended");
        Err(job.refuse(error.unwrap_or_else(ended)))
    }

    /// # Errors
    /// Why none of them can be used any more.
    fn check(&self) -> Result<()> {
        let mut lost = None;
        for lane in &self.all {
            match lane.connection.check() {
                Ok(()) => return Ok(()),
                Err(error) => lost = lost.or(Some(error)),
            }
        }
        lost.map_or(Ok(()), Err)
    }

    /// Has what connections that stand still owe brought by the others, if those do not. Whether there is one.
    fn relieve(&self, now: Instant, after: Duration) -> bool {
        if self.all.len() < 2 {
            return false;
        }
        let still: Vec<bool> = self.all.iter().map(|lane| lane.look(now, after)).collect();
        let moves = |(lane, still): (&Lane, &bool)| !still && lane.connection.check().is_ok();
        let relief = self.all.iter().zip(&still).any(moves);
        for (lane, still) in self.all.iter().zip(&still) {
            lane.avoid(*still && relief);
        }
        relief && still.contains(&true)
    }

    fn lose(&self, reason: &str) {
        self.all
            .iter()
            .for_each(|lane| lane.connection.lose(reason));
    }
}

/// The way to one peer.
pub(super) struct TcpChannel {
    lanes: Arc<Lanes>,
    detail: String,
    capabilities: Capabilities,
}

impl TcpChannel {
    pub(super) fn new(lanes: Vec<Lane>, detail: String) -> Self {
        Self {
            lanes: Lanes::new(lanes),
            detail,
            capabilities: Capabilities {
                local: Capabilities::HOST,
                remote: REMOTE,
                notifications: true,
                checksums: true,
            },
        }
    }
}

impl Backend for TcpChannel {
    fn name(&self) -> &'static str {
        NAME
    }

    fn refusal(&self, plan: &Plan) -> Option<String> {
        if !plan.wants(NAME) {
            return Some(NOT_WANTED.to_owned());
        }
        let is_device = |target: &Target| matches!(target, Target::Remote(region) if region.kind == RemoteKind::Device);
        let checked = plan.is_checked() || plan.sums;
        let refused = checked && plan.remote.iter().any(is_device);
        refused.then(|| "nobody computes checksums of a peer's memory of a CUDA device".to_owned())
    }

    /// What was sent of a write may still be on its way when the connection has ended.
    fn fences(&self, operation: Operation) -> bool {
        operation == Operation::Read
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn post(&self, job: Job) -> Result<(), Refusal> {
        self.lanes.post(job)
    }

    fn reap(&self) {
        self.lanes
            .all
            .iter()
            .for_each(|lane| lane.connection.poke());
    }

    fn progress(&self) -> Option<u64> {
        let received = self.lanes.all.iter();
        Some(received.map(|lane| lane.connection.moved()[1]).sum())
    }

    fn relieve(&self, now: Instant, after: Duration) -> bool {
        self.lanes.relieve(now, after)
    }

    fn assist(&self, until: Instant, look: &Look<'_>, done: &dyn Fn() -> bool) {
        if let Some(lane) = self.lanes.all.first() {
            lane.connection.assist(until, look, done);
        }
    }
}

impl Channel for TcpChannel {
    fn check(&self) -> Result<()> {
        self.lanes.check()
    }

    fn reaches(&self, _region: &RemoteRegion) -> Result<(), String> {
        Ok(())
    }

    fn detail(&self) -> String {
        self.detail.clone()
    }

    fn connections(&self) -> Vec<ConnectionReport> {
        let report = |lane: &Lane| {
            let [sent, received] = lane.connection.moved();
            ConnectionReport {
                to: lane.to,
                sent,
                received,
                lost: lane.connection.check().err().map(|e| e.to_string()),
            }
        };
        self.lanes.all.iter().map(report).collect()
    }

    fn close(&self) {
        self.lanes.lose("the peer was forgotten");
    }
}

impl Drop for TcpChannel {
    fn drop(&mut self) {
        self.lanes.lose("nobody uses the connection any more");
    }
}
