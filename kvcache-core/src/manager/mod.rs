//! Where blocks live and how they get there, as a state machine without I/O.

mod check;
mod command;
mod copies;
mod disk;
mod fetch;
mod job;
mod limits;
mod policy;
mod request;
mod segment;
mod serve;
mod space;
mod stats;
mod store;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

pub use command::{Command, CommandId, GrantedBlock, GrantedLease, Move, MoveFailure};
pub use limits::{DISK_SLOTS_MAX, HOST_SLOTS_MAX, Limits};
pub use policy::{HostUsage, OffloadPolicy, Pressure, WriteBehind};
pub use request::{
    BlockSource, FetchRequest, Held, LeasedBlock, Outcome, PeerHint, RecoveredBlock,
};
pub use stats::Stats;

use self::fetch::FetchOperation;
use self::job::{Grant, Holding, Pending};
use self::segment::Segments;
use self::serve::Lease;
use self::space::SlotRequest;
use self::store::StoreOperation;
use crate::error::{Error, ErrorKind, Result};
use crate::event::NodeEvent;
use crate::evict::{EvictionPolicy, LeafLru};
use crate::id::{LeaseId, OperationId, PeerId, SlotIndex, Time};
use crate::key::{BlockInfo, BlockKey, Checksum};
use crate::place::Tier;
use crate::pool::{Expiries, Sealed, Slot, Slots};
use crate::table::{Block, KeyMap, Table, Waiter};

/// Decides where blocks live; see the module's page for how it is driven.
#[derive(Debug)]
pub struct Manager {
    limits: Limits,
    policy: Box<dyn OffloadPolicy>,
    table: Table,

    slots: Slots,
    evictor: Box<dyn EvictionPolicy<BlockKey>>,
    /// Slots of copies found corrupt while others were still reading them.
    condemned: BTreeMap<SlotIndex, Slot<Sealed>>,
    /// Blocks on their way down.
    leaving: u32,
    /// Who waits for a slot, in the order of asking.
    wanted: VecDeque<SlotRequest>,
    /// Blocks of stores under way, which must not push each other out.
    protected: KeyMap<BlockKey, u32>,

    segments: Segments,
    disk_stopped: bool,
    object_stopped: bool,
    /// Blocks known to be in the object store, oldest knowledge first.
    objects: BTreeMap<u64, BlockKey>,
    objects_counter: u64,

    stores: BTreeMap<OperationId, StoreOperation>,
    fetches: BTreeMap<OperationId, FetchOperation>,
    /// Fetches to look at before a call returns: blocks without a source, or perhaps done.
    to_plan: BTreeSet<OperationId>,
    /// Fetches that have ended while transfers were still at work on so many of their engine slots.
    drains: BTreeMap<OperationId, u32>,
    next_operation: u64,

    leases: BTreeMap<LeaseId, Lease>,
    next_lease: u64,
    grants: BTreeMap<CommandId, Grant>,

    pending: BTreeMap<CommandId, Pending>,
    draining: BTreeMap<CommandId, Vec<Holding>>,
    next_command: u64,
    in_flight: u32,
    background_in_flight: u32,
    /// Commands to hand out; withdrawn ones are skipped.
    ready: VecDeque<CommandId>,
    ready_background: VecDeque<CommandId>,
    releases: VecDeque<Command>,

    timers: Expiries<Timer>,
    /// What is to be looked at again before a call returns.
    work: VecDeque<Waiter>,
    events: VecDeque<NodeEvent>,
    outcomes: VecDeque<Outcome>,
    stats: Stats,
}

/// What can be due.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    /// The deadline of a store or fetch.
    Operation(OperationId),
    /// The end of a lease, or of readying it.
    Lease(LeaseId),
    /// A peer's answer to a lease request.
    Answer(CommandId),
    /// The disk may be tried again.
    Disk,
    /// The object store may be tried again.
    Object,
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
            slots: Slots::new(limits.host_slots),
            segments: Segments::new(limits.disk_segments, limits.disk_segment_slots),
            limits,
            policy,
            table: Table::default(),
            evictor,
            condemned: BTreeMap::new(),
            leaving: 0,
            wanted: VecDeque::new(),
            protected: KeyMap::default(),
            disk_stopped: false,
            object_stopped: false,
            objects: BTreeMap::new(),
            objects_counter: 0,
            stores: BTreeMap::new(),
            fetches: BTreeMap::new(),
            to_plan: BTreeSet::new(),
            drains: BTreeMap::new(),
            next_operation: 0,
            leases: BTreeMap::new(),
            next_lease: 0,
            grants: BTreeMap::new(),
            pending: BTreeMap::new(),
            draining: BTreeMap::new(),
            next_command: 0,
            in_flight: 0,
            background_in_flight: 0,
            ready: VecDeque::new(),
            ready_background: VecDeque::new(),
            releases: VecDeque::new(),
            timers: Expiries::default(),
            work: VecDeque::new(),
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
        self.check_admission(blocks.iter())?;
        let operation = self.admit_operation(deadline);
        self.start_store(operation, blocks, copy_deadline(&self.limits, now, deadline));
        self.settle(now);
        Ok(operation)
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
        self.check_admission(request.blocks.iter())?;
        let operation = self.admit_operation(deadline);
        self.start_fetch(operation, request, copy_deadline(&self.limits, now, deadline));
        self.settle(now);
        Ok(operation)
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
        let lease = self.start_lease(now, peer, keys, ttl)?;
        self.settle(now);
        Ok(lease)
    }

    /// The peer gives a lease of ours back. One that has ended, or is another peer's, is ignored.
    pub fn handle_release(&mut self, now: Time, peer: PeerId, lease: LeaseId) {
        if self.leases.get(&lease).is_some_and(|lease| lease.peer == peer) {
            self.return_lease(now, lease);
        }
        self.settle(now);
    }

    /// The peer is gone: what was asked of it fails, and what it leased from us is free.
    pub fn handle_peer_lost(&mut self, now: Time, peer: PeerId) {
        self.lose_asked(peer);
        self.lose_leased(now, peer);
        self.settle(now);
    }

    /// The answer to [`Command::Copy`]: one result a move, in the order of the command, each with the checksum of the
    /// bytes that were copied.
    pub fn handle_copied(
        &mut self,
        now: Time,
        id: CommandId,
        results: Vec<Result<Checksum, MoveFailure>>,
    ) {
        self.finish_copy(now, id, results);
        self.settle(now);
    }

    /// Nothing of this copy command, some of whose moves had failed unsettled, is at work any more.
    pub fn handle_drained(&mut self, now: Time, id: CommandId) {
        self.drain(id);
        self.settle(now);
    }

    /// The answer to [`Command::Lease`].
    pub fn handle_leased(
        &mut self,
        now: Time,
        id: CommandId,
        result: Result<GrantedLease, ErrorKind>,
    ) {
        self.finish_ask(now, id, result);
        self.settle(now);
    }

    /// The answer to [`Command::DropSegment`].
    pub fn handle_segment_dropped(
        &mut self,
        now: Time,
        id: CommandId,
        result: Result<(), ErrorKind>,
    ) {
        self.finish_drop(now, id, result);
        self.settle(now);
    }

    /// What was found on disk at the start, before anything else is asked. Records that do not fit (out of range, or a
    /// block or place that was named before) are left out; returns how many were taken.
    pub fn handle_recovered(&mut self, now: Time, blocks: Vec<RecoveredBlock>) -> u32 {
        let taken = self.recover(blocks);
        self.settle(now);
        taken
    }

    /// Ends a store or fetch early: its outcome is ready at once. One that has ended is ignored.
    pub fn handle_cancel(&mut self, now: Time, operation: OperationId) {
        self.end_operation(now, operation);
        self.settle(now);
    }

    /// Advances time: whatever is due happens. Call it when [`Manager::poll_timeout`] says, or later.
    pub fn handle_timeout(&mut self, now: Time) {
        while let Some(timer) = self.timers.pop_due(now) {
            match timer {
                Timer::Operation(operation) => self.end_operation(now, operation),
                Timer::Lease(lease) => self.lease_due(now, lease),
                Timer::Answer(command) => self.give_up_ask(command),
                Timer::Disk => self.disk_stopped = false,
                Timer::Object => self.object_stopped = false,
            }
        }
        self.settle(now);
    }

    /// The next thing to do, if there is any now.
    pub fn poll_command(&mut self, now: Time) -> Option<Command> {
        self.next_command(now)
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
        self.timers.next()
    }

    /// How much of a chain this node could supply now; does not count as a use.
    #[must_use]
    pub fn lookup(&self, keys: &[BlockKey]) -> Held {
        let mut held = Held::default();
        for block in keys.iter().map_while(|key| self.table.get(key)) {
            if block.host_place().is_some() {
                held.host += 1;
            } else if block.disk.is_some() {
                held.disk += 1;
            } else {
                break;
            }
            held.depth += 1;
        }
        let known = |key: &&BlockKey| self.table.get(key).is_some_and(|b| b.object.is_some());
        held.shared_depth = keys.iter().take_while(known).count() as u32;
        held
    }

    /// The blocks that can be had from a tier of this node now, in no particular order.
    pub fn contents(&self, tier: Tier) -> impl Iterator<Item = BlockInfo> {
        let is_there = move |block: &&Block| match tier {
            Tier::Device => false,
            Tier::Host => block.host_place().is_some(),
            Tier::Disk => block.disk.is_some(),
            Tier::Object => block.object.is_some(),
        };
        self.table.iter().filter(is_there).map(|block| block.info)
    }

    /// The counters and levels.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats {
            host_blocks: u64::from(self.slots.sealed()),
            host_vacant: u64::from(self.slots.vacant()),
            host_quarantined: u64::from(self.slots.quarantined()),
            disk_blocks: self.segments.live(),
            object_blocks: self.objects.len() as u64,
            operations: (self.stores.len() + self.fetches.len()) as u64,
            leases: self.leases.len() as u64,
            commands_in_flight: u64::from(self.in_flight),
            disk_stopped: u64::from(self.disk_stopped),
            ..self.stats
        }
    }

    /// The sizes and bounds this manager was made with.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Whether there is room for one more store or fetch of these blocks.
    fn check_admission<'a>(
        &mut self,
        blocks: impl ExactSizeIterator<Item = &'a BlockInfo>,
    ) -> Result<()> {
        let max = self.limits.operation_blocks_max as usize;
        if blocks.len() > max {
            return Err(Error::invalid("blocks in one operation", blocks.len(), 0..=max));
        }
        for (position, block) in blocks.enumerate() {
            if block.parent == Some(block.key) {
                let context = format!("block {position} ({:?}) is its own parent", block.key);
                return Err(Error::new(ErrorKind::Invalid, context));
            }
        }
        // What has ended but not drained counts too: a fabric that never drains must not pile up.
        let open = self.stores.len() + self.fetches.len() + self.drains.len() + self.draining.len();
        if open >= self.limits.operations_max as usize {
            self.stats.busy += 1;
            let context = format!("{open} operations under way or draining, the most allowed");
            return Err(Error::new(ErrorKind::Busy, context));
        }
        Ok(())
    }

    fn admit_operation(&mut self, deadline: Time) -> OperationId {
        let operation = OperationId(self.next_operation);
        self.next_operation += 1;
        self.timers.set(Timer::Operation(operation), deadline);
        operation
    }

    /// Ends a store or fetch now, whatever is still under way for it.
    fn end_operation(&mut self, now: Time, operation: OperationId) {
        if self.stores.contains_key(&operation) {
            self.end_store(operation);
        } else if self.fetches.contains_key(&operation) {
            self.end_fetch(now, operation);
        }
    }

    /// Does everything that has become possible, until nothing is left to do without an answer.
    fn settle(&mut self, now: Time) {
        loop {
            while let Some(work) = self.work.pop_front() {
                match work {
                    Waiter::Store { operation, position } => self.place_store(operation, position),
                    Waiter::Fetch { operation, position } => self.reopen_fetch(operation, position),
                    Waiter::Lease(lease) => self.advance_lease(now, lease),
                }
            }
            self.plan_fetches(now);
            self.serve_slots(now);
            self.maintain_segments(now);
            self.demote(now);
            let waits_in_vain = self.wanted.is_empty() || self.slots.vacant() == 0;
            if self.work.is_empty() && self.to_plan.is_empty() && waits_in_vain {
                return;
            }
        }
    }

    fn announce_stored(&mut self, info: &BlockInfo, tier: Tier) {
        let (key, parent) = (info.index_key, info.index_parent);
        self.events.push_back(NodeEvent::Stored { key, parent, tier });
    }

    fn announce_removed(&mut self, info: &BlockInfo, tier: Tier) {
        self.events.push_back(NodeEvent::Removed { key: info.index_key, tier });
    }

    /// The block is known to be in the object store.
    fn know_object(&mut self, info: &BlockInfo) {
        let block = self.table.admit(*info);
        if block.object.is_some() {
            return;
        }
        self.objects_counter += 1;
        block.object = Some(self.objects_counter);
        self.objects.insert(self.objects_counter, info.key);
        self.announce_stored(info, Tier::Object);
        if self.objects.len() > self.limits.object_known_max as usize
            && let Some((_, oldest)) = self.objects.pop_first()
            && let Some(block) = self.table.get_mut(&oldest)
        {
            block.object = None;
            self.table.forget_if_gone(&oldest);
        }
    }

    /// The block is not in the object store, or what is there is of no use.
    fn lose_object(&mut self, info: &BlockInfo) {
        if let Some(block) = self.table.get_mut(&info.key)
            && let Some(since) = block.object.take()
        {
            self.objects.remove(&since);
            self.table.forget_if_gone(&info.key);
        }
        // Others may have announced it: a read that failed is how the world learns that it is gone.
        self.announce_removed(info, Tier::Object);
    }

    fn stop_disk(&mut self, now: Time) {
        self.disk_stopped = true;
        self.timers.set(Timer::Disk, now + self.limits.retry_after);
    }

    fn stop_object(&mut self, now: Time) {
        self.object_stopped = true;
        self.timers.set(Timer::Object, now + self.limits.retry_after);
    }
}

/// When the copies of an operation must be done for their answers to be here by its deadline.
fn copy_deadline(limits: &Limits, now: Time, deadline: Time) -> Time {
    let margin = limits.answer_margin.min((deadline - now) / 8);
    Time(deadline.0.saturating_sub(u64::try_from(margin.as_nanos()).unwrap_or(u64::MAX)))
}
