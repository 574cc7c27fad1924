//! Fetches: from wherever the blocks are into the engine's slots.

use super::command::{CommandId, MoveFailure};
use super::copies::is_source_bad;
use super::job::{Job, PendingWork, Source, Task};
use super::plan::{FetchOperation, FetchStep, Plan};
use super::request::{BlockSource, FetchRequest, Outcome};
use super::{Manager, Timer};
use crate::id::{OperationId, PeerId, Time};
use crate::key::{BlockInfo, BlockKey};
use crate::table::Waiter;

impl Manager {
    pub(super) fn start_fetch(
        &mut self,
        operation: OperationId,
        request: FetchRequest,
        copy_deadline: Time,
    ) {
        let keys: Vec<BlockKey> = request.blocks.iter().map(|block| block.key).collect();
        self.touch(&keys);
        self.fetches
            .insert(operation, FetchOperation::new(request, copy_deadline));
        self.to_plan.insert(operation);
    }

    /// A block that the fetch waited for is sealed, or will not be.
    pub(super) fn reopen_fetch(&mut self, operation: OperationId, position: u32) {
        if let Some(fetch) = self.fetches.get_mut(&operation)
            && fetch.steps[position as usize] == FetchStep::WaitsForSeal
        {
            fetch.reopen(position);
            self.to_plan.insert(operation);
        }
    }

    /// Finds sources for all blocks that need one, and ends the fetches that are done.
    pub(super) fn plan_fetches(&mut self, now: Time) {
        while let Some(operation) = self.to_plan.pop_first() {
            self.plan_fetch(now, operation);
            if self
                .fetches
                .get(&operation)
                .is_some_and(FetchOperation::is_done)
            {
                self.end_fetch(now, operation);
            }
        }
    }

    fn plan_fetch(&mut self, now: Time, operation: OperationId) {
        let mut from_host = Vec::new();
        let mut from_disk = Vec::new();
        let mut from_object = Vec::new();
        let mut asks: Vec<(PeerId, Vec<u32>)> = Vec::new();
        while let Some((position, plan)) = self.plan_next(operation) {
            let Some(fetch) = self.fetches.get_mut(&operation) else {
                return;
            };
            let info = fetch.blocks[position as usize];
            match plan {
                Plan::Copy(source, expected) => {
                    fetch.set_step(position, FetchStep::Moving);
                    fetch.moving += 1;
                    let task = Task::Fetch {
                        operation,
                        position,
                        source,
                    };
                    let job = Job {
                        info,
                        expected,
                        task,
                    };
                    match source {
                        Source::Host(place) => {
                            self.pin_host(&info.key, place);
                            from_host.push(job);
                        }
                        Source::Disk(slot) => {
                            let used = self.tick();
                            self.segments.pin(slot.segment, used);
                            from_disk.push(job);
                        }
                        Source::Object | Source::Peer { .. } => from_object.push(job),
                    }
                }
                Plan::Wait => {
                    fetch.set_step(position, FetchStep::WaitsForSeal);
                    if let Some(block) = self.table.get_mut(&info.key) {
                        block.waiters.push(Waiter::Fetch {
                            operation,
                            position,
                        });
                    }
                }
                Plan::Ask(peer) => match asks.iter_mut().find(|(asked, _)| *asked == peer) {
                    Some((_, positions)) => positions.push(position),
                    None => asks.push((peer, vec![position])),
                },
                Plan::Miss => self.cut_fetch(now, operation, position),
            }
        }
        let Some(fetch) = self.fetches.get(&operation) else {
            return;
        };
        let deadline = fetch.copy_deadline;
        for jobs in [from_host, from_disk, from_object] {
            self.submit(Some(operation), jobs, deadline);
        }
        for (peer, positions) in asks {
            for positions in positions.chunks(self.limits.lease_blocks_max as usize) {
                self.ask(now, operation, peer, positions.to_vec());
            }
        }
    }

    /// The first position that needs a source, and where to take it from.
    fn plan_next(&mut self, operation: OperationId) -> Option<(u32, Plan)> {
        let fetch = self.fetches.get_mut(&operation)?;
        let position = fetch.unplanned.pop_first()?;
        let barred = fetch.barred[position as usize];
        let block = self.table.get(&fetch.blocks[position as usize].key);
        if let Some(block) = block {
            if let Some(place) = block.host_place()
                && !barred.host
            {
                return Some((position, Plan::Copy(Source::Host(place), block.checksum)));
            }
            if let Some(slot) = block.disk
                && !barred.disk
            {
                return Some((position, Plan::Copy(Source::Disk(slot), block.checksum)));
            }
            if block.is_filling() && !barred.host {
                return Some((position, Plan::Wait));
            }
        }
        if let Some(peer) = fetch.holder_of(position) {
            return Some((position, Plan::Ask(peer)));
        }
        let is_shared =
            fetch.is_shared(position) || block.is_some_and(|block| block.object.is_some());
        if is_shared && self.limits.object && !barred.object {
            // Another node may have written the object, with bytes that differ in rounding: its record knows which.
            return Some((position, Plan::Copy(Source::Object, None)));
        }
        Some((position, Plan::Miss))
    }

    pub(super) fn fetch_copied(
        &mut self,
        operation: OperationId,
        position: u32,
        info: &BlockInfo,
        source: Source,
    ) {
        if source == Source::Object {
            self.know_object(info);
        }
        let Some(fetch) = self.fetches.get_mut(&operation) else {
            self.engine_drained(operation, position);
            return;
        };
        fetch.moving -= 1;
        if position < fetch.cut {
            fetch.open -= 1;
            fetch.set_step(position, FetchStep::Done(as_told(source)));
        } else {
            fetch.set_step(position, FetchStep::Missed);
        }
        self.to_plan.insert(operation);
    }

    pub(super) fn fetch_failed(
        &mut self,
        now: Time,
        operation: OperationId,
        position: u32,
        info: &BlockInfo,
        source: Source,
        failure: MoveFailure,
    ) {
        if is_source_bad(failure.kind) {
            self.lose_source(info, source);
        }
        let Some(fetch) = self.fetches.get_mut(&operation) else {
            if failure.settled {
                self.engine_drained(operation, position);
            }
            return;
        };
        fetch.moving -= 1;
        let barred = &mut fetch.barred[position as usize];
        match source {
            Source::Host(_) => barred.host = true,
            Source::Disk(_) => barred.disk = true,
            Source::Object => barred.object = true,
            // Wrong bytes speak of one block; anything else of the way there.
            Source::Peer { peer, .. } if is_source_bad(failure.kind) => {
                fetch.limit_holder(peer, position);
            }
            Source::Peer { peer, .. } => fetch.limit_holder(peer, 0),
        }
        if failure.settled {
            fetch.reopen(position);
            self.stats.replanned += 1;
        } else {
            // Another copy into the same slot could be overwritten by this one.
            fetch.unsettled.insert(position);
            self.cut_fetch(now, operation, position);
            if let Some(fetch) = self.fetches.get_mut(&operation) {
                fetch.set_step(position, FetchStep::Missed);
            }
        }
        self.to_plan.insert(operation);
    }

    fn lose_source(&mut self, info: &BlockInfo, source: Source) {
        match source {
            Source::Host(place) => self.lose_host(&info.key, place),
            Source::Disk(slot) => self.lose_corrupt_disk(&info.key, slot),
            Source::Object => {
                self.stats.corrupt += 1;
                self.lose_object(info);
            }
            Source::Peer { .. } => self.stats.corrupt += 1,
        }
    }

    /// Everything from this position on is a miss; copies that the driver has not got are taken back.
    fn cut_fetch(&mut self, now: Time, operation: OperationId, position: u32) {
        let Some(fetch) = self.fetches.get_mut(&operation) else {
            return;
        };
        fetch.cut_at(position);
        for id in fetch.copies.clone() {
            self.withdraw_fetch_copies(now, operation, id, position);
        }
    }

    /// Takes back the copies of blocks from `position` on, if the driver has not got the command yet.
    fn withdraw_fetch_copies(
        &mut self,
        now: Time,
        operation: OperationId,
        id: CommandId,
        position: u32,
    ) {
        let Some(pending) = self.pending.get_mut(&id) else {
            return;
        };
        let PendingWork::Copy { jobs, .. } = &mut pending.work else {
            return;
        };
        if pending.issued {
            return;
        }
        let is_useless = |job: &Job| match job.task {
            Task::Fetch {
                position: other, ..
            } => other >= position,
            _ => false,
        };
        let (useless, useful): (Vec<Job>, Vec<Job>) =
            std::mem::take(jobs).into_iter().partition(is_useless);
        let is_empty = useful.is_empty();
        *jobs = useful;
        if is_empty {
            self.pending.remove(&id);
        }
        for job in useless {
            let Task::Fetch {
                position, source, ..
            } = job.task
            else {
                continue;
            };
            self.release_source(now, &job.info.key, source);
            if let Some(fetch) = self.fetches.get_mut(&operation) {
                fetch.moving -= 1;
                fetch.set_step(position, FetchStep::Missed);
                if is_empty {
                    fetch.copies.remove(&id);
                }
            }
        }
    }

    /// Ends the fetch: what is not there is a miss, and slots that transfers are still at work on are named.
    pub(super) fn end_fetch(&mut self, now: Time, operation: OperationId) {
        let Some(fetch) = self.fetches.get(&operation) else {
            return;
        };
        let first_open = fetch
            .steps
            .iter()
            .position(|step| !matches!(step, FetchStep::Done(_)));
        let first_open = first_open.unwrap_or(fetch.steps.len()) as u32;
        self.cut_fetch(now, operation, first_open);
        let Some(mut fetch) = self.fetches.remove(&operation) else {
            return;
        };
        self.timers.clear(Timer::Operation(operation));
        self.to_plan.remove(&operation);
        for (position, step) in fetch.steps.iter().enumerate() {
            if *step == FetchStep::Moving {
                fetch.unsettled.insert(position as u32);
            }
        }
        let asks = self
            .pending
            .iter()
            .filter(|(_, pending)| match &pending.work {
                PendingWork::Ask(ask) => ask.operation == Some(operation),
                PendingWork::Copy { .. } | PendingWork::Drop(_) => false,
            });
        let asks: Vec<CommandId> = asks.map(|(id, _)| *id).collect();
        for id in asks {
            self.give_up_ask(id);
        }
        if !fetch.unsettled.is_empty() {
            self.drains.insert(operation, fetch.unsettled.len() as u32);
        }
        let sources = fetch.sources();
        self.count_sources(&sources);
        let unsettled = fetch.unsettled.into_iter().collect();
        self.outcomes.push_back(Outcome::Fetched {
            operation,
            sources,
            unsettled,
        });
    }

    fn count_sources(&mut self, sources: &[BlockSource]) {
        for source in sources {
            *match source {
                BlockSource::Host => &mut self.stats.fetched_host,
                BlockSource::Disk => &mut self.stats.fetched_disk,
                BlockSource::Peer { .. } => &mut self.stats.fetched_peer,
                BlockSource::Object => &mut self.stats.fetched_object,
                BlockSource::Miss => &mut self.stats.missed,
            } += 1;
        }
    }

    /// No transfer is at work on this engine slot any more.
    pub(super) fn engine_drained(&mut self, operation: OperationId, position: u32) {
        if let Some(fetch) = self.fetches.get_mut(&operation) {
            fetch.unsettled.remove(&position);
        } else if let Some(open) = self.drains.get_mut(&operation) {
            *open -= 1;
            if *open == 0 {
                self.drains.remove(&operation);
                self.outcomes.push_back(Outcome::Drained { operation });
            }
        }
    }

    /// The copy from this source has ended. Whether it ended while the source was still ours to read.
    pub(super) fn release_source(&mut self, now: Time, key: &BlockKey, source: Source) -> bool {
        match source {
            Source::Host(place) => self.unpin_host(key, place),
            Source::Disk(slot) => self.segments.unpin(slot.segment),
            Source::Object => {}
            Source::Peer { grant: id, .. } => {
                let Some(grant) = self.grants.get_mut(&id) else {
                    return false;
                };
                grant.open -= 1;
                let in_time = now <= grant.usable_until;
                if grant.open == 0
                    && let Some(grant) = self.grants.remove(&id)
                {
                    self.release(&grant);
                }
                return in_time;
            }
        }
        true
    }
}

fn as_told(source: Source) -> BlockSource {
    match source {
        Source::Host(_) => BlockSource::Host,
        Source::Disk(_) => BlockSource::Disk,
        Source::Peer { peer, tier, .. } => BlockSource::Peer { peer, tier },
        Source::Object => BlockSource::Object,
    }
}
