//! Where blocks live and how they get there, as a state machine without I/O.
//!
//! A driver hands requests, answers and the time to `Manager::handle_*`, and after each call takes what has come of it
//! from [`Manager::poll_command`], [`Manager::poll_event`], [`Manager::poll_outcome`] and [`Manager::poll_timeout`].
//! Equal calls give equal answers. Everything that can pile up has a bound in [`Limits`]; the queues of events and
//! outcomes are bounded by what one call can change, if the driver empties them after each.
//!
//! # The life of a store
//!
//! 1. [`Manager::handle_store`]: a block that is in DRAM or on disk counts as held; one that another store is copying
//!    waits for that; the others queue for slots.
//! 2. A slot comes from the vacant ones, or by evicting a block that is also held below, or by waiting for demotion, or,
//!    when the policy finds nothing else, by dropping the coldest block. The slot is `Filling`, under a new generation.
//! 3. [`Command::Copy`] from `Place::Engine` to `Place::Host`. The answer brings the checksum: the slot is `Sealed`,
//!    [`NodeEvent::Stored`] is announced, and whoever waited for the block goes on.
//! 4. [`Outcome::Stored`] when every block has come to its end, or the deadline has. What is copied after that is thrown
//!    away: the engine may have reused its memory, and the checksum would bless the wrong bytes.
//!
//! Later, when vacant slots run low, the coldest leaf is copied to disk (or to the object store), and leaves DRAM when it
//! is there. When disk room runs low, the least recently used segment is dropped whole, after blocks that are
//! nowhere else were copied to the object store.
//!
//! # The life of a fetch
//!
//! 1. [`Manager::handle_fetch`] finds a source for each block, in order: own DRAM (pinned), own disk (its segment
//!    pinned), DRAM that is being written (waits), the deepest peer of the hints, the object store. The first block
//!    without any cuts the fetch: from there on all are misses.
//! 2. [`Command::Lease`] for a peer's blocks, [`Command::Copy`] for the others, at the same time, straight into
//!    `Place::Engine`. When the lease is granted, copies from `Place::Peer` follow.
//! 3. A short lease, a failed or late copy, wrong bytes: that source is out for this block (a wrong copy of our own is
//!    forgotten and [`NodeEvent::Removed`] announced), and step 1 runs again for it. Each round has fewer sources.
//! 4. [`Outcome::Fetched`] when every block before the cut is there and nothing writes behind it, or at the deadline.
//!    Engine slots that a transfer may still write to are named in it, and free at [`Outcome::Drained`].
//! 5. [`Command::Release`] goes to the peer when the last copy from its lease has ended; nobody waits for it.
//!
//! # The life of a lease
//!
//! 1. [`Manager::handle_lease`]: blocks in DRAM are pinned; blocks on disk get slots and are copied up; the first block
//!    that cannot be had cuts the lease.
//! 2. [`Outcome::LeaseReady`] with slots, generations and checksums when all are there, or after `stage_wait` with those
//!    before the first that is not. The lease runs from then.
//! 3. It ends by [`Manager::handle_release`], by its time, or with its peer. The slots may be reused at once, under a new
//!    generation: a reader that was too slow sees that, or the checksum.
//!
//! # Pins, and what is forgotten on demand
//!
//! A pin ([`Manager::handle_pin`]) is a lease to nobody in particular, bounded apart from those of peers: it ends by
//! [`Manager::handle_unpin`] or by its time. Its number is the caller's choice, so that somebody else can know it before
//! the pin is asked for; an unpin that comes first is remembered for a while. [`Manager::handle_remove`] and [`Manager::handle_clear`] forget blocks, but
//! none that is pinned, leased, read or on its way somewhere: those are kept, and counted, so that whoever relies on a
//! lease or a pin need not fear them.
//!
//! # The end
//!
//! [`Manager::handle_retire`]: nothing new is taken on, and what is in DRAM alone goes down, the blocks used last first.
//! [`Outcome::Retired`] says how much stayed behind for want of room or time.
//!
//! # Transfers own what they were lent
//!
//! A [`MoveFailure`] that is not settled keeps its slots, pins and engine memory out of use until
//! [`Manager::handle_drained`]. Deadlines and cancelling end what engines wait for, never what a transfer holds.
//!
//! Blocks are announced by their index keys; two blocks with one index key are announced one by one.

mod admission;
mod ask;
mod check;
mod command;
mod copies;
mod disk;
mod fetch;
mod flush;
mod forget;
mod job;
mod limits;
mod object;
mod pin;
mod plan;
mod policy;
mod request;
mod retire;
mod segment;
mod serve;
mod space;
mod stats;
mod store;
#[cfg(test)]
mod tests;
mod uses;
mod view;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

pub use command::{Command, CommandId, GrantedBlock, GrantedLease, Move, MoveFailure};
pub use limits::{DISK_SLOTS_MAX, HOST_SLOTS_MAX, Limits};
pub use policy::{HostUsage, OffloadPolicy, Pressure, WriteBehind};
pub use request::{
    BlockSource, FetchRequest, Held, LeasedBlock, Outcome, PeerHint, RecoveredBlock, Removed,
};
pub use stats::Stats;

use self::admission::copy_deadline;
use self::job::{Grant, Holding, Pending};
use self::plan::FetchOperation;
use self::retire::Retirement;
use self::segment::Segments;
use self::serve::{Holder, Lease};
use self::space::SlotRequest;
use self::store::StoreOperation;
use crate::error::{ErrorKind, Result};
use crate::event::NodeEvent;
use crate::evict::{EvictionPolicy, LeafLru};
use crate::id::{LeaseId, OperationId, PeerId, PinId, SlotIndex, Time};
use crate::key::{BlockInfo, BlockKey, Checksum};
use crate::place::Tier;
use crate::pool::{Expiries, Sealed, Slot, Slots};
use crate::table::{KeyMap, Table, Waiter};

/// Decides where blocks live; see the module's page for how it is driven.
#[derive(Debug)]
pub struct Manager {
    limits: Limits,
    policy: Box<dyn OffloadPolicy>,
    table: Table,
    /// Orders the uses of blocks and segments.
    uses: u64,

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
    /// Flushes, each with the commands that it waits for.
    flushes: BTreeMap<OperationId, BTreeSet<CommandId>>,
    next_operation: u64,
    /// The end of the node, once it was asked for.
    retirement: Option<Retirement>,

    /// What peers lease from us and what is pinned: both keep blocks in DRAM for a while.
    leases: BTreeMap<LeaseId, Lease>,
    /// Those of them that are pins.
    pins: BTreeMap<PinId, LeaseId>,
    /// Pins that were let go of without being in force, and until when that is remembered; oldest first.
    early_unpins: VecDeque<(Time, PinId)>,
    /// How many pins each pinned block has.
    pinned: KeyMap<BlockKey, u32>,
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
    /// The deadline of a store, fetch or flush.
    Operation(OperationId),
    /// The end of a lease or pin, or of readying it.
    Lease(LeaseId),
    /// A peer's answer to a lease request.
    Answer(CommandId),
    /// The disk may be tried again.
    Disk,
    /// The object store may be tried again.
    Object,
    /// The deadline of the end.
    Retirement,
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
            flushes: BTreeMap::new(),
            next_operation: 0,
            retirement: None,
            uses: 0,
            leases: BTreeMap::new(),
            pins: BTreeMap::new(),
            early_unpins: VecDeque::new(),
            pinned: KeyMap::default(),
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
        self.start_store(
            operation,
            blocks,
            copy_deadline(&self.limits, now, deadline),
        );
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
        self.start_fetch(
            operation,
            request,
            copy_deadline(&self.limits, now, deadline),
        );
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

    /// The peer gives a lease of ours back. One that has ended, or is another peer's, is ignored; one that is not ready
    /// becomes ready at once, without blocks.
    pub fn handle_release(&mut self, now: Time, peer: PeerId, lease: LeaseId) {
        self.return_lease(now, lease, Holder::Peer(peer));
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

    /// What was found on disk at the start, before anything else is asked; what was used last comes last, so that it goes
    /// last. Records that do not fit (out of range, or a block or place that was named before) are left out; returns how
    /// many were taken.
    pub fn handle_recovered(&mut self, now: Time, blocks: Vec<RecoveredBlock>) -> u32 {
        let taken = self.recover(blocks);
        self.settle(now);
        taken
    }

    /// Ends a store, fetch or flush early: its outcome is ready at once. One that has ended is ignored.
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
                Timer::Retirement => self.end_retirement(),
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

    /// Does everything that has become possible, until nothing is left to do without an answer.
    fn settle(&mut self, now: Time) {
        loop {
            while let Some(work) = self.work.pop_front() {
                match work {
                    Waiter::Store {
                        operation,
                        position,
                    } => self.place_store(operation, position),
                    Waiter::Fetch {
                        operation,
                        position,
                    } => self.reopen_fetch(operation, position),
                    Waiter::Lease(lease) => self.advance_lease(now, lease),
                }
            }
            self.plan_fetches(now);
            self.serve_slots(now);
            match &self.retirement {
                None => self.demote(now),
                Some(retirement) if !retirement.is_over => self.retire(now),
                Some(_) => {}
            }
            self.maintain_segments(now);
            let waits_in_vain = self.wanted.is_empty() || self.slots.vacant() == 0;
            if self.work.is_empty() && self.to_plan.is_empty() && waits_in_vain {
                return;
            }
        }
    }

    fn announce_stored(&mut self, info: &BlockInfo, tier: Tier) {
        let (key, parent) = (info.index_key, info.index_parent);
        self.events
            .push_back(NodeEvent::Stored { key, parent, tier });
    }

    fn announce_removed(&mut self, info: &BlockInfo, tier: Tier) {
        self.events.push_back(NodeEvent::Removed {
            key: info.index_key,
            tier,
        });
    }
}
