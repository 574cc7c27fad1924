//! Leases that we ask of peers.

use super::command::{Command, CommandId, GrantedLease};
use super::job::{Ask, Grant, Job, PendingWork, Source, Task};
use super::plan::FetchStep;
use super::{Manager, Timer};
use crate::error::ErrorKind;
use crate::id::{OperationId, PeerId, Time};

impl Manager {
    /// Asks the peer for these blocks of the fetch.
    pub(super) fn ask(
        &mut self,
        now: Time,
        operation: OperationId,
        peer: PeerId,
        positions: Vec<u32>,
    ) {
        let Some(fetch) = self.fetches.get(&operation) else {
            return;
        };
        let keys = positions
            .iter()
            .map(|p| fetch.blocks[*p as usize].key)
            .collect();
        let deadline = fetch.copy_deadline.min(now + self.limits.lease_wait);
        let asked = positions.clone();
        let id = self.enqueue(PendingWork::Ask(Ask {
            operation: Some(operation),
            peer,
            positions,
            keys,
            sent: now,
            deadline,
        }));
        self.timers.set(Timer::Answer(id), deadline);
        self.stats.leases_asked += 1;
        if let Some(fetch) = self.fetches.get_mut(&operation) {
            for position in asked {
                fetch.set_step(position, FetchStep::Asked(id));
            }
        }
    }

    pub(super) fn finish_ask(
        &mut self,
        now: Time,
        id: CommandId,
        result: Result<GrantedLease, ErrorKind>,
    ) {
        let is_ask = |work: &PendingWork| matches!(work, PendingWork::Ask(_));
        let Some(PendingWork::Ask(ask)) = self.take_answered(id, is_ask) else {
            return;
        };
        self.timers.clear(Timer::Answer(id));
        let granted = match result {
            Ok(granted) => granted,
            Err(_) => {
                self.stats.leases_short += 1;
                self.close_ask(id, &ask, 0);
                return;
            }
        };
        let ttl = granted
            .ttl
            .min(self.limits.lease_ttl)
            .saturating_sub(self.limits.lease_margin);
        let usable_until = ask.sent + ttl;
        // One that was given up has no positions left, so there is nothing that its late answer could not fit.
        if ask.operation.is_some() && granted.blocks.len() > ask.positions.len() {
            self.stats.stray_answers += 1;
        }
        if granted.blocks.len() < ask.positions.len() {
            self.stats.leases_short += 1;
        }
        let usable = if usable_until > now {
            granted.blocks.len()
        } else {
            0
        };
        let jobs = self.granted_jobs(id, &ask, &granted, usable);
        let grant = Grant {
            peer: ask.peer,
            lease: granted.lease,
            usable_until,
            open: jobs.len() as u32,
        };
        if jobs.is_empty() {
            self.release(&grant);
        } else {
            self.grants.insert(id, grant);
            let fetch = ask
                .operation
                .and_then(|operation| self.fetches.get(&operation));
            let deadline = fetch
                .map_or(now, |fetch| fetch.copy_deadline)
                .min(usable_until);
            self.submit(ask.operation, jobs, deadline);
        }
        let lacking = ask.positions.get(usable).copied();
        self.close_ask(id, &ask, lacking.unwrap_or(u32::MAX));
    }

    /// The copies that the first `usable` granted blocks allow, of those that are still wanted.
    fn granted_jobs(
        &mut self,
        id: CommandId,
        ask: &Ask,
        granted: &GrantedLease,
        usable: usize,
    ) -> Vec<Job> {
        let Some(operation) = ask.operation else {
            return Vec::new();
        };
        let Some(fetch) = self.fetches.get_mut(&operation) else {
            return Vec::new();
        };
        let mut jobs = Vec::new();
        let blocks = granted.blocks.iter().take(usable).enumerate();
        for ((index, block), &position) in blocks.zip(&ask.positions) {
            if fetch.steps[position as usize] != FetchStep::Asked(id) {
                continue;
            }
            fetch.set_step(position, FetchStep::Moving);
            fetch.moving += 1;
            let source = Source::Peer {
                grant: id,
                peer: ask.peer,
                lease: granted.lease,
                position: index as u32,
                tier: block.tier,
            };
            jobs.push(Job {
                info: fetch.blocks[position as usize],
                expected: Some(block.checksum),
                task: Task::Fetch {
                    operation,
                    position,
                    source,
                },
            });
        }
        jobs
    }

    /// What the ask did not bring is looked for elsewhere; the peer has nothing from `depth` on.
    fn close_ask(&mut self, id: CommandId, ask: &Ask, depth: u32) {
        let Some(operation) = ask.operation else {
            return;
        };
        let Some(fetch) = self.fetches.get_mut(&operation) else {
            return;
        };
        fetch.limit_holder(ask.peer, depth);
        for &position in &ask.positions {
            if fetch.steps[position as usize] == FetchStep::Asked(id) {
                fetch.reopen(position);
                self.stats.replanned += 1;
            }
        }
        self.to_plan.insert(operation);
    }

    /// The answer to a lease request is not waited for any more.
    pub(super) fn give_up_ask(&mut self, id: CommandId) {
        let Some(pending) = self.pending.get_mut(&id) else {
            return;
        };
        let PendingWork::Ask(ask) = &mut pending.work else {
            return;
        };
        let given_up = Ask {
            operation: ask.operation.take(),
            positions: std::mem::take(&mut ask.positions),
            keys: Vec::new(),
            ..*ask
        };
        if !pending.issued {
            self.pending.remove(&id);
        }
        self.timers.clear(Timer::Answer(id));
        self.close_ask(id, &given_up, 0);
    }

    /// What was asked of a lost peer fails.
    pub(super) fn lose_asked(&mut self, peer: PeerId) {
        let is_lost = |work: &PendingWork| match work {
            PendingWork::Ask(ask) => ask.peer == peer,
            PendingWork::Copy { .. } | PendingWork::Drop(_) => false,
        };
        let pending = self
            .pending
            .iter()
            .filter(|(_, pending)| is_lost(&pending.work));
        let lost: Vec<CommandId> = pending.map(|(id, _)| *id).collect();
        for id in lost {
            self.give_up_ask(id);
        }
        for fetch in self.fetches.values_mut() {
            fetch.limit_holder(peer, 0);
        }
    }

    /// The lease is not needed any more.
    pub(super) fn release(&mut self, grant: &Grant) {
        let (peer, lease) = (grant.peer, grant.lease);
        self.releases.push_back(Command::Release { peer, lease });
    }
}
