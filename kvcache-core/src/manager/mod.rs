//! Where blocks live and how they get there, as a state machine without I/O.

mod command;
mod limits;
mod policy;
mod request;
mod stats;

use std::collections::VecDeque;
use std::time::Duration;

pub use command::{Command, CommandId, GrantedBlock, GrantedLease, Move, MoveFailure};
pub use limits::{DISK_SLOTS_MAX, HOST_SLOTS_MAX, Limits};
pub use policy::{HostUsage, OffloadPolicy, Pressure, WriteBehind};
pub use request::{
    BlockSource, FetchRequest, Held, LeasedBlock, Outcome, PeerHint, RecoveredBlock,
};
pub use stats::Stats;

use crate::error::{ErrorKind, Result};
use crate::event::NodeEvent;
use crate::evict::{EvictionPolicy, LeafLru};
use crate::id::{LeaseId, OperationId, PeerId, Time};
use crate::key::{BlockInfo, BlockKey, Checksum};
use crate::place::Tier;

/// Decides where blocks live; see the module's page for how it is driven.
#[derive(Debug)]
pub struct Manager {
    limits: Limits,
    evictor: Box<dyn EvictionPolicy<BlockKey>>,
    policy: Box<dyn OffloadPolicy>,
    commands: VecDeque<Command>,
    events: VecDeque<NodeEvent>,
    outcomes: VecDeque<Outcome>,
    stats: Stats,
}

impl Manager {
    /// A manager with empty tiers, leaf-first LRU and write-behind.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for the limit that is out of its range.
    pub fn new(limits: Limits) -> Result<Self> {
        Self::with_policies(
            limits,
            Box::new(LeafLru::new()),
            Box::<WriteBehind>::default(),
        )
    }

    /// A manager with empty tiers and these policies.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for the limit that is out of its range.
    pub fn with_policies(
        limits: Limits,
        evictor: Box<dyn EvictionPolicy<BlockKey>>,
        policy: Box<dyn OffloadPolicy>,
    ) -> Result<Self> {
        limits.check()?;
        Ok(Self {
            limits,
            evictor,
            policy,
            commands: VecDeque::new(),
            events: VecDeque::new(),
            outcomes: VecDeque::new(),
            stats: Stats::default(),
        })
    }

    /// Starts to take these blocks out of engine memory, which must stay as it is until [`Outcome::Stored`].
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when `operations_max` are under way, [`ErrorKind::Invalid`] for too many blocks or one that
    /// is its own parent.
    pub fn handle_store(
        &mut self,
        now: Time,
        blocks: Vec<BlockInfo>,
        deadline: Time,
    ) -> Result<OperationId> {
        let _ = (now, blocks, deadline);
        Ok(OperationId(0))
    }

    /// Starts to bring these blocks into engine memory, which is ours to write until [`Outcome::Fetched`].
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when `operations_max` are under way, [`ErrorKind::Invalid`] for too many blocks.
    pub fn handle_fetch(
        &mut self,
        now: Time,
        request: FetchRequest,
        deadline: Time,
    ) -> Result<OperationId> {
        let _ = (now, request, deadline);
        Ok(OperationId(0))
    }

    /// Starts to ready these blocks for a peer to read; ends in [`Outcome::LeaseReady`], at the latest after
    /// `stage_wait`. The lease then lasts `ttl`, or `lease_ttl` when that is less.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when `leases_max` are granted.
    pub fn handle_lease(
        &mut self,
        now: Time,
        peer: PeerId,
        keys: &[BlockKey],
        ttl: Duration,
    ) -> Result<LeaseId> {
        let _ = (now, peer, keys, ttl);
        Ok(LeaseId(0))
    }

    /// The peer gives a lease of ours back. One that has ended, or is another peer's, is ignored.
    pub fn handle_release(&mut self, now: Time, peer: PeerId, lease: LeaseId) {
        let _ = (now, peer, lease);
    }

    /// The peer is gone: what was asked of it fails, and what it leased from us is free.
    pub fn handle_peer_lost(&mut self, now: Time, peer: PeerId) {
        let _ = (now, peer);
    }

    /// The answer to [`Command::Copy`]: one result a move, in the order of the command, each with the checksum of the
    /// bytes that were copied.
    pub fn handle_copied(
        &mut self,
        now: Time,
        id: CommandId,
        results: Vec<Result<Checksum, MoveFailure>>,
    ) {
        let _ = (now, id, results);
    }

    /// Nothing of this copy command, some of whose moves had failed unsettled, is at work any more.
    pub fn handle_drained(&mut self, now: Time, id: CommandId) {
        let _ = (now, id);
    }

    /// The answer to [`Command::Lease`].
    pub fn handle_leased(
        &mut self,
        now: Time,
        id: CommandId,
        result: Result<GrantedLease, ErrorKind>,
    ) {
        let _ = (now, id, result);
    }

    /// The answer to [`Command::DropSegment`].
    pub fn handle_segment_dropped(
        &mut self,
        now: Time,
        id: CommandId,
        result: Result<(), ErrorKind>,
    ) {
        let _ = (now, id, result);
    }

    /// What was found on disk at the start, before anything else is asked. Records that do not fit (out of range, or a
    /// block or place that was named before) are left out; returns how many were taken.
    pub fn handle_recovered(&mut self, now: Time, blocks: Vec<RecoveredBlock>) -> u32 {
        let _ = (now, blocks);
        0
    }

    /// Ends a store or fetch early: its outcome is ready at once. One that has ended is ignored.
    pub fn handle_cancel(&mut self, now: Time, operation: OperationId) {
        let _ = (now, operation);
    }

    /// Advances time: whatever is due happens. Call it when [`Manager::poll_timeout`] says, or later.
    pub fn handle_timeout(&mut self, now: Time) {
        let _ = now;
    }

    /// The next thing to do, if there is any now.
    pub fn poll_command(&mut self, now: Time) -> Option<Command> {
        let _ = now;
        self.commands.pop_front()
    }

    /// The next change to announce, in order.
    pub fn poll_event(&mut self) -> Option<NodeEvent> {
        self.events.pop_front()
    }

    /// The next thing that ended.
    pub fn poll_outcome(&mut self) -> Option<Outcome> {
        self.outcomes.pop_front()
    }

    /// When [`Manager::handle_timeout`] is next needed.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        None
    }

    /// How much of a chain this node could supply now; does not count as a use.
    #[must_use]
    pub fn lookup(&self, keys: &[BlockKey]) -> Held {
        let _ = keys;
        Held::default()
    }

    /// The blocks that can be had from a tier of this node now, in no particular order.
    pub fn contents(&self, tier: Tier) -> impl Iterator<Item = BlockInfo> {
        let _ = tier;
        std::iter::empty()
    }

    /// The counters and levels.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// The sizes and bounds this manager was made with.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }
}
