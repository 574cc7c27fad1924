//! The world that a manager believes it steers, kept the slow and obvious way.
//!
//! [`World`] owns a [`Manager`], carries out its commands in any order and with any fault, and holds what the bytes of
//! every slot, record and object really are, as one number each. It knows who reads and writes what, so it notices
//! a slot that is reused under a transfer, bytes that were never sealed, an outcome that is missing, or an event that
//! does not match; it panics then. Property tests drive it, here and in the virtual cluster.

#![expect(
    clippy::panic,
    reason = "a model that notices something wrong stops the test"
)]

mod ending;
mod executor;
mod keeping;
mod outcomes;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::error::{ErrorKind, Result};
use crate::event::NodeEvent;
use crate::id::{Generation, LeaseId, OperationId, PeerId, PinId, SlotIndex, Time};
use crate::key::{BlockInfo, BlockKey, IndexKey};
use crate::manager::{
    Command, CommandId, FetchRequest, LeasedBlock, Limits, Manager, Move, Outcome,
};
use crate::place::{DiskSlot, Tier};

/// What bytes are here: their checksum's value.
type Bytes = u32;

/// Bytes that belong to no block.
const GARBAGE: Bytes = 0xdead_beef;

/// How one move of a command goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// As it should.
    None,
    /// The bytes at the source change before they are read, and stay so.
    Rot,
    /// It fails, and nothing is at work any more.
    Fails(ErrorKind),
    /// It fails, and garbage is written to the target when it drains.
    Unsettled(ErrorKind),
}

/// Which tiers hold which blocks, as told by events.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Replayed {
    tiers: BTreeMap<Tier, BTreeSet<IndexKey>>,
}

impl Replayed {
    /// Takes one event.
    pub fn apply(&mut self, event: &NodeEvent) {
        match event {
            NodeEvent::Stored { key, tier, .. } => {
                self.tiers.entry(*tier).or_default().insert(*key);
            }
            NodeEvent::Removed { key, tier } => {
                self.tiers.entry(*tier).or_default().remove(key);
            }
            NodeEvent::Cleared => self.tiers.retain(|tier, _| tier.is_shared()),
        }
    }

    /// The blocks of a tier.
    #[must_use]
    pub fn tier(&self, tier: Tier) -> BTreeSet<IndexKey> {
        self.tiers.get(&tier).cloned().unwrap_or_default()
    }
}

/// What was asked of the manager and has not ended.
#[derive(Debug)]
struct Engine {
    blocks: Vec<BlockInfo>,
    /// The engine's memory for them.
    memory: Vec<Bytes>,
    is_fetch: bool,
    /// Positions that must not be touched before the fetch has drained.
    unsettled: Vec<u32>,
    ended: bool,
}

/// A lease that the manager granted.
#[derive(Debug)]
struct Granted {
    peer: PeerId,
    blocks: Vec<LeasedBlock>,
    until: Time,
}

/// A transfer that failed without being settled, and what it may still write to.
#[derive(Debug)]
struct Undrained {
    moves: Vec<Move>,
}

/// A manager and everything around it.
#[derive(Debug)]
pub struct World {
    /// The manager; hand it nothing but through the world.
    pub manager: Manager,
    now: Time,
    limits: Limits,
    host: BTreeMap<SlotIndex, (Generation, Bytes)>,
    disk: BTreeMap<DiskSlot, ending::Record>,
    objects: BTreeMap<BlockKey, Bytes>,
    /// What each peer holds.
    peers: BTreeMap<PeerId, BTreeSet<BlockKey>>,
    peer_leases: BTreeMap<(PeerId, LeaseId), (Vec<BlockKey>, Time)>,
    next_peer_lease: u64,
    engines: BTreeMap<OperationId, Engine>,
    unready_leases: BTreeSet<LeaseId>,
    leases: BTreeMap<LeaseId, Granted>,
    unready_pins: BTreeMap<PinId, (Vec<BlockKey>, Duration)>,
    next_pin: u64,
    /// Pins that were let go of without being in force, and when; in that order.
    early_unpins: Vec<(PinId, Time)>,
    /// What each pin keeps in DRAM, and until when.
    pins: BTreeMap<PinId, (Vec<BlockKey>, Time)>,
    /// The copies that each flush waits for, as far as they have been handed out.
    flushes: BTreeMap<OperationId, Vec<CommandId>>,
    commands: Vec<Command>,
    undrained: BTreeMap<CommandId, Undrained>,
    replayed: Replayed,
    /// The outcomes so far, for the test to look at.
    pub outcomes: Vec<Outcome>,
    /// Everything the manager said, in order, so that two runs can be compared.
    pub log: Vec<String>,
    /// Blocks whose bytes were made to rot somewhere.
    rotten: BTreeSet<BlockKey>,
    /// Blocks of which a write to the disk went wrong.
    torn: BTreeSet<BlockKey>,
    /// Whether the end was asked for, and whether it is reached.
    is_ending: bool,
    retired: bool,
    /// Blocks of which a slot was said to hold the wrong bytes.
    blamed: BTreeSet<BlockKey>,
}

/// The bytes that every good copy of a block has.
#[must_use]
pub fn genuine(key: &BlockKey) -> u32 {
    key.0.iter().fold(17, |sum: u32, byte| {
        sum.wrapping_mul(31).wrapping_add(u32::from(*byte))
    })
}

impl World {
    /// An empty node among these peers, each holding these blocks.
    ///
    /// # Errors
    /// As [`Manager::new`].
    pub fn new(limits: Limits, peers: BTreeMap<PeerId, BTreeSet<BlockKey>>) -> Result<Self> {
        Ok(Self {
            manager: Manager::new(limits.clone())?,
            now: Time(0),
            limits,
            host: BTreeMap::new(),
            disk: BTreeMap::new(),
            objects: BTreeMap::new(),
            peers,
            peer_leases: BTreeMap::new(),
            next_peer_lease: 0,
            engines: BTreeMap::new(),
            unready_leases: BTreeSet::new(),
            leases: BTreeMap::new(),
            unready_pins: BTreeMap::new(),
            // Far from the numbers that tests choose.
            next_pin: 1 << 32,
            early_unpins: Vec::new(),
            pins: BTreeMap::new(),
            flushes: BTreeMap::new(),
            commands: Vec::new(),
            undrained: BTreeMap::new(),
            replayed: Replayed::default(),
            outcomes: Vec::new(),
            log: Vec::new(),
            rotten: BTreeSet::new(),
            torn: BTreeSet::new(),
            is_ending: false,
            retired: false,
            blamed: BTreeSet::new(),
        })
    }

    /// What time it is.
    #[must_use]
    pub fn now(&self) -> Time {
        self.now
    }

    /// How many commands wait to be carried out.
    #[must_use]
    pub fn commands(&self) -> usize {
        self.commands.len()
    }

    /// How many failed transfers have not drained.
    #[must_use]
    pub fn undrained(&self) -> usize {
        self.undrained.len()
    }

    /// The operations that have not ended.
    #[must_use]
    pub fn open_operations(&self) -> Vec<OperationId> {
        let open = self.engines.iter().filter(|(_, engine)| !engine.ended);
        open.map(|(operation, _)| *operation).collect()
    }

    /// The leases that peers hold of this node.
    #[must_use]
    pub fn open_leases(&self) -> Vec<LeaseId> {
        self.leases.keys().copied().collect()
    }

    /// Another node puts a block into the shared object store.
    pub fn put_object(&mut self, key: BlockKey) {
        self.objects.insert(key, genuine(&key));
    }

    /// An engine hands over blocks.
    ///
    /// # Errors
    /// As [`Manager::handle_store`].
    pub fn store(&mut self, blocks: &[BlockInfo], within: Duration) -> Result<OperationId> {
        let deadline = self.now + within;
        let operation = self
            .manager
            .handle_store(self.now, blocks.to_vec(), deadline);
        if let Ok(operation) = &operation {
            let memory = blocks.iter().map(|block| genuine(&block.key)).collect();
            self.begin(*operation, blocks.to_vec(), memory, false);
        }
        self.after();
        operation
    }

    /// An engine asks for blocks.
    ///
    /// # Errors
    /// As [`Manager::handle_fetch`].
    pub fn fetch(&mut self, request: FetchRequest, within: Duration) -> Result<OperationId> {
        let deadline = self.now + within;
        let blocks = request.blocks.clone();
        let operation = self.manager.handle_fetch(self.now, request, deadline);
        if let Ok(operation) = &operation {
            let memory = vec![GARBAGE; blocks.len()];
            self.begin(*operation, blocks, memory, true);
        }
        self.after();
        operation
    }

    fn begin(
        &mut self,
        operation: OperationId,
        blocks: Vec<BlockInfo>,
        memory: Vec<Bytes>,
        is_fetch: bool,
    ) {
        let engine = Engine {
            blocks,
            memory,
            is_fetch,
            unsettled: Vec::new(),
            ended: false,
        };
        let previous = self.engines.insert(operation, engine);
        assert!(
            previous.is_none(),
            "operation {operation} was given out twice"
        );
    }

    /// A peer asks for a lease.
    ///
    /// # Errors
    /// As [`Manager::handle_lease`].
    pub fn lease(&mut self, peer: PeerId, keys: &[BlockKey], ttl: Duration) -> Result<LeaseId> {
        let lease = self.manager.handle_lease(self.now, peer, keys, ttl);
        if let Ok(lease) = &lease {
            self.unready_leases.insert(*lease);
        }
        self.after();
        lease
    }

    /// A peer gives its lease back.
    pub fn release(&mut self, lease: LeaseId) {
        let Some(granted) = self.leases.remove(&lease) else {
            return;
        };
        self.manager.handle_release(self.now, granted.peer, lease);
        self.after();
    }

    /// A peer dies: its leases end, and what it held cannot be read any more.
    pub fn lose_peer(&mut self, peer: PeerId) {
        self.leases.retain(|_, granted| granted.peer != peer);
        self.peers.remove(&peer);
        self.manager.handle_peer_lost(self.now, peer);
        self.after();
    }

    /// An engine withdraws a store or fetch.
    pub fn cancel(&mut self, operation: OperationId) {
        self.manager.handle_cancel(self.now, operation);
        self.after();
    }

    /// Time passes.
    pub fn advance(&mut self, by: Duration) {
        self.now = self.now + by;
        let now = self.now;
        self.leases.retain(|_, granted| granted.until > now);
        self.pins.retain(|_, (_, until)| *until > now);
        self.manager.handle_timeout(now);
        self.after();
    }

    /// Carries out the `pick`-th waiting command; its moves go as `faults` say, the rest of them well.
    pub fn execute(&mut self, pick: usize, faults: &[Fault]) {
        if self.commands.is_empty() {
            return;
        }
        match self.commands.remove(pick % self.commands.len()) {
            Command::Copy { id, moves, .. } => {
                let mut faults = faults.iter().copied().chain(std::iter::repeat(Fault::None));
                let mut unsettled = Vec::new();
                let results = moves
                    .into_iter()
                    .map(|a_move| {
                        let fault = faults.next().unwrap_or(Fault::None);
                        let result = self.carry_out(&a_move, fault);
                        if result.is_err_and(|failure| !failure.settled) {
                            unsettled.push(a_move);
                        }
                        result
                    })
                    .collect();
                if !unsettled.is_empty() {
                    self.undrained.insert(id, Undrained { moves: unsettled });
                }
                self.manager.handle_copied(self.now, id, results);
            }
            Command::Lease {
                id,
                peer,
                keys,
                ttl,
                ..
            } => {
                let fault = faults.first().copied().unwrap_or(Fault::None);
                let result = self.grant(peer, &keys, ttl, fault);
                self.manager.handle_leased(self.now, id, result);
            }
            Command::Release { peer, lease } => {
                self.peer_leases.remove(&(peer, lease));
            }
            Command::DropSegment { id, segment } => {
                let fails = matches!(faults.first(), Some(Fault::Fails(_) | Fault::Unsettled(_)));
                let result = if fails {
                    Err(ErrorKind::Io)
                } else {
                    self.disk.retain(|slot, _| slot.segment != segment);
                    Ok(())
                };
                self.manager.handle_segment_dropped(self.now, id, result);
            }
        }
        self.after();
    }

    /// The `pick`-th failed transfer drains, writing garbage to its targets before.
    pub fn drain(&mut self, pick: usize) {
        let Some(id) = self
            .undrained
            .keys()
            .nth(pick % self.undrained.len().max(1))
            .copied()
        else {
            return;
        };
        if let Some(undrained) = self.undrained.remove(&id) {
            for a_move in &undrained.moves {
                self.write(a_move, GARBAGE);
            }
        }
        self.manager.handle_drained(self.now, id);
        self.after();
    }

    /// Lets everything that is under way end, without faults, and checks that nothing is left.
    ///
    /// # Panics
    /// If something is.
    pub fn finish(&mut self) {
        while self.commands() > 0 || self.undrained() > 0 || self.manager.open_ends() > 0 {
            while self.commands() > 0 {
                self.execute(0, &[]);
            }
            while self.undrained() > 0 {
                self.drain(0);
            }
            if self.manager.open_ends() > 0 && self.commands() == 0 {
                let next = self.manager.poll_timeout();
                assert!(next.is_some(), "something is open that nothing will end");
                self.advance(next.map_or(Duration::ZERO, |next| next - self.now));
            }
        }
        assert_eq!(self.open_operations(), [], "operations without an outcome");
        assert!(self.unready_leases.is_empty(), "leases without an outcome");
        assert!(self.unready_pins.is_empty(), "pins without an outcome");
        assert!(self.flushes.is_empty(), "flushes without an outcome");
        let unsettled = self
            .engines
            .values()
            .any(|engine| !engine.unsettled.is_empty());
        assert!(!unsettled, "engine slots that were never given back");
    }

    /// Takes what the manager has to say, and checks it.
    fn after(&mut self) {
        while let Some(outcome) = self.manager.poll_outcome() {
            self.log.push(format!("{outcome:?}"));
            self.end(outcome);
        }
        while let Some(event) = self.manager.poll_event() {
            self.log.push(format!("{event:?}"));
            self.replayed.apply(&event);
        }
        while let Some(command) = self.manager.poll_command(self.now) {
            self.log.push(format!("{command:?}"));
            self.accept(&command);
            self.commands.push(command);
        }
        self.manager.check_invariants();
        self.check_pins();
        for tier in Tier::ALL {
            let contents = self
                .manager
                .contents(tier)
                .map(|info| info.index_key)
                .collect();
            assert_eq!(
                self.replayed.tier(tier),
                contents,
                "events and contents of {tier}"
            );
        }
    }
}
