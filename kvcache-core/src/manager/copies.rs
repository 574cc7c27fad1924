//! Commands under way: queueing, handing out, answers, draining.

use super::Manager;
use super::command::{Command, CommandId, MoveFailure};
use super::job::{Holding, Job, Pending, PendingWork, Source, Task};
use crate::error::ErrorKind;
use crate::id::{OperationId, Time};
use crate::key::{BlockKey, Checksum};
use crate::place::{HostSlot, SegmentId};
use crate::pool::{Filling, Slot};

impl Manager {
    /// Queues copies, all for one purpose, in commands of at most `batch_blocks_max`.
    pub(super) fn submit(
        &mut self,
        operation: Option<OperationId>,
        jobs: Vec<Job>,
        deadline: Time,
    ) {
        let mut jobs = jobs.into_iter().peekable();
        while jobs.peek().is_some() {
            let jobs = jobs
                .by_ref()
                .take(self.limits.batch_blocks_max as usize)
                .collect();
            let id = self.enqueue(PendingWork::Copy {
                operation,
                jobs,
                deadline,
            });
            let copies = match operation {
                Some(operation) if self.stores.contains_key(&operation) => self
                    .stores
                    .get_mut(&operation)
                    .map(|store| &mut store.copies),
                Some(operation) => self
                    .fetches
                    .get_mut(&operation)
                    .map(|fetch| &mut fetch.copies),
                None => None,
            };
            if let Some(copies) = copies {
                copies.insert(id);
            }
        }
    }

    /// Queues a command; copies that nobody waits for go behind.
    pub(super) fn enqueue(&mut self, work: PendingWork) -> CommandId {
        let id = CommandId(self.next_command);
        self.next_command += 1;
        if work.is_background() {
            self.ready_background.push_back(id);
        } else {
            self.ready.push_back(id);
        }
        self.pending.insert(
            id,
            Pending {
                issued: false,
                work,
            },
        );
        id
    }

    /// Background copies queued or with the driver.
    pub(super) fn background_open(&self) -> u32 {
        self.ready_background.len() as u32 + self.background_in_flight
    }

    pub(super) fn next_command(&mut self, now: Time) -> Option<Command> {
        if let Some(release) = self.releases.pop_front() {
            return Some(release);
        }
        while self.in_flight < self.limits.commands_in_flight_max {
            let background = self.background_in_flight < self.limits.background_in_flight_max;
            let id = match self.ready.pop_front() {
                Some(id) => id,
                None if background => self.ready_background.pop_front()?,
                None => return None,
            };
            // Withdrawn commands leave their numbers behind.
            let Some(pending) = self.pending.get_mut(&id) else {
                continue;
            };
            pending.issued = true;
            self.in_flight += 1;
            if pending.work.is_background() {
                self.background_in_flight += 1;
            }
            return Some(match &mut pending.work {
                PendingWork::Copy { jobs, deadline, .. } => Command::Copy {
                    id,
                    moves: jobs.iter().map(Job::as_move).collect(),
                    deadline: *deadline,
                },
                PendingWork::Ask(ask) => {
                    ask.sent = now;
                    Command::Lease {
                        id,
                        peer: ask.peer,
                        keys: ask.keys.clone(),
                        ttl: self.limits.lease_ttl,
                        deadline: ask.deadline,
                    }
                }
                PendingWork::Drop(segment) => Command::DropSegment {
                    id,
                    segment: *segment,
                },
            });
        }
        None
    }

    /// Takes an answered command out; none, and counted, when no such command was handed out.
    pub(super) fn take_answered(
        &mut self,
        id: CommandId,
        fits: impl FnOnce(&PendingWork) -> bool,
    ) -> Option<PendingWork> {
        let expected = self
            .pending
            .get(&id)
            .is_some_and(|p| p.issued && fits(&p.work));
        if !expected {
            self.stats.stray_answers += 1;
            return None;
        }
        let pending = self.pending.remove(&id)?;
        self.in_flight -= 1;
        if pending.work.is_background() {
            self.background_in_flight -= 1;
        }
        Some(pending.work)
    }

    pub(super) fn finish_copy(
        &mut self,
        now: Time,
        id: CommandId,
        results: Vec<Result<Checksum, MoveFailure>>,
    ) {
        let is_copy = |work: &PendingWork| matches!(work, PendingWork::Copy { .. });
        let Some(PendingWork::Copy {
            operation, jobs, ..
        }) = self.take_answered(id, is_copy)
        else {
            return;
        };
        self.advance_flushes(id);
        if results.len() != jobs.len() {
            self.stats.stray_answers += 1;
        }
        if let Some(operation) = operation {
            self.forget_copy(operation, id);
        }
        let mut holdings = Vec::new();
        let mut results = results.into_iter();
        for job in jobs {
            // A move without an answer may still be at work.
            let unanswered = Err(MoveFailure::unsettled(ErrorKind::Internal));
            match checked(&job, results.next().unwrap_or(unanswered)) {
                Ok(checksum) => self.complete(now, job, checksum),
                Err(failure) => self.fail(now, job, failure, &mut holdings),
            }
        }
        if !holdings.is_empty() {
            self.draining.insert(id, holdings);
        }
    }

    fn forget_copy(&mut self, operation: OperationId, id: CommandId) {
        if let Some(store) = self.stores.get_mut(&operation) {
            store.copies.remove(&id);
        } else if let Some(fetch) = self.fetches.get_mut(&operation) {
            fetch.copies.remove(&id);
        }
    }

    fn complete(&mut self, now: Time, job: Job, checksum: Checksum) {
        let Job { info, task, .. } = job;
        match task {
            Task::Store {
                operation,
                position,
                slot,
            } => {
                self.store_copied(operation, position, &info, slot, checksum);
            }
            Task::Stage { from, slot } => {
                self.segments.unpin(from.segment);
                self.stats.staged += 1;
                self.seal(&info, slot, checksum);
            }
            Task::Fetch {
                operation,
                position,
                source,
            } => {
                let in_time = self.release_source(now, &info.key, source);
                if in_time {
                    self.fetch_copied(operation, position, &info, source);
                } else {
                    let failure = MoveFailure::settled(ErrorKind::Timeout);
                    self.fetch_failed(now, operation, position, &info, source, failure);
                }
            }
            Task::DemoteDisk { from, to } => {
                self.segments.unpin(to.segment);
                self.stats.demoted_disk += 1;
                self.place_on_disk(&info, to, checksum);
                self.left_host(&info.key, from);
            }
            Task::DemoteObject { from } => {
                self.stats.demoted_object += 1;
                self.know_object(&info);
                self.left_host(&info.key, from);
            }
            Task::Rescue { from } => {
                self.segments.unpin(from.segment);
                self.stats.rescued += 1;
                self.know_object(&info);
                self.rescue_ended(from.segment);
            }
        }
    }

    fn fail(&mut self, now: Time, job: Job, failure: MoveFailure, holdings: &mut Vec<Holding>) {
        if !failure.settled {
            self.stats.unsettled += 1;
        }
        let Job { info, task, .. } = job;
        let settled = failure.settled;
        match task {
            Task::Store {
                operation,
                position,
                slot,
            } => {
                self.let_go_slot(slot, settled, holdings);
                self.fill_failed(&info.key);
                self.store_failed(operation, position);
            }
            Task::Stage { from, slot } => {
                self.let_go_slot(slot, settled, holdings);
                self.let_go_segment(from.segment, settled, holdings);
                if is_source_bad(failure.kind) {
                    self.lose_corrupt_disk(&info.key, from);
                }
                self.fill_failed(&info.key);
            }
            Task::Fetch {
                operation,
                position,
                source,
            } => {
                self.let_go_source(now, &info.key, source, settled, holdings);
                if !settled {
                    holdings.push(Holding::Engine {
                        operation,
                        position,
                    });
                }
                self.fetch_failed(now, operation, position, &info, source, failure);
            }
            Task::DemoteDisk { from, to } => {
                self.let_go_segment(to.segment, settled, holdings);
                self.demotion_failed(&info.key, from, failure, holdings);
                if !is_source_bad(failure.kind) {
                    self.stop_disk(now);
                }
            }
            Task::DemoteObject { from } => {
                self.demotion_failed(&info.key, from, failure, holdings);
                if !is_source_bad(failure.kind) {
                    self.stop_object(now);
                }
            }
            Task::Rescue { from } => {
                self.let_go_segment(from.segment, settled, holdings);
                if is_source_bad(failure.kind) {
                    self.lose_corrupt_disk(&info.key, from);
                } else {
                    self.stop_object(now);
                }
                self.rescue_ended(from.segment);
            }
        }
    }

    /// Everything that the command kept is free.
    pub(super) fn drain(&mut self, id: CommandId) {
        let Some(holdings) = self.draining.remove(&id) else {
            self.stats.stray_answers += 1;
            return;
        };
        for holding in holdings {
            match holding {
                Holding::Quarantine(slot) => self.slots.readmit(slot),
                Holding::HostPin(key, place) => self.unpin_host(&key, place),
                Holding::SegmentPin(segment) => self.segments.unpin(segment),
                Holding::Engine {
                    operation,
                    position,
                } => self.engine_drained(operation, position),
            }
        }
    }

    fn let_go_slot(&mut self, slot: Slot<Filling>, settled: bool, holdings: &mut Vec<Holding>) {
        if settled {
            self.slots.abandon(slot);
        } else {
            holdings.push(Holding::Quarantine(self.slots.quarantine(slot)));
        }
    }

    fn let_go_segment(&mut self, id: SegmentId, settled: bool, holdings: &mut Vec<Holding>) {
        if settled {
            self.segments.unpin(id);
        } else {
            holdings.push(Holding::SegmentPin(id));
        }
    }

    pub(super) fn let_go_host(
        &mut self,
        key: &BlockKey,
        place: HostSlot,
        settled: bool,
        holdings: &mut Vec<Holding>,
    ) {
        if settled {
            self.unpin_host(key, place);
        } else {
            holdings.push(Holding::HostPin(*key, place));
        }
    }

    fn let_go_source(
        &mut self,
        now: Time,
        key: &BlockKey,
        source: Source,
        settled: bool,
        holdings: &mut Vec<Holding>,
    ) {
        match source {
            Source::Host(place) => self.let_go_host(key, place, settled, holdings),
            Source::Disk(slot) => self.let_go_segment(slot.segment, settled, holdings),
            // A lease that ends under a reader costs it a checksum failure at most.
            Source::Peer { .. } | Source::Object => {
                self.release_source(now, key, source);
            }
        }
    }
}

/// The result, after a second look at the checksum: a driver that forgets to compare must not cost a wrong byte.
fn checked(job: &Job, result: Result<Checksum, MoveFailure>) -> Result<Checksum, MoveFailure> {
    match (result, job.expected) {
        (Ok(checksum), Some(expected)) if checksum != expected => {
            Err(MoveFailure::settled(ErrorKind::Corrupt))
        }
        (result, _) => result,
    }
}

/// Whether the failure says that the source does not have the right bytes.
pub(super) fn is_source_bad(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::Corrupt | ErrorKind::NotFound)
}
