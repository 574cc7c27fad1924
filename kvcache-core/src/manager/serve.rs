//! Leases that peers ask of us, and pins: blocks that stay in DRAM for a while.

use std::time::Duration;

use super::job::{Job, Task};
use super::request::{LeasedBlock, Outcome};
use super::space::SlotRequest;
use super::{Manager, Timer};
use crate::error::{Error, ErrorKind, Result};
use crate::id::{LeaseId, PeerId, PinId, Time};
use crate::key::BlockKey;
use crate::place::Tier;
use crate::pool::{Filling, Slot};
use crate::table::{HostCopy, Waiter};

/// A lease of ours: being readied, or running.
#[derive(Debug)]
pub(super) struct Lease {
    pub(super) holder: Holder,
    ttl: Duration,
    /// One a block still hoped for; cut at the first that cannot be had.
    pub(super) steps: Vec<LeaseStep>,
    is_ready: bool,
}

/// For whom blocks are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holder {
    /// A peer, which reads them.
    Peer(PeerId),
    /// Whoever pinned them, under this number.
    Pin(PinId),
}

impl Holder {
    pub(super) fn is_pin(self) -> bool {
        matches!(self, Self::Pin(_))
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) enum LeaseStep {
    /// The block is being brought into DRAM.
    Waits { key: BlockKey, tier: Tier },
    /// The block is in DRAM, and pinned.
    Pinned(LeasedBlock),
}

impl LeaseStep {
    pub(super) fn key(&self) -> &BlockKey {
        match self {
            Self::Waits { key, .. } => key,
            Self::Pinned(block) => &block.key,
        }
    }
}

impl Manager {
    pub(super) fn start_lease(
        &mut self,
        now: Time,
        peer: PeerId,
        keys: &[BlockKey],
        ttl: Duration,
    ) -> Result<LeaseId> {
        self.check_not_retired()?;
        let leases = self.leases.len() - self.pins.len();
        if leases >= self.limits.leases_max as usize {
            self.stats.busy += 1;
            let context = format!("{leases} leases granted, the most allowed");
            return Err(Error::new(ErrorKind::Busy, context));
        }
        let keys = &keys[..keys.len().min(self.limits.lease_blocks_max as usize)];
        let ttl = ttl.min(self.limits.lease_ttl);
        Ok(self.begin_lease(now, Holder::Peer(peer), keys, ttl))
    }

    /// Starts to bring these blocks into DRAM and to keep them there.
    pub(super) fn begin_lease(
        &mut self,
        now: Time,
        holder: Holder,
        keys: &[BlockKey],
        ttl: Duration,
    ) -> LeaseId {
        let id = LeaseId(self.next_lease);
        self.next_lease += 1;
        self.touch(keys);
        let mut steps = Vec::with_capacity(keys.len());
        for key in keys {
            let Some(step) = self.first_lease_step(id, key) else {
                break;
            };
            steps.push(step);
        }
        if let Holder::Pin(pin) = holder {
            self.pins.insert(pin, id);
            self.count_pinned(&steps);
        }
        self.leases.insert(
            id,
            Lease {
                holder,
                ttl,
                steps,
                is_ready: false,
            },
        );
        self.timers
            .set(Timer::Lease(id), now + self.limits.stage_wait);
        self.work.push_back(Waiter::Lease(id));
        id
    }

    /// How the lease gets this block; none when it cannot.
    fn first_lease_step(&mut self, lease: LeaseId, key: &BlockKey) -> Option<LeaseStep> {
        if let Some(pinned) = self.pin_for_lease(key, Tier::Host) {
            return Some(pinned);
        }
        let block = self.table.get_mut(key)?;
        let waiter = Waiter::Lease(lease);
        if block.is_filling() || block.staging {
            let tier = if block.disk.is_some() {
                Tier::Disk
            } else {
                Tier::Host
            };
            block.waiters.push(waiter);
            return Some(LeaseStep::Waits { key: *key, tier });
        }
        block.disk?;
        block.staging = true;
        block.waiters.push(waiter);
        self.wanted.push_back(SlotRequest::Stage(*key));
        Some(LeaseStep::Waits {
            key: *key,
            tier: Tier::Disk,
        })
    }

    fn pin_for_lease(&mut self, key: &BlockKey, tier: Tier) -> Option<LeaseStep> {
        let block = self.table.get(key)?;
        let slot = block.host_place()?;
        let checksum = block.checksum?;
        self.pin_host(key, slot);
        Some(LeaseStep::Pinned(LeasedBlock {
            key: *key,
            slot,
            checksum,
            tier,
        }))
    }

    /// Whether this block still needs a slot to be brought up from disk.
    pub(super) fn needs_stage(&mut self, key: &BlockKey) -> bool {
        let Some(block) = self.table.get_mut(key) else {
            return false;
        };
        if !block.staging || block.is_filling() || block.host_place().is_some() {
            return false;
        }
        if block.disk.is_none() || block.waiters.is_empty() {
            block.staging = false;
            self.wake(key);
            self.table.forget_if_gone(key);
            return false;
        }
        true
    }

    /// The copy that fills the slot with this block.
    pub(super) fn stage_job(&mut self, key: &BlockKey, slot: Slot<Filling>) -> Option<Job> {
        let source = self.table.get(key).and_then(|block| block.disk);
        let used = self.tick();
        let (Some(from), Some(block)) = (source, self.table.get_mut(key)) else {
            self.slots.abandon(slot);
            return None;
        };
        block.host = HostCopy::Filling;
        block.staging = false;
        self.segments.pin(from.segment, used);
        let (info, expected) = (block.info, block.checksum);
        Some(Job {
            info,
            expected,
            task: Task::Stage { from, slot },
        })
    }

    /// Looks again at what the lease waits for; grants it when there is nothing left.
    pub(super) fn advance_lease(&mut self, now: Time, id: LeaseId) {
        let Some(lease) = self.leases.get(&id) else {
            return;
        };
        if lease.is_ready {
            return;
        }
        let mut cut = lease.steps.len();
        let mut waits = false;
        for position in 0..cut {
            let step = self.leases.get(&id).map(|lease| lease.steps[position]);
            let Some(LeaseStep::Waits { key, tier }) = step else {
                continue;
            };
            if let Some(pinned) = self.pin_for_lease(&key, tier) {
                if let Some(lease) = self.leases.get_mut(&id) {
                    lease.steps[position] = pinned;
                }
                continue;
            }
            let Some(block) = self.table.get_mut(&key) else {
                cut = position;
                break;
            };
            if !block.is_filling() && !block.staging {
                cut = position;
                break;
            }
            let waiter = Waiter::Lease(id);
            if !block.waiters.contains(&waiter) {
                block.waiters.push(waiter);
            }
            waits = true;
        }
        self.cut_lease(id, cut);
        if !waits {
            self.grant_lease(now, id);
        }
    }

    /// Gives up the blocks of the lease from this position on.
    fn cut_lease(&mut self, id: LeaseId, position: usize) {
        let Some(lease) = self.leases.get_mut(&id) else {
            return;
        };
        let cut = lease.steps.split_off(position.min(lease.steps.len()));
        if lease.holder.is_pin() {
            self.uncount_pinned(&cut);
        }
        for step in cut {
            match step {
                LeaseStep::Pinned(block) => self.unpin_host(&block.key, block.slot),
                LeaseStep::Waits { key, .. } => {
                    if let Some(block) = self.table.get_mut(&key) {
                        block.waiters.retain(|waiter| *waiter != Waiter::Lease(id));
                    }
                }
            }
        }
    }

    /// The lease runs from now on, with the blocks it has.
    fn grant_lease(&mut self, now: Time, id: LeaseId) {
        let Some(lease) = self.leases.get_mut(&id) else {
            return;
        };
        lease.is_ready = true;
        let blocks: Vec<LeasedBlock> = lease
            .steps
            .iter()
            .map_while(|step| match step {
                LeaseStep::Pinned(block) => Some(*block),
                LeaseStep::Waits { .. } => None,
            })
            .collect();
        let (holder, ttl) = (lease.holder, lease.ttl);
        self.cut_lease(id, blocks.len());
        if blocks.is_empty() {
            self.end_lease(id);
        } else {
            self.timers.set(Timer::Lease(id), now + ttl);
        }
        self.outcomes.push_back(match holder {
            Holder::Peer(peer) => {
                self.stats.leases_granted += u64::from(!blocks.is_empty());
                Outcome::LeaseReady {
                    lease: id,
                    peer,
                    blocks,
                    ttl,
                }
            }
            Holder::Pin(pin) => Outcome::Pinned {
                pin,
                depth: blocks.len() as u32,
            },
        });
    }

    /// The time of readying the lease, or of the lease itself, is over.
    pub(super) fn lease_due(&mut self, now: Time, id: LeaseId) {
        match self.leases.get(&id) {
            Some(lease) if lease.is_ready => {
                match lease.holder {
                    Holder::Peer(_) => self.stats.leases_expired += 1,
                    Holder::Pin(_) => self.stats.pins_expired += 1,
                }
                self.end_lease(id);
            }
            _ => self.grant_lease(now, id),
        }
    }

    /// Nothing is kept for this lease any more.
    fn end_lease(&mut self, id: LeaseId) {
        self.timers.clear(Timer::Lease(id));
        self.cut_lease(id, 0);
        if let Some(Holder::Pin(pin)) = self.leases.remove(&id).map(|lease| lease.holder) {
            self.pins.remove(&pin);
        }
    }

    /// What a lost peer had leased is free.
    pub(super) fn lose_leased(&mut self, now: Time, peer: PeerId) {
        let holder = Holder::Peer(peer);
        let leases = self.leases.iter();
        let lost = leases.filter(|(_, lease)| lease.holder == holder);
        let lost: Vec<LeaseId> = lost.map(|(id, _)| *id).collect();
        for id in lost {
            self.return_lease(now, id, holder);
        }
    }

    /// Its holder does not want the lease any more, ready or not. One that is somebody else's stays.
    pub(super) fn return_lease(&mut self, now: Time, id: LeaseId, holder: Holder) {
        match self.leases.get(&id) {
            Some(lease) if lease.holder != holder => {}
            Some(lease) if lease.is_ready => self.end_lease(id),
            _ => {
                // Whoever waits for it to be ready is told that there is nothing.
                self.cut_lease(id, 0);
                self.grant_lease(now, id);
            }
        }
    }
}
